from __future__ import annotations

import pytest

from tools.brokers import mosquitto_path
from tools.client import connected, new_client
from tools.demo import BUNDLED
from tools.scene import agent_values, policy_values
from tools.trial import Setting, prepared, stage

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
WAIT_SECONDS = 20
COUNT = 40  # the window of the pictures' session is 8


async def test_session_that_resumes_with_more_than_a_window_of_waiting_messages_is_connected_again(tmp_path):
    setting = Setting(
        agent=agent_values(1), policy=policy_values(), recording=BUNDLED, folder=tmp_path / "run", broker="mosquitto"
    )
    with prepared(setting.folder) as spool:
        status = await _resumed(setting, spool)
    assert status["counts"]["refused"] == COUNT


async def _resumed(setting, spool):
    """The status once an agent that was killed has all that was published meanwhile."""
    async with stage(setting, spool) as running:
        await running.agent.kill()
        client = new_client(running.car, "camera")
        with connected(client, running.car):
            sent = [client.publish("vehicle/camera/front", b"\xff\xd8\xff%d" % number, 1) for number in range(COUNT)]
            for one in sent:
                one.wait_for_publish(WAIT_SECONDS)
        await running.agent.start()
        return await running.agent.until(lambda found, _pid: found["counts"]["received"] >= COUNT, WAIT_SECONDS)
