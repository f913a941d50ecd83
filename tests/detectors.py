"""A family of detectors for the worker process: perfect, slow, crashing, wrong, greedy. Each is made by a factory."""

import ctypes
import os
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from canary import find_mark

from agent.errors import ModelError
from agent.messages import Box
from agent.redaction.redaction import as_it_is

DIGEST = "5d" * 32
POISON = (0, 255, 0)  # the colour of the top left pixel that sets the faulty ones off


class Marks:
    """The perfect one."""

    digest = DIGEST

    def wanted(self, width, height):
        return as_it_is(width, height)

    def detect(self, rgb, colour):
        return find_mark(rgb, colour)


class Faulty(Marks):
    """Perfect until it sees a picture with the poison colour in its corner."""

    def __init__(self, fault):
        self._fault = fault

    def detect(self, rgb, colour):
        if abs(rgb[0, 0].astype(int) - POISON).max() < 30:
            return self._fault()
        return super().detect(rgb, colour)


def factory(make):
    """What the worker calls with a manifest and a number of threads; neither matters here."""
    return lambda *_arguments, **_options: make()


def faulty(fault):
    return factory(lambda: Faulty(fault))


def box(**corners):
    return [Box(label="person", score=0.9, **{"x1": 0, "y1": 0, "x2": 10, "y2": 10, **corners})]


def loop():
    while True:
        pass


def fail():
    raise ZeroDivisionError


def distrust():
    message = "the output has a wrong shape"
    raise ModelError(message)


def talk():
    """Write to every stream that a library could find."""
    os.write(1, b"stdout")
    os.write(2, b"stderr")
    return []


def escapes():
    """Try what a decoder that was taken over would try; what succeeds is told as a label."""
    attempts = {
        "socket": socket.socket,
        "file": lambda: Path("/etc/passwd").read_bytes(),
        "write": tempfile.mkstemp,
        "process": lambda: subprocess.run(["true"], check=True),
        "fork": os.fork,
        "signal": lambda: os.kill(os.getppid(), 0),
        "thread": lambda: threading.Thread(target=int).start(),
    }
    return [replace(box()[0], label=name) for name, attempt in attempts.items() if succeeds(attempt)]


def succeeds(attempt):
    try:
        attempt()
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def refuse_to_open():
    message = "model.onnx: the model cannot be read"
    raise ModelError(message)


def fork_and_open():
    """Leave a child behind that holds every pipe, before anything was forbidden."""
    if os.fork() == 0:
        time.sleep(3600)
    return Faulty(lambda: time.sleep(3600))


marks = factory(Marks)
forking = factory(fork_and_open)
sleeping = faulty(lambda: time.sleep(3600))
looping = faulty(loop)
crashing = faulty(lambda: ctypes.string_at(0))
exiting = faulty(lambda: os._exit(7))
greedy = faulty(lambda: [bytearray(16 << 20) for _ in range(1000)])
raising = faulty(fail)
untrusted = faulty(distrust)
nan = faulty(lambda: box(x1=float("nan")))
inverted = faulty(lambda: box(x1=20))
nonsense = faulty(lambda: "no boxes at all")
chatty = faulty(talk)
escaping = faulty(escapes)
missing = factory(refuse_to_open)
slow_to_open = factory(lambda: time.sleep(3600))
