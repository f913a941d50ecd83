"""Writes a trained network as ONNX, in float or in int8 (QDQ, static).

The graph's input is the picture itself, uint8 (1, H, W, 3), its output float32 (1, N, classes * 5). In int8 the
picture's bytes are the first convolution's quantised input (scale 1/255), weights are signed per channel and keep to
+-64, so that CPUs without VNNI cannot saturate (255 * 64 * 2 < 2^15). The last convolution of each head stays float.
Convolutions of few channels next to the picture look at several columns at once (`side_by_side`): equal sums in less
time.

A network is trained on RGB and shipped for the YCbCr that JPEG holds: the first convolution's weights take the
conversion in, so that nobody has to do it for each pixel. Its input is (sample - 128) / 255 in all three planes; what
it pads with is thus mid-grey, where zeros of RGB were black. RGB values that a decoder would clip are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from tools.training.efficientnet import Convolution
from tools.training.graph import Beside, Graph
from tools.training.layers import CEILING, CHANNELS, INPUT, MIDDLE, Concat, Conv, Layer, Merge, Pool, Sum
from tools.training.plan import head_names
from tools.training.rounding import rounded

WEIGHT_LIMIT = 64  # reduced range
BORROWED_LIMIT = 127  # the range of what borrowed weights were written in
RGB_FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])  # of Y, Cb - 128, Cr - 128: JFIF
Weights = Mapping[str, Convolution]
COLUMNS = 4  # of the picture that the int8 network takes as one
_ENDS = {"low": 0.0, "high": CEILING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Smallest and largest value that a tensor takes on calibration pictures."""

    low: float
    high: float

    def grid(self) -> tuple[float, int]:
        """Scale and zero point of uint8; zero is exactly representable."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = max(high - low, 1e-6) / 255.0
        return scale, round(-low / scale)


def float_model(layers: tuple[Layer, ...], weights: Weights, values: int) -> bytes:
    """The network, of `weights` for RGB in 0..1, in float32 as ONNX bytes; `values` is the length of a cell."""
    graph = Graph()
    graph.add("Transpose", [INPUT], "planes", perm=[0, 3, 1, 2])
    graph.add("Cast", ["planes"], "cast", to=TensorProto.FLOAT)
    graph.add("Sub", ["cast", graph.constant("middle", np.float32(MIDDLE))], "centred")
    graph.add("Mul", ["centred", graph.constant("unit", np.float32(1 / 255))], "scaled")
    weights = _for_ycc(layers, weights)
    names = {INPUT: "scaled"}
    for layer in layers:
        names[layer.name] = _float_layer(graph, layer, names, weights)
    flat = graph.constant("flat", np.array([1, values, -1], np.int64))
    heads = [graph.add("Reshape", [names[name], flat], f"{name}.flat") for name in head_names()]
    graph.add("Transpose", [graph.add("Concat", heads, "joined", axis=2)], "cells", perm=[0, 2, 1])
    return graph.finished(values)


def int8_model(
    layers: tuple[Layer, ...],
    weights: Weights,
    ranges: Mapping[str, Range],
    values: int,
    together: Mapping[int, NDArray[np.float64]] | None = None,
) -> bytes:
    """The same in int8 with float heads; `ranges` by layer name from calibration.

    `together` are the moments (tools.training.rounding) of what a convolution of the picture sees, by the side of its
    kernel; without, it is rounded as all others are.
    """
    whole = _Whole(weights=_for_ycc(layers, weights), together=together or {})
    for layer in layers:
        whole.grids[layer.name] = _grid(layer, whole.grids, ranges)
        whole.names[layer.name] = whole.layer(layer)
    whole.graph.add("Concat", [whole.names[name] for name in head_names()], "cells", axis=1)
    return whole.graph.finished(values)


def _for_ycc(layers: tuple[Layer, ...], weights: Weights) -> Weights:
    """The weights with those of the convolutions that look at the picture changed."""
    first = [layer.name for layer in layers if isinstance(layer, Conv) and layer.source == INPUT]
    return {**weights, **{name: ycc_from_rgb(weights[name]) for name in first}}


def ycc_from_rgb(convolution: Convolution) -> Convolution:
    """Weight (O, 3, K, K) and bias for (sample - 128) / 255 of YCbCr that give what those for RGB in 0..1 give."""
    weight, bias = convolution
    changed = np.einsum("oikl,ij->ojkl", weight, RGB_FROM_YCC)
    return changed.astype(np.float32), (bias + _grey(weight)).astype(np.float32)


def rgb_from_ycc(convolution: Convolution) -> Convolution:
    """The way back."""
    changed, bias = convolution
    weight = np.einsum("ojkl,ji->oikl", changed, np.linalg.inv(RGB_FROM_YCC))
    return weight.astype(np.float32), (bias - _grey(weight)).astype(np.float32)


def _grey(weight: NDArray[np.floating]) -> NDArray[np.float64]:
    """What mid-grey gives, (O,): the middle of luma that is subtracted."""
    return np.asarray(weight.sum(axis=(1, 2, 3), dtype=np.float64) * (MIDDLE / 255))


def _float_layer(graph: Graph, layer: Layer, names: Mapping[str, str], weights: Weights) -> str:
    if isinstance(layer, Conv):
        weight, bias = weights[layer.name]
        inputs = [
            names[layer.source],
            _weight(graph, layer, weight),
            graph.constant(f"{layer.name}.b", bias),
        ]
        result = graph.convolution(layer, inputs, f"{layer.name}.raw" if layer.relu else layer.name)
        if layer.relu and layer.borrowed:
            ends = [graph.constant(f"{layer.name}.{end}", np.float32(value)) for end, value in _ENDS.items()]
            return graph.add("Clip", [result, *ends], layer.name)
        return graph.add("Relu", [result], layer.name) if layer.relu else result
    if isinstance(layer, Pool):
        return graph.pool(names[layer.source], layer.name)
    if isinstance(layer, Concat):
        return graph.add("Concat", [names[name] for name in layer.sources], layer.name, axis=1)
    if isinstance(layer, Sum):
        total = graph.add(
            "Add", [names[part] for part in layer.parts], f"{layer.name}.raw" if layer.relu else layer.name
        )
        return graph.add("Relu", [total], layer.name) if layer.relu else total
    parts = [names[layer.lateral], graph.twice(names[layer.deeper], layer.name)]
    return graph.add("Relu", [graph.add("Add", parts, f"{layer.name}.raw")], layer.name)


def _weight(graph: Graph, layer: Conv, weight: NDArray[np.float32]) -> str:
    """A weight of the float network; a borrowed one of whole steps keeps them, a quarter of the bytes."""
    if layer.borrowed:
        scales = weight_scales(weight, BORROWED_LIMIT)
        steps = np.round(weight / scales[:, None, None, None]).astype(np.int8)
        if np.allclose(steps * scales[:, None, None, None], weight, rtol=1e-4, atol=0):
            return graph.real_constant(steps, scales, f"{layer.name}.w")
    return graph.constant(f"{layer.name}.w", weight)


def _grid(layer: Layer, grids: Mapping[str, tuple[float, int]], ranges: Mapping[str, Range]) -> tuple[float, int]:
    """Pooling keeps its source's grid, concatenation (of nothing negative) the widest; all others have their range."""
    if isinstance(layer, Pool):
        return grids[layer.source]
    if isinstance(layer, Concat):
        return max(grids[source] for source in layer.sources)
    relu = isinstance(layer, Merge) or layer.relu
    found = ranges[layer.name]
    return Range(low=0.0, high=found.high).grid() if relu else found.grid()


