"""Who may import whom: a table of rooms, not an order of files. app.py and train/ stand apart on top of cvlab/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "app.py"
TRAIN = sorted((ROOT / "train").glob("*.py"))
CVLAB = sorted((ROOT / "cvlab").rglob("*.py"))
SHARED = {
    "accelerator",
    "calibration",
    "cli",
    "limits",
    "measure",
    "resume",
    "run",
    "run_queue",
    "sweep_plan",
    "sweep_tables",
}  # by the scripts
SCRIPTS = {path.stem for path in TRAIN} - SHARED | {"app", "train"}
# A room of cvlab/, a file or a folder, and the rooms that it may import besides its own.
ROOMS = {
    "files": set(),
    "fonts": set(),
    "memory": set(),
    "metrics": set(),
    "tiles": set(),
    "transforms": {"models", "tiles"},
    "models": {"files"},
    "learning": {"models", "files"},
    "data": {"models", "tiles", "transforms", "files"},
    "explain": {"models", "tiles"},
    "trust": {"explain", "models", "transforms"},
    "audit": {"explain", "files", "metrics", "models", "render", "transforms", "trust"},
    "plots": {"fonts"},
    "render": {"explain", "models", "transforms", "files", "fonts", "plots"},
    "checkpoint": {"models", "files"},
    "page": {
        "checkpoint",
        "data",
        "explain",
        "files",
        "memory",
        "metrics",
        "models",
        "plots",
        "render",
        "tiles",
        "transforms",
        "trust",
    },
}
OF_DATA = {"data.shapes", "data.masks"}  # all that the page takes from there: it starts without reading folders
WITH_GRADIO = {"page.api", "page.server", "page.upload"}


def imports(path):
    """Dotted names, those of `from a import b` as a.b, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: cvlab is imported by its full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def module_of(path):
    """cvlab/models/unet.py -> models.unet"""
    return ".".join(path.relative_to(ROOT / "cvlab").with_suffix("").parts).removesuffix(".__init__")


def of_cvlab(path):
    return {name.removeprefix("cvlab.") for name in imports(path) if name.startswith("cvlab.")}


@pytest.mark.parametrize("path", [APP, *TRAIN], ids=lambda path: path.name)
def test_app_and_scripts_never_import_each_other(path):
    assert not packages(path) & SCRIPTS


@pytest.mark.parametrize("path", CVLAB, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_the_rooms_that_the_table_names(path):
    assert not packages(path) & (SCRIPTS | SHARED | {"argparse"})
    room = module_of(path).split(".")[0]
    if room == "__init__":
        assert not of_cvlab(path)
        return
    assert room in ROOMS, f"give {room} its row in ROOMS"
    assert {name.split(".")[0] for name in of_cvlab(path)} <= ROOMS[room] | {room}


def test_the_table_has_no_circle():
    above, rooms = set(), dict(ROOMS)
    while rooms:
        free = {room for room, used in rooms.items() if used <= above}
        assert free, f"these import each other: {sorted(rooms)}"
        above |= free
        rooms = {room: used for room, used in rooms.items() if room not in free}


def test_the_page_needs_of_the_data_only_the_synthetic_scenes():
    used = {name for path in (APP, *(ROOT / "cvlab/page").glob("*.py")) for name in of_cvlab(path)}
    assert {".".join(name.split(".")[:2]) for name in used if name.startswith("data.")} <= OF_DATA


def test_gradio_stays_at_the_door():
    others = {module_of(path) for path in CVLAB if "gradio" in packages(path)}
    assert others <= WITH_GRADIO
    assert not [path for path in TRAIN if "gradio" in packages(path)]


def test_no_module_has_a_name_that_says_nothing():
    stems = {path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *TRAIN, *CVLAB)}
    assert not stems & {"utils", "engine", "base", "manager", "common", "helpers"}


@pytest.mark.parametrize(("folder", "most"), [(ROOT / "train", 220), (ROOT / "cvlab", 340)])
def test_a_file_can_be_read_in_one_sitting(folder, most):
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*.py")}
    assert not {path: length for path, length in lengths.items() if length > most}
