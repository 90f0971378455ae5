"""Does a photo look like those that a model was trained on? A classifier names one of its classes for anything.

The answer comes from statistics in the model's folder, which cvlab/learning/calibration.py fits: numbers, never photos.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.explain.hooks import alone_with, forward
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model

PRETRAINED = ("timm", "timm_head")
FOREIGN = 0.05  # less familiar than this is called foreign: so are this share of the photos of val


@takes_wrapped
def familiarity(model: Model, images: Tensor) -> Tensor:
    """The share of the photos of val that look at least as foreign as each image (N, 3, S, S) in [0, 1]: (N,).

    Raises:
        ValueError: the model's folder has no statistics for it, or they are of another network.
    """
    statistics = model.statistics or {}
    try:
        foreign = foreignness(statistics, features(model, images))
        return (statistics["val"] >= foreign[:, None]).float().mean(1)
    except (KeyError, RuntimeError) as error:
        raise ValueError("no statistics of its photos are kept: train/evaluate.py --calibrate fits them") from error


def features(model: Model, images: Tensor) -> Tensor:
    """What a network holds of each image (N, 3, S, S), as numbers, (N, D).

    Of a network of timm what enters its head, as it was trained on more than the model's own classes; of others mean
    and standard deviation of each channel at every stage.
    """
    rows: list[Tensor] = []

    def read(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows.extend(torch.std_mean(output.float(), (2, 3), correction=0))

    with alone_with(model), torch.no_grad():
        if model.config["network"] in PRETRAINED:
            network = model.backbone
            found = network.forward_head(network.forward_features(model.normalize(images)), pre_logits=True).float()
            return found.flatten(2).mean(2) if found.ndim == 4 else found
        handles = [stage.module.register_forward_hook(read) for stage in model.stages.values()]
        try:
            forward(model, images)
        finally:
            for handle in handles:
                handle.remove()
    return torch.cat(rows, 1)


def foreignness(statistics: dict[str, Tensor], found: Tensor) -> Tensor:
    """How little features (N, D) look like those of the photos of training: (N,), higher for more foreign ones.

    Args:
        statistics: "basis" (D, k), directions in which the own features lie, scaled to length 1: what counts is the
            part outside them. Or "weight" (D,) and "bias" (1,) of a logistic regression: own photos against others.
    """
    if "basis" in statistics:
        return 1 - (F.normalize(found, dim=1) @ statistics["basis"].float()).norm(dim=1)
    return found @ statistics["weight"] + statistics["bias"]