@dataclass(slots=True, kw_only=True)
class _Whole:
    """The int8 network while it is written, for YCbCr: its tensors and their grids by layer name.

    `columns`: of layers whose columns hold several of the plan's side by side, how many.
    """

    weights: Weights
    together: Mapping[int, NDArray[np.float64]]
    graph: Graph = field(default_factory=Graph)
    names: dict[str, str] = field(default_factory=dict)
    grids: dict[str, tuple[float, int]] = field(default_factory=lambda: {INPUT: (1 / 255, MIDDLE)})
    columns: dict[str, int] = field(default_factory=lambda: {INPUT: COLUMNS})

    def __post_init__(self) -> None:
        beside = self.graph.constant("beside", np.array([0, 0, -1, COLUMNS * CHANNELS], np.int64))
        columns = self.graph.add("Reshape", [INPUT, beside], "columns")
        self.names[INPUT] = self.graph.add("Transpose", [columns], "planes", perm=[0, 3, 1, 2])

    def layer(self, layer: Layer) -> str:
        """Add a layer on quantised tensors; a ReLU needs no node, the unsigned grid's zero cuts it."""
        graph, name, grid = self.graph, layer.name, self.grids[layer.name]
        if isinstance(layer, Conv):
            return self._cells(layer) if name in head_names() else self._convolution(layer)
        if isinstance(layer, Pool):
            return graph.quantised(graph.pool(self._real(layer.source, f"{name}.in"), f"{name}.max"), grid, name)
        if isinstance(layer, Concat):
            parts = [self._real(source, f"{name}.{source}") for source in layer.sources]
            return graph.quantised(graph.add("Concat", parts, f"{name}.joined", axis=1), grid, name)
        if isinstance(layer, Sum):
            parts = [self._real(part, f"{name}.{part}") for part in layer.parts]
            return graph.quantised(graph.add("Add", parts, f"{name}.sum"), grid, name)
        large = graph.repeated(self.names[layer.deeper], name, len(self.weights[layer.lateral][1]))
        added = graph.real(large, self.grids[layer.deeper], f"{name}.added")
        parts = [self._real(layer.lateral, f"{name}.lateral"), added]
        return graph.quantised(graph.add("Add", parts, f"{name}.sum"), grid, name)

    def _real(self, source: str, output: str) -> str:
        return self.graph.real(self.names[source], self.grids[source], output)

    def _convolution(self, layer: Conv) -> str:
        graph, name = self.graph, layer.name
        weight, bias = self.weights[name]
        scales = weight_scales(weight)
        steps = self._steps(layer, weight / scales[:, None, None, None])
        bias_scales = (scales * self.grids[layer.source][0]).astype(np.float32)
        offsets = np.round(bias.astype(np.float64) / bias_scales).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
        taken = self.columns.get(layer.source, 1)
        beside = side_by_side(steps, layer, taken) if taken > 1 else None
        if beside:
            self.columns[name], steps = beside.made, beside.weight
            scales, bias_scales = np.tile(scales, beside.made), np.tile(bias_scales, beside.made)
            offsets = np.tile(offsets, beside.made)
        inputs = [
            self._real(layer.source, f"{name}.in"),
            graph.real_constant(steps, scales, f"{name}.w"),
            graph.real_constant(offsets, bias_scales, f"{name}.b"),
        ]
        result = graph.convolution(layer, inputs, f"{name}.sum", beside)
        return graph.quantised(result, self.grids[name], name)

    def _steps(self, layer: Conv, exact: NDArray[np.float32]) -> NDArray[np.int8]:
        if layer.source != INPUT or layer.kernel not in self.together:
            return np.round(exact).astype(np.int8)
        steps = rounded(exact.reshape(len(exact), -1), self.together[layer.kernel], WEIGHT_LIMIT)
        return steps.reshape(exact.shape).astype(np.int8)

    def _cells(self, layer: Conv) -> str:
        """A head's 1x1 convolution in float as a product of matrices, (1, cells, outputs): no plane is put in order."""
        graph, name = self.graph, layer.name
        weight, bias = self.weights[name]
        rows = graph.constant(f"{name}.rows", np.array([1, -1, layer.inputs], np.int64))
        lying = graph.add("Reshape", [graph.channels_last(self.names[layer.source], name), rows], f"{name}.lying")
        real = graph.real(lying, self.grids[layer.source], f"{name}.in")
        product = graph.add("MatMul", [real, graph.constant(f"{name}.w", weight[:, :, 0, 0].T)], f"{name}.sum")
        return graph.add("Add", [product, graph.constant(f"{name}.b", bias)], name)


