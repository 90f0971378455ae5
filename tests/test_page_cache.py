"""cvlab.page.cache: each value is computed once, and the least recently used goes first."""

import threading
import time

import pytest

from cvlab.page.cache import Cache


def test_what_was_asked_for_least_recently_goes_first() -> None:
    cache = Cache(3, len)
    for key in "abcab":  # c was asked for before a and b
        cache.get(key, lambda key=key: key)
    cache.get("d", lambda: "d")
    assert list(cache._values) == ["a", "b", "d"]
    assert cache.bytes() == 3


def test_what_is_larger_than_the_limit_stays_until_something_else_comes() -> None:
    cache = Cache(3, len)
    cache.get("a", lambda: "a")
    assert cache.get("large", lambda: "large") == "large"
    assert list(cache._values) == ["large"]
    cache.get("a", lambda: "a")
    assert list(cache._values) == ["a"]


def test_many_threads_have_it_made_once_and_do_not_wait_for_another_key() -> None:
    cache = Cache(99, len)
    made, others = [], []

    def make() -> str:
        while not others:  # ends only because the other key is answered meanwhile
            time.sleep(0.001)
        made.append(1)
        return "a"

    threads = [threading.Thread(target=cache.get, args=("a", make)) for _ in range(8)]
    threads.append(threading.Thread(target=lambda: others.append(cache.get("b", lambda: "b"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1


def test_what_could_not_be_made_is_tried_again() -> None:
    cache = Cache(9, len)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", lambda: "a") == "a"
