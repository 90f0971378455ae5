"""The page: drop a photo, see what a model predicts, why, and whether that can be believed.

    python app.py                           the models in checkpoints/ and runs/
    python app.py runs/NAME user/name ...   also these: folders, or names on the Hugging Face Hub
    python app.py FILE.py:FUNCTION          also the model that a function of your own returns (cvlab.models.adopt)

CVLAB_MODELS="user/a,user/b" adds models as the command line does. On a public server CVLAB_ALLOW="user,school" limits
the other Hub names that a visitor may type to these owners. CVLAB_HOSTS="*.school.edu" lets photos come from there.

This file holds the widgets (`layout`), and which event each of them begins (`wire`). What happens then is in
cvlab/page/events.py, what the tabs show in cvlab/page/panels.py, the endpoints for programs in cvlab/page/api.py,
and how it is served in cvlab/page/server.py.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
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

from cvlab.models.adopted import IN_FILE
from cvlab.page.api import ONE_AT_A_TIME, add_api, fetch_with_progress, show_progress
from cvlab.page.breaking import TOOLS
from cvlab.page.events import PICKED
from cvlab.page.examples import example_files
from cvlab.page.html import paragraph
from cvlab.page.lesson import fill
from cvlab.page.live import START
from cvlab.page.many import HINT
from cvlab.page.models import Models, offered_models
from cvlab.page.panels import CHECKED, FOLLOWING, REDRAWN
from cvlab.page.question import COLORMAPS, REGIONS, Question
from cvlab.page.server import Page, end, launch
from cvlab.page.upload import photo_input
from cvlab.page.visit import METHOD_NAMES
from cvlab.page.worker import SafeEvents

ROOT = Path(__file__).resolve().parent
SCRIPT = (ROOT / "cvlab/page/page.js").read_text("utf-8")
METHOD_CHOICES = [(name, key) for key, name in METHOD_NAMES.items()]
REGION_CHOICES = [(label, region) for region, (label, _) in REGIONS.items()]
COLORMAP_HINTS = {"jet": " (as in older reports)"}
COLORMAP_CHOICES = [(name + COLORMAP_HINTS.get(name, ""), name) for name in COLORMAPS]
TAKEN = "file => { if (file) document.body.classList.remove('camera'); return [file, null]; }"
MARK = """<h1><a href="./" aria-label="cvlab, to the start"><svg viewBox="0 0 32 32" aria-hidden="true">
<rect x="1.5" y="1.5" width="29" height="29" rx="7"/><path d="M5.5 16C12 5.5 20 5.5 26.5 16 20 26.5 12 26.5 5.5 16Z"/>
<circle cx="16" cy="16" r="4"/></svg>cvlab</a></h1>"""


def build_page(models: Models) -> gr.Blocks:
    """The Blocks page, not launched."""
    events = SafeEvents(models, show_progress)
    with Page(title="cvlab", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        wire(page, layout(list(models.offered)), events)
        add_api(events)
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
            "Choose photos",
            file_types=["image", ".npy"],
            file_count="multiple",
            variant="primary",
            size="md",
            elem_id="choose",
        )
        at.camera_button = gr.Button("Camera", size="md", elem_id="camera-button")
        with gr.Row(elem_classes="examples"):
            for path, caption in examples.items():
                example = gr.Button(caption, icon=path, size="sm")
                example.click(partial(str, path), None, at.photo, api_visibility="private")
        at.model = choice(names, names[0] if names else None, label="Model", container=False, elem_id="model")
    at.kept, at.strip = gr.State([]), html(elem_id="kept")
    with gr.Row(elem_id="camera"):
        at.camera = photo_input(label="Camera, or paste a picture", sources=["webcam", "clipboard"], height=320)
        with gr.Column():
            hint = "hf://datasets/user/name/photo.jpg, or of a host that this page allows; then Enter"
            at.address = gr.Textbox(label="Address of a photo", info=hint, placeholder="https://")
            at.fetched, at.live = html(elem_id="fetched"), html(START, elem_id="live")
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
        with gr.Tab("Lesson", elem_id="lessons") as at.lessons:
            at.place, at.steps, at.lesson = gr.State(None), html(fill("steps")), html(elem_id="lesson")
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
        with gr.Tab("Break it") as at.breaking:
            at.part, at.clipboard, at.trail = gr.State(None), gr.State(""), gr.State([])
            with gr.Row():
                with gr.Column(min_width=260):
                    at.canvas = html(elem_id="canvas")
                with gr.Column(min_width=260):
                    with gr.Row(elem_id="tools"):
                        at.tools = {tool: gr.Button(tool, size="sm") for tool in TOOLS}
                    at.told = html(elem_id="told")
                    at.size = gr.Slider(5, 60, 25, step=5, label="Size of a part that is clicked, in percent")
                    at.history = html()
        with gr.Tab("Many pictures"):
            with gr.Row():
                buttons = ("Choose pictures", "multiple"), ("Choose a folder", "directory")
                at.files = [gr.UploadButton(name, file_count=kind, variant="primary") for name, kind in buttons]
                at.again = gr.Button("Again, with the model and stage that are chosen now")
            at.pace, at.taken, at.gallery = html(elem_id="pace"), gr.State([]), html(paragraph(HINT), elem_id="gallery")
        with gr.Tab("Report") as at.report:
            at.beside = choice([("(none)", ""), *names], label="Second model beside it")
            at.record = html()
            with gr.Row():
                at.export = gr.Button("Make model.onnx, to run it without torch", size="sm")
                at.onnx, at.onnx_told = gr.File(label="model.onnx", interactive=False, height=90, visible=False), html()
        with gr.Tab("Audit") as at.audited:
            at.audit = html()
        with gr.Tab("Code"):
            at.code = html()
    with gr.Accordion("Colours", open=False):
        at.colormap = gr.Dropdown(COLORMAP_CHOICES, value=usual.colormap, label="Colour map")
    at.link, at.save, at.saved, at.background = html(), gr.Button("Save as a page", size="sm"), html(), html()
    at.photo.render()  # after the strip, whose input for files is the first of the page
    return at


def choice(choices: Sequence, value: str | None = "", **options: object) -> gr.Dropdown:
    """A list that takes other values too: what the model does not have is refused by the library, in a sentence."""
    return gr.Dropdown(choices, value=value, allow_custom_value=True, **options)


def wire(page: gr.Blocks, at: SimpleNamespace, events: SafeEvents) -> None:
    """Connects the widgets of `layout`: each begins an event, whose values they then show."""
    settings = {field.name: getattr(at, field.name) for field in fields(Question)}
    asked = [at.photo, at.model, at.mask, *settings.values()]
    changed = [getattr(at, name) for name in {**dict.fromkeys(REDRAWN), **dict.fromkeys(CHECKED)}]
    everything = [at.shown, at.photo, at.fetched, at.background, at.facts, at.model, *changed, *settings.values()]

    def by_widget(shown: dict[str, object]) -> dict:
        lists = {name: choice(**value) if isinstance(value, dict) else value for name, value in shown.items()}
        return {getattr(at, name): value for name, value in lists.items()} or {at.chip: gr.skip()}

    def begin(request: gr.Request, before: str, photo: str | None, name: str, *others: object) -> dict:
        query = {} if before else dict(request.query_params)
        linked = events.run("linked", [], query)
        photo, name = linked.get("photo", photo), linked.get("model", name)
        shown = events.run("begin", [name], request.session_hash, query, before, photo, name, *others)
        return by_widget(shown | linked)

    def handler(event: str, *given: object, ahead: int = 0, two: bool = False) -> Callable:
        # So many inputs stand ahead of photo and model; of `two` models the first input is the other one.
        def handle(request: gr.Request, *values: object) -> dict:
            names = [values[ahead + 1]] + [values[0]] * bool(two and values[0])
            return by_widget(events.run(event, names, request.session_hash, *given, *values))

        return handle

    def pick(click: gr.EventData, request: gr.Request, *asked: object) -> dict:
        return handler("pick", click.points)(request, *asked)

    def choose_part(click: gr.EventData, request: gr.Request, *asked: object) -> dict:
        return handler("choose_part", click.points, ahead=1)(request, *asked)

    def learn(click: gr.EventData, request: gr.Request, place: list | None) -> dict:
        clicked = getattr(click, "do", ""), getattr(click, "points", [])
        return by_widget(events.run("learn", [], request.session_hash, *clicked, place))

    def live(click: gr.EventData, request: gr.Request, name: str) -> dict:
        return by_widget(events.run("live", [name], request.session_hash, click.frame, click.scale, name))

    def change(request: gr.Request, tool: str, *asked: object) -> dict:
        return by_widget(events.run("change", [], request.session_hash, tool, *asked))

    def export(photo: str | None, name: str, *others: object) -> tuple:
        path, told = events.run("onnx", [name], photo, name, *others)
        return gr.update(value=path, visible=path is not None), told

    def fetch(address: str) -> dict:
        return by_widget(events.run("fetch", [], address))

    def keep(files: list[str] | None, photo: str | None, kept: list[str], trail: list) -> dict:
        return by_widget(events.run("keep", [], files, photo, kept, trail))

    def go_back(click: gr.EventData, kept: list[str]) -> str:
        return kept[click.index]

    def many(files: list[str] | None, photo: str | None, name: str, *others: object) -> tuple:
        return events.run("many", [name], files or [], photo, name, *others), files

    def open_one(click: gr.EventData, taken: list[str]) -> str | None:
        return dict(enumerate(taken, start=1)).get(click.number)

    def when(triggers: list, make: Callable, inputs: list, outputs: list, **options: object) -> object:
        # "always_last": the last choice made while an answer is on its way is not lost.
        return gr.on(triggers, make, inputs, outputs, trigger_mode="always_last", api_visibility="private", **options)

    quietly = {"trigger_mode": "always_last", "api_visibility": "private", "show_progress": "hidden"}
    begun = [page.load, at.photo.change, at.model.input]
    waiting = {"show_progress_on": [at.look, at.grad_cam, at.stages]}
    touched = [widget.input for name, widget in settings.items() if name not in ("points", "opacity", "colormap")]
    answers = [
        when(begun, begin, [at.shown, *asked], everything, **waiting),
        when([*touched, at.points.submit, at.mask.change], handler("redraw"), asked, changed),
        when([at.picker.select, at.look.select], pick, asked, [*map(settings.get, PICKED), *changed]),
    ]
    following, checked, drawn = ([getattr(at, name) for name in names] for names in (FOLLOWING, CHECKED, REDRAWN))
    for each in answers:  # what takes more passes follows
        followed = each.then(handler("follow"), asked, [*following, at.chip], **quietly)
        followed.then(handler("check"), asked, checked, **ONE_AT_A_TIME, **quietly)
    at.chip.select(handler("check_now"), asked, checked, **ONE_AT_A_TIME, **quietly)
    when([at.colormap.input], handler("drawing", REDRAWN), asked, drawn)  # the check stays as it is
    # In the browser alone: what was chosen or taken becomes the photo.
    at.upload.upload(None, at.upload, at.photo, js="files => files[0]", api_visibility="private")
    at.camera.input(None, at.camera, [at.photo, at.camera], js=TAKEN, api_visibility="private")
    at.camera_button.click(None, js="() => document.body.classList.toggle('camera')", api_visibility="private")
    when([at.address.submit], fetch, [at.address], [at.photo, at.fetched])
    for each, files in ((at.upload.upload, at.upload), (at.photo.change, gr.State(None))):
        each(keep, [files, at.photo, at.kept, at.trail], [at.kept, at.strip], **quietly)
    at.strip.select(go_back, at.kept, at.photo, **quietly)
    at.live.select(live, at.model, at.live, **quietly)
    when([at.canvas.select], choose_part, [at.size, *asked], [at.part, at.canvas])
    for tool in at.tools.values():
        changing = [tool, at.part, at.clipboard, at.trail, at.photo]
        when([tool.click], change, changing, [at.photo, at.trail, at.clipboard, at.told])
    opened = at.breaking.select(lambda part: part or "", at.part, at.part, **quietly)
    for each in (opened.then, at.photo.change, at.model.input):
        each(handler("broken", ahead=2), [at.part, at.trail, *asked], [at.canvas, at.history, at.chip], **quietly)
    learned = [at.lessons.select, at.steps.select, at.lesson.select]
    when(learned, learn, [at.place], [at.place, at.lesson, at.photo, at.model, at.chip])
    both = [at.other, at.second, at.photo, at.model, *settings.values()]
    compare, reports = (handler("beside", panel, ahead=2, two=True) for panel in ("compared", "record"))
    when([at.other.input, at.second.change, at.photo.change, at.model.input], compare, both, [at.compared])
    when([at.report.select, at.model.input, at.beside.input], reports, [at.beside, *both[1:]], [at.record])
    when([at.export.click], export, asked, [at.onnx, at.onnx_told], concurrency_limit=1)
    when([at.save.click], handler("drawing", ["saved"]), asked, [at.saved])
    when([at.audited.select, at.model.input], handler("drawing", ["audit"]), asked, [at.audit])
    alone = {"concurrency_limit": 1, "concurrency_id": "many", "show_progress_on": [at.pace]}
    for given, begun in ((at.taken, at.again.click), *((each, each.upload) for each in at.files)):
        when([begun], many, [given, *asked], [at.gallery, at.taken], **alone)
    when([at.gallery.select], open_one, [at.taken], [at.photo])


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
        own = {name: name for name in args.models if IN_FILE.fullmatch(name)}  # here, and nowhere else
        others = [name for name in args.models if name not in own]
        models = Models(own | offered_models(ROOT, [*others, *named]), owners, fetch_with_progress)
        server_name = host.address()
        for name in own:
            models[name]  # runs the file
    except ValueError as error:
        parser.error(str(error))
    page = build_page(models)
    signal.signal(signal.SIGTERM, lambda *_: end(page))
    try:
        launch(page, server_name=server_name, server_port=args.port)  # which looks for a free one
    except (OSError, OverflowError):  # the second beyond 65535
        port = args.port or os.environ.get("GRADIO_SERVER_PORT", 7860)
        sys.exit(f"Port {port} is taken or for administrators (below 1024). Choose another one with --port.")


if __name__ == "__main__":
    main()
