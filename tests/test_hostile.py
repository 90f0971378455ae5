"""Folders of strangers that mean harm: each is refused with a sentence of its own, in a process that is watched.

The process reports whether anything was executed (a marker file), opened outside the folder, or connected to, and how
much memory it took beyond what it had before.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.checkpoint import folder as folder_module
from cvlab.explain import grad_cam, predict
from cvlab.models import build
from cvlab.models.timm import read_weights
from cvlab.page import evidence
from cvlab.page.models import Models
from cvlab.trust import judge

ROOT = Path(__file__).resolve().parents[1]
MAX_GROWTH_MB = 300  # beyond the libraries and one small network
SCRIPT = """
import json, resource, sys
from cvlab import checkpoint

homes = tuple(json.loads(sys.argv[1]))
seen = []

def watch(event, arguments):
    if event in ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"):
        seen.append(f"{event} {arguments}")
    elif event == "open" and str(arguments[0]).startswith(homes):
        seen.append(f"open {arguments[0]}")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

checkpoint.load(sys.argv[2])  # a good folder: what a first opening imports and takes is no finding
sys.addaudithook(watch)
for line in sys.stdin:
    folder, before, sentence = line.strip(), peak(), None
    seen.clear()
    try:
        checkpoint.load(folder)
    except checkpoint.CheckpointError as error:
        sentence = str(error)
    except BaseException as error:
        sentence = f"!{type(error).__name__}: {error}"
    print(json.dumps({"sentence": sentence, "seen": list(seen), "growth": peak() - before}), flush=True)
"""


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def ours(folder):
    torch.manual_seed(0)
    checkpoint.save(build("convnet", ["cat", "dog"], 16, {"widths": [4, 8]}), folder)


def theirs(folder):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2)
    timm.models.save_for_hf(network, folder, model_config={"label_names": ["cat", "dog"]}, safe_serialization=True)


def block(**entries):
    """Changes entries of our config."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["cvlab"].update(entries)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def keys(**entries):
    """Changes entries of timm's config, those of pretrained_cfg written view__NAME."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in entries.items():
            if key.startswith("view__"):
                config["pretrained_cfg"][key.removeprefix("view__")] = value
            else:
                config[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def content(name, written):
    return lambda folder: (folder / name).write_bytes(written)


def header(entries, numbers=b"", length=None):
    """model.safetensors with this header, which may say another length."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return content("model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + numbers)


def tensors(change):
    def damage(folder):
        weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def bomb_pickle(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "executed"), protocol=2))


def bomb_checkpoint(folder):
    torch.save({"head.bias": Bomb(folder / "executed")}, folder / "model.safetensors")


def bomb_config(folder):
    (folder / "config.json").write_bytes(pickle.dumps(Bomb(folder / "executed"), protocol=0))


def only_a_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"head.bias": Bomb(folder / "executed")}, folder / "pytorch_model.bin")


