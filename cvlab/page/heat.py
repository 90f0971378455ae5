"""The maps of an answer as pictures, on the scale that the question asks for."""

from functools import lru_cache

from cvlab.explain import peak
from cvlab.page.picture import heated
from cvlab.page.question import Question
from cvlab.page.visit import Answer

METHOD_NAMES = {"grad_cam": "Grad-CAM", "hires_cam": "HiResCAM"}
UNIT = "logits"


@lru_cache(maxsize=1)  # two tabs show it
def draw_map(answer: Answer, stage: str = "", method: str = "", spot: bool = True) -> tuple[str, float]:
    """A map over the photo, and the top of its scale as a peak; by default the map that is asked for.

    On one scale with it are a segmenter's maps at all stages, and a classifier's map of its prediction.
    """
    question, stage, method = answer.question, stage or answer.stage, method or answer.question.method
    maps = answer.evidence.maps[method]
    top, largest = peak(maps[stage]).item(), None
    if question.common_scale:
        usual = answer if answer.segments else answer.again(Question(stage=question.stage))
        top = max(top, *(peak(each).item() for each in usual.evidence.maps[method].values()))
        largest = top / maps[stage][0, 0].numel()
    label = f"Heatmap: {answer.words} at {stage} by {METHOD_NAMES[method]}, over the photo"
    read_at = answer.model.stages[stage]
    return heated(maps[stage], read_at, answer.box, label, question.colormap, largest, spot), top
