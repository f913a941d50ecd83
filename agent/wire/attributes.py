"""The CloudEvents 1.0 attributes of a record, and their text form: which exist, what they may hold.

Every attribute goes over the wire as text in CloudEvents' canonical string form, in both modes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from agent.errors import EnvelopeError
from agent.messages import Basis

SPECVERSION = "1.0"  # CloudEvents
MAX_VALUE_BYTES = 8192  # of one attribute; with MAX_ATTRIBUTES it bounds what a reader allocates
MAX_ATTRIBUTES = 64
UTF8_BYTES = 4  # of a character at most
MAX_SEQUENCE = 2**63 - 1  # 19 digits, SQLite's largest integer
MAX_TIME_NS = 253_402_300_800 * 10**9  # the year 10000, which RFC 3339 cannot write

NAME = re.compile(r"[a-z0-9]{1,20}")  # CloudEvents 1.0, attribute naming
# CloudEvents 1.0, type String: no control characters, surrogates or noncharacters. U+FEFF: paho drops the connection
# over a user property that holds one, and the broker sends it again and again.
_BAD_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufeff\ufffe\uffff]")
_REGION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z", re.ASCII)
_SEQUENCE = re.compile(r"\d{19}", re.ASCII)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PLAIN = ("id", "source", "type", "subject", "datacontenttype", "dataclassification", "policyversion")
_REQUIRED = (*_PLAIN, "dataregion", "regionbasis", "sequence", "time", "recordedtime")
_OPTIONAL = ("dataschema", "redaction", "modeldigest", "traceparent")
NAMES = frozenset({"specversion", *_REQUIRED, *_OPTIONAL})
_RESERVED = NAMES | {"data", "keyid", "signature"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """The CloudEvents attributes of one record; construction raises EnvelopeError for what the wire cannot carry.

    `subject` is the topic on the car. `dataregion`: every region in which the record may have been captured, sorted.
    `sequence` counts per `source` and `dataregion` value. `redaction` is `Redaction.summary()`, `modeldigest` the hex
    SHA-256 of the model. `extensions` are attributes that this version does not know.
    """

    id: str
    source: str
    type: str
    subject: str
    time_ns: int
    datacontenttype: str
    dataregion: tuple[str, ...]
    regionbasis: Basis
    dataclassification: str
    policyversion: str
    recordedtime_ns: int
    sequence: int
    dataschema: str | None = None
    redaction: str | None = None
    modeldigest: str | None = None
    traceparent: str | None = None
    extensions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    texts: Mapping[str, str] = field(init=False, repr=False, compare=False)
    """What `texts` gives: it is needed for the check, the event bytes and the user properties."""

    def __post_init__(self) -> None:
        if not 0 <= self.sequence <= MAX_SEQUENCE:
            _refuse(f"sequence: {self.sequence} is not in 0..{MAX_SEQUENCE}")
        if clash := _RESERVED & self.extensions.keys():
            _refuse(f"extensions: {sorted(clash)} have a meaning of their own")
        object.__setattr__(self, "texts", MappingProxyType(_texts(self)))
        _check_texts(self.texts)


def texts(attributes: Attributes) -> dict[str, str]:
    """Every attribute by its name on the wire, in CloudEvents' canonical string form, names ascending.

    Times are RFC 3339 UTC with nine decimals; `sequence` is nineteen digits, so strings sort as the numbers do.
    """
    return dict(attributes.texts)


def _texts(attributes: Attributes) -> dict[str, str]:
    found: dict[str, str | None] = {
        "dataclassification": attributes.dataclassification,
        "datacontenttype": attributes.datacontenttype,
        "dataregion": _region_text(attributes.dataregion),
        "dataschema": attributes.dataschema,
        "id": attributes.id,
        "modeldigest": attributes.modeldigest,
        "policyversion": attributes.policyversion,
        "recordedtime": format_time(attributes.recordedtime_ns),
        "redaction": attributes.redaction,
        "regionbasis": attributes.regionbasis.value,
        "sequence": f"{attributes.sequence:019d}",
        "source": attributes.source,
        "specversion": SPECVERSION,
        "subject": attributes.subject,
        "time": format_time(attributes.time_ns),
        "traceparent": attributes.traceparent,
        "type": attributes.type,
    }
    if attributes.extensions:
        found = dict(sorted({**found, **attributes.extensions}.items()))
    return {name: text for name, text in found.items() if text is not None}


@lru_cache(maxsize=256)
def _region_text(regions: tuple[str, ...]) -> str:
    """The regions joined by commas; raises EnvelopeError where they are not sorted, unique and well named."""
    if not regions or list(regions) != sorted(set(regions)):
        _refuse(f"dataregion: {regions!r} is empty, not sorted or not unique")
    if bad := [region for region in regions if not _REGION.fullmatch(region)]:
        _refuse(f"dataregion: {bad[0]!r} is not the name of a region")
    return ",".join(regions)


def from_texts(found: Mapping[str, str]) -> Attributes:
    """Invert `texts`; raises EnvelopeError for a missing attribute or a value that `texts` would not have written."""
    if missing := [name for name in _REQUIRED if name not in found]:
        _refuse(f"attributes {', '.join(missing)} are missing")
    if found.get("specversion") != SPECVERSION:
        _refuse(f"specversion: {found.get('specversion')!r} is not {SPECVERSION}")
    if found["regionbasis"] not in set(Basis):
        _refuse(f"regionbasis: {found['regionbasis']!r} is unknown")
    if not _SEQUENCE.fullmatch(found["sequence"]):
        _refuse(f"sequence: {found['sequence']!r} is not nineteen digits")
    plain: dict[str, Any] = {name: found[name] for name in (*_PLAIN, *_OPTIONAL) if name in found}
    return Attributes(
        **plain,
        time_ns=parse_time(found["time"]),
        recordedtime_ns=parse_time(found["recordedtime"]),
        dataregion=tuple(found["dataregion"].split(",")),
        regionbasis=Basis(found["regionbasis"]),
        sequence=int(found["sequence"]),
        extensions=MappingProxyType({name: text for name, text in found.items() if name not in NAMES}),
    )


def traceparent_or_none(text: str | None) -> str | None:
    """Give a valid W3C trace context value, else None: a bad one is dropped, never a reason to refuse a record."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None