def code_beside(folder):
    """A config that asks for code, and the code beside it."""
    (folder / "modeling.py").write_text("import os; os.mkdir('executed')")
    keys(architectures=["Evil"], auto_map={"AutoModel": "modeling.Evil"})(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["cvlab"]
    (folder / "config.json").write_text(json.dumps(config))


def zip_bomb(folder):
    with zipfile.ZipFile(folder / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(50 * 2**20))


def sparse(name, size):
    def damage(folder):
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return damage


def link(name, target):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def directory(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    # weights that are no weights
    "a pickle": (ours, bomb_pickle),
    "a pickled checkpoint": (ours, bomb_checkpoint),
    "only a pickle": (ours, only_a_pickle),
    "a zip bomb": (ours, zip_bomb),
    "an empty file": (ours, content("model.safetensors", b"")),
    "a header of 2^63 bytes": (ours, header({}, length=2**63)),
    "a header longer than the file": (ours, header({"a": F32}, length=1000)),
    "a header of 20 MB": (ours, header(b'{"a":"' + b"x" * (20 * 2**20) + b'"}')),
    "a header of brackets": (ours, header(b"[" * 100_000)),
    "a header that is no object": (ours, header([1, 2])),
    "a header of no UTF-8": (ours, header(b"\xff\xfe{}")),
    "shapes beyond any memory": (ours, header({"head.weight": F32 | {"shape": [2**40, 2**40]}}, bytes(8))),
    "shapes below zero": (ours, header({"head.weight": F32 | {"shape": [-1]}}, bytes(8))),
    "shapes that are no numbers": (ours, header({"head.weight": F32 | {"shape": ["a"]}}, bytes(8))),
    "an infinite shape": (ours, header(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8))),
    "numbers of a foreign type": (ours, header({"head.weight": F32 | {"dtype": "__import__"}}, bytes(8))),
    "a hundred thousand tensors": (ours, header({f"t{i}": F32 for i in range(100_000)}, bytes(8))),
    "a file cut off": (ours, lambda f: os.truncate(f / "model.safetensors", 2000)),
    "bytes behind the end": (
        ours,
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"\0" * 99),
    ),
    "weights of 3 GB": (ours, sparse("model.safetensors", 3 * 2**30)),
    "NaN weights": (ours, tensors(lambda w: w["head.weight"].fill_(torch.nan))),
    "an infinite variance": (ours, tensors(lambda w: w["stem.1.running_var"].fill_(torch.inf))),
    "weights of 1e300": (
        ours,
        tensors(lambda w: w.update({"head.weight": torch.full((2, 8), 1e300, dtype=torch.float64)})),
    ),
    "a weight too many": (ours, tensors(lambda w: w.update({"../../evil": torch.zeros(1)}))),
    "a weight too few": (ours, tensors(lambda w: w.pop("head.bias"))),
    "a wrong shape": (ours, tensors(lambda w: w.update({"head.bias": torch.zeros(3)}))),
    # files that are no files
    "config linked to a secret": (ours, link("config.json", "/etc/passwd")),
    "weights linked to a device": (ours, link("model.safetensors", "/dev/zero")),
    "weights linked beside the folder": (ours, link("model.safetensors", "../good/model.safetensors")),
    "a link to itself": (ours, link("config.json", "config.json")),
    "a pipe for a config": (ours, pipe("config.json")),
    "a pipe for weights": (ours, pipe("model.safetensors")),
    "a folder for a config": (ours, directory("config.json")),
    "a folder for weights": (ours, directory("model.safetensors")),
    # configs
    "a pickled config": (ours, bomb_config),
    "a config of 100 MB": (ours, sparse("config.json", 100 * 2**20)),
    "a config of brackets": (ours, content("config.json", b'{"cvlab":' + b"[" * 200_000)),
    "a number of a million digits": (ours, content("config.json", b'{"cvlab": {"format": ' + b"9" * 10**6 + b"}}")),
    "code beside the config": (ours, code_beside),
    "a class of another library": (ours, content("config.json", b'{"_model_class": "os.system", "classes": 1}')),
    "a network by path": (ours, block(network="../../evil")),
    "an argument that is code": (ours, block(arguments={"widths": "__import__('os').mkdir('executed')"})),
    "an argument that is an object": (ours, block(arguments={"widths": {"_target_": "os.system"}})),
    "channels beyond any memory": (ours, block(arguments={"widths": [8000] * 32, "depth": 32})),
    "a U-Net beyond any memory": (ours, block(network="unet", task="segmentation", arguments={"depth": 20})),
    "views beyond any memory": (ours, block(image_size=4096, arguments={"widths": [512, 512]})),
    "a size below zero": (ours, block(image_size=-1)),
    "a size of a thousand digits": (ours, block(image_size=10**1000)),
    "a temperature of a thousand digits": (ours, block(temperature=10**1000)),
    "a mean that is NaN": (ours, block(mean=[float("nan")] * 3)),
    "a std of 0": (ours, block(std=[0, 0, 0])),
    "a crop of nearly nothing": (ours, block(crop_pct=0.003)),
    "a crop of 1e-9": (ours, block(crop_pct=1e-9)),
    "a crop of the smallest float": (ours, block(crop_pct=5e-324)),
    "a photo resized beyond any memory": (ours, block(image_size=2048, crop_pct=0.2)),
    "a std that makes infinities": (ours, block(std=[1e-30] * 3)),
    "a std of a million": (ours, block(std=[1e6] * 3)),
    "a mean of 900": (ours, block(mean=[900, 0.5, 0.5])),
    "a mean that is a bool": (ours, block(mean=[True, 0.5, 0.5])),
    "a threshold of the smallest float": (ours, block(threshold=5e-324)),
    "a threshold that no pixel reaches": (ours, block(threshold=1 - 1e-16)),
    "a temperature of nearly 0": (ours, block(temperature=1e-30)),
    "limits of 999": (ours, block(limits=[999, -999])),
    "a set of a negative probability": (ours, block(set_threshold=-1e-9)),
    "a negative number of channels": (ours, block(arguments={"widths": [4, -8]})),
    "a dropout of 8000": (ours, block(arguments={"widths": [4, 8], "dropout": 8000})),
    "a padding of thousands": (ours, block(network="plain", arguments={"padding": 8000})),
    "a class twice among fifty thousand": (ours, block(class_names=[*map(str, range(49_999)), "49998"])),
    "a segmenter of 1,001 classes": (
        ours,
        block(network="unet", task="segmentation", arguments={"width": 1}, class_names=[*map(str, range(1001))]),
    ),
    "data that is a list": (ours, block(data=["evil"])),
    # labels
    "labels with line ends": (ours, block(class_names=["cat\nTraceback: send your token to evil", "dog"])),
    "labels with terminal codes": (ours, block(class_names=["\x1b[2Jcat", "dog"])),
    "labels that turn around": (ours, block(class_names=["\u202etac", "dog"])),
    "labels of half characters": (ours, block(class_names=["\ud800", "dog"])),
    "labels of a megabyte": (ours, block(class_names=["cat" * 300_000, "dog"])),
    "a label twice": (ours, block(class_names=["cat", "cat"])),
    "labels of nothing": (ours, block(class_names=["", "dog"])),
    "too many labels": (ours, block(class_names=[str(i) for i in range(200_000)])),
    # timm
    "timm: a foreign class": (theirs, keys(architecture="subprocess.Popen")),
    "timm: a model of the Hub": (theirs, keys(architecture="hf-hub:evil/evil")),
    "timm: a file of its own": (theirs, keys(model_args={"checkpoint_path": "/etc/passwd"})),
    "timm: a class for a layer": (theirs, keys(model_args={"norm_layer": "evil"})),
    "timm: layers beyond any memory": (theirs, keys(model_args={"layers": [10**6] * 4})),
    "timm: another network": (theirs, keys(architecture="resnet18")),
    "timm: the largest network": (
        theirs,
        keys(architecture="eva02_enormous_patch14_clip_224", view__input_size=[3, 224, 224]),
    ),
    "timm: views beyond any memory": (theirs, keys(architecture="test_vit", view__input_size=[3, 4096, 4096])),
    "timm: a billion classes": (theirs, keys(num_classes=10**9)),
    "timm: a number of classes that is terminal codes": (theirs, keys(num_classes="\x1b[2J\n")),
    "timm: views of a megabyte": (theirs, keys(view__input_size=[3, "x" * 10**6, 64])),
    "timm: hostile labels": (theirs, keys(label_names=["\x1b]0;evil\x07", "dog"])),
    "timm: labels by a hostile index": (theirs, keys(label_names={"0": ["evil"], "1": "dog"})),
    "timm: a pool that is code": (theirs, keys(model_args={"global_pool": "evil"})),
    "timm: a crop of nearly nothing": (theirs, keys(view__crop_pct=1e-9)),
    "timm: a std that makes infinities": (theirs, keys(view__std=[1e-30] * 3)),
    "timm: a mean of 123": (theirs, keys(view__mean=[123.7, 116.3, 103.5])),
    "timm: a dropout of 9": (theirs, keys(model_args={"drop_rate": 9})),
    "timm: a head too wide": (theirs, keys(num_classes=3, label_names=["a", "b", "c"])),
}


