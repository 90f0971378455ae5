"""How often the verdict on a heatmap is wrong: `cvlab.trust.judge` against 228 other hidden parts a picture.

python tests/bench/verdict.py flowers=checkpoints/flowers:DIR scenes=checkpoints/shapes-segmenter: --json FILE
python tests/bench/verdict.py --json FILE --write         the tables, into README.md too

NAME=MODEL:DATA is a model and the folder of its photos, nothing for synthetic scenes. FILE gets a line a picture; what
stands there is not done again. The pictures are of val and test, in a shuffled order; the constants of the verdict were
chosen on the first CHOSEN_ON of each model, so that the tables are of others.

The maps are the model's own at several stages, by two methods, and fakes. The truth about each is its correlation with
the importance of places (`cvlab.trust.reliability.oracle`), whatever its name: a fake may be right by accident.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tables import README, hardware, inserted, table
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.data.evaluation import parts_of, read_views
from cvlab.explain import METHODS, class_score, correlation, explain, predict, predicted_masks, region_score
from cvlab.explain.hooks import passes
from cvlab.models import Model, build
from cvlab.models.fused import fused
from cvlab.transforms import view
from cvlab.trust import judge
from cvlab.trust.judge import CELLS, SENTENCES, Verdicts, blind_maps, evidence
from cvlab.trust.reliability import CONFIRMED, REFUTED, oracle

MARK = "bench-verdict"
CHOSEN_ON = 100
OTHERS = 12  # pictures whose content the oracle fills parts with
LEVELS = list(SENTENCES)
CLEARLY = {"confirmed": 0.6, "refuted": 0.1}
QUICK = {"classifier": "checkpoints/shapes-classifier:", "segmenter": "checkpoints/shapes-segmenter:"}
Maps = dict[str, Tensor]


# --- pictures and maps ------------------------------------------------------------------------------------------------


def views_of(model: Model, data: str, count: int, skipped: int) -> Tensor:
    """(N, 3, S, S) in [0, 1]."""
    if not data:
        return torch.cat([view(shapes.scene(9000 + i, model.image_size).image, model) for i in range(count)])
    parts, _ = parts_of(model, Path(data), "all")
    views = torch.cat([read_views(parts, part, model)[0] for part in ("val", "test") if parts.samples[part]])
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(1))
    return views[order[skipped : skipped + count]] / 255


def untrained(model: Model) -> Model:
    """The same network before it learned anything."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return fresh


def maps_of_class(verdicts: Verdicts, fresh: Model, other: Tensor, generator: torch.Generator) -> Maps:
    """Maps of the predicted class, right ones and fakes, at the picture's size."""
    model, images = verdicts.model, verdicts.images
    last, *earlier = list(model.stages)[::-1][:3]

    def cam(model: Model, images: Tensor, class_idx: int, name: str, method: str = "grad_cam") -> Tensor:
        return verdicts.placed(
            explain(model, images, class_score(class_idx), [name], [method]).maps[method][name], name
        )

    first, second = predict(model, images).topk(2).indices[0].tolist()
    found = {"Grad-CAM, last stage": cam(model, images, first, last)}
    for words, name in zip(("one stage", "two stages"), earlier, strict=False):
        found[f"Grad-CAM, {words} before"] = cam(model, images, first, name)
    found["HiResCAM, one stage before"] = cam(model, images, first, earlier[0], "hires_cam")
    seen, _ = passes(model, images, class_score(first), {last: model.stages[last].module})
    activation = model.stages[last].to_map(seen.activations[last]).float()
    weights = torch.randn(1, activation.shape[1], 1, 1, generator=generator)
    found["mean activation"] = verdicts.placed(activation.mean(1, keepdim=True), last)
    found["random channel weights"] = verdicts.placed((weights * activation).sum(1, keepdim=True), last)
    found["second class"] = cam(model, images, second, last)
    found["another picture's"] = cam(model, other, int(predict(model, other).argmax()), last)
    found["untrained network's"] = cam(fresh, images, first, last)
    found["noise"] = verdicts.placed(torch.randn(1, 1, *activation.shape[-2:], generator=generator), last)
    return found | {"mirrored": found["Grad-CAM, last stage"].flip(3)}


