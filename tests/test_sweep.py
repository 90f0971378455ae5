"""Sweeps over a stand-in script that "trains" in a tenth of a second: who runs what, how often, and what is best."""

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "train"))
import cli
import run_queue
import sweep
import sweep_plan
from sweep_tables import by_number

from cvlab import checkpoint

# val accuracy is lr * epoch / 10, so that the answer is known; every epoch is noted in trained.log beside the script.
SCRIPT = """
import argparse, json, os, sys, time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--width", type=int, default=4)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--early", action=argparse.BooleanOptionalAction, default=True, help="the best epoch is the first")
parser.add_argument("--keep", type=int, help="the epoch that the run keeps, as --best-by loss may choose another")
parser.add_argument("--out", type=Path)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
if args.lr == 13 and not Path(__file__).with_name("mended").exists():
    sys.exit("ValueError: 13 brings bad luck")
path = args.out / "history.jsonl"
lines = path.read_text().splitlines(keepends=True) if path.exists() else []
for epoch in range(len(lines) + 1, args.epochs + 1):
    time.sleep(0.1)
    score = args.lr * (args.epochs + 1 - epoch if args.early else epoch) / 10
    lines.append(json.dumps({"epoch": epoch, "val_loss": 1, "val_accuracy": score, "seconds": 6}) + "\\n")
    path.with_name("writing").write_text("".join(lines))
    with open(Path(__file__).with_name("trained.log"), "a") as log:
        log.write(f"{args.out.name} {epoch}\\n")
    os.replace(path.with_name("writing"), path)
if args.keep:
    path.with_name("writing").write_text(json.dumps({"best_epoch": args.keep}))
    os.replace(path.with_name("writing"), path.with_name("manifest.json"))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(sweep, "POLL", 0.05)
    return tmp_path / "script.py"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The scripts listen to signals in their own way; the tests after these shall not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*arguments: object) -> None:
    """The sweep's command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        sweep.main()


