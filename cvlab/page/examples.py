"""Pictures to begin with: photographs that scikit-learn brings along, synthetic scenes, and the drawing of a horse."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cvlab.data import shapes
from cvlab.files import whole_file
from cvlab.page.host import own_folder

# Found without an import, which would take a tenth of the time until the first page.
PHOTOS = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
SCENE_SIDE = 256  # pixels of what is drawn
SCENES = {4022: "cross", 4019: "star", 4015: "square"}  # seeds, not among those of the synthetic train, val and test
# Corners in a square of 256 pixels: back, neck, head, and along the belly and the legs to the tail.
HORSE = (
    "52,102 58,90 74,84 110,84 132,82 152,60 164,44 170,34 176,40 184,46 200,64 198,72 188,72 178,66 170,82 164,104 "
    "158,120 162,160 160,206 166,214 152,214 152,150 146,130 140,160 138,206 142,214 130,214 130,160 128,128 92,128 "
    "82,136 86,160 78,186 82,206 86,214 72,214 68,188 72,162 64,140 58,160 56,186 56,206 60,214 46,214 44,186 48,156 "
    "48,122 42,106 36,140 32,130 36,106 44,96"
)


def example_files() -> dict[str, str]:
    """{path: caption}."""
    photos = {str(PHOTOS / "flower.jpg"): "flower", str(PHOTOS / "china.jpg"): "temple"}
    scenes = {scene_file(seed): caption for seed, caption in SCENES.items()}
    return photos | scenes | {_drawn("horse.png", lambda: horse(SCENE_SIDE)[0]): "horse"}


def scene_file(seed: int) -> str:
    """The path of a scene, which is drawn where its file is missing: at first, and after the disk was cleaned."""
    return _drawn(f"scene-{seed}.png", lambda: shapes.scene(seed, SCENE_SIDE).image)


def _drawn(name: str, draw: Callable[[], Image.Image]) -> str:
    path = own_folder() / "examples" / name
    if not path.is_file():
        with whole_file(path) as writing:
            draw().save(writing, "PNG")
    return str(path)


def horse(size: int) -> tuple[Image.Image, np.ndarray]:
    """A brown horse on a meadow under the sky, and its mask (size, size) bool."""
    rng, down = np.random.default_rng(0), np.linspace(0, 1, size)[:, None, None]
    noise = rng.normal(0, 0.04, (size, size, 1))
    meadow = np.array([0.36, 0.49, 0.24]) * (0.8 + 0.4 * down) + noise
    place = np.where(down < 0.5, np.array([0.66, 0.77, 0.87]) * (0.9 + 0.2 * down), meadow)
    coat = np.array([0.38, 0.24, 0.15]) * (1.25 - 0.6 * down) + noise / 2
    canvas = Image.new("L", (4 * size, 4 * size))  # larger, then reduced, for smooth edges
    corners = [tuple(int(each) * 4 * size // 256 for each in corner.split(",")) for corner in HORSE.split()]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    cover = np.asarray(canvas.reduce(4))[..., None] / 255
    pixels = np.clip(place + cover * (coat - place), 0, 1)
    return Image.fromarray(np.round(255 * pixels).astype(np.uint8)), cover[..., 0] > 0.5
