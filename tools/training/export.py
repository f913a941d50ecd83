"""Writes a trained network as ONNX, in float or in int8 (QDQ, static).

The graph's input is the picture itself, uint8 (1, H, W, 3), its output float32 (1, N, classes * 5). In int8 the
picture's bytes are the first convolution's quantised input (scale 1/255), weights are signed per channel and keep to
+-64, so that CPUs without VNNI cannot saturate (255 * 64 * 2 < 2^15). The last convolution of each head stays float.
The first two convolutions, of few channels, look at several columns at once (`side_by_side`): equal sums in less time.

A network is trained on RGB and shipped for the YCbCr that JPEG holds: the first convolution's weights take the
conversion in, so that nobody has to do it for each pixel. Its input is (sample - 128) / 255 in all three planes; what
it pads with is thus mid-grey, where zeros of RGB were black. RGB values that a decoder would clip are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from tools.training.plan import INPUT, MIDDLE, Concat, Conv, Layer, Merge, Pool, head_names
from tools.training.rounding import rounded

OPSET = 13  # first opset with per-channel QuantizeLinear
IR_VERSION = 8
WEIGHT_LIMIT = 64  # reduced range
RGB_FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])  # of Y, Cb - 128, Cr - 128: JFIF
Convolution = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight and bias
Weights = Mapping[str, Convolution]
CHANNELS = 3  # of a picture
COLUMNS = 4  # of the picture that the int8 network takes as one


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


class _Graph:
    """Collects nodes and constants under unique names. `seen`: moments of what the first convolution sees.

    `columns`: of tensors whose columns hold several of the plan's side by side, how many.
    """

    def __init__(self, seen: NDArray[np.float64] | None = None) -> None:
        self.seen = seen
        self.columns: dict[str, int] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: ArrayLike) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:  # noqa: ANN401 - as onnx takes them
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes))
        return output


def float_model(layers: tuple[Layer, ...], weights: Weights, values: int) -> bytes:
    """The network, of `weights` for RGB in 0..1, in float32 as ONNX bytes; `values` is the length of a cell."""
    graph = _Graph()
    graph.add("Transpose", [INPUT], "planes", perm=[0, 3, 1, 2])
    graph.add("Cast", ["planes"], "cast", to=TensorProto.FLOAT)
    graph.add("Sub", ["cast", graph.constant("middle", np.float32(MIDDLE))], "centred")
    graph.add("Mul", ["centred", graph.constant("unit", np.float32(1 / 255))], "scaled")
    weights = _for_ycc(layers, weights)
    names = {INPUT: "scaled"}
    for layer in layers:
        names[layer.name] = _float_layer(graph, layer, names, weights)
    return _finish(graph, [names[name] for name in head_names()], values)


def int8_model(
    layers: tuple[Layer, ...],
    weights: Weights,
    ranges: Mapping[str, Range],
    values: int,
    together: NDArray[np.float64] | None = None,
) -> bytes:
    """The same in int8 with float heads; `ranges` by layer name from calibration.

    `together` are the moments (tools.training.rounding) of what the first convolution sees; without, it is rounded
    as all others are.
    """
    graph = _Graph(together)
    beside = graph.constant("beside", np.array([0, 0, -1, COLUMNS * CHANNELS], np.int64))
    graph.add("Transpose", [graph.add("Reshape", [INPUT, beside], "columns")], "planes", perm=[0, 3, 1, 2])
    graph.columns[INPUT] = COLUMNS
    grids = {INPUT: (1 / 255, MIDDLE)}
    weights = _for_ycc(layers, weights)
    names = {INPUT: "planes"}
    for layer in layers:
        grids[layer.name] = _grid(layer, grids, ranges)
        names[layer.name] = _int8_layer(graph, layer, names, grids, weights)
    return _finish(graph, [names[name] for name in head_names()], values)


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


def _float_layer(graph: _Graph, layer: Layer, names: Mapping[str, str], weights: Weights) -> str:
    if isinstance(layer, Conv):
        inputs = [names[layer.source], *_real_weights(graph, layer, weights)]
        result = _conv(graph, layer, inputs, f"{layer.name}.raw" if layer.relu else layer.name)
        return graph.add("Relu", [result], layer.name) if layer.relu else result
    if isinstance(layer, Pool):
        return _pool(graph, names[layer.source], layer.name)
    if isinstance(layer, Concat):
        return graph.add("Concat", [names[name] for name in layer.sources], layer.name, axis=1)
    parts = [names[layer.lateral], _twice(graph, names[layer.deeper], layer.name)]
    return graph.add("Relu", [graph.add("Add", parts, f"{layer.name}.raw")], layer.name)


def _real_weights(graph: _Graph, layer: Conv, weights: Weights) -> list[str]:
    weight, bias = weights[layer.name]
    return [graph.constant(f"{layer.name}.w", weight), graph.constant(f"{layer.name}.b", bias)]


def _grid(layer: Layer, grids: Mapping[str, tuple[float, int]], ranges: Mapping[str, Range]) -> tuple[float, int]:
    """Pooling and concatenation keep the grid of their first source; all others take the calibrated range."""
    if isinstance(layer, Pool):
        return grids[layer.source]
    if isinstance(layer, Concat):
        return grids[layer.sources[0]]
    relu = isinstance(layer, Merge) or layer.relu
    found = ranges[layer.name]
    return Range(low=0.0, high=found.high).grid() if relu else found.grid()


def _int8_layer(
    graph: _Graph,
    layer: Layer,
    names: Mapping[str, str],
    grids: Mapping[str, tuple[float, int]],
    weights: Weights,
) -> str:
    """Add a layer on quantised tensors; a ReLU needs no node, the unsigned grid's zero cuts it."""
    if isinstance(layer, Conv):
        return _int8_conv(graph, layer, names[layer.source], grids, weights)
    if isinstance(layer, Pool):
        real = _real(graph, names[layer.source], grids[layer.source], f"{layer.name}.in")
        return _quantised(graph, _pool(graph, real, f"{layer.name}.max"), grids[layer.name], layer.name)
    if isinstance(layer, Concat):
        parts = [_real(graph, names[name], grids[name], f"{layer.name}.{name}") for name in layer.sources]
        joined = graph.add("Concat", parts, f"{layer.name}.joined", axis=1)
        return _quantised(graph, joined, grids[layer.name], layer.name)
    deeper = _real(graph, names[layer.deeper], grids[layer.deeper], f"{layer.name}.deeper")
    large = _quantised(graph, _twice(graph, deeper, layer.name), grids[layer.deeper], f"{layer.name}.large")
    parts = [
        _real(graph, names[layer.lateral], grids[layer.lateral], f"{layer.name}.lateral"),
        _real(graph, large, grids[layer.deeper], f"{layer.name}.added"),
    ]
    return _quantised(graph, graph.add("Add", parts, f"{layer.name}.sum"), grids[layer.name], layer.name)


