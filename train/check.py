"""Names what is wrong with a data folder, before a training does.

    python train/check.py DIR                    a folder as the training scripts read it
    python train/check.py DIR --out report       also pictures: samples of the data, and the pairs of copies
    python train/check.py DIR --to-masks OUT     makes the folder OUT with masks from annotations, and checks it

It names files that cannot be opened or that training would not read, copies of a photo (the same file, or the photo
saved again, resized or mirrored) within and across parts and classes, small classes, and masks that are missing, have
another size than their image or have values that do not fit. It ends with what a training would say of the folder.

--to-masks reads what COCO tools, labelme and CVAT (“CVAT for images 1.1”) export: polygons and boxes, of COCO also
RLE, of CVAT also masks; and masks in colour (images/, masks/) beside a palette labelmap.txt as CVAT writes it. COCO's
crowds, as CVAT calls painted masks there, become 255: not to be scored.

--out is a folder for samples.png (random photos of five classes, or photos with mask and overlay) and copies.png. They
show photographs.
"""

import argparse
from collections import Counter
from pathlib import Path

import cli
import numpy as np
from PIL import Image, ImageOps

from cvlab import fonts, render
from cvlab.data.annotations import to_masks
from cvlab.data.duplicates import Copies, Copy
from cvlab.data.folders import DataError, Found, class_pictures, existing, has_masks, mask_pairs
from cvlab.data.masks import count_classes, examine_masks, ignored_value, listed_classes, odd_masks
from cvlab.data.parts import PARTS, SMALL_CLASS, Parts, classification_parts, segmentation_parts
from cvlab.transforms import open_image

MOST_LINES = 50
THUMBNAIL = 128, 128  # pixels at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--out", type=Path, help="folder for pictures of samples and copies")
    parser.add_argument("--to-masks", type=Path, metavar="OUT", help="make this folder from annotations in DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--image-size", type=int, default=64, help="of the training: small masks may vanish")
    parser.add_argument("--class-names", nargs="+", help="names of the masks' classes, as given to the segmenter")
    args = parser.parse_args()
    if args.to_masks:
        notes = to_masks(args.data, args.to_masks)
        print("".join(f"{note}\n" for note in notes[:MOST_LINES]))
        if len(notes) > MOST_LINES:
            print(f"... and {len(notes) - MOST_LINES} more\n")
        args.data = args.to_masks
    with_masks = has_masks(existing(args.data))
    found = (mask_pairs if with_masks else class_pictures)(args.data)
    copies = Copies(found.pictures)
    pairs = [copy for copy in copies.pairs if not {copies.paths[i] for i in copy[:2]} & copies.faults.keys()]
    about_masks = {path: f"{why}." for path, why in found.left_out.items() if "mask" in why or "image" in why}
    faults = found.left_out | copies.faults
    lines = [f"{path.relative_to(args.data)}: {faults[path]}" for path in sorted(faults.keys() - about_masks.keys())]
    findings = {"cannot be used": lines, "copies": [described(copy, copies.paths, args.data) for copy in pairs]}
    if with_masks:
        findings["masks"] = mask_findings(found, about_masks, args)
    else:
        findings["small classes"] = class_findings(found.parts, faults)

    sound = [path for path in copies.paths if path not in copies.faults]
    print(f"{args.data}: {len(copies.paths) + len(found.left_out)} files, {len(sound)} pictures")
    for title, lines in findings.items():
        print(f"\n{title}: {len(lines) or 'none'}")
        print("".join(f"  {line}\n" for line in lines[:MOST_LINES]), end="")
        if len(lines) > MOST_LINES:
            print(f"  ... and {len(lines) - MOST_LINES} more")
    try:
        if with_masks:
            parts = segmentation_parts(args.data, 0, args.class_names, args.image_size, copies=copies)
        else:
            parts = classification_parts(args.data, copies=copies)
    except DataError as error:
        print(f"\ntraining: refused\n  {error}")
        parts = None
    else:
        sizes = ", ".join(f"{part} {len(parts.samples[part])}" for part in PARTS)
        print(f"\ntraining: {sizes}\n" + "".join(f"  {note}\n" for note in parts.notes), end="")
        if unreadable := fonts.without_glyphs(parts.class_names):
            print(f"  {unreadable}")
    if args.out:
        if parts:
            render.save_png(sample_sheet(parts, with_masks, args.seed), args.out / "samples.png")
        if pairs:
            render.save_png(contact_sheet(pairs, copies.paths), args.out / "copies.png")
        print(f"\nPictures: {args.out}")


