"""Beside: a process of ours that works while a measurement goes on, and ends with it.

It says one line of JSON once it works, or why it does not ({"why_not": "..."}); it ends when its
input does, or when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

START_TIMEOUT_S = 30.0
PART_S = 60.0
"""A part is written again until it holds a minute."""

Self = TypeVar("Self", bound="Beside")


class Beside(ABC):
    """One such process, between entering and leaving; enter it before the clock starts. Never
    raises for a reason of its own.

    why_not  why it does not work, for the manifest; '' while it does
    told     what it said first
    """

    what: ClassVar[str]
    """What it is called in a sentence."""
    module: ClassVar[str]
    end_timeout_s: ClassVar[float]

    def __init__(self, environ: Mapping[str, str] | None, why_not: str) -> None:
        self._environ = dict(os.environ if environ is None else environ)
        self._process: subprocess.Popen[bytes] | None = None
        self.why_not = why_not
        self.told: Mapping[str, Any] = {}

    @abstractmethod
    def _words(self) -> Sequence[str]:
        """What the module is started with."""

    def __enter__(self: Self) -> Self:
        if not self.why_not:
            try:
                self._start()
            except Exception as error:  # noqa: BLE001 - a measurement must not end for this
                self.why_not = f"{self.what} could not start ({type(error).__name__}: {error})"
            if self.why_not:
                self._end(0.0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(Exception):
            self._end(self.end_timeout_s)

    def _start(self) -> None:
        # The child must find this very speedbench, wherever it was started from.
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [self._environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self._words(), "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**self._environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a terminal's Ctrl-C is for the run, which ends this one
        )
        self.told = json.loads(_first_line(self._process, START_TIMEOUT_S) or "{}")
        self.why_not = str(self.told.get("why_not", f"{self.what} ended before it began"))

    def _end(self, timeout_s: float) -> None:
        """Tell it to end, and wait until it has; one that does not is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()  # the end of its input tells it to end
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _first_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """What the process says first; '' if it ends or takes too long."""
    if process.stdout is None:
        return ""
    end_s, line = time.monotonic() + timeout_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, end_s - time.monotonic())):
                return ""
            some = os.read(process.stdout.fileno(), 65536)
            if not some:
                return ""
            line += some
    return line.decode()


def say(told: Mapping[str, Any]) -> int:
    """The one line, from within the process; the exit code that goes with it."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps(dict(told)) + "\n")
        sys.stdout.flush()
    return 1 if told["why_not"] else 0


class Parts:
    """Rows as numbered parts; the last one is written again until it is full.

    store  writes one part: of its number and its table
    """

    def __init__(
        self, number: int, schema: pa.Schema, store: Callable[[int, pa.Table], None]
    ) -> None:
        self._number, self._schema, self._store = number, schema, store
        self.rows: list[dict[str, Any]] = []

    def write(self) -> None:
        """Store what there is. A disk that is full loses samples, which the report tells."""
        if not self.rows:
            return
        try:
            self._store(self._number, pa.Table.from_pylist(self.rows, schema=self._schema))
        except OSError:
            return
        finally:
            if self.rows[-1]["time_ns"] - self.rows[0]["time_ns"] >= PART_S * 1e9:
                self.rows = []
                self._number += 1
