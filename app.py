"""The page: drop a photo, see what a model predicts, where it looked, and what each stage of a U-Net contributed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub

CVLAB_MODELS="user/a,user/b" adds models as the command line does. On a public server CVLAB_ALLOW="user,school" limits
the other Hub names that a visitor may type to these owners.
"""

import argparse
import base64
import contextvars
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

from cvlab import checkpoint, figures, hub, shapes
from cvlab.answers import grad_cam_answer, predict_answer, stages_answer
from cvlab.explain import default_stage
from cvlab.figures import Figure, as_html, paragraph
from cvlab.transforms import open_image

ROOT = Path(__file__).resolve().parent
TOP_CLASSES = 5

PREDICTED = "(predicted)"
EXAMPLE_SEEDS = (4022, 4019, 4015)  # beyond those that cvlab/data.py gives to train, val and test

# System fonts, as the default theme asks a font server; and greys and blues that can be read on their background.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)
CSS = """
.gradio-container {width: 100%; max-width: 1200px !important; margin: 0 auto}
button[role=tab].selected {color: var(--primary-700) !important}
.dark button[role=tab].selected {color: var(--primary-300) !important}
.examples {display: grid; grid-template-columns: repeat(5, 1fr); gap: 6px}
.examples button {min-width: 0; flex-direction: column; padding: 4px; font-weight: normal}
.examples button img {width: 100%; height: 52px; object-fit: cover; margin: 0; border-radius: 3px}
"""


# --- models -----------------------------------------------------------------------------------------------------------


def offered_models(root: Path, names: Sequence[str]) -> dict[str, str]:
    """What the picker offers, {name: folder or Hub name}: those asked for, then shipped, then local ones."""
    offered = {name: name for name in names}
    offered |= {config.parent.name: str(config.parent) for config in sorted(root.glob("checkpoints/*/config.json"))}
    offered |= {f"runs/{config.parent.name}": str(config.parent) for config in sorted(root.glob("runs/*/config.json"))}
    return offered


class Models:
    """The models of the page, loaded when first used. A visitor can name a Hub model, but no folder of the server.

    A branch of the Hub is looked up once: as long as the page runs, its answers are those of one commit.
    """

    def __init__(self, offered: dict[str, str], owners: Sequence[str] = ()) -> None:
        self.offered = offered
        self.owners = owners  # on the Hub, of models that are not offered; none means everybody's
        self._locks: dict[str, threading.Lock] = {}  # one a name: a long download keeps nobody else waiting
        self._load = lru_cache(maxsize=8)(checkpoint.load)
        self._pull = lru_cache(maxsize=None)(fetch_with_progress)

    def __getitem__(self, name: str) -> nn.Module:
        """The model of an offered name (a shipped one also as checkpoints/NAME) or of a Hub name.

        Raises:
            ValueError: there is no such model, or it cannot be opened.
        """
        source = self.offered.get(name.removeprefix("checkpoints/"))
        if source is None:
            if not hub.is_id(name):
                raise ValueError(f"There is no model {name!r}: choose one of the list, or type a Hub name (user/name).")
            if self.owners and name.split("/")[0] not in self.owners:
                raise ValueError(f"This page opens models of {', '.join(self.owners)} only, not {name!r}.")
        with self._locks.setdefault(source or name, threading.Lock()):
            if source is None or (hub.is_id(source) and not Path(source).is_dir()):
                source = self._pull(source or name)
            return self._load(source)


def fetch_with_progress(model_id: str) -> Path:
    """`hub.pull`, with the bytes counted on the page where it is called in answer to one."""
    progress, here = gr.Progress(), contextvars.copy_context()

    def show(arrived: int, expected: int) -> None:
        # Called in threads of the download, which do not know whom they work for.
        here.copy().run(progress, (arrived, expected), desc=f"Fetching {model_id}", unit="bytes")

    return hub.pull(model_id, show)


def model_facts(model: nn.Module) -> str:
    """What the chosen model is, in plain text: names come from strangers and are never rendered."""
    classes = model.class_names
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    kind = "Tells apart" if model.task == "classification" else "Finds the pixels of"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    facts = f"{kind}: {shown}. It sees {model.image_size} x {model.image_size} pixels; {parameters:.1f} M parameters."
    return facts + (f" From the Hub: {model.source}." if hub.is_id(model.source) else "")


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


def example_files(folder: Path) -> dict[str, str]:
    """Pictures to begin with, {path: caption}: the photographs that scikit-learn brings along, and synthetic scenes."""
    photos = Path(sklearn.datasets.__file__).parent / "images"
    examples = {str(photos / "flower.jpg"): "flower", str(photos / "china.jpg"): "temple"}
    for seed in EXAMPLE_SEEDS:
        scene = shapes.scene(seed, size=256)
        path = folder / f"scene-{seed}.png"
        scene.image.save(path)
        examples[str(path)] = shapes.CLASS_NAMES[scene.label]
    return examples


def answer(models: Models, photo: str | BytesIO | None, name: str) -> dict[str, object]:
    """Everything that is shown for a photo and a model, by the names of `build_page`'s widgets.

    What cannot be answered is emptied, with a sentence instead: an old heatmap never stands beside another photo.
    """
    shown = {"notes": "", "facts": None, "label": None, "look": "", "grad_cam": "", "stages": ""}
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
        shares, mask, sentence = predict_answer(image, model)
    except (ValueError, OSError) as error:
        return shown | {"notes": paragraph(sentence_of(error))}
    share, heading = ("Probability", True) if mask is None else ("Share of the photo", False)
    shown["notes"] = "".join(map(paragraph, image.info["notes"]))
    shown["label"] = gr.Label(value=shares, label=share, show_heading=heading)
    shown |= grad_cam_shown(image, model, PREDICTED, None) | stages_shown(image, model)
    if mask is not None:
        shown["look"] = as_html([Figure(mask, "Mask", sentence, "The photo, grey outside the predicted mask")], "large")
    return shown


