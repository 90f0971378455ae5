"""Ends commands at random moments, gives them again, and compares what they leave with an undisturbed run, bit by bit.

    python tests/bench/kill.py [--moments 200] [--seed 0] [--json FILE] [--commands classifier ...]
    python tests/bench/kill.py --seed 0 --only 17              moment 17 alone, to repeat it

At each moment a command is begun and disturbed, once or twice: SIGKILL after a time, SIGKILL of itself just before or
just after a rename, SIGTERM (trainings and sweeps save then), or a disk that is full: no file may grow beyond a size.
Then the same command is given again, without a disturbance, and has to end well. The moments and sizes follow from the
seed and the number of the moment. Times differ from machine to machine, so only renames and sizes repeat exactly.

Every process is forked from one that has imported everything, so that moments are seldom spent on imports. Plots are
replaced by small pictures that follow from their numbers. Seconds and dates are left out of the comparison.
"""

import argparse
import fcntl
import hashlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: nothing is forked from a process with threads

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "train"), str(ROOT), str(ROOT / "tests")]

from matplotlib.figure import Figure
from PIL import Image
from tables import table

MODEL_ID = "user/killed"
LIMIT = 120.0  # seconds after which a command hangs
OF_A_PROCESS = ("command", "minutes", "peak_memory_mb", "finished")  # entries of manifest.json
SMALL = ["--image-size", "32", "--epochs", "2", "--precision", "fp32"]
SWEPT = [*SMALL, "--widths", "8", "16", "--batch-size", "16"]
CLASSIFIER = [*SWEPT, "--lr", "0.05", "--dropout", "0.2", "--mixup", "0.2", "--ema", "0.9"]
SEGMENTER = [*SMALL, "--width", "4", "--depth", "2", "--batch-size", "8", "--dropout", "0.2"]
TRANSFER = [*SMALL, "--backbone", "test_resnet", "--no-pretrained", "--unfreeze", "1", "--finetune-epochs", "1"]


class Command(NamedTuple):
    """What is disturbed: a script with its words, as so many processes at once.

    It writes to `folder`, which is at first a copy of the folder `model` where there is one.
    """

    script: str
    words: list[str]
    folder: Path
    model: Path | None = None
    processes: int = 1

    @property
    def trains(self) -> bool:
        """Whether it takes --resume, and saves on SIGTERM."""
        return self.script in ("classifier", "segmenter", "transfer")


class Trouble(NamedTuple):
    """One disturbance. `at` is a share of the time, a number of a rename, or a size in bytes."""

    kind: str  # kill, stop, rename or disk
    at: float
    after: bool = False  # the rename is done


class Left(NamedTuple):
    """How processes ended, what they printed, and how many files they renamed."""

    statuses: list[int]
    printed: str
    renames: int
    seconds: float


def commands(work: Path) -> dict[str, Command]:
    """The commands by name; those that need a model come after the training that leaves it."""
    photos, discs, trained = str(work / "photos"), str(work / "discs"), work / "classifier-whole"
    swept = ["classifier", "--over", "lr=0.05,0.02", "--out", str(work / "sweep"), "--", "--data", photos]

    def training(script: str, data: str, words: list[str]) -> Command:
        return Command(script, ["--data", data, *words, "--out", str(work / script)], work / script)

    def of_model(script: str, model: Path, *words: str) -> Command:
        return Command(script, [str(work / script), *words], work / script, model)

    explained = [str(trained), "--data", photos, "--part", "all", "--batch-size", "16", "--out", str(work / "explain")]
    return {
        "classifier": training("classifier", photos, CLASSIFIER),
        "segmenter": training("segmenter", discs, SEGMENTER),
        "transfer": training("transfer", photos, TRANSFER),
        "sweep": Command("sweep", [*swept, *SWEPT], work / "sweep", processes=2),
        "audit": of_model("audit", trained, "--data", photos),
        "explain": Command("explain", explained, work / "explain"),
        "evaluate": of_model("evaluate", work / "segmenter-whole", "--data", discs, "--calibrate"),
        "publish": of_model("publish", trained, MODEL_ID),
    }


# --- processes --------------------------------------------------------------------------------------------------------


def import_all() -> None:
    """The slow imports, made once. huggingface_hub reads its environment here."""
    import accelerate  # noqa: F401
    import optuna.samplers._tpe.sampler  # noqa: F401
    import timm  # noqa: F401

    for script in ("classifier", "segmenter", "transfer", "sweep", "audit", "explain", "evaluate", "publish"):
        module = __import__(script)
        assert Path(module.__file__).parent == ROOT / "train", script
    sys.modules["sweep"].POLL = 0.05
    render, plots = (__import__(f"cvlab.{name}", fromlist=[name]) for name in ("render", "plots"))
    render.as_picture = plots.as_picture = hashed


