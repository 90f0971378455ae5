"""The page where people run it: its environment, ports and proxies, a disk that is cleaned, a proxy before it."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import uvicorn
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import app
from cvlab import files
from cvlab.checkpoint import CheckpointError, hub
from cvlab.data import shapes
from cvlab.page import host
from cvlab.page.examples import example_files
from cvlab.page.host import GONE, sentence_of, without_paths
from cvlab.page.many import explain_picture
from cvlab.page.models import Models, offered_models
from cvlab.page.question import Question
from cvlab.page.upload import UPLOADS, photo_input

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = "shapes-classifier"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """os.environ without proxies and settings of Gradio, as it was afterwards."""
    before = dict(os.environ)
    for name in before:
        if (name.startswith("GRADIO_") and name != "GRADIO_TEMP_DIR") or name.lower().endswith("_proxy"):
            del os.environ[name]
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GRADIO_SERVER_PORT", "http"),
        ("GRADIO_SERVER_PORT", ""),
        ("GRADIO_SERVER_PORT", "70000"),
        ("GRADIO_SERVER_PORT", "-1"),
        ("GRADIO_NUM_PORTS", "many"),
        ("GRADIO_NUM_PORTS", "0"),
        ("GRADIO_NUM_WORKERS", "x"),
        ("GRADIO_DEBUG", "yes"),
        ("HF_HUB_ETAG_TIMEOUT", "10s"),
        ("http_proxy", "ftp://proxy"),
        ("HTTPS_PROXY", "http://proxy:port"),
        ("all_proxy", "socks4://127.0.0.1:9"),
        ("NO_PROXY", "*.school:x"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(environment, name, value):
    environment[name] = value
    with pytest.raises(ValueError, match=f"(?i){name}") as refused:
        host.read_environment()
    assert str(refused.value).endswith(".")


def test_a_password_in_the_address_of_a_proxy_is_not_shown(environment):
    environment["http_proxy"] = "ftp://user:open-sesame@proxy"
    with pytest.raises(ValueError, match="http_proxy") as refused:
        host.read_environment()
    assert "open-sesame" not in str(refused.value)


@pytest.mark.parametrize("listed", ["", "school.example", "[::1],school.example"])
def test_this_machine_is_never_behind_a_proxy(environment, listed):
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": listed, "GRADIO_SERVER_NAME": "10.0.0.7"}
    host.read_environment()
    for name in ("NO_PROXY", "no_proxy"):
        assert {"localhost", "127.0.0.1", "::1", "10.0.0.7"} <= set(environment[name].split(","))
        assert ("school.example" in environment[name]) == bool(listed)


@pytest.mark.parametrize("name", ["all_proxy", "HTTPS_PROXY"])
def test_a_socks_proxy_without_its_package_is_refused_by_name(environment, name):
    environment |= {name: "socks5://user:open-sesame@127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    with pytest.raises(ValueError, match=f"^{name} .*socksio") as refused:
        host.read_environment()
    assert "open-sesame" not in str(refused.value)


# --- address and models -----------------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    """The last words of a page that cannot be served, of a user who is no administrator."""
    lines = "import hub_client; hub_client.give_up_rights(); import app; app.main()"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    ran = subprocess.run([sys.executable, "-c", lines, *words], env=env, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    return ran.stderr.splitlines()[-1]


def test_a_port_that_is_taken(environment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        assert refusal("--port", taken).startswith(f"Port {taken} is taken")  # and no other one is chosen


def test_a_port_for_administrators(environment):
    free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if not free.is_file() or int(free.read_text()) <= 80:
        pytest.skip("on this machine everybody may take every port")
    assert refusal("--port", "80").startswith("Port 80 is taken or for administrators")


@pytest.mark.parametrize("name", ["::1", "[::1]", "no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_cannot_be_served(environment, name):
    environment["GRADIO_SERVER_NAME"] = name
    with pytest.raises(ValueError, match=f"GRADIO_SERVER_NAME.*{re.escape(name)}"):
        host.address()


def test_models_that_are_given_are_there(tmp_path):
    offered = offered_models(ROOT, ["user/m ", "https://huggingface.co/user/pets", "checkpoints/flowers"])
    assert list(offered)[:3] == ["user/m", "user/pets", "checkpoints/flowers"]
    for name in ("./typo", str(tmp_path), "checkpoints", "https://huggingface.co/spaces/user/page"):
        with pytest.raises(ValueError, match=re.escape(name)):
            offered_models(ROOT, [name])


# --- a folder of its own ----------------------------------------------------------------------------------------------


def folder_of_a_page(**env: str) -> str:
    lines = "from cvlab.page import host; print(host.own_folder(), end='')"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env}
    ran = subprocess.run([sys.executable, "-c", lines], env=env, capture_output=True, text=True)
    return ran.stdout if ran.returncode == 0 else ran.stderr.splitlines()[-1]


def test_the_folder_of_the_page(tmp_path):
    """Not among the temporary files, which are cleaned; nobody else's; gone when the page ends; left-overs too."""
    home, tmp = tmp_path / "home", tmp_path / "tmp"
    tmp.mkdir()
    left = home / ".cache" / "cvlab" / "cvlab-page-killed" / "uploads" / "0" / "photo.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a visitor")
    folder = Path(folder_of_a_page(HOME=str(home), TMPDIR=str(tmp)))
    assert folder.is_relative_to(home / ".cache")
    assert not folder.exists()
    assert left.exists()  # it may be another page's that runs
    assert not list(tmp.iterdir())
    (tmp_path / "file").write_text("")
    assert Path(folder_of_a_page(HOME=str(tmp_path / "file"), TMPDIR=str(tmp))).parent == tmp
    assert "GRADIO_TEMP_DIR" in folder_of_a_page(HOME=str(home), GRADIO_TEMP_DIR=str(tmp_path / "file"))


