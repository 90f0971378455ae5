"""Commands that are killed, stopped or out of disk at any moment and given again leave what they leave undisturbed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, and pipes sized, as on Linux")
def test_what_was_ended_at_twenty_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "tests/bench/kill.py", "--moments", "20", "--json", str(tmp_path / "moments.json")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    moments = json.loads((tmp_path / "moments.json").read_text())
    assert len(moments) == 20
    assert not [each for each in moments if each["differs"]], answer.stdout
    assert len({each["command"] for each in moments}) == 8
    for kind in ("kills", "at_rename", "stops", "full_disks"):
        assert sum(each[kind] for each in moments) > 0, answer.stdout
