"""What a checkpoint folder tells about its model: sections made from its files alone.

`write` renders them as Markdown, as the card README.md; cvlab/page/record.py renders them as HTML.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData

from cvlab.checkpoint.config import opened, read_config
from cvlab.checkpoint.hub import MAX_TEXT_BYTES
from cvlab.files import write_text
from cvlab.models.model import MOST_NAMES, TILES

MAIN_METRIC = {"classification": "accuracy", "segmentation": "iou"}
OUTPUTS = "one sigmoid output for each class", "one softmax over all classes"  # of a segmenter; the other if exclusive
ALT_TEXTS = {
    "Confusion matrix": "Confusion matrix: true classes in rows, predicted classes in columns",
    "Confused pairs": "The classes that are taken for one another most often, with their counts",
    "Curves": "Loss and score of each epoch, on training and validation data",
    "Reliability": "Calibration: the probability of the predicted class, and how often it is right",
    "Threshold": "IoU at each threshold of the mask",
}
LIMITS = {
    "classification": (
        "It always answers with one of its classes, even for a photo that shows none of them. Its scores hold for "
        "photos like those it was trained on; other cameras, views or styles may do worse. A heatmap shows where the "
        "model found evidence for a class, not that this evidence is right."
    ),
    "segmentation": (
        "Its scores hold for photos like those it was trained on. A heatmap shows where the model found evidence for "
        "the mask; at the last decoder stage it only repeats the prediction."
    ),
}
SQUASHED = "It sees the whole photo squashed to a square: small things in a large photo are lost."
RECORDED = ("epochs", "minutes", "hardware", "peak_memory_mb", "precision", "seed", "finished")  # in manifest.json
BY_CLASS = ("classes", "iou_by_class")  # entries of metrics.json whose keys are names of classes
USE = """\
from cvlab.checkpoint import load
from cvlab.explain import grad_cam
from cvlab.transforms import open_image, view

