"""The command line that the scripts share: options, recipes, how a script ends, and the manifest of its run."""

import argparse
import difflib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from run import peak_memory_mb

from cvlab.checkpoint import card, hub
from cvlab.data import public
from cvlab.data.cache import Cache
from cvlab.data.parts import Parts
from cvlab.files import write_text
from cvlab.learning.optim import OPTIMIZERS, SCHEDULES
from cvlab.memory import keep_freed_memory
from cvlab.models import Model

RECIPES = Path(__file__).parent / "recipes"


class Parser(argparse.ArgumentParser):
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
    return public.folder_of(str(data)) if str(data).startswith(public.SCHEME) else data


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


def parser(script: str, doc: str, **defaults: object) -> Parser:
    """The options that every training script has.

    Args:
        script: its name without .py; by default its runs are in runs/script.
        doc: its docstring.
        defaults: its own values.
    """
    parser = Parser(
        prog=f"{script}.py", description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    group.add_argument("--out", type=Path, default=Path("runs") / script, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the last saved epoch of --out")
    group.add_argument("--push", metavar="USER/NAME", help="publish the trained model on the Hugging Face Hub")
    parser.set_defaults(**defaults)
    return parser


def add_classification(parser: Parser, **defaults: object) -> None:
    """The options of the scripts that train classifiers; `defaults` are the script's own."""
    group = parser.add_argument_group("classification")
    group.add_argument("--per-class", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="so many of each class")
    group.add_argument("--classes", type=int, help="take the first so many classes")
    group.add_argument("--allow-leaks", action="store_true", help="go on although val and test share files")
    group.add_argument("--crop-pct", type=float, help="share of the shorter side that a view shows")
    group.add_argument("--min-area", type=float, default=0.6, help="least share of a photo that a training crop shows")
    group.add_argument("--label-smoothing", type=float, default=0.0)
    group.add_argument("--best-by", choices=("accuracy", "loss"), default="accuracy", help="on val")
    parser.set_defaults(**defaults)


def add_cnn(parser: Parser) -> None:
    """The options that choose a CNN of cvlab/models; what is not given is as it stands there."""
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group("network", "What is not given is as cvlab/models/ has it.")
    group.add_argument("--network", choices=("convnet", "plain", "residual"), default="convnet")
    group.add_argument("--widths", type=int, nargs="+", help="channels of each stage or block")
    group.add_argument("--depth", type=int, help="convnet: residual blocks per stage; plain: convolutions per block")
    group.add_argument("--dropout", type=float)
    group.add_argument("--hidden", type=int, nargs="*", help="plain: lengths of the linear layers before the last")
    group.add_argument("--head-dropout", type=float, nargs="*", help="plain: before each linear layer")
    group.add_argument("--pools", type=int, help="plain: blocks that end in max pooling")
    group.add_argument("--pool-to", type=int, help="plain: side of the map that the linear layers read")
    group.add_argument("--padding", action=switch, help="plain: convolutions keep height and width")
    group.add_argument("--batch-norm", action=switch, help="plain: after every convolution")


def cnn_arguments(args: argparse.Namespace) -> dict:
    """The arguments of the network that were given."""
    names = ("widths", "depth", "dropout", "hidden", "head_dropout", "pools", "pool_to", "padding", "batch_norm")
    return {name: value for name in names if (value := vars(args)[name]) is not None}


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


def read_json(path: Path) -> dict:
    """The object in a file, {} where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_manifest(args: argparse.Namespace, model: Model, history: list[dict], best_epoch: int) -> None:
    """manifest.json: what was run, on what, how long it took, and the epoch whose weights were kept."""
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
        "best_epoch": best_epoch,
        "minutes": round(sum(line["seconds"] for line in history) / 60, 2),
        "peak_memory_mb": peak_memory_mb(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(args.out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


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
