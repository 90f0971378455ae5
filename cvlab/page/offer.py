"""The models that a page offers: loaded when first asked for, once, and dropped when memory is needed for others."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from cvlab import checkpoint
from cvlab.checkpoint import hub
from cvlab.models import Model
from cvlab.page.shelf import Shelf

ROOT = Path(__file__).resolve().parents[2]
MAX_NAME = 300  # characters of a model's name
MAX_BYTES = 3 * 2**30  # of parameters and buffers, of all models in memory


def offered_models(root: Path, names: Sequence[str]) -> dict[str, str]:
    """What the picker offers, {name: folder or Hub name}: those asked for, then shipped, then local ones."""
    offered = {name: name for name in names}
    offered |= {config.parent.name: str(config.parent) for config in sorted(root.glob("checkpoints/*/config.json"))}
    offered |= {f"runs/{config.parent.name}": str(config.parent) for config in sorted(root.glob("runs/*/config.json"))}
    return offered


class Models:
    """The models of a page by name. A visitor can name a Hub model, but no folder of the server.

    A branch of the Hub is looked up once: as long as the page runs, its answers are those of one commit.

    Args:
        offered: name to folder or Hub name.
        owners: whose models on the Hub a visitor may name besides; none means everybody's.
        fetch: a Hub name to its folder.
        limit: bytes of the models in memory; those least recently asked for are dropped.
    """

    def __init__(
        self,
        offered: dict[str, str],
        owners: Sequence[str] = (),
        fetch: Callable[[str], Path] = hub.pull,
        limit: int = MAX_BYTES,
    ) -> None:
        self.offered = offered
        self.owners = owners
        self.shelf = Shelf(limit, bytes_of)
        self._fetch = lru_cache(maxsize=None)(fetch)

    def __getitem__(self, name: str) -> Model:
        """The model of an offered name (a shipped one also as checkpoints/NAME) or of a Hub name.

        Raises:
            ValueError: there is no such model, or it cannot be opened.
        """
        source = self._source(name)
        return self.shelf.get(source, lambda: checkpoint.load(self._folder(source)))

    def folder(self, name: str) -> Path:
        """Where the files of a model are; raises what opening it raises."""
        return self._folder(self._source(name))

    def public_name(self, name: str) -> str:
        """How someone else would call a model: a shipped one by its folder, never by a path of this machine."""
        source = Path(self.offered.get(name.removeprefix("checkpoints/"), name))
        inside = source.is_absolute() and source.is_relative_to(ROOT)
        return source.relative_to(ROOT).as_posix() if inside else name

    def _source(self, name: str) -> str:
        if not name or not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError("Choose a model, or type its name on the Hub (user/name).")
        if source := self.offered.get(name.removeprefix("checkpoints/")):
            return source
        if not hub.is_id(name):
            raise ValueError(
                f"There is no model {name[:99]!r}: choose one of the list, or type a Hub name (user/name)."
            )
        if self.owners and name.split("/")[0] not in self.owners:
            raise ValueError(f"This page opens models of {', '.join(self.owners)} only, not {name[:99]!r}.")
        return name

    def _folder(self, source: str) -> Path:
        return self._fetch(source) if hub.is_id(source) and not self._is_offered_folder(source) else Path(source)

    def _is_offered_folder(self, source: str) -> bool:
        """A name typed by a visitor is never a folder, also where there is one of that name."""
        return source in self.offered.values() and Path(source).is_dir()


def bytes_of(model: Model) -> int:
    """Of its parameters and buffers."""
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


def model_facts(model: Model) -> str:
    """What a model is, in plain text: names come from strangers and are never rendered."""
    classes = model.class_names
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    kind = "Tells apart" if model.task == "classification" else "Finds the pixels of"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    facts = f"{kind}: {shown}. It sees {model.image_size} x {model.image_size} pixels; {parameters:.1f} M parameters."
    return facts + (f" From the Hub: {model.source}." if hub.is_id(model.source) else "")
