"""SIGKILL at every step of the line and at random: nothing lost, nothing misrouted, nothing unredacted."""

import asyncio
import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from harness import SHENZHEN, car
from killpoints import BATCH_POINTS, POINTS
from PIL import Image

LAUNCHER = Path(__file__).with_name("killpoints.py")
SECRET = b"UNREDACTED-CANARY-" + bytes(range(48, 90))


def jpeg(seed, size=(640, 480)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=80, comment=SECRET)
    return buffer.getvalue()


class Traffic:
    """What a car sends, and what must come of it."""

    def __init__(self, it):
        self.it, self.numbers, self.times = it, [], []

    def telemetry(self):
        self.numbers.append(len(self.numbers))
        self.it.telemetry(self.numbers[-1])

    def picture(self):
        self.times.append(time.time_ns())
        user = [("time", str(self.times[-1]))]
        self.it.client.publish("vehicle/camera/front", self.frame, user)

    frame = jpeg(1)

    async def burst(self, place):
        """Telemetry before the first fix is held, and settled by what follows."""
        self.telemetry()
        for _ in range(3):
            self.it.drive(place)
            await asyncio.sleep(0.05)
        self.telemetry()

    @property
    def sent(self):
        return len(self.numbers) + len(self.times)

    def settled(self):
        """All was taken, and delivered or held: a fix that an agent took with it to its death may settle nothing."""
        counts = self.it.counts()
        return counts["received"] >= self.sent and not counts["pending"] and self.arrived + counts["held"] >= self.sent

    @property
    def arrived(self):
        """Different messages at the endpoint."""
        pictures = {row.attributes.time_ns for row in self.it.received if "camera" in row.topic}
        assert pictures <= set(self.times)
        return len(set(self.it.numbers("cn"))) + len(pictures)

    def check(self):
        """Everything exactly once in the books, in one region only, and nowhere unredacted."""
        it = self.it
        assert {row.region for row in it.received} == {"cn"}
        counts = it.counts()
        assert counts["conserved"]
        assert counts["received"] == self.sent, "a redelivery was taken twice, or none at all"
        assert counts["delivered"] == self.arrived > 0
        assert (counts["refused"], counts["expired"], counts["evicted"]) == (0, 0, 0)
        sequences = {row.attributes.sequence for row in it.received}
        assert sequences == set(range(1, counts["delivered"] + 1)), "the consumer would see gaps"
        for path in it.folder.rglob("*"):
            if path.is_file():
                assert SECRET not in path.read_bytes(), path
        assert all(SECRET not in row.payload for row in it.received)


async def launch(it, point=None, count=1):
    environment = os.environ | ({"KILLPOINT": f"{point}:{count}"} if point else {})
    with (it.folder / "agent.log").open("ab") as log:
        it.process = await asyncio.create_subprocess_exec(
            sys.executable, LAUNCHER, "run", it.config, stdout=log, stderr=log, env=environment
        )
    return it.process


async def ended(it, traffic, place):
    """Keep the car sending until the agent is dead."""
    process = it.process
    traffic.picture()
    while process.returncode is None:
        await traffic.burst(place)
        for _ in range(20):
            if process.returncode is not None:
                break
            await asyncio.sleep(0.05)
    it.process = None
    return process.returncode


async def begun(it):
    """The broker knows the agent's sessions from here on, and keeps what comes."""
    await it.start()
    await it.stop()
    return Traffic(it)


async def recovered(it, traffic):
    """A healthy agent settles all that is left; then it stops, so that the books hold still while they are checked."""
    await it.start()
    await it.at(SHENZHEN)
    await it.until(traffic.settled)
    await it.stop()
    await it.until(lambda: traffic.arrived == it.counts()["delivered"])


async def test_agent_killed_at_each_step_of_the_line_loses_nothing(tmp_path, patience):
    async with asyncio.timeout(len(POINTS) * patience), car(tmp_path) as it:
        it.configure(agent="[motion]\nmax_speed_mps = 100.0\n")
        traffic = await begun(it)
        for point in POINTS:
            await launch(it, point)
            assert await ended(it, traffic, SHENZHEN) == -signal.SIGKILL, f"{point} was never reached\n{it.log}"
        await recovered(it, traffic)
        traffic.check()
        assert it.numbers("hk") == []


async def test_agent_that_sends_batches_and_is_killed_at_each_step_of_it_loses_nothing(tmp_path, patience):
    async with asyncio.timeout((len(BATCH_POINTS) + 2) * patience), car(tmp_path) as it:
        batches = 'batch_records = 16\nbatch_compression = "zstd"\nin_flight = 1'
        it.configure(agent="[motion]\nmax_speed_mps = 100.0\n", endpoint=batches)
        traffic = await begun(it)
        for point in BATCH_POINTS:
            for _ in range(20):  # they wait in the in-car broker, and are ready together
                traffic.telemetry()
            await launch(it, point)
            assert await ended(it, traffic, SHENZHEN) == -signal.SIGKILL, f"{point} was never reached\n{it.log}"
        await recovered(it, traffic)
        traffic.check()
        assert max(row.company for row in it.received) > 1
        assert it.numbers("hk") == []


async def test_agent_killed_at_random_loses_nothing(tmp_path, patience, soak):
    kills, chance = soak or 20, random.Random(7)
    async with asyncio.timeout((kills + 3) * patience), car(tmp_path) as it:
        it.configure(agent="[motion]\nmax_speed_mps = 100.0\n")
        traffic = await begun(it)
        for _ in range(kills):
            process = await launch(it)
            killer = asyncio.get_running_loop().call_later(chance.uniform(0.8, 2.2), process.kill)
            assert await ended(it, traffic, SHENZHEN) == -signal.SIGKILL, it.log
            killer.cancel()
        await recovered(it, traffic)
        traffic.check()


async def test_message_that_waited_across_a_border_goes_to_no_wrong_region(tmp_path, patience):
    """The car sends in one region while the agent is down, crosses the border, and the agent starts in the other."""
    north, south = (22.545, 114.068), (22.465, 114.068)  # 3 and 6 km from the border
    rules = '[[rules]]\ntopic = "vehicle/telemetry/#"\naction = "forward"\nclass = "telemetry"\n'
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        it.configure(agent="[motion]\nmax_speed_mps = 1000.0\n", rules=rules)  # only the arrival is known
        await it.start()
        await it.at(north)
        await it.stop(signal.SIGKILL)
        for number in range(100, 110):
            it.telemetry(number)
        await asyncio.sleep(9)  # what the drive to the south takes at that speed
        await it.start()
        await it.at(south)
        await it.until(lambda: it.counts()["received"] == 10)
        await asyncio.sleep(2.5)  # longer than transport is taken to last
        it.drive(south)
        it.telemetry(2)
        await it.until(lambda: it.numbers("hk") == [2])
        await it.until(lambda: it.counts()["delivered"])
        counts = it.counts()
        assert (counts["held"], counts["delivered"], counts["conserved"]) == (10, 1, True)
