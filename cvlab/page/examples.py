"""Pictures to begin with: photographs that scikit-learn brings along, and synthetic scenes."""

import atexit
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cvlab.data import shapes

EXAMPLE_SEEDS = (4022, 4019, 4015)  # not among those of the synthetic train, val and test parts


@cache
def example_files() -> dict[str, str]:
    """{path: caption}. The scenes are drawn once a process, into a folder that is deleted when the process ends."""
    # Found without an import, which would take a tenth of the time until the first page.
    photos = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
    folder = tempfile.TemporaryDirectory(prefix="cvlab-examples-")
    atexit.register(folder.cleanup)
    examples = {str(photos / "flower.jpg"): "flower", str(photos / "china.jpg"): "temple"}
    for seed in EXAMPLE_SEEDS:
        scene = shapes.scene(seed, size=256)
        path = Path(folder.name) / f"scene-{seed}.png"
        scene.image.save(path)
        examples[str(path)] = shapes.CLASS_NAMES[scene.label]
    return examples
