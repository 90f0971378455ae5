"""The lesson: what it teaches is so, and its five steps are gone through by mouse, keyboard and touch."""

import os
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from captum.attr import LayerGradCam
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import app
from cvlab.data import shapes
from cvlab.data.parts import SHAPES_SEEDS
from cvlab.explain import channel_maps, class_score, predict
from cvlab.models import Model, probabilities
from cvlab.page import lesson
from cvlab.page.breaking import heat_in
from cvlab.page.lesson import BELIEVED, CLASSIFIER, FOOLED, GUESSED, REFUTED, TAKEN_APART, turn
from cvlab.page.models import Models, offered_models
from cvlab.page.question import Question
from cvlab.page.visit import Answer, Visits
from cvlab.transforms import WHOLE, view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def visits() -> Visits:
    return Visits(Models(offered_models(app.ROOT, [])))


def ask(visits: Visits, seed: int) -> Answer:
    return visits.ask(lesson.scene_file(seed), CLASSIFIER, Question())


def go(visits: Visits, did: str, place: list, points: list = ()) -> dict:
    return turn(visits, did, points, place, lambda picture: picture)


def text(shown: dict) -> str:
    return re.sub(r"\s+", " ", re.sub("<.*?>", " ", shown["lesson"]))


def test_the_scenes_were_not_trained_on() -> None:
    shown = {*GUESSED, TAKEN_APART, BELIEVED, REFUTED, *(seed for seed, _ in FOOLED)}
    assert not shown & {seed for seeds in SHAPES_SEEDS.values() for seed in seeds}


def test_the_channels_together_are_grad_cam(classifier: Model, images: torch.Tensor) -> None:
    for name, stage in classifier.stages.items():
        maps = channel_maps(classifier, images, class_score(1), name)
        known = LayerGradCam(classifier, stage.module).attribute(images, 1)
        assert torch.allclose(maps.sum(1, keepdim=True), known, atol=1e-6)


def test_the_channels_of_the_lesson_add_up_to_the_map_of_the_page_and_to_the_score(visits: Visits) -> None:
    answer = ask(visits, TAKEN_APART)
    evidence = answer.evidence
    maps = channel_maps(answer.model, evidence.images, class_score(evidence.class_idx), answer.stage)
    assert torch.allclose(maps.sum(1, keepdim=True), answer.attribution, atol=1e-6)
    bias = visits.models[CLASSIFIER].head.bias[evidence.class_idx].item()
    assert maps.sum().item() + bias == pytest.approx(evidence.score, abs=1e-4)
    likeness = [
        float(each)
        for each in re.findall(r"Likeness to the whole: (-?[\d.]+)\d\.", text(go(visits, "step 1", [0, 0, ""])))
    ]
    assert likeness[0] < 0.5 < 0.9 < likeness[-1]


def test_the_hottest_part_is_where_a_map_says() -> None:
    class Seen:
        attribution = torch.zeros(1, 1, 10, 10)
        read_at, box = None, WHOLE

    Seen.attribution[..., 2:4, 6:8] = 1.0
    best = "600,200 800,400"
    assert lesson.hottest(Seen, "0,0 200,200") == best
    assert heat_in(Seen, best) > 0.75  # the rest lies on its edge, as the map is made larger smoothly
    assert heat_in(Seen, "0,0 200,200") == 0


def test_a_guess_is_scored_by_the_map_and_by_erasing(visits: Visits) -> None:
    answer = ask(visits, GUESSED[0])
    best = lesson.hottest(answer, "0,0 200,200")
    x, y = (int(each) + 100 for each in best.split()[0].split(","))
    hit, miss = (text(go(visits, "", [0, 0, ""], [[x, y]])), text(go(visits, "", [0, 0, ""], [[0, 0]])))
    assert "Well seen" in hit
    assert "100%" in hit
    assert "looked elsewhere" in miss
    left = lesson.without(answer, best)
    assert f"the hottest part {heat_in(answer, best):.0%} {left:.0%}" in miss
    assert left < 0.5
    last = ask(visits, GUESSED[-1])
    assert lesson.without(last, lesson.hottest(last, "0,0 200,200")) > 0.99


def free_places(seed: int) -> list[tuple[int, int]]:
    """Where a heart does not touch the shape itself."""
    mask = shapes.scene(seed, 1000).mask
    places = [(x, y) for x in range(100, 901, 200) for y in range(100, 901, 200)]
    return [(x, y) for x, y in places if not mask[max(0, y - 105) : y + 105, max(0, x - 105) : x + 105].any()]


