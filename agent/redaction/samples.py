"""The samples of a picture as its stream holds them: what the detector sees, and what is masked.

A JPEG with chroma of its own size is decoded to planes and stays in them, for a decoder's smoothed chroma, coded again,
would lose 15 to 40 dB (tests/test_redaction.py). libturbojpeg gives the planes; with Pillow those of 4:2:0 come from
a second look at half the size, and those of 4:2:2 from undoing the smoothing.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from agent.errors import AgentError, RefusedError
from agent.pictures import jpeg
from agent.pictures.formats import MODES, Colour, Format, Header
from agent.redaction.masking import Pixels
from agent.redaction.scaling import shrunk
from agent.redaction.turbojpeg import SIDE, turbo

OPENERS: Mapping[Format, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    Format.JPEG: JpegImagePlugin.JpegImageFile,
    Format.PNG: PngImagePlugin.PngImageFile,
    Format.WEBP: WebPImagePlugin.WebPImageFile,
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A decoded picture as it is stored: `L`, `RGB` or `YCbCr`, whose decoder mixed `bleed` pixels across blocks.

    Or in planes: then `stored` is the luma alone, and the second and third band of `chroma`, a `YCbCr` of its own size,
    are the chroma. `density` is how many samples they have for one of luma, across and down.
    """

    stored: Image.Image
    bleed: int = 0
    chroma: Image.Image | None = None
    density: tuple[float, float] = (1.0, 1.0)

    @cached_property
    def image(self) -> Image.Image:
        """All of it; planes are joined when it is asked for: just before encoding, it is read from the CPU's cache."""
        return self.stored if self.chroma is None else _joined(self.stored, self.chroma, self._extent)

    def seen(self, size: tuple[int, int], colour: Colour) -> Pixels:
        """RGB or YCbCr (H, W, 3) in a size of the stored picture (width, height)."""
        if size == self.stored.size:
            image = self.image
        else:
            image = shrunk(self.stored, size)
            image = image if self.chroma is None else _joined(image, self.chroma, self._extent)
        return np.asarray(image if image.mode == MODES[colour] else image.convert(MODES[colour]))

    @property
    def _extent(self) -> tuple[float, float]:
        """How much of `chroma` the picture covers: its last sample may lie half beyond the edge."""
        return self.stored.width * self.density[0], self.stored.height * self.density[1]


def _joined(luma: Image.Image, chroma: Image.Image, extent: tuple[float, float]) -> Image.Image:
    """`YCbCr` in the size of `luma`.

    Chroma samples are repeated where that is larger. Smoothing them instead takes 7 ms and shows the detector nothing:
    they are as coarse anyway (models/README.md, "Measured").
    """
    way = Image.Resampling.NEAREST if luma.width >= extent[0] else Image.Resampling.BILINEAR
    image = chroma.resize(luma.size, way, (0, 0, *extent))
    image.im.putband(luma.im, 0)
    return image


def decode(header: Header) -> Samples:
    """Decode the cleaned stream; whatever a codec raises refuses the picture."""
    try:
        if (library := turbo()) and (planes := library.planes(header)):
            return _of_planes(header, *map(Image.fromarray, planes))
        if header.sampling == jpeg.QUARTER_CHROMA and min(header.width, header.height) > 1:
            return _quartered(header)
        return Samples(stored=_whole(header), bleed=header.bleed)
    except AgentError:
        raise
    except MemoryError as exc:
        raise RefusedError("redaction.memory") from exc
    except Exception as exc:
        raise RefusedError("picture.corrupt", type(exc).__name__) from exc


def _of_planes(header: Header, luma: Image.Image, *chroma: Image.Image) -> Samples:
    """Both chroma planes have the sampling factors (1, 1) in every JPEG that is taken apart; a grey one has none."""
    both = Image.merge("YCbCr", (chroma[0], *chroma)) if chroma else None
    return Samples(stored=luma, chroma=both, density=_density(header))


def _density(header: Header) -> tuple[float, float]:
    return SIDE / header.block[0], SIDE / header.block[1]


def _whole(header: Header) -> Image.Image:
    """Return the picture as it is stored, in `L`, `RGB` or `YCbCr`."""
    with OPENERS[header.format](io.BytesIO(header.clean)) as image:
        if header.colour is Colour.YCC:
            image.draft("YCbCr", None)
        flat = _flatten(image)
    _check_size(flat, (header.width, header.height))
    if header.sampling != jpeg.HALF_CHROMA:
        return flat
    pixels = np.array(flat)
    pixels[..., 1:] = _unsmoothed_chroma(pixels[..., 1:])
    return Image.fromarray(pixels, flat.mode)


def _quartered(header: Header) -> Samples:
    """The planes of a 4:2:0 JPEG: at half size chroma needs no interpolation, and luma needs no colours decoded."""
    luma = _drafted(header, "L", None)
    half = _drafted(header, "YCbCr", (header.width // 2, header.height // 2))
    _check_size(luma, (header.width, header.height))
    _check_size(half, ((header.width + 1) // 2, (header.height + 1) // 2))
    return Samples(stored=luma, chroma=half, density=_density(header))


def _drafted(header: Header, mode: str, size: tuple[int, int] | None) -> Image.Image:
    """Return a JPEG in another mode or size, given to the decoder in one piece: else it begins rows again."""
    with OPENERS[Format.JPEG](io.BytesIO(header.clean)) as image:
        image.decodermaxblock = len(header.clean)
        image.draft(mode, size)
        image.load()
    return image


def _check_size(image: Image.Image, size: tuple[int, int]) -> None:
    """Raise ValueError for a decoder that gives another picture than its header promises."""
    if image.size != size:
        raise ValueError


def _unsmoothed_chroma(smooth: Pixels) -> Pixels:
    """Return the stored chroma (H, W, 2) of a 4:2:2 JPEG from the decoded one, within its rounding.

    The decoder makes of samples c the pixels (3 c[i] + c[i-1]) / 4 and (3 c[i] + c[i+1]) / 4 (libjpeg's "fancy"
    upsampling). Each pair of pixels that share two samples gives either; a sample is the mean of its two values.
    """
    width = smooth.shape[1]
    even, odd = smooth[:, 0::2].astype(np.int16), smooth[:, 1::2].astype(np.int16)
    odd = odd if width % 2 == 0 else np.concatenate([odd, even[:, -1:]], axis=1)
    before = np.concatenate([even[:, :1], odd[:, :-1]], axis=1)
    after = np.concatenate([even[:, 1:], odd[:, -1:]], axis=1)
    samples: Pixels = ((3 * (even + odd) - before - after + 2) // 4).clip(0, 255).astype(np.uint8)
    return samples.repeat(2, axis=1)[:, :width]


def _flatten(image: Image.Image) -> Image.Image:
    """One opaque 8-bit rendering: alpha over black, inks as RGB, the high byte of 16-bit grey."""
    image.load()
    if image.mode in {"L", "RGB", "YCbCr"} and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    if "transparency" in image.info or image.mode in {"LA", "PA", "RGBA"}:
        layered = image.convert("RGBA")
        flat = Image.new("RGB", image.size)
        flat.paste(layered.convert("RGB"), mask=layered.getchannel("A"))
        return flat
    return image.convert("RGB")