def hashed(figure: Figure) -> Image.Image:
    """A small picture that follows from what a figure shows: drawing takes nine tenths of a tiny training."""
    shown = hashlib.sha256()
    for axes in figure.axes:
        shown.update(repr((axes.get_title(), [line.get_xydata().tolist() for line in axes.lines])).encode())
        for image in axes.images:
            shown.update(image.get_array().tobytes())
    return Image.frombytes("RGB", (8, 4), 3 * shown.digest())


def count_renames(count: memoryview, trouble: Trouble | None) -> None:
    """Counts the renames of this process and its forks together; the one that is meant kills who makes it."""

    def counted(rename: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*paths: object, **options: object) -> None:
            meant = trouble is not None and trouble.kind == "rename" and count[0] == trouble.at
            count[0] += 1
            if meant and not trouble.after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths, **options)
            if meant:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    os.replace, os.rename = counted(os.replace), counted(os.rename)  # Path.replace calls them too


def print_to(file: int) -> None:
    """Everything that this process prints goes there."""
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115


def run_script(script: str, words: list[str]) -> None:
    """train/SCRIPT.py in this process, which ends as Python would."""
    import numpy as np
    import torch

    random.seed()  # as in a new process, not as all others that are forked
    np.random.seed()
    torch.seed()
    sys.argv, status = [str(ROOT / "train" / f"{script}.py"), *words], 0
    try:
        sys.modules["cli"].run(sys.modules[script].main)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        if isinstance(end.code, str):
            print(end.code)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        status = 1
    sys.modules["resume"].release()
    try:
        sys.stdout.flush()
    finally:
        os._exit(status or 0)


class Forked:
    """What train/sweep.py uses of subprocess.Popen: the training is a fork of the sweep, with its imports."""

    def __init__(self, command: list[str], stdout: object, preexec_fn: Callable[[], None], **_: object) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            subprocess.Popen = POPEN
            print_to(stdout.fileno())
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            preexec_fn()
            run_script(Path(command[1]).stem, command[2:])

    def wait(self, timeout: float = LIMIT) -> None:
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("training", timeout)
            else:
                time.sleep(0.01)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


POPEN = subprocess.Popen


def run(command: Command, whole: float, trouble: Trouble | None = None, again: bool = False) -> Left:
    """Runs the processes of a command until all have ended. `whole`: seconds of the undisturbed run."""
    words = [*command.words, *(["--resume"] if again and command.trains else [])]
    count = memoryview(mmap.mmap(-1, 8)).cast("q")
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)  # all that is printed fits: nobody has to read meanwhile
    os.set_blocking(writing, False)
    sys.stdout.flush()
    begun, running, statuses = time.monotonic(), {}, []
    for number in range(command.processes):
        child = os.fork()
        if child == 0:
            print_to(writing)
            count_renames(count, trouble)
            if trouble and trouble.kind == "disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(trouble.at), int(trouble.at)))
            if command.script == "sweep":
                subprocess.Popen = Forked
            run_script(command.script, words)
        running[child] = number
    os.close(writing)
    waiting = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}.get(trouble.kind if trouble else "")
    while running:
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                statuses.append(os.waitstatus_to_exitcode(status))
                del running[child]
        spent = time.monotonic() - begun
        if waiting and spent > trouble.at * whole:
            for child, number in running.items():
                if number == 0 or trouble.after:  # the first process, or all
                    os.kill(child, waiting)
            waiting = None
        if spent > LIMIT:
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    seconds = time.monotonic() - begun
    with open(reading, "rb") as pipe:
        os.set_blocking(reading, False)
        printed = (pipe.read() or b"").decode(errors="replace")
    return Left(statuses, printed, count[0], seconds)


# --- the stand-in for the Hub -----------------------------------------------------------------------------------------


