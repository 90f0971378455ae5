"""The endpoints of the page for programs, and what they share with the page.

Names and parameters of the endpoints are part of the contract with those programs.
"""

import contextvars
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from cvlab.checkpoint import hub
from cvlab.explain import peak, predicted_masks
from cvlab.models.model import MOST_NAMES
from cvlab.page.evidence import mask_size
from cvlab.page.examples import example_files
from cvlab.page.host import sentence_of, without_paths
from cvlab.page.picture import MAX_SIDE
from cvlab.page.question import Question, mask_of
from cvlab.page.unet import CLASSIFIER
from cvlab.page.upload import UPLOADS, photo_input
from cvlab.page.visit import Answer, Visits
from cvlab.render import enlarged, heatmap_picture, mask_overlay, overlay, to_picture
from cvlab.transforms import open_image, resize_logits, resize_mask


class Page(gr.Blocks):
    """Blocks that answer whatever goes wrong with a sentence: Gradio would show the text of the error."""

    async def process_api(self, *arguments: object, **options: object) -> dict:
        """The answer to one event or call."""
        example_files()  # where somebody cleaned the disk, they are drawn again
        try:
            return await super().process_api(*arguments, **options)
        except gr.Error as error:
            error.message = without_paths(str(error.message))
            raise
        except Exception as error:
            raise gr.Error(sentence_of(error)) from error


def fetch_with_progress(model_id: str) -> Path:
    """`hub.pull`, with the bytes counted on the page of the visitor who waits for them."""
    progress, here = gr.Progress(), contextvars.copy_context()

    def show(arrived: int, expected: int) -> None:
        # The download calls this in threads of its own, which do not know whose page it is.
        here.copy().run(progress, (arrived, expected), desc=f"Fetching {model_id}", unit="bytes")

    return hub.pull(model_id, show)


def tiles_with_progress(batches: Sequence) -> Iterator:
    """Batches of a photo's tiles one by one, counted on the page of the visitor who waits for them."""
    progress = gr.Progress()
    for i, batch in enumerate(batches):
        progress((i, len(batches)), desc="Predicting the photo in tiles", unit="batches")
        yield batch


def saved(picture: Image.Image) -> str:
    """A PNG in Gradio's cache, in a folder of its own: nobody else writes there while it is read."""
    path = UPLOADS / secrets.token_hex(16) / "image.png"
    path.parent.mkdir(parents=True)
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
    photo.thumbnail((MAX_SIDE, MAX_SIDE))
    mask = resize_mask(masks.any(0)[None], (photo.height, photo.width))[0]
    return mask_overlay(photo, mask.numpy()), shares, sentence


ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "verdict"}  # verdicts have a queue of their own


def add_api(visits: Visits) -> None:
    """Adds the endpoints to the page that is being built."""

    def predict(image: str, model: str) -> dict:
        """{label, confidences, familiar, set} for a classifier, {mask, shares, numbers} for a segmenter."""
        answer = visits.ask(image, model, Question())
        if answer.segments:
            picture, shares, numbers = masked(open_image(image), answer)
            mask = gr.FileData(path=saved(enlarged(picture)))
            return {"mask": mask.model_dump(), "shares": shares, "numbers": numbers}
        ranked = sorted(answer.prediction.shares.items(), key=lambda item: -item[1])[:MOST_NAMES]
        confidences = [{"label": name, "confidence": share} for name, share in ranked]
        names = answer.prediction.names and answer.prediction.names[:MOST_NAMES]
        told = {"familiar": answer.prediction.familiar, "set": names}
        return {"label": ranked[0][0], "confidences": confidences, **told}

    def grad_cam(
        image: str, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[str, str, str, float]:
        """Original, heatmap, overlay and peak; by default for the predicted class at the deepest stage."""
        answer = visits.ask(image, model, Question(class_name=class_name, stage=stage))
        attribution, images = answer.attribution, answer.evidence.images
        heat = heatmap_picture(attribution, images.shape[-2:], stage=answer.read_at)
        three = to_picture(images), heat, overlay(images, attribution, stage=answer.read_at)
        return *(saved(enlarged(picture)) for picture in three), peak(attribution).item()

    def stages(image: str, model: str) -> tuple[str, list[tuple[str, str]]]:
        """The mask picture and a gallery of every stage, each with its name, resolution and peak."""
        answer = visits.ask(image, model, Question())
        if not answer.segments:
            raise ValueError(CLASSIFIER)
        images, maps = answer.evidence.images, answer.evidence.maps["grad_cam"]
        pictures = []
        for name, attribution in maps.items():
            height, width = attribution.shape[-2:]
            caption = f"{name}: {width} x {height}, peak {peak(attribution).item():.3g}. {answer.warning(attribution)}"
            drawn = overlay(images, attribution, stage=answer.model.stages[name])
            pictures.append((saved(enlarged(drawn)), caption))
        mask = mask_of(answer.question, answer.model, answer.evidence.logits)
        return saved(enlarged(mask_overlay(to_picture(images), mask.numpy()))), pictures

    def judge(
        image: str, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[str, str, dict[str, dict]]:
        """Whether the map of `grad_cam` can be believed: level, a sentence, and the checks that it rests on."""
        answer = visits.ask(image, model, Question(class_name=class_name, stage=stage))
        answer.work_out_verdict()
        verdict = answer.verdict
        checks = {name: check._asdict() for name, check in verdict.checks.items()}
        return verdict.level, verdict.sentence, checks

    image = photo_input(visible=False, label="a photo, in any format")
    model = gr.Textbox(visible=False, label="a model by its name on the page, or on the Hub: user/name")
    class_name = gr.Textbox(visible=False, label="a class by its name; empty: the predicted one")
    stage = gr.Textbox(visible=False, label="a stage by its name; empty: the deepest one")
    shown = [gr.Image(visible=False, format="png") for _ in range(4)]
    number, gallery, answer = gr.Number(visible=False), gr.Gallery(visible=False, format="png"), gr.JSON(visible=False)
    trigger = gr.Button(visible=False)
    trigger.click(predict, [image, model], answer, api_name="predict")
    trigger.click(grad_cam, [image, model, class_name, stage], [*shown[:3], number], api_name="grad_cam")
    told = [gr.Textbox(visible=False), gr.Textbox(visible=False), answer]
    trigger.click(judge, [image, model, class_name, stage], told, api_name="judge", **ONE_AT_A_TIME)
    trigger.click(stages, [image, model], [shown[3], gallery], api_name="stages")
