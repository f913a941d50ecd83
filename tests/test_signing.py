"""Keys from files, their ids, and what is refused."""

from __future__ import annotations

import pytest
import stream
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from agent.errors import EnvelopeError
from agent.wire.envelope import pack, unpack, verify
from agent.wire.signing import Signature, Signer, key_id_of, public_key, public_keys

KEY, SAMPLE = stream.KEY, stream.TELEMETRY


def test_a_key_from_a_file_signs_under_the_id_of_its_public_key():
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signer = Signer.from_pem(pem)
    assert signer.key_id == key_id_of(public_key(public))
    assert Signer.from_pem(pem, "car-1").key_id == "car-1"
    verify(unpack(pack(SAMPLE, b"d", signer)), public_keys(b"comment\n" + public))


def test_what_is_not_a_signing_key_is_refused():
    foreign = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    good = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem, key_id in ((b"", None), (b"junk", None), (foreign, None), (good, "a b")):
        with pytest.raises(EnvelopeError):
            Signer.from_pem(pem, key_id)


def test_what_is_not_a_public_key_is_refused():
    foreign = X25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for pem in (b"", b"junk", foreign):
        with pytest.raises(EnvelopeError):
            public_keys(pem)
        with pytest.raises(EnvelopeError):
            public_key(pem)


@pytest.mark.parametrize(("keyid", "sig"), [("", bytes(64)), ("a\n", bytes(64)), ("a", bytes(63))])
def test_a_signature_of_another_shape_is_refused(keyid, sig):
    with pytest.raises(EnvelopeError):
        Signature(keyid=keyid, sig=sig)
