"""Which stage and method to trust for a region of a U-Net? Truth, deletion, leakage, robustness and time of its maps.

python tests/bench/attribution.py --data DIR        200 scenes and 24 Weizmann horses; 25 minutes of one core
python tests/bench/attribution.py                   the scenes alone
python tests/bench/attribution.py --json FILE       also into FILE, a line a picture; a second run goes on from there
python tests/bench/attribution.py --write           put the tables into tests/bench/README.md
python tests/bench/attribution.py --quick           four scenes of a tiny untrained network: whether it runs

The region is the largest part of the predicted mask, its score the mean logit over it. Four measures are those of the
first public benchmark of attribution for segmentation (Sakib et al., "Toward Faithful Segmentation Attribution via
Benchmarking and Dual-Evidence Fusion", 2603.22624, 2026); here a hidden place is painted in the colours around it. The
fifth is the truth that it has not: scenes are drawn again without an object, and the fall of the score is what the
object is worth. The measures:

truth       Pearson's r, over the objects, of the map's evidence on each with what it is worth; scenes only
per pixel   the same of the mean evidence on each pixel: added up, large objects get much evidence whatever the map
mass        the share of the evidence on objects worth a quarter of the most important one; scenes only
deletion    mean score while the hottest 5, 10, 20, 40% of the picture are hidden, less that of random parts as large; 1
            is the score of the picture and 0 that of its mean colour, so less is better
leakage     the share of the evidence off the region, grown by a tenth of the side, and off what may matter: objects
            that do in scenes, the true horse
robustness  Pearson's r with the map of the picture a little noisier and brighter, for the same region

Known failures: the score belongs to the region, so a map that repeats it does well on every measure; a map that never
looks at the picture is perfectly robust; and only the predicted region is asked about.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trust_measures as measures
from attribution_maps import FORWARD, REGION, all_maps, by_nobody, differences, times
from scipy import ndimage
from tables import README, hardware, inserted, spread, table
from torch import Tensor
from trust import alike, figure, questions
from trust_maps import Question

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.data.evaluation import parts_of, read_views
from cvlab.explain import default_stage, predict
from cvlab.models import Model, build
from cvlab.models.fused import fused
from cvlab.transforms import view, whole_mask
from cvlab.trust import hide
from cvlab.trust.hiding import BORDER, PIXELS_AT_ONCE

MARK = "bench-attribution"
FIRST_SEED = 5000  # these scenes are in no part that a model was trained, chosen or tested on
SHARES = (0.05, 0.1, 0.2, 0.4)
RANDOM = 4  # maps whose hottest parts are the random parts
GROWN = 0.1  # of the side
NOISE, BRIGHTER = 2 / 255, 1.03
AS_ONE = 1e-4  # of the peak: maps that differ by less are hidden once
TELLS = 0.01  # a smaller difference to the default is not named
ROUNDS = {"scenes": 9, "horses": 5}
# Whether more is better.
HIGHER = {"truth": True, "per pixel": True, "mass": True, "deletion": False, "leakage": False, "robustness": True}


@dataclass
class Picture:
    """A picture (1, 3, S, S) and what is known of it: objects (K, S, S) and pictures without each; or the truth."""

    number: int
    images: Tensor
    objects: np.ndarray | None = None
    without: Tensor | None = None
    true: np.ndarray | None = None


def scenes(model: Model, numbers: list[int]) -> Iterator[Picture]:
    """Synthetic scenes, each with its scenes that lack one object."""
    for number in numbers:
        seed, size = FIRST_SEED + number, model.image_size
        whole = shapes.scene(seed, size)
        without = [view(shapes.scene(seed, size, without=[i]).image, model) for i in range(len(whole.objects))]
        yield Picture(number, view(whole.image, model), whole.objects, torch.cat(without))


def horses(model: Model, data: Path, numbers: list[int]) -> Iterator[Picture]:
    """Photos of the test part, in an order drawn once, with the true mask."""
    parts, _ = parts_of(model, data, "test")
    views, masks = read_views(parts, "test", model)
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(0)).tolist()
    for number in numbers:
        if number < len(order):
            mask = whole_mask(masks[order[number]], model.image_size)[0].numpy()
            yield Picture(number, views[order[number]][None] / 255, true=mask)


# --- measures ---------------------------------------------------------------------------------------------------------


def truth(heat: np.ndarray, objects: np.ndarray, falls: np.ndarray, per_pixel: bool = False) -> float:
    """Pearson's r of the evidence on each visible object with the fall of the score without it.

    With `per_pixel` it is the mean evidence on the object's pixels. 0 where all objects have the same.
    """
    visible = objects.any((1, 2))
    if visible.sum() < 2:
        return np.nan
    evidence = (objects[visible] * heat).sum((1, 2))
    if per_pixel:
        evidence = evidence / objects[visible].sum((1, 2))
    return float(np.corrcoef(evidence, falls[visible])[0, 1]) if evidence.std() else 0.0


def hottest(heat: np.ndarray, share: float) -> np.ndarray:
    """What to hide, (S, S) bool, so that with the border of `hide` the hottest `share` of the picture is hidden.

    Of equally hot pixels those come first whose surroundings are hotter: so the region itself is hidden from its middle
    outwards, and every map hides as much.
    """
    side = len(heat)
    around = ndimage.gaussian_filter(heat.astype(float), side / 8)
    ranks = np.empty(heat.size, np.float32)
    ranks[np.lexsort((around.ravel(), heat.ravel()))] = np.arange(heat.size)
    ranks = torch.from_numpy(ranks).view(1, 1, side, side)
    border = -(-side // BORDER)
    grown = F.max_pool2d(ranks, 2 * border + 1, 1, border)  # of the pixels that hiding a pixel of this rank hides
    return (ranks >= grown.flatten().topk(round(share * heat.size)).values[-1])[0, 0].numpy()


class Deletion:
    """What the score of one picture is while parts are hidden."""

    def __init__(self, model: Model, picture: Picture, asked: Question) -> None:
        self.model, self.images, self.asked = model, picture.images, asked
        size = self.images.shape[-1]
        self.empty, self.whole = self.ask([np.ones((size, size), bool), np.zeros((size, size), bool)])
        self.known: list[tuple[np.ndarray, float]] = []
        seeds = range(10**6 + RANDOM * picture.number, 10**6 + RANDOM * (picture.number + 1))
        noise = [by_nobody(self.images, asked, seed)["random blobs", ""] for seed in seeds]
        self.by_chance = float(np.mean([self.area(each) for each in noise]))

    def ask(self, hidden: list[np.ndarray]) -> np.ndarray:
        """The score with each part hidden."""
        regions, found = torch.from_numpy(np.stack(hidden))[:, None], []
        for some in regions.split(max(1, PIXELS_AT_ONCE // regions[0].numel())):
            pictures = hide(self.images.expand(len(some), -1, -1, -1), some)
            found.append(self.asked.scores(predict(self.model, pictures)))
        return torch.cat(found).numpy()

    def area(self, heat: np.ndarray) -> float:
        """The mean height of the curve of scores from nothing hidden to the largest share."""
        scores = (self.ask([hottest(heat, share) for share in SHARES]) - self.empty) / (self.whole - self.empty)
        return float(np.trapezoid([1, *scores], [0, *SHARES]) / SHARES[-1])

    def less_chance(self, heat: np.ndarray) -> float:
        """The area less that of random parts as large; 0 of a blank map."""
        if not heat.any():
            return 0.0
        scaled = heat / heat.max()
        for other, area in self.known:
            if np.abs(other - scaled).max() < AS_ONE:
                return area
        self.known.append((scaled, self.area(heat) - self.by_chance))
        return self.known[-1][1]


def may_matter(region: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The region grown by a tenth of the side, and what else may matter, (S, S) bool."""
    by = round(GROWN * len(region))
    return (F.max_pool2d(torch.from_numpy(region)[None].float(), 2 * by + 1, 1, by)[0] > 0).numpy() | others


