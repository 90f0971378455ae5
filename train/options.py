"""What the training scripts share of their command line and of their run folder; nothing of their loop.

runs/NAME/config.json, model.safetensors   the best model so far (cvlab/checkpoint.py)
runs/NAME/history.jsonl                    one line an epoch
runs/NAME/manifest.json                    command, seed, versions, hardware, minutes, peak memory
runs/NAME/report/                          curves; pictures with photographs in report/photos/
runs/NAME/state/step-N/                    what --resume goes on from
"""

import argparse
import ctypes
import difflib
import io
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from cvlab import atomic, card, checkpoint, fetch, hub
from cvlab.cache import Cache
from cvlab.data import PARTS, SHAPES, Parts, classification_parts, segmentation_parts
from cvlab.optim import OPTIMIZERS, SCHEDULES, fastest_precision

RECIPES = Path(__file__).parent / "recipes"


class RecipeParser(argparse.ArgumentParser):
    """A command line whose defaults a recipe may set: a recipe is written before the words that were typed.

    recipes/NAME.toml has `script`, `data` (a sentence on how to get the pictures, where there is no other default), the
    table [report] (system, row, figure), and the table [options] with the names of the command line, underscored.
    Without --out the run's folder is runs/NAME.
    """

    def __init__(self, **settings: object) -> None:
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        group = asked.add_argument_group("recipe")
        group.add_argument("--recipe", metavar="NAME", help="take the options of recipes/NAME.toml as defaults")
        group.add_argument("--list-recipes", action="store_true", help="print the recipes of this script")
        super().__init__(**settings, allow_abbrev=False, parents=[asked])
        self.asked = asked

    def parse_args(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """As argparse, with the recipe's options first; unknown names are answered with the nearest.

        Raises:
            ValueError: no such recipe, one of another script, one that names an option that the script has not, or
                that needs photos.
            FileNotFoundError: --data torchvision:NAME is not there and cannot be fetched.
        """
        words = list(sys.argv[1:] if words is None else words)
        asked, _ = self.asked.parse_known_args(words)
        if asked.list_recipes:
            print(list_recipes(Path(self.prog).stem))
            self.exit()
        args, unknown = self.parse_known_args((self.recipe_words(asked.recipe) if asked.recipe else []) + words)
        if unknown:
            self.error(f"there is no {unknown[0]}{nearest(unknown[0].split('=')[0], self._option_string_actions)}")
        if args.recipe and args.data is None and (how := read_recipe(args.recipe).get("data")):
            raise ValueError(f"Recipe {args.recipe} needs photos, whose folder is given with --data: {how}")
        args.data = data_folder(args.data)
        return args

    def recipe_words(self, name: str) -> list[str]:
        """The recipe's options as words of a command line."""
        recipe, script = read_recipe(name), Path(self.prog).stem
        if recipe["script"] != script:
            other = f"python train/{recipe['script']}.py --recipe {name}"
            raise ValueError(f"{name} is no recipe of {script}.py. Run: {other}")
        known = {action.dest: action for action in self._actions}
        words = ["--out", f"runs/{name}"]
        for option, value in recipe["options"].items():
            if option not in known:
                raise ValueError(f"Recipe {name}: {script}.py has no option {option!r}{nearest(option, known)}")
            if not known[option].option_strings:  # it is told by its place: words would stand beside those typed
                self.set_defaults(**{option: value})
                continue
            flag = known[option].option_strings[-1 if value is False else 0]  # of a switch the last one is --no-...
            if value is not False or flag.startswith("--no-"):
                values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
                words += [flag, *map(str, values)]
        return words


def data_folder(data: Path | None) -> Path | None:
    """The folder of --data: that of torchvision:NAME is fetched where it is not there yet."""
    return fetch.folder_of(str(data)) if str(data).startswith(fetch.SCHEME) else data


def read_recipe(name: str) -> dict:
    """The tables of a recipe.

    Raises:
        ValueError: there is none of this name.
    """
    names = [path.stem for path in sorted(RECIPES.glob("*.toml"))]
    if name not in names:
        raise ValueError(f"There is no recipe {name!r}{nearest(name, names)} See --list-recipes.")
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def list_recipes(script: str) -> str:
    """A table of a script's recipes: name, system, experiment and the figure to compare with."""
    recipes = {path.stem: read_recipe(path.stem) for path in sorted(RECIPES.glob("*.toml"))}
    rows = [
        (name, *(recipe["report"][key] for key in ("system", "row", "figure")))
        for name, recipe in recipes.items()
        if recipe["script"] == script
    ]
    rows = [("recipe", "system", "experiment", "figure"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that names what may have been meant."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {close[0]}." if close else "."


def parser(doc: str, **defaults: object) -> RecipeParser:
    """The options that every training script has; `doc` is the script's docstring, `defaults` are its own."""
    parser = RecipeParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data", type=Path, help="data folder, or torchvision:NAME; without one, synthetic scenes")
    group.add_argument("--split-seed", type=int, default=0, help="decides which pictures train, choose and test")
    group.add_argument("--image-size", type=int, help="side of the square that the network sees, pixels")
    group.add_argument("--cache-limit", type=float, default=4.0, metavar="GB", help="decoded pictures kept in memory")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch-size", type=int)
    group.add_argument("--lr", type=float, help="(highest) learning rate")
    group.add_argument("--optimizer", choices=OPTIMIZERS)
    group.add_argument("--momentum", type=float, default=0.9, help="of sgd, nesterov and rmsprop")
    group.add_argument("--schedule", choices=SCHEDULES, default="onecycle")
    group.add_argument("--div-factor", type=float, default=25.0, help="onecycle starts at --lr divided by this")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--patience", type=int, default=50, help="stop after so many epochs without a better val score")
    group.add_argument("--seed", type=int, default=0, help="weights, order and augmentation")
    group.add_argument("--start-from", type=Path, metavar="CHECKPOINT", help="begin with the weights of this model")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster here")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs") / Path(sys.argv[0]).stem, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the last saved epoch of --out")
    group.add_argument("--push", metavar="USER/NAME", help="publish the trained model on the Hugging Face Hub")
    parser.set_defaults(**defaults)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a script; what a person can put right ends in a sentence. CVLAB_TRACEBACK=1 shows where it came from."""
    keep_freed_memory()
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's: of several processes the first one speaks
        sys.stdout = io.StringIO()
    try:
        main()
    except KeyboardInterrupt:
        again = shlex.join(["python", *(word for word in sys.argv if word != "--resume"), "--resume"])
        sys.exit(f"\nStopped; what was saved is safe. Go on with:\n  {again}")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
        if os.environ.get("CVLAB_TRACEBACK") or (isinstance(error, RuntimeError) and not no_memory):
            raise
        if no_memory:
            sys.exit("The memory does not suffice: make --batch-size or --image-size smaller. What was saved is safe.")
        sys.exit(f"{type(error).__name__}: {error}")


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks that were freed. Other C libraries are left as they are.

    Every step frees its activations and asks for the same again; by default glibc returns such blocks to the system,
    which clears each page before it gives it back. Kept, a step takes 0.74 to 0.91 of the time on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD, in bytes
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Stop:
    """Ctrl-C and SIGTERM as a question: `asked` is true once one came, so that the loop can finish its step and save.

    A second one stops at once. Of several processes none listens, since they would stop at different steps and wait
    for each other forever: they end at once, and --resume goes on from the last whole epoch.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.asked = False
        if accelerator.num_processes == 1:
            signal.signal(signal.SIGINT, self._hear)
            signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def open_run(args: argparse.Namespace) -> Path | None:
    """Makes the run folder, and returns the saved state to go on from: None to start at the beginning."""
    args.out.mkdir(parents=True, exist_ok=True)
    states = sorted((args.out / "state").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if args.resume:
        for left_over in args.out.rglob(".*.tmp"):  # of a run that was killed while it wrote
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink(missing_ok=True)
        return states[-1] if states else None
    if states:
        raise ValueError(f"{args.out} holds a run already: go on with --resume, or choose another --out.")
    (args.out / "history.jsonl").unlink(missing_ok=True)
    return None


def start_from(folder: Path, model: nn.Module) -> None:
    """Gives a fresh model the weights of a trained one of the same network.

    Raises:
        ValueError: the other's tensors are of other names or shapes.
    """
    try:
        model.load_state_dict(checkpoint.load(folder).state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"--start-from {folder}: it is another network than the one asked for. {reason}") from error


def describe(parts: Parts, part_lengths: dict[str, int], cache: Cache | None = None) -> None:
    """Prints what the data is and what was done to it."""
    lengths = ", ".join(f"{part} {length}" for part, length in part_lengths.items())
    print(f"{parts.name}: {len(parts.class_names)} classes ({', '.join(parts.class_names[:8])}), pictures: {lengths}")
    if cache:
        print(f"  decoded once and kept: {cache}")
    for note in parts.notes[:20]:
        print("  " + note)
    if len(parts.notes) > 20:
        print(f"  ... and {len(parts.notes) - 20} more.")


def accelerator_for(
    args: argparse.Namespace, model: nn.Module, images: Tensor, criterion: Callable[[Tensor], Tensor]
) -> Accelerator:
    """The Accelerator of a run; its precision is measured where --precision is auto, and kept when resumed.

    Several processes (`torchrun --nproc_per_node 2 train/...`) share the batch, and take the precision of the first.
    """
    recorded = args.out / "state" / "precision.txt"
    processes = PartialState()
    with processes.main_process_first():
        known = args.resume or not processes.is_main_process
        if args.precision == "auto" and known and recorded.is_file():
            args.precision = recorded.read_text().strip()
        elif args.precision == "auto":
            args.precision = fastest_precision(model, images, criterion)
        if processes.is_main_process:
            atomic.write_text(recorded, args.precision + "\n")
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=args.seed)
    return Accelerator(mixed_precision="no" if args.precision == "fp32" else "bf16", dataloader_config=loading)


def whole_batches(batch_size: int, length: int) -> int:
    """The batch size, but no more than there are images, and even in each process: images are mixed in pairs.

    Raises:
        ValueError: there are fewer images than that takes.
    """
    least = 2 * int(os.environ.get("WORLD_SIZE", 1))
    if min(batch_size, length) < least:
        raise ValueError(f"A batch needs {least} images; there are {length}, and --batch-size is {batch_size}.")
    return min(batch_size, length) // least * least


def progress_bar(batches: Iterable, description: str, batch_size: int, done: int) -> Iterable:
    """The batches of an epoch behind a bar that shows images a second, the time left and the memory in use."""
    bar = tqdm(batches, description, done + len(batches), leave=False, unit=" images", unit_scale=batch_size)
    bar.update(done)
    for i, batch in enumerate(bar):
        if i % 10 == 0:
            bar.set_postfix_str(f"{peak_memory_mb()} MB", refresh=False)
        yield batch


def peak_memory_mb() -> int:
    """The most memory that this process has used so far, on a GPU that of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def check_finite(loss: float, epoch: int, out: Path) -> None:
    """Stops a training whose loss is no number before the weights take it in."""
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss became {loss} in epoch {epoch}: nothing more can be learned. Take a smaller --lr (a tenth), or "
            f"--precision fp32. The best model so far is in {out}."
        )


def parts_of(model: nn.Module, data: Path | None, part: str) -> tuple[Parts, int]:
    """The parts that a trained model knows, and how many of the pictures it was trained on.

    Args:
        data: the data folder; None for a model of synthetic scenes.
        part: the one that is needed, or "all": then samples["all"] are those of all parts.

    Raises:
        ValueError: no folder was given, or its classes are not the model's.
    """
    facts, size = model.config.get("data", {}), model.image_size
    needed = () if part == "all" else (part,)
    if data is None and facts.get("name") != SHAPES:
        trained_on = facts.get("name", "pictures that it does not name")
        raise ValueError(f"The model was trained on {trained_on}: give their folder with --data.")
    if model.task == "classification":
        cut = [facts.get(key) for key in ("split_seed", "per_class", "classes")]
        parts = classification_parts(data, cut[0] or 0, cut[1], size, True, needed, cut[2])
    else:
        parts = segmentation_parts(data, facts.get("split_seed", 0), model.class_names, size, needed)
    if parts.class_names != model.class_names:
        raise ValueError(f"The classes of {data} are {parts.class_names}, the model's {model.class_names}.")
    trained_on = parts.as_recorded(facts.get("fingerprints", {}))
    parts.samples["all"] = [sample for name in PARTS for sample in parts.samples[name]]
    return parts, trained_on


def save_state(accelerator: Accelerator, out: Path, step: int, progress: dict) -> None:
    """Saves everything that --resume needs as out/state/step-N, whole or not at all, and drops older ones.

    Raises:
        OSError: it cannot be written.
    """
    path = out / "state" / f"step-{step}"
    alone = accelerator.is_main_process
    with atomic.new_folder(path) if alone else nullcontext(atomic.beside(path)) as folder:
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(folder))
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            raise OSError(f"The state could not be written to {path}: is the disk full?") from error
        accelerator.wait_for_everyone()
        if alone:
            atomic.write_text(folder / "progress.json", json.dumps(progress))
    for other in (out / "state").glob("step-*") if alone else ():
        if other.name != path.name:
            shutil.rmtree(other)


def load_state(accelerator: Accelerator, state: Path) -> dict:
    """Restores weights, optimizer, schedule and random numbers; returns the progress that was saved with them."""
    accelerator.load_state(str(state))
    return json.loads((state / "progress.json").read_text())


def read_history(out: Path, epochs: int) -> list[dict]:
    """The first lines of history.jsonl, one an epoch; what a killed run wrote beyond `epochs` is dropped."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    history = [json.loads(line) for line in lines[:epochs]]
    write_history(out, history)
    return history


def read_json(path: Path) -> dict:
    """The object in a file, {} where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_history(out: Path, history: list[dict]) -> None:
    """One JSON object a line."""
    atomic.write_text(out / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def print_epoch(line: dict, epochs: int, best: bool) -> None:
    """One aligned line an epoch; a star marks the best so far."""
    shown = {key: value for key, value in line.items() if key not in ("epoch", "lr", "seconds")}
    scores = "  ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())
    star = "*" if best else " "
    tqdm.write(f"epoch {line['epoch']:>3}/{epochs}  {scores}  lr {line['lr']:.1e}  {line['seconds']:>6.1f} s {star}")


def write_manifest(args: argparse.Namespace, model: nn.Module, history: list[dict]) -> None:
    """manifest.json: what was run, on what, and how long it took."""
    packages = ("torch", "torchvision", "timm", "accelerate", "captum", "numpy", "pillow")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    before = read_json(args.start_from / "manifest.json") if args.start_from else {}
    manifest = {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": args.recipe,
        "started_from": {key: before.get(key) for key in ("command", "epochs", "minutes")} if before else None,
        "seed": args.seed,
        "split_seed": args.split_seed,
        "precision": args.precision,
        "commit": commit or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "minutes": round(sum(line["seconds"] for line in history) / 60, 2),
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    atomic.write_text(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def finish(args: argparse.Namespace) -> None:
    """Says what to do with the trained model, and publishes it where --push asks for that."""
    data = f" --data {shlex.quote(str(args.data))}" if args.data else ""
    print(f"Look at it:  python app.py {args.out}")
    print(f"Measure it:  python train/evaluate.py {args.out}{data} --part test")
    if args.push:
        card.write(args.out, args.push)
        print(f"Published:   {hub.push(args.out, args.push)}")


def hardware() -> str:
    """The processor that trains, with the number of cores or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
