"""The wire format: pack, unpack, sign, verify. Everything about the bytes of a record is decided here.

A record is one CloudEvents 1.0 event. Its *event bytes* are a msgpack map of the attributes (str -> str) and `data`
(bin), keys ascending, every length in its shortest form: one event has exactly one such encoding. The *envelope* is
DSSE's shape in msgpack, so the signed bytes travel verbatim and are verified before anything in them is parsed:

    {"payload": bin(event bytes), "payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": str, "sig": bin(64)}]}

`sig` is Ed25519 over DSSE's pre-authentication encoding of payloadType and payload; an unsigned record has an empty
list. On MQTT 5 the attributes also stand in the user properties. In CloudEvents binary mode (`from_binary`) nothing
but the data is in the PUBLISH payload, keyid and sig are user properties, and the event bytes are built again.

Compatibility promise, for as long as PAYLOAD_TYPE stays: attributes may be added, none is removed or renamed and none
changes its meaning; readers ignore names that they do not know (`Attributes.extensions` keeps them, the signature
covers them). Whatever else changes takes a new PAYLOAD_TYPE, which older readers refuse.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import msgpack  # type: ignore[import-untyped]  # it ships no annotations
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent.errors import EnvelopeError
from agent.wire.attributes import MAX_ATTRIBUTES, NAME, Attributes, from_texts, texts, traceparent_or_none
from agent.wire.signing import Signature, Signer, pre_authentication_encoding

__all__ = [
    "CONTENT_TYPE",
    "PAYLOAD_TYPE",
    "Attributes",
    "Envelope",
    "Kept",
    "Signature",
    "Signer",
    "from_binary",
    "kept",
    "pack",
    "pairs",
    "properties",
    "received",
    "repack",
    "traceparent_or_none",
    "unpack",
    "verify",
]

PAYLOAD_TYPE = "application/vnd.residency-agent.event.v1+msgpack"  # what is signed
CONTENT_TYPE = "application/vnd.residency-agent.envelope+msgpack"  # MQTT 5 Content Type of an envelope
_encode = msgspec.msgpack.Encoder().encode  # every length in its shortest form
MAX_ENVELOPE_BYTES = 64 << 20  # default of `unpack`; the agent's own payload limit is far below


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A record as received: `payload` is what the signature covers, and what the other fields were read from."""

    attributes: Attributes
    data: bytes
    payload: bytes
    signature: Signature | None

    @property
    def keyid(self) -> str | None:
        """Which key is said to have signed; None = unsigned."""
        return self.signature.keyid if self.signature else None


class _Signed(msgspec.Struct, frozen=True):
    keyid: str
    sig: bytes


class _Outer(msgspec.Struct, frozen=True):
    payload: bytes
    signatures: list[_Signed]


