"""The network as a plan: a tuple of layers that names its tensors, without any weights.

The same plan is run by PyTorch for training and written as ONNX by `tools.training.export`, so that what is trained is
what is shipped. Every convolution of the trunk is convolution + batch norm + ReLU, which folds into one integer
convolution.

Output of a cell: for each class a quality score (logit) and the logarithms of the distances, in strides, from the
cell's centre to the left, top, right and bottom side. Classes do not compete for a cell: a face and the person who
wears it may share one, and the loss of a class that a source did not label is simply left out.
"""

from __future__ import annotations

from dataclasses import dataclass

STRIDES = (8, 16, 32)
VALUES_PER_CLASS = 5  # score, left, top, right, bottom


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

    @property
    def deepens(self) -> bool:
        """Whether it may begin as the identity: as wide as what it takes, which is not negative, and as large."""
        return self.relu and self.inputs == self.outputs and self.kernel == 3 and self.stride == 1


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
CHANNELS = 3  # of a picture
MIDDLE = 128  # of a sample: chroma without colour, what is subtracted from luma too, and what the border is padded with


def head_names() -> tuple[str, ...]:
    """The tensors that are the network's output, by rising stride."""
    return tuple(f"out{stride}" for stride in STRIDES)


def plan(shape: Shape) -> tuple[Layer, ...]:
    """The layers of a shape in the order in which they run."""
    return (*_trunk(shape), *_neck(shape), *_heads(shape))


def _trunk(shape: Shape) -> list[Layer]:
    layers: list[Layer] = [Conv(name="stem", source=INPUT, inputs=CHANNELS, outputs=shape.widths[0], stride=2)]
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
