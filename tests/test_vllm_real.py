"""Real vLLM, its core in its own process, held against the closed form. Minutes, not seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import engines
from speedbench import calibrate, inputs, session, store
from speedbench.calibration.verdict import Fault
from speedbench.config import RunConfig, from_dict
from speedbench.report.summary import summarize
from speedbench.target import Target
from speedbench.types import Engine, EngineCounters, EngineInfo, Request, Step
from tests.processes import children_of, is_running

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
EAGER = {"enforce_eager": True}
ONE_THREAD = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
}  # fmt: skip
"""For models this small a second thread only waits, and pinned ones wait for other processes."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def eager_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("yaml") / "eager.yaml"
    path.write_text("engine_args: {enforce_eager: true}\n")
    return path


def config(models: Path, pair: str, save_dir: Path, **changes: Any) -> RunConfig:
    return from_dict(
        {
            "engine": "VLLM",
            "model_dir": str(models / pair / "target"),
            "draft_model_dir": str(models / pair / "draft"),
            "speculative_algorithm": "DRAFT_TARGET",
            "draft_length": 3,
            "dataset": "calibration" if pair == "word" else "mini",
            "concurrency": 16,
            "output_length": 40,
            "engine_args": EAGER,
            "warmup": 4,
            "save_dir": str(save_dir),
            **changes,
        }
    )


@contextmanager
def started(settings: RunConfig) -> Iterator[Any]:
    """A vLLM for these settings, ended whatever happens."""
    running = engines.adapter("VLLM")(settings.engine_settings())
    try:
        yield running
    finally:
        running.close()


@dataclass(frozen=True)
class Fresh:
    """A vLLM with the word pair and K = 3, and the first run it did, without a warm-up."""

    engine: Engine
    run: store.Run
    prepared: inputs.Prepared


@pytest.fixture(scope="module")
def fresh(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    directory = tmp_path_factory.mktemp("first") / "run"
    settings = config(models, "word", directory, warmup=0, num_requests=22)
    with started(settings) as running:
        run, prepared, _ = measured(running, settings)
        yield Fresh(running, run, prepared)


@pytest.fixture(scope="module")
def engine(fresh: Fresh) -> Engine:
    """One vLLM for every test that needs no other."""
    return fresh.engine


def measured(
    engine: Engine, settings: RunConfig
) -> tuple[store.Run, inputs.Prepared, session.Outcome]:
    prepared = inputs.prepare(settings)
    directory = Path(settings.save_dir or "")
    outcome = session.measure(settings, prepared, engine, Target(directory))
    return store.load(directory), prepared, outcome


def with_plugin() -> dict[str, str]:
    path = [str(Path(__file__).parent / "vllm_cpu_fix"), str(ROOT)]
    return {"PYTHONPATH": os.pathsep.join(path)}


def calibrate_command(
    eager_yaml: Path, save_dir: Path, *more: str
) -> tuple[int, list[tuple[str, int, int, str]], str]:
    """Exit code, (case, requests, steps, verdict) of every line, and all output."""
    done = subprocess.run(
        [sys.executable, "-m", "speedbench", "calibrate", "--engine", "VLLM", "--runtime_params",
         str(eager_yaml), "--save_dir", str(save_dir), *more],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, **ONE_THREAD, **with_plugin()},
    )  # fmt: skip
    form = r"^([a-z0-9_-]+-n\d+-o\d+-t\S+)\s+(\d+)\s+(\d+)\s+(.+)$"
    lines = re.findall(form, done.stdout, re.MULTILINE)
    cases = [(name, int(n), int(steps), verdict) for name, n, steps, verdict in lines]
    return done.returncode, cases, done.stdout + done.stderr[-3000:]


KNOWN = (
    "none", "draft_target", "eagle", "eagle3", "eagle3-pruned", "mtp", "medusa", "pard", "dflash",
    "ngram", "suffix",
)  # fmt: skip
"""What every installation of this vLLM on a CPU has, as its cases are named."""


