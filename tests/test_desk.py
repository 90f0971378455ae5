"""cvlab.page.desk and what stands on it: answered once, drawn as asked, and a sentence where there is no answer."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import METHODS, explain, predicted_score
from cvlab.page import tabs
from cvlab.page.answers import evidence_for, open_mask, peak_of
from cvlab.page.desk import Desk
from cvlab.page.offer import Models, bytes_of
from cvlab.page.question import Question, score_of
from cvlab.transforms import open_image, view


@pytest.fixture
def desk(tmp_path: Path, classifier: nn.Module, segmenter: nn.Module) -> Desk:
    segmenter.head.bias.data.fill_(0.3)  # so that a mask is found
    for name, model in (("pets", classifier), ("riders", segmenter)):
        checkpoint.save(model, tmp_path / name)
    return Desk(Models({name: str(tmp_path / name) for name in ("pets", "riders")}))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    shapes.scene(4003, 40).image.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_drawing_needs_no_other_pass(desk: Desk, photo: str) -> None:
    first = desk.evidence(photo, "riders", Question())
    drawn = Question(
        opacity=0.1, colormap="jet", common_scale=True, method="hires_cam", stage="decoder1", threshold=0.5
    )
    assert desk.evidence(photo, "riders", drawn) is first
    assert desk.evidence(photo, "riders", Question(against=True)) is not first
    asked = Question("cat", method="occlusion")
    assert desk.evidence(photo, "pets", asked) is desk.evidence(
        photo, "pets", Question("cat", "", False, "stage1", "occlusion")
    )


def test_evidence_is_that_of_explain(desk: Desk, photo: str) -> None:
    model = desk.models["riders"]
    images = view(open_image(photo), model)
    for question in (Question(), Question("rider", "horse", True, region="box", points="1,1 9,9")):
        expected = explain(model, images, score_of(question, model), None, tuple(METHODS))
        found = desk.evidence(photo, "riders", question)
        assert found.score == pytest.approx(expected.scores.item())
        for method, stages in expected.maps.items():
            for stage, attribution in stages.items():
                assert torch.equal(found.maps[method][stage], attribution)


def test_a_slow_method_explains_the_class_that_the_whole_picture_is(desk: Desk, photo: str) -> None:
    model = desk.models["pets"]
    images = view(open_image(photo), model)
    told: list[float] = []
    for method in ("occlusion", "integrated_gradients"):
        found = evidence_for(images, model, Question(method=method), progress=told.append)
        (attribution,) = found.maps[method].values()
        assert attribution.shape == (1, 1, 16, 16)
        assert found.score == pytest.approx(predicted_score(model)(found.logits).item())
        assert told[-1] == 1
    assert peak_of(torch.tensor([[[[-1.0, 2.0]]]]), "occlusion") == 2
    assert peak_of(torch.tensor([[[[-1.0, 2.0]]]])) == 4


def test_every_tab_has_an_answer_or_a_sentence(desk: Desk, photo: str) -> None:
    shown = tabs.explained(desk, photo, "riders", None, Question())
    assert all(shown[name] for name in ("grad_cam", "picker", "stages", "link", "code"))
    assert shown["ways"] == ""
    tabs.work_out(desk, photo, "riders", None, Question(threshold=0.5))
    assert "biases" in tabs.stages(desk, photo, "riders", None, Question())["ways"]
    assert "random places" in tabs.believe(desk, photo, "pets", None, Question())
    assert "classifier" in tabs.explained(desk, photo, "pets", None, Question())["stages"]
    for question in (
        Question(class_name="dog?"),
        Question(stage="stage9"),
        Question(rather_than="cat", class_name="cat"),
    ):
        shown = tabs.explained(desk, photo, "pets", None, question)
        assert re.fullmatch(r"<p>[^<]+\.</p>", shown["grad_cam"])
    for name, file in (("nothing", photo), ("", photo), ("pets", None), ("pets", __file__)):
        shown = tabs.explained(desk, file, name, None, Question())
        assert re.fullmatch(r"<p>[^<]+\.</p>", shown["grad_cam"])
        assert not shown["picker"]


def test_how_far_maps_depend_on_the_region_is_worked_out_later_and_stays_beside_them(desk: Desk, photo: str) -> None:
    asked, dependence = {"region": "box", "points": "1,1 9,9"}, "r\N{NO-BREAK SPACE}="
    assert dependence not in tabs.explained(desk, photo, "riders", None, Question(**asked))["stages"]
    tabs.work_out(desk, photo, "riders", None, Question(**asked))
    assert tabs.stages(desk, photo, "riders", None, Question(**asked))["stages"].count(dependence) >= 2 * 3
    assert dependence in tabs.explained(desk, photo, "riders", None, Question(**asked, colormap="jet"))["stages"]
    assert dependence not in tabs.explained(desk, photo, "riders", None, Question(**asked, against=True))["stages"]
    whole = Question(region="box", points="0,0 40,40")
    tabs.work_out(desk, photo, "riders", None, whole)
    assert "is the whole picture" in tabs.stages(desk, photo, "riders", None, whole)["stages"]


def test_one_scale_brings_the_peaks_of_all_stages_under_one_top(desk: Desk, photo: str) -> None:
    html = tabs.explained(desk, photo, "riders", None, Question(common_scale=True))["stages"]
    tops = re.findall(r"</span></span> ([\d.,e+-]+) ", html) or re.findall(r"</span> ([\d.,e+-]+) </div>", html)
    assert len(set(tops)) == len(METHODS)


def test_the_same_model_and_picture_twice_agree(desk: Desk, photo: str, tmp_path: Path) -> None:
    desk.models.offered["twin"] = desk.models.offered["pets"] + "/."
    shown = tabs.compared(desk, photo, "pets", Question(), "twin", None)
    assert "r = 1.00" in shown
    assert "0.00 of their largest" in shown
    assert "compare like with like" in tabs.compared(desk, photo, "pets", Question(), "riders", None)
    assert tabs.compared(desk, photo, "pets", Question(), "", None) == f"<p>{tabs.CHOOSE_TWO}</p>"


def test_a_true_mask_is_read_in_every_way_that_it_is_written(tmp_path: Path, segmenter: nn.Module) -> None:
    true = np.zeros((20, 40), bool)
    true[:, 10:20] = True
    for name, values in (("a.png", true * 255), ("b.png", true * 1), ("c.png", true * 2), ("d.jpg", true * 255)):
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / name)
        found = open_mask(str(tmp_path / name), segmenter, 1 if name == "c.png" else 0, (200, 400))
        assert (found.numpy() == true).mean() > 0.97, name
    with pytest.raises(ValueError, match="another shape"):
        open_mask(str(tmp_path / "a.png"), segmenter, 0, (100, 100))


def test_models_are_dropped_at_the_limit_and_come_back(desk: Desk) -> None:
    largest = max(bytes_of(desk.models["pets"]), bytes_of(desk.models["riders"]))
    models = Models(desk.models.offered, limit=largest)
    first = models["pets"]
    assert models["checkpoints/pets"] is first
    assert models["riders"] is not first
    assert models.shelf.bytes() <= largest
    assert models["pets"] is not first


def test_a_path_of_the_server_is_not_a_name_and_not_in_the_code(desk: Desk, photo: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model"):
        desk.models[str(tmp_path / "pets")]
    assert str(tmp_path) not in tabs.explained(desk, photo, "pets", None, Question())["code"]
