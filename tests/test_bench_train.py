"""The benchmarks of training and of copies run, and say something of everything that they measure."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from cvlab.data import shapes

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import tables

import train


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "tests" / "bench" / script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_trainings_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    text = run("train.py", "--quick", "--json", path)
    figures = json.loads(path.read_text())
    for part, contenders in train.CONTENDERS.items():
        for found in figures[part].values():
            assert list(found) == list(contenders)
            walls = [wall for each in found.values() for wall in train.walls(each)]
            assert all(math.isfinite(wall) and wall > 0 for wall in walls)
            assert all(0 < each["memory"]["loaded"] <= each["memory"]["peak"] for each in found.values())
    (memory,) = figures["memory"].values()
    assert memory["cvlab"]["memory"]["cache"] > 0
    shown = rows(text)
    assert all(name in shown for part in ("epochs", "loaders") for name in train.CONTENDERS[part])


def test_the_tables_stand_between_their_marks() -> None:
    def found(seconds: dict[str, list[float]], **memory: float) -> dict:
        return {
            name: {
                "rounds": [{"seconds": each, "note": "bf16"} for each in seconds.get(name, [2.0, 4.0])],
                "memory": {"loaded": 100, "peak": 130, "cache": 20},
            }
            for part in train.CONTENDERS.values()
            for name in part
        }

    figures = {
        "hardware": "abacus, 2 threads",
        "versions": {"torch": "2"},
        "epochs": {"net": found({"plain": [4.0, 8.0], "cvlab": [1.0, 3.0]})},
        "loaders": {"64 px": found({"plain": [4.0, 8.0], "cvlab": [0.5, 0.5]})},
        "frozen": {"net": found({"plain": [8.0, 8.0], "cvlab": [1.0, 1.0]})},
        "memory": {"net": found({})},
        "trainings": {
            "photos": "flowers",
            "n": 10,
            "plain": [{"accuracy": 0.5, "cpu": 10}, {"accuracy": 0.6, "cpu": 10}],
            "cvlab": [{"accuracy": 0.6, "cpu": 4}, {"accuracy": 0.5, "cpu": 6}],
        },
    }
    once = tables.inserted("a\n<!-- m -->\nearlier tables\n<!-- /m -->\nb\n", "m", train.page(figures))
    assert tables.inserted(once, "m", train.page(figures)) == once
    assert once.startswith("a\n")
    assert once.endswith("b\n")
    assert "earlier tables" not in once
    assert rows(train.epochs_table(figures))["cvlab"] == ["0.31 (0.28 to 0.34), bf16"]
    assert rows(train.loaders_table(figures))["cvlab"] == ["512", "12.0 (10.0 to 14.0)"]  # 4 batches of 64
    assert "30 MiB, which is 0.60 of" in train.page(figures)  # of 30 and 20
    assert "8.0 (8.0 to 8.0) times as fast" in train.page(figures)
    assert "+10.0, -10.0" in train.page(figures)
    assert "took 0.50 of" in train.page(figures)


def test_planted_copies_are_counted(tmp_path: Path) -> None:
    for seed in range(10):
        shapes.scene(seed, 160).image.save(tmp_path / f"{seed}.png")
    shapes.scene(3, 160).image.save(tmp_path / "three again.jpg")
    (row,) = [cells for name, cells in rows(run("copies.py", tmp_path)).items() if name == tmp_path.name]
    assert row[:6] == ["11", "3 of 3", "2 of 2", "2 of 2", "2 of 2", "2 of 2"]
    assert row[6] == "1"
