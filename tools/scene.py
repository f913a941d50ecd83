"""What the demonstration sets up: two regions, their permits, and the configuration of one vehicle.

`PERMITS` and `CLASS_OF_TOPIC` are the intent; the policy that the agent gets is written from them, and the judge holds
what the regional brokers received against them without asking the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from agent.topics import matches

Table = Mapping[str, Mapping[str, tuple[str, ...]]]

REGION_OF_COUNTRY: Mapping[str, str] = MappingProxyType({"CN": "cn", "HK": "hk"})
# Region -> data class -> endpoints. An example of different permits, not legal advice: Hong Kong's precise location
# stays in the car, and its diagnostics may also go to mainland China.
PERMITS: Table = MappingProxyType(
    {
        "cn": {"picture": ("cn",), "telemetry": ("cn",), "diagnostics": ("cn",), "location": ("cn",)},
        "hk": {"picture": ("hk",), "telemetry": ("hk",), "diagnostics": ("hk", "cn")},
    }
)
# Topic filter -> data class and action, in the order of the policy's rules. The class None never leaves the car.
CLASS_OF_TOPIC: tuple[tuple[str, str | None, str], ...] = (
    ("vehicle/camera/cabin", None, "refuse"),
    ("vehicle/camera/front", "picture", "redact"),
    ("vehicle/gnss", "location", "forward"),
    ("vehicle/diagnostics/#", "diagnostics", "forward"),
    ("vehicle/telemetry/#", "telemetry", "forward"),
)
MAX_SPEED_MPS = 45.0  # 162 km/h: faster than any stretch of the drive
WIRE_TOPIC = "{region}/{vehicle}/{topic}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A broker on loopback and the MQTT version that it speaks."""

    port: int
    protocol: Literal["5", "3.1.1"]


def data_class(topic: str) -> str | None:
    """The data class that a topic is meant to have; None: it must not leave the car."""
    return next((name for wanted, name, _ in CLASS_OF_TOPIC if matches(wanted, topic)), None)


def permitted(country: str, topic: str) -> tuple[str, ...]:
    """The endpoints that may see a message of this topic captured in this country."""
    name = data_class(topic)
    return PERMITS[REGION_OF_COUNTRY[country]].get(name, ()) if name else ()


def agent_toml(car: Port, *, speed: float) -> str:
    """Write agent.toml; at 10x speed the car seems to move ten times as fast, so its speed limit grows alike."""
    return f"""# Written by `residency-tools demo`.
[vehicle]
source = "urn:vehicle:demo"
name = "demo"

[broker]
port = {car.port}
protocol = "{car.protocol}"

[intake]
telemetry = ["vehicle/gnss", "vehicle/telemetry/#", "vehicle/diagnostics/#"]
pictures = ["vehicle/camera/#"]

[[position]]
topic = "vehicle/gnss"
format = "json"
latitude = "/lat"
longitude = "/lon"
accuracy = "/acc"
time = "/ts"

[motion]
max_speed_mps = {MAX_SPEED_MPS * speed:.1f} # {MAX_SPEED_MPS:g} m/s at {speed:g}x
"""


def policy_toml(endpoints: Mapping[str, Port], *, stamped: bool = True) -> str:
    """Write policy.toml for regional brokers on loopback.

    `stamped`: pictures state their capture time in a property, which MQTT 3.1.1 drops; then arrival has to do.
    """
    regions = "".join(f'[regions.{name}]\ncountries = ["{code}"]\n' for code, name in REGION_OF_COUNTRY.items())
    brokers = "".join(_endpoint(name, place) for name, place in endpoints.items())
    classes = sorted({name for row in PERMITS.values() for name in row})
    kinds = "".join(f'[classes.{name}]\npriority = "{_priority(name)}"\n' for name in classes)
    permit = "".join(f"[permit.{region}]\n{_permits(row)}" for region, row in PERMITS.items())
    rules = "".join(_rule(*rule, stamped=stamped) for rule in CLASS_OF_TOPIC)
    head = '# Written by `residency-tools demo`; an example, not advice.\nversion = "demo-1"\n'
    return f"{head}\n{regions}\n{brokers}\n{kinds}\n{permit}\n{rules}"


def _endpoint(name: str, place: Port) -> str:
    wire = f'protocol = "{place.protocol}"\ntopic = "{WIRE_TOPIC}"\n'
    return f'[endpoints.{name}]\nhost = "127.0.0.1"\nport = {place.port}\ntls = false\n{wire}'


def _priority(name: str) -> str:
    return "bulk" if name == "picture" else "live"


def _permits(row: Mapping[str, tuple[str, ...]]) -> str:
    quoted = {name: ", ".join(f'"{endpoint}"' for endpoint in endpoints) for name, endpoints in row.items()}
    return "".join(f"{name} = [{endpoints}]\n" for name, endpoints in quoted.items())


def _rule(topic: str, name: str | None, action: str, *, stamped: bool) -> str:
    lines = [f'topic = "{topic}"', f'action = "{action}"']
    if name:
        lines.append(f'class = "{name}"')
    if action == "redact" and stamped:
        lines += ['capture_time = "property:time"', 'capture_unit = "rfc3339"']
    elif action == "forward":
        lines += ['capture_time = "/ts"', 'capture_unit = "s"']
    return "[[rules]]\n" + "\n".join(lines) + "\n"
