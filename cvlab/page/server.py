"""The page as a server: what it looks like, what it refuses, and how it ends."""

import sys
import time
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import FileResponse
from starlette.routing import Route

from cvlab.memory import share_arenas
from cvlab.page.examples import example_files
from cvlab.page.host import MAX_UPLOAD_MB, sentence_of, without_paths
from cvlab.page.limits import Limits, is_public

HERE = Path(__file__).resolve().parent
CSS, SERVED = HERE / "page.css", (HERE / "llms.txt", HERE / "teacher.html")  # for assistants, and for teachers
LAST_SECONDS = 4.0  # for the answers in hand, when the page is to end

# System fonts, as the default theme asks a font server; the colours are in page.css.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


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


def launch(page: gr.Blocks, server_name: str = "127.0.0.1", **options: object) -> None:
    """Starts the server, with the settings that keep it closed: no analytics, no history of the users' pictures."""
    share_arenas()
    limits = Middleware(Limits, waiting=lambda: [each.request for each in list(events_in(page).values())])
    page.queue(api_open=False, default_concurrency_limit=10).launch(  # a model gives one answer at a time
        theme=THEME,
        css_paths=CSS,
        run_history=False,
        footer_links=["api"],
        max_file_size=f"{MAX_UPLOAD_MB}mb",
        show_error=True,  # else a program that calls with wrong types is told nothing
        ssr_mode=False,
        server_name=server_name,
        app_kwargs={
            "middleware": [limits] if is_public(server_name) else [],
            "routes": [Route(f"/{each.name}", lambda _, each=each: FileResponse(each)) for each in SERVED],
        },
        **options,
    )


def events_in(page: gr.Blocks) -> dict:
    """What waits in the queue of a page, or is being answered."""
    return page._queue.event_ids_to_events


def end(page: gr.Blocks) -> None:
    """An orderly end, which deletes the files of the page: the answers in hand are given, within a few seconds."""
    page._queue.max_size, until = 0, time.monotonic() + LAST_SECONDS
    while events_in(page) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.3)  # for the way to the visitor
    sys.exit()
