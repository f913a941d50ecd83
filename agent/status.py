"""How the agent is: a JSON file that a running agent keeps up to date, and the ledger's counters beside it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.boot import boot_id
from agent.histogram import within
from agent.messages import State
from agent.store.entries import Counts
from agent.store.ledger import Ledger

MIB = 1 << 20
SECOND = 10**9
STATES = ("received", "delivered", "pending", "held", "refused", "expired", "evicted")
ENDED_WITH_REASON = ("refused", "expired", "evicted")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What the agent wrote last; empty where it never ran or the file was cut."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def as_dict(counts: Counts, oldest: Mapping[State, int]) -> dict[str, Any]:
    """Counters by name, with the conservation check, when the oldest records were made, and the breakdown."""
    totals = {state: getattr(counts, state) for state in STATES}
    details = {state: {key: dict(names) for key, names in rows.items()} for state, rows in counts.breakdown.items()}
    return {
        **totals,
        "conserved": counts.conserved,
        "late": counts.late,
        "pending_bytes": counts.pending_bytes,
        "held_bytes": counts.held_bytes,
        "oldest_ns": {str(state): time_ns for state, time_ns in oldest.items()},
        "breakdown": details,
    }


def gather(ledger_path: Path, status_path: Path) -> dict[str, Any]:
    """Everything that is known of a running or a stopped agent; raises LedgerError without a readable ledger."""
    content = read(status_path)
    this_boot = content.get("boot_id", boot_id()) == boot_id()  # else its pid is another process's
    content["running"] = this_boot and _is_running(content.get("pid"))
    content["counts"] = as_dict(Ledger.read_counts(ledger_path), Ledger.read_oldest(ledger_path))
    return content


def table(content: Mapping[str, Any], now_ns: int) -> str:
    """The same for a person, who sees at `now_ns` how old things are."""
    counts = content["counts"]
    lines = [
        f"agent       {_agent(content)}",
        f"policy      {_policy(content)}",
        f"model       {_model(content.get('model', {}))}",
    ]
    if content.get("reload", {}).get("error"):
        reasons = content["reload"]["error"].replace("\n", "\n            ")
        lines.append(f"reload      REFUSED, the old configuration holds:\n            {reasons}")
    if content.get("stalled"):
        lines.append(f"disk        TAKES NO RECORDS: {content['stalled']}")
    if content["running"]:
        lines += _connections(content)
    lines += [f"{state:<11} {counts[state]}{_queue(counts, state, now_ns)}" for state in STATES]
    holds = " + ".join(str(counts[state]) for state in STATES[1:])
    lines.append(f"{'conserved' if counts['conserved'] else 'NOT CONSERVED'}   {counts['received']} = {holds}")
    for state in ENDED_WITH_REASON:
        for reason, count in sorted(counts["breakdown"].get(state, {}).get("reason", {}).items()):
            lines.append(f"  {state:<9} {reason}: {count}")
    return "\n".join(lines)


def _connections(content: Mapping[str, Any]) -> Iterator[str]:
    """What an agent of another version may not have written is left out."""
    for name, endpoint in sorted(content.get("endpoints", {}).items()):
        state = "connected" if endpoint["connected"] else f"down: {endpoint['error']}" if endpoint["error"] else "idle"
        slow = _mostly(endpoint.get("delivered_seconds", {}), "delivered")
        yield f"endpoint    {name}: {state}, {endpoint['in_flight']} in flight{slow}"
        if endpoint.get("certificate"):
            yield f"            OLD CERTIFICATE in use, the new one does not work: {endpoint['certificate']}"
    fixes = content.get("fixes")
    if fixes:
        yield f"fixes       {fixes['accepted']} accepted, {fixes['malformed']} malformed"
    for name, session in sorted(content.get("sessions", {}).items()):
        slow = _mostly(session.get("durable_seconds", {}), "durable")
        yield f"intake      {name}: {'connected' if session['connected'] else 'not connected'}{slow}"


def _agent(content: Mapping[str, Any]) -> str:
    process = content.get("process", {})
    memory = (process.get("resident_bytes", 0) + content.get("model", {}).get("resident_bytes", 0)) / MIB
    state = f"running, {memory:.0f} MiB" if content["running"] else "stopped"
    return f"{state}, version {content.get('version', 'unknown')}"


def _queue(counts: Mapping[str, Any], state: str, now_ns: int) -> str:
    """Bytes and age of what waits in a state; empty for states in which nothing waits."""
    made_ns = counts["oldest_ns"].get(state)
    if made_ns is None:
        return ""
    return f", {counts[f'{state}_bytes'] / MIB:.1f} MiB, the oldest for {max(now_ns - made_ns, 0) // SECOND} s"


def _mostly(durations: Mapping[str, Any], what: str) -> str:
    bound = within(durations, 0.95)
    return f", 95 % {what} within {bound} s" if bound else ""


def _policy(content: Mapping[str, Any]) -> str:
    serial = f", serial {content['serial']}" if content.get("serial") else ""
    again = ", records are being decided again" if content.get("reload", {}).get("deciding_again") else ""
    return f"{content.get('policy', 'unknown')}{serial}{again}"


def _model(model: Mapping[str, Any]) -> str:
    if not model:
        return "unknown"
    if not model["ready"]:
        return f"not ready: {model['error']}"
    slow = _mostly(model.get("redaction_seconds", {}), "of the payloads redacted")
    return f"{'unloaded' if model.get('unloaded') else 'ready'}, {model['digest'][:12]}{slow}"


def _is_running(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return "agent" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    return False
