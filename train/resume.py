"""How a training carries on: --start-from the weights of another, or --resume, and what that may change.

What a training computes follows from its options and its data. Both must be those of the beginning, or else config,
manifest and card would tell of a training that was never done. Free are where the run lies, how long it has patience
and the like (FREE), and under some schedules the number of epochs, which may grow.
"""

import json
from argparse import Namespace
from pathlib import Path

import torch

from cvlab import checkpoint
from cvlab.data.parts import Parts
from cvlab.files import read_json, to_json, write_text
from cvlab.models import Model, build, settings_in
from cvlab.models.model import misfit, shapes_of

RECORD = "state/made_with.json"  # in the run's folder: options, class_names, data
FREE = ("out", "data", "resume", "overwrite", "push", "recipe", "list_recipes", "patience", "others")
FIXED_LENGTH = ("onecycle", "cosine")  # every rate of these schedules follows from the number of epochs


def start_from(folder: Path | None, model: Model) -> None:
    """Gives a new model the weights of a trained one, but for other classes not those of its head.

    ValueError if it is another network.
    """
    if folder is None:
        return
    trained = checkpoint.load(folder)
    weights, names = trained.state_dict(), model.class_names
    if trained.class_names != names and max(len(names), len(trained.class_names)) > 1:  # of one class only its name
        with torch.device("meta"):  # the head is what depends on the number of classes
            more = build(**settings_in(model.config) | {"class_names": [*names, ""]}).state_dict()
        weights |= {name: new for name, new in model.state_dict().items() if new.shape != more[name].shape}
        print(f"--start-from {folder} has other classes ({', '.join(trained.class_names)}): the head starts anew.")
    if fault := misfit(shapes_of(model.state_dict()), shapes_of(weights)):
        raise ValueError(f"--start-from {folder} is another network: {fault}.")
    model.load_state_dict(weights)


def options_of(args: Namespace) -> dict:
    """The options that decide what a training computes, as JSON holds them."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in FREE}, default=str))


def check_options(args: Namespace, state: Path) -> None:
    """Raises ValueError for options that --resume cannot change, with their old and new values."""
    before, after = read_json(args.out / RECORD).get("options", {}), options_of(args)
    phase = read_json(state / "progress.json")["phase"]
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    notes = []
    for name, number, schedule in (("epochs", 1, "schedule"), ("finetune_epochs", 2, "finetune_schedule")):
        if name in changed and after[name] > before[name] and phase <= number:
            if phase == number and after[schedule] in FIXED_LENGTH:
                notes.append(f"{after[schedule]} plans every rate by the number of epochs")
            else:
                changed.remove(name)
    if changed:
        values = [f"--{n.replace('_', '-')} was {before[n]} and is {after[n]}" for n in sorted(changed)]
        raise ValueError(
            f"--resume continues the run in {args.out} as it was begun: {'; '.join([*values, *notes])}. Give the old "
            f"values, or begin another run: a new --out, with --start-from {args.out} if it is to go on from there."
        )


def record(args: Namespace, parts: Parts, resumed: bool, first: bool) -> dict:
    """What config.json says about options and data, checked with --resume; the first of several processes writes it."""
    made_with = {"options": options_of(args), "class_names": parts.class_names, "data": parts.facts}
    if resumed and (before := read_json(args.out / RECORD)):
        _check_data(before, made_with)
    if first:
        write_text(args.out / RECORD, to_json(made_with))
    return {"options": made_with["options"], "data": parts.facts}


def _check_data(before: dict, after: dict) -> None:
    if before["class_names"] != after["class_names"]:
        was, now = (", ".join(each["class_names"]) for each in (before, after))
        raise ValueError(f"--resume needs the data of the run. Its classes were {was}; those of --data are {now}.")
    prints = [each["data"]["fingerprints"] for each in (before, after)]
    if prints[0] != prints[1]:
        was, now = (", ".join(f"{part} {len(each)}" for part, each in parts.items()) or "none" for parts in prints)
        raise ValueError(f"--resume needs the data of the run. Its pictures were {was}; --data has others: {now}.")
