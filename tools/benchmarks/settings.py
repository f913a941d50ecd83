"""How much is measured: repetitions, seconds, sizes, and what is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is wanted: `rows`, in `rounds` turns of about `seconds` each, on `backlog` stored records.

    `picture` is a JPEG; what is made on the way goes to `folder`.
    """

    rows: tuple[str, ...]
    rounds: int
    seconds: float
    backlog: int
    picture: bytes
    folder: Path
