"""What an epoch of training costs, as a multiple of the loop that people usually write.

python tests/bench/train.py --json FILE      measure what FILE does not hold yet, and print the tables
python tests/bench/train.py --quick          tiny networks and few pictures, twice: whether it runs
python tests/bench/train.py --json FILE --photos DIR    with the trainings that compare the accuracy, on a folder with
                                             train, val and test; about half an hour more
python tests/bench/train.py --json FILE --write         put the tables into tests/bench/README.md

"Plain" is the loop of PyTorch's examples: ImageFolder, torchvision's transforms on PIL images, DataLoader, float32.
"cvlab" is that of train/classifier.py and train/segmenter.py: images decoded once, batches augmented as tensors,
channels last, and the precision that `--precision auto` finds. Networks, batches, numbers of steps and the kinds of
augmentation are the same: a crop, a turn, a mirror image, brightness, contrast and saturation. The pictures are
synthetic scenes saved as JPEGs of 400 x 400 pixels, about as many as a photo of 500 x 333 has and as slow to decode.

Every contender is a process of its own, made before the clock starts. A round runs each of them once, in an order drawn
anew, while the others wait.
"""

import argparse
import json
import math
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tables import README, hardware, inserted, spread, table
from timm.data import create_dataset, create_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import decode_image
from torchvision.transforms import InterpolationMode, functional, v2

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]  # the repository root and what the scripts share

from accelerator import accelerator_for

from cvlab.checkpoint import load
from cvlab.data import shapes
from cvlab.data.cache import Cache
from cvlab.data.parts import Parts
from cvlab.data.sets import CACHE_MARGIN, AugmentedImages, AugmentedPairs, EvaluationSet, channels_last
from cvlab.learning import frozen
from cvlab.memory import keep_freed_memory
from cvlab.models import build
from cvlab.transforms import open_image, resized, to_uint8, whole_mask, whole_view

PHOTO_SIDE = 400
MIN_AREA, DEGREES, AMOUNT = 0.6, 15, 0.3  # of the augmentation, as train/classifier.py has it
PLAIN = "plain"

# --- tasks ------------------------------------------------------------------------------------------------------------

DEEP = {"widths": [64, 128, 256, 512], "depth": 2, "hidden": [512], "head_dropout": [0, 0.5], "batch_norm": True}
DEEP["pool_to"] = 4


@dataclass
class Task:
    """What a round does: `steps` batches of pictures at `size` pixels, which are only loaded without a network."""

    part: str  # of the figures
    size: int
    batch: int
    steps: int
    network: str | None = None
    arguments: dict | None = None

    @property
    def masks(self) -> bool:
        return self.network == "unet"

    @property
    def pictures(self) -> int:
        return self.batch * self.steps

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return build(self.network, ["object"] if self.masks else shapes.CLASS_NAMES, self.size, self.arguments)

    @property
    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        if self.masks:
            return lambda logits, masks: F.binary_cross_entropy_with_logits(logits, masks.float())
        return F.cross_entropy


TASKS = {
    "deep CNN 64-512, 64 px": Task("epochs", 64, 32, 2, "plain", DEEP),
    "deep CNN 64-512, 150 px": Task("epochs", 150, 16, 1, "plain", DEEP),
    "ConvNet 24-192, 64 px": Task("epochs", 64, 64, 4, "convnet", {"widths": [24, 48, 96, 192]}),
    "U-Net 32-256, 128 px": Task("epochs", 128, 8, 2, "unet", {"width": 32, "depth": 3}),
    "64 px": Task("loaders", 64, 64, 4),
    "150 px": Task("loaders", 150, 64, 4),
    "ResNet-18, 224 px": Task("frozen", 224, 16, 1, "timm", {"architecture": "resnet18"}),
    "ConvNet 24-192, 150 px": Task("memory", 150, 16, 100, "convnet", {"widths": [24, 48, 96, 192]}),
}
QUICK = {
    "ConvNet 8, 16 px": Task("epochs", 16, 4, 2, "convnet", {"widths": [8]}),
    "U-Net 4-8, 16 px": Task("epochs", 16, 4, 2, "unet", {"width": 4, "depth": 1}),
    "16 px": Task("loaders", 16, 4, 2),
    "ResNet-10t, 32 px": Task("frozen", 32, 4, 1, "timm", {"architecture": "resnet10t"}),
    "memory, 16 px": Task("memory", 16, 4, 2, "convnet", {"widths": [8]}),
}
ROUNDS = {"epochs": 7, "loaders": 7, "frozen": 5, "memory": 1}