@pytest.mark.parametrize(("scene", "outcome"), [(0, "You fooled it"), (1, "the heat misleads you")])
def test_a_heart_fools_the_model_in_one_scene_and_misleads_the_heat_in_the_other(
    visits: Visits, scene: int, outcome: str
) -> None:
    places = free_places(FOOLED[scene][0])
    assert outcome in text(go(visits, "part", [3, scene, ""]))
    tried = [text(go(visits, "", [3, scene, ""], [place])) for place in places]
    assert sum(outcome in each for each in tried) > len(places) / 3  # who tries a few places finds one


def test_the_misleading_heart_is_not_what_the_model_needs(visits: Visits) -> None:
    """The planted evidence: without the heart the answer is the same, without the shape it is another one."""
    seed, part = FOOLED[1]
    model, scene = visits.models[CLASSIFIER], shapes.scene(seed, 256)
    own = [i for i, each in enumerate(scene.objects) if (each & scene.mask).any()]
    pictures = lesson.with_heart(1, part), scene.image, shapes.scene(seed, 256, without=own).image
    planted, plain, removed = (
        probabilities(model, predict(model, view(each, model)))[0, scene.label] for each in pictures
    )
    assert abs(planted - plain) < 0.02
    assert removed < 0.5


def test_the_verdicts_of_the_last_step_are_what_it_says(visits: Visits) -> None:
    shown = text(go(visits, "step 4", [0, 0, ""]))
    for seed, level in ((BELIEVED, "believable"), (REFUTED, "not believable")):
        answer = ask(visits, seed)
        answer.work_out_verdict()
        assert answer.verdict.level == level
        assert answer.verdict.sentence in shown
        shares = answer.prediction.shares
        assert max(shares, key=shares.get) == shapes.CLASS_NAMES[shapes.scene(seed).label]
    flower = visits.ask(str(lesson.PHOTOS / "flower.jpg"), CLASSIFIER, Question())
    flower.work_out_verdict()
    assert flower.verdict.level == "believable"
    assert max(flower.prediction.shares.values()) > 0.99


def test_where_a_click_leads(visits: Visits) -> None:
    assert go(visits, "step 4", [0, 3, "0,0 200,200"])["place"] == [4, 0, ""]
    assert go(visits, "scene 1", [3, 0, "0,0 200,200"])["place"] == [3, 1, ""]
    assert go(visits, "", [0, 1, ""], [[10, 10], [500, 500]])["place"] == [0, 1, "400,400 600,600"]
    assert go(visits, "", None)["place"] == [0, 0, ""]
    assert go(visits, "", [0, 1, "0,0 200,200"]) == {}  # its tab is opened again
    opened = go(visits, "open", [3, 0, "0,0 200,200"])
    assert opened["model"] == CLASSIFIER
    assert isinstance(opened["photo"], Image.Image)
    with pytest.raises(ValueError, match="invalid literal"):
        go(visits, "step x", [0, 0, ""])


