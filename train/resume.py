"""What a training finds in its run folder: who trains there, the model and the saved states; and --start-from another.

RUN/state/lock is locked while a process trains. RUN/state/step-N/ is what --resume continues from, with all that a run
notes in progress.json, and checksums in sha256.json: the two newest are kept, and one that is damaged is not used.

What a training computes follows from its options and its data. Both must be those of the beginning, or else config,
manifest and card would tell of a training that was never done. Free are where the run lies, how long it has patience
and the like (FREE), and under some schedules the number of epochs, which may grow.
"""

import atexit
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from accelerate.utils import load as load_numbers

from cvlab import checkpoint
from cvlab.checkpoint import hub
from cvlab.data.parts import Parts
from cvlab.files import make_folder, read_json
from cvlab.models import Model, build, settings_in
from cvlab.models.model import misfit, shapes_of

SUMS = "sha256.json"  # in the folder of a state: file name to checksum
FREE = ("out", "data", "resume", "overwrite", "push", "push_state", "track", "recipe", "list_recipes", "patience")
FREE += ("others",)
FIXED_LENGTH = ("onecycle", "cosine")  # every rate of these schedules follows from the number of epochs
# What tells of the model of a folder. The record of when the test part was read is none of it: it stays.
OF_A_MODEL = ("report", hub.ONNX, *(name for name in hub.FILES if name != "README.md"))
_held: dict[Path, BinaryIO] = {}  # run folder: its lock


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


def open_run(args: Namespace) -> Path | None:
    """Makes the run folder and holds it for this process. What is in it stays until a better model is there.

    Returns the saved state that --resume continues from; None to start at the beginning.
    """
    out, states = args.out, args.out / "state"
    make_folder(out)
    if states.is_dir():
        hold(out)  # who trains there is said before what is there
    made = [name for name in OF_A_MODEL if (out / name).exists()] + [path.name for path in saved_states(out)]
    if made and not args.overwrite and not (args.resume and states.is_dir()):  # a shipped model has no states
        raise ValueError(f"{out} holds {', '.join(made)}: give another --out, --overwrite, or --resume a saved state.")
    states.mkdir(exist_ok=True)
    hold(out)
    delete(out.rglob(".*.tmp"))  # of a run that was killed while it wrote
    if args.resume and args.push_state and not made:
        fetch_state(out, args.push)
    state = newest_whole(out) if args.resume else None
    if state:
        check_options(args, state)
    return state


def fetch_state(out: Path, model_id: str) -> None:
    """Fetches what a run pushed from another machine, if anything; ValueError for pickles of more than numbers."""
    place = out / ".fetched.tmp"
    hub.pull_state(place, model_id)
    try:
        for path in place.glob("state/*/*.[bp]*"):  # .bin and .pkl
            load_numbers(path)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path.name} of {model_id}@{hub.STATE} is not opened: {error}") from error
    for found in [*filter(Path.is_file, place.glob("*")), *place.glob("state/*")]:  # the state last
        os.replace(found, out / found.relative_to(place))
    delete([place])


def delete(paths: Iterable[Path]) -> None:
    """Deletes files and folders; those that are not there are no error."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def hold(out: Path) -> None:
    """Locks a run folder; ValueError if another process has it. The system takes the lock of one that died."""
    if out in _held or int(os.environ.get("RANK", 0)):  # of several processes the first one holds it
        return
    lock = open(out / "state" / "lock", "a+b", buffering=0)  # noqa: SIM115  open while the process trains
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = (out / "state" / "lock").read_text() or "Another process"
        raise ValueError(f"{holder} trains in {out}: wait until it has ended, or choose another --out.") from None
    except OSError:  # some network folders have no locks
        pass
    _held[out] = lock
    lock.truncate(0)
    lock.write(f"Process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},".encode())


@atexit.register
def release() -> None:
    """Gives back the run folders that this process holds."""
    for out, lock in _held.items():
        with lock:
            (out / "state" / "lock").unlink(missing_ok=True)
    _held.clear()


def saved_states(out: Path) -> list[Path]:
    """The folders of the saved states of a run, oldest first."""
    steps = {path.name.removeprefix("step-"): path for path in out.glob("state/step-*/") if any(path.iterdir())}
    return [steps[step] for step in sorted(filter(str.isdecimal, steps), key=int)]


def newest_whole(out: Path) -> Path | None:
    """The newest saved state whose files are as they were written, None without any; ValueError if all are damaged."""
    for state in reversed(states := saved_states(out)):
        if not (damaged := damaged_files(state)):
            return state
        print(f"{state} is damaged ({', '.join(damaged)}, by {SUMS}): it is not used.", flush=True)
    if states:
        raise ValueError(f"All saved states in {out} are damaged: begin anew, with --overwrite in place of --resume.")
    return None


def checksums(state: Path) -> dict[str, str]:
    """The SHA-256 of each file of a state, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in state.iterdir() if path.is_file()}


def damaged_files(state: Path) -> list[str]:
    """The files of a saved state that are not as SUMS says."""
    with suppress(ValueError):
        if written := read_json(state / SUMS):
            found = checksums(state)
            return [name for name in written if written[name] != found.get(name)]
    return [SUMS]


def options_of(args: Namespace) -> dict:
    """The options that decide what a training computes, as JSON holds them."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in FREE}, default=str))


def check_options(args: Namespace, state: Path) -> None:
    """Raises ValueError for options that --resume cannot change, with their old and new values."""
    progress = read_json(state / "progress.json")
    before, after, phase = progress["made_with"]["options"], options_of(args), progress["phase"]
    before, after = (dict.fromkeys(("in_channels", "show", "range")) | each for each in (before, after))
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
            f"values, or begin another run: --overwrite, or a new --out, with --start-from {args.out} to go on."
        )


def record(args: Namespace, parts: Parts, state: Path | None) -> dict:
    """Options, class_names and data of a run; ValueError if the data are not those of the state that it resumes."""
    made_with = {"options": options_of(args), "class_names": parts.class_names, "data": parts.facts}
    before = read_json(state / "progress.json")["made_with"] if state else made_with
    if before["class_names"] != parts.class_names:
        was, now = (", ".join(names) for names in (before["class_names"], parts.class_names))
        raise ValueError(f"--resume needs the data of the run. Its classes were {was}; those of --data are {now}.")
    prints = [each["data"]["fingerprints"] for each in (before, made_with)]
    if prints[0] != prints[1]:
        was, now = (", ".join(f"{part} {len(each)}" for part, each in parts.items()) or "none" for parts in prints)
        raise ValueError(f"--resume needs the data of the run. Its pictures were {was}; --data has others: {now}.")
    return made_with
