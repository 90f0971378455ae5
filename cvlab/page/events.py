"""What happens when a visitor touches the page, or a program calls it.

An event takes and returns what JSON can hold, so that another process can work on it (worker.py). It returns panels as
HTML and settings as values, by their names; a list to choose from comes with its choices. `asked` stands for photo,
model, true mask and the values of a `Question`.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image

from cvlab import checkpoint
from cvlab.checkpoint import onnx
from cvlab.explain import peak, predicted_masks
from cvlab.models import Model
from cvlab.models.model import MOST_NAMES
from cvlab.page.breaking import change
from cvlab.page.changes import chosen
from cvlab.page.evidence import mask_size
from cvlab.page.examples import example_files
from cvlab.page.host import own_folder, sentence_of
from cvlab.page.html import paragraph
from cvlab.page.lesson import turn
from cvlab.page.live import START, answer_to_frame, look_live
from cvlab.page.many import explain_files
from cvlab.page.models import Models
from cvlab.page.panels import CHECKED, FOLLOWING, ON_REQUEST, REDRAWN, draw
from cvlab.page.photos import MOST_KEPT, fetch, strip
from cvlab.page.picture import MAX_SIDE
from cvlab.page.question import Question, from_query, mask_of, picked, settings_of
from cvlab.page.unet import CLASSIFIER
from cvlab.page.visit import Answer, Visits
from cvlab.page.words import time_left
from cvlab.render import enlarged, heatmap_picture, mask_overlay, overlay, to_picture
from cvlab.transforms import open_image, resize_logits, resize_mask

KEPT = ("method", "opacity", "colormap")  # of the settings, when another photo or model is chosen
PICKED = ("class_name", "rather_than", "region", "points")  # what a click in the picture sets
COPIED = "Copied. Choose where it goes, in this photo or in another one, then Paste."
Report = Callable[[int, int, str, str], object]  # told how much is done, of how much, of what, and its unit


class Events:
    """The events of a page by name. Each raises a ValueError or OSError only for what no widget of the page sends."""

    def __init__(self, models: Models, report: Report) -> None:
        self.visits, self.report = Visits(models, partial(_counted, report)), report

    def begin(self, session: str, query: Mapping[str, str], before: str, *asked: object) -> dict:
        """Another photo or model; at first what a link asks. `before` is the model whose lists the page shows."""
        given = self._answer(*asked).given
        question = Question(**{key: getattr(given, key) for key in KEPT}) if before else from_query(query)
        photo, name, mask, *_ = asked
        answer, changed = self.visits.ask(photo, name, question, mask), {"shown": "none"}
        with suppress(ValueError, OSError):  # the sentence says it
            wanted = settings_of(answer.model, question)
            # Gradio makes each widget anew that gets more than a value.
            changed = {"shown": name} | wanted | (_lists(answer.model, wanted) if name != before else {})
        return self._redrawn(session, answer, "background", "facts") | changed

    def linked(self, query: Mapping[str, str]) -> dict[str, str]:
        """The model and the photo that a link names."""
        examples = {caption: path for path, caption in example_files().items()}
        found = {"model": query["model"]} if query.get("model") else {}
        found |= {"photo": examples[query["example"]]} if query.get("example") in examples else {}
        return found | (self.fetch(query["photo"]) if query.get("photo") else {})

    def fetch(self, address: str) -> dict[str, str]:
        """A photo by its address, or why it cannot be had."""
        try:
            return {"photo": fetch(address, self.visits.models.owners), "fetched": ""}
        except (ValueError, OSError) as error:
            return {"fetched": paragraph(sentence_of(error))}

    def keep(self, files: Sequence[str] | None, photo: str | None, kept: list[str], trail: list) -> dict:
        """The strip with the visitor's photos; without examples, and without what "Break it" made."""
        others = {*example_files(), *(step["photo"] for step in trail[1:]), None}
        added = [each for each in (*(files or []), photo) if each not in others]
        kept = [*dict.fromkeys([*kept, *added])][-MOST_KEPT:]
        return {"kept": kept, "strip": strip(kept, photo)}

    def redraw(self, session: str, *asked: object) -> dict:
        """Another question about the same photo."""
        return self._redrawn(session, self._answer(*asked))

    def drawing(self, session: str, names: Sequence[str], *asked: object) -> dict:
        """Some panels anew."""
        return draw(self._answer(*asked), names)

    def pick(self, session: str, points: list, *asked: object) -> dict:
        """A click or a drag in the picture."""
        answer = self._answer(*asked)
        with suppress(ValueError, OSError):  # the panels say it
            if answer.segments:
                answer = answer.again(picked(answer.question, answer.model, answer.prediction.logits, points))
        return self._redrawn(session, answer) | {name: getattr(answer.given, name) for name in PICKED}

    def follow(self, session: str, *asked: object) -> dict:
        """What takes more passes, of a segmenter."""
        answer = self._answer(*asked)
        with suppress(ValueError, OSError):  # the panels of the answer say it
            if answer.segments:
                answer.work_out_paths()
                return draw(answer, FOLLOWING)
        return {}

    def check(self, session: str, *asked: object) -> dict:
        """The verdict on the map, or a button for it where it takes long or others wait."""
        answer = self._answer(*asked)
        with suppress(ValueError, OSError):
            busy = self.visits.others_ask(session) or not answer.quick
            if busy and answer.testable and not answer.verdict:
                return {"chip": ON_REQUEST}
        return self.check_now(session, *asked)

    def check_now(self, session: str, *asked: object) -> dict:
        """The verdict on the map, unless another question was asked meanwhile."""
        answer, last = self._answer(*asked), partial(self.visits.is_last, session)
        with suppress(ValueError, OSError):
            if last(answer.key):
                answer.work_out_verdict()
            if not last(answer.key):
                return {}
        return draw(answer, CHECKED)

    def beside(self, session: str, panel: str, other: str, second: str | None, *asked: object) -> dict:
        """A panel about two models, or two photos; an empty one is the first one again."""
        photo, name, *values = asked
        two = self._answer(photo, name, None, *values), self._answer(second or photo, other or name, None, *values)
        return draw(two[0], [panel], two[1])

    def many(self, files: Sequence[str], *asked: object) -> str:
        """Many photos: gallery and table as HTML."""
        answer, begun = self._answer(*asked), time.monotonic()

        def progress(done: tuple[int, int]) -> None:
            self.report(*done, f"Explaining pictures{time_left(begun, *done)}", "pictures")

        try:
            return explain_files(answer.model, files, answer.given, progress)[0]
        except (ValueError, OSError) as error:
            return paragraph(sentence_of(error))

    def onnx(self, *asked: object) -> tuple[str | None, str]:
        """The path of the model as model.onnx, or why there is none."""
        try:
            model = checkpoint.load(self._answer(*asked).folder)  # a copy: another visitor may ask the one of the page
            return str(onnx.write(model, _folder())), ""
        except (ValueError, OSError) as error:
            return None, paragraph(sentence_of(error))

    def choose_part(self, session: str, points: list, size: float, *asked: object) -> dict:
        """A click or a drag in the picture of "Break it"; `size` is that of a clicked part, in percent of the sides."""
        part = chosen(points, size)
        return {"part": part} | draw(self._answer(*asked), ["canvas"], part)

    def change(self, session: str, tool: str, part: str, clipboard: str, trail: list, photo: str | None) -> dict:
        """A button of "Break it": another photo with its history, or a part that is copied."""
        try:
            found = change(tool, part, clipboard, trail, photo, _saved)
            return {"told": "" if "photo" in found else paragraph(COPIED)} | found
        except (ValueError, OSError) as error:
            return {"told": paragraph(sentence_of(error))}

    def broken(self, session: str, part: str | None, trail: list, *asked: object) -> dict:
        """What "Break it" shows of a photo; nothing until it is opened, when `part` is no longer None."""
        if part is None:
            return {}
        answer = self._answer(*asked)
        return draw(answer, ["canvas"], part) | draw(answer, ["history"], trail)

    def learn(self, session: str, did: str, points: list, place: list | None) -> dict:
        """A button of the lesson, or a click in its picture; both are empty when its tab is opened."""
        return turn(self.visits, did, points, place, _saved)

    def live(self, session: str, frame: str, scale: str, name: str) -> dict:
        """A frame of the camera, as a data: URL."""
        try:
            return {"live": look_live(answer_to_frame(self.visits, name, frame), scale)}
        except (ValueError, OSError) as error:
            return {"live": paragraph(sentence_of(error)) + START}

    def predict(self, image: str, model: str) -> dict:
        """As the endpoint of this name; the mask is a path."""
        answer = self.visits.ask(image, model, Question())
        if answer.segments:
            picture, shares, numbers = masked(open_image(image, None, answer.model.channels), answer)
            return {"mask": _saved(enlarged(picture)), "shares": shares, "numbers": numbers}
        ranked = sorted(answer.prediction.shares.items(), key=lambda item: -item[1])[:MOST_NAMES]
        confidences = [{"label": name, "confidence": share} for name, share in ranked]
        names = answer.prediction.names and answer.prediction.names[:MOST_NAMES]
        told = {"familiar": answer.prediction.familiar, "set": names}
        return {"label": ranked[0][0], "confidences": confidences, **told}

    def grad_cam(self, image: str, model: str, class_name: str | None, stage: str | None) -> tuple:
        """As the endpoint of this name; pictures are paths."""
        answer = self.visits.ask(image, model, Question(class_name=class_name, stage=stage))
        attribution, images = answer.attribution, answer.model.as_rgb(answer.evidence.images)
        heat = heatmap_picture(attribution, images.shape[-2:], stage=answer.read_at)
        three = to_picture(images), heat, overlay(images, attribution, stage=answer.read_at)
        return *(_saved(enlarged(each)) for each in three), peak(attribution).item()

    def stages(self, image: str, model: str) -> tuple[str, list[tuple[str, str]]]:
        """As the endpoint of this name; pictures are paths."""
        answer = self.visits.ask(image, model, Question())
        if not answer.segments:
            raise ValueError(CLASSIFIER)
        images, maps = answer.model.as_rgb(answer.evidence.images), answer.evidence.maps["grad_cam"]
        pictures = []
        for name, attribution in maps.items():
            height, width = attribution.shape[-2:]
            caption = f"{name}: {width} x {height}, peak {peak(attribution).item():.3g}. {answer.warning(attribution)}"
            drawn = overlay(images, attribution, stage=answer.model.stages[name])
            pictures.append((_saved(enlarged(drawn)), caption))
        mask = mask_of(answer.question, answer.model, answer.evidence.logits)
        return _saved(enlarged(mask_overlay(to_picture(images), mask.numpy()))), pictures

    def judge(self, image: str, model: str, class_name: str | None, stage: str | None) -> tuple[str, str, dict]:
        """As the endpoint of this name."""
        answer = self.visits.ask(image, model, Question(class_name=class_name, stage=stage))
        answer.work_out_verdict()
        verdict = answer.verdict
        return verdict.level, verdict.sentence, {name: check._asdict() for name, check in verdict.checks.items()}

    def _answer(self, photo: str | None, name: str, mask: str | None, *values: object) -> Answer:
        return self.visits.ask(photo, name, Question(*values), mask)

    def _redrawn(self, session: str, answer: Answer, *more: str) -> dict:
        key = None
        with suppress(ValueError, OSError):  # the sentence says it
            key = answer.key
        self.visits.note(session, key)
        return dict.fromkeys(CHECKED, "") | draw(answer, (*REDRAWN, *more))


