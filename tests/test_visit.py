"""cvlab.page.visit and its panels: answered once, drawn as asked, and a sentence where there is no answer."""

import base64
import io
import re
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import METHODS, explain, predict
from cvlab.models import build
from cvlab.page.compare import difference, relative_map
from cvlab.page.evidence import open_mask
from cvlab.page.host import sentence_of
from cvlab.page.html import quoted
from cvlab.page.models import TOLERANCE, Models, bytes_of, faster_copy
from cvlab.page.panels import CHECKED, PANELS, draw
from cvlab.page.picture import difference_layer
from cvlab.page.question import Question, score_of
from cvlab.page.visit import Answer, Visits
from cvlab.page.words import percent, said, time_left
from cvlab.transforms import WHOLE, Box, open_image, resize_logits, view
from cvlab.trust import judge

ROOT = Path(__file__).resolve().parents[1]
OF_ONE = [name for name in PANELS if name not in ("sentence", "compared", "canvas", "history", "record")]


@pytest.fixture
def visits(tmp_path: Path, classifier: nn.Module, segmenter: nn.Module) -> Visits:
    segmenter.head.bias.data.fill_(0.3)  # so that a mask is found
    for name, model in (("pets", classifier), ("riders", segmenter)):
        checkpoint.save(model, tmp_path / name)
    return Visits(Models({name: str(tmp_path / name) for name in ("pets", "riders")}))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    shapes.scene(4003, 40).image.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_drawing_needs_no_other_pass(visits: Visits, photo: str) -> None:
    riders, pets = visits.ask(photo, "riders", Question()), visits.ask(photo, "pets", Question())
    first = riders.again(Question()).evidence
    drawn = Question(opacity=0.1, colormap="jet", method="hires_cam", stage="decoder1", threshold=0.5)
    assert visits.ask(photo, "riders", drawn).evidence is first
    assert riders.again(Question(against=True)).evidence is not first
    asked = Question("cat", stage="stage1")
    assert pets.again(asked).evidence is pets.again(Question("cat", "", False, "stage1", "hires_cam")).evidence


def test_a_photo_and_its_mask_are_opened_once_whatever_is_asked(visits: Visits, photo: str) -> None:
    opened: list[str] = []
    sys.addaudithook(lambda event, about: opened.append(str(about[0])) if event == "open" else None)
    mask = photo.removesuffix("photo.png") + "mask.png"
    shapes.scene(4003, 40).image.convert("L").point(lambda value: 255 * (value > 99)).save(mask)
    opened.clear()
    for question in (Question(), Question(against=True), Question(region="false positives")):
        draw(visits.ask(photo, "riders", question, mask), ("sentence", *OF_ONE))
    assert (opened.count(photo), opened.count(mask)) == (1, 1)


def test_evidence_is_that_of_explain(visits: Visits, photo: str) -> None:
    model = visits.models["riders"]
    images = view(open_image(photo), model)
    for question in (Question(), Question("rider", "horse", True, region="box", points="1,1 9,9")):
        expected = explain(model, images, score_of(question, model), None, tuple(METHODS))
        found = visits.ask(photo, "riders", question).evidence
        assert found.score == pytest.approx(expected.scores.item())
        for method, stages in expected.maps.items():
            for stage, attribution in stages.items():
                assert torch.equal(found.maps[method][stage], attribution)


def test_every_panel_has_an_answer_or_a_sentence(visits: Visits, photo: str) -> None:
    answer = visits.ask(photo, "riders", Question())
    shown = draw(answer, OF_ONE)
    assert all(shown[name] for name in ("look", "grad_cam", "picker", "stages", "link", "code"))
    assert shown["contributions"] == ""
    visits.ask(photo, "riders", Question(threshold=0.5)).work_out_paths()
    assert "biases" in draw(answer, ["contributions"])["contributions"]
    pets = visits.ask(photo, "pets", Question())
    shown = draw(pets.again(Question()), OF_ONE)
    assert "Checking" in shown["chip"]
    assert not shown["reasons"]
    assert "classifier" in shown["stages"]
    for question in (
        Question(class_name="dog?"),
        Question(stage="stage9"),
        Question(rather_than="cat", class_name="cat"),
    ):
        shown = draw(pets.again(question), OF_ONE)
        assert re.fullmatch(r"<p>[^<]+\.</p>", shown["grad_cam"])
    for name, file in (("nothing", photo), ("", photo), ("pets", None), ("pets", __file__)):
        answer = visits.ask(file, name, Question())
        shown = draw(answer, OF_ONE)
        assert re.fullmatch(r"<p>[^<]+\.</p>", shown["grad_cam"])
        assert not shown["picker"]
        shown = draw(answer, ("sentence", *OF_ONE))  # said once, above all
        assert re.fullmatch(r"<p>[^<]+\.</p>", shown["sentence"])
        assert not any(shown[name] for name in OF_ONE)