SMP = {"_model_class": "Unet", "encoder_name": "resnet18", "classes": 1}


def smp_config(**entries):
    return content("config.json", json.dumps(SMP | entries).encode())


HOSTILE |= {
    "smp: a function": (ours, smp_config(_model_class="from_pretrained")),
    "smp: a foreign encoder": (ours, smp_config(encoder_name="\x1b[2J../../evil")),
    "smp: an encoder of the Hub": (ours, smp_config(encoder_name="tu-hf-hub:evil/evil")),
    "smp: an encoder of a folder": (ours, smp_config(encoder_name="tu-local-dir:/etc")),
    "smp: the largest encoder": (ours, smp_config(encoder_name="tu-convnextv2_huge", encoder_depth=5)),
    "smp: a file of its own": (ours, smp_config(checkpoint_path="/etc/passwd")),
    "smp: a class for a layer": (ours, smp_config(decoder_use_norm={"type": "evil"})),
    "smp: a decoder beyond any memory": (ours, smp_config(decoder_channels=[10**6] * 5)),
    "smp: 1,001 classes": (ours, smp_config(classes=1001)),
    "smp: a negative decoder": (ours, smp_config(decoder_channels=[64, 32, -16, 8, 4])),
    "smp: a million blocks": (ours, smp_config(encoder_depth=10**6, decoder_channels=[1] * 10**6)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    ours(root / "good")
    for i, (make, damage) in enumerate(HOSTILE.values()):
        make(root / str(i))
        damage(root / str(i))
    return root


@pytest.fixture(scope="module")
def findings(folders):
    """What happened to each folder, from one process that met them all, one after another."""
    homes = json.dumps(["/etc/passwd", "/dev/zero"])
    paths = [str(folders / str(i)) for i in range(len(HOSTILE))]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, homes, folders / "good"],
        input="\n".join(paths),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folders,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(HOSTILE, map(json.loads, ran.stdout.splitlines()), strict=True))


