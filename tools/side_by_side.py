"""Figures of several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of every run; `timing` figures differ between any two runs and do not count as a difference."""

    name: str
    values: tuple[str, ...]
    timing: bool = False

    @property
    def differs(self) -> bool:
        """Whether the runs do not agree."""
        return not self.timing and len(set(self.values)) > 1


def show(console: Console, found: Sequence[Row], names: Sequence[str], *, everything: bool) -> None:
    """Print what differs, and how much does not; with `everything` all of it."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for one in found:
        if everything or one.differs or one.timing:
            style = "bold yellow" if one.differs else ""
            table.add_row(one.name, *one.values, style=style)
    console.print(table)
    differing = sum(one.differs for one in found)
    console.print(f"{differing} of {sum(not one.timing for one in found)} figures differ.")
