"""Real servers on a CPU, asked over HTTP and held against the closed form. Minutes, not seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import calibrate, inputs, session, store
from speedbench.calibration import closed_form
from speedbench.config import from_dict
from speedbench.report.summary import summarize
from speedbench.target import Target
from speedbench.types import UserError
from tests.cpu_engines import SGLANG as ENGINE_ARGS
from tests.test_sglang_real import environment
from tests.test_vllm_real import ONE_THREAD

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, log: Path, env: dict[str, str]) -> Iterator[str]:
    """The URL of a server that answers, ended with all its processes."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=env, cwd=log.parent, start_new_session=True
        )
    try:
        until_s = time.monotonic() + 600
        while not answers(f"{url}/v1/models"):
            text = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, text
            assert time.monotonic() < until_s, text
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def vllm(models: Path, folder: Path, *words: str) -> Iterator[str]:
    port, pair = free_port(), models / "word"
    speculative = {
        "method": "draft_model", "model": str(pair / "draft"), "num_speculative_tokens": 3,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pair / "target"),
        "--served-model-name", "word", "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--max-num-seqs", "32", "--speculative-config", json.dumps(speculative),
        *words,
    ]  # fmt: skip
    env = {
        **os.environ, **ONE_THREAD, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with serving(command, port, folder / "vllm.log", env) as url:
        yield url


@contextmanager
def sglang(models: Path, folder: Path) -> Iterator[str]:
    python = Path(os.environ.get("SPEEDBENCH_SGLANG_PYTHON") or ROOT / ".venv-sglang/bin/python")
    assert python.exists(), "scripts/test.sh installs SGLang's environment"
    port, pair = free_port(), models / "word"
    own: list[str] = []
    for name, value in ENGINE_ARGS.items():
        flag = f"--{name.replace('_', '-')}"
        own += [flag] if value is True else [flag, str(value)]
    command = [
        str(python), "-m", "sglang.launch_server", "--model-path", str(pair / "target"),
        "--served-model-name", "word", "--host", "127.0.0.1", "--port", str(port),
        "--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path",
        str(pair / "draft"), "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", "4", "--skip-server-warmup", *own,
    ]  # fmt: skip
    with serving(command, port, folder / "sglang.log", environment(str(python))) as url:
        yield url


def config(url: str, models: Path, save_dir: Path, **changes: Any) -> Any:
    pair = models / "word"
    return from_dict(
        {
            "engine": "OPENAI", "url": url, "model": "word", "model_dir": str(pair / "target"),
            "draft_model_dir": str(pair / "draft"), "speculative_algorithm": "DRAFT_TARGET",
            "dataset": "calibration", "num_requests": 44, "concurrency": 8, "output_length": 40,
            "save_dir": str(save_dir), **changes,
        }
    )  # fmt: skip


def measured(settings: Any) -> tuple[store.Run, inputs.Prepared]:
    import engines

    prepared = inputs.prepare(settings)
    running = engines.adapter("OPENAI")(settings.engine_settings())
    try:
        session.measure(settings, prepared, running, Target(Path(settings.save_dir or "")))
    finally:
        running.close()
    return store.load(settings.save_dir or ""), prepared


def known_steps(run: store.Run, prepared: inputs.Prepared) -> list[int]:
    """How many verifications accepted 0, 1, 2, 3 draft tokens, as computed from the prompts."""
    config = run.manifest["config"]
    known = closed_form.read_known_answer(
        Path(config["model_dir"]), Path(config["draft_model_dir"])
    )
    case = calibrate.case_of(run, prepared.stop_token_ids)
    accepted = [
        step.accepted
        for request in calibrate.observed_requests(run, prepared)
        for step in case.steps(known, request.prompt_ids)
        if step.drafted
    ]
    return np.bincount(accepted, minlength=4).tolist()


def hold(run: store.Run, prepared: inputs.Prepared) -> None:
    """Every request's verifications are the known ones, and so is what is made of them."""
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence
    assert verdict.n_requests == run.columns.n_requests > 40
    rows = store.load_served(run).to_pylist()
    assert len(rows) == run.columns.n_requests
    histograms = [row["histogram"] or [] for row in rows]  # SGLang: none without a verification
    told = np.sum([found + [0] * (4 - len(found)) for found in histograms], axis=0)
    assert told.tolist() == known_steps(run, prepared)
    found = summarize(run)
    assert list(found.histogram) == told.tolist()
    assert {row["prompt_proof"] for row in rows} == {"echoed"}


def test_vllm_tells_every_verification(models: Path, tmp_path: Path) -> None:
    with vllm(models, tmp_path, "--per-request-spec-decode-metrics", "detailed") as url:
        run, prepared = measured(config(url, models, tmp_path / "run"))
        with pytest.raises(UserError, match="speculates, but --speculative_algorithm is NONE"):
            measured(
                config(
                    url, models, tmp_path / "none", speculative_algorithm="NONE",
                    draft_model_dir=None,
                )
            )  # fmt: skip
    engine = run.manifest["engine"]
    assert engine["draft_length"] == 3
    assert engine["settings"]["draft_length_from"] == "as the server says"
    assert engine["settings"]["server"] == "vLLM"
    assert engine["prefix_cache"] is False
    hold(run, prepared)
    beside(run, tmp_path)


def beside(served: store.Run, folder: Path) -> None:
    """The same measurement embedded: the same prompts, every request's verifications the same, and
    a comparison that says where the times part."""
    asked, directory = served.manifest["config"], folder / "embedded"
    parameters = folder / "parameters.yaml"
    parameters.write_text(json.dumps({"engine_args": {"enforce_eager": True}}))
    same = (
        "model_dir", "draft_model_dir", "speculative_algorithm", "dataset", "num_requests",
        "concurrency", "output_length",
    )  # fmt: skip
    words = ["--engine", "VLLM", "--save_dir", str(directory), "--runtime_params", str(parameters)]
    words += [word for name in same for word in (f"--{name}", str(asked[name]))]
    env = {**os.environ, **ONE_THREAD, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "run.py", *words], cwd=ROOT, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    embedded = store.load(directory)
    assert embedded.manifest["prompts"]["fingerprint"] == served.manifest["prompts"]["fingerprint"]
    one, other = summarize(embedded), summarize(served)
    assert list(one.histogram) == list(other.histogram)
    for row, row_served in zip(one.categories, other.categories, strict=True):
        assert row.name == row_served.name
        assert row_served.lengths["al"].value == pytest.approx(row.lengths["al"].value)
    words = ["compare", str(directory), str(served.directory), "--allow", "engine"]
    compared = subprocess.run(
        [sys.executable, "-m", "speedbench", *words], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "Where embedded and served part" in compared.stdout


def test_vllm_that_merges_steps_and_tells_totals(models: Path, tmp_path: Path) -> None:
    words = ("--per-request-spec-decode-metrics", "summary", "--stream-interval", "5")
    with vllm(models, tmp_path, *words) as url:
        run, prepared = measured(config(url, models, tmp_path / "run"))
        chat = {"endpoint": "chat", "dataset": "mini", "num_requests": 22, "output_length": 24}
        chats, _ = measured(config(url, models, tmp_path / "chat", **chat))
    assert (run.columns.engine_steps != 1).mean() > 0.5
    hold(run, prepared)
    hold_against_counters(chats)


def hold_against_counters(run: store.Run) -> None:
    """Of live chats, whose prompts the server makes: what the responses told, each for itself, is
    what the server counted in all."""
    assert run.columns.turn.max() > 0
    rows = store.load_served(run).to_pylist()
    assert len(rows) == run.columns.n_requests
    told = np.sum([found + [0] * (4 - len(found)) for r in rows if (found := r["histogram"])], 0)
    (entry,) = run.manifest["sessions"]
    assert entry["counters"]["drafts"] == told.sum() > 0
    assert entry["counters"]["accepted"] == told @ np.arange(4)


def test_sglang_tells_totals(models: Path, tmp_path: Path) -> None:
    with sglang(models, tmp_path) as url:
        run, prepared = measured(config(url, models, tmp_path / "run"))
    engine = run.manifest["engine"]
    assert engine["settings"]["server"] == "SGLang"
    assert (engine["draft_length"], engine["settings"]["draft_length_from"]) == (
        3, "as the server says",
    )  # fmt: skip
    hold(run, prepared)