model = load("{source}")
images = view(open_image({opened}), model)
logits, attribution = grad_cam(model, images)"""


@dataclass(frozen=True)
class Section:
    """A title and, in this order, what stands under it: plain text, which a renderer escapes, and image files."""

    title: str
    code: str = ""
    facts: Sequence[tuple[str, str]] = ()  # each with its name
    sentences: Sequence[str] = ()
    tables: Sequence[Sequence[Sequence[str]]] = ()  # rows of cells, the first of them the head
    pictures: Sequence[Path] = ()


def write(folder: str | Path, model_id: str | None = None) -> None:
    """Writes README.md from config.json and, if present, manifest.json, metrics.json, history.jsonl and report/.

    Args:
        model_id: the Hub name under which the folder is published; by default the card names the folder instead.

    Raises:
        ValueError: a file of the folder is not valid.
    """
    folder = Path(folder)
    name = (model_id or folder.resolve().name).split("/")[-1]
    blocks = [_front_matter(name, folder), f"# {escaped(name)}"]
    for section in (each(folder) for each in SECTIONS):
        # Photographs of an audit are not published.
        shown = [path for path in section.pictures if not model_id or path.parent.name == "report"]
        blocks.append(markdown(replace(section, pictures=shown)))
    opened = '"my.tif", channels=model.channels' if "channels" in read_config(folder / "config.json") else '"photo.jpg"'
    blocks += ["## Use", _fenced(USE.format(source=model_id or folder, opened=opened), "python")]
    write_text(folder / "README.md", "\n\n".join(filter(None, blocks)) + "\n")


# --- reading a folder, which may come from a stranger -----------------------------------------------------------------


def read_text(path: Path) -> str:
    """A text file; empty if there is none."""
    if not path.exists():
        return ""
    with opened(path, MAX_TEXT_BYTES) as file:
        return file.read().decode("utf-8", errors="replace")


def read_history(folder: Path) -> list[dict]:
    """The lines of history.jsonl, one an epoch."""
    return [json.loads(line) for line in read_text(folder / "history.jsonl").splitlines() if line.strip()]


def _read_json(path: Path) -> dict:
    try:
        return json.loads(read_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


# --- the sections -----------------------------------------------------------------------------------------------------


def _model(folder: Path) -> Section:
    config, manifest = read_config(folder / "config.json"), _read_json(folder / "manifest.json")
    side, count = config["image_size"], len(config["mean"])
    if config["task"] == "classification":
        resized = "squashed" if config["crop_mode"] == "squash" else "shorter side resized"
        geometry = f"{resized} to {int(side / config['crop_pct'])} pixels, centre crop of {side}"
        task = config["task"]
    else:
        task = f"segmentation, {OUTPUTS[config['exclusive']]}"
        geometry = f"{'tiles of' if config['crop_mode'] == TILES else 'squashed to'} {side} x {side} pixels"
    facts = [
        ("task", task),
        ("network", config["network"]),
        ("parameters", f"{manifest['parameters']:,}" if "parameters" in manifest else "unknown"),
        ("classes", ", ".join(config["class_names"][:MOST_NAMES])),
        ("input", f"{'RGB' if count == 3 else f'{count} channels'} from 0 to 1, {geometry}"),
        ("stages that can be explained", ", ".join(config.get("stages", []))),
    ]
    return Section("Model", facts=facts)


def _scores(folder: Path) -> Section:
    metrics = _read_json(folder / "metrics.json")
    if not metrics:
        return Section("Scores", sentences=["This folder holds no scores: train/evaluate.py measures and writes them."])
    return scores(metrics)


def scores(metrics: dict) -> Section:
    """What metrics.json holds."""
    threshold = f", at threshold {metrics['threshold']:g}" if "threshold" in metrics else ""
    tiles = ", in overlapping tiles" if metrics.get("tiles") else ""
    sentences = [f"Measured on {metrics['n']} pictures of the part “{metrics['part']}”{threshold}{tiles}."]
    if "expected_calibration_error" in metrics:
        sentences.append(f"Expected calibration error: {metrics['expected_calibration_error']:.4f}.")
    if "temperature" in metrics:
        after = metrics["expected_calibration_error_at_temperature"]
        sentences.append(f"With the logits divided by {metrics['temperature']:.3f} (fitted on val) it is {after:.4f}.")
    if compared := metrics.get("compared"):
        difference = "{value:+.4f} (95% interval {low:+.4f} to {high:+.4f})".format(**compared["difference"])
        sentences.append(f"{compared['score']} minus that of {compared['with']}, same pictures: {difference}.")
    if curve := metrics.get("threshold_curve_on_val"):
        best = max(curve, key=curve.get)
        sentences.append(f"On val the threshold {best} gives the highest iou, {curve[best]:.4f}.")
    rows = [("score", "value", "95% interval")]
    for name, each in metrics.items():
        if isinstance(each, dict) and "low" in each and name not in BY_CLASS:
            rows.append((_words(name), f"{each['value']:.4f}", f"{each['low']:.4f} to {each['high']:.4f}"))
    ious = metrics.get("iou_by_class", {}).items()
    ious = [("class", "iou"), *((name, "not there" if iou is None else f"{iou:.4f}") for name, iou in ious)]
    classes, sets = [("class", "precision", "recall", "F1", "pictures")], [("class", "sets that hold it", "their size")]
    for name, each in metrics.get("classes", {}).items():
        shares = (f"{each[score]:.3f}" for score in ("precision", "recall", "f1-score"))
        classes.append((name, *shares, f"{each['support']:.0f}"))
        if held := each.get("set_coverage"):
            told = "{value:.3f} ({low:.3f} to {high:.3f})".format(**held)
            sets.append((name, told, f"{each['set_size']:.2f}"))
    return Section(
        "Scores", sentences=sentences, tables=[table for table in (rows, classes, sets, ious) if len(table) > 1]
    )


def _trust(folder: Path) -> Section:
    trust = _read_json(folder / "trust.json")
    if not trust:
        return Section("Trust", sentences=["Nobody tested its heatmaps: train/evaluate.py --trust does that."])
    sentences = [
        f"Grad-CAM of {trust['pictures']} pictures of val was tested by hiding 228 parts of each. A map is confirmed "
        "if the score falls where it is hot, and refuted if the score falls elsewhere as much.",
        f"Recommended stage: {trust['recommended']}.",
    ]
    stages = [("stage", "confirmed", "undecided", "refuted")]
    for name, counts in trust["stages"].items():
        stages.append((name, *(str(counts[kind]) for kind in stages[0][1:])))
    verdicts = [("verdict on maps of pictures held out", "believable", "doubtful", "not believable")]
    verdicts += [(f"{kind} maps", *map(str, counts)) for kind, counts in trust["verdicts"].items()]
    return Section("Trust", sentences=sentences, tables=[stages, verdicts])


def audit(folder: Path) -> Section:
    """What train/audit.py found; empty where it was not asked."""
    found = _read_json(folder / "audit.json")
    if not found:
        return Section("Audit")
    score = "accuracy" if "accuracy" in found else "iou"
    told = "{value:.3f} ({low:.3f} to {high:.3f})".format(**found[score])
    sentences = [f"The {score} is {told} on {found['n']} pictures.", "Nothing was found that misleads it."]
    if found["suspects"]:
        sentences[1] = "What is used misleads it: train/audit.py --clean paints marks over; of light, add pictures."
    facts = [(each["level"], each["sentence"]) for each in found["tried"]]
    groups = [("pictures that fail more", "pictures of test", "error", "of the rest", "difference")]
    for each in found.get("groups", []):
        shares = (f"{each[name]:.3f}" for name in ("error", "rest"))
        more = "{value:.3f} ({low:.3f} to {high:.3f})".format(**each["more"])
        groups.append(("{fact} {side} {bound:.3g}".format(**each), str(each["n"]), *shares, more))
    telling = [("what alone tells the class", "balanced accuracy in train")]
    telling += [(name, f"{share:.2f}") for name, share in sorted(found["telling"].items(), key=lambda each: -each[1])]
    telling += [("nothing, by chance", f"{found['chance']:.2f}")] if "chance" in found else []
    odd = [("labels to look at", "label", "likelier"), *(tuple(each.values()) for each in found["labels"][:15])]
    tables = [each for each in (telling, groups, odd) if len(each) > 1]
    pictures = sorted((folder / "audit").glob("suspect-*.png"))
    return Section("Audit", facts=facts, sentences=sentences, tables=tables, pictures=pictures)


def _data(folder: Path) -> Section:
    data = read_config(folder / "config.json").get("data")
    if not data:
        return Section("Data", sentences=["This folder does not say what the model was trained on."])
    sizes = ", ".join(f"{part} {len(prints)}" for part, prints in data.get("fingerprints", {}).items())
    if not sizes:
        return Section("Data", sentences=[f"Synthetic scenes ({data['name']}), drawn from a seed: no photographs."])
    facts = [("name", data["name"]), ("pictures", sizes), ("split seed", str(data["split_seed"]))]
    sentence = (
        "The epoch was chosen on val; test was not used in training. config.json holds a hash of every picture, so "
        "that an evaluation can tell which ones the model has seen."
    )
    return Section("Data", facts=facts, sentences=[sentence])


def _training(folder: Path) -> Section:
    manifest, commands = _read_json(folder / "manifest.json"), []
    if not manifest:
        return Section("Training", sentences=["This folder holds no record of the training."])
    facts = [(_words(name), str(manifest[name])) for name in RECORDED if name in manifest]
    facts.append(("torch", manifest.get("versions", {}).get("torch", "unknown")))
    by = f"epoch {manifest.get('best_epoch')}, the best on val by {manifest.get('best_by')}"
    facts.append(("weights kept", by if "best_by" in manifest else "the best epoch on val"))
    if first := manifest.get("started_from"):
        commands.append(first["command"])
        facts.append(("before", f"{first['epochs']} epochs in {first['minutes']} minutes by the first command"))
    return Section("Training", code="\n".join([*commands, manifest.get("command", "")]), facts=facts)


def _pictures(folder: Path) -> Section:
    return Section("Pictures", pictures=sorted((folder / "report").glob("*.png")))


def _limits(folder: Path) -> Section:
    config, measured = read_config(folder / "config.json"), _read_json(folder / "metrics.json")
    task = config["task"]
    refused = {name.removeprefix("refused "): each["value"] for name, each in measured.items() if "refused " in name}
    missed = [name for name, share in refused.items() if name != "own" and share < 0.8]
    told = task != "classification" or (folder / "familiarity.safetensors").is_file()
    squashed = [SQUASHED] if task == "segmentation" and config["crop_mode"] != TILES else []
    note = f"It cannot tell photos of none of its classes{': ' if missed else ''}{', '.join(missed)}."
    return Section("Limits", sentences=[*squashed, LIMITS[task], *([note] if missed or not told else [])])


SECTIONS: tuple[Callable[[Path], Section], ...] = (_model, _scores, _trust, audit, _data, _training, _pictures, _limits)


def title_and_alt_text(picture: Path) -> tuple[str, str]:
    """A picture's title, which is the name of its file in words, and what it shows for those who cannot see it."""
    title = _words(picture.stem)
    title = title[:1].upper() + title[1:]
    return title, ALT_TEXTS.get(title, title)


