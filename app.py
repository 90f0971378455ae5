"""The page: drop a photo, see what a model predicts, why, and whether that can be believed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub

CVLAB_MODELS="user/a,user/b" adds models as the command line does. On a public server CVLAB_ALLOW="user,school" limits
the other Hub names that a visitor may type to these owners.

Here are the widgets, what happens when one of them is touched, and the endpoints for programs. What the tabs say is in
cvlab/page/tabs.py, and how it looks in cvlab/page/panels.py.
"""

import argparse
import base64
import contextvars
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported: nothing leaves this machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads that wait leave the processor to others

import gradio as gr
from gradio.data_classes import GradioRootModel, ImageData
from gradio.utils import get_upload_folder
from PIL import Image

from cvlab.checkpoint import hub
from cvlab.explain import METHODS, default_stage
from cvlab.memory import share_arenas
from cvlab.models import Model
from cvlab.page import panels, style, tabs
from cvlab.page.answers import map_of, peak_of, worth_of
from cvlab.page.desk import Desk, Photo
from cvlab.page.examples import example_files
from cvlab.page.figures import paragraph
from cvlab.page.offer import Models, model_facts, offered_models
from cvlab.page.question import Question, from_query
from cvlab.render import enlarged, to_picture

ROOT = Path(__file__).resolve().parent
TOP_CLASSES = 5
MAX_UPLOAD_MB = 40
COLOURS = ("colormap", "opacity", "common_scale")  # the settings that ask for no other map
KEPT = ("method", *COLOURS)  # of the settings, when another photo or model is chosen
UPLOADS = Path(get_upload_folder()).resolve()
AT_ONCE = 8  # answers; a model gives one at a time

# System fonts, as the default theme asks a font server; and greys and blues that can be read on their background.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)

# --- what is shown ----------------------------------------------------------------------------------------------------

Shown = dict[str, object]  # by the names that build_page gives its widgets


def answer(desk: Desk, photo: Photo | None, name: str, mask: Photo | None, question: Question) -> Shown:
    """Everything that is shown for a photo and a model, and the settings of the question.

    What cannot be answered is emptied, with a sentence instead: an old heatmap never stands beside another photo.
    """
    shown: Shown = dict.fromkeys(("notes", "look", *tabs.REDRAWN), "") | {"facts": None, "label": None}
    try:
        model = desk.models[name]
        shown |= {"facts": model_facts(model)} | settings_for(model, question)
        model, seen = desk.seen(photo, name)
    except (ValueError, OSError) as error:
        return shown | {"notes": paragraph(tabs.sentence_of(error))}
    shown["notes"] = "".join(map(paragraph, seen.notes))
    share, heading = ("Probability", True) if seen.mask is None else ("Share of the photo", False)
    shown["label"] = gr.Label(value=seen.shares, label=share, show_heading=heading)
    shown["look"] = panels.look_panel(seen, model, question)
    return shown | tabs.explained(desk, photo, name, mask, question, progress_of(question))


def choice(choices: Sequence, value: str = "", **options: object) -> gr.Dropdown:
    """A list that depends on the model. What is not in it is said by the library, in a sentence."""
    return gr.Dropdown(choices, value=value, allow_custom_value=True, **options)


def settings_for(model: Model, question: Question) -> Shown:
    """The widgets at what the question says, where the model has it."""

    def one_of(names: list[str], value: str, empty: str, **options: object) -> gr.Dropdown:
        return choice([(empty, ""), *names], value=value if value in names else "", **options)

    names, segments = model.class_names, model.task == "segmentation"
    stage = question.stage if question.stage in model.stages else default_stage(model)
    return asdict(question) | {
        "class_name": one_of(names, question.class_name, "(the first)" if segments else "(predicted)"),
        "rather_than": one_of(names, question.rather_than, "(nothing else)", visible=len(names) > 1),
        "stage": choice(list(model.stages), value=stage),
        "threshold": question.threshold or model.threshold,
        "asking": gr.Column(visible=segments),
    }


def progress_of(question: Question) -> Callable[[float], None] | None:
    """Where a slow method tells how far it is."""
    if question.method in METHODS:
        return None
    progress = gr.Progress()
    return lambda share: progress(share, desc=panels.METHOD_NAMES[question.method])


