"""cvlab.memory: what a server's threads freed is not kept by each of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Threads that live on, each of which asks for 16 MiB in small pieces and frees them, one after the other.
CODE = """
import sys, threading
sys.path.insert(0, {root!r})
from cvlab import memory
{setting}
import numpy as np

def work():
    pieces = [np.ones(1024, np.uint8) for _ in range(16 * 1024)]
    kept.append(np.ones(1024, np.uint8))  # at the end of the block, so that it is not given back
    pieces.clear()
    freed.release()
    done.wait()

kept, freed, done = [], threading.Semaphore(0), threading.Event()
for _ in range(12):
    threading.Thread(target=work).start()
    freed.acquire()
status = open("/proc/self/status").read()
done.set()
print(int(status.split("VmRSS:")[1].split()[0]) // 1024)
"""


def resident(setting: str) -> int:
    """MiB of a process with this setting after its threads freed what they had."""
    code = CODE.format(root=str(ROOT), setting=setting)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_threads_that_share_arenas_keep_less_of_what_they_freed():
    assert resident("memory.share_arenas()") < 0.6 * resident("")
