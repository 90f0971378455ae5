"""The parts of the page as HTML: what a question's answer looks like, and how it is to be read."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from torch import Tensor

from cvlab.explain.many import likeness
from cvlab.explain.paths import dependence_sentence
from cvlab.models import Model
from cvlab.page.answers import Evidence, Seen, Ways, in_view, map_of, peak_of, scores_of, worth_of
from cvlab.page.figures import Figure, Scale, as_html, number, pairs, paragraph, picker, sorted_by, table
from cvlab.page.many import Explained
from cvlab.page.question import SLOW_METHODS, Question, mask_of, parse_points, region_words
from cvlab.render import heatmap_picture, mask_overlay, outlined, overlay, to_picture
from cvlab.trust import deletion

MOST_SHOWN = 60  # of many pictures; the table and the zip hold all
MANY_ORDERS = {
    "number": lambda row: row.number,
    "prediction": lambda row: (row.prediction or "", -row.share),
    "share, the least first": lambda row: row.share,
    "peak, the highest first": lambda row: -row.peak,
}
METHOD_NAMES = {
    "grad_cam": "Grad-CAM",
    "hires_cam": "HiResCAM",
    "integrated_gradients": "Integrated Gradients",
    "occlusion": "Occlusion",
}
UNIT = "logits"
CLASSIFIER = (
    "This model is a classifier: it has no mask and no U-Net stages. Its own stages can be chosen in the tab Grad-CAM"
)
READING = (
    "Each map is divided by its own maximum. A peak is that maximum times the number of positions of its stage, in "
    "units of the score (logits): with it the stages of one model can be compared, but not two models."
)
DEPENDENCE = (
    "Does a map answer for the region? r compares it with the map of everything else: near 1 it would be the same "
    "whatever is asked."
)
WHOLE_PICTURE = "The region is the whole picture: there is nothing else to compare its maps with."


def words_of(model: Model, evidence: Evidence, question: Question) -> str:
    """What the maps show, as it stands in a title."""
    name = repr(model.class_names[evidence.class_idx])
    if evidence.other is not None:
        name += f" rather than {model.class_names[evidence.other]!r}"
    where = "" if evidence.region is None else f" in {region_words(question)}"
    return f"Evidence {'against' if question.against else 'for'} {name}{where}"


def look_panel(seen: Seen, model: Model, question: Question) -> str:
    """The answer in one look: the mask, or where the model saw what it predicts."""
    if seen.mask is not None:
        return as_html(
            [Figure(seen.mask, "Mask", seen.sentence, "The photo, grey outside the predicted mask")], "large"
        )
    words = words_of(model, seen.evidence, Question())
    _, attribution = map_of(seen.evidence, model, Question())
    laid = over_photo(seen.images, attribution, question)
    return as_html([Figure(laid, words, "By Grad-CAM; elsewhere the picture is unchanged.")], "large")


def why_panel(seen: Seen, model: Model, evidence: Evidence, question: Question, usual: Evidence | None = None) -> str:
    """Original, heatmap and overlay of one map in a row, with its scale, peak and worth in words.

    Args:
        usual: of a classifier the answer to what the model says itself, whose scale is held as well.
    """
    stage, attribution = map_of(evidence, model, question)
    held = [usual.maps.get(question.method, {}).get(stage)] if usual else [*evidence.maps[question.method].values()]
    top, largest = scale_of(attribution, [each for each in held if each is not None], question)
    heat, laid = pictures(seen.images, attribution, question, largest)
    words, side = words_of(model, evidence, question), seen.images.shape[-1]
    at = f"{METHOD_NAMES[question.method]} at {stage}, {attribution.shape[-1]} x {attribution.shape[-2]} positions."
    peak = f"Peak {number(peak_of(attribution, question.method))} of a score of {number(evidence.score)} {UNIT}."
    three = [
        Figure(to_picture(seen.images), "Original", f"What the model sees: {side} x {side} pixels."),
        Figure(heat, words, f"{at} {peak}", f"Heatmap: {words} at {stage}", Scale(top, UNIT, question.colormap)),
        Figure(laid, "Where it is", "Elsewhere the picture is unchanged.", f"{words}, over the photo"),
    ]
    return as_html(three, "large") + paragraph(worth_of(attribution, evidence, question))


def scale_of(attribution: Tensor, held: Sequence[Tensor], question: Question) -> tuple[float, float | None]:
    """The top of a map's scale as a peak, and the value of the map that it stands for; None for the map's own maximum.

    Args:
        held: maps that share the scale where the question wants one scale.
    """
    top = peak_of(attribution, question.method)
    if not question.common_scale:
        return top, None
    top = max([top, *(peak_of(each, question.method) for each in held)])
    return top, top if question.method == "occlusion" else top / attribution[0, 0].numel()


def pictures(
    images: Tensor, attribution: Tensor, question: Question, largest: float | None = None
) -> tuple[Image.Image, Image.Image]:
    """A map alone, and over the photo, as a question wants them drawn."""
    heat = heatmap_picture(attribution, images.shape[-2:], question.colormap, largest)
    return heat, over_photo(images, attribution, question, largest)


def over_photo(images: Tensor, attribution: Tensor, question: Question, largest: float | None = None) -> Image.Image:
    """A map over the photo alone."""
    return overlay(images, attribution, question.colormap, question.opacity, largest)


def believe_panel(seen: Seen, model: Model, evidence: Evidence, question: Question) -> str:
    """What hiding the hottest tenth of the picture does to the probability, beside hiding random tenths."""
    stage, attribution = map_of(evidence, model, question)
    check = deletion(model, seen.images, attribution, evidence.class_idx, evidence.region)
    name = repr(model.class_names[evidence.class_idx])
    moved = "lowers" if check.hidden < check.before else "does not lower"
    verdict = (
        "More than any of the random places does: the model did look there."
        if check.telling
        else "Random places do as much: do not take this map for the reason."
    )
    if question.against or evidence.other is not None:
        verdict = ""  # what speaks against a class need not lower its probability
    rows = [
        ("whole picture", f"{check.before:.1%}"),
        (f"hottest {check.share:.0%} hidden", f"{check.hidden:.1%}"),
        (f"{len(check.random)} random places hidden, mean", f"{np.mean(check.random):.1%}"),
        ("random places, from and to", f"{min(check.random):.1%} to {max(check.random):.1%}"),
    ]
    shown = Figure(to_picture(check.picture), "The hottest part hidden", f"Painted over: {stage}.")
    sentence = f"Hiding the hottest part {moved} the probability of {name}. {verdict}"
    return paragraph(sentence) + table(("shown to the model", f"probability of {name}"), rows) + as_html([shown])


# --- segmenters -------------------------------------------------------------------------------------------------------


def region_picker(seen: Seen, model: Model, question: Question, region: Tensor | None) -> str:
    """The photo with the mask at the question's threshold, an orange line around the region, to choose another in."""
    shown, side = mask_picture(seen, model, question), seen.images.shape[-1]
    try:
        at = parse_points(question.points)[-1]
    except ValueError:
        at = side // 2, side // 2
    return picker(outlined(shown, region.numpy()) if region is not None else shown, side, at)