def format_time(time_ns: int) -> str:
    """RFC 3339 in UTC with nine decimals, from Unix nanoseconds; raises EnvelopeError outside 1970-9999."""
    if not 0 <= time_ns < MAX_TIME_NS:
        _refuse(f"time: {time_ns} ns is not in the years 1970 to 9999")
    seconds, rest = divmod(time_ns, 10**9)
    return f"{_format_seconds(seconds)}.{rest:09d}Z"


@lru_cache(maxsize=64)
def _format_seconds(seconds: int) -> str:
    """Most records of a second are written in it."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def parse_time(text: str) -> int:
    """Unix nanoseconds from what `format_time` wrote; raises EnvelopeError."""
    parts = _TIME.fullmatch(text)
    try:
        seconds = datetime.fromisoformat(f"{parts[1]}+00:00").timestamp() if parts else -1
    except ValueError:
        seconds = -1
    if parts is None or seconds < 0:
        _refuse(f"time: {text!r} is not RFC 3339 in UTC with nine decimals, since 1970")
    return int(seconds) * 10**9 + int(parts[2])


def _check_texts(found: Mapping[str, str]) -> None:
    """Raise EnvelopeError for what the wire cannot carry; most often one look at everything tells that all is well."""
    joined = "".join(found.values())
    short = len(found) <= MAX_ATTRIBUTES and len(joined) * UTF8_BYTES <= MAX_VALUE_BYTES
    if not (short and found.keys() <= NAMES and all(found.values()) and not _BAD_TEXT.search(joined)):
        _check_each(found)


def _check_each(found: Mapping[str, str]) -> None:
    if len(found) > MAX_ATTRIBUTES:
        _refuse(f"{len(found)} attributes; the limit is {MAX_ATTRIBUTES}")
    for name, text in found.items():
        if not NAME.fullmatch(name):
            _refuse(f"{name!r} is not the name of a CloudEvents attribute")
        if not text or _BAD_TEXT.search(text):
            _refuse(f"{name}: empty, or holds characters that CloudEvents or paho refuse")
        if len(text.encode()) > MAX_VALUE_BYTES:
            _refuse(f"{name}: longer than {MAX_VALUE_BYTES} bytes")


def _refuse(message: str) -> NoReturn:
    raise EnvelopeError(message)
