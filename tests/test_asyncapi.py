"""The AsyncAPI document is valid, names what the code writes, and describes real traffic."""

from __future__ import annotations

import base64
import dataclasses
import json

import nodejs
import pytest
import stream
from consumers import judged_by_the_official_parser, read_by_node

from agent.wire import asyncapi, batch, presence
from agent.wire.addressing import check_template
from agent.wire.attributes import NAMES, texts
from agent.wire.envelope import CONTENT_TYPE, PAYLOAD_TYPE
from tools.brokers import mosquitto, mosquitto_path

SESSION = presence.Session(id="s", source="urn:vehicle:car-7", vehicle="car-7")


@pytest.fixture
def node():
    if reason := nodejs.missing():
        pytest.skip(reason)


needs_node = pytest.mark.usefixtures("node")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "asyncapi.json"
    path.write_text(asyncapi.text(), encoding="utf-8")
    return path


def test_the_schema_names_exactly_the_attributes_that_the_code_writes():
    schema = asyncapi.schemas()["attributes"]
    assert schema["properties"].keys() == NAMES
    full = dataclasses.replace(stream.PICTURE, dataschema="https://example.org/s")
    assert texts(full).keys() == NAMES
    required = {name for name in texts(stream.TELEMETRY) if name != "datacontenttype"}
    assert set(schema["required"]) == required


def test_the_document_names_the_types_that_the_code_writes():
    made = asyncapi.document(asyncapi.schemas())
    messages = made["components"]["messages"]
    assert messages["envelope"]["contentType"] == CONTENT_TYPE
    assert messages["batch"]["contentType"] == batch.CONTENT_TYPE
    assert messages["compressed"]["contentType"] == batch.ZSTD_CONTENT_TYPE
    bounds = made["components"]["schemas"]["batch"]
    assert (bounds["minItems"], bounds["maxItems"]) == (batch.FEWEST_RECORDS, batch.MAX_RECORDS)
    assert made["components"]["schemas"]["envelope"]["properties"]["payloadType"] == {"const": PAYLOAD_TYPE}
    assert made["components"]["schemas"]["presence"]["properties"]["type"]["enum"] == list(presence.TYPES.values())


def test_the_document_follows_the_topic_template_of_the_fleet():
    template = "v1/{class}/{vehicle}"
    assert check_template(template) is None
    channel = asyncapi.document(asyncapi.schemas(), template)["channels"]["records"]
    assert channel["address"] == template
    assert channel["parameters"].keys() == {"class", "vehicle"}


@needs_node
async def test_the_official_parser_would_find_a_fault(tmp_path):
    made = asyncapi.document(asyncapi.schemas())
    made["operations"]["records"]["channel"] = {"$ref": "#/channels/nowhere"}
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    verdict = await judged_by_the_official_parser(path, [])
    assert any(one["severity"] == 0 for one in verdict["diagnostics"])


def _line(topic, content_type, pairs, payload):
    encoded = base64.b64encode(payload).decode()
    return {"topic": topic, "contentType": content_type, "userProperties": dict(pairs), "payload": encoded}


def _undescribed():
    """Messages that the document must not accept."""
    sent = stream.outgoing(stream.TELEMETRY, b"{}", wire="binary")
    short = [pair for pair in sent.properties if pair[0] != "dataregion"]
    wrong = [(name, "41" if name == "sequence" else text) for name, text in sent.properties]
    return [
        _line(sent.topic, sent.content_type, short, sent.payload),
        _line(sent.topic, sent.content_type, wrong, sent.payload),
        _line(sent.topic, CONTENT_TYPE, sent.properties, b"\x80"),
        _line(sent.topic, batch.CONTENT_TYPE, [("dataregion", "cn")], b"\x91\xc4\x01x"),
        _line(sent.topic, batch.CONTENT_TYPE, [], b"\x92\xc4\x01x\xc4\x01x"),
        _line("alone", sent.content_type, sent.properties, sent.payload),
    ]


@needs_node
@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
async def test_the_official_parser_accepts_the_document_and_the_document_exactly_the_real_traffic(document, tmp_path):
    own = [
        presence.birth(SESSION, 0, version="0", policy_version="0", keyid=None),
        presence.death(SESSION, 0, "stopped"),
        presence.status(SESSION, 0, 1, {"received": 1}),
    ]
    lines = [_line(one.topic, one.content_type, [], one.payload) for one in own]
    public_key = tmp_path / "car.pub.pem"
    public_key.write_bytes(stream.PUBLIC_PEM)
    records = [
        stream.outgoing(attributes, b"{}", wire=wire, signer=signer)
        for wire in ("msgpack", "binary")
        for attributes, signer in ((stream.TELEMETRY, stream.SIGNER), (stream.PICTURE, None))
    ]
    async with mosquitto() as broker:
        lines += await read_by_node(broker.port, public_key, records)
    batches = [stream.batched(records[:1] * 3, compress=compress) for compress in (False, True)]
    lines += [_line(one.topic, one.content_type, one.properties, one.payload) for one in batches]
    verdict = await judged_by_the_official_parser(document, lines + _undescribed())
    assert [one for one in verdict["diagnostics"] if one["severity"] < 2] == []
    assert verdict["messages"][:9] == [
        *[["presence", "presence", []]] * 2,
        ["status", "presence", []],
        *[["records", "envelope", []]] * 2,
        *[["records", "binary", []]] * 2,
        ["records", "batch", []],
        ["records", "compressed", []],
    ]
    assert all(errors for _channel, _message, errors in verdict["messages"][9:])
