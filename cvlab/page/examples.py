"""Pictures to begin with: photographs that scikit-learn brings along, and synthetic scenes."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cvlab.data import shapes
from cvlab.files import whole_file
from cvlab.page.start import own_folder

EXAMPLE_SEEDS = (4022, 4019, 4015)  # not among those of the synthetic train, val and test parts


def example_files() -> dict[str, str]:
    """{path: caption}. A scene is drawn where its file is missing: at first, and after somebody cleaned the disk."""
    examples = {str(_photos() / "flower.jpg"): "flower", str(_photos() / "china.jpg"): "temple"}
    for seed in EXAMPLE_SEEDS:
        path = own_folder() / "examples" / f"scene-{seed}.png"
        if not path.is_file():
            with whole_file(path) as writing:
                _scene(seed).image.save(writing, "PNG")
        examples[str(path)] = shapes.CLASS_NAMES[_scene(seed).label]
    return examples


@cache
def _photos() -> Path:
    # Found without an import, which would take a tenth of the time until the first page.
    return Path(find_spec("sklearn").origin).parent / "datasets" / "images"


@cache
def _scene(seed: int) -> shapes.Scene:
    return shapes.scene(seed, size=256)
