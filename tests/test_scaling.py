"""What the detector sees of a larger picture is what Pillow's bilinear filter would show it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.redaction.scaling import shrunk

NOISE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (108, 192)).astype(np.uint8))
APART = 2  # grey levels: ninths in 256ths, and two roundings


def plain(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)


def test_two_of_three_samples_are_those_of_the_bilinear_filter():
    found = np.asarray(shrunk(NOISE, (128, 72))).astype(int)
    assert found.shape == (72, 128)
    inside = np.s_[1:-1, 1:-1]  # at the border that filter leaves out what this one repeats
    assert np.abs(found - plain(NOISE, (128, 72)))[inside].max() <= APART


def thirds_mixed(samples: np.ndarray) -> np.ndarray:
    """Two of every three along the first axis, as the module's docstring has it."""
    bordered = np.pad(samples.astype(int), ((1, 1), (0, 0)), mode="edge")
    before, first, middle, last, after = (bordered[start : start + len(samples) : 3] for start in range(5))
    mixed = [(142 * first + 85 * middle + 29 * before + 128) >> 8, (142 * last + 85 * middle + 29 * after + 128) >> 8]
    return np.stack(mixed, axis=1).reshape(-1, samples.shape[1])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_ninths_are_mixed_exactly_to_the_border(height, width, seed):
    samples = np.random.default_rng(seed).integers(0, 256, (3 * height, 3 * width)).astype(np.uint8)
    found = np.asarray(shrunk(Image.fromarray(samples), (2 * width, 2 * height)))
    assert np.array_equal(found, thirds_mixed(thirds_mixed(samples).T).T)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 255))
def test_a_plain_picture_keeps_its_grey_to_the_border(height, width, grey):
    image = Image.new("L", (3 * width, 3 * height), grey)
    found = np.asarray(shrunk(image, (2 * width, 2 * height)))
    assert found.shape == (2 * height, 2 * width)
    assert (found == grey).all()


@pytest.mark.parametrize("size", [(128, 71), (127, 72), (64, 36), (192, 108), (384, 216)])
def test_other_sizes_are_left_to_the_filter_itself(size):
    assert np.array_equal(np.asarray(shrunk(NOISE, size)), plain(NOISE, size))


def test_colours_are_left_to_the_filter_itself():
    image = Image.merge("RGB", [NOISE, NOISE.rotate(180), NOISE])
    assert np.array_equal(np.asarray(shrunk(image, (128, 72))), plain(image, (128, 72)))
