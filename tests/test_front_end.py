"""vLLM's own front end over a core of numbers: what the benchmark counts is what was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import front_end  # noqa: E402
from front_end import Found  # noqa: E402
from overhead import Case  # noqa: E402

from speedbench import store  # noqa: E402


def test_what_the_core_takes_is_not_the_harnesss() -> None:
    assert Found(cpu_s=5.0, core_s=2.0, n_steps=1_000_000, n_kept=1).us == pytest.approx(3.0)


def test_the_page_gives_medians_and_the_range_of_ratios() -> None:
    ours = [Found(cpu_s, 1.0, 1_000_000, 1_000_000) for cpu_s in (3.0, 4.0, 3.5)]  # 2, 3 and 2.5 us
    published = [
        Found(cpu_s, 1.0, 1_000_000, 900_000) for cpu_s in (21.0, 13.0, 11.0)
    ]  # 20, 12, 10 us
    page = front_end.page({(256, 512): (ours, published)}, ROOT)
    assert "| 256 | 512 | 2.50 | 12.00 | 4.0 (4.0-10.0) | 100.0% | 90.0% |" in page


@pytest.mark.real
def test_every_step_of_the_core_is_recorded_through_vllms_front_end(
    models: Path, tmp_path: Path
) -> None:
    case = Case("speedbench", 4, front_end.K, output_length=50, n_steps=300)
    script = f"""
import sys; sys.path.insert(0, {str(ROOT / "scripts")!r})
import json, os, front_end, overhead
from pathlib import Path
case = overhead.Case(**json.loads(sys.argv[1]))
found = front_end.measure_ours(case, Path({str(models / "word")!r}), Path({str(tmp_path / "r")!r}))
print(json.dumps([found.n_steps, case.n_rows]), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(asdict(case))], cwd=tmp_path,
                          env={**os.environ, **front_end.ENVIRONMENT}, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    n_steps, n_rows = json.loads(done.stdout.splitlines()[-1])
    columns = store.load(tmp_path / "r").columns
    assert len(columns.step) == n_steps
    assert columns.n_requests == n_rows
    assert columns.n_tokens.sum() == 50 * n_rows
    # The core drafts K tokens in each decode step; what it accepted is what a step adds, less one,
    # but for the last ones, which may show less: those are told as the request ends.
    decode, last = columns.step > 0, columns.is_last()
    assert set(columns.drafted[decode]) == {front_end.K}
    going = decode & ~last
    assert (columns.accepted[going] == columns.n_tokens[going] - 1).all()
    assert (columns.accepted[last] >= columns.n_tokens[last] - 1).all()
