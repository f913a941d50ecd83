"""Which class a name in labels means, and the class lists that lie beside YOLO labels.

Names are compared without case, spaces, `_`, `-`, `.` and `/`: `License_Plate` and `license-plate` are one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.evaluation.raw import LabelsError, files, naming

SEPARATORS = re.compile(r"[\s_\-./]+")
MEANT: Mapping[str, Sequence[str]] = {
    "person": (
        *("person", "persons", "people", "human", "pedestrian", "pedestrians", "man", "woman", "boy", "girl", "child"),
        *("rider", "riders", "cyclist", "bicyclist", "motorcyclist"),
    ),
    "face": ("face", "faces", "human face", "with mask", "without mask", "mask weared incorrect"),
    "plate": (
        *("plate", "plates", "licence", "license", "licence plate", "license plate", "licence plates"),
        *("license plates", "number plate", "number plates", "car plate", "car license plate", "registration plate"),
        "vehicle registration plate",
    ),
}
ITEM = re.compile(r"""(?:(\d+)\s*:\s*)?("[^"]*"|'[^']*'|[^,\s#"'{}\[\]][^,#{}\[\]]*)""")  # of a YAML list or map


def _key(name: str) -> str:
    return SEPARATORS.sub("", name.casefold())


LABELS = {_key(name): label for label, names in MEANT.items() for name in names}


def label_of(name: str) -> str | None:
    """The class that a name means: person, face or plate; None where it means another thing."""
    return LABELS.get(_key(name))


def listed_names(folder: Path) -> list[str]:
    """The class names of data.yaml, `classes.txt`, `*.names` or `*.labels`, by number.

    Raises LabelsError where there are none, or where two files say different things.
    """
    found: dict[Path, list[str]] = {}
    for pattern in ("*.yaml", "*.yml", "classes.txt", "*.names", "*.labels"):
        for path in files(folder, pattern):
            with naming(path):
                text = path.read_text("utf-8-sig")
                names = yaml_names(text) if path.suffix in {".yaml", ".yml"} else text.splitlines()
                found[path] = [name.strip() for name in names if name.strip()]
    told = [(path, names) for path, names in found.items() if names]
    if not told:
        message = f"{folder}: YOLO labels without data.yaml, classes.txt or *.names: give the names with --classes"
        raise LabelsError(message)
    for path, names in told[1:]:
        if names != told[0][1]:
            message = f"{told[0][0]} and {path} name different classes: give the right ones with --classes"
            raise LabelsError(message)
    return told[0][1]


def yaml_names(text: str) -> list[str]:
    """The list or map `names` of a YOLO data.yaml; empty where it has none."""
    opening = re.search(r"^names[ \t]*:[ \t]*", text, re.MULTILINE)
    if opening is None:
        return []
    rest = text[opening.end() :]
    if rest[:1] in {"[", "{"}:
        closing = "]" if rest[0] == "[" else "}"
        inner = re.sub(r"(?<=\s)#.*", "", rest[1 : rest.index(closing)])
        return _numbered(ITEM.findall(inner))
    items = []
    for line in rest.splitlines()[1:]:
        plain = re.sub(r"^\s*-\s+", "", line)
        if line.strip() and plain == line and not line[0].isspace():
            break  # the next key
        items.extend(ITEM.findall(plain)[:1] if not plain.lstrip().startswith("#") else [])
    return _numbered(items)


def _numbered(items: Sequence[tuple[str, str]]) -> list[str]:
    """Names in the order of their numbers, or of the list; numbers that are left out keep their place."""
    names = {int(number or place): name.strip().strip("\"'") for place, (number, name) in enumerate(items)}
    return [names.get(place, f"class {place}") for place in range(max(names, default=-1) + 1)]
