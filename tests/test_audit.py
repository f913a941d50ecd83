import argparse
import itertools
import json
import shutil
import sqlite3
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_samples import MODEL, NOW, SECOND, delivered, in_memory, record, refused, store

from agent.errors import LedgerError
from agent.messages import Redaction
from agent.store import audit
from agent.store.audit import GENESIS, Block, Head, Seal, canonical, head_of, link, pack, verify
from agent.store.audit_cli import add_parser, export, signed_by
from agent.store.audit_cli import verify as verify_file
from agent.store.entries import LedgerLimits, Noted, Rejected, Store
from agent.store.ledger import Ledger


def row(n, **fields):
    return {"n": n, "time_ns": NOW + n, "what": "stored", **fields}


def chain(*sizes):
    blocks, head, n = [], Head(), 0
    for size in sizes:
        blocks.append(pack(head, [canonical(row(n + k + 1, id=f"id-{n + k + 1}")) for k in range(size)]))
        head, n = head_of(blocks[-1]), n + size
    return blocks


def problems(blocks, *, base=None, head=None, seal=None, **fields):
    head = head or head_of(blocks[-1])
    return verify(
        blocks, base=base or Head(), last=head.n, seal=seal or Seal(head=head, time_ns=NOW), **fields
    ).problems


def test_hash_of_a_row_covers_the_row_and_all_before_it():
    first, second = canonical(row(1)), canonical(row(2))
    assert pack(Head(), [first, second]).digest == link(link(GENESIS, first), second)
    assert canonical({"what": "é", "n": 1}) == '{"n":1,"what":"é"}'.encode()


def test_row_with_a_field_that_no_row_may_have_is_not_written():
    for field in ("payload", "topic", "latitude", "position"):
        with pytest.raises(ValueError, match=field):
            canonical(row(1, **{field: "x"}))


def test_whole_chain_verifies():
    blocks = chain(1, 3, 2)
    report = verify(blocks, base=Head(), last=6, seal=Seal(head=head_of(blocks[-1]), time_ns=NOW))
    assert (report.intact, report.first, report.last, report.sealed) == (True, 1, 6, 6)


