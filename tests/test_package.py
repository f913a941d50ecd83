import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator
from oelint_parser.cls_item import Item
from oelint_parser.cls_stash import Stash

from agent import __version__
from tools import package
from tools.__main__ import main
from tools.packaging import lock, sbom, targets
from tools.packaging.lock import Locked, Wheel
from tools.packaging.targets import PackagingError

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "systemd" / "requirements.lock"
RECIPE = ROOT / "systemd" / "yocto" / f"residency-agent_{__version__}.bb"
LOCKED = lock.parse(LOCK.read_text())


def wheel(filename):
    return Wheel(filename=filename, sha256=hashlib.sha256(filename.encode()).hexdigest())


def build(folder, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, **environment})
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Wheel and sdist by file name."""
    return build(tmp_path_factory.mktemp("dist"))


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    return set(listed.stdout.splitlines())


def test_sdist_holds_what_is_tracked_and_nothing_else(distributions):
    with tarfile.open(distributions[f"residency_agent-{__version__}.tar.gz"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    made_by_the_build = {"PKG-INFO"}
    new = {name for name in names - tracked() if not (ROOT / name).exists()}
    assert new == made_by_the_build
    assert tracked() <= names
    assert not [name for name in names if name.endswith((".pyc", ".log")) or ".venv" in name]


def test_wheel_holds_agent_tools_model_borders_and_units_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions[f"residency_agent-{__version__}-py3-none-any.whl"]).namelist()
    for wanted in ("agent/models/detector.onnx", "agent/models/detector.json", "agent/data/borders.bin"):
        assert wanted in names
    assert f"residency_agent-{__version__}.data/data/share/residency-agent/systemd/residency-agent.service" in names
    assert f"residency_agent-{__version__}.dist-info/licenses/NOTICE" in names
    sources = {name for name in tracked() if name.startswith(("agent/", "tools/")) and name.endswith(".py")}
    assert sources <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "agent",
        "tools",
        f"residency_agent-{__version__}.data",
        f"residency_agent-{__version__}.dist-info",
    }


def test_equal_sources_give_equal_bytes(distributions, tmp_path):
    again = build(tmp_path, PYTHONHASHSEED="7", TZ="Asia/Shanghai")
    assert {name: path.read_bytes() for name, path in again.items()} == {
        name: path.read_bytes() for name, path in distributions.items()
    }


def test_lock_file_is_read_back_as_it_was_written():
    assert lock.render(LOCKED) == LOCK.read_text()


def test_lock_file_holds_every_dependency_of_the_project_at_a_permitted_version():
    versions = {item.name: item.version for item in LOCKED}
    for line in lock.requirements(ROOT / "pyproject.toml"):
        found = re.match(r"([\w.-]+)(?:>=(\d+))?", line)
        name, lowest = lock.normalised(found[1]), found[2]
        assert name in versions, f"run residency-tools package lock: {name} is not locked"
        assert int(versions[name].split(".")[0]) >= int(lowest or 0)
        assert lock.SELF in next(item for item in LOCKED if item.name == name).needed_by


@pytest.mark.parametrize("target", targets.ALL, ids=lambda target: f"{target.architecture}-{target.python}")
def test_every_locked_distribution_has_one_wheel_for_every_target(target):
    for item in LOCKED:
        fitting = [wheel.filename for wheel in item.wheels if target.takes(wheel.filename)]
        assert len(fitting) == 1, f"{item.name}: {fitting}"


def test_wheels_of_other_machines_are_not_taken():
    target = targets.named("arm64", "3.12")
    assert target.takes("a-1-py3-none-any.whl")
    assert target.takes("a-1-cp310-abi3-manylinux_2_28_aarch64.whl")
    assert target.takes("a-1-cp312-cp312-manylinux_2_28_aarch64.whl")
    assert not target.takes("a-1-cp312-cp312-manylinux_2_28_x86_64.whl")
    assert not target.takes("a-1-cp311-cp311-manylinux_2_28_aarch64.whl")


def test_unknown_target_is_named_with_the_known_ones():
    with pytest.raises(PackagingError, match=r"riscv64.*known: amd64 with 3\.11"):
        targets.named("riscv64", "3.11")


def test_lock_file_that_was_edited_is_refused():
    item = Locked(name="a", version="1", licence="MIT", needed_by=("b",), wheels=(wheel("a-1-py3-none-any.whl"),))
    text = lock.render([item])
    assert lock.parse(text) == [item]
    with pytest.raises(PackagingError, match="lock file"):
        lock.parse(text.replace("    # a-1-py3-none-any.whl\n", ""))


def test_licences_are_spdx_expressions_or_the_lock_is_not_written():
    assert lock._licence({"name": "a", "license_expression": "MIT-0"}) == "MIT-0"
    assert lock._licence({"name": "a", "license": "MIT License"}) == "MIT"
    with pytest.raises(PackagingError, match="a: say in SPDX"):
        lock._licence({"name": "a", "license": "see the website"})


def test_requirements_of_extras_need_nobody():
    metadata = [
        {"name": "A_b", "requires_dist": ["c>=1", 'd; extra == "x"', "e ; python_version < '4'"]},
        {"name": "c"},
        {"name": "d"},
        {"name": "e"},
    ]
    found = lock._needed_by(["a.b>=2"], metadata)
    assert found == {"a-b": (lock.SELF,), "c": ("a-b",), "d": (), "e": ("a-b",)}


@pytest.fixture(scope="module")
def bom():
    return sbom.bill(LOCKED, ROOT)


def test_bill_of_materials_meets_the_schema(bom):
    validator = make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bom)) is None
    broken = {**bom, "components": [{**bom["components"][0], "type": "no such type"}]}
    assert validator.validate_str(json.dumps(broken)) is not None


def test_bill_of_materials_names_every_lock_entry_the_model_and_the_borders(bom):
    by_kind = {}
    for component in bom["components"]:
        by_kind.setdefault(component["type"], []).append(component)
    assert [item["purl"] for item in by_kind["library"]] == [f"pkg:pypi/{item.name}@{item.version}" for item in LOCKED]
    manifest = json.loads((ROOT / "models" / "detector.json").read_text())
    (model,) = by_kind["machine-learning-model"]
    assert (model["name"], model["hashes"][0]["content"]) == (manifest["name"], manifest["sha256"])
    (borders,) = by_kind["data"]
    content = (ROOT / "agent" / "data" / "borders.bin").read_bytes()
    assert borders["hashes"][0]["content"] == hashlib.sha256(content).hexdigest()


def test_bill_of_materials_leads_from_the_agent_to_every_component(bom):
    edges = {item["ref"]: item["dependsOn"] for item in bom["dependencies"]}
    reached, ahead = set(), [sbom.REFERENCE]
    while ahead:
        here = ahead.pop()
        if here not in reached:
            reached.add(here)
            ahead += edges.get(here, [])
    assert reached - {sbom.REFERENCE} == {component["bom-ref"] for component in bom["components"]}


def test_sbom_command_writes_the_same_bytes_twice(tmp_path, capsys):
    for name in ("a", "b"):
        assert main(["package", "sbom", "--output", str(tmp_path / name)]) == 0
    assert (tmp_path / "a/sbom.cdx.json").read_bytes() == (tmp_path / "b/sbom.cdx.json").read_bytes()
    licences = (tmp_path / "a/licences.md").read_text()
    assert all(f"| {item.name} | {item.version} | {item.licence} |" in licences for item in LOCKED)
    assert "sbom.cdx.json" in capsys.readouterr().out


def test_what_is_built_from_a_checkout_says_so_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(package, "ROOT", tmp_path)
    monkeypatch.setattr(package, "LOCK", tmp_path / "systemd" / "requirements.lock")
    for what in ("lock", "dist", "sbom", "deb"):
        assert main(["package", what]) == 1
        assert f"{tmp_path} is no checkout and no unpacked sdist" in capsys.readouterr().err


def recipe(path):
    stash = Stash(quiet=True)
    stash.AddFile(str(path))
    stash.Finalize()
    return stash.GetItemsFor()


def test_every_line_of_the_yocto_recipe_is_understood(tmp_path):
    def unknown(path):
        return [item.Raw for item in recipe(path) if type(item) is Item and item.Raw.strip()]

    assert unknown(RECIPE) == []
    broken = tmp_path / "broken_1.0.bb"
    broken.write_text(RECIPE.read_text() + "this is no recipe\n")
    assert unknown(broken) == ["this is no recipe\n"]


def test_yocto_recipe_tells_the_truth():
    values = {item.VarName: item.VarValueStripped for item in recipe(RECIPE) if hasattr(item, "VarName")}
    digest = hashlib.md5((ROOT / "LICENSE").read_bytes(), usedforsecurity=False).hexdigest()
    assert values["LIC_FILES_CHKSUM"] == f"file://LICENSE;md5={digest}"
    assert values["LICENSE"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert "S" not in values, "its default is right in every release: below WORKDIR, and below UNPACKDIR from 5.3 on"
    direct = {f"python3-{item.name}" for item in LOCKED if lock.SELF in item.needed_by}
    assert set(re.findall(r"python3-[\w-]+", values["RDEPENDS"])) - {"python3-modules"} == direct
    for name in re.findall(r"\$\{S\}/(\S+)", RECIPE.read_text()):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("target", targets.ALL, ids=lambda target: f"{target.architecture}-{target.python}")
def test_every_locked_wheel_can_be_fetched_and_has_its_hash(target, tmp_path, packages):
    if not packages:
        pytest.skip("asked for by --packages: it fetches some 60 MB")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "-d", str(tmp_path)]
    subprocess.run([*command, *target.pip_options(), "-r", str(LOCK)], check=True)
    assert len(list(tmp_path.iterdir())) == len(LOCKED)
