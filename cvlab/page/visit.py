"""The answers to what visitors ask about a photo and a model. Each value is computed once."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

from torch import Tensor

from cvlab.explain import check_stages, default_stage
from cvlab.models import Model, Stage
from cvlab.page.cache import Cache
from cvlab.page.evidence import Evidence, Paths, Prediction, evidence_of, open_mask, paths_of, predict_photo
from cvlab.page.html import quoted
from cvlab.page.models import Models
from cvlab.page.picture import cased, heat_layer, heated, hottest_edge, outline
from cvlab.page.question import Question, mask_of, region_words
from cvlab.transforms import WHOLE, Box, open_image, whole_mask
from cvlab.trust import Judgement, judge
from cvlab.trust.diagnosis import diagnose

MAX_BYTES = 256 * 2**20  # of what is cached about photos
SMALL = 2**12  # bytes of a value that is a few numbers
QUIET, FORGOTTEN = 10, 3600  # seconds after a question until its visitor is not thought to wait, or to be there
FORWARDS, SECONDS = 45, 3  # of a verdict; one that takes longer is given on request
METHOD_NAMES = {"grad_cam": "Grad-CAM", "hires_cam": "HiResCAM"}
UNIT = "logits"


class Visits:
    """Who asks what on a page, its models, and the cache that all answers share."""

    def __init__(self, models: Models, progress: Callable[[Sequence], Iterable] = iter) -> None:
        self.models, self.progress = models, progress
        self.cache = Cache(MAX_BYTES, lambda value: getattr(value, "nbytes", SMALL))
        self._asked: dict[str, tuple[float, tuple | None]] = {}

    def ask(self, photo: str | None, name: str, question: Question, mask: str | None = None) -> "Answer":
        """The answer about an uploaded photo of a model by its name in `Models`; `mask` is the path of the true mask.

        Gradio names the folder of an upload by a hash of the content: the path is the key of what is cached about it.
        """
        return Answer(self, photo, name, question, mask)

    def note(self, session: str, key: tuple | None) -> None:
        """Notes the `Answer.key` of what a visitor asks; None for what cannot be answered."""
        now, asked = time.monotonic(), list(self._asked.items())
        self._asked = {each: (at, of) for each, (at, of) in asked if now - at < FORGOTTEN} | {session: (now, key)}

    def is_last(self, session: str, key: tuple) -> bool:
        """Whether a visitor asked this last."""
        return self._asked.get(session, (0, None))[1] == key

    def others_ask(self, session: str) -> bool:
        """Whether another visitor asked something within the last seconds."""
        now = time.monotonic()
        return any(now - at < QUIET for each, (at, _) in list(self._asked.items()) if each != session)


@dataclass(eq=False)
class Answer:
    """The answer to one question about a photo: what every panel of the page is drawn from.

    Nothing is opened or computed before it is looked at. The values are in the cache and the model is in `Models`. An
    answer only refers to them, so that both can be dropped. Reading `model` or `prediction` raises a ValueError or
    OSError where there is no such model or photo.
    """

    visits: Visits
    photo: str | None
    name: str
    given: Question
    mask: str | None = None

    def again(self, question: Question) -> "Answer":
        """The answer to another question about the same photo."""
        return replace(self, given=question)

    @cached_property
    def model(self) -> Model:
        """The model, in eval mode."""
        return self.visits.models[self.name]

    @property
    def folder(self) -> Path:
        """The folder with the model's files."""
        return self.visits.models.folder(self.name)

    @cached_property
    def prediction(self) -> Prediction:
        """What the model sees in the photo."""
        model = self.model
        if self.photo is None:
            raise ValueError("Drop a photo, or choose an example.")
        key = "prediction", self.photo, self.name
        look = partial(predict_photo, model=model, progress=self.visits.progress)
        return self.visits.cache.get(key, lambda: look(open_image(self.photo, None, model.channels)))

    @property
    def segments(self) -> bool:
        """Whether the model is a segmenter."""
        return self.model.task == "segmentation"

    @cached_property
    def question(self) -> Question:
        """What was asked. The model's own threshold and default stage are left out: one question has one form."""
        threshold = 0.0 if self.given.threshold == self.model.threshold else self.given.threshold
        stage = "" if self.given.stage == default_stage(self.model) else self.given.stage
        return replace(self.given, threshold=threshold, stage=stage)

    @cached_property
    def evidence(self) -> Evidence:
        """The maps. Raises a ValueError where there is nothing to explain."""
        usual = self.question.asked == Question().asked and (self.segments or not self.question.stage)
        if usual and self.prediction.evidence:
            return self.prediction.evidence

        def make() -> Evidence:
            true = whole_mask(self.true_mask, self.prediction.logits.shape[-1]) if self._key[-1] else None
            return evidence_of(self.prediction, self.model, self.question, true)

        return self.visits.cache.get(("evidence", *self._key), make)

    @property
    def _key(self) -> tuple:
        """What decides the maps: of a classifier also the stage, of its errors also the true mask."""
        stage = "" if self.segments else self.question.stage
        mask = self.mask if self.question.region.startswith("false") else None
        return (self.photo, self.name, *self.question.asked, stage, mask)

    @cached_property
    def true_mask(self) -> Tensor:
        """The true mask at its own resolution, as `open_mask` gives it."""
        if not self.segments:
            raise ValueError("This model is a classifier: there is no mask to compare.")
        make = partial(open_mask, self.mask, self.model, self.prediction.size)
        return self.visits.cache.get(("mask", self.mask, self.photo, self.name), make)

    @property
    def stage(self) -> str:
        """The stage whose map is asked for."""
        (stage,) = check_stages(self.model, [self.question.stage or default_stage(self.model)])
        return stage

    @property
    def read_at(self) -> Stage:
        """The same as an object, which knows where its cells look."""
        return self.model.stages[self.stage]

    @property
    def attribution(self) -> Tensor:
        """The map that is asked for, signed, (1, 1, h, w)."""
        return self.evidence.maps[self.question.method][self.stage]

    @property
    def words(self) -> str:
        """What the maps show, as it stands in a title."""
        evidence, names = self.evidence, self.model.class_names
        compared = "" if evidence.other is None else f" rather than {quoted(names[evidence.other])}"
        where = "" if evidence.region is None else f" in {region_words(self.question)}"
        side = "against" if self.question.against else "for"
        return f"Evidence {side} {quoted(names[evidence.class_idx])}{compared}{where}"

    def warning(self, attribution: Tensor) -> str:
        """What to know before one of the maps is believed, as a sentence; empty where there is nothing to warn of."""
        logits = self.evidence.logits / self.model.temperature if self.testable else None
        return diagnose(attribution, logits, self.evidence.class_idx)

    @property
    def box(self) -> Box:
        """The part of the photo that the maps are of."""
        return self.evidence.box

    @property
    def testable(self) -> bool:
        """Whether the map is evidence for one class: hiding it then has to lower the score of that class."""
        return self.evidence.other is None and not self.question.against

    @property
    def quick(self) -> bool:
        """Whether a verdict takes few seconds, judged by the pass of the prediction, as long as three forwards."""
        return self.prediction.seconds / 3 * FORWARDS < SECONDS

    @property
    def key(self) -> tuple:
        """What decides the verdict."""
        return (*self._key, self.question.method, self.question.stage)

    @property
    def verdict(self) -> Judgement | None:
        """Whether the map can be believed, if `work_out_verdict` was called before."""
        return self.visits.cache.known(("verdict", *self.key))

    def work_out_verdict(self) -> None:
        """Takes 44 forwards; `verdict` is known afterwards. Does nothing where the map is not `testable`."""
        if self.testable:
            evidence, of = self.evidence, (self.evidence.class_idx, self.evidence.region, self.stage)
            make = partial(judge, self.model, evidence.images, self.attribution, *of)
            self.visits.cache.get(("verdict", *self.key), make)

    @property
    def paths(self) -> Paths | None:
        """How a segmenter came to the answer, if `work_out_paths` was called before."""
        return self.visits.cache.known(("paths", *self._key))

    def work_out_paths(self) -> None:
        """Takes two passes more; `paths` is known afterwards. Does nothing for a classifier."""
        if self.segments:
            make = partial(paths_of, self.model, self.evidence, self.question.against)
            self.visits.cache.get(("paths", *self._key), make)