def maps_of_region(verdicts: Verdicts, fresh: Model, other: Tensor, generator: torch.Generator) -> Maps:
    """Maps of a segmenter's predicted region at every stage, and fakes, at the picture's size."""
    model, found = verdicts.model, {}
    explained = explain(model, verdicts.images, verdicts.score, None, list(METHODS)).maps
    for method, words in zip(METHODS, ("Grad-CAM", "HiResCAM"), strict=True):
        found |= {f"{words}, {name}": verdicts.placed(each, name) for name, each in explained[method].items()}
    theirs = predicted_masks(model, predict(model, other))[0, 0]
    if theirs.any():
        stages = ["bottleneck", "decoder2"]
        for name, each in explain(model, other, region_score(theirs), stages).maps["grad_cam"].items():
            found[f"another picture's, {name}"] = verdicts.placed(each, name)
    found["noise"] = verdicts.placed(torch.randn(1, 1, 14, 14, generator=generator), "")
    found["mirrored"] = found["Grad-CAM, decoder2"].flip(3)
    return found | {"the region itself": verdicts.region[None, None].float()}


def examined(model: Model, fresh: Model, images: Tensor, others: Tensor, seed: int) -> dict:
    """How well halves of the oracle agree on a picture; of each map the truth by all and each half, and the verdict."""
    verdicts = Verdicts(model, images, None, None, 0)
    cells, *halves = oracle(verdicts, others)
    make = maps_of_class if verdicts.region is None else maps_of_region
    maps = make(verdicts, fresh, others[:1], torch.Generator().manual_seed(seed))
    for name, each in blind_maps(images).items():
        maps[name] = F.interpolate(each, images.shape[-2:], mode="bilinear")
    found = {}
    for name, heat in maps.items():
        truths = [correlation(F.adaptive_avg_pool2d(heat, CELLS), each).item() for each in (cells, *halves)]
        judged = verdicts.judge(heat)
        if "hidden parts" in judged.checks:  # not of a map that is the same everywhere
            found[name] = [*truths, evidence(judged.checks), judged.level]
    return {"agreement": correlation(*halves).item(), "maps": found}


def collect(sets: Sequence[str], count: int, skipped: int, known: list[dict]) -> Iterator[dict]:
    """A line for each picture that is not known yet."""
    for each in sets:
        name, where = each.split("=", 1)
        folder, data = where.rsplit(":", 1)
        model = fused(checkpoint.load(folder))
        model.config.pop("limits", None)  # its own: the usual ones are tested
        views, fresh = views_of(model, data, count + OTHERS, skipped), untrained(model)
        done = {line["picture"] for line in known if line["set"] == name}
        for i in tqdm([i for i in range(len(views) - OTHERS) if i not in done], name):
            others = views[i + 1 : i + 1 + OTHERS]
            if model.task == "classification" or predicted_masks(model, predict(model, views[i : i + 1])).any():
                facts = {"set": name, "picture": i, "task": model.task}
                yield facts | examined(model, fresh, views[i : i + 1], others, i)


# --- tables -----------------------------------------------------------------------------------------------------------


def label(truth: float, limits: dict | None = None) -> str:
    """Confirmed, refuted or undecided."""
    limits = limits or {"confirmed": CONFIRMED, "refuted": REFUTED}
    return "confirmed" if truth >= limits["confirmed"] else "refuted" if truth <= limits["refuted"] else "undecided"


