"""The card of a checkpoint: README.md, written from the files beside it and from nothing else."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from cvlab import atomic

PIPELINE_TAGS = {"classification": "image-classification", "segmentation": "image-segmentation"}
MAIN_METRIC = {"classification": "accuracy", "segmentation": "iou"}

SNIPPET = """\
```python
from cvlab.checkpoint import load
from cvlab.explain import grad_cam
from cvlab.transforms import open_image, view

model = load("{folder}")
images = view(open_image("photo.jpg"), model)
logits, attribution = grad_cam(model, images)
```"""


def write(folder: str | Path) -> None:
    """Writes README.md from config.json, and from manifest.json and metrics.json where they are there."""
    folder = Path(folder)
    config = _read_json(folder / "config.json")["cvlab"]
    manifest, metrics = _read_json(folder / "manifest.json"), _read_json(folder / "metrics.json")
    name = folder.resolve().name
    sections = [
        _front_matter(name, config, metrics),
        f"# {name}\n\n{_summary(config, manifest)}",
        _metrics(metrics),
        _training(config, manifest, folder),
        "## Use\n\n" + SNIPPET.format(folder=folder),
    ]
    atomic.write_text(folder / "README.md", "\n\n".join(section for section in sections if section) + "\n")


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


def _metrics(metrics: dict) -> str:
    if not metrics:
        return ""
    rows = [
        f"| {name} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} |"
        for name, score in metrics.items()
        if isinstance(score, dict) and "low" in score
    ]
    table = "\n".join(["| score | value | 95% interval |", "| --- | --- | --- |", *rows])
    return f"## Scores\n\nPart {metrics['part']!r}, {metrics['n']} pictures.\n\n{table}"


def _training(config: dict, manifest: dict, folder: Path) -> str:
    data = config.get("data", {})
    lines = [f"Data: {data.get('name', 'unknown')}, cut by split seed {data.get('split_seed', 'none')}."]
    if manifest:
        versions = manifest["versions"]
        lines += [
            "",
            f"```\n{manifest['command']}\n```",
            "",
            f"{manifest['epochs']} epochs in {manifest['minutes']:.1f} minutes on {manifest['hardware']} "
            f"({manifest['precision']}, torch {versions['torch']}, seed {manifest['seed']}); the epoch with the best "
            "validation score was kept.",
        ]
    lines += ["", *(f"![{name}](report/{name}.png)" for name in _pictures(folder))]
    return "## Training\n\n" + "\n".join(lines).strip()


def _pictures(folder: Path) -> list[str]:
    return [name for name in ("curves", "confusion_matrix") if (folder / "report" / f"{name}.png").is_file()]
