"""What a prediction with its explanation costs, as a multiple of the model's plain forward pass.

python tests/bench/explain.py                print the tables; about fifteen minutes on two cores that do nothing else
python tests/bench/explain.py --write        put them into tests/bench/README.md
python tests/bench/explain.py --json FILE    the figures behind them too; a second run goes on from there
python tests/bench/explain.py --shared       on a machine that does other things too: processor time of one thread
python tests/bench/explain.py --network "U-Net on ResNet-18, 256 px"     the times of one network, printed alone
python tests/bench/explain.py --quick        two small networks, twice: whether it runs

Everything is timed interleaved in one process: a round runs every contender once, in an order drawn anew, and divides
by the plain forward pass (eval mode, no_grad) of the same round. The tables show the median over rounds and the
quartiles. Peers are used as in their READMEs, at the same stage, for the predicted class or the predicted mask, with
everything that makes the picture: what cvlab gives is resized to the image too. Weights are random. Peak memory is
resident memory of a process of its own, which predicts and explains twice.
"""

import argparse
import ctypes
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path

import torch
from captum.attr import LayerAttribution, LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget
from tables import README, hardware, inserted, spread, table
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchcamGradCAM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab.explain import default_stage, explain, grad_cam, heatmap, predict, predicted_masks, predicted_score
from cvlab.explain.many import explain_predictions
from cvlab.models import Model, build
from cvlab.models.fused import fused

MARK = "bench-explain"
SHORTEST = 0.05  # seconds: what is faster is repeated within a round
FORWARD = "plain forward"

# --- networks ---------------------------------------------------------------------------------------------------------

IMAGENET = [str(i) for i in range(1000)]
SHAPES = ["circle", "cross", "square", "star", "triangle"]
DEEP = {"widths": [64, 128, 256, 512], "depth": 2, "batch_norm": True, "pool_to": 4}  # train/recipes/caltech256-deep-*
NETWORKS: dict[str, Callable[[], Model]] = {
    "ResNet-18, 224 px": lambda: build("timm", IMAGENET, 224, {"architecture": "resnet18"}),
    "ResNet-50, 224 px": lambda: build("timm", IMAGENET, 224, {"architecture": "resnet50"}),
    "VGG-16, 224 px": lambda: build("timm", IMAGENET, 224, {"architecture": "vgg16"}),
    "deep CNN 64-512, 224 px": lambda: build("plain", IMAGENET[:257], 224, DEEP),
    "ConvNet 32-256, 128 px": lambda: build("convnet", SHAPES, 128, {"widths": [32, 64, 128, 256], "depth": 2}),
    "ConvNet 24-192, 64 px": lambda: build("convnet", SHAPES, 64, {"widths": [24, 48, 96, 192]}),
    "U-Net 64-512, 256 px": lambda: build("unet", ["object"], 256, {"width": 64, "depth": 3}),
    "U-Net on ResNet-18, 256 px": lambda: build("smp", ["object"], 256, {"encoder": "resnet18"}),
    "ConvNet 8-16, 32 px": lambda: build("convnet", SHAPES, 32, {"widths": [8, 16]}),
    "U-Net 8-16, 32 px": lambda: build("unet", ["object"], 32, {"width": 8, "depth": 1}),
}
CLASSIFIERS = list(NETWORKS)[:6]
SEGMENTER = list(NETWORKS)[6]
BATCHES = {"ResNet-18, 224 px": 16, SEGMENTER: 2}
ROUNDS = {"VGG-16, 224 px": 9, "deep CNN 64-512, 224 px": 9, SEGMENTER: 5}  # of the others 15
BATCH_ROUNDS = 3
QUICK = list(NETWORKS)[8:]


