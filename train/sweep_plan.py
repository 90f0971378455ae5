"""Plans a sweep: lists its runs, and checks their options with the script's own parser before the first one starts."""

import argparse
import importlib
import itertools
import math
import re
import shlex
from pathlib import Path

import cli
import optuna

SCRIPTS = ("classifier", "segmenter", "transfer")
# Options that the sweep sets for each run, and one that would publish every run under the same name.
NOT_FOR_RUNS = {"out", "resume", "overwrite", "push"}


def make_plan(args: argparse.Namespace, recipe: dict, fixed: list[str]) -> dict:
    """What defines a sweep, as JSON: script, fixed words, ranges, runs and how a sampler draws.

    "runs" has the options of each run as text, None where a sampler draws them from "ranges".

    `recipe` holds the tables of its recipe, {} without one; `fixed` the words after --, for every run.
    """
    name = args.script or recipe.get("of")
    script = find_script(name)
    fixed = recipe.get("fixed", []) + (["--data", str(args.data)] if args.data else []) + fixed
    ranges = dict(map(read_over, args.over))
    if args.trials:
        listed, runs = [], [None] * args.trials
    else:
        if any(".." in values for values in ranges.values()):
            raise ValueError("A range has no list of values: say with --trials how many runs a sampler should draw.")
        listed = [{name: as_text(value) for name, value in row.items()} for row in recipe.get("runs", [])]
        grid = itertools.product(*(dict.fromkeys(values.split(",")) for values in ranges.values()))
        runs = [dict(zip(ranges, values, strict=True)) | row for values in grid for row in listed or [{}]]

    swept = {*ranges, *itertools.chain(*listed)} - {"report"}
    if not swept:
        raise ValueError("Nothing to sweep over: give --over OPTION=VALUES, or a --recipe that lists runs.")
    names = (word.partition("=")[0].lstrip("-") for word in fixed if word.startswith("--"))
    given = {name.replace("-", "_").removeprefix("no_") for name in names}  # --no-batch-norm is one of batch_norm
    if refused := sorted(NOT_FOR_RUNS & (swept | given)):
        raise ValueError(f"--{refused[0]} cannot be given to the runs of a sweep: each has its own folder.")
    if twice := sorted(swept & given):
        raise ValueError(f"{twice[0]} is given after -- and swept over: leave one of them out.")
    ends = {name: values.split(".." if ".." in values else ",") for name, values in ranges.items()}
    for options in [*({name: value} for name, values in ends.items() for value in values), *listed]:
        check_words(script, fixed + as_words(options))
    prune = bool(args.trials) if args.prune is None else args.prune
    settings = {"sampler": args.sampler, "seed": args.seed, "prune": prune}
    return {"script": name, "fixed": fixed, "ranges": ranges, "runs": runs, **settings}


def find_script(name: str | None) -> Path:
    """The file of a training script: one of `SCRIPTS` by its name, any other one by its path."""
    if name is None:
        raise ValueError(f"Which script? One of {', '.join(SCRIPTS)}, or the path of your own.")
    path = Path(__file__).with_name(f"{name}.py") if name in SCRIPTS else Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"There is no training script {name}{cli.nearest(name, SCRIPTS)}")
    return path


def read_over(word: str) -> tuple[str, str]:
    """The option and the values of OPTION=VALUES."""
    name, _, values = word.partition("=")
    if not all(values.split(",")):
        raise ValueError(f"--over {word}: write OPTION=VALUE,VALUE or OPTION=LOW..HIGH.")
    read_range(name, values)
    return name.replace("-", "_"), values


def read_range(name: str, values: str) -> tuple[float, float, bool] | None:
    """Both ends of LOW..HIGH, and whether it is drawn on a logarithmic scale: from a factor of ten. None of a list."""
    if ".." not in values:
        return None
    try:
        low, high = ((int if re.fullmatch(r"-?\d+", end) else float)(end) for end in values.split(".."))
    except ValueError:
        low, high = 1, 0
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--over {name}={values}: a range is LOW..HIGH, two numbers, the smaller one first.")
    return low, high, low > 0 and high >= 10 * low


def check_words(script: Path, words: list[str]) -> None:
    """Parses the words of a run as its script does; a script of another folder has no parser here, its runs tell."""

    def refuse(message: str) -> None:
        raise ValueError(f"{script.name} {shlex.join(words)}: {message}")

    if script.stem in SCRIPTS and script.resolve().parent == Path(__file__).resolve().parent:
        parser = importlib.import_module(script.stem).parser()
        parser.error = refuse  # where argparse would end the process
        parser.parse_args(words)


def draw(trial: optuna.Trial, name: str, values: str) -> str:
    """One option's value, drawn by the study's sampler from LOW..HIGH or from values with commas."""
    ends = read_range(name, values)
    if not ends:
        return trial.suggest_categorical(name, values.split(","))
    low, high, log = ends
    if isinstance(low, int) and isinstance(high, int):
        return str(trial.suggest_int(name, low, high, log=log))
    return f"{trial.suggest_float(name, low, high, log=log):.4g}"


def as_text(value: object) -> str:
    """An option's value in a recipe, as --over writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return shlex.join(map(str, value if isinstance(value, list) else [value]))


def as_words(options: dict[str, str]) -> list[str]:
    """Options as words of a command line; a switch is --NAME or --no-NAME."""
    words = []
    for name, value in options.items():
        if name != "report":  # a published score beside a run of a recipe, to compare with
            words.append(f"--{'no-' if value == 'off' else ''}{name.replace('_', '-')}")
            words += [] if value in ("on", "off") else shlex.split(value)
    return words
