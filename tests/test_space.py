"""train/publish.py --space: the tree that is sent, and the page that runs from it alone, as a Space runs it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hub_client import TOKEN
from hub_client import Client as Owner
from hub_server import serve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from playwright.sync_api import expect, sync_playwright

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.models import build, probabilities
from cvlab.transforms import open_image, view

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements.lock"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PUBLISH = ("train/publish.py", "--space", "user/page", "--models", "user/pets")
MAX_MEMORY_MB = 2500  # of the 16 GB of a free Space


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("hub"), token=TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def owner(hub, tmp_path_factory):
    return Owner(hub, tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    checkpoint.save(build("convnet", ["cat", "dog"], 32, {"widths": [8, 16]}), root / "pets")
    checkpoint.save(build("timm", ["cat", "dog", "fox"], 64, {"architecture": "test_resnet"}), root / "foxes")
    return root


@pytest.fixture(scope="module")
def space(hub, owner, checkpoints):
    """The repository of the Space, with models beside it on the Hub, one of another owner."""
    owner.push(checkpoints / "pets", "user/pets")
    owner.push(checkpoints / "foxes", "user/foxes")
    hub.repos["models", "stranger/pets"] = hub.repos["models", "user/pets"]
    assert f"{hub.url}/spaces/user/page" in owner.command(*PUBLISH)
    return hub.repos["spaces", "user/page"]


@pytest.fixture(scope="module")
def tree(hub, space, tmp_path_factory):
    """The files of the Space, in a folder of their own."""
    folder = tmp_path_factory.mktemp("space")
    for name, file in hub.files(space, "main").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub.blob(file["sha256"]), folder / name)
    return folder


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_page_and_the_library_are_sent(tree):
    names = files_in(tree)
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cvlab").rglob("*") if path.is_file()}
    library = {name for name in library if "__pycache__" not in name}
    assert names == {"app.py", "README.md", "requirements.txt", "requirements.lock"} | library


def test_the_card_is_a_spaces(tree):
    front = yaml.safe_load((tree / "README.md").read_text().split("---\n")[1])
    assert (front["sdk"], front["app_file"], front["title"]) == ("gradio", "app.py", "page")
    assert tuple(map(int, front["python_version"].split("."))) >= (3, 11)
    assert f"gradio=={front['sdk_version']}" in (tree / "requirements.txt").read_text().splitlines()
    assert {"emoji", "colorFrom", "colorTo", "license", "tags"} <= set(front)
    assert front["models"] == ["user/pets"]
    assert len(front["short_description"]) <= 60


def locked(path):
    """Name -> (version, hashes) of a lock."""
    blocks = re.findall(r"^([\w-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", path.read_text(), re.M)
    assert len(blocks) == len(re.findall(r"^\w", path.read_text(), re.M))
    return {canonicalize_name(name): (version, hashes.count("--hash")) for name, version, hashes in blocks}


def test_the_lock_pins_all_that_is_required_at_a_version_that_is_allowed_with_its_hashes():
    found = locked(LOCK)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line[0] != "#":
            required = Requirement(line)
            assert required.specifier.contains(found[canonicalize_name(required.name)][0]), f"run .ci/lock: {line}"
    assert all(hashes for _, hashes in found.values())


def test_the_lock_names_no_place_that_packages_come_from():
    assert not re.search(r"://|^-|@", LOCK.read_text(), re.M)


def test_the_space_installs_what_the_lock_says_for_a_processor(tree):
    first, *lines = (tree / "requirements.txt").read_text().splitlines()
    assert "download.pytorch.org/whl/cpu" in first
    found = {name: version for name, (version, _) in locked(tree / "requirements.lock").items()}
    assert (tree / "requirements.lock").read_bytes() == LOCK.read_bytes()
    pinned = dict(line.split("==") for line in lines)
    assert {name: version.removesuffix("+cpu") for name, version in pinned.items()}.items() <= found.items()
    assert {name for name, version in pinned.items() if version.endswith("+cpu")} == {"torch", "torchvision"}
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in found.keys() - pinned.keys())


def test_the_space_knows_its_models_and_their_owners(space):
    assert {key: entry["value"] for key, entry in space["variables"].items()} == {
        "CVLAB_MODELS": "user/pets",
        "CVLAB_ALLOW": "user",
    }


def test_publishing_again_sends_only_what_changed_and_clears_what_is_gone(hub, space, owner):
    before = hub.files(space, "main")
    hub.add(space, {"cvlab/old.py": b"", "notes.txt": b"of the owner", "app.py": b"edited"})
    hub.log.clear()
    owner.command(*PUBLISH)
    assert hub.files(space, "main") == before | {"notes.txt": hub.store(b"of the owner")}
    assert len([path for _, path, _ in hub.log if "/commit/" in path]) == 1


# --- the tree, run as a Space runs it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(hub, space, tree, tmp_path_factory):
    """(process, address, home) of the page: SPACE_ID set, two threads, a home of its own and nothing else to write."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    env |= hub.env(home / ".cache" / "huggingface") | {key: entry["value"] for key, entry in space["variables"].items()}
    env |= {"SPACE_ID": "user/page", "HOME": str(home), "TMPDIR": str(home / "tmp"), "SYSTEM": "spaces"}
    env |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    (home / "tmp").mkdir()
    with (
        open(home / "tmp" / "log", "w") as log,
        subprocess.Popen([sys.executable, "app.py"], cwd=tree, env=env, stdout=log, stderr=log) as process,
    ):
        try:
            for _ in range(1200):
                with socket.socket() as door:
                    if door.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (home / "tmp" / "log").read_text()
                time.sleep(0.1)
            yield process, f"http://127.0.0.1:{port}", home
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    shapes.scene(4003, 256).image.save(path)
    return path


