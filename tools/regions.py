"""`residency-tools regions`: compile the agent's borders, look at them, and rehearse crossings.

`build` reads `borders.json` of the npm package @rapideditor/country-coder (ISC; its geometry follows OpenStreetMap) and
writes the compact file. Only ISO 3166-1 codes are taken: groups such as the EU are law, not geometry, and belong to
the policy.

- An area with an official code of its own keeps it (Hong Kong, Macau, Taiwan, Puerto Rico, Greenland, Aland, ...).
- Exceptionally reserved codes (FX, IC, AC, TA, CP, CQ, DG) become the code that they are part of: the first official
  one among the area's groups, else that of its country. XK (Kosovo, user-assigned) stays.
- Where two states claim an area or its law, both are candidates, so that both must permit an endpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent.places.polygons import UNITS_PER_DEGREE, Polygon, Ring, pack_polygons, unpack_polygons
from agent.places.regions import RegionMap
from tools.crossings import table

PACKAGE = "@rapideditor/country-coder@5.6.1"
SHIPPED = Path(__file__).parent.parent / "agent" / "data" / "borders.bin"
LARGEST_BYTES = 700_000

# Wikidata item -> candidates, where the data names no country or only one of several.
SEVERAL: Mapping[str, tuple[str, ...]] = {
    "Q7835": ("RU", "UA"),  # Crimea
    "Q23681": ("CY", "TR"),  # Northern Cyprus
    "Q620634": ("EG", "SD"),  # Bir Tawil
    "Q9143535": ("CY", "GB"),  # Akrotiri
    "Q9206745": ("CY", "GB"),  # Dhekelia
    "Q6250": ("EH", "MA"),  # Western Sahara
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `regions build` and `regions show`."""
    parser = subparsers.add_parser("regions", help="compile the border file, look at it, rehearse crossings")
    parser.set_defaults(run=run)
    commands = parser.add_subparsers(dest="regions_command", required=True)
    build = commands.add_parser("build", help=f"compile the borders of npm {PACKAGE}")
    build.add_argument("--input", type=Path, help="borders.json already at hand; fetched with `npm pack` otherwise")
    build.add_argument("--output", type=Path, default=SHIPPED)
    show = commands.add_parser("show", help="countries near a place")
    show.add_argument("latitude", type=float)
    show.add_argument("longitude", type=float)
    show.add_argument("--radius", type=float, default=0.0, help="metres (default: %(default)s)")
    show.add_argument("--file", type=Path, default=SHIPPED)
    crossings = commands.add_parser("crossings", help="synthetic border crossings: misrouted, held, flips")
    crossings.add_argument("--seed", type=int, default=1, help="of the fixes' errors (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `regions build`, `show` or `crossings`; returns the exit status."""
    if args.regions_command == "build":
        return _build(args.input, args.output)
    return _show(args) if args.regions_command == "show" else _crossings(args.seed)


def compile_borders(text: str) -> bytes:
    """The compact file of a country-coder `borders.json`; the same text always gives the same bytes."""
    features = json.loads(text)["features"]
    official = {_official(feature["properties"]) for feature in features} - {None, "EU", "UN"}
    polygons = [
        Polygon(codes=_codes(feature["properties"], official), rings=tuple(map(_ring, rings)))
        for feature in features
        if feature["geometry"] is not None
        for rings in feature["geometry"]["coordinates"]
    ]
    return pack_polygons(polygons, f"npm {PACKAGE}, ISC; contains data from OpenStreetMap contributors, ODbL")


def _build(source: Path | None, output: Path) -> int:
    data = compile_borders(source.read_text(encoding="utf-8") if source else _fetch())
    if len(data) > LARGEST_BYTES:
        print(f"regions: {len(data)} bytes are more than the {LARGEST_BYTES} that may be shipped")
        return 1
    output.write_bytes(data)
    print(f"{output}: {len(data)} bytes, {len(RegionMap.from_bytes(data, overrides=()).countries)} countries")
    return 0


def _show(args: argparse.Namespace) -> int:
    borders = RegionMap.from_bytes(args.file.read_bytes())
    print(" ".join(sorted(borders.countries_near(args.latitude, args.longitude, args.radius))))
    return 0


def _crossings(seed: int) -> int:
    for line in table(unpack_polygons(SHIPPED.read_bytes()), seed):
        print(line, flush=True)
    return 0


def _fetch() -> str:
    """`borders.json` out of the package, fetched by npm into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PACKAGE]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(Path(folder) / name) as package:
            member = package.extractfile("package/src/data/borders.json")
            if member is None:
                message = f"{PACKAGE} holds no src/data/borders.json"
                raise FileNotFoundError(message)
            return member.read().decode()


def _official(properties: Mapping[str, Any]) -> str | None:
    """The feature's own official ISO 3166-1 code, if it has one."""
    reserved = properties.get("isoStatus") == "excRes"
    code: str | None = None if reserved else properties.get("iso1A2")
    return code


def _codes(properties: Mapping[str, Any], official: set[str | None]) -> tuple[str, ...]:
    """Every country that the area may belong to, sorted."""
    if several := SEVERAL.get(properties["wikidata"]):
        return several
    candidates: Sequence[str | None] = [
        _official(properties),
        *(group for group in properties.get("groups", []) if re.fullmatch("[A-Z]{2}", group)),
        properties.get("country"),
    ]
    return (next(code for code in candidates if code in official and code is not None),)


def _ring(coordinates: Sequence[Sequence[float]]) -> Ring:
    """One closed GeoJSON ring as an open ring of 1e-7 degrees."""
    return np.round(np.array(coordinates[:-1]) * UNITS_PER_DEGREE).astype(np.int32)
