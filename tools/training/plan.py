"""The network as a plan: a tuple of layers that names its tensors, without any weights.

The same plan is run by PyTorch for training and written as ONNX by `tools.training.export`, so that what is trained is
what is shipped. Every convolution of the trunk is convolution + batch norm + ReLU, which folds into one integer
convolution. Beside the trunk, a borrowed one looks at half the picture's size (`tools.training.efficientnet`).

Output of a cell: for each class a quality score (logit) and the logarithms of the distances, in strides, from the
cell's centre to the left, top, right and bottom side. Classes do not compete for a cell: a face and the person who
wears it may share one, and the loss of a class that a source did not label is simply left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.training.efficientnet import AT_16, AT_32, WIDTH_AT_16, WIDTH_AT_32, trunk
from tools.training.layers import CHANNELS, INPUT, Concat, Conv, Layer, Merge, Pool, Sum

STRIDES = (8, 16, 32)
JOINED = (16, 32)  # those at which the borrowed trunk has a say
VALUES_PER_CLASS = 5  # score, left, top, right, bottom


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths and depths: `widths` of strides 2, 4, 8, 16, 32; `blocks` extra convolutions at 4, 8, 16, 32.

    `beside` is the width of what is made of the borrowed trunk; 0 leaves it out.
    """

    widths: tuple[int, int, int, int, int] = (8, 24, 48, 96, 128)
    blocks: tuple[int, int, int, int] = (0, 2, 2, 2)
    neck: int = 48
    beside: int = 64
    classes: int = 3


def head_names() -> tuple[str, ...]:
    """The tensors that are the network's output, by rising stride."""
    return tuple(f"out{stride}" for stride in STRIDES)


def plan(shape: Shape) -> tuple[Layer, ...]:
    """The layers of a shape in the order in which they run."""
    return (*_trunk(shape), *beside_layers(shape), *_neck(shape), *_heads(shape))


def beside_layers(shape: Shape) -> list[Layer]:
    """The borrowed trunk and what is made of it for strides 16 and 32: nothing at first, for `see` is silent."""
    wide = shape.beside
    if not wide:
        return []
    return [
        *trunk(),
        Conv(name="far32_0", source=AT_32, inputs=WIDTH_AT_32, outputs=wide),
        Conv(name="far32_1", source="far32_0", inputs=wide, outputs=wide),
        Conv(name="see32", source="far32_1", inputs=wide, outputs=shape.neck, kernel=1, relu=False, silent=True),
        Conv(name="far16_0", source=AT_16, inputs=WIDTH_AT_16, outputs=wide, kernel=1, relu=False),
        Merge(name="far16_1", lateral="far16_0", deeper="far32_1"),
        Conv(name="far16_2", source="far16_1", inputs=wide, outputs=wide),
        Conv(name="see16", source="far16_2", inputs=wide, outputs=shape.neck, kernel=1, relu=False, silent=True),
        Conv(name="say32", source="far32_1", inputs=wide, outputs=wide),
        Conv(name="say16", source="far16_2", inputs=wide, outputs=wide),
    ]


def trunk_names(shape: Shape, stride: int) -> list[str]:
    """The convolutions of the own trunk up to a stride."""
    stages = {2: "stem", 4: "s4_", 8: "s8_", 16: "s16_", 32: "s32_"}
    kept = tuple(stage for one, stage in stages.items() if one <= stride)
    return [layer.name for layer in _trunk(shape) if layer.name.startswith(kept)]


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
        *_joined(shape, 32),
        Conv(name="lat16", source=f"s16_{blocks[2]}", inputs=widths[3], outputs=neck, kernel=1, relu=False),
        Merge(name="p16", lateral="lat16", deeper=_neck_name(shape, 32)),
        *_joined(shape, 16),
        Conv(name="lat8", source=f"s8_{blocks[1]}", inputs=widths[2], outputs=neck, kernel=1, relu=False),
        Merge(name="p8", lateral="lat8", deeper=_neck_name(shape, 16)),
    ]


def _is_joined(shape: Shape, stride: int) -> bool:
    """Whether the borrowed trunk has a say at this stride."""
    return shape.beside > 0 and stride in JOINED


def _joined(shape: Shape, stride: int) -> list[Layer]:
    """What was seen beside, added to the neck's map of a stride."""
    both = Sum(name=_neck_name(shape, stride), parts=(f"p{stride}", f"see{stride}"))
    return [both] if _is_joined(shape, stride) else []


def _neck_name(shape: Shape, stride: int) -> str:
    """The neck's map of a stride, with what was seen beside it."""
    return f"both{stride}" if _is_joined(shape, stride) else f"p{stride}"


def _heads(shape: Shape) -> list[Layer]:
    layers: list[Layer] = []
    for stride, out in zip(STRIDES, head_names(), strict=True):
        neck = _neck_name(shape, stride)
        layers.append(Conv(name=f"head{stride}", source=neck, inputs=shape.neck, outputs=shape.neck))
        values, source, inputs = shape.classes * VALUES_PER_CLASS, f"head{stride}", shape.neck
        if _is_joined(shape, stride):
            layers.append(Concat(name=f"heads{stride}", sources=(source, f"say{stride}")))
            source, inputs = f"heads{stride}", shape.neck + shape.beside
        layers.append(Conv(name=out, source=source, inputs=inputs, outputs=values, kernel=1, relu=False))
    return layers
