"""Headers are read, limits applied and metadata left behind before any decoder sees a byte."""

import io
import re
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from blocks import after_ihdr, after_soi, chunk, raw_png, riff, segment, tiff, with_webp_chunks
from canary import HEIGHT, WIDTH, saved, scene
from PIL import Image

from agent.errors import RefusedError
from agent.pictures import exif, jpeg, png, webp
from agent.pictures.containers import format_of, read_header, rebuild
from agent.pictures.formats import Colour, Format, PictureLimits

LIMITS = PictureLimits()
PLAIN = {kind: saved(scene(), kind) for kind in ("JPEG", "PNG", "WEBP")}


def refusal(data: bytes, limits: PictureLimits = LIMITS) -> str:
    with pytest.raises(RefusedError) as caught:
        read_header(data, limits)
    return caught.value.reason


def bomb() -> bytes:
    """A well-formed PNG of 1.02 Gpx in 125 kB."""
    side, squeeze = 32_000, zlib.compressobj(9)
    row = b"\x00" * (side // 8 + 1)
    data = b"".join(squeeze.compress(row * 100) for _ in range(side // 100)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return png.SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_gigapixel_png_is_refused_within_milliseconds_and_without_memory():
    data = bomb()
    assert 100_000 < len(data) < 200_000
    tracemalloc.start()
    seconds = []
    for _ in range(5):
        started = time.process_time()
        assert refusal(data, PictureLimits(max_side=65_535)) == "picture.limit.pixels"
        seconds.append(time.process_time() - started)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.005
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("data", "limits", "reason"),
    [
        (PLAIN["PNG"], PictureLimits(max_bytes=100), "picture.limit.bytes"),
        (PLAIN["JPEG"], PictureLimits(max_pixels=WIDTH * HEIGHT - 1), "picture.limit.pixels"),
        (PLAIN["WEBP"], PictureLimits(max_side=WIDTH - 1), "picture.limit.side"),
        (raw_png(0, 5, 8, 0, b""), LIMITS, "picture.corrupt"),
        (after_ihdr(PLAIN["PNG"], chunk(b"acTL", struct.pack(">II", 2, 0))), LIMITS, "picture.limit.frames"),
        (after_ihdr(PLAIN["PNG"], chunk(b"ABCD", b"")), LIMITS, "picture.coding"),
        (raw_png(4, 4, 3, 0, b""), LIMITS, "picture.coding"),
        (PLAIN["PNG"][:40] + b"\x00" + PLAIN["PNG"][41:], LIMITS, "picture.corrupt"),
        (b"\xff\xd8\xff\xd9", LIMITS, "picture.corrupt"),
        (PLAIN["JPEG"].replace(b"\xff\xc0", b"\xff\xc9"), LIMITS, "picture.coding"),
        (PLAIN["JPEG"].replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), LIMITS, "picture.coding"),
        (PLAIN["JPEG"].replace(b"\xff\xdb\x00\x43\x00", b"\xff\xdb\x00\x43\x02"), LIMITS, "picture.corrupt"),
        (PLAIN["JPEG"][:-2], LIMITS, "picture.truncated"),
        (PLAIN["WEBP"][:-2], LIMITS, "picture.truncated"),
        (riff((b"EXIF", b"")), LIMITS, "picture.corrupt"),
        (riff((b"VP8L", b"\x2f\xff\xff\xff\x0f")), PictureLimits(max_pixels=1000), "picture.limit.pixels"),
        (b"GIF89a", LIMITS, "picture.format"),
    ],
)
def test_picture_that_breaks_a_limit_or_its_format_is_refused_with_its_reason(data, limits, reason):
    assert refusal(data, limits) == reason


@pytest.mark.parametrize("kind", PLAIN)
def test_every_torn_picture_is_refused_and_never_crashes(kind):
    data = PLAIN[kind]
    for end in range(16, len(data) - 1, 7):
        assert refusal(data[:end]).startswith("picture.")


def test_jpeg_header_tells_what_pillow_would_tell():
    for options in ({"quality": 40}, {"quality": 92, "subsampling": 1}, {"subsampling": 0, "progressive": True}):
        data = saved(scene(), "JPEG", **options)
        header = read_header(data, LIMITS)
        with Image.open(io.BytesIO(data)) as image:
            tables = [tuple(image.quantization[layer[3]]) for layer in image.layer]
            assert list(header.tables) == tables
            assert header.sampling == tuple((layer[1], layer[2]) for layer in image.layer)
            assert header.progressive == bool(options.get("progressive"))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (saved(Image.new("L", (16, 16)), "JPEG"), Colour.GREY),
        (saved(Image.new("CMYK", (16, 16)), "JPEG"), Colour.CMYK),
        (saved(Image.new("RGB", (16, 16)), "JPEG", keep_rgb=True), Colour.RGB),
        (saved(Image.new("RGB", (16, 16)), "JPEG"), Colour.YCC),
    ],
)
def test_jpeg_colour_is_read_as_decoders_read_it(data, colour):
    assert read_header(data, LIMITS).colour is colour


