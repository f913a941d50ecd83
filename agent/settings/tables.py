"""What the tables of both configuration files are made of."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=366 * 86_400)]
Country = Annotated[str, Meta(pattern="^[A-Z]{2}$")]
CountryOrNone = Annotated[str, Meta(pattern="^([A-Z]{2})?$")]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Pointer = Annotated[str, Meta(pattern="^/")]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TOML table: an unknown key is a mistake."""
