"""What else would tell that a model uses a mark? SpRAy's clusters of heatmaps, and what a single fact tells.

    python tests/bench/audit_others.py DIR ... [--write]     the folders of tests/bench/audit.py, into README.md here

Each network of these folders gets three scores for its marked class, and the areas under the ROC of used marks against
unused ones are compared.

SpRAy (Lapuschkin et al., "Unmasking Clever Hans predictors", 2019): Grad-CAM maps of the class's pictures are clustered
spectrally; a gap after the second eigenvalue or a later one says that there are clearly separated ways to decide. Its
score is the largest such gap. A person would look at every cluster, which no score replaces.

cleanlab's score of spurious correlations: how well a single fact of pictures (brightness, blur, ...), here the facts of
cvlab/audit/data.py and of the files, tells the class from the others: the balanced accuracy, less one half. It does not
ask the model.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import kneighbors_graph
from tables import README, hardware, inserted, table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]  # cvlab needs no installation

from cvlab import checkpoint
from cvlab.audit.data import facts_of, telling
from cvlab.data.evaluation import parts_of, read_views
from cvlab.explain import default_stage, explain
from cvlab.explain.scores import class_score
from cvlab.files import read_json
from cvlab.models import Model

USED, UNUSED = 0.1, 0.05  # as in audit.py beside this script
SIDE, LARGEST_GROUPS = 16, 8  # of the maps that are compared; clusters that are asked about
NEIGHBOURS = 0.15  # of the maps: so gaps of large and small classes can be compared
MARK = "bench-audit-others"


def eigengap(maps: Tensor) -> float:
    """The largest gap among the first eigenvalues of the normalised Laplacian of a graph of neighbours of maps.

    Args:
        maps: (N, 1, h, w) >= 0.
    """
    small = F.adaptive_avg_pool2d(maps, min(SIDE, maps.shape[-1])).flatten(1)
    rows = F.normalize(small, dim=1).numpy()
    graph = kneighbors_graph(rows, max(3, round(NEIGHBOURS * len(rows)))).toarray()
    graph = np.maximum(graph, graph.T)
    degree = graph.sum(1)
    laplacian = np.eye(len(rows)) - graph / np.sqrt(np.outer(degree, degree))
    values = eigh(laplacian, eigvals_only=True, subset_by_index=[0, min(LARGEST_GROUPS, len(rows) - 1)])
    return float(np.diff(values)[1:].max())  # the first one is large where all maps are alike


def spray(model: Model, views: Tensor, class_idx: int) -> float:
    """`eigengap` of the Grad-CAM maps of a class in its pictures (N, 3, S, S) uint8."""
    stage = default_stage(model)
    maps = [
        explain(model, some / 255, class_score(class_idx), [stage]).maps["grad_cam"][stage] for some in views.split(32)
    ]
    return eigengap(torch.cat(maps).relu())


def scores(folder: Path, class_name: str) -> dict[str, float]:
    """Of the class of an experiment: SpRAy's, and what a single fact tells."""
    model = checkpoint.load(folder / "run")
    parts, _ = parts_of(model, folder / "data", "test")
    views, labels = read_views(parts, "train", model)
    class_idx, labels = model.class_names.index(class_name), torch.tensor(labels)
    own = labels == class_idx
    told = telling(facts_of(views, parts.samples["train"]), own.long())
    return {"spray": spray(model, views[own], class_idx), "fact": max(told.values()) - 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="--out of tests/bench/audit.py")
    parser.add_argument("--write", action="store_true", help="the table into README.md")
    args = parser.parse_args()
    found = []
    for folder in args.folders:
        rows = read_json(folder / "rows.json").get("rows", [])
        for run, row in zip(sorted(path for path in folder.iterdir() if path.is_dir()), rows, strict=False):
            if row["mark"] and not UNUSED <= row["truth"] < USED:
                found.append(row | scores(run, row["class"]))
                told = {name: found[-1][name] for name in ("mark", "truth", "effect", "heat", "spray", "fact")}
                print(
                    {name: value if name == "mark" else round(float(value), 3) for name, value in told.items()},
                    flush=True,
                )
    used = [row["truth"] >= USED for row in found]
    names = {"effect": "the audit: proven effect", "heat": "share of the heatmaps on the mark, which has to be known"}
    names |= {"spray": "SpRAy: gap of the eigenvalues", "fact": "what a single fact tells (cleanlab)"}
    lines = [[words, f"{roc_auc_score(used, [row[name] for row in found]):.2f}"] for name, words in names.items()]
    page = f"{sum(used)} used and {len(used) - sum(used)} unused marks, {hardware()}.\n\n"
    page += table(["score", "area under ROC"], lines) + "\n"
    if args.write:
        README.write_text(inserted(README.read_text("utf-8"), MARK, page), "utf-8")
    print(page)


if __name__ == "__main__":
    main()
