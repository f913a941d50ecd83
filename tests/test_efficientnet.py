"""The borrowed trunk: its shape, the halving of the picture, and the reading of a .tflite file."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.training.efficientnet import AT_16, AT_32, WIDTH_AT_16, WIDTH_AT_32, BorrowError, halving, read, trunk
from tools.training.layers import INPUT, Conv, Sum

CONVOLUTIONS = [layer for layer in trunk() if isinstance(layer, Conv)]
lite_needed = pytest.mark.skipif(
    importlib.util.find_spec("ai_edge_litert") is None, reason="ai-edge-litert, of the train extra, is missing"
)


def strides_of(layers):
    """How many pixels of the picture a cell of each layer stands for."""
    strides = {INPUT: 1}
    for layer in layers:
        source = layer.parts[0] if isinstance(layer, Sum) else layer.source
        strides[layer.name] = strides[source] * (1 if isinstance(layer, Sum) else layer.stride)
    return strides


def test_trunk_ends_where_its_names_say():
    strides, widths = strides_of(trunk()), {layer.name: layer.outputs for layer in CONVOLUTIONS}
    widths |= {layer.name: widths[layer.parts[1]] for layer in trunk() if isinstance(layer, Sum)}
    assert (strides[AT_16], widths[AT_16]) == (16, WIDTH_AT_16)
    assert (strides[AT_32], widths[AT_32]) == (32, WIDTH_AT_32)
    assert trunk()[-1].name == AT_32


def test_both_parts_of_a_sum_are_of_one_size():
    strides, widths = strides_of(trunk()), {layer.name: layer.outputs for layer in CONVOLUTIONS}
    for layer in trunk():
        if isinstance(layer, Sum):
            assert strides[layer.parts[0]] == strides[layer.parts[1]]
            widths[layer.name] = widths[layer.parts[1]]
            assert widths[layer.parts[0]] == widths[layer.parts[1]]


def test_trunk_has_as_many_weights_as_efficientnet_lite0_up_to_its_fifth_stage():
    weights = sum(int(np.prod(layer.weight_shape)) + layer.outputs for layer in CONVOLUTIONS)
    assert weights == 695_280 == 692_688 + 32 * 3 * (36 - 9)  # the halving makes 36 of the first one's 9


@pytest.mark.parametrize("layer", CONVOLUTIONS[1:], ids=lambda layer: layer.name)
def test_odd_borders_are_wider_after_the_last_row_as_where_it_was_trained(layer):
    before, after = layer.border
    assert before + after == layer.kernel - layer.stride
    assert after - before == (layer.kernel - layer.stride) % 2


@given(st.integers(0, 999))
def test_halved_picture_gives_the_first_convolution_what_its_file_says(seed):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(2, 3, 3, 3)).astype(np.float32), rng.normal(size=2).astype(np.float32)
    window = rng.integers(0, 256, (3, 6, 6))
    half = (window.reshape(3, 3, 2, 3, 2).mean(axis=(2, 4)) - 127) / 128
    whole, moved = halving((weight, bias))
    found = np.einsum("oikl,ikl->o", whole, window / 255) + moved
    assert np.allclose(found, np.einsum("oikl,ikl->o", weight, half) + bias, atol=1e-4)


def lite_file(path, convolutions, *, named="TFL3"):
    """A .tflite file of nothing but convolutions (kind, int8 weight, scales, int32 bias, bias scales)."""
    from ai_edge_litert import schema_py_generated as schema  # noqa: PLC0415
    from flatbuffers import Builder  # noqa: PLC0415

    model, graph = schema.ModelT(), schema.SubGraphT()
    kinds = [schema.BuiltinOperator.CONV_2D, schema.BuiltinOperator.DEPTHWISE_CONV_2D]
    model.operatorCodes, model.buffers, model.subgraphs = [], [], [graph]
    for kind in kinds:
        code = schema.OperatorCodeT()
        code.builtinCode = kind
        model.operatorCodes.append(code)
    graph.tensors, graph.operators = [], []

    def tensor(values, scales, axis):
        buffer, made, quantised = schema.BufferT(), schema.TensorT(), schema.QuantizationParametersT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        made.buffer, made.shape = len(model.buffers), list(values.shape)
        made.type = schema.TensorType.INT8 if values.dtype == np.int8 else schema.TensorType.INT32
        quantised.scale, quantised.quantizedDimension = scales, axis
        made.quantization = quantised
        model.buffers.append(buffer)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    for depthwise, weight, scales, bias, bias_scales in convolutions:
        operator = schema.OperatorT()
        operator.opcodeIndex = int(depthwise)
        operator.inputs = [0, tensor(weight, scales, 3 if depthwise else 0), tensor(bias, bias_scales, 0)]
        graph.operators.append(operator)
    builder = Builder(0)
    builder.Finish(model.Pack(builder), file_identifier=named.encode())
    path.write_bytes(bytes(builder.Output()))
    return path


def written(rng):
    """Numbers of the trunk's convolutions as a .tflite file has them, and what they stand for."""
    for layer in CONVOLUTIONS:
        outputs, inputs, side, _ = layer.weight_shape
        side = 3 if layer.source == INPUT else side
        depthwise = layer.groups > 1
        shape = (1, side, side, outputs) if depthwise else (outputs, side, side, inputs)
        steps = rng.integers(-127, 128, shape).astype(np.int8)
        bias = rng.integers(-9999, 9999, outputs).astype(np.int32)
        scales, bias_scales = (rng.uniform(0.01, 0.1, outputs).astype(np.float32) for _ in range(2))
        real = steps * (scales if depthwise else scales[:, None, None, None])
        real = real.transpose(3, 0, 1, 2) if depthwise else real.transpose(0, 3, 1, 2)
        yield (depthwise, steps, scales, bias, bias_scales), (real, bias * bias_scales)


@lite_needed
def test_weights_are_read_with_their_scales_and_turned_as_the_network_has_them(tmp_path):
    numbers, real = zip(*written(np.random.default_rng(1)), strict=True)
    found = read(lite_file(tmp_path / "trunk.tflite", numbers))
    assert list(found) == [layer.name for layer in CONVOLUTIONS]
    for layer, wanted in zip(CONVOLUTIONS, [halving(real[0]), *real[1:]], strict=True):
        for one, other in zip(found[layer.name], wanted, strict=True):
            assert np.allclose(one, other, rtol=1e-5)


@lite_needed
def test_file_that_holds_no_such_trunk_is_named(tmp_path):
    numbers = [one for one, _ in written(np.random.default_rng(1))]
    for cut, why in ((numbers[:9], "borrowed3a"), (numbers[1:], "borrowed wants")):
        path = lite_file(tmp_path / "other.tflite", cut)
        with pytest.raises(BorrowError, match=rf"other.tflite: no EfficientNet-Lite0: {why}"):
            read(path)


@lite_needed
@pytest.mark.parametrize("damage", ["empty", "picture", "cut", "absent"])
def test_file_that_is_no_model_is_named(tmp_path, damage):
    path = lite_file(tmp_path / "whole.tflite", [one for one, _ in written(np.random.default_rng(1))])
    data = path.read_bytes()
    path = tmp_path / "broken.tflite"
    if damage != "absent":
        path.write_bytes({"empty": b"", "picture": b"\xff\xd8" * 99, "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(BorrowError, match=r"broken\.tflite"):
        read(path)
