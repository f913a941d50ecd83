"""The embedded broker as a process: amqtt, MQTT 3.1.1 on loopback, for machines without mosquitto.

`python -m tools.embedded_broker PORT` serves until its standard input closes, so it never outlives who started it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from amqtt.broker import Broker

HOST = "127.0.0.1"


def configuration(port: int) -> dict[str, Any]:
    """Build amqtt's configuration: one anonymous listener on loopback and no $SYS topics."""
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{port}", "max_connections": 0}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }


async def serve(port: int) -> None:
    """Serve on the port until standard input ends."""
    broker = Broker(configuration(port))
    await broker.start()
    await asyncio.to_thread(sys.stdin.read)
    await broker.shutdown()


def main() -> None:
    """Entry of the child process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(serve(int(sys.argv[1])))


if __name__ == "__main__":
    main()
