"""The figures of a listener: what came per region, what was refused and why; as a table and as JSON."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table
from rich.text import Text

from agent.wire.envelope import Envelope
from tools.listening.judging import REFUSED, Judgement, Verdict

LATEST_REFUSALS = 5  # shown below the table
SECOND = 10**9


@dataclass(slots=True, kw_only=True)
class RegionFigures:
    """Good records of one region value; `lag_ns` is from the ledger of the latest one to its arrival here."""

    good: int = 0
    duplicates: int = 0
    bytes: int = 0
    lag_ns: int = 0


@dataclass(slots=True, kw_only=True)
class Board:
    """Counts from the start of this listener; `started` is on the monotonic clock, in seconds."""

    started: float
    regions: dict[str, RegionFigures] = field(default_factory=dict)
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    refusals: deque[str] = field(default_factory=lambda: deque(maxlen=LATEST_REFUSALS))
    connected: bool = False
    trouble: str = ""  # why it was not, the last time

    @property
    def good(self) -> int:
        """Good records, each counted once."""
        return sum(region.good for region in self.regions.values())

    @property
    def refused(self) -> int:
        """Messages that are not what they should be."""
        return sum(self.verdicts[verdict] for verdict in REFUSED)

    def judged(self, topic: str, judgement: Judgement) -> None:
        """Count a verdict; a refusal is remembered for the table."""
        self.verdicts[judgement.verdict] += 1
        if judgement.verdict in REFUSED:
            self.refusals.append(f"{judgement.verdict}: {topic!r}: {judgement.detail}")

    def took(self, envelope: Envelope, *, fresh: bool, now_ns: int) -> None:
        """Count a good record, or its duplicate."""
        region = self.regions.setdefault(",".join(envelope.attributes.dataregion), RegionFigures())
        if not fresh:
            region.duplicates += 1
            return
        region.good += 1
        region.bytes += len(envelope.data)
        region.lag_ns = now_ns - envelope.attributes.recordedtime_ns

    def as_json(self, missing: Mapping[str, int], now: float) -> dict[str, object]:
        """Give the figures for programs."""
        return {
            "seconds": round(now - self.started, 3),
            "good": self.good,
            "refused": self.refused,
            "verdicts": {verdict.value: self.verdicts[verdict] for verdict in Verdict},
            "regions": {
                name: {
                    "good": one.good,
                    "duplicates": one.duplicates,
                    "missing": missing.get(name, 0),
                    "bytes": one.bytes,
                    "lag_s": round(one.lag_ns / SECOND, 3),
                }
                for name, one in sorted(self.regions.items())
            },
        }

    def table(self, missing: Mapping[str, int], now: float) -> Group:
        """Give the figures for people."""
        seconds = max(now - self.started, 1e-9)
        state = "connected" if self.connected else f"not connected: {self.trouble}" if self.trouble else "not connected"
        table = Table("region", title=Text(f"{state}, {seconds:.0f} s"))
        for heading in ("good", "per s", "duplicates", "missing", "MB", "lag s"):
            table.add_column(heading, justify="right")
        for name, one in sorted(self.regions.items()):
            figures = (one.good, f"{one.good / seconds:.1f}", one.duplicates, missing.get(name, 0))
            table.add_row(name, *map(str, figures), f"{one.bytes / 1e6:.2f}", f"{one.lag_ns / SECOND:.1f}")
        verdicts = ", ".join(f"{verdict.value} {self.verdicts[verdict]}" for verdict in (*REFUSED, Verdict.NOTICE))
        style = "bold red" if self.refused else "green"
        return Group(table, Text(f"refused {self.refused} ({verdicts})", style), *map(Text, self.refusals))
