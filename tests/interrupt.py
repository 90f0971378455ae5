"""Ends a training script by signals at random moments, resumes it each time, and lets it finish at last.

    python tests/interrupt.py SIGKILL,SIGTERM 20 classifier --out DIR [options of the script]

The signals take turns. Every run is forked from one process that has imported everything, so that moments are seldom
spent on imports.
"""

import itertools
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401  the slow imports, made once

SCRIPTS = Path(__file__).resolve().parents[1] / "train"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]

import cli  # noqa: F401


def start(script: str, words: list[str]) -> int:
    """The process id of a fork that runs the script."""
    child = os.fork()
    if child == 0:
        sys.argv = [str(SCRIPTS / f"{script}.py"), *words]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            print(end, flush=True)
            os._exit(1 if end.code else 0)
        os._exit(0)
    return child


def main() -> None:
    names, times, script, *words = sys.argv[1:]
    signals = itertools.cycle(getattr(signal, name) for name in names.split(","))
    rng = random.Random(0)
    begun = time.time()
    os.waitpid(start(script, [*words, "--out", words[words.index("--out") + 1] + "-whole"]), 0)
    whole = time.time() - begun
    ended = 0
    for _ in range(int(times)):
        child = start(script, [*words, "--resume"])
        time.sleep(rng.uniform(0.05, 0.5) * whole)
        os.kill(child, next(signals))
        ended += os.waitpid(child, 0)[1] != 0
    _, status = os.waitpid(start(script, [*words, "--resume"]), 0)
    print(f"ended early: {ended}, at last: {status}")


if __name__ == "__main__":
    main()
