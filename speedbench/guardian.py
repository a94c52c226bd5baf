"""The guardian: a process that outlives the one that measures, if only for a moment.

Engines' processes do not notice when the process that started them is killed: vLLM's core and its
workers then hold their memory for ever. The guardian notices, and ends them. It also hears that the
measuring process is alive; one that lets none of its threads run any more it ends, too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speedbench import processes

POLL_S = 1.0
SCAN_S = (1.0, 30.0)
"""Between looks at what the engine has started: at first, and at most; each costs milliseconds."""


class Guard:
    """The measuring process's end of it. Where the guardian could not be started, or is gone, the
    run goes on without."""

    def __init__(self, process: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process

    def expect(self, silence_s: float, stacks: Path) -> None:
        """From now on: be called dead after so long without a sign of life, and described there."""
        self._tell(f"expect {silence_s} {stacks.absolute()}")

    def alive(self) -> None:
        self._tell("alive")

    def relax(self) -> None:
        self._tell("relax")

    def _tell(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._process.stdin.write(line.encode() + b"\n")


UNGUARDED = Guard()


@contextmanager
def guarded() -> Iterator[Guard]:
    """While an engine may be running: somebody ends its processes if this one is killed."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "speedbench.guardian", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a terminal's Ctrl-C is for the run
        )
    except OSError:
        yield UNGUARDED
        return
    if process.stdin is not None:
        os.set_blocking(process.stdin.fileno(), False)  # a guardian that is stuck holds up nobody
    guard = Guard(process)
    try:
        yield guard
    finally:
        process.kill()  # it has nothing left to do
        process.wait()


def serve(parent: int) -> None:
    """Until the parent is gone; one that ends in order ends this process first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a batch system's notice is for the run
    processes.give_way()
    watched = _Watched(parent)
    while True:
        if os.getppid() != parent:  # the pipe alone does not tell: forks keep it open
            watched.end_what_is_left()
            return
        if select.select([0], [], [], POLL_S)[0]:
            text = os.read(0, 1 << 16)
            if not text and os.getppid() == parent:
                time.sleep(POLL_S)  # it is about to end
            watched.hear(text)
        watched.look()


class _Watched:
    """The measuring process: what its engine has started, and when it was last heard of."""

    def __init__(self, parent: int) -> None:
        self.known: dict[int, str] = {}
        self._parent = parent
        self._scan_s, self._next_scan_s = SCAN_S[0], 0.0
        self._limit_s = float("inf")
        self._stacks = Path()
        self._silent_s, self._last_s = 0.0, time.monotonic()
        self._rest = b""

    def hear(self, text: bytes) -> None:
        """Take what the parent says."""
        *lines, self._rest = (self._rest + text).split(b"\n")
        self._silent_s = 0.0
        for line in lines:
            word, _, more = line.decode().partition(" ")
            if word == "expect":
                limit, _, path = more.partition(" ")
                self._limit_s, self._stacks = float(limit), Path(path)
                self._scan_s, self._next_scan_s = SCAN_S[0], 0.0  # an engine has just started
            elif word == "relax":
                self._limit_s = float("inf")

    def look(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_scan_s:
            found = processes.of_engine(self._parent)
            self.known = {p: when for p in [*self.known, *found] if (when := self._since(p))}
            self._scan_s = min(2 * self._scan_s, SCAN_S[1])
            self._next_scan_s = now_s + self._scan_s
        # Silence is what this process has seen of it: a batch system may have suspended both.
        self._silent_s += min(now_s - self._last_s, 2 * POLL_S)
        if processes.is_suspended(self._parent):  # by Ctrl-Z, say
            self._silent_s = 0.0
        self._last_s = now_s
        if self._silent_s > self._limit_s:
            self._end()

    def end_what_is_left(self) -> None:
        """Of a parent that is gone: what it had started, and what that has started since."""
        begun = {p: when for p, when in self.known.items() if processes.started(p) == when}
        younger = {d: processes.started(d) for p in begun for d in processes.of_engine(p)}
        processes.kill({**younger, **begun}.items())

    def _since(self, process: int) -> str:
        """When a known process began, if it is still the same."""
        when = processes.started(process)
        return when if self.known.get(process, when) == when else ""

    def _end(self) -> None:
        """End a process none of whose threads runs."""
        self._limit_s = float("inf")
        found = [self._parent, *processes.of_engine(self._parent)]
        text = f"process {self._parent} let none of its threads run for {self._silent_s:.0f} s\n\n"
        text += "\n".join(map(processes.told, found))
        text += processes.end(found)
        with contextlib.suppress(OSError):
            self._stacks.parent.mkdir(exist_ok=True)
            with self._stacks.open("a", encoding="utf-8") as file:
                file.write(text)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
