"""The AsyncAPI 3.0 document of the stream: what a backend receives on an endpoint, in either wire mode, or in batches.

`document` is a function of the schemas beside this package's data, the topic template and the agent's version; JSON is
YAML, so every AsyncAPI tool reads it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from agent import __version__
from agent.wire import batch, presence
from agent.wire.addressing import DEFAULT_TEMPLATE, PLACEHOLDERS, PRESENCE_TEMPLATE, STATUS_TEMPLATE
from agent.wire.envelope import CONTENT_TYPE

SCHEMAS = ("attributes", "batch", "envelope", "presence")
_PARAMETERS = {
    "region": "The attribute dataregion; several candidates are joined by commas.",
    "vehicle": "The vehicle's pseudonymous name.",
    "topic": "The MQTT topic inside the vehicle; it may hold further levels.",
    "class": "The attribute dataclassification.",
    "type": "The attribute type.",
}
_SIGNATURE = {
    "keyid": {"type": "string", "description": "Which key signed; absent where the record is not signed."},
    "signature": {"type": "string", "description": "The Ed25519 signature in base64."},
}

Json = dict[str, Any]


def schemas() -> dict[str, Json]:
    """Read the JSON Schemas (draft 7) that the package ships, by name."""
    folder = resources.files("agent") / "data"
    return {name: json.loads((folder / f"{name}.schema.json").read_text(encoding="utf-8")) for name in SCHEMAS}


def text(template: str = DEFAULT_TEMPLATE) -> str:
    """Give the document as `residency-agent asyncapi` prints it."""
    return json.dumps(document(schemas(), template), indent=2, ensure_ascii=False) + "\n"


def document(found: Mapping[str, Json], template: str = DEFAULT_TEMPLATE, version: str = __version__) -> Json:
    """Build the document for endpoints that use this topic template."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "residency-agent",
            "version": version,
            "license": {"name": "Apache-2.0"},
            "description": "Redacted, region-tagged records of vehicles. At least once: `source` and `id` tell "
            "duplicates, `sequence` tells gaps and order within one source and dataregion.",
        },
        "servers": {"endpoint": _server()},
        "channels": _channels(template),
        "operations": {name: _operation(name) for name in ("records", "presence", "status")},
        "components": {"messages": _messages(), "schemas": _components(found)},
    }


def _server() -> Json:
    return {
        "host": "{endpoint}:8883",
        "protocol": "mqtts",
        "protocolVersion": "5.0",
        "description": "One broker per endpoint of the policy.",
        "variables": {"endpoint": {"description": "Host name of the regional broker."}},
    }


def _channels(template: str) -> Json:
    return {
        "records": _channel(template, ["envelope", "binary", "batch", "compressed"]),
        "presence": _channel(PRESENCE_TEMPLATE, ["presence"]),
        "status": _channel(STATUS_TEMPLATE, ["presence"]),
    }


def _channel(address: str, messages: list[str]) -> Json:
    used = [name for name in PLACEHOLDERS if f"{{{name}}}" in address]
    return {
        "address": address,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "parameters": {name: {"description": _PARAMETERS[name]} for name in used},
    }


def _operation(channel: str) -> Json:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{channel}"},
        "bindings": {"mqtt": {"qos": 1, "retain": channel != "records", "bindingVersion": "0.2.0"}},
    }


def _messages() -> Json:
    binary = {"type": "string", "format": "binary", "description": "The data itself, of the type in Content Type."}
    return {
        "envelope": {
            "title": "Record, wire mode msgpack",
            "contentType": CONTENT_TYPE,
            "headers": {"$ref": "#/components/schemas/attributes"},
            "payload": {"$ref": "#/components/schemas/envelope"},
        },
        "binary": {
            "title": "Record, wire mode binary: CloudEvents binary content mode",
            "headers": {"$ref": "#/components/schemas/binaryattributes"},
            "payload": binary,
        },
        "batch": {
            "title": "Several records, wire mode msgpack with batches",
            "contentType": batch.CONTENT_TYPE,
            "headers": {"$ref": "#/components/schemas/batchattributes"},
            "payload": {"$ref": "#/components/schemas/batch"},
        },
        "compressed": {
            "title": "Several records, as one zstd frame",
            "contentType": batch.ZSTD_CONTENT_TYPE,
            "headers": {"$ref": "#/components/schemas/batchattributes"},
            "payload": {
                "type": "string",
                "format": "binary",
                "description": "One zstd frame (RFC 8878) with its content size: a payload of the message batch.",
            },
        },
        "presence": {
            "title": "Birth, death or status",
            "contentType": presence.CONTENT_TYPE,
            "payload": {"$ref": "#/components/schemas/presence"},
        },
    }


def _components(found: Mapping[str, Json]) -> Json:
    """Give the schemas without what AsyncAPI says itself; a `$ref` inside one must name its new place."""
    made = {name: _moved(found[name], f"#/components/schemas/{name}/definitions/") for name in SCHEMAS}
    made["binaryattributes"] = copy.deepcopy(made["attributes"])
    made["binaryattributes"]["properties"] |= _SIGNATURE
    made["batchattributes"] = {
        "type": "object",
        "description": "What all records of the batch have in common; refuse a record that it contradicts.",
        "required": [batch.PROPERTY],
        "properties": {batch.PROPERTY: copy.deepcopy(made["attributes"]["properties"][batch.PROPERTY])},
    }
    return made


def _moved(schema: Json, place: str) -> Json:
    moved: Json = json.loads(json.dumps(schema).replace('"#/definitions/', f'"{place}'))
    del moved["$schema"]
    return moved
