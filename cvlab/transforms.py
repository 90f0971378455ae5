"""From an image file to what a model sees. Training, evaluation and the page all open pictures here."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from torch import Tensor

from cvlab.models import Model
from cvlab.models.model import TILES
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


# --- the opener -------------------------------------------------------------------------------------------------------


def open_image(path_or_file: str | Path | BinaryIO, at_least: int | None = None) -> Image.Image:
    """Opens any picture upright, as 8-bit RGB. This is what `image` means everywhere.

    EXIF rotation is applied, transparency becomes white, 16-bit and float pixels are scaled to 8 bits, and only the
    first frame of an animation is used. `image.info["notes"]` has a sentence for each change that a user should know.

    Args:
        at_least: decode a JPEG smaller, which is several times faster, but to no fewer pixels a side than this.

    Raises:
        ImageError: not an image, cut off, empty, a line of pixels, or, as is checked before decoding, too large.
    """
    name = Path(path_or_file).name if isinstance(path_or_file, str | Path) else "the picture"
    try:
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
    """PIL RGB to (3, H, W) uint8, the form in which images stay in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1], any shape."""
    return images / 255
