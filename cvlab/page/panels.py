"""The panels of the page. Each is a function of an answer, and returns HTML or raises an error that `draw` words.

Those of segmenters alone are in cvlab/page/unet.py.
"""

import html
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from cvlab.checkpoint import hub
from cvlab.explain import heatmap, peak
from cvlab.page.breaking import canvas, history
from cvlab.page.compare import compare
from cvlab.page.examples import example_files
from cvlab.page.host import sentence_of
from cvlab.page.html import bars, code_block, figure, folded, in_grid, number, paragraph, quoted, scale_bar
from cvlab.page.photos import address_of
from cvlab.page.picture import captioned, slider, with_photo
from cvlab.page.question import to_query
from cvlab.page.record import audit_panel, record_panel, side_by_side
from cvlab.page.saved import document, download
from cvlab.page.snippet import as_python
from cvlab.page.unet import contributions, errors, region_picker, stages, three_stages
from cvlab.page.visit import METHOD_NAMES, UNIT, Answer, draw_map
from cvlab.page.words import place, said, shares_of_evidence
from cvlab.render import to_picture
from cvlab.trust import hide, hottest_part
from cvlab.trust.judge import SHARES

SAME_MAP = (
    "These lines compute the map that is shown, equal to within a thousandth of its largest value: the page runs a "
    "faster copy of the model, which rounds differently."
)
ICONS = {"believable": "M4 9l3 3 7-7", "doubtful": "M9 4v6M9 13.5v.5", "not believable": "M5 5l8 8M13 5l-8 8"}
CHECKING = '<p class="chip">Checking the marked spot …</p>'
ON_REQUEST = '<button class="chip ask">Check the marked spot</button>'
REDRAWN = (  # what a question changes, the sentence first
    *("sentence", "chip", "look", "side", "three", "grad_cam"),
    *("picker", "stages", "contributions", "errors", "link", "code"),
)
FOLLOWING = ("three", "stages", "contributions")  # of a segmenter: they take more passes, and are drawn once more
CHECKED = ("chip", "reasons", "believe")  # whether the map can be believed: many passes, so they come last
IN_FILE = ("sentence", "chip", "background", "look", "side", "reasons", "grad_cam", "stages", "contributions", "code")
HUB_HINT = "Another model: type its name on the Hugging Face Hub, user/name, into the list of models."


def draw(answer: Answer, names: Iterable[str], *others: object) -> dict[str, str]:
    """Panels by their names, as HTML; an error becomes a sentence.

    Where the panel "sentence" fails, model or photo cannot be opened. That is said there, and the rest stays empty.

    Args:
        names: of PANELS; "sentence" comes first.
        others: what a panel takes besides the answer.
    """
    drawn = dict.fromkeys(names, "")
    for name in drawn:
        try:
            drawn[name] = PANELS[name](answer, *others)
        except (ValueError, OSError) as error:
            drawn[name] = paragraph(sentence_of(error)) if name in SPEAKING else ""
            if name == "sentence":
                break
    return drawn


def sentence(answer: Answer) -> str:
    """The answer in a sentence, and what was done to open the photo."""
    lead, rest = map(html.escape, said(answer))
    return f"<h2>{lead} <span>{rest}</span></h2>" + "".join(map(paragraph, answer.prediction.notes))


def look(answer: Answer) -> str:
    """The answer in one picture: the outline of the mask, or the heat for the class that is asked about."""
    if answer.segments:
        return region_picker(answer)
    unseen = " Dark frame: not seen by the model." if answer.box[2:] != (1, 1) else ""
    lines = f"White line: the hottest tenth.{unseen}"
    shown = captioned(draw_map(answer), "", lines, slider("Heat", answer.question.opacity))
    return with_photo(shown, "main")


def background(answer: Answer) -> str:
    """The photo for the pictures of all panels, sent once."""
    return f"<style>.photos {{{answer.prediction.photo}}}</style>"


def side(answer: Answer) -> str:
    """What stands beside the picture: the probabilities, or where the evidence for what a segmenter found lies."""
    shares = answer.prediction.shares
    if not answer.segments:
        return bars(shares, "Probability")
    lies = shares_of_evidence(answer.attribution, answer.evidence.region, answer.read_at)
    return bars(lies, f"Where the evidence lies, read at {answer.stage}")


def facts(answer: Answer) -> str:
    """What the model is: what it predicts, its input size, its parameters."""
    model = answer.model
    classes, size = model.class_names[model.first_object :], model.image_size
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    kind = "Finds the pixels of" if answer.segments else "Tells apart"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    source = f" From the Hub: {model.source}." if hub.is_id(model.source) else ""
    text = f"{kind}: {shown}. It sees {size} x {size} pixels; {parameters:.1f} M parameters.{source}"
    return most_like(answer) + folded("About this model", paragraph(text) + paragraph(HUB_HINT), "about")


