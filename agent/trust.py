"""Whose policy and model this vehicle uses: signed files are read and verified here, and made by `sign`.

- What is verified is what is used: the bytes are read once, and handed on.
- A signed policy stands for its borders too: it names their SHA-256, so no other borders go with it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from agent import usage
from agent.errors import AgentError, ConfigError, EnvelopeError, InvalidConfigError
from agent.settings.config import Trust, parse_policy
from agent.settings.policy_config import PolicyConfig
from agent.wire import detached
from agent.wire.detached import Kind
from agent.wire.signing import Signer, key_id_of, public_keys

KINDS = {".toml": Kind.POLICY, ".json": Kind.MODEL}

ABOUT = """FILE.sig is written beside each FILE. What it signs is told by the name: .toml a policy, .json a detector's
manifest. The manifest names the model's SHA-256, the policy that of its own borders: nothing else has to be signed."""
EXAMPLES = (
    "residency-agent sign --key fleet.pem --generate",
    "residency-agent sign --key fleet.pem policy.toml detector.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The public keys that are trusted, by id; none: nothing has to be signed."""

    keys: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)

    @classmethod
    def read(cls, trust: Trust, file: Path) -> Keys:
        """The keys that [trust] of agent.toml (`file`) names; raises InvalidConfigError."""
        if not trust.keys_file:
            return cls()
        try:
            return cls(keys=public_keys(Path(trust.keys_file).read_bytes()))
        except (OSError, EnvelopeError) as exc:
            wanted = "a readable file of Ed25519 public keys in PEM"
            raise InvalidConfigError([ConfigError(file, "trust.keys_file", str(exc), wanted)]) from exc

    def __bool__(self) -> bool:
        return bool(self.keys)

    def read_file(self, file: Path, kind: Kind, named: tuple[Path, str] | None = None) -> bytes:
        """The bytes of a file, signed by one of the keys where there are any.

        Raises InvalidConfigError, with the file and key that name it (else itself).
        """
        beside = file.with_name(file.name + detached.SUFFIX)
        try:
            data = file.read_bytes()
            if self.keys:
                with beside.open("rb") as signature:
                    text = signature.read(detached.LONGEST_BYTES).decode("ascii")
                detached.verify(text, kind, data, self.keys)
        except (OSError, UnicodeDecodeError, EnvelopeError) as exc:
            wanted = "a file signed by a key of [trust]" if self.keys else "a readable file"
            raise InvalidConfigError([ConfigError(*(named or (file, "the file")), _why(exc), wanted)]) from exc
        return data


def read_borders(policy: PolicyConfig, file: Path, *, bound: bool) -> bytes | None:
    """The bytes of the own borders that the policy in `file` names; None where it names none.

    Raises InvalidConfigError where they are not those of its `borders.sha256`; `bound`: it must have one.
    """
    borders = policy.borders
    if not borders.geojson:
        if borders.sha256:
            wanted = "the file that borders.sha256 is of"
            raise InvalidConfigError([ConfigError(file, "borders.geojson", "nothing", wanted)])
        return None
    try:
        data = Path(borders.geojson).read_bytes()
    except OSError as exc:
        raise InvalidConfigError([ConfigError(file, "borders.geojson", _why(exc), "a readable file")]) from exc
    digest = hashlib.sha256(data).hexdigest()
    if borders.sha256 != digest and (borders.sha256 or bound):
        wanted = f"{digest}, as {borders.geojson} has"
        raise InvalidConfigError([ConfigError(file, "borders.sha256", borders.sha256 or "nothing", wanted)])
    return data


def _why(exc: Exception) -> str:
    return f"{exc.filename}: {exc.strerror}" if isinstance(exc, OSError) and exc.filename else str(exc)


def add_parser(commands: Any) -> None:  # noqa: ANN401 - argparse has no public type for it
    """Add `sign` to the subcommands."""
    summary = "sign a policy or a detector's manifest, or make the key for it"
    epilog = usage.epilog(EXAMPLES, failed="a file could not be read, signed or written")
    parser = usage.add(commands, "sign", summary, epilog=epilog, description=f"{summary}\n\n{ABOUT}")
    parser.add_argument("--key", type=Path, required=True, help="Ed25519 private key, PEM; keep it off the vehicles")
    parser.add_argument("--generate", action="store_true", help="make KEY first, and KEY.pub for [trust] keys_file")
    parser.add_argument("--as", dest="kind", choices=[kind.name.lower() for kind in Kind], help="where the name lies")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")

    def run(arguments: argparse.Namespace) -> int:
        if not (arguments.generate or arguments.files):
            parser.error("nothing to do: name a FILE to sign, or --generate to make the key")
        return _sign(arguments)

    parser.set_defaults(run=run)


def _sign(arguments: argparse.Namespace) -> int:
    try:
        for line in _signed(arguments):
            print(line)  # noqa: T201 - the command line prints
    except (OSError, EnvelopeError) as exc:
        raise AgentError(_why(exc)) from exc
    return 0


def _signed(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.generate:
        yield _generate(arguments.key)
    signer = Signer.from_pem(arguments.key.read_bytes())
    for file in arguments.files:
        kind = Kind[arguments.kind.upper()] if arguments.kind else KINDS.get(file.suffix)
        if kind is None:
            raise AgentError(f"{file}: say with --as what it is; the name ends in none of {', '.join(KINDS)}")
        target = file.with_name(file.name + detached.SUFFIX)
        data = file.read_bytes()
        if kind is Kind.POLICY:
            read_borders(parse_policy(file, data), file, bound=True)
        target.write_text(detached.sign(signer, kind, data), encoding="ascii")
        yield f"{target}: {kind.name.lower()}, signed by {signer.key_id}"


def _generate(file: Path) -> str:
    """Make a private key that only its owner reads, and the public one beside it; a key that is there stays."""
    key = Ed25519PrivateKey.generate()
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as private:
        private.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = file.with_name(file.name + ".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return f"{file}: private key; {public}: public key {key_id_of(key.public_key())}"
