"""Explains a model's prediction for a photo, or its predictions on a whole part of a data set.

    python train/explain.py checkpoints/flowers rose.jpg --out runs/rose [--class tulips]

METHOD-STAGE.png  the heat over the part of the photo that the model saw, at most 1024 pixels a side
mask.png          of a segmenter: the mask of the explained class over the photo
maps.npz          METHOD/STAGE is (h, w) float32, raw and signed
manifest.json     file, prediction, probabilities (of a segmenter: shares of the photo in the masks), the explained
                  class, score, peaks and warnings by method and stage. It is written last: where it is, all is

    python train/explain.py checkpoints/flowers --data DIR --out runs/maps                the part val
    python train/explain.py runs/a --data DIR --out runs/maps --stages stage3 stage4 --methods grad_cam hires_cam

maps/NNNNNN.npz   a batch: METHOD/STAGE is (N, h, w) float32, raw and signed; "lines" is its part of the manifest
manifest.jsonl    one object a picture: file, batch, row, prediction, score, peaks by method and stage
settings.json     the model, data and options of these maps

The explained score is that of the prediction: the logit of the predicted class, or the mean logit over the predicted
mask that covers most (the maps are all 0 where nothing was found). A batch is written whole or not at all: the same
command continues a run that was stopped. Memory holds one batch at a time.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import cli
import numpy as np
import torch
from accelerator import goes_on, processes
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint
from cvlab.data import public
from cvlab.data.evaluation import parts_of
from cvlab.data.folders import DataError
from cvlab.data.parts import Parts
from cvlab.explain import METHODS, check_stages, explain, peak, predicted_classes, predicted_masks
from cvlab.explain.many import describe, explain_predictions
from cvlab.files import read_json, to_json, whole_file, write_text
from cvlab.models import Model
from cvlab.models.fused import fused
from cvlab.page.evidence import mask_size, predict_photo
from cvlab.page.question import Question, settled_score
from cvlab.render import enlarged, mask_overlay, overlay, save_png
from cvlab.transforms import ImageError, open_image, resize_logits, resize_mask, to_float, to_uint8, view
from cvlab.trust.diagnosis import diagnose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("photo", type=Path, nargs="?", help="explain this photo; without it, a part of a data set")
    parser.add_argument("--class", dest="class_name", default="", help="of PHOTO: explain another class than predicted")
    parser.add_argument("--data", type=Path, help="folder, torchvision:NAME or hf:user/dataset; else synthetic scenes")
    parser.add_argument("--part", choices=("val", "test", "train", "all"), help="by default val")
    parser.add_argument("--out", type=Path, required=True, help="folder of the maps")
    parser.add_argument("--stages", nargs="+", help="by default all stages of the model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["grad_cam"])
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if args.photo and (args.data or args.part):
        parser.error("give PHOTO, or --data and --part")
    if args.class_name and not args.photo:
        parser.error("--class goes with PHOTO")
    model = checkpoint.load_own(args.checkpoint)
    stages = check_stages(model, args.stages or model.stages)
    if args.photo:
        explain_photo(model, args, stages)
    else:
        explain_part(model, args, stages)


def explain_photo(model: Model, args: argparse.Namespace, stages: list[str]) -> None:
    """The files of one photo; ValueError for a class that the model does not have, or does not find."""
    image, out = open_image(args.photo, None, model.channels), args.out
    asked = Question(class_name=args.class_name)
    seen = predict_photo(image, model, asked, progress=partial(tqdm, desc="predicting"))  # makes the image smaller
    image = image.convert("RGB") if model.channels else image
    evidence, size, segments = seen.evidence, (image.height, image.width), model.task == "segmentation"
    predicted = model.class_names[predicted_classes(model, seen.logits)]
    explained = args.class_name or predicted
    manifest = {
        "file": str(args.photo),
        "model": model.source,
        "weights": hash_of_weights(model),
        "prediction": None if segments and not seen.shares[predicted] else predicted,
        "shares" if segments else "probabilities": seen.shares,
        "explained": explained,
        "score": evidence.score if evidence else 0.0,
        "peak": {method: {} for method in args.methods},
        "warnings": {method: {} for method in args.methods},
        "notes": seen.notes,
    }
    (out / "manifest.json").unlink(missing_ok=True)  # of other maps
    if segments:
        masks = predicted_masks(model, resize_logits(seen.logits, mask_size(model, size)))[0]
        mask = resize_mask(masks[model.class_names.index(explained)][None], size)[0]
        save_png(enlarged(mask_overlay(image, mask.numpy())), out / "mask.png")
    arrays = {}
    if evidence:
        score = settled_score(evidence.class_idx, None, evidence.region, negative=False)
        found = explain(model, evidence.images, score, stages, args.methods)
        x, y, width, height = (share * side for share, side in zip(evidence.box, 2 * image.size, strict=True))
        left, top = round(x), round(y)
        part = image.crop((left, top, left + max(1, round(width)), top + max(1, round(height))))
        pixels = to_float(to_uint8(enlarged(part)))[None]
        for method, stage in product(args.methods, stages):
            attribution = found.maps[method][stage]
            save_png(overlay(pixels, attribution, stage=model.stages[stage]), out / f"{method}-{stage}.png")
            arrays[f"{method}/{stage}"] = attribution[0, 0].numpy()
            manifest["peak"][method][stage] = peak(attribution).item()
            if warning := diagnose(attribution, found.logits / model.temperature, evidence.class_idx):
                manifest["warnings"][method][stage] = warning
    else:
        manifest["notes"] += [f"No pixel reaches the threshold of {model.threshold:g}: there is nothing to explain."]
    write_arrays(out / "maps.npz", arrays)
    write_text(out / "manifest.json", to_json(manifest, indent=1) + "\n")
    print(f"{args.photo}: {manifest['prediction'] or 'nothing found'}. Maps for {explained}: {out}")


def explain_part(model: Model, args: argparse.Namespace, stages: list[str]) -> None:
    """The files of a part of a data set, batch after batch; several processes (torchrun) share the batches."""
    data, size, part = public.folder_of(args.data), args.batch_size, args.part or "val"
    parts, _ = parts_of(model, data, part)
    for note in parts.notes:
        print(note)
    samples = parts.samples[part]
    names = [f"scene {each}" if data is None else each[0].relative_to(data).as_posix() for each in samples]

    settings = {"data": parts.name, "part": part, "pictures": hash_of([json.dumps(names).encode()])}
    settings |= {"weights": hash_of_weights(model), "stages": stages, "methods": args.methods, "batch": size}
    if read_json(args.out / "settings.json") not in ({}, settings):
        raise ValueError(f"{args.out} holds maps of another model, other data or other options: choose another --out.")
    write_text(args.out / "settings.json", json.dumps(settings, indent=1) + "\n")

    paths = [args.out / "maps" / f"{i:06d}.npz" for i in range(-(-len(samples) // size))]
    sharing = processes()
    own = range(sharing.process_index, len(paths), sharing.num_processes)
    to_do = [i for i in own if not paths[i].is_file()]
    faster = fused(model).to(sharing.device)  # the same maps in 0.7 of the time
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
        write_arrays(paths[i], {"lines": np.array(lines), **arrays})

    if not goes_on():
        return
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


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A .npz file, whole or not at all."""
    with whole_file(path) as writing, open(writing, "wb") as file:
        np.savez(file, **arrays)


def hash_of_weights(model: Model) -> str:
    """A short hash of all tensors of a model."""
    return hash_of(tensor.cpu().contiguous().numpy().tobytes() for tensor in model.state_dict().values())


def hash_of(contents: Iterable[bytes]) -> str:
    """A short hash of bytes, one after the other."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()[:16]


if __name__ == "__main__":
    cli.run(main)
