"""What labels on disk say before anything is made of it, and which picture they mean.

A picture is never guessed by its stem alone: two folders may hold the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Self
from xml.etree import ElementTree as ET

from agent.errors import AgentError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"})
PLACES = ("JPEGImages", "images", "Images", "image", "imgs", "img", "data")  # folders in which pictures lie
Row = tuple[str, tuple[float, float, float, float], bool]  # class, box, ignored


class LabelsError(AgentError, ValueError):
    """Labels that cannot be read: says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """One picture with its boxes as the labels name them.

    `size`: width and height that the labels state, if they do; `declared`: names that they could have used here.
    """

    path: Path
    size: tuple[int, int] | None
    rows: tuple[Row, ...]
    declared: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one form of labels gave; `missing` counts labelled pictures that are not there."""

    pictures: tuple[Raw, ...] = ()
    missing: int = 0
    remarks: tuple[str, ...] = ()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Every mistake inside becomes a LabelsError that names the file."""
    try:
        yield
    except LabelsError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ET.ParseError) as exc:
        message = f"{path}: {type(exc).__name__}: {exc}"
        raise LabelsError(message) from exc


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files in a folder and in the folders in it, sorted, without hidden ones and what macOS adds to an archive."""
    found = [
        path
        for path in folder.rglob(pattern)
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
    ]
    return sorted(path for path in found if path.is_file())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """All pictures of a folder, by file name and by path without suffix."""

    folder: Path
    by_name: Mapping[str, Sequence[Path]]
    by_stem: Mapping[Path, Sequence[Path]]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Those in the folder and in the folders in it."""
        by_name: dict[str, list[Path]] = {}
        by_stem: dict[Path, list[Path]] = {}
        for path in files(folder):
            if path.suffix.lower() in SUFFIXES:
                by_name.setdefault(path.name, []).append(path)
                by_stem.setdefault(path.with_suffix(""), []).append(path)
        return cls(folder=folder, by_name=by_name, by_stem=by_stem)

    def within(self, place: Path, name: str) -> Path | None:
        """The picture of this name, or of this stem, in just this folder."""
        if place / name in self.by_name.get(Path(name).name, ()):
            return place / name
        found = self.by_stem.get(place / name) or self.by_stem.get((place / name).with_suffix("")) or ()
        return _only(found, str(place / name))

    def named(self, name: str, labels: Path) -> Path | None:
        """The picture that a label file names: from its own folder, else the one that agrees with most of the path.

        Of several that agree equally, the one whose folder the label file's name contains, or that lies where pictures
        lie. None where there is none; LabelsError where several are left.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        found = self.by_name.get(wanted.name, ())
        if labels.parent / wanted in found:
            return labels.parent / wanted
        lengths = [_agreement(path.parts, wanted.parts) for path in found]
        best = [path for path, length in zip(found, lengths, strict=True) if length == max(lengths)]
        stem = labels.stem.casefold()
        folders = {path: path.relative_to(self.folder).parts[:-1] for path in best}
        for likely in (
            [path for path, parts in folders.items() if any(part.casefold() in stem for part in parts)],
            [path for path, parts in folders.items() if set(parts) & set(PLACES)],
        ):
            best = likely if len(likely) == 1 and len(best) > 1 else best
        return _only(best, f"{labels}: {name}")


def _agreement(one: Sequence[str], two: Sequence[str]) -> int:
    """How many last parts are the same."""
    pairs = zip(reversed(one), reversed(two), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _only(found: Sequence[Path], wanted: str) -> Path | None:
    if len(found) > 1:
        message = f"{wanted}: several pictures could be meant: {', '.join(map(str, found))}"
        raise LabelsError(message)
    return found[0] if found else None
