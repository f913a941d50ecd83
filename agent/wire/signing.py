"""Ed25519 keys, their ids, and DSSE's pre-authentication encoding.

A key id defaults to the first 16 hex digits of the SHA-256 of the 32 raw public key bytes. It only picks a key out of
those that a reader trusts already; nothing is trusted because of it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from agent.errors import EnvelopeError

SIGNATURE_BYTES = 64  # RFC 8032, 5.1.6
KEY_ID_DIGITS = 16  # 64 bits: enough to tell a fleet's keys apart
_KEY_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """An Ed25519 signature and the id of its key; construction raises EnvelopeError."""

    keyid: str
    sig: bytes

    def __post_init__(self) -> None:
        if not _KEY_ID.fullmatch(self.keyid):
            message = f"keyid: {self.keyid!r} is not 1 to 128 of A-Z a-z 0-9 . _ : -"
            raise EnvelopeError(message)
        if len(self.sig) != SIGNATURE_BYTES:
            message = f"sig: {len(self.sig)} bytes, not {SIGNATURE_BYTES}"
            raise EnvelopeError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """A private key and the name under which its signatures are given."""

    key: Ed25519PrivateKey
    key_id: str

    @classmethod
    def from_pem(cls, pem: bytes, key_id: str | None = None) -> Signer:
        """Read an unencrypted PKCS #8 Ed25519 key; raises EnvelopeError. An empty or missing id is derived."""
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            message = "signing key: not an unencrypted private key in PEM"
            raise EnvelopeError(message) from exc
        if not isinstance(key, Ed25519PrivateKey):
            message = "signing key: not Ed25519"
            raise EnvelopeError(message)
        chosen = key_id or key_id_of(key.public_key())
        if not _KEY_ID.fullmatch(chosen):
            message = f"signing key: {chosen!r} is not an id of 1 to 128 of A-Z a-z 0-9 . _ : -"
            raise EnvelopeError(message)
        return cls(key=key, key_id=chosen)

    def sign(self, payload_type: str, payload: bytes) -> Signature:
        """Sign DSSE's encoding of type and payload."""
        return Signature(keyid=self.key_id, sig=self.key.sign(pre_authentication_encoding(payload_type, payload)))


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1: `DSSEv1 LEN(type) type LEN(payload) payload`, lengths in decimal, single spaces."""
    encoded = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded), encoded, len(payload), payload)


def key_id_of(key: Ed25519PublicKey) -> str:
    """Give the default id of a key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:KEY_ID_DIGITS]


def public_key(pem: bytes) -> Ed25519PublicKey:
    """Read one Ed25519 public key; raises EnvelopeError."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        message = "public key: not PEM"
        raise EnvelopeError(message) from exc
    if not isinstance(key, Ed25519PublicKey):
        message = "public key: not Ed25519"
        raise EnvelopeError(message)
    return key


def public_keys(pem: bytes) -> dict[str, Ed25519PublicKey]:
    """Every public key of a PEM bundle by its default id; raises EnvelopeError, also where there is none."""
    keys = [public_key(block) for block in _PUBLIC_PEM.findall(pem)]
    if not keys:
        message = "public keys: the file holds no PUBLIC KEY block"
        raise EnvelopeError(message)
    return {key_id_of(key): key for key in keys}
