"""`run.py` with a null engine that spreads over nodes: the first measures, the others serve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import engines.null
from speedbench.cli import main
from speedbench.types import EngineSettings, UserError


class SpreadEngine(engines.null.NullEngine):
    """Its nodes meet through files in $MEET; those after the first serve for ever."""

    node_args = {"n_nodes": "nnodes", "node_rank": "node_rank", "address": "dist_init_addr"}  # noqa: RUF012

    def __init__(self, settings: EngineSettings) -> None:
        arguments = dict(settings.engine_args)
        self._place = {name: arguments.pop(name) for name in self.node_args.values()}
        self._meet = Path(os.environ["MEET"])
        rank = self._place["node_rank"]
        if str(rank) == os.environ.get("FAILING_NODE"):
            raise UserError("this node has no GPU: mend it")
        (self._meet / f"node-{rank}.json").write_text(json.dumps(self._place))
        if rank:
            worker = subprocess.Popen(["sleep", "600"])
            (self._meet / "worker").write_text(str(worker.pid))
            worker.wait()  # as vLLM's do, whatever becomes of the first node
            (self._meet / "worker-ended").touch()
        while not (self._meet / "node-1.json").exists():
            time.sleep(0.05)
        super().__init__(replace(settings, engine_args=arguments))


if __name__ == "__main__":
    engines.null.NullEngine = SpreadEngine  # type: ignore[misc]
    sys.exit(main(["run", *sys.argv[1:]], prog="run.py"))