@settings(deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_any_block_is_found(data):
    blocks = chain(1, 3, 2, 1)
    head = head_of(blocks[-1])
    at = data.draw(st.integers(0, len(blocks) - 1))
    rows = blocks[at].rows()
    which = data.draw(st.integers(0, len(rows) - 1))
    where = data.draw(st.integers(0, len(rows[which]) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = bytearray(rows[which])
    changed[where] ^= 1 << bit
    rows[which] = bytes(changed)
    before = blocks[at - 1].digest if at else GENESIS
    forged = pack(Head(n=blocks[at].first - 1, digest=before), rows)
    assert problems([*blocks[:at], replace(blocks[at], data=forged.data), *blocks[at + 1 :]], head=head)
    assert problems([*blocks[:at], forged, *blocks[at + 1 :]], head=head)


@settings(deadline=None)
@given(data=st.data())
def test_any_reordering_is_found(data):
    blocks = chain(1, 1, 2, 1, 3)
    shuffled = data.draw(st.permutations(blocks).filter(lambda other: other != blocks))
    assert problems(shuffled, head=head_of(blocks[-1]))
    order = data.draw(st.permutations(range(5)).filter(lambda other: other != list(range(5))))
    renumbered = [replace(blocks[k], first=block.first) for k, block in zip(order, blocks, strict=True)]
    assert problems(renumbered, head=head_of(blocks[-1]))


@settings(deadline=None)
@given(cut=st.integers(0, 4), drop=st.integers(0, 4))
def test_any_missing_block_is_found(cut, drop):
    blocks = chain(1, 1, 2, 1, 3)
    head = head_of(blocks[-1])
    assert problems(blocks[:drop] + blocks[drop + 1 :], head=head)
    remaining = blocks[:cut]
    shorter = head_of(remaining[-1]) if remaining else Head()
    assert problems(remaining, head=shorter, seal=Seal(head=head, time_ns=NOW))


def test_chain_rewritten_from_a_changed_row_on_does_not_match_its_seal():
    blocks = chain(2, 2)
    seal = Seal(head=head_of(blocks[0]), time_ns=NOW)
    forged = [pack(Head(), [canonical(row(1, id="other")), canonical(row(2))])]
    forged.append(pack(head_of(forged[0]), blocks[1].rows()))
    assert problems(forged, seal=seal) == ("row 2 is not the row that was sealed",)


def test_dropped_rows_need_a_checkpoint_that_names_them():
    blocks = chain(2, 2, 1)
    base = head_of(blocks[1])
    checkpoint = pack(head_of(blocks[2]), [canonical(audit.checkpoint(6, NOW, base))])
    assert problems([blocks[2], checkpoint], base=base) == ()
    assert problems([checkpoint], base=head_of(blocks[2]))
    assert problems([blocks[2]], base=base)
    assert problems([blocks[2], checkpoint], base=replace(base, digest=GENESIS))


def test_unreadable_block_is_a_problem_and_not_a_crash():
    blocks = chain(1, 2)
    assert "unreadable" in problems([blocks[0], replace(blocks[1], data=b"junk")])[0]
    assert problems([Block(first=1, count=1, digest=GENESIS, data=b"")])


def test_missing_or_forged_seal_is_a_problem():
    blocks = chain(2)
    head = head_of(blocks[-1])
    assert verify(blocks, base=Head(), last=head.n, seal=None).problems == ("the seal is missing",)
    assert problems(blocks, signed=lambda _message, _signature: False) == ("the seal's signature is not valid",)


@pytest.fixture
def path():
    directory = in_memory()
    yield directory / "ledger.db"
    shutil.rmtree(directory)


def tampered(path, statement, *values):
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def written(path, *, key=None, rows=20, limits=LedgerLimits(reserve_bytes=0, seal_seconds=0)):  # noqa: B008 - a frozen value
    ledger = Ledger.open(path, limits, seal=key.sign if key else None)
    for n in range(rows):
        ledger.commit([store(n)])
    ledger.close()


def test_rows_say_what_was_decided_and_done_and_nothing_of_the_content(path):
    ledger = Ledger.open(path, LedgerLimits(reserve_bytes=0, seal_seconds=0))
    redaction = Redaction(counts={"person": 2, "plate": 1}, model_digest=MODEL)
    held = Store(record=record(2, route=(), regions=("cn", "hk")), reason="position.unknown")
    ledger.commit([Store(record=record(1, route=("a", "b")), redaction=redaction), held])
    ledger.commit([delivered(1, "a", 16), refused(data_class="cabin", regions=("cn",))])
    ledger.commit([Rejected(id="id-2", endpoint="a", code=0x87, time_ns=NOW)])
    ledger.commit([Noted(name="policy", value="7", time_ns=NOW)])
    ledger.close()
    rows = [{k: v for k, v in row.items() if k not in {"chain", "time_ns"}} for row in export(path)]
    both = {"class": "telemetry", "candidates": "cn"}
    hk = {"class": "telemetry", "candidates": "cn,hk", "id": "id-2"}
    masked = {"model": MODEL, "pictures": 1, "counts": "person=2,plate=1"}
    assert rows == [
        {"n": 1, "what": "stored", "id": "id-1", "decision": "pending", "route": "a,b", **both, **masked},
        {"n": 2, "what": "stored", "decision": "held", "reason": "position.unknown", **hk},
        {"n": 3, "what": "delivered", "id": "id-1", "endpoint": "a", "code": 16, **both},
        {
            "n": 4,
            "what": "refused",
            "decision": "refused",
            "class": "cabin",
            "candidates": "cn",
            "reason": "policy.no-rule",
        },
        {"n": 5, "what": "refused", "endpoint": "a", "code": 135, "reason": "endpoint.rejected-135", **hk},
        {"n": 6, "what": "noted", "name": "policy", "value": "7"},
    ]


def test_exported_rows_can_be_verified_without_the_agent(path):
    written(path)
    digest = GENESIS
    for row in export(path):
        expected = row.pop("chain")
        plain = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        digest = link(digest, plain)
        assert digest.hex() == expected


def test_chain_goes_on_over_restarts_and_is_sealed_at_each_sweep_and_end(path):
    written(path)
    written(path.with_name("other.db"))
    ledger = Ledger.open(path, LedgerLimits(reserve_bytes=0, seal_seconds=0))
    ledger.commit([delivered(n) for n in range(5)])
    assert verify_file(path).intact
    assert verify_file(path).sealed == 20
    ledger.sweep(NOW)
    assert verify_file(path).sealed == 25
    ledger.close()
    assert verify_file(path).intact


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET data = (SELECT data FROM audit WHERE first = 3) WHERE first = 4",
        "DELETE FROM audit WHERE first = 1",
        "DELETE FROM audit WHERE first = 10",
        "DELETE FROM audit WHERE first > 15",
        "UPDATE audit SET first = first + 1000 WHERE first > 15",
        "UPDATE counter SET number = number - 1 WHERE state = 'audit'",
        "UPDATE audit SET digest = zeroblob(32) WHERE first = 20",
    ],
)
def test_tampering_with_the_file_is_found(path, statement):
    written(path)
    assert verify_file(path).intact
    tampered(path, statement)
    assert not verify_file(path).intact


def test_tail_cut_off_together_with_its_count_is_found_by_the_seal(path):
    written(path)
    tampered(path, "DELETE FROM audit WHERE first > 15")
    tampered(path, "UPDATE counter SET number = 15 WHERE state = 'audit'")
    assert verify_file(path).problems == ("rows 16 to 20 were cut off",)


def test_agent_goes_on_after_tampering_and_the_break_stays_visible(path):
    written(path)
    tampered(path, "DELETE FROM audit WHERE first > 15")
    written(path, rows=0)
    ledger = Ledger.open(path, LedgerLimits(reserve_bytes=0, seal_seconds=0))
    ledger.commit([delivered(1)])
    ledger.close()
    assert not verify_file(path).intact


def test_signed_seal_cannot_be_made_without_the_key(path):
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    written(path, key=key)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert verify_file(path, signed_by(pem)).intact
    wrong = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert verify_file(path, signed_by(wrong)).problems == ("the seal's signature is not valid",)
    seal = path.with_name("ledger.db.seal")
    seal.write_text(seal.read_text().replace('"n":20', '"n":19'))
    assert not verify_file(path, signed_by(pem)).intact
    seal.write_text("not JSON")
    assert "not readable" in verify_file(path).problems[0]


def test_log_is_bounded_by_size_and_still_verifies(path):
    limits = LedgerLimits(reserve_bytes=0, seal_seconds=0, audit_bytes=20_000)
    ledger = Ledger.open(path, limits)
    for n in range(400):
        ledger.commit([store(n)])
        if n % 20 == 0:
            ledger.sweep(NOW)
    ledger.sweep(NOW)
    first = verify_file(path)
    assert first.intact
    assert first.first > 100
    with sqlite3.connect(path) as connection:
        assert 10_000 < connection.execute("SELECT sum(length(data)) FROM audit").fetchone()[0] <= 20_000
    connection.close()
    ledger.close()
    tampered(path, "DELETE FROM audit WHERE first <= ?", first.first + 5)
    assert not verify_file(path).intact


def test_rows_that_no_seal_covers_yet_are_not_dropped(path):
    ledger = Ledger.open(path, LedgerLimits(reserve_bytes=0, seal_seconds=1000, audit_bytes=3000))
    for n in range(60):
        ledger.commit([store(n)])
        if n % 20 == 0:
            ledger.sweep(NOW)
            assert verify_file(path).intact
    report = verify_file(path)
    assert (report.intact, report.sealed) == (True, 1)
    ledger.close()


def test_expired_and_evicted_records_are_audited(path):
    ledger = Ledger.open(path, LedgerLimits(reserve_bytes=0, seal_seconds=0, lane_bytes=3 * 612))
    ledger.commit([store(n, ttl=10) for n in range(4)])
    ledger.sweep(NOW + 60 * SECOND)
    ledger.close()
    ended = [(row["what"], row["id"], row["reason"]) for row in export(path) if row["what"] != "stored"]
    assert ended == [
        ("evicted", "id-0", "ledger.limit"),
        *(("expired", f"id-{n}", "ledger.ttl") for n in (1, 2, 3)),
    ]


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["audit", *map(str, arguments)])
    return parsed.run(parsed)


