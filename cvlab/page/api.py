"""The endpoints of the page for programs, and what they share with the page.

Names and parameters of the endpoints are part of the contract with those programs.
"""

import contextvars
import time
from pathlib import Path

import gradio as gr

from cvlab.checkpoint import hub
from cvlab.page.upload import photo_input
from cvlab.page.words import time_left
from cvlab.page.worker import SafeEvents


def fetch_with_progress(model_id: str) -> Path:
    """`hub.pull`, with the bytes counted on the page of the visitor who waits for them."""
    progress, here, begun = gr.Progress(), contextvars.copy_context(), time.monotonic()

    def show(arrived: int, expected: int) -> None:
        # The download calls this in threads of its own, which do not know whose page it is.
        told = f"Fetching {model_id}{time_left(begun, arrived, expected)}"
        here.copy().run(progress, (arrived, expected), desc=told, unit="bytes")

    return hub.pull(model_id, show)


def show_progress(done: int, of: int, what: str, unit: str) -> None:
    """Shows the visitor who waits how far the work is."""
    gr.Progress()((done, of), desc=what, unit=unit)


ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "verdict"}  # verdicts have a queue of their own


def add_api(events: SafeEvents) -> None:
    """Adds the endpoints to the page that is being built."""

    def predict(image: str, model: str) -> dict:
        """What a model sees in a photo: {label, confidences, familiar, set}, of a segmenter {mask, shares, numbers}.

        Args:
            image: the photo.
            model: a model by its name on the page, such as flowers, or on the Hugging Face Hub, user/name.
        """
        answer = events.run("predict", [model], image, model)
        mask = {"mask": gr.FileData(path=answer["mask"]).model_dump()} if "mask" in answer else {}
        return answer | mask

    def grad_cam(
        image: str, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[str, str, str, float]:
        """Where a model looked: the photo as it saw it, the heatmap, the heatmap over the photo, and its peak.

        Args:
            image: the photo.
            model: a model by its name.
            class_name: the class whose evidence is shown; empty: the predicted one.
            stage: the stage at which it is read; empty: the deepest one.
        """
        return tuple(events.run("grad_cam", [model], image, model, class_name, stage))

    def stages(image: str, model: str) -> tuple[str, list[tuple[str, str]]]:
        """What a U-Net found: the mask, and the heatmap of every stage with its name, resolution and peak.

        Args:
            image: the photo.
            model: a segmenter by its name.
        """
        return tuple(events.run("stages", [model], image, model))

    def judge(
        image: str, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[str, str, dict[str, dict]]:
        """Whether the heatmap of grad_cam can be believed: a level, a sentence, and the checks that it rests on.

        Args:
            image: the photo.
            model: a model by its name.
            class_name: as for grad_cam.
            stage: as for grad_cam.
        """
        return tuple(events.run("judge", [model], image, model, class_name, stage))

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
