"""Labelled pictures from disk: labels.json of the training set, COCO, Pascal VOC and YOLO.

The form is told from what the folder holds. Class names are matched to person, face and plate by `ALIASES`; a class
that the labels never name is unknown in every picture, one that they name somewhere is known in all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from PIL import Image

from agent.errors import AgentError
from tools.evaluation.truths import Labelled, Truth, from_entry, rows
from tools.training.dataset import CLASSES, read_entries

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
ALIASES: Mapping[str, str] = {
    "person": "person",
    "pedestrian": "person",
    "people": "person",
    "rider": "person",
    "face": "face",
    "plate": "plate",
    "licence": "plate",
    "license": "plate",
    "license-plate": "plate",
    "license_plate": "plate",
    "licence_plate": "plate",
    "licenseplate": "plate",
    "number_plate": "plate",
}
Row = tuple[str, tuple[float, float, float, float], bool]  # class, box, ignored


class LabelsError(AgentError, ValueError):
    """Labels that cannot be read: says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """One picture with its boxes as the labels name them."""

    path: Path
    width: int
    height: int
    rows: tuple[Row, ...]


def read_folder(folder: Path, names: Sequence[str] = ()) -> list[Labelled]:
    """All labelled pictures of a folder; `names` are the classes of YOLO labels where no file tells them."""
    if (folder / "labels.json").is_file():
        return [from_entry(entry, _pictures_of(folder)) for entry in read_entries(folder / "labels.json")]
    try:
        raw = _raw(folder, names)
    except (OSError, KeyError, TypeError, ValueError, IndexError, ET.ParseError) as exc:
        message = f"{folder}: {type(exc).__name__}: {exc}"
        raise LabelsError(message) from exc
    if not raw:
        message = f"{folder}: no labels.json, no COCO *.json, no VOC *.xml and no YOLO *.txt beside pictures"
        raise LabelsError(message)
    return labelled(raw, folder.name)


def _pictures_of(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder


def _raw(folder: Path, names: Sequence[str]) -> list[Raw]:
    for path in sorted(folder.rglob("*.json")):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
            return coco(content, folder)
    pictures = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES}
    annotations = sorted(folder.rglob("*.xml"))
    if annotations:
        return [voc(path, pictures) for path in annotations if path.stem in pictures]
    return yolo(folder, pictures, names)


def labelled(raw: Iterable[Raw], source: str) -> list[Labelled]:
    """Pictures with truths of every class that is named anywhere in the labels."""
    listed = list(raw)
    known = {ALIASES[name.lower()] for item in listed for name, _, _ in item.rows if name.lower() in ALIASES}
    return [
        Labelled(
            path=item.path,
            source=source,
            width=item.width,
            height=item.height,
            truths={label: _truth(item, label) for label in CLASSES if label in known},
        )
        for item in listed
    ]


def _truth(item: Raw, label: str) -> Truth:
    own = [(box, ignored) for name, box, ignored in item.rows if ALIASES.get(name.lower()) == label]
    return Truth(
        objects=rows([box for box, ignored in own if not ignored]),
        ignored=rows([box for box, ignored in own if ignored]),
    )


def coco(content: Mapping[str, Any], folder: Path) -> list[Raw]:
    """COCO detection: boxes are x, y, width, height; `iscrowd` regions are ignored."""
    names = {category["id"]: str(category["name"]) for category in content["categories"]}
    found: dict[object, list[Row]] = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        x, y, width, height = (float(value) for value in item["bbox"])
        box = (x, y, x + width, y + height)
        found[item["image_id"]].append((names[item["category_id"]], box, bool(item.get("iscrowd"))))
    return [
        Raw(
            path=_existing(folder, str(image["file_name"])),
            width=int(image["width"]),
            height=int(image["height"]),
            rows=tuple(found[image["id"]]),
        )
        for image in content["images"]
    ]


def _existing(folder: Path, name: str) -> Path:
    """A picture by the name that the labels give, in the folder or in one of its own folders; never outside it."""
    direct = folder / name
    if direct.is_file() and direct.resolve().is_relative_to(folder.resolve()):
        return direct
    for path in sorted(folder.rglob(Path(name).name)):
        return path
    raise FileNotFoundError(name)


def voc(path: Path, pictures: Mapping[str, Path]) -> Raw:
    """Pascal VOC: one XML file for each picture; `difficult` objects are ignored."""
    root = ET.parse(path).getroot()  # noqa: S314 - the user's own labels; expat refuses entity bombs
    width, height = (int(float(_text(root, f"size/{side}"))) for side in ("width", "height"))
    boxes = [
        (
            _text(item, "name"),
            (
                float(_text(item, "bndbox/xmin")),
                float(_text(item, "bndbox/ymin")),
                float(_text(item, "bndbox/xmax")),
                float(_text(item, "bndbox/ymax")),
            ),
            item.findtext("difficult", "0").strip() == "1",
        )
        for item in root.iter("object")
    ]
    return Raw(path=pictures[path.stem], width=width, height=height, rows=tuple(boxes))


def _text(node: ET.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        message = f"<{node.tag}> has no {path}"
        raise ValueError(message)
    return text


def yolo(folder: Path, pictures: Mapping[str, Path], names: Sequence[str]) -> list[Raw]:
    """YOLO: a text file for each picture; lines of class number, centre x, centre y, width, height, as shares."""
    listed = list(names) or _yolo_names(folder)
    raw = []
    for label_file in sorted(folder.rglob("*.txt")):
        picture = pictures.get(label_file.stem)
        if picture is None:
            continue
        with Image.open(picture) as opened:
            width, height = opened.size
        lines = [line.split() for line in label_file.read_text().splitlines() if line.strip()]
        boxes = tuple(_yolo_row(line, listed, width, height) for line in lines)
        raw.append(Raw(path=picture, width=width, height=height, rows=boxes))
    return raw


def _yolo_row(line: Sequence[str], names: Sequence[str], width: int, height: int) -> Row:
    x, y, across, down = (float(value) for value in line[1:5])
    box = ((x - across / 2) * width, (y - down / 2) * height, (x + across / 2) * width, (y + down / 2) * height)
    return names[int(line[0])], box, False


def _yolo_names(folder: Path) -> list[str]:
    """Class names of `classes.txt`, `obj.names` or `*.names`, one on each line."""
    for pattern in ("classes.txt", "*.names"):
        for path in sorted(folder.rglob(pattern)):
            return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    message = "YOLO labels without classes.txt or *.names: give the class names in order"
    raise ValueError(message)
