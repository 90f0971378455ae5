"""The card of a checkpoint: README.md, written from the files beside it and from nothing else."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from cvlab.files import write_text

PIPELINE_TAGS = {"classification": "image-classification", "segmentation": "image-segmentation"}
MAIN_METRIC = {"classification": "accuracy", "segmentation": "iou"}

SNIPPET = """\
```python
from cvlab.checkpoint import load
from cvlab.explain import grad_cam
from cvlab.transforms import open_image, view

model = load("{source}")
images = view(open_image("photo.jpg"), model)
logits, attribution = grad_cam(model, images)
```"""


LIMITS = {
    "classification": (
        "It always answers one of its classes, also for a photo that shows none of them. Its scores hold for photos "
        "like those it was trained on; other cameras, views or styles may do worse. A heatmap shows where evidence "
        "for a class was found, not that the evidence is right."
    ),
    "segmentation": (
        "It sees the whole photo squashed to a square: what is small in a large photo is lost. Its scores hold for "
        "photos like those it was trained on. A heatmap shows where evidence for the mask was found; at the last "
        "decoder it only repeats the prediction."
    ),
}


def write(folder: str | Path, model_id: str | None = None) -> None:
    """Writes README.md from config.json, and from manifest.json, metrics.json and report/ where they are there.

    Args:
        model_id: the Hub name under which the folder is published; by default the card speaks of the folder.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")["cvlab"]
    manifest, metrics = _read_json(folder / "manifest.json"), _read_json(folder / "metrics.json")
    name = (model_id or folder.resolve().name).split("/")[-1]
    sections = [
        _front_matter(name, config, metrics),
        f"# {name}\n\n{_summary(config, manifest)}",
        _scores(metrics),
        f"## Data\n\n{_data(config.get('data', {}))}",
        f"## Training\n\n{_training(manifest)}",
        "\n".join(
            f"![{path.stem.replace('_', ' ')}](report/{path.name})" for path in sorted(folder.glob("report/*.png"))
        ),
        f"## Limits\n\n{LIMITS[config['task']]}",
        "## Use\n\n" + SNIPPET.format(source=model_id or folder),
    ]
    write_text(folder / "README.md", "\n\n".join(section for section in sections if section) + "\n")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _front_matter(name: str, config: dict, metrics: dict) -> str:
    tag, metric = PIPELINE_TAGS[config["task"]], MAIN_METRIC[config["task"]]
    dataset = config.get("data", {}).get("name", "unknown")
    found = []
    if metric in metrics:
        found.append(
            EvalResult(
                task_type=tag,
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=metrics["part"],
                metric_type=metric,
                metric_value=metrics[metric]["value"],
            )
        )
    card = ModelCardData(
        library_name="cvlab",
        pipeline_tag=tag,
        tags=["cvlab", tag, "grad-cam"],
        model_name=name if found else None,
        eval_results=found or None,
    )
    return f"---\n{card.to_yaml()}\n---"


def _summary(config: dict, manifest: dict) -> str:
    kind = "classifier" if config["task"] == "classification" else "segmenter (one sigmoid channel per class)"
    size = f" with {manifest['parameters']:,} parameters" if manifest else ""
    side = config["image_size"]
    geometry = (
        f"shorter side to {int(side / config['crop_pct'])} pixels, centre crop of {side}"
        if config["task"] == "classification"
        else f"squashed to {side} x {side} pixels"
    )
    return (
        f"A {kind}: network `{config['network']}`{size}, trained with cvlab.\n\n"
        f"- classes: {', '.join(config['class_names'])}\n"
        f"- input: RGB in [0, 1], {geometry}\n"
        f"- stages that can be explained: {', '.join(config['stages'])}"
    )


def _scores(metrics: dict) -> str:
    if not metrics:
        return ""
    rows = [
        f"| {name.replace('_', ' ')} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} |"
        for name, score in metrics.items()
        if isinstance(score, dict) and "low" in score
    ]
    table = "\n".join(["| score | value | 95% interval |", "| --- | --- | --- |", *rows])
    threshold = f", threshold {metrics['threshold']:g}" if "threshold" in metrics else ""
    text = f"## Scores\n\nPart {metrics['part']!r}, {metrics['n']} pictures{threshold}.\n\n{table}"
    if "temperature" in metrics:
        text += (
            f"\n\nExpected calibration error {metrics['expected_calibration_error']:.4f}; "
            f"{metrics['expected_calibration_error_at_temperature']:.4f} when the logits are divided by "
            f"{metrics['temperature']:.3f} (fitted on val)."
        )
    if "classes" in metrics:
        text += "\n\n| class | precision | recall | F1 | pictures |\n| --- | --- | --- | --- | --- |"
        for name, each in metrics["classes"].items():
            scores = " | ".join(f"{each[score]:.3f}" for score in ("precision", "recall", "f1-score"))
            text += f"\n| {name} | {scores} | {each['support']:.0f} |"
    return text


def _data(data: dict) -> str:
    sizes = {part: len(prints) for part, prints in data.get("fingerprints", {}).items()}
    if not sizes:
        return f"{data.get('name', 'unknown')}: synthetic scenes, which a seed draws; no photograph was used."
    listed = ", ".join(f"{part} {size}" for part, size in sizes.items())
    return (
        f"{data['name']}, cut by split seed {data['split_seed']}: {listed} pictures. val chose the epoch, test was not "
        "used in training; config.json holds a hash of every picture, so that none is counted as unseen by mistake."
    )


def _training(manifest: dict) -> str:
    if not manifest:
        return "No record of it is in this folder."
    first = manifest.get("started_from")
    before = f"{first['command']}\n" if first else ""
    after = f", after {first['epochs']} in {first['minutes']:.1f} minutes by the first command" if first else ""
    kept = f"Epoch {manifest['best_epoch']}" if "best_epoch" in manifest else "The epoch"
    return (
        f"```\n{before}{manifest['command']}\n```\n\n"
        f"{manifest['epochs']} epochs in {manifest['minutes']:.1f} minutes on {manifest['hardware']} "
        f"({manifest['precision']}, torch {manifest['versions']['torch']}, seed {manifest['seed']}, at most "
        f"{manifest['peak_memory_mb']} MB of memory){after}. {kept} with the best validation "
        f"{manifest.get('best_by', 'score')} was kept."
    )
