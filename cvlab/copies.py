"""Copies of a picture: the same file under another name, or the same photo saved again, resized or mirrored.

A photo that trains and also tests proves nothing, and public data sets hold many such pairs. Every picture is reduced
to two small thumbnails, 16 x 16 in colour and 32 x 32 in grey, each less its mean and of length 1, so that their inner
product is a correlation; two pictures are copies where both are high, as they are or one of them mirrored.
"""

import hashlib
import os
from collections.abc import Sequence
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

COARSE, FINE = 0.99, 0.985  # least correlations of copies; other photos of one scene stay below at least one of them
BLOCK = 2048  # rows of the table of correlations that are held at once


class Copy(NamedTuple):
    """Pictures number `first` < `second`; `exact` where the files are equal byte for byte."""

    first: int
    second: int
    exact: bool


def fingerprint(path: Path) -> str:
    """A short hash of a file's contents: the same file is recognised under another name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def find_copies(paths: Sequence[Path]) -> list[Copy]:
    """All pairs of copies among files, with a progress bar. Files that cannot be opened are only compared as bytes."""

    def examine(path: Path) -> tuple[str, np.ndarray]:
        return fingerprint(path), thumbnails(path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        examined = list(tqdm(pool.map(examine, paths), "looking for copies", len(paths), leave=False))
    if not examined:
        return []
    prints = [fingerprint for fingerprint, _ in examined]
    coarse, coarse_mirrored, fine, fine_mirrored = (
        torch.from_numpy(np.stack(each)) for each in zip(*(rows for _, rows in examined), strict=True)
    )
    found: dict[tuple[int, int], Copy] = {}
    groups: dict[str, int] = {}
    for j, text in enumerate(prints):
        i = groups.setdefault(text, j)
        if i != j:
            found[i, j] = Copy(i, j, exact=True)
    for start in range(0, len(paths), BLOCK):
        rows = slice(start, start + BLOCK)
        for other_coarse, other_fine in ((coarse, fine), (coarse_mirrored, fine_mirrored)):
            pairs = (coarse[rows] @ other_coarse.T > COARSE).nonzero() + torch.tensor([start, 0])
            for i, j in pairs[pairs[:, 0] < pairs[:, 1]].tolist():
                if fine[i] @ other_fine[j] > FINE:
                    found.setdefault((i, j), Copy(i, j, exact=prints[i] == prints[j]))
    return [found[pair] for pair in sorted(found)]


def grouped(paths: Sequence[Path]) -> list[list[Path]]:
    """The files with all copies of a picture in one group; groups and files in the order of `paths`."""
    copies = find_copies(paths)
    first, second = [copy.first for copy in copies], [copy.second for copy in copies]
    links = coo_array((np.ones(len(copies)), (first, second)), shape=(len(paths), len(paths)))
    groups: dict[int, list[Path]] = {}
    for path, label in zip(paths, connected_components(links, directed=False)[1], strict=True):
        groups.setdefault(int(label), []).append(path)
    return list(groups.values())


def thumbnails(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A picture's coarse and fine thumbnail, each followed by its mirror image: four vectors of length 1.

    Of a picture without structure, or one that cannot be opened, they are zero and resemble nothing.
    """
    try:
        image = open_image(path, at_least=64)
    except ImageError:
        image = Image.new("RGB", (1, 1))
    coarse = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32)
    fine = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    return _unit(coarse), _unit(coarse[:, ::-1]), _unit(fine), _unit(fine[:, ::-1])


def _unit(pixels: np.ndarray) -> np.ndarray:
    centred = (pixels - pixels.mean()).ravel()
    length = np.linalg.norm(centred)
    return centred / length if length > 0 else centred
