"""Telling systemd how we are: sd_notify over its datagram socket (sd_notify(3)); silent where there is none."""

from __future__ import annotations

import os
import socket

MICROSECONDS = 1_000_000


def notify(*lines: str) -> bool:
    """Send state lines such as `READY=1`; whether there was anybody to tell. Never raises for a missing listener."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
    return True


class Watchdog:
    """What is told to be alive; `fed` counts how often, also where nobody listens."""

    def __init__(self) -> None:
        self.fed = 0

    def feed(self) -> None:
        """Say that everything makes progress."""
        self.fed += 1
        notify("WATCHDOG=1")


def watchdog_seconds() -> float | None:
    """Half of the time within which systemd wants to hear from us; None without a watchdog for this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    text = os.environ.get("WATCHDOG_USEC", "")
    return int(text) / MICROSECONDS / 2 if text.isdigit() and int(text) > 0 else None
