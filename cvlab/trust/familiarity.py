"""Does a photo look like those that a model was trained on? A classifier names one of its classes for anything.

The answer comes from statistics in the model's folder, which cvlab/learning/calibration.py fits: numbers, never photos.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain.hooks import alone_with, forward
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model

FOREIGN = 0.05  # less familiar than this is called foreign: it happens to so many of the photos of val


@takes_wrapped
def familiarity(model: Model, images: Tensor) -> Tensor:
    """The share of the photos of val that look at least as foreign as each image, (N,) from 0 to 1.

    Args:
        images: (N, 3, S, S) in [0, 1].

    Raises:
        ValueError: the model's folder has no statistics for it, or they do not fit the model.
    """
    if not model.statistics:
        raise ValueError("this model's folder has no statistics of its photos: train/calibrate.py fits them")
    return share_of_val(model.statistics, foreignness(model.statistics, features(model, images)))


def share_of_val(statistics: dict[str, Tensor], foreign: Tensor) -> Tensor:
    """The share of val whose foreignness is at least each of these (N,), which come from `foreignness`: (N,)."""
    return (statistics["val"] >= foreign[:, None]).float().mean(1)


def features(model: Model, images: Tensor) -> Tensor:
    """What a network holds of each image (N, 3, S, S), as one row of numbers, (N, D).

    Of a network of timm what enters its head, since it was trained on more than the model's own classes; of others
    mean and standard deviation of each channel at every stage.
    """
    with alone_with(model), torch.no_grad():
        if model.config["network"] == "timm":
            return model.backbone.forward_head(
                model.backbone.forward_features(model.normalize(images)), pre_logits=True
            ).float()
        if model.config["network"] == "timm_head":
            found = model.backbone(model.normalize(images)).float()
            return found.flatten(2).mean(2) if found.ndim == 4 else found
        rows: list[Tensor] = []

        def keep(to_map: object) -> object:
            return lambda module, inputs, output: rows.extend(
                torch.std_mean(to_map(output).float(), (2, 3), correction=0)
            )

        handles = [stage.module.register_forward_hook(keep(stage.to_map)) for stage in model.stages.values()]
        try:
            forward(model, images)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(rows, 1)


def foreignness(statistics: dict[str, Tensor], found: Tensor) -> Tensor:
    """How little the features (N, D) of images look like those of the photos of training; higher is more foreign, (N,).

    Args:
        statistics: "basis" (D, k), the directions in which most of the own features lie: what remains of an image's
            features, scaled to length 1, is their part outside. Or "weight" (D,) and "bias" (1,) of a logistic
            regression that tells own photos from others.

    Raises:
        ValueError: they are of another network.
    """
    first = statistics.get("basis", statistics.get("weight"))
    if first is None or "val" not in statistics or len(first) != found.shape[1]:
        raise ValueError("familiarity.safetensors does not fit this model: train/calibrate.py fits it anew")
    if "basis" in statistics:
        return 1 - (F.normalize(found, dim=1) @ first.float()).norm(dim=1)
    return found @ first.float() + statistics["bias"]
