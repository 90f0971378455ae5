"""Copies of a picture: the same file under another name, or the same photo saved again, resized or mirrored.

A photo in both train and test makes the test worthless, and public data sets have many such pairs. Every picture is
reduced to two thumbnails, 16 x 16 in colour and 32 x 32 in grey, with mean 0 and length 1, so that inner products are
correlations. Two pictures are copies if both correlations are high, directly or mirrored.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from cvlab.transforms import ImageError, open_image

COARSE, FINE = 0.99, 0.985  # lowest correlations of copies; for other photos of a scene at least one is lower
BLOCK = 2048  # rows of the table of correlations that are in memory at once


class Copy(NamedTuple):
    """The positions `first` < `second` of two copies; `exact` if the files are equal byte for byte."""

    first: int
    second: int
    exact: bool


def fingerprint(path: Path) -> str:
    """A short hash of a file's contents. It recognises the same file under another name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Examined(NamedTuple):
    """What is needed of a file to compare it with others.

    Attributes:
        fingerprint: hash of its contents.
        coarse, fine: thumbnails (16, 16, 3) and (32, 32) with mean 0 and length 1. A picture of one colour, or a file
            that cannot be opened, has zeros, which correlate with nothing.
        fault: a sentence why the file cannot be opened, or None.
    """

    fingerprint: str
    coarse: np.ndarray
    fine: np.ndarray
    fault: str | None


def examine(paths: Sequence[Path]) -> list[Examined]:
    """Opens every file once, on all cores and with a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(_examine_one, paths), "looking for copies", len(paths), leave=False))


def copies_among(examined: Sequence[Examined]) -> list[Copy]:
    """All pairs of copies, in the order of the files. Those that cannot be opened are only compared byte for byte."""
    if not examined:
        return []
    found: dict[tuple[int, int], Copy] = {}
    groups: dict[str, int] = {}
    for j, each in enumerate(examined):
        i = groups.setdefault(each.fingerprint, j)
        if i != j:
            found[i, j] = Copy(i, j, exact=True)
    coarse = torch.from_numpy(np.stack([each.coarse for each in examined]))
    fine = torch.from_numpy(np.stack([each.fine for each in examined]))
    for others, other_fine in ((coarse, fine), (coarse.flip(2), fine.flip(2))):  # directly, and mirrored
        for start in range(0, len(coarse), BLOCK):
            rows = coarse[start : start + BLOCK].flatten(1)
            pairs = (rows @ others[start:].flatten(1).T > COARSE).nonzero() + start
            for i, j in pairs[pairs[:, 0] < pairs[:, 1]].tolist():
                if (fine[i] * other_fine[j]).sum() > FINE:
                    exact = examined[i].fingerprint == examined[j].fingerprint
                    found.setdefault((i, j), Copy(i, j, exact))
    return [found[pair] for pair in sorted(found)]


def grouped(count: int, copies: Iterable[Copy]) -> list[int]:
    """A group number for each of `count` files. Copies of a picture, and their copies, have the same number."""
    pairs = [(copy.first, copy.second) for copy in copies]
    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    links = coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count))
    return connected_components(links, directed=False)[1].tolist()


class Copies:
    """Which of some files are copies of one photo, and which cannot be opened.

    Attributes:
        paths: the files.
        faults: by file a sentence why it cannot be opened.
        pairs: the copies among them.
        group: by file the number of its group of copies.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, examined = paths, examine(paths)
        self.faults = {path: each.fault for path, each in zip(paths, examined, strict=True) if each.fault}
        self.pairs = copies_among(examined)
        self.group = dict(zip(paths, grouped(len(paths), self.pairs), strict=True))

    def cut(
        self, paths: list[Path], seed: list[int], shares: dict[str, float], rest: str = "train"
    ) -> dict[str, list[Path]]:
        """Draws a part for each of `shares` (a fraction, or a number of pictures); what is left is the part `rest`.

        Copies of a photo stay in one part: a photo that was trained on tests nothing.
        """
        together: dict[int, list[Path]] = {}
        for path in paths:
            together.setdefault(self.group[path], []).append(path)
        groups = list(together.values())
        groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
        cut: dict[str, list[Path]] = {}
        for part, share in shares.items():
            wanted = share if isinstance(share, int) else round(share * len(paths))
            drawn: list[Path] = []
            while groups and len(drawn) < wanted:
                drawn += groups.pop()
            cut[part] = sorted(drawn)
        return cut | {rest: sorted(path for group in groups for path in group)}


def _examine_one(path: Path) -> Examined:
    fault = None
    try:
        image = open_image(path, at_least=128)
    except ImageError as error:
        image, fault = Image.new("RGB", (1, 1)), str(error)
    coarse = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32)
    fine = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    return Examined(fingerprint(path), _unit(coarse), _unit(fine), fault)


def _unit(pixels: np.ndarray) -> np.ndarray:
    centred = pixels - pixels.mean()
    length = np.linalg.norm(centred)
    return centred / length if length > 0 else centred
