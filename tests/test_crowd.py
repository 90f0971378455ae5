"""64 visitors at once: each gets the answer, the pictures or the sentence that one alone would get.

Half of them ask for what cannot be answered, some for models of strangers, one of which cannot be opened. And what a
page does when a visitor leaves, asks too much, or when it has to end.
"""

import asyncio
import base64
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import httpx
import pytest

import app
from cvlab.data import shapes
from cvlab.page import limits, server
from cvlab.page.host import sentence_of
from cvlab.page.models import Models, offered_models
from cvlab.page.server import Page
from cvlab.page.upload import Sent, path_of

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER, SEGMENTER = "shapes-classifier", "shapes-segmenter"
STRANGER, HOSTILE = "user/stranger", "user/hostile"
COMMIT = "0123456789" * 4
CLIENTS = 64
PHOTOS = 4
ASKED = [  # by client in turn
    ("predict", [CLASSIFIER]),
    ("grad_cam", [CLASSIFIER, "star", "stage3"]),
    ("grad_cam", [SEGMENTER, "", "decoder2"]),
    ("stages", [SEGMENTER]),
    ("predict", [SEGMENTER]),
    ("grad_cam", [CLASSIFIER, "cross", ""]),
    ("grad_cam", [CLASSIFIER, "", "stage2"]),
    ("predict", [STRANGER]),
    ("predict", [HOSTILE]),
    ("predict", ["no such model"]),
    ("grad_cam", [CLASSIFIER, "whale", ""]),
    ("grad_cam", [SEGMENTER, "", "stage9"]),
    ("stages", [CLASSIFIER]),
    ("predict", ["../checkpoints"]),
    ("grad_cam", ["", "", ""]),
    ("stages", ["no such model"]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models as the Hub's client keeps them: one is whole, one states more classes than memory can hold."""
    cache, made = tmp_path_factory.mktemp("hub"), {}
    for name in (STRANGER, HOSTILE):
        made[name] = cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
        shutil.copytree(ROOT / "checkpoints" / SEGMENTER, made[name])
    config = json.loads((made[HOSTILE] / "config.json").read_text())
    config["cvlab"] |= {"class_names": [str(i) for i in range(1000)], "image_size": 4096}
    (made[HOSTILE] / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def url(folders: dict[str, Path]) -> Iterator[str]:
    page = fresh_page(folders)
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


def fresh_page(folders: dict[str, Path]) -> gr.Blocks:
    """A page that has answered nothing yet."""
    return app.build_page(Models(offered_models(ROOT, []), fetch=folders.__getitem__))


def photo_url(i: int) -> str:
    buffer = io.BytesIO()
    shapes.scene(4003 + i, 96).image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked_by(i: int) -> tuple[str, list]:
    """Endpoint and arguments of a client; no two ask the very same."""
    name, arguments = ASKED[i % len(ASKED)]
    return name, [{"url": photo_url(i // len(ASKED) % PHOTOS)}, *arguments]


async def answer_over_http(client: httpx.AsyncClient, i: int) -> object:
    name, arguments = asked_by(i)
    call = await client.post(f"gradio_api/call/{name}", json={"data": arguments})
    events = (await client.get(f"gradio_api/call/{name}/{call.json()['event_id']}")).text
    kind, _, data = events.rpartition("event: ")[2].partition("\ndata: ")  # after signs of life
    return json.loads(data)["error"] if kind == "error" else await with_pictures(client, json.loads(data))


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
    try:
        answer = make(path_of(Sent(photo)), *arguments)
    except ValueError as error:
        return sentence_of(error)
    if name == "predict":
        return [answer | {"mask": Path(answer["mask"]["path"]).read_bytes()} if "mask" in answer else answer]
    if name == "stages":
        mask, gallery = answer
        pictures = [{"image": Path(path).read_bytes(), "caption": caption} for path, caption in gallery]
        return [Path(mask).read_bytes(), pictures]
    return [Path(each).read_bytes() if isinstance(each, str) else each for each in answer]


def test_each_of_64_visitors_gets_the_answer_of_one_alone(url: str, folders: dict[str, Path]) -> None:
    async def crowd() -> list:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(answer_over_http(client, i) for i in range(CLIENTS)))

    together, page = asyncio.run(crowd()), fresh_page(folders)
    for i, answer in enumerate(together):
        assert answer == answer_alone(page, i), asked_by(i)
    assert sum(isinstance(answer, str) for answer in together) >= CLIENTS * 0.45  # the sentences


# --- leaving, asking too much, and the end ----------------------------------------------------------------------------


@contextmanager
def slow_page(**options: object) -> Iterator[tuple[str, threading.Event, list[str], gr.Blocks]]:
    """A page with one event that waits until it may go on, and a list of what it was asked."""
    go_on, asked = threading.Event(), []

    def answer(text: str) -> str:
        asked.append(text)
        go_on.wait(30)
        return text

    with Page() as page:
        box = gr.Textbox()
        gr.Button().click(answer, box, box, api_name="answer", concurrency_limit=1)
    app.launch(page, prevent_thread_lock=True, quiet=True, **options)
    try:
        yield page.local_url, go_on, asked, page
    finally:
        go_on.set()
        page.close()


def join(url: str, text: str, session: str, **options: object) -> httpx.Response:
    sent = {"fn_index": 0, "data": [text], "session_hash": session}
    return httpx.post(f"{url}gradio_api/queue/join", json=sent, **options)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_work_of_a_visitor_who_leaves_is_dropped() -> None:
    with slow_page() as (url, go_on, asked, page):
        join(url, "first", "stays")
        until(lambda: asked)
        for text in ("second", "third"):
            join(url, text, "leaves")
        join(url, "fourth", "stays too")
        with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": "leaves"}) as stream:
            next(stream.iter_lines())
        until(lambda: len(server.events_in(page)) == 2)
        go_on.set()
        until(lambda: not server.events_in(page))
        assert asked == ["first", "fourth"]


def test_a_public_server_limits_what_one_visitor_asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WAITING", 3)
    monkeypatch.setenv("SPACE_ID", "user/space")
    with slow_page() as (url, *_):
        first, second = ({"headers": {"x-forwarded-for": address}} for address in ("10.0.0.1, 10.9.9.9", "10.0.0.2"))
        codes = [join(url, str(i), f"s{i}", **first).status_code for i in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        assert "later" in join(url, "again", "s9", **first).json()["error"]
        assert join(url, "another", "t", **second).status_code == 200


def test_a_public_server_limits_what_one_visitor_sends_in_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BYTES", 100_000)
    monkeypatch.setenv("SPACE_ID", "user/space")
    with slow_page() as (url, *_):
        files = {"files": ("photo.png", b"0" * 60_000)}
        codes = [httpx.post(f"{url}gradio_api/upload", files=files).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        monkeypatch.setattr(limits, "HOUR", 0.0)
        assert httpx.post(f"{url}gradio_api/upload", files=files).status_code == 200


def test_at_home_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WAITING", 0)
    monkeypatch.setattr(limits, "BYTES", 0)
    monkeypatch.delenv("SPACE_ID", raising=False)
    with slow_page() as (url, *_):
        assert join(url, "text", "session").status_code == 200


@pytest.mark.parametrize(("name", "public"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_which_addresses_are_public(name: str, public: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert limits.is_public(name) is public


def test_a_page_that_has_to_end_gives_the_answer_in_hand() -> None:
    """SIGTERM comes while a verdict is worked out."""
    with subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            url = next(line for line in running.stdout if "http://" in line).split()[-1]
            photo = {"url": photo_url(0), "meta": {"_type": "gradio.FileData"}}
            for name, given in (("predict", []), ("judge", ["", ""])):  # the first one opens the model
                sent = {"data": [photo, SEGMENTER, *given]}
                call = httpx.post(f"{url}/gradio_api/call/{name}", json=sent).json()
                with httpx.stream("GET", f"{url}/gradio_api/call/{name}/{call['event_id']}", timeout=60) as stream:
                    if name == "judge":
                        running.send_signal(signal.SIGTERM)
                    lines = [line for line in stream.iter_lines() if line]
                assert "event: complete" in lines
            running.wait(30)
        finally:
            running.kill()