def test_every_step_of_every_request_is_the_known_one(eager_yaml: Path, tmp_path: Path) -> None:
    """Every algorithm, one request at a time and 64 of them, from the shortest answers to ones of
    many steps; natural multi-turn prompts; and sampled, which this vLLM gets right only with the
    function that its CPU build lacks (tests/vllm_cpu_fix)."""
    code, cases, output = calibrate_command(
        eager_yaml, tmp_path / "calibrate", "--draft_length", "3",
        "--concurrency", "1,64", "--output_length", "5,64",
    )  # fmt: skip
    assert code == 0, output
    verdicts = {name: verdict for name, _, _, verdict in cases}
    assert verdicts.pop("draft_target-sampled-k3-n64-o64-t1") == "interval", output
    assert verdicts.pop("draft_target-natural-k3-n8-o64-t0") == "exact", output
    for label in KNOWN:
        k = "" if label == "none" else "-k3"
        mine = {f"{label}{k}-n{n}-o{length}-t0" for n in (1, 64) for length in (5, 64)}
        assert mine <= verdicts.keys(), output
        assert {verdicts[name] for name in mine} == {"exact"}, output
    assert all(requests >= 33 and steps > 0 for _, requests, steps, _ in cases)


def test_other_draft_lengths_are_known_too(eager_yaml: Path, tmp_path: Path) -> None:
    code, cases, output = calibrate_command(
        eager_yaml, tmp_path / "calibrate", "--algorithm", "DRAFT_TARGET,NGRAM",
        "--draft_length", "1,5", "--concurrency", "8", "--output_length", "20",
    )  # fmt: skip
    assert code == 0, output
    names = {name for name, _, _, verdict in cases if verdict == "exact"}
    assert names >= {f"{a}-k{k}-n8-o20-t0" for a in ("draft_target", "ngram") for k in (1, 5)}


