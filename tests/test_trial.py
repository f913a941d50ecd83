"""A trial keeps of an endpoint what its stand-in can do, and its witnesses see every record by itself."""

import io
from types import SimpleNamespace

import pytest
import stream

from agent.settings.config import load_policy
from tools.demo import BUNDLED
from tools.scene import agent_values, policy_values
from tools.spool import Spool
from tools.trial import POLICY_FILE, Setting, configure
from tools.witness import Witness, opened

BATCHES = {"batch_records": 16, "batch_compression": "zstd"}


@pytest.mark.parametrize(("protocol", "kept"), [("5", (16, "zstd")), ("3.1.1", (1, "none"))])
def test_batches_are_kept_where_the_broker_of_the_trial_speaks_mqtt_5(tmp_path, protocol, kept):
    policy = policy_values()
    policy["endpoints"] = {name: {**endpoint, **BATCHES} for name, endpoint in policy["endpoints"].items()}
    setting = Setting(agent=agent_values(1), policy=policy, recording=BUNDLED, folder=tmp_path)
    place = {"host": "127.0.0.1", "port": 1883, "protocol": protocol}
    configure(setting, place, dict.fromkeys(policy["endpoints"], place))
    for endpoint in load_policy(tmp_path / POLICY_FILE).endpoints.values():
        assert (endpoint.batch_records, endpoint.batch_compression) == kept


@pytest.mark.parametrize("content_type", ["its own", None])
def test_witness_sees_each_record_of_a_batch(content_type):
    records = [stream.outgoing(stream.record(number), stream.data_of(number)) for number in range(4)]
    sent = stream.batched(records)
    properties = SimpleNamespace(ContentType=sent.content_type) if content_type else None
    found = Witness("cn", Spool(io.BytesIO()))
    found.on_message(None, None, SimpleNamespace(topic=sent.topic, payload=sent.payload, properties=properties))
    found.on_message(None, None, SimpleNamespace(topic=sent.topic, payload=records[0].payload, properties=None))
    assert [opened(one).attributes["sequence"][-1] for one in found.records] == ["0", "1", "2", "3", "0"]
    assert [opened(one).data for one in found.records][:4] == [stream.data_of(number) for number in range(4)]
