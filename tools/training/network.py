"""The network: plain 3x3 convolutions with ReLU, strides 8, 16 and 32, anchor-free, one box per class and cell.

A network is a plan, a tuple of layers that names its tensors; the same plan is run by PyTorch for training and written
as ONNX by `tools.training.export`, so that what is trained is what is shipped. Every convolution of the trunk is
convolution + batch norm + ReLU, which folds into one integer convolution.

Output of a cell: for each class a quality score (logit) and the logarithms of the distances, in strides, from the
cell's centre to the left, top, right and bottom side. Classes do not compete for a cell: a face and the person who
wears it may share one, and the loss of a class that a source did not label is simply left out.
"""

# torch is loosely typed, and absent where nobody trains: the file has to pass in both cases.
# mypy: disable-error-code="misc, no-any-return, arg-type, index, assignment, union-attr"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDES = (8, 16, 32)
VALUES_PER_CLASS = 5  # score, left, top, right, bottom
PRIOR = 0.01  # initial score of every cell, as in focal loss (arXiv 1708.02002, 4.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths and depths: `widths` of strides 2, 4, 8, 16, 32; `blocks` extra convolutions at 4, 8, 16, 32."""

    widths: tuple[int, int, int, int, int] = (8, 24, 48, 96, 128)
    blocks: tuple[int, int, int, int] = (0, 2, 2, 2)
    neck: int = 48
    classes: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """Square convolution; with `relu` also batch norm before it while training."""

    name: str
    source: str
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    relu: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Maximum over 5x5 cells, stride 1: widens the view without weights."""

    name: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat:
    """Channels of all sources, in order."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """ReLU of a lateral map plus the deeper map enlarged twice by repetition."""

    name: str
    lateral: str
    deeper: str


Layer = Conv | Pool | Concat | Merge
INPUT = "picture"


def head_names() -> tuple[str, ...]:
    """The tensors that are the network's output, by rising stride."""
    return tuple(f"out{stride}" for stride in STRIDES)


def plan(shape: Shape) -> tuple[Layer, ...]:
    """The layers of a shape in the order in which they run."""
    return (*_trunk(shape), *_neck(shape), *_heads(shape))


def _trunk(shape: Shape) -> list[Layer]:
    layers: list[Layer] = [Conv(name="stem", source=INPUT, inputs=3, outputs=shape.widths[0], stride=2)]
    last, width = "stem", shape.widths[0]
    for index, (outputs, extra) in enumerate(zip(shape.widths[1:], shape.blocks, strict=True)):
        for step in range(extra + 1):
            name = f"s{4 << index}_{step}"
            layers.append(Conv(name=name, source=last, inputs=width, outputs=outputs, stride=1 if step else 2))
            last, width = name, outputs
    layers.append(Pool(name="view1", source=last))
    layers.append(Pool(name="view2", source="view1"))
    layers.append(Concat(name="views", sources=(last, "view1", "view2")))
    layers.append(Conv(name="deep", source="views", inputs=3 * width, outputs=width, kernel=1))
    return layers


def _neck(shape: Shape) -> list[Layer]:
    neck, widths, blocks = shape.neck, shape.widths, shape.blocks
    return [
        Conv(name="p32", source="deep", inputs=widths[4], outputs=neck, kernel=1),
        Conv(name="lat16", source=f"s16_{blocks[2]}", inputs=widths[3], outputs=neck, kernel=1, relu=False),
        Merge(name="p16", lateral="lat16", deeper="p32"),
        Conv(name="lat8", source=f"s8_{blocks[1]}", inputs=widths[2], outputs=neck, kernel=1, relu=False),
        Merge(name="p8", lateral="lat8", deeper="p16"),
    ]


def _heads(shape: Shape) -> list[Layer]:
    layers: list[Layer] = []
    for stride, out in zip(STRIDES, head_names(), strict=True):
        layers.append(Conv(name=f"head{stride}", source=f"p{stride}", inputs=shape.neck, outputs=shape.neck))
        values = shape.classes * VALUES_PER_CLASS
        layers.append(
            Conv(name=out, source=f"head{stride}", inputs=shape.neck, outputs=values, kernel=1, relu=False),
        )
    return layers


class Network(nn.Module):
    """Runs a plan. Input (B, 3, H, W) in 0..1 with H and W multiples of 32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = plan(shape)
        self.convs = nn.ModuleDict({layer.name: _module(layer) for layer in self.layers if isinstance(layer, Conv)})
        for name in head_names():
            _start_head(self.convs[name].conv, shape.classes)

    def tensors(self, picture: Tensor) -> dict[str, Tensor]:
        """Every tensor of the plan by name: what calibration looks at."""
        known = {INPUT: picture}
        for layer in self.layers:
            known[layer.name] = self._run(layer, known)
        return known

    def forward(self, picture: Tensor) -> Tensor:
        """Cells of all strides, (B, N, classes * 5): scores of all classes, then four distances for each class."""
        known = self.tensors(picture)
        return torch.cat([known[name].flatten(2) for name in head_names()], dim=2).transpose(1, 2)

    def _run(self, layer: Layer, known: dict[str, Tensor]) -> Tensor:
        if isinstance(layer, Conv):
            result: Tensor = self.convs[layer.name](known[layer.source])
            return result
        if isinstance(layer, Pool):
            return functional.max_pool2d(known[layer.source], 5, 1, 2)
        if isinstance(layer, Concat):
            return torch.cat([known[name] for name in layer.sources], dim=1)
        return functional.relu(known[layer.lateral] + functional.interpolate(known[layer.deeper], scale_factor=2.0))


def _module(layer: Conv) -> nn.Sequential:
    """`conv`, and with ReLU also `norm` and `relu`, as named children."""
    sequence = nn.Sequential()
    padding = layer.kernel // 2
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, padding, bias=not layer.relu)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if layer.inputs == layer.outputs and layer.kernel == 3:
        _lean_to_identity(conv)
    sequence.add_module("conv", conv)
    if layer.relu:
        sequence.add_module("norm", nn.BatchNorm2d(layer.outputs))
        sequence.add_module("relu", nn.ReLU(inplace=False))
    return sequence


def _lean_to_identity(conv: nn.Conv2d) -> None:
    """Start as half noise, half identity, which trains like a residual layer and costs nothing at run time."""
    with torch.no_grad():
        identity = torch.empty_like(conv.weight)
        nn.init.dirac_(identity)
        conv.weight.mul_(0.5).add_(identity)


def _start_head(conv: nn.Conv2d, classes: int) -> None:
    """Scores start at the prior, distances at two strides."""
    nn.init.normal_(conv.weight, std=0.01)
    with torch.no_grad():
        conv.bias[:classes] = -math.log((1 - PRIOR) / PRIOR)
        conv.bias[classes:] = math.log(2.0)


def folded(network: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of every convolution with its batch norm folded in, by layer name."""
    result = {}
    for name, module in network.convs.items():
        conv: nn.Conv2d = module.conv
        norm = getattr(module, "norm", None)
        if norm is None:
            result[name] = (conv.weight.detach().clone(), conv.bias.detach().clone())
            continue
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = conv.weight * gain[:, None, None, None]
        result[name] = (weight.detach().clone(), (norm.bias - norm.running_mean * gain).detach().clone())
    return result
