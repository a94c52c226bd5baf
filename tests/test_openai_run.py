"""Runs against a scripted server, whole: from the command line to the numbers of the report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import metrics, store
from speedbench.config import from_dict
from speedbench.configure import configuration
from speedbench.insights.served_times import of_run
from speedbench.lossless import answers
from speedbench.report.summary import summarize
from speedbench.types import UNKNOWN, UserError
from tests.http_server import VLLM_FIELDS, Reply, Running, Script, started

ROOT = Path(__file__).parent.parent
SPECULATING = "vllm:num_requests_running 0\nvllm:spec_decode_num_drafts_total 0\n"
CYCLE = Reply((3, 1, 2, 4), wait_s=0.005)
"""Steps of 3, 1, 2, 4 tokens after the prefill: 2.5 on average, 21 tokens in 9 steps."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with started() as running:
        yield running


def run(
    server: Running, save_dir: Path, *words: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "run.py", "--engine", "OPENAI", "--url", server.url, "--model", "m",
         "--speculative_algorithm", "EAGLE3", "--random_isl", "8", "--num_requests", "12",
         "--output_length", "21", "--concurrency", "4", "--save_dir", str(save_dir),
         "--no_server_metrics", *words],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done


def script(reply: Reply, **about: Any) -> Script:
    return Script(reply, **{"metrics": SPECULATING, **about})


@pytest.mark.parametrize(
    "reply",
    [
        replace(CYCLE, told="detailed"),
        replace(CYCLE, told="detailed", merge=(1, 2, 3)),
        replace(CYCLE, told="summary"),
        replace(CYCLE, told="summary", merge=(2,)),
        replace(CYCLE, told="sglang", merge=(4, 1)),
    ],
    ids=["each", "each, merged", "totals", "totals, merged", "sglang, merged"],
)
def test_acceptance_is_the_servers_however_chunks_are_merged(
    server: Running, tmp_path: Path, reply: Reply
) -> None:
    server.play(script(reply))
    run(server, tmp_path / "run")
    stored = store.load(tmp_path / "run")
    found = summarize(stored)
    assert stored.columns.n_tokens.sum() == 12 * 21
    for name in ("al", "al_step", "al_drafted"):
        assert found.lengths[name].value == pytest.approx(2.5, abs=1e-12)
    assert found.lengths["al_specdec_bench"].value == pytest.approx(21 / 9, abs=1e-12)
    assert [rate.value for rate in found.rates] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert list(found.histogram) == [24, 24, 24, 24]
    # 8 decode steps each: the mean step time is known whether or not each is seen.
    times = metrics.served_timing(stored.columns)
    first, last = stored.columns.first_and_last()
    begins_alone = stored.columns.n_tokens[first] == 1
    decode_s = (stored.columns.time_ns[last] - stored.columns.time_ns[first]) / 1e9
    assert times.mean_step_s == pytest.approx((decode_s / 8)[begins_alone])
    seen = (found.timing["step_time_s"] or {"n": 0})["n"]
    if reply.merge != (1,):
        assert seen == 0
    elif (stored.columns.engine_steps == 1).all():  # no two came in one read
        assert seen == 12 * 8


def test_steps_without_a_draft_may_be_missing_from_totals(server: Running, tmp_path: Path) -> None:
    """A lookup drafts nothing at times, and the end cuts off as many tokens at times: the one hides
    the other, so only what is over verifications is known."""
    server.play(script(replace(CYCLE, told="summary", merge=(2,))))
    run(server, tmp_path / "run", "--speculative_algorithm", "NGRAM")
    stored = store.load(tmp_path / "run")
    found = summarize(stored)
    assert found.lengths["al_drafted"].value == pytest.approx(2.5)
    assert [rate.value for rate in found.rates] == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    for name in ("al", "al_step", "al_conversation", "al_specdec_bench"):
        assert found.lengths[name].value is None
    assert of_run(stored, "").mean_step_s is None


