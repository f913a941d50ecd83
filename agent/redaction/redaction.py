"""Picture bytes in, redacted picture bytes out. Runs in the worker process only: it imports the codecs.

Invariants:
- The decoder gets no byte of metadata: only the stream that the format's own module has rebuilt.
- What leaves are the samples that the detector saw, perhaps in a smaller size, after masking: no second rendering
  (alpha, CMYK inks, the low byte of 16-bit samples, an unused palette entry, another frame) can carry anything else.
  Of a JPEG they leave as the coefficients that they were decoded from, where libturbojpeg can write them.
- The encoder's output is read again and rebuilt from the allow-list before it leaves.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
from PIL import Image

from agent.errors import AgentError, ModelError, RefusedError
from agent.messages import Box
from agent.payloads.inspection import InspectionLimits, rewrite
from agent.pictures import webp
from agent.pictures.containers import read_header, rebuild
from agent.pictures.formats import (
    Colour,
    Fill,
    Format,
    Header,
    People,
    PictureLimits,
    RedactedPayload,
    RedactionOptions,
    View,
)
from agent.redaction.masking import Area, Pixels, areas, head_part, paint, stored, upright, whole_blocks
from agent.redaction.samples import Samples, decode
from agent.redaction.turbojpeg import turbo

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
    samples = decode(header)
    boxes = _detect(detect, samples, header, wanted)
    keep = "orientation" in options.metadata or header.orientation == 1
    masked = _masked(samples, header, _areas(boxes, header, options, samples.bleed), options.fill, keep=keep)
    clean = rebuild(masked, OWN_OUTPUT, header.orientation if keep else 1)
    return clean, Counter(box.label for box in boxes)


def _masked(samples: Samples, header: Header, where: list[Area], fill: Fill, *, keep: bool) -> bytes:
    """The stored picture, or without `keep` the upright one, masked in areas of the stored one and coded.

    Where the codec can, only the blocks in the areas are changed; else all of the picture is coded anew.
    """
    if keep and fill is Fill.CONSTANT and (library := turbo()):
        masked = library.masked(header, where)
        if masked is not None:
            return masked
    paint(samples.image, where, fill)
    return _encode(samples.image if keep else _turned(samples.image, header.orientation), header)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it stands upright."""
    return Image.fromarray(np.ascontiguousarray(upright(np.asarray(image), orientation)), image.mode)


def _areas(boxes: list[Box], header: Header, options: RedactionOptions, bleed: int) -> list[Area]:
    """Where the stored picture is masked for boxes of the upright one."""
    width, height = (header.width, header.height)[:: -1 if header.orientation >= 5 else 1]
    masked = [_part(box, options.people) for box in boxes]
    return [
        whole_blocks(stored(area, header.orientation, width, height), header.block, bleed, header.width, header.height)
        for area in areas(masked, width, height, options.margins)
    ]


def _part(box: Box, people: People) -> Box:
    return head_part(box) if people is People.HEAD and box.label == "person" else box


def _detect(detect: Detect, samples: Samples, header: Header, wanted: Wanted) -> list[Box]:
    """Run the detector on a read-only picture; whatever it raises refuses the picture. Boxes of the upright picture."""
    turned = header.orientation >= 5
    width, height = (header.width, header.height)[:: -1 if turned else 1]
    try:
        view = wanted(width, height)
        size = view.width, view.height
        lying = (view.height, view.width) if turned else size
        pixels = upright(samples.seen(lying, view.colour), header.orientation)
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
