"""Fits on val how sure a trained model may be, and keeps it in the model's folder; trainings do so at their end.

    python train/calibrate.py runs/NAME --data DIR

It is for models that were trained before, or when the data for it has changed. The weights stay as they are. Afterwards
train/evaluate.py measures on test what it is worth.
"""

import argparse
from pathlib import Path

import cli

from cvlab import checkpoint
from cvlab.checkpoint import card
from cvlab.data.evaluation import parts_of
from cvlab.learning.calibration import calibrate


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a model")
    parser.add_argument("--data", type=Path, help="data folder, or torchvision:NAME; by default synthetic scenes")
    parser.add_argument("--others", type=Path, metavar="DIR", help="photos of anything else, for a classifier")
    args = parser.parse_args()
    parts, _ = parts_of(checkpoint.load(args.checkpoint), args.data, "val")
    for sentence in calibrate(args.checkpoint, parts, args.others):
        print(sentence)
    card.write(args.checkpoint)


if __name__ == "__main__":
    cli.run(main)
