"""Which heatmaps are right? Judged on synthetic scenes that are drawn again without one object, all else unchanged.

python tests/bench/trust.py                          the shipped models of synthetic scenes; an hour on one core
python tests/bench/trust.py RUN ...                  and runs of train/classifier.py on these scenes
python tests/bench/trust.py --json FILE              also into FILE, a line a scene; a second run goes on from there
python tests/bench/trust.py --write                  put the tables into tests/bench/README.md
python tests/bench/trust.py --quick                  four scenes of one model: whether it runs

The truth is what each object is worth to the score: Shapley values over all subsets of the objects, every subset drawn
and nothing painted over, so that a model sees only pictures of the kind that it knows. The score is the logit of the
predicted class, or a segmenter's mean logit over its mask, or over the largest part of its mask (a region). Heatmaps
are judged as they are drawn, their evidence for the score alone (trust_maps.py). The measures, with sources and known
failures, stand in trust_measures.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trust_measures as measures
from scipy import ndimage
from tables import README, hardware, inserted, table
from torch import Tensor
from trust_maps import Mosaic, Question, all_maps, beside, references

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import explain, predict, predicted_masks
from cvlab.models import Model, build

MARK = "bench-trust"
SHIPPED = [ROOT / "checkpoints" / "shapes-classifier", ROOT / "checkpoints" / "shapes-segmenter"]
FIRST_SEED = 10_000  # these scenes are in no part that a model was trained, chosen or tested on
SCENES, AT_ONCE = 500, 20
EXTRA = 100  # of the first scenes peers' maps, mosaics and infills too
SANITY = 8  # of each batch of these, the maps are compared with those of a network that learned nothing
MEASURES = ("mass", "its ceiling", "rank", "its ceiling", "part deletion", "per pixel", "single deletion")

# --- truth ------------------------------------------------------------------------------------------------------------


@lru_cache(AT_ONCE)
def drawn(seed: int, size: int) -> tuple[np.ndarray, Tensor]:
    """A scene's objects (K, H, W), and the scene with every subset of them (2**K, 3, S, S); the last one is whole."""
    objects = shapes.scene(seed, size).objects
    pictures = []
    for subset in range(2 ** len(objects)):
        left_out = [i for i in range(len(objects)) if not subset >> i & 1]
        pictures.append(np.asarray(shapes.scene(seed, size, without=left_out).image))
    return objects, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def questions(model: Model, images: Tensor) -> dict[str, Question]:
    """What is asked of a model's predictions."""
    logits = predict(model, images)
    if model.task == "classification":
        return {"class": Question(logits.argmax(1))}
    masks = predicted_masks(model, logits)[:, 0]
    masks[~masks.flatten(1).any(1)] = True  # a scene in which nothing is found is asked about as a whole
    parts = []
    for mask in masks.numpy():
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        parts.append(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
    return {"mask": Question(regions=masks), "region": Question(regions=torch.from_numpy(np.stack(parts)))}


def greyed(images: Tensor) -> Tensor:
    """Pictures (1, 3, S, S) with each cell of a 4 x 4 grid greyed: (16, 3, S, S), as `--erase` does in training."""
    cells = torch.eye(16).view(16, 1, 4, 4)
    return torch.where(F.interpolate(cells, images.shape[-2:]) > 0, 0.5, images)


def infills(model: Model, images: Tensor, objects: np.ndarray, asked: Question, worth: list, seed: int) -> dict:
    """By kind of infill, what hiding does to the score of one picture (1, 3, S, S).

    "objects": pairs of falls, of each object hidden and, as `worth` says, left out; "background": falls at four places
    off all objects, where nothing that matters is hidden; "random": for four random maps the score with their hot half
    shown less that with it hidden, which should be 0 but for chance.
    """
    size, generator = images.shape[-1], torch.Generator().manual_seed(seed)
    noise = F.interpolate(torch.randn(4, 1, 8, 8, generator=generator), (size, size), mode="bicubic")
    hot, hotter = (noise > noise.flatten(1).quantile(q, 1).view(-1, 1, 1, 1) for q in (0.5, 0.85))
    near = F.max_pool2d(torch.from_numpy(objects.any(0))[None, None].float(), 5, 1, 2) > 0
    hidden = torch.cat([torch.from_numpy(objects)[:, None], hotter & ~near, hot, ~hot])
    found = {}
    for kind in measures.INFILLS:
        pictures = measures.infill(images.expand(len(hidden), -1, -1, -1), hidden, kind)
        whole, *after = asked.scores(predict(model, torch.cat([images, pictures]))).tolist()
        falls = [whole - each for each in after]
        found[kind] = {
            "objects": list(zip(falls[: len(objects)], worth, strict=True)),
            "background": falls[-12:-8],
            "random": [gone - shown for gone, shown in zip(falls[-8:-4], falls[-4:], strict=True)],
        }
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


def unlearned(model: Model, seed: int) -> Model:
    """The same network with its weights drawn anew."""
    torch.manual_seed(seed)
    config = model.config
    network = build(
        config["network"], model.class_names, model.image_size, config["arguments"], config["mean"], config["std"]
    )
    return network.eval()


def figures_of(model: Model, seeds: list[int]) -> Iterator[dict]:
    """What is found for each scene and question."""
    scenes = [drawn(seed, model.image_size) for seed in seeds]
    images = torch.stack([pictures[-1] for _, pictures in scenes]) / 255
    subsets = [predict(model, pictures / 255) for _, pictures in scenes]
    cells = [predict(model, greyed(image[None])) for image in images]
    number = seeds[0] - FIRST_SEED
    for asked, question in questions(model, images).items():
        extra = number < EXTRA
        maps = all_maps(model, images, question, extra)
        maps |= {(method, at): heat for method, at, heat in references(images, seeds)}
        fourth, few = question.at(slice(None, None, 4)), slice(SANITY)
        mosaics = all_maps(Mosaic(model), beside(images), fourth) if extra else {}
        others = all_maps(unlearned(model, number), images[few], question.at(few)) if extra else {}
        raw = explain(model, images[:1], question.at(slice(1)).score).maps["grad_cam"]
        for i, seed in enumerate(seeds):
            one, objects = question.at(slice(i, i + 1)), scenes[i][0]
            scores = one.scores(subsets[i])
            importance = measures.shapley(scores.tolist())
            worth = [float(scores[-1] - scores[-1 - 2**k]) for k in range(len(objects))]
            area = measures.what_matters(objects, importance)
            falls = (scores[-1] - one.scores(cells[i])).tolist()
            ceilings = {at: measures.ceiling(area, each.shape[-1], model.stages[at]) for at, each in raw.items()}
            rows = {}
            for (method, at), heat in maps.items():
                drawn_maps = (heat[i], ceilings.get(at, area.astype(float)))
                found = [measure(each, area) for measure in (measures.mass, measures.rank) for each in drawn_maps]
                found += [measures.part_deletion(heat[i], objects, importance, each) for each in (False, True)]
                found.append(measures.single_deletion(heat[i], falls))
                rows[f"{method} | {at}"] = [round(each, 4) for each in found]
            line = {"asked": asked, "seed": seed, "area": float(area.mean()), "rows": rows}
            if extra:
                line["infills"] = infills(model, images[i : i + 1], objects, one, worth, seed)
            if extra and i < SANITY:
                line["alike"] = {" | ".join(key): alike(heat[i], maps[key][i]) for key, heat in others.items()}
            if extra and i % 4 == 0:
                line["leaks"] = {" | ".join(key): measures.mosaic_leak(heat[i // 4]) for key, heat in mosaics.items()}
            yield line


def alike(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two heatmaps; NaN if one is blank or the same everywhere."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) if a.std() and b.std() else np.nan


def measure(folders: list[Path], scenes: int, path: Path | None) -> list[dict]:
    """A line for each model, scene and question; those that the file at `path` already has are read from it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    done = {(line["model"], line["seed"]) for line in lines}
    models = {folder.name: checkpoint.load(folder) for folder in folders}
    for start in range(FIRST_SEED, FIRST_SEED + scenes, AT_ONCE):
        seeds = list(range(start, min(start + AT_ONCE, FIRST_SEED + scenes)))
        for name, model in models.items():
            if (name, seeds[-1]) in done:
                continue
            erased = bool(model.config.get("options", {}).get("erase"))
            new = [{"model": name, "erased": erased} | line for line in figures_of(model, seeds)]
            lines += new
            if path:
                with path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in new)
            print(f"{name}: {seeds[-1] + 1 - FIRST_SEED} of {scenes} scenes", file=sys.stderr, flush=True)
    return [line for line in lines if line["model"] in models and line["seed"] < FIRST_SEED + scenes]


# --- tables -----------------------------------------------------------------------------------------------------------


def figure(values: list[float]) -> str:
    """Mean and 95% interval; a dash if there is none."""
    mean, low, high = measures.interval(values)
    return "-" if np.isnan(mean) else f"{mean:.2f} ({low:.2f} to {high:.2f})"


def maps_table(lines: list[dict]) -> str:
    """The heatmaps of one model and question, those first that show best what matters."""
    keys, rows = dict.fromkeys(key for line in lines for key in line["rows"]), {}
    for key in keys:
        found = np.array([line["rows"][key] for line in lines if key in line["rows"]], float).T
        sanity = [line["alike"][key] for line in lines if key in line.get("alike", {})]
        leaks = [line["leaks"][key] for line in lines if key in line.get("leaks", {})]
        cells = [figure(found[0]), f"{np.nanmean(found[1]):.2f}", figure(found[2]), f"{np.nanmean(found[3]):.2f}"]
        cells += [figure(found[4]), figure(found[5])]
        cells.append(figure(found[6]) if lines[0]["erased"] else f"not valid ({np.nanmean(found[6]):.2f})")
        cells.append(("passes" if measures.gate(sanity) else "fails") if sanity else "-")
        cells.append(f"{abs(np.nanmean(leaks)):.2f}" if leaks else "-")
        rows[key] = np.nanmean(found[2]), [*key.split(" | "), str(found.shape[1]), *cells]
    head = ["heatmap", "stage", "n", *MEASURES, "gate", "mosaic"]
    return table(head, [row for _, row in sorted(rows.values(), key=lambda each: -each[0])])


def infills_table(lines: list[dict]) -> str:
    """Three ways to hide a part of a picture, beside what drawing the scene without it does."""
    rows = []
    for kind in measures.INFILLS:
        found = [line["infills"][kind] for line in lines if "infills" in line]
        hidden, left_out = np.array([pair for each in found for pair in each["objects"]]).T
        background = np.array([each["background"] for each in found])
        chance = [float(np.mean(each["random"])) for each in found]
        scale = np.mean([max(worth for _, worth in each["objects"]) for each in found])
        rows.append(
            [
                kind,
                f"{np.corrcoef(hidden, left_out)[0, 1]:.2f}",
                f"{np.abs(hidden - left_out).mean() / scale:.2f}",
                figure(np.abs(background).mean(1) / scale),
                figure(np.array(chance) / scale),
            ]
        )
    head = ["hidden places are", "objects: r", "objects: error", "background: fall", "random maps: shown less hidden"]
    return table(head, rows)


def page(lines: list[dict]) -> str:
    """All tables."""
    text = []
    for name, asked in dict.fromkeys((line["model"], line["asked"]) for line in lines):
        mine = [line for line in lines if (line["model"], line["asked"]) == (name, asked)]
        erased = "trained with grey cells" if mine[0]["erased"] else "trained without grey cells"
        chance = np.mean([line["area"] for line in mine])
        text.append(f"**{name}, {asked}**, {len(mine)} scenes, {erased}. Mass and rank are {chance:.2f} by chance.")
        text += [maps_table(mine), infills_table(mine)]
    return "\n\n".join([f"On {hardware()}, torch {torch.__version__}.", *text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="further models of synthetic scenes")
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="what is found, a line a scene; read first if there")
    parser.add_argument("--write", action="store_true", help="put the tables into tests/bench/README.md")
    parser.add_argument("--quick", action="store_true", help="four scenes of one model")
    options = parser.parse_args()
    if options.write and options.quick:
        parser.error("--write is for the whole bench")
    folders = SHIPPED[:1] if options.quick else [*SHIPPED, *options.runs]
    text = page(measure(folders, 4 if options.quick else options.scenes, options.json))
    print(text)
    if options.write:
        README.write_text(inserted(README.read_text(), MARK, text))


if __name__ == "__main__":
    main()
