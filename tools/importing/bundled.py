"""Builds the bundled drive: a synthetic track over the Shenzhen-Hong Kong border with real street pictures.

The track, the telemetry and the cabin pictures are made here; the street pictures are crops of the photographs that
NOTICE names, with objects labelled by hand. So the recording is a composite and says so. The ground truth attachment
holds the true positions (without GNSS noise or loss), the true countries, and the labelled objects of every picture.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tools.importing.truth import Crossing, Labelled, Truth
from tools.recording import PROVENANCE, Properties, Recorded, RecordingWriter
from tools.schemas import NANOSECONDS
from tools.stamps import TIME_PROPERTY

START_NS = 1_760_000_400 * NANOSECONDS  # 2025-10-09 09:00:00 UTC
SEED = 20251009
LENGTH_S = 600
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6371 km

# Roads through Futian, Huanggang port, Lok Ma Chau, San Tin: latitude, longitude, speed in km/h from there on.
WAYPOINTS = (
    (22.5615, 114.0565, 70),
    (22.5445, 114.0590, 65),
    (22.5310, 114.0585, 60),
    (22.5235, 114.0690, 40),
    (22.5175, 114.0745, 35),
    (22.5130, 114.0735, 40),
    (22.5075, 114.0735, 65),
    (22.4990, 114.0720, 85),
    (22.4915, 114.0640, 95),
    (22.4790, 114.0560, 95),
    (22.4660, 114.0500, 80),
    (22.4550, 114.0440, 60),
)
# Where the track crosses the border line of OpenStreetMap as simplified in @rapideditor/country-coder 5.6.1; that line
# is within 253 m of OpenStreetMap's here, and the lost stretch of GNSS reaches further than this on both sides.
CROSSING = (22.51912, 114.07301)
LOST_BEFORE_M, LOST_AFTER_M = 650.0, 900.0  # GNSS is lost between these distances from the crossing

FRONT_SIZE = (960, 540)
FRONT_EVERY_S = 14
CABIN_SIZE = (320, 240)
CABIN_EVERY_S = 30
JPEG_QUALITY = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class Photograph:
    """A source picture: file below the folder of sources, size, and objects (label, x1, y1, x2, y2) in its pixels."""

    file: str
    width: int
    height: int
    objects: tuple[tuple[str, int, int, int, int], ...]


MARKET = Photograph(
    file="modern_yolonas-0.5.0/docs/assets/street.jpg",
    width=1600,
    height=929,
    objects=(
        ("person", 496, 540, 609, 866),
        ("person", 633, 561, 690, 738),
        ("person", 70, 558, 177, 807),
        ("person", 155, 566, 210, 757),
        ("person", 1379, 537, 1459, 770),
        ("plate", 1037, 709, 1090, 740),
    ),
)
ALLEY = Photograph(
    file="visionstyle/assets/samples/street.jpg",
    width=1600,
    height=1037,
    objects=(("person", 64, 399, 148, 696), ("person", 491, 406, 578, 674), ("plate", 1030, 770, 1136, 828)),
)
AVENUE = Photograph(
    file="visionstyle/assets/samples/night.jpg",
    width=1600,
    height=1057,
    objects=(("person", 828, 566, 887, 760), ("person", 1217, 572, 1354, 760)),
)
SUBURB = tuple(
    Photograph(file=f"geovisio_cli-0.3.14/tests/fixtures/e{number}.jpg", width=1920, height=1080, objects=())
    for number in (1, 2, 3)
)
ORDER = (MARKET, MARKET, ALLEY, MARKET, AVENUE, MARKET, *SUBURB[:1], MARKET, ALLEY, MARKET, SUBURB[1], AVENUE, MARKET)


def build(sources: Path, target: Path) -> None:
    """Write the drive; `sources` holds the unpacked packages that NOTICE names."""
    random = Random(SEED)
    track = _track()
    lost = _lost(track)
    front = list(_front(sources, random))
    recorded = [*_telemetry(track, lost, random), *(message for message, _ in front), *_cabin()]
    with target.open("wb") as stream, RecordingWriter(stream) as writer:
        writer.metadata(PROVENANCE, _provenance())
        for message in sorted(recorded, key=lambda one: (one.capture_ns, one.topic)):
            writer.write(message)
        truth = _truth(track, [labelled for _, labelled in front])
        writer.attach("ground_truth.json", "application/json", truth.encode(), START_NS)


def _provenance() -> dict[str, str]:
    return {
        "composite": "true",
        "track": "synthetic, along real roads",
        "telemetry": "synthetic",
        "front camera": "crops of photographs from modern-yolonas 0.5.0, visionstyle 0.1.1 and geovisio-cli 0.3.14",
        "cabin camera": "drawn",
    }


def _track() -> NDArray[np.float64]:
    """Rows of latitude, longitude and speed in m/s, one a second."""
    points = np.array(WAYPOINTS, dtype=np.float64)
    shrink = math.cos(math.radians(points[:, 0].mean()))
    legs = np.hypot(np.diff(points[:, 0]), np.diff(points[:, 1]) * shrink) * METRES_PER_DEGREE
    along = np.concatenate([[0.0], np.cumsum(legs)])
    metres = [0.0]
    for _ in range(LENGTH_S):
        metres.append(metres[-1] + float(np.interp(metres[-1], along, points[:, 2])) / 3.6)
    place = np.array(metres)
    speed = np.append(np.diff(place), 0.0)
    return np.stack([np.interp(place, along, points[:, 0]), np.interp(place, along, points[:, 1]), speed], axis=1)


def _crossing_second(track: NDArray[np.float64]) -> int:
    """The first second on the far side: after the point of the track that is nearest to the crossing."""
    return int(np.argmin(_metres(track, CROSSING))) + 1


def _metres(track: NDArray[np.float64], point: tuple[float, float]) -> NDArray[np.float64]:
    shrink = math.cos(math.radians(point[0]))
    flat = np.hypot(track[:, 0] - point[0], (track[:, 1] - point[1]) * shrink) * METRES_PER_DEGREE
    return np.asarray(flat, dtype=np.float64)


def _lost(track: NDArray[np.float64]) -> set[int]:
    """The seconds without GNSS."""
    metres = _metres(track, CROSSING)
    crossing = _crossing_second(track)
    return {
        second
        for second in range(len(track))
        if metres[second] < (LOST_BEFORE_M if second < crossing else LOST_AFTER_M)
    }


def _telemetry(track: NDArray[np.float64], lost: set[int], random: Random) -> Iterator[Recorded]:
    for second, (latitude, longitude, speed) in enumerate(track.tolist()):
        if second not in lost:
            yield _fix(second, latitude, longitude, random)
        yield _json("vehicle/telemetry/speed", second, {"kmh": round(speed * 3.6, 1), "seq": second})
        if second % 5 == 0:
            charge = round(81.0 - second * 0.004, 2)
            yield _json("vehicle/telemetry/battery", second, {"soc": charge, "volt": 396.5, "seq": second})
        if second % 10 == 0:
            yield _json("vehicle/diagnostics/brakes", second, {"dtc": [], "pad_mm": 8.1, "seq": second})


def _fix(second: int, latitude: float, longitude: float, random: Random) -> Recorded:
    """A fix with 2 m of noise in each axis and an accuracy that covers it."""
    north, east = random.gauss(0, 2), random.gauss(0, 2)
    accuracy = round(5 + math.hypot(north, east), 1)
    shrink = math.cos(math.radians(latitude))
    position = {
        "lat": round(latitude + north / METRES_PER_DEGREE, 7),
        "lon": round(longitude + east / METRES_PER_DEGREE / shrink, 7),
    }
    return _json("vehicle/gnss", second, {**position, "acc": accuracy})


def _json(topic: str, second: int, members: dict[str, object]) -> Recorded:
    capture_ns = START_NS + second * NANOSECONDS
    payload = json.dumps({"ts": capture_ns / NANOSECONDS, **members}, separators=(",", ":")).encode()
    properties = Properties(content_type="application/json")
    return Recorded(topic=topic, payload=payload, capture_ns=capture_ns, receipt_ns=capture_ns, properties=properties)


def _front(sources: Path, random: Random) -> Iterator[tuple[Recorded, Labelled]]:
    for number, second in enumerate(range(4, LENGTH_S, FRONT_EVERY_S)):
        photograph = ORDER[number % len(ORDER)]
        picture, objects = _crop(sources, photograph, random)
        message = _picture("vehicle/camera/front", second, picture)
        yield message, Labelled(topic=message.topic, capture_ns=message.capture_ns, objects=objects)


def _crop(
    sources: Path, photograph: Photograph, random: Random
) -> tuple[Image.Image, tuple[tuple[str, int, int, int, int], ...]]:
    """A crop of its own place and scale in the frame's shape, and the objects that lie wholly in it."""
    width = round(photograph.width * random.uniform(0.72, 0.95))
    height = width * FRONT_SIZE[1] // FRONT_SIZE[0]
    left = random.randint(0, photograph.width - width)
    bottom_bias = random.uniform(0.6, 1.0)  # the street is in the lower part
    top = round((photograph.height - height) * bottom_bias)
    with Image.open(sources / photograph.file) as opened:
        area = (left, top, left + width, top + height)
        picture = opened.convert("RGB").resize(FRONT_SIZE, Image.Resampling.LANCZOS, box=area)
    scale = FRONT_SIZE[0] / width
    moved = [
        (
            label,
            round((x1 - left) * scale),
            round((y1 - top) * scale),
            round((x2 - left) * scale),
            round((y2 - top) * scale),
        )
        for label, x1, y1, x2, y2 in photograph.objects
    ]
    inside = tuple(box for box in moved if min(box[1:3]) >= 0 and box[3] <= FRONT_SIZE[0] and box[4] <= FRONT_SIZE[1])
    return picture, inside


