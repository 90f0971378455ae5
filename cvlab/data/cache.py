"""Keeps decoded images for all epochs, in a memory-mapped temporary file."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch


@dataclass
class Cache:
    """Keeps tensors of uint8 or bool as views of a file, which read like any others.

    The system holds the file's pages in memory. If memory runs short, it drops them and reads them again later. The
    file has no name, so the system deletes it when the process ends, also after a crash.
    """

    # Where the file is; by default the system's folder of temporary files, which may itself be in memory.
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    nbytes: int = 0  # kept so far

    def __str__(self) -> str:
        return f"{self.nbytes / 1e6:.0f} MB in a temporary file in {self.folder}"

    def keep(self, rows: Iterable[tuple]) -> list[tuple]:
        """The same rows with their tensors kept.

        Raises:
            OSError: the file cannot be created, or the disk is full.
        """
        kept = []
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                for row in rows:
                    for tensor in filter(torch.is_tensor, row):
                        file.write(tensor.contiguous().numpy())
                    # On the meta device a tensor has its shape and type, but no numbers.
                    kept.append([item.to("meta") if torch.is_tensor(item) else item for item in row])
                file.flush()
                pages = torch.from_numpy(np.memmap(file, np.uint8, "r+")) if file.tell() else torch.empty(0)
        except OSError as error:
            taken = sum(item.nbytes for row in kept for item in row if torch.is_tensor(item)) / 1e6
            reason = f"{error.strerror}. The first {len(kept)} took {taken:.2f} MB: make room, or choose another --out."
            raise OSError(f"The decoded pictures cannot be kept in {self.folder}: {reason}") from error
        self.nbytes += pages.nbytes
        start = 0
        for row in kept:
            for i, item in enumerate(row):
                if torch.is_tensor(item):
                    row[i] = pages[start : start + item.nbytes].view(item.dtype).view(item.shape)
                    start += item.nbytes
        return [tuple(row) for row in kept]
