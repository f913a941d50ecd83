"""What the demonstration sets up: two regions, their permits, and the configuration of one vehicle.

`PERMITS` and `CLASS_OF_TOPIC` are the intent; the policy that the agent gets is written from them, and the judge holds
what the regional brokers received against them without asking the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

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


def data_class(topic: str) -> str | None:
    """The data class that a topic is meant to have; None: it must not leave the car."""
    return next((name for wanted, name, _ in CLASS_OF_TOPIC if matches(wanted, topic)), None)


def permitted(country: str, topic: str) -> tuple[str, ...]:
    """The endpoints that may see a message of this topic captured in this country."""
    name = data_class(topic)
    return PERMITS[REGION_OF_COUNTRY[country]].get(name, ()) if name else ()


def agent_values(speed: float, manifest: Path | None = None) -> dict[str, Any]:
    """Give agent.toml as values; at 10x speed the car seems ten times as fast, so its speed limit grows alike."""
    return {
        "model": {"manifest": str(manifest.absolute())} if manifest else {},
        "vehicle": {"source": "urn:vehicle:demo", "name": "demo"},
        "intake": {
            "telemetry": ["vehicle/gnss", "vehicle/telemetry/#", "vehicle/diagnostics/#"],
            "pictures": ["vehicle/camera/#"],
        },
        "position": [
            {
                "topic": "vehicle/gnss",
                "format": "json",
                "latitude": "/lat",
                "longitude": "/lon",
                "accuracy": "/acc",
                "time": "/ts",
            }
        ],
        "motion": {"max_speed_mps": MAX_SPEED_MPS * speed},
    }


def policy_values() -> dict[str, Any]:
    """Give policy.toml as values; the addresses of the endpoints are filled in when their brokers run."""
    classes = sorted({name for row in PERMITS.values() for name in row})
    return {
        "version": "demo-1",
        "regions": {region: {"countries": [country]} for country, region in REGION_OF_COUNTRY.items()},
        "endpoints": {region: {"topic": WIRE_TOPIC} for region in PERMITS},
        "classes": {name: {"priority": "bulk" if name == "picture" else "live"} for name in classes},
        "permit": {region: {name: list(ends) for name, ends in row.items()} for region, row in PERMITS.items()},
        "rules": [_rule(*rule) for rule in CLASS_OF_TOPIC],
    }


def _rule(topic: str, name: str | None, action: str) -> dict[str, Any]:
    capture = {
        "redact": {"capture_time": "property:time", "capture_unit": "ns"},
        "forward": {"capture_time": "/ts", "capture_unit": "s"},
    }
    named = {"class": name} if name else {}
    return {"topic": topic, "action": action, **named, **capture.get(action, {})}