def network(name: str) -> tuple[Model, Tensor]:
    """A network in eval mode and one image; a segmenter finds half of it to be its object."""
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    images = torch.rand(1, 3, model.image_size, model.image_size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a training leaves them
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    if model.task == "segmentation":
        model.threshold = predict(model, images).sigmoid().median().item()
    return model, images


# --- contenders -------------------------------------------------------------------------------------------------------
# Each takes a model of its own and images, and gives a call without arguments: one prediction and its maps at image
# size, of the default stage of a classifier or of all stages of a segmenter.


def stages_of(model: Model) -> list[str]:
    """The stages to explain: the last one of a classifier, all of a segmenter."""
    return [default_stage(model)] if model.task == "classification" else list(model.stages)


def plain(model: Model, images: Tensor) -> Callable:
    """The forward pass alone."""

    def call() -> None:
        with torch.no_grad():
            model(images)

    return call


def cvlab(model: Model, images: Tensor) -> Callable:
    """One forward and one backward pass for everything."""
    size = images.shape[-2:]

    def one() -> None:
        _, attribution = grad_cam(model, images)
        heatmap(attribution, size)

    def all_of_them() -> None:
        explanation = explain(model, images, predicted_score(model))
        predicted_masks(model, explanation.logits)
        for attribution in explanation.maps["grad_cam"].values():
            heatmap(attribution, size)

    def batch() -> None:  # as train/explain.py makes the maps of a data set
        explanation = explain_predictions(model, images, stages_of(model))
        for attribution in explanation.maps["grad_cam"].values():
            heatmap(attribution, size)

    if len(images) > 1:
        return batch
    return one if model.task == "classification" else all_of_them


def by_grad_cam(model: Model, images: Tensor) -> Callable:
    """pytorch-grad-cam: the object is made once for a layer, and of several layers it gives only the mean map."""
    layers = [model.stages[stage].module for stage in stages_of(model)]
    if model.task == "classification":
        cam = GradCAM(model=model, target_layers=layers)

        def one() -> None:
            cam(input_tensor=images, targets=None)  # the predicted classes; cam.outputs holds the logits

        return one

    def each() -> None:
        with torch.no_grad():
            masks = predicted_masks(model, model(images))[:, 0].float().numpy()
        targets = [SemanticSegmentationTarget(0, mask) for mask in masks]
        for layer in layers:
            with GradCAM(model=model, target_layers=[layer]) as cam:
                cam(input_tensor=images, targets=targets)

    return each


def by_torchcam(model: Model, images: Tensor) -> Callable:
    """torchcam: the object is made once for a list of layers; maps stay at the resolution of their stage."""
    modules = {module: name for name, module in model.named_modules()}
    names = [modules[model.stages[stage].module] for stage in stages_of(model)]
    extractor = TorchcamGradCAM(model, names)

    def one() -> None:
        logits = model(images)
        classes = logits.argmax(1).tolist()
        extractor(classes if len(images) > 1 else classes[0], logits)

    def several() -> None:
        logits = model(images)
        masks = predicted_masks(model, logits)[:, 0]
        targets = [lambda output, mask=mask: (output[0] * mask).sum() for mask in masks]
        extractor(scores=logits, targets=targets)

    return one if model.task == "classification" else several


def by_captum(model: Model, images: Tensor) -> Callable:
    """Captum: a forward pass for the prediction, and LayerGradCam once for each layer."""
    layers, size = [model.stages[stage].module for stage in stages_of(model)], images.shape[-2:]

    def one() -> None:
        with torch.no_grad():
            classes = model(images).argmax(1)
        attribution = LayerGradCam(model, layers[0]).attribute(images, target=classes)
        LayerAttribution.interpolate(attribution, size, interpolate_mode="bilinear")

    def each() -> None:
        with torch.no_grad():
            masks = predicted_masks(model, model(images))[:, 0]
        for layer in layers:
            method = LayerGradCam(lambda images: (model(images)[:, 0] * masks).sum((1, 2)), layer)
            LayerAttribution.interpolate(method.attribute(images), size, interpolate_mode="bilinear")

    return one if model.task == "classification" else each


def fused_in(model: Model, dtype: torch.dtype) -> Model:
    """A fused copy whose weights and activations have a type; logits are float32 in any case."""
    copy = fused(model)
    for name, child in copy.named_children():
        if name != "normalize":  # in float32, so that pixels keep their 256 values
            child.to(dtype)
    copy.normalize.register_forward_hook(lambda module, inputs, images: images.to(dtype))
    copy.register_forward_hook(lambda module, inputs, logits: logits.float())
    return copy


def on_fused(contender: Callable, dtype: torch.dtype) -> Callable:
    """The same on a copy prepared for serving."""
    return lambda model, images: contender(fused_in(model, dtype), images)


CONTENDERS: dict[str, Callable[[Model, Tensor], Callable]] = {
    FORWARD: plain,
    "forward, fused": on_fused(plain, torch.float32),
    "forward, fused, bf16": on_fused(plain, torch.bfloat16),
    "cvlab": cvlab,
    "cvlab, fused": on_fused(cvlab, torch.float32),
    "cvlab, fused, bf16": on_fused(cvlab, torch.bfloat16),
    "torchcam": by_torchcam,
    "Captum": by_captum,
    "grad-cam": by_grad_cam,
}

# --- measuring --------------------------------------------------------------------------------------------------------


def seconds(call: Callable, repeats: int) -> float:
    """Of one call: by the clock, or of the processor where this process has one thread."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def times(name: str, rounds: int, batch: int = 1) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    model, images = network(name)
    images = images.repeat(batch, 1, 1, 1)
    calls = {key: make(deepcopy(model), images) for key, make in CONTENDERS.items()}  # hooks of one meet no other
    repeats = {}
    for key, call in calls.items():
        first = seconds(call, 1)  # slower than those that follow
        repeats[key] = 1 if first > 1 else math.ceil(SHORTEST / seconds(call, 1))
    found: dict[str, list[float]] = {key: [] for key in calls}
    order, shuffled = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for key in order:
            found[key].append(seconds(calls[key], repeats[key]))
    return found


def resident(name: str, contender: str) -> dict[str, float]:
    """MiB of a process of its own, with the model loaded and at its peak over two calls."""
    command = [sys.executable, __file__, "--memory", name, contender]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_memory(name: str, contender: str) -> None:
    """The child's side of `resident`. Linux only: the peak is set back after the model has been made."""
    call = CONTENDERS[contender](*network(name))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = mebibytes("VmRSS")
    for _ in range(2):
        call()
    print(json.dumps({"loaded": before, "peak": mebibytes("VmHWM")}))


def mebibytes(key: str) -> float:
    """A line of /proc/self/status: this process's memory, on Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 2**10


def difference_in_bf16(name: str) -> float:
    """The largest difference of a map in bfloat16, as a share of its largest absolute value."""
    model, images = network(name)
    score = predicted_score(model)
    expected, found = (explain(m, images, score).maps["grad_cam"] for m in (model, fused_in(model, torch.bfloat16)))
    return max(((found[key] - expected[key]).abs().max() / expected[key].abs().max()).item() for key in expected)


def measure(quick: bool, path: Path | None) -> dict:
    """All figures of the tables; those that the file at `path` already has are read from it."""
    names = QUICK if quick else [*CLASSIFIERS, SEGMENTER]
    batches = dict.fromkeys(QUICK, 2) if quick else BATCHES
    contenders = [FORWARD, "cvlab"] if quick else list(CONTENDERS)
    memory_of = QUICK[1:] if quick else ["ResNet-50, 224 px", SEGMENTER]
    figures = {"times": {}, "batches": {}, "memory": {}}
    if path and path.exists():
        figures = json.loads(path.read_text())
    figures["hardware"] = hardware() + " (processor time)" * (torch.get_num_threads() == 1)
    figures["versions"] = {key: version(key) for key in ("torch", "timm", "captum", "torchcam", "grad-cam")}

    def found(part: str, name: str, make: Callable[[], object]) -> None:
        if name not in figures[part]:
            print(f"{part} of {name}", file=sys.stderr)
            figures[part][name] = make()
            if path:
                path.write_text(json.dumps(figures, indent=1))

    for name in names:
        found("times", name, lambda name=name: times(name, 2 if quick else ROUNDS.get(name, 15)))
    for name, batch in batches.items():
        rounds = 2 if quick else BATCH_ROUNDS
        found("batches", name, lambda of=(name, rounds, batch): {"batch": of[2], "times": times(*of)})
    for name in memory_of:
        found("memory", name, lambda name=name: {key: resident(name, key) for key in contenders})
    figures["bf16"] = difference_in_bf16(names[-1])
    return figures


# --- tables -----------------------------------------------------------------------------------------------------------


def ratios(found: dict[str, list[float]]) -> dict[str, list[float]]:
    """By contender and round, seconds as multiples of the plain forward pass in the same round."""
    return {
        key: [one / forward for one, forward in zip(values, found[FORWARD], strict=True)]
        for key, values in found.items()
    }


def times_table(figures: dict) -> str:
    """The forward pass in milliseconds, and every contender as multiples of it; a column for each network."""
    found = figures["times"]
    head = [f"{name}, n = {len(values[FORWARD])}" for name, values in found.items()]
    rows = [[FORWARD, *(f"{1000 * statistics.median(values[FORWARD]):.1f} ms" for values in found.values())]]
    for key in list(CONTENDERS)[1:]:
        rows.append([key, *(spread(ratios(values)[key]) for values in found.values())])
    return table(["time", *head], rows)


def batches_table(figures: dict) -> str:
    """Images a second; a column for each network."""
    found = figures["batches"]
    head = [f"{name}, batches of {of['batch']}, n = {len(of['times'][FORWARD])}" for name, of in found.items()]
    rows = []
    for key in CONTENDERS:
        rows.append([key, *(spread([of["batch"] / one for one in of["times"][key]]) for of in found.values())])
    return table(["images a second", *head], rows)


def memory_table(figures: dict) -> str:
    """A contender's memory beyond the loaded model, and of its whole process, as multiples of a forward pass's."""
    found = figures["memory"]
    beyond = {name: {key: of["peak"] - of["loaded"] for key, of in each.items()} for name, each in found.items()}
    whole = {name: {key: of["peak"] for key, of in each.items()} for name, each in found.items()}
    columns = [each[name] for name in found for each in (beyond, whole)]
    head = [f"{name}, {what}" for name in found for what in ("beyond the loaded model", "whole process")]
    rows = [[FORWARD, *(f"{column[FORWARD]:.0f} MiB" for column in columns)]]
    for key in list(columns[0])[1:]:
        rows.append([key, *(f"{column[key] / column[FORWARD]:.2f}" for column in columns)])
    return table(["peak memory", *head], rows)


def page(figures: dict) -> str:
    """What stands between the marks in tests/bench/README.md."""
    versions = ", ".join(f"{key} {number}" for key, number in figures["versions"].items())
    command = "python tests/bench/explain.py" + " --shared" * ("processor time" in figures["hardware"])
    parts = [
        f"Prediction and explanation as multiples of the plain forward pass (eval mode, no gradients), medians of "
        f"n interleaved rounds with quartiles, on {figures['hardware']}, {versions}. Of a classifier the last stage is "
        "explained, of the U-Net its mask at all seven stages. *Fused* is `cvlab.models.fused.fused`: batch "
        "normalisation fused into the convolutions, channels last.",
        times_table(figures),
        "Images a second over a data set:",
        batches_table(figures),
        "Peak resident memory as multiples of the plain forward pass, one image, one process each:",
        memory_table(figures),
        f"Maps of {list(figures['times'])[-1].split(',')[0]} in bfloat16 differ by at most {figures['bf16']:.1e} of "
        "their largest value; fused in float32 they are equal within 1e-5, except where rounding flips a ReLU "
        "(cvlab/models/fused.py). "
        f"`{command}` measures all of this; peers are used as in their READMEs, and torchcam's maps are not resized to "
        "the image.",
    ]
    return "\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="the times of this one alone")
    parser.add_argument("--quick", action="store_true", help="two small networks, twice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go; read first if there")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    parser.add_argument("--memory", nargs=2, metavar=("NETWORK", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--shared", action="store_true", help="processor time of one thread, whatever else is running")
    options = parser.parse_args()
    if options.shared:
        torch.set_num_threads(1)
    if options.memory:
        print_memory(*options.memory)
        return
    if options.network:
        found = times(options.network, ROUNDS.get(options.network, 7))
        print(hardware(), times_table({"times": {options.network: found}}), sep="\n\n")
        return
    figures = measure(options.quick, options.json)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.write:
        README.write_text(inserted(README.read_text(), MARK, page(figures)))
    print(page(figures))


if __name__ == "__main__":
    main()
