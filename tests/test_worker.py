"""Models that the owner of the page did not name: worked on by another process, whose end is no end of the page."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.models import build
from cvlab.page import worker
from cvlab.page.events import Events
from cvlab.page.models import Models
from cvlab.page.question import Question
from cvlab.page.worker import STOPPED, SafeEvents

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789" * 4
MODELS = {"user/classes": "shapes-classifier", "user/masks": "shapes-segmenter"}
USUAL = [getattr(Question(), name) for name in Question.__dataclass_fields__]


def in_cache(folder: Path, name: str) -> Path:
    """Where the Hub's client keeps a model."""
    return folder / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shipped models as models of a stranger, and a network that takes more memory than its worker may."""
    folder = tmp_path_factory.mktemp("hub")
    for name, shipped in MODELS.items():
        shutil.copytree(ROOT / "checkpoints" / shipped, in_cache(folder, name))
    large = build("convnet", ["cat", "dog"], 1024, {"widths": [96, 96]})
    checkpoint.save(large, in_cache(folder, "user/large"))
    return folder


def events_of(cache: Path, said: list | None = None) -> SafeEvents:
    """A page's events; `said` gets what the visitor is shown of the progress."""
    report = lambda *done: None if said is None else said.append(done)  # noqa: E731
    return SafeEvents(Models({}, fetch=lambda name: in_cache(cache, name)), report)


@pytest.fixture(scope="module")
def events(cache: Path) -> Iterator[SafeEvents]:
    made = events_of(cache)
    yield made
    made.process.kill()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    shapes.scene(4019, 96).image.save(path)
    return str(path)


