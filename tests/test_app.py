"""The page in a real Chromium and through its API: what a visitor and a program see."""

import csv
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import app
from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import class_score, explain, grad_cam, peak, predict
from cvlab.metrics import class_counts, segmentation_scores
from cvlab.models import build, probabilities
from cvlab.page.models import Models, offered_models
from cvlab.transforms import open_image, resize_logits, view
from cvlab.trust import Judgement, judge

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]
CLASSIFIER, SEGMENTER = "shapes-classifier", "shapes-segmenter"
TABS = ["Predict", "Lesson", "Grad-CAM", "U-Net stages", "Compare", "Break it", "Many pictures", "Report", "Audit"]
TABS.append("Code")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class names try to become HTML or a template, and whose card and report do so too."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "hostile"
    names = ["<img src=x onerror='document.title=1'>", "</strong><script>document.title=2</script>"]
    names.append("${document.title=3} {{document.title=4}} `${document.title=5}`")
    checkpoint.save(build("convnet", names, 32, {"widths": [4, 8]}), folder)
    (folder / "README.md").write_text("<script>document.title=6</script><img src=x onerror='document.title=7'>")
    (folder / "metrics.json").write_text('{"part": "<b onclick=x>", "n": [], "classes": {"<i>": 1}}')
    return folder