@contextmanager
def hub(port: int, folder: Path) -> Iterator[None]:
    """A new and empty Hub, as a process of its own."""
    from hub_client import TOKEN
    from hub_server import serve

    shutil.rmtree(folder, ignore_errors=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with serve(folder, TOKEN, port):
            os.write(writing, b"!")
            signal.pause()
    os.close(writing)
    assert os.read(reading, 1), "the Hub did not start"
    os.close(reading)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def on_the_hub(port: int) -> dict[str, str]:
    """The files of the repository with their hashes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/models/{MODEL_ID}/tree/main") as answer:
        return {f"hub: {entry['path']}": f"{entry['oid']} {entry['size']}" for entry in json.load(answer)}


# --- what a command leaves --------------------------------------------------------------------------------------------


def without_times(path: Path) -> object:
    """The content of a file, without what differs from one run to the next: seconds, dates, memory, --resume."""
    if path.name == "history.jsonl":
        return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
    if path.name == "manifest.json":
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in OF_A_PROCESS}
    if path.name == "test_reads.jsonl":  # a command that was given twice may have read it twice
        return {str({**json.loads(line), "time": ""}) for line in path.read_text().splitlines()}
    if path.name == "progress.json":
        saved = json.loads(path.read_text())
        return saved | {"history": [{**line, "seconds": 0} for line in saved["history"]]}
    if path.name == "sha256.json":
        return {name: sha for name, sha in json.loads(path.read_text()).items() if name != "progress.json"}
    if path.name == "README.md":
        text = path.read_text().replace(" --resume", "")
        text = re.sub(r"^- (minutes|peak memory in MB|finished): .*", "", text, flags=re.MULTILINE)
        return re.sub(r" +", " ", text)
    return path.read_bytes()


def left_in(folder: Path) -> tuple[dict[str, object], list[str]]:
    """The files of a folder as they are compared, and the temporary files beside them. Locks and logs are none.

    Of the two saved states only the newer one is compared: the other is of the step at which a training was stopped.
    """
    found, temporary = {}, []
    states = sorted(folder.rglob("state/step-*/"), key=lambda path: int(path.name.removeprefix("step-")))
    newest = {path.parent: path for path in states}
    older = set(states) - set(newest.values())
    for path in sorted(folder.rglob("*")):
        if path.parent in older:
            continue
        name = path.relative_to(folder).as_posix()
        if re.search(r"(^|/)(lock|queue\.lock|log\.txt|journal\.[^/]*)$", name) or path.is_dir():
            continue
        if re.search(r"(^|/)\.[^/]*\.tmp(/|$)", name):
            temporary.append(name)
        else:
            try:
                found[name] = without_times(path)
            except ValueError as error:
                found[name] = f"cannot be read: {error}"
    return found, temporary


# --- moments ----------------------------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """The undisturbed run: what it leaves, how long it took, its renames, the sizes of its files."""

    left: dict[str, object]
    seconds: float
    renames: int
    sizes: list[int]


def begin(command: Command) -> None:
    """The folder of a command, as it is before it."""
    shutil.rmtree(command.folder, ignore_errors=True)
    if command.model:
        shutil.copytree(command.model, command.folder)


def undisturbed(command: Command, port: int, work: Path) -> Whole:
    """Runs a command whole, and keeps its folder as NAME-whole."""
    begin(command)
    with hub(port, work / "hub"):
        ended = run(command, 0)
        assert not any(ended.statuses), f"{command.script} fails undisturbed:\n{ended.printed}"
        left = left_in(command.folder)[0] | (on_the_hub(port) if command.script == "publish" else {})
    sizes = sorted({path.stat().st_size for path in command.folder.rglob("*") if path.is_file()} - {0})
    kept = command.folder.with_name(f"{command.folder.name}-whole")
    command.folder.rename(kept)
    print(f"{command.script}: {ended.seconds:.1f} s, {ended.renames} renames", file=sys.stderr, flush=True)
    return Whole(left, ended.seconds, ended.renames, sizes)


def troubles(command: Command, whole: Whole, rng: random.Random) -> list[Trouble]:
    """One or two disturbances."""
    drawn, kinds, weights = [], ["kill", "rename", "disk", "stop"], [5, 4, 2, 2]
    if not command.trains and command.script != "sweep":
        weights[3] = 0
    for _ in range(rng.choice([1, 1, 2])):
        kind, after, share = rng.choices(kinds, weights)[0], rng.random() < 0.5, rng.random()
        if kind == "rename":
            share = rng.randrange(max(1, whole.renames))
        elif kind == "disk":
            share = int(rng.choice(whole.sizes) * share)
        drawn.append(Trouble(kind, share, after))
    return drawn


def disturb(command: Command, whole: Whole, planned: Iterable[Trouble], port: int, work: Path) -> dict:
    """What comes of a command that is disturbed so, given again, and compared with the undisturbed one."""
    begun, again = time.monotonic(), False
    found = {"kills": 0, "at_rename": 0, "stops": 0, "full_disks": 0, "ended_early": 0, "differs": []}
    begin(command)
    with hub(port, work / "hub") if command.script == "publish" else open(os.devnull):
        for trouble in planned:
            ended = run(command, whole.seconds, trouble, again)
            # Where a training of a sweep is killed at a rename the sweep goes on, and names the failed run at its end.
            killed = -signal.SIGKILL in ended.statuses or (trouble.kind == "rename" and ended.renames > trouble.at)
            found["kills"] += killed
            found["at_rename"] += killed and trouble.kind == "rename"
            found["stops"] += trouble.kind == "stop" and any(ended.statuses)
            found["full_disks"] += trouble.kind == "disk" and any(ended.statuses)
            found["ended_early"] += killed or any(ended.statuses)
            if "Traceback" in ended.printed:
                found["differs"].append(f"a traceback: {ended.printed.strip().splitlines()[-1]}")
            again = True
        ended = run(command, whole.seconds, again=True)
        left, temporary = left_in(command.folder)
        with_hub = command.script == "publish" and not any(ended.statuses)
        left |= on_the_hub(port) if with_hub else {}
    if any(ended.statuses):
        found["differs"].append(f"given again it fails: {ended.printed.strip()[-1500:]}")
    found["differs"] += [name for name in {**whole.left, **left} if whole.left.get(name) != left.get(name)]
    found["differs"] += temporary if command.trains else []
    return found | {"temporary": len(temporary), "last": ended.seconds, "seconds": time.monotonic() - begun}


def report(moments: list[dict], seed: int) -> str:
    """The table, and the moments whose results are not equal."""
    rows, names = [], list(dict.fromkeys(each["command"] for each in moments))
    counts = ("kills", "at_rename", "stops", "full_disks", "ended_early")
    for name in [*names, "all"]:
        own = [each for each in moments if name in (each["command"], "all")]
        equal = sum(not each["differs"] for each in own)
        sums = [str(sum(each[count] for each in own)) for count in counts]
        rows.append([name, *sums, f"{equal} of {len(own)}", f"{sum(each['seconds'] for each in own):.0f}"])
    head = ["command", "kills", "of these at a rename", "SIGTERM", "full disks", "ended early", "results equal", "s"]
    lines = [table(head, rows)]
    for each in moments:
        if each["differs"]:
            lines.append(f"\n{each['command']}, --seed {seed} --only {each['moment']}, {each['troubles']}:")
            lines += [f"    {differs}" for differs in each["differs"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="moment N alone")
    parser.add_argument("--commands", nargs="+", metavar="NAME", choices=list(commands(Path())), help="only these")
    parser.add_argument("--json", type=Path, help="write every moment there")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave what there is")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as beside:
        work = args.keep or Path(beside).resolve()
        work.mkdir(parents=True, exist_ok=True)
        moments = measure(args, work)
    if args.json:
        args.json.write_text(json.dumps(moments, indent=1) + "\n")
    print(report(moments, args.seed))


def measure(args: argparse.Namespace, work: Path) -> list[dict]:
    """All moments, one after the other."""
    from hub_client import TOKEN
    from hub_server import Hub

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Hub(work / "hub")
    client.url = f"http://127.0.0.1:{port}"
    os.environ |= client.env(work / "home", TOKEN)  # before huggingface_hub is imported
    import_all()
    import runs

    runs.colours(work / "photos")
    runs.discs(work / "discs")
    every = commands(work)
    names = args.commands or list(every)
    numbers = range(args.moments) if args.only is None else [args.only]
    needed = {names[number % len(names)] for number in numbers}
    wholes, moments = {}, []
    for name, command in every.items():
        uses = {Path(each).name for other in needed for each in (every[other].model, *every[other].words) if each}
        if name in needed or f"{name}-whole" in uses:
            wholes[name] = undisturbed(command, port, work)
    for number in numbers:
        name = names[number % len(names)]
        planned = troubles(every[name], wholes[name], random.Random(f"{args.seed} {number}"))
        found = disturb(every[name], wholes[name], planned, port, work)
        shown = ", ".join(f"{t.kind} {t.at:.3g}{' after' * (t.after and t.kind == 'rename')}" for t in planned)
        moments.append({"moment": number, "command": name, "troubles": shown, **found})
        line = f"{number} {name} {shown}: {'; '.join(found['differs']) or 'equal'}, {found['seconds']:.1f} s"
        print(line, file=sys.stderr, flush=True)
    return moments


if __name__ == "__main__":
    main()
