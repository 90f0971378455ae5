"""A network in two pieces: a frozen front, whose output is computed once for each picture, and the rest, which learns.

Both share the network's modules: who trains the rest trains the network.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset
from tqdm import tqdm

from cvlab.models import Model


def heights(model: Model) -> dict[str, int]:
    """For each parameter how far below the logits it is: 0 in the head, 1 in the last layer of the backbone, then 2 ...

    Layers are timm's (`group_matcher`): a residual block, a block of a transformer, a convolution of VGG.

    Args:
        model: a TimmClassifier or a BackboneWithHead.
    """
    backbone = model.backbone
    layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    in_heads = {id(parameter) for head in _classifiers(backbone) for parameter in head.parameters()}
    layers = {name: layers[name] for name, p in backbone.named_parameters() if id(p) not in in_heads}
    below = {f"backbone.{name}": max(layers.values()) + 1 - layer for name, layer in layers.items()}
    return {name: below.get(name, 0) for name, _ in model.named_parameters()}


def _classifiers(backbone: nn.Module) -> list[nn.Module]:
    classifier = backbone.get_classifier()
    return list(classifier) if isinstance(classifier, tuple | list) else [classifier]  # distilled transformers have two


def start_classifier(model: Model) -> None:
    """A small beginning for timm's last layer: some of its networks draw one that drowns what features say."""
    for module in _classifiers(model.backbone):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def freeze(model: Model, layers: int = 0) -> None:
    """Lets the head and the last `layers` of the backbone learn, and nothing else; gradients of before are dropped.

    Batch normalisation of the backbone never learns: its statistics are of millions of pictures.
    """
    below = heights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(below[name] <= layers)
    for module in model.backbone.modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def train_mode(model: Model) -> None:
    """Training mode for what learns. What is frozen stays in eval mode, or its statistics would move."""
    model.train()
    for module in model.modules():
        frozen = [not parameter.requires_grad for parameter in module.parameters()]
        if isinstance(module, _BatchNorm) or (frozen and all(frozen)):
            module.eval()


def cut(model: Model, images: Tensor) -> tuple[nn.Module, nn.Module] | None:
    """Where a partly frozen model can be cut: the first module that learns, and the model from there on.

    The second takes what enters the first (see `entering`) and returns the logits. It is the head alone or, where the
    way there is a chain, the model with nothing in the place of what lies before. Which it is, is tried on `images`.

    Returns:
        None where the model has to be run as a whole: it learns from its beginning on, or it uses what lies before
        the cut again behind it, as transformers do.
    """
    model.eval()
    with torch.no_grad():
        logits = model(images)
        path = _first_that_learns(model)
        while path:
            first = model.get_submodule(path)
            features = entering(model, first, images)
            for rest in (first, _without_front(model, path.split("."))):
                if _puts_out(rest, features, logits):
                    return None if features.shape == images.shape else (first, rest)  # pictures are no features
            path = path.rpartition(".")[0]  # a cut inside a block may miss its shortcut: before the block, then
    return None


class _ReachedError(Exception):
    """Ends a forward pass at the module that is asked about."""


def entering(model: Model, module: nn.Module, images: Tensor) -> Tensor:
    """What enters a module of the model for these images; what lies behind is not computed.

    Args:
        images: (N, 3, S, S) in [0, 1].
    """
    seen = []

    def stop(_: nn.Module, inputs: tuple) -> None:
        seen.extend(inputs)
        raise _ReachedError

    hook = module.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            model(images)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return seen[0]


class FeatureSet(Dataset):
    """Pictures as the frozen front of a model puts them out, computed once.

    Set `epoch` before each one: where a picture has several views, it chooses among them in turn.

    Args:
        pictures: batches of images and labels by indices; their `epoch` is the number of the view, from 1.
        views: how many of each picture are kept.
        front: images (N, 3, S, S) to what is kept of them, N first.
        batch_size: pictures that go through the front at once.
        device: where the front is.
    """

    def __init__(
        self,
        pictures: Dataset,
        views: int,
        front: Callable[[Tensor], Tensor],
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        starts = range(0, len(pictures), batch_size)
        progress = tqdm(total=views * len(pictures), desc="features", leave=False, unit=" images")
        self.views, self.epoch = [], 1
        for view in range(1, views + 1):
            pictures.epoch, kept, labels = view, [], []
            for start in starts:
                images, some = pictures.__getitems__(list(range(start, min(start + batch_size, len(pictures)))))
                images = images.to(device)
                if images.ndim == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                kept.append(front(images).cpu())
                labels.append(some)
                progress.update(len(images))
            self.views.append(torch.cat(kept))
        self.labels = torch.cat(labels)
        progress.close()

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.views[0].shape[1:]))
        megabytes = sum(view.nbytes for view in self.views) / 1e6
        return f"features of {shape} of {len(self)} pictures in {len(self.views)} views, {megabytes:.0f} MB"

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.views[(self.epoch - 1) % len(self.views)][indices], self.labels[indices]


def computed_once(
    network: nn.Module, pictures: Sequence[Dataset], views: int, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Dataset, Dataset]:
    """What learns of a network, with what enters it for the pictures of train and val.

    That is the network itself with the pictures where they have ever other views, or where it cannot be cut.

    Args:
        pictures: of train and val, as FeatureSet takes them.
        views: of each training picture; 0 are ever others. A picture of val has one.
    """
    inputs, _ = pictures[1].__getitems__(list(range(min(batch_size, len(pictures[1])))))
    pieces = cut(network, inputs.to(device)) if views else None
    if pieces is None:
        return network, *pictures
    first, rest = pieces
    front = partial(entering, network, first)
    train, val = (
        FeatureSet(each, count, front, batch_size, device) for each, count in zip(pictures, (views, 1), strict=True)
    )
    return rest, train, val


def _puts_out(rest: nn.Module, features: Tensor, logits: Tensor) -> bool:
    try:
        found = rest(features)
    except Exception:  # a network that is no chain may meet anything where a part of it is missing
        return False
    same = isinstance(features, Tensor) and isinstance(found, Tensor) and found.shape == logits.shape
    return same and (found - logits).abs().max().item() <= 1e-5 * logits.abs().max().item()


def _first_that_learns(module: nn.Module) -> str:
    """The path to the innermost module that learns first, in the order in which modules were registered."""
    for name, child in module.named_children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            return f"{name}.{_first_that_learns(child)}".rstrip(".")
    return ""


def _without_front(module: nn.Module, path: list[str]) -> nn.Module:
    """A copy that shares parameters and submodules; those before the one at `path` do nothing."""
    rest = copy.copy(module)
    rest._modules = dict(module._modules)
    for name, child in module._modules.items():
        if name == path[0]:
            rest._modules[name] = _without_front(child, path[1:]) if len(path) > 1 else child
            return rest
        rest._modules[name] = nn.Identity()
    return rest