def _words(name: str) -> str:
    """The name of a file or of an entry in words."""
    return re.sub("[_-]", " ", name).replace(" mb", " in MB").replace("grad cam", "Grad-CAM")


# --- as Markdown ------------------------------------------------------------------------------------------------------


def markdown(section: Section) -> str:
    """A section as Markdown; empty where only its title is there."""
    blocks = [_fenced(section.code)] if section.code else []
    blocks.append("\n".join(f"- {escaped(name)}: {escaped(fact)}" for name, fact in section.facts))
    blocks.append(escaped(" ".join(section.sentences)))
    blocks += map(table, section.tables)
    for path in section.pictures:
        blocks.append(f"![{escaped(title_and_alt_text(path)[1])}]({quote(f'{path.parent.name}/{path.name}')})")
    text = "\n\n".join(filter(None, blocks))
    return f"## {section.title}\n\n{text}" if text else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text, the first of them the head, as a Markdown table."""
    head, *others = ("| " + " | ".join(map(escaped, cells)) + " |" for cells in rows)
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *others])


def _fenced(code: str, language: str = "") -> str:
    """A code block; its fence is longer than any row of backticks in the code."""
    fence = "`" * max([3] + [len(ticks) + 1 for ticks in re.findall("`+", code)])
    return f"{fence}{language}\n{code}\n{fence}"


def escaped(text: str) -> str:
    """Plain text as Markdown on one line: nothing in it becomes markup."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w)|^[#+-]", r"\\\g<0>", text)


def _front_matter(name: str, folder: Path) -> str:
    """The entries at the top of the card that the Hub reads."""
    config, metrics = read_config(folder / "config.json"), _read_json(folder / "metrics.json")
    tag, metric = f"image-{config['task']}", "mean_iou" if "mean_iou" in metrics else MAIN_METRIC[config["task"]]
    data = config.get("data", {}).get("name", "unknown")
    results = None
    if metric in metrics:
        results = [EvalResult(tag, data, data, metric, metrics[metric]["value"], dataset_split=metrics["part"])]
    entries = ModelCardData(
        library_name="cvlab",
        pipeline_tag=tag,
        tags=["cvlab", tag, "grad-cam"],
        datasets=[data.split(":")[1]] if data.startswith("hf:") else None,
        model_name=name if results else None,
        eval_results=results,
    )
    return f"---\n{entries.to_yaml()}\n---"
