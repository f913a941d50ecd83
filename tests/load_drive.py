"""A generated drive under load: `python tests/load_drive.py FILE [SECONDS]` writes 5,000 messages/s and 8 cameras.

What the replay is measured with: 200 topics of JSON with a capture time and MQTT 5 properties, evenly spread, and eight
cameras of two 100 kB pictures a second each, all at the same moments, which is the harder case.
"""

import sys
from pathlib import Path
from random import Random

from tools.recording import Properties, Recorded, RecordingWriter

START_NS = 1_790_000_000 * 10**9
SECOND = 10**9
TOPICS, MESSAGES_PER_SECOND = 200, 5000
CAMERAS, PICTURES_PER_SECOND, PICTURE_BYTES = 8, 2, 100_000
PROPERTIES = Properties(content_type="application/json", user=(("unit", "m/s"),))


def messages(seconds):
    """The drive in the order of receipt."""
    random = Random(7)
    gap_ns = SECOND // MESSAGES_PER_SECOND
    between = MESSAGES_PER_SECOND // PICTURES_PER_SECOND
    for number in range(seconds * MESSAGES_PER_SECOND):
        moment = START_NS + number * gap_ns
        if number % between == 0:
            yield from (picture(camera, moment, random) for camera in range(CAMERAS))
        payload = b'{"ts":%.6f,"value":%.3f,"sensor":"%d"}' % (moment / SECOND, random.random() * 50, number % TOPICS)
        yield recorded(f"vehicle/telemetry/{number % TOPICS}", payload, moment, PROPERTIES)


def picture(camera, moment, random):
    """Bytes with the first ones of a JPEG: a broker does not look into them."""
    payload = b"\xff\xd8\xff" + random.randbytes(PICTURE_BYTES)
    return recorded(f"vehicle/camera/{camera}", payload, moment, Properties(user=(("time", str(moment)),)))


def recorded(topic, payload, moment, properties):
    return Recorded(topic=topic, payload=payload, capture_ns=moment, receipt_ns=moment, properties=properties)


def write(path, seconds):
    with Path(path).open("wb") as stream, RecordingWriter(stream) as writer:
        for message in messages(seconds):
            writer.write(message)


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
