"""Records into files, partitioned by region, date and data class, each file complete under its name or not there.

    region=cn,hk/date=2026-09-21/class=telemetry/CONSUMER-ROLL.jsonl

The date is that of capture, in UTC. Of a region or class that is too long for the name of a folder, the name holds the
beginning and a digest; the records hold it as it is. A JSONL line is an event in the CloudEvents JSON format, with
`topic` and `keyid` beside the attributes; data whose type is JSON stands in `data` as it came, any other in
`data_base64`.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from agent.errors import AgentError
from agent.wire.attributes import NAMES, parse_time
from tools.listening.inbox import Roll, Row

LONGEST_NAME = 200  # bytes; Linux takes 255, of which the key and the digest need some
DIGEST_DIGITS = 16
LATEST_NS = 2**63 - 1  # what a Parquet timestamp in nanoseconds holds: the year 2262
Rows = list[Row]


class StoreError(AgentError):
    """Output cannot be written in this form here."""


def store(folder: Path, form: str, consumer: str, roll: Roll) -> list[Path]:
    """Write a roll's files and return once they are on the disk; the same roll gives the same names and contents."""
    parts: dict[Path, Rows] = {}
    for row in roll.rows:
        parts.setdefault(partition(row.fields), []).append(row)
    return [_write(folder / part / f"{consumer}-{roll.number:012d}.{form}", rows) for part, rows in parts.items()]


def partition(fields: dict[str, str]) -> Path:
    """The folder of a record, relative to the output's."""
    region, class_ = (_named(fields[name]) for name in ("dataregion", "dataclassification"))
    return Path(f"region={region}", f"date={fields['time'][:10]}", f"class={class_}")


def _named(text: str) -> str:
    """The text as part of a file name; raises nothing, however long it is."""
    name = quote(text, safe=",")
    if len(name) <= LONGEST_NAME:
        return name
    beginning = re.sub("%[0-9A-F]?$", "", name[:LONGEST_NAME])
    return f"{beginning}~{hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]}"


def jsonl(rows: Rows) -> bytes:
    """One event per line."""
    return b"".join(_line(row) for row in rows)


def parquet(rows: Rows) -> bytes:
    """One row per event: attributes as text, times as UTC nanoseconds, sequence as integer, data as bytes.

    A time after 2262 is null.
    """
    pyarrow, writer = needed("pyarrow"), needed("pyarrow.parquet")
    columns: dict[str, Any] = {}
    for name in sorted({*NAMES, "topic", "keyid"}):
        found = [row.fields.get(name) for row in rows]
        if name in {"time", "recordedtime"}:
            stamps = [parse_time(text) for text in found if text is not None]
            kept = [one if one <= LATEST_NS else None for one in stamps]
            columns[name] = pyarrow.array(kept, pyarrow.timestamp("ns", "UTC"))
        elif name == "sequence":
            columns[name] = pyarrow.array([int(text) for text in found if text is not None], pyarrow.int64())
        else:
            columns[name] = pyarrow.array(found, pyarrow.string())
    columns["extensions"] = pyarrow.array([_extensions(row) for row in rows], pyarrow.string())
    columns["data"] = pyarrow.array([row.data for row in rows], pyarrow.binary())
    out = pyarrow.BufferOutputStream()
    writer.write_table(pyarrow.table(columns), out, compression="zstd")
    return bytes(out.getvalue())


def needed(module: str) -> Any:  # noqa: ANN401 - an optional library without annotations
    """Import what only the extra `parquet` installs; raises StoreError that says so."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        message = "Parquet needs pyarrow: pip install 'residency-agent[parquet]'"
        raise StoreError(message) from exc


FORMS: dict[str, Callable[[Rows], bytes]] = {"jsonl": jsonl, "parquet": parquet}


def _extensions(row: Row) -> str | None:
    """Attributes that this version does not know, as a JSON object."""
    found = {name: text for name, text in row.fields.items() if name not in {*NAMES, "topic", "keyid"}}
    return json.dumps(found, ensure_ascii=False, sort_keys=True) if found else None


def _line(row: Row) -> bytes:
    head = json.dumps(row.fields, ensure_ascii=False).encode()[:-1]
    text = _json_text(row)
    if text is None:
        return b'%s, "data_base64": "%s"}\n' % (head, base64.b64encode(row.data))
    return b'%s, "data": %s}\n' % (head, text)


def _json_text(row: Row) -> bytes | None:
    """The data as one line of valid JSON, numbers untouched; None where it is something else."""
    media_type = row.fields["datacontenttype"].split(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        return None
    try:
        json.loads(row.data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return row.data.translate(bytes.maketrans(b"\r\n", b"  "))  # a line break in JSON is only ever white space


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _write(path: Path, rows: Rows) -> Path:
    content = FORMS[path.suffix[1:]](rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    _sync(_folders(path))
    return path


def _folders(path: Path) -> Iterable[Path]:
    """The three partition folders and the one above them: each may be new."""
    return list(path.parents)[:4]


def _sync(folders: Iterable[Path]) -> None:
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