def test_how_far_maps_depend_on_the_region_is_worked_out_later_and_stays_beside_them(
    visits: Visits, photo: str
) -> None:
    def stages(**asked: object) -> str:
        return draw(visits.ask(photo, "riders", Question(**asked)), ["stages"])["stages"]

    asked, dependence = {"region": "box", "points": "1,1 9,9"}, "r\N{NO-BREAK SPACE}="
    assert dependence not in stages(**asked)
    visits.ask(photo, "riders", Question(**asked)).work_out_paths()
    assert stages(**asked).count(dependence) >= 2 * 3
    assert dependence in stages(**asked, colormap="jet")
    assert dependence not in stages(**asked, against=True)
    whole = {"region": "box", "points": "0,0 40,40"}
    visits.ask(photo, "riders", Question(**whole)).work_out_paths()
    assert "is the whole picture" in stages(**whole)


def test_the_same_model_and_picture_twice_agree(visits: Visits, photo: str) -> None:
    def compared(other: str) -> str:
        first, second = (visits.ask(photo, name, Question()) for name in ("pets", other))
        return draw(first, ["compared"], second)["compared"]

    visits.models.offered["twin"] = visits.models.offered["pets"] + "/."
    assert "r = 1.00" in compared("twin")
    assert "Heat of both: 100%." in compared("twin")
    assert "compare like with like" in compared("riders")
    assert "<figure>" not in compared("pets")


def planted(answer: Answer, box: Box, *hot: tuple[int, int, float]) -> Answer:
    """The answer with a map of 4 x 4 positions over a part of the photo, 0 but at (row, column, value)."""
    heat = torch.zeros(1, 1, 4, 4)
    for row, column, value in hot:
        heat[0, 0, row, column] = value
    answer.evidence = replace(answer.evidence, maps={"grad_cam": {answer.stage: heat}}, box=box)
    return answer


def test_the_difference_of_two_maps_is_where_only_one_of_them_is_hot(visits: Visits, photo: str) -> None:
    """One of the whole photo, hot at the upper left and the lower right; the other saw the right half, hot below."""
    first = planted(visits.ask(photo, "pets", Question()), WHOLE, (0, 0, 5.0), (3, 3, 5.0))
    second = planted(visits.ask(photo, "pets", Question()), (0.5, 0, 0.5, 1), (3, 2, 2.0), (3, 3, 2.0))
    mine, theirs = relative_map(first, second.box), relative_map(second, second.box)  # what both saw
    assert (mine[-1, -1], theirs[-1, -1], mine[0, 0], theirs[0, 0]) == (1, 1, 0, 0)
    caption = difference(first, second).split("<figcaption>")[1]
    shares = [int(share) for share in re.findall(r"(\d+)%", caption)]
    expected = [(mine - theirs).clip(0), (theirs - mine).clip(0), np.minimum(mine, theirs)]
    expected = [round(100 * each.sum() / np.maximum(mine, theirs).sum()) for each in expected if each.max() > 0.02]
    assert shares == expected
    assert 98 <= sum(shares) <= 102
    apart = planted(visits.ask(photo, "pets", Question()), (0, 0, 0.5, 1), (0, 0, 1.0))
    assert "<figure>" not in difference(second, apart)
    blank = planted(visits.ask(photo, "pets", Question()), WHOLE)
    assert "%" not in difference(blank, blank).split("<figcaption>")[1]


def test_a_difference_is_orange_above_zero_blue_below_and_see_through_at_zero() -> None:
    url = difference_layer(np.array([[-1.0, 0.0, 1.0]]))
    ((blue, zero, orange),) = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))
    assert (zero[3], blue[3], orange[3]) == (0, 255, 255)
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]


def test_two_models_are_compared_at_the_stage_that_both_have(visits: Visits, photo: str, tmp_path: Path) -> None:
    deeper = build("convnet", ["cat", "dog"], 16, {"widths": [4, 4, 4]})
    checkpoint.save(deeper, tmp_path / "riders")

    def stage_of_second(first: str, stage: str, second: str) -> str:
        answer, other = (visits.ask(photo, name, Question(stage=stage)) for name in (first, second))
        return re.findall(r"at (stage\d)", draw(answer, ["compared"], other)["compared"])[-1]

    assert stage_of_second("pets", "", "riders") == "stage2"  # the default of the first
    assert stage_of_second("pets", "stage1", "riders") == "stage1"
    assert stage_of_second("riders", "stage3", "pets") == "stage2"  # which has no third


