"""What takes long to make, kept in memory up to a number of bytes: what was asked for least recently goes first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

Kept = TypeVar("Kept")


class _Lock:
    """A lock that can be referred to weakly."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Shelf(Generic[Kept]):
    """Things by their keys, each made once however many threads ask for it, and whoever asks for another need not wait.

    Args:
        limit: bytes in all. What is larger by itself is kept alone, until something else is asked for.
        size: bytes of a thing.
    """

    def __init__(self, limit: int, size: Callable[[Kept], int]) -> None:
        self.limit = limit
        self.size = size
        self._kept: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()
        self._making: WeakValueDictionary[Hashable, _Lock] = WeakValueDictionary()
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """The thing of that key; `make` is called where it is not there. What `make` raises is raised, and not kept."""
        with self._guard:
            making = self._making.setdefault(key, _Lock())
        with making.lock:
            with self._guard:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key][0]
            made = make()
            with self._guard:
                self._kept[key] = made, self.size(made)
                while len(self._kept) > 1 and self.bytes() > self.limit:
                    self._kept.popitem(last=False)
            return made

    def kept(self, key: Hashable) -> Kept | None:
        """The thing of that key, if it was made and is still here."""
        with self._guard:
            return self._kept[key][0] if key in self._kept else None

    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(size for _, size in self._kept.values())

    def keys(self) -> list[Hashable]:
        """What is kept, the least recently asked for first."""
        return list(self._kept)