def test_without_the_shipped_models_a_sentence_says_so() -> None:
    assert "models that ship with cvlab" in text(go(Visits(Models({})), "step 1", [0, 0, ""]))


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    page = app.build_page(Models(offered_models(app.ROOT, [])))
    app.launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to test the page (apt-get install chromium)")
    os.environ.setdefault("PLAYWRIGHT_BROWSERS_PATH", "0")
    with sync_playwright() as playwright:
        expect.set_options(timeout=20_000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def check(page: Page) -> None:
    """Nothing that axe finds, and no scrolling sideways."""
    page.wait_for_timeout(300)
    assert [each["id"] for each in Axe().run(page).response["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def title(page: Page, step: int) -> None:
    """The step is shown, and marked among the buttons."""
    expect(page.locator(f"#lesson [data-step='{step}']")).to_be_visible()
    expect(page.locator(".steps [aria-current=step]")).to_have_text(re.compile(f"^{step + 1} "))


def test_the_five_steps_by_keyboard_alone(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.goto(f"{url}?__theme=light&model=shapes-segmenter#lesson")
    picker, told = page.locator("#lesson .picker"), page.locator("#lesson .told")
    title(page, 0)
    picker.press("ArrowLeft")
    picker.press("Enter")
    expect(told).to_be_focused()
    expect(page.get_by_role("row", name="the hottest part")).to_be_visible()
    check(page)
    page.get_by_role("button", name="Another scene").press("Enter")
    expect(picker).to_be_focused()
    page.get_by_role("button", name="Next: 2").press("Enter")
    title(page, 1)
    expect(page.locator("#lesson h2")).to_be_focused()
    slider = page.get_by_role("slider", name="Add them up")
    slider.press("ArrowRight")
    expect(page.get_by_text(re.compile("^2 of 192 channels"))).to_be_visible()
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^2 of 192 channels"))
    slider.press("End")
    expect(page.get_by_text("All 192 channels: this is Grad-CAM")).to_be_visible()
    expect(page.locator("#lesson .main figure").filter(visible=True)).to_have_count(1)
    check(page)
    page.get_by_role("button", name="3 Stages", exact=True).press("Enter")
    title(page, 2)
    expect(page.locator("#lesson figure")).to_have_count(4 + 7)
    check(page)
    page.get_by_role("button", name="Next: 4").press("Enter")
    title(page, 3)
    for _ in range(4):
        picker.press("ArrowLeft")
    picker.press("Enter")
    expect(told).to_contain_text("You fooled it")
    expect(picker).to_be_focused()
    check(page)
    page.get_by_role("button", name="The other picture").press("Enter")
    expect(told).to_have_count(0)
    page.get_by_role("button", name="Show me a place").press("Enter")
    expect(told).to_contain_text("misleads you")
    page.get_by_role("button", name="5 Believe it?", exact=True).press("Enter")
    title(page, 4)
    page.locator("#lesson summary").nth(1).press("Enter")
    expect(page.get_by_text("The marked spot hardly mattered").filter(visible=True).first).to_be_visible()
    check(page)
    with page.context.expect_page() as sheet:
        page.get_by_role("link", name="For teachers").press("Enter")
    expect(sheet.value.get_by_role("heading", name="A sheet for teachers")).to_be_visible()
    check(sheet.value)
    page.get_by_role("button", name="Break it with a photo").press("Enter")
    expect(page.get_by_role("tab", name="Break it")).to_have_attribute("aria-selected", "true")
    page.close()


def test_the_five_steps_by_touch_on_a_phone(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.goto(f"{url}?__theme=dark&model=shapes-segmenter")
    page.get_by_role("tab", name="Lesson").tap()
    picker, told = page.locator("#lesson .picker"), page.locator("#lesson .told")

    def tap(x: float, y: float) -> None:
        picker.scroll_into_view_if_needed()
        box = picker.bounding_box()
        page.touchscreen.tap(box["x"] + x * box["width"], box["y"] + y * box["height"])

    title(page, 0)
    tap(0.5, 0.5)
    expect(told).to_be_in_viewport()
    check(page)
    page.get_by_role("button", name="Next: 2").tap()
    title(page, 1)
    expect(page.locator("#lesson h2")).to_be_in_viewport()
    page.get_by_role("slider", name="Add them up").tap()  # its middle
    expect(page.get_by_text("16 of 192 channels")).to_be_visible()
    check(page)
    page.get_by_role("button", name="Next: 3").tap()
    title(page, 2)
    check(page)
    page.get_by_role("button", name="Next: 4").tap()
    title(page, 3)
    tap(0.4, 0.6)
    expect(told).to_contain_text("You fooled it")
    expect(told).to_be_in_viewport()
    check(page)
    page.get_by_role("button", name="Open this picture").tap()
    expect(page.locator("#canvas .picker")).to_be_visible()
    expect(page.locator("#sentence")).to_contain_text("Cross")
    page.get_by_role("tab", name="Lesson").tap()
    page.get_by_role("button", name="Next: 5").tap()
    title(page, 4)
    page.locator("#lesson summary").first.tap()
    expect(page.get_by_text("The marked spot mattered").filter(visible=True).first).to_be_visible()
    check(page)
    page.close()


def test_the_five_steps_by_mouse(browser: Browser, url: str) -> None:
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.goto(f"{url}?model=shapes-segmenter#lesson")
    page.locator("#lesson .picker").click()
    expect(page.locator("#lesson .told")).to_contain_text("Your part holds")
    page.get_by_role("button", name="2 Channels", exact=True).click()
    page.get_by_role("slider", name="Add them up").click()
    expect(page.get_by_text("16 of 192 channels")).to_be_visible()
    page.get_by_role("button", name="Next: 3").click()
    title(page, 2)
    page.get_by_role("button", name="4 Fool it", exact=True).click()
    page.locator("#lesson .picker").click(position={"x": 150, "y": 220})
    expect(page.locator("#lesson .told")).to_contain_text("You fooled it")
    page.get_by_role("button", name="Next: 5").click()
    page.locator("#lesson summary").last.click()
    expect(page.get_by_text("The check is about the heat")).to_be_visible()
    page.get_by_role("button", name="1 Guess", exact=True).click()
    title(page, 0)
    page.close()
