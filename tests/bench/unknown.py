"""How many pictures of something else a classifier refuses, when it refuses 5% of its own, and by what it tells them.

    python tests/bench/unknown.py RUN ... --data DIR --foreign DIR ...     prints Markdown, a table for each model
    python tests/bench/unknown.py ... --write                              puts it into README.md beside this script
    python tests/bench/unknown.py --quick                                  a small model of drawn scenes, for a test

Each way to tell is fitted on train. What looks more foreign than 95% of val is refused; test and the foreign folders
are only measured. The first row of a table is what the model's folder keeps and `cvlab.trust.familiarity` says.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from tables import README, inserted, table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.data.evaluation import foreign_views, parts_of, read_views
from cvlab.data.shapes import scene
from cvlab.explain.many import predict_views
from cvlab.metrics import wilson_interval
from cvlab.models import Model, build
from cvlab.transforms import square_view, to_uint8
from cvlab.trust.familiarity import FOREIGN, PRETRAINED, features, fit_statistics, foreignness

Scores = dict[str, Tensor]  # of each group of pictures, (N,): higher is more foreign
MARK = "bench-unknown"


def ways(model: Model, groups: dict[str, Tensor], labels: Tensor) -> dict[str, Scores]:
    """What each way to tell says of the views of "train", "val", "test" and foreign groups, by its name.

    Args:
        labels: of train.
    """
    kept = {name: features(model, views) for name, views in groups.items()}
    logits = {name: torch.cat([*predict_views(model, views)]) for name, views in groups.items()}
    unit = {name: F.normalize(rows, dim=1) for name, rows in kept.items()}
    found: dict[str, Scores] = {}

    def add(name: str, score: Callable[[Tensor], Tensor], rows: dict[str, Tensor]) -> None:
        found[name] = {group: score(each) for group, each in rows.items()}

    if model.statistics:
        add("**kept in the folder**", lambda rows: foreignness(model.statistics, rows), kept)
    directions = torch.linalg.svd(unit["train"], full_matrices=False).Vh
    for count in (16, 32, 128):
        basis = directions[:count].T
        add(f"outside {count} directions", lambda rows, basis=basis: 1 - (rows @ basis).norm(dim=1), unit)
    add("10th nearest neighbour", lambda rows: 1 - (rows @ unit["train"].T).topk(10).values[:, -1], unit)
    means = torch.stack([unit["train"][labels == i].mean(0) for i in labels.unique()])
    add("nearest mean of a class", lambda rows: 1 - (rows @ F.normalize(means, dim=1).T).amax(1), unit)
    if model.config["network"] not in PRETRAINED:
        imitated = fit_statistics(
            model, groups["train"], torch.zeros(len(groups["train"])), groups["val"], imitations(groups["train"])
        )
        add("class for rejecting imitations", lambda rows: foreignness(imitated, rows), kept)
    add("energy", lambda rows: -rows.logsumexp(1), logits)
    add("probability of the prediction", lambda rows: -rows.softmax(1).amax(1), logits)
    return found


def imitations(views: Tensor) -> Tensor:
    """As many pictures made of these (N, 3, S, S) uint8: two mixed, tiles in another order, colours exchanged."""
    views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(0))].float()
    mixed, cut, coloured = views.tensor_split(3)
    for side in (2, 3):
        bands = cut.tensor_split(4, side)
        cut = torch.cat([bands[i] for i in (2, 0, 3, 1)], side)
    return torch.cat([(mixed + mixed.roll(1, 0)) / 2, cut, coloured[:, [1, 2, 0]]]).to(torch.uint8)


def shares(scores: Scores) -> dict[str, dict]:
    """For test and each foreign group: the share that is refused, its interval, n, and the area under ROC."""
    own, found = scores["test"], {}
    for name, each in scores.items():
        if name not in ("train", "val"):
            refused = int(((scores["val"] >= each[:, None]).float().mean(1) < FOREIGN).sum())  # as the page decides
            low, high = wilson_interval(refused, len(each))
            found[name] = {"n": len(each), "refused": refused / len(each), "low": low, "high": high}
            if name != "test":
                truth = [0] * len(own) + [1] * len(each)
                found[name]["area"] = float(roc_auc_score(truth, torch.cat([own, each])))
    return found


def measured(model: Model, data: Path | None, foreign: list[Path]) -> dict[str, dict]:
    """The shares of each way to tell, for the model's own parts and pictures of anything else."""
    parts, _ = parts_of(model, data, "test")
    groups, labels = {}, []
    for part in ("train", "val", "test"):
        groups[part], some = read_views(parts, part, model)
        labels = labels or some
    groups |= {folder.name: foreign_views(folder, model) for folder in foreign}
    return {name: shares(scores) for name, scores in ways(model, groups, torch.tensor(labels)).items()}


def page(title: str, found: dict[str, dict]) -> str:
    """A table: a row for each way to tell, a column for each group of pictures."""
    groups = next(iter(found.values()))
    head = ["told by", *(f"{'own test' if name == 'test' else name} ({each['n']})" for name, each in groups.items())]
    rows = []
    for name, by_group in found.items():
        cells = []
        for each in by_group.values():
            area = f", area {each['area']:.3f}" if "area" in each else ""
            cells.append(f"{each['refused']:.1%} ({each['low']:.1%} to {each['high']:.1%}){area}")
        rows.append([name, *cells])
    return f"{title}: share refused, with its 95% interval, and area under ROC.\n\n{table(head, rows)}\n"


def quick(folder: Path) -> tuple[Model, Path, list[Path]]:
    """A small untrained model of two kinds of drawn scenes, its data, and a folder of noise."""
    data, foreign = folder / "scenes", folder / "noise"
    rng = np.random.default_rng(0)
    for seed in range(120):
        drawn = scene(seed, 32)
        path = data / ("round" if drawn.label == 0 else "cornered") / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.image.save(path)
    foreign.mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(foreign / f"{i}.png")
    torch.manual_seed(0)
    model = build("convnet", ["cornered", "round"], 32, {"widths": [4, 8]}).eval()
    own = torch.stack([to_uint8(square_view(scene(seed, 32).image, model)) for seed in range(40)])
    model.statistics = fit_statistics(model, own[:20], torch.zeros(20), own[20:], foreign_views(foreign, model))
    return model, data, [foreign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of classifiers that were trained on the data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="+", default=[], help="folders of photos of anything else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    found, text = {}, ""
    with tempfile.TemporaryDirectory() as scratch:
        asked = [(str(run), checkpoint.load(run), args.data, args.foreign) for run in args.runs]
        if args.quick:
            asked = [("quick", *quick(Path(scratch)))]
        for name, model, data, foreign in asked:
            found[name] = measured(model, data, foreign)
            told = "pretrained" if model.config["network"] in PRETRAINED else "from scratch"
            text += page(f"`{Path(name).name}` ({told}, {model.image_size} pixels)", found[name]) + "\n"
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.write:
        README.write_text(inserted(README.read_text(), MARK, text))
    print(text)


if __name__ == "__main__":
    main()