def test_what_a_killed_page_left_is_deleted_after_a_while(tmp_path, environment, monkeypatch):
    left = tmp_path / "cvlab-page-killed" / "uploads" / "0" / "photo.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a visitor")
    environment["GRADIO_TEMP_DIR"] = str(tmp_path)
    monkeypatch.setattr(host, "KEPT", -1)
    host.own_folder.__wrapped__()
    assert not left.exists()


def test_threads_may_write_one_file_at_once(tmp_path):
    contents = [bytes([i]) * 300_000 for i in range(8)]
    errors: list[Exception] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                files.write_bytes(tmp_path / "table.csv", content)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / "table.csv").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


# --- sentences --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            f"/home/a/.cache/huggingface/hub/models--user--bad/snapshots/{COMMIT}/config.json is not valid JSON.",
            "user/bad/config.json is not valid JSON.",
        ),
        (f"{ROOT}/checkpoints/pets/config.json: no", "checkpoints/pets/config.json: no"),
        ("cannot open (/srv/models/pets/model.safetensors).", "cannot open (model.safetensors)."),
        ("[Errno 2] No such file: '/tmp/gradio/00ff/a b.png'", "[Errno 2] No such file: 'a b.png'"),
        ("There is no model “/etc/passwd”: choose one.", "There is no model “/etc/passwd”: choose one."),
        ("accept https://huggingface.co/user/m/tree/x first", "accept https://huggingface.co/user/m/tree/x first"),
        ("write x/y, and/or 1/2", "write x/y, and/or 1/2"),
    ],
)
def test_names_stand_in_place_of_paths(text, shown):
    assert without_paths(text) == shown


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/srv/data/photo.png"),
        OSError(errno.ENOSPC, "No space left on device", "/srv/data/photo.png"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/srv/data/photo.png"),
    ],
)
def test_errors_of_the_system_are_sentences(error):
    sentence = sentence_of(error)
    assert sentence.startswith("Photo.png ")
    assert "/srv" not in sentence
    assert "Errno" not in sentence
    assert sentence.endswith(".")


# --- a page on a machine that is cleaned ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[gr.Blocks]:
    """With a model of the Hub whose config is broken, as it lies in the cache."""
    broken = tmp_path_factory.mktemp("hub") / "models--user--bad" / "snapshots" / COMMIT
    broken.mkdir(parents=True)
    for name in hub.NEEDED:
        (broken / name).write_text("{")
    page = app.build_page(Models(offered_models(ROOT, []), fetch=lambda name: broken))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


def called(page: gr.Blocks, number: int, *values: object) -> dict:
    """What the queue answers to an event, as the browser gets it."""
    import json

    session = f"s{time.time_ns()}"
    sent = {"fn_index": number, "data": values, "session_hash": session}
    httpx.post(f"{page.local_url}gradio_api/queue/join", json=sent)
    events = f"{page.local_url}gradio_api/queue/data"
    with httpx.stream("GET", events, params={"session_hash": session}, timeout=60) as lines:
        messages = (json.loads(line.removeprefix("data:")) for line in lines.iter_lines() if line.startswith("data:"))
        return next(message["output"] for message in messages if message["msg"] == "process_completed")


