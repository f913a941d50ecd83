"""Pictures and what is known about them: which source labels which class, and how completely.

A source that does not label a class says nothing about it, so its pictures must not teach that the class is absent.
What is unknown becomes an ignore box over the whole picture; what a teacher doubts becomes an ignore box over the
doubtful place. A validation split is held out by groups of like pictures, so that neighbours never lie on both sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from agent.errors import AgentError

CLASSES = ("person", "face", "plate")
SURE = 0.5  # teacher score from which a box counts as true (measured on the supplied pseudo-labels)
DOUBT = 0.2  # teacher score from which a place is ignored; below it counts as background
SAME = 0.4  # intersection over union from which two boxes mean the same object
HELD_OUT = 8  # one group in eight is for validation
BLOCK = 40  # consecutive frames of a drive or walk that stay together
LIKE = 6  # differing bits of a 64-bit difference hash below which two pictures are one group


class Knowledge(StrEnum):
    """What a source's labels say about a class."""

    FULL = "full"  # every object is labelled
    PARTIAL = "partial"  # labels are right but not complete; a sure teacher completes them
    TAUGHT = "taught"  # no labels; the teacher's sure boxes stand for them
    UNKNOWN = "unknown"  # nothing is known: no loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What one collection of pictures labels; `sequence` says that neighbours are nearly the same picture."""

    person: Knowledge = Knowledge.TAUGHT
    face: Knowledge = Knowledge.TAUGHT
    plate: Knowledge = Knowledge.UNKNOWN
    sequence: bool = False


SOURCES: Mapping[str, Source] = {
    "openimages_lp": Source(plate=Knowledge.FULL),
    "experiment_plates_uniq": Source(plate=Knowledge.FULL),
    "usfl_lhqow": Source(plate=Knowledge.FULL),
    "ro_dashcam_day": Source(plate=Knowledge.PARTIAL, sequence=True),
    "facemask853_train": Source(face=Knowledge.FULL),
    "bikeshelmets": Source(),
    "coco_minis": Source(person=Knowledge.FULL),
    "tud_street": Source(person=Knowledge.PARTIAL, sequence=True),
}


