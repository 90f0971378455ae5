"""The page: drop a photo, see what a model predicts, where it looked, and what each stage of a U-Net contributed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub

CVLAB_MODELS="user/a,user/b" adds models as the command line does.
"""

import argparse
import base64
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: nothing leaves this machine

import gradio as gr
import sklearn.datasets
from gradio.data_classes import ImageData
from gradio.processing_utils import save_pil_to_cache
from PIL import Image
from torch import nn

from cvlab import checkpoint, hub, shapes
from cvlab.answers import grad_cam_answer, predict_answer, stages_answer
from cvlab.explain import default_stage
from cvlab.transforms import open_image

ROOT = Path(__file__).resolve().parent
TOP_CLASSES = 5

PREDICTED = "(the predicted one)"
GRAD_CAM_PICTURES = ("original", "heat", "blended")
STAGES_PICTURES = ("stage_input", "stage_mask", "gallery")

# System fonts: the default theme asks a font server.
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto}
.note p {margin: 0}
.stages .caption-label {position: static; display: block; max-width: 100%; border-radius: 0}
"""


# --- models -----------------------------------------------------------------------------------------------------------


def offered_models(root: Path, names: Sequence[str]) -> dict[str, str]:
    """What the picker offers, {name: folder or Hub name}: those asked for, then shipped, then local ones."""
    offered = {name: name for name in names}
    offered |= {config.parent.name: str(config.parent) for config in sorted(root.glob("checkpoints/*/config.json"))}
    offered |= {f"runs/{config.parent.name}": str(config.parent) for config in sorted(root.glob("runs/*/config.json"))}
    return offered


class Models:
    """The models of the page, loaded when first used. A visitor can name a Hub model, but no folder of the server."""

    def __init__(self, offered: dict[str, str]) -> None:
        self.offered = offered
        self._lock = threading.Lock()
        self._load = lru_cache(maxsize=8)(checkpoint.load)

    def __getitem__(self, name: str) -> nn.Module:
        """The model of an offered name (a shipped one also as checkpoints/NAME) or of a Hub name.

        Raises:
            ValueError: there is no such model, or it cannot be opened.
        """
        source = self.offered.get(name.removeprefix("checkpoints/"))
        with self._lock:
            if source is not None:
                return self._load(source)
            if not hub.is_id(name):
                raise ValueError(f"There is no model {name!r}: choose one of the list, or type a Hub name (user/name).")
            return self._load(hub.pull(name))


def model_facts(model: nn.Module) -> str:
    """What the chosen model is, in plain text: names come from strangers and are never rendered."""
    classes = model.class_names
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    kind = "Tells apart" if model.task == "classification" else "Finds the pixels of"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{kind}: {shown}. It sees {model.image_size} x {model.image_size} pixels; {parameters:.1f} M parameters."


# --- the page ---------------------------------------------------------------------------------------------------------


def photo_input(**options: object) -> gr.Image:
    """An image input that hands over the file as it came, for cvlab's own opener (Gradio's spoils several formats)."""
    component = gr.Image(image_mode=None, type="filepath", **options)
    component.preprocess = file_of
    return component


def file_of(payload: ImageData | None) -> str | BytesIO | None:
    """What was uploaded, undecoded: a path, or the bytes of a data: URL."""
    if payload is None:
        return None
    if payload.url and payload.url.startswith("data:"):
        return BytesIO(base64.b64decode(payload.url.partition(",")[2]))
    return payload.path


def example_files(folder: Path) -> list[str]:
    """Pictures to begin with: synthetic scenes, and the two photographs that scikit-learn brings along."""
    scenes = []
    for seed in (4006, 4019, 4003):  # beyond the seeds that cvlab/data.py gives to train, val and test
        path = folder / f"scene-{seed}.png"
        shapes.scene(seed, size=256).image.save(path)
        scenes.append(str(path))
    photos = Path(sklearn.datasets.__file__).parent / "images"
    return [*scenes, *(str(photos / name) for name in ("flower.jpg", "china.jpg"))]


def answer(models: Models, photo: str | BytesIO | None, name: str) -> dict[str, object]:
    """Everything that is shown for a photo and a model, by the names of `build_page`'s widgets.

    What cannot be answered is emptied, with a sentence instead: an old heatmap never stands beside another photo.
    """
    shown = dict.fromkeys(("facts", "label", "mask", *GRAD_CAM_PICTURES, *STAGES_PICTURES), None)
    shown |= dict.fromkeys(("notes", "mask_numbers", "trust", "stages_trust"), "")
    try:
        if not name:
            raise ValueError("Choose a model, or type its name on the Hub (user/name).")
        model = models[name]
        shown["facts"] = model_facts(model)
        shown["class_choice"] = gr.Dropdown(choices=[PREDICTED, *model.class_names], value=PREDICTED)
        shown["stage_choice"] = gr.Dropdown(choices=list(model.stages), value=default_stage(model))
        if photo is None:
            raise ValueError("Drop a photo, or choose an example.")
        image = open_image(photo)
        shares, mask_picture, shown["mask_numbers"] = predict_answer(image, model)
    except (ValueError, OSError) as error:
        return shown | {"notes": sentence_of(error)}
    segmenter = model.task == "segmentation"
    share = "Share of the photo" if segmenter else "Probability"
    shown["notes"] = " ".join(image.info["notes"])
    shown["label"] = gr.Label(value=shares, label=share, show_heading=not segmenter)
    shown["mask"] = gr.Image(value=mask_picture, visible=segmenter)
    return shown | grad_cam_shown(image, model, PREDICTED, None) | stages_shown(image, model)


def redraw(models: Models, photo: str | BytesIO | None, name: str, class_name: str, stage: str) -> dict[str, object]:
    """Grad-CAM again, for another class or stage."""
    try:
        if photo is None:
            raise ValueError("Drop a photo, or choose an example.")
        return grad_cam_shown(open_image(photo), models[name], class_name, stage)
    except (ValueError, OSError) as error:
        return dict.fromkeys(GRAD_CAM_PICTURES) | {"trust": sentence_of(error)}


def grad_cam_shown(image: Image.Image, model: nn.Module, class_name: str, stage: str | None) -> dict[str, object]:
    """The Grad-CAM tab."""
    try:
        drawn = grad_cam_answer(image, model, None if class_name == PREDICTED else class_name, stage)
    except ValueError as error:
        return dict.fromkeys(GRAD_CAM_PICTURES) | {"trust": sentence_of(error)}
    scale = f"Peak {drawn.peak:.3g}: colours run from no evidence to this. {drawn.sentence}"
    return {"original": drawn.original, "heat": drawn.heatmap, "blended": drawn.overlay, "trust": scale}


def stages_shown(image: Image.Image, model: nn.Module) -> dict[str, object]:
    """The U-Net tab, or why it is empty."""
    try:
        photo, mask_picture, captioned, sentences = stages_answer(image, model)
    except ValueError as error:
        return dict.fromkeys(STAGES_PICTURES) | {"stages_trust": sentence_of(error)}
    return {"stage_input": photo, "stage_mask": mask_picture, "gallery": captioned, "stages_trust": sentences}


def build_page(models: Models) -> gr.Blocks:
    """The Blocks page, not launched."""
    names = list(models.offered)
    examples = example_files(Path(tempfile.mkdtemp(prefix="cvlab-examples-")))
    shown: dict[str, gr.components.Component] = {}
    with gr.Blocks(title="cvlab", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# cvlab\nWhat does a vision model see in a photo, and why? Choose a model and drop a picture.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model = gr.Dropdown(
                    names,
                    value=names[0] if names else None,
                    allow_custom_value=True,
                    label="Model",
                    info="From the list, or a name on the Hugging Face Hub: user/name",
                )
                shown["facts"] = gr.Textbox(label="About the model", interactive=False, lines=2)
                photo = photo_input(
                    value=examples[0], label="Photo", height=300, buttons=[], alt_text="The photo that was chosen"
                )
                gr.Examples(examples, photo, label="Examples", cache_examples=False)
            with gr.Column(scale=5, min_width=300):
                shown["notes"] = gr.Markdown(elem_classes="note")
                with gr.Tab("Predict"):
                    shown["label"] = gr.Label(label="Probability", num_top_classes=TOP_CLASSES)
                    shown["mask"] = picture("Mask", "The photo with the predicted mask tinted blue", visible=False)
                    shown["mask_numbers"] = gr.Markdown(elem_classes="note")
                with gr.Tab("Grad-CAM"):
                    shown |= grad_cam_widgets()
                with gr.Tab("U-Net stages"):
                    shown |= stages_widgets()

        def by_widget(answer: Callable[..., dict], *inputs: object) -> dict:
            return {shown[name]: value for name, value in answer(models, *inputs).items()}

        gr.on(
            [page.load, photo.change, model.change],
            partial(by_widget, answer),
            [photo, model],
            list(shown.values()),
            api_visibility="private",
            show_progress_on=[shown["label"], shown["blended"], shown["gallery"]],
        )
        gr.on(
            [shown["class_choice"].input, shown["stage_choice"].input],
            partial(by_widget, redraw),
            [photo, model, shown["class_choice"], shown["stage_choice"]],
            [shown[name] for name in (*GRAD_CAM_PICTURES, "trust")],
            api_visibility="private",
        )
        add_api(models)
    return page


def grad_cam_widgets() -> dict[str, gr.components.Component]:
    """The Grad-CAM tab: two choices, three pictures of one view, and the scale."""
    widgets = {}
    with gr.Row():
        widgets["class_choice"] = gr.Dropdown([PREDICTED], value=PREDICTED, label="Evidence for the class")
        widgets["stage_choice"] = gr.Dropdown([], label="Read at the stage")
    with gr.Row():
        widgets["original"] = picture("Original", "The part of the photo that the model sees")
        widgets["heat"] = picture("Heatmap", "Evidence for the class: black is none, yellow the most")
        widgets["blended"] = picture("Overlay", "The heatmap laid over the photo")
    widgets["trust"] = gr.Markdown(elem_classes="note")
    return widgets


def stages_widgets() -> dict[str, gr.components.Component]:
    """The U-Net tab: input, mask, one captioned heatmap a stage, and what the maps cannot say."""
    widgets = {}
    with gr.Row():
        widgets["stage_input"] = picture("Input", "The photo as the model sees it")
        widgets["stage_mask"] = picture("Mask", "The predicted mask, tinted blue")
    widgets["gallery"] = gr.Gallery(
        label="Evidence for the mask at every stage, from the first encoder to the last decoder",
        columns=4,
        height="auto",
        object_fit="contain",
        format="jpeg",
        buttons=[],
        elem_classes="stages",
    )
    widgets["stages_trust"] = gr.Markdown(elem_classes="note")
    gr.Markdown(
        "Each map is divided by its own maximum. The peak is that maximum times the number of positions of the stage:"
        " with it the stages of one model can be compared, but not two models.",
        elem_classes="note",
    )
    return widgets


def picture(label: str, alt_text: str, visible: bool = True) -> gr.Image:
    """A picture that is shown, not changed. JPEG: PNG takes 70 times as long to encode."""
    return gr.Image(
        label=label,
        alt_text=alt_text,
        visible=visible,
        interactive=False,
        format="jpeg",
        buttons=["download", "fullscreen"],
    )


def sentence_of(error: ValueError) -> str:
    """An error of the library as a sentence of the page."""
    text = str(error)
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def add_api(models: Models) -> None:
    """The endpoints for programs: /predict, /grad_cam and /stages, whose names and parameters are kept."""

    def api_predict(image: str | BytesIO, model: str) -> dict:
        """Of a classifier {label, confidences}, of a segmenter {mask, shares, numbers}."""
        with in_sentences():
            network = models[model]
            shares, mask_picture, sentence = predict_answer(open_image(image), network)
        if network.task == "classification":
            ranked = sorted(shares.items(), key=lambda item: -item[1])
            confidences = [{"label": name, "confidence": share} for name, share in ranked]
            return {"label": ranked[0][0], "confidences": confidences}
        file = gr.FileData(path=save_pil_to_cache(mask_picture, api_cache, format="png"))
        return {"mask": file.model_dump(), "shares": shares, "numbers": sentence}

    def api_grad_cam(
        image: str | BytesIO, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[Image.Image, Image.Image, Image.Image, float]:
        """Original, heatmap, overlay, peak; by default for the predicted class at the deepest stage."""
        with in_sentences():
            drawn = grad_cam_answer(open_image(image), models[model], class_name, stage)
        return drawn.original, drawn.heatmap, drawn.overlay, drawn.peak

    def api_stages(image: str | BytesIO, model: str) -> tuple[Image.Image, list[tuple]]:
        """The mask picture and a gallery of every stage, each with its name, resolution and peak."""
        with in_sentences():
            _, mask_picture, captioned, _ = stages_answer(open_image(image), models[model])
        return mask_picture, captioned

    image, model = photo_input(visible=False), gr.Textbox(visible=False)
    class_name, stage = gr.Textbox(visible=False), gr.Textbox(visible=False)
    pictures = [gr.Image(visible=False, format="png") for _ in range(4)]
    numbers, gallery, answer = gr.Number(visible=False), gr.Gallery(visible=False, format="png"), gr.JSON(visible=False)
    api_cache = answer.GRADIO_CACHE
    trigger = gr.Button(visible=False)
    trigger.click(api_predict, [image, model], answer, api_name="predict")
    trigger.click(api_grad_cam, [image, model, class_name, stage], [*pictures[:3], numbers], api_name="grad_cam")
    trigger.click(api_stages, [image, model], [pictures[3], gallery], api_name="stages")


@contextmanager
def in_sentences() -> Iterator[None]:
    """An error of the library reaches a program as its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(sentence_of(error)) from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a folder, or a name on the Hub (user/name)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    args = parser.parse_args()
    named = [name.strip() for name in os.environ.get("CVLAB_MODELS", "").split(",") if name.strip()]
    offered = offered_models(ROOT, [*args.models, *named])
    launch(build_page(Models(offered)), server_port=args.port)


def launch(page: gr.Blocks, **options: object) -> None:
    """Starts the server, with the settings that keep it closed: no analytics, no history of the users' pictures."""
    page.queue(api_open=False).launch(
        theme=THEME, css=CSS, run_history=False, footer_links=["api"], max_file_size="40mb", ssr_mode=False, **options
    )


if __name__ == "__main__":
    main()
