"""Photos and questions, answered once: what was seen lately need not be computed again to be drawn differently.

What is kept is kept in memory only, up to a number of bytes, and goes when others come.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from torch import Tensor

from cvlab.explain import METHODS, default_stage
from cvlab.models import Model
from cvlab.page.answers import Evidence, Seen, Ways, evidence_for, in_view, open_mask, see, size_of, ways_of
from cvlab.page.offer import Models
from cvlab.page.question import Question, class_indices
from cvlab.page.shelf import Shelf
from cvlab.transforms import open_image

MAX_BYTES = 512 * 2**20  # of views and maps
Photo = str | BytesIO


class Desk:
    """Answers of models to questions about photos."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._seen: Shelf[Seen] = Shelf(MAX_BYTES // 2, lambda seen: seen.bytes)
        self._evidence: Shelf[Evidence] = Shelf(MAX_BYTES // 2, size_of)
        # By the id of the evidence, which is kept too, so that no other one gets that id.
        self._ways: Shelf[tuple[Evidence, Ways]] = Shelf(MAX_BYTES // 4, lambda kept: size_of(kept[0]))

    def seen(self, photo: Photo | None, name: str) -> tuple[Model, Seen]:
        """A model by its name, and what it sees in a photo.

        Raises:
            ValueError, OSError: no such model or photo, or one that cannot be opened.
        """
        model = self.models[name]
        if photo is None:
            raise ValueError("Drop a photo, or choose an example.")
        return model, self._seen.get((key_of(photo), name), lambda: see(open_image(photo), model))

    def evidence(
        self,
        photo: Photo,
        name: str,
        question: Question,
        mask: Photo | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Evidence:
        """The maps that answer a question about a photo.

        Args:
            mask: the true mask, where the question needs one.

        Raises:
            ValueError, OSError: as `seen` and `evidence_for`.
        """
        model, seen = self.seen(photo, name)
        question = as_usual(question, model)
        usual = question.asked == Question().asked and (model.task == "segmentation" or not question.stage)
        if usual and seen.evidence:
            return seen.evidence
        needs_mask = question.region.startswith("false")
        key = (key_of(photo), name, question.asked, mask and needs_mask and key_of(mask))
        if model.task == "classification" and question.method in METHODS:  # of a segmenter all stages are explained
            key += (question.stage,)

        def make() -> Evidence:
            true = in_view(self.true_mask(photo, name, question, mask), model) if needs_mask and mask else None
            return evidence_for(seen.images, model, question, true, progress)

        return self._evidence.get(key, make)

    def ways(self, evidence: Evidence, seen: Seen, model: Model, against: bool) -> Ways:
        """`ways_of` of a segmenter's evidence, worked out once."""
        return self._ways.get(id(evidence), lambda: (evidence, ways_of(seen.images, model, evidence, against)))[1]

    def known_ways(self, evidence: Evidence) -> Ways | None:
        """The same, if they were worked out before."""
        kept = self._ways.kept(id(evidence))
        return kept[1] if kept else None

    def true_mask(self, photo: Photo, name: str, question: Question, mask: Photo) -> Tensor:
        """The true mask (H, W) of the class that is asked about, at its own resolution."""
        model, seen = self.seen(photo, name)
        if model.task == "classification":
            raise ValueError("This model is a classifier: there is no mask to compare.")
        return open_mask(mask, model, class_indices(question, model, seen.logits)[0], seen.size)


def as_usual(question: Question, model: Model) -> Question:
    """The same question, with what is as the model has it anyway left out, so that it is known again."""
    threshold = 0.0 if question.threshold == model.threshold else question.threshold
    stage = "" if question.stage == default_stage(model) else question.stage
    return replace(question, threshold=threshold, stage=stage)


def key_of(photo: Photo) -> str:
    """The same for the same bytes."""
    content = photo.getvalue() if isinstance(photo, BytesIO) else Path(photo).read_bytes()
    return hashlib.sha256(content).hexdigest()
