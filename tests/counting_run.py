"""`speedbench` with a null engine that writes down, in the file $STARTS, every start and end.

$FAULT: K:POLLS kills the engine that drafts K tokens, at that poll of its life, each time it lives;
K:start, it does not start; K:raise, its start ends in something unforeseen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import engines.null
from speedbench.cli import main
from speedbench.types import EngineDiedError, EngineSettings, Step, UserError


def note(text: str) -> None:
    with Path(os.environ["STARTS"]).open("a") as file:
        file.write(text + "\n")


class CountedEngine(engines.null.NullEngine):
    """At most one lives at a time, or the process ends."""

    n_alive = 0

    def __init__(self, settings: EngineSettings) -> None:
        k = 0 if settings.algorithm == "NONE" else settings.draft_length
        which, _, what = os.environ.get("FAULT", "-1:").partition(":")
        mine = int(which) == k
        self._polls_left = int(what) if mine and what.isdigit() else -1
        if mine and what == "start":
            raise UserError("no memory for so many drafts: draft fewer")
        if mine and what == "raise":
            raise RuntimeError("CUDA is gone")
        super().__init__(settings)
        note(f"start k={k} slots={settings.concurrency}")
        CountedEngine.n_alive += 1
        if CountedEngine.n_alive > 1:
            note("two engines at once")
            sys.exit(99)
        self._open = True

    def poll(self) -> Sequence[Step]:
        self._polls_left -= 1
        if self._polls_left == 0:
            raise EngineDiedError("its GPU fell off the bus")
        return super().poll()

    def forget(self) -> None:
        note("forget")
        super().forget()

    def close(self) -> None:
        super().close()
        if self._open:
            CountedEngine.n_alive -= 1
            self._open = False
            note("close")


if __name__ == "__main__":
    engines.null.NullEngine = CountedEngine  # type: ignore[misc]
    sys.exit(main(sys.argv[1:]))
