"""What a connection has read and nobody has taken yet."""

from __future__ import annotations

import asyncio
from collections import deque

from agent.mqtt.packets import Delivery


class Inbox:
    """A queue that is full at a number of deliveries or of bytes.

    It takes what is put in all the same: who reads the socket asks `full` first.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        self.arrived = asyncio.Event()
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._waiting: deque[Delivery] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether nothing more should be read."""
        return len(self._waiting) >= self._limit or self._bytes >= self._limit_bytes

    @property
    def low(self) -> bool:
        """Whether at least half of the room is free: reading goes on from here, so that it does not stop at once."""
        return len(self._waiting) <= self._limit // 2 and self._bytes <= self._limit_bytes // 2

    def put(self, delivery: Delivery) -> None:
        """Append."""
        self._waiting.append(delivery)
        self._bytes += len(delivery.payload)
        self.arrived.set()

    def take(self) -> Delivery:
        """The oldest; IndexError when empty."""
        delivery = self._waiting.popleft()
        self._bytes -= len(delivery.payload)
        return delivery
