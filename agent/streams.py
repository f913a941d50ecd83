"""The standard streams, as every command needs them: all three are there, and standard output takes every character.

A stream that was closed before the start leads to /dev/null. Otherwise Python prints to none, takes standard output for
a missing standard error, and the next file or socket gets the number that libraries and child processes write to.
"""

from __future__ import annotations

import io
import os
import sys

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))  # by their descriptors


def prepare() -> None:
    """Open what is missing, and have standard output escape what it cannot encode, as standard error does.

    The first thing that a command does. The name of a file may be any bytes, and a name or value any character that the
    terminal's encoding lacks.
    """
    for number, (name, mode) in enumerate(STREAMS):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets `number`, the lowest that is free
            os.set_inheritable(number, True)  # noqa: FBT003 - it takes no keyword
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
