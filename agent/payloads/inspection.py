"""What is in a payload: plain data, a picture, pictures inside other data, or bytes that nobody can vouch for.

This module decides alone where a picture may hide. Pure; no codec: it runs in the agent's event loop for every
message, and its quick path costs microseconds (measured in tests/test_inspection.py).

A payload, and every leaf inside it, is read in this order: accepted picture, refused signature (other picture, video,
archive), text (JSON or not), msgpack, protobuf, opaque. Raw bytes are judged, never a parsed copy, so that a duplicate
key hides nothing. What it cannot find: a picture under an encoding of someone's own (encrypted, cut up, raw samples
below `opaque_bytes`); a topic whose sender is not trusted belongs under a rule that refuses it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from urllib.parse import unquote_to_bytes

import msgspec

from agent.errors import RefusedError
from agent.payloads.encoded import (
    MIN_RUN,
    Part,
    has_bare_data_url,
    has_unread_word,
    is_shifted_picture,
    numbers,
    runs,
    strings,
)
from agent.payloads.packed import Leaf, msgpack_leaves, pack, protobuf_leaves, varint
from agent.pictures.containers import format_of
from agent.pictures.formats import PictureLimits
from agent.pictures.signatures import MIN_PICTURE_BYTES, leading, search

_CONTROL = bytes({*range(0x20)} - {*b"\t\n\v\f\r\x1b"})  # never in a text; ESC colours a terminal's log
_JSON_STARTS = (b"{", b"[", b'"')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON = msgspec.json.Decoder(msgspec.Raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionLimits:
    """How much is looked through. `opaque_bytes`: an unreadable leaf up to this size counts as plain data.

    1 kB lets keys, tokens and certificates pass; as raw samples it would be 18 x 18 pixels.
    """

    max_bytes: int = 16 << 20
    max_depth: int = 12
    max_pictures: int = 16
    opaque_bytes: int = 1024
    picture: PictureLimits = field(default_factory=PictureLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What was found. `pictures`: it must be redacted; `opaque`: it also holds bytes that cannot be read.

    Neither: plain data that parses fully. `whole`: the payload itself is the picture. `parts`: where pictures lie.
    """

    pictures: bool = False
    opaque: bool = False
    whole: bool = False
    parts: tuple[Part, ...] = ()


MAX_NESTING = 64  # lists within lists of one msgpack value; real messages have fewer than ten
PLAIN = Contents()
OPAQUE = Contents(opaque=True)
PICTURE = Contents(pictures=True, whole=True)


def inspect(payload: bytes, limits: InspectionLimits, content_type: str | None = None) -> Contents:
    """Say what is in a payload; RefusedError for what must not leave whatever the policy says.

    Reasons: `payload.limit.bytes`, `payload.limit.depth`, `payload.compressed`, `picture.format`, `picture.hidden`.
    """
    if len(payload) > limits.max_bytes:
        raise RefusedError("payload.limit.bytes", f"{len(payload)} bytes")
    contents = _survey(payload, limits, 0)
    if not contents.whole and (content_type or "").strip().lower().startswith(("image/", "video/")):
        raise RefusedError("picture.format", "declared as a picture")
    return contents


def rewrite(
    payload: bytes, redact: Callable[[bytes], bytes], limits: InspectionLimits, content_type: str | None = None
) -> bytes:
    """Return the payload with `redact(picture)` in the place of every picture, all else byte for byte as it was."""
    return _rewrite(payload, inspect(payload, limits, content_type), redact, limits, 0)


def _rewrite(
    data: bytes, contents: Contents, redact: Callable[[bytes], bytes], limits: InspectionLimits, depth: int
) -> bytes:
    if contents.whole:
        return redact(data)
    pieces: list[bytes] = []
    at = 0
    for part in contents.parts:
        inner = _survey(part.data, limits, depth + 1)
        pieces += (data[at : part.start], part.wrap(_rewrite(part.data, inner, redact, limits, depth + 1)))
        at = part.end
    return b"".join((*pieces, data[at:]))


def _survey(data: bytes, limits: InspectionLimits, depth: int) -> Contents:
    if depth > limits.max_depth:
        raise RefusedError("payload.limit.depth")
    if format_of(data):
        return PICTURE
    if reason := leading(data):
        raise RefusedError(reason)
    if _is_text(data):
        return _text(data, limits, depth)
    if (leaves := msgpack_leaves(data, MAX_NESTING)) is not None:
        return _leaves(leaves, limits, depth)
    return _binary(data, limits, depth)


