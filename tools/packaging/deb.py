"""The Debian package: an environment of its own under /opt, the unit, the examples as conffiles, four small scripts.

Nothing of the target runs while it is built, so a package for one architecture can be built on another. Equal sources
and an equal lock file give equal bytes: dates are SOURCE_DATE_EPOCH or the last commit's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent import __version__
from tools.packaging import lock, sbom
from tools.packaging.targets import PackagingError, Target

HOME = "opt/residency-agent"
DOC = "usr/share/doc/residency-agent"
CONFIGURATION = "etc/residency-agent"
SCRIPTS = ("postinst", "prerm", "postrm")

FILES = {
    "systemd/residency-agent.service": "usr/lib/systemd/system/residency-agent.service",
    "systemd/residency-agent.sysusers": "usr/lib/sysusers.d/residency-agent.conf",
    "systemd/residency-agent.tmpfiles": "usr/lib/tmpfiles.d/residency-agent.conf",
    "systemd/agent.example.toml": f"{CONFIGURATION}/agent.toml",
    "systemd/policy.example.toml": f"{CONFIGURATION}/policy.example.toml",
    "systemd/mosquitto.example.conf": f"{DOC}/examples/mosquitto.conf",
    "systemd/debian/lintian-overrides": "usr/share/lintian/overrides/residency-agent",
    "README.md": f"{DOC}/README.md",
    "CHANGELOG.md": f"{DOC}/CHANGELOG.md",
    "NOTICE": f"{DOC}/NOTICE",
}

UNUSED = (
    "bin",  # launchers for the interpreter that built the package
    "share",  # the wheel's copy of systemd/
    "tools",  # for testers, and without their dependencies
    "*.dist-info/RECORD",  # dpkg keeps its own; this one knows the builder's folders
    "*.dist-info/direct_url.json",
    "**/tests",
    "**/*.pyi",
    "numpy/distutils",
    "numpy/f2py",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "zstandard/_cffi.*.so",  # for other interpreters than CPython
    "zstandard/backend_cffi.py",
)
"""What no gateway runs, relative to site-packages; a test runs the agent without it."""

LAUNCHER = f"""\
#!/{HOME}/bin/python3
import sys

from agent.__main__ import main

sys.exit(main())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the builder chooses; `version` is Debian's, `compression` dpkg-deb's name and level."""

    target: Target
    maintainer: str
    version: str = __version__
    compression: tuple[str, str] = ("xz", "6")


def build(root: Path, output: Path, options: Options) -> Path:
    """Build the package from the checkout `root` into the folder `output`; its path. Raises PackagingError."""
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder) / "root"
        stage(root, staged, options.target)
        return pack(root, staged, output, options)


def stage(root: Path, staged: Path, target: Target) -> None:
    """Lay out everything that the package installs."""
    site = staged / HOME / "lib" / f"python{target.python}" / "site-packages"
    _install_wheels(root, site, target)
    for pattern in UNUSED:
        for path in sorted(site.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (staged / HOME / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    binaries = staged / HOME / "bin"
    binaries.mkdir()
    (binaries / "python3").symlink_to(f"/usr/bin/python{target.python}")
    (binaries / "residency-agent").write_text(LAUNCHER)
    (staged / "usr/bin").mkdir(parents=True)
    (staged / "usr/bin/residency-agent").symlink_to(f"/{HOME}/bin/residency-agent")
    for source, place in FILES.items():
        (staged / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / source, staged / place)
    _document(root, staged / DOC)


def pack(root: Path, staged: Path, output: Path, options: Options) -> Path:
    """Close what `stage` laid out with its control files; the path of the package."""
    epoch = source_date_epoch(root)
    control = staged / "DEBIAN"
    shutil.rmtree(control, ignore_errors=True)
    _write_changelog(staged / DOC / "changelog.gz", options, epoch)
    files = sorted(path for path in staged.rglob("*") if path.is_file() and not path.is_symlink())
    control.mkdir()
    (control / "control").write_text(_control(root, files, options))
    (control / "conffiles").write_text(
        "".join(f"/{path}\n" for path in sorted(FILES.values()) if path.startswith("etc/"))
    )
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(staged)}"
        for path in files
    )
    (control / "md5sums").write_text("".join(f"{line}\n" for line in sums))
    for script in SCRIPTS:
        shutil.copyfile(root / "systemd/debian" / script, control / script)
    _settle(staged, epoch)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"residency-agent_{options.version}_{options.target.debian_architecture}.deb"
    name, level = options.compression
    command = ["dpkg-deb", "--root-owner-group", f"-Z{name}", f"-z{level}", "--build", str(staged), str(path)]
    _run(command, {"SOURCE_DATE_EPOCH": str(epoch)})
    return path


def source_date_epoch(root: Path) -> int:
    """The date of the sources in Unix seconds: as the environment says it, else the last commit's, else a file's."""
    if text := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(text)
    try:
        return int(_run(["git", "-C", str(root), "log", "-1", "--format=%ct"]))
    except PackagingError:  # an unpacked sdist, or a machine without git
        return int((root / "pyproject.toml").stat().st_mtime)


def _install_wheels(root: Path, site: Path, target: Target) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    pip += ["--no-deps", f"--target={site}", "--root-user-action=ignore"]
    with tempfile.TemporaryDirectory() as folder:
        _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=root)
        own = next(Path(folder).glob("*.whl"))
        _run([*pip, *target.pip_options(), "--require-hashes", "-r", str(root / "systemd/requirements.lock")])
        _run([*pip, str(own)])


def _document(root: Path, folder: Path) -> None:
    bom = sbom.bill(lock.parse((root / "systemd/requirements.lock").read_text()), root)
    (folder / "sbom.cdx.json").write_text(json.dumps(bom, indent=1) + "\n")
    (folder / "licences.md").write_text(sbom.licences(bom))
    (folder / "copyright").write_text((root / "systemd/debian/copyright").read_text())


def _control(root: Path, files: list[Path], options: Options) -> str:
    text = (root / "systemd/debian/control").read_text()
    values = {
        "VERSION": options.version,
        "ARCHITECTURE": options.target.debian_architecture,
        "MAINTAINER": options.maintainer,
        "SIZE": str(sum(-(-path.stat().st_size // 1024) for path in files)),
        "PYTHON": options.target.python,
        "NEXT_PYTHON": options.target.next_python,
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _write_changelog(path: Path, options: Options, epoch: int) -> None:
    date = datetime.fromtimestamp(epoch, UTC).strftime("%a, %d %b %Y %H:%M:%S +0000")
    text = f"residency-agent ({options.version}) unstable; urgency=medium\n\n  * As CHANGELOG.md says.\n\n"
    text += f" -- {options.maintainer}  {date}\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=epoch))


def _settle(staged: Path, epoch: int) -> None:
    """One date and two modes for everything, whatever the builder's umask and clock are."""
    for path in [staged, *sorted(staged.rglob("*"))]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or _runs(path, staged) else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _runs(path: Path, staged: Path) -> bool:
    return path.parent in (staged / HOME / "bin", staged / "DEBIAN") and path.read_bytes()[:2] == b"#!"


def _run(command: list[str], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a program printed, once it has ended; raises PackagingError with the end of what it said."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(environment or {})}
        )
    except FileNotFoundError as exc:
        raise PackagingError(f"{command[0]} is not installed") from exc
    if result.returncode != 0:
        raise PackagingError(f"{' '.join(command[:4])} failed: {result.stderr.strip()[-1000:]}")
    return result.stdout
