"""What a network is made of: kinds of layers that name their tensors, without any weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv:
    """Square convolution; with `relu` also batch norm before it while training.

    A `borrowed` one comes with its norm folded in, stays as it is, and its ReLU ends at CEILING. A `silent` one begins
    with zeros. `first` is how many rows and columns its first window has beyond the border, half the kernel by default.
    """

    name: str
    source: str
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1
    relu: bool = True
    groups: int = 1
    first: int | None = None
    borrowed: bool = False
    silent: bool = False

    @property
    def border(self) -> tuple[int, int]:
        """Rows (and columns) beyond the first one and the last one, of an input that the stride divides."""
        before = self.kernel // 2 if self.first is None else self.first
        return before, self.kernel - self.stride - before

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Of its weight: outputs, inputs of a group, rows, columns."""
        return self.outputs, self.inputs // self.groups, self.kernel, self.kernel

    @property
    def normed(self) -> bool:
        """Whether a batch norm follows it while training."""
        return self.relu and not self.borrowed

    @property
    def deepens(self) -> bool:
        """Whether it may begin as the identity: as wide as what it takes, which is not negative, and as large."""
        alike = self.inputs == self.outputs and self.kernel == 3 and self.stride == 1
        return self.normed and self.groups == 1 and alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Maximum over 5x5 cells, stride 1: widens the view without weights."""

    name: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat:
    """Channels of all sources, in order."""

    name: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """ReLU of a lateral map plus the deeper map enlarged twice by repetition."""

    name: str
    lateral: str
    deeper: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """Two maps of one size added, with ReLU or without."""

    name: str
    parts: tuple[str, str]
    relu: bool = True


Layer = Conv | Pool | Concat | Merge | Sum
INPUT = "picture"
CHANNELS = 3  # of a picture
CEILING = 6.0  # of a borrowed convolution's ReLU
MIDDLE = 128  # of a sample: chroma without colour, what is subtracted from luma too, and what the border is padded with
