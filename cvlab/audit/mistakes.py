"""A page of a model's mistakes: two clicks from the confusion matrix to each picture, with the evidence that misled."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from cvlab.explain import default_stage, grad_cam, predicted_masks
from cvlab.explain.many import explain_predictions
from cvlab.metrics import confusion_matrix
from cvlab.models import Model, probabilities
from cvlab.render import mask_overlay, overlay, picture_url, to_picture
from cvlab.transforms import to_float

MOST_CELLS, MOST_EACH, MOST_MASKS = 60, 8, 24  # cells that are shown, pictures of each, and the worst masks
FALSE, MISSED = (230, 120, 0), (0, 90, 220)  # colours of pixels that are wrongly found, and of those not found


def mistakes_page(
    model: Model,
    title: str,
    views: Tensor,
    labels: Tensor,
    logits: Tensor,
    files: Sequence[str],
    like: Sequence[tuple[Tensor, str, int]],
) -> str:
    """HTML that needs no other file. Mistakes come before right answers, and the surest mistakes first.

    Args:
        views, labels, logits: (N, 3, S, S) uint8, (N,) and (N, C).
        files: the name of each picture.
        like: for each the picture of train that is most like it to the network, (3, S, S) uint8, its name and label.
    """
    names, probs, stage = model.class_names, probabilities(model, logits), default_stage(model)
    predicted = probs.argmax(1)
    matrix = confusion_matrix(labels, predicted, len(names))
    cells = sorted(matrix.nonzero().tolist(), key=lambda cell: (cell[0] == cell[1], -matrix[tuple(cell)]))[:MOST_CELLS]

    def pictures(true: int, found: int) -> Iterator[dict[str, object]]:
        rows = ((labels == true) & (predicted == found)).nonzero().flatten()
        for row in rows[probs[rows, found].argsort(descending=true != found)][:MOST_EACH].tolist():
            images, (similar, name, _) = to_float(views[row])[None], like[row]
            _, attribution = grad_cam(model, images, found, stage)
            evidence = picture_url(overlay(images, attribution, stage=model.stages[stage]))
            shown = {"evidence": evidence, "similar": picture_url(to_picture(to_float(similar)))}
            yield shown | {"file": files[row], "share": probs[row, found].item(), "like": name}

    # Of how many pictures of a cell the most similar one of train is of the class that they were taken for.
    misled = predicted == torch.tensor([label for _, _, label in like])
    alike = confusion_matrix(labels[misled], predicted[misled], len(names)).tolist()
    shown, rows = {(i, j): pictures(i, j) for i, j in cells}, list(zip(names, matrix.tolist(), strict=True))
    return _filled("mistakes", title=title, names=names, rows=rows, cells=shown, alike=alike)


def worst_page(model: Model, title: str, views: Tensor, masks: Tensor, ious: Tensor, files: Sequence[str]) -> str:
    """The same of a segmenter: views with their masks (N, C, S, S), the lowest iou (N,) first, errors and evidence."""
    stage, first = default_stage(model), model.first_object

    def pictures() -> Iterator[dict[str, object]]:
        for row in ious.argsort()[:MOST_MASKS].tolist():
            images, true = to_float(views[row])[None], masks[row]
            explained, photo = explain_predictions(model, images, [stage]), to_picture(images)
            found = predicted_masks(model, explained.logits)[0] & (true.any(0) if model.exclusive else True)
            errors = np.array(photo.convert("L").convert("RGB"))
            for pixels, colour in ((found & ~true, FALSE), (true & ~found, MISSED)):
                errors[pixels[first:].any(0).numpy()] = colour
            heat = overlay(images, explained.maps["grad_cam"][stage], stage=model.stages[stage])
            drawn = photo, mask_overlay(photo, true[first:].any(0).numpy()), Image.fromarray(errors), heat
            yield {"file": files[row], "iou": ious[row].item(), "drawn": map(picture_url, drawn)}

    return _filled("worst", title=title, pictures=pictures(), count=len(ious), mean=ious.mean().item())


def _filled(name: str, **values: object) -> str:
    template = Path(__file__).with_name(f"{name}.html").read_text("utf-8")
    return Environment(autoescape=True, trim_blocks=True).from_string(template).render(values)