def _int8_conv(
    graph: _Graph,
    layer: Conv,
    source: str,
    grids: Mapping[str, tuple[float, int]],
    weights: Weights,
) -> str:
    real = _real(graph, source, grids[layer.source], f"{layer.name}.in")
    if layer.name in head_names():
        return _conv(graph, layer, [real, *_real_weights(graph, layer, weights)], layer.name)
    weight, bias = weights[layer.name]
    scales = weight_scales(weight)
    steps = _steps(weight / scales[:, None, None, None], graph.seen if layer.source == INPUT else None)
    bias_scales = (scales * grids[layer.source][0]).astype(np.float32)
    offsets = np.round(bias / bias_scales).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32)
    taken = graph.columns.get(layer.source, 1)
    made = taken // 2
    if made:
        graph.columns[layer.name] = made
        steps, scales = side_by_side(steps, taken), np.tile(scales, made)
        bias_scales, offsets = np.tile(bias_scales, made), np.tile(offsets, made)
    inputs = [
        real,
        _real_constant(graph, steps, scales, f"{layer.name}.w"),
        _real_constant(graph, offsets, bias_scales, f"{layer.name}.b"),
    ]
    result = _conv(graph, layer, inputs, f"{layer.name}.sum", merged=bool(made))
    return _quantised(graph, result, grids[layer.name], layer.name)


