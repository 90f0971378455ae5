"""Tells what is wrong with a data folder, before a training does.

    python train/check.py DIR                    a folder as the training scripts take it
    python train/check.py DIR --out report.png   also a contact sheet of the copies

Named are: files that cannot be opened or are no pictures, copies of a photo (the same file, saved again, resized or
mirrored) within and across parts and classes, small classes, and masks that are missing, of another size or odd.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli

from cvlab import render
from cvlab.data.duplicates import Copy, copies_among, examine
from cvlab.data.folders import DataError
from cvlab.data.masks import mask_faults
from cvlab.data.parts import SMALL_CLASS
from cvlab.transforms import open_image

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

    examined = examine(files)
    faulty = [f"{path}: {each.fault}" for path, each in zip(files, examined, strict=True) if each.fault]
    findings = {"cannot be used": faulty}
    pictures = [path for path, each in zip(files, examined, strict=True) if not each.fault]
    copies = copies_among([each for each in examined if not each.fault])
    findings["copies"] = [described(copy, pictures, args.data) for copy in copies]
    if pairs:
        findings["masks"] = mask_faults(args.data)
    else:
        findings["small classes"] = class_findings(args.data, pictures)

    print(f"{args.data}: {len(files)} files, {len(pictures)} pictures")
    for title, lines in findings.items():
        print(f"\n{title}: {len(lines) or 'none'}")
        print("".join(f"  {line}\n" for line in lines[:MOST_LINES]), end="")
        if len(lines) > MOST_LINES:
            print(f"  ... and {len(lines) - MOST_LINES} more")
    if args.out and copies:
        render.save_png(contact_sheet(copies, pictures), args.out)
        print(f"\nThe pairs of copies, side by side: {args.out}")


def described(copy: Copy, pictures: list[Path], root: Path) -> str:
    """A pair of copies in words; what stands in different folders is what misleads a training."""
    first, second = pictures[copy.first].relative_to(root), pictures[copy.second].relative_to(root)
    across = "" if first.parent == second.parent else "  ACROSS FOLDERS"
    return f"{first} = {second}{'' if copy.exact else '  (saved again)'}{across}"


def class_findings(root: Path, pictures: list[Path]) -> list[str]:
    """Classes of few pictures, over all parts; folders with none; a class that is the only one."""
    sizes = Counter(path.parent.name for path in pictures)
    lines = [f"{name}: {size} pictures" for name, size in sorted(sizes.items()) if size < SMALL_CLASS]
    folders = {path for path in root.rglob("*") if path.is_dir()}
    empty = folders - {path.parent for path in pictures} - {path.parent for path in folders}
    lines += [f"{path.relative_to(root)}: no picture" for path in sorted(empty)]
    return lines + [f"{name} is the only class" for name in sizes if len(sizes) == 1]


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
    cli.run(main)
