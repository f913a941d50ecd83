"""Where border geometry is not good enough: guard distances per border, and areas under another country's law.

A guard is how far a drawn edge may be from the true border. Borders are drawn with long edges where the country is
empty, and the error grows with them: the 95th percentile of the offset between the shipped borders and OpenStreetMap
was measured as 263 m at Basel, 346 m at Strasbourg, 571 m at Detroit, 712 m at Narva, 1,224 m at Newry, 1,298 m for
CA-US, 1,724 m for Shenzhen-Hong Kong (253 m at most on land), 2,054 m for AT-IT and 7,065 m for MX-US; for the last
three that is 7 to 10 % of the typical edge. So the guard of a border that was not measured is a tenth of the edge, at
least 500 m and at most 7 km. A measured border has its own. A guard that is too wide holds records back, it never
misroutes them; one in twenty places along a measured border may still be farther off than its 95th percentile.

An override is an area in which the law is not that of the country around it. The two shipped ones were drawn by hand,
so they are good to a few hundred metres, which the guard covers:

- Shenzhen Bay Port, Hong Kong Port Area, with the bridge from it as far as Hong Kong waters: under Hong Kong law by
  the decision of the Standing Committee of the National People's Congress of 2006-10-31; Hong Kong Cap. 591.
- University of Macau, Hengqin campus: under Macau law by the decision of the same committee of 2009-06-27.

Not shipped: the Mainland Port Area in Hong Kong's West Kowloon station (Cap. 632), which no car can enter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_MEASURED_M: Mapping[frozenset[str], float] = MappingProxyType(
    {
        frozenset({"AT", "IT"}): 2_500.0,
        frozenset({"CA", "US"}): 1_200.0,
        frozenset({"EE", "RU"}): 1_000.0,
        frozenset({"GB", "IE"}): 1_200.0,
        frozenset({"MX", "US"}): 7_000.0,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A box in degrees in which a border was measured to be better than elsewhere: edges wholly inside it count."""

    pair: frozenset[str]
    west: float
    south: float
    east: float
    north: float
    metres: float


# El Paso: median 16 m, 95th percentile 65 m.
_STRETCHES = (
    Stretch(pair=frozenset({"MX", "US"}), west=-106.53, south=31.69, east=-106.34, north=31.79, metres=500.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guards:
    """Metres by which a border may be wrong; pairs are sets of two ISO 3166-1 codes.

    `pairs` hold for every edge between two countries but those in `stretches`; any other edge is given
    `length_share` of its length, between `default_m` and `cap_m`.
    """

    default_m: float = 500.0
    length_share: float = 0.1
    cap_m: float = 7_000.0
    pairs: Mapping[frozenset[str], float] = field(default_factory=lambda: _MEASURED_M)
    stretches: tuple[Stretch, ...] = _STRETCHES


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
