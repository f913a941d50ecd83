"""Detached signatures of the files that decide what may leave: the policy and the detector's manifest.

A signature of FILE stands beside it in FILE.sig: four lines of text, Ed25519 over DSSE's encoding of the kind and the
file's bytes. The kind is signed too, so that a signature of one kind of file never stands for another.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from enum import StrEnum

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent.errors import EnvelopeError
from agent.wire.signing import Signature, Signer, pre_authentication_encoding

SUFFIX = ".sig"
LONGEST_BYTES = 4096  # of a signature file
_TEXT = re.compile(r"residency-agent signature v1\ntype: (\S+)\nkeyid: (\S+)\ned25519: ([A-Za-z0-9+/=]+)\n?")


class Kind(StrEnum):
    """What a signed file is."""

    POLICY = "application/vnd.residency-agent.policy.v1+toml"
    MODEL = "application/vnd.residency-agent.model.v1+json"


def sign(signer: Signer, kind: Kind, data: bytes) -> str:
    """The text of the signature file."""
    made = signer.sign(kind, data)
    text = base64.b64encode(made.sig).decode()
    return f"residency-agent signature v1\ntype: {kind}\nkeyid: {made.keyid}\ned25519: {text}\n"


def verify(text: str, kind: Kind, data: bytes, keys: Mapping[str, Ed25519PublicKey]) -> str:
    """The id of the trusted key that signed these bytes as this kind; raises EnvelopeError saying what is wrong."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise EnvelopeError("not a signature file of version 1")
    stated, keyid, encoded = found.groups()
    if stated != kind:
        raise EnvelopeError(f"signs {stated}, not {kind}")
    if keyid not in keys:
        raise EnvelopeError(f"signed by {keyid}, which is none of the trusted keys: {', '.join(sorted(keys))}")
    try:
        signature = Signature(keyid=keyid, sig=base64.b64decode(encoded, validate=True))
        keys[keyid].verify(signature.sig, pre_authentication_encoding(kind, data))
    except (InvalidSignature, binascii.Error) as exc:
        raise EnvelopeError(f"the file is not what {keyid} signed") from exc
    return keyid
