"""What the READMEs say is so: their figures, their snippet, their commands, their links and the tree of files."""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from cvlab.data import shapes
from cvlab.explain import grad_cam

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "train/recipes/README.md", "tests/bench/README.md", ".github/CONTRIBUTING.md")
LINKING = (*PAGES, ".github/CHANGELOG.md", ".github/SECURITY.md")

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import readme
import results


def test_the_table_of_models_is_what_the_files_beside_the_weights_say() -> None:
    assert readme.inserted(README) == README


def test_the_comparison_with_the_reports_is_what_the_collected_figures_say() -> None:
    page = (ROOT / "train/recipes/README.md").read_text()
    assert results.inserted(page) == page


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


def test_it_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 130


def test_every_figure_of_the_comparison_is_in_a_table_that_it_links_to() -> None:
    claims = README.split("## How it compares")[1].split("\n## ")[0].split("\n- ")[1:]
    for claim in claims:
        (link,) = re.findall(r"\]\(([^)#]+)", claim)
        rows = [line for line in (ROOT / link).read_text().splitlines() if line.startswith(("|", "**"))]
        figures = re.findall(r"\d+\.\d+|\d+%|\d+ of \d+", claim)
        assert figures
        assert not [figure for figure in figures if not any(figure in row for row in rows)], claim


def files_of_the_tree() -> set[Path]:
    """Every file that the tree names, under the folder that its line stands in."""
    tree = README.split("## Layout")[1].split("```")[1]
    folders: list[tuple[int, Path]] = [(-1, Path())]
    named = set()
    for line in tree.strip("\n").splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [(column, folder) for column, folder in folders if column < indent]
        if opened := re.match(r"([\w.]+)/", line.lstrip()):
            folders.append((indent, folders[-1][1] / opened[1]))
        named |= {folders[-1][1] / name for name in re.findall(r"(?<![/.])\b\w+\.(?:py|css|js)\b", line)}
    return named


def test_the_tree_names_the_files_that_are_there() -> None:
    there = {path.relative_to(ROOT) for folder in ("cvlab", "train") for path in (ROOT / folder).rglob("*.*")}
    there = {path for path in there if path.suffix in (".py", ".css", ".js") and path.name != "__init__.py"}
    assert files_of_the_tree() == {Path("app.py"), *there}


def anchors(page: Path) -> set[str]:
    """The links to a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKING)
def test_every_link_leads_to_a_file_and_its_heading(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def commands(name: str) -> list[str]:
    """The commands with a script of ours in a page, of its blocks and of its text, without their comments."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    blocks = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S).replace("\n", " "))
    lines = [re.sub(r"\s#.*", "", line) for line in blocks + inline]
    return [line for line in lines if re.match(r"(python|pytest|torchrun) ", line)]


@cache
def options(script: str) -> set[str]:
    """The options in a script's --help. It is imported here, as a process of its own would import torch again."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    printed, before = io.StringIO(), (sys.argv, list(sys.path))
    sys.argv = [script, "--help"]
    sys.path.insert(0, str(path.parent))
    try:
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            module.main()
    finally:
        sys.argv, sys.path[:] = before
        del sys.modules[spec.name]
    return set(re.findall(r"(?<![\w-])--[\w-]+", printed.getvalue()))


@pytest.mark.parametrize("name", PAGES)
def test_every_command_has_options_that_its_script_knows(name: str) -> None:
    found = commands(name)
    assert found
    for command in found:
        words = shlex.split(command.replace("[", "").replace("]", "").split("&&")[-1])
        scripts = [word for word in words if word.endswith(".py") and "::" not in word]
        assert all((ROOT / word).is_file() for word in scripts), command
        if words[0] == "pytest":
            continue
        (script,) = scripts
        own, _, passed_on = " ".join(words[words.index(script) + 1 :]).partition(" -- ")
        for part, owner in ((own, script), (passed_on, f"train/{own.split()[0]}.py" if passed_on else "")):
            given = set(re.findall(r"(?:^| )(--[\w-]+)", part))
            assert not given or given <= options(owner), command
        for recipe in re.findall(r"--recipe (\S+)", own):
            assert (ROOT / f"train/recipes/{recipe}.toml").is_file(), command


def test_the_changes_that_contributing_shows_fit_the_files() -> None:
    changes = re.findall(r"```diff\n(.*?)```", (ROOT / ".github/CONTRIBUTING.md").read_text(), re.S)
    assert len(changes) == 3
    for change in changes:
        subprocess.run(["git", "apply", "--check", "--recount", "-"], input=change, text=True, cwd=ROOT, check=True)


def test_the_network_that_contributing_shows_is_one() -> None:
    (code,) = re.findall(r"```python\n(\"\"\"Two.*?)```", (ROOT / ".github/CONTRIBUTING.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    model = names["Shallow"](3, (4, 8))
    images = torch.rand(2, 3, 16, 16)
    assert model(images).shape == (2, 3)
    _, attribution = grad_cam(model.eval(), images)
    assert attribution.shape == (2, 1, 4, 4)


def test_every_promise_about_security_has_its_test() -> None:
    promises = (ROOT / ".github/SECURITY.md").read_text().split("\n## What is not promised")[0].split("\n- ")[1:]
    for promise in promises:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
        assert tests, promise
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), f"{file}::{name}"
