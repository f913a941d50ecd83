"""Both configuration files, read together and held against each other; every command starts here."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from agent import topics
from agent.errors import ConfigError, InvalidConfigError
from agent.places.geojson import read_polygons
from agent.places.regions import RegionMap
from agent.policy import Policy, is_loopback
from agent.settings.config import (
    AgentConfig,
    Broker,
    Credential,
    PositionSource,
    load_agent,
    load_policy,
    parse_policy,
    policy_path,
    shipped_manifest,
)
from agent.trust import Keys, read_borders
from agent.wire.detached import Kind

LEDGER_FILE = "ledger.sqlite"
STATUS_FILE = "status.json"
SHIPPED_BORDERS = Path(__file__).parent / "data" / "borders.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A vehicle's configuration and the fleet's policy, fitting together.

    `digest` is the SHA-256 of policy and borders, `manifest` is the detector's manifest, empty where there is
    none; `trusted`: the policy, which names the borders' SHA-256, is signed by a trusted key.
    """

    file: Path
    config: AgentConfig
    policy: Policy
    digest: str
    manifest: bytes
    trusted: bool
    own_borders: bytes | None

    @property
    def ledger_path(self) -> Path:
        """Where the records are."""
        return Path(self.config.paths.state) / LEDGER_FILE

    @property
    def status_path(self) -> Path:
        """Where a running agent writes how it is."""
        return Path(self.config.paths.state) / STATUS_FILE

    @property
    def manifest_path(self) -> Path:
        """The detector's manifest."""
        return _manifest_path(self.config)

    def borders(self) -> RegionMap:
        """The shipped borders, or the policy's own; raises InvalidConfigError."""
        if self.own_borders is None:
            return RegionMap.from_bytes(SHIPPED_BORDERS.read_bytes())
        own = self.policy.config.borders.geojson
        try:
            text = self.own_borders.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidConfigError([ConfigError(own, "the file", str(exc), "GeoJSON in UTF-8")]) from exc
        try:
            return RegionMap(read_polygons(text, file=own))
        except ConfigError as exc:
            raise InvalidConfigError([exc]) from exc


def load(file: Path) -> Setup:
    """Read agent.toml and the policy that it names; raises InvalidConfigError with every mistake of both."""
    mistakes: list[ConfigError] = []
    try:
        config = load_agent(file)
        keys = Keys.read(config.trust, file)
    except InvalidConfigError as exc:
        raise InvalidConfigError([*exc.mistakes, *_policy_mistakes(file)]) from exc
    policy_file = Path(config.paths.policy)
    try:
        data = keys.read_file(policy_file, Kind.POLICY)
        policy = Policy(parse_policy(policy_file, data), policy_file)
        borders = read_borders(policy.config, policy_file, bound=bool(keys))
    except InvalidConfigError as exc:
        mistakes += exc.mistakes
    else:
        mistakes += [*_between(config, policy, file), *_not_installed(policy, policy_file)]
        if keys and not policy.config.serial:
            mistakes.append(ConfigError(policy_file, "serial", 0, "at least 1 in a policy that has to be signed"))
    mistakes += [
        *_intake(config, file),
        *_status_topic(config, file),
        *_metrics(config, file),
        *_positions(config, file),
    ]
    if mistakes:
        raise InvalidConfigError(mistakes)
    return Setup(
        file=file,
        config=config,
        policy=policy,
        digest=hashlib.sha256(data + (borders or b"")).hexdigest(),
        manifest=_manifest(config, keys, file),
        trusted=bool(keys),
        own_borders=borders,
    )


def _policy_mistakes(file: Path) -> Iterator[ConfigError]:
    """The policy's, for a person who has to mend this agent.toml as well; none where it does not name a policy."""
    try:
        policy_file = policy_path(file)
    except InvalidConfigError:
        return
    try:
        Policy(load_policy(policy_file), policy_file)
    except InvalidConfigError as exc:
        yield from exc.mistakes


def _manifest_path(config: AgentConfig) -> Path:
    return Path(config.model.manifest) if config.model.manifest else shipped_manifest()


def _manifest(config: AgentConfig, keys: Keys, file: Path) -> bytes:
    """The manifest, verified where it must be signed; empty for one that is missing and need not be."""
    path, signed = _manifest_path(config), keys if config.trust.model else Keys()
    if not signed and _is_missing(path):
        return b""
    return signed.read_file(path, Kind.MODEL, (file, "model.manifest"))


def _is_missing(path: Path) -> bool:
    """Whether nothing is there; what may not be looked at is not missing."""
    try:
        path.stat()
    except OSError as exc:
        return isinstance(exc, FileNotFoundError)
    return False


def _metrics(config: AgentConfig, file: Path) -> Iterator[ConfigError]:
    """Nothing is served beyond the vehicle (`metrics`)."""
    host = config.metrics.host
    if host == "localhost" or not is_loopback(host):  # a name is none that could be served on
        yield ConfigError(file, "metrics.host", host, "a loopback address, as 127.0.0.1 or ::1")


