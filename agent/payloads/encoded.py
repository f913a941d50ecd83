"""Bytes written as text: where a text holds base64, hex, escaped or numbered bytes, and how other bytes are put back.

Pure. A part's span is in the raw text, so everything around a picture stays byte for byte as it was.
"""

from __future__ import annotations

import binascii
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from agent.pictures.signatures import MIN_PICTURE_BYTES, search

MIN_RUN = MIN_PICTURE_BYTES * 4 // 3
MIN_LINE = 16  # characters of base64 in the first of several lines
_ALPHABET = rb"[A-Za-z0-9+/_-]"
_RUN = re.compile(
    rb"(?<!%(one)s)(?:%(one)s{%(long)d,}+|%(one)s{%(line)d,}+(?=\r?\n))"
    rb"(?:\r?\n%(one)s{4,}+%(end)s)*(?:={1,2}|\r?\n[0-9A-Fa-f]{2}%(end)s)?"
    % {b"one": _ALPHABET, b"long": MIN_RUN, b"line": MIN_LINE, b"end": rb"(?=[=\r\n\"'<]|\Z)"}
)
_LETTERS = bytes(0x78 if re.match(_ALPHABET, bytes([c])) else 0x20 for c in range(256))
_A_LINE, _A_RUN = b"x" * MIN_LINE, b"x" * MIN_RUN
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_MORE = {b"byte": rb"-?\d{1,3}(?:\.0++)?+", b"more": MIN_PICTURE_BYTES - 1}
_NUMBERS = re.compile(rb"\[\s*+%(byte)s(?:\s*+,\s*+%(byte)s){%(more)d,}+\s*+\]" % _MORE)
_KEYED = re.compile(rb'\{\s*+"0"\s*+:\s*+\d{1,3}(?:\s*+,\s*+"\d++"\s*+:\s*+\d{1,3}){%(more)d,}+\s*+\}' % _MORE)
_DECIMALS = re.compile(rb"\.0+")
_SPACE = re.compile(rb"\s|\\[nrt]")
_HEX = re.compile(rb"(0?[xX])?((?:[0-9A-Fa-f]{2})++)\Z")
_URL = rb"data:(?:image|video)/"
_DATA_URL = re.compile(rb"%(url)s(?:(?!%(url)s)[^,\"])*+," % {b"url": _URL}, re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_STANDARD = bytes.maketrans(b"+/", b"-_")


class Part(NamedTuple):
    """A span [start, end) of a payload, the bytes that it stands for, and how other bytes are written in its place."""

    start: int
    end: int
    data: bytes
    wrap: Callable[[bytes], bytes]


def strings(json_text: bytes) -> Iterator[Part]:
    """Yield the strings of a JSON text that have to be unescaped before they can be read."""
    if b"\\" not in json_text and json_text.isascii():
        return
    for match in _STRING.finditer(json_text):
        token = match[0]
        if len(token) > MIN_PICTURE_BYTES and (b"\\" in token or not token.isascii()):
            yield _string(match.start(), token)


def numbers(text: bytes) -> Iterator[Part]:
    """Yield the lists of byte values: some senders write bytes that way.

    Signed (Java), with a decimal point, or as an object of numbered keys (JavaScript's typed arrays) only where a
    picture shows, for numbers in these notations are measurements else.
    """
    for match in _NUMBERS.finditer(text):
        listed, ending = match[0][1:-1], b""
        if b"." in listed:
            listed, ending = _DECIMALS.sub(b"", listed), b".0"
        values = [int(value) for value in listed.split(b",")]
        smallest, largest = min(values), max(values)
        signed = smallest < 0
        if smallest < -128 or largest >= (128 if signed else 256):
            continue
        data = bytes(value & 0xFF for value in values) if signed else bytes(values)
        if not (signed or ending) or search(data) is not None:
            yield Part(match.start(), match.end(), data, partial(_as_numbers, signed=signed, ending=ending))
    if b'"0"' in text:
        yield from _keyed_numbers(text)


def _keyed_numbers(text: bytes) -> Iterator[Part]:
    for match in _KEYED.finditer(text):
        items = [item.split(b":") for item in match[0][1:-1].split(b",")]
        values = [int(value) for _, value in items]
        in_order = all(int(key.strip(b'" \t\r\n')) == index for index, (key, _) in enumerate(items))
        if in_order and max(values) < 256 and search(bytes(values)) is not None:
            yield Part(match.start(), match.end(), bytes(values), _as_keyed)


def has_unread_word(json_text: bytes, read: Iterable[tuple[int, int]], most: int) -> bool:
    """Whether a string without white space has more than `most` bytes outside the spans that could be read.

    That is what an encoding looks like that nobody here knows.
    """
    if b"\\" not in json_text and max(map(len, json_text.split(b'"'))) <= most:
        return False
    spans = _merged(read)
    ends = [end for _, end in spans]
    for match in _STRING.finditer(json_text):
        first, last = match.span()
        if last - first > most and not _SPACE.search(match[0]):
            index, unread = bisect_right(ends, first), last - first
            while index < len(spans) and spans[index][0] < last:
                unread -= min(last, ends[index]) - max(first, spans[index][0])
                index += 1
            if unread > most:
                return True
    return False


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as spans in order that share none, so that none is counted twice."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def runs(text: bytes) -> Iterator[Part]:
    """Yield the runs of base64 or hex in a text that are long enough for a picture."""
    letters = text.translate(_LETTERS)
    if _A_LINE not in letters or (_A_RUN not in letters and b"\n" not in text):
        return
    for match in _RUN.finditer(text):
        run = match[0]
        decoded = _unbase64(run)
        digits = _HEX.match(run.translate(None, b"\r\n"))
        if digits and search(decoded) is None:
            start = match.start() + digits.start(2)
            yield Part(start, match.end(), binascii.unhexlify(digits[2]), _in_lines(run, binascii.hexlify))
        else:
            yield Part(match.start(), match.end(), decoded, _in_lines(run, _base64_like(run)))


def is_shifted_picture(part: Part, text: bytes) -> bool:
    """Whether a run of base64 holds a picture that starts off its four-character beat, behind something glued on."""
    run = text[part.start : part.end]
    return any(search(_unbase64(run[shift:])) is not None for shift in (1, 2, 3))


def has_bare_data_url(text: bytes) -> bool:
    """Whether a picture stands in the text as a data URL that is not base64."""
    return b"data:" in text.lower() and any(b";base64" not in match[0].lower() for match in _DATA_URL.finditer(text))


def _string(start: int, token: bytes) -> Part:
    value = json.loads(token)
    end = start + len(token)
    latin = value.encode("latin-1", "replace")
    if search(latin) is None:
        return Part(start, end, value.encode(), _as_string)
    return Part(start, end, latin, _as_latin)


def _as_string(data: bytes) -> bytes:
    return json.dumps(data.decode(), ensure_ascii=False).encode()


def _as_latin(data: bytes) -> bytes:
    return json.dumps(data.decode("latin-1")).encode()


def _as_numbers(data: bytes, *, signed: bool, ending: bytes) -> bytes:
    values = (value - 256 if signed and value > 127 else value for value in data)
    return b"[" + b",".join(b"%d%s" % (value, ending) for value in values) + b"]"


def _as_keyed(data: bytes) -> bytes:
    return b"{" + b",".join(b'"%d":%d' % item for item in enumerate(data)) + b"}"


def _unbase64(run: bytes) -> bytes:
    plain = run.translate(_URL_SAFE, b"\r\n=")
    plain = plain[: len(plain) - (len(plain) % 4 == 1)]
    return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4))


def _base64_like(run: bytes) -> Callable[[bytes], bytes]:
    """Write base64 as this run does: its alphabet, with or without padding."""
    url_safe = b"-" in run or b"_" in run
    padded = b"=" in run or not len(run.translate(None, b"\r\n")) % 4

    def wrap(data: bytes) -> bytes:
        text = binascii.b2a_base64(data, newline=False)
        text = text.translate(_STANDARD) if url_safe else text
        return text if padded else text.rstrip(b"=")

    return wrap


def _in_lines(run: bytes, write: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Break what `write` gives into lines as long as this run's; not at all where it has none."""
    newline = b"\r\n" if b"\r\n" in run else b"\n"
    line = run.find(newline)
    if line < 0:
        return write

    def wrap(data: bytes) -> bytes:
        text = write(data)
        return newline.join(text[i : i + line] for i in range(0, len(text), line))

    return wrap
