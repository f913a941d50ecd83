"""`residency-tools listen` as a process: nothing lost, nothing stored twice, everything wrong reported."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import json
import re
import signal
import sqlite3
import sys
from contextlib import AsyncExitStack, closing
from pathlib import Path

import msgspec
import pytest
import stream
from authority import Authority
from consumers import SECONDS, SUBSCRIPTIONS, consumer, subscribed, until

from agent.errors import EndpointError
from agent.mqtt import backoff
from agent.mqtt.packets import Outgoing, Session
from tools.__main__ import main as tools_main
from tools.brokers import free_port, mosquitto, mosquitto_path
from tools.listening import receiving
from tools.listening.board import Board
from tools.listening.inbox import Inbox

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.pem"
    path.write_bytes(stream.PUBLIC_PEM)
    return path


def _command(port, keys, *more, allow="cn,hk"):
    common = ("--keys", keys, "--allow", allow, "--json")
    return [sys.executable, "-m", "tools", "listen", "--port", port, *common, *more]


def _stored(folder):
    return [line for path in sorted(folder.rglob("region=*/**/*.jsonl")) for line in stream.lines(path)]


async def _figures(process):
    """The figures and the exit status of a listener that ends."""
    out, err = await process.communicate()
    return json.loads(out or b"{}"), process.returncode, err.decode()


@needs_mosquitto
async def test_bad_records_are_reported_and_never_stored(keys, tmp_path):
    secret = b"\xff\xd8 a picture from elsewhere \xff\xd9"
    away = stream.record(1, regions=("us",), datacontenttype="image/jpeg")
    messages = [
        stream.outgoing(stream.record(0), stream.data_of(0)),
        stream.outgoing(stream.record(2), stream.data_of(2), wire="binary"),
        stream.outgoing(stream.record(2), stream.data_of(2)),
        stream.outgoing(stream.record(3), b"", signer=stream.STRANGER),
        stream.outgoing(stream.record(4), b"", signer=None),
        stream.outgoing(away, secret),
        Outgoing(topic="cn/car-7/x", payload=b"junk"),
        stream.outgoing(stream.record(5), b"{}"),
    ]
    out = tmp_path / "out"
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        listening = _listened(_command(broker.port, keys, "--name", "a", "--count", 3, "--out", out))
        ending = asyncio.create_task(listening)
        await subscribed(broker, "+/+/#")
        await asyncio.to_thread(stream.publish, broker.port, messages)
        figures, status, _ = await ending
    assert status == 1
    assert figures["verdicts"] == {
        "good": 4, "notice": 0, "malformed": 1, "unsigned": 1, "forged": 1, "misplaced": 1,
    }  # fmt: skip
    region = figures["regions"]["cn"]
    assert (region["good"], region["duplicates"], region["missing"]) == (3, 1, 3)
    assert [line["sequence"][-1] for line in _stored(out)] == ["0", "2", "5"]
    refusals = stream.lines(out / "refused-a.jsonl")
    assert sorted(line["verdict"] for line in refusals) == ["forged", "malformed", "misplaced", "unsigned"]
    assert not any(b"from elsewhere" in path.read_bytes() for path in out.rglob("*") if path.is_file())


@needs_mosquitto
async def test_records_of_batches_are_stored_and_refused_one_by_one(keys, tmp_path):
    out, count = tmp_path / "out", 600
    good = [stream.outgoing(stream.record(number), stream.data_of(number)) for number in range(count)]
    forged = stream.outgoing(stream.record(count), b"", signer=stream.STRANGER)
    torn = stream.batched(good[:3])
    messages = [
        *(stream.batched(good[at : at + 200], compress=at > 0) for at in range(0, count, 200)),
        stream.batched([*good[:10], forged]),
        msgspec.structs.replace(torn, payload=torn.payload[:-1]),
        stream.outgoing(stream.record(count + 1), b"{}"),
    ]
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        ending = asyncio.create_task(
            _listened(_command(broker.port, keys, "--name", "a", "--count", count + 1, "--out", out))
        )
        await subscribed(broker, "+/+/#")
        await asyncio.to_thread(stream.publish, broker.port, messages)
        figures, status, _ = await ending
    assert status == 1
    assert (figures["verdicts"]["good"], figures["refused"]) == (count + 11, 2)
    assert (figures["verdicts"]["forged"], figures["verdicts"]["malformed"]) == (1, 1)
    region = figures["regions"]["cn"]
    assert (region["good"], region["duplicates"], region["missing"]) == (count + 1, 10, 1)
    stored = _stored(out)
    assert sorted(int(line["sequence"]) for line in stored) == [*range(count), count + 1]
    refusals = stream.lines(out / "refused-a.jsonl")
    assert sorted((line["verdict"], line["id"] is None) for line in refusals) == [
        ("forged", False),
        ("malformed", True),
    ]


def _seen(folder):
    """How many records the listeners of a folder have taken together."""
    path = folder / ".listen.sqlite"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path, timeout=SECONDS)) as db:
        return db.execute("SELECT count(*) FROM seen").fetchone()[0]


@needs_mosquitto
@pytest.mark.parametrize("listeners", [1, 2, 4])
async def test_listeners_share_a_stream_without_loss_and_without_double_output(keys, tmp_path, listeners):
    out, records = tmp_path / "out", [stream.record(number) for number in range(200)]
    messages = [stream.outgoing(one, stream.data_of(one.sequence)) for one in records]
    twice = [messages[at // 2] for at in range(2 * len(messages))]  # the two copies meet different listeners
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        command = _command(broker.port, keys, "--group", "g", "--out", out, "--roll-rows", 45)
        processes = [
            await stack.enter_async_context(consumer(*command, "--name", f"l{number}")) for number in range(listeners)
        ]
        await subscribed(broker, "$share/g/+/+/#", times=listeners)
        await asyncio.to_thread(stream.publish, broker.port, twice)
        await until(lambda: _seen(out) == len(records))
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ends = [await _figures(process) for process in processes]
    assert [status for _, status, _ in ends] == [0] * listeners
    ids = [line["id"] for line in _stored(out)]
    assert len(ids) == len(set(ids)) == len(records)
    assert all(figures["verdicts"]["good"] for figures, _, _ in ends)
    assert sum(figures["regions"]["cn"]["duplicates"] for figures, _, _ in ends) > 0
    assert ends[-1][0]["regions"]["cn"]["missing"] == 0


async def _listened(command):
    async with consumer(*command) as process:
        return await _figures(process)


@needs_mosquitto
async def test_a_killed_listener_loses_nothing_and_stores_nothing_twice(keys, tmp_path):
    out, records = tmp_path / "out", [stream.record(number) for number in range(300)]
    messages = [stream.outgoing(one, stream.data_of(one.sequence)) for one in records]
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--name", "a", "--out", out, "--roll-rows", 20)
        async with consumer(*command) as process:
            await subscribed(broker, "+/+/#")
            sending = asyncio.create_task(asyncio.to_thread(stream.publish, broker.port, messages))
            await until(lambda: list(out.rglob("region=*/**/*.jsonl")))
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await sending
        assert len(_stored(out)) < len(records)
        figures, status, _ = await _listened([*command, "--idle", "1"])
    assert status == 0
    assert figures["regions"]["cn"]["missing"] == 0
    ids = [line["id"] for line in _stored(out)]
    assert len(ids) == len(set(ids)) == len(records)


@needs_mosquitto
async def test_a_killed_listener_without_a_name_writes_what_it_took_when_it_is_started_again(keys, tmp_path):
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--out", tmp_path, "--roll-seconds", 600)
        async with consumer(*command) as process:
            await subscribed(broker, "+/+/#")
            await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(stream.record(1), b"{}")])
            await until(lambda: _spooled(tmp_path / ".listen.sqlite"))
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await _listened([*command, "--idle", "0"])
    assert [line["id"] for line in _stored(tmp_path)] == [stream.record(1).id]


def _spooled(path):
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT count(*) FROM spool").fetchone()[0]


@needs_mosquitto
async def test_a_backlog_larger_than_the_queue_does_not_keep_a_listener_from_subscribing(monkeypatch):
    monkeypatch.setattr(receiving, "BATCH", 2)  # also the length of the queue in front of the SUBACK
    records = [stream.record(number) for number in range(40)]
    async with mosquitto() as broker, asyncio.timeout(SECONDS):
        session = Session(
            host=broker.host,
            port=broker.port,
            client_id="a",
            clean_start=False,
            session_expiry_s=60,
            receive_maximum=40,
        )
        options = receiving.Options(
            session=session, filters=("+/+/#",), expectations=stream.HERE, consumer="a", idle_s=0
        )
        await _received(options)
        await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(one, b"{}") for one in records])
        board = await _received(dataclasses.replace(options, idle_s=None, count=len(records)))
        rest = await _received(dataclasses.replace(options, idle_s=0.5))
    assert board.good == len(records)
    assert rest.verdicts.total() == 0, "what was acknowledged does not come again"


async def _received(options):
    board, inbox = Board(started=0.0), Inbox(None, "a")
    await receiving.Listener(options=options, inbox=inbox, board=board).run_loop()
    inbox.close()
    return board


async def test_after_a_stable_connection_a_listener_comes_back_without_the_delay_of_losses_before(monkeypatch):
    monkeypatch.setattr(backoff, "STABLE_SECONDS", -1.0)
    monkeypatch.setattr(backoff, "delays", lambda *_, **__: iter([0.0, 1e6]))
    board, served = Board(started=0.0), []

    class Losing(receiving.Listener):
        async def _serve(self, _connection):
            board.connected = True
            served.append(None)
            if len(served) == 4:
                self.stop.set()
            raise EndpointError("lost")

    session = Session(host="127.0.0.1", port=1, client_id="a")
    options = receiving.Options(session=session, filters=("#",), expectations=stream.HERE, consumer="a")
    async with asyncio.timeout(SECONDS):
        inbox = Inbox(None, "a")
        await Losing(options=options, inbox=inbox, board=board).run_loop()
        inbox.close()
    assert len(served) == 4


@needs_mosquitto
async def test_a_signal_ends_a_listener_in_order(keys, tmp_path):
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--name", "a", "--out", tmp_path / "out", "--roll-seconds", 600)
        async with consumer(*command) as process:
            await subscribed(broker, "+/+/#")
            sent = [stream.outgoing(stream.record(number), b"{}") for number in (1, 2)]
            await asyncio.to_thread(stream.publish, broker.port, sent)
            process.send_signal(signal.SIGTERM)
            _, status, _ = await _figures(process)
        figures, _, _ = await _listened([*command, "--idle", "1"])
    assert status == 0
    assert len(_stored(tmp_path / "out")) == 2
    assert figures["refused"] == 0


@needs_mosquitto
async def test_a_listener_that_cannot_come_back_says_why(keys, tmp_path):
    async with (
        asyncio.timeout(SECONDS),
        mosquitto(config_lines=SUBSCRIPTIONS) as broker,
        consumer(*_command(broker.port, keys, "--out", tmp_path, "--roll-seconds", 600)) as process,
    ):
        await subscribed(broker, "+/+/#")
        await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(stream.record(1), b"{}")])
        await until(lambda: _spooled(tmp_path / ".listen.sqlite"))
        await broker.stop()
        told = b""
        while told.count(b"trying again") < 2:
            told += await process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        await _figures(process)
    assert b"cannot be reached" in told or b"refused" in told


def _run(capsys, command):
    """The exit status and standard error of a command, run in this process."""
    status = tools_main(list(map(str, command[3:])))
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "wanted", "reason"),
    [
        (("--keys", "no.pem", "--allow", "cn"), 3, "no.pem"),
        (("--unverified", "--policy", "no.toml", "--endpoint", "x"), 2, "no.toml"),
        (("--unverified", "--allow", "cn", "--name", "a/b"), 2, "--name"),
        (("--unverified", "--allow", "cn"), 3, "cannot be reached|refused"),
    ],
)
def test_what_cannot_run_ends_with_a_status_and_a_reason(capsys, more, wanted, reason):
    status, told = _run(capsys, [*_command(free_port(), "")[:6], *more])
    assert status == wanted
    assert re.search(reason, told)


def test_an_endpoint_that_the_policy_does_not_know_is_named(capsys):
    example = Path(__file__).parent.parent / "systemd" / "policy.example.toml"
    status, told = _run(
        capsys, [*_command(free_port(), "")[:6], "--unverified", "--policy", example, "--endpoint", "atlantis"]
    )
    assert status == 2
    assert "atlantis" in told


def test_two_listeners_of_one_name_do_not_write_to_one_folder(capsys, keys, tmp_path):
    with (tmp_path / ".a.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, told = _run(capsys, _command(free_port(), keys, "--name", "a", "--out", tmp_path))
    assert status == 3
    assert "another listener named a" in told


@needs_mosquitto
async def test_a_key_may_have_a_name_of_its_own_and_mqtt_3_1_1_is_enough(keys):
    signer = dataclasses.replace(stream.SIGNER, key_id="car-7.2026")
    async with mosquitto() as broker, asyncio.timeout(SECONDS):
        trust = ("--keys", f"car-7.2026={keys}", "--protocol", "3.1.1", "--name", "a")
        command = [*_command(broker.port, keys)[:6], *trust, "--allow", "cn", "--json"]
        await _listened([*command, "--idle", "0"])
        await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(stream.TELEMETRY, b"{}", signer=signer)])
        figures, status, _ = await _listened([*command, "--count", "1"])
    assert (figures["good"], status) == (1, 0)


@needs_mosquitto
async def test_over_tls_only_a_broker_of_the_trusted_authority_is_listened_to(keys, tmp_path):
    good, other = Authority(tmp_path), Authority(tmp_path, "other")
    server = good.issue("127.0.0.1")
    lines = (f"certfile {server.cert}", f"keyfile {server.key}")
    async with mosquitto(config_lines=lines) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--name", "a")
        await _listened([*command, "--ca-file", good.file, "--idle", "0"])
        sent = [stream.outgoing(stream.record(1), b"{}")]
        await asyncio.to_thread(stream.publish, broker.port, sent, ca_file=good.file)
        _, status, told = await _listened([*command, "--ca-file", other.file, "--count", "1"])
        figures, _, _ = await _listened([*command, "--ca-file", good.file, "--count", "1"])
    assert status == 3
    assert "certificate" in told
    assert "Traceback" not in told
    assert figures["good"] == 1


@needs_mosquitto
async def test_without_json_the_table_is_printed_once_at_the_end():
    async with mosquitto() as broker, asyncio.timeout(SECONDS):
        command = [*_command(broker.port, "")[:6], "--unverified", "--allow", "*", "--idle", "0"]
        async with consumer(*command) as process:
            out, _ = await process.communicate()
    assert out.decode().count("refused 0 (") == 1
    assert process.returncode == 0
