"""What may stay in a structured payload: keep, drop, coarsen, pseudonymise, in this order.

Places are JSON pointers (RFC 6901); the token `*` stands for every element of a list or every member of an object, and
a list is entered by no other token. A field that is absent or null needs nothing. A payload that cannot be parsed, or
in which a place leads into a value of another shape, is refused: nothing that a rule speaks of passes unchanged by
accident.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped]  # it ships no annotations

from agent.errors import RefusedError
from agent.payloads.documents import Node, Number, parse_document
from agent.payloads.pointers import tokens

EVERY = "*"
METRES_PER_DEGREE = 110_574.0  # of latitude on the equator of WGS84: no degree is shorter, so no cell is too small
PSEUDONYM_BYTES = 16  # of HMAC-SHA-256: 128 bits against collisions by chance
SHORTEST_KEY = 16  # bytes
LARGEST_EXPONENT = 30  # a stated time beyond 1e30 is none

UNITS_PER_SECOND: Mapping[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

Path = tuple[str, ...]
Change = Callable[[Node], Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarsePosition:
    """Move a pair of degrees to the middle of a cell of `metres`; both places have the same parent."""

    latitude: str
    longitude: str
    metres: float

    def __post_init__(self) -> None:
        if self.latitude.rpartition("/")[0] != self.longitude.rpartition("/")[0]:
            message = f"{self.latitude} and {self.longitude} are not members of one object"
            raise ValueError(message)
        _require(0 < self.metres < math.inf, f"{self.metres} is not a positive number of metres")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoarseTime:
    """Set a time back to the last multiple of `seconds`; `unit` says how it is written."""

    place: str
    seconds: int
    unit: Literal["s", "ms", "us", "ns", "rfc3339"] = "s"

    def __post_init__(self) -> None:
        _require(self.seconds > 0, f"{self.seconds} is not a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """The rules of one data class; raises ValueError where a place is no pointer or a key is missing or short.

    `keep` empty keeps everything that is not dropped.
    """

    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    positions: tuple[CoarsePosition, ...] = ()
    times: tuple[CoarseTime, ...] = ()
    pseudonymise: tuple[str, ...] = ()
    key: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        pairs = (place for rule in self.positions for place in (rule.latitude, rule.longitude))
        for place in (*self.keep, *self.drop, *self.pseudonymise, *pairs, *(rule.place for rule in self.times)):
            _require(place.startswith("/"), f"{place!r} is not a JSON pointer")
        _require(
            not self.pseudonymise or len(self.key) >= SHORTEST_KEY, f"a key of at least {SHORTEST_KEY} bytes is needed"
        )


def apply_field_rules(payload: bytes, rules: FieldRules, media_type: str | None = None) -> bytes:
    """The payload as the rules leave it, in the format in which it came; raises RefusedError."""
    try:
        document = parse_document(payload, media_type)
        root = _kept(document.root, [tokens(place) for place in rules.keep]) if rules.keep else document.root
        for place in rules.drop:
            _drop(root, tokens(place))
        for position in rules.positions:
            _coarsen(root, position)
        for time in rules.times:
            _change(root, tokens(time.place), _floor(time))
        for place in rules.pseudonymise:
            _change(root, tokens(place), _pseudonym(rules.key))
        return document.dump(root)
    except (RecursionError, ArithmeticError, TypeError, ValueError) as exc:
        raise RefusedError("fields.unreadable", type(exc).__name__) from exc


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 - reads like assert
    if not condition:
        raise ValueError(message)


def _unfit(what: str) -> RefusedError:
    return RefusedError("fields.unfit", what)


def _name(key: Node) -> str:
    """A key as a place names it: text, bytes as UTF-8, or a number of msgpack in decimal."""
    return key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else str(key)


def _members(node: Node, token: str) -> Iterator[tuple[Any, Any]]:
    """(key, child) pairs that a token names. Raises RefusedError where the node is of another shape."""
    if isinstance(node, dict):
        yield from [(key, child) for key, child in node.items() if token in {EVERY, _name(key)}]
    elif isinstance(node, list) and token == EVERY:
        yield from enumerate(list(node))
    elif node is not None:
        raise _unfit("a place leads into a value that has no such members")


def _parents(node: Node, path: Path) -> Iterator[Node]:
    """Every node that the path leads to."""
    if not path:
        yield node
        return
    for _, child in _members(node, path[0]):
        yield from _parents(child, path[1:])


def _kept(node: Node, paths: list[Path]) -> Any:  # noqa: ANN401 - a tree of the same type
    """The node with nothing but what the paths lead to."""
    if () in paths:
        return node
    if isinstance(node, dict):
        inner = {key: [path[1:] for path in paths if path[0] in {EVERY, _name(key)}] for key in node}
        return {key: _kept(node[key], rest) for key, rest in inner.items() if rest and _leads(node[key], rest)}
    if isinstance(node, list):
        rest = [path[1:] for path in paths if path[0] == EVERY]
        return [_kept(child, rest) for child in node if rest and _leads(child, rest)]
    raise _unfit("a place leads into a value that has no members")


def _leads(node: Node, paths: list[Path]) -> bool:
    """Whether something of the node can be kept: all of it, or members."""
    return () in paths or isinstance(node, dict | list)


def _drop(root: Node, path: Path) -> None:
    for parent in _parents(root, path[:-1]):
        found = [key for key, _ in _members(parent, path[-1])]
        for key in reversed(found):
            del parent[key]  # type: ignore[attr-defined]


def _change(root: Node, path: Path, change: Change) -> None:
    """Replace every value that the path leads to; null stays."""
    for parent in _parents(root, path[:-1]):
        for key, child in _members(parent, path[-1]):
            if child is not None:
                parent[key] = change(child)  # type: ignore[index]


def _coarsen(root: Node, rule: CoarsePosition) -> None:
    north, east = tokens(rule.latitude), tokens(rule.longitude)
    for parent in _parents(root, north[:-1]):
        if parent is None:
            continue
        if not isinstance(parent, dict):
            raise _unfit("a position that is not part of an object")
        pair = [*_members(parent, north[-1]), *_members(parent, east[-1])]
        if all(value is None for _, value in pair):
            continue
        if len(pair) != 2:
            raise _unfit("half a position")
        cell = coarse_position(_degrees(pair[0][1], 90.0), _degrees(pair[1][1], 180.0), rule.metres)
        for (key, old), new in zip(pair, cell, strict=True):
            parent[key] = _like(old, Decimal(repr(new)))


def coarse_position(latitude: float, longitude: float, metres: float) -> tuple[float, float]:
    """The middle of the cell of a grid of at least `metres`; the grid of longitudes follows from the cell's latitude.

    Every position in a cell gives the same result, to 1e-7 degrees, and the result gives itself.
    """
    step = min(metres / METRES_PER_DEGREE, 180.0)
    row = _middle(latitude, step, 90.0)
    narrowest = math.cos(math.radians(min(abs(row) + step / 2, 90.0)))  # at the side of the cell nearest to a pole
    return row, _middle(longitude, min(step / max(narrowest, 1e-9), 360.0), 180.0)


def _middle(degrees: float, step: float, limit: float) -> float:
    """The middle of the cell, cells counted from 0 as a middle; kept on Earth."""
    return max(-limit, min(limit, round(round(degrees / step) * step, 7)))


def _degrees(node: Node, limit: float) -> float:
    value = float(_decimal(node))
    if not abs(value) <= limit:
        raise _unfit("a position that is not on Earth")
    return value


def _decimal(node: Node) -> Decimal:
    """The value of a number, whatever the format; raises RefusedError."""
    if isinstance(node, bool) or not isinstance(node, Number | int | float):
        raise _unfit("a number was expected")
    value = Decimal(node.text) if isinstance(node, Number) else Decimal(node)
    if not value.is_finite() or value.adjusted() > LARGEST_EXPONENT:
        raise _unfit("a number of usual size was expected")
    return value


def _like(old: Node, value: Decimal) -> Node:
    """A number in the notation of the one that it replaces; an integer position becomes a fraction where it must."""
    if isinstance(old, Number):
        return Number(format(value, "f"))
    whole = isinstance(old, int) and value == value.to_integral_value()
    return int(value) if whole else float(value)


def _floor(rule: CoarseTime) -> Change:
    def floor(node: Node) -> Node:
        if isinstance(node, msgpack.Timestamp):
            return msgpack.Timestamp(node.seconds // rule.seconds * rule.seconds, 0)
        if rule.unit == "rfc3339":
            return _floor_text(node, rule.seconds)
        step = Decimal(rule.seconds * UNITS_PER_SECOND[rule.unit])
        value = _decimal(node)
        return _like(node, (value - value % step if value >= 0 else value - (value % step + step) % step))

    return floor


def _floor_text(node: Node, seconds: int) -> str:
    """RFC 3339 text in the zone that it came in; raises ValueError or TypeError where it is none or has no zone."""
    if not isinstance(node, str):
        raise _unfit("a time in text was expected")
    moment = datetime.fromisoformat(node)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    coarse = (moment - since % timedelta(seconds=seconds)).isoformat()
    return coarse.removesuffix("+00:00") + "Z" if node.endswith(("Z", "z")) else coarse


def _pseudonym(key: bytes) -> Change:
    """Keyed and one-way: the same value gives the same 32 hexadecimal digits as long as the key is the same."""

    def pseudonym(node: Node) -> str:
        if isinstance(node, str):
            value = b"s" + node.encode("utf-8", "surrogatepass")
        elif isinstance(node, bytes):
            value = b"b" + node
        else:
            value = b"n" + format(_decimal(node).normalize(), "f").encode()
        return hmac.digest(key, value, "sha256")[:PSEUDONYM_BYTES].hex()

    return pseudonym
