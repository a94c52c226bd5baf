"""Faults on real vLLM in its production layout: an engine core and a worker in processes of their
own, which do not notice by themselves when the process that measures is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from speedbench import store
from tests.processes import children_of, is_running

ROOT = Path(__file__).parent.parent.parent
N_ROWS = 600


def start(models: Path, run_dir: Path, *more: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start or resume the run; returned once it has stored something new, with its processes."""
    parameters = run_dir.parent / "p.yaml"
    parameters.write_text("engine_args: {enforce_eager: true}")
    n_before = len(list((run_dir / "turns").glob("[0-9]*.parquet")))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "--engine", "VLLM", "--model_dir",
         str(models / "word" / "target"), "--dataset", "random", "--random_isl", "8",
         "--num_requests", str(N_ROWS), "--output_length", "64", "--concurrency", "4",
         "--runtime_params", str(parameters), "--save_dir", str(run_dir), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )  # fmt: skip
    limit_s = time.monotonic() + 300
    while len(list((run_dir / "turns").glob("[0-9]*.parquet"))) <= n_before:
        if process.poll() is not None or time.monotonic() > limit_s:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.05)
    return process, children_of(process.pid)


def core_of(children: list[int]) -> int:
    return next(p for p in children if "EngineCore" in command_of(p))


def command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    return ""


def ended(process: subprocess.Popen[str], children: list[int]) -> tuple[int, str]:
    """Its exit code and what it said; nothing that it started runs on."""
    out, _ = process.communicate(timeout=180)
    limit_s = time.monotonic() + 15
    while left := [p for p in children if is_running(p)]:
        if time.monotonic() > limit_s:
            for one in left:
                os.kill(one, signal.SIGKILL)
            raise AssertionError(f"left behind: {left}")
        time.sleep(0.1)
    return process.returncode, out


def answers(run_dir: Path) -> dict[str, tuple[int, ...]]:
    rows = [r for r in store.load(run_dir).turns.to_pylist() if r["finish_reason"] != "error"]
    assert set(Counter(row["conversation_id"] for row in rows).values()) == {1}
    return {row["conversation_id"]: tuple(row["output_token_ids"]) for row in rows}


def run_and_engine(models: Path, tmp_path: Path) -> None:
    """The run survives its engine, the engine does not survive the run."""
    run_dir = tmp_path / "run"

    def last_session() -> dict[str, object]:
        manifest = json.loads((run_dir / "manifest.json").read_text())
        return dict(manifest["sessions"][-1])

    process, children = start(models, run_dir)
    os.kill(core_of(children), signal.SIGKILL)
    code, out = ended(process, children)
    assert (code, last_session()["end"]) == (1, "engine died"), out
    kept = answers(run_dir)

    process, children = start(models, run_dir, "--resume", "--stall_timeout", "5")
    os.kill(core_of(children), signal.SIGSTOP)
    code, out = ended(process, children)
    assert (code, last_session()["end"]) == (1, "stalled"), out
    stacks = (run_dir / "stalls" / "00001.txt").read_text()
    assert "EngineCore" in stacks
    assert "poll" in stacks
    assert kept.items() <= answers(run_dir).items()
    kept = answers(run_dir)

    process, children = start(models, run_dir, "--resume")
    process.kill()
    code, out = ended(process, children)
    assert code == -signal.SIGKILL
    assert kept.items() <= answers(run_dir).items()
    kept = answers(run_dir)

    process, children = start(models, run_dir, "--resume")
    process.send_signal(signal.SIGTERM)
    code, out = ended(process, children)
    assert code == 143, out
    assert "Traceback" not in out
    assert last_session()["end"] == "stopped"
    assert kept.items() <= answers(run_dir).items()