def begin(*arguments: object) -> multiprocessing.Process:
    """The same in another process."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    return process


def runs(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "runs.csv").open(newline="")))


def column(out: Path, name: str) -> list[str]:
    return [row[name] for row in runs(out)]


def trained(script: Path) -> Counter[str]:
    """How often each epoch of each run was trained: "002 1" is the first epoch of the second run."""
    return Counter(script.with_name("trained.log").read_text().splitlines())


def wait_for(path: Path) -> None:
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_a_grid_has_every_combination_and_names_the_best(script: Path, capsys: pytest.CaptureFixture) -> None:
    out = script.with_name("sweep")
    run(script, "--over", "lr=0.1,0.5", "early=on,off", "width=4", "--out", out, "--", "--epochs", 2)
    assert [(row["lr"], row["early"], row["best val"], row["at epoch"]) for row in runs(out)] == [
        ("0.1", "on", "0.0200", "1"),
        ("0.1", "off", "0.0200", "2"),
        ("0.5", "on", "0.1000", "1"),
        ("0.5", "off", "0.1000", "2"),
    ]
    assert column(out, "minutes") == ["0.2"] * 4
    assert set(trained(script).values()) == {1}
    (best,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("| **")]
    assert best.split()[1] == "**003**"  # the first of the two that are equal
    assert f"{out}/003" in capsys.readouterr().out
    assert Image.open(out / "curves.png").width > 300


def test_what_a_number_does_to_the_score_is_drawn_by_the_other_options(script: Path) -> None:
    out = script.with_name("numbers")
    run(script, "--over", "lr=0.1,0.2,0.5", "early=on,off", "--out", out, "--", "--epochs", 1)
    scores = [(0.1, 0.01), (0.2, 0.02), (0.5, 0.05)]
    assert by_number(runs(out)) == ("lr", {"early on": scores, "early off": scores})
    assert Image.open(out / "by_lr.png").width > 300
    rows = [{"run": "", "per_class": f"{n} 50", "seed": str(n), "best val": f"0.{n}"} for n in (20, 30, 40)]
    assert by_number(rows) == ("per_class", {"": [(20, 0.2), (30, 0.3), (40, 0.4)]})
    assert by_number(rows[:2]) is None  # a line through two points says nothing


def test_a_run_counts_by_the_epoch_that_it_kept(script: Path) -> None:
    """The first run reaches 0.3 and keeps an epoch of 0.1, the second one reaches and keeps 0.2."""
    out = script.with_name("kept")
    run(script, "--over", "lr=1,2", "early=on,off", "--out", out, "--", "--epochs", 3, "--keep", 3)
    assert [(row["best val"], row["at epoch"]) for row in runs(out)] == [
        ("0.1000", "3"),
        ("0.3000", "3"),
        ("0.2000", "3"),
        ("0.6000", "3"),
    ]
    run(script, "--over", "lr=3,2", "early=on", "--out", out / "2", "--", "--epochs", 2, "--keep", 2)
    assert column(out / "2", "best val") == ["0.3000", "0.2000"]
    (best,) = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("| **")]
    assert best.split()[1] == "**004**"


def test_a_killed_sweep_goes_on_without_a_run_done_twice(script: Path) -> None:
    arguments = [script, "--over", "lr=0.1,0.4,0.2", "--out", script.with_name("killed"), "--", "--epochs", 4]
    process = begin(*arguments)
    wait_for(script.with_name("killed") / "002" / "history.jsonl")
    process.kill()
    process.join()
    alive = time.monotonic() + 0.5
    while time.monotonic() < alive:  # the training that it had started has ended with it
        before = trained(script)
        time.sleep(0.25)
    assert trained(script) == before
    assert len(before) < 12
    run(*arguments)
    assert column(script.with_name("killed"), "best val") == ["0.0400", "0.1600", "0.0800"]
    assert column(script.with_name("killed"), "state") == ["done"] * 3
    times = trained(script)
    assert set(times) == {f"{n:03} {epoch}" for n in (1, 2, 3) for epoch in (1, 2, 3, 4)}
    assert sum(times.values()) <= 13  # the epoch in which it was killed
    assert all(times[f"001 {epoch}"] == 1 for epoch in (1, 2, 3, 4))


def test_two_processes_share_the_runs_of_one_journal(script: Path) -> None:
    out = script.with_name("shared")
    arguments = [script, "--over", "lr=0.1,0.2,0.3,0.4", "--out", out]
    processes = [begin(*arguments) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert column(out, "best val") == [f"{lr * 0.03:.4f}" for lr in range(1, 5)]
    assert set(trained(script).values()) == {1}
    changes = map(json.loads, (out / "journal.log").read_text().splitlines())
    assert len({change["worker_id"] for change in changes if change.get("state") == TrialState.RUNNING}) == 2


def test_the_run_of_a_killed_worker_is_taken_at_once_and_finished(script: Path) -> None:
    out = script.with_name("taken")
    process = begin(script, "--over", "lr=0.1", "--out", out, "--", "--epochs", 5)
    wait_for(out / "001" / "history.jsonl")
    study = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(out / "journal.log"))))
    assert run_queue.take(study, out) is None  # the other worker lives
    process.kill()
    process.join()
    trial, lock = run_queue.take(study, out)
    assert (trial.number, trial.user_attrs["options"]) == (0, {"lr": "0.1"})
    assert run_queue.take(study, out) is None  # this worker lives
    sweep.train(study, trial, out)
    lock.release()
    assert study.trials[0].value == 0.05
    assert set(trained(script)) == {f"001 {epoch}" for epoch in range(1, 6)}
    assert sum(trained(script).values()) <= 6  # the epoch in which it was killed


def test_a_run_that_ends_while_another_worker_looks_is_no_dead_one(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is recorded and its lock let go between the other's look at the journal and its look at the lock."""
    out = script.parent / "sweep"
    plan = {"runs": [{"lr": "1"}], "sampler": "tpe", "seed": 0}
    other = run_queue.open_study(out, plan)
    trial, lock = run_queue.take(other, out)

    def late(path: Path) -> FileLock:
        if lock.is_locked:
            other.tell(trial.number, 0.5)
            lock.release()
        return FileLock(path)

    study = run_queue.open_study(out, plan)
    monkeypatch.setattr(run_queue, "FileLock", late)
    assert run_queue.take(study, out) is None
    assert [each.state for each in study.trials] == [TrialState.COMPLETE]


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The URL of a PostgreSQL of its own, that only a socket in its folder reaches."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), *filter(None, [shutil.which("pg_ctl")])]
    if not found:
        pytest.skip("there is no pg_ctl: install the package postgresql")
    user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}  # it refuses root
    folder = Path(tempfile.mkdtemp())
    if user:
        shutil.chown(folder, "nobody", "nogroup")

    def control(*words: str) -> None:
        command = [found[0], "-D", folder / "data", "-s", "-w", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **user)

    control("initdb", "-o", "-A trust -U sweeper --no-sync")
    control("start", "-l", folder / "log", "-o", f"-k {folder} -c listen_addresses= -F")
    yield f"postgresql://sweeper@/postgres?host={folder}"
    control("stop", "-m", "immediate")
    shutil.rmtree(folder)