def mask_picture(seen: Seen, model: Model, question: Question) -> Image.Image:
    """The photo as the model sees it, grey outside the mask at the question's threshold."""
    return mask_overlay(to_picture(seen.images), mask_of(question, model, seen.logits).numpy())


def stages_panel(seen: Seen, model: Model, evidence: Evidence, question: Question, ways: Ways | None = None) -> str:
    """Grad-CAM beside HiResCAM at every stage, for the region that is asked about.

    Args:
        ways: beside each map, where they are known, how far it depends on that region.
    """
    if question.method in SLOW_METHODS:
        return paragraph(f"{METHOD_NAMES[question.method]} belongs to no stage: see the tab Grad-CAM")
    drawn, dependence = [], ways.dependence if ways else {}
    for stage in evidence.maps["grad_cam"]:
        two, notes = [], []
        for method, stages in evidence.maps.items():
            attribution, name = stages[stage], METHOD_NAMES[method]
            top, largest = scale_of(attribution, [*stages.values()], question)
            caption = f"peak {number(peak_of(attribution, method))} {UNIT}"
            worth = [worth_of(attribution, evidence, question)]
            if dependence:
                caption += f", r\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{dependence[method][stage]:.2f}"
                worth.append(dependence_sentence(dependence[method][stage]))
            two.append(
                Figure(
                    over_photo(seen.images, attribution, question, largest),
                    name,
                    caption,
                    f"{words_of(model, evidence, question)} at {stage} by {name}, over the photo",
                    Scale(top, "", question.colormap) if question.common_scale else None,
                )
            )
            notes += [f"{name}: {sentence}" for sentence in worth if sentence]
        height, width = evidence.maps["grad_cam"][stage].shape[-2:]
        drawn.append((f"{stage}, {width} x {height}", " ".join(notes), two))
    title = f"{words_of(model, evidence, question)}; score {number(evidence.score)} {UNIT}."
    depends = DEPENDENCE if dependence else WHOLE_PICTURE if ways else ""
    return paragraph(title) + pairs(drawn) + paragraph(f"{READING} {depends}")


def ways_panel(evidence: Evidence, ways: Ways) -> str:
    """What each way through a U-Net contributed to the score."""
    if not ways.parts:
        return paragraph("Contributions of the skips are worked out for cvlab's own U-Net only.")
    reading = "What each way through the U-Net added to the score; together they are the score. Orange is against it."
    return paragraph(reading) + table(("way", UNIT), [*ways.parts.items(), ("score", evidence.score)])


