"""Running consumers as processes of their own, and the Node reader of tests/clients."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import nodejs
import stream

SECONDS = 60
SUBSCRIPTIONS = ("log_type error", "log_type warning", "log_type notice", "log_type subscribe")


@asynccontextmanager
async def consumer(*command, **options):
    """Run a consumer; it is ended with the block."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdin=pipe, stdout=pipe, stderr=pipe, limit=1 << 24, **options
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def subscribed(broker, topic_filter, times=1):
    """Return once the log of a broker with `log_type subscribe` names so many subscriptions to the filter."""
    async with consumer("tail", "-n", "+1", "-F", broker.log_path) as tail:
        async for line in tail.stdout:
            times -= topic_filter in line.decode(errors="replace")
            if times == 0:
                return


async def until(condition):
    """Return once a fact about another process, which cannot wake us, holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def read_by_node(port, public_key, messages):
    """What tests/clients/records.mjs says of these messages."""
    command = nodejs.command("records.mjs", port, "+/+/#", len(messages), stream.SIGNER.key_id, public_key)
    async with asyncio.timeout(SECONDS), consumer(*command) as process:
        ready = await process.stdout.readline()
        assert json.loads(ready or b"{}").get("ready"), (await process.stderr.read()).decode()
        await asyncio.to_thread(stream.publish, port, messages)
        lines = [json.loads(line) async for line in process.stdout]
        assert await process.wait() == 0, (await process.stderr.read()).decode()
    return lines


async def judged_by_the_official_parser(document, lines):
    """What tests/clients/asyncapi.mjs says of the document in this file, and of messages against it."""
    async with asyncio.timeout(SECONDS), consumer(*nodejs.command("asyncapi.mjs", document)) as process:
        out, err = await process.communicate("\n".join(map(json.dumps, lines)).encode())
    assert process.returncode == 0, err.decode()
    return json.loads(out)
