"""What may go where. Everything that decides it lives in this file.

Invariants, upheld here and tried by tests/test_policy.py:
- Residency: an endpoint is permitted only if EVERY candidate region permits it for the data class. A region, class or
  endpoint that the table does not name is not permitted.
- A topic that no rule names is refused. The first rule that matches decides.
- A stored record is decided again as if it came now, but for the regions and the class that it carries.
- Doubt holds, certainty refuses: where no endpoint is permitted, a record waits only if fixes may narrow its
  candidates, and a narrower set would permit one.
- `Cleared` is the only thing that a publisher accepts, and only `Policy.clear` makes one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from functools import lru_cache
from pathlib import Path

from agent import topics
from agent.errors import ConfigError, InvalidConfigError
from agent.messages import Basis, Decision, Held, Hold, Publish, Record, Refuse, Whereabouts
from agent.payloads.fields import SHORTEST_KEY
from agent.settings.field_config import field_rules
from agent.settings.policy_config import DataClass, Endpoint, PolicyConfig, Rule
from agent.wire.addressing import check_template

UNLISTED = "unlisted"
"""The region of every country that the policy does not name; it permits nothing."""

_TOPICS_REMEMBERED = 4096
_SEAL = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """A record that the policy permits for one endpoint at this moment; made by `Policy.clear` only."""

    record: Record
    endpoint: str
    seal: InitVar[object]  # not kept, so that `dataclasses.replace` cannot carry it to another record

    def __post_init__(self, seal: object) -> None:
        """Refuse to exist without the policy's seal."""
        if seal is not _SEAL:
            msg = "only Policy.clear makes a Cleared"
            raise TypeError(msg)