def test_an_engine_that_samples_wrongly_is_found_out(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    """Stock vLLM on a CPU: greedy is exact (other tests), sampling is not, and that is said."""
    settings = config(models, "word", tmp_path / "run", temperature=1.0, output_length=64)
    run, prepared, _ = measured(engine, settings)
    assert not calibrate.judge(run, prepared).ok
    errors = [c.sentence for c in summarize(run).checks if c.level == "error"]
    assert any("uninitialised" in sentence for sentence in errors)


def test_the_first_message_of_the_engine_is_recorded(fresh: Fresh) -> None:
    """vLLM's own handler waits for the core from the start; nothing may pass it by."""
    verdict = calibrate.judge(fresh.run, fresh.prepared)
    assert verdict.ok, verdict.sentence


def test_answers_of_one_token_are_recorded(engine: Engine, models: Path, tmp_path: Path) -> None:
    settings = config(models, "word", tmp_path / "run", output_length=1, num_requests=22)
    run, prepared, _ = measured(engine, settings)
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence


RUN_ALL = """
import json, sys
from speedbench.cli import main
for argv in json.loads(sys.argv[1]):
    print("exit code", main(argv))
"""


def test_what_vllm_refuses_at_the_start_is_one_sentence_and_leaves_no_process(
    models: Path, tmp_path: Path
) -> None:
    """The causes are told by processes that are gone by then: a cache too small for one request,
    and a draft model that is no EAGLE3 head."""
    small = tmp_path / "small.yaml"
    small.write_text("engine_args: {enforce_eager: true, kv_cache_memory_bytes: 1048576}\n")
    run = ["run", "--engine", "VLLM", "--model_dir", str(models / "word/target"), "--dataset",
           "calibration", "--runtime_params", str(small)]  # fmt: skip
    head = ["--speculative_algorithm", "EAGLE3", "--draft_model_dir", str(models / "word/draft")]
    environment = {**os.environ, **ONE_THREAD, **with_plugin()}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override what is asked for
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_ALL,
         json.dumps([[*run, "--save_dir", str(tmp_path / "a")],
                     [*run, *head, "--save_dir", str(tmp_path / "b")]])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert re.findall(r"^exit code (\d+)$", out, re.MULTILINE) == ["2", "2"], err[-3000:]
    too_small, unfit = re.findall(r"^speedbench: (vLLM did not start: .*)$", err, re.MULTILINE)
    assert "KV cache" in too_small
    assert "lower --max_seq_len" in too_small
    assert f"{models / 'word/draft'} is made for EAGLE3" in unfit
    left = subprocess.run(
        ["ps", "-o", "pid=,args=", "-s", str(process.pid)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert left.stdout.strip() == ""


def test_acceptance_lengths_and_counters_agree_with_the_closed_form(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    run, prepared, _ = measured(engine, config(models, "word", tmp_path / "run"))
    known = calibrate.known_answer(tmp_path / "run", prepared)
    assert known is not None
    assert known["ok"], known["sentence"]
    store.write_manifest(tmp_path / "run", {**run.manifest, "known_answer": known})
    summary = summarize(store.load(tmp_path / "run"))
    assert len(summary.categories) == 11
    for row in summary.categories:
        assert row.n_complete == row.n_expected == 22
        assert row.lengths["al"].value == pytest.approx(row.expected_al, abs=1e-12)
    assert [c for c in summary.checks if c.level != "note"] == []
    # 1 + accepted / drafts of the engine's own counters is the same number: every decode step
    # was drafted, and counters are not cut.
    assert summary.lengths["al_engine"].value == pytest.approx(
        summary.lengths["al_step"].value, abs=1e-12
    )
    engine_info = run.manifest["engine"]
    assert (engine_info["draft_length"], engine_info["max_num_seqs"]) == (3, 16)
    assert engine_info["prefix_cache"] is False


# ---------------------------------------------------------------- injected faults


@dataclass
class Faulty:
    """A real engine whose records are spoiled on the way, one fault at a time."""

    engine: Engine
    spoil: Callable[[Sequence[Step]], Sequence[Step]]

    def submit(self, request: Request) -> None:
        self.engine.submit(request)

    def poll(self) -> Sequence[Step]:
        return self.spoil(self.engine.poll())

    def counters(self) -> EngineCounters | None:
        return self.engine.counters()

    def describe(self) -> EngineInfo:
        return self.engine.describe()

    def forget(self) -> None:
        self.engine.forget()

    def close(self) -> None:
        pass


class Merging:
    """Two consecutive steps of a request arrive as one, as when a consumer lags."""

    def __init__(self) -> None:
        self.held: dict[str, Step] = {}

    def __call__(self, steps: Sequence[Step]) -> list[Step]:
        out = []
        for step in steps:
            first = self.held.pop(step.request_id, None)
            if first is not None:
                step = step._replace(token_ids=[*first.token_ids, *step.token_ids], detail=None)
            elif step.finish_reason is None and len(step.token_ids) > 1:
                self.held[step.request_id] = step
                continue
            out.append(step._replace(detail=None))
        return out


def prefill_counted(steps: Sequence[Step]) -> list[Step]:
    """The prefill is told to be a verification that accepted nothing."""
    return [
        s._replace(detail=[(0, 3), *s.detail[1:]]) if s.detail is not None else s for s in steps
    ]


def final_counted(steps: Sequence[Step]) -> list[Step]:
    """The cut last step is told to have accepted just what it shows."""
    return [
        s._replace(detail=[*s.detail[:-1], (len(s.token_ids) - 1, s.detail[-1][1])])
        if s.detail is not None and len(s.detail) > 1
        else s
        for s in steps
    ]


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (Merging(), "merged events"),
        (prefill_counted, "prefill counted"),
        (final_counted, "final step counted"),
    ],
)
def test_a_spoiled_record_is_noticed_and_named(
    engine: Engine, models: Path, tmp_path: Path, spoil: Any, fault: Fault
) -> None:
    settings = config(models, "word", tmp_path / "run", num_requests=55)
    run, prepared, _ = measured(Faulty(engine, spoil), settings)
    verdict = calibrate.judge(run, prepared)
    assert (verdict.ok, verdict.fault) == (False, fault), verdict.sentence


def test_another_k_than_asked_for_is_noticed_and_named(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    run, prepared, _ = measured(engine, config(models, "word", tmp_path / "run", num_requests=55))
    case = calibrate.case_of(run, prepared.stop_token_ids)
    verdict = calibrate.judge(run, prepared, replace(case, draft_length=2))
    assert (verdict.ok, verdict.fault) == (False, "off-by-one K"), verdict.sentence


def test_a_swapped_drafter_is_noticed_and_named(models: Path, tmp_path: Path) -> None:
    settings = config(
        models, "word", tmp_path / "run", draft_model_dir=str(models / "word" / "target"),
        num_requests=55,
    )  # fmt: skip
    with started(settings) as running:
        run, prepared, _ = measured(running, settings)
    verdict = calibrate.judge(run, prepared)
    assert (verdict.ok, verdict.fault) == (False, "swapped drafter"), verdict.sentence


# ---------------------------------------------------------------- a lagging consumer


def test_a_lagging_consumer_changes_no_step(engine: Engine, models: Path, tmp_path: Path) -> None:
    """Chunks of vLLM's async API merge under this load; recorded steps must not."""

    def lag(steps: Sequence[Step]) -> Sequence[Step]:
        time.sleep(0.001 * len(steps))
        return steps

    settings = config(models, "word", tmp_path / "run", num_requests=88)
    run, prepared, _ = measured(Faulty(engine, lag), settings)
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence
    assert (run.columns.engine_steps == 1).all()


# ---------------------------------------------------------------- faults of requests and runs


def measured_with_prompt(
    engine: Engine, settings: RunConfig, token_ids: Sequence[int]
) -> tuple[str, session.Outcome, store.Run]:
    """A run whose fourth row has these token IDs for its prompt; that row's id."""
    prepared = inputs.prepare(settings)
    victim = prepared.rows[3].id
    prompts = dict(prepared.prompts)
    prompts[victim, 0] = replace(prompts[victim, 0], token_ids=token_ids)
    directory = Path(settings.save_dir or "")
    spoiled = replace(prepared, prompts=prompts)
    outcome = session.measure(settings, spoiled, engine, Target(directory))
    return victim, outcome, store.load(directory)


def test_a_request_the_engine_refuses_is_recorded_and_the_others_go_on(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    settings = config(models, "word", tmp_path / "run", num_requests=22)
    victim, outcome, run = measured_with_prompt(engine, settings, [])  # vLLM takes no empty one
    assert (outcome.end.reason, outcome.n_failed) == ("finished", 1)
    assert run.columns.conversation_ids[int(run.columns.failed.argmax())] == victim
    assert len(run.columns.conversation_ids) == 22
    summary = summarize(run)
    assert (summary.n_failed, summary.n_conversations) == (1, 21)


def test_a_token_outside_the_vocabulary_is_refused_before_it_kills_the_engine(
    engine: Engine, models: Path, tmp_path: Path
) -> None:
    settings = config(models, "word", tmp_path / "run", num_requests=11)
    victim, outcome, run = measured_with_prompt(engine, settings, [5, 10**6])
    assert outcome.end.reason == "finished"
    assert [row["id"] for row in run.manifest["refused"]] == [victim]
    assert "1000000" in run.manifest["refused"][0]["reason"]
    assert len(run.columns.conversation_ids) == 10


def test_ctrl_c_ends_in_order_and_leaves_no_process(
    models: Path, eager_yaml: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), "--engine", "VLLM", "--model_dir",
         str(models / "word/target"), "--draft_model_dir", str(models / "word/draft"),
         "--speculative_algorithm", "DRAFT_TARGET", "--dataset", "calibration", "--concurrency",
         "2", "--output_length", "400", "--ignore_eos", "--runtime_params", str(eager_yaml),
         "--save_dir", str(run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((run_dir / "turns").glob("*.parquet")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "nothing was stored in 120 s"
        time.sleep(0.1)
    family = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the engine's processes too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err[-3000:]
    assert store.read_manifest(run_dir)["status"] == "partial"
    assert len(store.load(run_dir).columns.conversation_ids) > 0
    assert "Acceptance" in out
    deadline = time.monotonic() + 60
    while left := [pid for pid in family if is_running(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.2)
