"""agent.toml (this vehicle) and policy.toml (the fleet) as typed, validated values.

Both are read here and nowhere else. An unknown key is a mistake; every mistake names file, key, what was found and
what was wanted. The descriptions of the keys are the reference that the documentation prints.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from agent.errors import ConfigError, InvalidConfigError
from agent.settings.policy_config import PolicyConfig
from agent.settings.tables import CountryOrNone, Port, Positive, Seconds, Table, Text, Word
from agent.settings.typed import convert

MIB = 1 << 20
LARGEST_PACKET = 268_435_455  # bytes; MQTT 5.0, 1.5.5: the largest Variable Byte Integer
S = TypeVar("S", bound=msgspec.Struct)


class Vehicle(Table, frozen=True, kw_only=True):
    """[vehicle]: who sends."""

    source: Annotated[Text, Meta(description="CloudEvents `source`: a URI of this vehicle, pseudonymous")]
    name: Annotated[Text, Meta(description="`{vehicle}` in topic templates; pseudonymous", pattern="^[^/+#$\0]+$")]
    registration: Annotated[CountryOrNone, Meta(description="ISO 3166-1 country of registration, or empty")] = ""
    fixed_country: Annotated[
        CountryOrNone, Meta(description="Set only where the vehicle cannot leave this country; replaces GNSS")
    ] = ""


class Broker(Table, frozen=True, kw_only=True):
    """[broker]: the in-car broker."""

    host: Annotated[Word, Meta(description="In-car broker")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Its MQTT port")] = 1883
    protocol: Annotated[Literal["5", "3.1.1"], Meta(description="MQTT version of the in-car broker")] = "5"
    client_id: Annotated[Text, Meta(description="Prefix of the client ids of both sessions")] = "residency-agent"
    username: Annotated[str, Meta(description="Empty: none")] = ""
    password_file: Annotated[str, Meta(description="File that holds the password; empty: none")] = ""
    window: Annotated[
        int, Meta(ge=1, le=65_535, description="Receive Maximum per session: messages taken but not yet durable")
    ] = 256
    picture_window: Annotated[
        int, Meta(ge=1, le=65_535, description="The same for the session that carries pictures")
    ] = 8
    session_expiry_s: Annotated[
        int, Meta(ge=0, le=0xFFFFFFFE, description="How long the broker keeps messages while the agent is away")
    ] = 86_400
    keepalive_s: Annotated[int, Meta(ge=5, le=65_535, description="MQTT keep alive")] = 30


class Intake(Table, frozen=True, kw_only=True):
    """[intake]: what is taken from the in-car broker."""

    telemetry: Annotated[list[str], Meta(description="Topic filters of outgoing data without pictures")]
    pictures: Annotated[list[str], Meta(description="Topic filters of outgoing pictures; a session of their own")] = []


class PositionSource(Table, frozen=True, kw_only=True):
    """[[position]]: where fixes come from."""

    topic: Annotated[Text, Meta(description="Topic filter of the fixes")]
    format: Annotated[
        Literal["json", "vss", "nmea", "locationfix"], Meta(description="How a fix stands in the payload")
    ] = "json"
    latitude: Annotated[str, Meta(description="json: pointer to the latitude; vss: its topic")] = "/lat"
    longitude: Annotated[str, Meta(description="json: pointer to the longitude; vss: its topic")] = "/lon"
    accuracy: Annotated[
        str, Meta(description="json: pointer to the 95 % radius in metres; empty: default_accuracy_m")
    ] = ""
    time: Annotated[str, Meta(description="json: pointer to the time in Unix seconds; empty: arrival")] = ""
    datum: Annotated[Literal["wgs84", "gcj02"], Meta(description="Datum of the coordinates")] = "wgs84"
    default_accuracy_m: Annotated[float, Meta(gt=0, le=100_000, description="Where the fix states none")] = 50.0


class Motion(Table, frozen=True, kw_only=True):
    """[motion]: what a fix says about other moments."""

    max_speed_mps: Annotated[float, Meta(gt=0, le=1_000, description="Faster than this the car cannot be")] = 70.0
    max_fix_age_s: Annotated[Seconds, Meta(description="An older fix says nothing about the position")] = 600.0
    history: Annotated[int, Meta(ge=2, le=100_000, description="Fixes kept in memory")] = 4096


class Model(Table, frozen=True, kw_only=True):
    """[model]: the detector and its process."""

    manifest: Annotated[str, Meta(description="Manifest of the detector; empty: the one shipped with the agent")] = ""
    threads: Annotated[int, Meta(ge=1, le=64, description="CPU threads of the detector")] = 1
    far: Annotated[
        bool,
        Meta(description="A second look, in full resolution, for far plates: 1920x1080 takes 2.2 times, 4K 3.2 times"),
    ] = False
    processes: Annotated[int, Meta(ge=1, le=16, description="Redaction processes; each takes its own memory")] = 1
    timeout_s: Annotated[Seconds, Meta(description="Longest time for one payload's pictures, both looks")] = 10.0
    unload_after_s: Annotated[
        float, Meta(ge=0, description="Without a picture for so long the process is ended, until the next; 0: never")
    ] = 0.0
    memory_bytes: Annotated[int, Meta(ge=256 * MIB, description="Address space of the redaction process")] = 1024 * MIB
    people: Annotated[Literal["whole", "head"], Meta(description="What of a person is masked")] = "whole"
    fill: Annotated[
        Literal["constant", "weaker-mosaic", "weaker-blur"],
        Meta(description="Mosaic and blur can be reversed: weaker, as their names say"),
    ] = "constant"
    margin: Annotated[float, Meta(ge=0, le=1, description="Masks grow by this part of a box on every side")] = 0.1


class Limits(Table, frozen=True, kw_only=True):
    """[limits]: every bound of memory and disk."""

    payload_bytes: Annotated[int, Meta(ge=1, le=LARGEST_PACKET, description="A larger message is refused")] = 8 * MIB
    picture_pixels: Annotated[Positive, Meta(description="A larger picture is refused before it is decoded")] = (
        40_000_000
    )
    pictures_per_payload: Annotated[Positive, Meta(description="A payload with more pictures is refused")] = 16
    ledger_bytes: Annotated[int, Meta(ge=MIB, description="Stored records; beyond it the least urgent are evicted")] = (
        1024 * MIB
    )
    lane_bytes: Annotated[int, Meta(ge=MIB, description="The same for the records of one set of regions")] = 512 * MIB
    audit_bytes: Annotated[int, Meta(ge=MIB // 8, description="Audit rows; the oldest become a checkpoint")] = 64 * MIB
    commit_ms: Annotated[float, Meta(ge=0, le=1_000, description="Longest wait for a group commit")] = 2.0
    queue_bytes: Annotated[int, Meta(ge=MIB, description="Messages read but not yet taken, per session")] = 32 * MIB
    drain_s: Annotated[Seconds, Meta(description="At shutdown, how long PUBACKs are waited for")] = 5.0


class Signing(Table, frozen=True, kw_only=True):
    """[signing]: the key of the records' signatures."""

    key_file: Annotated[str, Meta(description="Ed25519 private key, PEM; empty: records are not signed")] = ""
    key_id: Annotated[str, Meta(description="Name of the key; empty: derived from the public key")] = ""
    pseudonym_key_file: Annotated[str, Meta(description="Key of the pseudonyms, 16 bytes or more; a secret")] = ""