class Policy:
    """A validated policy.toml, ready to decide. Immutable."""

    def __init__(self, config: PolicyConfig, file: Path | str = "policy.toml") -> None:
        """Raise InvalidConfigError for references and combinations that make no sense."""
        mistakes = list(_mistakes(config, file))
        if mistakes:
            raise InvalidConfigError(mistakes)
        self.config = config
        self.version = config.version
        self._region_of = {country: name for name, region in config.regions.items() for country in region.countries}
        self._permit = {
            (region, data_class): tuple(endpoints)
            for region, classes in config.permit.items()
            for data_class, endpoints in classes.items()
        }
        self.rule_for = lru_cache(_TOPICS_REMEMBERED)(self._rule_for)
        self.permitted = lru_cache(_TOPICS_REMEMBERED)(self._permitted)
        self._verdict = lru_cache(_TOPICS_REMEMBERED)(self._verdict_of)

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """Endpoints by name."""
        return self.config.endpoints

    def data_class(self, name: str) -> DataClass:
        """Raises KeyError for a class that the policy does not have."""
        return self.config.classes[name]

    def regions_of(self, countries: Iterable[str]) -> tuple[str, ...]:
        """The policy regions of ISO countries: sorted, never empty; no country at all means any region."""
        regions = {self._region_of.get(country, UNLISTED) for country in countries}
        return tuple(sorted(regions)) or self.everywhere

    @property
    def everywhere(self) -> tuple[str, ...]:
        """The candidates of a record about whose place nothing is known."""
        return tuple(sorted({*self.config.regions, UNLISTED}))

    def _rule_for(self, topic: str) -> Rule | None:
        return next((rule for rule in self.config.rules if topics.matches(rule.topic, topic)), None)

    def _permitted(self, regions: tuple[str, ...], data_class: str) -> tuple[str, ...]:
        """Endpoints that all regions permit for the class, best sum of ranks first, then by name."""
        rows = [self._permit.get((region, data_class), ()) for region in regions]
        common = set(rows[0]).intersection(*rows[1:]) if rows else set()
        return tuple(sorted(common, key=lambda endpoint: (sum(row.index(endpoint) for row in rows), endpoint)))

    def bound(self, data_class: str, whereabouts: Whereabouts, registration: str) -> tuple[str, ...]:
        """The regions that must all agree: the candidates, and the registration's where the class binds it."""
        if not self.data_class(data_class).registration_bound:
            return whereabouts.regions
        return tuple(sorted({*whereabouts.regions, *self.regions_of([registration] if registration else [])}))

    def decide(self, data_class: str, whereabouts: Whereabouts, registration: str = "") -> Decision:
        """Publish, Hold or Refuse a record of a class with these candidates. `registration`: ISO country or empty."""
        if data_class not in self.config.classes:
            return Refuse(reason="policy.unknown-class")
        agreed = self.permitted(self.bound(data_class, whereabouts, registration), data_class)
        if agreed:
            return Publish(endpoints=agreed)
        singles = ((region,) for region in whereabouts.regions)
        hopes = (Whereabouts(regions=single, basis=whereabouts.basis) for single in singles)
        narrows = whereabouts.basis is Basis.GNSS and len(whereabouts.regions) > 1
        if narrows and any(self.permitted(self.bound(data_class, hope, registration), data_class) for hope in hopes):
            return Hold(reason="region.doubt")
        return Refuse(reason="region.not-permitted")

    def again(self, record: Record | Held, whereabouts: Whereabouts, registration: str = "") -> Decision:
        """Decide about a stored record, perhaps one of an earlier policy; `whereabouts`: its regions, or fewer.

        It keeps the class that it carries, and that one's order of endpoints. Where the rule of its topic now gives
        another class, both must permit.
        """
        return self._verdict(record.topic, record.data_class, whereabouts.regions, whereabouts.basis, registration)

    def _verdict_of(
        self, topic: str, data_class: str, regions: tuple[str, ...], basis: Basis, registration: str
    ) -> Decision:
        """`again` by all that it depends on: records on the same topic from the same place are decided once."""
        rule = self.rule_for(topic)
        if rule is None or rule.action == "refuse":
            return Refuse(reason="policy.no-rule" if rule is None else "policy.refused")
        whereabouts = Whereabouts(regions=regions, basis=basis)
        decisions = [
            self.decide(name, whereabouts, registration) for name in dict.fromkeys((data_class, rule.data_class))
        ]
        for kind in (Refuse, Hold):
            found = next((decision for decision in decisions if isinstance(decision, kind)), None)
            if found is not None:
                return found
        routes = [decision.endpoints for decision in decisions if isinstance(decision, Publish)]
        agreed = tuple(name for name in routes[0] if all(name in route for route in routes))
        return Publish(endpoints=agreed) if agreed else Refuse(reason="region.not-permitted")

    def clear(self, record: Record, endpoint: str, registration: str = "") -> Cleared | None:
        """Check a record again at the last line before it is published: Cleared, or None if it must not go."""
        decision = self._verdict(record.topic, record.data_class, record.regions, record.basis, registration)
        if not isinstance(decision, Publish) or endpoint not in decision.endpoints:
            return None
        return Cleared(record=record, endpoint=endpoint, seal=_SEAL)

    def shrunk(self, meanings: Mapping[str, Iterable[str]]) -> frozenset[str]:
        """The regions that have lost a country, given the countries that each name stood for before.

        A record that carries such a name may have been captured in the lost country, where another region's law holds.
        """
        now = {name: set(region.countries) for name, region in self.config.regions.items()}
        return frozenset(
            name for name, countries in meanings.items() if name in now and not set(countries) <= now[name]
        )

    @property
    def meanings(self) -> dict[str, list[str]]:
        """The countries that the name of each region stands for."""
        return {name: sorted(region.countries) for name, region in self.config.regions.items()}

    def reachable(self, regions: Iterable[str], endpoint: str) -> bool:
        """Whether an endpoint may be connected to while the vehicle may be in these regions."""
        found = (self.config.regions[name].reach for name in regions if name in self.config.regions)
        return all(not reach or endpoint in reach for reach in found)

    def warnings(self) -> Iterator[str]:
        """What is legal but probably not meant."""
        rules = self.config.rules
        for index, rule in enumerate(rules):
            shadow = next((earlier for earlier in rules[:index] if topics.covers(earlier.topic, rule.topic)), None)
            if shadow is not None:
                yield f"rules[{index}] ({rule.topic}) is never reached: {shadow.topic} comes first"
        used = {name for row in self._permit.values() for name in row}
        for name in sorted(self.config.endpoints.keys() - used):
            yield f"endpoints.{name} is permitted to no region"
        for name, endpoint in sorted(self.config.endpoints.items()):
            if endpoint.batch_compression != "none" and endpoint.batch_records == 1:
                yield f"endpoints.{name}.batch_compression does nothing while batch_records is 1"


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _mistakes(config: PolicyConfig, file: Path | str) -> Iterator[ConfigError]:
    yield from _region_mistakes(config, file)
    yield from _permit_mistakes(config, file)
    yield from _rule_mistakes(config, file)
    for name, endpoint in config.endpoints.items():
        yield from _endpoint_mistakes(f"endpoints.{name}", endpoint, file)


