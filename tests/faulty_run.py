"""`run.py` with a null engine that fails where FAULT says: RANK:WHERE, or RANK:WHERE:POLLS.

WHERE: start (the engine does not start), refuse (a UserError at the start), forget (it dies as its
warm-up ends), die (the engine dies),
crash (it raises something unforeseen), kill (the whole process is killed), differ (its engine is
not like the others').
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace

import engines.null
from speedbench.cli import main
from speedbench.types import EngineDiedError, EngineInfo, EngineSettings, Step, UserError


class FaultyEngine(engines.null.NullEngine):
    def __init__(self, settings: EngineSettings) -> None:
        rank, where, *polls = os.environ.get("FAULT", "-1:").split(":")
        mine = rank == os.environ.get("OMPI_COMM_WORLD_RANK", "0")
        self._where = where if mine else ""
        self._polls_left = int(polls[0]) if polls else 0
        if self._where == "start":
            raise RuntimeError("no GPU answers")
        if self._where == "refuse":
            raise UserError("the weights are not there: mount them")
        super().__init__(settings)

    def poll(self) -> Sequence[Step]:
        self._polls_left -= 1
        if self._polls_left < 0:
            if self._where == "die":
                raise EngineDiedError("the engine ended")
            if self._where == "crash":
                raise ZeroDivisionError("something unforeseen")
            if self._where == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().poll()

    def forget(self) -> None:
        if self._where == "forget":
            raise EngineDiedError("its GPU is gone")
        super().forget()

    def describe(self) -> EngineInfo:
        info = super().describe()
        return replace(info, max_num_seqs=7) if self._where == "differ" else info


if __name__ == "__main__":
    engines.null.NullEngine = FaultyEngine  # type: ignore[misc]
    sys.exit(main(["run", *sys.argv[1:]], prog="run.py"))
