"""The training loop: AdamW, cosine schedule, moving average of the weights, checkpoints, a time limit.

Batches are numbered; a resumed run goes on with the next number, so the stream of tiles is that of an unbroken run.
The schedule follows the larger of steps done and minutes spent, so that a run always ends at the low rate.
"""

# torch is read as if it were absent (pyproject.toml).
# mypy: disable-error-code="misc, no-any-return"

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tools.training.dataset import Targets
from tools.training.efficientnet import read
from tools.training.losses import Cells, Loss, Objects, loss_of
from tools.training.network import Network
from tools.training.plan import Shape, trunk_names
from tools.training.start import start_from
from tools.training.tiles import Album, Stream, batch_of

WARM_UP = 300  # steps of rising rate
LAST_RATE = 0.01  # of the highest rate
AVERAGE = 0.998  # decay of the moving average per step
FOLLOW = 4  # steps between its updates
CLIP = 10.0  # largest norm of a step's gradient
REPORT = 50  # steps between lines of the log
MEASURED = 12  # batches on which the norms of a warm start are measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train. `keep`: convolutions up to this stride stay as they are."""

    folder: Path
    minutes: float
    steps: int = 40_000
    rate: float = 2e-3
    decay: float = 0.02
    stream: Stream = field(default_factory=Stream)
    threads: int = 2
    workers: int = 1
    keep: int = 0
    checkpoint_minutes: float = 4.0
    device: str = "cpu"


class _Batches(Dataset[tuple[NDArray[np.uint8], list[Targets]]]):
    """Batch number -> batch, from a first number on."""

    def __init__(self, album: Album, plan: Plan, first: int) -> None:
        self.album, self.plan, self.first = album, plan, first

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], list[Targets]]:
        return batch_of(self.album, self.plan.stream, self.first + index)


class Trainer:
    """Holds network, its moving average and the optimiser; `run` trains until the plan's end."""

    def __init__(self, shape: Shape, plan: Plan) -> None:
        torch.manual_seed(plan.stream.seed)
        torch.set_num_threads(plan.threads)
        self.plan = plan
        self.device = torch.device(plan.device)
        self.network = Network(shape).to(self.device, memory_format=torch.channels_last)
        self.network.keep(trunk_names(shape, plan.keep))
        self.average = copy.deepcopy(self.network).eval().requires_grad_(requires_grad=False)
        self.optimiser = torch.optim.AdamW(_groups(self.network, plan.decay), lr=plan.rate, fused=True)
        self.step = self.tiles = 0
        self.spent_s = 0.0
        self.stopping = False

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the same shape."""
        state = torch.load(checkpoint, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.tiles, self.spent_s = int(state["step"]), int(state["tiles"]), float(state["spent_s"])

    def borrow(self, lite: Path) -> None:
        """Take the borrowed trunk's weights from a .tflite file."""
        self.network.borrow(read(lite))
        self.average.load_state_dict(self.network.state_dict())

    def start(self, manifest: Path, album: Album) -> None:
        """Begin with the weights of a shipped float file instead of random ones."""
        stream = replace(self.plan.stream, seed=self.plan.stream.seed + 1)
        start_from(self.network, manifest, (batch_of(album, stream, number)[0] for number in range(MEASURED)))
        self.average.load_state_dict(self.network.state_dict())

    def save(self) -> Path:
        """Write `checkpoint.pt` whole or not at all."""
        path = self.plan.folder / "checkpoint.pt"
        part = path.with_suffix(".part")
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "shape": json.dumps(asdict(self.network.shape)),
            "step": self.step,
            "tiles": self.tiles,
            "spent_s": self.spent_s,
        }
        torch.save(state, part)
        return part.replace(path)

    def run(self, album: Album) -> Path:
        """Train until steps or minutes are used up or `stopping` is set; the path of the last checkpoint."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        started, before = time.monotonic(), self.spent_s
        saved, sums = started, np.zeros(3)
        cells = {side: Cells.of(side, side).to(self.device) for side in self.plan.stream.sides}
        for pixels, targets in self._batches(album):
            progress = self._progress()
            if self.stopping or progress >= 1:
                break
            sums += (*self._learn(pixels, targets, cells[pixels.shape[1]], progress), 1)
            self.step += 1
            self.tiles += len(targets)
            now = time.monotonic()
            self.spent_s = before + now - started
            if self.step % REPORT == 0:
                self._report(sums, progress)
                sums[:] = 0
            if now - saved > self.plan.checkpoint_minutes * 60:
                self.save()
                saved = now
        return self.save()

    def _batches(self, album: Album) -> Iterator[tuple[NDArray[np.uint8], list[Targets]]]:
        batches = _Batches(album, self.plan, self.step)
        prefetch = 6 if self.plan.workers else None
        loader = DataLoader(batches, batch_size=None, num_workers=self.plan.workers, prefetch_factor=prefetch)
        return iter(loader)

    def _progress(self) -> float:
        return max(self.step / self.plan.steps, self.spent_s / (self.plan.minutes * 60))

    def _learn(
        self,
        pixels: NDArray[np.uint8] | Tensor,
        targets: list[Targets],
        cells: Cells,
        progress: float,
    ) -> tuple[float, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate * rate_factor(self.step, progress)
        picture = torch.as_tensor(pixels).to(self.device).permute(0, 3, 1, 2).float().div(255)
        values = self.network(picture.contiguous(memory_format=torch.channels_last))
        loss: Loss = loss_of(values, Objects.of(targets).to(self.device), cells)
        self.optimiser.zero_grad(set_to_none=True)
        loss.total().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimiser.step()
        if self.step % FOLLOW == 0:
            follow(self.average, self.network, self.step)
        return float(loss.score.detach()), float(loss.box.detach())

    def _report(self, sums: NDArray[np.float64], progress: float) -> None:
        score, box = sums[:2] / sums[2]
        line = {
            "step": self.step,
            "tiles": self.tiles,
            "minutes": round(self.spent_s / 60, 2),
            "progress": round(progress, 4),
            "score": round(float(score), 4),
            "box": round(float(box), 4),
        }
        with (self.plan.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")


def rate_factor(step: int, progress: float) -> float:
    """Share of the highest rate: linear warm-up, then half a cosine down to LAST_RATE."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move the average toward the network; quickly at first."""
    decay = min(AVERAGE**FOLLOW, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value.detach(), 1 - decay)
        else:
            mean.copy_(value)


def _groups(network: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for kernels only, not for norms and biases."""
    trained = [value for value in network.parameters() if value.requires_grad]
    kernels = [value for value in trained if value.ndim > 1]
    others = [value for value in trained if value.ndim <= 1]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def shape_in(checkpoint: Path) -> Shape:
    """The shape of a checkpoint's network."""
    return _shape_of(_state_in(checkpoint))


def _state_in(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def _shape_of(state: Mapping[str, Any]) -> Shape:
    return msgspec.json.decode(state["shape"], type=Shape)


def load_average(checkpoint: Path) -> Network:
    """The averaged network of a checkpoint, ready to be exported."""
    state = _state_in(checkpoint)
    network = Network(_shape_of(state))
    network.load_state_dict(state["average"])
    return network.eval()
