"""Structured payloads as the judge reads them, without the agent's code: values, pictures among them, field rules.

A leaf is a value that holds no other one, with the path of its keys; every element of a list has the path `*`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it ships no annotations

from tools.pixels import picture_format

Path = tuple[str, ...]
Leaf = tuple[Path, object]

EVERY = "*"
METRES_PER_DEGREE = 110_574.0  # of latitude on the equator of WGS84
UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
PICTURE, CHANGED = ("a picture",), ("changed by a rule",)  # in the place of such a value; no payload holds a tuple
_PSEUDONYM = re.compile(r"[0-9a-f]{32}")
_BASE64 = re.compile(r"/9j/|_9j_|iVBORw|UklGR")  # the beginnings of JPEG, PNG and RIFF
_PICTURE = re.compile(rb"[/_]9j[\\/_]|iVBORw|UklGR|\xff\xd8\xff|\x89PNG|RIFF")


class _Members(list[tuple[object, object]]):
    """The members of an object in their order; a key that occurs twice does not hide its first value."""


def leaves(payload: bytes) -> list[Leaf] | None:
    """The leaves of a JSON or msgpack object or array in their order; None for anything else."""
    is_json = payload.lstrip()[:1] in {b"{", b"["}
    try:
        if is_json:
            root = json.loads(payload, object_pairs_hook=_Members)
        else:
            root = msgpack.unpackb(
                payload, object_pairs_hook=_Members, strict_map_key=False, unicode_errors="surrogateescape"
            )
        return list(_leaves(root, ())) if isinstance(root, list) else None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None


def common(payload: bytes, fields: Fields | None) -> bytes:
    """A digest of what a record has in common with the message that it was, whether it is given one or the other.

    All bytes; or the values that stay, where the document is under field rules or has pictures in it.
    """
    found = leaves(payload) if fields or _PICTURE.search(payload) else None
    if found is None:
        return digest(payload)
    shown: list[Leaf] = [(path, PICTURE if _picture_in(value) else value) for path, value in found]
    if not fields and shown == found:
        return digest(payload)
    return digest(repr(fields.left(shown) if fields else shown).encode())


def pictures(payload: bytes, fields: Fields | None) -> list[bytes]:
    """The pictures of a payload that may leave: it is one itself, or they are in it as bytes or base64."""
    if picture_format(payload):
        return [payload]
    found = leaves(payload) if _PICTURE.search(payload) else None
    left = fields.left(found) if fields and found else found
    return [data for _, value in left or () if (data := _picture_in(value))]


def digest(data: bytes) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def _picture_in(value: object) -> bytes | None:
    """The picture that a leaf is: its bytes, or base64 of them as text, alone or in a data URL; else None."""
    if isinstance(value, str):
        text = value.partition(",")[2] if value.startswith("data:") else value
        if not _BASE64.match(text):
            return None
        try:
            value = base64.b64decode(text.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=") + "==")
        except ValueError:
            return None
    return value if isinstance(value, bytes) and picture_format(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What `[rules.fields]` of a policy says of a document, its places as paths.

    `degrees`: size of a cell by the place of its latitude. `units`: by the place of a time, the number that divides
    what is left, None where it is text. `step_s`: how much earlier than its capture a record may say that it was.
    """

    keep: tuple[Path, ...]
    drop: tuple[Path, ...]
    pseudonymise: tuple[Path, ...]
    longitudes: tuple[Path, ...]
    degrees: Mapping[Path, float]
    units: Mapping[Path, int | None]
    step_s: int

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Fields:
        """From the table's values; raises KeyError, TypeError or AttributeError where they are none."""
        times, positions = table.get("times", ()), table.get("positions", ())
        return cls(
            keep=_paths(table.get("keep", ())),
            drop=_paths(table.get("drop", ())),
            pseudonymise=_paths(table.get("pseudonymise", ())),
            longitudes=_paths(one["longitude"] for one in positions),
            degrees={_path(one["latitude"]): one["metres"] / METRES_PER_DEGREE for one in positions},
            units={_path(one["place"]): _divisor(one) for one in times},
            step_s=max((one["seconds"] for one in times), default=0),
        )

    def left(self, found: Sequence[Leaf]) -> list[Leaf]:
        """What of a document's leaves may leave; values that a rule changes are `CHANGED`."""
        places = (*self.pseudonymise, *self.longitudes, *self.degrees, *self.units)
        return [
            (path, CHANGED if value is not None and _any_leads(places, path) else value)
            for path, value in found
            if (not self.keep or _any_leads(self.keep, path)) and not _any_leads(self.drop, path)
        ]

    def are_kept(self, found: Sequence[Leaf]) -> bool:
        """Whether a delivered document keeps to the rules: nothing too much, and what is to be changed was changed.

        A longitude is not looked at: its cell follows from the latitude's.
        """
        if len(self.left(found)) != len(found):
            return False
        return all(value is None or self._is_changed(path, value) for path, value in found)

    def _is_changed(self, path: Path, value: object) -> bool:
        """Whether a value is as the rules leave it."""
        if _any_leads(self.pseudonymise, path) and not _is_pseudonym(value):
            return False
        sizes = [size for place, size in self.degrees.items() if _leads(place, path)]
        units = [unit for place, unit in self.units.items() if _leads(place, path)]
        return all(_is_middle(value, size) for size in sizes) and all(_is_multiple(value, unit) for unit in units)


def _leaves(node: object, path: Path) -> Iterator[Leaf]:
    if isinstance(node, _Members):
        for key, child in node:
            name = key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)
            yield from _leaves(child, (*path, name))
    elif isinstance(node, list):
        for child in node:
            yield from _leaves(child, (*path, EVERY))
    else:
        yield path, node


def _paths(pointers: Iterable[str]) -> tuple[Path, ...]:
    return tuple(_path(one) for one in pointers)


def _path(pointer: str) -> Path:
    """The keys of a JSON pointer (RFC 6901)."""
    return tuple(one.replace("~1", "/").replace("~0", "~") for one in pointer.split("/")[1:])


def _divisor(time: Mapping[str, Any]) -> int | None:
    units = UNITS_PER_SECOND.get(time.get("unit", "s"))
    return units and units * time["seconds"]


def _leads(place: Path, path: Path) -> bool:
    """Whether a place names a leaf, or something that the leaf is in."""
    return len(place) <= len(path) and all(one in {EVERY, key} for one, key in zip(place, path, strict=False))


def _any_leads(places: Iterable[Path], path: Path) -> bool:
    return any(_leads(one, path) for one in places)


def _is_pseudonym(value: object) -> bool:
    return isinstance(value, str) and _PSEUDONYM.fullmatch(value) is not None


def _is_middle(value: object, degrees: float) -> bool:
    """Whether a latitude is the middle of a cell, cells counted from 0 as a middle, to 1e-7 degrees; or a pole."""
    if not isinstance(value, int | float) or not abs(value) <= 90:
        return False
    return abs(value - round(value / degrees) * degrees) <= 1e-7 or abs(value) == 90


def _is_multiple(value: object, divisor: int | None) -> bool:
    """Whether a time in a number is a multiple; one that is written otherwise is not looked at."""
    return divisor is None or not isinstance(value, int | float) or value % divisor == 0
