import argparse
import json
import os
import tarfile
from pathlib import Path

import pytest

from agent.places.guards import Guards
from agent.places.polygons import unpack_polygons
from agent.places.regions import RegionMap
from tools import regions

SQUARE = [[[[0.0, 0.0], [1.0, 0.0], [1.0, 1.00001], [0.0, 1.0], [0.0, 0.0]]]]


def feature(coordinates=SQUARE, **properties):
    geometry = {"type": "MultiPolygon", "coordinates": coordinates} if coordinates else None
    return {"type": "Feature", "properties": {"wikidata": "Q0", **properties}, "geometry": geometry}


GROUPS = [feature(None, iso1A2=code) for code in ("EU", "UN", "FR", "GG", "SH", "NL", "BQ", "RU", "UA", "CY", "TR")]


def source(*features):
    return json.dumps({"type": "FeatureCollection", "features": [*GROUPS, *features]})


def codes_of(**properties):
    (polygon,) = unpack_polygons(regions.compile_borders(source(feature(**properties))))
    return polygon.codes


def parse(*arguments):
    parser = argparse.ArgumentParser()
    regions.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["regions", *map(str, arguments)])


@pytest.mark.parametrize(
    ("properties", "codes"),
    [
        ({"iso1A2": "HK", "country": "CN"}, ("HK",)),
        ({"iso1A2": "XK", "isoStatus": "usrAssn"}, ("XK",)),
        ({"iso1A2": "FX", "isoStatus": "excRes", "country": "FR", "groups": ["EU", "155"]}, ("FR",)),
        ({"iso1A2": "AC", "isoStatus": "excRes", "country": "GB", "groups": ["SH", "UN"]}, ("SH",)),
        ({"country": "NL", "groups": ["Q1451600", "BQ", "EU"]}, ("BQ",)),
        ({"country": "NL", "groups": ["EU", "155"]}, ("NL",)),
        ({"wikidata": "Q7835", "country": "RU"}, ("RU", "UA")),
        ({"wikidata": "Q23681"}, ("CY", "TR")),
    ],
)
def test_an_area_gets_its_own_official_code_or_that_of_what_it_is_part_of(properties, codes):
    assert codes_of(**properties) == codes


def test_compiling_keeps_the_coordinates_and_is_repeatable():
    text = source(feature(iso1A2="FR"))
    data = regions.compile_borders(text)
    (polygon,) = unpack_polygons(data)
    assert polygon.rings[0].tolist() == [[0, 0], [10_000_000, 0], [10_000_000, 10_000_100], [0, 10_000_000]]
    assert data == regions.compile_borders(text)


def test_the_shipped_file_names_its_source_and_its_licence():
    shipped = regions.SHIPPED.read_bytes()
    assert b"country-coder@5.6.1, ISC" in shipped
    assert b"OpenStreetMap contributors, ODbL" in shipped
    licence = (regions.SHIPPED.parent / "BORDERS-LICENSE.md").read_text(encoding="utf-8")
    assert "ISC License" in licence
    assert "OpenStreetMap contributors" in licence


def test_build_writes_a_file_that_the_agent_reads(tmp_path, capsys):
    (tmp_path / "borders.json").write_text(source(feature(iso1A2="FR")), encoding="utf-8")
    args = parse("build", "--input", tmp_path / "borders.json", "--output", tmp_path / "out.bin")
    assert regions.run(args) == 0
    assert "1 countries" in capsys.readouterr().out
    assert RegionMap.from_bytes((tmp_path / "out.bin").read_bytes(), overrides=()).countries == {"FR"}


def test_build_takes_the_borders_out_of_the_package_that_npm_packs(tmp_path, monkeypatch):
    text = source(feature(iso1A2="FR"))
    (tmp_path / "borders.json").write_text(text, encoding="utf-8")
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as package:
        package.add(tmp_path / "borders.json", "package/src/data/borders.json")
    npm = tmp_path / "npm"
    npm.write_text(f'#!/bin/sh\n[ "$3" = "{regions.PACKAGE}" ] && cp {tmp_path}/made.tgz p.tgz && echo p.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert regions.run(parse("build", "--output", tmp_path / "out.bin")) == 0
    assert (tmp_path / "out.bin").read_bytes() == regions.compile_borders(text)


def test_build_does_not_write_more_than_may_be_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(regions, "LARGEST_BYTES", 10)
    (tmp_path / "borders.json").write_text(source(feature(iso1A2="FR")), encoding="utf-8")
    args = parse("build", "--input", tmp_path / "borders.json", "--output", tmp_path / "out.bin")
    assert regions.run(args) == 1
    assert not (tmp_path / "out.bin").exists()
    assert "more than the 10" in capsys.readouterr().out


def test_show_prints_the_countries_near_a_place(capsys):
    assert regions.run(parse("show", "47.589", "7.589", "--radius", "100")) == 0
    assert capsys.readouterr().out == "CH DE FR\n"


def test_the_shipped_map_uses_the_guards_that_were_measured():
    shipped = RegionMap.from_bytes(Path(regions.SHIPPED).read_bytes())
    assert max(Guards().pairs.values()) == 7_000.0
    assert shipped.countries_near(27.0, -99.33, 10.0) == {"MX", "US"}  # a rural stretch of the Rio Grande
