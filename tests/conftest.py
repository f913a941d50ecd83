"""What every test may use: a real broker, and one place that scales all waiting."""

import os
import signal

import pytest
from fake_broker import fake_broker

from agent.mqtt import backoff
from agent.redaction import redaction, samples, turbojpeg
from tools.brokers import mosquitto

# The background job of a shell script ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TIME_SCALE = float(os.environ.get("RESIDENCY_TEST_TIME_SCALE", "1"))
"""Slow machines multiply every limit on waiting by this."""

PATIENCE_SECONDS = 20.0 * TIME_SCALE


@pytest.fixture
async def broker():
    """A mosquitto of this test's own on a free loopback port."""
    async with mosquitto() as running:
        yield running


@pytest.fixture
async def endpoint():
    """A fake broker for an uplink to publish to."""
    async with fake_broker() as running:
        yield running


@pytest.fixture
def quick_uplinks(monkeypatch):
    """Uplinks reconnect after milliseconds: the waits themselves have tests of their own."""
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.02)
    monkeypatch.setattr(backoff, "LONGEST_SECONDS", 0.1)


@pytest.fixture(scope="module", params=["libturbojpeg", "Pillow"])
def codec(request):
    """Both ways in which JPEGs are decoded and masked: with the library that a system may have, and without."""
    if request.param == "libturbojpeg" and turbojpeg.turbo() is None:
        pytest.skip(f"{turbojpeg.LIBRARY} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "Pillow":
            patch.setattr(samples, "turbo", lambda: None)
            patch.setattr(redaction, "turbo", lambda: None)
        yield request.param


@pytest.fixture
def patience():
    """How long a test waits for what must happen."""
    return PATIENCE_SECONDS


def pytest_addoption(parser):
    parser.addoption("--soak", type=int, default=0, metavar="KILLS", help="random kills in the fault suite, e.g. 200")
    parser.addoption("--packages", action="store_true", help="fetch every locked wheel; install in a debootstrap root")


@pytest.fixture
def soak(request):
    """How many random kills were asked for; 0 where nobody did."""
    return request.config.getoption("--soak")


@pytest.fixture(scope="session")
def packages(request):
    """Whether the tests of packages may fetch from the registries and take minutes."""
    return request.config.getoption("--packages")
