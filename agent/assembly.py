"""Both configuration files, read together and held against each other; every command starts here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from agent import topics
from agent.errors import ConfigError, InvalidConfigError
from agent.places.geojson import read_polygons
from agent.places.regions import RegionMap
from agent.policy import Policy
from agent.settings.config import AgentConfig, load_agent, load_policy, shipped_manifest

LEDGER_FILE = "ledger.sqlite"
STATUS_FILE = "status.json"
SHIPPED_BORDERS = Path(__file__).parent / "data" / "borders.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A vehicle's configuration and the fleet's policy, fitting together."""

    file: Path
    config: AgentConfig
    policy: Policy

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
        return Path(self.config.model.manifest) if self.config.model.manifest else shipped_manifest()

    def borders(self) -> RegionMap:
        """The shipped borders, or the policy's own; raises InvalidConfigError."""
        own = self.policy.config.borders.geojson
        if not own:
            return RegionMap.from_bytes(SHIPPED_BORDERS.read_bytes())
        try:
            text = Path(own).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidConfigError([ConfigError(self.file, "borders.geojson", str(exc), "a readable file")]) from exc
        return RegionMap(read_polygons(text, file=own))


def load(file: Path) -> Setup:
    """Read agent.toml and the policy that it names; raises InvalidConfigError with every mistake of both."""
    mistakes: list[ConfigError] = []
    config = load_agent(file)
    policy_file = Path(config.paths.policy)
    try:
        policy = Policy(load_policy(policy_file), policy_file)
    except InvalidConfigError as exc:
        mistakes += exc.mistakes
    else:
        mistakes += _between(config, policy, file)
    mistakes += _intake(config, file)
    if mistakes:
        raise InvalidConfigError(mistakes)
    return Setup(file=file, config=config, policy=policy)


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


def _between(config: AgentConfig, policy: Policy, file: Path) -> Iterator[ConfigError]:
    for name in config.credentials.keys() - policy.endpoints.keys():
        yield ConfigError(file, f"credentials.{name}", name, f"an endpoint: {', '.join(sorted(policy.endpoints))}")
    countries = {country for region in policy.config.regions.values() for country in region.countries}
    for key in ("registration", "fixed_country"):
        country = getattr(config.vehicle, key)
        if country and country not in countries:
            yield ConfigError(file, f"vehicle.{key}", country, "a country of one of the policy's regions")
    if not config.position and not config.vehicle.fixed_country:
        yield ConfigError(file, "position", "nothing", "at least one [[position]], or vehicle.fixed_country")
