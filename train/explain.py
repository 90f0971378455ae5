"""Explains a model's predictions on a whole part of a data set: maps as float arrays, a manifest, mean maps.

    python train/explain.py checkpoints/flowers --data DIR --out runs/maps                the part val
    python train/explain.py runs/a --data DIR --out runs/maps --stages stage3 stage4 --methods grad_cam hires_cam
    python train/explain.py runs/a --data DIR --out runs/maps --compare runs/b

maps/NNNNNN.npz   a batch: METHOD/STAGE is (N, h, w) float32, raw and signed; "lines" is its part of the manifest
manifest.jsonl    one object a picture: file, batch, row, prediction, score, peaks by method and stage
mean_maps.npz, mean_METHOD.png   the mean map of each predicted class at every stage: (C, h, w), and pictures
settings.json     the model, data and options of these maps

The explained score is that of the prediction: the logit of the predicted class, or the mean logit over the predicted
mask of the first class (the maps are all 0 where the mask is empty). A batch is written whole or not at all: the same
command continues a run that was stopped. Memory holds one batch at a time.

With --compare both models explain every picture, each its own prediction. The manifest then also has the correlation of
the two maps, and the mean difference after each is divided by its largest value (exactly 0 for the same model).
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path

import cli
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint, render
from cvlab.data.evaluation import parts_of
from cvlab.data.folders import DataError
from cvlab.data.parts import Parts
from cvlab.explain import METHODS, check_stages, peak
from cvlab.explain.many import MeanMaps, compared_stages, explain_batches, likeness
from cvlab.files import read_json, to_json, whole_file, write_text
from cvlab.models import Model
from cvlab.models.fused import for_serving
from cvlab.transforms import ImageError, view

MOST_ROWS = 20  # classes in a picture of mean maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", type=Path, help="data folder, or torchvision:NAME; by default synthetic scenes")
    parser.add_argument("--part", choices=("val", "test", "train", "all"), default="val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the maps")
    parser.add_argument("--stages", nargs="+", help="by default all stages of the model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grad_cam"])
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second model, on the same pictures")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    data, size = cli.data_folder(args.data), args.batch_size
    model = checkpoint.load(args.checkpoint)
    other = checkpoint.load(args.compare) if args.compare else None
    if other and other.task != model.task:
        raise ValueError(f"{args.checkpoint} is for {model.task}, {args.compare} for {other.task}: choose two alike.")
    stages = check_stages(model, args.stages or model.stages)
    parts, _ = parts_of(model, data, args.part)
    for note in parts.notes:
        print(note)
    samples = parts.samples[args.part]
    names = [f"scene {each}" if data is None else each[0].relative_to(data).as_posix() for each in samples]

    settings = {"data": parts.name, "part": args.part, "pictures": hash_of([json.dumps(names).encode()])}
    settings |= {"weights": weights_hash(model), "stages": stages, "methods": args.methods, "batch": size}
    if other:
        method, (stage, other_stage) = args.methods[0], compared_stages(model, other, stages)
        settings |= {"other_weights": weights_hash(other), "compared_stages": [stage, other_stage]}
    if read_json(args.out / "settings.json") not in ({}, settings):
        raise ValueError(f"{args.out} holds maps of another model, other data or other options: choose another --out.")
    write_text(args.out / "settings.json", json.dumps(settings, indent=1) + "\n")

    paths = [args.out / "maps" / f"{i:06d}.npz" for i in range(-(-len(samples) // size))]
    to_do = [i for i, path in enumerate(paths) if not path.is_file()]
    batches = [samples[i * size : (i + 1) * size] for i in to_do]

    def explained_by(model: Model, stages: list[str], methods: list[str]) -> Iterator:
        model = for_serving(model)  # fused: the same maps in 0.7 of the time
        return explain_batches(model, batches, partial(open_view, parts, model), stages, methods, os.cpu_count())

    ours = explained_by(model, stages, args.methods)
    others = explained_by(other, [other_stage], [method]) if other else repeat(None)
    for i, (opened, explanation, lines), theirs in zip(tqdm(to_do, "explaining"), ours, others, strict=False):
        for reason in opened:
            if isinstance(reason, str):
                tqdm.write(f"Left out: {reason}")
        if explanation is None:
            continue
        if theirs:
            r, difference = likeness(explanation.maps[method][stage], theirs[1].maps[method][other_stage])
            for row, line in enumerate(lines):
                line |= {"other_prediction": theirs[2][row]["prediction"], "correlation": r[row].item()}
                line |= {"difference": difference[row].item()}
        batch = zip(names[i * size : (i + 1) * size], opened, strict=True)
        files = [name for name, view in batch if isinstance(view, Tensor)]
        for row, name in enumerate(files):
            lines[row] = to_json({"file": name, "batch": paths[i].name, "row": row, **lines[row]})
        arrays = {f"{m}/{s}": maps[:, 0].numpy() for m, of in explanation.maps.items() for s, maps in of.items()}
        write_arrays(paths[i], {"lines": np.array(lines), **arrays})
    summarise(args.out, model, stages, args.methods)


def open_view(parts: Parts, model: Model, sample: object) -> Tensor | str:
    """What the model sees of a sample, or the reason why it cannot be used."""
    try:
        return view(parts.open_sample(sample)[0], model)
    except (ImageError, DataError) as error:
        return str(error)


def summarise(out: Path, model: Model, stages: list[str], methods: list[str]) -> None:
    """Writes the manifest and the mean maps, reading one batch after the other."""
    manifest, mean = [], MeanMaps(model.class_names)
    for path in sorted((out / "maps").glob("*.npz")):
        with np.load(path) as arrays:
            lines = arrays["lines"].tolist()
            mean.add([json.loads(line)["prediction"] for line in lines], {k: arrays[k] for k in arrays if k != "lines"})
        manifest += lines
    if not manifest:
        raise ValueError("No picture could be opened, so there is nothing to explain.")
    write_text(out / "manifest.jsonl", "".join(line + "\n" for line in manifest))
    means = mean.means()
    write_arrays(out / "mean_maps.npz", {"class_names": np.array(mean.class_names), "counts": mean.counts, **means})
    shown = [i for i in np.argsort(-mean.counts, kind="stable")[:MOST_ROWS].tolist() if mean.counts[i]]
    for method in methods if shown else ():
        pictures, titles = [], []
        for i in shown:
            for stage in stages:
                mean_map = torch.from_numpy(means[f"{method}/{stage}"][i])[None, None]
                view_size = model.image_size, model.image_size
                pictures.append(render.heatmap_picture(mean_map, view_size, stage=model.stages[stage]))
                title = f"{model.class_names[i][:14]} ({mean.counts[i]})"
                titles.append(f"{title}\n{stage[-14:]}, peak {peak(mean_map).item():.3g}")
        render.save_png(render.grid(pictures, titles, len(stages)), out / f"mean_{method}.png")
    print(f"{len(manifest)} pictures explained: {out / 'manifest.jsonl'}")
    if compared := [r for line in manifest if (r := json.loads(line).get("correlation")) is not None]:
        print(f"Correlation of the two models' maps: median {np.median(compared):.4f}, lowest {min(compared):.4f}")


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file whole or not at all."""
    with whole_file(path) as writing, open(writing, "wb") as file:
        np.savez(file, **arrays)


def weights_hash(model: Model) -> str:
    """A short hash of a model's weights."""
    return hash_of(tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values())


def hash_of(contents: Iterable[bytes]) -> str:
    """A short hash of bytes."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content)
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