def test_the_time_that_is_left_is_that_of_the_mean_pace() -> None:
    """A quarter was done in 100 seconds."""
    begun = time.monotonic() - 100
    assert time_left(begun, 0, 40) == ""
    assert time_left(begun, 10, 40) == ", 5 min left"
    assert time_left(begun, 20, 40) == ", 2 min left"
    assert time_left(begun, 40, 40) == ", 0 s left"


@pytest.mark.parametrize(
    "strange",
    [{}, {"val": torch.zeros(5)}, {"val": torch.zeros(2, 2), "weight": torch.zeros(24, 3), "bias": torch.zeros(3)},
     {"val": torch.zeros(3), "weight": torch.zeros(7), "bias": torch.zeros(1)}, {"basis": torch.zeros(24)},
     {"val": torch.zeros(0), "basis": torch.zeros(2, 2, 2)}],
)  # fmt: skip
def test_statistics_that_do_not_fit_the_network_are_left_out(
    strange: dict, classifier: nn.Module, tmp_path: Path
) -> None:
    checkpoint.save(classifier, tmp_path / "pets")
    (tmp_path / "pets" / "familiarity.safetensors").write_bytes(to_safetensors(strange))
    models = Models({"pets": str(tmp_path / "pets")})
    assert not models["pets"].statistics


def test_an_error_becomes_a_sentence_and_keeps_the_names_in_it() -> None:
    assert sentence_of(ValueError("no class McLaren in ResNet")) == "No class McLaren in ResNet."


def test_a_name_of_a_stranger_is_shown_plainly_and_on_one_line() -> None:
    assert (
        quoted('Großer Fuchs\' "Bau"')
        == '\N{LEFT DOUBLE QUOTATION MARK}Großer Fuchs\' "Bau"\N{RIGHT DOUBLE QUOTATION MARK}'
    )
    assert quoted("a\nb\u202e").isprintable()


def test_a_true_mask_is_read_in_every_way_that_it_is_written(tmp_path: Path, segmenter: nn.Module) -> None:
    true = np.zeros((20, 40), bool)
    true[:, 10:20] = True
    for name, values in (("a.png", true * 255), ("b.png", true * 1), ("c.png", true * 2), ("d.jpg", true * 255)):
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / name)
        found = open_mask(str(tmp_path / name), segmenter, (200, 400))[2 if name == "c.png" else 1]
        assert (found.numpy() == true).mean() > 0.97, name
    with pytest.raises(ValueError, match="another shape"):
        open_mask(str(tmp_path / "a.png"), segmenter, (100, 100))


@pytest.fixture
def of_shapes(visits: Visits, photo: str, tmp_path: Path) -> Answer:
    """The photo before a segmenter of classes that exclude each other, which finds some of each in it."""
    torch.manual_seed(0)
    names = ["background", "circle", "star", "cross"]
    model = build("unet", names, 16, {"width": 4, "depth": 2}, exclusive=True).eval()
    model.head.bias.data -= predict(model, view(open_image(photo), model)).mean((0, 2, 3))
    checkpoint.save(model, tmp_path / "shapes")
    visits.models.offered["shapes"] = str(tmp_path / "shapes")
    return visits.ask(photo, "shapes", Question())