def test_restart_interval_is_read():
    assert read_header(saved(scene(), "JPEG", restart_marker_blocks=5), LIMITS).restart == 5


def test_scan_bomb_is_refused():
    data = saved(scene(), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert refusal(data[:-2] + last * 100 + b"\xff\xd9") == "picture.corrupt"


@pytest.mark.parametrize("order", [("MM", ">"), ("II", "<")])
@pytest.mark.parametrize("value", range(10))
def test_orientation_is_read_in_both_byte_orders_and_only_from_one_to_eight(order, value):
    name, sign = order
    block = name.encode() + struct.pack(sign + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, value, 0, 0)
    assert exif.orientation(block) == (value if 1 <= value <= 8 else 1)


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"MM\x00*",
        b"MM\x00*\xff\xff\xff\xff",
        b"MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x00" * 50,
        b"XX\x00*" + b"\x00" * 30,
    ],
)
def test_malformed_exif_means_upright(block):
    assert exif.orientation(block) == 1


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_found_in_every_format_and_written_again_by_a_block_of_our_own(value):
    block = tiff([(0x0112, 3, 1, bytes([0, value])), (0x010F, 2, 8, b"Owner AG")])
    pictures = (
        after_soi(PLAIN["JPEG"], segment(0xE1, exif.PREFIX + block)),
        after_ihdr(PLAIN["PNG"], chunk(b"eXIf", block)),
        with_webp_chunks(PLAIN["WEBP"], 8, (b"EXIF", block)),
    )
    for data in pictures:
        assert read_header(data, LIMITS).orientation == value
        written = rebuild(data, LIMITS, value)
        assert b"Owner" not in written
        with Image.open(io.BytesIO(written)) as image:
            assert image.getexif().get(0x0112, 1) == value


@pytest.mark.parametrize("kind", PLAIN)
def test_rebuilt_picture_has_the_same_pixels(kind):
    data = PLAIN[kind]
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(rebuild(data, LIMITS, 6))) as after:
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_rebuilding_twice_changes_nothing_more():
    for data in PLAIN.values():
        once = rebuild(data, LIMITS, 3)
        assert rebuild(once, LIMITS, 3) == once


def test_no_colour_profile_survives():
    for data in (saved(scene(), kind, icc_profile=b"profile" * 20) for kind in PLAIN):
        with Image.open(io.BytesIO(rebuild(data, LIMITS, 1))) as image:
            assert "icc_profile" not in image.info


def test_format_is_told_by_signature():
    assert [format_of(data) for data in PLAIN.values()] == [Format.JPEG, Format.PNG, Format.WEBP]
    assert format_of(b"RIFF\x00\x00\x00\x00WAVE") is None


def test_webp_quantiser_follows_the_quality_that_the_encoder_was_given():
    picture = Image.effect_noise((160, 120), 60).convert("RGB")
    indices = [read_header(saved(picture, "WEBP", quality=q), LIMITS).quantizer for q in (20, 50, 75, 90, 100)]
    assert indices == sorted(indices, reverse=True)
    assert indices[-1] == 0
    assert [webp.quality(index) for index in (127, 0)] == [0, 100]


def test_jpeg_walk_ignores_fill_bytes_before_a_marker():
    data = PLAIN["JPEG"]
    assert jpeg.parse(data[:2] + b"\xff\xff\xff" + data[2:], LIMITS) == jpeg.parse(data, LIMITS)


@pytest.mark.parametrize("seed", range(50))
def test_end_of_a_scan_is_the_first_marker_that_is_no_restart(seed):
    generator = np.random.default_rng(seed)
    choice = np.array([0x00, 0x01, 0xD0, 0xD7, 0xD8, 0xD9, 0xFF, 0xFF, 0xFF, 0x55], np.uint8)
    data = generator.choice(choice, int(generator.integers(0, 40))).tobytes()
    wanted = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]").search(data)
    if wanted is None:
        with pytest.raises(RefusedError):
            jpeg._scan_end(data, 0)
    else:
        assert jpeg._scan_end(data, 0) == wanted.start()
