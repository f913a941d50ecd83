"""YOLO: a text file for each picture, a line for each object: class number, then shares of width and height.

Five values are a box (centre x, centre y, width, height), six a box and a score, more the corners of a polygon.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.evaluation.fitting import upright_size
from tools.evaluation.names import listed_names
from tools.evaluation.raw import LabelsError, Pictures, Raw, Read, Row, files, naming

BOX, SCORED, TRIANGLE = 5, 6, 7  # values of a line
FARTHEST = 2.0  # of a share; beyond it the values are pixels


def yolo(folder: Path, pictures: Pictures, names: Sequence[str]) -> Read:
    """Every text file whose picture lies at the same place under `images`, or beside it."""
    texts = [path for path in files(folder, "*.txt") if path.name != "classes.txt"]
    pairs = [(path, _picture_of(path, pictures)) for path in texts]
    missing = sum(picture is None and "labels" in path.relative_to(folder).parts for path, picture in pairs)
    if not any(picture for _, picture in pairs):
        return Read(missing=missing)
    listed = list(names) or listed_names(folder)
    raw = []
    for path, picture in pairs:
        if picture is not None:
            try:
                width, height = upright_size(picture)
            except OSError:  # told of with all other pictures that do not fit their labels
                raw.append(Raw(path=picture, size=None, rows=(), declared=frozenset(listed)))
                continue
            with naming(path):
                lines = [line.split() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
                boxes = tuple(_row(line, listed, width, height) for line in lines)
            raw.append(Raw(path=picture, size=None, rows=boxes, declared=frozenset(listed)))
    return Read(pictures=tuple(raw), missing=missing)


def _picture_of(path: Path, pictures: Pictures) -> Path | None:
    parts = path.parent.relative_to(pictures.folder).parts
    places = [path.parent]
    if "labels" in parts:
        last = len(parts) - 1 - parts[::-1].index("labels")
        places.insert(0, pictures.folder.joinpath(*parts[:last], "images", *parts[last + 1 :]))
    for place in places:
        found = pictures.by_stem.get(place / path.stem, ())
        if len(found) > 1:
            message = f"{path}: several pictures could be meant: {', '.join(map(str, found))}"
            raise LabelsError(message)
        if found:
            return found[0]
    return None


def _row(line: Sequence[str], names: Sequence[str], width: int, height: int) -> Row:
    number, values = int(line[0]), [float(value) for value in line[1:]]
    if not 0 <= number < len(names):
        message = f"class {number} of {len(names)}"
        raise ValueError(message)
    if len(line) < BOX or (len(line) >= TRIANGLE and len(values) % 2):
        message = f"{len(line)} values in a line"
        raise ValueError(message)
    if max(map(abs, values)) > FARTHEST:
        message = f"{max(values, key=abs)} is no share of a picture's side"
        raise ValueError(message)
    if len(line) <= SCORED:
        x, y, across, down = values[:4]
        x1, y1, x2, y2 = x - across / 2, y - down / 2, x + across / 2, y + down / 2
    else:
        x1, y1, x2, y2 = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    return names[number], (x1 * width, y1 * height, x2 * width, y2 * height), False
