"""Picture bytes in, redacted picture bytes out. Runs in the worker process only: it imports the codecs.

Invariants:
- The decoder gets no byte of metadata: only the stream that the format's own module has rebuilt.
- What is encoded are the samples that the detector saw, perhaps in a smaller size, after masking: no second rendering
  (alpha, CMYK inks, the low byte of 16-bit samples, an unused palette entry, another frame) can carry anything else.
- The encoder's output is read again and rebuilt from the allow-list before it leaves.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from agent.errors import AgentError, ModelError, RefusedError
from agent.messages import Box
from agent.payloads.inspection import InspectionLimits, rewrite
from agent.pictures import jpeg, webp
from agent.pictures.containers import read_header, rebuild
from agent.pictures.formats import (
    MODES,
    Colour,
    Format,
    Header,
    People,
    PictureLimits,
    RedactedPayload,
    RedactionOptions,
    View,
)
from agent.redaction.masking import Area, Pixels, areas, head_part, paint, stored, upright, whole_blocks
from agent.redaction.scaling import shrunk

Detect = Callable[[Pixels, Colour], list[Box]]  # (H, W, 3) of an upright picture, and what its samples are
Wanted = Callable[[int, int], View]  # what of a picture of this width and height `Detect` wants

SUBSAMPLING: Mapping[tuple[tuple[int, int], ...], int] = {
    ((1, 1),) * 3: 0,
    ((2, 1), (1, 1), (1, 1)): 1,
    ((2, 2), (1, 1), (1, 1)): 2,
}  # Pillow's numbers
FULL_SAMPLING = 0
PNG_COMPRESSION = 6  # zlib's default: 9 takes twice the time for about 1 %
WEBP_LOSSLESS_EFFORT = 40
WEBP_METHOD = 4
OWN_OUTPUT = PictureLimits(max_bytes=1 << 32, max_pixels=1 << 32)
OPENERS: Mapping[Format, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    Format.JPEG: JpegImagePlugin.JpegImageFile,
    Format.PNG: PngImagePlugin.PngImageFile,
    Format.WEBP: WebPImagePlugin.WebPImageFile,
}


def as_it_is(width: int, height: int) -> View:
    """What a detector wants that looks at every pixel, in RGB."""
    return View(width=width, height=height, colour=Colour.RGB)


def redact_payload(  # noqa: PLR0913, PLR0917 - a payload and everything that bears on it
    payload: bytes,
    detect: Detect,
    options: RedactionOptions,
    limits: InspectionLimits,
    content_type: str | None = None,
    wanted: Wanted = as_it_is,
) -> RedactedPayload:
    """Redact every picture in the payload in place; RefusedError where it cannot be shown to be clean."""
    counts: Counter[str] = Counter()
    pictures = 0

    def redact(data: bytes) -> bytes:
        nonlocal pictures
        pictures += 1
        if pictures > limits.max_pictures:
            raise RefusedError("payload.limit.pictures")
        redacted, found = redact_picture(data, detect, options, limits.picture, wanted)
        counts.update(found)
        return redacted

    clean = rewrite(payload, redact, limits, content_type)
    return RedactedPayload(payload=clean, counts=MappingProxyType(dict(counts)), pictures=pictures)


def redact_picture(
    data: bytes, detect: Detect, options: RedactionOptions, limits: PictureLimits, wanted: Wanted = as_it_is
) -> tuple[bytes, Counter[str]]:
    """Return the redacted picture in its own format, and how many boxes of each label were masked.

    `wanted` says in which size and colours the detector looks at an upright picture of (width, height).
    """
    header = read_header(data, limits)
    decoded = _decode(header)
    boxes = _detect(detect, decoded, header, wanted)
    paint(decoded.image, _areas(boxes, header, options), options.fill)
    keep = "orientation" in options.metadata
    shown = decoded.image if keep else _turned(decoded.image, header.orientation)
    clean = rebuild(_encode(shown, header), OWN_OUTPUT, header.orientation if keep else 1)
    return clean, Counter(box.label for box in boxes)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it stands upright."""
    return Image.fromarray(np.ascontiguousarray(upright(np.asarray(image), orientation)), image.mode)