def redraw(models: Models, photo: str | BytesIO | None, name: str, class_name: str, stage: str) -> dict[str, object]:
    """The Grad-CAM tab again, for another class or stage."""
    try:
        if photo is None:
            raise ValueError("Drop a photo, or choose an example.")
        return {"grad_cam": grad_cam_shown(open_image(photo), models[name], class_name, stage)["grad_cam"]}
    except (ValueError, OSError) as error:
        return {"grad_cam": paragraph(sentence_of(error))}


def grad_cam_shown(image: Image.Image, model: nn.Module, class_name: str, stage: str | None) -> dict[str, object]:
    """The Grad-CAM tab, and its overlay beside the prediction."""
    try:
        drawn = grad_cam_answer(image, model, None if class_name == PREDICTED else class_name, stage)
    except ValueError as error:
        return {"grad_cam": paragraph(sentence_of(error))}
    why, side = f"{drawn.class_name!r} at {drawn.stage}", model.image_size
    three = [
        Figure(drawn.original, "Original", f"What the model sees: {side} x {side} pixels."),
        Figure(drawn.heatmap, f"Evidence for {why}", drawn.sentence, f"Heatmap: evidence for {why}", drawn.peak),
        Figure(drawn.overlay, f"Where it sees {drawn.class_name!r}", "Elsewhere the picture is unchanged."),
    ]
    return {"grad_cam": as_html(three, "large"), "look": as_html([three[2]], "large")}


def stages_shown(image: Image.Image, model: nn.Module) -> dict[str, object]:
    """The U-Net tab, or why it is empty."""
    try:
        photo, mask, stages = stages_answer(image, model)
    except ValueError as error:
        return {"stages": paragraph(sentence_of(error))}
    drawn = [
        Figure(photo, "Input", f"{model.image_size} x {model.image_size} pixels", "The photo as the model sees it"),
        Figure(mask, "Mask", "The region that is explained.", "The photo, grey outside the predicted mask"),
    ]
    for stage in stages:
        caption = f"{stage.resolution}, peak {stage.peak:.3g}. {stage.sentence}"
        drawn.append(
            Figure(stage.overlay, stage.name, caption, f"Evidence for the mask at {stage.name}, over the photo")
        )
    reading = paragraph(
        "Each map is divided by its own maximum. The peak is that maximum times the number of positions of the "
        "stage: with it the stages of one model can be compared, but not two models."
    )
    return {"stages": as_html(drawn) + reading}


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
                first = next(iter(examples))
                photo = photo_input(value=first, label="Photo", height=300, buttons=[], alt_text="The chosen photo")
                gr.Markdown("Examples")
                with gr.Row(elem_classes="examples"):
                    for path, caption in examples.items():
                        example = gr.Button(caption, icon=path, size="sm")
                        example.click(partial(str, path), None, photo, api_visibility="private")
            with gr.Column(scale=5, min_width=300):
                shown["notes"] = gr.HTML()
                with gr.Tab("Predict"), gr.Row():
                    with gr.Column(min_width=220):
                        shown["label"] = gr.Label(label="Probability", num_top_classes=TOP_CLASSES)
                    with gr.Column(min_width=220):
                        shown["look"] = gr.HTML()
                with gr.Tab("Grad-CAM"):
                    with gr.Row():
                        shown["class_choice"] = gr.Dropdown(
                            [PREDICTED], value=PREDICTED, label="Evidence for the class"
                        )
                        shown["stage_choice"] = gr.Dropdown([], label="Read at the stage")
                    shown["grad_cam"] = gr.HTML()
                with gr.Tab("U-Net stages"):
                    shown["stages"] = gr.HTML()

        def by_widget(answer: Callable[..., dict], *inputs: object) -> dict:
            return {shown[name]: value for name, value in answer(models, *inputs).items()}

        gr.on(
            [page.load, photo.change, model.change],
            partial(by_widget, answer),
            [photo, model],
            list(shown.values()),
            trigger_mode="always_last",  # a choice made while an answer is on its way is not lost
            api_visibility="private",
            show_progress_on=[shown["label"], shown["grad_cam"], shown["stages"]],
        )
        gr.on(
            [shown["class_choice"].input, shown["stage_choice"].input],
            partial(by_widget, redraw),
            [photo, model, shown["class_choice"], shown["stage_choice"]],
            [shown["grad_cam"]],
            trigger_mode="always_last",
            api_visibility="private",
        )
        add_api(models)
    return page


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
            _, mask_picture, stages = stages_answer(open_image(image), models[model])
        captions = (f"{stage.name}: {stage.resolution}, peak {stage.peak:.3g}. {stage.sentence}" for stage in stages)
        return mask_picture, [(stage.overlay, caption) for stage, caption in zip(stages, captions, strict=True)]

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
    owners = [owner.strip() for owner in os.environ.get("CVLAB_ALLOW", "").split(",") if owner.strip()]
    launch(build_page(Models(offered, owners)), server_port=args.port)


def launch(page: gr.Blocks, **options: object) -> None:
    """Starts the server, with the settings that keep it closed: no analytics, no history of the users' pictures."""
    page.queue(api_open=False).launch(
        theme=THEME,
        css=CSS + figures.CSS,
        run_history=False,
        footer_links=["api"],
        max_file_size="40mb",
        ssr_mode=False,
        **options,
    )


if __name__ == "__main__":
    main()