def errors_panel(
    seen: Seen, model: Model, question: Question, true_mask: Tensor, answer: Callable[[Question], Evidence]
) -> str:
    """A true mask (H, W) held against the predicted one: scores, where they differ, and why.

    What was wrongly found is asked for the evidence for it, what was missed for the evidence against it.
    """
    scores = scores_of(seen.logits, model, question, true_mask)
    found, true = mask_of(question, model, seen.logits), in_view(true_mask, model)
    false, missed = found & ~true, true & ~found
    pixels = np.asarray(to_picture(seen.images)).copy()
    for wrong, color in ((false.numpy(), (213, 94, 0)), (missed.numpy(), (0, 114, 178))):
        pixels[wrong] = np.round(0.25 * pixels[wrong] + 0.75 * np.array(color)).astype(np.uint8)
    shares = f"{false.float().mean():.1%} of the picture is wrongly found, {missed.float().mean():.1%} is missed."
    drawn = [Figure(Image.fromarray(pixels), "Errors", f"Orange: wrongly found, blue: missed. {shares}")]
    method = "grad_cam" if question.method in SLOW_METHODS else question.method
    for title, region in (("Why wrongly found", "false positives"), ("Why missed", "false negatives")):
        asked = replace(question, region=region, against=region == "false negatives", method=method)
        try:
            evidence = answer(asked)
        except ValueError as error:
            drawn.append(Figure(to_picture(seen.images), title, f"{str(error).capitalize()}."))
            continue
        stage, attribution = map_of(evidence, model, asked)
        caption = f"{words_of(model, evidence, asked)} at {stage}, peak {number(peak_of(attribution, method))} {UNIT}."
        drawn.append(Figure(pictures(seen.images, attribution, asked)[1], title, caption))
    listed = ", ".join(f"{name} {getattr(scores, name):.3f}" for name in ("iou", "dice", "precision", "recall"))
    return paragraph(f"At threshold {question.threshold or model.threshold:g}: {listed}.") + as_html(drawn, "large")


# --- two models, two pictures -----------------------------------------------------------------------------------------


def compare_panel(sides: Sequence[tuple[str, Seen, Model, Evidence, Question]]) -> str:
    """Two answers beside each other: (title, seen, model, evidence, question) each."""
    drawn, maps = [], []
    for title, seen, model, evidence, question in sides:
        stage, attribution = map_of(evidence, model, question)
        maps.append(attribution)
        words = f"{words_of(model, evidence, question)} at {stage}"
        peak = f"Peak {number(peak_of(attribution, question.method))} {UNIT}."
        drawn += [
            Figure(to_picture(seen.images), title, said(seen, model), f"{title} as the model sees it"),
            Figure(pictures(seen.images, attribution, question)[1], words, peak, f"{title}: {words}"),
        ]
    notes = ["One model, one class: the peaks of the two pictures can be compared."]
    if sides[0][2] is not sides[1][2]:
        r, difference = (each.item() for each in likeness(*maps))
        alike = ("look elsewhere", "partly look at the same places", "look at the same places")[(r > 0.3) + (r > 0.7)]
        notes = [
            f"Agreement of the two maps: r = {r:.2f}; the models {alike}. On average the maps differ by "
            f"{difference:.2f} of their largest values. Of models only the shape of maps can be compared, not peaks."
        ]
    return "".join(map(paragraph, notes)) + as_html(drawn, "two")


def said(seen: Seen, model: Model) -> str:
    """A prediction in a sentence."""
    if seen.sentence:
        return seen.sentence
    name = max(seen.shares, key=seen.shares.get)
    return f"{name!r} with probability {seen.shares[name]:.1%}."


def many_panel(drawn: Sequence[Explained], count: int) -> str:
    """A gallery of many pictures, each with the evidence for what was predicted."""
    figures = [
        Figure(
            overlay(each.view, each.attribution),
            f"{each.row.number}: {each.row.prediction or 'nothing found'}",
            f"{each.row.share:.1%}, peak {each.row.peak:.3g}",
            f"{each.row.file}: evidence for {each.row.prediction or 'nothing'}",
        )
        for each in drawn
    ]
    rest = f" The first {MOST_SHOWN} are shown; the table and the zip hold all." if len(drawn) == MOST_SHOWN else ""
    orders = {
        name: sorted(range(len(drawn)), key=lambda i, key=key: key(drawn[i].row)) for name, key in MANY_ORDERS.items()
    }
    return paragraph(f"{count} pictures.{rest}") + (sorted_by(orders) if drawn else "") + as_html(figures)
