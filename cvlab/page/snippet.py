"""A question to a model as Python: a few lines that compute the same map with cvlab's public functions.

Names of classes, photos and models come from strangers. They enter as string literals only (`repr`); everything else is
written here.
"""

import ast

from cvlab.explain import default_stage
from cvlab.models import Model
from cvlab.page.question import STROKE_RADIUS, Question, parse_points

PUBLIC = {
    "cvlab": ("checkpoint",),
    "cvlab.page.evidence": ("in_view", "open_mask"),
    "cvlab.explain": ("against", "class_score", "contrast_score", "explain", "predict", "region_score"),
    "cvlab.explain.regions": ("box", "brush", "component", "false_negatives", "false_positives", "pixel", "whole"),
    "cvlab.models": ("probabilities",),
    "cvlab.render": ("overlay",),
    "cvlab.transforms": ("open_image", "view"),
}


def as_python(source: str, photo: str, model: Model, question: Question, true_mask: str = "mask.png") -> str:
    """Lines that leave the map of a question, signed, in `attribution` and save it over the photo.

    Args:
        source: the model's folder or its name on the Hub, as the reader of the lines knows it: no path of a server.
        photo, true_mask: names of files.
        model: that of `source`.

    Raises:
        ValueError: the question needs a place in the picture and has none.
    """
    lines = [
        f"model = checkpoint.load({source!r})",
        f"image = open_image({photo!r})",
        "images = view(image, model)",
        f"class_idx = {_class_idx(question, model)}",
    ]
    if question.rather_than:
        lines.append(f"other_idx = model.class_names.index({question.rather_than!r})")
    if model.task == "segmentation":
        lines += _region(question, model, true_mask)
        score = "region_score(region, class_idx)"
        if question.rather_than:
            score = f"lambda logits: {score}(logits) - region_score(region, other_idx)(logits)"
    else:
        score = "contrast_score(class_idx, other_idx)" if question.rather_than else "class_score(class_idx)"
    lines.append(f"score = {score}")
    if question.against:
        lines.append("score = against(score)")
    method, stage = repr(question.method), repr(question.stage or default_stage(model))
    lines += [
        f"attribution = explain(model, images, score, [{stage}], [{method}]).maps[{method}][{stage}]",
        f"overlay(images, attribution, stage=model.stages[{stage}]).save('overlay.png')",
    ]
    return "\n".join([*_imports(lines), "", *lines, ""])


def _class_idx(question: Question, model: Model) -> str:
    if question.class_name:
        return f"model.class_names.index({question.class_name!r})"
    return "0" if model.task == "segmentation" else "int(predict(model, images).argmax())"


def _region(question: Question, model: Model, true_mask: str) -> list[str]:
    """The lines that make `region`, (H, W) bool."""
    size = "images.shape[-2:]"
    if question.region in ("pixel", "box", "stroke"):
        points = parse_points(question.points)
        asked = {
            "pixel": f"pixel({size}, {points[-1][0]}, {points[-1][1]})",
            "box": f"box({size}, {', '.join(map(str, points[-2:]))})",
            "stroke": f"brush({size}, {points}, {max(0.5, STROKE_RADIUS * model.image_size)})",
        }
        return [f"region = {asked[question.region]}"]
    threshold = question.threshold or "model.threshold"
    lines = [f"mask = probabilities(model, predict(model, images))[0, class_idx] > {threshold}"]
    if question.region == "mask":
        return [*lines, "region = whole(mask)"]
    if question.region == "part":
        x, y = parse_points(question.points)[-1]
        return [*lines, f"region = component(mask, {x}, {y})"]
    return [
        *lines,
        f"true = in_view(open_mask({true_mask!r}, model, class_idx, (image.height, image.width)), model)",
        f"region = {question.region.replace(' ', '_')}(mask, true)",
    ]


def _imports(lines: list[str]) -> list[str]:
    """The import statements of the public names in use, one for each module."""
    used = {node.id for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Name)}
    found = {module: [name for name in names if name in used] for module, names in sorted(PUBLIC.items())}
    return [f"from {module} import {', '.join(names)}" for module, names in found.items() if names]
