"""The tab "Lesson": in five steps a visitor finds out how a model can be fooled, and when its heat misleads.

The shipped models look at synthetic scenes, whose truth is known. A step, and every figure in it, is worked out when it
is shown. Its texts are templates in lesson.html. A part of a picture is written as in changes.py, "" for none.
"""

import html
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cvlab.data import shapes
from cvlab.explain import channel_maps, class_score, correlation, predict
from cvlab.models import probabilities
from cvlab.page.breaking import heat_in
from cvlab.page.changes import SIDE, box_of, changed, chosen, frame_of, pixels_of
from cvlab.page.evidence import predict_photo
from cvlab.page.examples import PHOTOS, SCENE_SIDE, scene_file
from cvlab.page.host import sentence_of
from cvlab.page.html import number, quoted
from cvlab.page.panels import chip
from cvlab.page.picture import cased, heat_layer, layers
from cvlab.page.question import COLORMAPS, Question
from cvlab.page.visit import Answer, Visits, draw_map, marks
from cvlab.page.words import percent, said
from cvlab.render import relative_heat
from cvlab.transforms import open_image, view

CLASSIFIER, SEGMENTER = "shapes-classifier", "shapes-segmenter"
# Seeds of scenes, not among those of the synthetic train, val and test.
GUESSED = 4211, 4306, 4326, 4257, 4264, 4200  # in the last one the hottest part is not needed
TAKEN_APART, BELIEVED, REFUTED = 4263, 4244, 4236
# With a part where a heart fools the model, and one where it misleads the heat.
FOOLED = (4128, "300,500 500,700"), (4049, "300,0 500,200")
SIZE = 20  # of a part that is clicked, in percent of the sides
MIDDLE, MIDDLES = (SIDE // 2, SIDE // 2), range(SIDE * SIZE // 200, SIDE, SIDE // 20)  # of parts
CHANNELS = 6  # that are shown for a class, and against it
NEEDED = 0.1  # by so much the probability falls without a part that was needed
SAME, DRAWN = 0.02, 2.5  # the heart changed the probability by less; it has more heat than this multiple of its area


def turn(visits: Visits, did: str, points: list, place: list | None, save: Callable[[Image.Image], str]) -> dict:
    """What a click does: it leads to another "place" of the "lesson", or gives the page a "photo" and a "model".

    `did` is what a button says, `points` are those of a click in the picture; `save` returns the path of a picture.
    A place is the number of the step, that of its scene, and the part that was clicked; None before the tab is opened.
    """
    (step, scene, part), (field, _, value) = place or (0, 0, ""), did.partition(" ")
    if field == "open":
        return {"photo": save(with_heart(scene, part)), "model": CLASSIFIER}
    if field in ("step", "scene"):
        step, scene, part = (int(value), 0, "") if field == "step" else (step, int(value), "")
    elif field == "part" or points:
        part = FOOLED[scene][1] if field == "part" else chosen(points[-1:], SIZE)
    elif place:  # its tab is opened again: what is there stays
        return {}
    try:
        shown = STEPS[step](visits, scene, part)
    except (ValueError, OSError) as error:
        shown = fill("none", step=step, reason=html.escape(sentence_of(error)))
    return {"place": [step, scene, part], "lesson": shown}


@cache
def texts() -> dict[str, str]:
    """The templates by their names."""
    content = Path(__file__).with_name("lesson.html").read_text("utf-8")
    return dict(re.findall(r'<template id="(\w+)">(.*?)</template>', content, re.DOTALL))


def fill(template: str, /, **values: object) -> str:
    """A template with its values, which are HTML."""
    return texts()[template].format(**values)


def guess(visits: Visits, scene: int, part: str) -> str:
    """Which part did the model use? It is clicked before the heat is shown, and compared with the hottest part."""
    answer = visits.ask(scene_file(GUESSED[scene % len(GUESSED)]), CLASSIFIER, Question())
    name, share = likeliest(answer)
    known = {"name": name, "share": percent(share), "photo": answer.prediction.photo, "other": scene + 1}
    if not part:
        return fill("guess", picture=layers(fill("guess_label"), picks=SIDE, at=MIDDLE), **known)
    best = hottest(answer, part)
    heat, left = ([of(answer, each) for each in (part, best)] for of in (heat_in, without))
    known["good"] = fill("good" if heat[0] > heat[1] / 2 else "bad", score=percent(heat[0] / heat[1]))
    known["why"] = fill("needed" if left[1] < share - NEEDED else "spare")
    known |= {"heat": list(map(percent, heat)), "left": list(map(percent, left))}
    lines = cased("edge", frame_of(best)) + cased("asked", frame_of(part))
    return fill("guessed", picture=layers(fill("guessed_label"), heat=marks(answer)["heat"], lines=lines), **known)


def channels(visits: Visits, scene: int, part: str) -> str:
    """The channels of the last stage that have the largest part in the heat, and the heat as their sum."""
    answer = visits.ask(scene_file(TAKEN_APART), CLASSIFIER, Question())
    maps = channel_maps(answer.model, answer.evidence.images, class_score(answer.evidence.class_idx), answer.stage)
    maps = maps[0, :, None, None]  # (C, 1, 1, h, w)
    adds, largest = maps.flatten(1).sum(1).tolist(), maps.abs().max().item()
    order = maps.abs().flatten(1).sum(1).argsort(descending=True).tolist()
    known = {"pro": "", "con": "", "sums": "", "name": likeliest(answer)[0], "photo": answer.prediction.photo}
    for side, sign, colours in (("pro", 1, COLORMAPS[0]), ("con", -1, "gray")):
        for i in [each for each in order if sign * adds[each] > 0][:CHANNELS]:
            heat = heat_layer(sign * maps[i], colours, answer.read_at, (sign * maps[i]).max().item() / largest)
            known[side] += fill("channel", picture=layers(fill("channel_label"), heat=heat), adds=f"{adds[i]:+.2f}")
    counts = [2**power for power in range(len(maps).bit_length()) if 2**power < len(maps)] + [len(maps)]
    for count in counts:
        summed = maps[order[:count]].sum(0)
        like = correlation(summed, answer.attribution).item()
        picture = layers(fill("sum_label"), heat=heat_layer(summed, COLORMAPS[0], answer.read_at))
        kind = "sum" if count < len(maps) else "whole"
        known["sums"] += fill(kind, picture=picture, count=count, all=len(maps), like=f"{like:.2f}")
    figures = {"count": len(maps), "last": len(counts) - 1, "total": number(sum(adds))}
    return fill("channels", **figures, score=number(answer.evidence.score), **known)


def stages(visits: Visits, scene: int, part: str) -> str:
    """The same question at every stage of a classifier and of a U-Net, with the share of the heat on the shape."""
    truth, known = shapes.scene(TAKEN_APART, SCENE_SIDE), {"classifier": "", "segmenter": ""}
    for kind, model in (("classifier", CLASSIFIER), ("segmenter", SEGMENTER)):
        usual = visits.ask(scene_file(TAKEN_APART), model, Question())
        for stage in usual.model.stages:
            answer = usual.again(Question(stage=stage))
            heat = relative_heat(answer.attribution, truth.mask.shape, stage=answer.read_at)
            share = percent(float(heat[truth.mask].sum() / max(heat.sum(), 1e-9)))
            picture, size = draw_map(answer, spot=False), answer.attribution.shape
            known[kind] += fill("stage", picture=picture, stage=stage, size=size, share=share)
    name, area = shapes.CLASS_NAMES[truth.label], percent(float(truth.mask.mean()))
    return fill("stages", name=name, area=area, photo=usual.prediction.photo, **known)


def fool(visits: Visits, scene: int, part: str) -> str:
    """A heart is put into a scene: in the first one it changes the answer, in the second one only the heat."""
    seed, _ = FOOLED[scene]
    before = after = visits.ask(scene_file(seed), CLASSIFIER, Question())
    name, share = likeliest(before)
    found, lines, at = "", (), MIDDLE
    if part:
        after = Answer(visits, None, CLASSIFIER, Question())
        after.prediction = predict_photo(with_heart(scene, part), after.model)
        found, lines = tried(before, after, part, shapes.scene(seed, SCENE_SIDE).mask), cased("asked", frame_of(part))
        at = tuple(round(SIDE * (start + SIZE / 200)) for start in box_of(part)[:2])
    shown = marks(after)
    picture = layers(fill("fool_label"), **shown | {"lines": shown["lines"] + lines}, picks=SIDE, at=at)
    known = {"name": name, "share": percent(share), "task": fill(f"fool{scene}"), "photo": after.prediction.photo}
    return fill("fool", picture=picture, found=found, other=1 - scene, **known)


def tried(before: Answer, after: Answer, part: str, mask: np.ndarray) -> str:
    """What a heart in a part did; `mask` is where the shape itself is seen, (S, S) bool."""
    (name, share), (becomes, certain), area = likeliest(before), likeliest(after), (SIZE / 100) ** 2
    left = after.prediction.shares[max(before.prediction.shares, key=before.prediction.shares.get)]
    heat = [heat_in(each, part) for each in (before, after)]
    x1, y1, x2, y2 = pixels_of(part, Image.fromarray(mask))
    outcome = "misled" if abs(left - share) < SAME and heat[1] > DRAWN * area else "nothing"
    outcome = "covered" if mask[y1:y2, x1:x2].any() else "fooled" if becomes != name else outcome
    known = {"name": name, "share": percent(share), "becomes": becomes, "certain": percent(certain)}
    known |= {"left": percent(left), "heat": list(map(percent, heat)), "area": percent(area)}
    return fill("tried", says=fill(outcome, **known), **known)


def believe(visits: Visits, scene: int, part: str) -> str:
    """Three answers, each with the verdict on its heat to unfold, and what to keep in mind."""
    cards = ""
    for i, photo in enumerate((scene_file(BELIEVED), scene_file(REFUTED), str(PHOTOS / "flower.jpg"))):
        answer = visits.ask(photo, CLASSIFIER, Question())
        answer.work_out_verdict()
        lead, rest = map(html.escape, said(answer))
        known = {"number": i, "lead": lead, "rest": rest, "photo": answer.prediction.photo, "told": fill(f"card{i}")}
        cards += fill("card", picture=draw_map(answer), chip=chip(answer), sentence=answer.verdict.sentence, **known)
    return fill("believe", cards=cards)


STEPS = guess, channels, stages, fool, believe


def likeliest(answer: Answer) -> tuple[str, float]:
    """The likeliest class as HTML, and its probability."""
    name, share = max(answer.prediction.shares.items(), key=lambda item: item[1])
    return html.escape(quoted(name)), share


def hottest(answer: Answer, own: str) -> str:
    """Of a part and others as large, whose middles stand on a grid, the one with the largest share of the heat."""
    parts = [chosen([[x, y]], SIZE) for y in MIDDLES for x in MIDDLES]
    return max([own, *parts], key=partial(heat_in, answer))


def without(answer: Answer, part: str) -> float:
    """The probability of the class of an answer when a part of the photo is erased."""
    images = view(changed(open_image(answer.photo), "Erase", part), answer.model)
    return probabilities(answer.model, predict(answer.model, images))[0, answer.evidence.class_idx].item()


def with_heart(scene: int, part: str) -> Image.Image:
    """A scene of the step "Fool it" with a heart in a part."""
    photo, turned, finer = shapes.scene(FOOLED[scene][0], SCENE_SIDE).image, np.linspace(0, 2 * np.pi), 4
    left, top, right, bottom = pixels_of(part, photo)
    mask = Image.new("L", (finer * (right - left), finer * (bottom - top)))  # then reduced, for smooth edges
    down = 5 * np.cos(2 * turned) - 13 * np.cos(turned) + 2 * np.cos(3 * turned) + np.cos(4 * turned)
    edge = (np.stack([16 * np.sin(turned) ** 3, down - 2], 1) / 34 + 0.5) * mask.size
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in edge], fill=255)
    photo.paste((255, 0, 200), (left, top, right, bottom), mask.reduce(finer))
    return photo
