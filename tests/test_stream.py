"""Streams of many requests, followed from one thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engines.stream import Streams


class Heard:
    """What the callbacks were told; streams end when an item equals `last`."""

    def __init__(self, last: int = -1) -> None:
        self.items: list[tuple[str, int]] = []
        self.ends: list[tuple[str, Exception | None]] = []
        self.streams: Streams[int] = Streams(self._item, self._end)
        self._last = last

    def _item(self, name: str, item: int) -> bool:
        self.items.append((name, item))
        return item != self._last

    def _end(self, name: str, error: Exception | None) -> None:
        self.ends.append((name, error))

    def until(self, n_ends: int) -> None:
        while len(self.ends) < n_ends:
            self.streams.wait(1.0)


async def numbers(n: int, error: Exception | None = None) -> AsyncIterator[int]:
    for i in range(n):
        await asyncio.sleep(0)
        yield i
    if error is not None:
        raise error


def test_every_item_arrives_once_in_order_and_each_stream_ends_once() -> None:
    heard = Heard()
    failure = RuntimeError("broken")
    heard.streams.open("a", lambda: numbers(5))
    heard.streams.open("b", lambda: numbers(3, failure))
    heard.until(2)
    assert [i for name, i in heard.items if name == "a"] == [0, 1, 2, 3, 4]
    assert [i for name, i in heard.items if name == "b"] == [0, 1, 2]
    assert dict(heard.ends) == {"a": None, "b": failure}
    heard.streams.close()


def test_a_stream_that_its_listener_ends_is_followed_no_further() -> None:
    heard = Heard(last=2)
    heard.streams.open("a", lambda: numbers(9))
    heard.streams.open("b", lambda: numbers(2))
    heard.until(1)
    assert [i for name, i in heard.items if name == "a"] == [0, 1, 2]
    assert heard.ends == [("b", None)]
    heard.streams.close()


def test_an_error_of_the_listener_ends_the_stream_with_it() -> None:
    def broken(_name: str, _item: int) -> bool:
        raise KeyError("unknown")

    ends: list[Any] = []
    streams: Streams[int] = Streams(broken, lambda name, error: ends.append((name, error)))
    streams.open("a", lambda: numbers(1))
    while not ends:
        streams.wait(1.0)
    assert ends[0][0] == "a"
    assert isinstance(ends[0][1], KeyError)
    streams.close()


def test_what_starting_raises_is_raised() -> None:
    heard = Heard()

    def refuse() -> AsyncIterator[int]:
        raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        heard.streams.open("a", refuse)
    heard.streams.close()


def test_items_of_another_thread_wake_the_waiting() -> None:
    """Engines push responses from a thread of theirs, into the loop a stream was started in."""
    heard = Heard(last=3)

    async def pushed_numbers() -> AsyncIterator[int]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[int]()

        def push() -> None:
            for i in range(4):
                loop.call_soon_threadsafe(queue.put_nowait, i)

        threading.Thread(target=push).start()
        while True:
            yield await queue.get()

    heard.streams.open("a", pushed_numbers)
    while len(heard.items) < 4:
        heard.streams.wait(1.0)
    assert heard.items == [("a", i) for i in range(4)]
    heard.streams.close()


def test_closing_drops_open_streams_and_may_be_repeated() -> None:
    heard = Heard()
    cleaned: list[bool] = []

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    heard.streams.open("a", endless)
    heard.streams.wait(0.01)
    heard.streams.close()
    heard.streams.close()
    assert heard.items == [("a", 1)]
    assert heard.ends == []
    assert cleaned == [True]
