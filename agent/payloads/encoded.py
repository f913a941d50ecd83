"""Bytes written as text: where a text holds base64, hex, escaped or numbered bytes, and how other bytes are put back.

Pure. A part's span is in the raw text, so everything around a picture stays byte for byte as it was.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from agent.pictures.signatures import MIN_PICTURE_BYTES, search

MIN_RUN = MIN_PICTURE_BYTES * 4 // 3
MIN_LINE = 16  # characters of base64 in the first of several lines
_ALPHABET = rb"[A-Za-z0-9+/_-]"
_RUN = re.compile(
    rb"(?<!%(one)s)(?:%(one)s{%(long)d,}+|%(one)s{%(line)d,}+(?=\r?\n))(?:\r?\n%(one)s{4,}+(?=[=\r\n\"'<]|\Z))*={0,2}"
    % {b"one": _ALPHABET, b"long": MIN_RUN, b"line": MIN_LINE}
)
_LETTERS = bytes(0x78 if re.match(_ALPHABET, bytes([c])) else 0x20 for c in range(256))
_A_LINE, _A_RUN = b"x" * MIN_LINE, b"x" * MIN_RUN
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NUMBERS = re.compile(rb"\[\s*+\d{1,3}(?:\s*+,\s*+\d{1,3}){%d,}+\s*+\]" % (MIN_PICTURE_BYTES - 1))
_SPACE = re.compile(rb"\s|\\[nrt]")
_HEX = re.compile(rb"(?:[0-9A-Fa-f]{2})++\Z")
_DATA_URL = re.compile(rb"data:(?:image|video)/[^,\"]*+,", re.IGNORECASE)
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
    """Yield the lists of byte values: some senders write bytes that way."""
    for match in _NUMBERS.finditer(text):
        values = [int(value) for value in match[0][1:-1].split(b",")]
        if max(values) < 256:
            yield Part(match.start(), match.end(), bytes(values), _as_numbers)


def has_unread_word(json_text: bytes, read: Iterable[tuple[int, int]], most: int) -> bool:
    """Whether a string without white space has more than `most` bytes outside the spans that could be read.

    That is what an encoding looks like that nobody here knows.
    """
    if max(map(len, json_text.split(b'"'))) <= most:
        return False
    spans = sorted(read)
    for match in _STRING.finditer(json_text):
        if len(match[0]) > most and not _SPACE.search(match[0]):
            first, last = match.span()
            known = sum(max(0, min(last, end) - max(first, start)) for start, end in spans)
            if last - first - known > most:
                return True
    return False


def runs(text: bytes) -> Iterator[Part]:
    """Yield the runs of base64 or hex in a text that are long enough for a picture."""
    letters = text.translate(_LETTERS)
    if _A_LINE not in letters or (_A_RUN not in letters and b"\n" not in text):
        return
    for match in _RUN.finditer(text):
        run = match[0]
        decoded = _unbase64(run)
        if _HEX.match(run) and search(decoded) is None:
            yield Part(match.start(), match.end(), binascii.unhexlify(run), _as_hex)
        else:
            yield Part(match.start(), match.end(), decoded, _base64_like(run))


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


def _as_numbers(data: bytes) -> bytes:
    return b"[" + b",".join(b"%d" % value for value in data) + b"]"


def _as_hex(data: bytes) -> bytes:
    return binascii.hexlify(data)


def _unbase64(run: bytes) -> bytes:
    plain = run.translate(_URL_SAFE, b"\r\n=")
    plain = plain[: len(plain) - (len(plain) % 4 == 1)]
    return binascii.a2b_base64(plain + b"=" * (-len(plain) % 4))


def _base64_like(run: bytes) -> Callable[[bytes], bytes]:
    """Write base64 as this run does: its alphabet, with or without padding, in lines of the same length."""
    url_safe = b"-" in run or b"_" in run
    padded = b"=" in run or not len(run.translate(None, b"\r\n")) % 4
    newline = b"\r\n" if b"\r\n" in run else b"\n"
    line = run.find(newline)

    def wrap(data: bytes) -> bytes:
        text = binascii.b2a_base64(data, newline=False)
        text = text.translate(_STANDARD) if url_safe else text
        text = text if padded else text.rstrip(b"=")
        return newline.join(text[i : i + line] for i in range(0, len(text), line)) if line > 0 else text

    return wrap
