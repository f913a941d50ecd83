"""What was found of one thing that was tried."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agent.errors import AgentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried, or `skipped`. `advice` is empty where it is as it should be."""

    name: str
    detail: str
    advice: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        if self.skipped:
            return f"skip  {self.name}: {self.detail}"
        if not self.advice:
            return f"ok    {self.name}: {self.detail}"
        return f"FAIL  {self.name}: {self.detail}\n      {self.advice}"


async def tried(name: str, attempt: Callable[[], Awaitable[str]], advice: Callable[[AgentError], str]) -> Finding:
    """What an attempt gave, or how it failed and what to do about it. Cancelling is as safe as the attempt's."""
    try:
        return Finding(name=name, detail=await attempt())
    except AgentError as exc:
        return Finding(name=name, detail=str(exc), advice=advice(exc))
