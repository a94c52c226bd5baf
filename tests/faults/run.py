"""`run.py` in which one thing goes wrong, as $FAULT says: NAME or NAME:ARGUMENT.

The engine is the null engine; time limits that protect real ones are shortened.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import engines.null
from speedbench import session, store, watchdog
from speedbench.cli import main
from speedbench.types import EngineDiedError, EngineSettings, Request, Step

CHILD = """
import sys, time
def stuck_in_a_collective():
    while True:
        time.sleep(60)
for line in sys.stdin:
    if line.strip() == "hang":
        stuck_in_a_collective()
    print("ok", flush=True)
"""
"""The other process of an engine that has two."""


class FaultyEngine(engines.null.NullEngine):
    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._fault, _, argument = os.environ.get("FAULT", "").partition(":")
        self._at = int(argument) if argument.isdigit() else 0
        self._slow_s = float(os.environ.get("SLOW_MS", 0)) / 1e3
        self._n_polls = self._n_submitted = 0
        self._last: dict[str, Step] = {}
        self._kept: list[Step] = []
        self._child: subprocess.Popen[str] | None = None
        if self._fault.startswith("child"):
            self._child = subprocess.Popen(
                [sys.executable, "-c", CHILD],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip

    def submit(self, request: Request) -> None:
        self._n_submitted += 1
        super().submit(request)

    def poll(self) -> Sequence[Step]:
        self._n_polls += 1
        is_due = self._n_polls > self._at
        if self._child is not None:
            self._ask_child("hang" if is_due and self._fault == "child-hangs" else "go")
        if is_due and self._fault in HANGS:
            HANGS[self._fault]()
        if self._fault == "dies-at-request" and self._n_submitted >= self._at:
            raise EngineDiedError("its GPU fell off the bus")
        time.sleep(self._slow_s)
        steps = super().poll()
        change = CHANGES.get(self._fault)
        return steps if change is None else change(self, list(steps))

    def _ask_child(self, word: str) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(word + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise EngineDiedError("its other process is gone") from None
        if not self._child.stdout.readline():
            raise EngineDiedError("its other process ended")

    def close(self) -> None:
        super().close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    # ------------------------------------------------------------ what it may answer

    def reversed_steps(self, steps: list[Step]) -> list[Step]:
        return steps[::-1]

    def late(self, steps: list[Step]) -> list[Step]:
        """Each poll's steps come with the next poll's, after them; last steps come at once."""
        ended = {step.request_id for step in steps if step.finish_reason is not None}
        now = [step for step in self._kept if step.request_id in ended]
        held = [step for step in self._kept if step.request_id not in ended]
        last = [step for step in steps if step.request_id in ended]
        self._kept = [step for step in steps if step.request_id not in ended]
        return [*held, *now, *last]

    def swapped(self, steps: list[Step]) -> list[Step]:
        """A step's time and that of the one before it change places."""
        changed = []
        for step in steps:
            before = self._last.get(step.request_id)
            self._last[step.request_id] = step
            swap = before is not None and self._n_polls % 3 == 0
            changed.append(step._replace(time_ns=before.time_ns - 1) if swap and before else step)
        return changed

    def twice(self, steps: list[Step]) -> list[Step]:
        return [s for step in steps for s in ((step,) if step.finish_reason else (step, step))]

    def last_twice(self, steps: list[Step]) -> list[Step]:
        return [s for step in steps for s in ((step, step) if step.finish_reason else (step,))]

    def unknown(self, steps: list[Step]) -> list[Step]:
        return [s for step in steps for s in (step, step._replace(request_id="who-is-this"))]

    def too_many(self, steps: list[Step]) -> list[Step]:
        """The last step goes on beyond what was asked for."""
        return [s._replace(token_ids=[*s.token_ids, 1]) if s.finish_reason else s for s in steps]

    def endless(self, steps: list[Step]) -> list[Step]:
        """No request ends; its first part does not know that."""
        time.sleep(0.001)
        ended = [step._replace(finish_reason=None) for step in steps]
        for step in steps:
            if step.finish_reason is not None:
                self._live[step.request_id] = engines.null._Live(
                    Request(step.request_id, (), 10**9, self._settings.sampling),
                    self._now_ns + self._step_ns,
                    __import__("random").Random(0),
                    1,
                )
        return ended

    def spoilt(self, steps: list[Step], **values: Any) -> list[Step]:
        """In every second request, one step holds something else than numbers."""
        return [
            step._replace(**values)
            if step.finish_reason and step.request_id.rpartition(".")[0][-1] in "02468"
            else step
            for step in steps
        ]


def hang_and_hold() -> None:
    """Sleeps in C with the interpreter's lock: no other thread of the process runs."""
    ctypes.PyDLL(None).sleep(10_000)


HANGS: dict[str, Callable[[], object]] = {
    "hangs": lambda: time.sleep(10_000),
    "pauses": lambda: time.sleep(4),
    "hangs-and-holds": hang_and_hold,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "crash": lambda: 1 // 0,
}

CHANGES: dict[str, Callable[[FaultyEngine, list[Step]], list[Step]]] = {
    "reversed": FaultyEngine.reversed_steps,
    "late": FaultyEngine.late,
    "swapped": FaultyEngine.swapped,
    "twice": FaultyEngine.twice,
    "last-twice": FaultyEngine.last_twice,
    "unknown": FaultyEngine.unknown,
    "too-many": FaultyEngine.too_many,
    "endless": FaultyEngine.endless,
    "nan": lambda e, s: e.spoilt(s, time_ns=float("nan")),
    "huge-time": lambda e, s: e.spoilt(s, time_ns=2**70),
    "text-time": lambda e, s: e.spoilt(s, time_ns="noon"),
    "no-time": lambda e, s: e.spoilt(s, time_ns=None),
    "future": lambda e, s: e.spoilt(s, time_ns=2**62),
    "negative": lambda e, s: e.spoilt(s, engine_steps=-1),
    "odd-reason": lambda e, s: e.spoilt(s, finish_reason="abort"),
    "text-token": lambda e, s: e.spoilt(s, token_ids=["a"]),
}


def jump_clock() -> None:
    """The wall clock jumps by a year, forth and back, every time it is read."""
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (31_536_000 if calls[0] % 2 else -31_536_000)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Jumping:
            return cls.fromtimestamp(jumping(), tz)

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
    session.datetime = Jumping  # type: ignore[misc]


def kill_at_operation(n: int) -> None:
    """SIGKILL at the n-th of the operations that make files durable or give them their names."""
    left = [n]

    def counted(name: str, of: Any) -> None:
        real = getattr(of, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(of, name, operation)

    counted("fsync", os)
    counted("replace", Path)
    counted("write_text", Path)
    counted("write_table", store.pq)
    counted("mkdir", Path)


def faulty_main(argv: Sequence[str]) -> int:
    watchdog.RETURN_S, watchdog.STOP_PATIENCE_S, watchdog.GUARD_S = 5.0, 1.0, 1.0
    engines.null.NullEngine = FaultyEngine  # type: ignore[misc]
    fault, _, argument = os.environ.get("FAULT", "").partition(":")
    if fault == "clock":
        jump_clock()
    if fault == "killed-at-operation":
        kill_at_operation(int(argument))
    return main(["run", *argv], prog="run.py")


if __name__ == "__main__":
    sys.exit(faulty_main(sys.argv[1:]))
