"""The records of an MCAP file that hold its contents, in its order: what a cut file still holds, errors for damage.

The mcap package's own reader takes every record apart field by field and parses indexes that nobody asked for: 90 us a
message. Here a message is one `struct` call, 5 us in all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO

import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import EndOfFile, McapError
from mcap.opcode import Opcode
from mcap.records import Attachment, Channel, Chunk, Footer, McapRecord, Message, Metadata
from mcap.stream_reader import get_chunk_data_stream

from agent.errors import AgentError

MAGIC = b"\x89MCAP0\r\n"
RECORD_LIMIT = 1 << 30  # bytes; a longer record is damage
_HEAD = struct.Struct("<BQ")  # MCAP 1.0, Records: opcode, length of what follows
_MESSAGE = struct.Struct("<HIQQ")  # op=0x05: channel, sequence, log time, publish time; the rest is the data
_READERS: Mapping[int, Callable[[ReadDataStream], McapRecord]] = {
    Opcode.ATTACHMENT: Attachment.read,
    Opcode.CHANNEL: Channel.read,
    Opcode.CHUNK: Chunk.read,
    Opcode.FOOTER: Footer.read,
    Opcode.METADATA: Metadata.read,
}


class RecordingError(AgentError, ValueError):
    """A file that is not a recording, or one that is damaged before its first message."""


def records(path: Path, *, open_chunks: bool = True) -> Iterator[McapRecord]:
    """Channels, messages, attachments, metadata and the footer, up to the last whole record.

    Chunks come as their channels and messages, or as they are. Raises RecordingError, OSError.
    """
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            message = f"{path}: not a readable recording: it does not begin as an MCAP file"
            raise RecordingError(message)
        try:
            for record in _outer(stream):
                if open_chunks and isinstance(record, Chunk):
                    yield from _inside(record)
                else:
                    yield record
        except EndOfFile:
            return
        except (McapError, zstandard.ZstdError, ValueError, OverflowError, struct.error) as exc:
            message = f"{path}: not a readable recording: {exc or type(exc).__name__}"
            raise RecordingError(message) from exc


def _outer(stream: IO[bytes]) -> Iterator[McapRecord]:
    """The records of the file itself; the footer is the end."""
    while True:
        opcode, length = _HEAD.unpack(_whole(stream, _HEAD.size))
        if length > RECORD_LIMIT:
            message = f"a record of {length} bytes"
            raise ValueError(message)
        data = _whole(stream, length)
        if opcode == Opcode.MESSAGE:
            yield _message(data)
        elif opcode in _READERS:
            yield _READERS[opcode](ReadDataStream(BytesIO(data)))
        if opcode == Opcode.FOOTER:
            return


def _inside(chunk: Chunk) -> Iterator[McapRecord]:
    """Channels and messages of a chunk, after its checksum was compared."""
    stream, size = get_chunk_data_stream(chunk, validate_crc=True)
    data, place = stream.read(size), 0
    while place < size:
        opcode, length = _HEAD.unpack_from(data, place)
        start, place = place + _HEAD.size, place + _HEAD.size + length
        if opcode == Opcode.MESSAGE:
            yield _message(data[start:place])
        elif opcode == Opcode.CHANNEL:
            yield Channel.read(ReadDataStream(BytesIO(data[start:place])))


def _message(data: bytes) -> Message:
    channel, sequence, log_time, publish_time = _MESSAGE.unpack_from(data)
    return Message(
        channel_id=channel, sequence=sequence, log_time=log_time, publish_time=publish_time, data=data[_MESSAGE.size :]
    )


def _whole(stream: IO[bytes], length: int) -> bytes:
    """So many bytes; EndOfFile where the file was cut: half a record is none."""
    data = stream.read(length)
    if len(data) < length:
        raise EndOfFile
    return data