def changed(picture: Picture) -> Tensor:
    """The picture a little noisier and brighter."""
    noise = torch.randn(picture.images.shape, generator=torch.Generator().manual_seed(picture.number))
    return (picture.images * BRIGHTER + NOISE * noise).clamp(0, 1)


def measured(model: Model, picture: Picture) -> dict:
    """All figures of one picture but times."""
    asked = questions(model, picture.images)["region"]
    maps = all_maps(model, picture.images, asked, picture.number)
    after = changed(picture)
    later = all_maps(model, after, asked, picture.number + 10**7)
    later[REGION, ""] = questions(model, after)["region"].regions[0].float().numpy()
    falls, matters = np.zeros(0), picture.true
    if picture.objects is not None:
        whole, *rest = asked.scores(predict(model, torch.cat([picture.images, picture.without]))).tolist()
        falls = np.array([whole - each for each in rest])
        matters = measures.what_matters(picture.objects, falls)
    allowed, deletion, rows = may_matter(asked.regions[0].numpy(), matters), Deletion(model, picture, asked), {}
    for key, heat in maps.items():
        found = [np.nan] * 3
        if picture.objects is not None:
            found = [truth(heat, picture.objects, falls, each) for each in (False, True)]
            found.append(measures.mass(heat, matters))
        found += [deletion.less_chance(heat), 1 - measures.mass(heat, allowed), alike(heat, later[key])]
        rows[" | ".join(key)] = [None if math.isnan(each) else round(each, 3) for each in found]
    blank = [" | ".join(key) for key, heat in maps.items() if not heat.any()]
    return {"rows": rows, "blank": blank, "differences": differences(model, picture.images, asked, maps)}


# --- tables -----------------------------------------------------------------------------------------------------------


def against(own: np.ndarray, default: np.ndarray) -> str:
    """By which measures (M, n) a map is better or worse than the default, by more than its paired 95% interval."""
    better, worse = [], []
    for (name, higher), a, b in zip(HIGHER.items(), own, default, strict=True):
        mean, low, high = measures.interval(a - b)
        if abs(mean) >= TELLS and (low > 0 or high < 0):
            (better if (mean > 0) == higher else worse).append(name)
    return "; ".join(f"{word} {', '.join(each)}" for word, each in (("better", better), ("worse", worse)) if each)