def most_like(answer: Answer) -> str:
    """The classes of the pictures of training that are most like the photo."""
    rows = answer.prediction.alike
    if not rows:
        return ""
    told = ", ".join(f"{quoted(name)} ({likeness:.2f})" for name, likeness in rows)
    return paragraph(f"Most like it in training (cosine similarity): {told}.")


def grad_cam(answer: Answer) -> str:
    """The map that is asked for, large, and on demand its scale, peak and stage, and what the model sees."""
    question, attribution = answer.question, answer.attribution
    lies = place(attribution, answer.read_at) or "nowhere"
    large = captioned(draw_map(answer), answer.words, f"lies {lies}.", slider("Heat", question.opacity))
    shown = with_photo(large, "main") + paragraph(answer.warning(attribution))
    height, width = attribution.shape[-2:]
    top, score = peak(attribution).item(), number(answer.evidence.score)
    figures = f"{METHOD_NAMES[question.method]} at {answer.stage}, {width} x {height} positions. "
    figures += f"Peak {number(top)} of a score of {score} {UNIT}."
    images = answer.evidence.images
    pixels = images.shape[-1]
    seen = figure(to_picture(answer.model.as_rgb(images)), "What the model sees", f"{pixels} x {pixels} pixels.")
    return shown + folded(
        "Details", scale_bar(top, UNIT, question.colormap) + paragraph(figures) + in_grid([seen]), "why"
    )


def chip(answer: Answer) -> str:
    """Whether the marked spot mattered, told by words, icon and fill, not by a colour."""
    if not answer.testable:
        return ""
    if not (verdict := answer.verdict):
        return CHECKING
    icon = f'<svg viewBox="0 0 18 18" aria-hidden="true"><path d="{ICONS[verdict.level]}"/></svg>'
    good = " good" if verdict.level == "believable" else ""
    return f'<p class="chip{good}">{icon}{verdict.sentence.split(":")[0].rstrip(".")}</p>'


def reasons(answer: Answer) -> str:
    """Why the spot is said to matter or not; on demand what was hidden, and the figures."""
    if not (verdict := answer.verdict):
        return ""
    first, *others = (check.sentence for check in verdict.checks.values())
    hidden = ""
    if others:  # else the map marks no place
        images = answer.evidence.images
        spot = hottest_part(heatmap(answer.attribution, images.shape[-2:], answer.read_at), SHARES[0])
        picture = to_picture(answer.model.as_rgb(hide(images, spot[None, None])))
        hidden = in_grid([figure(picture, "The spot hidden", "As the model saw it.")])
    more = hidden + folded("Details", "".join(map(paragraph, others)), "checks") if others else ""
    return f'<p class="note">{verdict.sentence}</p>' + folded("Why?", paragraph(first) + more, "reasons")


def link(answer: Answer) -> str:
    """A link to the model and the question, and to the photo if it is an example or has an address."""
    example, address = example_files().get(answer.photo, ""), address_of(answer.photo)
    href = html.escape(to_query(answer.name, answer.question, example=example, photo=address))
    without = "" if example or address else " (without the photo)"
    return f'<a class="question-link" href="{href}">Link to this model and these settings</a>{without}'


def saved(answer: Answer) -> str:
    """A link that saves the answer as a page of its own, with the verdict if it takes few seconds."""
    _ = answer.prediction
    with suppress(ValueError):  # nothing was found
        if answer.quick:
            answer.work_out_verdict()
    title = f"{answer.name} about {Path(answer.photo).name}"
    return download(document(title, draw(answer, IN_FILE).values()), "cvlab.html")


def code(answer: Answer) -> str:
    """Python that computes the map again."""
    _ = answer.prediction  # without a photo there is nothing to compute
    source = answer.visits.models.public_name(answer.name)
    question, tile = answer.question, None
    if (large := answer.prediction.large) is not None:
        question, (height, width) = replace(question, points=answer.evidence.points), large.shape[1:]
        tile = width, height, round(answer.box[0] * width), round(answer.box[1] * height)
    lines = as_python(source, Path(answer.photo).name, answer.model, question, tile=tile)
    return paragraph(SAME_MAP) + code_block(lines)


def record(answer: Answer, second: Answer | None = None, panel: Callable[[Path], str] = record_panel) -> str:
    """The scores, training and card in the folder of the model, or another panel of it; also of two models."""
    folders = {each.name: each.folder for each in (answer, second) if each and each.model}  # which checks its folder
    return side_by_side(folders) if len(folders) > 1 else panel(answer.folder)


PANELS: dict[str, Callable[..., str]] = {
    **{each.__name__: each for each in (sentence, background, look, side, facts, grad_cam, chip, reasons)},
    **{each.__name__: each for each in (stages, contributions, errors, canvas, history, link, saved, code, record)},
    **{"three": three_stages, "picker": region_picker, "compared": compare, "believe": reasons},
    "audit": partial(record, panel=audit_panel),
}
# Those that say what went wrong.
SPEAKING = ("sentence", "grad_cam", "stages", "errors", "code", "compared", "history", "record", "audit", "saved")