_OUTER, _EVENT = msgspec.msgpack.Decoder(_Outer), msgspec.msgpack.Decoder(dict[str, Any])


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A record of our own as it is stored: the attributes as text, names ascending."""

    texts: Mapping[str, str]
    data: bytes
    signature: Signature | None


def pack(attributes: Attributes, data: bytes, signer: Signer | None) -> bytes:
    """Give the envelope of one record, signed where there is a signer."""
    return _seal(_event(attributes.texts, data), signer)


def repack(packed: bytes, signer: Signer | None, **changes: Any) -> bytes:  # noqa: ANN401 - fields of Attributes
    """Give the same record with other attributes (a held record whose regions were narrowed), signed anew."""
    envelope = unpack(packed)
    return pack(dataclasses.replace(envelope.attributes, **changes), envelope.data, signer)


def unpack(packed: bytes, max_bytes: int = MAX_ENVELOPE_BYTES) -> Envelope:
    """Read an envelope; raises EnvelopeError for everything that `pack` would not have written.

    The signature is not judged: see `verify`.
    """
    if len(packed) > max_bytes:
        _refuse(f"an envelope of {len(packed)} bytes; the limit is {max_bytes}")
    outer = _map(packed, "envelope")
    if outer.get("payloadType") != PAYLOAD_TYPE:
        _refuse(f"payloadType: {outer.get('payloadType')!r} is not {PAYLOAD_TYPE}")
    payload, signature = outer.get("payload"), _signature(outer.get("signatures"))
    if not isinstance(payload, bytes) or _outer(payload, signature) != packed:
        _refuse("the envelope is not in the form that the agent writes")
    event = _map(payload, "event")
    data = event.pop("data", None)
    if not isinstance(data, bytes):
        _refuse("data: the event holds none as bytes")
    return _opened(event, data, payload, signature)


def kept(packed: bytes) -> Kept:
    """Read an envelope that this agent has written, out of a store that checks its bytes; raises EnvelopeError.

    Unlike `unpack` it does not prove again that nobody else could have written it, which takes most of the time.
    """
    try:
        outer = _OUTER.decode(packed)
        event = _EVENT.decode(outer.payload)
    except msgspec.MsgspecError as exc:
        message = f"not an envelope of our own: {exc}"
        raise EnvelopeError(message) from exc
    data = event.pop("data", None)
    if not isinstance(data, bytes) or not all(isinstance(text, str) for text in event.values()):
        _refuse("the event holds no data, or an attribute that is not text")
    signature = Signature(keyid=outer.signatures[0].keyid, sig=outer.signatures[0].sig) if outer.signatures else None
    return Kept(texts=event, data=data, signature=signature)


def from_binary(data: bytes, content_type: str | None, user_properties: Iterable[tuple[str, str]]) -> Envelope:
    """Read a record in CloudEvents binary mode: the PUBLISH payload, its Content Type and its user properties.

    User properties whose names CloudEvents does not allow are not the agent's and are left out; all others were
    signed. Raises EnvelopeError.
    """
    found: dict[str, str] = {}
    for name, text in user_properties:
        if found.setdefault(name, text) != text:
            _refuse(f"{name}: two different user properties have this name")
    found = {name: text for name, text in found.items() if NAME.fullmatch(name)}
    if content_type is None or "datacontenttype" in found:
        _refuse("datacontenttype: it must be the Content Type, and nothing else")
    keyid, encoded = found.pop("keyid", None), found.pop("signature", None)
    found["datacontenttype"] = content_type
    signature = None if keyid is None and encoded is None else _decoded(keyid, encoded)
    return _opened(found, data, _event(dict(sorted(found.items())), data), signature)


def properties(attributes: Attributes, signature: Signature | None = None) -> list[tuple[str, str]]:
    """MQTT 5 user properties: every attribute but `datacontenttype`, which is the Content Type in binary mode.

    In binary mode the signature goes along as `keyid` and `signature` (base64); in msgpack mode it is in the payload.
    """
    return pairs(attributes.texts, signature)


def pairs(found: Mapping[str, str], signature: Signature | None = None) -> list[tuple[str, str]]:
    """Give the user properties for attributes as text."""
    plain = [(name, text) for name, text in found.items() if name != "datacontenttype"]
    if signature is None:
        return plain
    return [*plain, ("keyid", signature.keyid), ("signature", base64.b64encode(signature.sig).decode())]


def received(
    payload: bytes,
    content_type: str | None,
    user_properties: Iterable[tuple[str, str]],
    max_bytes: int = MAX_ENVELOPE_BYTES,
) -> Envelope:
    """Read a PUBLISH in whichever mode it is; without Content Type (MQTT 3.1.1) it is an envelope.

    Raises EnvelopeError, also where a user property of an envelope contradicts it: somebody may have routed by that.
    Only `traceparent` may differ, for hops that trace replace it.
    """
    if len(payload) > max_bytes:
        _refuse(f"a payload of {len(payload)} bytes; the limit is {max_bytes}")
    if content_type not in (None, CONTENT_TYPE):
        return from_binary(payload, content_type, user_properties)
    envelope = unpack(payload, max_bytes)
    signed = texts(envelope.attributes)
    for name, text in user_properties:
        if name != "traceparent" and signed.get(name, text) != text:
            _refuse(f"{name}: the user property is not what the envelope says")
    return envelope


def verify(envelope: Envelope, keys: Mapping[str, Ed25519PublicKey]) -> None:
    """Raise EnvelopeError unless one of these keys (by key id) signed exactly this record."""
    signature = envelope.signature
    if signature is None:
        _refuse("unsigned")
    key = keys.get(signature.keyid)
    if key is None:
        _refuse(f"signed with an unknown key: {signature.keyid!r}")
    try:
        key.verify(signature.sig, pre_authentication_encoding(PAYLOAD_TYPE, envelope.payload))
    except InvalidSignature as exc:
        message = f"the signature of key {signature.keyid!r} is wrong"
        raise EnvelopeError(message) from exc


def _event(found: Mapping[str, str], data: bytes) -> bytes:
    """Give the event bytes. The data is copied once."""
    return _encode(dict(sorted({**found, "data": data}.items())))


def _seal(payload: bytes, signer: Signer | None) -> bytes:
    return _outer(payload, signer.sign(PAYLOAD_TYPE, payload) if signer else None)


def _outer(payload: bytes, signature: Signature | None) -> bytes:
    signatures = [] if signature is None else [{"keyid": signature.keyid, "sig": signature.sig}]
    return _encode({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": signatures})


def _opened(found: Mapping[str, object], data: bytes, payload: bytes, signature: Signature | None) -> Envelope:
    """Check what was read against what would have been written."""
    if len(found) > MAX_ATTRIBUTES or not all(isinstance(text, str) for text in found.values()):
        _refuse(f"an attribute is not text, or there are more than {MAX_ATTRIBUTES}")
    attributes = from_texts(cast("Mapping[str, str]", found))
    if _event(attributes.texts, data) != payload:
        _refuse("the event is not in the form that the agent writes")
    return Envelope(attributes=attributes, data=data, payload=payload, signature=signature)


def _map(packed: bytes, what: str) -> dict[str, Any]:
    try:
        found = msgpack.unpackb(packed, strict_map_key=True, raw=False)
    except (ValueError, msgpack.UnpackException) as exc:
        message = f"{what}: not msgpack: {exc}"
        raise EnvelopeError(message) from exc
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        _refuse(f"{what}: not a map with text keys")
    return found


def _signature(found: object) -> Signature | None:
    match found:
        case []:
            return None
        case [{"keyid": str(keyid), "sig": bytes(sig), **others}] if not others:
            return Signature(keyid=keyid, sig=sig)
    message = "signatures: not an empty list, and not a list of one"
    raise EnvelopeError(message)


def _decoded(keyid: str | None, encoded: str | None) -> Signature:
    try:
        sig = base64.b64decode(encoded or "", validate=True)
    except (binascii.Error, ValueError) as exc:
        message = "signature: not base64"
        raise EnvelopeError(message) from exc
    if keyid is None or base64.b64encode(sig).decode() != encoded:
        _refuse("signature: keyid and signature must come together, in canonical base64")
    return Signature(keyid=keyid, sig=sig)


def _refuse(message: str) -> NoReturn:
    raise EnvelopeError(message)