def _is_text(data: bytes) -> bool:
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
    return len(data.translate(None, _CONTROL)) == len(data)


def _text(data: bytes, limits: InspectionLimits, depth: int) -> Contents:
    if has_bare_data_url(data):
        raise RefusedError("picture.hidden", "data URL without base64")
    json = _is_json(data)
    unescaped = list(strings(data)) if json else []
    encoded = list(_outside(runs(data), unescaped))
    if any(format_of(run.data) is None and is_shifted_picture(run, data) for run in encoded):
        raise RefusedError("picture.hidden", "base64 off its beat")
    found = _gather([*unescaped, *encoded, *_outside(numbers(data), unescaped)], limits, depth)
    if not json and any(_holds_runs(text) for text in _unescaped(data)):
        raise RefusedError("picture.hidden", "escaped base64 in a text that is not JSON")
    if json and len(data) > limits.opaque_bytes:
        read = [*encoded, *found.parts, *(part for part in unescaped if _is_json(part.data))]
        if has_unread_word(data, ((part.start, part.end) for part in read), limits.opaque_bytes):
            return replace(found, opaque=True)
    return found


def _outside(found: Iterable[Part], parts: list[Part]) -> Iterator[Part]:
    """Yield what does not start within one of the parts (in order, apart): their content is read by itself."""
    ends = [part.end for part in parts]
    for run in found:
        index = bisect_right(ends, run.start)
        if index == len(parts) or run.start < parts[index].start:
            yield run


def _leaves(leaves: Iterable[Leaf], limits: InspectionLimits, depth: int) -> Contents:
    return _gather([Part(x.start, x.end, x.content, partial(pack, x)) for x in leaves], limits, depth)


def _binary(data: bytes, limits: InspectionLimits, depth: int) -> Contents:
    """Bytes of no known form: opaque, or refused where a picture shows that is not a whole protobuf field."""
    if search(data) is None:
        if len(data) >= MIN_RUN and (_holds_runs(data) or _holds_runs(data.replace(b"\x00", b""))):
            raise RefusedError("picture.hidden", "base64 in a binary")
        return OPAQUE
    fields = protobuf_leaves(data) or []
    found = _gather([Part(x.start, x.end, x.content, _as_field) for x in fields], limits, depth)
    if search(b"".join(_between(data, fields))) is not None or not found.pictures:
        raise RefusedError("picture.hidden", "inside a binary")
    return found


def _gather(parts: Iterable[Part], limits: InspectionLimits, depth: int) -> Contents:
    """Survey the leaves: keep those that hold pictures, in order and without overlap."""
    opaque, kept, end = False, [], 0
    for part in sorted(parts, key=_start):
        if len(part.data) < MIN_PICTURE_BYTES or part.start < end:
            continue
        contents = _survey(part.data, limits, depth + 1)
        opaque |= contents.opaque and len(part.data) > limits.opaque_bytes
        if contents.pictures:
            kept.append(part)
            end = part.end
    if not kept:
        return OPAQUE if opaque else PLAIN
    return Contents(pictures=True, opaque=opaque, parts=tuple(kept))


def _start(part: Part) -> int:
    return part.start


def _unescaped(text: bytes) -> Iterator[bytes]:
    """What a text says where JSON's or a URL's escapes stand for the characters of base64 that need them."""
    if b"\\/" in text:
        yield text.replace(b"\\/", b"/")
    if b"%2" in text:
        yield unquote_to_bytes(text)


def _holds_runs(data: bytes) -> bool:
    return any(search(run.data) is not None for run in runs(data))


def _between(data: bytes, leaves: Iterable[Leaf]) -> Iterator[bytes]:
    at = 0
    for leaf in leaves:
        yield data[at : leaf.end - len(leaf.content)]
        at = leaf.end
    yield data[at:]


def _as_field(data: bytes) -> bytes:
    return varint(len(data)) + data


def _is_json(data: bytes) -> bool:
    """Whether a text is one JSON value, or one in each line; a byte order mark before it changes nothing."""
    data = data.removeprefix(_BYTE_ORDER_MARK)
    if data.lstrip()[:1] not in _JSON_STARTS:
        return False
    try:
        _JSON.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return b"\n" in data and _is_json_lines(data)
    return True


def _is_json_lines(data: bytes) -> bool:
    try:
        return bool(_JSON.decode_lines(data))
    except (msgspec.DecodeError, RecursionError):
        return False
