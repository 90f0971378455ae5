"""A page of a model's mistakes: two clicks from the confusion matrix to each picture, with the evidence that misled."""

import html
from collections.abc import Sequence

from torch import Tensor

from cvlab.explain import default_stage, grad_cam
from cvlab.metrics import confusion_matrix
from cvlab.models import Model, probabilities
from cvlab.render import overlay, picture_url, to_picture
from cvlab.transforms import to_float

MOST_CELLS, MOST_EACH = 60, 8  # cells that are shown with their pictures, and pictures of each
ALT = "with the evidence for the answer", "of train, the most similar one"
HINT = """<p>Each picture stands under its answer with the evidence for it, brighter where there is more; beside it the
picture of train that is most like it to the network. Is one of the two in the wrong class? Move or remove it. Is the
evidence beside the object? See README.md. Are there few pictures like it in its class? Add some.</p>
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body {{ font: 1rem/1.5 system-ui; max-width: 75rem; margin: auto; padding: 1rem }} figure {{ margin: 0 }}
.pictures {{ display: flex; flex-wrap: wrap; gap: 1rem }} figure {{ width: 17rem }} img {{ width: 8rem }}
td, th {{ padding: 0.1rem 0.5rem; text-align: right }} .table {{ overflow: auto }}</style>
<h1>{title}</h1>
{content}
"""


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
    names, probs = [html.escape(name) for name in model.class_names], probabilities(model, logits)
    predicted, stage = probs.argmax(1), default_stage(model)
    matrix = confusion_matrix(labels, predicted, len(names))
    cells = sorted(matrix.nonzero().tolist(), key=lambda cell: (cell[0] == cell[1], -matrix[tuple(cell)]))[:MOST_CELLS]

    def figure(row: int, shown_class: int) -> str:
        images, (similar, name) = to_float(views[row])[None], like[row]
        _, attribution = grad_cam(model, images, shown_class, stage)
        sources = map(
            picture_url, (overlay(images, attribution, stage=model.stages[stage]), to_picture(to_float(similar)))
        )
        drawn = "".join(f'<img src="{source}" alt="{alt}">' for source, alt in zip(sources, ALT, strict=True))
        said = f"{files[row]}: {probs[row, shown_class]:.0%} {model.class_names[shown_class]}. Beside it {name}."
        return f"<figure>{drawn}<figcaption>{html.escape(said)}</figcaption></figure>"

    sections = ""
    for true, found in cells:
        rows = ((labels == true) & (predicted == found)).nonzero().flatten()
        rows = rows[probs[rows, found].argsort(descending=true != found)]
        figures = "".join(figure(row, found) for row in rows[:MOST_EACH].tolist())
        head = f"{names[true]} taken for {names[found]}" if true != found else f"{names[true]}, recognised"
        sections += f'<h2 id="{true}-{found}">{head}: {len(rows)}</h2><div class="pictures">{figures}</div>'
    return PAGE.format(title=html.escape(title), content=_matrix(matrix, names, cells) + HINT + sections)


def _matrix(matrix: Tensor, names: Sequence[str], cells: Sequence[Sequence[int]]) -> str:
    """The confusion matrix as a table; the cells that are shown are links."""
    links = {(i, j): f'<a href="#{i}-{j}">{int(matrix[i, j])}</a>' for i, j in cells}
    numbers = range(len(names))
    rows = [["", *(f"as {name}" for name in names)]]
    rows += [[names[i], *(links.get((i, j), str(int(matrix[i, j]))) for j in numbers)] for i in numbers]
    drawn = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table>{drawn}</table></div>'
