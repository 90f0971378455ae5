"""Does a photo look like those that a model was trained on? Statistics in its folder tell, never the photos."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.explain.hooks import alone_with, forward
from cvlab.explain.many import BATCH_SIZE, shared
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model
from cvlab.transforms import to_float

PRETRAINED = ("timm", "timm_head")
DIRECTIONS = 32  # of the features of a pretrained network: tests/bench/unknown.py tries more and fewer
MOST_BYTES = 290_000  # of all statistics together
FOREIGN = 0.05  # less familiar than this is called foreign: so are this share of the photos of val


@takes_wrapped
def familiarity(model: Model, images: Tensor, found: Tensor | None = None) -> Tensor:
    """The share of the photos of val that look at least as foreign as each image (N, 3, S, S) in [0, 1]: (N,).

    `found` are their `features` where they are known.

    Raises:
        ValueError: the model's folder has no statistics for it, or they are of another network.
    """
    statistics = model.statistics or {}
    try:
        foreign = foreignness(statistics, features(model, images) if found is None else found)
        return (statistics["val"] >= foreign[:, None]).float().mean(1)
    except (LookupError, RuntimeError) as error:
        raise ValueError("no statistics of its photos are kept: train/evaluate.py --calibrate fits them") from error


@takes_wrapped
def nearest(model: Model, images: Tensor, found: Tensor | None = None, most: int = 3) -> list[tuple[str, float]]:
    """The pictures of training that are most like one image (1, 3, S, S): class and cosine similarity of each.

    Compared are features along the main directions of those of training. Arguments and errors as of `familiarity`.
    """
    statistics = model.statistics or {}
    try:
        alike = _along(statistics, features(model, images) if found is None else found) @ statistics["rows"].float().T
        best = alike[0].topk(min(most, alike.shape[1]))
        names = [model.class_names[i] for i in statistics["labels"][best.indices].tolist()]
        return list(zip(names, best.values.tolist(), strict=True))
    except (LookupError, RuntimeError) as error:
        raise ValueError("nothing of its pictures of training is kept: --calibrate keeps it") from error


def _along(statistics: dict[str, Tensor], found: Tensor) -> Tensor:
    """Features (N, D) along the kept directions, with length 1: (N, k)."""
    if "basis" in statistics:
        return F.normalize(found @ statistics["basis"].float(), dim=1)
    scaled = (found - statistics["mean"]) / statistics["scale"]  # each of these features has a unit of its own
    return F.normalize(scaled @ statistics["directions"].float(), dim=1)


def features(model: Model, images: Tensor) -> Tensor:
    """What enters the head of a timm network; of others each stage's deviation and mean by channel: (N, D)."""
    if len(images) > BATCH_SIZE:
        return torch.cat([*shared(images.split(BATCH_SIZE), partial(features, model))])
    home, place = images.device, next(model.parameters(), images).device
    images, rows = (to_float(images) if images.dtype == torch.uint8 else images).to(place), []

    def read(to_map: Callable, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows.extend(torch.std_mean(to_map(output).float(), (2, 3), correction=0))

    with alone_with(model), torch.no_grad():
        if model.config["network"] in PRETRAINED:
            network = model.backbone
            found = network.forward_head(network.forward_features(model.normalize(images)), pre_logits=True).float()
            return (found.flatten(2).mean(2) if found.ndim == 4 else found).to(home)
        stages = model.stages.values()
        handles = [stage.module.register_forward_hook(partial(read, stage.to_map)) for stage in stages]
        try:
            forward(model, images)
        finally:
            for handle in handles:
                handle.remove()
    return torch.cat(rows, 1).to(home)


def foreignness(statistics: dict[str, Tensor], found: Tensor) -> Tensor:
    """How little features (N, D) look like those of the photos of training: (N,), higher for more foreign ones.

    By "basis" (D, k), directions in which the own features lie, scaled to length 1, it is the part outside them; or by
    "weight" (D,) and "bias" (1,) of a logistic regression of own photos against others.
    """
    if "basis" in statistics:
        return 1 - (F.normalize(found, dim=1) @ statistics["basis"].float()).norm(dim=1)
    return found @ statistics["weight"] + statistics["bias"]


def fit_statistics(model: Model, own: Tensor, labels: Tensor, val: Tensor, others: Tensor | None) -> dict[str, Tensor]:
    """What `familiarity` and `nearest` need, of pictures of train, of val and perhaps of others, (N, 3, S, S) uint8.

    `labels` are those of train, (N,). Of its pictures the first ones are kept for `nearest`, as many as there is room.
    """
    rows = features(model, own)
    if others is None:
        directions = torch.linalg.svd(F.normalize(rows, dim=1), full_matrices=False).Vh
        found = {"basis": directions[: min(DIRECTIONS, rows.shape[1] // 2)].T.half().contiguous()}
    else:
        from sklearn.linear_model import LogisticRegression  # imported here: it takes a second

        both = torch.cat([rows, features(model, others)])
        mean, scale = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-6)
        reject = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
        reject.fit(((both - mean) / scale).numpy(), [0] * len(rows) + [1] * len(others))
        weight = torch.from_numpy(reject.coef_[0]).float() / scale
        found = {"weight": weight, "bias": torch.from_numpy(reject.intercept_).float() - weight @ mean}
        directions = torch.linalg.svd((rows - mean) / scale, full_matrices=False).Vh[:DIRECTIONS].T
        found |= {"mean": mean, "scale": scale, "directions": directions.half().contiguous()}
    foreign, along = foreignness(found, features(model, val)), _along(found, rows).half()
    room = MOST_BYTES - sum(each.nbytes for each in found.values())
    most = room // (along[0].nbytes + 4)
    found |= {"rows": along[:most], "labels": labels[:most].int()}
    return found | {"val": foreign.quantile(torch.linspace(0, 1, 1000)) if len(foreign) > 1000 else foreign}
