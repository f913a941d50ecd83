"""From the tables of [rules.fields] to the rules that `fields` applies."""

from __future__ import annotations

from agent.payloads.fields import CoarsePosition, CoarseTime, FieldRules
from agent.settings.policy_config import Fields


def field_rules(table: Fields, key: bytes) -> FieldRules:
    """The rules of one table; raises ValueError where they do not fit together or the key is too short."""
    return FieldRules(
        keep=tuple(table.keep),
        drop=tuple(table.drop),
        positions=tuple(
            CoarsePosition(latitude=rule.latitude, longitude=rule.longitude, metres=rule.metres)
            for rule in table.positions
        ),
        times=tuple(CoarseTime(place=rule.place, seconds=rule.seconds, unit=rule.unit) for rule in table.times),
        pseudonymise=tuple(table.pseudonymise),
        key=key,
    )