def side_by_side(weight: NDArray[np.int8], taken: int) -> NDArray[np.int8]:
    """Weight (O, C, 3, 3) of a convolution of stride 2, for an input that holds `taken` columns as channels of one.

    It becomes (O taken / 2, C taken, 3, 2), of stride 2 down and 1 across, and makes half as many columns of one. The
    sums are the same. Between few channels it takes half the time, for what is gathered for a sum lies together.
    """
    outputs, channels = weight.shape[:2]
    made = taken // 2
    result = np.zeros((made, outputs, taken, channels, 3, 2), weight.dtype)
    for column in range(made):
        for across in range(3):
            place = 2 * column + across - 1  # in the column's own group; -1 is the last of the group before
            result[column, :, place, :, :, 0 if place < 0 else 1] = weight[..., across]
    return result.reshape(made * outputs, taken * channels, 3, 2)


def _steps(exact: NDArray[np.float32], together: NDArray[np.float64] | None) -> NDArray[np.int8]:
    if together is None:
        return np.round(exact).astype(np.int8)
    return rounded(exact.reshape(len(exact), -1), together, WEIGHT_LIMIT).reshape(exact.shape).astype(np.int8)


def weight_scales(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Step of each output channel, so that its largest weight is 64 steps."""
    largest = np.abs(weight).reshape(weight.shape[0], -1).max(axis=1)
    return np.asarray(np.maximum(largest, 1e-8) / WEIGHT_LIMIT, np.float32)


def _real_constant(graph: _Graph, steps: NDArray[np.generic], scales: NDArray[np.float32], name: str) -> str:
    inputs = [
        graph.constant(f"{name}.q", steps),
        graph.constant(f"{name}.scale", scales),
        graph.constant(f"{name}.zero", np.zeros(len(scales), steps.dtype)),
    ]
    return graph.add("DequantizeLinear", inputs, name, axis=0)


def _ends(graph: _Graph, grid: tuple[float, int], name: str) -> list[str]:
    scale, zero = grid
    return [
        graph.constant(f"{name}.scale", np.float32(scale)),
        graph.constant(f"{name}.zero", np.uint8(zero)),
    ]


def _real(graph: _Graph, source: str, grid: tuple[float, int], name: str) -> str:
    return graph.add("DequantizeLinear", [source, *_ends(graph, grid, name)], name)


def _quantised(graph: _Graph, source: str, grid: tuple[float, int], name: str) -> str:
    return graph.add("QuantizeLinear", [source, *_ends(graph, grid, name)], name)


def _conv(graph: _Graph, layer: Conv, inputs: list[str], output: str, *, merged: bool = False) -> str:
    """`merged`: with the weights of `side_by_side`."""
    around = layer.kernel // 2
    return graph.add(
        "Conv",
        inputs,
        output,
        kernel_shape=[layer.kernel, 2] if merged else [layer.kernel] * 2,
        strides=[layer.stride, 1] if merged else [layer.stride] * 2,
        pads=[around, 1, around, 0] if merged else [around] * 4,
    )


def _pool(graph: _Graph, source: str, output: str) -> str:
    return graph.add("MaxPool", [source], output, kernel_shape=[5, 5], strides=[1, 1], pads=[2, 2, 2, 2])


def _twice(graph: _Graph, source: str, name: str) -> str:
    scales = graph.constant(f"{name}.scales", np.array([1, 1, 2, 2], np.float32))
    return graph.add(
        "Resize",
        [source, "", scales],
        f"{name}.resized",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _finish(graph: _Graph, heads: list[str], values: int) -> bytes:
    """Join the heads into (1, N, values) and serialise."""
    flat = graph.constant("flat", np.array([1, values, -1], np.int64))
    parts = [graph.add("Reshape", [head, flat], f"{head}.flat") for head in heads]
    graph.add("Concat", parts, "joined", axis=2)
    graph.add("Transpose", ["joined"], "cells", perm=[0, 2, 1])
    shape_in: list[str | int | None] = [1, "height", "width", 3]
    inputs = [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape_in)]
    outputs = [helper.make_tensor_value_info("cells", TensorProto.FLOAT, [1, "cells", values])]
    body = helper.make_graph(graph.nodes, "detector", inputs, outputs, graph.constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data
