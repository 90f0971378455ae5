"""Errors as sentences for those who see the page: the one place where paths of this machine become names."""

import os
import re
from pathlib import Path, PurePath

from huggingface_hub import constants

from cvlab.page.start import own_folder

ROOT = Path(__file__).resolve().parents[2]
GONE = "This photo was deleted after an hour: drop it again."
IN_CACHE = re.compile(r".*models--(.+?)--(.+?)/snapshots/\w+")  # of the Hub


def sentence_of(error: Exception) -> str:
    """An error as a sentence without a path of this machine."""
    missing = error if isinstance(error, FileNotFoundError) else error.__cause__
    if isinstance(missing, FileNotFoundError) and str(missing.filename).startswith(f"{own_folder()}{os.sep}"):
        return GONE
    text = str(error) or f"The page could not do that ({type(error).__name__})"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{_name(str(error.filename))} cannot be read or written: {error.strerror}"
    text = without_paths(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def without_paths(text: str) -> str:
    """A text with names in place of absolute paths. What a visitor wrote stands in “quotation marks”, and stays."""
    places = "|".join(re.escape(str(place)) for place in (constants.HF_HUB_CACHE, own_folder()))  # may hold blanks
    return re.sub(rf"(?<![\w./:@“-])(?:{places}|)(?:/[^\s/'\"“”,;:()]+)+", lambda found: _name(found[0]), text)


def _name(path: str) -> str:
    """user/name/FILE for a file in the cache of the Hub, a path in the project, else the last part of the path."""
    if PurePath(path).is_relative_to(ROOT):
        return os.path.relpath(path, ROOT)
    name, found = IN_CACHE.subn(r"\1/\2", path)
    return name if found else PurePath(path).name
