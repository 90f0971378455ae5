"""The page: drop a photo, see what a model predicts, why, and whether that can be believed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub

CVLAB_MODELS="user/a,user/b" adds models as the command line does. On a public server CVLAB_ALLOW="user,school" limits
the other Hub names that a visitor may type to these owners.

This file holds the widgets (`layout`) and what happens when one of them is touched (`wire`). What the tabs show is in
cvlab/page/panels.py, the endpoints for programs in cvlab/page/api.py.
"""

import argparse
import contextvars
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from cvlab.page import host

try:
    host.read_environment()  # before gradio is imported, which reads it too
except ValueError as error:
    sys.exit(str(error))

import gradio as gr

from cvlab.checkpoint import hub
from cvlab.explain import METHODS, default_stage
from cvlab.memory import share_arenas
from cvlab.models import Model
from cvlab.page.api import Page, add_api, in_sentences
from cvlab.page.examples import example_files
from cvlab.page.gallery import ROWS, explain_files
from cvlab.page.html import paragraph
from cvlab.page.models import Models, model_facts, offered_models
from cvlab.page.panels import METHOD_NAMES, draw, sentence_of
from cvlab.page.question import COLORMAPS, REGIONS, Question, from_query, picked
from cvlab.page.upload import MAX_UPLOAD_MB, UPLOADS, photo_input
from cvlab.page.visit import Answer, Visits

ROOT = Path(__file__).resolve().parent
CSS, SCRIPT = ROOT / "cvlab/page/page.css", (ROOT / "cvlab/page/page.js").read_text("utf-8")
COLOURS = ("colormap", "opacity", "common_scale")  # the settings that need no other map
KEPT = ("method", *COLOURS)  # of the settings, when another photo or model is chosen
FIRST = ("notes", "look")  # the panels that depend on photo and model alone
REDRAWN = ("grad_cam", "picker", "stages", "contributions", "errors", "link", "code")  # those that the question changes
METHOD_CHOICES = [(name + (" (slow)" if key not in METHODS else ""), key) for key, name in METHOD_NAMES.items()]
REGION_CHOICES = [(label, region) for region, label in REGIONS.items()]
COLORMAP_CHOICES = [(f"{name} (as in older reports)" if name == "jet" else name, name) for name in COLORMAPS]

# System fonts, as the default theme asks a font server; and greys and blues that can be read on their background.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
)


