"""Which of the accepted formats some bytes are, and their header within the limits: before any decoder allocates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from agent.errors import RefusedError
from agent.pictures import jpeg, png, webp
from agent.pictures.formats import Format, Header, PictureLimits

PARSERS: Mapping[Format, Callable[[bytes, PictureLimits], Header]] = MappingProxyType(
    {Format.JPEG: jpeg.parse, Format.PNG: png.parse, Format.WEBP: webp.parse}
)
FINISHERS: Mapping[Format, Callable[[Header, int], bytes]] = MappingProxyType(
    {Format.JPEG: jpeg.finish, Format.PNG: png.finish, Format.WEBP: webp.finish}
)


def format_of(data: bytes) -> Format | None:
    """Return the accepted format whose signature stands at the start."""
    if data.startswith(b"\xff\xd8\xff"):
        return Format.JPEG
    if data.startswith(png.SIGNATURE):
        return Format.PNG
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return Format.WEBP
    return None


def read_header(data: bytes, limits: PictureLimits) -> Header:
    """Return the checked header of a JPEG, PNG or WebP; RefusedError for anything else or beyond the limits."""
    if len(data) > limits.max_bytes:
        raise RefusedError("picture.limit.bytes", f"{len(data)} bytes")
    found = format_of(data)
    if found is None:
        raise RefusedError("picture.format")
    return PARSERS[found](data, limits)


def rebuild(data: bytes, limits: PictureLimits, orientation: int) -> bytes:
    """Return the picture with its pixels and, of all metadata, only this orientation, written anew."""
    header = read_header(data, limits)
    return FINISHERS[header.format](header, orientation)
