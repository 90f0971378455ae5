"""Processes of torchrun take turns with the batches of a part, and write the bytes that one process writes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import colours, discs

from cvlab import checkpoint
from cvlab.data.parts import classification_parts, segmentation_parts
from cvlab.models import build

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
LEFT_OUT = "test_reads.jsonl"  # holds the time


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By task the folders of a network with random weights and of its data: more than one batch in each part."""
    folder, saved = tmp_path_factory.mktemp("share"), {}
    torch.manual_seed(0)
    pictures, photos = colours(folder / "colours", each=130), discs(folder / "discs", count=230)
    model = build("convnet", ["blue", "red"], 16, {"widths": [4, 8]})
    checkpoint.save(model, folder / "classifier", data=classification_parts(pictures).facts)
    model = build("unet", ["disc"], 16, {"width": 4, "depth": 1})
    checkpoint.save(model, folder / "segmenter", data=segmentation_parts(photos).facts)
    saved["classifier"], saved["segmenter"] = (folder / "classifier", pictures), (folder / "segmenter", photos)
    return saved


@pytest.mark.parametrize(("script", "task"), [("evaluate", "segmenter"), ("audit", "classifier")])
def test_two_processes_write_the_bytes_of_one(models, script: str, task: str, tmp_path: Path) -> None:
    folder, data = models[task]
    written = []
    for several in ([], TORCHRUN):
        out = tmp_path / str(len(several))
        words = [*several, f"train/{script}.py", str(folder), "--data", str(data), "--out", str(out)]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        files = (path for path in out.rglob("*") if path.is_file() and path.name != LEFT_OUT)
        written.append({path.relative_to(out).as_posix(): path.read_bytes() for path in files})
    one, two = written
    assert len(one) >= 3
    assert one == two
