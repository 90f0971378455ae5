"""From an image file to what a model sees. Training, evaluation and the page all open pictures here."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from torch import Tensor

from cvlab.models import Model
from cvlab.models.model import TILES, Channels
from cvlab.tiles import middle

register_heif_opener()

MAX_PIXELS = 80_000_000  # phones and scanners usually save less
MAX_BYTES = 4 * MAX_PIXELS  # of a picture as it is decoded and as it is returned, together
Box = tuple[float, float, float, float]  # x, y, width and height in shares of a photo
WHOLE: Box = (0, 0, 1, 1)
MIN_SIDE = 2  # pixels; a single line of them is not a picture
# Recognised by content, not by name. EPS is a program for Ghostscript; a kilobyte of JPEG 2000 may take half a minute.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "PPM")


class ImageError(ValueError):
    """A picture cannot be opened. The message is a sentence for the person who chose it."""


class Bands:
    """A picture of any number of channels, with what is used here of a picture of Pillow."""

    def __init__(self, bands: Sequence[Image.Image], rgb: Sequence[int]) -> None:
        self.bands, self.rgb = bands, rgb  # a grey picture for each channel; the three that people see, from 1
        self.width, self.height = self.size = bands[0].size
        self.info: dict[str, list[str]] = {"notes": []}

    def resize(self, *how: object) -> "Bands":
        """As of a picture of Pillow."""
        return Bands([band.resize(*how) for band in self.bands], self.rgb)

    def crop(self, box: Sequence[int]) -> "Bands":
        """As of a picture of Pillow."""
        return Bands([band.crop(box) for band in self.bands], self.rgb)

    def convert(self, mode: str) -> Image.Image:
        """What people see, as a picture of Pillow."""
        return Image.merge("RGB", [self.bands[int(i) - 1] for i in self.rgb]).convert(mode)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.stack(self.bands, -1)  # (H, W, N)


# --- the opener -------------------------------------------------------------------------------------------------------


def open_image(
    path_or_file: str | Path | BinaryIO, at_least: int | None = None, channels: Channels | None = None
) -> Image.Image | Bands:
    """Opens any picture upright, as 8-bit RGB. This is what `image` means everywhere.

    EXIF rotation is applied, transparency becomes white, 16-bit and float pixels are scaled to 8 bits, and only the
    first frame of an animation is used. `image.info["notes"]` has a sentence for each change that a user should know.

    Args:
        at_least: decode a JPEG smaller, which is several times faster, but to no fewer pixels a side than this.
        channels: `Model.channels` of a model that sees no photos: open the path of a TIFF or .npy, see `_bands`.

    Raises:
        ImageError: not an image, cut off, empty, a line of pixels, or, as is checked before decoding, too large.
    """
    name = Path(path_or_file).name if isinstance(path_or_file, str | Path) else "the picture"
    try:
        if channels:
            return _bands(path_or_file, name, channels)
        with Image.open(path_or_file, formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{name} is {width} x {height} pixels: too small to show anything.")
            # Of a progressive one all would be in memory even so.
            if decoded_bytes(image) > MAX_BYTES and image.format in ("JPEG", "MPO") and "progressive" not in image.info:
                image.draft("RGB", (width // 2, height // 2))
            if (taken := decoded_bytes(image)) > MAX_BYTES:
                most = f"{MAX_BYTES / 1e6:.0f} MB, {MAX_PIXELS / 1e6:.0f} million pixels in colour: make it smaller"
                raise ImageError(f"{name} takes {taken / 1e6:.0f} MB when decoded; cvlab opens up to {most}.")
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))
            image.load()
            # They are not counted: a file may hold a million frames, or pages of a scan.
            notes = ["Only the first of its frames is used."] if getattr(image, "is_animated", False) else []
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image, name, notes)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture in a format that cvlab knows.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has too many pixels: cvlab opens up to {MAX_PIXELS / 1e6:.0f} million.") from error
    except ImageError:
        raise
    except ImportError as error:
        raise ImageError(f"{name} needs packages that are missing: pip install tifffile imagecodecs") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ValueError ...
        raise ImageError(f"{name} is damaged or cut off and cannot be decoded.") from error
    rgb.info = {"notes": notes}
    return rgb


def decoded_bytes(image: Image.Image) -> int:
    """Memory that a picture takes as Pillow decodes it, and once more as RGB where it is not."""
    narrow = {"1": 1, "L": 1, "P": 1, "RGB": 0}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    return math.prod(image.size) * (4 + narrow)


def _to_rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Strip by strip where something is in between, which takes several times the memory."""
    wide = image.mode.startswith("I") or image.mode == "F"  # 16 or 32 bits
    if not wide and image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    boxes = [(0, top, image.width, min(top + 256, image.height)) for top in range(0, image.height, 256)]
    to_8_bits = _scale((np.asarray(image.crop(box)) for box in boxes), name, notes) if wide else None
    rgb, opaque = Image.new("RGB", image.size, "white"), True
    for box in boxes:
        strip = image.crop(box)
        if wide:
            strip = Image.fromarray(to_8_bits(np.asarray(strip)))
        else:
            strip = strip.convert("RGBA")
            opaque = opaque and strip.getextrema()[3][0] == 255
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rgb.paste(strip.convert("RGB"), box)
    notes += [] if opaque else ["Transparent parts are shown on white."]
    return rgb