def _areas(boxes: list[Box], header: Header, options: RedactionOptions) -> list[Area]:
    """Where the stored picture is masked for boxes of the upright one."""
    width, height = (header.width, header.height)[:: -1 if header.orientation >= 5 else 1]
    masked = [_part(box, options.people) for box in boxes]
    return [
        whole_blocks(
            stored(area, header.orientation, width, height), header.block, header.bleed, header.width, header.height
        )
        for area in areas(masked, width, height, options.margins)
    ]


def _part(box: Box, people: People) -> Box:
    return head_part(box) if people is People.HEAD and box.label == "person" else box


def _detect(detect: Detect, decoded: Decoded, header: Header, wanted: Wanted) -> list[Box]:
    """Run the detector on a read-only picture; whatever it raises refuses the picture. Boxes of the upright picture."""
    turned = header.orientation >= 5
    width, height = (header.width, header.height)[:: -1 if turned else 1]
    try:
        view = wanted(width, height)
        size = view.width, view.height
        lying = (view.height, view.width) if turned else size
        pixels = upright(decoded.seen(lying, view.colour), header.orientation)
        seen = np.ascontiguousarray(pixels).view()
        seen.flags.writeable = False
        boxes = detect(seen, view.colour)
    except MemoryError as exc:
        raise RefusedError("redaction.memory") from exc
    except ModelError as exc:
        raise RefusedError("redaction.model", str(exc)) from exc
    except AgentError:
        raise
    except Exception as exc:
        raise RefusedError("redaction.detector", type(exc).__name__) from exc
    if not isinstance(boxes, list) or not all(isinstance(box, Box) for box in boxes):
        raise RefusedError("redaction.detector", "not boxes")
    return boxes if size == (width, height) else [_scaled(box, width / size[0], height / size[1]) for box in boxes]


def _scaled(box: Box, across: float, down: float) -> Box:
    return replace(box, x1=box.x1 * across, y1=box.y1 * down, x2=box.x2 * across, y2=box.y2 * down)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A decoded picture as it is stored: `L`, `RGB` or `YCbCr`.

    Or in two parts: then `stored` is the luma alone, and `half`, of half the size, has the chroma.
    """

    stored: Image.Image
    half: Image.Image | None = None

    @cached_property
    def image(self) -> Image.Image:
        """All of it. Parts are joined when this is asked for: just before encoding, it is read from the CPU's cache."""
        return self.stored if self.half is None else _joined(self.stored, self.half, self.stored.size)

    def seen(self, size: tuple[int, int], colour: Colour) -> Pixels:
        """RGB or YCbCr (H, W, 3) in a size of the stored picture (width, height)."""
        if size == self.stored.size:
            image = self.image
        elif self.half is None:
            image = shrunk(self.stored, size)
        else:
            image = _joined(shrunk(self.stored, size), self.half, self.stored.size)
        return np.asarray(image if image.mode == MODES[colour] else image.convert(MODES[colour]))


def _decode(header: Header) -> Decoded:
    """Decode the cleaned stream; whatever a codec raises refuses the picture."""
    try:
        if header.sampling == jpeg.QUARTER_CHROMA and min(header.width, header.height) > 1:
            return _planes(header)
        return Decoded(stored=_samples(header))
    except AgentError:
        raise
    except MemoryError as exc:
        raise RefusedError("redaction.memory") from exc
    except Exception as exc:
        raise RefusedError("picture.corrupt", type(exc).__name__) from exc


def _samples(header: Header) -> Image.Image:
    """Return the picture as it is stored, in `L`, `RGB` or `YCbCr`."""
    with OPENERS[header.format](io.BytesIO(header.clean)) as image:
        if header.colour is Colour.YCC:
            image.draft("YCbCr", None)
        flat = _flatten(image)
    _check_size(flat, (header.width, header.height))
    if header.sampling != jpeg.HALF_CHROMA:
        return flat
    pixels = np.array(flat)
    pixels[..., 1:] = _unsmoothed_chroma(pixels[..., 1:])
    return Image.fromarray(pixels, flat.mode)


