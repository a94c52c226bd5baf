"""Real SGLang in its production layout, in an environment of its own, held against the closed form.

Its compiled CPU kernels cannot be had; tests/sglang_cpu_shim stands in for the few that are needed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import calibrate, inputs, store
from speedbench.calibration import closed_form
from speedbench.checks import reconcile
from speedbench.config import from_dict
from speedbench.report.summary import summarize
from tests.cpu_engines import SGLANG as ENGINE_ARGS
from tests.processes import children_of, is_running

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that has SGLang."""
    path = Path(os.environ.get("SPEEDBENCH_SGLANG_PYTHON") or ROOT / ".venv-sglang/bin/python")
    if not path.exists():
        pytest.fail(f"{path} does not exist: scripts/test.sh installs SGLang's environment")
    return str(path)


@pytest.fixture(scope="session")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("yaml") / "sglang.yaml"
    path.write_text(json.dumps({"engine_args": ENGINE_ARGS}))
    return str(path)


def environment(python: str) -> dict[str, str]:
    return {
        **os.environ,
        # The n-gram trie is compiled when it is first used, by the ninja of that environment.
        "PATH": os.pathsep.join([str(Path(python).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "sglang_cpu_shim"), str(ROOT)]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SHIM_TRITON": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # otherwise the first drafts wait for a compiler
        "HF_HUB_OFFLINE": "1",
    }


def speedbench(python: str, *words: str, fork: bool = False) -> subprocess.CompletedProcess[str]:
    """fork: start SGLang's processes faster than it does, where many engines are started."""
    return subprocess.run(
        [python, "-m", "speedbench", *words],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=1800,
        env={**environment(python), **({"SHIM_FORK": "1"} if fork else {})},
    )  # fmt: skip


def config(models: Path, **changes: Any) -> dict[str, Any]:
    return {
        "engine": "SGLANG",
        "engine_args": ENGINE_ARGS,
        "model_dir": str(models / "word" / "target"),
        "draft_model_dir": str(models / "word" / "draft"),
        "speculative_algorithm": "DRAFT_TARGET",
        "draft_length": 3,
        "dataset": "calibration",
        "concurrency": 16,
        "output_length": 40,
        "warmup": 4,
        **changes,
    }


def loaded(directory: Path) -> tuple[store.Run, inputs.Prepared]:
    run = store.load(directory)
    return run, inputs.prepare(from_dict(run.manifest["config"]))


# ---------------------------------------------------------------- every step


def cases_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Case -> verdict, of every line that calibrate printed."""
    lines = re.findall(r"^([a-z][\w-]+)\s+\d+\s+\d+\s{2,}(\S.*)$", done.stdout, re.MULTILINE)
    return dict(lines)


def test_every_step_of_every_request_is_the_known_one(
    python: str, yaml: str, tmp_path: Path
) -> None:
    """Greedy, all that drafts along a chain, and the experts of a Mixture-of-Experts target. At a
    temperature drafts are not verified as they should be on a CPU: that is found out and said."""
    done = speedbench(
        python, "calibrate", "--engine", "SGLANG", "--algorithm",
        "NONE,DRAFT_TARGET,EAGLE,EAGLE3,MTP,NGRAM", "--draft_length", "3", "--concurrency", "16",
        "--output_length", "40", "--runtime_params", yaml, "--save_dir", str(tmp_path / "c"),
        fork=True,
    )  # fmt: skip
    verdicts = cases_of(done)
    exact = {name for name, verdict in verdicts.items() if verdict == "exact"}
    assert exact == {
        "none-n16-o40-t0", "draft_target-k3-n16-o40-t0", "draft_target-natural-k3-n8-o40-t0",
        "eagle-k3-n16-o40-t0", "eagle3-k3-n16-o40-t0", "eagle3-pruned-k3-n16-o40-t0",
        "mtp-k3-n16-o40-t0", "routed-experts-n16-o40-t0",
    }, done.stdout + done.stderr[-3000:]  # fmt: skip
    # SGLang's n-gram trie is shared: what it drafts at this concurrency depends on the others.
    assert verdicts["ngram-k3-n16-o40-t0"] == "consistent"
    sampled = "draft_target-sampled-k3-n16-o40-t1"
    assert (done.returncode, verdicts[sampled]) == (1, "FAULT: acceptance rate")
    assert set(verdicts) == exact | {"ngram-k3-n16-o40-t0", sampled}
    for name in verdicts:
        run = store.load(tmp_path / "c" / "runs" / name)
        assert (run.columns.engine_steps == 1).all(), name
        errors = [c.sentence for c in summarize(run).checks if c.level == "error"]
        assert len(errors) == (name == sampled), errors
        assert all("most likely token" in sentence for sentence in errors)


@pytest.fixture(scope="module")
def driven(python: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on three engines, one after the other in one process: K = 1, the same without the hook,
    and n-grams."""
    folder = tmp_path_factory.mktemp("driven")

    def run(name: str, **changes: Any) -> dict[str, Any]:
        more = {key: changes.pop(key) for key in ("lag_s", "prompt") if key in changes}
        return {"config": {"save_dir": str(folder / name), **changes}, **more}

    one = config(models, draft_length=1, num_requests=88)
    ngram = config(
        models, speculative_algorithm="NGRAM", draft_model_dir=None, concurrency=1, warmup=2,
        num_requests=44, output_length=64,
    )  # fmt: skip
    hooked = [
        run("lag", lag_s=0.002),
        run("refused", num_requests=22, prompt=[]),
        run("short", num_requests=22, output_length=1),
    ]
    asked = [
        {"config": one, "hooked": True, "runs": hooked},
        {"config": one, "hooked": False, "runs": [run("chunks", lag_s=0.002)]},
        {"config": ngram, "hooked": True, "runs": [run("ngram"), run("ngram again")]},
    ]
    done = subprocess.run(
        [python, "-m", "tests.sglang_driver", json.dumps(asked)],
        capture_output=True, text=True, cwd=ROOT, env=environment(python), check=False,
        timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert ends == [["finished", int(name == "refused")] for name in RUNS]
    return folder


RUNS = ("lag", "refused", "short", "chunks", "ngram", "ngram again")


def test_a_lagging_consumer_changes_no_step(driven: Path) -> None:
    run, prepared = loaded(driven / "lag")
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence
    assert (run.columns.engine_steps == 1).all()
    info = run.manifest["engine"]
    assert info["settings"]["steps"] == "scheduler messages"
    assert (info["draft_length"], info["prefix_cache"], info["max_num_seqs"]) == (1, False, 16)
    assert info["max_seq_len"] == 4096 - 2  # SGLang cuts answers short that come nearer
    assert info["unused"] == []


@pytest.mark.parametrize("name", ["lag", "short", "ngram", "ngram again"])
def test_the_engines_counts_are_those_of_the_steps(driven: Path, name: str) -> None:
    books = reconcile(loaded(driven / name)[0])
    assert books["exact"]
    assert (books["unexplained_accepted"], books["unexplained_drafts"]) == (0, 0)
    assert (books["counter_drafts"] > 0) == (name != "short")  # prefills only


def test_a_request_the_engine_refuses_is_recorded_and_the_others_go_on(driven: Path) -> None:
    run, _ = loaded(driven / "refused")
    assert (int(run.columns.failed.sum()), len(run.columns.failed)) == (1, 22)
    errors = [e for e in run.turns["error"].to_pylist() if e]
    assert len(errors) == 1
    assert errors[0].startswith("SGLang refused the request")


def test_without_the_hook_chunks_are_marked_and_acceptance_is_the_engines(
    driven: Path, models: Path
) -> None:
    """A version that lacks the hook: its stream merges steps, and its counts are what is left."""
    run, prepared = loaded(driven / "chunks")
    columns = run.columns
    assert run.manifest["engine"]["settings"]["steps"] == "public chunks"
    assert (columns.engine_steps[columns.step > 0] == 0).all()
    assert columns.n_tokens.max() > 2  # it did merge
    known = closed_form.read_known_answer(models / "word" / "target")
    case = calibrate.case_of(run, prepared.stop_token_ids)
    expected = [
        step.accepted + 1
        for request in calibrate.observed_requests(run, prepared)
        for step in case.steps(known, request.prompt_ids)[1:]
    ]
    summary = summarize(run)
    assert summary.lengths["al"].value is None
    assert summary.lengths["al_engine"].value == pytest.approx(np.mean(expected), abs=1e-12)
    assert any("merge" in c.sentence for c in summary.checks if c.level == "warning")


@pytest.mark.parametrize("name", ["ngram", "ngram again"])
def test_ngram_drafts_are_those_of_its_trie(driven: Path, models: Path, name: str) -> None:
    """One request after the other, from a trie that was emptied after the warm-up: every step of
    every request, by a twin."""
    run, prepared = loaded(driven / name)
    verdict = calibrate.judge(run, prepared)
    assert (verdict.ok, verdict.kind) == (True, "exact"), verdict.sentence
    assert int(run.columns.accepted.sum()) > 500


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("algorithm", "engine_args", "told"),
    [
        ("DFLASH", {}, ["DFLASH", "'cpu'"]),  # by SGLang, before it starts a process
        # By one. A share below zero: what others free meanwhile cannot make it enough.
        ("NONE", {"mem_fraction_static": -1.0}, ["no GPU memory", "--max_seq_len"]),
    ],
)
def test_what_cannot_start_is_one_sentence_and_leaves_nothing(
    python: str, models: Path, tmp_path: Path, algorithm: str, engine_args: Any, told: list[str]
) -> None:
    yaml = tmp_path / "engine.yaml"
    changed = {**ENGINE_ARGS, **engine_args}
    changed.pop("max_total_tokens")
    yaml.write_text(json.dumps({"engine_args": changed}))
    draft = ["--draft_model_dir", str(models / "word/draft")] if algorithm != "NONE" else []
    done = speedbench(
        python, "run", "--engine", "SGLANG", "--model_dir", str(models / "word/target"),
        "--speculative_algorithm", algorithm, *draft, "--dataset", "calibration",
        "--output_length", "8", "--runtime_params", str(yaml), "--save_dir", str(tmp_path / "run"),
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr[-3000:]
    assert last.startswith("speedbench"), last
    assert all(word in last for word in told), last
    assert not (tmp_path / "run").exists()
    # The call above returns when all that inherited its output has ended.


# ---------------------------------------------------------------- death


@contextmanager
def running(python: str, yaml: str, models: Path, run_dir: Path) -> Iterator[Any]:
    """A run that has stored something; afterwards none of its processes may be left."""
    process = subprocess.Popen(
        [python, str(ROOT / "run.py"), "--engine", "SGLANG", "--model_dir",
         str(models / "word/target"), "--draft_model_dir", str(models / "word/draft"),
         "--speculative_algorithm", "DRAFT_TARGET", "--dataset", "calibration", "--num_requests",
         "44", "--concurrency", "2", "--output_length", "300", "--ignore_eos",
         "--runtime_params", yaml, "--save_dir", str(run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=ROOT, env=environment(python),
    )  # fmt: skip
    family: list[int] = []
    try:
        deadline = time.monotonic() + 300
        while not list((run_dir / "turns").glob("*.parquet")):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "nothing was stored in 300 s"
            time.sleep(0.05)
        family = children_of(process.pid)
        yield process
        deadline = time.monotonic() + 60
        while left := [pid for pid in family if is_running(pid)]:
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.2)
    finally:
        for pid in [process.pid, *family]:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_dead_scheduler_ends_the_run_in_order_and_it_can_be_resumed(
    python: str, yaml: str, models: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with running(python, yaml, models, run_dir) as process:
        scheduler = next(
            pid
            for pid in children_of(process.pid)
            if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(scheduler, signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err[-3000:]
    assert "a process of SGLang ended with exit code -9" in err
    manifest = store.read_manifest(run_dir)
    assert (manifest["status"], manifest["sessions"][0]["end"]) == ("failed", "engine died")
    n_stored = len(store.load(run_dir).columns.conversation_ids)
    assert 0 < n_stored < 44

    done = speedbench(
        python, "run", "--runtime_params", yaml, "--save_dir", str(run_dir), "--resume"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run, prepared = loaded(run_dir)
    assert (run.manifest["status"], len(run.manifest["sessions"])) == ("complete", 2)
    assert len(run.columns.conversation_ids) == 44
    assert len(run.manifest["sessions"]) == 2
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence


def test_ctrl_c_ends_in_order_and_leaves_no_process(
    python: str, yaml: str, models: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with running(python, yaml, models, run_dir) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the engine's processes too
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-3000:]
    assert store.read_manifest(run_dir)["status"] == "partial"
    assert len(store.load(run_dir).columns.conversation_ids) > 0
    assert "Acceptance" in out