def fetch_with_progress(model_id: str) -> Path:
    """`hub.pull`, with the bytes counted on the page where it is called in answer to one."""
    progress, here = gr.Progress(), contextvars.copy_context()

    def show(arrived: int, expected: int) -> None:
        # Called in threads of the download, which do not know whom they work for.
        here.copy().run(progress, (arrived, expected), desc=f"Fetching {model_id}", unit="bytes")

    return hub.pull(model_id, show)


# --- the page ---------------------------------------------------------------------------------------------------------


class Sent(GradioRootModel):
    """Whatever was sent as a photo: judged by `file_of`, which answers in sentences, and documented as an image."""

    root: Any

    @classmethod
    def model_json_schema(cls, *arguments: object, **options: object) -> dict:
        """That of an image, for the page of the API and its clients."""
        return ImageData.model_json_schema(*arguments, **options)


def photo_input(**options: object) -> gr.Image:
    """An image input that hands over the file as it came, for cvlab's own opener (Gradio's spoils several formats)."""
    component = gr.Image(image_mode=None, type="filepath", buttons=[], **options)
    component.data_model = Sent
    component.preprocess = file_of
    return component


def file_of(payload: object) -> Photo | None:
    """What was uploaded, undecoded: the path of a file in Gradio's cache, or the bytes of a data: URL.

    Raises:
        gr.Error: anything else, also another path of this machine.
    """
    payload = payload.root if isinstance(payload, Sent) else payload
    if payload is None:
        return None
    url, path = (payload.get("url"), payload.get("path")) if isinstance(payload, dict) else (None, None)
    if isinstance(url, str) and url.startswith("data:"):
        if len(url) > MAX_UPLOAD_MB * 2**20 * 4 / 3:
            raise gr.Error(f"The picture is too large: up to {MAX_UPLOAD_MB} MB are taken.")
        try:
            return BytesIO(base64.b64decode(url.partition(",")[2]))
        except ValueError as error:
            raise gr.Error("The data: URL of the picture is damaged.") from error
    if isinstance(path, str) and "\0" not in path and Path(path).resolve().is_relative_to(UPLOADS):
        return path
    raise gr.Error("That is not an uploaded picture.")


