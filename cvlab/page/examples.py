"""Pictures to begin with: photographs that scikit-learn brings along, and synthetic scenes."""

from importlib.util import find_spec
from pathlib import Path

from cvlab.data import shapes
from cvlab.files import whole_file
from cvlab.page.host import own_folder

# Found without an import, which would take a tenth of the time until the first page.
PHOTOS = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
SCENES = {4022: "cross", 4019: "star", 4015: "square"}  # seeds, not among those of the synthetic train, val and test


def example_files() -> dict[str, str]:
    """{path: caption}. A scene is drawn where its file is missing: at first, and after somebody cleaned the disk."""
    examples = {str(PHOTOS / "flower.jpg"): "flower", str(PHOTOS / "china.jpg"): "temple"}
    for seed, caption in SCENES.items():
        path = own_folder() / "examples" / f"scene-{seed}.png"
        if not path.is_file():
            with whole_file(path) as writing:
                shapes.scene(seed, size=256).image.save(writing, "PNG")
        examples[str(path)] = caption
    return examples