def content(answer: object) -> object:
    """An answer as JSON has it, with the bytes of each picture in place of its path."""
    if isinstance(answer, dict):
        return {key: content(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [content(each) for each in answer]
    is_file = isinstance(answer, str) and answer.endswith(".png") and Path(answer).is_file()
    return Path(answer).read_bytes() if is_file else answer


@pytest.mark.parametrize("name", MODELS)
def test_a_strangers_model_gets_the_same_answers(events: SafeEvents, cache: Path, photo: str, name: str) -> None:
    here = Events(Models({}, fetch=lambda each: in_cache(cache, each)), lambda *done: None)
    asked = [photo, name, None, *USUAL]
    calls = {
        "begin": ["session", {}, "", *asked],
        "pick": ["session", [[40, 40], [40, 40]], *asked],
        "follow": ["session", *asked],
        "check_now": ["session", *asked],
        "predict": [photo, name],
        "grad_cam": [photo, name, "", ""],
        "judge": [photo, name, "", ""],
        "beside": ["session", "compared", name, None, *asked[:2], *asked[3:]],
    }
    for event, arguments in calls.items():
        there = events.run(event, [name], *arguments)
        assert content(there) == content(getattr(here, event)(*arguments)), event


def test_it_is_another_process_and_the_models_of_the_owner_are_not_opened_there(events: SafeEvents, photo: str) -> None:
    events.run("predict", ["user/classes"], photo, "user/classes")
    assert events.process.pid != os.getpid()
    assert "user/classes" not in events.models.loaded._values
    owned = SafeEvents(Models({"mine": str(ROOT / "checkpoints/shapes-classifier")}), lambda *done: None)
    owned.run("predict", ["mine"], photo, "mine")
    assert owned.process is None


def test_after_its_death_the_visitor_is_told_and_the_next_one_gets_an_answer(cache: Path, photo: str) -> None:
    events = events_of(cache)
    before = events.run("predict", ["user/classes"], photo, "user/classes")
    dead = events.process
    os.kill(dead.pid, signal.SIGSTOP)  # it hangs, with a question
    killer = threading.Timer(0.5, dead.kill)
    killer.start()
    shown = events.run("begin", ["user/classes"], "s", {}, "", photo, "user/classes", None, *USUAL)
    assert STOPPED[:60] in shown["sentence"]
    assert events.run("predict", ["user/classes"], photo, "user/classes") == before
    assert events.process.pid != dead.pid
    events.process.kill()


def test_silence_ends_it(cache: Path, photo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "SILENT", 0.5)
    events = events_of(cache)
    events.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    with pytest.raises(ValueError, match="was stopped"):
        events.run("predict", ["user/classes"], photo, "user/classes")
    assert time.monotonic() - began < 30
    assert events.process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_more_memory_than_its_limit_is_refused_to_it(cache: Path, photo: str) -> None:
    events = events_of(cache)
    small = "from cvlab.page import models, worker; worker.GIB = 0.5; models.MOST_GIB = 99; worker.main()"
    events.command = [sys.executable, "-c", small, json.dumps({})]
    with pytest.raises(ValueError, match="was stopped"):
        events.run("predict", ["user/large"], photo, "user/large")
    assert "label" in events.run("predict", ["user/classes"], photo, "user/classes")
    events.process.kill()


def test_a_line_at_the_worker_leaves_the_page_to_the_others(cache: Path, photo: str) -> None:
    events = events_of(cache)
    for _ in range(worker.MOST_WAITING):
        events.line.acquire()
    with pytest.raises(ValueError, match="Too many visitors"):
        events.run("predict", ["user/classes"], photo, "user/classes")
    events.line.release()
    assert "label" in events.run("predict", ["user/classes"], photo, "user/classes")
    events.process.kill()


def test_progress_arrives_where_the_visitor_waits(cache: Path, photo: str, tmp_path: Path) -> None:
    said: list = []
    events = events_of(cache, said)
    files = [shutil.copy(photo, tmp_path / f"{i}.png") for i in range(3)]
    shown = events.run("many", ["user/classes"], [str(each) for each in files], photo, "user/classes", None, *USUAL)
    assert [done for done, *_ in said] == [1, 2, 3]
    assert shown.count("<figure>") == 3
    events.process.kill()


def test_an_answer_that_nobody_waits_for_is_not_given_to_the_next(cache: Path, photo: str, tmp_path: Path) -> None:
    def gone(*done: object) -> None:
        raise RuntimeError("the visitor left")

    events = SafeEvents(Models({}, fetch=lambda name: in_cache(cache, name)), gone)
    files = [shutil.copy(photo, tmp_path / f"{i}.png") for i in range(3)]
    asked = [photo, "user/classes", None, *USUAL]
    with pytest.raises(RuntimeError, match="left"):
        events.run("many", ["user/classes"], [str(each) for each in files], *asked)
    assert "label" in events.run("predict", ["user/classes"], photo, "user/classes")
    events.process.kill()


def test_visitors_of_one_worker_get_their_own_answers(events: SafeEvents, photo: str, tmp_path: Path) -> None:
    photos = [str(tmp_path / f"{seed}.png") for seed in range(8)]
    for seed, path in enumerate(photos):
        shapes.scene(4003 + seed, 96).image.save(path)
    alone = {path: events.run("predict", ["user/classes"], path, "user/classes") for path in photos}
    together: dict[str, object] = {}

    def ask(path: str) -> None:
        together[path] = events.run("predict", ["user/classes"], path, "user/classes")

    threads = [threading.Thread(target=ask, args=[path]) for path in photos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_what_its_folder_says_wrongly_is_told_as_before(cache: Path, photo: str) -> None:
    broken = in_cache(cache, "user/broken")
    broken.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_text("{")
    events = events_of(cache)
    shown = events.run("begin", ["user/broken"], "s", {}, "", photo, "user/broken", None, *USUAL)
    assert "is not valid JSON" in shown["sentence"]
    assert str(cache) not in json.dumps(shown)
    with pytest.raises(ValueError, match="not valid JSON"):
        events.run("predict", ["user/broken"], photo, "user/broken")
    events.process.kill()
