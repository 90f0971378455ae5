"""Copies of a picture: the same file under another name, or the same photo saved again, resized or mirrored.

A photo in both train and test makes the test worthless, and public data sets have many such pairs. Every picture is
reduced to two thumbnails, 16 x 16 in colour and 32 x 32 in grey, with mean 0 and length 1, so that inner products are
correlations. Two pictures are copies if both correlations are high, directly or mirrored.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.contrib.concurrent import thread_map

from cvlab.models.model import Channels
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


class Copies:
    """Which of some files are copies of one photo, and which cannot be opened. Each is opened once, on all cores."""

    def __init__(self, paths: Sequence[Path], channels: Channels | None = None) -> None:
        bar = {"desc": "looking for copies", "leave": False}
        examined = thread_map(lambda path: _examined(path, channels), paths, max_workers=os.cpu_count(), **bar)
        self.paths = paths
        # By file a sentence why it cannot be opened; such files are only compared byte for byte.
        self.faults = {path: fault for path, (*_, fault) in zip(paths, examined, strict=True) if fault}
        if channels and len(self.faults) == len(paths) > 0:
            raise ImageError(f"None of {len(paths)} pictures can be used. {self.faults[paths[0]]}")
        self.pairs = _pairs(*list(zip(*examined, strict=True))[:3]) if examined else []  # in the order of the files
        first, second, _ = zip(*self.pairs, strict=True) if self.pairs else ((), (), ())
        links = coo_array((np.ones(len(self.pairs)), (first, second)), shape=(len(paths), len(paths)))
        # By file the number of its group: copies of a picture, and their copies, have the same one.
        self.group = dict(zip(paths, connected_components(links, directed=False)[1].tolist(), strict=True))

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


def _examined(path: Path, channels: Channels | None) -> tuple[str, np.ndarray, np.ndarray, str]:
    """A file's fingerprint, its thumbnails (16, 16, 3 or more) and (32, 32), and why it cannot be opened.

    Of a picture of one colour, or a file that cannot be opened, the thumbnails are zeros, which correlate with nothing.
    """
    try:
        image = open_image(path, 128, channels)
    except ImageError as error:
        nothing = np.zeros((16, 16, channels.count if channels else 3), np.float32)
        return fingerprint(path), nothing, np.zeros((32, 32), np.float32), str(error)
    coarse = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32)
    fine = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    # A channel that is no colour may be brighter than the others in all pictures.
    return fingerprint(path), _unit(coarse - coarse.mean((0, 1)) if channels else coarse), _unit(fine), ""


def _unit(pixels: np.ndarray) -> np.ndarray:
    centred = pixels - pixels.mean()
    length = np.linalg.norm(centred)
    return centred / length if length > 0 else centred


def _pairs(fingerprints: Sequence[str], coarse: Sequence[np.ndarray], fine: Sequence[np.ndarray]) -> list[Copy]:
    found: dict[tuple[int, int], Copy] = {}
    groups: dict[str, int] = {}
    for j, print_of_file in enumerate(fingerprints):
        i = groups.setdefault(print_of_file, j)
        if i != j:
            found[i, j] = Copy(i, j, exact=True)
    coarse, fine = torch.from_numpy(np.stack(coarse)), torch.from_numpy(np.stack(fine))
    for others, other_fine in ((coarse, fine), (coarse.flip(2), fine.flip(2))):  # directly, and mirrored
        for start in range(0, len(coarse), BLOCK):
            rows = coarse[start : start + BLOCK].flatten(1)
            pairs = (rows @ others[start:].flatten(1).T > COARSE).nonzero() + start
            for i, j in pairs[pairs[:, 0] < pairs[:, 1]].tolist():
                if (fine[i] * other_fine[j]).sum() > FINE:
                    found.setdefault((i, j), Copy(i, j, fingerprints[i] == fingerprints[j]))
    return [found[pair] for pair in sorted(found)]
