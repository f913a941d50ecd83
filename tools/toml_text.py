"""Values as TOML text: the standard library reads TOML but does not write it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from agent.errors import AgentError


class TomlError(AgentError, TypeError):
    """A value that TOML has no form for."""


def toml_text(table: Mapping[str, object]) -> str:
    """Write a table of strings, numbers, booleans, lists and tables; reading it back gives the same values."""
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, object], path: tuple[str, ...]) -> Iterator[str]:
    """Plain values come before tables, as they would belong to the last table otherwise."""
    nested = {key: found for key, value in table.items() if (found := _tables(value))}
    yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in nested)
    for key, found in nested.items():
        name = ".".join(_key(part) for part in (*path, key))
        for one in found:
            yield f"\n[{name}]" if one is table[key] else f"\n[[{name}]]"
            yield from _lines(one, (*path, key))


def _tables(value: object) -> list[Mapping[str, object]]:
    """Give the table, or the tables of a list of nothing else."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        return list(value)
    return []


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else _string(key)


def _string(text: str) -> str:
    """Write a basic string: JSON's escapes are TOML's, but TOML wants DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    message = f"{type(value).__name__} cannot be written as TOML"
    raise TomlError(message)
