"""cvlab.checkpoint and cvlab.files: a folder opens with bit-equal logits or is refused; files are written whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError, card
from cvlab.checkpoint.config import FORMAT, MAX_CONFIG_BYTES
from cvlab.files import new_folder, write_text
from cvlab.models import Model, build
from cvlab.models.fused import fused

ROOT = Path(__file__).resolve().parents[1]
DATA = {"name": "pets: of the [yard]", "split_seed": 0, "fingerprints": {"test": ["1f", "2e"]}}
KNOWN = ("task", "class_names", "image_size", "crop_pct", "threshold")
IN_A_PROCESS_OF_ITS_OWN = """
import sys
import torch
from safetensors.torch import load_file, save_file
from cvlab import checkpoint
with torch.no_grad():
    save_file({"logits": checkpoint.load(sys.argv[1])(load_file(sys.argv[2])["images"])}, sys.argv[3])
"""


def config_of(folder):
    return json.loads((folder / "config.json").read_text("utf-8"))


def weights_of(folder):
    # In memory: the tensors of load_file are the file itself, which is about to be written over.
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def contents(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one(model, images, tmp_path):
    model.threshold = 0.3  # chosen on the validation part
    checkpoint.save(model, tmp_path / "runs" / "model", data=DATA, precision="bf16")
    loaded = checkpoint.load(tmp_path / "runs" / "model")
    assert torch.equal(loaded(images), model(images))
    assert not any(module.training for module in loaded.modules())
    assert [getattr(loaded, name) for name in KNOWN] == [getattr(model, name) for name in KNOWN]
    assert list(loaded.stages) == list(model.stages)
    expected = model.config | {"threshold": 0.3, "data": DATA, "precision": "bf16", "format": FORMAT}
    assert loaded.config == config_of(tmp_path / "runs" / "model")["cvlab"]
    assert {key: loaded.config[key] for key in expected} == expected
    assert loaded.config["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_process_of_its_own_gives_the_same_logits_to_the_bit(classifier, images, tmp_path):
    checkpoint.save(classifier, tmp_path / "model")
    save_file({"images": images}, tmp_path / "images")
    files = [tmp_path / name for name in ("model", "images", "logits")]
    subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN, *files], cwd=ROOT, check=True)
    assert torch.equal(load_file(tmp_path / "logits")["logits"], classifier(images))


PROMISED = (
    "task",
    "class_names",
    "image_size",
    "crop_pct",
    "crop_mode",
    "interpolation",
    "threshold",
    "config",
    "source",
)


@pytest.mark.parametrize("folder", sorted(path.parent for path in ROOT.glob("checkpoints/*/config.json")), ids=str)
def test_a_loaded_model_and_its_fused_copy_have_all_that_a_model_promises(folder):
    model = checkpoint.load(folder)
    assert model.source == str(folder)
    for each in (model, fused(model)):
        assert isinstance(each, Model)
        assert {name: getattr(each, name) for name in PROMISED} == {name: getattr(model, name) for name in PROMISED}
        assert list(each.stages) == model.config["stages"]


def test_saving_again_what_was_loaded_changes_nothing(model, tmp_path):
    checkpoint.save(model, tmp_path, data=DATA)
    before = contents(tmp_path)
    checkpoint.save(checkpoint.load(tmp_path), tmp_path)
    assert contents(tmp_path) == before


def test_a_model_in_training_is_saved_and_stays_in_training(classifier, images, tmp_path):
    expected = classifier(images)
    checkpoint.save(classifier.train(), tmp_path)
    assert classifier.training
    assert torch.equal(checkpoint.load(tmp_path)(images), expected)


def test_a_folder_that_does_not_say_how_photos_are_cropped_shows_their_centre(classifier, tmp_path):
    checkpoint.save(classifier, tmp_path)
    edit(crop_mode=None)(tmp_path)
    assert checkpoint.load(tmp_path).crop_mode == "center"


def test_whole_numbers_may_stand_for_fractions(classifier, images, tmp_path):
    checkpoint.save(classifier, tmp_path)
    edit(crop_pct=1)(tmp_path)
    assert torch.equal(checkpoint.load(tmp_path)(images), classifier(images))


# --- what is refused --------------------------------------------------------------------------------------------------


def edit(**entries):
    """Changes entries of the config; None takes one out."""

    def damage(folder):
        block = {k: v for k, v in (config_of(folder)["cvlab"] | entries).items() if v is not None}
        (folder / "config.json").write_text(json.dumps({"cvlab": block}))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(length):
    return lambda folder: write("model.safetensors", (folder / "model.safetensors").read_bytes()[:length])(folder)


def tensors(change):
    """Changes the weights, a dict, in place."""

    def damage(folder):
        weights = weights_of(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


DAMAGES = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config of another library": write("config.json", b'{"architecture": "resnet18", "num_classes": 3}'),
    "config is a list": write("config.json", b"[1, 2]"),
    "entry is a list": write("config.json", b'{"cvlab": []}'),
    "broken JSON": write("config.json", b'{"cvlab": {'),
    "empty config": write("config.json", b""),
    "not UTF-8": write("config.json", b'{"cvlab": "\xff"}'),
    "nested too deep": write("config.json", b"[" * 100_000),
    "endless number": write("config.json", b'{"cvlab": {"image_size": ' + b"9" * 10_000 + b"}}"),
    "huge config": write("config.json", b" " * (MAX_CONFIG_BYTES + 1)),
    "no format": edit(format=None),
    "format of another version": edit(format=99),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": cut(-100),
    "cut header": cut(20),
    "empty weights": cut(0),
    "pickled weights": lambda folder: torch.save(weights_of(folder), folder / "model.safetensors"),
    "NaN": tensors(lambda weights: weights["head.weight"].view(-1)[1].fill_(torch.nan)),
    "infinity": tensors(lambda weights: weights["stem.1.running_var"].view(-1)[0].fill_(torch.inf)),
    "missing tensor": tensors(lambda weights: weights.pop("head.bias")),
    "missing statistics": tensors(lambda weights: weights.pop("stem.1.running_mean")),
    "extra tensor": tensors(lambda weights: weights.update(extra=torch.zeros(1))),
    "wrong shape": tensors(lambda weights: weights.update({"head.weight": torch.zeros(8, 3)})),
    "wrong number of dimensions": tensors(lambda weights: weights.update({"head.bias": torch.zeros(3, 1)})),
    "unknown network": edit(network="resnet"),
    "network of another task": edit(network="unet", arguments={}),
    "another task": edit(task="segmentation"),
    "unknown task": edit(task="poetry"),
    "more classes than weights": edit(class_names=["a", "b", "c", "d"]),
    "no class": edit(class_names=[]),
    "classes that are no names": edit(class_names=[1, 2, 3]),
    "unknown argument": edit(arguments={"size": 3}),
    "argument of no type": edit(arguments={"widths": "wide"}),
    "no widths": edit(arguments={"widths": []}),
    "widths by name": edit(arguments={"widths": {"first": 4}}),
    "negative width": edit(arguments={"widths": [-4, 8]}),
    "width beyond any memory": edit(arguments={"widths": [10**6, 10**6]}),
    "width beyond any integer": edit(arguments={"widths": [10**30, 8]}),
    "impossible dropout": edit(arguments={"widths": [4, 8], "depth": 2, "dropout": 2}),
    "negative depth": edit(network="unet", task="segmentation", arguments={"depth": -3}),
    "std of 0": edit(std=[0.0, 1, 1]),
    "std of NaN": edit(std=[0.2, float("nan"), 1]),
    "mean of infinity": edit(mean=[0, float("-inf"), 0]),
    "mean beyond any float": edit(mean=[10**400, 0, 0]),
    "mean of two": edit(mean=[0.5, 0.5]),
    "mean of words": edit(mean=["a", "b", "c"]),
    "crop_pct of 0": edit(crop_pct=0),
    "crop_mode of a word": edit(crop_mode="stretch"),
    "threshold of 2": edit(threshold=2.0),
    "threshold of NaN": edit(threshold=float("nan")),
    "one limit": edit(limits=[0.3]),
    "limits of words": edit(limits=["a", "b"]),
    "limit of NaN": edit(limits=[float("nan"), 0]),
    "image_size of 0": edit(image_size=0),
    "negative image_size": edit(image_size=-16),
    "absurd image_size": edit(image_size=10**9),
}
WRONG_TYPES = {
    "task": 1, "network": ["convnet"], "arguments": [4, 8], "class_names": "cat", "image_size": "16", "mean": 0.5,
    "std": {"r": 1}, "crop_pct": "1", "threshold": True,
}  # fmt: skip
DAMAGES |= {f"{key} of another type": edit(**{key: value}) for key, value in WRONG_TYPES.items()}
DAMAGES |= {f"no {key}": edit(**{key: None}) for key in WRONG_TYPES}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_named(classifier, tmp_path, damage):
    checkpoint.save(classifier, tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"weights")
    for path in (tmp_path / "nowhere", tmp_path / "model.pth", "nowhere", "no\0where"):
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_where_the_weights_cannot_be_written_nothing_is(classifier, tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        checkpoint.save(classifier, tmp_path)
    assert contents(tmp_path) == {"model.safetensors": None}


def test_where_the_config_cannot_be_written_the_folder_is_no_model(classifier, tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OSError, match=r"config\.json"):
        checkpoint.save(classifier, tmp_path)
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)


def test_a_fact_that_is_no_json_leaves_the_old_model_whole(classifier, tmp_path):
    checkpoint.save(classifier, tmp_path)
    before = contents(tmp_path)
    another = build("convnet", ["a"], 16, {"widths": [2]})
    with pytest.raises(TypeError):
        checkpoint.save(another, tmp_path, data=object())
    assert contents(tmp_path) == before


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "step-1") as beside:
        write_text(beside / "deep" / "state", "ä")
        assert not (tmp_path / "step-1").exists()
    assert (tmp_path / "step-1" / "deep" / "state").read_bytes() == b"\xc3\xa4"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_folder_replaces_one_of_the_same_name(tmp_path):
    for name in ("old", "new"):
        with new_folder(tmp_path / "step-1") as beside:
            write_text(beside / name, name)
    assert contents(tmp_path / "step-1") == {"new": b"new"}


def test_after_an_error_no_folder_is_left_and_an_old_one_stays(tmp_path):
    def fill(content, fail):
        with new_folder(tmp_path / "step-1") as beside:
            write_text(beside / "state", content)
            assert not fail, "on purpose"

    with pytest.raises(AssertionError, match="on purpose"):
        fill("half", fail=True)
    assert contents(tmp_path) == {}
    fill("whole", fail=False)
    with pytest.raises(AssertionError, match="on purpose"):
        fill("half", fail=True)
    assert contents(tmp_path) == {"step-1": None}
    assert contents(tmp_path / "step-1") == {"state": b"whole"}


# --- the card ---------------------------------------------------------------------------------------------------------

METRICS = {
    "classification": {"accuracy": {"value": 0.91, "low": 0.89, "high": 0.93}},
    "segmentation": {"iou": {"value": 0.77, "low": 0.7, "high": 0.8}, "dice": {"value": 0.87, "low": 0.8, "high": 0.9}},
}
MANIFEST = {
    "command": "train/classifier.py --epochs 3", "seed": 1, "epochs": 3, "minutes": 2.5, "hardware": "2 cores",
    "precision": "bf16", "parameters": 2879, "peak_memory_mb": 900, "versions": {"torch": "2.15.0"},
}  # fmt: skip


def test_the_card_of_a_bare_model_is_read_by_the_hub(model, tmp_path):
    checkpoint.save(model, tmp_path)
    card.write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.to_dict()["library_name"] == "cvlab"
    assert written.data.pipeline_tag == {"classification": "image-classification"}.get(model.task, "image-segmentation")
    assert all(name in written.text for name in (*model.class_names, *model.stages))


def test_the_card_carries_the_score_and_the_training(model, tmp_path):
    checkpoint.save(model, tmp_path, data=DATA)
    metrics = METRICS[model.task]
    (tmp_path / "metrics.json").write_text(json.dumps({"part": "test", "n": 120, **metrics}))
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    card.write(tmp_path)
    written = ModelCard.load(tmp_path / "README.md")
    (result,) = written.data.eval_results
    name = next(iter(metrics))
    assert (result.metric_type, result.metric_value) == (name, metrics[name]["value"])
    assert (result.dataset_name, result.dataset_split) == (DATA["name"], "test")
    for fact in (MANIFEST["command"], MANIFEST["hardware"], "120", "2,879", f"{metrics[name]['low']:.4f}"):
        assert fact in written.text


def test_the_code_on_the_card_runs(model, tmp_path, monkeypatch):
    model.threshold = 0.01  # an untrained segmenter that finds something
    checkpoint.save(model, tmp_path / "model")
    card.write(tmp_path / "model")
    code = (tmp_path / "model" / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    Image.effect_noise((40, 30), 90).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["logits"].shape[:2] == (1, len(model.class_names))
    assert names["attribution"].shape[:2] == (1, 1)


def test_a_mistyped_path_is_a_folder_that_is_not_there(classifier, tmp_path, monkeypatch):
    """It has the form of a name on the Hub; what cannot be reached is beside the point."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    checkpoint.save(classifier, tmp_path / "runs" / "flowers")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load("runs/flwers")
    assert "no folder runs/flwers" in str(caught.value)
    assert "runs has flowers" in str(caught.value)