def test_without_the_servers_word_there_is_time_and_no_acceptance(
    server: Running, tmp_path: Path
) -> None:
    server.play(script(CYCLE))
    run(server, tmp_path / "run")
    found = summarize(store.load(tmp_path / "run"))
    for name in ("al", "al_step", "al_conversation", "al_drafted", "al_specdec_bench"):
        assert found.lengths[name].value is None
    assert all(rate.value is None for rate in found.rates)
    assert found.timing["step_time_s"] is None
    for name in ("ttft_s", "user_tps", "e2e_s"):
        assert (found.timing[name] or {})["n"] == 12
    stored = store.load(tmp_path / "run")
    times = of_run(stored, "")
    n_later = int((stored.columns.step > 0).sum())  # fewer than 96 where two came in one read
    assert (times.n_chunks, times.n_single, times.mean_step_s) == (n_later, 0, None)
    assert (times.inter_chunk_s or {})["n"] == n_later
    assert dict(times.proofs) == {"echoed": 12}


def test_a_failed_request_is_measured_again_on_resume(server: Running, tmp_path: Path) -> None:
    """A request breaks off and another is refused; there is no warm-up."""
    told = replace(CYCLE, told="detailed")
    replies = {
        "5": replace(told, fault="drop", at=3),
        "9": Reply(fault="status", status=429, message="slow down"),
    }
    server.play(script(told, replies=replies))
    run(server, tmp_path / "run", "--warmup", "0")
    stored = store.load(tmp_path / "run")
    errors = [e for e in stored.turns["error"].to_pylist() if e]
    assert sorted(e.split(" ")[0] for e in errors) == ["HTTP", "the"]
    assert "HTTP 429: slow down" in errors
    reasons = np.array(stored.turns["finish_reason"].to_pylist())
    tokens = np.array([len(ids) for ids in stored.turns["output_token_ids"].to_pylist()])
    assert sorted(tokens[reasons == "error"]) == [0, 5]  # 1, 3 and 1 came before it broke
    assert set(tokens[reasons != "error"]) == {21}
    server.play(script(told))
    run(server, tmp_path / "run", "--warmup", "0", "--resume")
    assert len(server.state()["bodies"]) == 1 + 2  # a probe, and what had failed
    again = store.load(tmp_path / "run")
    assert not again.columns.failed.any()
    assert summarize(again).lengths["al"].value == pytest.approx(2.5)


def test_counts_without_ids_are_no_answers_to_compare(server: Running, tmp_path: Path) -> None:
    fields = [name for name in VLLM_FIELDS if name != "return_token_ids"]
    server.play(script(replace(CYCLE, told="summary"), fields=fields))
    run(server, tmp_path / "run")
    stored = store.load(tmp_path / "run")
    ids = {t for answer in stored.turns["output_token_ids"].to_pylist() for t in answer}
    assert ids == {UNKNOWN}
    assert answers(stored) == {}
    assert summarize(stored).lengths["al"].value == pytest.approx(2.5)


# ---------------------------------------------------------------- the configuration


def asked(**values: Any) -> Any:
    return from_dict({"engine": "OPENAI", "url": "http://h:1", "model": "m", **values})


def test_a_servers_drafter_is_described_not_loaded() -> None:
    config = asked(speculative_algorithm="EAGLE3")
    assert config.engine_settings().server.url == "http://h:1"
    assert config.engine_settings().draft_model_dir is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"url": None}, "--url is missing"),
        ({"model": None}, "--model is missing"),
        ({"url": "h:1"}, "--url is 'h:1': expected such as http"),
        ({"url": "http://me:key@h:1"}, "holds more than a place"),
        ({"url": "http://h:1/v1?key=1"}, "holds more than a place"),
        ({"engine_args": {"a": 1}}, "engine_args cannot be set from here"),
        ({"capture_experts": True}, "--capture_experts cannot be set from here"),
        ({"request_timeout": "soon"}, "--request_timeout is 'soon'"),
        ({"engine": "VLLM", "model": None}, "--url belongs to --engine OPENAI"),
    ],
)
def test_what_cannot_be_meant_is_a_sentence(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        asked(**values)
    assert said in str(raised.value)


def test_a_baseline_of_the_same_server_is_refused() -> None:
    flags = {
        "engine": "OPENAI", "url": "http://h:1", "model": "m", "speculative_algorithm": "EAGLE3",
        "baseline": True,
    }  # fmt: skip
    with pytest.raises(UserError, match="--baseline would ask the same server twice"):
        configuration(flags)
