"""The tables of policy.toml: the fleet's rules, the same for every vehicle. `config` reads them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.settings.tables import Country, Pointer, Port, Positive, Seconds, Sha256, Sha256OrNone, Table, Text, Word


class Borders(Table, frozen=True, kw_only=True):
    """[borders]: the polygons."""

    geojson: Annotated[str, Meta(description="Own borders instead of the shipped ones; relative to this file")] = ""
    sha256: Annotated[
        Sha256OrNone, Meta(description="Hex SHA-256 of that file, which it must have; required where [trust] is set")
    ] = ""


class Region(Table, frozen=True, kw_only=True):
    """[regions.NAME]: countries with the same law."""

    countries: Annotated[list[Country], Meta(min_length=1, description="ISO 3166-1 codes; each in one region only")]
    reach: Annotated[
        list[str], Meta(description="While the vehicle may be here, only these endpoints are connected to; empty: all")
    ] = []


class Endpoint(Table, frozen=True, kw_only=True):
    """[endpoints.NAME]: a regional broker, who it is and where it must stand."""

    host: Annotated[Word, Meta(description="Host name or address of the regional broker")]
    port: Annotated[Port, Meta(description="Its MQTT port")] = 8883
    tls: Annotated[bool, Meta(description="May be false only for loopback")] = True
    ca_file: Annotated[str, Meta(description="PEM file of trusted roots; empty: those of the system")] = ""
    spki_sha256: Annotated[list[Sha256], Meta(description="Pins: hex SHA-256 of the server's public key info")] = []
    networks: Annotated[list[Word], Meta(description="CIDRs in which the peer's address must lie; empty: any")] = []
    protocol: Annotated[Literal["5", "3.1.1"], Meta(description="MQTT version")] = "5"
    wire: Annotated[Literal["msgpack", "binary"], Meta(description="binary needs MQTT 5")] = "msgpack"
    topic: Annotated[Text, Meta(description="Template of {region} {vehicle} {class} {topic}")] = (
        "{region}/{vehicle}/{topic}"
    )
    presence: Annotated[
        bool,
        Meta(description="Say birth, death (Last Will) and counts on residency-agent/{vehicle}/presence and /status"),
    ] = False
    batch_records: Annotated[
        int,
        Meta(ge=1, le=256, description="Records of one topic in one PUBLISH at most; above 1 needs msgpack on MQTT 5"),
    ] = 1
    batch_compression: Annotated[
        Literal["none", "zstd"], Meta(description="Of batches; zstd needs the extra `zstd`")
    ] = "none"
    in_flight: Annotated[int, Meta(ge=1, le=65_535, description="Publishes without PUBACK at a time")] = 128
    keepalive_s: Annotated[int, Meta(ge=5, le=65_535, description="MQTT keep alive")] = 30
    ack_timeout_s: Annotated[Seconds, Meta(description="Without any PUBACK for so long the connection is renewed")] = (
        20.0
    )
    backlog_bytes_per_s: Annotated[
        int, Meta(ge=0, description="At most so fast does a backlog drain; live records are not limited; 0: no limit")
    ] = 0


class DataClass(Table, frozen=True, kw_only=True):
    """[classes.NAME]: how records of a kind are kept."""

    priority: Annotated[Literal["urgent", "live", "bulk"], Meta(description="Order of delivery and of eviction")] = (
        "live"
    )
    ttl_s: Annotated[Seconds, Meta(description="A record that is older is expired")] = 7 * 86_400.0
    hold_s: Annotated[Seconds, Meta(description="How long doubt about the region may last")] = 3600.0
    registration_bound: Annotated[
        bool, Meta(description="The region of registration must permit the endpoint as well")
    ] = False

    @property
    def held_s(self) -> float:
        """How long a record lives while it is held."""
        return min(self.hold_s, self.ttl_s)


class CoarsenPosition(Table, frozen=True, kw_only=True):
    """[[rules.fields.positions]]: a position that loses precision."""

    latitude: Annotated[Pointer, Meta(description="JSON pointer to the latitude in degrees; `*`: every element")]
    longitude: Annotated[Pointer, Meta(description="JSON pointer to the longitude, beside the latitude")]
    metres: Annotated[float, Meta(gt=0, le=1_000_000, description="Size of the cell whose middle remains")]


class CoarsenTime(Table, frozen=True, kw_only=True):
    """[[rules.fields.times]]: a time that loses precision; the record's own times lose it too."""

    place: Annotated[Pointer, Meta(description="JSON pointer to the time")]
    seconds: Annotated[Positive, Meta(description="What is left is a multiple of this")]
    unit: Annotated[Literal["s", "ms", "us", "ns", "rfc3339"], Meta(description="How the time is written")] = "s"


class Fields(Table, frozen=True, kw_only=True):
    """[rules.fields]: what of a JSON or msgpack payload may leave; applied in the order of these keys."""

    keep: Annotated[list[Pointer], Meta(description="JSON pointers; nothing else stays. Empty: everything")] = []
    drop: Annotated[list[Pointer], Meta(description="JSON pointers to what is taken out")] = []
    positions: list[CoarsenPosition] = []
    times: list[CoarsenTime] = []
    pseudonymise: Annotated[
        list[Pointer], Meta(description="JSON pointers to what becomes a keyed HMAC (signing.pseudonym_key_file)")
    ] = []


class Rule(Table, frozen=True, kw_only=True):
    """[[rules]]: what a topic carries and what happens to it."""

    topic: Annotated[Text, Meta(description="MQTT topic filter; the first rule that matches decides")]
    action: Annotated[
        Literal["forward", "redact", "refuse"],
        Meta(description="forward: structured data; redact: pictures; refuse: never leaves"),
    ]
    data_class: Annotated[str, Meta(description="Data class; required unless the action is refuse")] = msgspec.field(
        name="class", default=""
    )
    basis: Annotated[
        Literal["gnss", "registration"], Meta(description="registration: bound to the registration, not to the place")
    ] = "gnss"
    capture_time: Annotated[str, Meta(description="JSON pointer (`/ts`) or `property:NAME`; empty: arrival")] = ""
    capture_unit: Annotated[Literal["s", "ms", "us", "ns", "rfc3339"], Meta(description="Unit of capture_time")] = "s"
    opaque: Annotated[
        Literal["refuse", "forward"], Meta(description="Binary data that is not recognised: fail closed by default")
    ] = "refuse"
    fields: Fields | None = None


class PolicyConfig(Table, frozen=True, kw_only=True):
    """policy.toml: the fleet. `permit` is region -> data class -> ordered endpoints; absent means not permitted."""

    version: Annotated[Text, Meta(description="Travels with every record", pattern=r"^[!-~]{1,64}\Z")]
    serial: Annotated[
        int, Meta(ge=0, description="Counts up with each signed policy; where [trust] is set, no lower one is taken")
    ] = 0
    regions: dict[str, Region]
    endpoints: dict[str, Endpoint]
    classes: dict[str, DataClass]
    permit: Annotated[
        dict[str, dict[str, list[str]]], Meta(description="region -> data class -> endpoints; absent: not permitted")
    ]
    rules: list[Rule]
    borders: Borders = Borders()
