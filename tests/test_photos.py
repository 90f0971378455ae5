"""A visitor's own photos: fetched by an address from where that is allowed, and kept in a strip to go back to."""

import io
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import Client
from hub_server import Hub, serve
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

import app
from cvlab import checkpoint
from cvlab.checkpoint import hub as hub_module
from cvlab.data import shapes
from cvlab.explain import predict, predicted_masks
from cvlab.page import photos
from cvlab.page.examples import example_files, horse
from cvlab.page.models import Models, offered_models
from cvlab.transforms import resize_mask, view

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    shapes.scene(seed, 128).image.save(file, "PNG")
    return file.getvalue()


class Site(BaseHTTPRequestHandler):
    """/photo.png is a photo; the others misbehave."""

    asked: list[str] = []  # noqa: RUF012  of all requests together

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content, length = png(4022), None
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/photo.png")
            self.end_headers()
            return
        if self.path == "/claims.png":
            length = photos.MAX_UPLOAD_MB * 2**20 + 1
        self.send_response(404 if self.path == "/none.png" else 200)
        if self.path != "/endless.png":
            self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        try:
            self.wfile.write(content)
            while self.path == "/endless.png":
                self.wfile.write(bytes(2**20))
        except OSError:  # nobody reads on
            pass

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(photos.HOSTS, "upload.example.org, 127.0.0.1,*.school.edu")


def test_a_photo_of_an_allowed_host_is_the_bytes_that_it_sends(site: str) -> None:
    path = photos.fetch(f" {site}/photo.png?size=large ")
    assert Path(path).read_bytes() == png(4022)
    assert Path(path).name == "photo.png"
    assert photos.address_of(path) == f"{site}/photo.png?size=large"
    assert photos.address_of(next(iter(example_files()))) == ""


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("{site}/none.png", "HTTP 404"),
        ("{site}/moved.png", "HTTP 302"),  # to a host that is not named
        ("{site}/claims.png", "the limit is 40 MB"),
        ("{site}/endless.png", "the limit is 40 MB"),
        ("http://localhost:1/photo.png", "not from “localhost”"),
        ("https://school.edu.example.com/photo.png", "not from “school.edu.example.com”"),
        ("https://upload.example.org@localhost/photo.png", "not from “localhost”"),
        ("file:///etc/passwd", "not from “”"),
        ("ftp://127.0.0.1/photo.png", "did not arrive"),
        ("http://127.0.0.1:1/photo.png", "did not arrive"),
    ],
)
def test_any_other_address_is_refused(site: str, address: str, reason: str) -> None:
    Site.asked.clear()
    with pytest.raises(ValueError, match=reason):
        photos.fetch(address.format(site=site))
    assert "/photo.png" not in Site.asked


def test_the_hosts_that_a_star_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(photos.httpx, "stream", lambda method, address, **options: sent.append(address) or 1 / 0)
    for address in ("https://a.school.edu/x.png", "https://A.B.school.edu/x.png"):
        with pytest.raises(ZeroDivisionError):
            photos.fetch(address)
    for address in ("https://school.edu/x.png", "https://badschool.edu/x.png"):
        with pytest.raises(ValueError, match="not from"):
            photos.fetch(address)
    assert len(sent) == 2


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve(tmp_path_factory.mktemp("hub")) as hub:
        hub.add(hub.create("datasets", "user/photos"), {"a/star.png": png(4019), "large.png": bytes(2000)})
        yield hub


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(hub, tmp_path_factory.mktemp("home"))


def test_a_photo_on_the_hub_is_found_by_its_name_and_by_its_page(client: Client, hub: Hub) -> None:
    page = f"{hub.url}/datasets/user/photos/blob/main/a/star.png"
    for address in ("hf://datasets/user/photos/a/star.png", page):
        assert client.call(hub_module.pull_file, address, 10**6, ["user"]).read_bytes() == png(4019)
    assert client.call(hub_module.pull_file, "https://example.org/star.png", 10**6) is None


@pytest.mark.parametrize(
    ("address", "owners", "reason"),
    [
        ("hf://datasets/user/photos/large.png", (), "2,000 bytes"),
        ("hf://datasets/user/photos/none.png", (), "user/photos"),
        ("hf://datasets/user/photos", (), "no file"),
        ("hf://datasets/user/photos@../../x/a/star.png", (), "no file|not"),
        ("hf://datasets/user/photos/a/star.png", ("school",), "school only"),
    ],
)
def test_other_files_of_the_hub_are_refused(client: Client, address: str, owners: tuple, reason: str) -> None:
    most = 1000 if "large" in address else 10**6
    with pytest.raises(ValueError, match=reason):
        client.call(hub_module.pull_file, address, most, owners)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_the_drawn_horse_is_one_for_the_model_that_ships() -> None:
    image, mask = horse(256)
    model = checkpoint.load(ROOT / "checkpoints" / "horses")
    found = predicted_masks(model, predict(model, view(image, model)))[0]
    found = resize_mask(found, mask.shape)[0].numpy()
    assert (found & mask).sum() / (found | mask).sum() > 0.85
    assert np.array_equal(np.asarray(Image.open(next(p for p, c in example_files().items() if c == "horse"))), image)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    torch.manual_seed(0)
    page = app.build_page(Models(offered_models(ROOT, [])))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
        page.goto(f"{url}?model=shapes-classifier")
        expect(page.locator("#sentence h2")).to_contain_text("%", timeout=30_000)
        yield page
        browser.close()


def test_photos_that_were_chosen_stay_in_a_strip(page: Page, tmp_path: Path) -> None:
    names = []
    for seed in (4022, 4019):
        shapes.scene(seed, 128).image.save(tmp_path / f"{seed}.png")
        names.append(shapes.CLASS_NAMES[shapes.scene(seed).label].capitalize())
    answer, kept = page.locator("#sentence h2"), page.locator(".kept button")
    expect(kept).to_have_count(0)  # an example is none
    page.locator("#strip input[type=file]").set_input_files([tmp_path / "4022.png", tmp_path / "4019.png"])
    expect(answer).to_contain_text(names[0])
    expect(kept).to_have_count(2)
    expect(kept.nth(0)).to_have_attribute("aria-current", "true")
    kept.nth(1).tap()
    expect(answer).to_contain_text(names[1])
    expect(kept.nth(1)).to_have_attribute("aria-current", "true")
    kept.nth(0).focus()
    page.keyboard.press("Enter")
    expect(answer).to_contain_text(names[0])
    expect(kept).to_have_count(2)


def test_an_address_brings_a_photo_and_a_link_brings_it_again(page: Page, url: str, site: str) -> None:
    page.get_by_role("button", name="Camera", exact=True).click()
    field = page.get_by_label("Address of a photo")
    field.fill("https://elsewhere.org/photo.png")
    field.press("Enter")
    expect(page.locator("#fetched")).to_contain_text("not from “elsewhere.org”")
    field.fill(f"{site}/photo.png")
    field.press("Enter")
    expect(page.locator("#fetched")).to_have_text("")
    link = page.locator(".question-link")
    expect(link).to_have_attribute("href", re.compile(r"photo=http.*photo\.png"))
    page.goto(url + link.get_attribute("href"))
    expect(page.locator("#sentence h2")).to_contain_text(shapes.CLASS_NAMES[shapes.scene(4022).label].capitalize())
