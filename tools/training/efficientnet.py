"""The borrowed trunk: EfficientNet-Lite0 as EfficientDet-Lite0 trained it on COCO, which knows people of all kinds.

It looks at the picture at half its size, so its strides 8 and 16 are the picture's 16 and 32; what comes later is left
out. The halving is part of its first convolution. Its weights are read from a .tflite file, taken apart with the
schema that `ai-edge-litert` brings, and are used as they are. Structure: arXiv 1905.11946, table 1, without squeeze
and excitation, with ReLU that ends at 6.
"""

from __future__ import annotations

import importlib
import itertools
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.errors import AgentError
from tools.training.layers import CHANNELS, INPUT, Conv, Layer, Sum

STEM = 32  # channels
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3))
# of each: kernel, stride of its first block, expansion, channels, blocks
AT_16, WIDTH_AT_16 = "borrowed4", 40  # the last block's output of that stride, and its channels
AT_32, WIDTH_AT_32 = "borrowed10", 112
IDENTIFIER = b"TFL3"
OFFSET, UNIT = 127, 128  # it takes (sample - OFFSET) / UNIT of RGB

Convolution = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight and bias


class BorrowError(AgentError, ValueError):
    """A file that does not hold the trunk: says which file and what was found instead."""


def trunk() -> list[Layer]:
    """Its layers, `borrowed` by name; the blocks' outputs are `borrowed0` to `borrowed10`."""
    layers: list[Layer] = [
        Conv(name="borrowed", source=INPUT, inputs=CHANNELS, outputs=STEM, kernel=6, stride=4, first=0, borrowed=True)
    ]
    numbers = itertools.count()
    source, width = "borrowed", STEM
    for kernel, stride, expansion, outputs, blocks in STAGES:
        for block in range(blocks):
            depth = Conv(
                name=f"borrowed{next(numbers)}",
                source=source,
                inputs=width * expansion,
                outputs=width * expansion,
                kernel=kernel,
                stride=1 if block else stride,
                groups=width * expansion,
                borrowed=True,
            )
            layers.extend(_block(depth, width, outputs))
            source, width = depth.name, outputs
    return layers


def _block(depth: Conv, width: int, outputs: int) -> Iterator[Layer]:
    """An inverted residual block around its depthwise convolution, which is between two of 1x1.

    They are called a, b and c; the block's output has the name alone.
    """
    name, source, inner = depth.name, depth.source, depth.inputs
    if inner > width:
        yield Conv(name=f"{name}a", source=source, inputs=width, outputs=inner, kernel=1, borrowed=True)
        source = f"{name}a"
    yield replace(depth, name=f"{name}b", source=source, first=(depth.kernel - depth.stride) // 2)
    added = depth.stride == 1 and width == outputs
    narrow = f"{name}c" if added else name
    yield Conv(name=narrow, source=f"{name}b", inputs=inner, outputs=outputs, kernel=1, relu=False, borrowed=True)
    if added:
        yield Sum(name=name, parts=(depth.source, narrow), relu=False)


def read(path: Path) -> dict[str, Convolution]:
    """Weight (O, I, K, K) and bias of each of the trunk's convolutions from a .tflite file, for RGB in 0..1.

    Raises BorrowError where the file is no such trunk, ImportError without `ai-edge-litert`.
    """
    schema: Any = importlib.import_module("ai_edge_litert.schema_py_generated")
    try:
        data = path.read_bytes()
        named = data[4:8] == IDENTIFIER
        found = list(_convolutions(schema.ModelT.InitFromPackedBuf(data, 0), schema)) if named else []
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error) as exc:
        raise BorrowError(f"{path}: {type(exc).__name__}: {exc}") from exc
    wanted = [layer for layer in trunk() if isinstance(layer, Conv)]
    result = {
        layer.name: halving(one) if layer.source == INPUT else one for layer, one in zip(wanted, found, strict=False)
    }
    for layer in wanted:
        if layer.name not in result or result[layer.name][0].shape != layer.weight_shape:
            raise BorrowError(f"{path}: no EfficientNet-Lite0: {layer.name} wants weights {layer.weight_shape}")
    return result


def _convolutions(model: Any, schema: Any) -> Iterator[Convolution]:  # noqa: ANN401 - generated classes
    """Weight (O, I, K, K) and bias of the model's convolutions in order."""
    kinds = {schema.BuiltinOperator.CONV_2D: False, schema.BuiltinOperator.DEPTHWISE_CONV_2D: True}
    codes = [code.builtinCode for code in model.operatorCodes]
    graph = model.subgraphs[0]
    for one in graph.operators:
        depthwise = kinds.get(codes[one.opcodeIndex])
        if depthwise is not None:
            weight, bias = (_values(model, graph.tensors[index], schema) for index in one.inputs[1:3])
            yield weight.transpose(3, 0, 1, 2) if depthwise else weight.transpose(0, 3, 1, 2), bias


def _values(model: Any, tensor: Any, schema: Any) -> NDArray[np.float32]:  # noqa: ANN401 - generated classes
    """A constant tensor's numbers, int8 or int32 with a scale for all or for each of one axis."""
    kind = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}[tensor.type]
    raw = np.frombuffer(bytes(model.buffers[tensor.buffer].data), kind).reshape(tensor.shape)
    shape = [1] * raw.ndim
    shape[tensor.quantization.quantizedDimension] = len(tensor.quantization.scale)
    return np.asarray(raw * np.reshape(tensor.quantization.scale, shape), np.float32)


def halving(stem: Convolution) -> Convolution:
    """The first convolution, for (sample - 127) / 128 of a picture of half the size, for RGB in 0..1 of the whole."""
    weight, bias = stem
    whole = weight.repeat(2, axis=2).repeat(2, axis=3) / 4
    sums = weight.sum(axis=(1, 2, 3), dtype=np.float64)
    return np.asarray(whole * (255 / UNIT), np.float32), np.asarray(bias - sums * OFFSET / UNIT, np.float32)
