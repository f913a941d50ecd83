"""MQTT topic names and filters (MQTT 5.0, section 4.7): validity, matching, and how filters relate."""

from __future__ import annotations

from functools import lru_cache

_MEET_IN_NOTHING = {"+", "/#"}  # in the empty topic, which is none (MQTT 5.0, 4.7.3)
_SHARED = {"$share", "$queue"}  # of shared subscriptions (MQTT 5.0, 4.8.2, and EMQX): no topic begins with it
MAX_TOPIC_BYTES = 65_535  # MQTT 5.0, 1.5.4: a UTF-8 string carries a two-byte length


def filter_mistake(text: str) -> str | None:
    """What is wrong with a topic filter, or None."""
    levels = text.split("/")
    if levels[0] in _SHARED:
        return (
            "a topic filter without $share or $queue: nobody else may take some of the messages, or they arrive twice"
        )
    if not text or "\0" in text or len(text.encode()) > MAX_TOPIC_BYTES:
        return "a topic filter of 1 to 65535 bytes without NUL"
    if any("#" in level and level != "#" for level in levels) or "#" in levels[:-1]:
        return "a topic filter with # only as its last level"
    if any("+" in level and level != "+" for level in levels):
        return "a topic filter with + only as a whole level"
    return None


@lru_cache(maxsize=4096)
def matches(topic_filter: str, topic: str) -> bool:
    """Whether a topic name matches a valid filter; wildcards at the start do not match `$` topics (4.7.2)."""
    wanted, found = topic_filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in {"#", "+"}:
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(found) or level not in {"+", found[index]}:
            return False
    return len(wanted) == len(found)


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic that `narrow` matches is matched by `wide` as well."""
    wanted, given = wide.split("/"), narrow.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return not (index == 0 and narrow.startswith("$"))
        if index >= len(given) or given[index] == "#":
            return False
        if level != given[index] and (level != "+" or (index == 0 and narrow.startswith("$"))):
            return False
    return len(wanted) == len(given)


def overlap(one: str, other: str) -> bool:
    """Whether some topic matches both filters."""
    return {one, other} != _MEET_IN_NOTHING and _overlap(one.split("/"), other.split("/"))


def _overlap(one: list[str], other: list[str]) -> bool:
    if one[:1] == ["#"] or other[:1] == ["#"]:
        return True
    if not one or not other:
        return one == other or [*one, *other] == ["#"]
    level_meets = one[0] == other[0] or "+" in (one[0], other[0])
    return level_meets and _overlap(one[1:], other[1:])