def test_the_space_answers_by_the_name_on_the_hub(hub, running, checkpoints, photo):
    client = Client(running[1], verbose=False)
    for model_id in ("user/pets", "user/foxes"):  # one that it offers, and another of the same owner
        answer = client.predict(image=handle_file(photo), model=model_id, api_name="/predict")
        model = checkpoint.load(checkpoints / model_id.split("/")[1])
        with torch.no_grad():
            probs = probabilities(model, model(view(open_image(photo), model)))[0]
        found = {each["label"]: each["confidence"] for each in answer["confidences"]}
        assert found == pytest.approx(dict(zip(model.class_names, probs.tolist(), strict=True)), abs=1e-6)


def test_other_owners_are_refused_before_they_are_asked_for(hub, running, photo):
    hub.log.clear()
    with pytest.raises(AppError, match="stranger/pets"):
        Client(running[1], verbose=False).predict(image=handle_file(photo), model="stranger/pets", api_name="/predict")
    assert not hub.log


def test_a_branch_stays_at_its_commit_while_the_page_runs(hub, running, photo):
    """Somebody pushes another model meanwhile."""
    client = Client(running[1], verbose=False)
    before = client.predict(image=handle_file(photo), model="user/pets", api_name="/predict")
    repo = hub.repos["models", "user/pets"]
    hub.commit(repo, hub.files(hub.repos["models", "user/foxes"], "main"), "main")
    assert client.predict(image=handle_file(photo), model="user/pets", api_name="/predict") == before


def test_the_page_opens_a_model_by_its_id_and_shows_the_commit(hub, running):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to test the page (apt-get install chromium)")
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")
    commit = hub.repos["models", "user/foxes"]["branches"]["main"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.goto(running[1])
        box = page.get_by_label("Model", exact=True)
        for model_id in ("user/foxes", f"user/foxes@{commit}"):
            box.fill(model_id)
            box.press("Enter")
            about = page.locator("[data-name=about]")
            expect(about).to_contain_text(re.compile(f"cat, dog, fox.*user/foxes@{commit}"), timeout=20_000)
            expect(page.locator("caption ~ tbody th").first).to_have_text(re.compile("cat|dog|fox"))
        box.fill("user/nobody")
        box.press("Enter")
        expect(page.get_by_text("user/nobody is not on the Hub")).to_be_visible()
        browser.close()


def test_the_space_writes_into_its_caches_alone_and_fits_into_its_memory(running, tree, hub, space):
    process, _, home = running
    assert files_in(tree) == set(hub.files(space, "main")) - {"notes.txt"}
    outside = {name.split("/")[0] for name in files_in(home)} - {".cache", ".config", "tmp"}
    assert not outside
    status = Path(f"/proc/{process.pid}/status")
    if status.is_file():
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert int(peak) / 1024 < MAX_MEMORY_MB
        print(f"peak memory of the page: {int(peak) / 1024:.0f} MB")