class DatasetError(AgentError, ValueError):
    """A label file that cannot be used: says which entry and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Boxes (n, 4) in pixels with class numbers (n,); where `ignored` (n,) is set, the place teaches nothing."""

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    ignored: NDArray[np.bool_]

    @staticmethod
    def of(rows: Iterable[tuple[int, Sequence[float], bool]]) -> Targets:
        """From (class number, box, ignored) rows."""
        listed = list(rows)
        return Targets(
            boxes=np.array([row[1] for row in listed], np.float32).reshape(-1, 4),
            classes=np.array([row[0] for row in listed], np.int64),
            ignored=np.array([row[2] for row in listed], np.bool_),
        )

    @staticmethod
    def joined(parts: Sequence[Targets]) -> Targets:
        """All rows of all parts."""
        if not parts:
            return Targets.of(())
        return Targets(
            boxes=np.concatenate([part.boxes for part in parts]),
            classes=np.concatenate([part.classes for part in parts]),
            ignored=np.concatenate([part.ignored for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One picture of the label file: people's boxes by label name, teachers' boxes with a score."""

    file: str
    source: str
    width: int
    height: int
    boxes: tuple[tuple[str, tuple[float, ...]], ...]
    taught: tuple[tuple[str, tuple[float, ...], float], ...] = field(default=())


def read_entries(labels: Path) -> list[Entry]:
    """The entries of a labels.json; raises DatasetError for anything malformed."""
    try:
        raw = json.loads(labels.read_bytes())
        return [_entry(item) for item in raw]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        message = f"{labels}: {type(exc).__name__}: {exc}"
        raise DatasetError(message) from exc


def _entry(item: Mapping[str, object]) -> Entry:
    boxes, taught = item["boxes"], item.get("pseudo", [])
    if not isinstance(boxes, list) or not isinstance(taught, list):
        message = f"{item['file']}: boxes and pseudo are lists"
        raise TypeError(message)
    return Entry(
        file=str(item["file"]),
        source=str(item["source"]),
        width=int(str(item["w"])),
        height=int(str(item["h"])),
        boxes=tuple((str(row[0]), _box(row)) for row in boxes),
        taught=tuple((str(row[0]), _box(row), float(row[5])) for row in taught),
    )


def _box(row: Sequence[str | float]) -> tuple[float, ...]:
    x1, y1, x2, y2 = (float(value) for value in row[1:5])
    return x1, y1, x2, y2


def overlap(box: Sequence[float], others: Sequence[Sequence[float]]) -> float:
    """Largest intersection over union of a box with any of the others; 0 where there are none."""
    best = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width <= 0 or height <= 0:
            continue
        shared = width * height
        both = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
        best = max(best, shared / both)
    return best


def targets_of(entry: Entry, source: Source | None = None, *, completed: bool = False) -> Targets:
    """What an entry teaches. `completed`: the teacher's boxes cover also the classes that were unknown."""
    known = source or SOURCES.get(entry.source) or _own(entry)
    rows: list[tuple[int, Sequence[float], bool]] = []
    for number, label in enumerate(CLASSES):
        knowledge = Knowledge(getattr(known, label))
        if knowledge is Knowledge.UNKNOWN and completed:
            knowledge = Knowledge.TAUGHT
        rows.extend(_rows_of(entry, number, label, knowledge))
    return Targets.of(rows)


def _own(entry: Entry) -> Source:
    """An unlisted source: what it labels it labels fully, the rest is taught where teachers spoke, else unknown."""
    spoken = {label for label, _, _ in entry.taught}
    known = {label: Knowledge.TAUGHT if label in spoken else Knowledge.UNKNOWN for label in CLASSES}
    known |= {label: Knowledge.FULL for label, _ in entry.boxes if label in CLASSES}
    return Source(person=known["person"], face=known["face"], plate=known["plate"])


def _rows_of(entry: Entry, number: int, label: str, knowledge: Knowledge) -> list[tuple[int, Sequence[float], bool]]:
    if knowledge is Knowledge.UNKNOWN:
        return [(number, (0.0, 0.0, float(entry.width), float(entry.height)), True)]
    own = [box for name, box in entry.boxes if name == label and _sane(box, entry)]
    rows: list[tuple[int, Sequence[float], bool]] = [(number, box, False) for box in own]
    taken = list(own)
    for name, box, score in sorted(entry.taught, key=lambda row: -row[2]):
        if name != label or score < DOUBT or overlap(box, taken) >= SAME:
            continue
        believed = score >= SURE and knowledge is not Knowledge.FULL
        rows.append((number, box, not believed))
        taken.append(box)
    if label == "face":
        faces = [box for _, box, _ in rows]
        heads = [box for name, box in entry.boxes if name == "head" and _sane(box, entry)]
        rows.extend((number, box, True) for box in heads if not _holds(box, faces))
    return rows


def _sane(box: Sequence[float], entry: Entry) -> bool:
    """A box with an area that is inside its picture, give or take two pixels."""
    inside = box[0] >= -2 and box[1] >= -2 and box[2] <= entry.width + 2 and box[3] <= entry.height + 2
    return inside and box[2] - box[0] >= 1 and box[3] - box[1] >= 1


def _holds(head: Sequence[float], faces: Sequence[Sequence[float]]) -> bool:
    """Whether the middle of a face lies in a head box: that head needs no ignoring, its face is known."""
    middles = (((face[0] + face[2]) / 2, (face[1] + face[3]) / 2) for face in faces)
    return any(head[0] <= x <= head[2] and head[1] <= y <= head[3] for x, y in middles)


def difference_hash(picture: Image.Image) -> int:
    """64 bits: whether each of 8x8 grey cells is darker than its right neighbour."""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def groups(entries: Sequence[Entry], hashes: Mapping[str, int]) -> dict[str, str]:
    """File -> name of its group: blocks of a sequence, near-duplicates elsewhere."""
    result: dict[str, str] = {}
    by_source: dict[str, list[Entry]] = {}
    for entry in entries:
        by_source.setdefault(entry.source, []).append(entry)
    for name, members in sorted(by_source.items()):
        ordered = sorted(members, key=lambda entry: entry.file)
        if SOURCES.get(name, Source()).sequence:
            result |= {entry.file: f"{name}/block{index // BLOCK}" for index, entry in enumerate(ordered)}
        else:
            result |= _alike([entry.file for entry in ordered], hashes)
    return result


def _alike(files: Sequence[str], hashes: Mapping[str, int]) -> dict[str, str]:
    """Join each file to the first earlier file whose hash is alike."""
    codes = np.array([hashes[file] for file in files], np.uint64)
    result: dict[str, str] = {}
    for index, file in enumerate(files):
        near = np.flatnonzero(np.bitwise_count(codes[:index] ^ codes[index]) <= LIKE)
        result[file] = result[files[int(near[0])]] if len(near) else file
    return result


def is_held_out(group: str) -> bool:
    """Whether a group belongs to validation: by its name's hash alone, so that the split never moves."""
    return hashlib.sha256(group.encode()).digest()[0] % HELD_OUT == 0


def split(entries: Sequence[Entry], hashes: Mapping[str, int]) -> tuple[list[Entry], list[Entry]]:
    """(training, validation) entries."""
    group = groups(entries, hashes)
    training = [entry for entry in entries if not is_held_out(group[entry.file])]
    validation = [entry for entry in entries if is_held_out(group[entry.file])]
    return training, validation


def load_picture(path: Path) -> NDArray[np.uint8]:
    """A picture as (H, W, 3) RGB, upright; DatasetError names a file that cannot be read."""
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, Image.DecompressionBombError) as exc:
        message = f"{path}: {exc}"
        raise DatasetError(message) from exc
