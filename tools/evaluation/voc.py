"""Pascal VOC: one XML file for each picture; boxes are corners in pixels, `difficult` objects are ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

from tools.evaluation.raw import PLACES, SUFFIXES, LabelsError, Pictures, Raw, Read, Row, files, naming


def voc(folder: Path, pictures: Pictures) -> Read:
    """Every `<annotation>` of a folder with the picture that it names; other XML files are no labels."""
    roots: dict[Path, ET.Element] = {}
    for path in files(folder, "*.xml"):
        with naming(path):
            root = ET.parse(path).getroot()  # noqa: S314 - the user's own labels; expat refuses entity bombs
        if root.tag == "annotation":
            roots[path] = root
    found = _pictures_of(roots, pictures)
    raw = []
    for path, picture in found.items():
        with naming(path):
            raw.append(Raw(path=picture, size=_size(roots[path]), rows=tuple(_rows(roots[path]))))
    return Read(pictures=tuple(raw), missing=len(roots) - len(found))


def _pictures_of(roots: dict[Path, ET.Element], pictures: Pictures) -> dict[Path, Path]:
    """The picture of each file, by `<filename>`.

    Where several files name the same picture, as copies of labels do, each takes that of its own name; LabelsError
    where they still mean the same.
    """
    found: dict[Path, Path] = {}
    for path, root in roots.items():
        named = (root.findtext("filename") or "").strip()
        picture = _beside(path, named, pictures) or _beside(path, path.stem, pictures)
        if picture is not None:
            found[path] = picture
    counts = Counter(found.values())
    found = {
        path: picture if counts[picture] == 1 else _beside(path, path.stem, pictures) or picture
        for path, picture in found.items()
    }
    owners: dict[Path, Path] = {}
    for path, picture in found.items():
        if picture in owners:
            message = f"{owners[picture]} and {path} both label {picture}"
            raise LabelsError(message)
        owners[picture] = path
    return found


def _beside(path: Path, name: str, pictures: Pictures) -> Path | None:
    """A picture by name or stem in the folders that belong to an XML file, else by its full name anywhere."""
    if not name:
        return None
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    for place in _places(path, pictures.folder):
        if (found := pictures.within(place, name)) is not None:
            return found
    return pictures.named(name, path) if Path(name).suffix.lower() in SUFFIXES else None


def _places(path: Path, folder: Path) -> Iterator[Path]:
    """For Annotations/a/x.xml: JPEGImages/a, images/a, ...; then the folder of the file itself, and the one above."""
    parts = path.parent.relative_to(folder).parts
    for index in reversed(range(len(parts))):
        yield from (folder.joinpath(*parts[:index], place, *parts[index + 1 :]) for place in PLACES)
    yield path.parent
    if parts:
        yield path.parent.parent


def _size(root: ET.Element) -> tuple[int, int] | None:
    width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    return (width, height) if width and height else None


def _rows(root: ET.Element) -> Iterator[Row]:
    for item in root.iter("object"):
        x1, y1, x2, y2 = (float(_text(item, f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
        yield _text(item, "name").strip(), (x1, y1, x2, y2), (item.findtext("difficult") or "0").strip() == "1"


def _text(node: ET.Element, path: str) -> str:
    text = node.findtext(path)
    if text is None:
        message = f"<{node.tag}> has no {path}"
        raise ValueError(message)
    return text
