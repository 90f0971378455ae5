"""The command line that all scripts share: options, recipes, and how a script ends."""

import argparse
import difflib
import io
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from limits import check_numbers, converted

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before any script imports cvlab, which needs no installation

from cvlab.data import public
from cvlab.data.folders import existing
from cvlab.data.sets import AUGMENTATIONS, NORMALIZATIONS
from cvlab.files import DISK_IS_FULL, printable
from cvlab.learning.optim import DECAYS, OPTIMIZERS, SCHEDULES
from cvlab.memory import keep_freed_memory
from cvlab.models.model import Channels

RECIPES = Path(__file__).parent / "recipes"
FILE_IN_THE_WAY = (FileExistsError, NotADirectoryError)
TRAINERS = ("classifier", "segmenter", "transfer")
CROP_MODES = {"crop": "center", "squash": "squash"}  # --resize, as timm and config.json call it


class Parser(argparse.ArgumentParser):
    """A command line with --recipe NAME: the options of recipes/NAME.toml are defaults, typed options win.

    A recipe has `script`, `data` (how to get the pictures, unless [options] names them), the table [report] (system,
    row, figure) and the table [options] (names with underscores). The default of --out is runs/NAME.
    """

    def __init__(self, **settings: object) -> None:
        asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        group = asked.add_argument_group("recipe")
        group.add_argument("--recipe", metavar="NAME", help="use the options of recipes/NAME.toml as defaults")
        group.add_argument("--list-recipes", action="store_true", help="print the recipes of this script")
        super().__init__(**settings, allow_abbrev=False, parents=[asked])
        self.asked = asked

    def parse_args(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """As argparse does, but with recipes; for an unknown option the error names the nearest known one."""
        words = list(sys.argv[1:] if words is None else words)
        asked, _ = self.asked.parse_known_args(words)
        if asked.list_recipes:
            print(list_recipes(Path(self.prog).stem))
            self.exit()
        if asked.recipe:
            self.take_defaults(asked.recipe)
        args, unknown = self.parse_known_args(words)
        if unknown:
            self.error(f"there is no {unknown[0]}{nearest(unknown[0].split('=')[0], self._option_string_actions)}")
        if args.recipe and args.data is None and (how := read_recipe(args.recipe).get("data")):
            raise ValueError(f"Recipe {args.recipe} needs a folder of photos, given with --data: {how}")
        args.data = public.folder_of(args.data)
        if vars(args).get("others"):
            existing(args.others)
        if vars(args).get("push_state") and not (args.push and os.environ.get("WORLD_SIZE", "1") == "1"):
            self.error("--push-state goes with --push USER/NAME and a single process")
        check_numbers(args)
        return args

    def take_defaults(self, name: str) -> None:
        """Makes the options of a recipe the defaults."""
        recipe, script = read_recipe(name), Path(self.prog).stem
        if recipe["script"] != script:
            other = f"python train/{recipe['script']}.py --recipe {name}"
            raise ValueError(f"{name} is not a recipe of {script}.py. Run: {other}")
        known = {action.dest: action for action in self._actions}
        self.set_defaults(out=Path("runs") / name)
        for option, value in recipe["options"].items():
            if option not in known:
                raise ValueError(f"Recipe {name}: {script}.py has no option “{option}”{nearest(option, known)}")
            try:
                self.set_defaults(**{option: converted(value, known[option])})
            except ValueError as error:
                raise ValueError(f"Recipe {name}: “{value}” is not a value of {option}.") from error


def read_recipe(name: str) -> dict:
    """The tables of a recipe; ValueError if there is none of this name."""
    names = [path.stem for path in sorted(RECIPES.glob("*.toml"))]
    if name not in names:
        raise ValueError(f"There is no recipe “{name}”{nearest(name, names)} See --list-recipes.")
    return tomllib.loads((RECIPES / f"{name}.toml").read_text())


def list_recipes(script: str) -> str:
    """A table of a script's recipes: name, system, experiment and the figure to compare with."""
    recipes = {path.stem: read_recipe(path.stem) for path in sorted(RECIPES.glob("*.toml"))}
    rows = [("recipe", "system", "experiment", "figure")]
    reports = {name: recipe["report"] for name, recipe in recipes.items() if recipe["script"] == script}
    rows += [(name, report["system"], report["row"], report["figure"]) for name, report in reports.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: what was probably meant."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {close[0]}." if close else "."


def parser(script: str, doc: str, **defaults: object) -> Parser:
    """The options that every training script has; `script` is its name without .py, `doc` its docstring."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog=f"{script}.py", description=doc.splitlines()[0], formatter_class=style)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, help="data folder, torchvision:NAME or hf:user/dataset; else synthetic scenes")
    add("--split-seed", type=int, default=0, help="seed of the split into train, val and test")
    add("--image-size", type=int, help="side of the square input, pixels")
    add("--normalize", choices=NORMALIZATIONS, default="data", help="by whose mean and std of each channel")
    add("--no-augment", action="store_const", dest="augment", const="none", default="full", help="--augment none")
    add("--augment", choices=AUGMENTATIONS, nargs="?", const="full", default="full", help=(
        "training photos are cropped, rotated, mirrored and coloured at random; minimal: only mirrored"
    ))  # fmt: skip
    add("--color-jitter", type=float, default=0.3, help="full augmentation: how far colours change; 0: not at all")
    add("--erase", type=float, default=0.0, help="full augmentation: share of pictures with one of 16 cells greyed")
    add = parser.add_argument_group("pictures that are no photos", argument_default=argparse.SUPPRESS).add_argument
    # --channels of transfer.py is that of its head.
    names = ["--in-channels"] + ["--channels"] * (script != "transfer")
    add(*names, type=int, metavar="N", help="pictures are TIFF or .npy of N channels")
    add("--show", type=int, nargs=3, metavar=("R", "G", "B"), help="what people see of them; else 1 2 3, or 1 alone")
    add("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white; needed for all but uint8")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float, help="the highest learning rate")
    add("--optimizer", choices=OPTIMIZERS)
    add("--momentum", type=float, default=0.9, help="of sgd, nesterov and rmsprop")
    add("--schedule", choices=SCHEDULES, default="onecycle", help="of the learning rate")
    add("--div-factor", type=float, default=25.0, help="onecycle starts at --lr divided by this")
    add("--weight-decay", type=float)
    add("--decay", choices=DECAYS, default="weights", help="all: also biases and normalisation, as torch's optimizers")
    add("--patience", type=int, default=50, help="stop after this many epochs without a better val score")
    add("--seed", type=int, default=0, help="of first weights, order of pictures, and augmentation")
    add("--start-from", type=Path, metavar="CHECKPOINT", help="start with the weights of this trained model")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the faster one on this machine")
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--out", type=Path, default=Path("runs") / script, help="folder of the run")
    add("--push", metavar="USER/NAME", help="publish the trained model on the Hugging Face Hub")
    add("--push-state", action="store_true", help="each state too; --resume fetches it to another machine")
    add("--track", choices=("trackio", "tensorboard"), help="scores, options and pictures also for this tracker")
    add = group.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue the run in --out from where it was last saved")
    add("--overwrite", action="store_true", help="replace the run or model that is in --out")
    parser.set_defaults(**defaults)
    return parser


def add_classification(parser: Parser, **defaults: object) -> None:
    """Adds the options of the scripts that train classifiers; `defaults` are the script's own."""
    add = parser.add_argument_group("classification").add_argument
    add("--per-class", type=int, nargs=2, metavar=("TRAIN", "VAL"), help="pictures per class; the rest is for test")
    add("--classes", type=int, help="use only the first so many classes")
    add("--allow-leaks", action="store_true", help="continue although val and test share files")
    add("--resize", choices=CROP_MODES, default="crop", help="to a square: the centre, or the whole photo squashed")
    add("--crop-pct", type=float, help="side of the centre crop as a share of the photo's shorter side")
    add("--min-area", type=float, default=0.6, help="smallest share of a photo that an augmented crop shows")
    add("--others", type=Path, metavar="DIR", help="photos of anything else: teaches what is none of the classes")
    add("--label-smoothing", type=float, default=0.0)
    weights = "balanced: rare classes count more in the loss, n / (classes * n of the class)"
    add("--class-weights", choices=("none", "balanced"), default="none", help=weights)
    add("--best-by", choices=("accuracy", "loss"), default="accuracy", help="val score by which an epoch is kept")
    parser.set_defaults(**defaults)


def channels_of(args: argparse.Namespace) -> Channels | None:
    """The channels of pictures that are no photos; ValueError for what cannot go with them."""
    count, show, limits = (vars(args).get(name) for name in ("in_channels", "show", "range"))  # there if given
    if count is None:
        return None
    if args.data is None or args.normalize == "imagenet":
        raise ValueError("--in-channels needs pictures, given with --data, and --normalize data.")
    return Channels(count, show or ([1, 2, 3] if count > 2 else [1, 1, 1]), limits or [])


def view_of(args: argparse.Namespace) -> dict:
    """What a classifier sees of a photo, as far as it was given: arguments of `cvlab.models.build`."""
    given = {"image_size": args.image_size, "crop_pct": args.crop_pct, "crop_mode": CROP_MODES.get(args.resize)}
    return {name: value for name, value in given.items() if value}


def run(main: Callable[[], None]) -> None:
    """Runs a script; errors that a user can fix end in one sentence. CVLAB_TRACEBACK=1 shows where they come from."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # any name that a file can have can be printed, on any terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if int(os.environ.get("RANK", 0)) > 0:  # set by torchrun: only the first of several processes prints
        sys.stdout = io.StringIO()
    try:
        main()
    except KeyboardInterrupt:
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        words += ["--resume"] * (Path(sys.argv[0]).stem in TRAINERS)  # the others continue as they are
        sys.exit(f"\nStopped; what was saved is safe. Continue with:\n  {shlex.join(['python', *words])}")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)
        if os.environ.get("CVLAB_TRACEBACK") or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        if out_of_memory:
            sys.exit("Out of memory: make --batch-size or --image-size smaller. What was saved is safe.")
        if not isinstance(error, OSError) or not (error.filename or error.errno in DISK_IS_FULL):
            lines = str(error).split("\n")  # names of files may hold anything
            sys.exit(f"{type(error).__name__}: " + "\n".join(map(printable, lines)))
        advice = "If it was to be written, choose another folder with --out."
        if error.errno in DISK_IS_FULL:
            advice = "Make room, or choose another --out. What was saved is safe; --resume continues a training."
        reason = "it is a file, or lies below one" if isinstance(error, FILE_IN_THE_WAY) else error.strerror
        sys.exit(f"{str(error.filename2 or error.filename or 'the disk')!r}: {reason}. {advice}")