@lru_cache(maxsize=1)  # two tabs show it
def draw_map(answer: Answer, stage: str = "", method: str = "", spot: bool = True) -> str:
    """A map over the photo, by default the map that is asked for."""
    stage, method = stage or answer.stage, method or answer.question.method
    label = f"Heatmap: {answer.words} at {stage} by {METHOD_NAMES[method]}, over the photo"
    attribution, read_at = answer.evidence.maps[method][stage], answer.model.stages[stage]
    return heated(attribution, read_at, answer.box, label, answer.question.colormap, spot)


def marks(answer: Answer, share: float = 1.0) -> dict:
    """What lies over the photo in one picture, as arguments of `layers`: the heat, its hottest tenth, the mask.

    `share` is as in `heat_layer`.
    """
    shown: dict[str, object] = {"lines": ()}
    if answer.prediction.evidence:  # else nothing was found
        attribution, stage = answer.attribution, answer.read_at
        line = "spot" if answer.segments else "edge"
        shown = {"box": answer.box, "heat": heat_layer(attribution, answer.question.colormap, stage, share)}
        shown["lines"] = cased(line, hottest_edge(attribution, answer.box, stage))
    if answer.segments:
        mask = mask_of(answer.question, answer.model, answer.prediction.logits)
        shown["lines"] += cased("edge", outline(mask.numpy().astype(float), 0.5, WHOLE))
    return shown
