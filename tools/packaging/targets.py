"""The machines that packages are built for: an architecture and a CPython, in the words of pip and of Debian."""

from __future__ import annotations

import itertools
import platform
import sys
from dataclasses import dataclass

from agent.errors import AgentError

DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
PYTHONS = ("3.11", "3.12", "3.13")
"""Debian 12, Ubuntu 24.04 and Debian 13."""
NEWEST_GLIBC, OLDEST_GLIBC = 28, 17
"""Minor versions of glibc 2: onnxruntime needs 2.28 (Debian 10, Yocto 2.7), and no locked wheel may need more."""


class PackagingError(AgentError):
    """A package, lock file or bill of materials could not be made; the message says what was missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One kind of gateway: `architecture` as uname says it, `python` as major.minor."""

    architecture: str
    python: str

    @property
    def debian_architecture(self) -> str:
        """As dpkg says it."""
        return DEBIAN_NAMES[self.architecture]

    @property
    def next_python(self) -> str:
        """The first version that no longer loads this one's extension modules."""
        major, minor = self.python.split(".")
        return f"{major}.{int(minor) + 1}"

    def pip_options(self) -> list[str]:
        """What makes pip take this target's wheels, and wheels only, wherever it runs."""
        tags = [f"manylinux_2_{minor}" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)] + ["manylinux2014"]
        platforms = itertools.chain.from_iterable(("--platform", f"{tag}_{self.architecture}") for tag in tags)
        return ["--only-binary=:all:", "--implementation=cp", f"--python-version={self.python}", *platforms]

    def takes(self, filename: str) -> bool:
        """Whether a wheel of this name is this target's."""
        python, abi, tag = filename.removesuffix(".whl").split("-")[-3:]
        if tag != "any" and not tag.endswith(self.architecture):
            return False
        return abi in ("none", "abi3") or python == f"cp{self.python.replace('.', '')}"


ALL = tuple(Target(architecture=name, python=python) for python in PYTHONS for name in DEBIAN_NAMES)


def here() -> Target:
    """The machine that this runs on, whether or not packages are built for it."""
    return Target(architecture=platform.machine(), python=f"{sys.version_info.major}.{sys.version_info.minor}")


def named(debian_architecture: str, python: str) -> Target:
    """The target that an operator named; raises PackagingError where none is meant."""
    for target in ALL:
        if (target.debian_architecture, target.python) == (debian_architecture, python):
            return target
    known = ", ".join(f"{target.debian_architecture} with {target.python}" for target in ALL)
    raise PackagingError(f"no packages are built for {debian_architecture} with Python {python}; known: {known}")
