"""Real transformers through the command line, held against its own rules and the closed form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engines
from speedbench import calibrate, checks, inputs, session, store
from speedbench.calibration.closed_form import next_token_logits, read_known_answer
from speedbench.config import from_dict
from speedbench.target import Target
from speedbench.types import UNKNOWN
from tests import hf_twin

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "speedbench", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False, env=ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr[-3000:]


def settings(models: Path, algorithm: str, save_dir: Path, **changes: Any) -> dict[str, Any]:
    drafted = algorithm == "DRAFT_TARGET"
    return {
        "engine": "HF",
        "model_dir": str(models / "word" / "target"),
        "draft_model_dir": str(models / "word" / "draft") if drafted else None,
        "speculative_algorithm": algorithm,
        "draft_length": 4,
        "dataset": "calibration",
        "concurrency": 1,
        "num_requests": 22,
        "output_length": 24,
        "warmup": 2,
        "save_dir": str(save_dir),
        **changes,
    }


def test_calibrate_finds_every_step_as_computed(tmp_path: Path) -> None:
    code, output = command(
        "calibrate", "--engine", "HF", "--algorithm", "NONE,DRAFT_TARGET,NGRAM",
        "--concurrency", "1", "--draft_length", "1,3", "--output_length", "5,20",
        "--save_dir", str(tmp_path / "calibrate"),
    )  # fmt: skip
    assert code == 0, output
    lines = re.findall(r"^((?:word|bpe|none|draft|ngram)\S+)\s+(\d+)\s+(\d+)\s+(.+)$", output, re.M)
    # 2 cells for NONE and for both K of the two others; one sampled; one with natural prompts.
    assert len(lines) == (1 + 2 + 2) * 2 + 1 + 1, output
    verdicts = [verdict for name, _, _, verdict in lines if not name.endswith("t1")]
    assert set(verdicts) == {"exact"}


@pytest.mark.parametrize("algorithm", ["DRAFT_TARGET", "NGRAM", "NONE"])
def test_a_run_stores_the_steps_that_transformers_rules_give(
    models: Path, tmp_path: Path, algorithm: str
) -> None:
    told = settings(models, algorithm, tmp_path / "run")
    flags = [f"--{name}={value}" for name, value in told.items() if value is not None]
    _, output = command("run", *flags)
    run = store.load(tmp_path / "run")
    assert run.manifest["status"] == "complete", output
    prepared = inputs.prepare(from_dict(told))
    known = read_known_answer(models / "word" / "target")
    stops = prepared.stop_token_ids
    assert stops
    k, ngram_max = 4, 2
    propose = {
        "NONE": hf_twin.nothing,
        "DRAFT_TARGET": hf_twin.draft_model(hf_twin.bigram(known.draft_next), k, stops),
        "NGRAM": hf_twin.prompt_lookup(k, ngram_max, stops),
    }[algorithm]
    observed = calibrate.observed_requests(run, prepared)
    assert len(observed) >= 22
    for request in observed:
        wanted = hf_twin.steps(
            request.prompt_ids, hf_twin.bigram(known.target_next), propose, 24, stops
        )
        assert list(request.output_ids) == [t for step in wanted for t in step.token_ids]
        assert list(request.n_tokens) == [len(step.token_ids) for step in wanted]
        assert list(request.accepted) == [step.accepted for step in wanted]
        assert list(request.drafted) == [step.drafted for step in wanted]
        assert set(request.engine_steps) == {1}
    if algorithm != "NONE":
        books = checks.reconcile(run)
        assert books["exact"]
        assert books["counter_drafts"] > 20
        assert (books["unexplained_accepted"], books["unexplained_drafts"]) == (0, 0)


# ---------------------------------------------------------------- sampled


def distributions(folder: Path, temperature: float) -> np.ndarray[Any, Any]:
    """(V, V) probability of each next token after each token."""
    logits = next_token_logits(folder) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def z_score(chances: Sequence[float], n_hits: int) -> float:
    """How many standard deviations a count of independent successes is off."""
    found = np.minimum(chances, 1.0)
    return float((n_hits - found.sum()) / np.sqrt((found * (1 - found)).sum()))


def sampled(models: Path, tmp_path: Path, algorithm: str, **changes: Any) -> store.Run:
    config = from_dict(
        settings(models, algorithm, tmp_path / "run", num_requests=33, output_length=40,
                 ignore_eos=True, **changes)
    )  # fmt: skip
    prepared = inputs.prepare(config)
    engine = engines.adapter("HF")(config.engine_settings())
    try:
        session.measure(config, prepared, engine, Target(tmp_path / "run"))
    finally:
        engine.close()
    return store.load(tmp_path / "run")


def tokens_of(run: store.Run) -> list[list[list[int]]]:
    """Per request, per step, the tokens."""
    columns = run.columns
    found = []
    for r, turn in enumerate(run.turns.take(run.used).to_pylist()):
        ends = np.cumsum(columns.n_tokens[columns.request == r])
        ids = turn["output_token_ids"]
        found.append([ids[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)])
    return found


@pytest.mark.parametrize(("method", "temperature"), [(None, 1.5), ("greedy", 1.5)])
def test_sampled_drafts_are_accepted_as_often_as_they_must(
    models: Path, tmp_path: Path, method: str | None, temperature: float
) -> None:
    """A sampled draft is accepted with the overlap of both distributions, where transformers
    applies the temperature twice to its assistant; a greedy one with the target's probability."""
    run = sampled(
        models, tmp_path, "DRAFT_TARGET", temperature=temperature, draft_sample_method=method
    )
    assert run.manifest["engine"]["settings"]["draft_sample_method"] == (method or "probabilistic")
    target = distributions(models / "word" / "target", temperature)
    draft = distributions(models / "word" / "draft", temperature**2)
    overlap = np.minimum(target, draft).sum(axis=1)
    if method == "greedy":
        overlap = target[np.arange(len(target)), draft.argmax(axis=1)]
    columns = run.columns
    chances: list[float] = []
    hits = 0
    emitted: list[float] = []
    n_likely = 0
    for r, steps in enumerate(tokens_of(run)):
        mine = np.flatnonzero(columns.request == r)
        context = steps[0][-1]
        for step, tokens in zip(mine[1:], steps[1:], strict=True):
            accepted, drafted = int(columns.accepted[step]), int(columns.drafted[step])
            assert accepted == len(tokens) - 1
            for position, token in enumerate(tokens):
                if position < drafted:
                    chances.append(float(overlap[context]))
                    hits += position < accepted
                likely = int(target[context].argmax())
                emitted.append(float(target[context, likely]))
                n_likely += token == likely
                context = token
    assert len(chances) > 800
    assert abs(z_score(chances, hits)) < 4
    assert abs(z_score(emitted, n_likely)) < 4  # what comes out is the target's, whatever drafts
    books = checks.reconcile(run)
    assert (books["unexplained_accepted"], books["unexplained_drafts"]) == (0, 0)


def test_a_sampled_lookup_that_was_cut_is_not_known_and_its_books_have_bounds(
    models: Path, tmp_path: Path
) -> None:
    run = sampled(models, tmp_path, "NGRAM", temperature=0.3)
    last = run.columns.is_last()
    assert not (run.columns.accepted[~last] == UNKNOWN).any()
    books = checks.reconcile(run)
    assert books["counter_drafts"] > 20
    assert (books["unexplained_accepted"], books["unexplained_drafts"]) == (0, 0)
