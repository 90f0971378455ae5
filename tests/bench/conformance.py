"""Are the maps of every family of timm equal to Captum's? Tries the smallest network of each of timm's modules.

python tests/bench/conformance.py                     all of them, about fifteen minutes; nothing is downloaded
python tests/bench/conformance.py --json FILE         also into FILE, module by module; a second run goes on from there
python tests/bench/conformance.py --write             also the summary into tests/bench/README.md
python tests/bench/conformance.py --modules resnet swin_transformer
python tests/bench/conformance.py --unets             U-Nets of segmentation_models.pytorch on the same networks

Weights are random. At every stage the map of `cvlab.explain.explain` is compared with captum.attr.LayerGradCam on the
stage's (N, C, h, w) form, at the default stage that of `grad_cam` too. A module passes if they differ by at most 1e-5
of the map's largest absolute value, and every map is finite and not constant.

Is the map drawn where its cause is? A spot is moved over a plain image, to 20 places: five groups of four that mirror
each other about the middle of the view. What it changes at the last stage, drawn by the stage's grid, has its centre of
mass beside the spot; the `shift` is the mean of a group, and of these the median, in pixels at 224. Mirrored spots take
out what is no shift: a spot may lie anywhere in a large cell, and what reaches the whole map (attention, gates, wide
receptive fields) pulls every centre to the middle. By how much it pulls is fitted and undone. Weights of convolutions
are made positive here, so that no influence cancels another's. Edges cut maps off, and not alike on both sides where
strides are padded on one: a network above the aim is measured again in a view twice as large, if it takes one.

Of a U-Net the score is the mean logit of a box, and the parts of it at the cuts (`cvlab.explain.paths`) must add up.
"""

import argparse
import gc
import json
import statistics
import sys
from contextlib import suppress
from pathlib import Path

import timm
import torch
from captum.attr import LayerGradCam
from tables import README, inserted
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: cvlab needs no installation

from cvlab.explain import class_score, default_stage, explain, grad_cam, heatmap, region_score
from cvlab.explain.paths import contributions
from cvlab.explain.regions import box
from cvlab.models import Model, build
from cvlab.models.timm import default_view

MARK, UNETS = "bench-conformance", "bench-conformance-unets"
TOLERANCE = 1e-5
LARGEST = 288  # pixels: networks that are shown larger views are shown SMALLER ones here, if they can be
SMALLER = 224
AIM = 2.0  # pixels at 224, of the shift
LEAST = 0.3  # as many pixels as a map's centre moves with the spot's one, or it says nothing of a place
HEAD = ["module of timm", "network", "pixels", "stages", "largest difference", "shift", "in a larger view", "verdict"]


class Probe(nn.Identity):
    """Where Captum reads: the stage's output in the form (N, C, h, w), inside the network."""


