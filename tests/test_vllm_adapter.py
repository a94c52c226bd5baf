"""The vLLM adapter's pure parts: argument mapping over versions, and alignment of verifications."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.vllm import align, engine_arguments
from speedbench.types import UNKNOWN, EngineSettings, UserError

NAMES_026 = {
    "model", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "enable_expert_parallel", "max_num_seqs", "max_model_len", "enable_prefix_caching", "seed",
    "trust_remote_code", "skip_tokenizer_init", "disable_log_stats", "speculative_config",
    "enforce_eager", "gpu_memory_utilization", "stream_interval",
}  # fmt: skip
NAMES_029 = NAMES_026 | {"per_request_spec_decode_metrics"}


def arguments(names: set[str] = NAMES_029, **changes: Any) -> dict[str, Any]:
    return engine_arguments(EngineSettings("target", **changes), names)[0]


def test_arms_differ_in_the_speculative_settings_and_nothing_else() -> None:
    base = arguments(concurrency=32)
    spec = arguments(concurrency=32, algorithm="EAGLE3", draft_model_dir="head", draft_length=5)
    differing = {k for k in base.keys() | spec.keys() if base.get(k) != spec.get(k)}
    assert differing == {"speculative_config", "per_request_spec_decode_metrics"}
    assert spec["speculative_config"] == {
        "method": "eagle3", "model": "head", "num_speculative_tokens": 5,
    }  # fmt: skip
    assert base["max_num_seqs"] == spec["max_num_seqs"] == 32
    assert base["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("algorithm", "method"),
    [
        ("EAGLE3", "eagle3"), ("EAGLE", "eagle"), ("DRAFT_TARGET", "draft_model"),
        ("NGRAM", "ngram"), ("MTP", "mtp"), ("MEDUSA", "medusa"), ("DFLASH", "dflash"),
        ("SUFFIX", "suffix"),
    ],
)  # fmt: skip
def test_every_algorithm_has_its_method(algorithm: Any, method: str) -> None:
    config = arguments(algorithm=algorithm, draft_length=2)["speculative_config"]
    assert config["method"] == method
    assert config["num_speculative_tokens"] == 2


def test_a_version_without_per_request_metrics_says_so() -> None:
    settings_ = EngineSettings("target", algorithm="NGRAM")
    found, unused = engine_arguments(settings_, NAMES_026)
    assert "per_request_spec_decode_metrics" not in found
    assert unused == ("per_request_spec_decode_metrics",)


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"enforce_eagre": True}, ["enforce_eagre", "enforce_eager"]),
        ({"stream_interval": 8}, ["stream_interval", "speedbench"]),
        ({"skip_tokenizer_init": False}, ["skip_tokenizer_init"]),
        ({"speculative_config": {"method": "ngram"}}, ["--speculative_algorithm"]),
        ({"speculative_config": {"num_speculative_tokens": 9}}, ["--draft_length"]),
        ({"speculative_config": 3}, ["speculative_config"]),
    ],
)
def test_arguments_that_are_not_the_users_are_refused(
    engine_args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        arguments(algorithm="NGRAM", engine_args=engine_args)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "flag"), [({"block_size": 8}, "--block_size"), ({"ep_size": 4}, "--ep_size")]
)
def test_a_flag_without_effect_is_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        arguments(algorithm="NGRAM", tp_size=2, **changes)


def test_a_baseline_takes_no_speculative_config() -> None:
    with pytest.raises(UserError, match="NONE"):
        arguments(engine_args={"speculative_config": {"prompt_lookup_max": 3}})


# ---------------------------------------------------------------- alignment

Steps = list[tuple[int, int, int]]  # (tokens shown, accepted, drafted)


def play(rng: random.Random, n_steps: int, k: int, plain_share: float, phantom: bool) -> Steps:
    """A request as an engine would decode it: prefill, then verify and plain steps, then a cut."""
    steps = [(1, 0, k if phantom else 0)]
    for _ in range(n_steps):
        if rng.random() < plain_share:
            steps.append((1, 0, 0))
        else:
            drafted = rng.randint(1, k)
            accepted = rng.randint(0, drafted)
            steps.append((accepted + 1, accepted, drafted))
    if n_steps:
        shown, accepted, drafted = steps[-1]
        steps[-1] = (rng.randint(1, shown), accepted, drafted)
    return steps


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_steps=st.integers(0, 30),
    k=st.integers(1, 5),
    plain_share=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_alignment_keeps_every_count(seed: int, n_steps: int, k: int, plain_share: float) -> None:
    truth = play(random.Random(seed), n_steps, k, plain_share, phantom=False)
    verified = [(a, d) for _, a, d in truth if d]
    found = align(
        [n for n, _, _ in truth],
        [a for a, _ in verified],
        [d for _, d in verified],
        [(UNKNOWN, UNKNOWN)] * len(truth),
    )
    assert found is not None
    # Whatever one-token step was taken for the plain one, no count may depend on it.
    assert sorted(found) == sorted((a, d) for _, a, d in truth)
    for (shown, accepted, _), (a, _) in zip(truth, found, strict=True):
        if shown > 1:
            assert a == accepted


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), n_steps=st.integers(0, 20), k=st.integers(1, 4))
def test_alignment_is_exact_where_the_step_totals_decide(seed: int, n_steps: int, k: int) -> None:
    truth = play(random.Random(seed), n_steps, k, 0.4, phantom=False)
    verified = [(a, d) for _, a, d in truth if d]
    told = [(UNKNOWN if d else 0, k if d else 0) for _, _, d in truth]
    found = align(
        [n for n, _, _ in truth], [a for a, _ in verified], [d for _, d in verified], told
    )
    assert found == [(a, d) for _, a, d in truth]


def test_a_phantom_draft_belongs_to_the_first_step() -> None:
    # Emissions 1,2,4,1 with a leading padded draft: five verifications would be one too many.
    found = align([1, 2, 4, 1], [0, 1, 3, 0], [3, 3, 3, 3], [(UNKNOWN, UNKNOWN)] * 4)
    assert found == [(0, 3), (1, 3), (3, 3), (0, 3)]


def test_a_cut_last_step_keeps_the_engines_count() -> None:
    # max_tokens=7 with a perfect drafter: emitted 1, 4, 2, accepted 3 and 3.
    assert align([1, 4, 2], [3, 3], [3, 3], [(UNKNOWN, UNKNOWN)] * 3) == [(0, 0), (3, 3), (3, 3)]
    # Cut to one token: max_tokens=2.
    assert align([1, 1], [3], [3], [(UNKNOWN, UNKNOWN)] * 2) == [(0, 0), (3, 3)]


@pytest.mark.parametrize(
    ("n_tokens", "accepted"),
    [
        ([1, 3, 1], [1, 0]),  # shows three tokens, accepted one
        ([1, 2], [1, 2, 1]),  # more hits than steps
        ([1, 3, 2], [2]),  # a long step that was never verified
        ([1, 2, 4], [2, 3]),  # a step in the middle shows fewer than it accepted
    ],
)
def test_what_does_not_fit_is_not_forced(n_tokens: list[int], accepted: list[int]) -> None:
    nothing = [(UNKNOWN, UNKNOWN)] * len(n_tokens)
    assert align(n_tokens, accepted, [3] * len(accepted), nothing) is None
