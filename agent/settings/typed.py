"""Plain tables (as tomllib gives them) into msgspec structs, with every mistake named by its full key.

msgspec stops at the first mistake and writes `[...]` for the keys of a table; a person who corrects a file wants all
mistakes and the exact key. So structs are walked here, and msgspec judges the leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from agent.errors import ConfigError, InvalidConfigError

S = TypeVar("S", bound=msgspec.Struct)
_MISSING = object()


def convert(file: Path | str, table: object, wanted: type[S]) -> S:
    """`table` as a `wanted` struct; raises InvalidConfigError naming every mistake."""
    mistakes: list[ConfigError] = []
    value = _value(_Place(file, "", mistakes), table, wanted)
    if mistakes:
        raise InvalidConfigError(mistakes)
    return cast("S", value)


class _Place:
    """A key in a file, and the list that its mistakes go to."""

    def __init__(self, file: Path | str, key: str, mistakes: list[ConfigError]) -> None:
        self.file, self.key, self.mistakes = file, key, mistakes

    def at(self, name: str | int) -> _Place:
        child = f"{self.key}[{name}]" if isinstance(name, int) else f"{self.key}.{name}".lstrip(".")
        return _Place(self.file, child, self.mistakes)

    def mistake(self, found: object, wanted: str) -> object:
        self.mistakes.append(ConfigError(self.file, self.key or "the file", found, wanted))
        return _MISSING


def _value(place: _Place, found: object, wanted: Any) -> object:  # noqa: ANN401 - a type expression
    wanted = _without_none(wanted)
    if _is_struct(wanted):
        return _struct(place, found, wanted)
    if get_origin(wanted) is dict and _is_struct(get_args(wanted)[1]):
        return _table_of_structs(place, found, get_args(wanted)[1])
    if get_origin(wanted) is list and _is_struct(get_args(wanted)[0]):
        return _array_of_structs(place, found, get_args(wanted)[0])
    if isinstance(found, str) and "\0" in found:
        return place.mistake(found, "text without U+0000, which no name of a file, host or topic can hold")
    try:
        return msgspec.convert(found, wanted)
    except msgspec.ValidationError as exc:
        return place.mistake(found, _wanted_text(exc))


def _table_of_structs(place: _Place, found: object, wanted: type[msgspec.Struct]) -> object:
    if not isinstance(found, Mapping):
        return place.mistake(found, "a table of tables")
    for key in found:
        if not key or any(character.isspace() or not character.isprintable() for character in key):
            place.mistake(key, "names without white space and control characters")
    return {key: _struct(place.at(key), value, wanted) for key, value in found.items()}


def _array_of_structs(place: _Place, found: object, wanted: type[msgspec.Struct]) -> object:
    if not isinstance(found, list):
        return place.mistake(found, "an array of tables")
    return [_struct(place.at(index), value, wanted) for index, value in enumerate(found)]


def _struct(place: _Place, found: object, wanted: type[msgspec.Struct]) -> object:
    if not isinstance(found, Mapping):
        return place.mistake(found, "a table")
    before = len(place.mistakes)
    hints = get_type_hints(wanted, include_extras=True)
    fields = {field.encode_name: field for field in msgspec.structs.fields(wanted)}
    for key in found.keys() - fields.keys():
        # its value is told to nobody: it may be a secret
        place.at(key).mistake("an unknown key", f"one of the known keys: {', '.join(sorted(fields))}")
    values: dict[str, object] = {}
    for key, field in fields.items():
        if key in found:
            values[field.name] = _value(place.at(key), found[key], hints[field.name])
        elif field.required:
            place.at(key).mistake("nothing", "a value; this key is required")
    if len(place.mistakes) > before:
        return _MISSING
    try:
        return wanted(**values)
    except ValueError as exc:
        return place.mistake(dict(found), str(exc))


def _without_none(wanted: Any) -> Any:  # noqa: ANN401
    if get_origin(wanted) not in (Union, UnionType):
        return wanted
    kept = [argument for argument in get_args(wanted) if argument is not NoneType]
    return kept[0] if len(kept) == 1 else wanted


def _is_struct(wanted: object) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, msgspec.Struct)


def _wanted_text(exc: msgspec.ValidationError) -> str:
    text = str(exc).split(" - at ")[0].removeprefix("Expected ").split(", got ")[0]
    return text.replace("`", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of a configuration file, for its reference."""

    name: str
    type: str
    default: str
    meaning: str


def keys(wanted: type[msgspec.Struct], prefix: str = "") -> Iterator[Key]:
    """Every key of a struct; `NAME` stands for a name of the user's, `[]` for a table in an array."""
    hints = get_type_hints(wanted, include_extras=True)
    for field in msgspec.structs.fields(wanted):
        name, inner = f"{prefix}{field.encode_name}", _without_none(hints[field.name])
        arguments = get_args(inner)
        if _is_struct(inner):
            yield from keys(inner, f"{name}.")
        elif get_origin(inner) is dict and _is_struct(arguments[1]):
            yield from keys(arguments[1], f"{name}.NAME.")
        elif get_origin(inner) is list and _is_struct(arguments[0]):
            yield from keys(arguments[0], f"{name}[].")
        else:
            yield Key(name=name, type=_type_text(inner), default=_default_text(field), meaning=_meaning(inner))


def _type_text(wanted: Any) -> str:  # noqa: ANN401
    if get_origin(wanted) is Annotated:
        return _type_text(get_args(wanted)[0])
    if get_origin(wanted) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(wanted))
    if get_origin(wanted) is list:
        return f"list of {_type_text(get_args(wanted)[0])}"
    if get_origin(wanted) is dict:
        return "table"
    return {"str": "text", "int": "integer", "float": "number", "bool": "boolean"}.get(wanted.__name__, str(wanted))


def _default_text(field: msgspec.structs.FieldInfo) -> str:
    default = field.default
    if default is msgspec.NODEFAULT:
        factory = field.default_factory
        return "required" if factory is msgspec.NODEFAULT else f"`{factory()!r}`"
    return f"`{json.dumps(default)}`"


def _meaning(wanted: Any) -> str:  # noqa: ANN401
    metas = [meta for meta in get_args(wanted)[1:] if isinstance(meta, msgspec.Meta)]
    return next((meta.description for meta in metas if meta.description), "")
