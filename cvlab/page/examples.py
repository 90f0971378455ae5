"""Pictures to begin with: photographs that scikit-learn brings along, and synthetic scenes."""

from importlib.util import find_spec
from pathlib import Path

from cvlab.data import shapes

EXAMPLE_SEEDS = (4022, 4019, 4015)  # beyond those that cvlab/data/parts.py gives to train, val and test


def example_files(folder: Path) -> dict[str, str]:
    """{path: caption}; the scenes are written to the folder."""
    # Found without importing it, which would take a tenth of the time until the page is there.
    photos = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
    examples = {str(photos / "flower.jpg"): "flower", str(photos / "china.jpg"): "temple"}
    for seed in EXAMPLE_SEEDS:
        scene = shapes.scene(seed, size=256)
        path = folder / f"scene-{seed}.png"
        scene.image.save(path)
        examples[str(path)] = shapes.CLASS_NAMES[scene.label]
    return examples
