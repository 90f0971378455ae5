"""The folder of a run: who trains there, and what is in it already. RUN/state/lock is locked while a process does."""

import atexit
import fcntl
import os
import platform
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from resume import check_options, newest_whole, saved_states

from cvlab.checkpoint import hub

# What tells of the model of a folder. The record of when the test part was read is none of it: it stays.
OF_A_MODEL = ("report", *(name for name in hub.FILES if name != "README.md"))

_held: dict[Path, BinaryIO] = {}  # run folder: its lock


def open_run(args: Namespace) -> Path | None:
    """Makes the run folder and holds it for this process. What is in it stays until a better model is there.

    Returns the saved state that --resume continues from; None to start at the beginning.
    """
    out, states, first = args.out, args.out / "state", int(os.environ.get("RANK", 0)) == 0  # of several processes
    out.mkdir(parents=True, exist_ok=True)
    if first and states.is_dir():
        hold(out)  # who trains there is said before what is there
    made = [name for name in OF_A_MODEL if (out / name).exists()] + [path.name for path in saved_states(out)]
    if args.resume and "model.safetensors" in made and not states.is_dir():  # a shipped or published one
        raise ValueError(f"{out} holds a model without a saved state: it cannot be resumed.")
    if made and not args.resume and not args.overwrite:
        raise ValueError(f"{out} holds {', '.join(made)}: choose another --out, or give --resume or --overwrite.")
    if first:
        states.mkdir(exist_ok=True)
        hold(out)
        delete(out.rglob(".*.tmp"))  # of a run that was killed while it wrote
    state = newest_whole(out) if args.resume else None
    if state:
        check_options(args, state)
    return state


def delete(paths: Iterable[Path]) -> None:
    """Deletes files and folders; those that are not there are no error."""
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def hold(out: Path) -> None:
    """Locks a run folder; ValueError if another process has it. The system takes the lock of one that died."""
    if out in _held:
        return
    lock = open(out / "state" / "lock", "a+b", buffering=0)  # noqa: SIM115  open while the process trains
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().decode()
        raise ValueError(f"{holder} trains in {out}: wait until it has ended, or choose another --out.") from None
    except OSError:  # some network folders have no locks
        pass
    _held[out] = lock
    lock.truncate(0)
    lock.write(f"Process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},".encode())


@atexit.register
def release() -> None:
    """Gives back the run folders that this process holds."""
    for lock in _held.values():
        with lock, suppress(OSError):
            lock.truncate(0)
            lock.write(b"Another process")  # what is read before the next one has signed
    _held.clear()
