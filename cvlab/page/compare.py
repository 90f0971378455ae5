"""Two answers beside each other: of two models, or about two pictures."""

from dataclasses import replace

from cvlab.checkpoint.card import confirmed
from cvlab.explain import default_stage, peak
from cvlab.explain.many import likeness
from cvlab.page.html import number, paragraph
from cvlab.page.picture import captioned, heated, slider, with_photo
from cvlab.page.question import Question
from cvlab.page.visit import Answer
from cvlab.page.words import said


def compare(answer: Answer, second: Answer) -> str:
    """Two models on one picture, one on two, or both; ValueError where a classifier is compared with a segmenter."""
    if (second.visit.name, second.visit.photo) == (answer.visit.name, answer.visit.photo):
        return paragraph("Choose a second model, a second picture, or both.")
    # Places belong to one picture, thresholds to one model.
    first = answer.again(replace(answer.question, region="mask", points="", rather_than="", threshold=0.0))
    _ = first.prediction, second.prediction
    if first.model.task != second.model.task:
        raise ValueError("A classifier and a segmenter are asked different questions: compare like with like.")
    second = second.again(_of_second(first, second))
    titles = first.visit.name, second.visit.name
    if titles[0] == titles[1]:
        titles = "First picture", "Second picture"
    drawn = ""
    for title, each in zip(titles, (first, second), strict=True):
        attribution, question = each.attribution, each.question
        words = f"{each.words} at {each.stage}"
        shown = heated(attribution, each.read_at, each.box, f"{title}: {words}", question.colormap, None, True)
        tested = confirmed(each.visit.models.folder(each.visit.name), each.stage)
        caption = f"{' '.join(said(each))} {words}. Peak {number(peak(attribution).item())} logits. {tested}"
        drawn += with_photo(captioned(shown, title, caption), style=each.prediction.photo)
    agreement = paragraph(_agreement(first, second))
    return f'{agreement}{slider("Heat", first.question.opacity)}<div class="two">{drawn}</div>'


def _of_second(first: Answer, second: Answer) -> Question:
    """The question to the second side: at the same stage and about the same class, where its model has them."""
    stage = first.question.stage or default_stage(first.model)
    asked = replace(first.question, stage=stage if stage in second.model.stages else "")
    if first.model is second.model:  # the same class, so that the peaks can be compared
        return replace(asked, class_name=first.model.class_names[first.evidence.class_idx])
    return asked if asked.class_name in second.model.class_names else replace(asked, class_name="")


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
