"""The software bill of materials (CycloneDX 1.6) and the list of licences: functions of the lock file and what ships.

The model and the borders are components as well: the first is a machine-learning model, the second is data. No time and
no random number is in it, so that equal contents give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import __version__
from tools.packaging.lock import SELF, Locked

REFERENCE = f"pkg:pypi/{SELF}@{__version__}"
BORDERS_LICENCES = ("ISC", "ODbL-1.0")
"""The package that the borders were compiled from, and the database behind it: agent/data/BORDERS-LICENSE.md."""


def bill(locked: Sequence[Locked], root: Path) -> dict[str, Any]:
    """Every component of an installed agent; `root` holds `agent/` and `models/`."""
    shipped = [_model(root / "models"), _borders(root / "agent" / "data" / "borders.bin")]
    components = [_library(item) for item in locked] + shipped
    wanted = [_reference(item) for item in locked if SELF in item.needed_by]
    dependencies = [{"ref": REFERENCE, "dependsOn": wanted + [component["bom-ref"] for component in shipped]}]
    dependencies += [
        {"ref": _reference(item), "dependsOn": [_reference(other) for other in locked if item.name in other.needed_by]}
        for item in locked
    ]
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": REFERENCE,
                "name": SELF,
                "version": __version__,
                "purl": REFERENCE,
                "licenses": [{"expression": "Apache-2.0"}],
            }
        },
        "components": components,
        "dependencies": dependencies,
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(content, sort_keys=True))
    return {**content, "serialNumber": f"urn:uuid:{serial}"}


def licences(bom: dict[str, Any]) -> str:
    """The licence of every component as a Markdown table; the texts lie beside the installed distributions."""
    rows = ["| component | version | licence |", "|---|---|---|"]
    for component in [bom["metadata"]["component"], *bom["components"]]:
        names = " AND ".join(item.get("expression") or item["license"]["id"] for item in component["licenses"])
        rows.append(f"| {component['name']} | {component['version']} | {names} |")
    return "\n".join(rows) + "\n"


def _reference(item: Locked) -> str:
    return f"pkg:pypi/{item.name}@{item.version}"


def _library(item: Locked) -> dict[str, Any]:
    """A distribution; the hash of each of its wheels stands beside the wheel, as they differ by architecture."""
    return {
        "type": "library",
        "bom-ref": _reference(item),
        "name": item.name,
        "version": item.version,
        "purl": _reference(item),
        "licenses": [{"expression": item.licence}],
        "externalReferences": [
            {"type": "distribution", "url": wheel.filename, "hashes": [{"alg": "SHA-256", "content": wheel.sha256}]}
            for wheel in item.wheels
        ],
    }


def _model(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "detector.json").read_bytes())
    path = folder / manifest["model"]
    return _file(path, "machine-learning-model", manifest["name"], [{"expression": manifest["licence"]}])


def _borders(path: Path) -> dict[str, Any]:
    return _file(path, "data", "borders", [{"license": {"id": name}} for name in BORDERS_LICENCES])


def _file(path: Path, kind: str, name: str, licence: list[dict[str, Any]]) -> dict[str, Any]:
    """A file that ships with the agent; its version is the beginning of its hash, as it is that which is verified."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "type": kind,
        "bom-ref": f"{path.name}@{digest[:12]}",
        "name": name,
        "version": digest[:12],
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": licence,
    }
