"""What Linux tells about a connected TCP socket, beyond what MQTT says."""

from __future__ import annotations

import fcntl
import math
import select
import socket
import struct
import termios
import time

from agent.boot import boot_ns

NOTSENT_LOWAT = 25  # tcp(7), TCP_NOTSENT_LOWAT
UNSENT_BYTES = 64 << 10  # what the kernel may queue beyond what the link carries: urgent data waits behind no more
BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info of <linux/tcp.h>, since Linux 4.1
INFO_BYTES = 256
LONE_PACKET_BYTES = 64  # a PINGREQ or a PUBACK: no sign that anything larger gets through
RESET = struct.pack("ii", 1, 0)  # socket(7), SO_LINGER: close with RST, and forget what was not sent
LOOK_NS = 1_500_000_000  # a socket is looked at every second; a longer gap is a process that stood still


def reset(sock: socket.socket) -> None:
    """Make `close` forget what was not sent yet, so that it reaches nobody."""
    if sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


class Gauge:
    """Watches one connected socket. `look` is called every second, and whenever a read found nothing more."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._empty_ns = boot_ns()
        self._acknowledged = self.acknowledged()
        self._moved = -math.inf
        sock.setsockopt(socket.IPPROTO_TCP, NOTSENT_LOWAT, UNSENT_BYTES)
        # Nagle's algorithm would hold each record, and each PUBACK, back until the peer has answered the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def unseen_ns(self, now_ns: int) -> int:
        """How long bytes that are read now may have lain in the socket; 0 unless the process stood still."""
        gap = now_ns - self._empty_ns
        return gap if gap > LOOK_NS else 0

    def look_in(self, emptied_ns: int | None = None) -> None:
        """Note the moment if nothing waits to be read, or the one (boot time) at which a read emptied the socket."""
        if emptied_ns is not None:
            self._empty_ns = max(self._empty_ns, emptied_ns)
            return
        if self._sock.fileno() < 0:
            return
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(0):
            self._empty_ns = boot_ns()

    def acknowledge(self) -> None:
        """Tell the peer's TCP at once what was read: by Nagle's algorithm it may hold the next packet back until then.

        Left alone, Linux waits for a packet of ours to tell it with, up to 40 ms; and it forgets that it was asked.
        """
        if self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def look_out(self) -> None:
        """Note the moment if the peer's TCP has taken more than a lone packet since the last call."""
        before, self._acknowledged = self._acknowledged, self.acknowledged()
        if self._acknowledged - before > LONE_PACKET_BYTES:
            self._moved = time.monotonic()

    def moved_within(self, seconds: float) -> bool:
        """Whether bytes are under way: the peer has taken some lately."""
        return time.monotonic() - self._moved < seconds

    def acknowledged(self) -> int:
        """How many bytes the peer's TCP has acknowledged so far; 0 where the kernel does not say."""
        if self._sock.fileno() < 0:
            return 0
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
        if len(info) < BYTES_ACKED + 8:
            return 0
        found: int = struct.unpack_from("=Q", info, BYTES_ACKED)[0]
        return found

    def goal(self) -> int:
        """What `acknowledged` will be when the peer has everything that the kernel holds now."""
        if self._sock.fileno() < 0:
            return 0
        held: int = struct.unpack("i", fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
        return self.acknowledged() + held
