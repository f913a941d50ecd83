"""`residency-tools train`: train the detector, complete missing labels with it, and write what the agent loads.

The same code runs on a CPU and on a GPU. A data folder holds `labels.json` and the pictures under `train/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tools.training.dataset import Entry, difference_hash, load_picture, read_entries, split
from tools.training.plan import Shape

CALIBRATION = 96  # pictures
SEED = 3  # of their choice


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("train", help="train the detector", description=__doc__)
    steps = parser.add_subparsers(metavar="STEP", required=True)
    network = steps.add_parser("network", help="train, or go on training")
    network.add_argument("data", type=Path)
    network.add_argument("--folder", type=Path, required=True, help="checkpoint.pt and log.jsonl are written here")
    network.add_argument("--labels", type=Path, help="instead of DATA/labels.json: labels that were completed")
    network.add_argument("--completed", action="store_true", help="the labels' teachers speak of every class")
    network.add_argument("--minutes", type=float, default=100.0, help="time limit, all resumed runs together")
    network.add_argument("--steps", type=int, default=40_000)
    network.add_argument("--tile", type=int, nargs="+", default=[320, 384, 512, 640], help="sides of tiles in pixels")
    network.add_argument("--batch", type=int, default=6, help="tiles of the largest side; of smaller sides more")
    network.add_argument("--rate", type=float, default=2e-3)
    network.add_argument("--seed", type=int, default=1)
    network.add_argument("--threads", type=int, default=2)
    network.add_argument("--device", default="cpu")
    network.add_argument("--keep", type=int, default=0, metavar="STRIDE", help="leave the trunk as it is up to here")
    network.add_argument(
        "--borrow",
        type=Path,
        metavar="TFLITE",
        help="efficientdet-lite0.tflite, for a trunk beside the own one; --start and --resume bring theirs along",
    )
    begin = network.add_mutually_exclusive_group()
    begin.add_argument("--start", type=Path, help="manifest of a float file whose weights to begin with")
    begin.add_argument("--resume", type=Path, help="checkpoint to go on from")
    network.set_defaults(run=run_network)
    complete = steps.add_parser("complete", help="complete missing labels with a trained detector")
    complete.add_argument("data", type=Path)
    complete.add_argument("--manifest", type=Path, required=True)
    complete.add_argument("--second", type=Path, help="folder with efficientdet-lite0.tflite, to check the people")
    complete.add_argument("--out", type=Path, required=True, help="the completed labels.json")
    complete.set_defaults(run=run_complete)
    ship = steps.add_parser("ship", help="write ONNX files and manifests from a checkpoint")
    ship.add_argument("data", type=Path)
    ship.add_argument("--checkpoint", type=Path, required=True)
    ship.add_argument("--out", type=Path, required=True)
    ship.add_argument("--mean-with", type=Path, metavar="MANIFEST", help="a float file to average the weights with")
    ship.add_argument("--facts", type=Path, help="JSON with thresholds, name, licence, training_data, measured")
    ship.set_defaults(run=run_ship)


def divided(data: Path, labels: Path) -> tuple[list[Entry], list[Entry]]:
    """(training, validation) entries of a labels file whose pictures lie under DATA/train."""
    entries = read_entries(labels)
    hashes = {}
    for entry in entries:
        with Image.open(data / "train" / entry.file) as picture:
            hashes[entry.file] = difference_hash(picture)
    return split(entries, hashes)


def run_network(args: argparse.Namespace) -> int:
    """Train until the plan ends."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else threads that wait for one another burn a shared CPU
    from tools.training.loop import Plan, Trainer  # noqa: PLC0415 - torch is an optional, slow import
    from tools.training.tiles import Album, Stream  # noqa: PLC0415

    training, _ = divided(args.data, args.labels or args.data / "labels.json")
    album = Album.open(training, args.data / "train", completed=args.completed)
    plan = Plan(
        folder=args.folder,
        minutes=args.minutes,
        steps=args.steps,
        rate=args.rate,
        threads=args.threads,
        device=args.device,
        keep=args.keep,
        stream=Stream(sides=tuple(args.tile), batch=args.batch, seed=args.seed),
    )
    trainer = Trainer(_shape(args), plan)
    if args.borrow:
        trainer.borrow(args.borrow)
    if args.resume:
        trainer.resume(args.resume)
    elif args.start:
        trainer.start(args.start, album)
    print(f"{len(training)} pictures, from step {trainer.step}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stopping", True))
    signal.signal(signal.SIGINT, lambda *_: setattr(trainer, "stopping", True))
    print(trainer.run(album))
    return 0


def _shape(args: argparse.Namespace) -> Shape:
    """The shipped shape, without a borrowed trunk where none is brought; a checkpoint's own."""
    from tools.training.loop import shape_in  # noqa: PLC0415
    from tools.training.start import holds_borrowed  # noqa: PLC0415

    if args.resume:
        return shape_in(args.resume)
    if args.borrow or (args.start and holds_borrowed(args.start)):
        return Shape()
    return replace(Shape(), beside=0)


def run_complete(args: argparse.Namespace) -> int:
    """Write labels in which the detector has spoken of the classes that its sources left out."""
    from agent.redaction.detector import Detector  # noqa: PLC0415
    from tools.evaluation.baselines import efficientdet  # noqa: PLC0415
    from tools.training.completion import completed  # noqa: PLC0415

    second = [efficientdet(args.second / "efficientdet-lite0.tflite")] if args.second else []
    detector = Detector.open(args.manifest, threads=os.cpu_count() or 1)
    raw = json.loads((args.data / "labels.json").read_bytes())
    args.out.write_text(json.dumps(completed(raw, args.data / "train", detector, second)))
    return 0


def calibration_pictures(entries: Sequence[Entry], pictures: Path) -> list[np.ndarray]:
    """Training pictures to calibrate on, the same ones each time."""
    order = np.random.default_rng(SEED).permutation(len(entries))[:CALIBRATION]
    return [load_picture(pictures / entries[int(index)].file) for index in order]


def run_ship(args: argparse.Namespace) -> int:
    """Export the averaged network of a checkpoint in float and in int8."""
    from tools.training.loop import load_average  # noqa: PLC0415
    from tools.training.shipping import exported, write  # noqa: PLC0415
    from tools.training.start import mean_with  # noqa: PLC0415

    facts = json.loads(args.facts.read_bytes()) if args.facts else {}
    thresholds = facts.pop("thresholds", {"person": 0.4, "face": 0.4, "plate": 0.4})
    training, _ = divided(args.data, args.data / "labels.json")
    network = load_average(args.checkpoint)
    if args.mean_with:
        mean_with(network, args.mean_with)
    shipped = exported(network, calibration_pictures(training, args.data / "train"))
    for name, data in (("detector", shipped.int8), ("detector-float", shipped.real)):
        print(write(args.out, name, data, thresholds, facts))
    return 0
