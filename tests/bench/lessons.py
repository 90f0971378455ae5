"""Writes folders that differ in one thing, to learn what it does to a score: wrong labels, and copies across parts.

    python tests/bench/lessons.py DIR OUT       DIR/<class>/*, at least 300 photos a class
    cd OUT && python .../train/sweep.py --recipe lessons-data --out lessons-data
    python tests/bench/results.py --collect OUT/lessons-data

OUT/clean     200 photos a class in train, 50 in val, 50 in test
OUT/wrong     one label in ten of train is that of the next class
OUT/copies    half of val stands in train too, in place of other photos: cropped to nine tenths and saved again, so that
              the search for copies does not find them
"""

import argparse
import random
from pathlib import Path

from PIL import Image

PARTS = {"train": 200, "val": 50, "test": 50}


def write(photo: Path, to: Path, crop: float = 1.0) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if crop == 1:
        to.symlink_to(photo.resolve())
        return
    image = Image.open(photo).convert("RGB")
    width, height = (round(crop * side) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 3
    image.crop((left, top, left + width, top + height)).save(to.with_suffix(".jpg"), quality=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng, classes = random.Random(0), sorted(folder.name for folder in args.data.iterdir() if folder.is_dir())
    for number, name in enumerate(classes):
        photos = sorted((args.data / name).iterdir())
        rng.shuffle(photos)
        starts = {"train": 0, "val": PARTS["train"], "test": PARTS["train"] + PARTS["val"]}
        for variant in ("clean", "wrong", "copies"):
            for part, count in PARTS.items():
                for i, photo in enumerate(photos[starts[part] : starts[part] + count]):
                    label, chosen = name, photo
                    if variant == "wrong" and part == "train" and i % 10 == 0:
                        label = classes[(number + 1) % len(classes)]
                    copied = variant == "copies" and part == "train" and i < PARTS["val"] // 2
                    if copied:
                        chosen = photos[starts["val"] + i]
                    file = args.out / variant / part / label / f"{name}-{i}{photo.suffix}"
                    write(chosen, file, 0.9 if copied else 1.0)


if __name__ == "__main__":
    main()