def side_by_side(weight: NDArray[np.int8], layer: Conv, taken: int) -> Beside:
    """A convolution (O, C, K, K) for an input that holds `taken` columns, a multiple of its stride, as channels of one.

    It makes taken / stride columns of one, with the same sums. Between few channels it takes half the time, for what is
    gathered for a sum lies together.
    """
    outputs, channels, rows, across = weight.shape
    made = taken // layer.stride
    places = layer.stride * np.arange(made)[:, None] + np.arange(across) - layer.border[0]  # in columns of the input
    groups = places // taken
    first, last = int(groups.min()), int(groups.max())
    result = np.zeros((made, outputs, taken, channels, rows, last - first + 1), weight.dtype)
    for (column, step), place in np.ndenumerate(places):
        result[column, :, place % taken, :, :, groups[column, step] - first] = weight[..., step]
    flat = result.reshape(made * outputs, taken * channels, rows, last - first + 1)
    return Beside(weight=flat, border=(-first, last), made=made)


def weight_scales(weight: NDArray[np.float32], limit: int = WEIGHT_LIMIT) -> NDArray[np.float32]:
    """Step of each output channel, so that its largest weight is `limit` steps."""
    largest = np.abs(weight).reshape(weight.shape[0], -1).max(axis=1)
    return np.asarray(np.maximum(largest, 1e-8) / limit, np.float32)
