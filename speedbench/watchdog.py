"""Watchdog: sees that an engine gives no step while requests are in flight, writes down what its
processes are doing, and ends them.

A call that hangs inside an engine cannot be ended from the thread that made it. This thread kills
the engine's processes, after which most calls return and the run ends as any other; where the call
still hangs (an engine in this process), it hands over to `abandon`, which stores how the run ended
and ends the process. A call that hangs and lets no other thread run is left to the guardian.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from speedbench import processes
from speedbench.guardian import UNGUARDED, Guard

TICK_S = 1.0
"""How often it looks, at most: seldom enough to cost nothing."""

STOP_PATIENCE_S = 20.0
"""Silence that is borne once the run is to stop: batch systems kill 30 s after their notice."""

RETURN_S = 20.0
"""How long a call may take to return once the engine's processes are gone."""

STORE_S = 120.0
"""How long storing may take before the process ends without it."""

GUARD_S = 10.0
"""How much later than the watchdog the guardian calls a process dead."""


class Watched(Protocol):
    """What it sees of a loop."""

    n_tokens: int
    n_done: int

    @property
    def n_in_flight(self) -> int: ...

    def overlong(self) -> str | None:
        """The request with more steps than it may have tokens, if there is one."""


class Watchdog:
    """Watches a loop inside a `with` block.

    fault    why the engine is of no use any more, or ''
    stalled   the fault is silence
    silenced  the same, but the run was to stop anyway
    """

    def __init__(
        self,
        loop: Watched,
        timeout_s: float,
        *,
        stacks: Path,
        stop: Callable[[], str | None],
        abandon: Callable[[Watchdog], None],
        guard: Guard = UNGUARDED,
    ) -> None:
        """timeout_s  silence that is a stall; 0: none is
        stacks     the file that gets what the processes were doing
        stop       why the run is to stop, if it is
        abandon    stores how the run ended, where the loop cannot be left; must not return
        guard      hears that this thread can run
        """
        self.fault = ""
        self.stalled = self.silenced = False
        self._loop = loop
        self._timeout_s = timeout_s or float("inf")
        self._tick_s = min(TICK_S, self._timeout_s / 10)
        self._stacks = stacks
        self._stop = stop
        self._abandon = abandon
        self._guard = guard
        self._left = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="speedbench-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._leaving:  # held for good by whoever abandons the run
            self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        self._guard.expect(self._timeout_s + GUARD_S, self._stacks)
        seen, silent_s, last_s = self._seen(), 0.0, time.monotonic()
        while not self._left.wait(self._tick_s):
            self._guard.alive()
            now_s = time.monotonic()
            # A process that was suspended saw no step, and is not to blame for it.
            silent_s += min(now_s - last_s, 2 * self._tick_s)
            last_s = now_s
            why = self._stop()
            is_idle = why is None and not self._loop.n_in_flight  # an open loop between arrivals
            if (now := self._seen()) != seen or is_idle:
                seen, silent_s = now, 0.0
            self.fault = self.fault or self._overlong()
            patience_s = self._timeout_s if why is None else min(self._timeout_s, STOP_PATIENCE_S)
            if silent_s >= patience_s:
                self._end(silent_s, why)
                return
        self._guard.relax()

    def _seen(self) -> tuple[int, int]:
        return self._loop.n_tokens, self._loop.n_done

    def _overlong(self) -> str:
        found = self._loop.overlong()
        return "" if found is None else f"the engine does not end its answers: {found}"

    def _end(self, silent_s: float, why: str | None) -> None:
        """End the engine's processes, and the run if that does not."""
        self._guard.relax()
        silence = (
            f"no step came for {silent_s:.0f} s with {self._loop.n_in_flight} request(s) in flight"
            f" ({_place()}, see {self._stacks.parent.name}/{self._stacks.name})"
        )
        self.fault = silence if why is None else f"{why}; {silence}"
        self.stalled, self.silenced = why is None, why is not None
        threads = _own_stacks()
        children = processes.of_engine()
        self._write(f"{self.fault}\n\n{threads}\n" + "\n".join(map(processes.told, children)))
        said = processes.end(children)
        if said:
            self._write(said)
        if self._left.wait(RETURN_S if children else 0):
            return
        with self._leaving:
            if not self._left.is_set():
                _exit_after(STORE_S)
                self._abandon(self)

    def _write(self, text: str) -> None:
        try:
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:  # the disk may be what hangs; the run ends all the same
            sys.stderr.write(text)


def _main_stack() -> traceback.StackSummary:
    """Where the thread is that calls the engine: the innermost call last."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return traceback.extract_stack(frame)


def _place() -> str:
    """The innermost call of an adapter, below which all is the engine's."""
    stack = list(_main_stack())
    ours = [frame for frame in stack if Path(frame.filename).parent.name == "engines"]
    last = (ours or stack)[-1]
    return f"in {last.name}, {Path(last.filename).name}:{last.lineno}"


def _own_stacks() -> str:
    """Where every thread of this process is."""
    main = "".join(_main_stack().format())
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        all_threads = file.read().decode(errors="replace")
    return f"process {os.getpid()}, which measures, calls:\n{main}\nall threads:\n{all_threads}"


def _exit_after(seconds: float) -> None:
    timer = threading.Timer(seconds, lambda: os._exit(1))
    timer.daemon = True
    timer.start()
