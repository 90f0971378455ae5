"""Synthetic scenes with known evidence: data to train on without photos, and ground truth for explanations.

A scene has one or two shapes of one kind, which is its label, and distractors of other kinds on a textured background.
One distractor may cover part of a shape. The mask has the visible pixels of the labelled shapes: nothing else in the
picture depends on the label. A scene depends on its seed alone.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3  # polygons are drawn this much larger and then reduced, for smooth edges


def _regular_polygon(corners: int, turn: float = 0.0) -> np.ndarray:
    angles = 2 * np.pi * (np.arange(corners) / corners + turn)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    corners = _regular_polygon(2 * points)
    corners[1::2] *= inner
    return corners


def _cross(arm: float) -> np.ndarray:
    quarters = [np.array([[1, -arm], [1, arm], [arm, arm]])]
    for _ in range(3):
        quarters.append(quarters[-1] @ [[0, 1], [-1, 0]])  # a quarter turn
    return np.concatenate(quarters)


# Corners in units of the radius.
KINDS = {
    "circle": _regular_polygon(48),
    "cross": _cross(0.33),
    "square": _regular_polygon(4),
    "star": _star(5, 0.42),
    "triangle": _regular_polygon(3),
}
DISTRACTORS = {
    "bar": _regular_polygon(4, 0.125) * [1.3, 0.3],
    "lens": _regular_polygon(48) * [1.2, 0.4],
    "zigzag": np.array([[-1, -0.2], [-0.3, 0.5], [0.3, -0.5], [1, 0.2], [1, 0.6], [0.3, 0], [-0.3, 1], [-1, 0.3]]),
}
CLASS_NAMES = list(KINDS)


@dataclass(frozen=True)
class Scene:
    """A picture, its label (an index of CLASS_NAMES), and what its pixels show."""

    image: Image.Image
    label: int
    mask: np.ndarray  # where the labelled shapes are seen, (H, W) bool
    kinds: np.ndarray  # index of the labelled shape that each pixel shows, (H, W); -1 for everything else
    objects: np.ndarray  # where each object is seen, (K, H, W) bool


def scene(seed: int, size: int = 64, without: Collection[int] = (), mixed: bool = False) -> Scene:
    """The scene of a seed at `size` x `size` pixels. A seed gives the same scene at every size.

    It can be drawn again `without` some objects, indices of `Scene.objects`, with all else as it was: this shows what
    they are worth to a model. A `mixed` scene has two or three shapes, each of any kind; its label is the first one's.
    """
    rng = np.random.default_rng(seed)
    shown: list[np.ndarray] = []

    label, pixels = int(rng.integers(len(KINDS))), _texture(rng, size)
    targets = int(rng.integers(1, 3)) + mixed
    labels = [label, *rng.integers(len(KINDS), size=targets - 1)] if mixed else [label] * targets
    distractors = rng.choice(list(DISTRACTORS), size=int(rng.integers(2, 5)))
    centres = _apart(rng, targets + len(distractors))

    def draw(corners: np.ndarray, centre: np.ndarray, radius: float) -> None:
        nonlocal pixels
        cover = _cover(rng, size, corners, centre, radius) * (len(shown) not in without)
        pixels = pixels + cover[..., None] * (_texture(rng, size) - pixels)
        shown[:] = [before & (cover <= 0.5) for before in shown] + [cover > 0.5]

    # First the distractors, then the labelled shapes, then perhaps a distractor that covers part of the first shape.
    for name, centre in zip(distractors, centres[targets:], strict=True):
        draw(DISTRACTORS[name], centre, rng.uniform(0.07, 0.13))
    for each, centre in zip(labels, centres[:targets], strict=True):
        draw(KINDS[CLASS_NAMES[each]], centre, rng.uniform(0.16, 0.28))
    if rng.random() < 0.5:
        beside = centres[0] + rng.uniform(0.1, 0.15) * _regular_polygon(1, rng.random())[0]
        draw(DISTRACTORS["bar"], beside, 0.11)
    pixels = np.clip(pixels + rng.normal(0, 0.02, (size, size, 1)), 0, 1)
    image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    seen = shown[len(distractors) :][:targets]
    kinds = np.full((size, size), -1)
    for each, pixels_of in zip(labels, seen, strict=True):
        kinds[pixels_of] = each
    return Scene(image, label, kinds >= 0, kinds, np.stack(shown))


def _apart(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Centres in the unit square. Each is the one of eight random points that is farthest from the centres before."""
    centres: list[np.ndarray] = []
    for _ in range(count):
        tries = rng.uniform(0.2, 0.8, size=(8, 2))
        distances = [min((np.linalg.norm(t - c) for c in centres), default=1.0) for t in tries]
        centres.append(tries[int(np.argmax(distances))])
    return centres


def _cover(rng: np.random.Generator, size: int, corners: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    """How far a turned shape covers each pixel: (size, size) in [0, 1]."""
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = (centre + radius * corners @ rotation.T) * size * SUPERSAMPLING
    canvas = Image.new("L", (size * SUPERSAMPLING,) * 2)
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING)) / 255


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) in [0, 1]: patches that mix two similar colours, with faint stripes."""
    first = rng.uniform(0.1, 0.9, size=3)
    second = np.clip(first + rng.uniform(-0.3, 0.3, size=3), 0, 1)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    direction, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(4, 14), rng.uniform(0, 2 * np.pi)
    wave = np.cos(2 * np.pi * frequency * (x * np.cos(direction) + y * np.sin(direction)) + phase)
    coarse = Image.fromarray(rng.random((5, 5)).astype(np.float32))
    patches = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    share = np.clip(patches, 0, 1)[..., None]
    return np.clip(share * first + (1 - share) * second + rng.uniform(0, 0.08) * wave[..., None], 0, 1)
