"""Per-request async streams made pollable: one event loop, turned only in the caller's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Streams(Generic[Item]):
    """Follows the streams of many requests whenever the caller opens one or waits.

    on_item(request_id, item) -> whether to go on following; called as each item arrives.
    on_end(request_id, error): the stream ended by itself (None) or raised; called at most once,
    and not for a stream that `on_item` ended.
    """

    def __init__(
        self,
        on_item: Callable[[str, Item], bool],
        on_end: Callable[[str, Exception | None], None],
    ) -> None:
        self._on_item = on_item
        self._on_end = on_end
        self._loop = asyncio.new_event_loop()
        self._arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps weak references only

    def open(self, request_id: str, start: Callable[[], AsyncIterable[Item]]) -> None:
        """Call `start` inside the loop and follow what it returns. Raises what it raises."""
        self._loop.run_until_complete(self._open(request_id, start))

    async def _open(self, request_id: str, start: Callable[[], AsyncIterable[Item]]) -> None:
        task = asyncio.ensure_future(self._follow(request_id, start()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, request_id: str, stream: AsyncIterable[Item]) -> None:
        error: Exception | None = None
        try:
            async for item in stream:
                going_on = self._on_item(request_id, item)
                self._arrived.set()
                if not going_on:
                    return
        except Exception as raised:  # noqa: BLE001 - whatever it is, `on_end` tells its kind
            error = raised
        self._on_end(request_id, error)
        self._arrived.set()

    def wait(self, timeout_s: float) -> None:
        """Turn the loop until something arrives, or for so long."""
        self._arrived.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            self._loop.run_until_complete(asyncio.wait_for(self._arrived.wait(), timeout_s))

    def drop(self) -> None:
        """Stop following all streams; the loop can still be notified by the engine's threads."""
        if self._loop.is_closed() or not self._tasks:
            return
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))

    def close(self) -> None:
        """Drop all streams and end the loop. May be called twice."""
        self.drop()
        self._loop.close()
