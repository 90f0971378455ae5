"""A least-recently-used cache with a limit in bytes; each value is computed once, also under concurrent requests."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakValueDictionary


class Cache:
    """Values by their keys. A thread that asks for one value never waits for another.

    Args:
        limit: bytes in all. A value that is larger by itself is kept alone, until another key is asked for.
        size: bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[Any], int]) -> None:
        self.limit = limit
        self.size = size
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._making: WeakValueDictionary[Hashable, threading.Lock] = WeakValueDictionary()
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key; `make` computes it where it is missing. What `make` raises is raised, and not kept."""
        with self._guard:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._guard:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key][0]
            value = make()
            with self._guard:
                self._values[key] = value, self.size(value)
                while len(self._values) > 1 and self.bytes() > self.limit:
                    self._values.popitem(last=False)
            return value

    def known(self, key: Hashable) -> Any | None:
        """The value of a key if it is in the cache, else None; nothing is computed."""
        with self._guard:
            return self._values[key][0] if key in self._values else None

    def bytes(self) -> int:
        """Bytes of all values."""
        return sum(size for _, size in self._values.values())
