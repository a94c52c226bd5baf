"""Two arms, and a sweep, on real vLLM: every step as computed, one engine per configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import engines.vllm
from speedbench import calibrate, inputs, store
from speedbench.cli import main
from speedbench.config import from_dict
from speedbench.report.arms import load_arms
from speedbench.report.pareto import pareto
from speedbench.types import EngineSettings

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For models this small a second thread only waits, and pinned ones wait for others."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """(K, slots) of every vLLM that is started."""
    found: list[tuple[int, int]] = []

    class Counted(engines.vllm.VllmEngine):
        def __init__(self, settings: EngineSettings) -> None:
            k = 0 if settings.algorithm == "NONE" else settings.draft_length
            found.append((k, settings.concurrency))
            super().__init__(settings)

    monkeypatch.setattr(engines.vllm, "VllmEngine", Counted)
    return found


def flags(models: Path, tmp_path: Path, *more: str) -> list[str]:
    yaml = tmp_path / "eager.yaml"
    yaml.write_text("engine_args: {enforce_eager: true}\n")
    return [
        "--engine", "VLLM", "--model_dir", str(models / "word" / "target"), "--draft_model_dir",
        str(models / "word" / "draft"), "--speculative_algorithm", "DRAFT_TARGET", "--dataset",
        "calibration", "--num_requests", "22", "--output_length", "24", "--warmup", "2",
        "--runtime_params", str(yaml), "--save_dir", str(tmp_path / "d"), *more,
    ]  # fmt: skip


def judged(directory: Path) -> store.Run:
    """A run, once every one of its steps was found to be the closed form's."""
    run = store.load(directory)
    prepared = inputs.prepare(from_dict(run.manifest["config"]))
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence
    assert verdict.kind == "exact"
    assert run.manifest["known_answer"]["ok"]
    assert len(run.columns.conversation_ids) == 22
    assert run.manifest["status"] == "complete"
    return run


def test_two_arms_twice_equal_the_closed_form(
    models: Path, tmp_path: Path, starts: list[tuple[int, int]]
) -> None:
    command = flags(models, tmp_path, "--baseline", "--repeat", "2", "--concurrency", "8")
    assert main(["run", *command]) == 0
    assert starts == [(0, 8), (3, 8), (3, 8), (0, 8)]
    runs = {
        name: judged(tmp_path / "d" / name)
        for name in ("baseline-1", "speculative-1", "speculative-2", "baseline-2")
    }
    for name, run in runs.items():
        assert run.manifest["engine"]["draft_length"] == (3 if name[0] == "s" else 0)
    outputs = [
        dict(zip(*(run.turns[c].to_pylist() for c in ("conversation_id", "output_token_ids")),
                 strict=True))
        for run in runs.values()
    ]  # fmt: skip
    assert all(one == outputs[0] for one in outputs)  # nothing of an arm leaked into another


def test_a_sweep_starts_vllm_once_per_draft_length(
    models: Path, tmp_path: Path, starts: list[tuple[int, int]]
) -> None:
    command = flags(
        models, tmp_path, "--grid", "draft_length=1,4", "--grid", "concurrency=2,8", "--baseline"
    )
    assert main(["sweep", *command]) == 0
    assert starts == [(0, 8), (1, 8), (4, 8)]
    for arm, k in (("baseline", 0), ("draft_target-k1", 1), ("draft_target-k4", 4)):
        for c in (2, 8):
            run = judged(tmp_path / "d" / f"{arm}-c{c}")
            assert run.manifest["engine"]["draft_length"] == k
            assert run.manifest["engine"]["max_num_seqs"] == 8
            assert run.manifest["config"]["concurrency"] == c
            counters = run.manifest["sessions"][0]["counters"]
            assert (counters is None) == (k == 0)
    found = pareto(load_arms([tmp_path / "d"]))
    assert not found.per_gpu
    assert len(found.points) == 6
    assert {one.draft_lengths for one in found.best} == {(0, 1, 4)}
