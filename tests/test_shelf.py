"""cvlab.page.shelf: made once, kept as long as it fits, the least recently asked for goes first."""

import threading
import time

import pytest

from cvlab.page.shelf import Shelf


def test_what_was_asked_for_least_recently_goes_first() -> None:
    shelf: Shelf[str] = Shelf(3, len)
    for key in "abcab":  # c was asked for before a and b
        shelf.get(key, lambda key=key: key)
    shelf.get("d", lambda: "d")
    assert shelf.keys() == ["a", "b", "d"]
    assert shelf.bytes() == 3


def test_what_is_larger_than_the_limit_stays_until_something_else_comes() -> None:
    shelf: Shelf[str] = Shelf(3, len)
    shelf.get("a", lambda: "a")
    assert shelf.get("large", lambda: "large") == "large"
    assert shelf.keys() == ["large"]
    shelf.get("a", lambda: "a")
    assert shelf.keys() == ["a"]


def test_many_threads_have_it_made_once_and_do_not_wait_for_another_key() -> None:
    shelf: Shelf[str] = Shelf(99, len)
    made, others = [], []

    def make() -> str:
        while not others:  # ends only because the other key is answered meanwhile
            time.sleep(0.001)
        made.append(1)
        return "a"

    threads = [threading.Thread(target=shelf.get, args=("a", make)) for _ in range(8)]
    threads.append(threading.Thread(target=lambda: others.append(shelf.get("b", lambda: "b"))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1


def test_what_could_not_be_made_is_tried_again() -> None:
    shelf: Shelf[str] = Shelf(9, len)
    with pytest.raises(ZeroDivisionError):
        shelf.get("a", lambda: 1 / 0)
    assert shelf.get("a", lambda: "a") == "a"
