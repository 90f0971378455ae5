"""Writes files and folders whole or not at all, and reads and writes JSON."""

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how the text begins that git leaves for a file not fetched
NOT_FETCHED = (
    "is a Git LFS pointer, not the file itself: run `git lfs install` and `git lfs pull` there, or download it."
)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # or a limit was reached


def make_folder(path: Path) -> None:
    """Makes a folder that a command will write to. Where that cannot be done it raises OSError, before other work."""
    if str(path).splitlines() != [str(path)]:
        raise OSError(errno.EINVAL, "A name with a line end cannot be printed", str(path))
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and then renames it to `path`; after an error it is deleted.

    So a reader sees the old file or the new one, never half of it. The temporary name is nobody else's: threads and
    machines may write one file at once, and the last one wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield writing
        with open(writing, "rb") as written:
            os.fsync(written.fileno())
        os.replace(writing, path)
    except OSError as error:
        error.filename = str(path)  # a failed write names no file
        raise
    finally:
        writing.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with whole_file(path) as writing:
        try:
            writing.write_bytes(content)
        except OSError as error:
            if error.errno in DISK_IS_FULL:
                error.strerror += f", {len(content) / 1e6:.2f} MB are needed"
            raise


def write_text(path: str | Path, content: str) -> None:
    """`write_bytes` of UTF-8 text. The bytes of a file's name that are no UTF-8 are written as \\udc80 to \\udcff."""
    write_bytes(path, content.encode("utf-8", "backslashreplace"))


def to_json(value: object, indent: int | None = None) -> str:
    """JSON, with null for NaN and infinity: JSON has no word for them, and other readers refuse Python's."""

    def finite(each: object) -> object:
        if isinstance(each, dict):
            return {key: finite(item) for key, item in each.items()}
        if isinstance(each, list | tuple):
            return [finite(item) for item in each]
        return None if isinstance(each, float) and not math.isfinite(each) else each

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def read_json(path: str | Path) -> dict:
    """The object in a JSON file; {} where there is no file, ValueError with its name where it is not valid."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error


class Kept(dict):
    """Results by name, of what JSON can hold, in a file that is written as each is made; of another `key` none.

    Of several processes only the one that `writes` does so.
    """

    def __init__(self, path: Path, key: str, writes: bool = True) -> None:
        found = read_json(path)
        super().__init__(found if found.get("key") == key else {"key": key})
        self.path, self.writes = path, writes

    def of(self, name: str, make: Callable[[], object]) -> object:
        """The result of this name, made if it is not there."""
        if name not in self:
            self[name] = make()
            if self.writes:
                write_text(self.path, json.dumps(self))
        return self[name]


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to fill, and then renames it to `path`; after an error it is deleted."""
    path = Path(path)
    filling = beside(path)
    shutil.rmtree(filling, ignore_errors=True)
    filling.mkdir(parents=True)
    try:
        yield filling
        for file in filling.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(filling, path)
    finally:
        shutil.rmtree(filling, ignore_errors=True)


def beside(path: Path) -> Path:
    """The temporary folder of `new_folder`."""
    return path.with_name(f".{path.name}.tmp")


def printable(text: str) -> str:
    """A text with ? in place of characters that nobody sees, or that would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
