"""The lock file: every distribution that a gateway needs, its wheels for every target, their SHA-256, its licence.

The file is a pip requirements file, so `pip install --require-hashes -r` reads it as it is. What pip does not need
stands in comments under each requirement, and everything else that the packages tell of dependencies is read from here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.packaging.targets import ALL, PackagingError, Target

SELF = "residency-agent"
EXTRAS = ("metrics", "zstd")
"""Optional parts that a gateway gets: the exporter is 0.3 MB of pure Python; zstd is 12 MB, and saves more by radio."""

SPDX = {"MIT License": "MIT", "3-Clause BSD License": "BSD-3-Clause", "Apache 2.0": "Apache-2.0"}
"""Metadata that is older than licence expressions -> SPDX."""

HEAD = "# Written by `residency-tools package lock`; read by pip, and by the other `package` commands.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One file of a distribution."""

    filename: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """One distribution at one version; `licence` is an SPDX expression, `needed_by` the normalised names."""

    name: str
    version: str
    licence: str
    needed_by: tuple[str, ...]
    wheels: tuple[Wheel, ...]


def requirements(pyproject: Path) -> list[str]:
    """What a gateway needs by pyproject.toml: the dependencies and those of EXTRAS."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]


def resolve(wanted: Sequence[str], targets: Sequence[Target] = ALL) -> list[Locked]:
    """Ask pip for the newest versions, the same ones for every target; raises PackagingError where one has no wheel."""
    first = _report(wanted, targets[0])
    pins = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in first]
    reports = [first, *(_report(pins, target) for target in targets[1:])]
    wheels: dict[str, dict[str, Wheel]] = {}
    for item in (item for report in reports for item in report):
        wheel = Wheel(
            filename=item["download_info"]["url"].rsplit("/", 1)[-1],
            sha256=item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        wheels.setdefault(_name(item), {})[wheel.filename] = wheel
    if len(wheels) != len(first):
        raise PackagingError(f"targets differ in what they need: {sorted(set(wheels) - set(map(_name, first)))}")
    needed_by = _needed_by(wanted, [item["metadata"] for item in first])
    return [
        Locked(
            name=_name(item),
            version=item["metadata"]["version"],
            licence=_licence(item["metadata"]),
            needed_by=needed_by[_name(item)],
            wheels=tuple(wheels[_name(item)][name] for name in sorted(wheels[_name(item)])),
        )
        for item in sorted(first, key=_name)
    ]


def render(locked: Sequence[Locked]) -> str:
    """Write the file; `parse` reads it back."""
    return HEAD + "".join(_lines(item) for item in locked)


def parse(text: str) -> list[Locked]:
    """Read what `render` has written; raises PackagingError where the comments do not fit the hashes."""
    found = []
    for block in re.split(r"\n(?=[a-z0-9])", text)[1:]:
        head = re.match(r"(?P<name>\S+)==(?P<version>\S+) ", block)
        facts = dict(re.findall(r"^    # (licence|needed by): (.+)$", block, re.MULTILINE))
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", block)
        names = re.findall(r"^    # (\S+\.whl)$", block, re.MULTILINE)
        if head is None or len(facts) != 2 or len(hashes) != len(names):
            raise PackagingError(f"lock file: not as `residency-tools package lock` writes it: {block[:60]!r}")
        found.append(
            Locked(
                name=head["name"],
                version=head["version"],
                licence=facts["licence"],
                needed_by=tuple(facts["needed by"].split(", ")),
                wheels=tuple(Wheel(filename=name, sha256=digest) for name, digest in zip(names, hashes, strict=True)),
            )
        )
    return found


def _lines(item: Locked) -> str:
    hashes = " \\\n".join(f"    --hash=sha256:{wheel.sha256}" for wheel in item.wheels)
    comments = [wheel.filename for wheel in item.wheels]
    comments += [f"licence: {item.licence}", f"needed by: {', '.join(item.needed_by)}"]
    return f"{item.name}=={item.version} \\\n{hashes}\n" + "".join(f"    # {line}\n" for line in comments)


def _report(wanted: Sequence[str], target: Target) -> list[dict[str, Any]]:
    """What pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", f"--target={folder}", f"--report={path}", *target.pip_options(), *wanted]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise PackagingError(f"pip found no wheels for {target}: {result.stderr.strip()[-500:]}")
        installed: list[dict[str, Any]] = json.loads(path.read_bytes())["install"]
    return installed


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _name(item: Mapping[str, Any]) -> str:
    return normalised(item["metadata"]["name"])


def _needed_by(wanted: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    edges = [(name, SELF) for name in _names(wanted)]
    for item in metadata:
        edges += [(name, normalised(item["name"])) for name in _names(item.get("requires_dist") or ())]
    return {
        name: tuple(sorted({parent for child, parent in edges if child == name}))
        for name in (normalised(item["name"]) for item in metadata)
    }


def _names(lines: Sequence[str]) -> Iterator[str]:
    """The distributions that requirements name, less those of extras."""
    for line in lines:
        found = re.match(r"[\w.-]+", line)
        if found and not re.search(r"\bextra\s*==", line):
            yield normalised(found[0])


def _licence(metadata: Mapping[str, Any]) -> str:
    """The SPDX expression of a distribution."""
    if expression := metadata.get("license_expression"):
        return str(expression)
    text = str(metadata.get("license") or "")
    if text not in SPDX:
        raise PackagingError(f"{metadata['name']}: say in SPDX which licence {text[:40]!r} is (pip >= 25 is needed)")
    return SPDX[text]
