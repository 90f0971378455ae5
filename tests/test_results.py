"""The comparison with the reports: each kind of row from figures whose answer is known, and what a run leaves."""

import json
import sys
import tomllib
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


def test_another_backbone_than_the_recipes_is_named() -> None:
    found = {"score": "accuracy", "val": {"value": 0.625, "epoch": 3}, "test": TEST, "data": "scenes8"}
    other = MANIFEST | {"command": "python train/transfer.py --backbone vgg11 --data DIR", "started_from": None}
    (row,) = results.rows_of("scenes8-resnet18-head", {**found, "manifest": other})
    assert cells(row)[4].endswith("; **vgg11 stands in for resnet18**")
    (row,) = results.rows_of("scenes8-transfer", {**found, "manifest": other})  # not of a report
    assert "stands in" not in row


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
    assert results.scores_of(rows, {"lr": "0.1"}) == {"0": 0.5, "1": 0.7}
    assert results.scores_of(rows, {"lr": "0.1", "dropout": "0.5"}) == {"0": 0.9}


def test_differences_are_those_of_the_same_seed() -> None:
    assert results.differences({"0": 0.5, "1": 0.8}, {"1": 0.7, "0": 0.7, "2": 0.1}) == "-0.050 (-0.200 to +0.100)"
    assert results.differences({"0": 0.5}, {"0": 0.5}) == ""


def test_every_lesson_is_a_run_of_its_recipe() -> None:
    """The options by which the figures are found are those that train/recipes/ lists."""
    sys.path.insert(0, str(ROOT / "train"))
    import sweep_plan

    for name, changes in results.SWEEPS.items():
        recipe = tomllib.loads((results.RECIPES / f"{name}.toml").read_text())
        ranges = dict(word.split("=") for word in recipe["options"]["over"])
        listed = [{key: sweep_plan.as_text(value) for key, value in row.items()} for row in recipe.get("runs", [])]
        (other,) = [key for key in ranges if key != "seed"] or [""]
        listed = listed or [{other: value} for value in ranges[other].split(",")]
        assert [change.options for change in changes] == [{k: v for k, v in row.items() if v} for row in listed]


def test_the_time_of_a_recipe_is_that_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """9 pictures in batches of 4 are two steps an epoch. Parameters of a U-Net of width 2 and depth 1 by hand:
    convolutions 3-2-2, 2-4-4, transposed 4-2, convolutions 4-2-2, 1x1 to one channel.
    """
    convolutions = sum(9 * a * b + b for a, b in ((3, 2), (2, 2), (2, 4), (4, 4), (4, 2), (2, 2)))
    (tmp_path / "small.toml").write_text("""
        script = "segmenter"
        [options]
        class_names = ["disc"]
        width = 2
        depth = 1
        batch_norm = false
        image_size = 32
        batch_size = 4
        epochs = 3600
        optimizer = "adam"
        lr = 1e-3
        weight_decay = 0
        loss = "bce"
    """)
    monkeypatch.setattr(results, "RECIPES", tmp_path)
    figures = results.timed("small", 9, 1)["timed"]
    assert figures["parameters"] == convolutions + (4 * 4 * 2 + 2) + 3
    assert figures["hours"] == pytest.approx(2 * figures["seconds_a_step"], rel=0.01)


def test_pairs_are_shown_where_both_were_measured(tmp_path: Path) -> None:
    for name, value in (("flowers5-cvlab", 0.5), ("flowers5-transfer", 0.75)):
        figures = {"measured": f"2026-01-{20 * value:02.0f}", "test": {**TEST, "value": value}}
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    assert "Measured on 2026-01-10 to 2026-01-15." in results.learned(tmp_path)
    (line,) = [line for line in results.learned(tmp_path).splitlines() if "0.750" in line]
    assert cells(line)[1:3] == ["flowers5-cvlab 0.500", "flowers5-transfer 0.750"]


def test_a_run_folder_is_collected_without_its_photographs(tmp_path: Path) -> None:
    lines = [{"epoch": i, "val_iou": iou} for i, iou in enumerate((0.5, 0.75, 0.25), start=1)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "manifest.json").write_text(
        json.dumps({**MANIFEST, "best_epoch": 3, "finished": "2026-01-05T10:00:00Z"})
    )
    block = {"network": "unet", "data": {"name": "horses", "fingerprints": {"train": ["a"]}}, "image_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({"cvlab": block}))
    metrics = {"part": "test", "n": 42, "iou": {"value": 0.5, "low": 0.25, "high": 0.75}, "dice": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    found = results.collected(tmp_path)
    assert found["measured"] == "2026-01-05"
    assert found["val"] == {"value": 0.25, "epoch": 3}
    assert found["test"] == {"value": 0.5, "low": 0.25, "high": 0.75, "n": 42}
    assert found["data"] == "horses"
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "part": "val"}))
    assert results.collected(tmp_path)["test"] is None


@pytest.mark.parametrize("path", sorted((ROOT / "tests/bench/results").glob("*.json")), ids=lambda path: path.stem)
def test_every_collected_file_is_shown(path: Path) -> None:
    assert path.stem in {*results.EXPERIMENTS, *results.SWEEPS}