def _region_mistakes(config: PolicyConfig, file: Path | str) -> Iterator[ConfigError]:
    owner: dict[str, str] = {}
    for name, region in config.regions.items():
        if name == UNLISTED or not name.isascii() or not name.replace("-", "").isalnum():
            yield ConfigError(file, f"regions.{name}", name, "letters, digits and -; not 'unlisted'")
        for country in region.countries:
            if owner.setdefault(country, name) != name:
                yield ConfigError(file, f"regions.{name}.countries", country, f"not in regions.{owner[country]} too")
        for endpoint in region.reach:
            if endpoint not in config.endpoints:
                yield ConfigError(file, f"regions.{name}.reach", endpoint, _one_of("endpoints", config.endpoints))


def _permit_mistakes(config: PolicyConfig, file: Path | str) -> Iterator[ConfigError]:
    for region, classes in config.permit.items():
        if region not in config.regions:
            yield ConfigError(file, f"permit.{region}", region, _one_of("regions", config.regions))
        for data_class, endpoints in classes.items():
            key = f"permit.{region}.{data_class}"
            if data_class not in config.classes:
                yield ConfigError(file, key, data_class, _one_of("classes", config.classes))
            for endpoint in endpoints:
                if endpoint not in config.endpoints:
                    yield ConfigError(file, key, endpoint, _one_of("endpoints", config.endpoints))
            if len(set(endpoints)) != len(endpoints):
                yield ConfigError(file, key, endpoints, "each endpoint once")


def _rule_mistakes(config: PolicyConfig, file: Path | str) -> Iterator[ConfigError]:
    for index, rule in enumerate(config.rules):
        key = f"rules[{index}]"
        mistake = topics.filter_mistake(rule.topic)
        if mistake:
            yield ConfigError(file, f"{key}.topic", rule.topic, mistake)
        if rule.action != "refuse" and rule.data_class not in config.classes:
            yield ConfigError(file, f"{key}.class", rule.data_class, _one_of("classes", config.classes))
        if rule.capture_time and not rule.capture_time.startswith(("/", "property:")):
            yield ConfigError(file, f"{key}.capture_time", rule.capture_time, "a JSON pointer or property:NAME")
        yield from _field_mistakes(f"{key}.fields", rule, file)


def _field_mistakes(key: str, rule: Rule, file: Path | str) -> Iterator[ConfigError]:
    if rule.fields is None:
        return
    if rule.action != "forward":
        yield ConfigError(file, key, rule.action, "the action forward: only structured data has fields")
    try:
        field_rules(rule.fields, key=bytes(SHORTEST_KEY))
    except ValueError as exc:
        yield ConfigError(file, key, str(exc), "field rules that fit together")


def _endpoint_mistakes(key: str, endpoint: Endpoint, file: Path | str) -> Iterator[ConfigError]:
    if not endpoint.tls and not is_loopback(endpoint.host):
        yield ConfigError(file, f"{key}.tls", False, "true: only loopback may go without TLS")  # noqa: FBT003 - the value found
    if endpoint.wire == "binary" and endpoint.protocol != "5":
        yield ConfigError(file, f"{key}.wire", endpoint.wire, "msgpack: binary needs the user properties of MQTT 5")
    if endpoint.batch_records > 1 and (endpoint.wire, endpoint.protocol) != ("msgpack", "5"):
        wanted = '1: a batch needs wire = "msgpack" and protocol = "5"'
        yield ConfigError(file, f"{key}.batch_records", endpoint.batch_records, wanted)
    mistake = check_template(endpoint.topic)
    if mistake:
        yield ConfigError(file, f"{key}.topic", endpoint.topic, mistake)
    for network in endpoint.networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as exc:
            yield ConfigError(file, f"{key}.networks", network, f"a CIDR: {exc}")


def _one_of(table: str, names: Iterable[str]) -> str:
    return f"one of [{table}]: {', '.join(sorted(names)) or 'none defined'}"