def build_page(models: Models) -> gr.Blocks:
    """The Blocks page, not launched."""
    desk, names, usual = Desk(models), list(models.offered), Question()
    examples = example_files(Path(tempfile.mkdtemp(prefix="cvlab-examples-")))
    shown: dict[str, gr.blocks.Block] = {}  # widgets, by the names that the functions above answer with
    with gr.Blocks(title="cvlab", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        fresh = gr.State(True)  # the first answer is to what the link asks
        gr.Markdown("# cvlab\nWhat does a vision model see in a photo, and why? Choose a model and drop a picture.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                shown["model"] = gr.Dropdown(
                    names,
                    value=names[0] if names else None,
                    allow_custom_value=True,
                    label="Model",
                    info="From the list, or a name on the Hugging Face Hub: user/name",
                )
                shown["facts"] = gr.Textbox(label="About the model", interactive=False, lines=2)
                first = next(iter(examples))
                photo = photo_input(value=first, label="Photo", height=280, alt_text="The chosen photo")
                gr.Markdown("Examples")
                with gr.Row(elem_classes="examples"):
                    for path, caption in examples.items():
                        example = gr.Button(caption, icon=path, size="sm")
                        example.click(partial(str, path), None, photo, api_visibility="private")
                with gr.Accordion("Colours", open=False):
                    shown["colormap"] = gr.Dropdown(tabs.COLORMAP_CHOICES, value=usual.colormap, label="Colour map")
                    shown["opacity"] = gr.Slider(0, 1, usual.opacity, step=0.05, label="Opacity over the photo")
                    shown["common_scale"] = gr.Checkbox(
                        label="One scale", info="For all stages of a U-Net, or for a class beside the predicted one"
                    )
                shown["link"] = gr.HTML(js_on_load=style.LINK_JS)
            with gr.Column(scale=5, min_width=300):
                shown["notes"] = gr.HTML()
                with gr.Tab("Predict"), gr.Row():
                    with gr.Column(min_width=220):
                        shown["label"] = gr.Label(label="Probability", num_top_classes=TOP_CLASSES)
                    with gr.Column(min_width=220):
                        shown["look"] = gr.HTML()
                with gr.Tab("Grad-CAM"):
                    with gr.Row():
                        shown["class_name"] = choice([("", "")], label="Evidence for the class", min_width=150)
                        shown["rather_than"] = choice([("", "")], label="Rather than", min_width=150)
                        shown["stage"] = choice([], label="Read at the stage", min_width=150)
                        shown["method"] = gr.Dropdown(
                            tabs.METHOD_CHOICES, value="grad_cam", label="Method", min_width=150
                        )
                    shown["against"] = gr.Checkbox(label="Show the evidence against it instead")
                    shown["grad_cam"] = gr.HTML()
                    check = gr.Button("Can I believe it? Hide the hottest tenth of the picture", size="sm")
                    shown["believe"] = gr.HTML()
                with gr.Tab("U-Net stages"):
                    with gr.Column(visible=False) as shown["asking"]:
                        with gr.Row():
                            with gr.Column(min_width=260):
                                shown["picker"] = gr.HTML(js_on_load=style.PICKER_JS)
                            with gr.Column(min_width=220):
                                shown["region"] = gr.Dropdown(tabs.REGION_CHOICES, value="mask", label="Ask about")
                                shown["points"] = gr.Textbox(
                                    label="Places",
                                    info="Click or drag in the picture, or write x,y from the top left, then Enter",
                                    placeholder="20,30 50,60",
                                )
                                shown["threshold"] = gr.Slider(0.05, 0.95, 0.5, step=0.01, label="Threshold")
                        with gr.Accordion("Compare with the true mask", open=False):
                            mask = photo_input(
                                label="True mask (white is the class)",
                                height=160,
                                sources=["upload"],
                                elem_id="true-mask",
                            )
                        shown["errors"] = gr.HTML()
                    shown["stages"] = gr.HTML()
                    shown["ways"] = gr.HTML()
                with gr.Tab("Compare"):
                    with gr.Row():
                        other = gr.Dropdown(
                            [("(the same)", ""), *names], value="", allow_custom_value=True, label="Second model"
                        )
                        other_photo = photo_input(
                            label="Second picture (empty: the same)", height=180, elem_id="second"
                        )
                    shown["compared"] = gr.HTML(paragraph(tabs.CHOOSE_TWO))
                with gr.Tab("Many pictures"):
                    with gr.Row():
                        files = gr.UploadButton(
                            "Choose pictures, or a zip of them",
                            file_count="multiple",
                            variant="primary",
                            elem_id="many",
                        )
                        again = gr.Button("Again, by the model and stage that are chosen now")
                    gallery = gr.HTML(js_on_load=style.SORT_JS)
                    rows = gr.Dataframe(
                        headers=list(tabs.ROWS),
                        column_widths=[f"{width}px" for width in tabs.ROWS.values()],
                        label="Results",
                        interactive=False,
                        wrap=True,
                    )
                    with gr.Row():
                        kinds = ("Table (CSV)", "Maps (zip)")
                        written = [gr.File(label=kind, interactive=False, height=90) for kind in kinds]
                with gr.Tab("Report") as report_tab:
                    shown["record"] = gr.HTML()
                with gr.Tab("Code"):
                    shown["code"] = gr.HTML(js_on_load=style.COPY_JS)

        settings = {field.name: shown[field.name] for field in fields(Question)}
        asked, everything = [photo, shown["model"], mask, *settings.values()], list(shown.values())
        redrawn = [shown[name] for name in tabs.REDRAWN]

        def by_widget(answered: Shown) -> dict:
            return {shown[name]: value for name, value in answered.items()}

        def answer_to(
            request: gr.Request, new: bool, photo: Photo | None, name: str, mask: Photo | None, *values
        ) -> dict:
            query = dict(request.query_params) if new else {}
            name, before = query.get("model") or name, question_of(values)
            question = from_query(query) if new else Question(**{key: getattr(before, key) for key in KEPT})
            linked = {"model": name} if query.get("model") else {}
            return {fresh: False} | by_widget(linked | answer(desk, photo, name, mask, question))

        def redraw(photo: Photo | None, name: str, mask: Photo | None, *values: object) -> dict:
            question = question_of(values)
            return by_widget(tabs.explained(desk, photo, name, mask, question, progress_of(question)))

        def pick(event: gr.EventData, photo: Photo | None, name: str, mask: Photo | None, *values: object) -> dict:
            question = tabs.chosen(desk, photo, name, question_of(values), event.points)
            chosen = {"region": question.region, "points": question.points}
            return by_widget(chosen | tabs.explained(desk, photo, name, mask, question, progress_of(question)))

        def recolour(photo: Photo | None, name: str, mask: Photo | None, *values: object) -> dict:
            drawn = tabs.explained(desk, photo, name, mask, question_of(values))
            return by_widget(drawn | {"believe": gr.skip()})  # it hides the same places as before

        def work_out(photo: Photo | None, name: str, mask: Photo | None, *values: object) -> None:
            tabs.work_out(desk, photo, name, mask, question_of(values))

        def show_stages(photo: Photo | None, name: str, mask: Photo | None, *values: object) -> dict:
            return by_widget(tabs.stages(desk, photo, name, mask, question_of(values)))

        def show_believe(photo: Photo | None, name: str, mask: Photo | None, *values: object) -> str:
            return tabs.believe(desk, photo, name, mask, question_of(values))

        def show_compared(other: str, second: Photo | None, photo: Photo | None, name: str, *values: object) -> str:
            return tabs.compared(desk, photo, name, question_of(values), other, second)

        def show_record(name: str) -> str:
            return tabs.record(desk, name)

        def explain_all(files: list[str] | None, name: str, stage: str, method: str) -> tuple:
            folder = Path(page.GRADIO_CACHE) / secrets.token_hex(16)  # deleted with the uploads
            return tabs.many(desk, files, name, stage, method, gr.Progress(), folder)

        def when(triggers: list, make: Callable, inputs: list, outputs: list, **options: object) -> object:
            # The last choice made while an answer is on its way is not lost.
            return gr.on(
                triggers, make, inputs, outputs, trigger_mode="always_last", api_visibility="private", **options
            )

        waiting = {"show_progress_on": [shown["label"], shown["grad_cam"], shown["stages"]]}
        begun = [page.load, photo.change, shown["model"].input]
        quietly = {"api_visibility": "private", "show_progress": "hidden"}
        answers = [when(begun, answer_to, [fresh, *asked], [fresh, *everything], **waiting)]
        touched = [widget.input for name, widget in settings.items() if name not in ("points", *COLOURS)]
        answers += [when([*touched, shown["points"].submit, mask.change], redraw, asked, redrawn)]
        answers += [when([shown["picker"].select], pick, asked, [shown["region"], shown["points"], *redrawn])]
        for each in answers:  # what takes more passes follows
            # Drawn apart: what is chosen while it is worked out has its own stages.
            each.then(work_out, asked, None, **quietly).then(
                show_stages, asked, [shown["stages"], shown["ways"]], **quietly
            )
        when([shown[name].input for name in COLOURS], recolour, asked, redrawn)
        when([check.click], show_believe, asked, [shown["believe"]])
        both = [other, other_photo, photo, shown["model"], *settings.values()]
        when([other.input, other_photo.change], show_compared, both, [shown["compared"]])
        when([report_tab.select, shown["model"].input], show_record, [shown["model"]], [shown["record"]])
        all_of = [files, shown["model"], shown["stage"], shown["method"]]
        when([files.upload, again.click], explain_all, all_of, [gallery, rows, *written], concurrency_limit=1)
        add_api(desk)
    return page


# --- for programs -----------------------------------------------------------------------------------------------------


def add_api(desk: Desk) -> None:
    """The endpoints, whose names and parameters are kept."""

    def saved(picture: Image.Image) -> str:
        """A PNG in Gradio's cache, in a folder of its own: nobody else writes there while it is read."""
        path = Path(answer.GRADIO_CACHE) / secrets.token_hex(16) / "image.png"
        path.parent.mkdir(parents=True)
        picture.save(path, "PNG", compress_level=1)
        return str(path)

    def predict(image: Photo, model: str) -> dict:
        """Of a classifier {label, confidences}, of a segmenter {mask, shares, numbers}."""
        with in_sentences():
            network, seen = desk.seen(image, model)
        if network.task == "classification":
            ranked = sorted(seen.shares.items(), key=lambda item: -item[1])
            confidences = [{"label": name, "confidence": share} for name, share in ranked]
            return {"label": ranked[0][0], "confidences": confidences}
        mask = gr.FileData(path=saved(enlarged(seen.mask)))
        return {"mask": mask.model_dump(), "shares": seen.shares, "numbers": seen.sentence}

    def grad_cam(
        image: Photo, model: str, class_name: str | None = None, stage: str | None = None
    ) -> tuple[str, str, str, float]:
        """Original, heatmap, overlay, peak; by default for the predicted class at the deepest stage."""
        with in_sentences():
            question = Question(class_name=class_name, stage=stage)
            network, seen = desk.seen(image, model)
            _, attribution = map_of(desk.evidence(image, model, question), network, question)
        three = to_picture(seen.images), *panels.pictures(seen.images, attribution, question)
        return *(saved(enlarged(picture)) for picture in three), peak_of(attribution)

    def grad_cam_array(
        image: Photo, model: str, class_name: str | None = None, stage: str | None = None, method: str | None = None
    ) -> dict:
        """{class_name, stage, method, score, peak, map}: the map is raw and signed, in rows, as large as its stage."""
        with in_sentences():
            question = Question(class_name=class_name, stage=stage, method=method or "grad_cam")
            network, _ = desk.seen(image, model)
            evidence = desk.evidence(image, model, question)
            stage, attribution = map_of(evidence, network, question)
        return {
            "class_name": network.class_names[evidence.class_idx],
            "stage": stage,
            "method": question.method,
            "score": evidence.score,
            "peak": peak_of(attribution, question.method),
            "map": attribution[0, 0].tolist(),
        }

    def stages(image: Photo, model: str) -> tuple[str, list[tuple[str, str]]]:
        """The mask picture and a gallery of every stage, each with its name, resolution and peak."""
        question, gallery = Question(), []
        with in_sentences():
            network, seen = desk.seen(image, model)
            if network.task == "classification":
                raise ValueError(panels.CLASSIFIER)
            evidence = desk.evidence(image, model, question)
        for name, attribution in evidence.maps["grad_cam"].items():
            height, width = attribution.shape[-2:]
            worth = worth_of(attribution, evidence, question)
            caption = f"{name}: {width} x {height}, peak {peak_of(attribution):.3g}. {worth}"
            gallery.append((saved(enlarged(panels.over_photo(seen.images, attribution, question))), caption))
        return saved(enlarged(panels.mask_picture(seen, network, question))), gallery

    image = photo_input(visible=False, label="a photo, in any format")
    model = gr.Textbox(visible=False, label="a model by its name on the page, or on the Hub: user/name")
    class_name = gr.Textbox(visible=False, label="a class by its name; empty: the predicted one")
    stage = gr.Textbox(visible=False, label="a stage by its name; empty: the deepest one")
    method = gr.Textbox(visible=False, label="grad_cam or hires_cam; empty: grad_cam")
    pictures = [gr.Image(visible=False, format="png") for _ in range(4)]
    number, gallery, answer = gr.Number(visible=False), gr.Gallery(visible=False, format="png"), gr.JSON(visible=False)
    trigger = gr.Button(visible=False)
    trigger.click(predict, [image, model], answer, api_name="predict")
    trigger.click(grad_cam, [image, model, class_name, stage], [*pictures[:3], number], api_name="grad_cam")
    trigger.click(grad_cam_array, [image, model, class_name, stage, method], answer, api_name="grad_cam_array")
    trigger.click(stages, [image, model], [pictures[3], gallery], api_name="stages")


def question_of(values: Sequence[object]) -> Question:
    """The question that the settings make, in the order of its fields."""
    with in_sentences():
        return Question(*values)


@contextmanager
def in_sentences() -> Iterator[None]:
    """An error of the library reaches a program as its sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(tabs.sentence_of(error)) from error


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a folder, or a name on the Hub (user/name)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    args = parser.parse_args()
    named = [name.strip() for name in os.environ.get("CVLAB_MODELS", "").split(",") if name.strip()]
    offered = offered_models(ROOT, [*args.models, *named])
    owners = [owner.strip() for owner in os.environ.get("CVLAB_ALLOW", "").split(",") if owner.strip()]
    launch(build_page(Models(offered, owners, fetch_with_progress)), server_port=args.port)


def launch(page: gr.Blocks, **options: object) -> None:
    """Starts the server, with the settings that keep it closed: no analytics, no history of the users' pictures."""
    share_arenas()
    page.queue(api_open=False, default_concurrency_limit=AT_ONCE).launch(
        theme=THEME,
        css=style.CSS,
        run_history=False,
        footer_links=["api"],
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        show_error=True,  # else a program that calls with wrong types is told nothing
        ssr_mode=False,
        **options,
    )


if __name__ == "__main__":
    main()
