"""32 visitors at once: each gets the answer and the pictures that one alone would get, and nobody an error."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import httpx
import pytest

import app
from cvlab.data import shapes
from cvlab.page.models import Models, offered_models
from cvlab.page.upload import Sent, path_of

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER, SEGMENTER = "shapes-classifier", "shapes-segmenter"
CLIENTS = 32
PHOTOS = 4  # so that eight visitors at once ask for the same pictures
ASKED = [  # by client in turn; each photo meets each
    ("predict", [CLASSIFIER]),
    ("grad_cam", [CLASSIFIER, "star", "stage3"]),
    ("grad_cam", [SEGMENTER, "", "decoder2"]),
    ("stages", [SEGMENTER]),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    page = fresh_page()
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


def fresh_page() -> gr.Blocks:
    """A page that has answered nothing yet."""
    return app.build_page(Models(offered_models(ROOT, [])))


def photo_url(i: int) -> str:
    buffer = io.BytesIO()
    shapes.scene(4003 + i, 96).image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked_by(i: int) -> tuple[str, list]:
    """Endpoint and arguments of a client; two of them ask the very same only if they are 16 apart."""
    name, arguments = ASKED[i % len(ASKED)]
    return name, [{"url": photo_url(i // len(ASKED) % PHOTOS)}, *arguments]


async def answer_over_http(client: httpx.AsyncClient, i: int) -> object:
    name, arguments = asked_by(i)
    call = await client.post(f"gradio_api/call/{name}", json={"data": arguments})
    events = (await client.get(f"gradio_api/call/{name}/{call.json()['event_id']}")).text
    assert events.startswith("event: complete"), events
    return await with_pictures(client, json.loads(events.partition("data: ")[2]))


async def with_pictures(client: httpx.AsyncClient, answer: object) -> object:
    """The answer, with each file that it names, downloaded whole, in the place of its name."""
    if isinstance(answer, dict) and answer.get("path"):
        file = await client.get(answer["url"] or f"gradio_api/file={answer['path']}")
        assert file.status_code == 200
        return file.content
    if isinstance(answer, dict):
        return {key: await with_pictures(client, value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [await with_pictures(client, value) for value in answer]
    return answer


def answer_alone(page: gr.Blocks, i: int) -> object:
    """The same by the function that the endpoint calls, one after the other."""
    name, (photo, *arguments) = asked_by(i)
    make = next(each.fn for each in page.fns.values() if each.api_name == name)
    answer = make(path_of(Sent(photo)), *arguments)
    if name == "stages":
        mask, gallery = answer
        pictures = [{"image": Path(path).read_bytes(), "caption": caption} for path, caption in gallery]
        return [Path(mask).read_bytes(), pictures]
    return (
        [Path(each).read_bytes() if isinstance(each, str) else each for each in answer]
        if name == "grad_cam"
        else [answer]
    )


def test_each_of_32_visitors_gets_the_answer_of_one_alone(url: str) -> None:
    async def crowd() -> list:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(answer_over_http(client, i) for i in range(CLIENTS)))

    together, page = asyncio.run(crowd()), fresh_page()
    for i, answer in enumerate(together):
        assert answer == answer_alone(page, i), asked_by(i)[0]
