"""How long a record has to live: the one rule, for SQL and for values.

- Its time is up when the wall clock says so, and for a record of this boot CLOCK_BOOTTIME too, which nobody sets.
- While the wall clock is not set, no record's time is up.
- What was made before it was set has no date, and its time is not up before a sweep has dated it: a record of this boot
  by its age on CLOCK_BOOTTIME, one of an earlier boot as if it were made when this boot began. It may live longer than
  its time by what had passed before that, which nobody knows.

The age of a record of this boot counts from its message's arrival, the latest moment that its capture allows.
"""

from __future__ import annotations

from agent.clock import IS_SET_NS, Moment, is_set
from agent.messages import Record

_YOUNG = "boot = ? AND monotonic_ns + doubt_ns + expires_ns - recorded_ns > ?"
UNDATED = f"recorded_ns <= {IS_SET_NS}"
OVERDUE = f"expires_ns <= ? AND NOT ({UNDATED} OR {_YOUNG})"
DUE = f"expires_ns <= ? AND ({UNDATED} OR NOT ({_YOUNG}))"  # what a sweep ends or dates
_LATER = "iif(boot = ?, monotonic_ns + doubt_ns, 0)"  # than the beginning of this boot, at most: when it was made
MADE_NS = f"max(? - max(-{_LATER} + ?, 0), {IS_SET_NS + 1})"  # of one without a date
_NEVER = -(1 << 63)  # a time at which nothing is due


def arguments(now: Moment | None) -> tuple[int, str, int]:
    """Those of `OVERDUE`, `DUE` and `MADE_NS`, each; None: nothing is due."""
    return (now.time_ns, now.boot_id, now.monotonic_ns) if now is not None and is_set(now.time_ns) else (_NEVER, "", 0)


def aged_ns(record: Record, now: Moment) -> int | None:
    """Nanoseconds since a record's message arrived, by CLOCK_BOOTTIME; None: it did in an earlier boot."""
    capture = record.capture
    if capture.boot_id != now.boot_id:
        return None
    return max(now.monotonic_ns - capture.monotonic_ns - capture.doubt_ns, 0)


def left_ns(record: Record, now: Moment) -> int:
    """Nanoseconds until the record's time is up as far as the clocks tell, at most all of its time to live.

    Where none does, the record is of an earlier boot, and at least as old as this one.
    """
    whole_ns, capture, left = record.expires_ns - record.recorded_ns, record.capture, list[int]()
    if is_set(now.time_ns) and is_set(record.recorded_ns):
        left.append(record.expires_ns - now.time_ns)
    if capture.boot_id == now.boot_id:
        left.append(capture.monotonic_ns + capture.doubt_ns + whole_ns - now.monotonic_ns)
    return min(max(left, default=whole_ns - now.monotonic_ns), whole_ns)


def overdue(record: Record, now: Moment) -> bool:
    """`OVERDUE`, of a record that was read."""
    return is_set(now.time_ns) and is_set(record.recorded_ns) and left_ns(record, now) <= 0