def test_workers_share_the_runs_of_a_database(script: Path, database: str) -> None:
    out = script.with_name("shared")
    arguments = [script, "--over", "lr=0.1,0.2,0.3,0.4", "--out", out, "--storage", database]
    processes = [begin(*arguments) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert column(out, "best val") == [f"{lr * 0.03:.4f}" for lr in range(1, 5)]
    run(*arguments)
    assert set(trained(script).values()) == {1}
    assert not (out / "journal.log").exists()


def test_the_run_of_a_killed_worker_goes_on_by_a_database(script: Path, database: str) -> None:
    arguments = [script, "--over", "lr=0.1,0.4", "--out", script.with_name("killed"), "--storage", database]
    process = begin(*arguments, "--", "--epochs", 4)
    wait_for(script.with_name("killed") / "001" / "history.jsonl")
    process.kill()
    process.join()
    run(*arguments, "--", "--epochs", 4)
    assert column(script.with_name("killed"), "state") == ["done"] * 2
    assert set(trained(script)) == {f"{n:03} {epoch}" for n in (1, 2) for epoch in (1, 2, 3, 4)}
    assert sum(trained(script).values()) <= 9


@pytest.mark.parametrize("sampler", run_queue.SAMPLERS)
def test_a_seed_draws_the_same_with_a_journal_and_a_database(tmp_path: Path, database: str, sampler: str) -> None:
    plan, drawn = {"runs": [None] * 3, "sampler": sampler, "seed": 5}, {}
    for where in (None, database):
        study = run_queue.open_study(tmp_path / f"{sampler} {where is None}", plan, where)
        for _ in plan["runs"]:
            trial, lock = run_queue.take(study, tmp_path)
            drawn.setdefault(where, []).append(sweep_plan.draw(trial, "lr", "1e-4..1e-1"))
            study.tell(trial, 0.5)
            lock.release()
    assert drawn[None] == drawn[database]
    assert len(set(drawn[None])) == 3


@pytest.mark.parametrize("url", ["postgresql://me@127.0.0.1:9/none", "oracle://me@127.0.0.1:9/none", "nothing"])
def test_a_database_that_is_not_there_is_a_sentence(script: Path, url: str) -> None:
    with pytest.raises(ValueError, match="--storage"):
        run(script, "--over", "lr=0.1", "--out", script.with_name("none"), "--storage", url)


def test_a_queue_that_was_cut_off_is_completed(tmp_path: Path) -> None:
    """The first worker was killed before it had queued the last run."""
    plan = {"runs": [{"lr": "1"}, {"lr": "2"}]}
    run_queue.open_study(tmp_path, plan)
    journal = tmp_path / "journal.log"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    for _ in range(2):
        study = run_queue.open_study(tmp_path, plan)
        assert [trial.user_attrs["options"] for trial in study.trials] == plan["runs"]


def test_half_a_line_of_a_full_disk_ends_no_sweep(tmp_path: Path) -> None:
    plan = {"runs": [{"lr": "1"}, {"lr": "2"}]}
    run_queue.open_study(tmp_path, plan)
    journal = tmp_path / "journal.log"
    journal.write_bytes(journal.read_bytes()[:-20])
    for _ in range(2):  # what is written after the half line can be read again
        study = run_queue.open_study(tmp_path, plan)
        assert [trial.user_attrs["options"] for trial in study.trials] == plan["runs"]


@pytest.mark.parametrize("sampler", run_queue.SAMPLERS)
def test_a_sampler_draws_so_many_runs_within_the_ranges(script: Path, sampler: str) -> None:
    ranges = ["lr=1e-4..1e-1", "width=2..8", "early=on,off"]
    out = script.with_name("sweep")
    run(script, "--over", *ranges, "--trials", 2, "--sampler", sampler, "--out", out, "--", "--epochs", 1)
    chosen = [(float(row["lr"]), int(row["width"]), row["early"]) for row in runs(out)]
    assert len(set(chosen)) == 2
    assert all(1e-4 <= lr <= 1e-1 and 2 <= width <= 8 for lr, width, _ in chosen)


@pytest.mark.parametrize(
    ("values", "expected"),
    [("1e-4..1e-1", (1e-4, 1e-1, True)), ("0..0.5", (0, 0.5, False)), ("2..16", (2, 16, False)), ("1,2", None)],
)
def test_a_range_is_logarithmic_from_a_factor_of_ten(values: str, expected: tuple | None) -> None:
    assert sweep_plan.read_range("lr", values) == expected


def test_a_run_under_the_median_of_the_others_is_stopped(script: Path) -> None:
    out = script.with_name("pruned")
    run(script, "--over", "lr=0.5,0.6,0.7,0.8,0.9,0.1", "--prune", "--out", out, "--", "--epochs", 5)
    assert column(out, "state") == ["done"] * 5 + ["pruned"]
    assert int(runs(out)[5]["epochs"]) < 5


def test_what_failed_is_named_and_tried_again_by_the_next_command(script: Path) -> None:
    out = script.with_name("failed")
    arguments = [script, "--over", "lr=13,1", "--out", out]
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed[^\0]*001: ValueError: 13 brings bad luck"):
        run(*arguments)
    assert column(out, "state") == ["failed", "done"]
    script.with_name("mended").touch()
    run(*arguments)
    assert column(out, "state") == ["done", "done"]
    assert set(trained(script).values()) == {1}


def test_a_recipe_lists_runs_beside_the_figures_of_a_report(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        'script = "sweep"',
        f'of = "{script}"',
        'fixed = ["--epochs", "1"]',
        "[options]",
        'over = ["early=on,off"]',
    ]
    lines += ["[[runs]]", "lr = 0.5", "width = 8", "report = 0.7", "[[runs]]", "lr = 1", "report = 0.8"]
    script.with_name("listed.toml").write_text("\n".join(lines))
    monkeypatch.setattr(cli, "RECIPES", script.parent)
    monkeypatch.chdir(script.parent)
    run("--recipe", "listed")
    rows = [
        (row["early"], row["lr"], row["width"], row["report"], row["best val"]) for row in runs(Path("runs/listed"))
    ]
    assert rows == [
        ("on", "0.5", "8", "0.7", "0.0500"),
        ("on", "1", "", "0.8", "0.1000"),
        ("off", "0.5", "8", "0.7", "0.0500"),
        ("off", "1", "", "0.8", "0.1000"),
    ]


@pytest.mark.parametrize(("name", "number"), [("horses-sweep", 12), ("scenes8-sweep", 8), ("lessons", 27)])
def test_the_scripts_take_every_run_of_a_recipe(tmp_path: Path, name: str, number: int) -> None:
    recipe = cli.read_recipe(name)
    settings = {"script": None, "trials": None, "prune": None, "sampler": "tpe", "seed": 0}
    args = argparse.Namespace(data=tmp_path, over=recipe["options"].get("over", []), **settings)
    assert len(sweep_plan.make_plan(args, recipe, [])["runs"]) == number


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["clasifier", "--over", "lr=1,2"], "nearest is classifier"),
        (["SCRIPT"], "--over"),
        (["segmenter", "--over", "widht=1,2"], "nearest is --width"),
        (["classifier", "--over", "lr=1,2", "--", "--no-agument"], "nearest is --no-augment"),
        (["segmenter", "--over", "crop_pct=0.8,1"], "no --crop-pct"),
        (["segmenter", "--over", "depth=2,2.5"], r"--depth: .*2\.5"),
        (["segmenter", "--over", "width=0.5..16", "--trials", "2"], r"--width: .*0\.5"),
        (["segmenter", "--over", "loss=bce,bse"], "--loss: .*bse"),
        (["segmenter", "--over", "lr=1,2", "--", "--epochs", "many"], "--epochs: .*many"),
        (["segmenter", "--over", "batch_norm=1"], "batch-norm 1"),
        (["segmenter", "--over", "recipe=flowers5-basic"], "flowers5-basic"),
        (["segmenter", "--over", "recipe=horses-unet"], "--data"),
        (["SCRIPT", "--over", "lr=1,2", "--", "--lr", "3"], "lr is given"),
        (["SCRIPT", "--over", "lr=1,2", "--", "--out=x"], "--out"),
        (["SCRIPT", "--over", "lr=1..2"], "--trials"),
        (["SCRIPT", "--over", "lr=2..1", "--trials", "2"], "lr=2..1"),
        (["SCRIPT", "--over", "lr=a..b", "--trials", "2"], "lr=a..b"),
        (["SCRIPT", "--over", "lr"], "--over lr"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_it(script: Path, arguments: list[str], named: str) -> None:
    out = script.with_name("mistake")
    words = [str(script) if word == "SCRIPT" else word for word in arguments]
    cut = words.index("--") if "--" in words else len(words)
    with pytest.raises(ValueError, match=named):
        run(*words[:cut], "--out", out, *words[cut:])
    assert not out.exists()


def test_a_folder_keeps_to_one_sweep(script: Path) -> None:
    out = script.with_name("sweep")
    run(script, "--over", "lr=1", "--out", out, "--", "--epochs", 1)
    with pytest.raises(ValueError, match=str(out)):
        run(script, "--over", "lr=1", "--out", out, "--", "--epochs", 2)


def test_a_trained_network_learns_on_with_dropout_at_several_places(tmp_path: Path) -> None:
    """The true scripts: 24 noisy pictures of two classes; the second sweep shows what evaluate.py measured."""
    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    small = ["--image-size", "16", "--widths", "4", "8", "--precision", "fp32", "--data", tmp_path / "photos"]
    small += ["--network", "plain", "--hidden", "--epochs", "1"]
    start, study = tmp_path / "start", tmp_path / "study"
    subprocess.run([sys.executable, ROOT / "train/classifier.py", *small, "--out", start], check=True)
    words = ["classifier", "--over", "dropout=0.5", "dropout_at=2,2 3", "--out", study]
    run(*words, "--", *small, "--start-from", start)
    for folder, places in (("001", [2]), ("002", [2, 3])):
        arguments = checkpoint.load(study / folder).config["arguments"]
        assert (arguments["dropout"], arguments["dropout_at"]) == (0.5, places)
    measuring = [ROOT / "train/evaluate.py", study / "001", "--data", tmp_path / "photos"]
    subprocess.run([sys.executable, *measuring], check=True)
    assert (study / "001/report/confusion_matrix.png").is_file()
    run(*words, "--", *small, "--start-from", start)
    accuracy = json.loads((study / "001/metrics.json").read_text())["accuracy"]
    assert column(study, "test") == ["{value:.3f} ({low:.3f} to {high:.3f})".format(**accuracy), ""]