def build_page(models: Models) -> gr.Blocks:
    """The Blocks page, not launched."""
    visits = Visits(models)
    with Page(title="cvlab", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        wire(page, layout(list(models.offered)), visits)
        add_api(visits)
    return page


def layout(names: Sequence[str]) -> SimpleNamespace:
    """The widgets by the names of panels and settings; `names` are those of the models to choose from."""
    at, usual, examples = SimpleNamespace(), Question(), example_files()
    at.fresh = gr.State(True)  # the first answer is to what the link asks
    gr.Markdown("# cvlab\nWhat does a vision model see in a photo, and why? Choose a model and drop a picture.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            hint = "From the list, or a name on the Hugging Face Hub: user/name"
            at.model = choice(names, names[0] if names else None, label="Model", info=hint)
            at.facts = gr.Textbox(label="About the model", interactive=False, lines=2)
            at.photo = photo_input(value=next(iter(examples)), label="Photo", height=280, alt_text="The chosen photo")
            gr.Markdown("Examples")
            with gr.Row(elem_classes="examples"):
                for path, caption in examples.items():
                    example = gr.Button(caption, icon=path, size="sm")
                    example.click(partial(str, path), None, at.photo, api_visibility="private")
            with gr.Accordion("Colours", open=False):
                at.colormap = gr.Dropdown(COLORMAP_CHOICES, value=usual.colormap, label="Colour map")
                at.opacity = gr.Slider(0, 1, usual.opacity, step=0.05, label="Opacity over the photo")
                hint = "For all stages of a U-Net, or for a class beside the predicted one"
                at.common_scale = gr.Checkbox(label="One scale", info=hint)
            at.link = gr.HTML(js_on_load=SCRIPT)
        with gr.Column(scale=5, min_width=300):
            at.notes = gr.HTML()
            with gr.Tab("Predict"), gr.Row():
                with gr.Column(min_width=220):
                    at.label = gr.Label(label="Probability", num_top_classes=5)
                with gr.Column(min_width=220):
                    at.look = gr.HTML()
            with gr.Tab("Grad-CAM"):
                with gr.Row():
                    at.class_name = choice([("", "")], label="Evidence for the class", min_width=150)
                    at.rather_than = choice([("", "")], label="Rather than", min_width=150)
                    at.stage = choice([], label="Read at the stage", min_width=150)
                    at.method = gr.Dropdown(METHOD_CHOICES, value="grad_cam", label="Method", min_width=150)
                at.against = gr.Checkbox(label="Show the evidence against it instead")
                at.grad_cam = gr.HTML()
                at.check = gr.Button("Can I believe it? Hide the hottest tenth of the picture", size="sm")
                at.believe = gr.HTML()
            with gr.Tab("U-Net stages"):
                with gr.Column(visible=False) as at.asking:
                    with gr.Row():
                        with gr.Column(min_width=260):
                            at.picker = gr.HTML(js_on_load=SCRIPT)
                        with gr.Column(min_width=220):
                            at.region = gr.Dropdown(REGION_CHOICES, value="mask", label="Ask about")
                            hint = "Click or drag in the picture, or write x,y from the top left, then Enter"
                            at.points = gr.Textbox(label="Places", info=hint, placeholder="20,30 50,60")
                            at.threshold = gr.Slider(0.05, 0.95, 0.5, step=0.01, label="Threshold")
                    with gr.Accordion("Compare with the true mask", open=False):
                        at.mask = photo_input(
                            label="True mask (white is the class)", height=160, sources=["upload"], elem_id="true-mask"
                        )
                    at.errors = gr.HTML()
                at.stages = gr.HTML()
                at.contributions = gr.HTML()
            with gr.Tab("Compare"):
                with gr.Row():
                    at.other = choice([("(the same)", ""), *names], label="Second model")
                    at.second = photo_input(label="Second picture (empty: the same)", height=180, elem_id="second")
                at.compared = gr.HTML(paragraph("Choose a second model, a second picture, or both."))
            with gr.Tab("Many pictures"):
                with gr.Row():
                    at.files = gr.UploadButton(
                        "Choose pictures, or a zip of them", file_count="multiple", variant="primary", elem_id="many"
                    )
                    at.again = gr.Button("Again, with the model and stage that are chosen now")
                at.gallery = gr.HTML(js_on_load=SCRIPT)
                table = {"headers": list(ROWS), "column_widths": [f"{width}px" for width in ROWS.values()]}
                at.rows = gr.Dataframe(**table, label="Results", interactive=False, wrap=True)
                with gr.Row():
                    at.table = gr.File(label="Table (CSV)", interactive=False, height=90)
                    at.maps = gr.File(label="Maps (zip)", interactive=False, height=90)
            with gr.Tab("Report") as at.report:
                at.record = gr.HTML()
            with gr.Tab("Code"):
                at.code = gr.HTML(js_on_load=SCRIPT)
    return at


def choice(choices: Sequence, value: str | None = "", **options: object) -> gr.Dropdown:
    """A list that takes other values too: what the model does not have is refused by the library, in a sentence."""
    return gr.Dropdown(choices, value=value, allow_custom_value=True, **options)


def settings_for(model: Model, question: Question) -> dict[str, object]:
    """The widgets of the settings as the question has them, where the model can be asked so."""
    names, segments = model.class_names, model.task == "segmentation"
    first, other = (name if name in names else "" for name in (question.class_name, question.rather_than))
    stage = question.stage if question.stage in model.stages else default_stage(model)
    return asdict(question) | {
        "class_name": choice([("(the first)" if segments else "(predicted)", ""), *names], first),
        "rather_than": choice([("(nothing else)", ""), *names], other, visible=len(names) > 1),
        "stage": choice(list(model.stages), stage),
        "threshold": question.threshold or model.threshold,
        "asking": gr.Column(visible=segments),
    }


def wire(page: gr.Blocks, at: SimpleNamespace, visits: Visits) -> None:
    """Connects the widgets of `layout`: every event asks one question of one visit and draws panels of the answer."""
    settings = {field.name: getattr(at, field.name) for field in fields(Question)}
    asked = [at.photo, at.model, at.mask, *settings.values()]
    redrawn = [getattr(at, name) for name in (*REDRAWN, "believe")]
    everything = [getattr(at, name) for name in (*FIRST, "facts", "label", "model", "asking")]
    everything += [*redrawn, *settings.values()]

    def by_widget(shown: dict[str, object]) -> dict:
        return {getattr(at, name): value for name, value in shown.items()}

    def answer_to(photo: str | None, name: str, mask: str | None, question: Question) -> Answer:
        def show(done: float) -> None:
            gr.Progress()(done, desc=METHOD_NAMES[question.method])

        return visits.get(photo, name).ask(question, mask, show)

    def answer_of(photo: str | None, name: str, mask: str | None, *values: object) -> Answer:
        with in_sentences():
            return answer_to(photo, name, mask, Question(*values))

    def begin(request: gr.Request, fresh: bool, photo: str | None, name: str, mask: str | None, *values) -> dict:
        query, before = dict(request.query_params) if fresh else {}, answer_of(photo, name, mask, *values).given
        question = from_query(query) if fresh else Question(**{key: getattr(before, key) for key in KEPT})
        linked = {"model": query["model"]} if query.get("model") else {}
        answer = answer_to(photo, linked.get("model", name), mask, question)
        shown = linked | {"facts": None, "label": None, "believe": ""}
        with suppress(ValueError, OSError):  # the panel "notes" says it
            shown |= {"facts": model_facts(answer.model)} | settings_for(answer.model, answer.given)
            label = "Share of the photo" if answer.segments else "Probability"
            shown["label"] = gr.Label(answer.prediction.shares, label=label, show_heading=not answer.segments)
        return {at.fresh: False} | by_widget(shown | draw(answer, (*FIRST, *REDRAWN)))

    def drawing(*names: str, **shown: object) -> Callable:
        """The function of an event that draws panels, and shows what else is given."""
        return lambda *inputs: by_widget(draw(answer_of(*inputs), names) | shown)

    def pick(event: gr.EventData, photo: str | None, name: str, mask: str | None, *values: object) -> dict:
        answer = answer_of(photo, name, mask, *values)
        with suppress(ValueError, OSError):  # the panels say it
            question = picked(answer.question, answer.model, answer.prediction.logits, event.points)
            answer = answer_to(photo, name, mask, question)
        chosen = {"region": answer.given.region, "points": answer.given.points, "believe": ""}
        return by_widget(chosen | draw(answer, REDRAWN))

    def work_out(*inputs: object) -> None:
        with suppress(ValueError, OSError):  # the panel of the maps says it
            answer_of(*inputs).work_out_paths()

    def show_compared(other: str, second: str | None, photo: str | None, name: str, *values: object) -> dict:
        beside = answer_of(second or photo, other or name, None, *values)
        return by_widget(draw(answer_of(photo, name, None, *values), ("compared",), beside))

    def explain_all(files: list[str] | None, *inputs: object) -> tuple:
        answer, folder = answer_of(*inputs), UPLOADS / secrets.token_hex(16)  # a folder that Gradio deletes in time
        try:
            return explain_files(answer.visit, files or [], answer.given, gr.Progress(), folder)
        except (ValueError, OSError) as error:
            return paragraph(sentence_of(error)), None, None, None

    def when(triggers: list, make: Callable, inputs: list, outputs: list, **options: object) -> object:
        # "always_last": the last choice made while an answer is on its way is not lost.
        return gr.on(triggers, make, inputs, outputs, trigger_mode="always_last", api_visibility="private", **options)

    quietly = {"api_visibility": "private", "show_progress": "hidden"}
    begun = [page.load, at.photo.change, at.model.input]
    waiting = {"show_progress_on": [at.label, at.grad_cam, at.stages]}
    touched = [widget.input for name, widget in settings.items() if name not in ("points", *COLOURS)]
    answers = [
        when(begun, begin, [at.fresh, *asked], [at.fresh, *everything], **waiting),
        when([*touched, at.points.submit, at.mask.change], drawing(*REDRAWN, believe=""), asked, redrawn),
        when([at.picker.select], pick, asked, [at.region, at.points, *redrawn]),
    ]
    paths = drawing("stages", "contributions")
    for each in answers:  # what takes more passes follows, and is drawn apart: the question may have changed meanwhile
        each.then(work_out, asked, None, **quietly).then(paths, asked, [at.stages, at.contributions], **quietly)
    when([getattr(at, name).input for name in COLOURS], drawing(*REDRAWN), asked, redrawn)  # the check stays as it is
    when([at.check.click], drawing("believe"), asked, [at.believe])
    both = [at.other, at.second, at.photo, at.model, *settings.values()]
    when([at.other.input, at.second.change], show_compared, both, [at.compared])
    when([at.report.select, at.model.input], drawing("record"), asked, [at.record])
    many = [at.gallery, at.rows, at.table, at.maps]
    when([at.files.upload, at.again.click], explain_all, [at.files, *asked], many, concurrency_limit=1)


def fetch_with_progress(model_id: str) -> Path:
    """`hub.pull`, with the bytes counted on the page of the visitor who waits for them."""
    progress, here = gr.Progress(), contextvars.copy_context()

    def show(arrived: int, expected: int) -> None:
        # The download calls this in threads of its own, which do not know whose page it is.
        here.copy().run(progress, (arrived, expected), desc=f"Fetching {model_id}", unit="bytes")

    return hub.pull(model_id, show)


def launch(page: gr.Blocks, **options: object) -> None:
    """Starts the server, with the settings that keep it closed: no analytics, no history of the users' pictures."""
    share_arenas()
    page.queue(api_open=False, default_concurrency_limit=8).launch(  # a model gives one answer at a time
        theme=THEME,
        css_paths=CSS,
        run_history=False,
        footer_links=["api"],
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        show_error=True,  # else a program that calls with wrong types is told nothing
        ssr_mode=False,
        **options,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a folder, or a name on the Hub (user/name)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, the address is seen at once
    listed = [os.environ.get(variable, "").split(",") for variable in ("CVLAB_MODELS", "CVLAB_ALLOW")]
    named, owners = ([name.strip() for name in names if name.strip()] for names in listed)
    try:
        offered, at = offered_models(ROOT, [*args.models, *named]), host.address(args.port)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an orderly end, which deletes the files of the page
    launch(build_page(Models(offered, owners, fetch_with_progress)), server_name=at[0], server_port=at[1])


if __name__ == "__main__":
    main()
