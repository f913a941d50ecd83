"""Labelled pictures from disk: labels.json of the training set, COCO, Pascal VOC and YOLO.

The form is told from what the folder holds. A class is known in a picture where its labels name it, or declare that
they could: COCO and YOLO declare their classes, VOC and labels.json name them in some picture of the same source.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tools.evaluation.coco import coco
from tools.evaluation.fitting import fitted
from tools.evaluation.names import label_of
from tools.evaluation.raw import LabelsError, Pictures, Raw, Read, naming
from tools.evaluation.truths import Labelled, Truth, from_entry, rows
from tools.evaluation.voc import voc
from tools.evaluation.yolo import yolo
from tools.training.dataset import CLASSES, Entry, read_entries

SHOWN = 10  # names that are not understood, in the line that says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The pictures of a folder, and what of its labels could not be used: `strange` names, `missing` pictures."""

    pictures: tuple[Labelled, ...]
    strange: Mapping[str, int]
    missing: int
    remarks: tuple[str, ...] = ()

    def labels(self) -> int:
        """How many objects are labelled."""
        return sum(len(truth.objects) for item in self.pictures for truth in item.truths.values())

    def line(self) -> str:
        """All of it in a line."""
        ordered = sorted(self.strange.items(), key=lambda item: (-item[1], item[0]))
        names = [f"{name} ({count})" for name, count in ordered[:SHOWN]]
        names.extend([f"{len(ordered) - SHOWN} more"] if len(ordered) > SHOWN else [])
        return (
            f"read {len(self.pictures)} pictures, {self.labels()} labels; "
            f"not understood: {', '.join(names) or 'none'}; without picture: {self.missing}"
        )


def read_folder(folder: Path, names: Sequence[str] = ()) -> Reading:
    """All labelled pictures of a folder; `names` are the classes of YOLO labels, else a file tells them.

    Raises LabelsError, which says which file and why.
    """
    if (entries := _own_entries(folder)) is not None:
        return from_entries(entries, _pictures_of(folder), entries)
    pictures = Pictures.of(folder)
    remarks: list[str] = []
    forms: Sequence[Callable[[], Read]] = (
        lambda: coco(folder, pictures),
        lambda: voc(folder, pictures),
        lambda: yolo(folder, pictures, names),
    )
    for read in forms:
        result = read()
        remarks.extend(result.remarks)
        if result.pictures:
            spare = sum(map(len, pictures.by_name.values())) - len({item.path for item in result.pictures})
            remarks.extend([f"left out, as no label speaks of them: {spare} pictures"] if spare else [])
            return labelled(Read(pictures=result.pictures, missing=result.missing, remarks=tuple(remarks)), folder.name)
        remarks.extend([f"{result.missing} label files without their picture"] if result.missing else [])
    message = f"{folder}: no labels.json, no COCO *.json, no VOC *.xml and no YOLO *.txt with their pictures"
    raise LabelsError("; ".join([message, *remarks]))


def _own_entries(folder: Path) -> list[Entry] | None:
    """Those of labels.json, if it is a list; an object is COCO's."""
    path = folder / "labels.json"
    if not path.is_file():
        return None
    with naming(path):
        listed = isinstance(json.loads(path.read_bytes()), list)
    return read_entries(path) if listed else None


def _pictures_of(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def from_entries(entries: Sequence[Entry], pictures: Path, everything: Sequence[Entry]) -> Reading:
    """The pictures of entries; what an unlisted source labels is told from `everything` that it labels."""
    known: dict[str, set[str]] = {}
    for entry in everything:
        known.setdefault(entry.source, set()).update(label for label, _ in entry.boxes)
    here = [entry for entry in entries if (pictures / entry.file).is_file()]
    strange = Counter(label for entry in entries for label, _ in entry.boxes if label not in {*CLASSES, "head"})
    listed = (from_entry(entry, pictures, frozenset(known[entry.source])) for entry in here)
    return _reading(listed, strange, Read(missing=len(entries) - len(here)))


def labelled(read: Read, source: str) -> Reading:
    """Pictures with truths of every class that their labels declare, or that is named anywhere in them."""
    named = {name for item in read.pictures for name, _, _ in item.rows}
    strange = Counter(name for item in read.pictures for name, _, _ in item.rows if label_of(name) is None)
    listed = (
        Labelled(
            path=item.path,
            source=source,
            width=item.size[0] if item.size else 0,
            height=item.size[1] if item.size else 0,
            truths={
                label: _truth(item, label)
                for label in CLASSES
                if label in {label_of(name) for name in item.declared or named}
            },
        )
        for item in read.pictures
    )
    return _reading(listed, strange, read)


def _reading(listed: Iterable[Labelled], strange: Mapping[str, int], read: Read) -> Reading:
    """Only pictures that fit their labels; of the others the number, and the first."""
    results = [fitted(item) for item in listed]
    unfit = [item for item in results if isinstance(item, str)]
    remark = [f"left out, as picture and labels do not fit: {len(unfit)}, such as {unfit[0]}"] if unfit else []
    return Reading(
        pictures=tuple(item for item in results if isinstance(item, Labelled)),
        strange=strange,
        missing=read.missing,
        remarks=tuple(chain(read.remarks, remark)),
    )


def _truth(item: Raw, label: str) -> Truth:
    own = [(box, ignored) for name, box, ignored in item.rows if label_of(name) == label]
    return Truth(
        objects=rows([box for box, ignored in own if not ignored]),
        ignored=rows([box for box, ignored in own if ignored]),
    )
