"""What a running agent says of its parts, as plain values for the status file, the metrics and the status message."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from agent import status
from agent.boot import boot_ns
from agent.errors import LedgerStalledError
from agent.intake.intake import Fixes, Intake
from agent.memory import resident_bytes
from agent.redaction.pool import RedactionPool
from agent.store.committer import Committer
from agent.uplink.uplink import Uplink

SECOND = 10**9


def of_worker(worker: RedactionPool) -> dict[str, Any]:
    """The redaction process; `ready` also while it is unloaded, for the next picture starts it."""
    return {
        "ready": worker.ready or worker.unloaded,
        "unloaded": worker.unloaded,
        "confined": worker.confined,
        "digest": worker.digest,
        "error": worker.error,
        "restarts": worker.restarts,
        "resident_bytes": worker.resident_bytes,
        "redaction_seconds": worker.redactions.as_dict(),
        "start_seconds": worker.starts.as_dict(),
    }


def of_intakes(intakes: Mapping[str, Intake]) -> dict[str, Any]:
    """The sessions with the in-car broker; `emptied_seconds` ago each was last proved to hold nothing back."""
    now_ns = boot_ns()
    return {
        name: {
            "connected": intake.connected,
            "alive_ns": intake.alive_ns,
            "emptied_seconds": None if intake.alive_ns is None else (now_ns - intake.alive_ns) / SECOND,
            "turned_seconds": time.monotonic() - intake.turned,
            "durable_seconds": intake.durable.as_dict(),
            "unasked": intake.unasked,
        }
        for name, intake in intakes.items()
    }


def of_fixes(fixes: Fixes) -> dict[str, int]:
    """Position messages by what became of them; the stale ones are among the accepted."""
    return {"accepted": fixes.accepted, "malformed": fixes.malformed, "stale": fixes.stale}


def of_uplinks(uplinks: Mapping[str, Uplink]) -> dict[str, Any]:
    """The endpoints."""
    return {
        name: {
            "connected": uplink.connected,
            "error": uplink.last_error,
            "certificate": uplink.shown.error,
            "in_flight": uplink.in_flight,
            "resent": uplink.resent,
            "turned_seconds": time.monotonic() - uplink.turned,
            "delivered_seconds": uplink.delivered.as_dict(),
        }
        for name, uplink in uplinks.items()
    }


async def of_ledger(committer: Committer) -> dict[str, Any]:
    """Counters and queue; returns only when the ledger's thread does. Raises LedgerError where the ledger is damaged.

    Where the disk cannot be read now, the ages are missing: the counters are in memory.
    """
    try:
        counts, oldest = await committer.call(lambda ledger: (ledger.counts(), ledger.oldest()))
    except LedgerStalledError as exc:
        return {"counts": status.as_dict(committer.ledger.counts(), {}), "stalled": str(exc)}
    return {"counts": status.as_dict(counts, oldest), "stalled": committer.stalled}


def of_process() -> dict[str, int]:
    """This process, without the redaction process."""
    return {"resident_bytes": resident_bytes() or 0, "threads": len(os.listdir("/proc/self/task"))}  # noqa: PTH208 - no Path is needed
