"""The bench of the audit: what it plants into drawn scenes is found where a network uses it, and nothing else is."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvlab.files import read_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import audit as bench


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of the bench in its quick form: sticker, frame, an unused text, clean data."""
    folder = tmp_path_factory.mktemp("audit")
    run("tests/bench/audit.py", "--quick", "--out", folder)
    return folder


def run(script, *words, code=0):
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_used_marks_are_suspects_and_unused_ones_and_clean_data_are_not(out):
    rows = read_json(out / "rows.json")["rows"]
    assert [row["mark"] for row in rows] == ["sticker", "frame", "text", None]
    for row in rows:
        accused = {each["class_name"] for each in row["suspects"]}
        assert accused == ({row["class"]} if row.get("truth", 0) >= bench.USED else set())
    assert [row["truth"] >= bench.USED for row in rows[:2]] == [True, True]
    for row in rows[:2]:
        changes = [each["value"] for each in (row["suspects"][0]["removed"], row["suspects"][0]["added"]) if each]
        assert max(changes) == pytest.approx(row["truth"], abs=0.2)


def test_a_report_is_as_the_contract_has_it(out):
    found, row = read_json(out / "000/audit/audit.json"), read_json(out / "rows.json")["rows"][0]
    assert set(found["accuracy"]) == {"value", "low", "high"}
    (suspect,) = found["suspects"]
    assert {"kind", "class_name", "where", "pictures", "removed", "added", "sentence"} <= set(suspect)
    trained_on = sorted(path.name for path in (out / "000/data" / row["class"]).iterdir())
    assert set(suspect["pictures"]) <= {f"{row['class']}/{name}" for name in trained_on}
    assert len(suspect["pictures"]) >= 0.9 * 0.7 * len(trained_on)
    for effect in (suspect["removed"], suspect["added"]):
        assert effect["low"] <= effect["value"] <= effect["high"]
    for line in found["labels"]:
        assert set(line) == {"file", "label", "likely"}
        assert line["file"].startswith(line["label"] + "/")
    assert Image.open(out / "000/audit/audit/suspect-1.png").size[0] > 200
    page = (out / "000/audit/audit/mistakes.html").read_text()
    assert page.count("<figure>") > 0
    assert "http" not in page.replace("http-equiv", "")


def test_clean_paints_the_marks_over_and_leaves_other_pictures_as_they_are(out, tmp_path):
    row = read_json(out / "rows.json")["rows"][0]
    run(
        "train/audit.py",
        out / "000/run",
        "--data",
        out / "000/data",
        "--out",
        tmp_path / "report",
        "--clean",
        tmp_path / "clean",
    )
    data, change, same = out / "000/data", [], []
    for path in sorted((out / "000/bare").rglob("*.png")):
        name = path.relative_to(out / "000/bare")
        bare = np.asarray(Image.open(path), float)
        if name.parts[0] != row["class"]:
            same.append((tmp_path / "clean" / name).read_bytes() == path.read_bytes())
            continue
        marked, clean = (np.asarray(Image.open(folder / name), float) for folder in (data, tmp_path / "clean"))
        mark = (marked != bare).any(2)
        change.append(np.abs(clean - marked).mean(2)[mark].mean())
        assert (clean == marked)[~mark].mean() > 0.85
    assert np.mean(same) > 0.9
    assert np.mean(change) > 30  # of 255: yellow and red are gone
    said = run("train/audit.py", out / "000/run", "--data", out / "000/data", "--clean", tmp_path / "clean", code=1)
    assert str(tmp_path / "clean") in said
    assert "Traceback" not in said


def test_the_table_counts_what_was_found():
    def row(mark, truth, effect, accused, class_name="a"):
        suspects = [{"class_name": class_name}] if accused else []
        return {"mark": mark, "truth": truth, "effect": effect, "heat": effect, "suspects": suspects, "class": "a"}

    rows = [row("corner", 0.5, 0.4, True), row("corner", 0.2, 0.0, False), row("frame", 0.01, 0.02, False)]
    rows += [row("frame", 0.07, 0.05, False), row("blurred", 0.4, 0.3, True, None)]
    rows += [
        {"mark": None, "suspects": [], "class": "a"},
        {"mark": None, "suspects": [{"class_name": "b"}], "class": "a"},
    ]
    found = bench.told(rows)
    assert (found["used"], found["unused"], found["clean"], found["others"]) == ([2, 3], [0, 1], [1, 2], [0, 5])
    assert found["area"]["effect"] == pytest.approx(2 / 3)
    assert found["by mark"]["corner"] == [1, 2]
    assert json.dumps(found)
