"""From a file to what a model sees: the one image opener, the view for evaluation, and beside it the one for training.

Evaluation and the page share `view`. Training draws one set of random numbers per image (`uniforms`) and turns it into
a crop, a rotation, a flip and a change of colour; a mask is moved by the numbers of its image.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener
from torch import Tensor, nn

register_heif_opener()

MAX_PIXELS = 80_000_000  # 240 MB decoded; larger than what phones and scanners usually save
MIN_SIDE = 2  # a line of pixels is no picture
# By content, whatever the file's name. Pillow knows more: among them EPS, a program that it hands to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP", "PPM", "JPEG2000")
UNIFORMS_PER_IMAGE = 10


class ImageError(ValueError):
    """A picture that cannot be opened; the message is a sentence for whoever chose it."""


# --- the opener -------------------------------------------------------------------------------------------------------


def open_image(path_or_file: str | Path | BinaryIO, at_least: int | None = None) -> Image.Image:
    """Opens any picture upright, as 8-bit RGB: what every other function means by `image`.

    EXIF rotation is applied; transparency is laid on white; 16-bit and float pixels are brought to 8 bits; of an
    animation the first frame is taken. What was done beyond that is listed in `image.info["notes"]`, as sentences.

    Args:
        at_least: a JPEG may be decoded smaller, which is several times faster, but not below so many pixels a side.

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
            frames = getattr(image, "n_frames", 1)  # of an animation, or pages of a scan
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
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, EOFError, struct.error, ValueError ...
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
    """Grey pixels of 16 or 32 bits or floats, brought to 0..255 by the range that they use."""
    if not np.isfinite(pixels).all():
        raise ImageError(f"{name} has pixels that are not numbers (NaN or infinite).")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind == "u" or (pixels.dtype.kind == "i" and low >= 0 and 255 < high <= 65535):  # u is of 16 bits
        return np.round(pixels / 257).astype(np.uint8)  # 65535 / 257 = 255
    if low >= 0 and high <= 1 and pixels.dtype.kind == "f":
        return np.round(pixels * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.round(pixels).astype(np.uint8)
    notes.append(f"Pixel values from {low:g} to {high:g} are shown from black to white.")
    span = (high - low) or 1.0  # one value everywhere is black
    return np.round((pixels.astype(np.float64) - low) / span * 255).astype(np.uint8)


# --- evaluation -------------------------------------------------------------------------------------------------------


def view(image: Image.Image, model: nn.Module) -> Tensor:
    """What a model sees of a photo: (1, 3, S, S) float32 in [0, 1], S = model.image_size."""
    return to_float(to_uint8(square_view(image, model)))[None]


def square_view(image: Image.Image, model: nn.Module) -> Image.Image:
    """The same as a picture: a classifier sees the centre (`centre_view`), a segmenter the whole (`whole_view`)."""
    if model.task == "classification":
        return centre_view(image, model.image_size, model.crop_pct, model.interpolation)
    return whole_view(image, model.image_size)


def centre_view(
    image: Image.Image, image_size: int, crop_pct: float = 1.0, interpolation: str = "bilinear"
) -> Image.Image:
    """Shorter side to floor(image_size / crop_pct), then the centre: timm's evaluation geometry."""
    image = resize_shorter(image, math.floor(image_size / crop_pct), interpolation)
    left, top = round((image.width - image_size) / 2), round((image.height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def resize_shorter(image: Image.Image, size: int, interpolation: str = "bilinear") -> Image.Image:
    """Shorter side to `size` pixels; of a panorama the middle, twice as long as it is high.

    `interpolation` is a name of PIL.Image.Resampling in lower case.
    """
    width, height = image.size
    long, short = max(width, height), min(width, height)
    if long > 2 * short:
        cut = (long - 2 * short) // 2
        across = width > height
        image = image.crop((cut, 0, cut + 2 * short, height) if across else (0, cut, width, cut + 2 * short))
        width, height = image.size
    return image.resize((size * width // short, size * height // short), Image.Resampling[interpolation.upper()])


def whole_view(image: Image.Image, image_size: int) -> Image.Image:
    """The whole photo squashed to a square, bilinear."""
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR)


def whole_mask(mask: Tensor, image_size: int) -> Tensor:
    """Masks (C, H, W) bool squashed to a square by nearest neighbour: a bilinear mask would grow or shrink."""
    return F.interpolate(mask[None].to(torch.uint8), (image_size, image_size), mode="nearest-exact")[0].bool()


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """A segmenter's logits (N, C, S, S) bilinearly at a photo's own `size` (H, W), at which masks are scored."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def to_uint8(image: Image.Image) -> Tensor:
    """PIL RGB to (3, H, W) uint8, the form in which images are kept in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [0, 1], any shape."""
    return images.to(torch.float32) / 255


# --- training ---------------------------------------------------------------------------------------------------------


def uniforms(seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """(N, UNIFORMS_PER_IMAGE) random numbers in [0, 1) that depend on (seed, epoch, index) alone.

    Whatever the batch or the process an image falls into, and after a restart, it is augmented in the same way.
    """
    generator = torch.Generator()
    rows = []
    for index in indices:
        generator.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + int(index)) % 2**63)
        rows.append(torch.rand(UNIFORMS_PER_IMAGE, generator=generator))
    return torch.stack(rows)


def between(low: float, high: float, u: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) stretched to [low, high)."""
    return low + (high - low) * u


def train_views(
    images: Sequence[Tensor], image_size: int, u: Tensor, min_area: float = 0.35, degrees: float = 15.0
) -> Tensor:
    """Random resized crop, rotation, horizontal flip and colour for a classifier.

    Args:
        images: N of (3, h, w) uint8, of any sizes.
        image_size: S, side of the views.
        u: (N, UNIFORMS_PER_IMAGE) in [0, 1).
        min_area: smallest part of a photo's area that a crop may show.
        degrees: largest rotation either way.

    Returns:
        (N, 3, S, S) float32 in [0, 1].
    """
    views = []
    shares, aspects = between(min_area, 1.0, u[:, 0]), between(math.log(3 / 4), math.log(4 / 3), u[:, 1]).exp()
    for i, image in enumerate(images):
        height, width = image.shape[1:]
        area = shares[i].item() * width * height
        crop_w = min(width, math.sqrt(area * aspects[i].item()))
        crop_h = min(height, area / crop_w)
        crop_w = min(width, area / crop_h)  # wider again where the photo is too low for the aspect
        centre_x = crop_w / 2 + (width - crop_w) * u[i, 2].item()
        centre_y = crop_h / 2 + (height - crop_h) * u[i, 3].item()
        angle = math.radians(degrees) * (2 * u[i, 4].item() - 1)
        grid = crop_grid(image.shape[1:], image_size, centre_x, centre_y, crop_w, crop_h, angle, flip=u[i, 5] < 0.5)
        views.append(F.grid_sample(to_float(image[None]), grid, padding_mode="reflection", align_corners=False))
    return change_colours(torch.cat(views), u[:, 6:])


def train_pairs(
    images: Tensor, masks: Tensor, u: Tensor, max_zoom: float = 1.4, degrees: float = 15.0
) -> tuple[Tensor, Tensor]:
    """Zoom in or out, shift, rotation and flip, the same for image and mask, and colour for the image.

    Args:
        images: (N, 3, S, S) uint8.
        masks: (N, C, S, S) bool.
        u: (N, UNIFORMS_PER_IMAGE) in [0, 1).
        max_zoom: the crop's side is between S / max_zoom and S * max_zoom; outside, the photo is mirrored.
        degrees: largest rotation either way.

    Returns:
        images (N, 3, S, S) float32 in [0, 1] and masks (N, C, S, S) bool.
    """
    size = images.shape[-1]
    side = size * torch.exp(between(-math.log(max_zoom), math.log(max_zoom), u[:, 0]))
    room = (size - side).abs()
    grids = []
    for i in range(len(images)):
        crop = side[i].item()
        centre_x = size / 2 + room[i].item() * (u[i, 2].item() - 0.5)
        centre_y = size / 2 + room[i].item() * (u[i, 3].item() - 0.5)
        angle = math.radians(degrees) * (2 * u[i, 4].item() - 1)
        grids.append(crop_grid((size, size), size, centre_x, centre_y, crop, crop, angle, flip=u[i, 5] < 0.5))
    grid = torch.cat(grids)
    moved = F.grid_sample(to_float(images), grid, padding_mode="reflection", align_corners=False)
    moved_masks = F.grid_sample(masks.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return change_colours(moved, u[:, 6:]), moved_masks > 0.5


def crop_grid(
    source_size: Sequence[int],
    image_size: int,
    centre_x: float,
    centre_y: float,
    crop_w: float,
    crop_h: float,
    angle: float,
    flip: bool,
) -> Tensor:
    """Where each output pixel is read: (1, S, S, 2) for `grid_sample`, coordinates of the source in [-1, 1].

    The crop is a rectangle in pixels of the source (height, width), turned about its centre by `angle` radians.
    """
    height, width = source_size
    half_w, half_h = (-crop_w if flip else crop_w) / 2, crop_h / 2
    cos, sin = math.cos(angle), math.sin(angle)
    theta = torch.tensor(
        [
            [cos * half_w * 2 / width, -sin * half_h * 2 / width, 2 * centre_x / width - 1],
            [sin * half_w * 2 / height, cos * half_h * 2 / height, 2 * centre_y / height - 1],
        ]
    )
    return F.affine_grid(theta[None], [1, 1, image_size, image_size], align_corners=False)


def change_colours(images: Tensor, u: Tensor, amount: float = 0.3) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in 1 - amount .. 1 + amount, per image.

    Args:
        images: (N, 3, H, W) in [0, 1].
        u: (N, >= 3) in [0, 1).
    """
    brightness, contrast, saturation = between(1 - amount, 1 + amount, u[:, :3]).T.view(3, -1, 1, 1, 1)
    images = images * brightness
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * saturation
    return images.clamp(0, 1)
