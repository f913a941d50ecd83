"""msgpack and protobuf read as raw bytes: where their leaves lie, and how a leaf of another length is put back.

Pure. Nothing is decoded into objects, so a duplicate key or an unknown field is seen like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from agent.pictures.signatures import search

BIN = {0xC4: 1, 0xC5: 2, 0xC6: 4}
EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
STR = {0xD9: 1, 0xDA: 2, 0xDB: 4}
FIXEXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
LISTS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # width of the count, items per count
SCALARS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
SCALARS |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
MIN_INTEGERS = 32  # a shorter list of numbers cannot be a picture
# A number from -128 to 255 in any of msgpack's notations; the last byte of each is the number modulo 256.
_NEGATIVE = rb"[\xe0-\xff]|\xd0[\x80-\xff]|\xd1\xff[\x80-\xff]|\xd2\xff{3}[\x80-\xff]|\xd3\xff{7}[\x80-\xff]"
_NATURAL = rb"[\x00-\x7f]|[\xcc\xd0].|[\xcd\xd1]\x00.|[\xce\xd2]\x00{3}.|[\xcf\xd3]\x00{7}."
_INTEGER = re.compile(b"(%s)|%s" % (_NEGATIVE, _NATURAL), re.DOTALL)
_USUAL = {*range(0x80), 0xCC}  # how numbers 0-255 begin where they are written as shortly as they can be
UNSIGNED, SIGNED = 0, 1  # kinds of a list of numbers


class Leaf(NamedTuple):
    """A leaf: its whole span, where its content lies, and its first byte (list header, bin, str, ext).

    `kind`: the type of an ext, and of a list of numbers whether it is UNSIGNED or SIGNED.
    """

    start: int
    end: int
    content: bytes
    tag: int
    kind: int = 0


def msgpack_leaves(data: bytes, max_depth: int) -> list[Leaf] | None:
    """Return every str, bin, ext and list of byte values of one msgpack value; None where the bytes are not one."""
    try:
        leaves, end = _walk(data, max_depth)
    except IndexError:
        return None
    return leaves if end == len(data) else None


def _walk(data: bytes, max_depth: int) -> tuple[list[Leaf], int]:
    leaves: list[Leaf] = []
    open_items, at = [1], 0
    while open_items:
        if not open_items[-1]:
            open_items.pop()
            continue
        open_items[-1] -= 1
        tag = data[at]
        if tag <= 0x7F or tag >= 0xE0:
            at += 1
        elif tag in SCALARS:
            at += 1 + SCALARS[tag]
        elif tag < 0xA0 or tag in LISTS:
            items, body = _list(data, at, tag)
            if tag >> 4 == 9 or tag in {0xDC, 0xDD}:
                leaves += _integers(data, at, body, items)
            if len(open_items) > max_depth or items > len(data) - body:
                raise IndexError
            open_items.append(items)
            at = body
        else:
            leaf = _leaf(data, at, tag)
            leaves.append(leaf)
            at = leaf.end
    return leaves, at


def _list(data: bytes, at: int, tag: int) -> tuple[int, int]:
    if tag < 0xA0:
        return (tag & 15) * (2 if tag < 0x90 else 1), at + 1
    width, each = LISTS[tag]
    return int.from_bytes(data[at + 1 : at + 1 + width], "big") * each, at + 1 + width


def _leaf(data: bytes, at: int, tag: int) -> Leaf:
    kind = 0
    if 0xA0 <= tag <= 0xBF:
        length, body = tag & 31, at + 1
    elif tag in FIXEXT:
        length, body, kind = FIXEXT[tag], at + 2, data[at + 1]
    else:
        width = BIN.get(tag) or EXT.get(tag) or STR.get(tag)
        if width is None:
            raise IndexError
        length, body = int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
        if tag in EXT:
            kind, body = data[body], body + 1
    if body + length > len(data):
        raise IndexError
    return Leaf(at, body + length, data[body : body + length], tag, kind)


def _integers(data: bytes, at: int, body: int, items: int) -> Iterator[Leaf]:
    """A list of numbers 0-255 is a leaf as well: some senders write bytes that way, others as numbers -128-127.

    Of numbers that are not written as shortly as they could be, and of negative ones, only where a picture shows.
    """
    if items < MIN_INTEGERS:
        return
    content = bytearray()
    usual, kind, largest = True, UNSIGNED, 0
    while len(content) < items and (match := _INTEGER.match(data, body)):
        value = match[0][-1]
        content.append(value)
        if match[1]:
            kind = SIGNED
        else:
            usual &= data[body] in _USUAL
            largest = max(largest, value)
        body = match.end()
    if len(content) < items or (kind == SIGNED and largest > 127):
        return
    found = bytes(content)
    if (usual and kind == UNSIGNED) or search(found) is not None:
        yield Leaf(at, body, found, 0xDD, kind)


def pack(leaf: Leaf, content: bytes) -> bytes:
    """Return the leaf with other content: the same family and ext type, the shortest header that fits."""
    if leaf.tag == 0xDD:
        high = 0xD0 if leaf.kind == SIGNED else 0xCC
        body = b"".join(bytes([value]) if value < 0x80 else bytes([high, value]) for value in content)
        return b"\xdd" + len(content).to_bytes(4, "big") + body
    if leaf.tag in EXT or leaf.tag in FIXEXT:
        return _sized(EXT, len(content)) + bytes([leaf.kind]) + content
    return _sized(BIN if leaf.tag in BIN else STR, len(content)) + content


def _sized(family: dict[int, int], length: int) -> bytes:
    tag, width = next((tag, width) for tag, width in family.items() if length < 1 << 8 * width)
    return bytes([tag]) + length.to_bytes(width, "big")


def protobuf_leaves(data: bytes) -> list[Leaf] | None:
    """Return every length-delimited field of one protobuf message; None where the bytes are not one."""
    leaves: list[Leaf] = []
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            if not key >> 3:
                return None
            match key & 7:
                case 0:
                    _, at = _varint(data, at)
                case 1:
                    at += 8
                case 2:
                    length, body = _varint(data, at)
                    leaves.append(Leaf(at, body + length, data[body : body + length], 2))
                    at = body + length
                case 5:
                    at += 4
                case _:
                    return None
    except IndexError:
        return None
    return leaves if at == len(data) else None


def varint(value: int) -> bytes:
    """Encode a length as protobuf does: seven bits a byte, the lowest first."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise IndexError
