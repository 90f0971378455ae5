"""Explains a model's predictions on a whole part of a data set: maps as float arrays, a manifest, mean maps.

    python train/explain.py checkpoints/flowers --data DIR --out runs/maps                the part val
    python train/explain.py runs/a --data DIR --out runs/maps --stages stage3 stage4 --methods grad_cam hires_cam
    python train/explain.py runs/a --data DIR --out runs/maps --compare runs/b

maps/NNNNNN.npz   a batch: METHOD/STAGE is (N, h, w) float32, raw and signed; "lines" is its part of the manifest
manifest.jsonl    one object a picture: file, batch, row, prediction, score, peaks by method and stage
mean_maps.npz, mean_METHOD.png   the mean map of each predicted class at every stage: (C, h, w), and pictures
settings.json     what was asked

What is explained is what the model predicts: the logit of the class, or the mean logit over the mask of the first class
(all zeros where no pixel is found). A batch is written whole or not at all, and the same command goes on where a run
stopped. Memory is that of one batch, however many pictures there are.

With --compare both models explain every picture, each its own prediction, and the manifest has the correlation of the
two maps and their mean difference as shares of their largest values. The same model twice differs by exactly 0.
"""

import argparse
import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli

from cvlab import checkpoint, render
from cvlab.data.evaluation import parts_of, read_views
from cvlab.data.folders import DataError
from cvlab.explain import METHODS, check_stages, peak
from cvlab.explain.many import MeanMaps, compared_stages, describe, every_map, explain_predictions, likeness
from cvlab.files import write_bytes, write_text
from cvlab.models import Model
from cvlab.models.fused import for_serving
from cvlab.transforms import to_float

MOST_ROWS = 20  # classes in a picture of mean maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", type=Path, help="data folder; without one, synthetic scenes (cvlab/data/shapes.py)")
    parser.add_argument("--part", choices=("val", "test", "train", "all"), default="val")
    parser.add_argument("--out", type=Path, required=True, help="where the maps go")
    parser.add_argument("--stages", nargs="+", help="by default all of the model's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grad_cam"])
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second model, on the same images")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    args.data = cli.data_folder(args.data)
    model = checkpoint.load(args.checkpoint)
    other = checkpoint.load(args.compare) if args.compare else None
    if other and other.task != model.task:
        raise ValueError(
            f"{args.checkpoint} is for {model.task}, {args.compare} for {other.task}: compare like with like."
        )
    stages = check_stages(model, args.stages or model.stages)

    parts, _ = parts_of(model, args.data, args.part)
    samples = parts.samples[args.part]
    names = [file_name(sample, args.data) for sample in samples]

    settings = {"data": parts.name, "part": args.part, "pictures": hash_of(json.dumps(names).encode())}
    settings |= {"weights": weights_hash(model), "stages": stages, "methods": args.methods, "batch": args.batch_size}
    if other:
        compared = compared_stages(model, other, stages)
        settings |= {"other_weights": weights_hash(other), "compared_stages": list(compared)}
    if (args.out / "settings.json").is_file() and json.loads((args.out / "settings.json").read_text()) != settings:
        raise ValueError(f"{args.out} holds maps of another model, data or choice: take another --out.")
    write_text(args.out / "settings.json", json.dumps(settings, indent=1) + "\n")

    model, other = for_serving(model), for_serving(other) if other else None  # the same maps in 0.7 of the time
    for start in tqdm(range(0, len(samples), args.batch_size), "explaining"):
        path = args.out / "maps" / f"{start // args.batch_size:06d}.npz"
        if path.is_file():
            continue
        batch = replace(parts, samples={args.part: samples[start : start + args.batch_size]}, notes=[])
        try:
            explanation = explain_predictions(
                model, to_float(read_views(batch, args.part, model)[0]), stages, args.methods
            )
        except DataError as error:  # no picture of the batch can be opened
            tqdm.write(str(error))
            continue
        tqdm.write("\n".join(batch.notes), end="\n" if batch.notes else "")
        lines = describe(model, explanation)
        if other:
            theirs = explain_predictions(
                other, to_float(read_views(batch, args.part, other)[0]), [compared[1]], args.methods[:1]
            )
            mine, theirs_maps = explanation.maps[args.methods[0]], theirs.maps[args.methods[0]]
            correlations, differences = likeness(mine[compared[0]], theirs_maps[compared[1]])
            for i, (line, more) in enumerate(zip(lines, describe(other, theirs), strict=True)):
                line |= {"other_prediction": more["prediction"], "correlation": correlations[i].item()}
                line |= {"difference": differences[i].item()}
        for row, (sample, line) in enumerate(zip(batch.samples[args.part], lines, strict=True)):
            lines[row] = json.dumps({"file": file_name(sample, args.data), "batch": path.name, "row": row, **line})
        arrays = {f"{method}/{stage}": maps[:, 0].numpy() for method, stage, maps in every_map(explanation)}
        write_arrays(path, {"lines": np.array(lines), **arrays})
    summarise(args.out, model, stages, args.methods)


def file_name(sample: object, folder: Path | None) -> str:
    """How the manifest calls a sample: by its path in the data folder, or its seed where there is none."""
    return f"scene {sample}" if folder is None else sample[0].relative_to(folder).as_posix()


def summarise(out: Path, model: Model, stages: list[str], methods: list[str]) -> None:
    """The manifest and the mean maps, from one written batch after the other."""
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
        chosen = [(i, stage) for i in shown for stage in stages]
        maps = [torch.from_numpy(means[f"{method}/{stage}"][i])[None, None] for i, stage in chosen]
        pictures = [render.heatmap_picture(each, (model.image_size, model.image_size)) for each in maps]
        titles = [
            f"{model.class_names[i][:14]} ({mean.counts[i]})\n{stage[-14:]}, peak {peak(each).item():.3g}"
            for (i, stage), each in zip(chosen, maps, strict=True)
        ]
        render.save_png(render.grid(pictures, titles, len(stages)), out / f"mean_{method}.png")
    print(f"{len(manifest)} pictures explained: {out / 'manifest.jsonl'}")
    if compared := [json.loads(line)["correlation"] for line in manifest if '"correlation"' in line]:
        print(f"Correlation of the two models' maps: median {np.median(compared):.4f}, least {min(compared):.4f}")


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def weights_hash(model: Model) -> str:
    """Tells one set of weights from another."""
    return hash_of(*(tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values()))


def hash_of(*contents: bytes) -> str:
    """A short hash of bytes."""
    sha = hashlib.sha256()
    for content in contents:
        sha.update(content)
    return sha.hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
