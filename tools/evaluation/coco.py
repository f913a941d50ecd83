"""COCO detection: JSON with images, annotations and categories; boxes are x, y, width, height in pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.evaluation.raw import Pictures, Raw, Read, Row, files, naming


def coco(folder: Path, pictures: Pictures) -> Read:
    """Every such file of a folder. What two files say of the same picture is taken together.

    A file of which no picture is there is left out, with a remark.
    """
    merged: dict[Path, Raw] = {}
    missing, remarks = 0, []
    for path in files(folder, "*.json"):
        with naming(path):
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
                continue
            read = _file(path, content, pictures)
        if content["images"] and not read.pictures:
            first = content["images"][0]["file_name"]
            remarks.append(f"{path}: left out, none of its {read.missing} pictures is there, such as {first}")
            continue
        missing += read.missing
        remarks.extend(read.remarks)
        for item in read.pictures:
            merged[item.path] = _joined(merged[item.path], item) if item.path in merged else item
    return Read(pictures=tuple(merged.values()), missing=missing, remarks=tuple(remarks))


def _joined(one: Raw, two: Raw) -> Raw:
    """The boxes of both, those that both name once."""
    rows = tuple(dict.fromkeys((*one.rows, *two.rows)))
    return replace(one, size=one.size or two.size, rows=rows, declared=one.declared | two.declared)


def _file(path: Path, content: Mapping[str, Any], pictures: Pictures) -> Read:
    names = {str(category["id"]): str(category["name"]) for category in content["categories"]}
    rows: dict[str, list[Row]] = {str(image["id"]): [] for image in content["images"]}
    strangers = boxless = 0
    for item in content["annotations"]:
        corners = _corners(item)
        if str(item["image_id"]) not in rows:
            strangers += 1
        elif corners is None:
            boxless += 1
        else:
            name = names.get(str(item.get("category_id")), f"category {item.get('category_id')}")
            rows[str(item["image_id"])].append((name, corners, bool(item.get("iscrowd"))))
    declared = _declared(content["categories"], {name for listed in rows.values() for name, _, _ in listed})
    found = [(image, pictures.named(str(image["file_name"]), path)) for image in content["images"]]
    return Read(
        pictures=tuple(
            Raw(path=picture, size=_size(image), rows=tuple(rows[str(image["id"])]), declared=declared)
            for image, picture in found
            if picture is not None
        ),
        missing=sum(picture is None for _, picture in found),
        remarks=tuple(
            f"{path}: {count} annotations {what}"
            for count, what in ((strangers, "of pictures that it does not list"), (boxless, "without a box"))
            if count
        ),
    )


def _declared(categories: Sequence[Mapping[str, Any]], used: set[str]) -> frozenset[str]:
    """Names of categories, without unused ones that are only the family of others (Roboflow writes such)."""
    families = {str(item.get("supercategory")) for item in categories if item.get("supercategory") != item["name"]}
    return frozenset({str(item["name"]) for item in categories} - families) | used


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = (int(image.get(side) or 0) for side in ("width", "height"))
    return (width, height) if width and height else None


def _corners(item: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the box, else of the bounds of the polygons; None where there is neither."""
    if item.get("bbox"):
        x, y, width, height = (float(value) for value in item["bbox"])
        return x, y, x + width, y + height
    polygons = item.get("segmentation")
    values = [float(value) for part in polygons for value in part] if isinstance(polygons, list) else []
    if not values:
        return None
    return min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
