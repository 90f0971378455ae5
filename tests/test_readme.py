"""What the README says is so: figures come from the checkpoints, the snippet runs, the front matter is a Space's."""

import re
import sys
from pathlib import Path

import yaml

from cvlab.data import shapes

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import readme
import results


def test_the_table_of_models_is_what_the_files_beside_the_weights_say() -> None:
    assert readme.inserted(README) == README


def test_the_comparison_with_the_reports_is_what_the_collected_figures_say() -> None:
    assert results.inserted(README) == README


def test_every_shipped_model_is_in_the_table() -> None:
    for config in ROOT.glob("checkpoints/*/config.json"):
        assert f"checkpoints/{config.parent.name})" in README


def test_the_snippet_runs(tmp_path: Path, monkeypatch) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    shapes.scene(4003, 256).image.save(tmp_path / "photo.jpg")
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    exec(snippet, names)
    assert list(names["every_stage"]) == list(names["model"].stages)


def test_the_front_matter_is_a_spaces_card() -> None:
    card = yaml.safe_load(README.split("---")[1])
    assert card["sdk"] == "gradio"
    assert (ROOT / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    (pinned,) = re.findall(r"gradio~=(\d+\.\d+)", (ROOT / "requirements.txt").read_text())
    assert card["sdk_version"].startswith(pinned)
    assert card["python_version"] == "3.11"


def test_every_file_that_the_plan_names_is_there() -> None:
    plan = README.split("## How the house is laid out")[1]
    for name in set(re.findall(r"\b(\w+\.py)\b", plan)) - {"__init__.py"}:
        assert list(ROOT.glob(f"**/{name}")), name