def _cabin() -> Iterator[Recorded]:
    """A drawn driver behind a wheel; the number makes every picture another one."""
    for number, second in enumerate(range(7, LENGTH_S, CABIN_EVERY_S)):
        picture = Image.new("RGB", CABIN_SIZE, (58, 62, 70))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, 320, 70), fill=(150, 185, 215))
        draw.ellipse((120, 50, 200, 150), fill=(224, 180, 150))
        draw.ellipse((140, 88, 152, 98), fill=(40, 30, 30))
        draw.ellipse((168, 88, 180, 98), fill=(40, 30, 30))
        draw.arc((142, 108, 178, 132), 20, 160, fill=(150, 60, 60), width=4)
        draw.rectangle((100, 150, 220, 240), fill=(60, 90, 140))
        draw.arc((70, 170, 250, 330), 180, 360, fill=(20, 20, 20), width=14)
        draw.text((8, 220), f"cabin {number:02d}", fill=(255, 255, 255))
        yield _picture("vehicle/camera/cabin", second, picture)


def _picture(topic: str, second: int, picture: Image.Image) -> Recorded:
    """A camera message; its capture time stands in the user property `time`, in Unix nanoseconds."""
    capture_ns = START_NS + second * NANOSECONDS + 500_000_000
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
    properties = Properties(content_type="image/jpeg", user=((TIME_PROPERTY, str(capture_ns)),))
    return Recorded(
        topic=topic,
        payload=encoded.getvalue(),
        capture_ns=capture_ns,
        receipt_ns=capture_ns,
        properties=properties,
    )


def _truth(track: NDArray[np.float64], pictures: list[Labelled]) -> Truth:
    crossing = START_NS + _crossing_second(track) * NANOSECONDS
    positions = tuple(
        (START_NS + second * NANOSECONDS, round(latitude, 7), round(longitude, 7))
        for second, (latitude, longitude, _speed) in enumerate(track.tolist())
    )
    return Truth(
        positions=positions,
        crossings=(Crossing(from_ns=START_NS, country="CN"), Crossing(from_ns=crossing, country="HK")),
        pictures=tuple(pictures),
    )
