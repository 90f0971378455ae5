"""The page in a real Chromium and through its API: what a visitor and a program see."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import app
from cvlab import checkpoint, shapes
from cvlab.explain import grad_cam, peak
from cvlab.models import build
from cvlab.transforms import open_image, view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CLASSIFIER, SEGMENTER = "shapes-classifier", "shapes-segmenter"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class names try to become HTML."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "hostile"
    names = ["<img src=x onerror='document.title=1'>", "</strong><script>document.title=2</script>"]
    checkpoint.save(build("convnet", names, 32, {"widths": [4, 8]}), folder)
    return folder


@pytest.fixture(scope="module")
def url(hostile: Path) -> Iterator[str]:
    page = app.build_page(app.Models(app.offered_models(ROOT, [str(hostile)])))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene whose shape covers enough to be found."""
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    shapes.scene(4003, 256).image.save(path)
    return path


# --- through the API --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url, verbose=False)


def test_predict_gives_label_and_confidences_that_are_the_models(client: Client, scene: Path) -> None:
    answer = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/predict")
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    with torch.no_grad():
        probs = model(view(open_image(scene), model)).softmax(1)[0]
    assert answer["label"] == model.class_names[probs.argmax()] == shapes.CLASS_NAMES[shapes.scene(4003).label]
    found = {each["label"]: each["confidence"] for each in answer["confidences"]}
    assert found == pytest.approx(dict(zip(model.class_names, probs.tolist(), strict=True)), abs=1e-6)


def test_predict_gives_a_segmenters_mask_and_its_numbers(client: Client, scene: Path) -> None:
    answer = client.predict(image=handle_file(scene), model=SEGMENTER, api_name="/predict")
    true = shapes.scene(4003, 256).mask.mean()
    assert answer["shares"]["shape"] == pytest.approx(true, rel=0.25)
    mask = answer["mask"]["path"] if isinstance(answer["mask"], dict) else answer["mask"]
    assert Image.open(mask).size == (512, 512)  # 256, enlarged by a whole factor to at least 320


def test_grad_cam_gives_three_pictures_of_one_view_and_the_peak(client: Client, scene: Path) -> None:
    original, heatmap, overlay, number = client.predict(
        image=handle_file(scene), model=CLASSIFIER, class_name="star", stage="stage3", api_name="/grad_cam"
    )
    assert len({Image.open(path).size for path in (original, heatmap, overlay)}) == 1
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    images = view(open_image(scene), model)
    _, attribution = grad_cam(model, images, model.class_names.index("star"), "stage3")
    assert number == pytest.approx(peak(attribution).item(), rel=1e-4)


def test_stages_gives_the_mask_and_every_stage_in_order(client: Client, scene: Path) -> None:
    _, gallery = client.predict(image=handle_file(scene), model=SEGMENTER, api_name="/stages")
    names = [each["caption"].split(":")[0] for each in gallery]
    assert names == list(checkpoint.load(ROOT / "checkpoints" / SEGMENTER).stages)
    assert "autology" in gallery[-1]["caption"]


def test_grad_cam_defaults_to_the_predicted_class(client: Client, scene: Path) -> None:
    given = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/grad_cam")[3]
    label = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/predict")["label"]
    named = client.predict(image=handle_file(scene), model=CLASSIFIER, class_name=label, api_name="/grad_cam")[3]
    assert given == named


