"""The models that a page offers: each is loaded when it is first asked for, and dropped when others need the memory."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from cvlab import checkpoint
from cvlab.checkpoint import hub
from cvlab.data import shapes
from cvlab.explain import METHODS, explain
from cvlab.models import Model, device
from cvlab.models.adopted import IN_FILE
from cvlab.page.cache import Cache
from cvlab.page.html import quoted
from cvlab.transforms import view
from cvlab.trust import familiarity
from cvlab.trust.familiarity import nearest

ROOT = Path(__file__).resolve().parents[2]
MAX_NAME = 300  # characters of a model's name
# Chosen for a process of 4 GiB: about 1 without any model, these, 0.25 of what is cached about photos, and one opening.
MAX_BYTES = 3 * 2**28  # of all models in memory
MOST_GIB = 1.5  # of memory, to open and explain a model that the owner of the page did not name
TOLERANCE = 1e-3  # of a map's largest value: by how much the maps of the faster copy may differ
TEST_SCENE = 4015  # its seed


def offered_models(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The models to choose from, {name: folder or Hub name}: those that were named, then checkpoints/, then runs/.

    Raises:
        ValueError: a name is neither a folder with a model nor a name on the Hub.
    """
    offered = {name: name for name in map(hub.name_of, names)}
    for name in offered:
        if not (Path(name) / "config.json").is_file() and (Path(name).is_dir() or not hub.is_id(name)):
            raise ValueError(f"{name} is neither a folder with a config.json nor a name on the Hub (user/name).")
    offered |= {config.parent.name: str(config.parent) for config in sorted(root.glob("checkpoints/*/config.json"))}
    offered |= {f"runs/{config.parent.name}": str(config.parent) for config in sorted(root.glob("runs/*/config.json"))}
    return offered


class Models:
    """The models of a page by name. A visitor can name a model on the Hub, but no folder of the server.

    A branch on the Hub is looked up once, so that all answers come from one commit while the page runs.

    Args:
        offered: name to folder, Hub name or FILE.py:FUNCTION, whose model is kept, and answers as it is.
        owners: whose other models on the Hub a visitor may name; empty for everybody's.
        fetch: downloads a Hub name and returns its folder.
        limit: bytes of the models in memory, by default of a GPU half of its own; the least recently used are dropped.
    """

    def __init__(
        self,
        offered: dict[str, str],
        owners: Sequence[str] = (),
        fetch: Callable[[str], Path] = hub.pull,
        limit: int | None = None,
    ) -> None:
        self.offered, self.owners = offered, owners
        room = torch.cuda.mem_get_info()[1] // 2 if device().type == "cuda" else MAX_BYTES
        self.loaded = Cache(limit or room, bytes_of)
        self._fetch, self._fetched = fetch, lru_cache(maxsize=None)(fetch)
        self._made = lru_cache(maxsize=None)(checkpoint.load_own)

    def __getitem__(self, name: str) -> Model:
        """The `faster_copy` of an offered model (a shipped one also as checkpoints/NAME) or of one on the Hub.

        Raises:
            ValueError: there is no such model, or it cannot be opened.
        """
        source = self._source(name)
        if IN_FILE.fullmatch(source):
            return self._made(source)
        budget = {"most_gib": MOST_GIB} if self.is_foreign(name) else {}
        return self.loaded.get(source, lambda: faster_copy(checkpoint.load(self._folder(source), **budget)))

    def is_foreign(self, name: str) -> bool:
        """Whether a model is none of those that the owner of the page named. Raises the same errors as opening it."""
        return self._source(name) not in self.offered.values()

    def folder(self, name: str) -> Path:
        """The folder with the model's files. Raises the same errors as opening it."""
        if IN_FILE.fullmatch(source := self._source(name)):
            raise ValueError(f"This model is not in a folder but made by {source}, so it has no report.")
        return self._folder(source)

    def public_name(self, name: str) -> str:
        """The name for other people: a shipped model's folder in the project, never a path of this machine."""
        name = hub.name_of(name)
        source = Path(self.offered.get(name.removeprefix("checkpoints/"), name))
        inside = source.is_absolute() and source.is_relative_to(ROOT)
        return source.relative_to(ROOT).as_posix() if inside else name

    def _source(self, name: str) -> str:
        if not name or not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError("Choose a model, or type its name on the Hub (user/name).")
        name = hub.name_of(name)
        if source := self.offered.get(name.removeprefix("checkpoints/")):
            return source
        if not hub.is_id(name):
            raise ValueError(
                f"There is no model {quoted(name)}: choose one from the list, or type a Hub name (user/name)."
            )
        if self.owners and name.split("/")[0] not in self.owners:
            raise ValueError(f"This page opens models of {', '.join(self.owners)} only, not {quoted(name)}.")
        return name

    def _folder(self, source: str) -> Path:
        # A name that a visitor typed is never a folder, even where a folder has that name.
        offered = source in self.offered.values() and Path(source).is_dir()
        if offered or not hub.is_id(source):
            return Path(source)
        folder = self._fetched(source)
        if not all((folder / name).is_file() for name in hub.NEEDED):
            folder = self._fetch(hub.source_of(folder))  # somebody emptied the cache: the same commit again
        return folder


def faster_copy(model: Model) -> Model:
    """A copy with batch normalisation fused into the convolutions, which answers faster, on the GPU if there is one.

    The model itself, if a map of any stage differs by more than TOLERANCE of its maximum on a synthetic scene.
    """
    from cvlab.models.fused import fused  # imported here: it takes time that the first page need not wait for

    images = view(shapes.scene(TEST_SCENE, model.image_size).image, model)[:, [i % 3 for i in range(model.in_channels)]]
    try:
        if model.statistics:
            _ = familiarity(model, images), nearest(model, images) if "rows" in model.statistics else None
    except (ValueError, RuntimeError):  # a stranger's statistics may be of another network
        model.statistics = None
    model = model.to(device())
    copy = fused(model).eval()
    own, theirs = (explain(each, images, _first_class, None, tuple(METHODS)).maps for each in (model, copy))
    for method, stages in own.items():
        for stage, attribution in stages.items():
            if (theirs[method][stage] - attribution).abs().max() > TOLERANCE * attribution.abs().max():
                return model
    return copy


def _first_class(logits: Tensor) -> Tensor:
    """A score that every model has: the first class's logit, of a segmenter its mean over the picture."""
    return logits[:, 0].reshape(len(logits), -1).mean(1)


def bytes_of(model: Model) -> int:
    """Bytes of the parameters and buffers."""
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
