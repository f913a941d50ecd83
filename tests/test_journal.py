"""The log: what is said, how often, and what is never said."""

import asyncio
import io
import json
import logging
import re
import socket
import time

import pytest
from harness import LOK_MA_CHAU, RULES, SHENZHEN, Client, car
from test_end_to_end import jpeg

from agent import __main__ as command_line
from agent import daemon, journal
from agent.journal import Journal, Repeats
from tools.brokers import free_port


class Hand:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Hand()


@pytest.fixture
def said(clock):
    """A logger with a journal, and a function that gives the lines so far."""
    stream, logger = io.StringIO(), logging.getLogger("agent.of-a-test")
    handler = Journal(stream, clock)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, handler, lambda: stream.getvalue().splitlines()
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3), (logging.CRITICAL, 2)],
)
def test_line_begins_with_the_priority_that_journald_knows(said, level, priority):
    logger, _, lines = said
    logger.log(level, "a.thing", extra={"reason": 'two\nlines, "quoted"', "count": 3})
    assert lines() == [f'<{priority}>a.thing reason="two\\nlines, \\"quoted\\"" count=3']


def test_line_that_comes_again_is_counted_and_told_once_a_period(said, clock):
    logger, handler, lines = said
    for clock.now in range(150):
        logger.warning("uplink.lost", extra={"endpoint": "cn"})
    handler.flush()
    line = '<4>uplink.lost endpoint="cn"'
    assert lines() == [line, f"{line} repeated=59 within_s=60", f"{line} repeated=60 within_s=60"]
    handler.close()
    assert lines()[-1] == f"{line} repeated=30 within_s=29"


def test_count_is_told_although_the_line_never_comes_again(said, clock):
    logger, handler, lines = said
    for _ in range(3):
        logger.warning("a.thing")
    clock.now = 61
    handler.flush()
    assert lines() == ["<4>a.thing", "<4>a.thing repeated=2 within_s=61"]
    clock.now = 200
    handler.flush()
    logger.warning("a.thing")
    assert lines()[2:] == ["<4>a.thing"], "after a quiet period it is news again"


def test_error_of_one_endpoint_does_not_hide_that_of_another_nor_another_reason(said):
    logger, _, lines = said
    for _ in range(5):
        for endpoint in ("cn", "hk"):
            logger.warning("uplink.lost", extra={"endpoint": endpoint, "reason": "refused"})
    logger.warning("uplink.lost", extra={"endpoint": "cn", "reason": "another"})
    assert len(lines()) == 3


def test_lines_remembered_are_bounded_and_no_count_is_forgotten():
    repeats = Repeats(60.0, most=2)
    told = [line for event in ("a", "a", "b", "c", "a") for line in repeats.lines(event, 1.0)]
    assert told == ["a", "b", "a repeated=1 within_s=0", "c", "a"]


def test_words_of_a_library_are_not_told(said):
    _, handler, lines = said
    other = logging.getLogger("library-of-a-test")
    other.addHandler(handler)
    try:
        int("plate B-XY 123")
    except ValueError:
        other.exception("could not parse %s", "plate B-XY 123")
    finally:
        other.removeHandler(handler)
    assert lines() == ['<3>library.said library="library-of-a-test" error="ValueError"']


def test_log_that_nobody_takes_does_not_end_the_agent(said):
    logger, handler, _ = said
    handler.stream.close()
    logger.warning("a.thing")


def test_crash_of_the_agent_is_told_without_the_words_of_the_error(monkeypatch, capsys, tmp_path):
    async def fails(_):
        async with asyncio.TaskGroup() as group:
            group.create_task(broken(), name="broken")

    async def broken():
        journal.place_of(None)  # an AttributeError inside the agent

    async def fails_with_words(_):
        raise ValueError("plate B-XY 123")

    monkeypatch.setattr(command_line.assembly, "load", lambda _: None)
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    try:
        for run, wanted in ((fails, "AttributeError"), (fails_with_words, "ValueError")):
            monkeypatch.setattr(daemon, "run", run)
            assert command_line.main(["run", str(tmp_path / "agent.toml")]) == 1
            told = capsys.readouterr().err
            assert re.search(rf'^<2>agent.failed error="{wanted}" place="[\w/.: ]+"$', told, re.MULTILINE)
            assert "B-XY" not in told
    finally:
        root.handlers[:] = before
        logging.raiseExceptions = True