def _planes(header: Header) -> Decoded:
    """Return a 4:2:0 JPEG with its chroma samples as they are stored, each repeated over its four pixels.

    At half size they need no interpolation, and the encoder's mean over four equal samples gives them back exactly;
    the smoothed ones of a full decode would lose 15 to 40 dB (tests/test_redaction.py). Luma needs no colours decoded.
    """
    size = header.width, header.height
    whole = _drafted(header, "L", None)
    half = _drafted(header, "YCbCr", (header.width // 2, header.height // 2))
    _check_size(whole, size)
    _check_size(half, ((header.width + 1) // 2, (header.height + 1) // 2))
    return Decoded(stored=whole, half=half)


def _drafted(header: Header, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """Return a JPEG in another mode or size, given to the decoder in one piece: else it begins rows again."""
    with OPENERS[Format.JPEG](io.BytesIO(header.clean)) as image:
        image.decodermaxblock = len(header.clean)
        image.draft(mode, size)
        image.load()
    return image


def _joined(luma: Image.Image, half: Image.Image, stored_size: tuple[int, int]) -> Image.Image:
    """`YCbCr` in the size of `luma`, with the chroma of a picture of half the stored (width, height), rounded up.

    Chroma samples are repeated where that is larger. Smoothing them instead takes 7 ms and shows the detector nothing:
    they are as coarse anyway (models/README.md, "Measured").
    """
    way = Image.Resampling.NEAREST if 2 * luma.width >= stored_size[0] else Image.Resampling.BILINEAR
    image = half.resize(luma.size, way, (0, 0, stored_size[0] / 2, stored_size[1] / 2))
    image.im.putband(luma.im, 0)
    return image


def _check_size(image: Image.Image, size: tuple[int, int]) -> None:
    """Raise ValueError for a decoder that gives another picture than its header promises."""
    if image.size != size:
        raise ValueError


def _unsmoothed_chroma(smooth: Pixels) -> Pixels:
    """Return the stored chroma (H, W, 2) of a 4:2:2 JPEG from the decoded one, within its rounding.

    The decoder makes of samples c the pixels (3 c[i] + c[i-1]) / 4 and (3 c[i] + c[i+1]) / 4 (libjpeg's "fancy"
    upsampling). Each pair of pixels that share two samples gives either; a sample is the mean of its two values.
    """
    width = smooth.shape[1]
    even, odd = smooth[:, 0::2].astype(np.int16), smooth[:, 1::2].astype(np.int16)
    odd = odd if width % 2 == 0 else np.concatenate([odd, even[:, -1:]], axis=1)
    before = np.concatenate([even[:, :1], odd[:, :-1]], axis=1)
    after = np.concatenate([even[:, 1:], odd[:, -1:]], axis=1)
    samples: Pixels = ((3 * (even + odd) - before - after + 2) // 4).clip(0, 255).astype(np.uint8)
    return samples.repeat(2, axis=1)[:, :width]


def _flatten(image: Image.Image) -> Image.Image:
    """One opaque 8-bit rendering: alpha over black, inks as RGB, the high byte of 16-bit grey."""
    image.load()
    if image.mode in {"L", "RGB", "YCbCr"} and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA"}:
        layered = image.convert("RGBA")
        flat = Image.new("RGB", image.size)
        flat.paste(layered.convert("RGB"), mask=layered.getchannel("A"))
        return flat
    return image.convert("RGB")


def _encode(image: Image.Image, header: Header) -> bytes:
    out = io.BytesIO()
    if header.format is Format.JPEG:
        image.save(out, "JPEG", **_jpeg_parameters(header))
    elif header.format is Format.PNG:
        image.save(out, "PNG", compress_level=PNG_COMPRESSION)
    elif header.lossless:
        image.save(out, "WEBP", lossless=True, quality=WEBP_LOSSLESS_EFFORT)
    else:
        image.save(out, "WEBP", quality=webp.quality(header.quantizer), method=WEBP_METHOD)
    return out.getvalue()


def _jpeg_parameters(header: Header) -> dict[str, object]:
    """Return the source's own coding; inks become YCbCr, samplings that Pillow cannot write become full ones."""
    inks = header.colour is Colour.CMYK
    return {
        "qtables": header.tables[:3],
        "subsampling": FULL_SAMPLING if inks else SUBSAMPLING.get(header.sampling, FULL_SAMPLING),
        "progressive": header.progressive,
        "optimize": header.optimised,
        "restart_marker_blocks": header.restart,
        "keep_rgb": header.colour is Colour.RGB,
    }
