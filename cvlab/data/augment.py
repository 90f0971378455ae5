"""Augmentation on tensors: random crops, rotations, flips and colours, and images mixed in pairs.

Each image has a row of random numbers (`uniforms`), which decide its crop, rotation, flip and colour; a mask is
transformed by the numbers of its image.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from cvlab.tiles import window
from cvlab.transforms import to_float

UNIFORMS_PER_IMAGE = 12


def uniforms(seed: int, epoch: int, indices: Sequence[int]) -> Tensor:
    """(N, UNIFORMS_PER_IMAGE) random numbers in [0, 1) that depend on (seed, epoch, index) alone.

    So an image is augmented in the same way in any batch, in any process, and after a restart.
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
    images: Sequence[Tensor],
    image_size: int,
    u: Tensor,
    min_area: float = 0.35,
    jitter: float = 0.3,
    degrees: float = 15,
    erase: float = 0.0,
) -> Tensor:
    """Random resized crop, rotation, horizontal flip and colour for a classifier.

    Args:
        images: N of (3, h, w) uint8, of any sizes.
        u: (N, UNIFORMS_PER_IMAGE) in [0, 1), on the device of the images.
        min_area: smallest share of a photo's area that a crop may show.
        jitter: of `change_colours`.
        degrees: largest rotation either way.
        erase: of `erased`.

    Returns:
        (N, 3, S, S) float32 in [0, 1], where S is `image_size`.
    """
    heights, widths = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32, device=u.device).T
    areas = between(min_area, 1.0, u[:, 0]) * widths * heights
    aspects = between(math.log(3 / 4), math.log(4 / 3), u[:, 1]).exp()
    crop_w = torch.minimum(widths, (areas * aspects).sqrt())
    crop_h = torch.minimum(heights, areas / crop_w)
    crop_w = torch.minimum(widths, areas / crop_h)  # a photo may be too low for the aspect
    centre_x = crop_w / 2 + (widths - crop_w) * u[:, 2]
    centre_y = crop_h / 2 + (heights - crop_h) * u[:, 3]
    angles = math.radians(degrees) * (2 * u[:, 4] - 1)
    grids = crop_grids(heights, widths, image_size, centre_x, centre_y, crop_w, crop_h, angles, flips=u[:, 5] < 0.5)
    views = [
        F.grid_sample(to_float(image[None]), grid[None], padding_mode="reflection", align_corners=False)
        for image, grid in zip(images, grids, strict=True)  # one by one: photos differ in size
    ]
    return erased(change_colours(torch.cat(views), u[:, 6:], jitter), u[:, 9], erase)


def train_pairs(
    images: Tensor,
    masks: Tensor,
    u: Tensor,
    zoom: Sequence[float] = (1 / 1.4, 1.4),
    jitter: float = 0.3,
    degrees: float = 15.0,
    erase: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Zoom in or out, shift, rotation and flip, the same for image and mask, and colour for the image.

    Args:
        images: (N, 3, S, S) uint8.
        masks: (N, C, S, S) bool.
        zoom: smallest and largest factor; a photo that is made smaller is mirrored beyond its edges.
        u, jitter, degrees: as in `train_views`.
        erase: of `erased`; masks stay whole.

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
    return erased(change_colours(moved, u[:, 6:], jitter), u[:, 9], erase), moved_masks > 0.5


def random_square(photo: Tensor, side: int, u: Tensor) -> Tensor:
    """A square (..., S, S) anywhere in a photo or mask (..., H, W); the last two of its `uniforms` say where."""
    top, left = ((u[-2:] * (torch.tensor(photo.shape[-2:]) - side + 1)).long()).tolist()
    return window(photo, top, left, side)


def mirrored(images: Tensor, u: Tensor) -> Tensor:
    """Images or masks (N, C, H, W), those of them mirrored left to right that the functions above mirror too."""
    return torch.where((u[:, 5] < 0.5)[:, None, None, None], images.flip(3), images)


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
    """Where each output pixel is read: (N, S, S, 2) for `grid_sample`, coordinates in the sources, [-1, 1].

    A crop is a rectangle in pixels of its source (height, width), rotated about its centre by an angle in radians. All
    arguments except S = `image_size` are (N,).
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


def change_colours(images: Tensor, u: Tensor, jitter: float = 0.3) -> Tensor:
    """Changes brightness, contrast and saturation of images (N, 3, H, W) in [0, 1], each by a factor in 1 -+ jitter."""
    if images.shape[1] != 3:  # these are no colours
        return images
    brightness, contrast, saturation = between(1 - jitter, 1 + jitter, u[:, :3]).T.view(3, -1, 1, 1)
    # All three are linear in a pixel's colour: together one matrix and one shift, in a single pass over the images.
    mean = brightness * images.mean(dim=(1, 2, 3)).view(-1, 1, 1)
    identity = torch.eye(3, device=images.device)
    matrix = contrast * brightness * (saturation * identity + (1 - saturation) / 3)  # (N, 3, 3)
    return torch.baddbmm(mean * (1 - contrast), matrix, images.flatten(2)).clamp_(0, 1).view_as(images)


def erased(images: Tensor, u: Tensor, share: float) -> Tensor:
    """Greys one cell of a 4 x 4 grid in a `share` of the images (N, 3, H, W); `u` (N,) in [0, 1) decides which.

    For a model trained so, a picture with a cell hidden is nothing unusual, so hiding cells can test its heatmaps
    (Hesse, Schaub-Meyer and Roth, "Benchmarking the Attribution Quality of Vision Models", 2024).
    """
    if not share:
        return images
    chosen = (u * 16 / share).floor()[:, None] == torch.arange(16, device=u.device)  # none where u >= share
    hidden = F.interpolate(chosen.float().view(-1, 1, 4, 4), images.shape[-2:])
    return torch.where(hidden > 0, 0.5, images)


def mixing(mixup: float, cutmix: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 3, S, S) and class indices (N,) to images and targets (N, C), mixed in pairs.

    Args:
        mixup: alpha of blending two images (Zhang et al., "mixup", 2018); 0: never.
        cutmix: alpha of pasting a box of another image (Yun et al., "CutMix", 2019); 0: never.
    """
    if mixup or cutmix:
        return Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)
    return lambda images, labels: (images, F.one_hot(labels, num_classes).float())
