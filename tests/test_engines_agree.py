"""The same prompts through real vLLM, SGLang and transformers: the same tokens, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import store
from tests.cpu_engines import SGLANG as ENGINE_ARGS
from tests.test_sglang_real import environment
from tests.test_sglang_real import python as sglang_python  # noqa: F401 - a fixture
from tests.test_vllm_real import ONE_THREAD, with_plugin

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
K = 3


@pytest.fixture(scope="module")
def runs(
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
    sglang_python: str,  # noqa: F811
) -> dict[str, store.Run]:
    """One request at a time (transformers takes no more), 22 rows, 30 tokens each."""
    folder = tmp_path_factory.mktemp("agree")
    found = {}
    for engine, arguments, python, environ in (
        ("VLLM", {"enforce_eager": True}, sys.executable, {**ONE_THREAD, **with_plugin()}),
        ("SGLANG", ENGINE_ARGS, sglang_python, environment(sglang_python)),
        ("HF", {}, sys.executable, {"OMP_NUM_THREADS": "1"}),
    ):
        yaml = folder / f"{engine}.yaml"
        yaml.write_text(json.dumps({"engine_args": arguments}))
        done = subprocess.run(
            [python, "-m", "speedbench", "run", "--engine", engine, "--model_dir",
             str(models / "word/target"), "--draft_model_dir", str(models / "word/draft"),
             "--speculative_algorithm", "DRAFT_TARGET", "--draft_length", str(K), "--dataset",
             "calibration", "--num_requests", "22", "--output_length", "30", "--warmup", "1",
             "--runtime_params", str(yaml), "--save_dir", str(folder / engine)],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environ}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found[engine] = store.load(folder / engine)
    return found


def by_request(run: store.Run) -> dict[tuple[str, int], dict[str, Any]]:
    """(conversation, turn) -> output, and of every step its tokens, accepted and drafted."""
    turns = run.turns.take(run.used).to_pylist()
    columns = run.columns
    edges = np.searchsorted(columns.request, np.arange(columns.n_requests + 1))
    return {
        (turn["conversation_id"], turn["turn"]): {
            "output": turn["output_token_ids"],
            "prompt": turn["prompt_sha256"],
            "n_tokens": columns.n_tokens[edges[r] : edges[r + 1]].tolist(),
            "told": list(
                zip(
                    columns.accepted[edges[r] : edges[r + 1]].tolist(),
                    columns.drafted[edges[r] : edges[r + 1]].tolist(),
                    strict=True,
                )
            ),
        }
        for r, turn in enumerate(turns)
    }


def test_one_fingerprint_and_the_same_tokens_in_the_same_steps(runs: dict[str, store.Run]) -> None:
    assert len({run.manifest["prompts"]["fingerprint"] for run in runs.values()}) == 1
    vllm, sglang, hf = (by_request(runs[name]) for name in ("VLLM", "SGLANG", "HF"))
    assert len(vllm) >= 22
    for other in (sglang, hf):
        assert other.keys() == vllm.keys()
        for key, request in other.items():
            for what in ("prompt", "output", "n_tokens"):
                assert request[what] == vllm[key][what], key
    lengths = {
        name: np.bincount(run.columns.n_tokens[run.columns.step > 0], minlength=K + 2).tolist()
        for name, run in runs.items()
    }
    assert lengths["VLLM"] == lengths["SGLANG"] == lengths["HF"]
    assert min(lengths["VLLM"][1 : K + 2]) > 0  # every length occurs


def test_what_was_accepted_differs_only_where_transformers_drafts_less(
    runs: dict[str, store.Run],
) -> None:
    """vLLM and SGLang draft K tokens to the end; transformers no more than may still be shown."""
    vllm, sglang, hf = (by_request(runs[name]) for name in ("VLLM", "SGLANG", "HF"))
    n_shorter = 0
    for key, request in vllm.items():
        assert sglang[key]["told"] == request["told"], key
        ours, theirs = request["told"], hf[key]["told"]
        assert [a for a, _ in theirs[:-1]] == [a for a, _ in ours[:-1]]
        accepted, drafted = theirs[-1]
        assert (accepted, drafted) == ours[-1] or accepted <= drafted < K
        n_shorter += drafted < K and len(theirs) > 1
    assert n_shorter > 0
