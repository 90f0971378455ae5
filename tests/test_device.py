"""Working on a GPU, without one: torch's fake tensors know their device and refuse to meet those of another.

They have no numbers: what is computed there is not tested here.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs  # noqa: F401  train/ can be imported then
import torch
import torch.nn.functional as F
from run import Run
from timm.data import Mixup
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from cvlab.checkpoint import folder
from cvlab.data.parts import Parts
from cvlab.data.sets import AugmentedImages, AugmentedPairs, EvaluationSet, onto_gpu
from cvlab.explain import METHODS, explain, predict
from cvlab.explain.many import explain_predictions
from cvlab.explain.paths import contributions
from cvlab.learning.losses import SEGMENTATION_LOSSES
from cvlab.metrics import class_counts
from cvlab.models import Model, build, device
from cvlab.page.models import MAX_BYTES, Models
from cvlab.trust.familiarity import features

SIDE = 32
SETS: dict[str, Callable] = {
    "evaluation": lambda images, labels, masks: EvaluationSet(images, labels),
    "classifier": lambda images, labels, masks: AugmentedImages(images, labels, SIDE, seed=0),
    "segmenter": lambda images, labels, masks: AugmentedPairs(images, masks, seed=0),
}
LOSSES = {"convnet": F.cross_entropy, "plain": F.cross_entropy, "residual": F.cross_entropy, **SEGMENTATION_LOSSES}


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def decoded(number: int = 4) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Images, labels and masks as they are kept, on the CPU."""
    images = [torch.zeros(3, SIDE, SIDE, dtype=torch.uint8) for _ in range(number)]
    return images, torch.zeros(number, dtype=torch.long), [torch.zeros(1, SIDE, SIDE).bool() for _ in range(number)]


@pytest.mark.parametrize("name", SETS)
def test_batches_are_made_where_the_images_were_brought(name: str) -> None:
    data_set = SETS[name](*decoded())
    assert {each.device.type for each in data_set.__getitems__([0, 2])} == {"cpu"}
    data_set.to("cuda")
    assert {each.device.type for each in data_set.__getitems__([0, 2])} == {"cuda"}


@pytest.mark.parametrize(("most", "where"), [(2 * 4 * 3 * SIDE * SIDE, "cuda"), (2 * 4 * 3 * SIDE * SIDE - 1, "cpu")])
def test_pictures_are_kept_on_a_gpu_that_has_room_for_both_parts(
    most: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sets of four pictures, 3 x 32 x 32 bytes each; half of the free memory is for them."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * most, 4 * most))
    data_sets = [SETS["classifier"](*decoded()), SETS["evaluation"](*decoded())]
    onto_gpu(torch.device("cuda"), *data_sets)
    assert {each.device.type for data_set in data_sets for each in data_set.__getitems__([0, 1])} == {where}


def test_without_a_gpu_they_stay() -> None:
    data_set = SETS["classifier"](*decoded())
    onto_gpu(torch.device("cpu"), data_set)
    assert {each.device.type for each in data_set.__getitems__([0, 1])} == {"cpu"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_step_brings_nothing_of_the_cpu(name: str) -> None:
    segments = name in SEGMENTATION_LOSSES
    data_set = SETS["segmenter" if segments else "classifier"](*decoded())
    data_set.to("cuda")
    with torch.device("cuda"):  # where accelerate brings it
        model = build("unet", ["a"], SIDE, {"depth": 1}) if segments else build(name, ["a", "b"], SIDE)
    images, targets = data_set.__getitems__([0, 1])
    if not segments:
        images, targets = Mixup(0.2, num_classes=2)(images, targets)
    logits = model(images)
    loss = LOSSES[name](logits, targets)
    assert {each.device.type for each in (images, targets, logits, loss)} == {"cuda"}
    if segments:
        assert class_counts(logits > 0, targets).device.type == "cuda"


@pytest.mark.parametrize("counts", [1, 4])
def test_the_totals_of_a_run_wait_for_no_gpu(counts: int, tmp_path: Path) -> None:
    """A fake tensor has no value that could be asked for."""
    options = Namespace(out=tmp_path, data=None)
    accelerator = Namespace(device=torch.device("cuda"), mixed_precision="no", is_main_process=False)
    parts = Parts("none", [], {}, lambda sample: sample)
    run = Run(options, accelerator, None, parts, counts)
    run.add(torch.ones((), device="cuda"), 4, *torch.ones(counts, dtype=torch.long, device="cuda"))
    assert run.sums.device.type == "cuda"
    with pytest.raises(DataDependentOutputException):
        run.sums[0].item()


@pytest.fixture(params=["convnet", "unet"])
def there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model on another device: backward passes on a fake GPU ask for a true one, on the meta device for none."""
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: True)  # whether all logits are finite
    with torch.device("meta"):
        return build(request.param, ["a", "b"], SIDE).eval()


def first(logits: Tensor) -> Tensor:
    return logits[:, 0].reshape(len(logits), -1).mean(1)


@pytest.mark.parametrize("methods", [["grad_cam"], list(METHODS)])
@pytest.mark.parametrize("single", [True, False])
def test_answers_of_a_model_on_a_gpu_come_back_to_the_images(there: Model, methods: list[str], single: bool) -> None:
    images, stages = torch.rand(2, 3, SIDE, SIDE), list(there.stages)[-1:] if single else None
    with pytest.raises(RuntimeError, match="on the same device"):
        there(images)
    found = explain(there, images, first, stages, methods)
    maps = [each for of in found.maps.values() for each in of.values()]
    assert {each.device.type for each in (predict(there, images), found.logits, found.scores, *maps)} == {"cpu"}
    assert features(there, images).device.type == "cpu"
    assert predict(there, images.to("meta")).device.type == "meta"


def test_the_parts_of_a_score_are_compared_with_it_where_the_images_are(there: Model) -> None:
    """That comparison is refused here, as all truths of fake tensors are True; between two devices it would fail."""
    if there.task == "segmentation":
        with pytest.raises(ValueError, match="not linear"):
            contributions(there, torch.rand(2, 3, SIDE, SIDE), first)


def test_masks_and_classes_are_chosen_where_the_logits_are(there: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the predicted class, as train/explain.py asks; a fake index is class 0."""
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0] * tensor.numel())
    monkeypatch.setattr(Tensor, "__setitem__", lambda *_: None)  # of a fake mask nobody knows how many are True
    found = explain_predictions(there, torch.rand(2, 3, SIDE, SIDE))
    assert {each.device.type for each in (found.logits, *found.maps["grad_cam"].values())} == {"cpu"}


def test_there_is_one_device_for_commands_and_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (device().type, Models({}).loaded.limit) == ("cpu", MAX_BYTES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**33))
    monkeypatch.setattr(folder, "load", lambda name: Namespace(to=lambda device: device))
    assert (device().type, Models({}).loaded.limit) == ("cuda", 2**32)
    assert folder.load_own("user/name").type == "cuda"
