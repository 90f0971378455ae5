"""train/check.py names every planted fault of a data folder, and is silent about a sound one."""

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import check as train_check
import cli
import numpy as np
import pytest
from PIL import Image, ImageOps
from runs import discs

from cvlab.data import shapes
from cvlab.data.parts import classification_parts


def check(folder: Path, *arguments: object) -> SimpleNamespace:
    """The command in this process: importing torch would take longer than the check."""
    out, error, code = io.StringIO(), "", 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, "argv", ["train/check.py", str(folder), *map(str, arguments)])
        try:
            cli.run(train_check.main)
        except SystemExit as end:
            error, code = str(end), 1
    return SimpleNamespace(stdout=out.getvalue(), stderr=error, returncode=code)


def section(answer: SimpleNamespace, title: str) -> list[str]:
    """The lines under a title of the report."""
    assert answer.returncode == 0, answer.stderr
    return [line.strip() for line in answer.stdout.split(f"\n{title}: ")[1].split("\n\n")[0].splitlines()[1:]]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """25 scenes in each of two classes."""
    for seed in range(50):
        path = tmp_path / "data" / ("even", "odd")[seed % 2] / f"{seed:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.scene(seed, 80).image.save(path)
    return tmp_path / "data"


def test_a_sound_folder_has_no_findings(classes: Path) -> None:
    answer = check(classes)
    assert [section(answer, title) for title in ("cannot be used", "copies", "small classes")] == [[], [], []]
    assert "50 files, 50 pictures" in answer.stdout


def test_every_planted_fault_is_named(classes: Path) -> None:
    (classes / "odd" / "notes.txt").write_text("not a picture")
    (classes / "odd" / "empty.jpg").write_bytes(b"")
    whole = (classes / "even" / "00.png").read_bytes()
    (classes / "odd" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (classes / "even" / "same.png").write_bytes(whole)
    ImageOps.mirror(Image.open(classes / "even" / "02.png")).save(classes / "odd" / "mirrored.jpg")
    (classes / "none").mkdir()
    (classes / "tiny").mkdir()
    shapes.scene(99, 80).image.save(classes / "tiny" / "99.png")

    answer = check(classes, "--out", classes.parent / "sheets")
    unusable = section(answer, "cannot be used")
    assert sorted(Path(line.split(": ")[0]).name for line in unusable) == ["cut.png", "empty.jpg", "notes.txt"]
    copies = section(answer, "copies")
    assert copies == [
        "even/00.png = even/same.png",
        "even/02.png = odd/mirrored.jpg  (saved again)  ACROSS FOLDERS",
    ]
    assert section(answer, "small classes") == ["tiny: 1 pictures", "none: no picture"]
    assert Image.open(classes.parent / "sheets" / "copies.png").width > 300


def test_masks_are_checked(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for seed in range(8):
        scene = shapes.scene(seed, 48)
        scene.image.save(tmp_path / "images" / f"{seed}.png")
        mask = Image.fromarray((255 * scene.mask).astype(np.uint8))
        if seed == 3:
            mask = mask.resize((24, 24), Image.Resampling.NEAREST)
        if seed != 5:
            mask.save(tmp_path / "masks" / f"{seed}.png")
    found = section(check(tmp_path), "masks")
    assert len(found) == 2
    assert any("5.png has no mask" in line for line in found)
    assert any("masks/3.png is 24 x 24" in line for line in found)
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(tmp_path / "masks" / "3.png")
    Image.new("RGB", (48, 48), "red").save(tmp_path / "masks" / "4.png")
    (tmp_path / "masks" / "6.png").write_bytes(b"")
    Image.new("L", (48, 48)).save(tmp_path / "masks" / "nobody.png")
    faults = {
        "3.png has the values 200", "4.png is in colour", "5.png has no mask", "6.png cannot be opened",
        "masks/nobody.png belongs to no image",
    }  # fmt: skip
    found = section(check(tmp_path), "masks")
    assert len(found) == len(faults)
    assert {fault for fault in faults if any(fault in line for line in found)} == faults


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    answer = check(tmp_path / "nowhere")
    assert answer.returncode != 0
    assert "nowhere" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_check_sees_the_files_that_training_reads_and_names_the_others(classes: Path) -> None:
    """A picture is known by its content, and belongs to a class from any folder within it, but not from beside it."""
    for number, name in enumerate(("even/photo", "even/deeper/1.png", "beside.png")):
        (classes / name).parent.mkdir(exist_ok=True)
        shapes.scene(100 + number, 80).image.save(classes / name, "PNG")
    (classes / "even" / "notes.txt").write_text("no picture")
    for number in range(6, 26, 2):
        (classes / "even" / f"{number:02}.png").unlink()
    answer = check(classes)
    assert "44 files, 42 pictures" in answer.stdout
    assert {line.split(": ")[0] for line in section(answer, "cannot be used")} == {"beside.png", "even/notes.txt"}
    assert section(answer, "copies") == []
    assert section(answer, "small classes") == ["even: 17 pictures"]
    read = classification_parts(classes)
    assert sum(map(len, read.samples.values())) == 42


def test_samples_are_drawn_where_they_are_asked_for_and_depend_on_the_seed(classes: Path, tmp_path: Path) -> None:
    """Of two classes two photos each; of eight photos with masks photo, mask and overlay, six pictures in a row."""
    for number, seed in enumerate((0, 0, 1)):
        check(classes, "--out", tmp_path / str(number), "--seed", seed)
    first, again, other = ((tmp_path / str(number) / "samples.png").read_bytes() for number in range(3))
    assert first == again != other
    data = discs(tmp_path / "discs", 8)
    check(data, "--out", tmp_path / "masks")
    sizes = [Image.open(tmp_path / name / "samples.png").size for name in ("0", "masks")]
    assert sizes == [(484, 550), (1452, 1100)]  # 220 x 2 by 250 x 2, and 220 x 6 by 250 x 4, at 110 dots an inch
