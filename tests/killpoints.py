"""Runs the agent and kills it with SIGKILL at one step of the line: KILLPOINT=name:count python killpoints.py ARGS...

The steps are wrapped from outside; the product knows nothing of it. `POINTS` and `BATCH_POINTS` name each step,
and whether the kill comes before or after the wrapped call.
"""

import asyncio
import functools
import importlib
import os
import signal
import sys

POINTS = {
    "message taken": ("agent.intake.intake", "Intake._received", "before"),
    "message examined": ("agent.pipeline", "Pipeline.examine", "after"),
    "picture handed to the redaction process": ("agent.redaction.worker", "RedactionWorker._ask", "before"),
    "picture redacted": ("agent.redaction.worker", "RedactionWorker.redact", "after"),
    "record made": ("agent.intake.line", "Line.entry", "after"),
    "record queued for the ledger": ("agent.store.queue", "Queue.put", "after"),
    "large record's file written": ("agent.store.blobs", "Blobs.write", "after"),
    "transaction begun": ("agent.store.transaction", "Transaction._apply", "after"),
    "transaction written but not committed": ("agent.store.transaction", "Transaction.finish", "after"),
    "record durable": ("agent.store.ledger", "Ledger.commit", "after"),
    "before the in-car PUBACK": ("agent.mqtt.connection", "Connection.ack", "before"),
    "after the in-car PUBACK": ("agent.mqtt.connection", "Connection.ack", "after"),
    "session with the in-car broker begun": ("agent.intake.waiting", "Waiting.begin", "after"),
    "held record decided again": ("agent.pipeline", "Pipeline.release", "after"),
    "record claimed by an uplink": ("agent.uplink.supply", "Supply.refill", "after"),
    "record cleared": ("agent.policy", "Policy.clear", "after"),
    "record published": ("agent.uplink.outlet", "Outlet.publish", "after"),
    "endpoint's PUBACK read": ("agent.uplink.uplink", "Uplink._on_puback", "before"),
    "delivery about to be written down": ("agent.uplink.settling", "Settling._begin", "after"),
    "delivery written down": ("agent.uplink.settling", "Settling._settle", "after"),
    "sweep": ("agent.store.ledger", "Ledger.sweep", "after"),
    "status written": ("agent.status", "write", "before"),
}
BATCH_POINTS = {
    "batch put together": ("agent.uplink.loading", "Loading.next", "after"),
    "batch published": ("agent.uplink.outlet", "Outlet.publish_batch", "after"),
    "batch's PUBACK read": ("agent.uplink.flights", "Flights.landed", "after"),
    "batch's deliveries about to be written down": ("agent.uplink.settling", "Settling._begin", "after"),
    "batch's deliveries written down": ("agent.uplink.settling", "Settling._settle", "after"),
}
"""Where an endpoint takes batches."""


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name, count):
    """Make the `count`-th call of the step the last thing that this process does."""
    module_name, path, when = (POINTS | BATCH_POINTS)[name]
    owner = importlib.import_module(module_name)
    *classes, attribute = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    wrapped, left = getattr(owner, attribute), [count]

    def reached():
        left[0] -= 1
        return left[0] == 0

    @functools.wraps(wrapped)
    def step(*arguments, **named):
        last = reached()
        if last and when == "before":
            kill()
        result = wrapped(*arguments, **named)
        if last:
            kill()
        return result

    @functools.wraps(wrapped)
    async def awaited(*arguments, **named):
        last = reached()
        if last and when == "before":
            kill()
        result = await wrapped(*arguments, **named)
        if last:
            kill()
        return result

    setattr(owner, attribute, awaited if asyncio.iscoroutinefunction(wrapped) else step)


if __name__ == "__main__":
    from agent.__main__ import main

    if armed := os.environ.get("KILLPOINT"):
        point, _, number = armed.rpartition(":")
        arm(point, int(number))
    sys.exit(main(sys.argv[1:]))
