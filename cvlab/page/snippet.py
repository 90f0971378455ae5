"""A question to a model as Python: a few lines that compute the same map, with the page's own question and score.

Names of classes, photos and models come from strangers. They enter as string literals only (`repr`).
"""

from cvlab.explain import default_stage
from cvlab.models import Model
from cvlab.models.adopted import IN_FILE
from cvlab.page.question import Question, parse_points


def as_python(
    source: str,
    photo: str,
    model: Model,
    question: Question,
    true_mask: str = "mask.png",
    tile: tuple[int, int, int, int] | None = None,
) -> str:
    """Lines that leave the map of a question, signed, in `attribution` and save it over the photo.

    Args:
        source: the model's folder, its name on the Hub, or the FILE.py:FUNCTION that makes it, as the reader of the
            lines knows it: no path of a server.
        photo, true_mask: names of files.
        model: that of `source`.
        tile: width and height of a photo that is seen in tiles, and the left and top of the one that is explained.

    Raises:
        ValueError: the question needs a place in the picture and has none.
    """
    decisive, opened, given = ["class_name", "rather_than", "against"], "", ""
    checkpoint, imported, load = "from cvlab import checkpoint\n", "", "checkpoint.load"
    if IN_FILE.fullmatch(source):
        checkpoint, imported, load = "", "from cvlab.models.adopted import from_file\n", "from_file"
    channels, shown = (", channels=model.channels", "model.as_rgb(images)") if model.channels else ("", "images")
    names = ["open_image", "view"]  # imported from cvlab.transforms
    if model.task == "segmentation":
        decisive += ["region", "threshold"]
        if question.region.startswith("false"):
            imported += "from cvlab.page.evidence import open_mask\n"
            given = ", whole_mask(mask, model.image_size)"
            opened = f"mask = open_mask({true_mask!r}, model, (image.height, image.width))\n"
            names.append("whole_mask")
        elif question.region != "mask" and parse_points(question.points):
            decisive.append("points")
    if tile:
        width, height, left, top = tile
        right, bottom = left + model.image_size, top + model.image_size
        if opened:
            opened += f"mask = resize_mask(mask, ({height}, {width}))[:, {top}:{bottom}, {left}:{right}]\n"
            names.append("resize_mask")
        opened += f"image = image.resize(({width}, {height}), 2).crop(({left}, {top}, {right}, {bottom}))  # bilinear\n"
    asked = ", ".join(f"{name}={value!r}" for name, value in question.chosen.items() if name in decisive)
    method, stage = repr(question.method), repr(question.stage or default_stage(model))
    return f"""\
{checkpoint}from cvlab.explain import explain
{imported}from cvlab.page.question import Question, score_of
from cvlab.render import overlay
from cvlab.transforms import {", ".join(sorted(names))}

model = {load}({source!r})
image = open_image({photo!r}{channels})
{opened}images = view(image, model)
question = Question({asked})
score = score_of(question, model{given})
attribution = explain(model, images, score, [{stage}], [{method}]).maps[{method}][{stage}]
overlay({shown}, attribution, stage=model.stages[{stage}]).save('overlay.png')
"""
