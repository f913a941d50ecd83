"""The network in PyTorch: it runs a plan, anchor-free, with cells of strides 8, 16 and 32."""

# torch is read as if it were absent (pyproject.toml).
# mypy: disable-error-code="misc, no-any-return"

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from tools.training.layers import CEILING, INPUT, MIDDLE, Concat, Conv, Layer, Pool, Sum
from tools.training.plan import Shape, head_names, plan

GREY = MIDDLE / 255  # what lies beyond the picture
PRIOR = 0.01  # initial score of every cell, as in focal loss (arXiv 1708.02002, 4.1)


class Network(nn.Module):
    """Runs a plan. Input (B, 3, H, W) in 0..1 with H and W multiples of 32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = plan(shape)
        self.convs = nn.ModuleDict({layer.name: _module(layer) for layer in self.layers if isinstance(layer, Conv)})
        self.kept: set[str] = set()
        self.keep(layer.name for layer in self.layers if isinstance(layer, Conv) and layer.borrowed)
        for name in head_names():
            _start_head(self.convs[name].conv, shape.classes)

    def keep(self, names: Iterable[str]) -> None:
        """Leave the weights and norms of these convolutions as they are from now on."""
        self.kept |= set(names)
        for name in self.kept:
            self.convs[name].eval().requires_grad_(requires_grad=False)

    def borrow(self, weights: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        """Take weight and bias of borrowed convolutions by name, for RGB in 0..1."""
        with torch.no_grad():
            for name, (weight, bias) in weights.items():
                self.convs[name].conv.weight.copy_(torch.from_numpy(weight.copy()))
                self.convs[name].conv.bias.copy_(torch.from_numpy(bias.copy()))

    def train(self, mode: bool = True) -> Network:  # noqa: FBT001, FBT002 - as torch has it
        """What is kept stays in evaluation."""
        super().train(mode)
        self.keep(())
        return self

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
            result: Tensor = self.convs[layer.name](_seen(layer, known[layer.source]))
            return result
        if isinstance(layer, Pool):
            return functional.max_pool2d(known[layer.source], 5, 1, 2)
        if isinstance(layer, Concat):
            return torch.cat([known[name] for name in layer.sources], dim=1)
        if isinstance(layer, Sum):
            total = known[layer.parts[0]] + known[layer.parts[1]]
            return functional.relu(total) if layer.relu else total
        return functional.relu(known[layer.lateral] + functional.interpolate(known[layer.deeper], scale_factor=2.0))


def _seen(layer: Conv, tensor: Tensor) -> Tensor:
    """What a convolution takes: the picture with mid-grey around it, as the shipped file has it; others bring zeros."""
    if layer.source == INPUT:
        return functional.pad(tensor, [*layer.border] * 2, value=GREY)
    return functional.pad(tensor, [*layer.border] * 2) if _uneven(layer) else tensor


def _uneven(layer: Conv) -> bool:
    """Whether a border of the same width on all sides would move the result."""
    before, after = layer.border
    return after > before


def _module(layer: Conv) -> nn.Sequential:
    """`conv`, and with ReLU also `relu`, with a norm also `norm`, as named children."""
    sequence = nn.Sequential()
    padding = 0 if layer.source == INPUT or _uneven(layer) else layer.border[0]
    bias = not layer.normed
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, padding, groups=layer.groups, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if layer.deepens:
        _lean_to_identity(conv)
    if layer.silent:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    sequence.add_module("conv", conv)
    if layer.normed:
        sequence.add_module("norm", nn.BatchNorm2d(layer.outputs))
    if layer.relu:
        sequence.add_module("relu", nn.Hardtanh(0.0, CEILING) if layer.borrowed else nn.ReLU(inplace=False))
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
