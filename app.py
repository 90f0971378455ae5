"""The page: drop a photo, see what a model predicts, why, and whether that can be believed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub
    python app.py FILE.py:FUNCTION          also the model that a function of your own returns (cvlab.models.adopt)

CVLAB_MODELS="user/a,user/b" adds models as the command line does. On a public server CVLAB_ALLOW="user,school" limits
the other Hub names that a visitor may type to these owners.

This file holds the widgets (`layout`) and what happens when one of them is touched (`wire`). What the tabs show is in
cvlab/page/panels.py, the endpoints for programs in cvlab/page/api.py.
"""

import argparse
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from cvlab.page import host

try:
    host.read_environment()  # before gradio is imported, which reads it too
except ValueError as error:
    sys.exit(str(error))

import gradio as gr

from cvlab.memory import share_arenas
from cvlab.models import Model
from cvlab.models.adopted import IN_FILE, from_file
from cvlab.models.model import MOST_NAMES
from cvlab.page.api import ONE_AT_A_TIME, Page, add_api, fetch_with_progress, tiles_with_progress
from cvlab.page.examples import example_files
from cvlab.page.host import sentence_of
from cvlab.page.html import paragraph
from cvlab.page.many import WIDTHS, Row, explain_files
from cvlab.page.models import Models, offered_models
from cvlab.page.panels import CHECKED, FOLLOWING, ON_REQUEST, REDRAWN, draw
from cvlab.page.question import COLORMAPS, REGIONS, Question, from_query, picked, settings_of
from cvlab.page.upload import MAX_UPLOAD_MB, UPLOADS, photo_input
from cvlab.page.visit import METHOD_NAMES, Answer, Visits

ROOT = Path(__file__).resolve().parent
CSS, SCRIPT = ROOT / "cvlab/page/page.css", (ROOT / "cvlab/page/page.js").read_text("utf-8")
KEPT = ("method", "opacity", "colormap")  # of the settings, when another photo or model is chosen
PICKED = ("class_name", "rather_than", "region", "points")  # what a click in the picture sets
METHOD_CHOICES = [(name, key) for key, name in METHOD_NAMES.items()]
REGION_CHOICES = [(label, region) for region, (label, _) in REGIONS.items()]
COLORMAP_HINTS = {"jet": " (as in older reports)"}
COLORMAP_CHOICES = [(name + COLORMAP_HINTS.get(name, ""), name) for name in COLORMAPS]

# System fonts, as the default theme asks a font server; the colours are in page.css.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
TAKEN = "file => { if (file) document.body.classList.remove('camera'); return [file, null]; }"
MARK = """<h1><a href="./" aria-label="cvlab, to the start"><svg viewBox="0 0 32 32" aria-hidden="true">
<rect x="1.5" y="1.5" width="29" height="29" rx="7"/><path d="M5.5 16C12 5.5 20 5.5 26.5 16 20 26.5 12 26.5 5.5 16Z"/>
<circle cx="16" cy="16" r="4"/></svg>cvlab</a></h1>"""