def set_table(lines: list[dict], timed: dict[str, list[float]], default: str) -> str:
    """The table of one set of pictures."""
    found = {key: np.array([line["rows"][key] for line in lines], float).T for key in lines[0]["rows"]}
    shown = [i for i in range(len(HIGHER)) if not np.isnan(found[default][i]).all()]
    rows = []
    for key, values in found.items():
        ratios = [a / b for a, b in zip(timed.get(key, []), timed[FORWARD], strict=False)]
        cells = [figure(values[i]) for i in shown] + [spread(ratios) if len(ratios) > 1 else "-"]
        rows.append([*key.split(" | "), *cells, "the default" if key == default else against(values, found[default])])
    return table(["map", "stage", *(list(HIGHER)[i] for i in shown), "time", "against the default"], rows)


def page(lines: list[dict]) -> str:
    """All tables."""
    text = []
    for facts in (line for line in lines if "times" in line):
        mine = [line for line in lines if line["set"] == facts["set"] and "rows" in line]
        blank = [key for line in mine for key in line["blank"]]
        blank = [f"{key.replace(' | ', ' at ')} {blank.count(key)}" for key in dict.fromkeys(blank)]
        apart = {peer: [line["differences"][peer] for line in mine] for peer in mine[0]["differences"]}
        apart = [f"{peer} {max(each):.1e} (median {statistics.median(each):.1e})" for peer, each in apart.items()]
        text.append(
            f"**{facts['set']}**, n = {len(mine)}: means with 95% intervals by bootstrap over "
            f"pictures. Time is processor time of one map with its prediction, a multiple of the forward pass of "
            f"{1000 * statistics.median(facts['times'][FORWARD]):.0f} ms, medians of {len(facts['times'][FORWARD])} "
            f"interleaved rounds with quartiles, on {facts['hardware']}, {facts['versions']}. Largest difference to "
            f"grad_cam drawn alike, of a map's peak: {', '.join(apart)}. Blank maps, which count as chance: "
            f"{', '.join(blank) or 'none'}."
        )
        text.append(set_table(mine, facts["times"], facts["default"]))
    return "\n\n".join(text)


def collect(
    name: str, model: Model, of: Callable[[list[int]], Iterator[Picture]], count: int, rounds: int, known: list[dict]
) -> Iterator[dict]:
    """The lines of a set that are not known yet: first the times, then a line a picture."""
    done = {line.get("picture") for line in known if line["set"] == name}
    if None not in done:
        versions = ", ".join(f"{key} {version(key)}" for key in ("torch", "torchcam", "grad-cam"))
        facts = {"default": f"grad_cam | {default_stage(model)}", "hardware": hardware(), "versions": versions}
        images = next(of([0])).images
        found = times(model, images, questions(model, images)["region"], rounds)
        facts["times"] = {key: [round(each, 6) for each in row] for key, row in found.items()}
        yield {"set": name, **facts}
    for picture in of([i for i in range(count) if i not in done]):
        yield {"set": name, "picture": picture.number} | measured(model, picture)
        print(f"{name}: {picture.number + 1} of {count}", file=sys.stderr, flush=True)


def served(name: str) -> Model:
    """A shipped model as the page asks it, with gradients of weights, without which peers explain nothing."""
    return fused(checkpoint.load(ROOT / "checkpoints" / name)).requires_grad_(True)


def untrained() -> Model:
    """A tiny U-Net that learned nothing and finds half of a scene to be its object."""
    torch.manual_seed(0)
    model = build("unet", ["object"], 32, {"width": 8, "depth": 2}).eval()
    model.threshold = predict(model, next(scenes(model, [0])).images).sigmoid().median().item()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--horses", type=int, default=24, help="of the 42 of the test part")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of Weizmann horses")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="what is found, a line a picture; read first if there"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    parser.add_argument("--quick", action="store_true", help="four scenes of a tiny untrained network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write and (options.quick or not options.data):
        parser.error("--write is for the whole bench: give --data, and not --quick")
    sets = []
    if options.quick:
        tiny = untrained()
        sets.append(("scenes", tiny, partial(scenes, tiny), 4, 1))
    else:
        model = served("shapes-segmenter")
        sets.append(("scenes", model, partial(scenes, model), options.scenes, ROUNDS["scenes"]))
    if options.data:
        model = served("horses")
        sets.append(("horses", model, partial(horses, model, options.data), options.horses, ROUNDS["horses"]))
    lines = []
    if options.json and options.json.exists():
        lines = [json.loads(line) for line in options.json.read_text().splitlines()]
    for each in sets:
        for line in collect(*each, lines):
            lines.append(line)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    text = page(lines)
    print(text)
    if options.write:
        README.write_text(inserted(README.read_text(), MARK, text))


if __name__ == "__main__":
    main()
