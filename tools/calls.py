"""How each command of `residency-tools` is called, and what its exit status means: shown below its --help."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agent import usage
from tools.signals import INTERRUPTED_STATUS

TROUBLE = {3: "a file, a broker or the agent could not be used"}
INTERRUPTED = {INTERRUPTED_STATUS: "interrupted"}
USAGE = "wrong usage, or a mistake in a file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Help:
    """Examples without the program's name, what status 1 means, and what other statuses mean."""

    examples: Sequence[str]
    failed: str = "never"
    more: Mapping[int, str] = field(default_factory=dict)


HELP = {
    "demo": Help(
        examples=("demo", "demo --speed 20 --kill-after 20 --out runs/demo"),
        failed="a record went where it must not, a picture was not redacted, or a message is unaccounted for",
        more=TROUBLE | INTERRUPTED,
    ),
    "record": Help(
        examples=(
            "record --host 127.0.0.1 --duration 600 drive.mcap",
            "record --topic vehicle/# --max-mb 500 drive.mcap",
        ),
        more={3: "the file or the broker could not be used, or the connection was lost meanwhile"},
    ),
    "import": Help(
        examples=(
            "import --mdf 00000001.MF4 --dbc canmod-gps.dbc --frames dashcam/ -o drive.mcap",
            "import --gpx ride.gpx -o ride.mcap",
        ),
        more=TROUBLE,
    ),
    "replay": Help(
        examples=(
            "replay drive.mcap --speed 10 --fresh",
            "replay drive.mcap --fresh --link tunnel --fault clock-jump=120:-3600",
        ),
        more={3: "the broker or the recording could not be used, or messages were refused or lost"} | INTERRUPTED,
    ),
    "report": Help(examples=("report runs/demo", "report runs/demo --out page.html"), more=TROUBLE),
    "verify": Help(
        examples=(
            "verify drive.mcap --policy policy.toml",
            "verify drive.mcap --policy policy.toml --expect expect.toml --out run --junit result.xml",
            "verify --archive drives/ --policy policy.toml --expect expect.toml --out results",
        ),
        failed="a check did not pass",
        more=TROUBLE | INTERRUPTED,
    ),
    "compare": Help(
        examples=(
            "compare run1 run2",
            "compare --archive drives/ --policy old.toml --policy new.toml --fail",
            "compare --archive drives/ --policy policy.toml --python old/bin/python --python new/bin/python",
        ),
        failed="the runs differ, and --fail was given",
        more=TROUBLE | INTERRUPTED,
    ),
    "listen": Help(
        examples=(
            "listen --keys fleet.pem --allow cn",
            "listen --host mqtt.eea.example.com --tls --keys fleet.pem --policy policy.toml --endpoint eea \\",
            "    --group archive --name archive-1 --out records --format parquet",
        ),
        failed="a record was refused",
        more=TROUBLE,
    ),
    "bench": Help(examples=("bench --short", "bench --json bench.json"), failed="something could not be run"),
    "evaluate": Help(
        examples=("evaluate pictures/ --manifest models/detector.json", "evaluate coco/ --no-baselines --limit 100"),
        failed="the pictures or a detector could not be read",
    ),
    "train": Help(examples=("train network --help", "train complete --help", "train ship --help")),
    "train network": Help(
        examples=("train network data/ --folder run", "train network data/ --folder run --resume run/checkpoint.pt"),
        failed="the data could not be read, or training failed",
    ),
    "train complete": Help(
        examples=("train complete data/ --manifest models/detector.json --out data/completed.json",),
        failed="the data or the detector could not be read",
    ),
    "train ship": Help(
        examples=("train ship data/ --checkpoint run/checkpoint.pt --out models",),
        failed="the data or the checkpoint could not be read",
    ),
    "regions": Help(examples=("regions show --help", "regions crossings", "regions build --help")),
    "regions build": Help(
        examples=("regions build", "regions build --input borders.json --output borders.bin"),
        failed="the borders could not be fetched",
    ),
    "regions show": Help(examples=("regions show 22.5431 114.0579 --radius 500",)),
    "regions crossings": Help(examples=("regions crossings --seed 2",)),
    "package": Help(examples=("package lock", "package dist", "package sbom", "package deb --help")),
    "package lock": Help(examples=("package lock",), failed="an index could not be asked"),
    "package dist": Help(examples=("package dist --output dist",), failed="it could not be built"),
    "package sbom": Help(examples=("package sbom --output dist",), failed="the lock file could not be read"),
    "package deb": Help(
        examples=("package deb", "package deb --arch arm64 --python 3.11"), failed="it could not be built"
    ),
}
"""By the words of the command."""


def explain(parser: argparse.ArgumentParser, words: str = "") -> None:
    """Write examples and exit status below the help of a command and of the commands inside it."""
    found = HELP.get(words, Help(examples=("demo", "verify --help"), failed="something is not as it should be"))
    examples = [call if call.startswith(" ") else f"residency-tools {call}" for call in found.examples]
    parser.epilog = usage.epilog(examples, failed=found.failed, usage=USAGE, more=found.more)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, inner in _inside(parser):
        explain(inner, f"{words} {name}".strip())


def _inside(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001 - argparse offers no other way to them
    return [(name, inner) for group in groups for name, inner in group.choices.items()]
