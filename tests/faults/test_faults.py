"""The quick form of the fault campaign: every fault once, on real processes.

`scripts/faults.py` runs the whole of it and writes docs/faults.md.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.faults import real
from tests.faults.cases import FAULTS, Fault
from tests.faults.scene import CannotError, Scene


@pytest.mark.parametrize(
    ("fault", "turn"),
    [pytest.param(f, i, id=f"{f.name}-{i}") for f in FAULTS for i in range(f.n_quick)],
)
def test_what_is_promised_is_kept(fault: Fault, turn: int, tmp_path: Path) -> None:
    try:
        fault.happen(Scene(tmp_path, Random(turn)))
    except CannotError as reason:
        pytest.skip(str(reason))


@pytest.mark.real
def test_a_run_survives_its_engine_and_the_engine_does_not_survive_the_run(
    models: Path, tmp_path: Path
) -> None:
    """In this file because files with few tests come last, and this one takes minutes."""
    pytest.importorskip("vllm")
    real.run_and_engine(models, tmp_path)