def test_command_prints_the_rows_and_the_verdict(path, capsys):
    written(path, rows=3)
    assert command("export", path) == 0
    assert [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()] == ["id-0", "id-1", "id-2"]
    assert command("verify", path) == 0
    assert "rows 1 to 3 intact, sealed to 3" in capsys.readouterr().out
    tampered(path, "DELETE FROM audit WHERE first = 2")
    assert command("verify", path) == 1
    assert "NOT INTACT" in capsys.readouterr().out


def test_command_leaves_nothing_beside_a_file_that_is_no_ledger(path):
    path.write_bytes(b"not a database " * 100)
    for action in ("verify", "export"):
        with pytest.raises(LedgerError, match="damaged"):
            command(action, path)
    assert list(path.parent.iterdir()) == [path]


def test_command_says_which_file_is_missing(path):
    with pytest.raises(LedgerError, match="there is no ledger"):
        command("verify", path)
    written(path, rows=1)
    with pytest.raises(LedgerError, match="absent"):
        command("verify", path, "--key", path.with_name("absent.pem"))


def test_export_goes_on_behind_rows_that_are_dropped_meanwhile():
    folder = in_memory()
    path = folder / "ledger.db"
    ledger = Ledger.open(path, LedgerLimits(audit_bytes=400_000, reserve_bytes=65536))
    numbers = iter(range(1, 10_000))
    for _ in range(1300):
        ledger.commit([store(next(numbers), size=10)])
    rows = export(path)
    seen = [next(rows)["n"] for _ in range(200)]
    for _ in range(1500):
        ledger.commit([store(next(numbers), size=10)])
    for _ in range(2):
        ledger.sweep(NOW)
    rest = list(rows)
    seen += [row["n"] for row in rest]
    gaps = [(one, other) for one, other in itertools.pairwise(seen) if other != one + 1]
    assert len(gaps) == 1
    assert seen[-1] == 2801
    (told,) = [row["through"] for row in rest if row["what"] == audit.CHECKPOINT]
    assert told + 1 == gaps[0][1]
    ledger.close()
    shutil.rmtree(folder)
