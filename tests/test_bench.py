"""The benchmarks run, and say something of everything that they measure. What they measure is not asserted here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import conformance
import explain
import page
import space
import tables
import torch
import verdict

from cvlab.models import build


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "tests" / "bench" / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def rows(text):
    return [
        line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("| ")
    ]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_explanations_are_timed(tmp_path):
    text = run("explain.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    for found in [*figures["times"].values(), *(batch["times"] for batch in figures["batches"].values())]:
        ratios = explain.ratios(found)
        assert list(ratios) == list(explain.CONTENDERS)
        assert all(math.isfinite(ratio) and ratio > 0 for values in ratios.values() for ratio in values)
        assert ratios[explain.FORWARD] == [1.0, 1.0]
    assert 0 < figures["bf16"] < 1
    assert all(0 < value["loaded"] <= value["peak"] for found in figures["memory"].values() for value in found.values())
    names = [row[0] for row in rows(text)]
    assert names.count("cvlab, fused") == 2
    assert names.count("cvlab") == 3
    for name in explain.QUICK:
        assert text.count(f"| {name}, ") == (4 if name in figures["memory"] else 2)


def test_the_tables_stand_between_their_marks():
    figures = {
        "hardware": "abacus, 2 threads",
        "versions": {"torch": "2"},
        "times": {"net": {key: [1.0, 2.0, 4.0] for key in explain.CONTENDERS}},
        "batches": {"net": {"batch": 4, "times": {key: [0.5, 0.5] for key in explain.CONTENDERS}}},
        "memory": {"net": {explain.FORWARD: {"loaded": 10, "peak": 20}, "cvlab": {"loaded": 10, "peak": 35}}},
        "bf16": 0.5,
    }
    figures["times"]["net"]["cvlab"] = [3.0, 4.0, 4.0]  # of forward passes that took 1, 2 and 4 seconds
    before = f"a\n<!-- {explain.MARK} -->\nearlier tables\n<!-- /{explain.MARK} -->\nb\n"
    once = tables.inserted(before, explain.MARK, explain.page(figures))
    assert tables.inserted(once, explain.MARK, explain.page(figures)) == once
    assert once.startswith("a\n")
    assert once.endswith("b\n")
    assert "earlier tables" not in once
    forward, ours = ([row for row in rows(once) if row[0] == name] for name in (explain.FORWARD, "cvlab"))
    assert [row[1:] for row in forward] == [["2000.0 ms"], ["8.00 (8.00 to 8.00)"], ["10 MiB", "20 MiB"]]
    assert [row[1:] for row in ours] == [["2.00 (1.50 to 2.50)"], ["8.00 (8.00 to 8.00)"], ["2.50", "1.75"]]


def test_families_of_timm_are_examined(tmp_path):
    path = tmp_path / "lines.jsonl"
    arguments = ["--modules", "selecsls", "pit", "--json", str(path)]
    first = run("conformance.py", *arguments)
    assert [row[0] for row in rows(first)[2:]] == ["selecsls", "pit"]
    assert all(row[-1] == "equal" for row in rows(first)[2:])
    assert "2 of 2** modules" in first
    assert "Of 2 networks **" in first
    assert all(float(row[5]) < 16 for row in rows(first)[2:])  # half a cell: as maps were stretched over the view
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert run("conformance.py", *arguments) == first  # goes on where it was stopped
    assert len(path.read_text().splitlines()) == 2


def test_a_module_that_fails_is_named_with_its_reason():
    line = {"module": "m", "network": "n", "pixels": 64, "stages": [], "difference": None, "reason": "no map"}
    assert conformance.cells(line) == ["m", "n", 64, 0, "", "", "", "no map"]
    good = {"module": "g", "network": "h", "pixels": 64, "stages": ["a", "b"], "difference": 2e-7, "reason": ""}
    text, _, failed = conformance.summary([good, line]).split("\n")
    assert text.startswith("**1 of 2**")
    assert "(2 in all)" in text
    assert failed == "- m (n): no map"


def test_the_page_is_timed(tmp_path):
    text = run("page.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    (times,) = figures["upload"].values()
    assert {key: len(each) for key, each in times.items()} == {"page": 3, "identity": 3, "pass": 3}
    assert all(ratio > 0 for ratio in page.upload_ratios(times))
    assert [[len(each) for each in crowds] for crowds in figures["crowd"].values()] == [[figures["clients"]]]
    assert all(mib > 50 for mib in figures["memory"].values())
    ways = ["in Chromium", "over HTTP"] if page.CHROMIUM else ["over HTTP"]
    first = ["model", "---", *["shapes-classifier"] * len(ways), "model", "---", "shapes-classifier"]
    assert [row[0] for row in rows(text)] == [*first, "photos", "---", "MiB"]
    assert [row[1] for row in rows(text)[2 : 2 + len(ways)]] == ways


def test_a_shift_is_found():
    """A grid that is 5 pixels off, right and down, in a view of 64, is 5 * 224 / 64 pixels off at 224."""
    torch.manual_seed(0)
    model = conformance.positive(build("convnet", ["a", "b"], 64, {"widths": [4, 8]}).eval())
    assert conformance.shift(model, 64) < conformance.AIM
    module = model.stages["stage2"].module
    module.grid = module.grid._replace(offset=module.grid.offset + 5)
    off = conformance.shift(model, 64)
    assert math.isclose(off, math.hypot(5, 5) * 224 / 64, abs_tol=conformance.AIM)


def test_the_page_is_held_against_what_it_should_be():
    assert page.upload_ratios({"page": [3.0, 1.0], "identity": [1.0, 0.5], "pass": [0.5, 0.5]}) == [2.0, 1.0]
    ideal = [0.2 * (i + 1) for i in range(32)]
    assert math.isclose(page.crowd_ratio([ideal, ideal], 0.2), 1.0, rel_tol=0.02)
    assert math.isclose(page.crowd_ratio([[2 * each for each in ideal]], 0.2), 2.0, rel_tol=0.02)


def test_verdicts_are_counted_by_model_and_by_kind_of_map(tmp_path):
    path = tmp_path / "lines.jsonl"
    text = run("verdict.py", "--quick", "--json", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["set"], line["picture"]) for line in lines] == [(name, 0) for name in verdict.QUICK]
    assert all(abs(each) <= 1 for line in lines for found in line["maps"].values() for each in found[:3])
    assert "A verdict takes 44 pictures, each further map 10." in text
    kinds = [row[0] for row in rows(text)]
    assert all(kinds.count(kind) >= 1 for line in lines for kind in line["maps"])
    sets = [f"{name}={ROOT / where}" for name, where in verdict.QUICK.items()]
    assert list(verdict.collect(sets, 1, 0, lines)) == []  # what is known is not done again


def test_shares_of_verdicts_are_counted_by_hand():
    rows = [("a", 0.5, "believable"), ("a", 0.7, "doubtful"), ("b", 0.1, "believable"), ("b", 0.3, "believable")]
    assert verdict.share(rows, "confirmed", "believable") == "50% (50% to 50%) of 2"
    assert verdict.share(rows, "refuted", "believable") == "100% (100% to 100%) of 1"
    assert verdict.share(rows, "confirmed", "doubtful", verdict.CLEARLY) == "100% (100% to 100%) of 1"
    assert verdict.area([0.5, 0.1, 0.3], [1.0, 0.0, 2.0]) == "1.000"


def test_refusing_the_unknown_is_measured(tmp_path):
    text = run("unknown.py", "--quick", "--json", str(tmp_path / "figures.json"))
    (found,) = json.loads((tmp_path / "figures.json").read_text()).values()
    assert [row[0] for row in rows(text)[2:]] == list(found)
    for by_group in found.values():
        assert by_group.keys() == {"test", "noise"}
        assert by_group["noise"]["n"] == 12
        for each in by_group.values():
            assert 0 <= each["low"] <= each["refused"] <= each["high"] <= 1
        assert 0 <= by_group["noise"]["area"] <= 1
    assert found["**kept in the folder**"]["noise"]["refused"] == 1


def test_a_licence_is_permissive_if_all_its_parts_are():
    good = ("MIT", "BSD-3-Clause AND (0BSD OR GPL-2.0)", "Apache-2.0 WITH LLVM-exception", "Apache Software License")
    bad = ("MPL-2.0 AND MIT", "LicenseRef-NVIDIA-Proprietary", "LGPL-3.0", "BSD License AND Other/Proprietary License")
    assert all(map(space.permissive, good))
    assert not any(map(space.permissive, bad))


def test_a_space_whose_packages_have_no_licence_or_another_one_is_told():
    packages = [("a", "MIT", True), ("b", "", True), ("c", "GPL-3.0", True), ("cuda", "NVIDIA", False)]
    keys = ("name", "licence", "in_space")
    figures = {
        "hardware": "abacus, 2 threads",
        "python": "3.11",
        "install_seconds": 60.0,
        "start_seconds": 5.0,
        "peak_mb": 700.0,
        "answers": {"a": {"seconds": 1.0, "difference": 1e-7}, "b": {"seconds": 2.0, "difference": None}},
        "installed": [dict(zip(keys, each, strict=True)) | {"version": "1", "bytes": 1e6} for each in packages],
    }
    text = space.summary(figures)
    assert "name no licence: b. Not permissive: c (GPL-3.0)." in text
    assert [row[1:] for row in rows(text)[2:4]] == [["4", "4"], ["3", "3"]]
    assert [row[4:] for row in rows(space.licences(figures))[2:]] == [
        ["permissive", ""],
        ["missing", ""],
        ["not permissive", ""],
        ["not permissive", "not in a Space"],
    ]