def described(copy: Copy, pictures: list[Path], root: Path) -> str:
    """A pair of copies in words. Copies in different folders are the ones that mislead a training."""
    first, second = pictures[copy.first].relative_to(root), pictures[copy.second].relative_to(root)
    across = "" if first.parent == second.parent else "  ACROSS FOLDERS"
    return f"{first} = {second}{'' if copy.exact else '  (saved again)'}{across}"


def class_findings(parts: dict[str, dict[str, list[Path]]], faults: dict[Path, str]) -> list[str]:
    """Classes of few pictures, over all parts; classes without a picture in a part; a class that is the only one."""
    sizes, empty = Counter(), []
    for part, pictures in parts.items():
        for name, paths in pictures.items():
            sound = sum(path not in faults for path in paths)
            sizes[name] += sound
            if not sound:
                empty.append(f"{name}: no picture" if part == "all" else f"{name}: no picture in {part}")
    lines = [f"{name}: {size} pictures" for name, size in sorted(sizes.items()) if 0 < size < SMALL_CLASS]
    return lines + empty + [f"{name} is the only class" for name in sizes if len(sizes) == 1]


def mask_findings(found: Found, unpaired: dict[Path, str], args: argparse.Namespace) -> list[str]:
    """A sentence for each picture or mask that is alone, and for each mask that cannot be used."""
    pairs = {image: mask for part in found.parts.values() for image, mask in part.items()}
    held = examine_masks(pairs, args.image_size)
    num_classes = len(args.class_names or listed_classes(args.data) or ()) or count_classes(list(held.values()))
    odd = odd_masks(held, num_classes, ignored_value(list(held.values())))
    faults = {path: each.fault for path, each in held.items() if each.fault} | odd
    faults = unpaired | {pairs[path]: fault for path, fault in faults.items()}
    return [f"{path.relative_to(args.data)} {fault}" for path, fault in faults.items()]


def sample_sheet(parts: Parts, with_masks: bool, seed: int) -> Image.Image:
    """Random photos under their classes, two of each of five; or ten photos, each with its mask and both together."""
    random, drawn, titles = np.random.default_rng(seed), [], []
    samples = [sample for part in PARTS for sample in parts.samples[part]]
    samples = [samples[i] for i in random.permutation(len(samples))]
    if with_masks:
        for sample in samples[:10]:
            photo, mask = parts.open_sample(sample)
            mask = mask[parts.exclusive :]
            numbers = (mask * np.arange(1, len(mask) + 1)[:, None, None]).sum(0).numpy()
            levels = Image.fromarray((numbers * (255 // len(mask))).astype(np.uint8))
            drawn += [photo, levels.convert("RGB"), render.mask_overlay(photo, mask.any(0).numpy())]
            titles += [sample[0].name[:24], "mask", "overlay"]
        drawn = [ImageOps.contain(image, THUMBNAIL) for image in drawn]
        return render.grid(drawn, titles, 6)
    for label in sorted(random.permutation(len(parts.class_names))[:5].tolist()):
        for sample in [sample for sample in samples if sample[1] == label][:2]:
            photo, _ = parts.open_sample(sample, at_least=max(THUMBNAIL))
            drawn.append(ImageOps.contain(photo, THUMBNAIL))
            titles.append(parts.class_names[label][:24])
    return render.grid(drawn, titles, 2)


def contact_sheet(copies: list[Copy], pictures: list[Path], most: int = 40) -> Image.Image:
    """The first pairs of copies side by side, with their folders and names."""
    shown = [pictures[i] for copy in copies[:most] for i in (copy.first, copy.second)]
    drawn = [ImageOps.contain(open_image(path, at_least=max(THUMBNAIL)), THUMBNAIL) for path in shown]
    return render.grid(drawn, [f"{path.parent.name}/\n{path.name[:24]}" for path in shown], 6)


if __name__ == "__main__":
    cli.run(main)
