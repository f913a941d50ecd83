"""JSON pointers (RFC 6901): what they name in a document."""

from __future__ import annotations

from typing import Any


def tokens(pointer: str) -> tuple[str, ...]:
    """The steps of a pointer, unescaped (RFC 6901, section 4)."""
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:])


def value_at(document: object, pointer: str) -> object:
    """The value that a pointer names; raises LookupError, TypeError or ValueError where there is none."""
    found: Any = document
    for name in tokens(pointer):
        found = found[int(name)] if isinstance(found, list) else found[name]
    return found
