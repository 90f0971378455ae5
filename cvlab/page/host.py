"""The machine that the page runs on: its environment, an address, a folder, and names in place of its paths.

Gradio and its HTTP client read the environment when they are imported, and end in a traceback where a value is wrong:
app.py calls `read_environment` before it imports them.
"""

import atexit
import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath

import httpx

from cvlab.files import printable

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = re.compile(r"GRADIO_.*(PORTS?|WORKERS|EVENTS|FREQUENCY|DEBUG)|HF_HUB_.*_TIMEOUT")  # variables that hold one
WORKER_OF = "CVLAB_WORKER_OF"  # the variable that tells a worker the folder of its page
MAX_UPLOAD_MB = 40  # of a picture that is sent or fetched
KEPT = 7200  # seconds after which a photo that a killed page left behind is deleted
GONE = "This photo was deleted after an hour: drop it again."


def read_environment() -> None:
    """Prepares the environment for Gradio. Raises a ValueError that names a variable which cannot be read."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
    os.environ["GRADIO_DEFAULT_CONCURRENCY_LIMIT"] = "1"  # the page sets its own
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: idle threads leave the processor to others
    for name in filter(NUMBERS.fullmatch, os.environ):
        value, what = os.environ[name], "a number from 1 to 65535" if "PORT" in name else "a whole number"
        if not value.isdecimal() or ("PORT" in name and not 0 < int(value) < 65536):
            raise ValueError(f"{name}=“{value}” is not {what}: write one, or unset it.")
    _read_proxies()
    own_folder()


def _read_proxies() -> None:
    """Keeps the page's requests to itself away from a proxy."""
    listed = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")).split(",")
    listed += ["localhost", "127.0.0.1", "::1", os.environ.get("GRADIO_SERVER_NAME", "")]
    hosts = dict.fromkeys(host for each in listed if (host := each.strip().strip("[]")))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(hosts)
    try:
        httpx.Client().close()
    except ImportError as error:  # without the package for SOCKS not even a request to this machine is possible
        named = [each for each, url in os.environ.items() if url.lower().startswith(("socks5://", "socks5h://"))]
        raise ValueError(f"{named[0]} names a SOCKS proxy: `pip install socksio` for it, or unset it.") from error
    except (ValueError, httpx.InvalidURL) as error:
        names = "http_proxy, https_proxy, all_proxy or NO_PROXY"
        raise ValueError(f"{names} cannot be read ({error}): write http://host:port, or unset it.") from error


def address() -> str:
    """Where the page is served: GRADIO_SERVER_NAME, or this machine alone. Raises a ValueError where that cannot be."""
    name = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    try:
        socket.create_server((name, 0)).close()
    except OSError as error:
        advice = "127.0.0.1 serves this machine alone, 0.0.0.0 its network too"
        raise ValueError(f"GRADIO_SERVER_NAME=“{name}” is not an IPv4 address of this machine: {advice}.") from error
    return name


@cache
def own_folder() -> Path:
    """A folder of this page and its worker, for what they and Gradio write and serve; deleted when the page ends.

    Not in the system's folder for temporary files, which is cleaned while the page runs and shared with other users,
    unless there is no other place. What a killed page left behind is deleted here too: it holds visitors' photos.

    Raises:
        ValueError: GRADIO_TEMP_DIR names a folder that cannot be written.
    """
    if page := os.environ.get(WORKER_OF):
        return Path(page)
    given = os.environ.get("GRADIO_TEMP_DIR")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for parent in [given] if given else [os.path.join(caches, "cvlab"), tempfile.gettempdir()]:
        with suppress(OSError):
            os.makedirs(parent, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="cvlab-page-", dir=parent)).resolve()
            break
    else:
        raise ValueError(f"GRADIO_TEMP_DIR=“{given}” cannot be written: name a folder that can, or unset it.")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for left in folder.parent.glob("cvlab-page-*/uploads/*/*"):
        with suppress(OSError):
            if time.time() - left.stat().st_ctime > KEPT:
                left.unlink()
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # for Gradio
    return folder


def sentence_of(error: Exception) -> str:
    """An error as a sentence for those who see the page: without a path of this machine."""
    missing = error if isinstance(error, FileNotFoundError) else error.__cause__
    if isinstance(missing, FileNotFoundError) and str(missing.filename).startswith(str(own_folder())):
        return GONE
    text = str(error) or f"The page could not do that ({type(error).__name__})"
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{PurePath(error.filename).name} cannot be read or written: {error.strerror}"
    text = without_paths(printable(" ".join(text.split())))  # names of files may hold anything
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def without_paths(text: str) -> str:
    """A text with names in place of absolute paths. What a visitor wrote stands in “quotation marks”, and stays.

    A file in the cache of the Hub becomes user/name/FILE, one of the project its path there, any other its name.
    """
    text = re.sub(r"/\S*?/models--([^/\s]+?)--([^/\s]+)/snapshots/\w+", r"\1/\2", text.replace(f"{ROOT}/", ""))
    return re.sub(r"(?<![\w./:@“-])(?:/[^\s/'\"“”,;:()]+)*/(?=[^\s/'\"“”,;:()])", "", text)
