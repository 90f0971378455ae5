"""cvlab.page.record: what a folder tells of its model, and that nothing of a stranger's folder becomes HTML."""

import json
import os
from pathlib import Path

import pytest

from cvlab.data import shapes
from cvlab.page.record import record_panel

ROOT = Path(__file__).resolve().parents[1]
MARK = "<img src=x onerror=alert(1)>"


def test_a_shipped_model_tells_scores_curves_training_data_and_card() -> None:
    shown = record_panel(ROOT / "checkpoints" / "shapes-classifier")
    metrics = json.loads((ROOT / "checkpoints" / "shapes-classifier" / "metrics.json").read_text())
    assert f"{metrics['accuracy']['value']:.4f}" in shown
    assert "python train/classifier.py" in shown
    assert 'alt="Confusion matrix' in shown
    assert "cannot be shown" not in shown


def test_curves_are_drawn_from_the_history_where_the_report_has_none(tmp_path: Path) -> None:
    line = {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "train_iou": 0.5, "val_iou": 0.5}
    (tmp_path / "history.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'epoch': 2})}\n")
    assert "Loss and score" in record_panel(tmp_path)


@pytest.mark.parametrize("text", [MARK, "{}", "[]", '{"cvlab": 1}', '{"n": NaN, "part": []}', "[" * 10**5, "\0", '"x"'])
def test_whatever_a_stranger_writes_stays_text(tmp_path: Path, text: str) -> None:
    for name in ("metrics.json", "manifest.json", "config.json", "history.jsonl", "README.md"):
        (tmp_path / name).write_text(text)
    assert "<img src=x" not in record_panel(tmp_path)


def test_names_are_escaped_and_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "report").mkdir(parents=True)
    shapes.scene(1, 32).image.save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret words")
    os.symlink(tmp_path / "secret.txt", folder / "README.md")
    os.symlink(tmp_path / "secret.png", folder / "report" / "a.png")
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    (folder / "metrics.json").write_text(json.dumps({"part": MARK, "n": 3, MARK: score}))
    shown = record_panel(folder)
    assert "secret words" not in shown
    assert "data:image" not in shown
    assert "<img" not in shown
    assert "0.4000 to 0.6000" in shown