class Trust(Table, frozen=True, kw_only=True):
    """[trust]: whose policy and model are used."""

    keys_file: Annotated[
        str, Meta(description="Ed25519 public keys, PEM, one of which must have signed the policy; empty: unsigned")
    ] = ""
    model: Annotated[bool, Meta(description="Whether the detector's manifest must be signed too")] = True


class Credential(Table, frozen=True, kw_only=True):
    """[credentials.ENDPOINT]: how this vehicle proves itself to an endpoint."""

    username: Annotated[str, Meta(description="Empty: none")] = ""
    password_file: Annotated[str, Meta(description="File that holds the password; empty: none")] = ""
    cert_file: Annotated[str, Meta(description="Client certificate, PEM; empty: none")] = ""
    key_file: Annotated[str, Meta(description="Its private key, PEM")] = ""


class Status(Table, frozen=True, kw_only=True):
    """[status]: how the agent is, for others in the vehicle: retained on the in-car broker, with a Last Will."""

    topic: Annotated[
        str, Meta(description="Topic of the status message; empty: none", pattern="^[^+#\0]*$", max_length=65_535)
    ] = ""
    interval_s: Annotated[float, Meta(ge=1, le=3_600, description="Between two status messages")] = 10.0


class Metrics(Table, frozen=True, kw_only=True):
    """[metrics]: Prometheus; needs the extra `metrics`."""

    socket: Annotated[str, Meta(description="Unix socket to serve on, for its owner and group; empty: none")] = ""

    host: Annotated[Text, Meta(description="Loopback address to serve on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65_535, description="0: not over TCP; 9464 is the OpenTelemetry default")] = 0


class Paths(Table, frozen=True, kw_only=True):
    """[paths]: files and folders."""

    policy: Annotated[Text, Meta(description="policy.toml; relative to this file")] = "policy.toml"
    state: Annotated[Text, Meta(description="Folder of the ledger; relative to this file")] = "state"


class AgentConfig(Table, frozen=True, kw_only=True):
    """agent.toml: one vehicle."""

    vehicle: Vehicle
    intake: Intake
    broker: Broker = Broker()
    position: list[PositionSource] = []
    motion: Motion = Motion()
    model: Model = Model()
    limits: Limits = Limits()
    signing: Signing = Signing()
    trust: Trust = Trust()
    credentials: dict[str, Credential] = {}
    status: Status = Status()
    metrics: Metrics = Metrics()
    paths: Paths = Paths()


def load_agent(path: Path) -> AgentConfig:
    """agent.toml as values; file names in it become absolute. Raises InvalidConfigError."""
    config = convert(path, _toml(path, _read(path)), AgentConfig)
    folder = path.absolute().parent
    return msgspec.structs.replace(
        config,
        broker=_absolute(folder, config.broker, "password_file"),
        model=_absolute(folder, config.model, "manifest"),
        signing=_absolute(folder, config.signing, "key_file", "pseudonym_key_file"),
        trust=_absolute(folder, config.trust, "keys_file"),
        metrics=_absolute(folder, config.metrics, "socket"),
        paths=_absolute(folder, config.paths, "policy", "state"),
        credentials={
            name: _absolute(folder, credential, "password_file", "cert_file", "key_file")
            for name, credential in config.credentials.items()
        },
    )


def load_policy(path: Path) -> PolicyConfig:
    """policy.toml as values; file names in it become absolute. Raises InvalidConfigError."""
    return parse_policy(path, _read(path))


def parse_policy(path: Path, data: bytes) -> PolicyConfig:
    """The same for bytes that were read from this path before."""
    config = convert(path, _toml(path, data), PolicyConfig)
    folder = path.absolute().parent
    return msgspec.structs.replace(
        config,
        borders=_absolute(folder, config.borders, "geojson"),
        endpoints={name: _absolute(folder, endpoint, "ca_file") for name, endpoint in config.endpoints.items()},
    )


def shipped_manifest() -> Path:
    """The detector that came with the agent: inside the installed package, or in the checkout beside it."""
    package = Path(__file__).parent.parent
    installed = package / "models"
    return (installed if installed.is_dir() else package.parent / "models") / "detector.json"


def state_folder(path: Path) -> Path:
    """Where the agent of this agent.toml keeps its state, also when the rest of the file is in disorder."""
    return _named(path, "state", default="state")


def policy_path(path: Path) -> Path:
    """Where the policy of this agent.toml is, also when the rest of the file is in disorder."""
    return _named(path, "policy", default="policy.toml")


def _named(path: Path, key: str, *, default: str) -> Path:
    paths = _toml(path, _read(path)).get("paths", {})
    name = paths.get(key) if isinstance(paths, dict) else None
    return path.absolute().parent / (name if isinstance(name, str) and name and "\0" not in name else default)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise InvalidConfigError([ConfigError(path, "the file", exc.strerror, "a readable file")]) from exc


def _toml(path: Path, data: bytes) -> dict[str, object]:
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise InvalidConfigError([ConfigError(path, "the file", str(exc), "TOML 1.0 in UTF-8")]) from exc


def _absolute(folder: Path, table: S, *keys: str) -> S:
    names = {key: getattr(table, key) for key in keys}
    return msgspec.structs.replace(table, **{key: str(folder / name) for key, name in names.items() if name})