def _intake(config: AgentConfig, file: Path) -> Iterator[ConfigError]:
    lists = {"intake.telemetry": config.intake.telemetry, "intake.pictures": config.intake.pictures}
    sources = {f"position[{index}].topic": [source.topic] for index, source in enumerate(config.position)}
    for key, filters in {**lists, **sources}.items():
        for topic_filter in filters:
            mistake = topics.filter_mistake(topic_filter)
            if mistake:
                yield ConfigError(file, key, topic_filter, mistake)
    if not config.intake.telemetry and not config.intake.pictures:
        yield ConfigError(file, "intake", "no topic filter", "at least one in telemetry or pictures")
    pairs = [*product(config.intake.telemetry, config.intake.pictures)]
    pairs += [*combinations(config.intake.telemetry, 2), *combinations(config.intake.pictures, 2)]
    for one, other in pairs:
        if topics.overlap(one, other):
            yield ConfigError(file, "intake", f"{one} and {other}", "filters of which no topic matches two")
    positions = dict.fromkeys(source.topic for source in config.position)
    for one, other in (*product(positions, config.intake.telemetry), *combinations(positions, 2)):
        if topics.overlap(one, other) and not (topics.covers(one, other) or topics.covers(other, one)):
            wanted = "filters that no topic matches both, or one that covers the other: a message must come once"
            yield ConfigError(file, "position", f"{one} and {other}", wanted)


def _positions(config: AgentConfig, file: Path) -> Iterator[ConfigError]:
    """Fixes whose numbers are looked for where they cannot stand are malformed, every one of them."""
    for index, source in enumerate(config.position):
        for key, wanted in _misplaced(source):
            yield ConfigError(file, f"position[{index}].{key}", getattr(source, key), wanted)


def _misplaced(source: PositionSource) -> Iterator[tuple[str, str]]:
    """Keys of one source, each with what was wanted."""
    optional = [key for key in ("accuracy", "time") if getattr(source, key)]
    if source.format == "json":
        for key in ("latitude", "longitude", *optional):
            if not getattr(source, key).startswith("/"):
                yield key, "a JSON pointer, as /lat"
    elif source.format == "vss":
        for key in ("latitude", "longitude", *(key for key in optional if key == "accuracy")):
            if not topics.matches(source.topic, getattr(source, key)):
                yield key, f"a topic that {source.topic} takes in"
        if source.latitude == source.longitude:
            yield "longitude", "another topic than the latitude's"


def _status_topic(config: AgentConfig, file: Path) -> Iterator[ConfigError]:
    """What the agent says of itself must not come back to it as a vehicle's message."""
    topic = config.status.topic
    taken = [*config.intake.telemetry, *config.intake.pictures, *(source.topic for source in config.position)]
    if topic:
        for topic_filter in taken:
            if topics.matches(topic_filter, topic):
                yield ConfigError(file, "status.topic", topic, f"a topic that {topic_filter} does not take in")


def _not_installed(policy: Policy, file: Path) -> Iterator[ConfigError]:
    """What an endpoint asks for and this installation has not."""
    for name, endpoint in policy.endpoints.items():
        if endpoint.batch_compression == "zstd" and importlib.util.find_spec("zstandard") is None:
            wanted = "none; or install what it needs: pip install 'residency-agent[zstd]'"
            yield ConfigError(file, f"endpoints.{name}.batch_compression", endpoint.batch_compression, wanted)


def _between(config: AgentConfig, policy: Policy, file: Path) -> Iterator[ConfigError]:
    for name in config.credentials.keys() - policy.endpoints.keys():
        yield ConfigError(file, f"credentials.{name}", name, f"an endpoint: {', '.join(sorted(policy.endpoints))}")
    yield from _halves(config, file)
    countries = {country for region in policy.config.regions.values() for country in region.countries}
    for key in ("registration", "fixed_country"):
        country = getattr(config.vehicle, key)
        if country and country not in countries:
            yield ConfigError(file, f"vehicle.{key}", country, "a country of one of the policy's regions")
    if not config.vehicle.registration:
        for index, rule in enumerate(policy.config.rules):
            if rule.action != "refuse" and rule.basis == "registration":
                wanted = f"a country, to which rules[{index}] of the policy binds {rule.topic}"
                yield ConfigError(file, "vehicle.registration", "nothing", wanted)
    if not config.position and not config.vehicle.fixed_country:
        yield ConfigError(file, "position", "nothing", "at least one [[position]], or vehicle.fixed_country")


def _halves(config: AgentConfig, file: Path) -> Iterator[ConfigError]:
    """A password without a name, and a key without a certificate, would be left out without a word."""
    logins: dict[str, Broker | Credential] = {"broker": config.broker}
    logins |= {f"credentials.{name}": credential for name, credential in config.credentials.items()}
    for table, login in logins.items():
        if login.password_file and not login.username:
            yield ConfigError(file, f"{table}.username", "nothing", "the name that the password is for")
    for name, credential in config.credentials.items():
        if credential.key_file and not credential.cert_file:
            yield ConfigError(file, f"credentials.{name}.cert_file", "nothing", "the certificate that the key is for")
