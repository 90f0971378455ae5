"""Names what is wrong with a data folder, before a training does.

    python train/check.py DIR                    a folder as the training scripts read it
    python train/check.py DIR --out report.png   also a picture of the pairs of copies

It names files that cannot be opened or that training would not read, copies of a photo (the same file, or the photo
saved again, resized or mirrored) within and across parts and classes, small classes, and masks that are missing, have
another size than their image or have values that do not fit.
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
from cvlab.data.folders import class_pictures, existing, mask_files
from cvlab.data.masks import mask_faults
from cvlab.data.parts import SMALL_CLASS
from cvlab.transforms import open_image

MOST_LINES = 50
THUMBNAIL = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--out", type=Path, help="PNG file for the pairs of copies, side by side")
    args = parser.parse_args()
    existing(args.data)
    with_masks = (args.data / "images").is_dir() and (args.data / "masks").is_dir()
    if with_masks:
        root, read = args.data / "images", list(mask_files(args.data))
    else:
        classes = class_pictures(args.data)
        root, read = args.data, [path for part in classes.values() for paths in part.values() for path in paths]
    files = {path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")}

    examined = examine(read)
    faults = {path: each.fault for path, each in zip(read, examined, strict=True) if each.fault}
    for path in sorted(files - set(read)):
        faults[path] = "training does not read it, because of its place or the end of its name."
    findings = {"cannot be used": [f"{path.relative_to(args.data)}: {fault}" for path, fault in faults.items()]}
    pictures = [path for path in read if path not in faults]
    copies = copies_among([each for each in examined if not each.fault])
    findings["copies"] = [described(copy, pictures, args.data) for copy in copies]
    if with_masks:
        findings["masks"] = mask_faults(args.data)
    else:
        findings["small classes"] = class_findings(classes, faults)

    print(f"{args.data}: {len(files)} files, {len(pictures)} pictures")
    for title, lines in findings.items():
        print(f"\n{title}: {len(lines) or 'none'}")
        print("".join(f"  {line}\n" for line in lines[:MOST_LINES]), end="")
        if len(lines) > MOST_LINES:
            print(f"  ... and {len(lines) - MOST_LINES} more")
    if args.out and copies:
        render.save_png(contact_sheet(copies, pictures), args.out)
        print(f"\nPicture of the pairs of copies: {args.out}")


def described(copy: Copy, pictures: list[Path], root: Path) -> str:
    """A pair of copies in words. Copies in different folders are the ones that mislead a training."""
    first, second = pictures[copy.first].relative_to(root), pictures[copy.second].relative_to(root)
    across = "" if first.parent == second.parent else "  ACROSS FOLDERS"
    return f"{first} = {second}{'' if copy.exact else '  (saved again)'}{across}"


def class_findings(classes: dict[str, dict[str, list[Path]]], faults: dict[Path, str]) -> list[str]:
    """Classes of few pictures, over all parts; classes without a picture in a part; a class that is the only one."""
    sizes, empty = Counter(), []
    for part, pictures in classes.items():
        for name, paths in pictures.items():
            sound = sum(path not in faults for path in paths)
            sizes[name] += sound
            if not sound:
                empty.append(f"{name}: no picture" if part == "all" else f"{name}: no picture in {part}")
    lines = [f"{name}: {size} pictures" for name, size in sorted(sizes.items()) if 0 < size < SMALL_CLASS]
    return lines + empty + [f"{name} is the only class" for name in sizes if len(sizes) == 1]


def contact_sheet(copies: list[Copy], pictures: list[Path], most: int = 40) -> Image.Image:
    """The first pairs of copies side by side, with their folders and names."""
    shown = [pictures[i] for copy in copies[:most] for i in (copy.first, copy.second)]
    drawn = []
    for path in shown:
        image = open_image(path, at_least=THUMBNAIL)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        drawn.append(image)
    return render.grid(drawn, [f"{path.parent.name}/\n{path.name[:24]}" for path in shown], 6)


if __name__ == "__main__":
    cli.run(main)
