"""From an image file to what a model sees. Training, evaluation and the page all open pictures here."""

import math
from collections.abc import Sequence
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

MAX_PIXELS = 80_000_000  # 240 MB decoded; phones and scanners usually save less
Box = tuple[float, float, float, float]  # x, y, width and height in shares of a photo
MIN_SIDE = 2  # pixels; a single line of them is not a picture
# Recognised by content, not by the file's name. Pillow opens more, such as EPS, which is a program for Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "PPM", "JPEG2000")


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
        ImageError: not an image, cut off, empty, a line of pixels, or over MAX_PIXELS (checked before decoding).
    """
    name = Path(path_or_file).name if isinstance(path_or_file, str | Path) else "the picture"
    try:
        with Image.open(path_or_file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{name} has {width * height / 1e6:.0f} million pixels; "
                    f"cvlab opens up to {MAX_PIXELS / 1e6:.0f} million. Make it smaller first."
                )
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{name} is {width} x {height} pixels: too small to show anything.")
            if at_least is not None:
                image.draft("RGB", (at_least, at_least))
            image.load()
            frames = getattr(image, "n_frames", 1)  # also the pages of a scan
            notes = [f"Only the first of its {frames} frames is used."] if frames > 1 else []
            rgb = _to_rgb(ImageOps.exif_transpose(image), name, notes)
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


def _to_rgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image), name, notes)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            notes.append("Transparent parts are shown on white.")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, name: str, notes: list[str]) -> np.ndarray:
    """Grey pixels of 16 or 32 bits, or floats, scaled to 0..255 by the range that they use."""
    if not np.isfinite(pixels).all():
        raise ImageError(f"{name} has pixels that are not numbers (NaN or infinite).")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "u" or (pixels.dtype.kind == "i" and low >= 0 and 255 < high <= 65535):  # u: 16 bits
        if high < 4096:  # microscopes often store 10 or 12 bits in 16, and the file does not say which value is white
            notes.append(f"Its brightest pixel is {high:g} of 65535. Scale the picture if its camera has fewer bits.")
        return np.round(pixels / 257).astype(np.uint8)  # 65535 / 257 = 255
    if low >= 0 and high <= 1 and pixels.dtype.kind == "f":
        return np.round(pixels * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.round(pixels).astype(np.uint8)
    notes.append(f"Pixel values from {low:g} to {high:g} are shown from black to white.")
    span = (high - low) or 1.0  # one value everywhere is black
    return np.round((pixels.astype(np.float64) - low) / span * 255).astype(np.uint8)


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
        return 0, 0, 1, 1
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
