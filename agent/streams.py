"""The standard streams, as every command needs them."""

from __future__ import annotations

import io
import sys


def prepare() -> None:
    """Have standard output escape what it cannot encode, as standard error does; the first thing that a command does.

    The name of a file may be any bytes, and a name or value any character that the terminal's encoding lacks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
