"""libturbojpeg, where the system has it: a JPEG's samples as they are stored, and masks in its coefficients.

Pillow gives neither. With them a picture is decoded once instead of twice, and what is outside the masks leaves without
being coded anew: its coefficients are the source's own. Without the library, or for a stream that it warns of, both
functions return None, and Pillow does the work.

The functions are those of TurboJPEG 1.2 to 3.x, which all lie in `libturbojpeg.so.0`; loading it needs files, using it
none, so that the worker can load it and then give files up.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from agent.errors import RefusedError
from agent.pictures.formats import Colour, Format, Header
from agent.redaction.masking import Area, Pixels

LIBRARY = "libturbojpeg.so.0"
PROGRESSIVE, NO_MARKERS = 32, 64  # TJXOPT_PROGRESSIVE, TJXOPT_COPYNONE
KINDS: Mapping[tuple[tuple[int, int], ...], int] = {
    ((1, 1), (1, 1), (1, 1)): 0,
    ((2, 1), (1, 1), (1, 1)): 1,
    ((2, 2), (1, 1), (1, 1)): 2,
    ((1, 2), (1, 1), (1, 1)): 4,
    ((4, 1), (1, 1), (1, 1)): 5,
}  # TJSAMP: the samplings of colour pictures that the library knows
GREY = 3  # TJSAMP_GRAY
SIDE = 8  # samples of a block in either direction
BLOCK_BYTES = 2 * SIDE * SIDE  # of its coefficients
LEVEL = 128  # that black lies below the middle of luma; chroma without colour lies in the middle


class _Region(ctypes.Structure):
    """tjregion, in samples."""

    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


_Filter = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_short),  # a row of blocks, 64 coefficients each
    _Region,  # what of the component it holds
    _Region,  # the whole component
    *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p),  # component, transform, tjtransform
)


class _Transform(ctypes.Structure):
    """tjtransform."""

    _fields_ = [
        ("r", _Region),
        ("op", ctypes.c_int),
        ("options", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("customFilter", _Filter),
    ]


@dataclass(frozen=True, slots=True)
class _Span:
    """Blocks [first, end) of a row, and the coefficients that they get, one block after the other."""

    first: int
    end: int
    coefficients: bytes


@dataclass(slots=True)
class _Masks:
    """The spans by (component, row of blocks), those of them that were written, and what went wrong meanwhile."""

    spans: Mapping[tuple[int, int], Sequence[_Span]]
    written: set[tuple[int, int]] = field(default_factory=set)
    error: BaseException | None = None


class Turbo:
    """The loaded library, for one call at a time.

    The callback that writes masks is made once: it takes memory that can be executed, and later a confined process may
    get none.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._masks = _Masks({})
        self._filter = _Filter(self._visited)
        for name in ("tjInitDecompress", "tjInitTransform"):
            getattr(library, name).restype = ctypes.c_void_p
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_ulong
        taken: tuple[Any, ...] = pointer, ctypes.c_char_p, size
        library.tjDestroy.argtypes = library.tjFree.argtypes = [pointer]
        library.tjFree.restype = None
        library.tjDecompressHeader3.argtypes = [*taken, *(ctypes.POINTER(number),) * 4]
        library.tjDecompressToYUVPlanes.argtypes = [*taken, ctypes.POINTER(pointer), number, pointer, number, number]
        library.tjTransform.argtypes = [*taken, number, pointer, pointer, pointer, number]

    def planes(self, header: Header) -> tuple[Pixels, ...] | None:
        """Luma (height, width), then two chroma planes as they are stored, all uint8; luma alone of a grey picture.

        None for a stream that the library does not know, or of which it has anything to say.
        """
        kind = _kind(header)
        if kind is None:
            return None
        with self._lock, _Handle(self._library, self._library.tjInitDecompress()) as handle:
            found = [ctypes.c_int() for _ in range(4)]
            stream = header.clean, len(header.clean)
            if self._library.tjDecompressHeader3(handle, *stream, *map(ctypes.byref, found)) != 0:
                return None
            if [value.value for value in found[:3]] != [header.width, header.height, kind]:
                return None
            planes = [np.empty(shape, np.uint8) for shape in _shapes(header)]
            where = (ctypes.c_void_p * len(planes))(*(plane.ctypes.data for plane in planes))
            if self._library.tjDecompressToYUVPlanes(handle, *stream, where, header.width, None, header.height, 0) != 0:
                return None
        across, down = _samples(header)
        return tuple(
            np.ascontiguousarray(plane[: -(-header.height * v // down), : -(-header.width * h // across)])
            for plane, (h, v) in zip(planes, _factors(header), strict=True)
        )

    def masked(self, header: Header, areas: Sequence[Area]) -> bytes | None:
        """The JPEG with whole blocks in black, coded as the source was and without its markers.

        `areas` are of the stored picture and end at the edges of `header.block`, or of the picture. None where the
        library cannot write such a stream; RefusedError where not every block was reached.
        """
        if _kind(header) is None or not _can_be_written(header):
            return None
        transform = _Transform()
        transform.options = NO_MARKERS | (PROGRESSIVE if header.progressive else 0)
        transform.customFilter = self._filter
        target, size = ctypes.c_void_p(), ctypes.c_ulong()
        with self._lock, _Handle(self._library, self._library.tjInitTransform()) as handle:
            masks = self._masks = _Masks(_spans(header, areas))
            stream = header.clean, len(header.clean)
            ends = ctypes.byref(target), ctypes.byref(size), ctypes.byref(transform)
            try:
                failed = self._library.tjTransform(handle, *stream, 1, *ends, 0) != 0
                if masks.error is not None:
                    raise RefusedError("redaction.failed", type(masks.error).__name__) from masks.error
                if failed:
                    return None
                if masks.written != masks.spans.keys():
                    raise RefusedError("redaction.failed", "blocks")
                return ctypes.string_at(target, size.value)
            finally:
                self._library.tjFree(target)

    def _visited(self, row: Any, held: _Region, _: _Region, component: int, *rest: object) -> int:  # noqa: ANN401, ARG002
        """Write the masks of one row of blocks; -1 ends the transform. An exception would be lost in C: it is kept."""
        masks, place = self._masks, (component, held.y // SIDE)
        spans = masks.spans.get(place)
        if spans is None:
            return 0
        try:
            start = ctypes.addressof(row.contents)
            for span in spans:
                if span.end * SIDE > held.w:
                    return -1
                length = (span.end - span.first) * BLOCK_BYTES
                ctypes.memmove(start + span.first * BLOCK_BYTES, span.coefficients, length)
            masks.written.add(place)
        except BaseException as exc:  # noqa: BLE001 - as above
            masks.error = exc
            return -1
        return 0


class _Handle:
    """A tjhandle for the time of a `with`."""

    def __init__(self, library: ctypes.CDLL, handle: int | None) -> None:
        self._library, self._handle = library, handle

    def __enter__(self) -> int:
        if not self._handle:
            raise MemoryError
        return self._handle

    def __exit__(self, *_: object) -> None:
        self._library.tjDestroy(self._handle)


@cache
def turbo() -> Turbo | None:
    """The library of this system; None where there is none, or none that can be used."""
    with suppress(OSError, AttributeError, MemoryError):
        return Turbo(ctypes.CDLL(LIBRARY))
    return None


def codec() -> str:
    """What JPEGs are masked with, as `residency-agent doctor` says it."""
    return "libturbojpeg" if turbo() else "Pillow"


def _kind(header: Header) -> int | None:
    """TJSAMP of a picture that the library can take; None of any other, and of what is no JPEG."""
    if header.format is not Format.JPEG:
        return None
    if header.colour is Colour.GREY:
        return GREY
    return KINDS.get(header.sampling) if header.colour is Colour.YCC else None


def _can_be_written(header: Header) -> bool:
    """Whether the library can code as the source did.

    It makes no restart markers, and a picture's own Huffman tables only where the picture is progressive. A step of 0,
    which no encoder has, leaves no way to say black.
    """
    standard = header.progressive or not header.optimised
    return standard and not header.restart and header.tables[0][0] > 0


def _factors(header: Header) -> tuple[tuple[int, int], ...]:
    """Sampling factors of all components; those of a lone one do not count."""
    return ((1, 1),) if len(header.sampling) == 1 else header.sampling


def _samples(header: Header) -> tuple[int, int]:
    """Samples of an MCU's finest component along a block's side: the largest factors."""
    return header.block[0] // SIDE, header.block[1] // SIDE


def _shapes(header: Header) -> list[tuple[int, int]]:
    """What tjPlaneWidth and tjPlaneHeight give: the picture is filled up to a whole sample of the coarsest plane."""
    across, down = _samples(header)
    return [(-(-header.height // down) * v, -(-header.width // across) * h) for h, v in _factors(header)]


def _spans(header: Header, areas: Sequence[Area]) -> dict[tuple[int, int], list[_Span]]:
    """The areas as blocks of each component, by (component, row)."""
    width, height = header.block
    widest = -(-header.width // SIDE)
    spans: dict[tuple[int, int], list[_Span]] = {}
    for component, ((h, v), table) in enumerate(zip(_factors(header), header.tables, strict=True)):
        black = _black(component, table[0]) * widest
        for area in areas:
            span = _Span(area.x1 * h // width, -(-area.x2 * h // width), black)
            for row in range(area.y1 * v // height, -(-area.y2 * v // height)):
                spans.setdefault((component, row), []).append(span)
    return spans


def _black(component: int, step: int) -> bytes:
    """The coefficients of a black block: the first is eight times the mean, in the quantisation's steps, rounded up."""
    mean = -(-SIDE * LEVEL // step) if component == 0 else 0
    return (-mean).to_bytes(2, sys.byteorder, signed=True).ljust(BLOCK_BYTES, b"\0")
