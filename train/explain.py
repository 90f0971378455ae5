"""Explains a model's predictions on a whole part of a data set: maps as float arrays, and a manifest.

    python train/explain.py checkpoints/flowers --data DIR --out runs/maps                the part val
    python train/explain.py runs/a --data DIR --out runs/maps --stages stage3 stage4 --methods grad_cam hires_cam

maps/NNNNNN.npz   a batch: METHOD/STAGE is (N, h, w) float32, raw and signed; "lines" is its part of the manifest
manifest.jsonl    one object a picture: file, batch, row, prediction, score, peaks by method and stage
settings.json     the model, data and options of these maps

The explained score is that of the prediction: the logit of the predicted class, or the mean logit over the predicted
mask of the first class (the maps are all 0 where the mask is empty). A batch is written whole or not at all: the same
command continues a run that was stopped. Memory holds one batch at a time.
"""

import argparse
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cli
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cvlab.data.evaluation import parts_of
from cvlab.data.folders import DataError
from cvlab.data.parts import Parts
from cvlab.explain import METHODS, check_stages
from cvlab.explain.many import describe, explain_predictions
from cvlab.files import read_json, to_json, whole_file, write_text
from cvlab.models import Model
from cvlab.models.fused import fused
from cvlab.transforms import ImageError, view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("--data", type=Path, help="data folder, or torchvision:NAME; by default synthetic scenes")
    parser.add_argument("--part", choices=("val", "test", "train", "all"), default="val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the maps")
    parser.add_argument("--stages", nargs="+", help="by default all stages of the model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grad_cam"])
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    data, size = cli.data_folder(args.data), args.batch_size
    model = cli.open_model(args.checkpoint)
    stages = check_stages(model, args.stages or model.stages)
    parts, _ = parts_of(model, data, args.part)
    for note in parts.notes:
        print(note)
    samples = parts.samples[args.part]
    names = [f"scene {each}" if data is None else each[0].relative_to(data).as_posix() for each in samples]

    settings = {"data": parts.name, "part": args.part, "pictures": hash_of(json.dumps(names).encode())}
    weights = b"".join(tensor.contiguous().numpy().tobytes() for tensor in model.state_dict().values())
    settings |= {"weights": hash_of(weights), "stages": stages, "methods": args.methods, "batch": size}
    if read_json(args.out / "settings.json") not in ({}, settings):
        raise ValueError(f"{args.out} holds maps of another model, other data or other options: choose another --out.")
    write_text(args.out / "settings.json", json.dumps(settings, indent=1) + "\n")

    paths = [args.out / "maps" / f"{i:06d}.npz" for i in range(-(-len(samples) // size))]
    to_do = [i for i, path in enumerate(paths) if not path.is_file()]
    faster = fused(model)  # the same maps in 0.7 of the time
    for i in tqdm(to_do, "explaining"):
        batch = slice(i * size, (i + 1) * size)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            opened = list(pool.map(partial(open_view, parts, model), samples[batch]))
        found = list(zip(names[batch], opened, strict=True))
        for _, reason in found:
            if isinstance(reason, str):
                tqdm.write(f"Left out: {reason}")
        views = [view for view in opened if isinstance(view, Tensor)]
        if not views:
            continue
        explanation = explain_predictions(faster, torch.cat(views), stages, args.methods)
        files = [name for name, view in found if isinstance(view, Tensor)]
        lines = [
            to_json({"file": name, "batch": paths[i].name, "row": row, **line})
            for row, (name, line) in enumerate(zip(files, describe(model, explanation), strict=True))
        ]
        arrays = {f"{m}/{s}": maps[:, 0].numpy() for m, of in explanation.maps.items() for s, maps in of.items()}
        with whole_file(paths[i]) as writing, open(writing, "wb") as file:
            np.savez(file, lines=np.array(lines), **arrays)

    manifest = []
    for path in sorted((args.out / "maps").glob("*.npz")):  # one batch after the other
        with np.load(path) as arrays:
            manifest += arrays["lines"].tolist()
    if not manifest:
        raise ValueError("No picture could be opened, so there is nothing to explain.")
    write_text(args.out / "manifest.jsonl", "".join(line + "\n" for line in manifest))
    print(f"{len(manifest)} pictures explained: {args.out / 'manifest.jsonl'}")


def open_view(parts: Parts, model: Model, sample: object) -> Tensor | str:
    """What the model sees of a sample, or the reason why it cannot be used."""
    try:
        return view(parts.open_sample(sample)[0], model)
    except (ImageError, DataError) as error:
        return str(error)


def hash_of(content: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
