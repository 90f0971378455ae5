"""Splits a model into a frozen part, run once and cached, and the trainable rest.

Both share the model's modules: training the rest trains the model.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cvlab.models import Model


def heights(model: Model) -> dict[str, int]:
    """How far below the logits each parameter is: 0 in the head, 1 in the last layer of the backbone, and so on.

    The model is a TimmClassifier or a BackboneWithHead. Layers are timm's (`group_matcher`): a residual block, a block
    of a transformer, a convolution of VGG. Those of an SmpUNet are its encoder's resolutions.
    """
    if model.task == "segmentation":
        return model.heights()
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
    """Initialises the classifier small: some timm models start with weights that swamp the features."""
    for module in _classifiers(model.backbone):
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def freeze(model: Model, layers: int = 0) -> None:
    """Makes the head and the last `layers` of the backbone trainable, and nothing else; drops all gradients.

    Batch normalisation of the backbone stays frozen: its statistics come from millions of pictures.
    """
    below = heights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(below[name] <= layers)
    for module in (model.encoder if model.task == "segmentation" else model.backbone).modules():
        if isinstance(module, _BatchNorm):
            module.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def train_mode(model: Model) -> None:
    """Training mode for what learns; what is frozen stays in eval mode, so that its statistics do not change."""
    model.train()
    for module in model.modules():
        frozen = [not parameter.requires_grad for parameter in module.parameters()]
        if all(frozen) and (frozen or isinstance(module, _BatchNorm)):
            module.eval()


def cut(model: Model, images: Tensor) -> tuple[nn.Module, nn.Module] | None:
    """Cuts a partly frozen model before the first module that learns: returns this module, and the model from there.

    The second takes what enters the first (see `entering`) and returns the logits. It is the head alone, or a copy of
    the model without the modules before the cut if those are a chain. Which of them works is tried on `images`.

    Returns None if the model cannot be cut: it learns from its beginning, or uses again behind the cut what was
    computed before it, as transformers do.
    """
    model.eval()
    with torch.no_grad():
        logits = model(images)
        path = _first_that_learns(model)
        while path:
            first = model.get_submodule(path)
            features = entering(model, first, images)
            for rest in (first, _without_front(model, path)):
                if _puts_out(rest, features, logits):
                    return None if features.shape == images.shape else (first, rest)  # pictures are no features
            path = path.rpartition(".")[0]  # inside a block its shortcut may be missing: try before the block
    return None


def entering(model: Model, module: nn.Module, images: Tensor) -> Tensor | None:
    """The input of a module of the model for images (N, 3, S, S) in [0, 1]; None if the model does not call it."""
    seen: list[Tensor] = []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs)):
        model(images)
    return seen[0] if seen else None


class FeatureSet(Dataset):
    """The outputs of the frozen part of a model for all pictures, computed once.

    Set `epoch` before each one: it selects one of several views of each picture, in turn.

    Args:
        pictures: gives batches of images and labels for indices; its `epoch` is set to the number of the view, from 1.
        views: how many views of each picture are computed.
        front: the frozen part: images (N, 3, S, S) to features (N, ...).
        batch_size: pictures per forward pass.
        device: where the frozen part is.
    """

    def __init__(
        self,
        pictures: Dataset,
        views: int,
        front: Callable[[Tensor], Tensor],
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        loader = DataLoader(pictures, batch_size, collate_fn=tuple, generator=torch.Generator())  # whole batches
        self.views, self.epoch = [], 1
        for view in range(1, views + 1):
            pictures.epoch = view
            batches = tqdm(loader, f"features {view}/{views}", leave=False)
            kept = [(front(images.to(device)).cpu(), labels) for images, labels in batches]
            features, self.labels = map(torch.cat, zip(*kept, strict=True))
            self.views.append(features)

    def __len__(self) -> int:
        return len(self.labels)

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.views[0].shape[1:]))
        megabytes = sum(view.nbytes for view in self.views) / 1e6
        return f"features of {shape} of {len(self)} pictures in {len(self.views)} views, {megabytes:.0f} MB"

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.views[(self.epoch - 1) % len(self.views)][indices], self.labels[indices]


def computed_once(
    network: nn.Module, train_set: Dataset, val_set: Dataset, views: int, batch_size: int, device: torch.device | str
) -> tuple[nn.Module, Dataset, Dataset]:
    """The part of a network that learns, and data sets of what enters it, computed once for train and val.

    `views` is their number for each training picture, 0 if every epoch augments anew. Network and data sets are
    returned as they are if it is 0 or the network cannot be cut.
    """
    inputs, _ = val_set.__getitems__(list(range(min(batch_size, len(val_set)))))
    pieces = cut(network, inputs.to(device)) if views else None
    if pieces is None:
        return network, train_set, val_set
    first, rest = pieces
    settings = {"front": partial(entering, network, first), "batch_size": batch_size, "device": device}
    return rest, FeatureSet(train_set, views, **settings), FeatureSet(val_set, 1, **settings)


def _puts_out(rest: nn.Module, features: Tensor, logits: Tensor) -> bool:
    try:
        found = rest(features)
    except Exception:  # a network that is not a chain may fail in any way without its front
        return False
    same = isinstance(features, Tensor) and isinstance(found, Tensor) and found.shape == logits.shape
    return same and (found - logits).abs().max().item() <= 1e-5 * logits.abs().max().item()


def _first_that_learns(module: nn.Module) -> str:
    """The path to the innermost module that learns first, in the order in which modules were registered."""
    for name, child in module.named_children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            return f"{name}.{_first_that_learns(child)}".rstrip(".")
    return ""


def _without_front(model: nn.Module, path: str) -> nn.Module:
    """A copy that shares all tensors; the modules before `path` are replaced by nn.Identity."""
    rest = parent = copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
    for name in path.split("."):
        for child in dict(parent.named_children()):
            if child == name:
                break
            setattr(parent, child, nn.Identity())
        parent = parent.get_submodule(name)
    return rest