def _lists(model: Model, values: dict[str, object]) -> dict[str, dict]:
    """The lists whose choices depend on the model, with their values."""
    names = model.class_names[:MOST_NAMES]  # any other one can be typed
    choices = {
        "class_name": [("(predicted)", ""), *names],
        "rather_than": [("(nothing else)", ""), *names],
        "stage": list(model.stages),
    }
    lists = {name: {"choices": each, "value": values[name]} for name, each in choices.items()}
    return lists | {"rather_than": lists["rather_than"] | {"visible": len(names) > 1}}


def _counted(report: Report, batches: Sequence) -> Iterator:
    """The batches of a photo's tiles one by one."""
    for i, batch in enumerate(batches):
        report(i, len(batches), "Predicting the photo in tiles", "batches")
        yield batch


def _folder() -> Path:
    """A folder of its own in Gradio's cache, which is deleted in time: nobody else writes there while it is read."""
    folder = own_folder() / "uploads" / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder


def _saved(picture: Image.Image) -> str:
    """The path of a PNG of it."""
    path = _folder() / "image.png"
    picture.save(path, "PNG", compress_level=1)
    return str(path)


def masked(photo: Image.Image, answer: Answer) -> tuple[Image.Image, dict[str, float], str]:
    """The photo with a segmenter's mask, the share of it that each object covers, and a sentence about the mask."""
    model, logits, pixels = answer.model, answer.prediction.logits, photo.width * photo.height
    size = mask_size(model, (photo.height, photo.width))
    masks, names = predicted_masks(model, resize_logits(logits, size))[0], model.class_names
    masks, names = masks[model.first_object :], names[model.first_object :]
    shares = {name: mask.float().mean().item() for name, mask in zip(names, masks, strict=True)}
    share, at = masks.any(0).double().mean().item(), f"threshold {model.threshold:g}"
    sentence = f"The mask covers {round(share * pixels):,} of {pixels:,} pixels ({share:.1%}), {at}."
    if share == 0:
        sentence = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
    photo = photo.convert("RGB") if model.channels else photo
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    mask = resize_mask(masks.any(0)[None], (photo.height, photo.width))[0]
    return mask_overlay(photo, mask.numpy()), shares, sentence
