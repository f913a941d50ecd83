"""Headless Chromium over the DevTools protocol: pages are used as a reader uses them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
WRONG = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@contextmanager
def opened(path, profile):
    """The page of a file, loaded; everything that it does is kept in its events."""
    with browser(profile) as page:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=path.as_uri())
        page.wait("Page.loadEventFired")
        yield page


@contextmanager
def browser(profile):
    """Headless Chromium on a pipe of the DevTools protocol; yields a function that calls one of its methods."""
    to_child, from_us = os.pipe()
    from_child, to_us = os.pipe()

    # Above the numbers that the protocol wants, so that none is overwritten before it is copied.
    to_child, to_us = (fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (to_child, to_us))

    def pipes():
        os.dup2(to_child, 3)
        os.dup2(to_us, 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [CHROMIUM, *flags, "about:blank"],
        preexec_fn=pipes,  # noqa: PLW1509 - the protocol wants descriptors 3 and 4; the test has no threads
        pass_fds=(3, 4),
        close_fds=True,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(to_us)
    try:
        with open(from_us, "wb") as writer, open(from_child, "rb") as reader:  # noqa: PTH123 - descriptors
            yield Protocol(writer, reader)
    finally:
        process.kill()
        process.wait()


class Protocol:
    """Calls and events of the DevTools protocol, zero-terminated JSON."""

    def __init__(self, writer, reader):
        self._writer, self._reader = writer, reader
        self._number = 0
        self.session = None
        self.events = []

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait(self, method):
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self):
        """What stands in the console."""
        return [event for event in self.events if event["method"] in WRONG]

    def requests(self):
        """What was asked for beside files and embedded data."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [one for one in urls if not one.startswith(("file:", "data:"))]

    def _read(self):
        data = b""
        while not data.endswith(b"\0"):
            piece = self._reader.read(1)
            assert piece, "the browser ended"
            data += piece
        return json.loads(data[:-1])


def press(page, key):
    codes = {" ": ("Space", 32, " "), "ArrowRight": ("ArrowRight", 39, "")}
    code, number, text = codes[key]
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number, text=text)
