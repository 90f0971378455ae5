"""How many copies of a photo cvlab finds, how many pairs it names wrongly, and how long that takes.

python tests/bench/copies.py DIR ...         folders of photos; prints a table, a row for each folder
python tests/bench/copies.py DIR --out S.png     also a sheet of the pairs found among the photos themselves

At most 1,000 photos of each folder are used, spread over all of it. A copy of each is made in a temporary folder, by
the methods in `KINDS` in turn. Pairs among the photos themselves are counted separately: public data sets have many
true ones, so a person has to look whether such a pair is wrong.
"""

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tables import table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the repository root: cvlab needs no installation

from cvlab import render
from cvlab.data.duplicates import Copies
from cvlab.data.folders import IMAGE_SUFFIXES

KINDS = ("exact", "saved again", "resized", "mirrored", "all three")
MOST = 1000


def copied(path: Path, kind: str, rng: np.random.Generator) -> bytes:
    """The bytes of a copy: JPEG quality 30 to 95, 0.4 to 1.5 times as wide, mirrored from left to right."""
    if kind == "exact":
        return path.read_bytes()
    image = Image.open(path).convert("RGB")
    if kind in ("resized", "all three"):
        factor = rng.uniform(0.4, 1.5)
        image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    if kind in ("mirrored", "all three"):
        image = ImageOps.mirror(image)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(30, 96)))
    return file.getvalue()


def measure(folder: Path) -> tuple[list[str], list[tuple[Path, Path]]]:
    """A row of the table, and the pairs found among the photos themselves."""
    photos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    photos = photos[:: max(1, -(-len(photos) // MOST))]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as beside:
        planted = []
        for i, path in enumerate(photos):
            planted.append(Path(beside) / f"{i}.jpg")
            planted[-1].write_bytes(copied(path, KINDS[i % len(KINDS)], rng))
        start = time.process_time()
        found = Copies([*photos, *planted]).pairs
        seconds = time.process_time() - start
    n = len(photos)
    pairs = {(copy.first, copy.second): copy.exact for copy in found}
    shares = []
    for k, kind in enumerate(KINDS):
        hits = [pairs.get((i, i + n)) for i in range(k, n, len(KINDS))]
        right = [hit is not None and (kind != "exact" or hit) for hit in hits]
        shares.append(f"{sum(right)} of {len(right)}")
    among = [(photos[i], photos[j]) for i, j in pairs if j < n]
    row = [folder.name, str(n), *shares, str(len(among)), f"{seconds / (2 * n) * 10_000:.0f} s"]
    return row, among


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, help="PNG of the pairs among the photos")
    args = parser.parse_args()
    measured = [measure(folder) for folder in args.folders]
    head = ["photos", "n", *KINDS, "pairs among the photos", "processor time for 10,000"]
    print(table(head, [row for row, _ in measured]))
    shown = [path for _, among in measured for pair in among for path in pair]
    if args.out and shown:
        drawn = [ImageOps.contain(Image.open(path).convert("RGB"), (128, 128)) for path in shown]
        render.save_png(render.grid(drawn, [f"{path.parent.name}/\n{path.name[:24]}" for path in shown], 6), args.out)


if __name__ == "__main__":
    main()
