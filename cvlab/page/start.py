"""What the page needs before Gradio is imported: settings that Gradio can read, and a folder for its files.

Gradio and its HTTP client read the environment when they are imported, and end in a traceback where a value is wrong.
"""

import atexit
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from errno import EACCES, EADDRINUSE
from functools import cache
from pathlib import Path
from urllib.request import getproxies_environment

import httpx

NUMBERS = re.compile(r"GRADIO_.*(PORTS?|WORKERS|EVENTS|FREQUENCY|DEBUG)|HF_HUB_.*_TIMEOUT")  # variables that hold one
KEPT = 7200  # seconds after which a file that a killed page left behind is deleted


def read_environment() -> None:
    """Prepares the environment for Gradio, which must not have been imported yet.

    Raises:
        ValueError: a variable has a value that Gradio cannot read; the message names it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
    os.environ["GRADIO_DEFAULT_CONCURRENCY_LIMIT"] = "1"  # the page sets its own
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: idle threads leave the processor to others
    for name in filter(NUMBERS.fullmatch, os.environ):
        value = os.environ[name]
        if not value.isdecimal() or (name.endswith("PORT") and not 0 < int(value) < 65536):
            what = "a port from 1 to 65535" if name.endswith("PORT") else "a whole number"
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
    except ImportError:  # without the package for SOCKS not even a request to this machine is possible
        for name, value in list(os.environ.items()):
            if name.lower().endswith("_proxy") and value.startswith("socks"):
                del os.environ[name]
        if not {"https", "all"} & getproxies_environment().keys():
            os.environ["HF_HUB_OFFLINE"] = "1"  # what is meant to go through a proxy must not go past it
        print("The page starts without the SOCKS proxy: `pip install socksio` adds what it takes.", file=sys.stderr)
    except (ValueError, httpx.InvalidURL) as error:
        names = "http_proxy, https_proxy, all_proxy or NO_PROXY"
        raise ValueError(f"{names} cannot be read ({error}): write http://host:port, or unset it.") from error


def address(port: int | None) -> tuple[str, int]:
    """Host and port to serve at: the given port, or the first free one from GRADIO_SERVER_PORT or 7860 on.

    Raises:
        ValueError: the page cannot be served there; says why and what to do.
    """
    host = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    first = int(os.environ.get("GRADIO_SERVER_PORT", 7860)) if port is None else port
    if not 0 < first < 65536:
        raise ValueError(f"{first} is not a port: choose one from 1 to 65535.")
    count = int(os.environ.get("GRADIO_NUM_PORTS", 100)) if port is None else 1
    for each in range(first, min(first + max(count, 1), 65536)):
        try:
            with socket.socket() as door:
                door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Gradio tries it
                door.bind((host, each))
                return host, each
        except OSError as error:
            if error.errno not in (EADDRINUSE, EACCES):
                raise ValueError(
                    f"GRADIO_SERVER_NAME=“{host}” is no IPv4 address or host name of this machine: 127.0.0.1 serves "
                    "this machine alone, 0.0.0.0 its network too."
                ) from error
            why = (
                "taken by another program" if error.errno == EADDRINUSE else "for administrators: from 1024 on all may"
            )
    ports = f"Port {first} is" if each == first else f"Every port from {first} to {each} is"
    raise ValueError(f"{ports} {why}. Choose another with --port or GRADIO_SERVER_PORT.")


@cache
def own_folder() -> Path:
    """A folder of this process alone, for what the page and Gradio write and serve; deleted when the process ends.

    Not in the system's folder for temporary files, which is cleaned while the page runs and shared with other users,
    unless there is no other place. What a killed page left behind is deleted here too: it holds visitors' photos.

    Raises:
        ValueError: GRADIO_TEMP_DIR names a folder that cannot be written.
    """
    given, caches = (
        os.environ.get("GRADIO_TEMP_DIR"),
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
    )
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
