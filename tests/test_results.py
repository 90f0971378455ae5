"""The comparison with the reports: each kind of row from figures whose answer is known, and what a run leaves."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import results

MANIFEST = {"command": "python train/x.py", "parameters": 1_500_000, "epochs": 20, "minutes": 6.4, "hardware": "abacus"}
TEST = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 10}


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_a_run_has_its_score_with_interval_and_its_cost() -> None:
    found = {"score": "accuracy", "val": {"value": 0.625, "epoch": 3}, "test": TEST, "data": "horses"}
    first = {"command": "python train/x.py", "epochs": 5, "minutes": 1}
    (row,) = results.rows_of("horses-unet", {**found, "manifest": {**MANIFEST, "started_from": first}})
    assert cells(row)[1].startswith("val iou 0.7964")  # as train/recipes/horses-unet.toml has it
    assert cells(row)[2:] == [
        "accuracy **0.500** (0.250 to 0.750), n = 10",
        "0.625",
        "Weizmann horses, 278",
        "1.50 M",
        "25, 7",
    ]
    (row,) = results.rows_of("horses-unet", {**found, "test": None, "manifest": {**MANIFEST, "started_from": None}})
    assert cells(row)[2:4] == ["not read", "0.625"]


def test_what_was_not_run_says_why() -> None:
    (row,) = results.rows_of("sports100-vgg19", None)
    assert cells(row)[2] == f"not run: {results.WEIGHTS}"
    facts = {"seconds_a_step": 30.0, "steps": 3, "precision": "bf16", "hours": 31.2, "parameters": 7_700_000}
    (row,) = results.rows_of("horses-unet", {"timed": facts})
    assert "about 31 hours" in cells(row)[2]
    assert cells(row)[5] == "7.70 M"


def test_a_study_shows_the_value_that_val_chose_beside_the_control() -> None:
    def row(p: str, val: float, test: float) -> dict:
        return {"dropout": p, "after": {"val": {"value": val}, "test": {**TEST, "value": test}}}

    rows = [row("0", 0.4, 0.3), row("0.1", 0.6, 0.4), row("0.5", 0.5, 0.9)]
    (line,) = results.rows_of("scenes8-dropout-study", {"study": {"plain": {"epochs": 100, "rows": rows}}})
    assert cells(line)[0] == "scenes8-dropout-study: plain"
    assert cells(line)[2].startswith("accuracy **0.400**")
    assert cells(line)[2].endswith("at 0 0.300")


def test_the_scores_of_one_change_are_those_of_its_seeds() -> None:
    rows = [
        {"run": "001", "seed": "0", "lr": "0.1", "dropout": "", "best val": "0.5", "state": "done"},
        {"run": "002", "seed": "1", "lr": "0.1", "dropout": "", "best val": "0.7", "state": "done"},
        {"run": "003", "seed": "0", "lr": "0.1", "dropout": "0.5", "best val": "0.9", "state": "done"},
    ]
    assert results.scores_of(rows, {"lr": "0.1"}) == [0.5, 0.7]
    assert results.scores_of(rows, {"lr": "0.1", "dropout": "0.5"}) == [0.9]


def test_a_run_folder_is_collected_without_its_photographs(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "val_iou": 0.5}, {"epoch": 2, "val_iou": 0.75}, {"epoch": 3, "val_iou": 0.25}]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "manifest.json").write_text(json.dumps({**MANIFEST, "versions": {}}))
    block = {"network": "unet", "data": {"name": "horses", "fingerprints": {"train": ["a"]}}, "image_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"cvlab": block}))
    metrics = {"part": "test", "n": 42, "iou": {"value": 0.5, "low": 0.25, "high": 0.75}, "dice": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    found = results.collected(tmp_path)
    assert found["val"] == {"value": 0.75, "epoch": 2}
    assert found["test"] == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 42}
    assert found["data"] == "horses"
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "part": "val"}))
    assert results.collected(tmp_path)["test"] is None


@pytest.mark.parametrize("path", sorted((ROOT / "tests/bench/results").glob("*.json")), ids=lambda path: path.stem)
def test_every_collected_file_is_shown(path: Path) -> None:
    assert path.stem in {*results.EXPERIMENTS, *results.LESSONS}
