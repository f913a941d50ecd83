"""`tools/dev`, the one entry for people who build the project."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment stands already, and a PATH on which only what the script itself runs is found."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "dev", tmp_path / "tools")
    binaries, programs = tmp_path / ".venv" / "bin", tmp_path / "programs"
    binaries.mkdir(parents=True)
    programs.mkdir()
    (binaries / "python").symlink_to(sys.executable)
    for place in ("pyproject.toml", ".venv/.installed-dev"):
        shutil.copy(ROOT / "pyproject.toml", tmp_path / place)
    for name in ("bash", "cmp", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    for name, line in (("id", "echo 1000"), ("apt-get", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return tmp_path


def test_what_only_root_may_install_is_named_to_others(checkout):
    command = [str(checkout / "tools" / "dev"), "test"]
    environment = {"PATH": str(checkout / "programs")}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert "mosquitto-clients" in result.stderr
    assert "which only root may install" in result.stderr
