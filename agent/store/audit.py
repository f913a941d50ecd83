"""The audit chain: what the agent decided and did, row by row, so that a change to any row shows.

Invariants
- A row never holds content, a topic or a position: `ROW_KEYS` is everything that may stand in one.
- hash(n) = SHA-256(hash(n - 1) + canonical bytes of row n); hash(0) = `GENESIS`. Canonical bytes are JSON with sorted
  keys, no white space, UTF-8.
- Rows of one transaction are stored as one block with the hash of its last row. Old blocks may be dropped only
  together with a checkpoint row, later in the chain, that names the last dropped row and its hash.
- The head (number and hash of the last row) is also kept outside the chain, sealed in a file of its own: a chain that
  ends before the seal was truncated.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

GENESIS = hashlib.sha256(b"residency-agent audit chain 1").digest()
SEAL_TYPE = b"residency-agent audit head 1\n"  # so that the signature can be taken for nothing else
CHECKPOINT = "audit.checkpoint"
ROW_KEYS = frozenset(
    (
        *("n", "time_ns", "what", "id", "class", "candidates", "decision", "route", "reason", "endpoint", "code"),
        *("model", "counts", "pictures", "name", "value", "through", "hash"),
    )
)

_encode = msgspec.json.Encoder(order="sorted").encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last row of a chain: its number and hash. Row numbers begin at 1."""

    n: int = 0
    digest: bytes = GENESIS


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows `first` .. `first + count - 1` as stored: canonical rows joined by line feeds, deflated."""

    first: int
    count: int
    digest: bytes
    data: bytes

    def rows(self) -> list[bytes]:
        """The canonical rows. ValueError where the data is not what `pack` wrote."""
        try:
            return zlib.decompress(self.data).split(b"\n")
        except zlib.error as exc:
            raise ValueError(str(exc)) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """A head as it was at some time, signed where a key is configured."""

    head: Head
    time_ns: int
    signature: bytes = b""

    def signed_bytes(self) -> bytes:
        """What the signature covers."""
        return SEAL_TYPE + _encode({"hash": self.head.digest.hex(), "n": self.head.n, "time_ns": self.time_ns})


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What a verification saw: rows `first` .. `last`, and every problem in words; `sealed`: up to which row."""

    first: int
    last: int
    sealed: int
    problems: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether the chain is whole, as far as the seal can tell."""
        return not self.problems


def canonical(row: Mapping[str, object]) -> bytes:
    """The bytes that are hashed. ValueError for a key that no row may have."""
    if not row.keys() <= ROW_KEYS:
        msg = f"not part of an audit row: {sorted(row.keys() - ROW_KEYS)}"
        raise ValueError(msg)
    return _encode(row)


def link(previous: bytes, row: bytes) -> bytes:
    """The hash of a row."""
    return hashlib.sha256(previous + row).digest()


def pack(head: Head, rows: list[bytes]) -> Block:
    """The block that continues the chain at `head`."""
    digest = head.digest
    for row in rows:
        digest = link(digest, row)
    return Block(first=head.n + 1, count=len(rows), digest=digest, data=zlib.compress(b"\n".join(rows), 1))


def head_of(block: Block) -> Head:
    """The head of a chain that ends with this block."""
    return Head(n=block.first + block.count - 1, digest=block.digest)


def checkpoint(n: int, time_ns: int, base: Head) -> dict[str, object]:
    """The row that lets the rows up to `base` be dropped."""
    return {"n": n, "time_ns": time_ns, "what": CHECKPOINT, "through": base.n, "hash": base.digest.hex()}


def unpack(blocks: Iterable[Block], base: Head) -> Iterator[dict[str, object]]:
    """Rows after `base` for export, each with its hash as `chain`. ValueError where a block is damaged or missing."""
    digest, last = base.digest, base.n
    for block in blocks:
        if block.first != last + 1:
            msg = f"rows {last + 1} to {block.first - 1} are missing"
            raise ValueError(msg)
        last = block.first + block.count - 1
        for row in block.rows():
            digest = link(digest, row)
            yield {**msgspec.json.decode(row, type=dict[str, object]), "chain": digest.hex()}


class _Walk:
    """One pass over the chain."""

    def __init__(self, base: Head, seal: Seal | None) -> None:
        self.base = base
        self.head = base
        self.seal = seal
        self.dropped = Head()
        self.problems: list[str] = []

    def block(self, block: Block) -> None:
        if block.first != self.head.n + 1:
            self.problems.append(f"rows {self.head.n + 1} to {block.first - 1} are missing or out of order")
        try:
            rows = block.rows()
        except ValueError as exc:
            self.problems.append(f"rows from {block.first}: unreadable ({exc})")
            rows = []
        digest = self.head.digest
        for n, row in enumerate(rows, block.first):
            digest = link(digest, row)
            self.row(n, digest, row)
        if digest != block.digest or len(rows) != block.count:
            self.problems.append(f"rows {block.first} to {block.first + block.count - 1} were changed")
        self.head = head_of(block)

    def row(self, n: int, digest: bytes, row: bytes) -> None:
        if self.seal and n == self.seal.head.n and digest != self.seal.head.digest:
            self.problems.append(f"row {n} is not the row that was sealed")
        if CHECKPOINT.encode() in row:
            fields = msgspec.json.decode(row, type=dict[str, object])
            if fields.get("what") == CHECKPOINT:
                self.dropped = Head(n=int(str(fields["through"])), digest=bytes.fromhex(str(fields["hash"])))


def verify(
    blocks: Iterable[Block],
    *,
    base: Head,
    last: int,
    seal: Seal | None = None,
    signed: Callable[[bytes, bytes], bool] | None = None,
) -> AuditReport:
    """Check the chain from `base`, the last dropped row, to row `last`, against its seal.

    `signed(message, signature)` checks the seal's signature; without it the signature is not looked at.
    """
    walk = _Walk(base, seal)
    for block in blocks:
        walk.block(block)
    problems = walk.problems
    if walk.dropped != base:
        problems.append(f"rows up to {base.n} were dropped without a checkpoint")
    if walk.head.n != last:
        problems.append(f"the chain ends at row {walk.head.n}, its count says {last}")
    problems += _seal_problems(seal, base, walk.head, signed)
    first = min(base.n + 1, walk.head.n)
    return AuditReport(
        first=first, last=walk.head.n, sealed=seal.head.n if seal else 0, problems=tuple(dict.fromkeys(problems))
    )


def _seal_problems(
    seal: Seal | None, base: Head, last: Head, signed: Callable[[bytes, bytes], bool] | None
) -> list[str]:
    if seal is None:
        return ["the seal is missing"] if last.n else []
    problems = []
    if signed is not None and not signed(seal.signed_bytes(), seal.signature):
        problems.append("the seal's signature is not valid")
    if seal.head.n > last.n:
        problems.append(f"rows {last.n + 1} to {seal.head.n} were cut off")
    if seal.head.n < base.n or (seal.head.n == base.n and seal.head.digest != base.digest):
        problems.append(f"the seal names row {seal.head.n}, which is not in the chain")
    return problems