def rows_of(html: str) -> list[list[str]]:
    """The cells of the rows of a table."""
    return [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(<td>.*?)</tr>", html)]


def test_a_mask_of_numbers_gives_the_iou_of_every_class(of_shapes: Answer, tmp_path: Path) -> None:
    """The table is that of a count by NumPy; pixels of 255 are in none of its columns."""
    file, values = str(tmp_path / "numbers.png"), np.zeros((40, 40), np.uint8)
    values[5:20, 5:30], values[20:36, 8:20], values[0:3] = 1, 2, 255
    Image.fromarray(values).save(file)
    answer = replace(of_shapes, given=Question("star"), mask=file)
    found = resize_logits(answer.prediction.logits, (40, 40))[0].argmax(0).numpy()[values < 255]
    true, expected = values[values < 255], []
    for i, name in enumerate(answer.model.class_names):
        both, either = ((found == i) & (true == i)).sum(), ((found == i) | (true == i)).sum()
        shares = percent((found == i).mean()), percent((true == i).mean())
        expected.append([name, *shares, f"{both / either:.3f}"])
    html = draw(answer, ["errors"])["errors"]
    assert rows_of(html) == expected[1:]
    assert f"iou {expected[2][-1]}" in html
    Image.fromarray(255 * np.uint8(values == 2)).save(tmp_path / "white.png")
    html = draw(replace(of_shapes, given=Question("star"), mask=str(tmp_path / "white.png")), ["errors"])["errors"]
    found, true = resize_logits(answer.prediction.logits, (40, 40))[0].argmax(0).numpy() == 2, values == 2
    assert f"iou {(found & true).sum() / (found | true).sum():.3f}" in html
    assert not rows_of(html)  # of the other classes it tells nothing


def test_each_class_that_is_found_has_an_outline_and_a_line_of_the_legend(of_shapes: Answer, visits: Visits) -> None:
    answer = of_shapes.again(Question())
    found = answer.prediction.logits[0].argmax(0)
    shares = {name: (found == i).float().mean().item() for i, name in enumerate(answer.model.class_names) if i}
    assert min(shares.values()) > 0
    assert answer.prediction.shares == pytest.approx(shares)
    most = max(shares, key=shares.get)
    assert answer.model.class_names[answer.evidence.class_idx] == most
    assert said(answer)[0].startswith(f"{most.capitalize()} found: {percent(shares[most])} of the picture, ")
    html = draw(answer, ["picker"])["picker"]
    labels = re.findall(r'value="(of\d c\d)"><i></i>(.*?)</label>', html)
    assert labels == [(f"of{i} c{i}", f"{name} {percent(share)}") for i, (name, share) in enumerate(shares.items())]
    assert all(f'<path class="{line}"' in html for line, _ in labels)
    assert "legend" in draw(visits.ask(of_shapes.photo, "riders", Question(threshold=0.1)), ["picker"])["picker"]


def test_more_than_eight_classes_repeat_the_colours_with_dashed_lines(
    visits: Visits, photo: str, tmp_path: Path
) -> None:
    checkpoint.save(build("unet", [f"class {i}" for i in range(10)], 16, {"width": 4, "depth": 2}), tmp_path / "ten")
    visits.models.offered["ten"] = str(tmp_path / "ten")
    html = draw(visits.ask(photo, "ten", Question(threshold=0.01)), ["picker"])["picker"]
    lines = re.findall(r'<path class="of(\d) c(\d)( again)?"', html)
    assert lines == [(str(i), str(i % 8), " again" if i > 7 else "") for i in range(10)]
    css = (ROOT / "cvlab/page/page.css").read_text("utf-8")
    colours = dict(re.findall(r"label\)\.c(\d) {--c: (#\w+)}", css))
    assert sorted(colours) == [str(i) for i in range(8)]
    assert len(set(colours.values())) == 8


def test_a_model_of_one_class_needs_no_legend(photo: str) -> None:
    name = "shapes-segmenter"
    answer = Visits(Models({name: str(ROOT / "checkpoints" / name)})).ask(photo, name, Question(threshold=0.1))
    html = draw(answer, ["picker"])["picker"]
    assert '<path class="edge"' in html
    assert "checkbox" not in html


def test_a_part_of_a_class_is_asked_about_rather_than_the_background_at_every_stage(of_shapes: Answer) -> None:
    model, logits = of_shapes.model, of_shapes.prediction.logits
    y, x = (logits[0].argmax(0) == 2).nonzero()[0].tolist()
    answer = of_shapes.again(Question("star", "background", region="part", points=f"{x},{y}"))
    inside = answer.evidence.region
    assert answer.evidence.score == pytest.approx((logits[0, 2] - logits[0, 0])[inside].mean().item(), rel=1e-4)
    score = score_of(answer.question, model)
    expected = explain(model, of_shapes.prediction.images, score, None, ["grad_cam"]).maps["grad_cam"]
    assert list(expected) == list(model.stages)
    for stage, attribution in expected.items():
        assert torch.equal(answer.again(replace(answer.question, stage=stage)).attribution, attribution)
        assert attribution.any()


def test_models_are_dropped_at_the_limit_and_come_back(visits: Visits) -> None:
    largest = max(bytes_of(visits.models["pets"]), bytes_of(visits.models["riders"]))
    models = Models(visits.models.offered, limit=largest)
    first = models["pets"]
    assert models["checkpoints/pets"] is first
    assert models["riders"] is not first
    assert models.loaded.bytes() <= largest
    assert models["pets"] is not first


@pytest.mark.parametrize("name", ["flowers", "shapes-classifier", "shapes-segmenter"])
def test_the_faster_copy_makes_the_maps_of_the_code_tab(name: str, photo: str, tmp_path: Path) -> None:
    folder = ROOT / "checkpoints" / name
    answer = Visits(Models({name: str(folder)})).ask(photo, name, Question())
    model = checkpoint.load(folder)
    assert sum(type(module) is nn.BatchNorm2d for module in answer.model.modules()) == 0  # it is fused
    assert not any(module.training for module in answer.model.modules())
    score = score_of(Question(), model)
    expected = explain(model, view(open_image(photo), model), score, [answer.stage], ["grad_cam"])
    expected = expected.maps["grad_cam"][answer.stage]
    assert (answer.attribution - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_copy_whose_maps_differ_is_not_used(classifier: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        copy = deepcopy(model)
        copy.load_state_dict({key: value * 1.01 for key, value in model.state_dict().items()})
        return copy

    assert faster_copy(classifier) is not classifier
    monkeypatch.setattr("cvlab.models.fused.fused", wrong)
    assert faster_copy(classifier) is classifier


def test_a_path_of_the_server_is_not_a_name_and_not_in_the_code(visits: Visits, photo: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model"):
        visits.models[str(tmp_path / "pets")]
    assert str(tmp_path) not in draw(visits.ask(photo, "pets", Question()), ["code"])["code"]


def test_the_sentence_says_what_is_thought_how_surely_and_where(visits: Visits, photo: str) -> None:
    pets, riders = (visits.ask(photo, name, Question()) for name in ("pets", "riders"))
    shares = pets.prediction.shares
    likely, *others = sorted(shares, key=shares.get, reverse=True)
    for share, doubt in ((0.9, ""), (0.5, "Not sure: "), (0.3, "A guess: ")):
        shares[likely], shares[others[0]] = share, 0.01
        shares[others[1]] = 0.02
        lead, rest = said(pets.again(Question()))
        assert lead.lower() == f"{doubt}{likely}, {share:.0%}.".lower()
        assert re.match(r"It looked .+\.|No part of the picture", rest)
    lead, rest = said(pets.again(Question(class_name=others[0], against=True)))
    assert lead.lower() == f"{others[0]} got 1%."
    assert "against it" in rest
    assert said(pets.again(Question(class_name="no such class"))) == said(pets.again(Question()))
    lead, _ = said(riders.again(Question()))
    mask = riders.prediction.logits[0, 0].sigmoid() > riders.model.threshold
    assert lead.startswith(f"Horse found: {percent(mask.float().mean().item())} of the picture")


def test_where_nothing_is_found_the_page_says_so_and_a_place_can_be_asked_about(
    visits: Visits, photo: str, segmenter: nn.Module, tmp_path: Path
) -> None:
    segmenter.head.bias.data.fill_(-9)
    checkpoint.save(segmenter, tmp_path / "blind")
    visits.models.offered["blind"] = str(tmp_path / "blind")
    shown = draw(visits.ask(photo, "blind", Question()), ("sentence", *OF_ONE))
    assert "Nothing found." in shown["sentence"]
    assert 'class="pic flat picker"' in shown["look"]
    assert shown["chip"] == shown["reasons"] == ""
    shown = draw(visits.ask(photo, "blind", Question(region="box", points="1,1 9,9")), ("sentence", *OF_ONE))
    assert 'class="asked"' in shown["picker"]


def test_the_verdict_is_worked_out_once_and_speaks_of_the_spot(visits: Visits, photo: str) -> None:
    for name in ("pets", "riders"):
        answer = visits.ask(photo, name, Question())
        answer.work_out_verdict()
        found = visits.ask(photo, name, Question(colormap="jet"))
        images, evidence = answer.prediction.images, answer.evidence
        verdict = judge(answer.model, images, answer.attribution, evidence.class_idx, evidence.region, answer.stage)
        assert found.verdict is answer.verdict
        assert found.verdict == verdict
        drawn = draw(found, CHECKED)
        assert verdict.sentence in drawn["reasons"]
        assert verdict.sentence in drawn["believe"]
        assert verdict.sentence.split(":")[0].rstrip(".") in drawn["chip"]
        against = found.again(Question(against=True))  # hiding what speaks against a class need not lower it
        against.work_out_verdict()
        assert not any(draw(against, CHECKED)[panel] for panel in ("chip", "reasons"))


def test_verdicts_are_given_on_request_while_others_ask(visits: Visits, monkeypatch: pytest.MonkeyPatch) -> None:
    visits.note("first", ("a",))
    visits.note("first", ("b",))
    assert visits.is_last("first", ("b",))
    assert not visits.is_last("first", ("a",))
    assert not visits.others_ask("first")
    assert visits.others_ask("second")
    visits.note("second", None)
    assert visits.others_ask("first")
    monkeypatch.setattr("cvlab.page.visit.QUIET", 0)
    assert not visits.others_ask("first")
