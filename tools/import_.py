"""`residency-tools import`: turn other recordings into one MCAP file.

Each option names sources of one kind; files of one kind are one drive. Of several kinds the result is a composite: the
later drives are shifted to begin when the first does, and the recording's provenance says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from agent.errors import AgentError
from tools.importing import bundled, comma, frames, gpx, jsonl, mdf, nmea
from tools.importing.join import Drive, Waiting, joined
from tools.importing.rows import BadRowError, Complain, SourceError, strict
from tools.progress import Advance, progress
from tools.recording import PROVENANCE, Recorded, RecordingWriter
from tools.spool import Spool, spool_in
from tools.whole_files import whole

USAGE_STATUS, TROUBLE_STATUS = 2, 3
Reader = Callable[[Path, Complain], Iterator[Recorded]]
READERS: dict[str, tuple[Reader, str]] = {
    "jsonl": (jsonl.read, "what `mosquitto_sub -F` wrote, one JSON object a line"),
    "gpx": (gpx.read, "a GPX track"),
    "nmea": (nmea.read, "an NMEA 0183 log"),
    "mdf": (lambda path, complain: mdf.read(path, path.with_suffix(".dbc"), complain), "an MDF4 bus log; needs --dbc"),
    "comma2k19": (lambda path, _complain: comma.read(path), "the folder of a comma2k19 segment"),
    "frames": (frames.read, "a folder of pictures with times in their names or in times.csv"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was written, and how many rows were left out."""

    count: int
    provenance: dict[str, str]
    skipped: int


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `residency-tools`."""
    parser = subparsers.add_parser("import", help="turn other recordings into MCAP", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the MCAP file to write")
    for kind, (_reader, summary) in READERS.items():
        parser.add_argument(f"--{kind}", type=Path, action="append", default=[], metavar="PATH", help=summary)
    parser.add_argument("--dbc", type=Path, help="what the CAN messages of --mdf mean")
    parser.add_argument("--keep-times", action="store_true", help="do not shift later drives to the first one's start")
    parser.add_argument("--start", type=datetime.fromisoformat, metavar="TIME", help="when the first drive begins")
    parser.add_argument("--skip-bad", action="store_true", help="report bad rows and go on, instead of stopping")
    parser.add_argument("--bundled", type=Path, metavar="FOLDER", help="build the bundled drive from these packages")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Import; 0 done, 2 wrong usage, 3 a source cannot be read."""
    kinds = [kind for kind in READERS if getattr(arguments, kind)]
    if bool(kinds) == bool(arguments.bundled) or (arguments.mdf and not arguments.dbc):
        print("import: name at least one source, or --bundled alone; --mdf needs --dbc", file=sys.stderr)
        return USAGE_STATUS
    try:
        if arguments.bundled:
            bundled.build(arguments.bundled, arguments.out)
            return 0
        summary = import_drives(kinds, arguments)
    except (AgentError, OSError) as exc:
        print(f"import: {exc}", file=sys.stderr)
        return TROUBLE_STATUS
    _print(summary, arguments)
    return 0


def import_drives(kinds: list[str], arguments: argparse.Namespace) -> Summary:
    """Read the sources of every kind and write the recording; raises SourceError, SpoolError, OSError."""
    skipped: list[BadRowError] = []

    def report(error: BadRowError) -> None:
        skipped.append(error)
        print(f"import: skipped: {error}", file=sys.stderr)

    complain = report if arguments.skip_bad else strict
    start_ns = None if arguments.start is None else round(arguments.start.timestamp() * 1_000_000) * 1000
    with spool_in(arguments.out.parent) as spool:
        drives = [_drive(kind, arguments, complain, spool) for kind in kinds]
        found, provenance = joined(drives, align=not arguments.keep_times, start_ns=start_ns)
        _write(arguments, found, provenance)
    return Summary(count=len(found), provenance=provenance, skipped=len(skipped))


def _write(arguments: argparse.Namespace, found: list[Waiting], provenance: dict[str, str]) -> None:
    with whole(arguments.out) as stream, RecordingWriter(stream) as writer:
        writer.metadata(PROVENANCE, provenance)
        with progress("writing", len(found), quiet=arguments.quiet) as advance:
            for number, one in enumerate(found, start=1):
                writer.write(one.read())
                advance(number, one.topic)


def _drive(kind: str, arguments: argparse.Namespace, complain: Complain, spool: Spool) -> Drive:
    reader = READERS[kind][0] if kind != "mdf" else partial(_mdf, arguments.dbc)
    paths: list[Path] = getattr(arguments, kind)
    with progress("reading", None, quiet=arguments.quiet) as advance:
        read = _counted((message for path in paths for message in reader(path, complain)), advance)
        found = tuple(Waiting.of(message, spool) for message in read)
    if not found:
        message = f"{', '.join(str(path) for path in paths)}: no messages in it"
        raise SourceError(message)
    return Drive(name=f"{kind} {', '.join(path.name for path in paths)}", messages=found)


def _counted(found: Iterator[Recorded], advance: Advance) -> Iterator[Recorded]:
    for number, message in enumerate(found, start=1):
        advance(number, message.topic)
        yield message


def _mdf(dbc: Path, path: Path, complain: Complain) -> Iterator[Recorded]:
    return mdf.read(path, dbc, complain)


def _print(summary: Summary, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps({"count": summary.count, "provenance": summary.provenance, "skipped": summary.skipped}))
        return
    print(f"{arguments.out}: {summary.count} messages, {summary.skipped} bad rows skipped")
    for name, value in summary.provenance.items():
        print(f"  {name}: {value}")