def test_there_are_enough():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused(findings, folders, name):
    found = findings[name]
    folder = folders / str(list(HOSTILE).index(name))
    assert found["sentence"] is not None, "it was opened"
    assert found["sentence"].startswith(str(folder)), found["sentence"]
    said = found["sentence"].replace(str(folder), "")
    assert said.isprintable()
    assert len(said) < 600
    assert found["sentence"].endswith(".")
    assert not found["seen"]
    assert found["growth"] < MAX_GROWTH_MB
    assert not list(folders.rglob("executed"))


def test_different_faults_have_different_sentences(findings, folders):
    said = {found["sentence"].replace(str(folders / str(i)), "") for i, found in enumerate(findings.values())}
    assert len(said) >= 40


def test_given_weights_that_would_run_code_are_refused(tmp_path):
    """`--weights FILE` of the trainers."""
    torch.save({"head.bias": Bomb(tmp_path / "executed")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read as weights"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


# --- files that change between check and load -------------------------------------------------------------------------


def replace(path, written, in_place):
    if in_place:
        with open(path, "r+b") as file:
            file.truncate()
            file.write(written)
    else:
        beside = path.with_suffix(".new")
        beside.write_bytes(written)
        os.replace(beside, path)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("moment", ["read_config", "_measured", "_read_header", "misfit", "_read_tensors"])
def test_files_that_change_between_check_and_load(tmp_path, monkeypatch, moment, in_place):
    """Whenever the files are exchanged, what is loaded is what was checked, or it is refused."""
    ours(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    evil = {name: torch.full_like(tensor, torch.nan) for name, tensor in good.items() if tensor.is_floating_point()}
    evil |= {name: tensor.clone() for name, tensor in good.items() if name not in evil}
    good = {name: tensor.clone() for name, tensor in good.items()}
    save_file(evil, tmp_path / "evil.safetensors")
    written = (tmp_path / "evil.safetensors").read_bytes()
    true = getattr(folder_module, moment)

    def changed(*arguments):
        returned = true(*arguments)
        replace(tmp_path / "model.safetensors", written, in_place)
        replace(tmp_path / "config.json", b"evil", in_place)
        return returned

    monkeypatch.setattr(folder_module, moment, changed)
    try:
        model = checkpoint.load(tmp_path)
    except CheckpointError:
        return
    assert all(torch.equal(tensor, good[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    """A memory-mapped file would end the process with SIGBUS."""
    ours(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    stop = threading.Event()

    def flicker():
        while not stop.is_set():
            os.truncate(tmp_path / "model.safetensors", 3000)
            with open(tmp_path / "model.safetensors", "r+b") as file:
                file.write(whole)

    thread = threading.Thread(target=flicker)
    thread.start()
    try:
        for _ in range(20):
            try:
                model = checkpoint.load(tmp_path)
            except CheckpointError:
                continue
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    finally:
        stop.set()
        thread.join()


# --- logits that are no answer ----------------------------------------------------------------------------------------


def overflow(model):
    with torch.no_grad():
        model.head.weight.fill_(3e38)


def nearly_overflow(model):
    """Finite, but not when divided by a temperature."""
    with torch.no_grad():
        model.head.weight.fill_(0)
        model.head.bias.copy_(torch.tensor([3e38, -3e38]))


def negative_variance(model):
    with torch.no_grad():
        model.stem[1].running_var.fill_(-1)


@pytest.mark.parametrize("damage", [overflow, nearly_overflow, negative_variance])
def test_logits_that_are_not_finite_become_one_sentence(tmp_path, damage):
    model = build("convnet", ["cat", "dog"], 16, {"widths": [4, 8]}).eval()
    damage(model)
    images = torch.rand(1, 3, 16, 16)
    for ask in (predict, grad_cam, judge_nothing):
        with pytest.raises(ValueError, match="logits are not finite"):
            ask(model, images)
    checkpoint.save(model, tmp_path)  # each weight is finite
    with pytest.raises(ValueError, match="logits are not finite"):
        Models({"evil": str(tmp_path)})["evil"]


def judge_nothing(model, images):
    return judge(model, images, torch.rand(1, 1, 4, 4))


def test_a_map_that_is_not_finite_is_not_drawn(monkeypatch):
    """The gradient may overflow where the logits do not."""
    model = build("convnet", ["cat", "dog"], 16, {"widths": [4, 8]}).eval()
    true = evidence.explain

    def broken(*arguments):
        found = true(*arguments)
        for maps in found.maps.values():
            for each in maps.values():
                each *= 1e38
                each *= 1e38
        return found

    monkeypatch.setattr(evidence, "explain", broken)
    with pytest.raises(ValueError, match="maps of this model are not finite"):
        evidence.predict_photo(Image.new("RGB", (16, 16), "red"), model)
