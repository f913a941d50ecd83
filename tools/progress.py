"""Progress on the terminal of long commands: on standard error, absent where it is quiet or not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REDRAW_SECONDS = 0.1
Advance = Callable[[float, str], None]


@contextmanager
def progress(title: str, total: float | None, *, quiet: bool = False) -> Iterator[Advance]:
    """Show a bar; the yielded function takes what is done so far and a short text."""
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),  # it may be a topic that holds brackets
        console=console,
        disable=hidden,
        transient=True,
    )
    with shown:
        task = shown.add_task(title, total=total, note="")

        drawn_s = 0.0

        def advance(done: float, note: str) -> None:
            nonlocal drawn_s
            now_s = time.monotonic()
            if not shown.disable and now_s - drawn_s >= REDRAW_SECONDS:
                drawn_s = now_s
                shown.update(task, completed=done, note=note)

        yield advance
