"""How much may be in flight on one connection: in PUBLISHes, in bytes, and in what the socket has not taken yet."""

from __future__ import annotations

import time

from agent.mqtt.connection import Connection
from agent.uplink.flights import Flights
from agent.uplink.patience import Patience

UNSENT_BYTES = 64 << 10  # published but not yet taken by the socket
IN_FLIGHT_BYTES = 16 << 20  # without PUBACK: they stay in memory


class Window:
    """One connection. `largest`: PUBLISHes in flight at most, by the policy and the endpoint's Receive Maximum."""

    def __init__(self, connection: Connection, in_flight: int, flights: Flights, patience: Patience) -> None:
        self.largest = min(in_flight, connection.receive_maximum)
        self._connection = connection
        self._flights = flights
        self._patience = patience

    def trusted(self) -> int:
        """How many PUBLISHes may be in flight now, as far as the endpoint is trusted."""
        return self._patience.window(self.largest, time.monotonic())

    def free(self) -> bool:
        """Whether one more PUBLISH of records may go out now; the first one may, however large it is."""
        flights = self._flights
        if len(flights) >= self.trusted():
            return False
        return not flights or (self._connection.unsent < UNSENT_BYTES and flights.bytes < IN_FLIGHT_BYTES)

    def free_for_presence(self) -> bool:
        """Whether a word on the vehicle's presence may go out now, even while no record may."""
        return len(self._flights) < self.largest
