"""What libturbojpeg does for us: planes as they are stored, masks of whole blocks, every other sample as it was."""

import ctypes
import io
from dataclasses import replace

import numpy as np
import pytest
from blocks import after_soi, segment, tiff
from canary import saved
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.errors import RefusedError
from agent.pictures.containers import read_header
from agent.pictures.formats import Colour, Fill, PictureLimits, RedactionOptions
from agent.redaction import turbojpeg
from agent.redaction.masking import Area, whole_blocks
from agent.redaction.redaction import redact_picture
from agent.redaction.turbojpeg import Turbo, turbo

LIMITS = PictureLimits()
SUBSAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}

pytestmark = pytest.mark.skipif(turbo() is None, reason=f"{turbojpeg.LIBRARY} is not installed")


def noise(width, height, seed=0):
    """Blocks that all differ, in colour."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def header_of(width=70, height=50, **coding):
    return read_header(saved(noise(width, height), "JPEG", **{"quality": 85, **coding}), LIMITS)


@st.composite
def cases(draw):
    """A JPEG's size and coding, and boxes in it."""
    width, height = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append(Area(x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))))
    coding = {
        "subsampling": draw(st.sampled_from([0, 1, 2])),
        "progressive": draw(st.booleans()),
        "quality": draw(st.sampled_from([1, 30, 75, 95, 100])),
    }
    return width, height, boxes, coding, draw(st.booleans())


