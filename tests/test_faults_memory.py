"""What an agent holds in memory does not grow with what waits on its disk."""

import asyncio
import json
from pathlib import Path

from harness import SHENZHEN, car

MIB = 1 << 20
MOST_RESIDENT_BYTES = 160 * MIB  # about 60 MiB at rest, and the queues of both sessions and of the committer
MESSAGES, PAYLOAD_BYTES = 1500, 100_000


def resident_bytes(pid):
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


async def test_memory_and_disk_stay_bounded_while_an_endpoint_is_away_and_messages_pour_in(tmp_path, patience):
    limits = (
        "[limits]\npayload_bytes = 2000000\nqueue_bytes = 8388608\nledger_bytes = 67108864\nlane_bytes = 33554432\n"
    )
    async with asyncio.timeout(8 * patience), car(tmp_path) as it:
        it.configure()
        text = it.config.read_text()
        start = text.index("[limits]")
        it.config.write_text(text[:start] + limits + text[text.index("[paths]") :])
        await it.start()
        await it.at(SHENZHEN)
        await it.outer["cn"].kill()
        body = "all is well " * (PAYLOAD_BYTES // 12)
        for number in range(MESSAGES):
            it.telemetry(number, body=body)
            if number % 50 == 0:
                it.drive(SHENZHEN)
                await asyncio.sleep(0.01)
        await it.until(lambda: it.counts()["received"] == MESSAGES)
        counts = it.counts()
        assert counts["conserved"], counts
        assert counts["evicted"] > 0, counts
        assert counts["pending_bytes"] <= 33_554_432
        assert resident_bytes(it.process.pid) < MOST_RESIDENT_BYTES
        on_disk = sum(path.stat().st_size for path in (tmp_path / "state").rglob("*") if path.is_file())
        assert on_disk < 128 * MIB
        await it.outer["cn"].start()
        await it.until(lambda: it.counts()["pending"] == 0)

        def arrived():
            return {json.loads(row.data)["n"] for row in it.received if "telemetry" in row.topic}

        await it.until(lambda: len(arrived()) == counts["delivered"] + counts["pending"])
        assert MESSAGES - 1 in arrived(), "the newest stay, the oldest of a priority go"
