"""Keeps decoded images for all epochs: in memory up to a limit, the rest in a memory-mapped temporary file."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**26  # bytes


@dataclass
class Cache:
    """Keeps tensors of uint8 or bool. They are read in the same way from memory and from the file.

    The file has no name, so the system deletes it when the process ends, also after a crash. If memory runs short, the
    system drops the file's pages and reads them again later.

    Attributes:
        limit: bytes that may stay in memory.
        folder: where the file is; by default the system's folder of temporary files, which may itself be in memory.
        in_memory, in_file: bytes kept so far.
        block, used: the current block of memory, and how many of its bytes are taken. Blocks of their own keep pictures
            apart from the small gaps that decoding leaves, which would cost half as much memory again.
    """

    limit: float = 4e9
    folder: Path | None = None
    in_memory: int = 0
    in_file: int = 0
    block: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), repr=False)
    used: int = 0

    def __str__(self) -> str:
        beyond = f" and {self.in_file / 1e6:.0f} MB in a file in {self.folder or tempfile.gettempdir()}"
        return f"{self.in_memory / 1e6:.0f} MB in memory{beyond if self.in_file else ''}"

    def keep(self, rows: Iterable[tuple]) -> list[tuple]:
        """The same rows with their tensors kept: in memory, or beyond the limit as views of the file.

        Raises:
            OSError: the file cannot be created, or the disk is full.
        """
        kept = []
        with tempfile.TemporaryFile(dir=self.folder) as file:
            for row in rows:
                kept.append(tuple(self._put(item, file) if isinstance(item, Tensor) else item for item in row))
            file.flush()
            pages = torch.from_numpy(np.memmap(file, np.uint8, "r+")) if file.tell() else None
        return [tuple(item.of(pages) if isinstance(item, _Place) else item for item in row) for row in kept]

    def _put(self, tensor: Tensor, file: tempfile.TemporaryFile) -> "Tensor | _Place":
        if self.in_memory + tensor.nbytes <= self.limit:
            self.in_memory += tensor.nbytes
            if self.used + tensor.nbytes > self.block.nbytes:
                self.block, self.used = torch.empty(max(BLOCK, tensor.nbytes), dtype=torch.uint8), 0
            place = _Place(self.used, tensor.shape, tensor.dtype)
            self.used += tensor.nbytes
            return place.of(self.block).copy_(tensor)
        place = _Place(file.tell(), tensor.shape, tensor.dtype)
        try:
            file.write(tensor.contiguous().numpy())
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise OSError(
                f"The decoded pictures do not fit into {where}: {error.strerror}. Free some space on "
                "that disk, or keep more of them in memory with --cache-limit."
            ) from error
        self.in_file += tensor.nbytes
        return place


@dataclass
class _Place:
    """The place of a tensor in the file or in a block."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, pages: Tensor) -> Tensor:
        return pages[self.start : self.start + self.shape.numel()].view(self.dtype).view(self.shape)
