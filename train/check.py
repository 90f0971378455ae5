"""Tells what is wrong with a data folder, before a training does.

    python train/check.py DIR                    a folder as the training scripts take it
    python train/check.py DIR --out report.png   also a contact sheet of the copies

Named are: files that cannot be opened or are no pictures, copies of a photo (the same file, saved again, resized or
mirrored) within and across parts and classes, small classes, and masks that are missing, of another size or odd.
"""

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import options

from cvlab import render
from cvlab.copies import Copy, find_copies
from cvlab.data import DataError, segmentation_parts
from cvlab.transforms import ImageError, open_image

SMALL_CLASS = 20  # pictures: fewer than this leave three for val
MOST_LINES = 50
THUMBNAIL = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--out", type=Path, help="PNG of the pairs of copies, side by side")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise DataError(f"There is no folder {args.data}.")
    pairs = (args.data / "images").is_dir() and (args.data / "masks").is_dir()
    root = args.data / "images" if pairs else args.data
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(tqdm(pool.map(reason_against, files), "opening", len(files), leave=False))
    findings = {"cannot be used": [reason for reason in reasons if reason]}
    pictures = [path for path, reason in zip(files, reasons, strict=True) if not reason]
    copies = find_copies(pictures)
    findings["copies"] = [described(copy, pictures, args.data) for copy in copies]
    if pairs:
        findings["masks"] = mask_findings(args.data)
    else:
        sizes = Counter(path.parent.relative_to(args.data).as_posix() for path in pictures)
        findings["small classes"] = [f"{name}: {n} pictures" for name, n in sorted(sizes.items()) if n < SMALL_CLASS]

    print(f"{args.data}: {len(files)} files, {len(pictures)} pictures")
    for title, lines in findings.items():
        print(f"\n{title}: {len(lines) or 'none'}")
        print("".join(f"  {line}\n" for line in lines[:MOST_LINES]), end="")
        if len(lines) > MOST_LINES:
            print(f"  ... and {len(lines) - MOST_LINES} more")
    if args.out and copies:
        render.save_png(contact_sheet(copies, pictures), args.out)
        print(f"\nThe pairs of copies, side by side: {args.out}")


def reason_against(path: Path) -> str | None:
    """Why a file cannot be used, or None."""
    try:
        open_image(path)
    except ImageError as error:
        return f"{path}: {error}"
    return None


def described(copy: Copy, pictures: list[Path], root: Path) -> str:
    """A pair of copies in words; what stands in different folders is what misleads a training."""
    first, second = pictures[copy.first].relative_to(root), pictures[copy.second].relative_to(root)
    across = "" if first.parent == second.parent else "  ACROSS FOLDERS"
    return f"{first} = {second}{'' if copy.exact else '  (saved again)'}{across}"


def mask_findings(folder: Path) -> list[str]:
    """What is wrong with the masks of a segmentation folder."""
    try:
        parts = segmentation_parts(folder, needed=())
    except DataError as error:
        return [str(error)]
    samples = [sample for each in parts.samples.values() for sample in each]
    for sample in tqdm(samples, "comparing masks", leave=False):
        try:
            parts.open_sample(sample)
        except (DataError, ImageError) as error:
            parts.notes.append(str(error))
    return parts.notes


def contact_sheet(copies: list[Copy], pictures: list[Path], most: int = 40) -> Image.Image:
    """The first pairs side by side, with their folders and names."""
    shown = [pictures[i] for copy in copies[:most] for i in (copy.first, copy.second)]
    drawn = []
    for path in shown:
        image = open_image(path, at_least=THUMBNAIL)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        drawn.append(image)
    return render.grid(drawn, [f"{path.parent.name}/\n{path.name[:24]}" for path in shown], 6)


if __name__ == "__main__":
    options.run(main)