def _scale(strips: Iterable[np.ndarray], name: str, notes: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    """How grey pixels of 16 or 32 bits, or floats, are scaled to 0..255 by the range that they use in all strips."""
    ranges = []
    for pixels in strips:
        if not np.isfinite(pixels).all():
            raise ImageError(f"{name} has pixels that are not numbers (NaN or infinite).")
        ranges += [float(pixels.min()), float(pixels.max())]
    low, high, kind = min(ranges), max(ranges), pixels.dtype.kind
    span = 1.0 if low >= 0 and high <= 1 and kind == "f" else 255.0 if low >= 0 and high <= 255 else 0.0
    if kind == "u" or (kind == "i" and low >= 0 and 255 < high <= 65535):  # u: 16 bits
        if high < 4096:  # microscopes often store 10 or 12 bits in 16, and the file does not say which value is white
            notes.append(f"Its brightest pixel is {high:g} of 65535. Scale the picture if its camera has fewer bits.")
        span = 65535.0
    elif not span:
        notes.append(f"Pixel values from {low:g} to {high:g} are shown from black to white.")
    low, span = (0.0, span) if span else (low, (high - low) or 1.0)  # one value everywhere is black
    return lambda pixels: np.round((pixels.astype(np.float64) - low) / span * 255).astype(np.uint8)


def _bands(path: str | Path | BinaryIO, name: str, channels: Channels) -> Bands:
    """A .npy of (H, W, N), or the bands of all pages of a TIFF that are as large as the first; neither is turned."""
    with open(path, "rb") if isinstance(path, str | Path) else path as file:
        start = file.read(6)
    if start == b"\x93NUMPY":
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        _check_numbers(name, pixels.shape, pixels.dtype, channels.count)
    elif start.startswith((b"II", b"MM")):
        pixels = _of_tiff(path, name, channels.count)
    else:
        raise ImageError(f"{name} is no TIFF and no .npy. The model needs one, with {channels.count} channels.")
    if channels.range:
        low, high = channels.range
        pixels = (pixels.astype(np.float32) - low) * (255 / (high - low))
        pixels = np.round(np.clip(np.nan_to_num(pixels), 0, 255)).astype(np.uint8)  # NaN is as low
    elif pixels.dtype != np.uint8:
        told = f"{name} holds {pixels.dtype.name} from {pixels.min():g} to {pixels.max():g}"
        raise ImageError(f"{told}. Train with --range LOW HIGH, the values that become black and white.")
    return Bands([Image.fromarray(band) for band in np.moveaxis(pixels, 2, 0).copy()], channels.shown)


def _of_tiff(path: str | Path, name: str, count: int) -> np.ndarray:
    """The bands of all pages, (H, W, N)."""
    import imagecodecs  # noqa: F401  with it tifffile unpacks no more than the tags say; few pictures need the two
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        first, *others = islice(tiff.pages, 4 * count)  # some may be small copies
        pages = [first, *(page for page in others if page.shaped == first.shaped)]
        planes, depth, height, width, samples = first.shaped
        _check_numbers(name, (height, width, len(pages) * planes * depth * samples), first.dtype, count)
        for page in pages:  # a tile may be larger than its page
            sides = (page.tilelength * page.tiledepth, page.tilewidth) if page.is_tiled else (height, width)
            _check_numbers(name, (*sides, count), page.dtype, count)
        parts = [page.asarray().reshape(page.shaped).transpose(2, 3, 0, 1, 4) for page in pages]
        return np.concatenate([part.reshape(height, width, -1) for part in parts], -1)


def _check_numbers(name: str, shape: Sequence[int], dtype: np.dtype, count: int) -> None:
    """Raises ImageError for what is not to be decoded: no (H, W, N) numbers, or too many."""
    if len(shape) != 3 or shape[2] != count or min(shape[:2]) < MIN_SIDE or dtype.kind not in "uif":
        found = f"{' x '.join(map(str, shape))} values of {dtype.name}"
        raise ImageError(f"{name} holds {found}. The model needs height x width x {count} channels of numbers.")
    if (taken := math.prod(shape) * (2 * dtype.itemsize + 5)) > MAX_BYTES:
        raise ImageError(f"{name} takes {taken / 1e6:.0f} MB when decoded; cvlab opens up to {MAX_BYTES / 1e6:.0f} MB.")


# --- evaluation -------------------------------------------------------------------------------------------------------


def view(image: Image.Image, model: Model) -> Tensor:
    """What a model sees of a photo, (1, 3, S, S) float32 in [0, 1], where S = model.image_size."""
    return to_float(to_uint8(square_view(image, model)))[None]


def square_view(image: Image.Image, model: Model) -> Image.Image:
    """The same as a picture: the centre for a classifier (`centre_view`), all for a segmenter (`whole_view`).

    Of a segmenter that sees tiles it is the middle of `large_view`.
    """
    if model.task == "classification":
        return centre_view(image, model.image_size, model.crop_pct, model.interpolation, model.crop_mode)
    if model.crop_mode != TILES:
        return whole_view(image, model.image_size)
    large, side = large_view(image, model.image_size), model.image_size
    left, top = (large.width - side) // 2, (large.height - side) // 2
    return large.crop((left, top, left + side, top + side))


def seen_part(model: Model, size: Sequence[int]) -> Box:
    """Where the view of a model lies in a photo of `size` (height, width): see `square_view`."""
    if model.crop_mode == TILES:
        down, across = (min(1.0, model.image_size / side) for side in size)
    elif model.task != "classification":
        return WHOLE
    else:
        resized = math.floor(model.image_size / model.crop_pct)
        sides = size if model.crop_mode == "squash" else (min(size), min(size))
        down, across = (side / whole * model.image_size / resized for side, whole in zip(sides, size, strict=True))
    return (1 - across) / 2, (1 - down) / 2, across, down


def centre_view(
    image: Image.Image,
    image_size: int,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
    crop_mode: str = "center",
) -> Image.Image:
    """Shorter side to floor(image_size / crop_pct), then a centre crop, as timm does in evaluation.

    With the crop_mode "squash" both sides are resized to it.
    """
    image = resized(image, math.floor(image_size / crop_pct), interpolation, crop_mode)
    left, top = round((image.width - image_size) / 2), round((image.height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def resized(image: Image.Image, size: int, interpolation: str = "bilinear", crop_mode: str = "center") -> Image.Image:
    """Shorter side to `size` pixels, or with the crop_mode "squash" both sides.

    A panorama is first cropped to its middle, twice as long as wide.

    Args:
        interpolation: a name of PIL.Image.Resampling in lower case.
    """
    if crop_mode == "squash":
        return image.resize((size, size), Image.Resampling[interpolation.upper()])
    width, height = min(image.width, 2 * image.height), min(image.height, 2 * image.width)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    short = min(width, height)
    return image.resize((size * width // short, size * height // short), Image.Resampling[interpolation.upper()])


def whole_view(image: Image.Image, image_size: int) -> Image.Image:
    """The whole photo squashed to a square, bilinear."""
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def large_view(image: Image.Image, image_size: int) -> Image.Image:
    """The photo as it is, to be seen in tiles; a side that is shorter than a tile is stretched to it, bilinear."""
    size = max(image.width, image_size), max(image.height, image_size)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def whole_mask(mask: Tensor, image_size: int) -> Tensor:
    """Masks (C, H, W) bool squashed to a square by nearest neighbour, because bilinear masks grow or shrink."""
    return resize_mask(mask, (image_size, image_size))


def large_mask(mask: Tensor, image_size: int) -> Tensor:
    """Masks (C, H, W) bool as `large_view` shows their photo."""
    return resize_mask(mask, [max(side, image_size) for side in mask.shape[1:]])


def seen_mask(mask: Tensor, model: Model) -> Tensor:
    """Masks (C, H, W) bool of a photo as `square_view` shows it to a segmenter, (C, S, S)."""
    if model.crop_mode == TILES:
        return middle(large_mask(mask, model.image_size), model.image_size)
    return whole_mask(mask, model.image_size)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (C, H, W) bool at another `size` (H, W), by nearest neighbour."""
    return F.interpolate(mask[None].to(torch.uint8), tuple(size), mode="nearest-exact")[0].bool()


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """A segmenter's logits (N, C, S, S) at a photo's own `size` (H, W), at which masks are scored; bilinear."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def to_uint8(image: Image.Image) -> Tensor:
    """PIL RGB or `Bands` to (3 or N, H, W) uint8, the form in which images stay in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1], any shape."""
    return images / 255
