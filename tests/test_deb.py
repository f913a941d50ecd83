"""What the Debian package says of itself; tests/test_unit.py installs and runs it. Here without the wheels: seconds."""

import os
import shutil
import subprocess
import tarfile
import time

import pytest
from test_package import ROOT

from agent import __version__
from tools.packaging import deb, targets
from tools.packaging.targets import PackagingError

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
OPTIONS = deb.Options(
    target=targets.named("arm64", "3.12"), maintainer="A Builder <builder@example.com>", compression=("gzip", "1")
)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds the package around an agent without wheels."""

    def install(_root, site, _target):
        (site / "agent").mkdir(parents=True)
        (site / "agent" / "__init__.py").write_text("")
        (site / "tools").mkdir()

    monkeypatch.setattr(deb, "_install_wheels", install)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    return lambda name, options=OPTIONS: deb.build(ROOT, tmp_path / name, options)


def field(path, name):
    command = ["dpkg-deb", "--field", str(path), name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def members(path):
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], check=True, capture_output=True).stdout
    file = path.with_suffix(".tar")
    file.write_bytes(data)
    with tarfile.open(file) as archive:
        return {member.name.removeprefix("./"): member for member in archive.getmembers()}


def test_package_is_for_its_architecture_and_exactly_its_python(build):
    path = build("a")
    assert path.name == f"residency-agent_{__version__}_arm64.deb"
    assert field(path, "Architecture") == "arm64"
    assert field(path, "Depends").startswith("python3 (>= 3.12), python3 (<< 3.13~), ")
    assert members(path)["opt/residency-agent/bin/python3"].linkname == "/usr/bin/python3.12"


def test_everything_is_roots_and_only_launchers_can_be_run(build):
    found = members(build("a"))
    assert {(member.uid, member.gid) for member in found.values()} == {(0, 0)}
    modes = {member.mode for member in found.values() if member.isfile()}
    assert modes == {0o644, 0o755}
    assert [name for name, member in found.items() if member.isfile() and member.mode == 0o755] == [
        "opt/residency-agent/bin/residency-agent"
    ]


def test_gateway_gets_unit_user_folders_examples_and_bill_of_materials_but_no_tools(build):
    found = members(build("a"))
    assert set(deb.FILES.values()) <= set(found)
    assert "usr/share/doc/residency-agent/sbom.cdx.json" in found
    assert "usr/share/doc/residency-agent/licences.md" in found
    assert not [name for name in found if "/tools" in name]


def test_equal_sources_give_an_equal_package_whatever_the_builders_clock_and_umask(build, monkeypatch):
    first = build("a").read_bytes()
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    before = os.umask(0o077)
    try:
        second = build("b").read_bytes()
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert first == second


def test_wheels_are_laid_out_equally_twice(tmp_path, packages, monkeypatch):
    if not packages:
        pytest.skip("asked for by --packages: it installs all wheels twice")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    first, second = (deb.build(ROOT, tmp_path / name, OPTIONS).read_bytes() for name in ("a", "b"))
    assert first == second


def test_date_is_the_last_commits_where_nobody_says_one(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    command = ["git", "log", "-1", "--format=%ct"]
    found = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip("this is no git checkout")
    assert deb.source_date_epoch(ROOT) == int(found.stdout)


def test_date_is_a_files_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    (tmp_path / "pyproject.toml").write_text("")
    os.utime(tmp_path / "pyproject.toml", (1_790_000_000, 1_790_000_000))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert deb.source_date_epoch(tmp_path) == 1_790_000_000


def test_failing_program_is_named_with_what_it_said():
    with pytest.raises(PackagingError, match="no-such-program is not installed"):
        deb._run(["no-such-program"])
    with pytest.raises(PackagingError, match=r"dpkg-deb --field failed: .*--field needs"):
        deb._run(["dpkg-deb", "--field"])


@pytest.mark.skipif(shutil.which("lintian") is None, reason="lintian is not installed")
def test_lintian_finds_no_error(build):
    command = ["lintian", "--no-cfg", "--allow-root", "--fail-on", "error", str(build("a"))]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
