"""How long does train/audit.py take for 10,000 pictures, and how much memory?

    python tests/bench/audit_time.py --out DIR [--pictures 10000] [--write]     into README.md beside this script

The pictures are smooth random colours of 64 pixels in ten classes; one class has a corner mark. The network is trained
for one epoch. Processor seconds are told beside the time, because other programs may run.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tables import README, hardware, inserted, table

ROOT = Path(__file__).resolve().parents[2]
CLASSES, SIDE = 10, 64
MARK = "bench-audit-time"


def write_pictures(folder: Path, count: int) -> None:
    """Classes that differ a little in colour."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 200, (6, 6, 3)) + 5 * (i % CLASSES)
        picture = Image.fromarray(coarse.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        if i % CLASSES == 3:
            picture.paste((230, 40, 40), (4, 4, 16, 12))
        path = folder / f"class {i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=92)


def measured(*words: object) -> tuple[float, float, float]:
    """Seconds, processor seconds and the largest memory in MiB of a script of train/."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, ROOT / "train" / words[0], *map(str, words[1:])], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - begun, processor, after.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures, model and reports")
    parser.add_argument("--pictures", type=int, nargs="+", default=[10_000])
    parser.add_argument("--write", action="store_true", help="the table into README.md")
    args = parser.parse_args()
    rows = []
    for count in args.pictures:
        folder = args.out / str(count)
        write_pictures(folder / "data", count)
        small = ("--image-size", SIDE, "--widths", 16, 32, 64, 128, "--epochs", 1, "--precision", "fp32", "--overwrite")
        subprocess.run(
            [sys.executable, ROOT / "train/classifier.py", *map(str, small), "--data", folder / "data"]
            + ["--out", folder / "run"],
            check=True,
            capture_output=True,
        )
        seconds, processor, memory = measured("audit.py", folder / "run", "--data", folder / "data")
        rows.append([f"{count:,}", f"{seconds / 60:.1f}", f"{processor / 60:.1f}", f"{memory:,.0f}"])
        print(rows[-1], flush=True)
    head = ["pictures", "minutes", "processor minutes", "largest memory, MiB"]
    page = f"{hardware()}; other programs ran beside.\n\n{table(head, rows)}\n"
    if args.write:
        README.write_text(inserted(README.read_text("utf-8"), MARK, page), "utf-8")
    print(page)


if __name__ == "__main__":
    main()