def examples_of(page: gr.Blocks) -> list[int]:
    """The status of every picture that the page shows before anything is asked."""
    found = re.findall(r"/gradio_api/file=[^\"\\]+", httpx.get(f"{page.local_url}config").text)
    assert len(set(found)) >= len(example_files())
    return [httpx.get(page.local_url.rstrip("/") + path).status_code for path in set(found)]


def photo_at(page: gr.Blocks, path: str | Path, model: str = CLASSIFIER) -> dict:
    predict = next(number for number, each in page.fns.items() if each.api_name == "predict")
    return called(page, predict, {"path": str(path), "meta": {"_type": "gradio.FileData"}}, model)


def test_the_examples_outlive_every_cleaning(served):
    from gradio.route_utils import delete_files_created_by_app

    def all_are_there() -> None:
        assert set(examples_of(served)) == {200}
        for path in (next(iter(example_files())), next(reversed(example_files()))):  # a photo and a scene
            assert "error" not in photo_at(served, path), path

    all_are_there()
    delete_files_created_by_app(served, 0)  # what Gradio does every hour
    all_are_there()
    shutil.rmtree(host.own_folder())  # what a host does
    assert "error" not in photo_at(served, next(reversed(example_files())))
    all_are_there()


def test_every_example_can_be_chosen(served):
    chosen = [number for number, each in served.fns.items() if getattr(each.fn, "func", None) is str]
    for number in chosen:
        assert called(served, number)["data"][0]["path"] in example_files()


def test_an_expired_photo_says_so(served, tmp_path):
    shapes.scene(4003, 64).image.save(tmp_path / "photo.png")
    with open(tmp_path / "photo.png", "rb") as file:
        (path,) = httpx.post(f"{served.local_url}gradio_api/upload", files={"files": file}).json()
    assert Path(path).is_relative_to(UPLOADS)
    assert "error" not in photo_at(served, path)
    Path(path).unlink()
    assert "error" not in photo_at(served, path)  # what was seen is still known
    assert photo_at(served, path, "flowers")["error"] == GONE
    Path(path).parent.rmdir()
    model = Models(offered_models(ROOT, []))[CLASSIFIER]
    assert explain_picture(model, Path(path), Question(), 1)[0].sentence == GONE


def test_a_broken_model_of_the_hub_is_named_without_the_path_of_the_cache(served):
    error = photo_at(served, next(iter(example_files())), "https://huggingface.co/user/bad")["error"]
    assert error.startswith("User/bad/config.json is not valid JSON")


def test_an_error_that_nobody_foresaw_shows_no_path(served, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("/srv/secret/place/file.bin: bad magic")

    monkeypatch.setattr(Models, "__getitem__", fail)
    error = photo_at(served, next(iter(example_files())), "flowers")["error"]
    assert error == "File.bin: bad magic."


def test_a_model_whose_files_were_cleaned_is_fetched_again_at_its_commit(tmp_path):
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        folder = tmp_path / "models--user--pets" / "snapshots" / COMMIT
        shutil.copytree(ROOT / "checkpoints" / CLASSIFIER, folder, dirs_exist_ok=True)
        return folder

    models = Models({}, fetch=fetch)
    assert models.folder("user/pets") == models.folder(" user/pets")
    shutil.rmtree(tmp_path / "models--user--pets")
    assert (models.folder("user/pets") / "model.safetensors").is_file()
    assert asked == ["user/pets", f"user/pets@{COMMIT}"]
    with pytest.raises(CheckpointError):
        Models({}, fetch=lambda name: tmp_path)["user/pets"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_starts_behind_proxies_and_says_where_in_a_log(tmp_path):
    """Nobody answers at the proxies, the first port is taken, the temporary files are cleaned, the log is a file."""
    (tmp_path / "tmp").mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    log = tmp_path / "log"
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        open(log, "w") as out,
        subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=ROOT,
            env=env | {"GRADIO_SERVER_PORT": str(other.getsockname()[1])},
            stdout=out,
        ) as server,
    ):
        try:
            until = time.time() + 90
            while not (found := re.search(r"http://127.0.0.1:\d+(?=\s)", log.read_text())):
                assert server.poll() is None
                assert time.time() < until
                time.sleep(0.1)
            for path in (tmp_path / "tmp").iterdir():
                shutil.rmtree(path)
            shapes.scene(4003, 64).image.save(tmp_path / "photo.png")
            client = Client(found[0], verbose=False, httpx_kwargs={"trust_env": False})
            answer = client.predict(handle_file(tmp_path / "photo.png"), CLASSIFIER, api_name="/predict")
            assert answer["label"] == shapes.CLASS_NAMES[shapes.scene(4003).label]
        finally:
            server.send_signal(signal.SIGTERM)
    assert not list((tmp_path / "home" / ".cache" / "cvlab").iterdir())