def captum_map(model: Model, images: Tensor, stage: str, class_idx: int) -> Tensor:
    """LayerGradCam on the (N, C, h, w) form: to_map rearranges the output for the probe, and back after it."""
    module, to_map = model.stages[stage].module, model.stages[stage].to_map
    probe = Probe()

    def through(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        places = to_map(torch.arange(output.numel()).view_as(output)).flatten()
        assert len(places.unique()) == len(places), "to_map may only rearrange"
        return output.flatten().index_put((places,), probe(to_map(output)).flatten()).view_as(output)

    handle = module.register_forward_hook(through)
    try:
        return LayerGradCam(model, probe).attribute(images, class_idx).detach()
    finally:
        handle.remove()


def as_trained(model: Model) -> Model:
    """Random weights as after training: before it all variances are 1, and some heads and factors are 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine and not module.weight.any():
                nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
    return model.eval()


def smallest(module: str) -> str:
    """The network of one of timm's modules with the fewest parameters, counted without memory for them."""

    def parameters(architecture: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(architecture).parameters())

    return min(timm.list_models(module=module), key=parameters)


def differences(model: Model, images: Tensor) -> dict[str, float]:
    """The difference of each stage's map from Captum's, as a share of its largest absolute value.

    Raises:
        ValueError: a map is constant or not finite.
    """
    explanation = explain(model, images, class_score(1))
    found = dict(explanation.maps["grad_cam"])
    worst = {}
    for stage in model.stages:
        expected = captum_map(model, images, stage, 1)
        if not expected.isfinite().all() or expected.amax() == expected.amin():
            raise ValueError(f"the map at {stage} is constant or not finite")
        worst[stage] = ((found[stage] - expected).abs().max() / expected.abs().max()).item()
        if stage == default_stage(model):
            _, single = grad_cam(model, images, 1)
            worst[stage] = max(worst[stage], ((single - expected).abs().max() / expected.abs().max()).item())
    return worst


def positive(model: Model) -> Model:
    """Convolutions as weighted means of what they see, and no normalisation that changes a sign."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data.abs_()
            weight /= weight.flatten(1).sum(1).clamp_min(1e-12).view(-1, 1, 1, 1)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.weight.data.abs_()
    return model


@torch.no_grad()
def shift(model: Model, side: int) -> float | None:
    """How far from a spot the map of what it changes is drawn, in pixels at 224.

    None for a stage without a grid, or where a spot changes nothing, or nearly the same everywhere.

    Args:
        model: with `positive` weights.
        side: of the view, pixels; the grid of the model's own view goes on beyond its edges.
    """
    stage = model.stages[list(model.stages)[-1]]
    if stage.grid is None:
        return None
    middle, unit = (side - 1) / 2, model.image_size / 224
    aside = (60 * unit * torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(0))).round() + middle % 1
    spots = (middle + aside * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]])).view(20, 2)
    images = torch.full((21, 3, side, side), 0.5)
    for image, (y, x) in zip(images[1:], spots.long().tolist(), strict=True):
        image[:, y - 3 : y + 4, x - 3 : x + 4] = 1
    seen: list[Tensor] = []
    handle = stage.module.register_forward_hook(lambda module, inputs, output: seen.append(stage.to_map(output)))
    grid = stage.grid
    try:
        for batch in images.split(7):
            model(batch)
        stage.module.grid = grid._replace(side=side)
        plain, *changed = torch.cat(seen)
        heat = heatmap((torch.stack(changed) - plain).abs().sum(1, keepdim=True), (side, side), stage)[:, 0].double()
    finally:
        handle.remove()
        stage.module.grid = grid
    if not (heat.sum((1, 2)) > 0).all():  # nor if it is not finite
        return None
    places = torch.arange(side, dtype=torch.double)
    centres = torch.stack([heat.sum(2) @ places, heat.sum(1) @ places], 1) / heat.sum((1, 2))[:, None]
    found, true = centres - middle, spots - middle
    pull = (found * true).sum() / true.square().sum()  # 1 where nothing pulls to the middle
    if pull < LEAST:
        return None
    return (found / pull - true).view(5, 4, 2).mean(1).median(0).values.norm().item() / unit


def shifts(model: Model) -> dict:
    """The shift at the model's own view, and if that is above the aim, in a view twice as large."""
    found = {"shift": shift(positive(model), model.image_size), "shift_in_larger_view": None}
    if found["shift"] and found["shift"] > AIM:
        with suppress(Exception):  # many networks take one size only
            found["shift_in_larger_view"] = shift(model, 2 * model.image_size)
    return found


def examine(module: str) -> dict:
    """One line of the table."""
    architecture = smallest(module)
    line = {"module": module, "network": architecture, "pixels": default_view(architecture)["image_size"]}
    torch.manual_seed(0)
    try:
        for pixels in [SMALLER] * (line["pixels"] > LARGEST) + [line["pixels"]]:
            try:
                model = as_trained(build("timm", ["a", "b", "c"], pixels, {"architecture": architecture}))
                images = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
                worst = differences(model, images)
                break
            except Exception:
                if pixels == line["pixels"]:
                    raise
        difference = max(worst.values())
        line |= {"pixels": pixels, "stages": list(model.stages), "difference": difference}
        line["reason"] = ""
        if difference > TOLERANCE:
            exact = max(differences(model.double(), images.double()).values())
            line["reason"] = f"differs at {max(worst, key=worst.get)}, in float64 by {exact:.0e}"
        line |= shifts(model.float())
    except Exception as error:  # whatever a network does, the others are examined
        line |= {"stages": [], "difference": None, "reason": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    return line


class Scored(nn.Module):
    """A segmenter that puts out the mean logit of a region, for Captum."""

    def __init__(self, model: Model, region: Tensor) -> None:
        super().__init__()
        self.model, self.score = model, region_score(region)

    def forward(self, images: Tensor) -> Tensor:
        return self.score(self.model(images))


def examine_unet(module: str) -> dict:
    """One line of the table of U-Nets: the largest difference from Captum, and the parts of the score add up."""
    architecture = smallest(module)
    line = {"module": module, "network": architecture, "stages": [], "difference": None, "reason": ""}
    torch.manual_seed(0)
    try:
        fixed = timm.get_pretrained_cfg(architecture).fixed_input_size
        line["pixels"] = default_view(architecture)["image_size"] if fixed else 128
        side, arguments = line["pixels"], {"encoder": f"tu-{architecture}", "decoder_channels": [32, 16, 16, 8, 8]}
        model = as_trained(build("smp", ["a"], side, arguments))
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        region = box((side, side), (side // 4, side // 4), (side // 2, 2 * side // 3))
        found, differences = explain(model, images, region_score(region)).maps["grad_cam"], {}
        for name, stage in model.stages.items():
            expected = LayerGradCam(Scored(model, region), stage.module).attribute(images).detach()
            if not expected.isfinite().all() or expected.amax() == expected.amin():
                raise ValueError(f"the map at {name} is constant or not finite")
            differences[name] = ((found[name] - expected).abs().max() / expected.abs().max()).item()
        contributions(model, images, region_score(region))  # raises where the parts are not the score
        line |= {"stages": list(differences), "difference": max(differences.values())}
        if line["difference"] > TOLERANCE:
            line["reason"] = f"differs at {max(differences, key=differences.get)}"
    except Exception as error:  # whatever a network does, the others are examined
        line["reason"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return line


def summary_of_unets(lines: list[dict]) -> str:
    """How many U-Nets pass, and why the others do not: by reason."""
    passed, reasons = [line for line in lines if not line["reason"]], {}
    for line in lines:
        if line["reason"]:
            reasons.setdefault(line["reason"], []).append(line["module"])
    stages = sum(len(line["stages"]) for line in passed)
    largest = max((line["difference"] for line in passed), default=0.0)
    text = (
        f"**{len(passed)} of {len(lines)}** modules of timm {timm.__version__} serve as encoders of a U-Net of "
        f"segmentation_models.pytorch whose maps at every stage ({stages} in all) equal Captum's within "
        f"{TOLERANCE:.0e} of their largest value (the largest difference is {largest:.1e}), and whose score is the sum "
        "of what its skips, bottleneck and biases add. The others, by reason:"
    )
    return "\n".join([text, "", *(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items())])


def row(cells: list) -> str:
    """A line of a table in Markdown."""
    return "| " + " | ".join(map(str, cells)) + " |"


def cells(line: dict) -> list:
    """A module's row of the table."""
    difference = "" if line["difference"] is None else f"{line['difference']:.1e}"
    return [
        *(line.get(key, "") for key in ("module", "network", "pixels")),
        len(line["stages"]),
        difference,
        *("" if line.get(key) is None else f"{line[key]:.1f}" for key in ("shift", "shift_in_larger_view")),
        line["reason"] or "equal",
    ]


def summary(lines: list[dict]) -> str:
    """How many modules pass, and why the others do not."""
    passed = [line for line in lines if not line["reason"]]
    stages = sum(len(line["stages"]) for line in passed)
    largest = max((line["difference"] for line in passed), default=0.0)
    text = (
        f"**{len(passed)} of {len(lines)}** modules of timm {timm.__version__} pass: of the smallest network of each, "
        f"with random weights, the maps at every stage ({stages} in all) are finite, not constant, and those of "
        f"captum.attr.LayerGradCam on the stage's (N, C, h, w) form within {TOLERANCE:.0e} of their largest value; the "
        f"largest difference is {largest:.1e}."
    )
    drawn = [line for line in lines if line.get("shift") is not None]
    if drawn:
        near, middle = sum(line["shift"] <= AIM for line in drawn), statistics.median(line["shift"] for line in drawn)
        text += (
            f"\n\nOf {len(drawn)} networks **{near}** draw the last stage's map at most {AIM:.0f} pixels (at 224) off "
            f"its cause; the median is {middle:.1f}. The others, in brackets in a view twice as large, whose edges cut "
            "off less (a dash: the network takes one size only): "
        )
        far = [line for line in drawn if line["shift"] > AIM]
        wide = ["-" if line["shift_in_larger_view"] is None else f"{line['shift_in_larger_view']:.1f}" for line in far]
        each = [f"{line['module']} {line['shift']:.1f} ({other})" for line, other in zip(far, wide, strict=True)]
        text += ", ".join(each or ["none"]) + "."
    failed = [f"- {line['module']} ({line['network']}): {line['reason']}" for line in lines if line["reason"]]
    return "\n".join([text, *[""] * bool(failed), *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = timm.list_modules()
    parser.add_argument("--modules", nargs="+", choices=known, metavar="NAME", default=known, help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what is found, a line a module; read first if there")
    parser.add_argument("--write", action="store_true", help="put the summary into tests/bench/README.md")
    parser.add_argument("--unets", action="store_true", help="U-Nets on these networks in place of classifiers")
    options = parser.parse_args()
    if options.write and options.modules != known:
        parser.error("--write is for all modules")
    done = {}
    if options.json and options.json.exists():
        done = {line["module"]: line for line in map(json.loads, options.json.read_text().splitlines())}
    lines = []
    print(row(HEAD), row(["---"] * len(HEAD)), sep="\n")
    for module in options.modules:
        if module not in done:
            done[module] = (examine_unet if options.unets else examine)(module)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(done[module]) + "\n")
            gc.collect()
        lines.append(done[module])
        print(row(cells(lines[-1])), flush=True)
    mark, text = (UNETS, summary_of_unets(lines)) if options.unets else (MARK, summary(lines))
    print("", text, sep="\n")
    if options.write:
        README.write_text(inserted(README.read_text(), mark, text))


if __name__ == "__main__":
    main()