def build_page(models: Models) -> gr.Blocks:
    """The Blocks page, not launched."""
    visits = Visits(models, tiles_with_progress)
    with Page(title="cvlab", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        wire(page, layout(list(models.offered)), visits)
        add_api(visits)
    return page


def layout(names: Sequence[str]) -> SimpleNamespace:
    """The widgets by the names of panels and settings; `names` are those of the models to choose from."""
    at, usual, examples = SimpleNamespace(), Question(), example_files()
    at.shown = gr.State("")  # the model that the widgets show; the first answer is to what the link asks
    at.opacity = gr.State(usual.opacity)  # where the sliders from photo to heat begin
    at.photo = photo_input(value=next(iter(examples)), label="Photo", visible="hidden", render=False)
    html = partial(gr.HTML, apply_default_css=False, js_on_load=SCRIPT)
    with gr.Row(elem_id="strip"):
        html(MARK, elem_id="mark")
        at.upload = gr.UploadButton(
            "Choose a photo", file_types=["image"], variant="primary", size="md", elem_id="choose"
        )
        at.camera_button = gr.Button("Camera", size="md", elem_id="camera-button")
        with gr.Row(elem_classes="examples"):
            for path, caption in examples.items():
                example = gr.Button(caption, icon=path, size="sm")
                example.click(partial(str, path), None, at.photo, api_visibility="private")
        at.model = choice(names, names[0] if names else None, label="Model", container=False, elem_id="model")
    with gr.Column(elem_id="camera"):
        at.camera = photo_input(label="Camera, or paste a picture", sources=["webcam", "clipboard"], height=320)
    with gr.Row(elem_id="answer"):
        at.sentence = html("<h2><span>The model is looking …</span></h2>", elem_id="sentence")
        at.chip = html(elem_id="chip")
    with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
        with gr.Tab("Predict"):
            with gr.Row(elem_id="first"):
                with gr.Column(min_width=0):
                    at.look = html()
                with gr.Column(min_width=0):
                    at.side, at.reasons, at.facts = html(), html(), html()
            at.three = html(elem_id="three")
        with gr.Tab("Grad-CAM"):
            with gr.Row():
                at.class_name = choice([("", "")], label="Evidence for the class", min_width=150)
                at.rather_than = choice([("", "")], label="Rather than", min_width=150)
                at.stage = choice([], label="Read at the stage", min_width=150)
                at.method = gr.Dropdown(METHOD_CHOICES, value="grad_cam", label="Method", min_width=150)
            at.against = gr.Checkbox(label="Show the evidence against it instead")
            at.grad_cam = html()
            at.believe = html()
        with gr.Tab("U-Net stages"):
            at.stages = html()
            with gr.Column(elem_id="asking"):
                with gr.Row():
                    with gr.Column(min_width=260):
                        at.picker = html()
                    with gr.Column(min_width=220):
                        at.region = gr.Dropdown(REGION_CHOICES, value="mask", label="Ask about")
                        hint = "Click or drag in the picture, or write x,y from the top left, then Enter"
                        at.points = gr.Textbox(label="Places", info=hint, placeholder="20,30 50,60")
                        at.threshold = gr.Slider(0.05, 0.95, 0.5, step=0.01, label="Threshold")
                with gr.Accordion("Compare with the true mask", open=False):
                    at.mask = photo_input(
                        label="True mask: white, or the number of each class",
                        height=160,
                        sources=["upload"],
                        elem_id="true-mask",
                    )
                at.errors = html()
            at.contributions = html()
        with gr.Tab("Compare"):
            with gr.Row():
                at.other = choice([("(the same)", ""), *names], label="Second model")
                at.second = photo_input(label="Second picture (empty: the same)", height=180, elem_id="second")
            at.compared = html(paragraph("Choose a second model, a second picture, or both."))
        with gr.Tab("Many pictures"):
            with gr.Row():
                at.files = gr.UploadButton("Choose pictures", file_count="multiple", variant="primary", elem_id="many")
                at.again = gr.Button("Again, with the model and stage that are chosen now")
            at.gallery = html()
            table = {"headers": list(Row._fields), "column_widths": [f"{width}px" for width in WIDTHS]}
            at.rows = gr.Dataframe(**table, label="Results", interactive=False, wrap=True)
            at.table = gr.File(label="Table (CSV)", interactive=False, height=90)
        with gr.Tab("Report") as at.report:
            at.record = html()
        with gr.Tab("Code"):
            at.code = html()
    with gr.Accordion("Colours", open=False):
        at.colormap = gr.Dropdown(COLORMAP_CHOICES, value=usual.colormap, label="Colour map")
    at.link, at.background = html(), html()
    at.photo.render()  # after the strip, whose input for files is the first of the page
    return at


def choice(choices: Sequence, value: str | None = "", **options: object) -> gr.Dropdown:
    """A list that takes other values too: what the model does not have is refused by the library, in a sentence."""
    return gr.Dropdown(choices, value=value, allow_custom_value=True, **options)


def lists_of(model: Model, values: dict[str, object]) -> dict[str, gr.Component]:
    """The widgets whose choices depend on the model, with their values."""
    names = model.class_names[:MOST_NAMES]  # any other one can be typed
    return {
        "class_name": choice([("(predicted)", ""), *names], values["class_name"]),
        "rather_than": choice([("(nothing else)", ""), *names], values["rather_than"], visible=len(names) > 1),
        "stage": choice(list(model.stages), values["stage"]),
    }


def wire(page: gr.Blocks, at: SimpleNamespace, visits: Visits) -> None:
    """Connects the widgets of `layout`: every event asks one question of one visit and draws panels of the answer."""
    settings = {field.name: getattr(at, field.name) for field in fields(Question)}
    asked = [at.photo, at.model, at.mask, *settings.values()]
    changed = [getattr(at, name) for name in {**dict.fromkeys(REDRAWN), **dict.fromkeys(CHECKED)}]
    everything = [at.shown, at.background, at.facts, at.model, *changed, *settings.values()]

    def by_widget(shown: dict[str, object]) -> dict:
        return {getattr(at, name): value for name, value in shown.items()}

    def answer_of(photo: str | None, name: str, mask: str | None, *values: object) -> Answer:
        return visits.ask(photo, name, Question(*values), mask)

    def begin(request: gr.Request, shown: str, photo: str | None, name: str, mask: str | None, *values) -> dict:
        query, before = {} if shown else dict(request.query_params), answer_of(photo, name, mask, *values).given
        question = Question(**{key: getattr(before, key) for key in KEPT}) if shown else from_query(query)
        linked = {"model": query["model"]} if query.get("model") else {}
        name = linked.get("model", name)
        answer, changed = visits.ask(photo, name, question, mask), {"shown": "none"}
        with suppress(ValueError, OSError):  # the sentence says it
            wanted = settings_of(answer.model, question)
            # Gradio makes each widget anew that gets more than a value, or nothing.
            changed = {"shown": name} | wanted | (lists_of(answer.model, wanted) if name != shown else {})
        return redrawn(request, answer, "background", "facts") | by_widget(linked | changed)

    def redrawn(request: gr.Request, answer: Answer, *more: str) -> dict:
        key = None
        with suppress(ValueError, OSError):  # the sentence says it
            key = answer.key
        visits.note(request.session_hash, key)
        return by_widget(dict.fromkeys(CHECKED, "") | draw(answer, (*REDRAWN, *more)))

    def redraw(request: gr.Request, *inputs: object) -> dict:
        return redrawn(request, answer_of(*inputs))

    def drawing(*names: str) -> Callable:
        return lambda *inputs: by_widget(draw(answer_of(*inputs), names))

    def pick(event: gr.EventData, request: gr.Request, photo: str | None, name: str, mask: str | None, *values) -> dict:
        answer = answer_of(photo, name, mask, *values)
        with suppress(ValueError, OSError):  # the panels say it
            question = picked(answer.question, answer.model, answer.prediction.logits, event.points)
            answer = answer.again(question)
        return redrawn(request, answer) | by_widget({name: getattr(answer.given, name) for name in PICKED})

    def follow(*inputs: object) -> dict:
        answer = answer_of(*inputs)
        with suppress(ValueError, OSError):  # the panels of the answer say it
            if answer.segments:
                answer.work_out_paths()
                return by_widget(draw(answer, FOLLOWING))
        return {at.three: gr.skip()}

    def check(request: gr.Request, *inputs: object) -> dict:
        answer = answer_of(*inputs)
        with suppress(ValueError, OSError):
            busy = visits.others_ask(request.session_hash) or not answer.quick
            if busy and answer.testable and not answer.verdict:
                return {at.chip: ON_REQUEST}
        return check_now(request, *inputs)

    def check_now(request: gr.Request, *inputs: object) -> dict:
        answer, last = answer_of(*inputs), partial(visits.is_last, request.session_hash)
        with suppress(ValueError, OSError):
            if last(answer.key):
                answer.work_out_verdict()
            if not last(answer.key):  # another question was asked meanwhile
                return {at.chip: gr.skip()}
        return by_widget(draw(answer, CHECKED))

    def show_compared(other: str, second: str | None, photo: str | None, name: str, *values: object) -> dict:
        beside = answer_of(second or photo, other or name, None, *values)
        return by_widget(draw(answer_of(photo, name, None, *values), ("compared",), beside))

    def explain_all(files: list[str] | None, *inputs: object) -> tuple:
        answer, folder = answer_of(*inputs), UPLOADS / secrets.token_hex(16)  # a folder that Gradio deletes in time
        try:
            return explain_files(answer.model, files or [], answer.given, gr.Progress(), folder)
        except (ValueError, OSError) as error:
            return paragraph(sentence_of(error)), None, None

    def when(triggers: list, make: Callable, inputs: list, outputs: list, **options: object) -> object:
        # "always_last": the last choice made while an answer is on its way is not lost.
        return gr.on(triggers, make, inputs, outputs, trigger_mode="always_last", api_visibility="private", **options)

    quietly = {"trigger_mode": "always_last", "api_visibility": "private", "show_progress": "hidden"}
    begun = [page.load, at.photo.change, at.model.input]
    waiting = {"show_progress_on": [at.look, at.grad_cam, at.stages]}
    touched = [widget.input for name, widget in settings.items() if name not in ("points", "opacity", "colormap")]
    answers = [
        when(begun, begin, [at.shown, *asked], everything, **waiting),
        when([*touched, at.points.submit, at.mask.change], redraw, asked, changed),
        when([at.picker.select, at.look.select], pick, asked, [*map(settings.get, PICKED), *changed]),
    ]
    following, checked, drawn = ([getattr(at, name) for name in names] for names in (FOLLOWING, CHECKED, REDRAWN))
    for each in answers:  # what takes more passes follows
        each.then(follow, asked, following, **quietly).then(check, asked, checked, **ONE_AT_A_TIME, **quietly)
    at.chip.select(check_now, asked, checked, **ONE_AT_A_TIME, **quietly)
    when([at.colormap.input], drawing(*REDRAWN), asked, drawn)  # the check stays as it is
    # In the browser alone: what was chosen or taken becomes the photo.
    at.upload.upload(None, at.upload, at.photo, js="file => file", api_visibility="private")
    at.camera.input(None, at.camera, [at.photo, at.camera], js=TAKEN, api_visibility="private")
    at.camera_button.click(None, js="() => document.body.classList.toggle('camera')", api_visibility="private")
    both = [at.other, at.second, at.photo, at.model, *settings.values()]
    when([at.other.input, at.second.change], show_compared, both, [at.compared])
    when([at.report.select, at.model.input], drawing("record"), asked, [at.record])
    many = [at.gallery, at.rows, at.table]
    when([at.files.upload, at.again.click], explain_all, [at.files, *asked], many, concurrency_limit=1)


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
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a folder, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    args = parser.parse_args()
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"{args.port} is not a port: choose one from 1 to 65535.")
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, the address is seen at once
    listed = [os.environ.get(variable, "").split(",") for variable in ("CVLAB_MODELS", "CVLAB_ALLOW")]
    named, owners = ([name.strip() for name in names if name.strip()] for names in listed)
    try:
        own = {name: from_file(name) for name in args.models if IN_FILE.fullmatch(name)}  # nobody else may name files
        others = [name for name in args.models if name not in own]
        offered, server_name = own | offered_models(ROOT, [*others, *named]), host.address()
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an orderly end, which deletes the files of the page
    page = build_page(Models(offered, owners, fetch_with_progress))
    try:
        launch(page, server_name=server_name, server_port=args.port)  # which looks for a free one
    except (OSError, OverflowError):  # the second beyond 65535
        port = args.port or os.environ.get("GRADIO_SERVER_PORT", 7860)
        sys.exit(f"Port {port} is taken or for administrators (below 1024). Choose another one with --port.")


if __name__ == "__main__":
    main()