# --- the plain way ----------------------------------------------------------------------------------------------------


def plain_transform(size: int) -> transforms.Compose:
    """As in the example for ImageNet, with the augmentation of this benchmark."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (MIN_AREA, 1)),
            transforms.RandomRotation(DEGREES, InterpolationMode.BILINEAR),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(AMOUNT, AMOUNT, AMOUNT),
            transforms.ToTensor(),
        ]
    )


class PlainPairs(Dataset):
    """A data set of pictures and masks as tutorials on U-Nets write it."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths, self.size = sorted(folder.rglob("*.jpg")), size
        self.jitter = transforms.ColorJitter(AMOUNT, AMOUNT, AMOUNT)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        image, mask = Image.open(path).convert("RGB"), Image.open(mask_of(path))
        image = functional.resize(image, [self.size, self.size])
        mask = functional.resize(mask, [self.size, self.size], InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = functional.hflip(image), functional.hflip(mask)
        move = {"angle": random.uniform(-DEGREES, DEGREES), "translate": [random.randint(-9, 9) for _ in range(2)]}
        move |= {"scale": random.uniform(0.7, 1.4), "shear": 0.0}
        image = functional.affine(image, **move, interpolation=InterpolationMode.BILINEAR)
        mask = functional.affine(mask, **move)
        return functional.to_tensor(self.jitter(image)), (functional.to_tensor(mask) > 0.5).float()


def plain_loader(task: Task, folder: Path, workers: int) -> DataLoader:
    pictures = PlainPairs(folder, task.size) if task.masks else ImageFolder(folder, plain_transform(task.size))
    some = Subset(pictures, range(0, len(pictures), len(pictures) // task.pictures)[: task.pictures])
    return DataLoader(
        some, task.batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )


def plain_epoch(task: Task, folder: Path, workers: int) -> Callable:
    loader, model, criterion = plain_loader(task, folder, workers), task.model(), task.criterion
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def epoch() -> None:
        model.train()
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()

    return epoch


# --- cvlab ------------------------------------------------------------------------------------------------------------


def cvlab_set(task: Task, folder: Path, cache: Cache) -> AugmentedImages | AugmentedPairs:
    paths = sorted(folder.rglob("*.jpg"))
    samples = [paths[i % len(paths)] for i in range(task.pictures)]
    if task.masks:

        def opened(path: Path, at_least: int | None) -> tuple[Image.Image, Tensor]:
            return open_image(path), torch.from_numpy(np.asarray(Image.open(mask_of(path))) > 0)[None]

        images, masks = Parts("scenes", [], {"train": samples}, opened).read(
            "train",
            lambda image: to_uint8(whole_view(image, task.size)),
            lambda mask: whole_mask(mask, task.size),
            cache=cache,
        )
        return AugmentedPairs(images, masks, seed=0)
    side = math.ceil(task.size * CACHE_MARGIN)
    images, labels = Parts(
        "scenes", [], {"train": samples}, lambda path, at_least: (open_image(path, at_least), 0)
    ).read("train", lambda image: to_uint8(resized(image, side)), at_least=2 * side, cache=cache)
    return AugmentedImages(images, torch.tensor(labels), task.size, seed=0, min_area=MIN_AREA)


def cvlab_loader(data_set: Dataset, batch: int) -> DataLoader:
    return DataLoader(data_set, batch, shuffle=True, drop_last=True, collate_fn=channels_last)


def cvlab_epoch(task: Task, folder: Path, precision: str, cache: Cache) -> Callable:
    train_set = cvlab_set(task, folder, cache)
    loader, model, criterion = cvlab_loader(train_set, task.batch), task.model(), task.criterion
    model = model.to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as out:
        args = argparse.Namespace(precision=precision, out=Path(out), resume=False, seed=0)
        accelerator = accelerator_for(model, next(iter(loader)), criterion, args, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch() -> str:
        model.train()
        train_set.epoch += 1
        loader.set_epoch(train_set.epoch)
        total = torch.zeros((), dtype=torch.float64)
        for images, labels in loader:
            loss = criterion(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"

    return epoch


# --- loaders ----------------------------------------------------------------------------------------------------------


class TensorFolder(Dataset):
    """torchvision's own decoder and its transforms of tensors."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(size, (MIN_AREA, 1), antialias=True),
                v2.RandomRotation(DEGREES, InterpolationMode.BILINEAR),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(AMOUNT, AMOUNT, AMOUNT),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(decode_image(str(self.paths[index]), "RGB")), 0


def timm_loader(task: Task, folder: Path, workers: int) -> Iterable:
    """timm's, with its own order of things: it does not turn."""
    return create_loader(
        create_dataset("", str(folder), is_training=True),
        (3, task.size, task.size),
        task.batch,
        is_training=True,
        scale=(MIN_AREA, 1),
        color_jitter=AMOUNT,
        interpolation="bilinear",
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def through(loader: Iterable, steps: int) -> Callable:
    def epoch() -> None:
        for i, (images, _) in enumerate(loader, start=1):
            assert images.dtype == torch.float32
            if i == steps:
                break

    return epoch


def reading(task: Task, folder: Path) -> Callable:
    def once() -> None:
        cvlab_set(task, folder, Cache())

    return once


def one_batch(task: Task) -> Callable:
    """Steps on one batch of random numbers: what model and batch take without any pictures."""
    model, criterion = task.model().to(memory_format=torch.channels_last), task.criterion
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.rand(task.batch, 3, task.size, task.size), torch.zeros(task.batch, dtype=torch.long)

    def steps() -> None:
        for _ in range(4):
            criterion(model(images.contiguous(memory_format=torch.channels_last)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


# --- a frozen backbone ------------------------------------------------------------------------------------------------

EPOCHS = 10  # of a round: features are computed once for all of them


def plain_frozen(task: Task, folder: Path) -> Callable:
    """As tutorials have it: a new head on a backbone whose parameters do not ask for gradients."""
    view = transforms.Compose([transforms.Resize((task.size, task.size)), transforms.ToTensor()])
    pictures = ImageFolder(folder, view)
    some = Subset(pictures, range(0, len(pictures), len(pictures) // task.pictures)[: task.pictures])
    loader, model = DataLoader(some, task.batch, shuffle=True), task.model()
    model.requires_grad_(False)
    head = model.backbone.get_classifier().requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)

    def epochs() -> None:
        model.train()
        for _ in range(EPOCHS):
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()

    return epochs


def cvlab_frozen(task: Task, folder: Path) -> Callable:
    """As train/transfer.py with --views 1; pictures are read, and features computed, within the time that is taken."""
    paths = sorted(folder.rglob("*.jpg"))[: task.pictures]
    model = task.model().to(memory_format=torch.channels_last)
    frozen.freeze(model)

    def epochs() -> None:
        parts = Parts("scenes", [], {"train": paths}, lambda path, at_least: (open_image(path, at_least), 0))
        images, labels = parts.read("train", lambda image: to_uint8(whole_view(image, task.size)))
        pictures = EvaluationSet(images, torch.tensor(labels))
        first, rest = frozen.cut(model, pictures.__getitems__([0, 1])[0])
        known = frozen.FeatureSet(pictures, 1, partial(frozen.entering, model, first), task.batch)
        loader = cvlab_loader(known, task.batch)
        optimizer = torch.optim.SGD(rest.parameters(), lr=0.01, momentum=0.9)
        for _ in range(EPOCHS):
            frozen.train_mode(rest)
            for inputs, labels in loader:
                F.cross_entropy(rest(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

    return epochs


Contender = Callable[[Task, Path, Cache], Callable]
CONTENDERS: dict[str, dict[str, Contender]] = {
    "epochs": {
        PLAIN: lambda task, folder, cache: plain_epoch(task, folder, 0),
        "plain, 2 workers": lambda task, folder, cache: plain_epoch(task, folder, 2),
        "cvlab, float32": lambda task, folder, cache: cvlab_epoch(task, folder, "fp32", cache),
        "cvlab": lambda task, folder, cache: cvlab_epoch(task, folder, "auto", cache),
    },
    "loaders": {
        PLAIN: lambda task, folder, cache: through(plain_loader(task, folder, 0), task.steps),
        "plain, 2 workers": lambda task, folder, cache: through(plain_loader(task, folder, 2), task.steps),
        "torchvision on tensors": lambda task, folder, cache: through(
            DataLoader(TensorFolder(folder, task.size), task.batch, shuffle=True), task.steps
        ),
        "timm, without turning": lambda task, folder, cache: through(timm_loader(task, folder, 0), task.steps),
        "timm, 2 workers, without turning": lambda task, folder, cache: through(
            timm_loader(task, folder, 2), task.steps
        ),
        "cvlab": lambda task, folder, cache: through(
            cvlab_loader(cvlab_set(task, folder, cache), task.batch), task.steps
        ),
        "cvlab, reading once before": lambda task, folder, cache: reading(task, folder),
    },
    "frozen": {
        PLAIN: lambda task, folder, cache: plain_frozen(task, folder),
        "cvlab": lambda task, folder, cache: cvlab_frozen(task, folder),
    },
    "memory": {
        "model and batch": lambda task, folder, cache: one_batch(task),
        "cvlab": lambda task, folder, cache: cvlab_epoch(task, folder, "fp32", cache),
    },
}

# --- measuring --------------------------------------------------------------------------------------------------------


def mask_of(path: Path) -> Path:
    return path.parents[2] / "masks" / f"{path.stem}.png"


def write_scenes(folder: Path, count: int, side: int) -> Path:
    """JPEGs in a folder of each class, and masks beside them."""
    (folder / "masks").mkdir(parents=True)
    for seed in range(count):
        scene = shapes.scene(seed, side)
        path = folder / "photos" / shapes.CLASS_NAMES[scene.label] / f"{seed:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(path, quality=90)
        Image.fromarray(scene.mask).save(mask_of(path))
    return folder / "photos"


def mebibytes(key: str) -> float:
    """What Linux says of this process's memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 2**10


def answer_rounds(task: Task, name: str, folder: Path, pipe: Connection) -> None:
    """The child's side of `rounds`: one answer to every word, and one at the end."""
    loaded = mebibytes("VmRSS")
    if name.startswith("cvlab"):
        keep_freed_memory()
    cache = Cache()
    call = CONTENDERS[task.part][name](task, folder, cache)
    call()  # slower than those that follow
    pipe.send("ready")
    while pipe.recv():
        wall, spent = time.perf_counter(), cpu_seconds()
        note = call()
        pipe.send({"seconds": time.perf_counter() - wall, "cpu": cpu_seconds() - spent, "note": note})
    pipe.send({"loaded": loaded, "peak": mebibytes("VmHWM"), "cache": cache.nbytes / 2**20})


def cpu_seconds() -> float:
    """Of this process. Those of workers are not in it: they are known only once they have ended."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rounds(task: Task, folder: Path, count: int, start_method: str) -> dict[str, dict]:
    """Of every contender: seconds of each round, and memory at the end."""
    context = multiprocessing.get_context(start_method)
    pipes = {}
    for name in CONTENDERS[task.part]:
        pipes[name], far_end = context.Pipe()
        context.Process(target=answer_rounds, args=(task, name, folder, far_end)).start()
        far_end.close()  # so that a child that dies is an EOFError here
        pipes[name].recv()  # one after the other: it is ready
    found: dict[str, dict] = {name: {"rounds": []} for name in pipes}
    order, shuffled = list(pipes), random.Random(0)
    for _ in range(count):
        shuffled.shuffle(order)
        for name in order:
            pipes[name].send(True)
            found[name]["rounds"].append(pipes[name].recv())
    for name, pipe in pipes.items():
        pipe.send(False)
        found[name]["memory"] = pipe.recv()
    return found


# --- accuracy ---------------------------------------------------------------------------------------------------------

LEARNED = {"size": 64, "batch": 64, "epochs": 16, "lr": 0.1, "widths": [24, 48, 96, 192]}


def plain_training(photos: Path, seed: int) -> nn.Module:
    """A whole training of the plain way, with the network, optimizer and schedule that the script has by default."""
    torch.manual_seed(seed)
    random.seed(seed)
    train_set = ImageFolder(photos / "train", plain_transform(LEARNED["size"]))
    loader = DataLoader(train_set, LEARNED["batch"], shuffle=True, drop_last=True)
    model = build("convnet", train_set.classes, LEARNED["size"], {"widths": LEARNED["widths"]})
    optimizer = torch.optim.SGD(model.parameters(), LEARNED["lr"], 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNED["lr"], LEARNED["epochs"] * len(loader), cycle_momentum=False
    )
    best, best_state = -1.0, {}
    for _ in range(LEARNED["epochs"]):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
        if (found := accuracy(model, photos / "val")) > best:
            best, best_state = found, {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, folder: Path) -> float:
    size = LEARNED["size"]
    whole = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    pictures = ImageFolder(folder, whole)
    model.eval()
    right = [(model(images).argmax(1) == labels).sum().item() for images, labels in DataLoader(pictures, 64)]
    return sum(right) / len(pictures)


def train_once(photos: Path, seed: int, name: str, out: Path) -> dict:
    """Accuracy on test, and seconds of the processor for the training."""
    before = cpu_seconds()
    if name == PLAIN:
        model, spent = plain_training(photos, seed), cpu_seconds() - before
    else:
        command = [sys.executable, "train/classifier.py", "--data", photos, "--out", out, "--seed", seed]
        command += ["--epochs", LEARNED["epochs"], "--allow-leaks", "--patience", LEARNED["epochs"]]
        subprocess.run([*map(str, command)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        model, spent = load(out), used.ru_utime + used.ru_stime
    return {"accuracy": accuracy(model, photos / "test"), "cpu": spent}


def trainings(photos: Path, seeds: int = 3) -> dict:
    """Both ways with the same seeds, each training in a process of its own."""
    found: dict = {
        "photos": photos.name,
        "n": sum(1 for path in (photos / "test").rglob("*.*")),
        PLAIN: [],
        "cvlab": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name in (PLAIN, "cvlab"):
                command = [sys.executable, __file__, "--train", name, str(photos), str(seed), f"{folder}/{seed}"]
                child = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(child.stdout.splitlines()[-1]))
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def walls(found: dict) -> list[float]:
    return [each["seconds"] for each in found["rounds"]]


def ratios(found: dict, name: str, to: str = PLAIN) -> list[float]:
    """Seconds as multiples of another contender's in the same round."""
    return [ours / theirs for ours, theirs in zip(walls(found[name]), walls(found[to]), strict=True)]


def epochs_table(figures: dict) -> str:
    found = figures["epochs"]
    head = [f"{key}, n = {len(of[PLAIN]['rounds'])}" for key, of in found.items()]
    rows = [[PLAIN, *(f"{statistics.median(walls(of[PLAIN])):.2f} s" for of in found.values())]]
    for name in list(CONTENDERS["epochs"])[1:]:
        cells = [spread(ratios(of, name)) for of in found.values()]
        if name == "cvlab":
            cells = [f"{cell}, {of[name]['rounds'][0]['note']}" for cell, of in zip(cells, found.values(), strict=True)]
        rows.append([name, *cells])
    return table(["epoch", *head], rows)


def loaders_table(figures: dict) -> str:
    found = figures["loaders"]
    head, rows = [], []
    for key in found:
        head += [f"{key}, images a second", f"as a multiple, n = {len(found[key][PLAIN]['rounds'])}"]
    for name in CONTENDERS["loaders"]:
        cells = []
        for key, of in found.items():
            task = (TASKS | QUICK)[key]
            cells += [f"{task.pictures / statistics.median(walls(of[name])):.0f}"]
            cells += [spread(ratios(of, PLAIN, to=name), 1)]
        rows.append([name, *cells])
    return table(["loader", *head], rows)


def frozen_sentence(figures: dict) -> str:
    sentences = []
    for key, found in figures["frozen"].items():
        times = spread(ratios(found, PLAIN, to="cvlab"), 1)
        sentences.append(
            f"{EPOCHS} epochs of a new head on a frozen {key}, without augmentation: {times} times as fast as plain, "
            f"features computed once and their computing included, n = {len(found[PLAIN]['rounds'])}."
        )
    return " ".join(sentences)


def memory_sentence(figures: dict) -> str:
    sentences = []
    for key, found in figures["memory"].items():
        memory = {name: of["memory"] for name, of in found.items()}
        beyond = {name: of["peak"] - of["loaded"] for name, of in memory.items()}
        cache = memory["cvlab"]["cache"]
        expected = beyond["model and batch"] + cache
        sentences.append(
            f"Peak resident memory beyond the loaded libraries, {key}: {beyond['cvlab']:.0f} MiB, which is "
            f"{beyond['cvlab'] / expected:.2f} of what model and batch ({beyond['model and batch']:.0f} MiB) and the "
            f"cache ({cache:.0f} MiB) take. The system takes the cache's pages back at need."
        )
    return " ".join(sentences)


def trainings_sentence(figures: dict) -> str:
    found = figures["trainings"]
    means = {name: statistics.mean(each["accuracy"] for each in found[name]) for name in (PLAIN, "cvlab")}
    pairs = zip(found["cvlab"], found[PLAIN], strict=True)
    points = [100 * (ours["accuracy"] - theirs["accuracy"]) for ours, theirs in pairs]
    cost = sum(each["cpu"] for each in found["cvlab"]) / sum(each["cpu"] for each in found[PLAIN])
    return (
        f"Accuracy after {LEARNED['epochs']} epochs on {found['photos']} (ConvNet 24-192, 64 px; {found['n']} test "
        f"pictures, {len(points)} seeds): cvlab {means['cvlab']:.3f}, plain {means[PLAIN]:.3f}; cvlab less plain with "
        f"the same seed, in points: {', '.join(f'{each:+.1f}' for each in points)}. The whole command, with start, "
        f"reading, evaluation and saving, took {cost:.2f} of the processor time of the plain loop."
    )


def page(figures: dict) -> str:
    """What stands between the marks in tests/bench/README.md."""
    versions = ", ".join(f"{key} {number}" for key, number in figures["versions"].items())
    parts = [
        f"An epoch as a multiple of the plain loop's (ImageFolder, torchvision's transforms on PIL images, DataLoader, "
        f"float32), medians of n interleaved rounds with quartiles, on {figures['hardware']}, {versions}. Same "
        "networks, batches, steps and kinds of augmentation; behind cvlab's figure stands the precision that it chose.",
        epochs_table(figures),
        f"Batches ready for a step, from JPEGs of {PHOTO_SIDE} x {PHOTO_SIDE} pixels, cropped, turned, mirrored and "
        "coloured; the multiple is of plain, quartiles in brackets:",
        loaders_table(figures),
        frozen_sentence(figures),
        memory_sentence(figures),
    ]
    if "trainings" in figures:
        parts.append(trainings_sentence(figures))
    return "\n" + "\n\n".join(parts) + "\n"


def measure(figures: dict, tasks: dict[str, Task], quick: bool, keep: Callable[[], None]) -> None:
    """Adds to the figures what they do not hold yet; `keep` is called after each part."""
    with tempfile.TemporaryDirectory() as folder:
        photos = None
        for key, task in tasks.items():
            if key in figures.setdefault(task.part, {}):
                continue
            photos = photos or write_scenes(Path(folder) / "scenes", 12 if quick else 256, 40 if quick else PHOTO_SIDE)
            print(f"timing {key}", file=sys.stderr)
            # Forked children need not import anything again, but cannot tell their own memory from their parent's.
            method = "spawn" if task.part == "memory" and not quick else "fork"
            figures[task.part][key] = rounds(task, photos, 2 if quick else ROUNDS[task.part], method)
            keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny networks, twice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go, and are taken from")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder with parts, for the accuracy")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    parser.add_argument("--train", nargs=4, metavar=("NAME", "PHOTOS", "SEED", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        name, photos, seed, out = args.train
        print(json.dumps(train_once(Path(photos), int(seed), name, Path(out))))
        return
    figures = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    figures |= {"hardware": hardware(), "versions": {key: version(key) for key in ("torch", "torchvision", "timm")}}

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1))

    measure(figures, QUICK if args.quick else TASKS, args.quick, keep)
    if args.photos and "trainings" not in figures:
        figures["trainings"] = trainings(args.photos.resolve())
        keep()
    if args.write:
        README.write_text(inserted(README.read_text(), "bench-train", page(figures)))
    print(page(figures))


if __name__ == "__main__":
    main()
