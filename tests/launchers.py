"""How tests start processes under a real mpirun, the one that is installed beside this Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
MPIRUN = Path(sys.executable).parent / "mpirun"
NULL = ("--engine", "NULL", "--random_isl", "4")


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without what a launcher sets, allowing an mpirun as root (containers)."""
    launcher = ("OMPI_", "PMI_", "PMIX_", "SLURM_", "SPEEDBENCH_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, **allowed, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def mpirun(
    n: int, *arguments: str, options: tuple[str, ...] = (), script: str = "run.py",
    environment: Mapping[str, str] | None = None, timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run a script of ours in n processes. Returns when mpirun does."""
    return subprocess.run(
        [str(MPIRUN), "-n", str(n), "--oversubscribe", *options, sys.executable,
         str(ROOT / script), *arguments],
        capture_output=True, text=True, check=False, timeout=timeout_s,
        env=clean_environment(**(environment or {})),
    )  # fmt: skip
