"""What the detector sees of a larger picture: means over the samples' areas, or what Pillow's bilinear filter gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.redaction.scaling import shrunk

NOISE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (108, 192)).astype(np.uint8))
APART = 2  # grey levels: thirds in 256ths, and two roundings


def plain(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR)).astype(int)


def test_two_of_three_samples_are_the_means_over_their_areas():
    found = np.asarray(shrunk(NOISE, (128, 72))).astype(int)
    halves = np.asarray(NOISE).repeat(2, axis=0).repeat(2, axis=1)  # each sample of the result covers three by three
    means = halves.reshape(72, 3, 128, 3).mean(axis=(1, 3))
    assert np.abs(found - means).max() <= APART


def thirds_mixed(samples: np.ndarray) -> np.ndarray:
    """Two of every three along the first axis, as the module's docstring has it."""
    first, middle, last = (samples[start::3].astype(int) for start in range(3))
    mixed = [(171 * one + 85 * middle + 128) >> 8 for one in (first, last)]
    return np.stack(mixed, axis=1).reshape(-1, samples.shape[1])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_thirds_are_mixed_exactly(height, width, seed):
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
