"""Where border geometry is not good enough: guard distances per border, and areas under another country's law.

A guard distance is how far the drawn border may be from the true one. It belongs to the border between two countries:
the 95th percentile of the offset between the shipped borders and OpenStreetMap was measured as 1,298 m for CA-US,
1,224 m at Newry (GB-IE), 2,054 m for AT-IT and 7,065 m for MX-US in empty country, and under 500 m on land at
Shenzhen, Macau, Basel, Detroit, El Paso, Strasbourg, Geneva and Luxembourg. A guard that is too wide holds records
back, it never misroutes them.

An override is an area in which the law is not that of the country around it. The two shipped ones were drawn by hand,
so they are good to a few hundred metres, which the guard covers:

- Shenzhen Bay Port, Hong Kong Port Area, with the bridge from it as far as Hong Kong waters: under Hong Kong law by
  the decision of the Standing Committee of the National People's Congress of 2006-10-31; Hong Kong Cap. 591.
- University of Macau, Hengqin campus: under Macau law by the decision of the same committee of 2009-06-27.

Not shipped: the Mainland Port Area in Hong Kong's West Kowloon station (Cap. 632), which no car can enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

DEFAULT_GUARD_M = 500.0

_MEASURED_M: Mapping[frozenset[str], float] = MappingProxyType(
    {
        frozenset({"CA", "US"}): 1_200.0,
        frozenset({"GB", "IE"}): 1_200.0,
        frozenset({"AT", "IT"}): 2_500.0,
        frozenset({"MX", "US"}): 7_000.0,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """Metres by which the border of a pair of countries may be wrong; pairs are sets of two ISO 3166-1 codes."""

    default_m: float = DEFAULT_GUARD_M
    pairs: Mapping[frozenset[str], float] = field(default_factory=lambda: _MEASURED_M)

    def between(self, one: str, other: str) -> float:
        """Metres for the border of two countries; never less than the default."""
        return max(self.default_m, self.pairs.get(frozenset({one, other}), 0.0))

    def widest_between(self, one: str, others: Iterable[str]) -> float:
        """Metres for the worst border that `one` may have with any of `others`; the default where there are none."""
        return max((self.between(one, other) for other in others), default=self.default_m)

    @property
    def widest_m(self) -> float:
        """The largest guard of all borders."""
        return max([self.default_m, *self.pairs.values()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """An area under the law of `codes`, whatever country is drawn around it; `ring` is (longitude, latitude) pairs."""

    name: str
    codes: tuple[str, ...]
    ring: tuple[tuple[float, float], ...]


OVERRIDES: tuple[Override, ...] = (
    Override(
        name="Shenzhen Bay Port, Hong Kong Port Area and bridge",
        codes=("HK",),
        ring=(
            (113.9400, 22.5070),
            (113.9490, 22.5070),
            (113.9530, 22.4990),
            (113.9620, 22.4760),
            (113.9560, 22.4740),
            (113.9450, 22.4960),
            (113.9400, 22.4990),
        ),
    ),
    Override(
        name="University of Macau, Hengqin campus",
        codes=("MO",),
        ring=((113.5405, 22.1365), (113.5500, 22.1365), (113.5520, 22.1215), (113.5415, 22.1215)),
    ),
)
