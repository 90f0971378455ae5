"""A page of a model's mistakes: two clicks from the confusion matrix to each picture, with the evidence that misled."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment
from torch import Tensor

from cvlab.explain import default_stage, grad_cam
from cvlab.metrics import confusion_matrix
from cvlab.models import Model, probabilities
from cvlab.render import overlay, picture_url, to_picture
from cvlab.transforms import to_float

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_CELLS, MOST_EACH = 60, 8  # cells that are shown with their pictures, and pictures of each


def mistakes_page(
    model: Model,
    title: str,
    views: Tensor,
    labels: Tensor,
    logits: Tensor,
    files: Sequence[str],
    like: Sequence[tuple[Tensor, str]],
) -> str:
    """HTML that needs no other file. Mistakes come before right answers, and the surest mistakes first.

    Args:
        views, labels, logits: (N, 3, S, S) uint8, (N,) and (N, C).
        files: the name of each picture.
        like: for each the picture of train that is most like it to the network, (3, S, S) uint8, and its name.
    """
    names, probs, stage = model.class_names, probabilities(model, logits), default_stage(model)
    predicted = probs.argmax(1)
    matrix = confusion_matrix(labels, predicted, len(names))
    cells = sorted(matrix.nonzero().tolist(), key=lambda cell: (cell[0] == cell[1], -matrix[tuple(cell)]))[:MOST_CELLS]

    def pictures(true: int, found: int) -> Iterator[dict[str, object]]:
        rows = ((labels == true) & (predicted == found)).nonzero().flatten()
        for row in rows[probs[rows, found].argsort(descending=true != found)][:MOST_EACH].tolist():
            images, (similar, name) = to_float(views[row])[None], like[row]
            _, attribution = grad_cam(model, images, found, stage)
            evidence = picture_url(overlay(images, attribution, stage=model.stages[stage]))
            shown = {"evidence": evidence, "similar": picture_url(to_picture(to_float(similar)))}
            yield shown | {"file": files[row], "share": probs[row, found].item(), "like": name}

    page = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text("utf-8"))
    rows = list(zip(names, matrix.tolist(), strict=True))
    return page.render(title=title, names=names, rows=rows, cells={(i, j): pictures(i, j) for i, j in cells})
