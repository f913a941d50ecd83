"""How the agent is: a JSON file that a running agent keeps up to date, and the ledger's counters beside it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.store.entries import Counts
from agent.store.ledger import Ledger

STATES = ("received", "delivered", "pending", "held", "refused", "expired", "evicted")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What the agent wrote last; empty where it never ran or the file was cut."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def as_dict(counts: Counts) -> dict[str, Any]:
    """Counters by name, with the conservation check and the breakdown."""
    totals = {state: getattr(counts, state) for state in STATES}
    details = {state: {key: dict(names) for key, names in rows.items()} for state, rows in counts.breakdown.items()}
    return {
        **totals,
        "conserved": counts.conserved,
        "late": counts.late,
        "pending_bytes": counts.pending_bytes,
        "held_bytes": counts.held_bytes,
        "breakdown": details,
    }


def gather(ledger_path: Path, status_path: Path) -> dict[str, Any]:
    """Everything that is known of a running or a stopped agent; raises LedgerError without a readable ledger."""
    content = read(status_path)
    content["running"] = _is_running(content.get("pid"))
    content["counts"] = as_dict(Ledger.read_counts(ledger_path))
    return content


def table(content: Mapping[str, Any]) -> str:
    """The same for a person."""
    counts = content["counts"]
    lines = [
        f"agent       {'running' if content['running'] else 'stopped'}, version {content.get('version', 'unknown')}",
        f"policy      {content.get('policy', 'unknown')}",
        f"model       {_model(content.get('model', {}))}",
    ]
    for name, endpoint in sorted(content.get("endpoints", {}).items()):
        state = "connected" if endpoint["connected"] else f"down: {endpoint['error']}" if endpoint["error"] else "idle"
        lines.append(f"endpoint    {name}: {state}, {endpoint['in_flight']} in flight")
    for name, session in sorted(content.get("sessions", {}).items()):
        lines.append(f"intake      {name}: {'connected' if session['connected'] else 'not connected'}")
    lines += [f"{state:<11} {counts[state]}" for state in STATES]
    holds = " + ".join(str(counts[state]) for state in STATES[1:])
    lines.append(f"{'conserved' if counts['conserved'] else 'NOT CONSERVED'}   {counts['received']} = {holds}")
    for reason, count in sorted(counts["breakdown"].get("refused", {}).get("reason", {}).items()):
        lines.append(f"  refused   {reason}: {count}")
    return "\n".join(lines)


def _model(model: Mapping[str, Any]) -> str:
    if not model:
        return "unknown"
    return f"ready, {model['digest'][:12]}" if model["ready"] else f"not ready: {model['error']}"


def _is_running(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return "agent" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    return False
