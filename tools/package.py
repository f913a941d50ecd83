"""`residency-tools package`: the lock file, wheel and sdist, the bill of materials, the Debian package.

All work on a checkout (or an unpacked sdist), which is the folder above this package. `lock` asks the package index for
the newest permitted versions; `deb` fetches the locked ones from it, for any target on any machine.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from agent.errors import AgentError
from tools.packaging import deb, lock, sbom, targets

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "systemd" / "requirements.lock"
MAINTAINER = "The residency-agent authors <residency-agent@example.com>"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `package lock`, `package dist`, `package sbom` and `package deb`."""
    parser = subparsers.add_parser(
        "package", help="build the packages, the lock file and the bill of materials", description=__doc__
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    for name, run, summary in (
        ("lock", _lock, "resolve the dependencies for every target, with hashes and licences"),
        ("dist", _dist, "build wheel and sdist"),
        ("sbom", _sbom, "write the bill of materials (CycloneDX 1.6) and the list of licences"),
        ("deb", _deb, "build the Debian package"),
    ):
        command = commands.add_parser(name, help=summary)
        command.set_defaults(run=_run, build=run)
        if name != "lock":
            command.add_argument("--output", type=Path, default=Path("dist"), help="folder (default: %(default)s)")
    here = targets.here()
    debian = targets.DEBIAN_NAMES.get(here.architecture, "amd64")
    command.add_argument("--arch", default=debian, help="amd64 or arm64 (default: %(default)s)")
    command.add_argument("--python", default=here.python, help="of the gateway, e.g. 3.11 (default: %(default)s)")
    command.add_argument("--maintainer", default=_maintainer(), help="NAME <MAIL> (default: DEBFULLNAME, DEBEMAIL)")


def _maintainer() -> str:
    mail = os.environ.get("DEBEMAIL")
    return f"{os.environ.get('DEBFULLNAME', mail)} <{mail}>" if mail else MAINTAINER


def _run(arguments: argparse.Namespace) -> int:
    try:
        _check(arguments.build)
        return int(arguments.build(arguments))
    except (AgentError, OSError) as exc:
        print(f"residency-tools package: {exc}", file=sys.stderr)
        return 1


def _check(build: Callable[[argparse.Namespace], int]) -> None:
    """Raise PackagingError where there is nothing to build from or with."""
    if not LOCK.is_file():
        raise targets.PackagingError(f"{ROOT} is no checkout and no unpacked sdist: run it in one (./tools/dev deb)")
    if build in (_dist, _deb):
        importlib.import_module("hatchling")  # a program of it is run; `residency-tools` says what has it


def _lock(_: argparse.Namespace) -> int:
    locked = lock.resolve(lock.requirements(ROOT / "pyproject.toml"))
    LOCK.write_text(lock.render(locked))
    print(f"{LOCK.relative_to(ROOT)}: {len(locked)} distributions for {len(targets.ALL)} targets")
    return 0


def _dist(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(arguments.output.resolve())]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def _sbom(arguments: argparse.Namespace) -> int:
    bom = sbom.bill(lock.parse(LOCK.read_text()), ROOT)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "sbom.cdx.json").write_text(json.dumps(bom, indent=1) + "\n")
    (arguments.output / "licences.md").write_text(sbom.licences(bom))
    print(f"{arguments.output / 'sbom.cdx.json'}: {len(bom['components'])} components")
    return 0


def _deb(arguments: argparse.Namespace) -> int:
    target = targets.named(arguments.arch, arguments.python)
    path = deb.build(ROOT, arguments.output, deb.Options(target=target, maintainer=arguments.maintainer))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