@settings(deadline=None)
@given(cases())
def test_masked_blocks_are_black_and_every_other_stored_sample_is_what_it_was(case):
    width, height, boxes, coding, grey = case
    picture = Image.fromarray(noise(width, height))
    header = read_header(saved(picture.convert("L") if grey else picture, "JPEG", **coding), LIMITS)
    areas = [whole_blocks(area, header.block, 0, width, height) for area in boxes]
    before = turbo().planes(header)
    masked = turbo().masked(header, areas)
    assert masked is not None
    after = read_header(masked, LIMITS)
    kept = ["tables", "progressive", "colour", "width", "height", *([] if grey else ["sampling"])]
    assert {name: getattr(after, name) for name in kept} == {name: getattr(header, name) for name in kept}
    found = turbo().planes(after)
    assert len(found) == len(before) == (1 if grey else 3)
    for number, (was, now) in enumerate(zip(before, found, strict=True)):
        model = was.copy()
        across, down = (8 / header.block[0], 8 / header.block[1]) if number else (1, 1)
        for area in areas:
            rows = slice(round(area.y1 * down), int(np.ceil(area.y2 * down)))
            model[rows, round(area.x1 * across) : int(np.ceil(area.x2 * across))] = 128 if number else 0
        assert np.array_equal(now, model)


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_luma_is_what_pillow_decodes_and_chroma_comes_in_its_own_size(subsampling):
    header = header_of(71, 51, subsampling=SUBSAMPLINGS[subsampling])
    luma, blue, red = turbo().planes(header)
    with Image.open(io.BytesIO(header.clean)) as image:
        image.draft("L", None)
        assert np.array_equal(luma, np.asarray(image))
    across, down = header.block[0] // 8, header.block[1] // 8
    assert blue.shape == red.shape == (-(-51 // down), -(-71 // across))


@pytest.mark.parametrize("coding", [{"restart_marker_rows": 1}, {"optimize": True}], ids=["restart", "optimised"])
def test_coding_that_the_library_cannot_repeat_is_decoded_by_it_but_not_masked(coding):
    header = header_of(**coding)
    assert turbo().planes(header) is not None
    assert turbo().masked(header, []) is None


@pytest.mark.parametrize("coding", [{"keep_rgb": True}, {}], ids=["rgb", "cmyk"])
def test_colours_that_are_no_ycbcr_are_left_to_pillow(coding):
    picture = Image.fromarray(noise(70, 50))
    header = read_header(saved(picture if coding else picture.convert("CMYK"), "JPEG", **coding), LIMITS)
    assert header.colour in {Colour.RGB, Colour.CMYK}
    assert turbo().planes(header) is None
    assert turbo().masked(header, []) is None


def test_stream_that_the_library_warns_of_is_left_to_pillow():
    header = header_of()
    torn = replace(header, clean=header.clean[: len(header.clean) // 2] + b"\xff\xd9")
    assert turbo().planes(torn) is None
    assert turbo().masked(torn, []) is None


@pytest.mark.parametrize("wrong", [{"width": 69}, {"height": 49}, {"sampling": ((1, 1),) * 3}], ids=str)
def test_header_that_says_anything_else_than_the_stream_is_not_believed(wrong):
    assert turbo().planes(replace(header_of(), **wrong)) is None


def test_quantisation_step_of_nought_cannot_say_black():
    header = header_of()
    nought = replace(header, tables=((0, *header.tables[0][1:]), *header.tables[1:]))
    assert turbo().masked(nought, [Area(0, 0, 16, 16)]) is None


def test_nothing_but_the_picture_is_written():
    secret = after_soi(saved(noise(70, 50), "JPEG"), segment(0xFE, b"SECRET"), segment(0xE1, b"Exif\0\0SECRET"))
    header = read_header(secret, LIMITS)
    assert b"SECRET" not in turbo().masked(replace(header, clean=secret), [])


def test_error_while_a_mask_is_written_refuses_the_picture(monkeypatch):
    def broken(*_):
        raise OverflowError

    monkeypatch.setattr(turbojpeg.ctypes, "memmove", broken)
    with pytest.raises(RefusedError) as caught:
        turbo().masked(header_of(), [Area(0, 0, 16, 16)])
    assert (caught.value.reason, caught.value.detail) == ("redaction.failed", "OverflowError")


def test_mask_that_no_row_of_blocks_took_refuses_the_picture(monkeypatch):
    spans = turbojpeg._spans
    extra = {(0, 99): [turbojpeg._Span(0, 1, bytes(128))]}
    monkeypatch.setattr(turbojpeg, "_spans", lambda *given: spans(*given) | extra)
    with pytest.raises(RefusedError) as caught:
        turbo().masked(header_of(), [Area(0, 0, 16, 16)])
    assert (caught.value.reason, caught.value.detail) == ("redaction.failed", "blocks")


def test_mask_beyond_a_row_of_blocks_is_not_written():
    header = header_of()
    assert turbo().masked(header, [Area(64, 0, 96, 16)]) is None


def test_system_without_the_library_has_none(monkeypatch):
    monkeypatch.setattr(turbojpeg, "LIBRARY", "libturbojpeg-that-nobody-has.so.0")
    assert turbo.__wrapped__() is None
    monkeypatch.setattr(turbojpeg, "turbo", turbo.__wrapped__)
    assert turbojpeg.codec() == "Pillow"
    monkeypatch.setattr(turbojpeg, "LIBRARY", None)  # the program itself, which has other symbols
    assert turbo.__wrapped__() is None


def test_weaker_fill_and_a_turned_picture_are_coded_anew():
    calls = []

    class Counting(Turbo):
        def masked(self, *given):
            calls.append(given)
            return super().masked(*given)

    data = saved(noise(70, 50), "JPEG", quality=85)
    library = Counting(ctypes.CDLL(turbojpeg.LIBRARY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent.redaction.redaction.turbo", lambda: library)
        redact_picture(data, lambda *_: [], RedactionOptions(fill=Fill.WEAKER_BLUR), LIMITS)
        assert not calls
        block = tiff([(0x0112, 3, 1, bytes([0, 6]))])
        turned = after_soi(data, segment(0xE1, b"Exif\0\0" + block))
        redact_picture(turned, lambda *_: [], RedactionOptions(metadata=frozenset()), LIMITS)
        assert not calls
        for picture in (data, turned):
            redact_picture(picture, lambda *_: [], RedactionOptions(), LIMITS)
        assert len(calls) == 2
