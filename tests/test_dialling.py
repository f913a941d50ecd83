"""A connection that is being made ends at once when it is given up: nothing of it goes on behind the event loop."""

import asyncio
import contextlib
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from consumers import until
from endpoints import bench

from agent.mqtt import connection
from agent.mqtt.dialling import dialled
from agent.mqtt.packets import Session
from agent.uplink import reach
from agent.uplink.egress import PeerRules, dial
from agent.uplink.group import UplinkGroup

HERE = "127.0.0.1"
SESSION = Session(host="never used", port=1, client_id="car")
SYN_SENT = "02"


class Silent:
    """A server that never answers the TLS hello, and notes how each connection to it ended."""

    def __init__(self):
        self.greeted, self.ended = asyncio.Event(), asyncio.Queue()

    async def serve(self, reader, writer):
        with contextlib.closing(writer):
            try:
                while await reader.read(65_536):
                    self.greeted.set()
            except ConnectionResetError:
                self.ended.put_nowait("reset")
            else:
                self.ended.put_nowait("closed")


@pytest.fixture
async def silent(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 3600.0)
    made = Silent()
    async with await asyncio.start_server(made.serve, HERE, 0) as server:
        made.rules = PeerRules(host=HERE, port=server.sockets[0].getsockname()[1])
        yield made


async def test_handshake_that_is_cancelled_is_reset(silent, patience):
    async with asyncio.timeout(patience):
        dialling = asyncio.create_task(dial(silent.rules, SESSION))
        await silent.greeted.wait()
        dialling.cancel()
        assert await silent.ended.get() == "reset"


async def out_of_reach(it, _uplinks):
    it.board.reachable = lambda _: False


async def reloaded(_it, uplinks):
    await uplinks.apply({}, None)


async def stopped(_it, uplinks):
    uplinks.cancel()


@pytest.mark.parametrize("change", [out_of_reach, reloaded, stopped])
async def test_handshake_with_an_endpoint_that_must_not_be_connected_to_any_more_is_reset(
    silent, patience, monkeypatch, change
):
    monkeypatch.setattr(reach, "LOOK_SECONDS", 0.02)
    async with asyncio.timeout(patience), bench({"a": silent.rules.port}) as it:
        uplinks = UplinkGroup(it.board, it.make)
        await it.store([1])
        await uplinks.apply({"a": replace(it.options_of("a"), peer=silent.rules)}, it.run)
        await silent.greeted.wait()
        await change(it, uplinks)
        assert await silent.ended.get() == "reset"


def unanswered(port):
    """Local addresses of connections to this port whose SYN nobody has answered yet."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == SYN_SENT}


async def test_connection_that_nobody_answers_is_not_asked_for_again_once_it_is_cancelled(patience):
    async with asyncio.timeout(patience):
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(socket.socket())
            full.bind((HERE, 0))
            full.listen(0)
            address = full.getsockname()
            for _ in range(8):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(address)
            others = unanswered(address[1])
            assert others, "the listener's backlog is full"
            dialling = asyncio.create_task(dialled(replace(SESSION, host=HERE, port=address[1])))
            await until(lambda: unanswered(address[1]) != others)
            dialling.cancel()
            await asyncio.wait([dialling])
            assert unanswered(address[1]) == others


async def test_addresses_of_a_host_are_tried_in_turn(patience, monkeypatch):
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port)) for name in ("127.0.0.9", HERE)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        async with asyncio.timeout(patience):
            with await dialled(replace(SESSION, host="two.example.com", port=port)) as sock:
                assert sock.getpeername() == (HERE, port)
            found.pop()
            with pytest.raises(ConnectionRefusedError):
                await dialled(replace(SESSION, host="two.example.com", port=port))
