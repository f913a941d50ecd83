"""Pictures come back in their own format, masked where the detector pointed and close to the source elsewhere."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
from blocks import after_ihdr, after_soi, chunk, segment, tiff, with_webp_chunks
from canary import HEIGHT, MARK, WIDTH, find_mark, saved, scene
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agent.errors import ModelError, RefusedError
from agent.messages import Box
from agent.payloads.inspection import InspectionLimits
from agent.pictures import exif
from agent.pictures.containers import read_header
from agent.pictures.formats import Colour, Fill, Margin, People, PictureLimits, RedactionOptions, View
from agent.redaction.masking import Area, areas, head_part, paint, stored, upright, whole_blocks
from agent.redaction.redaction import redact_payload, redact_picture
from agent.redaction.samples import decode

pytestmark = pytest.mark.usefixtures("codec")

LIMITS, OPTIONS = PictureLimits(), RedactionOptions(margins={})
GREY = Image.fromarray(scene()).convert("L")
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 9)

SOURCES = {
    "jpeg-4:2:0": saved(scene(), "JPEG", quality=80),
    "jpeg-4:2:2": saved(scene(), "JPEG", quality=80, subsampling=1),
    "jpeg-4:4:4": saved(scene(), "JPEG", quality=80, subsampling=0),
    "jpeg-progressive": saved(scene(), "JPEG", quality=80, progressive=True),
    "jpeg-restart": saved(scene(), "JPEG", quality=80, restart_marker_rows=1),
    "jpeg-optimised": saved(scene(), "JPEG", quality=80, optimize=True),
    "jpeg-grey": saved(GREY, "JPEG", quality=80),
    "jpeg-cmyk": saved(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=90),
    "jpeg-rgb": saved(scene(), "JPEG", quality=80, keep_rgb=True),
    "png-rgb": saved(scene(), "PNG"),
    "png-grey": saved(GREY, "PNG"),
    "png-palette": saved(Image.fromarray(scene()).convert("P"), "PNG"),
    "png-palette-clear": saved(Image.fromarray(scene()).convert("P"), "PNG", transparency=3),
    "png-alpha": saved(Image.fromarray(scene()).convert("RGBA"), "PNG"),
    "png-grey-alpha": saved(GREY.convert("LA"), "PNG"),
    "png-16-bit": saved(DEEP, "PNG"),
    "webp-lossy": saved(scene(), "WEBP", quality=80),
    "webp-lossless": saved(scene(), "WEBP", lossless=True),
    "webp-alpha": saved(Image.fromarray(scene()).convert("RGBA"), "WEBP", quality=80),
}


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode == "I;16":
            return np.repeat(np.asarray(image)[..., None] >> 8, 3, axis=2).astype(int)
        return np.asarray(image.convert("RGB")).astype(int)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a - b) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def inside(margin: int = 0) -> np.ndarray:
    """Which pixels lie in the mark, grown by a margin."""
    x1, y1, x2, y2 = MARK
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1 - margin : y2 + margin, x1 - margin : x2 + margin] = True
    return mask


def street(width: int = 640, height: int = 368) -> np.ndarray:
    """A picture with structure at all scales, in colour."""
    generator, layers = np.random.default_rng(3), np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        noise = generator.integers(0, 256, (cells, cells * 2, 3)).astype(np.uint8)
        layers += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / 3.0
    return layers.round().clip(0, 255).astype(np.uint8)


def box(x1: float, y1: float, x2: float, y2: float, label: str = "person") -> Box:
    return Box(label=label, score=0.9, x1=x1, y1=y1, x2=x2, y2=y2)


def nothing(_picture, _colour):
    return []


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_source_is_masked_in_place_and_kept_elsewhere(source):
    before = SOURCES[source]
    after, counts = redact_picture(before, find_mark, OPTIONS, LIMITS)
    header, pixels = read_header(after, LIMITS), decoded(after)
    assert (header.format, header.width, header.height) == (source.split("-")[0], WIDTH, HEIGHT)
    assert counts == {"person": 1}
    assert pixels[inside(-2)].max() < 40
    away = ~inside(20)  # the detector's box, a coding block and what a decoder mixes
    assert psnr(pixels[away], decoded(before)[away]) > 40


@pytest.mark.parametrize("source", [name for name in SOURCES if name.startswith("jpeg") and "cmyk" not in name])
def test_jpeg_keeps_tables_sampling_and_coding(source):
    before = read_header(SOURCES[source], LIMITS)
    after = read_header(redact_picture(SOURCES[source], find_mark, OPTIONS, LIMITS)[0], LIMITS)
    kept = ("tables", "sampling", "progressive", "restart", "optimised", "colour")
    assert {name: getattr(after, name) for name in kept} == {name: getattr(before, name) for name in kept}


@pytest.mark.parametrize(
    ("quality", "subsampling", "least"), [(60, 2, 60), (75, 2, 60), (92, 2, 60), (85, 1, 55), (85, 0, 60)]
)
def test_jpeg_outside_the_masks_stays_close_and_about_as_large(quality, subsampling, least):
    before = saved(street(), "JPEG", quality=quality, subsampling=subsampling)
    after, _ = redact_picture(before, lambda *_: [box(160, 80, 320, 240)], OPTIONS, LIMITS)
    away = np.ones((368, 640), bool)
    away[64:256, 144:336] = False
    assert psnr(decoded(after)[away], decoded(before)[away]) > least
    assert len(after) < len(before) * 1.05


def test_working_on_the_stored_samples_is_far_closer_than_decoding_to_rgb():
    before = saved(street(641, 367), "JPEG", quality=90)
    ours, _ = redact_picture(before, nothing, OPTIONS, LIMITS)
    header = read_header(before, LIMITS)
    through_rgb = saved(decoded(before).astype(np.uint8), "JPEG", qtables=header.tables, subsampling=2)
    assert psnr(decoded(ours), decoded(before)) > psnr(decoded(through_rgb), decoded(before)) + 15


def test_lossless_sources_are_untouched_outside_the_masks():
    for name in ("png-rgb", "png-grey", "png-palette", "webp-lossless"):
        after, _ = redact_picture(SOURCES[name], find_mark, OPTIONS, LIMITS)
        assert np.array_equal(decoded(after)[~inside()], decoded(SOURCES[name])[~inside()])
        assert not decoded(after)[inside()].any()


def test_transparent_pixels_leave_as_they_look_over_black_and_the_layer_is_gone():
    layered = np.dstack([scene(mark=False), np.full((HEIGHT, WIDTH), 128, np.uint8)])
    layered[:, : WIDTH // 2, 3] = 0
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        after, _ = redact_picture(saved(layered, kind, **options), nothing, OPTIONS, LIMITS)
        with Image.open(io.BytesIO(after)) as image:
            assert image.mode == "RGB"
        assert not decoded(after)[:, : WIDTH // 2].any()
        assert np.abs(decoded(after)[:, WIDTH // 2 :] - scene(mark=False)[:, WIDTH // 2 :] // 2).max() <= 1


def as_stored(orientation: int) -> np.ndarray:
    """The samples that a camera stores so that the scene stands upright under an orientation (Exif 2.32, 4.6.4 A)."""
    turned = {
        1: Image.Transpose.FLIP_LEFT_RIGHT,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = Image.fromarray(lopsided())
    return np.asarray(image if orientation == 1 else image.transpose(turned[orientation]))


def lopsided() -> np.ndarray:
    """A scene of which no turn looks like another."""
    pixels = scene(mark=False)
    pixels[10:20, 30:70] = 255
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [True, False])
def test_detector_sees_the_upright_picture_and_the_mask_lands_where_it_pointed(orientation, kind, keep):
    block = tiff([(0x0112, 3, 1, bytes([0, orientation]))])
    data = saved(as_stored(orientation), kind, **({"quality": 95} if kind != "PNG" else {}))
    add = {
        "JPEG": lambda: after_soi(data, segment(0xE1, exif.PREFIX + block)),
        "PNG": lambda: after_ihdr(data, chunk(b"eXIf", block)),
        "WEBP": lambda: with_sized_chunks(data, block, as_stored(orientation).shape),
    }
    seen = []

    def detect(rgb, colour):
        seen.append(rgb.copy())
        return find_mark(rgb, colour)

    options = replace(OPTIONS, metadata=OPTIONS.metadata if keep else frozenset())
    after, _ = redact_picture(add[kind](), detect, options, LIMITS)
    assert np.abs(seen[0].astype(int) - lopsided()).mean() < 3
    with Image.open(io.BytesIO(after)) as image:
        tag = image.getexif().get(0x0112, 1)
        upright_pixels = upright(np.asarray(image.convert("RGB")), tag)
    assert tag == (orientation if keep else 1)
    assert upright_pixels[12:18, 32:68].max() < 60
    assert np.abs(upright_pixels[30:].astype(int) - lopsided()[30:]).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "subsampling"), [("JPEG", 2), ("JPEG", 1), ("JPEG", 0), ("PNG", None)])
def test_detector_that_wants_a_smaller_picture_sees_the_same_one_and_its_boxes_are_found_in_the_large(
    orientation, kind, subsampling
):
    pixels = scene()
    turned = {1: None, **dict(zip((2, 3, 4, 5, 6, 7, 8), (0, 3, 1, 5, 2, 6, 4), strict=True))}[orientation]
    stored_pixels = np.asarray(
        Image.fromarray(pixels) if turned is None else Image.fromarray(pixels).transpose(Image.Transpose(turned))
    )
    options = {} if kind == "PNG" else {"quality": 95, "subsampling": subsampling}
    block = tiff([(0x0112, 3, 1, bytes([0, orientation]))])
    data = saved(stored_pixels, kind, **options)
    add = {
        "JPEG": lambda: after_soi(data, segment(0xE1, exif.PREFIX + block)),
        "PNG": lambda: after_ihdr(data, chunk(b"eXIf", block)),
    }
    seen = []

    def detect(rgb, colour):
        seen.append(rgb.copy())
        large = np.asarray(Image.fromarray(rgb).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
        return [
            replace(one, x1=one.x1 / 2, x2=one.x2 / 2, y1=one.y1 / 3, y2=one.y2 / 3) for one in find_mark(large, colour)
        ]

    def small(width, height):
        return View(width=width // 2, height=height // 3, colour=Colour.RGB)

    after, counts = redact_picture(add[kind](), detect, OPTIONS, LIMITS, small)
    plain = np.asarray(Image.fromarray(pixels).resize((WIDTH // 2, HEIGHT // 3), Image.Resampling.BILINEAR))
    assert seen[0].shape == plain.shape
    assert np.abs(seen[0].astype(int) - plain).mean() < 4
    assert counts == {"person": 1}
    with Image.open(io.BytesIO(after)) as image:
        shown = upright(np.asarray(image.convert("RGB")), orientation)
    assert shown[inside(-3)].max() < 40
    assert np.abs(shown[~inside(20)].astype(int) - pixels[~inside(20)]).mean() < 3


@pytest.mark.parametrize(("width", "height"), [(2, 2), (3, 2), (17, 9), (641, 367), (33, 2)])
def test_jpeg_of_odd_size_is_decoded_to_its_stored_samples(width, height):
    data = saved(street(width, height), "JPEG", quality=90, subsampling=2)
    with Image.open(io.BytesIO(data)) as whole:
        whole.draft("YCbCr", None)
        luma = np.asarray(whole)[..., 0]
    with Image.open(io.BytesIO(data)) as half:
        half.draft("YCbCr", (width // 2, height // 2))
        chroma = np.asarray(half)[..., 1:].repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    found = np.asarray(decode(read_header(data, LIMITS)).image)
    assert (found[..., 0] == luma).all()
    assert (found[..., 1:] == chroma).all()


def test_parts_of_a_picture_are_joined_once():
    found = decode(read_header(SOURCES["jpeg-4:2:0"], LIMITS))
    assert found.stored.mode == "L"
    assert found.image is found.image
    assert found.image.mode == "YCbCr"


@pytest.mark.parametrize("size", [(427, 245), (320, 184), (100, 50)])
def test_colours_that_the_detector_sees_in_a_smaller_size_lie_where_the_picture_has_them(size):
    data = saved(street(641, 367), "JPEG", quality=90, subsampling=2)
    found = decode(read_header(data, LIMITS)).seen(size, Colour.RGB).astype(int)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR)).astype(int)
    assert found.shape == wanted.shape
    assert psnr(found, wanted) > 30


def in_ycc(width, height):
    return View(width=width, height=height, colour=Colour.YCC)


def shown(data: bytes) -> np.ndarray:
    """What a detector sees that wants a picture in YCbCr."""
    seen = []

    def detect(pixels, colour):
        assert colour is Colour.YCC
        seen.append(pixels.copy())
        return []

    redact_picture(data, detect, OPTIONS, LIMITS, in_ycc)
    return seen[0]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_samples_of_a_jpeg_are_shown_as_they_are_stored_to_a_detector_that_wants_them(subsampling):
    data = saved(street(641, 367), "JPEG", quality=90, subsampling=subsampling)
    assert np.array_equal(shown(data), np.asarray(decode(read_header(data, LIMITS)).image))


@pytest.mark.parametrize("source", ["jpeg-rgb", "jpeg-cmyk", "png-rgb", "png-palette", "webp-lossy", "webp-lossless"])
def test_other_colours_are_shown_in_the_ycbcr_of_jfif(source):
    image = decode(read_header(SOURCES[source], LIMITS)).image
    assert image.mode == "RGB"
    assert np.array_equal(shown(SOURCES[source]), np.asarray(image.convert("YCbCr")))


@pytest.mark.parametrize("source", ["jpeg-grey", "png-grey", "png-16-bit"])
def test_grey_picture_is_shown_with_chroma_that_has_no_colour(source):
    pixels = shown(SOURCES[source])
    assert (pixels[..., 1:] == 128).all()
    assert np.array_equal(pixels[..., 0], np.asarray(decode(read_header(SOURCES[source], LIMITS)).image))


def with_sized_chunks(data: bytes, block: bytes, shape: tuple[int, ...]) -> bytes:
    made = bytearray(with_webp_chunks(data, 8, (b"EXIF", block)))
    made[24:27], made[27:30] = (shape[1] - 1).to_bytes(3, "little"), (shape[0] - 1).to_bytes(3, "little")
    return bytes(made)


@pytest.mark.parametrize(
    ("given_box", "expected"),
    [
        (box(2, 3, 5, 6), Area(2, 3, 5, 6)),
        (box(2.1, 3.9, 4.1, 5.0), Area(2, 3, 5, 5)),
        (box(-5, -5, 3, 3), Area(0, 0, 3, 3)),
        (box(7, 7, 99, 99), Area(7, 7, 10, 8)),
        (box(0, 0, 10, 8), Area(0, 0, 10, 8)),
        (box(9, 7, 10, 8), Area(9, 7, 10, 8)),
    ],
)
def test_box_covers_every_pixel_that_it_touches_to_the_last_row_and_column(given_box, expected):
    assert areas([given_box], 10, 8, {}) == [expected]


@pytest.mark.parametrize(
    "given_box", [box(3, 3, 3, 6), box(3, 3, 6, 3), box(20, 20, 30, 30), box(-9, -9, -1, -1), box(10, 0, 12, 8)]
)
def test_box_without_a_pixel_of_the_frame_masks_nothing(given_box):
    assert areas([given_box], 10, 8, {}) == []


def test_zero_sized_box_masks_its_margin():
    assert areas([box(5, 5, 5, 5)], 10, 10, {"person": Margin(pixels=2)}) == [Area(3, 3, 7, 7)]


def test_margins_grow_each_class_by_its_own_measure():
    margins = {"plate": Margin(part=0.5), "face": Margin(pixels=1)}
    boxes = [box(10, 10, 20, 14, "plate"), box(10, 10, 20, 14, "face"), box(10, 10, 20, 14, "person")]
    assert areas(boxes, 100, 100, margins) == [Area(5, 8, 25, 16), Area(9, 9, 21, 15), Area(10, 10, 20, 14)]


@pytest.mark.parametrize(
    "wrong", [box(float("nan"), 0, 1, 1), box(0, 0, float("inf"), 1), box(5, 0, 1, 1), box(0, 5, 1, 1)]
)
def test_box_that_is_no_box_refuses_the_picture(wrong):
    with pytest.raises(RefusedError) as caught:
        areas([wrong], 10, 10, {})
    assert caught.value.reason == "redaction.box"


numbers = st.floats(-20, 60, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5), st.sampled_from(Fill), st.booleans())
def test_every_pixel_in_a_box_is_masked_and_every_other_one_is_untouched(corners, fill, colour):
    boxes = [box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    shape = (31, 37, 3) if colour else (31, 37)
    before = np.random.default_rng(1).integers(1, 255, shape).astype(np.uint8)
    image = Image.fromarray(before)
    paint(image, areas(boxes, 37, 31, {}), fill)
    after = np.asarray(image)
    ys, xs = np.mgrid[0:31, 0:37]
    covered = np.zeros((31, 37), bool)
    for b in boxes:
        if b.x1 < b.x2 and b.y1 < b.y2:
            covered |= (xs + 1 > b.x1) & (xs < b.x2) & (ys + 1 > b.y1) & (ys < b.y2)
    assert np.array_equal(after[~covered], before[~covered])
    if fill is Fill.CONSTANT:
        assert not after[covered].any()


@pytest.mark.parametrize("fill", [Fill.WEAKER_MOSAIC, Fill.WEAKER_BLUR])
def test_weaker_fills_blur_what_they_cover_and_say_so_in_their_name(fill):
    image = Image.fromarray(scene())
    paint(image, [Area(*MARK)], fill)
    pixels = np.asarray(image)
    x1, y1, x2, y2 = MARK
    assert fill.value.startswith("weaker-")
    assert pixels[y1:y2, x1:x2].std() < scene()[y1:y2, x1:x2].std() / 1.5
    assert RedactionOptions().fill is Fill.CONSTANT


@given(st.integers(1, 8), st.data())
def test_area_of_the_upright_picture_is_found_in_the_stored_one(orientation, data):
    pixels = np.zeros((7, 11), np.uint8)
    view = upright(pixels, orientation)
    height, width = view.shape
    x1, y1 = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    area = Area(x1, y1, data.draw(st.integers(x1, width)), data.draw(st.integers(y1, height)))
    view[area.y1 : area.y2, area.x1 : area.x2] = 1
    found = stored(area, orientation, width, height)
    pixels[found.y1 : found.y2, found.x1 : found.x2] -= 1
    assert not pixels.any()


@pytest.mark.parametrize(
    ("area", "block", "bleed", "expected"),
    [
        (Area(9, 9, 15, 15), (8, 8), 0, Area(8, 8, 16, 16)),
        (Area(9, 9, 17, 15), (16, 8), 1, Area(0, 7, 33, 17)),
        (Area(8, 8, 16, 16), (8, 8), 0, Area(8, 8, 16, 16)),
        (Area(90, 40, 99, 49), (16, 16), 3, Area(77, 29, 100, 50)),
        (Area(3, 4, 5, 6), (1, 1), 0, Area(3, 4, 5, 6)),
    ],
)
def test_area_grows_to_whole_coding_blocks_within_the_frame(area, block, bleed, expected):
    assert whole_blocks(area, block, bleed, 100, 50) == expected


@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 9))
def test_upright_view_shares_its_pixels_with_the_stored_picture(orientation, height, width):
    pixels = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    view = upright(pixels, orientation)
    assert view.shape == ((width, height) if orientation >= 5 else (height, width))
    view[0, 0] = 255
    assert (pixels == 255).sum() == 1


@pytest.mark.parametrize(("width", "height", "expected"), [(40, 160, 48), (80, 80, 72), (30, 10, 10)])
def test_head_part_is_the_upper_share_of_a_person_in_full_width(width, height, expected):
    part = head_part(box(10, 20, 10 + width, 20 + height))
    assert (part.x1, part.y1, part.x2, part.y2) == (10, 20, 10 + width, 20 + expected)


def test_head_rule_masks_faces_and_the_head_part_of_every_person_even_without_a_face():
    options = RedactionOptions(people=People.HEAD, margins={})
    found = [box(10, 10, 30, 90), box(100, 60, 110, 70, "face")]
    after, counts = redact_picture(saved(scene(mark=False), "PNG"), lambda *_: found, options, LIMITS)
    pixels = decoded(after)
    assert not pixels[10:34, 10:30].any()
    assert not pixels[60:70, 100:110].any()
    assert pixels[34:90, 10:30].min() > 100
    assert counts == {"person": 1, "face": 1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ModelError("x"), "redaction.model"),
        (ValueError("x"), "redaction.detector"),
        (MemoryError(), "redaction.memory"),
    ],
)
def test_detector_that_fails_refuses_the_picture(fault, reason):
    def detect(*_):
        raise fault

    with pytest.raises(RefusedError) as caught:
        redact_picture(SOURCES["png-rgb"], detect, OPTIONS, LIMITS)
    assert caught.value.reason == reason


def test_detector_gets_a_contiguous_picture_that_it_cannot_change():
    def detect(rgb, _):
        assert rgb.flags.c_contiguous
        assert (rgb.shape, rgb.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        rgb[:] = 77
        return []

    with pytest.raises(RefusedError) as caught:
        redact_picture(SOURCES["png-rgb"], detect, OPTIONS, LIMITS)
    assert (caught.value.reason, caught.value.detail) == ("redaction.detector", "ValueError")


@pytest.mark.parametrize("source", SOURCES)
def test_output_is_the_same_in_every_run(source):
    assert len({redact_picture(SOURCES[source], find_mark, OPTIONS, LIMITS)[0] for _ in range(3)}) == 1


def test_pictures_of_one_payload_are_counted_and_limited():
    payload = b"[" + b",".join(b'"' + base64.b64encode(SOURCES["jpeg-grey"]) + b'"' for _ in range(3)) + b"]"
    done = redact_payload(payload, find_mark, OPTIONS, InspectionLimits())
    assert (done.pictures, done.counts) == (3, {"person": 3})
    with pytest.raises(RefusedError) as caught:
        redact_payload(payload, find_mark, OPTIONS, InspectionLimits(max_pictures=2))
    assert caught.value.reason == "payload.limit.pictures"


def resampled(data: bytes, factors: int, width: int, height: int) -> bytes:
    """The same coded blocks under other luma sampling factors: what no encoder at hand writes, decoders must read."""
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : at + 19])
    frame[5:7], frame[7:9], frame[11] = height.to_bytes(2, "big"), width.to_bytes(2, "big"), factors
    return data[:at] + bytes(frame) + data[at + 19 :]


@pytest.mark.parametrize(
    ("made_with", "factors", "size", "known"),
    [
        (1, 0x12, (WIDTH // 2, HEIGHT * 2), True),
        (2, 0x41, (WIDTH * 2, HEIGHT // 2), True),
        (2, 0x14, (WIDTH // 2, HEIGHT * 2), False),
    ],
    ids=["4:4:0", "4:1:1", "1x4"],
)
def test_unusual_sampling_is_kept_where_a_codec_can_write_it_and_else_written_with_full_chroma(
    made_with, factors, size, known, codec
):
    width, height = size
    before = resampled(saved(scene(), "JPEG", quality=80, subsampling=made_with), factors, width, height)
    after, _ = redact_picture(before, lambda *_: [box(32, 32, 64, 64)], OPTIONS, LIMITS)
    header, away = read_header(after, LIMITS), np.ones((height, width), bool)
    away[:100, :128] = False
    kept = known and codec == "libturbojpeg"
    assert header.sampling == (read_header(before, LIMITS).sampling if kept else ((1, 1), (1, 1), (1, 1)))
    assert header.tables == read_header(before, LIMITS).tables
    assert decoded(after)[34:62, 34:62].max() < 40
    assert psnr(decoded(after)[away], decoded(before)[away]) > 35