def share(rows: list[tuple], wanted: str, level: str, limits: dict | None = None) -> str:
    """How many of the maps with a label got a level, in percent, with a 95% interval by bootstrap over pictures."""
    by_picture: dict = {}
    for picture, truth, verdict in rows:
        if label(truth, limits) == wanted:
            by_picture.setdefault(picture, []).append(verdict == level)
    if not by_picture:
        return ""
    hits, counts = (np.array([f(each) for each in by_picture.values()]) for f in (sum, len))
    drawn = np.random.default_rng(0).integers(len(hits), size=(1000, len(hits)))
    low, high = np.quantile(hits[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return f"{hits.sum() / counts.sum():.0%} ({low:.0%} to {high:.0%}) of {counts.sum()}"


def area(truths: Sequence[float], values: Sequence[float]) -> str:
    """Of the ROC curve, refuted against confirmed."""
    pairs = [(label(truth), value) for truth, value in zip(truths, values, strict=True)]
    pairs = [(name == "confirmed", value) for name, value in pairs if name != "undecided"]
    return f"{roc_auc_score(*zip(*pairs, strict=True)):.3f}" if len({each for each, _ in pairs}) == 2 else ""


def page(lines: list[dict], price: dict) -> str:
    """All that README.md gets."""
    text = []
    for task, words in (("classification", "Classifiers"), ("segmentation", "Segmenters, of their predicted region")):
        chosen = [line for line in lines if line["task"] == task]
        if not chosen:
            continue
        rows = []
        for name in (*dict.fromkeys(line["set"] for line in chosen), "all"):
            own = [line for line in chosen if name in (line["set"], "all")]
            maps = [((line["set"], line["picture"]), *found) for line in own for found in line["maps"].values()]
            plain = [(picture, truth, level) for picture, truth, *_, level in maps]
            kinds = [label(truth) for _, truth, _ in plain]
            agreement = np.mean([line["agreement"] for line in own])
            rows.append([
                name, str(len(own)), f"{2 * agreement / (1 + agreement):.2f}",
                " / ".join(f"{kinds.count(kind) / len(kinds):.0%}" for kind in ("confirmed", "refuted")),
                area([row[1] for row in maps], [row[4] for row in maps]),
                area([row[2] for row in maps], [row[3] for row in maps]),
                share(plain, "refuted", LEVELS[0]), share(plain, "confirmed", LEVELS[0]),
                share(plain, "confirmed", LEVELS[2]), share(plain, "refuted", LEVELS[0], CLEARLY),
                share(plain, "confirmed", LEVELS[0], CLEARLY),
            ])  # fmt: skip
        head = ["model", "pictures", "oracle's reliability", "confirmed / refuted", "area", "area of half an oracle"]
        head += ["refuted, called believable", "confirmed, called believable", "confirmed, called not believable"]
        text += [f"{words}:\n\n" + table([*head, "clearly refuted, believable", "clearly confirmed, believable"], rows)]
        rows = []
        for kind in dict.fromkeys(kind for line in chosen for kind in line["maps"]):
            found = [((line["set"], line["picture"]), *line["maps"][kind]) for line in chosen if kind in line["maps"]]
            plain, kinds = [(row[0], row[1], row[-1]) for row in found], [label(row[1]) for row in found]
            shares = [f"{kinds.count(each) / len(kinds):.0%}" for each in ("confirmed", "undecided", "refuted")]
            mean = f"{np.mean([row[1] for row in found]):.2f}"
            believed = [share(plain, each, LEVELS[0]) for each in ("refuted", "confirmed")]
            rows.append([kind, str(len(found)), mean, *shares, *believed])
        head = ["map", "n", "mean r with the oracle", "confirmed", "undecided", "refuted"]
        text.append(table([*head, "refuted, called believable", "confirmed, called believable"], rows))
    return "\n\n".join([*text, price["words"]]) + "\n"


def measure_price(size: int, rounds: int) -> dict:
    """What a verdict costs on timm's ResNet-18, as a multiple of the prediction of one picture, on one thread."""
    model = build("timm", ["a", "b"], size, {"architecture": "resnet18"})
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: forwards.append(len(inputs[0])))
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    attribution = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(1))
    forwards.clear()
    judge(model.eval(), images, attribution, 0)
    counts = [sum(forwards)]
    forwards.clear()
    judge(model, images, {"one": attribution, "two": attribution.flip(3)}, 0)
    counts.append(sum(forwards) - counts[0])
    times = []
    for each in (model, fused(model)):
        ratios = []
        for _ in range(rounds):
            marks = [time.process_time()]
            for act in (
                lambda net=each: [predict(net, images) for _ in range(4)],
                lambda net=each: judge(net, images, attribution, 0),
            ):
                act()
                marks.append(time.process_time())
            ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]) * 4)
        times.append(np.median(ratios))
    words = (
        f"A verdict takes {counts[0]} pictures, each further map {counts[1]}. With painting it takes the time of "
        f"{times[0]:.0f} predictions of one picture by timm's ResNet-18 at {size} px, and on the fused copy that of "
        f"{times[1]:.0f} by that copy (median of {rounds}, processor time, {hardware()})."
    )
    return {"words": words, "counts": counts, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="NAME=MODEL:DATA")
    parser.add_argument("--pictures", type=int, default=60, help="of each model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a line a picture; read first if there")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    parser.add_argument("--quick", action="store_true", help="one scene for each shipped model of scenes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets, count = options.sets, options.pictures
    if options.quick:
        sets, count = [f"{name}={ROOT / where}" for name, where in QUICK.items()], 1
    lines = []
    if options.json and options.json.exists():
        lines = [json.loads(line) for line in options.json.read_text().splitlines()]
    for line in collect(sets, count, CHOSEN_ON, lines):
        lines.append(line)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if sets and not options.quick:
        return
    text = page(lines, measure_price(*(64, 1) if options.quick else (224, 5)))
    if options.write:
        README.write_text(inserted(README.read_text(), MARK, text))
    print(text)


if __name__ == "__main__":
    main()
