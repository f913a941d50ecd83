"""Values that say what a picture is, how much of it is accepted and how it is redacted.

Pure and standard library only: both the agent and its worker process import it; no codec, no array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from agent.errors import RefusedError


class Format(StrEnum):
    """The formats that can be redacted; the value stands in status and in refusal details."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"


class Fill(StrEnum):
    """What replaces the masked pixels. Only `constant` cannot be reversed; the other names say so."""

    CONSTANT = "constant"
    WEAKER_MOSAIC = "weaker-mosaic"
    WEAKER_BLUR = "weaker-blur"


class People(StrEnum):
    """What is masked of a person: the whole box, or the part of it that holds the head."""

    WHOLE = "whole"
    HEAD = "head"


class Colour(StrEnum):
    """How a picture's samples are to be read; for a JPEG, the decision of ITU-T T.872 and of every decoder."""

    GREY = "grey"
    YCC = "ycc"
    RGB = "rgb"
    CMYK = "cmyk"


MODES: Mapping[Colour, str] = MappingProxyType({Colour.RGB: "RGB", Colour.YCC: "YCbCr"})  # Pillow's names


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a detector is shown of an upright picture: its size in pixels, and whether its samples are RGB or YCC."""

    width: int
    height: int
    colour: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLimits:
    """What a picture may claim in its header before any decoder sees it; more is refused.

    25 Mpx covers every automotive camera; at 3 bytes a pixel it bounds each array in the worker to 75 MB.
    """

    max_bytes: int = 8 << 20
    max_pixels: int = 25_000_000
    max_side: int = 16_384
    max_frames: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header claims, and `clean`: the only bytes that a decoder gets, all metadata removed.

    `tables`: quantisation tables per component in natural order; `sampling`: (h, v) per component; both JPEG only.
    `restart` is the restart interval in MCUs, `optimised` whether the Huffman tables were made for the picture.
    `lossless` and `quantizer` (0-127) are WebP only. `block` is the size in pixels of what the source coded as one,
    `bleed` by how many pixels a decoder mixes neighbouring blocks.
    """

    format: Format
    width: int
    height: int
    clean: bytes
    orientation: int = 1
    colour: Colour = Colour.RGB
    progressive: bool = False
    restart: int = 0
    optimised: bool = False
    tables: tuple[tuple[int, ...], ...] = ()
    sampling: tuple[tuple[int, int], ...] = ()
    lossless: bool = True
    quantizer: int = 0
    block: tuple[int, int] = (1, 1)
    bleed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """How far a box grows on every side: a part of its own width (height), plus pixels."""

    part: float = 0.0
    pixels: float = 0.0


# A box that is off by a tenth of its size still overlaps the truth by an IoU of 0.82, as good detections do.
MARGINS: Mapping[str, Margin] = MappingProxyType({label: Margin(part=0.1) for label in ("person", "face", "plate")})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactionOptions:
    """How pictures are redacted. `metadata` is what may survive: `orientation`, or else the picture is turned."""

    people: People = People.WHOLE
    fill: Fill = Fill.CONSTANT
    margins: Mapping[str, Margin] = field(default_factory=lambda: MappingProxyType(dict(MARGINS)))
    metadata: frozenset[str] = frozenset({"orientation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactedPayload:
    """A payload that may leave: every picture in it is redacted. `counts` holds the masked boxes per label.

    `pictures` may be 0: nothing in the payload was a picture. `model_digest` is set by the worker.
    """

    payload: bytes
    counts: Mapping[str, int]
    pictures: int
    model_digest: str = ""


def check_size(width: int, height: int, limits: PictureLimits) -> None:
    """Raise RefusedError where a header claims more than the limits allow, or nothing."""
    if not (width and height):
        raise RefusedError("picture.corrupt", "zero size")
    if max(width, height) > limits.max_side:
        raise RefusedError("picture.limit.side", f"{width}x{height}")
    if width * height > limits.max_pixels:
        raise RefusedError("picture.limit.pixels", f"{width}x{height}")


def check_frames(frames: int, limits: PictureLimits) -> None:
    """Raise RefusedError where a header claims more frames than the limits allow."""
    if frames > limits.max_frames:
        raise RefusedError("picture.limit.frames", f"{frames} frames")
