"""The live camera: one frame after the other is answered, at the speed of the model, and all maps have one scale.

A frame stays in memory: nothing that a camera shows is written to a disk.
"""

import base64
import html
from io import BytesIO

from cvlab.explain import peak
from cvlab.page.evidence import predict_photo
from cvlab.page.picture import layers, with_photo
from cvlab.page.question import Question
from cvlab.page.visit import Answer, Visits, marks
from cvlab.page.words import said
from cvlab.transforms import open_image

MAX_BYTES = 2 * 2**20  # of a frame; the page sends at most 640 pixels a side
START = '<button class="live">Live camera</button>'


def answer_to_frame(visits: Visits, name: str, frame: str) -> Answer:
    """The usual answer of a model to a picture as a data: URL; ValueError where it is too large or none."""
    if len(frame) > MAX_BYTES:
        raise ValueError(f"The frame is too large: the limit is {MAX_BYTES // 2**20} MB.")
    answer = Answer(visits, None, name, Question())
    image = open_image(BytesIO(base64.b64decode(frame.partition(",")[2])), None, answer.model.channels)
    answer.prediction = predict_photo(image, answer.model)
    return answer


def look_live(answer: Answer, scale: str) -> str:
    """A frame's answer and map, whose colours are those of the largest peak so far.

    Args:
        scale: what the page got with the frame before, "PEAK of MODEL"; empty for the first one.
    """
    top, _, of = scale.partition(" of ")
    top = float(top) if of == answer.name else 0.0
    own = peak(answer.attribution).item() if answer.prediction.evidence else 0.0
    top = max(top, own)
    lead, rest = map(html.escape, said(answer))
    told = f'<p class="note" data-scale="{top:.6g} of {html.escape(answer.name)}"><strong>{lead}</strong> {rest}</p>'
    picture = layers("The camera's picture with its heat", **marks(answer, own / top if top else 0.0))
    return with_photo(told + START + picture, "main")
