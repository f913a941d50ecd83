"""What the tables of both configuration files are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Word = Annotated[str, Meta(pattern=r"^[^\s\x00-\x1f\x7f]+\Z")]
"""Without white space and control characters: it is written into files of other programs."""
Port = Annotated[int, Meta(ge=1, le=65_535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=366 * 86_400)]
Country = Annotated[str, Meta(pattern=r"^[A-Z]{2}\Z")]
CountryOrNone = Annotated[str, Meta(pattern=r"^([A-Z]{2})?\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Sha256OrNone = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Pointer = Annotated[str, Meta(pattern="^/")]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table: an unknown key is a mistake."""
