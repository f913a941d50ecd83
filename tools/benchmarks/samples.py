"""The picture that is measured on: one of the bundled drive's camera pictures, at 1920x1080, or the caller's own."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from agent.errors import AgentError
from tools.recording import messages

DRIVE = Path(__file__).parent.parent / "drives" / "shenzhen-hong-kong.mcap"
CAMERA = "vehicle/camera/front"
SIZE = (1920, 1080)
QUALITY = 90


class SampleError(AgentError):
    """There is no picture to measure on."""


def picture(given: Path | None = None) -> bytes:
    """The JPEG that all rows use."""
    if given is not None:
        return given.read_bytes()
    found = next((message.payload for message in messages(DRIVE) if message.topic == CAMERA), None)
    if found is None:
        raise SampleError(f"{DRIVE} holds no picture of {CAMERA}")
    out = io.BytesIO()
    Image.open(io.BytesIO(found)).resize(SIZE, Image.Resampling.BICUBIC).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
