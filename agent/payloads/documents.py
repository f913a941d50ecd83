"""JSON and msgpack payloads as trees that can be written back without a change of meaning.

JSON numbers stay text, so that no digit is lost; object keys are unique, so that two readers cannot disagree on a
value. msgpack keeps the difference between text and bytes, extension types, and text that is not UTF-8.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import msgpack  # type: ignore[import-untyped]  # it ships no annotations

from agent.errors import RefusedError

JSON_TYPES = frozenset({"application/json", "text/json"})
MSGPACK_TYPES = frozenset({"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"})
_MSGPACK_CONTAINERS = (*range(0x80, 0xA0), *range(0xDC, 0xE0))  # fixmap, fixarray, array 16/32, map 16/32


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number as it was written."""

    text: str


Node = object  # dict, list, str, Number, int, float, bool, None, bytes, msgpack.ExtType, msgpack.Timestamp


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed payload and how to write it back; the root is a dict or a list."""

    root: dict[Node, Node] | list[Node]
    dump: Callable[[Node], bytes]


def parse_document(payload: bytes, media_type: str | None = None) -> Document:
    """The tree of a payload. Raises RefusedError where it is neither, or not a whole object or array."""
    load, dump = (_load_json, dump_json) if _is_json(payload, media_type) else (_load_msgpack, _dump_msgpack)
    try:
        root = load(payload)
    except (ValueError, TypeError, RecursionError, MemoryError) as exc:
        raise RefusedError("fields.unreadable", type(exc).__name__) from exc
    if not isinstance(root, dict | list):
        raise RefusedError("fields.unreadable", "neither an object nor an array")
    return Document(root, dump)


def _is_json(payload: bytes, media_type: str | None) -> bool:
    """By the media type where it names a format, else by the first byte; raises RefusedError where neither tells."""
    name = (media_type or "").partition(";")[0].strip().lower()
    if name in JSON_TYPES or name.endswith("+json"):
        return True
    if name in MSGPACK_TYPES or name.endswith("+msgpack"):
        return False
    first = payload.lstrip(b" \t\r\n")[:1]
    if first in {b"{", b"["}:
        return True
    if payload[:1] and payload[0] in _MSGPACK_CONTAINERS:
        return False
    raise RefusedError("fields.unreadable", "neither JSON nor msgpack")


def _unique(pairs: list[tuple[Node, Node]]) -> dict[Node, Node]:
    found = dict(pairs)
    if len(found) != len(pairs):
        message = "a key occurs twice"
        raise ValueError(message)
    return found


def _not_a_number(text: str) -> NoReturn:
    message = f"{text} is not JSON"
    raise ValueError(message)


def _load_json(payload: bytes) -> Node:
    text = payload.decode("utf-8")
    tree: Node = json.loads(
        text, object_pairs_hook=_unique, parse_int=Number, parse_float=Number, parse_constant=_not_a_number
    )
    return tree


def dump_json(node: Node) -> bytes:
    """UTF-8 JSON without white space; lone surrogates stay escaped."""
    return _json_text(node).encode("utf-8")


def _json_text(node: Node) -> str:
    if isinstance(node, Number):
        return node.text
    if isinstance(node, dict):
        return "{" + ",".join(f"{_json_text(key)}:{_json_text(value)}" for key, value in node.items()) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_json_text, node)) + "]"
    lone = isinstance(node, str) and any("\ud800" <= letter <= "\udfff" for letter in node)
    return json.dumps(node, ensure_ascii=lone)


def _load_msgpack(payload: bytes) -> Node:
    tree: Node = msgpack.unpackb(
        payload, raw=False, strict_map_key=False, object_pairs_hook=_unique, unicode_errors="surrogateescape"
    )
    return tree


def _dump_msgpack(node: Node) -> bytes:
    packed: bytes = msgpack.packb(node, use_bin_type=True, unicode_errors="surrogateescape")
    return packed
