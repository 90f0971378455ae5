"""Pictures to begin with: photographs that scikit-learn brings along, and synthetic scenes."""

from importlib.util import find_spec
from pathlib import Path

from cvlab.data import shapes
from cvlab.files import whole_file
from cvlab.page.host import own_folder

# Found without an import, which would take a tenth of the time until the first page.
PHOTOS = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
SCENES = {4022: "cross", 4019: "star", 4015: "square"}  # seeds, not among those of the synthetic train, val and test
SCENE_SIDE = 256  # pixels


def example_files() -> dict[str, str]:
    """{path: caption}."""
    photos = {str(PHOTOS / "flower.jpg"): "flower", str(PHOTOS / "china.jpg"): "temple"}
    return photos | {scene_file(seed): caption for seed, caption in SCENES.items()}


def scene_file(seed: int) -> str:
    """The path of a scene. It is drawn where its file is missing: at first, and after somebody cleaned the disk."""
    path = own_folder() / "examples" / f"scene-{seed}.png"
    if not path.is_file():
        with whole_file(path) as writing:
            shapes.scene(seed, SCENE_SIDE).image.save(writing, "PNG")
    return str(path)