@pytest.mark.parametrize(
    ("endpoint", "arguments"),
    [
        ("/predict", {"model": "no-such-model"}),
        ("/predict", {"model": "../tests"}),
        ("/predict", {"model": str(ROOT / "checkpoints" / CLASSIFIER)}),
        ("/grad_cam", {"model": CLASSIFIER, "class_name": "dog"}),
        ("/grad_cam", {"model": CLASSIFIER, "stage": "stage99"}),
        ("/stages", {"model": CLASSIFIER}),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(
    client: Client, scene: Path, endpoint: str, arguments: dict[str, str]
) -> None:
    with pytest.raises(AppError) as error:
        client.predict(image=handle_file(scene), api_name=endpoint, **arguments)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "Traceback" not in sentence
    assert client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/predict")["label"]


def test_no_file_of_the_server_can_be_named_as_a_photo(url: str) -> None:
    """Only what was uploaded is opened: another path ends in an error, whatever the file holds."""
    photo = {"path": str(ROOT / ".github" / "page.png"), "meta": {"_type": "gradio.FileData"}}
    call = httpx.post(f"{url}gradio_api/call/predict", json={"data": [photo, CLASSIFIER]}).json()
    events = httpx.get(f"{url}gradio_api/call/predict/{call['event_id']}", timeout=30).text
    assert "event: error" in events
    assert "confidences" not in events


def test_a_file_that_is_no_picture_is_a_sentence(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_text("not a picture")
    with pytest.raises(AppError, match="not a picture"):
        client.predict(image=handle_file(path), model=CLASSIFIER, api_name="/predict")


def test_exif_rotation_is_applied(client: Client, tmp_path: Path) -> None:
    """The same scene, stored on its side with the tag that says so, gets the same answer."""
    upright = shapes.scene(4003, 256).image
    tag = Image.Exif()
    tag[274] = 6  # stored turned by 90 degrees against the clock
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=tag)
    answers = [
        client.predict(image=handle_file(tmp_path / name), model=CLASSIFIER, api_name="/predict")
        for name in ("upright.png", "side.png")
    ]
    assert answers[0] == answers[1]


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to test the page (apt-get install chromium)")
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")
    with sync_playwright() as playwright:
        expect.set_options(timeout=20_000)  # two slow cores answer within that
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    page.goto(url)
    choose_model(page, CLASSIFIER)
    choose_example(page, "cross")
    expect(page.get_by_test_id("label-output-value")).to_have_text("cross")
    yield page
    page.close()


def choose_model(page: Page, name: str) -> None:
    """Types the name, as a visitor with a keyboard does, and waits until the page speaks of that model."""
    facts = {CLASSIFIER: "Tells apart: circle", SEGMENTER: "Finds the pixels of: shape"}.get(name, "onerror")
    box = page.get_by_label("Model", exact=True)
    box.fill(name)
    box.press("Enter")
    expect(page.get_by_label("About the model")).to_have_value(re.compile(facts))


def choose_example(page: Page, name: str) -> None:
    page.locator(".examples").get_by_role("button", name=name).click()


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def picture(page: Page, alt_text: str | re.Pattern) -> str:
    """The picture that is shown under an alternative text, as its data: URL."""
    image = page.get_by_alt_text(alt_text).filter(visible=True).first
    expect(image).to_be_visible()
    return image.get_attribute("src")


def predicted_label(page: Page) -> str:
    return page.get_by_test_id("label-output-value").inner_text().strip()


@pytest.mark.parametrize("seed", [4022, 4019, 4015])
def test_an_upload_shows_the_prediction(page: Page, tmp_path: Path, seed: int) -> None:
    scene = shapes.scene(seed, 256)
    scene.image.save(tmp_path / "scene.png")
    upload(page, tmp_path / "scene.png")
    expect(page.get_by_test_id("label-output-value")).to_have_text(shapes.CLASS_NAMES[scene.label])


def test_another_class_and_another_stage_change_the_map(page: Page) -> None:
    tab(page, "Grad-CAM")
    before = picture(page, re.compile("^Heatmap: evidence for .* at stage4"))
    page.get_by_label("Evidence for the class").click()
    page.get_by_role("option", name="triangle").click()
    other_class = picture(page, re.compile("^Heatmap: evidence for 'triangle' at stage4"))
    page.get_by_label("Read at the stage").click()
    page.get_by_role("option", name="stage2").click()
    other_stage = picture(page, re.compile("^Heatmap: evidence for 'triangle' at stage2"))
    assert len({before, other_class, other_stage}) == 3
    expect(page.locator(".scale").filter(visible=True)).to_have_text(re.compile(r"0\s+peak [\d.]+"))


def test_the_three_pictures_stand_in_one_row(page: Page) -> None:
    tab(page, "Grad-CAM")
    figures = page.locator(".figures.large figure").filter(visible=True)
    expect(figures).to_have_count(3)
    boxes = [figures.nth(i).bounding_box() for i in range(3)]
    assert len({round(box["y"]) for box in boxes}) == 1
    assert [box["x"] for box in boxes] == sorted(box["x"] for box in boxes)


def test_every_stage_of_a_unet_is_shown_with_its_caption(page: Page) -> None:
    choose_model(page, SEGMENTER)
    tab(page, "U-Net stages")
    model = checkpoint.load(ROOT / "checkpoints" / SEGMENTER)
    titles = page.locator(".figures figcaption strong").filter(visible=True)
    expect(titles).to_have_text(["Input", "Mask", *model.stages])
    last = page.locator("figure", has_text="decoder1").filter(visible=True)
    expect(last).to_contain_text("64 x 64, peak")
    expect(last).to_contain_text("the prediction itself")


def test_a_tab_that_does_not_fit_says_why(page: Page) -> None:
    tab(page, "U-Net stages")
    expect(page.get_by_text("This model is a classifier").filter(visible=True)).to_be_visible()
    assert page.locator("figure").filter(visible=True).count() == 0


def test_what_cannot_be_opened_is_a_sentence_and_leaves_no_old_answer(page: Page, tmp_path: Path) -> None:
    expect(page.get_by_test_id("label-output-value")).to_be_visible()
    (tmp_path / "photo.png").write_text("not a picture")
    upload(page, tmp_path / "photo.png")
    expect(page.get_by_text("not a picture")).to_be_visible()
    assert page.locator("figure").filter(visible=True).count() == 0
    choose_example(page, "star")
    expect(page.get_by_test_id("label-output-value")).to_have_text("star")


def test_an_unknown_model_is_a_sentence(page: Page) -> None:
    box = page.get_by_label("Model", exact=True)
    box.fill("no such model")
    box.press("Enter")
    expect(page.get_by_text("There is no model 'no such model'")).to_be_visible()
    choose_model(page, CLASSIFIER)


def test_names_from_strangers_are_shown_not_run(page: Page, hostile: Path) -> None:
    choose_model(page, str(hostile))
    tab(page, "Grad-CAM")
    expect(page.locator("figure strong").filter(visible=True).nth(1)).to_contain_text("Evidence for")
    assert page.title() == "cvlab"
    assert page.locator("figure img[src=x], .label img").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_accessibility_violation_on_any_tab(browser: Browser, url: str, theme: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{url}?__theme={theme}")
    choose_model(page, SEGMENTER)
    choose_example(page, "cross")
    for name in ("Predict", "Grad-CAM", "U-Net stages"):
        tab(page, name)
        expect(page.locator("figure").filter(visible=True).first).to_be_visible()
        violations = Axe().run(page).response["violations"]
        assert not [(each["id"], [node["html"] for node in each["nodes"]]) for each in violations], name
    page.close()


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(url)
    choose_model(page, SEGMENTER)
    choose_example(page, "cross")
    for name in ("Predict", "Grad-CAM", "U-Net stages"):
        tab(page, name)
        expect(page.locator("figure").filter(visible=True).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.close()


def test_the_page_asks_nobody_else(browser: Browser, url: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    choose_model(page, SEGMENTER)
    assert asked
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
    page.close()


def test_the_command_starts_a_server_that_answers(scene: Path) -> None:
    """`python app.py` as the README says, in a process of its own."""
    command = [sys.executable, "app.py", "--port", "7931"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        try:
            assert any("7931" in line for line in server.stdout)
            client = Client("http://127.0.0.1:7931", verbose=False)
            answer = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/predict")
            assert answer["label"] == shapes.CLASS_NAMES[shapes.scene(4003).label]
        finally:
            server.terminate()
