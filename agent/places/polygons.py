"""Country polygons as values, and the compact file that holds them.

The file: `RBRD` and a version byte; a 4-byte little-endian length; a JSON header `{"source", "polygons":
[[codes, [vertices per ring, ...]], ...]}`; then all vertices as little-endian int32 pairs (longitude, latitude) in
1e-7 degrees, rings open; then the SHA-256 of everything before it, because a flipped bit would move a border.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.errors import ConfigError

UNITS_PER_DEGREE = 10_000_000  # 1e-7 degrees: 11 mm, and 180 degrees still fit an int32
MAGIC = b"RBRD\x01"
DIGEST_BYTES = 32

Ring = NDArray[np.int32]  # (n, 2): longitude, latitude in 1e-7 degrees, open


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Polygon:
    """One outer ring and its holes under the law of every one of `codes` (several where the area is disputed)."""

    codes: tuple[str, ...]
    rings: tuple[Ring, ...]
    override: bool = False


def pack_polygons(polygons: Sequence[Polygon], source: str) -> bytes:
    """The compact file of polygons; `source` is a line on where they come from."""
    shape = [[list(polygon.codes), [len(ring) for ring in polygon.rings]] for polygon in polygons]
    header = json.dumps({"source": source, "polygons": shape}, separators=(",", ":")).encode()
    rings = b"".join(ring.astype("<i4").tobytes() for polygon in polygons for ring in polygon.rings)
    content = MAGIC + len(header).to_bytes(4, "little") + header + rings
    return content + hashlib.sha256(content).digest()


def unpack_polygons(data: bytes) -> list[Polygon]:
    """The polygons of the compact file; raises ConfigError where the bytes are not one."""
    try:
        content = _verified(data)
        start = len(MAGIC) + 4
        end = start + int.from_bytes(content[len(MAGIC) : start], "little")
        shape = json.loads(content[start:end])["polygons"]
        vertices = np.frombuffer(content[end:], dtype="<i4").astype(np.int32, copy=False).reshape(-1, 2)
        return list(_cut(shape, vertices))
    except (ValueError, TypeError, KeyError, IndexError) as exc:
        raise ConfigError("borders", "bytes", f"{len(data)} bytes", "a whole compact border file") from exc


def _verified(data: bytes) -> bytes:
    """The file without its digest; raises ValueError where it is not what was written."""
    content = data[:-DIGEST_BYTES]
    if not content.startswith(MAGIC) or hashlib.sha256(content).digest() != data[-DIGEST_BYTES:]:
        message = "not a border file, or an altered one"
        raise ValueError(message)
    return content


def _cut(shape: Sequence[tuple[list[str], list[int]]], vertices: Ring) -> Iterator[Polygon]:
    """The vertices as polygons of the given shape; raises ValueError unless they fit exactly."""
    if sum(size for _, sizes in shape for size in sizes) != len(vertices) or not len(vertices):
        message = "the header does not describe the vertices"
        raise ValueError(message)
    at = 0
    for codes, sizes in shape:
        ends = np.cumsum(sizes).tolist()
        rings = np.split(vertices[at : at + ends[-1]], ends[:-1])
        yield Polygon(codes=tuple(codes), rings=tuple(rings))
        at += ends[-1]