def test_the_command_refuses_its_environment_in_a_sentence():
    env = os.environ | {"GRADIO_SERVER_PORT": "http"}
    ran = subprocess.run([sys.executable, "app.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode != 0
    assert ran.stderr.startswith("GRADIO_SERVER_PORT")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "words", [["--port", "70000"], ["--port", "0"], ["--port", "-1"], ["--port", "http"], ["./no-such-model"]]
)
def test_the_command_refuses_its_options_in_a_sentence(environment, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(SystemExit):
        app.main()
    assert words[-1] in capsys.readouterr().err


# --- behind a proxy, and before a camera ------------------------------------------------------------------------------


@contextmanager
def proxied(url: str, prefix: str) -> Iterator[str]:
    """The address of a reverse proxy that serves `url` under a path, as nginx does with proxy_pass URL/."""

    async def forward(request: Request) -> Response:
        headers = {key: value for key, value in request.headers.items() if key not in ("host", "content-length")}
        headers |= {
            "x-forwarded-host": request.headers["host"],
            "x-forwarded-proto": request.headers.get("proto", "http"),
        }
        path = request.url.path.removeprefix(prefix)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            answer = await client.request(
                request.method, path, params=request.query_params, content=await request.body(), headers=headers
            )
        kept = {key: answer.headers[key] for key in ("content-type", "location") if key in answer.headers}
        return Response(answer.content, answer.status_code, kept)

    routes = [Route(prefix + "/{path:path}", forward, methods=["GET", "POST", "HEAD"])]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}/"
        server.should_exit = True
        thread.join(10)


def test_behind_a_reverse_proxy_under_a_path_and_behind_https(environment, tmp_path):
    """As the README says: GRADIO_ROOT_PATH, and the headers of the proxy."""
    environment["GRADIO_ROOT_PATH"] = "/cvlab"
    page = app.build_page(Models(offered_models(ROOT, [])))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    shapes.scene(4003, 64).image.save(tmp_path / "photo.png")
    try:
        with proxied(page.local_url, "/cvlab") as url:
            with open(tmp_path / "photo.png", "rb") as file:
                (path,) = httpx.post(f"{url}gradio_api/upload", files={"files": file}).json()
            sent = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, CLASSIFIER]}
            call = httpx.post(f"{url}gradio_api/call/predict", json=sent).json()
            events = httpx.get(f"{url}gradio_api/call/predict/{call['event_id']}", timeout=60).text
            assert f'"label": "{shapes.CLASS_NAMES[shapes.scene(4003).label]}"' in events
            assert httpx.get(f"{url}config").json()["root"] == url.rstrip("/")
            secure = httpx.get(f"{url}config", headers={"proto": "https"}).json()["root"]
            assert secure == url.rstrip("/").replace("http:", "https:")
    finally:
        page.close()


def test_the_photo_of_the_camera_is_not_mirrored(tmp_path):
    """A scene that is bright on its left reaches the server so."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to test the page (apt-get install chromium)")
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")
    scene = np.random.default_rng().integers(20, 40, (240, 320), np.uint8)  # never the same file twice
    scene[:, :160] += 180
    frame = b"FRAME\n" + scene.tobytes() + bytes([128]) * (2 * 120 * 160)
    (tmp_path / "camera.y4m").write_bytes(b"YUV4MPEG2 W320 H240 F10:1 Ip A1:1 C420jpeg\n" + frame * 10)
    camera = [f"--use-file-for-fake-video-capture={tmp_path / 'camera.y4m'}", "--use-fake-ui-for-media-stream"]
    before = set(UPLOADS.rglob("*.*"))
    with gr.Blocks() as blocks:
        photo_input(label="Photo")
    app.launch(blocks, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        flags = [*FLAGS, *camera, "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(blocks.local_url)
        page.get_by_label("Capture from camera").first.click()
        page.get_by_text("Click to Access Webcam").click()
        page.wait_for_function(  # before its first picture a camera gives none
            "[...document.querySelectorAll('video')].some(video => video.videoWidth && video.readyState >= 2)"
        )
        page.get_by_label("capture photo").click()
        for _ in range(300):
            if taken := [path for path in UPLOADS.rglob("*.*") if path not in before and path.stat().st_size]:
                break
            page.wait_for_timeout(100)
        browser.close()
    blocks.close()
    pixels = np.asarray(Image.open(taken[0]).convert("L"), float)
    left, right = pixels[:, : pixels.shape[1] // 3].mean(), pixels[:, -pixels.shape[1] // 3 :].mean()
    assert left > 180
    assert right < 70
