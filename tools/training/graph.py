"""An ONNX graph, node by node: what the exported network is made of, and the file in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from tools.training.layers import CHANNELS, INPUT, Conv

OPSET = 13  # first opset with per-channel QuantizeLinear
IR_VERSION = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A convolution for an input whose columns hold several of the plan's as channels.

    `weight` (O made, C taken, rows, groups of columns), of stride 1 across; `border`: groups before the first and
    after the last; `made` is how many columns of its result lie side by side.
    """

    weight: NDArray[np.int8]
    border: tuple[int, int]
    made: int


class Graph:
    """Collects nodes and constants under unique names; every method gives the name of the tensor that it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: ArrayLike) -> str:
        """A number stays without dimensions: onnxruntime adds in whole numbers only where a scale is no vector."""
        self.constants.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:  # noqa: ANN401 - as onnx takes them
        """Any node with one output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{output}", **attributes))
        return output

    def convolution(self, layer: Conv, inputs: list[str], output: str, beside: Beside | None = None) -> str:
        """`beside`: with its weight for columns that lie side by side."""
        rows, columns = layer.border, layer.border if beside is None else beside.border
        return self.add(
            "Conv",
            inputs,
            output,
            kernel_shape=[layer.kernel, layer.kernel if beside is None else beside.weight.shape[3]],
            strides=[layer.stride, layer.stride if beside is None else 1],
            pads=[rows[0], columns[0], rows[1], columns[1]],
            group=layer.groups,
        )

    def pool(self, source: str, output: str) -> str:
        """The plan's `Pool`."""
        return self.add("MaxPool", [source], output, kernel_shape=[5, 5], strides=[1, 1], pads=[2, 2, 2, 2])

    def real(self, source: str, grid: tuple[float, int], output: str) -> str:
        """A quantised tensor's values; `grid` is its scale and zero point."""
        return self.add("DequantizeLinear", [source, *self._ends(grid, output)], output)

    def quantised(self, source: str, grid: tuple[float, int], output: str) -> str:
        """The way back."""
        return self.add("QuantizeLinear", [source, *self._ends(grid, output)], output)

    def _ends(self, grid: tuple[float, int], name: str) -> list[str]:
        scale, zero = grid
        return [self.constant(f"{name}.scale", np.float32(scale)), self.constant(f"{name}.zero", np.uint8(zero))]

    def real_constant(self, steps: NDArray[np.generic], scales: NDArray[np.float32], output: str) -> str:
        """Whole numbers (O, ...) with a scale for each of their first axis."""
        inputs = [
            self.constant(f"{output}.q", steps),
            self.constant(f"{output}.scale", scales),
            self.constant(f"{output}.zero", np.zeros(len(scales), steps.dtype)),
        ]
        return self.add("DequantizeLinear", inputs, output, axis=0)

    def twice(self, source: str, name: str) -> str:
        """A map enlarged twice by repetition."""
        scales = self.constant(f"{name}.scales", np.array([1, 1, 2, 2], np.float32))
        return self.add(
            "Resize",
            [source, "", scales],
            f"{name}.resized",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )

    def repeated(self, source: str, name: str, channels: int) -> str:
        """As `twice`, in less time where channels are last: a map joined to itself has columns, then rows twice."""
        last = self.channels_last(source, name)
        columns = self.add("Concat", [last, last], f"{name}.columns", axis=3)  # (1, H, W, 2 C)
        rows = self.add("Concat", [columns, columns], f"{name}.rows", axis=2)  # (1, H, 2 W, 2 C)
        apart = self.constant(f"{name}.apart", np.array([0, -1, 0, channels], np.int64))
        large = self.add("Reshape", [rows, apart], f"{name}.repeated")  # (1, 2 H, 2 W, C)
        return self.add("Transpose", [large], f"{name}.large", perm=[0, 3, 1, 2])

    def channels_last(self, source: str, name: str) -> str:
        """(1, C, H, W) as (1, H, W, C), in which onnxruntime keeps quantised maps anyway."""
        return self.add("Transpose", [source], f"{name}.last", perm=[0, 2, 3, 1])

    def finished(self, values: int) -> bytes:
        """The model whose output is `cells`, (1, N, values), serialised."""
        shape_in: list[str | int | None] = [1, "height", "width", CHANNELS]
        inputs = [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape_in)]
        outputs = [helper.make_tensor_value_info("cells", TensorProto.FLOAT, [1, "cells", values])]
        body = helper.make_graph(self.nodes, "detector", inputs, outputs, self.constants)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        data: bytes = model.SerializeToString()
        return data