SECRETS = {
    "payload": "planted-payload-91",
    "topic": "planted-topic-92",
    "property": "planted-property-93",
    "source": "planted-source-94",
    "vehicle": "planted-vehicle-95",
    "password": "planted-password-96",
    "key": "planted-key-97-0123456789",
    "latitude": "22.516",
    "longitude": "114.068",
}
RULES_WITH_SECRET_TOPICS = (
    RULES
    + """[rules.fields]
pseudonymise = ["/driver"]
"""
)


async def drive_with_secrets(it):
    """Everything that may go wrong with a message, each with a secret in it."""
    payload, topic, now = SECRETS["payload"], SECRETS["topic"], [("time", str(time.time_ns()))]
    marked = [*now, ("who", SECRETS["property"])]
    publish = it.client.publish
    publish(f"vehicle/telemetry/{topic}", json.dumps({"driver": payload, "ts": time.time()}), marked)
    publish(f"vehicle/telemetry/{topic}", f"{{{payload}", marked)
    publish(f"vehicle/telemetry/{topic}", f'{{"ts": "{payload}"}}', marked)
    publish(f"vehicle/telemetry/{topic}", payload.encode() + bytes(range(256)) * 20, marked)
    publish(f"vehicle/other/{topic}", payload, marked)
    publish("vehicle/camera/front", jpeg(comment=payload.encode()), marked)
    publish("vehicle/camera/front", jpeg(comment=payload.encode())[:-300], marked)
    publish("vehicle/camera/cabin", jpeg(comment=payload.encode()), marked)
    publish("vehicle/camera/front", payload, [("time", payload)])
    publish("vehicle/gnss", payload)
    publish("vehicle/gnss", json.dumps({"lat": payload, "lon": SECRETS["longitude"]}))
    await it.until(lambda: it.counts()["received"] >= 9)


async def test_no_secret_stands_in_log_metrics_or_status_message(tmp_path, patience):
    port, told = free_port(), []
    (tmp_path / "password").write_text(SECRETS["password"])
    (tmp_path / "key").write_text(SECRETS["key"])
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        it.configure(
            agent=f'[credentials.cn]\nusername = "{SECRETS["vehicle"]}"\npassword_file = "password"\n'
            f'[signing]\npseudonym_key_file = "key"\n[metrics]\nport = {port}\n[status]\ntopic = "agent/status"\n',
            rules=RULES_WITH_SECRET_TOPICS,
        )
        text = it.config.read_text().replace("urn:test:car", f"urn:{SECRETS['source']}")
        it.config.write_text(text.replace('name = "car"', f'name = "{SECRETS["vehicle"]}"'))
        screen = Client(it.inner.port, "screen", lambda *arguments: told.append(arguments[-1].payload.decode()))
        await screen.subscribe("agent/status")
        await it.start("debug")
        await it.at(SHENZHEN)
        await drive_with_secrets(it)
        await it.at(LOK_MA_CHAU)
        await it.outer["cn"].kill()
        await drive_with_secrets(it)
        await it.until(lambda: "uplink.lost" in it.log)
        await it.inner.kill()
        await it.until(lambda: "intake.lost" in it.log)
        with socket.create_connection(("127.0.0.1", port)) as scraper:
            scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            told.append(await asyncio.to_thread(lambda: b"".join(iter(lambda: scraper.recv(65_536), b"")).decode()))
        screen.close()
        told.append(it.log)
    assert any("residency_conserved" in text for text in told)
    assert any('"running"' in text for text in told)
    for what, secret in SECRETS.items():
        assert not [text for text in told if secret in text], what
