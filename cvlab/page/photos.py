"""A visitor's own photos: the strip that keeps them to go back to, and photos by their address."""

import hashlib
import html
import os
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from PIL import Image

from cvlab.checkpoint import hub
from cvlab.files import printable, write_bytes, write_text
from cvlab.page.host import MAX_UPLOAD_MB, own_folder
from cvlab.page.html import quoted
from cvlab.render import picture_url
from cvlab.transforms import ImageError, open_image

HOSTS = "CVLAB_HOSTS"  # the variable that names the hosts of photos, such as "upload.wikimedia.org,*.school.edu"
SECONDS = 20.0  # of a download
MOST_KEPT, SIDE = 24, 64  # photos of the strip, pixels of a side
ADDRESS = ".address"  # the file beside a fetched photo that tells where it comes from


def strip(kept: Sequence[str], shown: str | None) -> str:
    """Small pictures of the photos, the one that is shown marked; a click sends its index. A single one needs none."""
    if not set(kept) - {shown}:
        return ""
    buttons = ""
    for index, path in enumerate(kept):
        name = html.escape(f"Photo {index + 1}: {printable(Path(path).name)}")
        now = ' aria-current="true"' if path == shown else ""
        buttons += f'<button data-index="{index}" title="{name}" aria-label="{name}"{now}>{_small(path)}</button>'
    return f'<div class="kept" role="group" aria-label="Your photos">{buttons}</div>'


@lru_cache(maxsize=1000)
def _small(path: str) -> str:
    try:
        image = open_image(path, SIDE)
    except ImageError:  # the answer says why
        image = Image.new("RGB", (SIDE, SIDE), "grey")
    image.thumbnail((2 * SIDE, 2 * SIDE))
    return f'<img alt="" src="{picture_url(image)}">'


def fetch(address: str, owners: Sequence[str] = ()) -> str:
    """Downloads a photo from the Hub, or from a host that the owner of the page named; returns its path.

    Args:
        address: hf://datasets/user/name/photo.jpg, or that of this file's page on the Hub; https://host/photo.jpg.
        owners: whose repositories on the Hub are open here; empty for everybody's.

    Raises:
        ValueError: it is not allowed, too large, or did not arrive.
    """
    address = address.strip()
    found = hub.pull_file(address, MAX_UPLOAD_MB * 2**20, owners)
    content = found.read_bytes() if found else _download(address)
    folder = own_folder() / "uploads" / hashlib.sha256(address.encode()).hexdigest()
    path = folder / (printable(Path(urlsplit(address).path).name)[-100:] or "photo")
    write_bytes(path, content)
    write_text(folder / ADDRESS, address)
    return str(path)


def address_of(photo: str | None) -> str:
    """Where a photo was fetched from; empty for any other one, and for none."""
    path = Path(photo or ADDRESS).with_name(ADDRESS)
    return path.read_text("utf-8") if photo and path.is_file() else ""


def _download(address: str) -> bytes:
    host, hosts = urlsplit(address).hostname or "", [each.strip() for each in os.environ.get(HOSTS, "").split(",")]
    if not any(fnmatchcase(host, each.lower()) for each in hosts):
        others = f" or {', '.join(hosts)}" if any(hosts) else ""
        raise ValueError(f"This page takes photos from the Hugging Face Hub{others} only, not from {quoted(host)}.")
    too_large = ValueError(f"The photo is too large: the limit is {MAX_UPLOAD_MB} MB.")
    content, until = bytearray(), time.monotonic() + SECONDS
    try:
        with httpx.stream("GET", address, timeout=SECONDS, headers={"accept-encoding": "identity"}) as response:
            response.raise_for_status()  # also of a redirection: it may lead to another host
            if int(response.headers.get("content-length", 0)) > MAX_UPLOAD_MB * 2**20:
                raise too_large
            for some in response.iter_raw():
                content += some
                if len(content) > MAX_UPLOAD_MB * 2**20:
                    raise too_large
                if time.monotonic() > until:
                    raise httpx.ReadTimeout(f"it takes longer than {SECONDS:g} s")
    except httpx.HTTPStatusError as error:
        raise ValueError(f"{host} does not give this photo (HTTP {error.response.status_code}).") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"The photo did not arrive ({str(error) or type(error).__name__}).") from error
    return bytes(content)
