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
        if high < 4096:  # cameras of microscopes often store 10 or 12 bits in 16; what is white to them is not said
            notes.append(f"Its brightest pixel is {high:g} of 65535, so it is dark. Has it fewer bits? Scale it first.")
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
    return images / 255


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
        u: (N, UNIFORMS_PER_IMAGE) in [0, 1), on the device of the images.
        min_area: smallest part of a photo's area that a crop may show.
        degrees: largest rotation either way.

    Returns:
        (N, 3, S, S) float32 in [0, 1].
    """
    heights, widths = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32, device=u.device).T
    areas = between(min_area, 1.0, u[:, 0]) * widths * heights
    aspects = between(math.log(3 / 4), math.log(4 / 3), u[:, 1]).exp()
    crop_w = torch.minimum(widths, (areas * aspects).sqrt())
    crop_h = torch.minimum(heights, areas / crop_w)
    crop_w = torch.minimum(widths, areas / crop_h)  # wider again where the photo is too low for the aspect
    centre_x = crop_w / 2 + (widths - crop_w) * u[:, 2]
    centre_y = crop_h / 2 + (heights - crop_h) * u[:, 3]
    angles = math.radians(degrees) * (2 * u[:, 4] - 1)
    grids = crop_grids(heights, widths, image_size, centre_x, centre_y, crop_w, crop_h, angles, flips=u[:, 5] < 0.5)
    views = [
        F.grid_sample(to_float(image[None]), grid[None], padding_mode="reflection", align_corners=False)
        for image, grid in zip(images, grids, strict=True)  # one by one: photos differ in size
    ]
    return change_colours(torch.cat(views), u[:, 6:])


def train_pairs(
    images: Tensor, masks: Tensor, u: Tensor, zoom: Sequence[float] = (1 / 1.4, 1.4), degrees: float = 15.0
) -> tuple[Tensor, Tensor]:
    """Zoom in or out, shift, rotation and flip, the same for image and mask, and colour for the image.

    Args:
        images: (N, 3, S, S) uint8.
        masks: (N, C, S, S) bool.
        u: (N, UNIFORMS_PER_IMAGE) in [0, 1), on the device of the images.
        zoom: smallest and largest factor; beyond the edges of a photo that is made smaller, it is mirrored.
        degrees: largest rotation either way.

    Returns:
        images (N, 3, S, S) float32 in [0, 1] and masks (N, C, S, S) bool.
    """
    size = images.shape[-1]
    side = size * torch.exp(between(-math.log(zoom[1]), -math.log(zoom[0]), u[:, 0]))  # of the crop
    room = (size - side).abs()
    centre_x, centre_y = size / 2 + room * (u[:, 2] - 0.5), size / 2 + room * (u[:, 3] - 0.5)
    angles = math.radians(degrees) * (2 * u[:, 4] - 1)
    sizes = torch.full_like(side, size)
    grid = crop_grids(sizes, sizes, size, centre_x, centre_y, side, side, angles, flips=u[:, 5] < 0.5)
    moved = F.grid_sample(to_float(images), grid, padding_mode="reflection", align_corners=False)
    moved_masks = F.grid_sample(masks.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return change_colours(moved, u[:, 6:]), moved_masks > 0.5


def crop_grids(
    heights: Tensor,
    widths: Tensor,
    image_size: int,
    centre_x: Tensor,
    centre_y: Tensor,
    crop_w: Tensor,
    crop_h: Tensor,
    angles: Tensor,
    flips: Tensor,
) -> Tensor:
    """Where each output pixel is read: (N, S, S, 2) for `grid_sample`, coordinates of the sources in [-1, 1].

    A crop is a rectangle in pixels of its source (height, width), turned about its centre by an angle in radians. All
    arguments but S = `image_size` are (N,).
    """
    half_w, half_h = torch.where(flips, -crop_w, crop_w) / 2, crop_h / 2
    cos, sin = angles.cos(), angles.sin()
    thetas = torch.stack(
        [
            torch.stack([cos * half_w / widths, sin * half_w / heights]),
            torch.stack([-sin * half_h / widths, cos * half_h / heights]),
            torch.stack([centre_x / widths - 0.5, centre_y / heights - 0.5]),
        ]
    )
    across, down, middle = 2 * thetas.transpose(1, 2)[..., None, None]  # (N, 2, 1, 1) each
    pixels = torch.arange(image_size, dtype=torch.float32, device=angles.device)
    steps = (2 * pixels + 1) / image_size - 1  # their centres
    # F.affine_grid does the same in ten times the time.
    return (across * steps + (down * steps[:, None] + middle)).permute(0, 2, 3, 1)


def change_colours(images: Tensor, u: Tensor, amount: float = 0.3) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in 1 - amount .. 1 + amount, per image.

    Args:
        images: (N, 3, H, W) in [0, 1].
        u: (N, >= 3) in [0, 1).
    """
    brightness, contrast, saturation = between(1 - amount, 1 + amount, u[:, :3]).T.view(3, -1, 1, 1)
    # All three are linear in a pixel's colour, so they are one matrix and one shift: a pass over the images, not ten.
    mean = brightness * images.mean(dim=(1, 2, 3)).view(-1, 1, 1)
    identity = torch.eye(3, device=images.device)
    matrix = contrast * brightness * (saturation * identity + (1 - saturation) / 3)  # (N, 3, 3)
    return torch.baddbmm(mean * (1 - contrast), matrix, images.flatten(2)).clamp_(0, 1).view_as(images)
