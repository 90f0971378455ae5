"""Three hundred inputs of the fuzzer: a result or a sentence answers each, within limits of time and memory."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

fuzz = pytest.importorskip("fuzz")
EXAMPLES = 300

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return fuzz.Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_input_is_answered_or_refused_in_a_sentence(bench, kind):
    found = fuzz.fuzz(kind, bench, EXAMPLES // len(fuzz.KINDS), 0)
    assert found["faults"] == []
    assert found["inputs"] > 0
    assert kind in fuzz.page_of([found])


def test_a_fault_is_noticed():
    assert fuzz.fault_of(KeyError("mean"))
    assert fuzz.fault_of(MemoryError())
    assert fuzz.fault_of(ValueError("math domain error\nat 0x7f"))
    assert not fuzz.fault_of(ValueError("The picture is too large: make it smaller."))