@pytest.fixture(scope="module")
def several(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of classes that exclude each other, which finds some of each in the scene."""
    torch.manual_seed(0)
    folder, names = tmp_path_factory.mktemp("models") / "several", ["background", "circle", "star", "cross"]
    model = build("unet", names, 32, {"width": 4, "depth": 2}, exclusive=True).eval()
    model.head.bias.data -= predict(model, view(open_image(scene), model)).mean((0, 2, 3))
    checkpoint.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def url(hostile: Path, several: Path) -> Iterator[str]:
    page = app.build_page(Models(offered_models(ROOT, [str(hostile), str(several)])))
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
        probs = probabilities(model, model(view(open_image(scene), model)))[0]
    assert answer["label"] == model.class_names[probs.argmax()] == shapes.CLASS_NAMES[shapes.scene(4003).label]
    found = {each["label"]: each["confidence"] for each in answer["confidences"]}
    assert found == pytest.approx(dict(zip(model.class_names, probs.tolist(), strict=True)), abs=1e-6)
    least = model.config["set_threshold"]
    assert set(answer["set"]) == {name for name, share in found.items() if share >= least} | {answer["label"]}
    assert answer["familiar"] is None  # nothing of other pictures is known to it


def test_predict_gives_a_segmenters_mask_and_its_numbers(client: Client, scene: Path) -> None:
    answer = client.predict(image=handle_file(scene), model=SEGMENTER, api_name="/predict")
    true = shapes.scene(4003, 256).mask.mean()
    assert answer["shares"]["shape"] == pytest.approx(true, rel=0.25)
    mask = answer["mask"]["path"] if isinstance(answer["mask"], dict) else answer["mask"]
    assert Image.open(mask).size == (512, 512)  # 256, enlarged by a whole factor to at least 320


def test_predict_gives_the_shares_of_the_objects_of_a_model_of_several_classes(
    client: Client, several: Path, scene: Path
) -> None:
    answer = client.predict(image=handle_file(scene), model=str(several), api_name="/predict")
    model = checkpoint.load(several)
    found = resize_logits(predict(model, view(open_image(scene), model)), (256, 256))[0].argmax(0)
    shares = {name: (found == i).float().mean().item() for i, name in enumerate(model.class_names) if i}
    assert answer["shares"] == pytest.approx(shares, abs=1e-3)
    covered = int(answer["numbers"].split()[3].replace(",", ""))  # "The mask covers 1,234 of 65,536 pixels"
    assert covered == pytest.approx((found > 0).sum().item(), abs=64)


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


def test_judge_gives_the_librarys_verdict(client: Client, scene: Path) -> None:
    level, sentence, checks = client.predict(
        image=handle_file(scene), model=CLASSIFIER, class_name="star", stage="stage3", api_name="/judge"
    )
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    images, star = view(open_image(scene), model), model.class_names.index("star")
    verdict = judge(model, images, grad_cam(model, images, star, "stage3")[1], star, stage="stage3")
    assert (level, sentence, list(checks)) == (verdict.level, verdict.sentence, list(verdict.checks))
    for name, check in verdict.checks.items():
        assert checks[name]["value"] == pytest.approx(float(check.value), abs=1e-3)


def test_many_equal_questions_at_once_get_equal_pictures(client: Client, scene: Path) -> None:
    """Files of equal content must not be written over each other while they are read."""

    def ask(_: int) -> bytes:
        paths = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/grad_cam")[:3]
        return b"".join(Path(path).read_bytes() for path in paths)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(16)))) == 1


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


@pytest.fixture(scope="module")
def visit(browser: Browser, url: str) -> Iterator[Page]:
    """One page for all tests: each opens it anew, so that no answer to an earlier one is still on its way."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    yield page
    page.close()


@pytest.fixture
def page(visit: Page, url: str) -> Page:
    """The page with the classifier and a scene that shows a cross, answered."""
    visit.goto(f"{url}?model={CLASSIFIER}")
    shown = visit.locator("figure img").filter(visible=True).first
    expect(shown).to_be_visible()
    before = shown.get_attribute("src")
    choose_example(visit, "cross")
    expect(shown).not_to_have_attribute("src", before)
    expect(likeliest(visit)).to_have_text("cross")
    return visit


@pytest.fixture
def unet(visit: Page, url: str, scene: Path) -> Page:
    """The page with the segmenter, in its tab, and the scene, answered."""
    visit.goto(f"{url}?model={SEGMENTER}")
    tab(visit, "U-Net stages")
    visit.get_by_text("stages by both methods").click()
    title = visit.get_by_text("Evidence for “shape” in the whole mask; score").filter(visible=True)
    expect(title).to_be_visible()
    before = title.text_content()
    upload(visit, scene)
    expect(title).not_to_have_text(before)
    return visit


def choose_model(page: Page, name: str) -> None:
    """Types the name, as a visitor with a keyboard does, and waits until the page speaks of that model."""
    facts = {CLASSIFIER: "Tells apart: circle", SEGMENTER: "Finds the pixels of: shape"}.get(name, "onerror")
    box = page.get_by_label("Model", exact=True)
    box.fill(name)
    box.press("Enter")
    expect(page.locator("[data-name=about]")).to_contain_text(facts)


def likeliest(page: Page) -> Locator:
    return page.locator("caption ~ tbody th").filter(visible=True).first


def choose_example(page: Page, name: str) -> None:
    page.locator(".examples").get_by_role("button", name=name).click()


def choose(page: Page, label: str, option: str) -> None:
    choices(page, label).get_by_role("option", name=option, exact=True).click()


def choices(page: Page, label: str) -> Locator:
    """The list under a box, opened; that of another box may still be closing."""
    box = page.get_by_label(label, exact=True)
    box.click()
    return page.locator(f"[id='{box.get_attribute('aria-controls')}']")


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()
    expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")


def picture(page: Page, alt_text: str | re.Pattern) -> str:
    """The picture that is shown under an alternative text, as its data: URL."""
    image = page.get_by_alt_text(alt_text).filter(visible=True).first
    expect(image).to_be_visible()
    return image.get_attribute("src")


def figures(page: Page) -> Locator:
    return page.locator("figure").filter(visible=True)


def test_an_upload_shows_the_prediction(page: Page, tmp_path: Path) -> None:
    drawn = shapes.scene(4022, 256)
    drawn.image.save(tmp_path / "scene.png")
    choose_example(page, "star")
    expect(likeliest(page)).to_have_text("star")
    upload(page, tmp_path / "scene.png")
    expect(likeliest(page)).to_have_text(shapes.CLASS_NAMES[drawn.label])


def test_what_is_asked_changes_the_map_and_how_it_is_drawn_the_picture(page: Page) -> None:
    tab(page, "Grad-CAM")
    seen = [picture(page, re.compile("^Heatmap: Evidence for “cross” at stage4"))]
    page.get_by_text("Details", exact=True).filter(visible=True).click()
    expect(page.locator(".scale").filter(visible=True)).to_have_text(re.compile(r"^0\s+[\d.]+ logits$"))
    choose(page, "Evidence for the class", "triangle")
    seen.append(picture(page, "Heatmap: Evidence for “triangle” at stage4"))
    choose(page, "Rather than", "cross")
    seen.append(picture(page, "Heatmap: Evidence for “triangle” rather than “cross” at stage4"))
    page.get_by_label("Show the evidence against it instead").check()
    seen.append(picture(page, "Heatmap: Evidence against “triangle” rather than “cross” at stage4"))
    choose(page, "Read at the stage", "stage2")
    seen.append(picture(page, "Heatmap: Evidence against “triangle” rather than “cross” at stage2"))
    choose(page, "Method", "HiResCAM")
    expect(page.get_by_text("HiResCAM at stage2")).to_be_visible()  # what was unfolded stays open
    seen.append(picture(page, re.compile("^Heatmap")))
    page.get_by_role("button", name="Colours").click()
    choose(page, "Colour map", "jet (as in older reports)")
    drawn = page.get_by_alt_text(re.compile("^Heatmap")).filter(visible=True)
    expect(drawn).not_to_have_attribute("src", seen[-1])
    assert len(set(seen)) == len(seen)
    page.get_by_label("Show the evidence against it instead").uncheck()
    page.get_by_role("button", name="Colours").click()


def checked(page: Page) -> Locator:
    """The chip of the verdict; while others ask it is given on request."""
    expect(page.locator("#chip .chip svg, #chip .ask")).to_be_visible()
    if page.locator("#chip .ask").is_visible():
        page.locator("#chip .ask").click()
    expect(page.locator("#chip .chip svg")).to_be_visible()
    return page.locator("#chip .chip")


def test_the_verdict_on_the_marked_spot_stands_beside_the_answer(page: Page, scene: Path) -> None:
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    images = view(open_image(scene), model)
    verdict = judge(model, images, grad_cam(model, images)[1], stage="stage4")
    tab(page, "Grad-CAM")
    heatmap = page.get_by_alt_text(re.compile("^Heatmap")).filter(visible=True)
    before = heatmap.get_attribute("src")
    upload(page, scene)
    expect(heatmap).not_to_have_attribute("src", before)
    expect(checked(page)).to_have_text(verdict.sentence.split(":")[0])
    expect(page.locator(".chip.good")).to_have_count(int(verdict.level == "believable"))
    reasons = page.locator("[data-name=reasons]").filter(visible=True)
    reasons.locator("summary").first.click()
    expect(reasons).to_contain_text(verdict.checks["marked spot"].sentence)
    reasons.get_by_text("Details").click()
    expect(reasons).to_contain_text(verdict.checks["hidden parts"].sentence)
    before = heatmap.get_attribute("src")
    page.get_by_role("button", name="Colours").click()
    choose(page, "Colour map", "jet (as in older reports)")
    expect(heatmap).not_to_have_attribute("src", before)
    expect(reasons).to_contain_text(verdict.checks["hidden parts"].sentence)  # another colour is no other map
    choose(page, "Read at the stage", "stage2")
    expect(page.get_by_text(verdict.checks["hidden parts"].sentence)).to_have_count(0)
    choose(page, "Colour map", "inferno")


def test_the_check_of_an_old_question_is_dropped(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(page)
    judged, go_on = [], threading.Event()

    def slow(*arguments: object) -> Judgement:
        judged.append(arguments[-1])
        go_on.wait(30)
        return judge(*arguments)

    monkeypatch.setattr("cvlab.page.visit.judge", slow)
    monkeypatch.setattr("cvlab.page.visit.QUIET", 0)
    monkeypatch.setattr("cvlab.page.visit.SECONDS", 1000)
    tab(page, "Grad-CAM")
    for stage in ("stage1", "stage2", "stage3"):
        choose(page, "Read at the stage", stage)
        picture(page, re.compile(f"^Heatmap: Evidence for “cross” at {stage}"))
        expect(page.locator("#chip .chip")).to_contain_text("Checking")
        page.wait_for_timeout(500)  # its check waits for that of stage1 by then
    go_on.set()
    expect(page.locator("#chip .chip svg")).to_be_visible()
    assert judged == ["stage1", "stage3"]


def test_every_stage_of_a_unet_is_shown_by_both_methods(unet: Page) -> None:
    model = checkpoint.load(ROOT / "checkpoints" / SEGMENTER)
    titles = unet.locator(".pair > h3").filter(visible=True)
    expect(titles).to_have_text([re.compile(f"^{stage}, ") for stage in model.stages])
    expect(unet.locator(".pairs figure")).to_have_count(2 * len(model.stages))
    last = unet.locator(".pair").filter(visible=True).last
    expect(last).to_contain_text("Tautology")
    expect(last).to_contain_text("Grad-CAM: This stage's map hardly depends on the region (r = 1.00)")
    expect(unet.locator("figcaption", has_text=re.compile(r"peak .* logits, r\s=\s-?\d\.\d\d"))).to_have_count(
        2 * len(model.stages)
    )
    parts = unet.locator("table.facts").filter(visible=True)
    values = [float(text) for text in parts.locator("td:nth-child(2)").all_inner_texts()]
    assert sum(values[:-1]) == pytest.approx(values[-1], rel=0.02)  # printed with three digits
    assert parts.locator("tr td:first-child").all_inner_texts()[-2:] == ["biases", "score"]


def test_a_click_asks_about_a_part_and_a_drag_about_a_box(unet: Page) -> None:
    inside = np.argwhere(shapes.scene(4003, 64).mask)
    y, x = inside[len(inside) // 2]
    picker = unet.locator(".picker").filter(visible=True)
    box = picker.bounding_box()
    picker.click(position={"x": (x + 0.5) / 64 * box["width"], "y": (y + 0.5) / 64 * box["height"]})
    expect(unet.get_by_text(f"in the part of the mask at {x},{y}; score").filter(visible=True)).to_be_visible()
    expect(unet.get_by_label("Places")).to_have_value(f"{x},{y}")
    picker.scroll_into_view_if_needed()
    box = picker.bounding_box()
    unet.mouse.move(box["x"] + 10, box["y"] + 10)
    unet.mouse.down()
    unet.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    unet.mouse.up()
    expect(unet.get_by_text("Evidence for “shape” in the box; score").filter(visible=True)).to_be_visible()
    assert re.fullmatch(r"\d,\d 3[12],3[12]", unet.get_by_label("Places").input_value())


@pytest.fixture
def classes(visit: Page, url: str, several: Path, scene: Path) -> Page:
    """The page with a segmenter of several classes and the scene, answered."""
    visit.goto(f"{url}?model={several}")
    legend = visit.locator("#first .legend")
    expect(legend).to_be_visible()
    before = legend.text_content()
    upload(visit, scene)
    expect(legend).not_to_have_text(before)
    return visit


def place_of(several: Path, scene: Path, class_idx: int) -> tuple[int, int]:
    """A pixel (x, y) of the view that the model finds to be of a class, surer than any other of that class."""
    model = checkpoint.load(several)
    probs = probabilities(model, predict(model, view(open_image(scene), model)))[0, class_idx]
    y, x = divmod(int(probs.argmax()), 32)
    return x, y


def click_at(picker: Locator, x: int, y: int, side: int) -> None:
    box = picker.bounding_box()
    picker.click(position={"x": (x + 0.5) / side * box["width"], "y": (y + 0.5) / side * box["height"]})


def test_the_legend_turns_outlines_off_and_on_in_the_browser_alone(classes: Page, several: Path, scene: Path) -> None:
    boxes, outlines = classes.locator("#first .legend input"), classes.locator("#first path[class^=of]")
    expect(boxes).to_have_count(3)
    expect(outlines).to_have_count(3)
    checked(classes)  # nothing more is on its way
    assert violations(classes) == []
    asked: list[str] = []
    classes.on("request", lambda request: asked.append(request.url))
    star = classes.get_by_role("checkbox", name=re.compile(r"^star \d+%$")).filter(visible=True)
    star.focus()
    classes.keyboard.press("Space")
    lines = [classes.locator(f"#first path.of{i}") for i in range(3)]
    expect(lines[1]).to_be_hidden()
    expect(lines[1].locator("xpath=preceding-sibling::*[1]")).to_be_hidden()  # the black line under it
    expect(lines[0]).to_be_visible()
    expect(lines[2]).to_be_visible()
    assert [url for url in asked if "queue" in url or "call" in url] == []
    click_at(classes.locator("#first .picker"), *place_of(several, scene, 1), 32)
    expect(classes.locator("#first path.asked")).to_be_visible()
    expect(star).not_to_be_checked()  # whatever is drawn next
    expect(lines[1]).to_be_hidden()
    tab(classes, "U-Net stages")
    expect(star).not_to_be_checked()
    star.check()
    expect(classes.locator("path.of1").filter(visible=True)).to_be_visible()


def test_a_click_chooses_the_class_that_is_there(classes: Page, several: Path, scene: Path) -> None:
    names, picker = checkpoint.load(several).class_names, classes.locator("#first .picker")
    for i in (1, 2, 3):
        x, y = place_of(several, scene, i)
        click_at(picker, x, y, 32)
        expect(classes.locator("#sentence h2")).to_contain_text(re.compile(f"^{names[i]} found", re.IGNORECASE))
    x, y = place_of(several, scene, 0)
    click_at(picker, x, y, 32)
    expect(classes.locator("#sentence")).to_contain_text(f"the pixel at {x},{y}")
    tab(classes, "Grad-CAM")
    expect(classes.get_by_label("Evidence for the class")).to_have_value(names[3])
    choose(classes, "Rather than", "background")
    expect(classes.locator("figure strong").filter(visible=True).first).to_have_text(
        f"Evidence for “{names[3]}” rather than “background” in the pixel at {x},{y}"
    )


def test_the_keyboard_alone_asks_about_a_place(unet: Page) -> None:
    picker = unet.locator(".picker").filter(visible=True)
    picker.focus()
    for _ in range(3):
        unet.keyboard.press("ArrowRight")
    unet.keyboard.press("Enter")
    expect(unet.get_by_label("Places")).to_have_value("38,32")
    expect(unet.locator("#sentence")).to_contain_text("38,32")
    expect(picker).to_be_focused()  # the arrow keys go on from there
    unet.get_by_label("Places").fill("3,4")
    unet.keyboard.press("Enter")
    expect(unet.get_by_text(re.compile("at 3,4")).filter(visible=True).first).to_be_visible()
    unet.get_by_label("Places").fill("nowhere")
    unet.keyboard.press("Enter")
    expect(unet.get_by_text("write it as x,y").filter(visible=True)).to_be_visible()
    mask = picker.locator(".edge")
    before = mask.get_attribute("d")
    unet.get_by_role("slider", name="Threshold").press("End")
    expect(mask).not_to_have_attribute("d", before)


def test_a_true_mask_gives_iou_and_where_it_is_wrong(unet: Page, scene: Path, tmp_path: Path) -> None:
    true = np.roll(shapes.scene(4003, 256).mask, 20, axis=1)
    Image.fromarray(true.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    unet.get_by_role("button", name="Compare with the true mask").click()
    unet.locator("#true-mask input[type=file]").set_input_files(tmp_path / "mask.png")
    model = checkpoint.load(ROOT / "checkpoints" / SEGMENTER)
    logits = torch.nn.functional.interpolate(
        predict(model, view(open_image(scene), model)), (256, 256), mode="bilinear"
    )
    scores = segmentation_scores(class_counts(logits > 0, torch.from_numpy(true)[None, None]).sum(1))
    expect(unet.get_by_text(f"iou {scores['iou']:.3f}").filter(visible=True)).to_be_visible()
    expect(unet.locator("figure", has_text="Why missed").filter(visible=True)).to_contain_text("Evidence against")
    choose(unet, "Ask about", "what was wrongly found (needs the true mask)")
    expect(unet.get_by_text("in what was wrongly found; score").filter(visible=True)).to_be_visible()
    unet.locator("#true-mask").get_by_label("Remove Image").click()


def test_a_tab_that_does_not_fit_says_why(page: Page) -> None:
    tab(page, "U-Net stages")
    expect(page.get_by_text("This model is a classifier").filter(visible=True)).to_be_visible()
    assert figures(page).count() == 0


def test_two_models_and_two_pictures_are_compared(page: Page, scene: Path) -> None:
    tab(page, "Compare")
    choose(page, "Second model", "flowers")
    expect(page.get_by_text(re.compile(r"^Agreement of the two maps: r = -?\d\.\d\d;"))).to_be_visible()
    expect(figures(page)).to_have_count(3)
    before = picture(page, f"Heat of {CLASSIFIER} minus heat of flowers")
    choose_example(page, "star")  # another photo is compared, too
    expect(page.get_by_alt_text(f"Heat of {CLASSIFIER} minus")).not_to_have_attribute("src", before)
    choose(page, "Second model", "(the same)")
    page.locator("#second input[type=file]").set_input_files(scene)
    expect(page.get_by_text("the peaks of the two pictures can be compared")).to_be_visible()
    expect(figures(page)).to_have_count(2)


def test_the_report_tells_what_the_folder_holds(page: Page) -> None:
    tab(page, "Report")
    expect(page.locator("table.facts").filter(visible=True, has_text="0.9920")).to_be_visible()
    picture(page, re.compile("^Confusion matrix"))
    expect(page.get_by_text("python train/classifier.py --out").filter(visible=True)).to_be_visible()
    page.get_by_text("The model's card").click()
    expect(page.locator("pre.card")).to_contain_text("## Limits")
    choose(page, "Second model beside it", "flowers")
    expect(page.get_by_role("heading", name="flowers")).to_be_visible()
    expect(page.get_by_role("heading", name="Scores")).to_have_count(2)
    expect(page.get_by_text("No difference: ")).to_be_visible()
    tab(page, "Audit")
    expect(page.get_by_text("python train/audit.py FOLDER --data DIR")).to_be_visible()


def test_the_report_makes_a_model_that_runs_without_torch(page: Page, scene: Path) -> None:
    tab(page, "Report")
    page.get_by_role("button", name="Make model.onnx").click()
    with page.expect_download(timeout=60_000) as download:
        page.locator("a[download='model.onnx']").click(timeout=60_000)
    session = onnxruntime.InferenceSession(str(download.value.path()))
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    images = view(open_image(scene), model)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert logits == pytest.approx(predict(model, images).numpy(), abs=1e-3)


def break_it(browser: Browser, url: str, model: str, **options: object) -> tuple[Page, Locator]:
    """A page of its own with the tab, and its picture."""
    page = browser.new_page(**options)
    page.goto(f"{url}?model={model}")
    tab(page, "Break it")
    picker = page.locator("#canvas .picker")
    expect(picker).to_be_visible()
    return page, picker


def test_a_part_is_erased_by_mouse_and_the_whole_page_answers_about_it(browser: Browser, url: str) -> None:
    page, picker = break_it(browser, url, CLASSIFIER)
    page.get_by_role("button", name="Erase").click()
    expect(page.locator("#told")).to_contain_text("Choose a part")
    expect(page.locator("#told [aria-live]").or_(page.locator("#told[aria-live]"))).to_have_count(1)
    box = picker.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 5, box["y"] + box["height"] - 5)
    page.mouse.up()
    expect(picker.locator("path.asked")).to_have_count(1)
    before = page.locator("#sentence").inner_text()
    page.get_by_role("button", name="Erase").click()
    expect(page.get_by_role("cell", name=re.compile("^Erased"))).to_be_visible()
    expect(page.locator("#sentence")).not_to_have_text(before)
    page.get_by_role("button", name="Start again").click()
    expect(page.locator("#sentence")).to_have_text(before)
    page.close()


def test_a_part_is_erased_by_keyboard_alone(browser: Browser, url: str) -> None:
    page, picker = break_it(browser, url, SEGMENTER)
    picker.press("ArrowLeft")
    picker.press("Enter")
    expect(picker.locator("path.asked")).to_have_count(1)
    page.get_by_role("button", name="Erase").press("Enter")
    expect(page.get_by_role("cell", name=re.compile("^Erased"))).to_be_visible()
    page.get_by_role("button", name="Undo").press("Enter")
    expect(page.get_by_role("cell", name=re.compile("^Erased"))).to_have_count(0)
    page.close()


def test_a_part_is_moved_by_touch_on_a_phone(browser: Browser, url: str) -> None:
    page, picker = break_it(browser, url, SEGMENTER, viewport={"width": 390, "height": 844}, has_touch=True)
    for place, tool, done in ((0.5, "Cut", "Cut out"), (0.2, "Paste", "Pasted over")):
        picker.scroll_into_view_if_needed()
        box = picker.bounding_box()
        page.touchscreen.tap(box["x"] + place * box["width"], box["y"] + place * box["height"])
        expect(picker.locator("path.asked")).to_have_count(1)
        page.get_by_role("button", name=tool, exact=True).tap()
        expect(page.get_by_role("cell", name=re.compile(f"^{done}"))).to_be_visible()
    page.close()


def test_many_pictures_become_a_gallery_and_a_table(page: Page, scene: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("not a picture")
    names = [f"{letter}.png" for letter in "cdefg"]
    for i, name in enumerate(names):
        shapes.scene(4015 + i, 128).image.save(tmp_path / name)
    tab(page, "Many pictures")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose pictures").click()
    chooser.value.set_files([scene, *(tmp_path / name for name in ("b.txt", *names))])
    expect(page.get_by_text("7 pictures.")).to_be_visible()
    expect(figures(page)).to_have_count(6)
    with page.expect_download() as download:
        page.locator("a[download='table.csv']").click()
    rows = list(csv.DictReader(Path(download.value.path()).read_text("utf-8-sig").splitlines()))
    assert [row["file"] for row in rows] == [scene.name, "b.txt", *names]
    page.get_by_text("All in a table").click()
    sort, shares = page.get_by_role("button", name="share"), page.locator(".rows td:nth-child(4)")
    for order in ("ascending", "descending"):
        sort.press("Enter")
        expect(page.get_by_role("columnheader", name="share")).to_have_attribute("aria-sort", order)
        shown = [float(text or 0) for text in shares.all_inner_texts()]
        assert shown == sorted(shown, reverse=order == "descending")
    for act in (  # by mouse on a row, by keyboard at a row, by mouse on a figure, by keyboard at it
        lambda: page.get_by_role("cell", name="e.png", exact=True).click(),
        lambda: page.locator(".rows").get_by_role("button", name="Open d.png").press("Enter"),
        lambda: (
            page.locator("#gallery figure", has=page.get_by_label("Open e.png", exact=True)).locator(".pic").click()
        ),
        lambda: page.locator("#gallery figure").get_by_role("button", name="Open c.png").press("Enter"),
    ):
        before = page.locator("#first .heat").get_attribute("src")
        act()
        expect(page.get_by_role("tab", name="Predict")).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tab", name="Predict")).to_be_focused()
        expect(page.locator("#first .heat")).not_to_have_attribute("src", before)
        tab(page, "Many pictures")


def test_the_pictures_of_a_folder_are_named_after_it_and_one_is_opened_by_touch(
    browser: Browser, url: str, tmp_path: Path
) -> None:
    scenes = {scene.label: scene.image for scene in (shapes.scene(seed, 128) for seed in range(4015, 4035))}
    for label, name in enumerate(("circle", "cross")):
        (tmp_path / name).mkdir()
        scenes[label].save(tmp_path / name / "1.png")
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(f"{url}?model={CLASSIFIER}")
    expect(page.locator("[data-name=about]")).to_contain_text("Tells apart: circle")
    tab(page, "Many pictures")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose a folder").tap()
    chooser.value.set_files(tmp_path)
    expect(page.get_by_text("Mistakes: 0 of 2")).to_be_visible()
    page.locator("#gallery figure", has=page.get_by_label("Open cross_1.png")).locator(".pic").tap()
    expect(page.locator("#sentence")).to_contain_text("Cross, ")
    page.close()


def test_a_link_restores_model_and_settings(page: Page, url: str) -> None:
    page.goto(f"{url}?model={CLASSIFIER}&class_name=star&stage=stage2&method=hires_cam&colormap=jet&opacity=oops")
    tab(page, "Grad-CAM")
    picture(page, "Heatmap: Evidence for “star” at stage2")
    expect(page.locator("[data-name=why]").filter(visible=True)).to_contain_text("HiResCAM at stage2")
    choose(page, "Read at the stage", "stage3")
    picture(page, "Heatmap: Evidence for “star” at stage3")
    link = f"?model={CLASSIFIER}&example=flower&class_name=star&stage=stage3&method=hires_cam&colormap=jet"
    expect(page.get_by_role("link", name="Link to this model")).to_have_attribute("href", link)
    expect(page).to_have_url(url + link)


def test_a_link_restores_an_example_too(page: Page, url: str) -> None:
    page.goto(f"{url}?model={CLASSIFIER}&example=star")
    expect(likeliest(page)).to_have_text("star")
    expect(page.locator(".question-link")).to_have_attribute("href", f"?model={CLASSIFIER}&example=star")


def test_a_saved_page_shows_the_same_answer_without_the_server(page: Page, browser: Browser, tmp_path: Path) -> None:
    checked(page)
    told, heat = page.locator("#sentence h2").inner_text(), page.locator("#first .heat").get_attribute("src")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as a page").click()
    download.value.save_as(tmp_path / "saved.html")
    alone = browser.new_page(offline=True, java_script_enabled=False)
    alone.goto(f"file://{tmp_path / 'saved.html'}")
    expect(alone.locator("h2").first).to_have_text(told)
    assert alone.locator(".heat").first.get_attribute("src") == heat
    expect(alone.locator(".chip")).to_be_visible()
    expect(alone.get_by_text("checkpoint.load('checkpoints/shapes-classifier')")).to_be_visible()
    alone.close()


def test_the_code_makes_the_map_that_is_shown(
    page: Page, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tab(page, "Grad-CAM")
    choose(page, "Evidence for the class", "star")
    choose(page, "Read at the stage", "stage3")
    picture(page, "Heatmap: Evidence for “star” at stage3")
    tab(page, "Code")
    lines = page.locator("pre.code").inner_text()
    (photo,) = re.findall(r"open_image\('(.*?)'\)", lines)
    shapes.scene(4022, 256).image.save(tmp_path / photo)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    names: dict = {}
    exec(lines, names)
    model = checkpoint.load(ROOT / "checkpoints" / CLASSIFIER)
    score = class_score(model.class_names.index("star"))
    expected = explain(model, view(shapes.scene(4022, 256).image, model), score, ["stage3"]).maps["grad_cam"]["stage3"]
    assert (names["attribution"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_cannot_be_opened_is_a_sentence_and_leaves_no_old_answer(page: Page, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("not a picture")
    upload(page, tmp_path / "photo.png")
    expect(page.get_by_text("Photo.png is not a picture")).to_be_visible()
    assert figures(page).count() == 0
    choose_example(page, "star")
    expect(likeliest(page)).to_have_text("star")


def test_an_unknown_model_is_a_sentence(page: Page) -> None:
    box = page.get_by_label("Model", exact=True)
    box.fill("no such model")
    box.press("Enter")
    expect(page.get_by_text("There is no model “no such model”")).to_be_visible()


def test_names_from_strangers_are_shown_not_run(page: Page, hostile: Path) -> None:
    choose_model(page, str(hostile))
    tab(page, "Grad-CAM")
    expect(page.locator("figure strong").filter(visible=True).first).to_contain_text("Evidence for")
    for option in range(3):
        choices(page, "Evidence for the class").get_by_role("option").nth(1 + option).click()
    expect(page.locator("figure strong").filter(visible=True).first).to_contain_text("{{document.title=4}}")
    tab(page, "Report")
    page.get_by_text("The model's card").click()
    expect(page.locator("pre.card")).to_contain_text("<script>document.title=6</script>")
    assert page.title() == "cvlab"
    assert page.locator("figure img[src=x], .label img, pre img").count() == 0


def test_no_accessibility_violation_in_any_tab_and_state(
    browser: Browser, url: str, scene: Path, tmp_path: Path
) -> None:
    """With everything unfolded, light at a desk and dark on a phone, for both kinds of model."""
    page = browser.new_page()

    def check(state: str) -> None:
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        for (width, height), dark in (((1366, 768), False), ((390, 844), True)):
            page.set_viewport_size({"width": width, "height": height})
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            assert violations(page) == [], (state, width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (state, width)

    page.goto(f"{url}?__theme=light&model={SEGMENTER}")
    checked(page)
    page.get_by_role("button", name="Colours").click()
    for name in TABS:
        tab(page, name)
        if name == "U-Net stages":
            page.get_by_role("button", name="Compare with the true mask").click()
        if name == "Compare":
            page.locator("#second input[type=file]").set_input_files(scene)
        if name == "Many pictures":
            with page.expect_file_chooser() as chooser:
                page.get_by_role("button", name="Choose pictures").click()
            chooser.value.set_files([scene, __file__])
        shown = page.locator({"Code": "pre.code", "Audit": "p:text('Does it cheat?')"}.get(name, "figure"))
        expect(shown.filter(visible=True).first).to_be_visible()
        check(name)
    tab(page, "Predict")
    choose_model(page, CLASSIFIER)
    checked(page)
    check("a classifier")
    page.get_by_role("button", name="Enlarge or save").filter(visible=True).first.click()
    check("enlarged")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Camera", exact=True).click()
    (tmp_path / "none.png").write_text("not a picture")
    upload(page, tmp_path / "none.png")
    expect(page.get_by_text("None.png is not a picture")).to_be_visible()
    check("no picture")
    page.close()


def violations(page: Page, **options: object) -> list:
    """What axe finds; again after a while if something was still fading in, and pale."""
    for _ in range(4):
        if not (found := Axe().run(page, options=options or None).response["violations"]):
            break
        page.wait_for_timeout(500)
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


@pytest.mark.parametrize("model", [CLASSIFIER, SEGMENTER])
def test_the_whole_answer_is_in_the_first_screen_with_all_tabs_in_one_row(
    browser: Browser, url: str, model: str
) -> None:
    page = browser.new_page()
    page.goto(f"{url}?model={model}")
    checked(page)
    expect(page.locator("#sentence").locator("xpath=descendant-or-self::*[@aria-live='polite']")).to_contain_text("%")
    for width, height in ((1366, 768), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        for part in ("#sentence h2", ".chip", "[role=tablist]", "#first .pic", "#first .fade input", ".bars"):
            box = page.locator(part).filter(visible=True).last.bounding_box()
            assert box["y"] + box["height"] <= height, part
            assert box["x"] + box["width"] <= width, part
        tabs = page.evaluate("[...document.querySelectorAll('[role=tab]')].map(tab => tab.getBoundingClientRect())")
        assert len({box["y"] for box in tabs}) == 1
        assert [box["x"] for box in tabs] == sorted(box["x"] for box in tabs)
    code = page.get_by_role("tab", name="Code")  # on the phone it is reached by scrolling the row
    code.press("Enter")
    expect(code).to_be_in_viewport()
    expect(page.locator("pre.code")).to_be_visible()
    page.close()


def test_the_slider_goes_from_the_photo_to_the_heat_in_all_tabs(page: Page) -> None:
    def opacity() -> float:
        return float(
            page.locator(".heat").filter(visible=True).first.evaluate("image => getComputedStyle(image).opacity")
        )

    slider = page.get_by_role("slider", name="From the photo to heat").filter(visible=True)
    assert opacity() == pytest.approx(0.7)
    slider.press("Home")
    assert opacity() == 0
    slider.press("End")
    assert opacity() == 1
    slider.press("ArrowLeft")
    tab(page, "Grad-CAM")
    expect(figures(page).first).to_be_visible()
    expect(slider).to_have_value("99")
    assert opacity() == pytest.approx(0.99)


def test_a_picture_is_enlarged_and_saved_with_its_caption(page: Page) -> None:
    page.get_by_role("button", name="Enlarge or save").filter(visible=True).click()
    shown = page.get_by_role("dialog").locator(".pic")
    before = shown.bounding_box()["width"]
    page.get_by_role("button", name="Larger").click()
    assert shown.bounding_box()["width"] == pytest.approx(1.5 * before, rel=0.01)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    saved = Image.open(download.value.path())
    assert saved.width == 1024 < saved.height  # the scene is square, and the caption is below it
    photo = np.asarray(shapes.scene(4022, 256).image.resize((1024, 1024)), float)
    drawn = np.asarray(saved.convert("RGB"), float)[:1024]
    assert np.abs(drawn - photo).mean() < 60 < np.abs(drawn - photo).max()  # the photo, and heat somewhere on it
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_picture_that_is_dropped_anywhere_is_the_photo(page: Page, scene: Path) -> None:
    drop = """content => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(content)], 'scene.png', {type: 'image/png'}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
    }"""
    page.evaluate(drop, list(scene.read_bytes()))
    expect(likeliest(page)).to_have_text(shapes.CLASS_NAMES[shapes.scene(4003).label])


FILMING = "[...document.querySelectorAll('video')].some(video => video.videoWidth && video.readyState >= 2)"


def test_the_camera_takes_the_photo(page: Page) -> None:
    shown = page.locator("#first .heat")
    before = shown.get_attribute("src")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_label("Click to Access Webcam").or_(page.get_by_text("Click to Access Webcam")).first.click()
    expect(page.get_by_label("capture photo")).to_be_visible()
    page.wait_for_function(FILMING)  # before its first picture a camera gives none
    page.get_by_label("capture photo").click()
    expect(shown).not_to_have_attribute("src", before)
    expect(page.get_by_label("capture photo")).to_be_hidden()


def test_the_live_camera_is_answered_frame_after_frame_until_it_is_stopped(page: Page) -> None:
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("button", name="Live camera").click()
    heat = page.locator("#live .heat")
    for _ in range(2):  # the picture of Chromium's camera moves
        before = heat.get_attribute("src", timeout=20_000)
        expect(heat).not_to_have_attribute("src", before)
    expect(page.locator("#live [data-scale]")).to_contain_text("%")
    assert violations(page) == []
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Live camera")).to_be_visible()


def test_a_phone_needs_no_sideways_scrolling(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(f"{url}?model={SEGMENTER}")
    choose_example(page, "cross")
    for name in TABS:
        tab(page, name)
        if name in TABS[:4]:
            expect(figures(page).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.close()


def test_the_page_asks_nobody_else(browser: Browser, url: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    choose_model(page, SEGMENTER)
    for name in TABS:
        tab(page, name)
    assert asked
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
    page.close()


def test_the_command_starts_a_server_that_answers_and_leaves_nothing_behind(scene: Path, tmp_path: Path) -> None:
    """`python app.py` as the README says, in a process of its own."""
    command, env = [sys.executable, "app.py", "--port", "7931"], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        try:
            assert any("7931" in line for line in server.stdout)
            client = Client("http://127.0.0.1:7931", verbose=False)
            answer = client.predict(image=handle_file(scene), model=CLASSIFIER, api_name="/predict")
            assert answer["label"] == shapes.CLASS_NAMES[shapes.scene(4003).label]
        finally:
            server.terminate()
    assert list(tmp_path.glob("cvlab-*")) == []  # what the page writes for itself goes with it


def test_the_page_starts_without_the_libraries_that_it_needs_later() -> None:
    lines = (
        "import sys, app; print([name for name in ('timm', 'torchvision', 'scipy', 'sklearn') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
