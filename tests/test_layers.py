"""Who may import whom: app and train on top of cvlab and apart from each other, and cvlab from below to above."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "app.py"
TRAIN = sorted((ROOT / "train").glob("*.py"))
CVLAB = sorted((ROOT / "cvlab").rglob("*.py"))
SHARED = {"options", "running"}  # by the scripts
SCRIPTS = {path.stem for path in TRAIN} - SHARED | {"app", "train"}
# A module of cvlab imports only what stands before it.
ORDER = [
    "__init__",
    "atomic",
    "memory",
    "page",
    "cache",
    "fetch",
    "page.shelf",
    "shapes",
    "transforms",
    "batches",
    "copies",
    "losses",
    "metrics",
    "calibration",
    "optim",
    "models.stage",
    "models.convnet",
    "models.plain",
    "models.residual",
    "models.unet",
    "models.transfer",
    "models.heads",
    "models.resnet_unet",
    "models",
    "features",
    "regions",
    "traceless",
    "fold",
    "explain",
    "dependence",
    "contributions",
    "crosschecks",
    "page.question",
    "trust",
    "maps",
    "diagnose",
    "render",
    "page.unzip",
    "page.many",
    "claims",
    "page.style",
    "page.figures",
    "page.answers",
    "page.panels",
    "page.snippet",
    "report",
    "data",
    "hub",
    "checkpoint",
    "card",
    "page.record",
    "page.offer",
    "page.desk",
    "page.tabs",
    "page.examples",
]


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


def module(name):
    """The longest prefix of a dotted name within cvlab that is a module: models.stage.Stage -> models.stage."""
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in ORDER)


@pytest.mark.parametrize("path", [APP, *TRAIN], ids=lambda path: path.name)
def test_app_and_scripts_never_import_each_other(path):
    if path.exists():
        assert not packages(path) & SCRIPTS


@pytest.mark.parametrize("path", CVLAB, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cvlab_imports_only_what_is_below(path):
    assert not packages(path) & (SCRIPTS | SHARED | {"gradio", "argparse"})
    name = ".".join(path.relative_to(ROOT / "cvlab").with_suffix("").parts).removesuffix(".__init__")
    assert name in ORDER, f"give {name} its place in ORDER"
    used = {module(found.removeprefix("cvlab.")) for found in imports(path) if found.startswith("cvlab.")}
    assert not [other for other in used if ORDER.index(other) >= ORDER.index(name)]


def test_only_the_page_imports_gradio():
    others = [path for path in (*ROOT.glob("*.py"), *TRAIN, *CVLAB) if path != APP]
    assert not [path for path in others if "gradio" in packages(path)]


def test_no_module_has_a_name_that_says_nothing():
    stems = {path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"), *TRAIN, *CVLAB)}
    assert not stems & {"utils", "engine", "base", "manager", "common", "helpers"}
