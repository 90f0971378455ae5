"""Two answers beside each other: of two models, or about two pictures."""

from dataclasses import replace

from cvlab.explain import peak
from cvlab.explain.many import likeness
from cvlab.page.html import number, paragraph
from cvlab.page.picture import captioned, slider, with_photo
from cvlab.page.question import Question, settings_of
from cvlab.page.visit import UNIT, Answer, draw_map
from cvlab.page.words import said


def compare(answer: Answer, second: Answer) -> str:
    """Two models on one picture, one on two, or both; ValueError where a classifier is compared with a segmenter."""
    if (second.name, second.photo) == (answer.name, answer.photo):
        return paragraph("Choose a second model, a second picture, or both.")
    # Places belong to one picture, thresholds to one model.
    asked = replace(answer.question, region="mask", points="", rather_than="", threshold=0.0)
    first = answer.again(asked)
    _ = first.prediction, second.prediction
    if first.model.task != second.model.task:
        raise ValueError("A classifier and a segmenter are asked different questions: compare like with like.")
    asked = replace(asked, stage=first.stage)
    if first.model is second.model:  # the same class, so that the peaks can be compared
        asked = replace(asked, class_name=first.model.class_names[first.evidence.class_idx])
    second = second.again(Question(**settings_of(second.model, asked)))
    titles = first.name, second.name
    if titles[0] == titles[1]:
        titles = "First picture", "Second picture"
    drawn = ""
    for title, each in zip(titles, (first, second), strict=True):
        caption = f"{' '.join(said(each))} {each.words} at {each.stage}."
        caption += f" Peak {number(peak(each.attribution).item())} {UNIT}."
        drawn += with_photo(captioned(draw_map(each), title, caption), style=each.prediction.photo)
    agreement = paragraph(_agreement(first, second))
    return f'{agreement}{slider("Heat", first.question.opacity)}<div class="two">{drawn}</div>'


def _agreement(first: Answer, second: Answer) -> str:
    if first.model is second.model:
        return "One model, one class: the peaks of the two pictures can be compared."
    r = likeness(first.attribution, second.attribution).item()
    partly = "" if r > 0.7 else "partly "
    places = f"{partly}look at the same places" if r > 0.3 else "look at different places"
    return (
        f"Agreement of the two maps: r = {r:.2f}; the models {places}. Of two models only the shape of maps can be "
        "compared, not peaks."
    )
