"""The maps of an answer as pictures."""

from functools import lru_cache

from cvlab.page.picture import heated
from cvlab.page.visit import Answer

METHOD_NAMES = {"grad_cam": "Grad-CAM", "hires_cam": "HiResCAM"}
UNIT = "logits"


@lru_cache(maxsize=1)  # two tabs show it
def draw_map(answer: Answer, stage: str = "", method: str = "", spot: bool = True) -> str:
    """A map over the photo, by default the map that is asked for."""
    stage, method = stage or answer.stage, method or answer.question.method
    label = f"Heatmap: {answer.words} at {stage} by {METHOD_NAMES[method]}, over the photo"
    attribution, read_at = answer.evidence.maps[method][stage], answer.model.stages[stage]
    return heated(attribution, read_at, answer.box, label, answer.question.colormap, spot)
