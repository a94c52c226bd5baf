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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NICENESS = 10


class Beside:
    """One such process, as who started it sees it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, module: str, words: Sequence[str], environ: Mapping[str, str], timeout_s: float
    ) -> Mapping[str, Any]:
        """What the process says first; it goes on if `why_not` in that is ''."""
        # The child must find this very speedbench, wherever it was started from.
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a terminal's Ctrl-C is for the run, which ends this one
        )
        told: Mapping[str, Any] = json.loads(_first_line(self._process, timeout_s) or "{}")
        told = {"why_not": "the sampler ended before it began", **told}
        if told["why_not"]:
            self.end(0.0)
        return told

    def end(self, timeout_s: float) -> None:
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


def give_way() -> None:
    """What is measured goes first."""
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
