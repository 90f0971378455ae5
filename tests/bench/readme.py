"""Prints the README's table of the models that ship, from the files beside their weights.

python tests/bench/readme.py            print it
python tests/bench/readme.py --write    put it into README.md
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the data name in a model's config.json stands for.
DATA = {
    "flower_photos": "photos of five kinds of flowers",
    "horses": "Weizmann horses",
    "cvlab/shapes.py": "[synthetic scenes](cvlab/data/shapes.py)",
}
START, END = "<!-- figures -->\n", "<!-- /figures -->\n"


def row(folder: Path) -> str:
    """One model: its score on the test part with the 95% interval, and what the training cost."""
    metrics, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "manifest"))
    config = json.loads((folder / "config.json").read_text())["cvlab"]
    data = config["data"]["name"]
    name = "accuracy" if config["task"] == "classification" else "mean_iou" if "mean_iou" in metrics else "iou"
    score, name = metrics[name], name.replace("_", " ")
    trainings = [manifest, *filter(None, [manifest.get("started_from")])]
    epochs, minutes = (sum(each[key] for each in trainings) for key in ("epochs", "minutes"))
    return (
        f"| [{folder.name}](checkpoints/{folder.name}) | {DATA.get(data, data)} | {metrics['n']} | "
        f"{name} **{score['value']:.3f}** ({score['low']:.3f} to {score['high']:.3f}) | "
        f"{manifest['parameters'] / 1e6:.2f} M | {epochs} | {minutes:.0f} | "
        f"{manifest['precision']} |"
    )


def table(root: Path = ROOT) -> str:
    """The table, with the day, the hardware and the versions of the trainings."""
    folders = sorted(path.parent for path in root.glob("checkpoints/*/metrics.json"))
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    days = sorted({manifest["finished"][:10] for manifest in manifests})  # ISO dates
    days = " to ".join(days[:1] + days[1:][-1:])
    hardware = "; ".join(sorted({manifest["hardware"] for manifest in manifests})).replace(" 1 threads", " 1 thread")
    versions = ", ".join(sorted({f"torch {manifest['versions']['torch']}" for manifest in manifests}))
    lines = [
        "| model | data | test pictures | score on test (95% interval) | parameters | epochs | minutes | precision |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(folder) for folder in folders),
    ]
    note = (
        f"One training each (seed 0), {days}, on {hardware}, {versions}. 95% intervals: Wilson for accuracy, bootstrap "
        "over pictures for iou; they cover the choice of pictures, not of the seed. The cards have the commands."
    )
    return "\n".join(["", *lines, "", note, ""])


def inserted(text: str) -> str:
    """The text of README.md with the table between its marks."""
    before, rest = text.split(START)
    return before + START + table() + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    readme = ROOT / "README.md"
    if parser.parse_args().write:
        readme.write_text(inserted(readme.read_text()))
    else:
        print(table())


if __name__ == "__main__":
    main()
