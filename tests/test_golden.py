"""Golden files fix the bytes: a change that breaks readers in the field breaks this first.

`records.json` says what each `*.msgpack` beside it holds, and `batch.msgpack` is the batch of all of them in its order;
readers in other languages may use all as test vectors. A file here is never edited: a new wire format gets new files,
and the old ones must still be read.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.errors import EnvelopeError
from agent.wire import batch
from agent.wire.attributes import from_texts, texts
from agent.wire.envelope import PAYLOAD_TYPE, Signer, from_binary, pack, properties, unpack, verify
from agent.wire.signing import public_keys

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "records.json").read_text(encoding="utf-8"))
KEYS = public_keys(GOLDEN["publicKey"].encode())
SIGNER = Signer(key=Ed25519PrivateKey.from_private_bytes(bytes(range(32))), key_id=GOLDEN["keyid"])
records = pytest.mark.parametrize("record", GOLDEN["records"], ids=lambda record: record["name"])


def _bytes(record):
    return (FOLDER / f"{record['name']}.msgpack").read_bytes()


@records
def test_the_agent_still_writes_these_bytes(record):
    data = base64.b64decode(record["data"])
    packed = pack(from_texts(record["attributes"]), data, SIGNER if record["signed"] else None)
    assert packed == _bytes(record)
    opened = unpack(packed)
    assert opened.attributes.datacontenttype == record["binary"]["contentType"]
    pairs = properties(opened.attributes, opened.signature)
    assert [list(pair) for pair in pairs] == record["binary"]["userProperties"]


@records
def test_these_bytes_are_still_read(record):
    envelope = unpack(_bytes(record))
    pairs = [tuple(pair) for pair in record["binary"]["userProperties"]]
    assert texts(envelope.attributes) == record["attributes"]
    assert envelope.data == base64.b64decode(record["data"])
    assert from_binary(envelope.data, record["binary"]["contentType"], pairs) == envelope
    if record["signed"]:
        verify(envelope, KEYS)
    else:
        with pytest.raises(EnvelopeError, match="unsigned"):
            verify(envelope, KEYS)


def test_the_batch_of_all_of_them_is_written_and_read_as_these_bytes():
    envelopes = [_bytes(record) for record in GOLDEN["records"]]
    golden = (FOLDER / "batch.msgpack").read_bytes()
    assert batch.pack(envelopes) == golden
    assert batch.unpack(golden, batch.CONTENT_TYPE) == envelopes
    compressed = (FOLDER / "batch.msgpack.zst").read_bytes()
    assert batch.unpack(compressed, batch.ZSTD_CONTENT_TYPE) == envelopes, "its bytes are the library's"


def test_the_signed_type_is_the_one_that_the_golden_files_were_signed_as():
    assert GOLDEN["payloadType"] == PAYLOAD_TYPE
