"""The SGLang adapter without SGLang: what messages mean, arguments over versions, and the twin."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.sglang import (
    NAMES,
    OURS,
    Seen,
    SglangEngine,
    Told,
    engine_arguments,
    read_message,
    refuse_simulation,
    routed_experts,
    why_no_start,
)
from speedbench.calibration.sglang_trie import sglang_ngram_steps
from speedbench.types import (
    EngineDiedError,
    EngineSettings,
    Request,
    Sampling,
    Step,
    UserError,
)

CONTRACTS = sorted((Path(__file__).parent / "contracts" / "sglang").glob("*.json"))
K = 3


def contract(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


NEWEST = contract(Path(__file__).parent / "contracts" / "sglang" / "0.5.23.json")
NAMES_23 = frozenset(NEWEST["classes"]["ServerArgs"])


def arguments(names: frozenset[str] = NAMES_23, **changes: Any) -> dict[str, Any]:
    return engine_arguments(EngineSettings("target", **changes), names)[0]


# ---------------------------------------------------------------- what a message means


def play(
    rng: random.Random, n_steps: int, k: int, plain_share: float
) -> list[tuple[int, Seen, Told]]:
    """(tokens, what SGLang tells after it, the truth) of each engine step of a request."""
    histogram: list[int] = []
    steps = [(1, Seen(0), Told(1, 0, 0))]
    for _ in range(n_steps):
        if rng.random() < plain_share:  # put back and prefilled again: one token, not verified
            truth = Told(1, 0, 0)
        else:
            truth = Told(1, rng.randint(0, k), k)
            histogram += [0] * (truth.accepted + 1 - len(histogram))
            histogram[truth.accepted] += 1
        steps.append((truth.accepted + 1, Seen(sum(histogram), tuple(histogram)), truth))
    return steps


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_steps=st.integers(0, 20),
    k=st.integers(1, 7),
    plain_share=st.sampled_from([0.0, 0.2]),
)
def test_every_message_of_one_step_is_told_exactly(
    seed: int, n_steps: int, k: int, plain_share: float
) -> None:
    before: Seen | None = None
    for n_tokens, seen, truth in play(random.Random(seed), n_steps, k, plain_share):
        assert read_message(before, seen, n_tokens, k) == truth
        before = seen


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_steps=st.integers(1, 20),
    k=st.integers(0, 5),
    plain_share=st.sampled_from([0.0, 0.3]),
)
def test_a_message_of_several_steps_never_passes_for_one(
    seed: int, n_steps: int, k: int, plain_share: float
) -> None:
    """Neighbouring messages are merged; each is told to hold as many steps as it does."""
    rng = random.Random(seed)
    steps = play(rng, n_steps, k, plain_share if k else 1.0)
    before: Seen | None = None
    while steps:
        merged = [steps.pop(0) for _ in range(min(len(steps), rng.randint(1, 4)))]
        told = read_message(before, merged[-1][1], sum(n for n, _, _ in merged), k)
        expected = merged[0][2] if len(merged) == 1 else Told(len(merged))
        assert told == expected
        before = merged[-1][1]


def test_a_cut_last_step_keeps_the_engines_count() -> None:
    # Recorded: 13 tokens in chunks 1, 3, 3, 1, 2, 3; the last step accepted 3 drafts, 2 are shown.
    chunks = [1, 3, 3, 1, 2, 3]
    histograms = [(), (0, 0, 1), (0, 0, 2), (1, 0, 2), (1, 1, 2), (1, 1, 2, 1)]
    seen = [Seen(i, histogram) for i, histogram in enumerate(histograms)]
    told = [
        read_message(before, now, n, K)
        for before, now, n in zip([None, *seen], seen, chunks, strict=False)
    ]
    assert [t.accepted for t in told] == [0, 2, 2, 0, 1, 3]
    assert [t.drafted for t in told] == [0, K, K, K, K, K]


def test_without_a_histogram_the_drafts_are_told_and_the_accepted_are_not() -> None:
    assert read_message(Seen(4), Seen(5), 2, K) == Told(1, None, K)
    assert read_message(Seen(4), Seen(6), 2, K) == Told(0)
    assert read_message(Seen(5), Seen(4), 1, K) == Told(0)


# ---------------------------------------------------------------- a recorded stream of messages


class Stub(SglangEngine):
    """The adapter's recording half, without a start."""

    def __init__(self, k: int, **changes: Any) -> None:
        self._settings = EngineSettings("target", **changes)
        self._events, self._live, self._finished = [], {}, []
        self._death, self._children, self._k = None, [], k
        self.version, self._hooked = "0.5.23", True
        self._asyncio, self._arrived = asyncio.new_event_loop(), asyncio.Event()

    def begin(self, rid: str, n_prompt: int = 5, stop: Sequence[int] = ()) -> None:
        from engines.sglang import _Live

        self._live[rid] = _Live(f"name of {rid}", n_prompt, stop)


def message(*requests: tuple[str, list[int], int, list[int], Any], **more: Any) -> Any:
    return SimpleNamespace(
        rids=[r[0] for r in requests],
        output_ids=[r[1] for r in requests],
        spec_verify_ct=[r[2] for r in requests],
        spec_correct_drafts_histogram=[r[3] for r in requests],
        finished_reasons=[r[4] for r in requests],
        **more,
    )


STOP_7 = {"type": "stop", "matched": 7}
LENGTH = {"type": "length", "length": 6}


def test_messages_become_steps_and_counters() -> None:
    engine = Stub(K)
    engine.begin("a")
    engine.begin("b", stop=(7,))
    engine._take(message(("a", [1], 0, [], None), ("b", [4], 0, [], None)))
    engine._take(message(("a", [2, 3, 9], 1, [0, 0, 1], None), ("b", [7], 1, [0, 0, 1], STOP_7)))
    engine._take(message(("a", [5, 6], 2, [0, 0, 1, 1], LENGTH), ("unknown", [1], 0, [], None)))
    steps = engine.poll()
    found = [(s.request_id[-1], list(s.token_ids), s.accepted, s.finish_reason) for s in steps]
    assert found == [
        ("a", [1], 0, None), ("b", [4], 0, None), ("a", [2, 3, 9], 2, None),
        ("b", [7], 2, "stop"), ("a", [5, 6], 3, "length"),
    ]  # fmt: skip
    assert [s.drafted for s in steps] == [0, 0, K, K, K]
    assert all(s.engine_steps == 1 and s.error is None for s in steps)
    assert sorted(s.time_ns for s in steps) == [s.time_ns for s in steps]
    counters = engine.counters()
    assert counters is not None
    # a: accepted 2 and 3; b: 2, of which nothing is seen beyond its stop.
    assert (counters.drafts, counters.draft_tokens, counters.accepted) == (3, 9, 7)
    assert counters.accepted_per_position == (3, 3, 1)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ({"type": "stop", "matched": 8}, ["8", "end-of-sequence"]),
        ({"type": "stop", "matched": "NaN happened"}, ["NaN"]),
        ({"type": "abort", "message": "the pool is full"}, ["pool is full"]),
    ],
)
def test_an_end_that_is_not_ours_is_an_error(reason: Any, words: list[str]) -> None:
    engine = Stub(0)
    engine.begin("a", stop=(7,))
    engine._take(message(("a", [8], 0, [], reason)))
    (step,) = engine.poll()
    assert step.finish_reason == "error"
    assert all(word in str(step.error) for word in words)


def test_a_message_that_is_not_as_expected_ends_the_run_and_not_the_process() -> None:
    engine = Stub(K)
    engine.begin("a")
    engine._take(SimpleNamespace(rids=["a"], output_ids=[[1]]))
    with pytest.raises(EngineDiedError, match="not as expected"):
        engine.poll()


@pytest.mark.parametrize(
    ("codes", "code"), [([None, -9], "-9"), ([0, 0], "0"), ([0, None], None), ([], None)]
)
def test_an_engine_whose_processes_ended_is_dead(codes: list[int | None], code: str | None) -> None:
    engine = Stub(K)
    engine._children = [SimpleNamespace(exitcode=c) for c in codes]
    assert engine._is_alive() == (code is None)
    if code is not None:
        with pytest.raises(EngineDiedError, match=f"exit code {code}:"):
            engine.poll()


def test_what_arrived_before_the_end_is_not_lost_by_a_submission() -> None:
    engine = Stub(K)
    engine.begin("a")
    engine._take(message(("a", [1], 0, [], None)))
    engine._children = [SimpleNamespace(exitcode=-9)]
    engine.submit(Request("b", [1], 1, Sampling()))
    assert [list(step.token_ids) for step in engine.poll()] == [[1]]
    with pytest.raises(EngineDiedError, match="exit code -9"):
        engine.poll()


def chunks(engine: Stub, rid: str, n_tokens: Sequence[int], **last: Any) -> list[Step]:
    ids: list[int] = []
    for i, n in enumerate(n_tokens):
        ids += range(len(ids), len(ids) + n)
        about = {"completion_tokens": len(ids)}
        if i + 1 == len(n_tokens):
            about |= {"finish_reason": LENGTH, **last}
        engine._take_chunk(
            rid, engine._live[rid], {"output_ids": [*ids, 99], "meta_info": about}, i
        )
    return list(engine.poll())


def test_public_chunks_are_never_taken_for_drafted_steps() -> None:
    """Chunks that merge are the long ones: those left over would all look rejected."""
    engine = Stub(K)
    engine.begin("a")
    about = {"spec_verify_ct": 4, "spec_correct_drafts_histogram": [2, 0, 1, 1]}
    steps = chunks(engine, "a", [1, 1, 5, 3], **about)
    assert [s.engine_steps for s in steps] == [1, 0, 0, 0]
    assert [list(s.token_ids) for s in steps] == [[0], [1], [2, 3, 4, 5, 6], [7, 8, 9]]
    counters = engine.counters()
    assert counters is not None
    assert (counters.drafts, counters.accepted) == (4, 5)


def test_public_chunks_of_one_token_are_steps_without_drafts() -> None:
    engine = Stub(0)
    engine.begin("a")
    assert [s.engine_steps for s in chunks(engine, "a", [1, 1, 2, 1])] == [1, 1, 0, 1]


# ---------------------------------------------------------------- routed experts


@pytest.mark.parametrize("encoded", [False, True])
def test_routed_experts_keep_token_layer_and_rank(encoded: bool) -> None:
    import numpy as np

    table = np.arange(4 * 3 * 2, dtype=np.int32).reshape(4, 3, 2)
    found: Any = base64.b64encode(table.tobytes()).decode() if encoded else table
    experts = routed_experts(found, 4, 2)
    assert (experts.n_tokens, experts.n_layers, experts.top_k) == (4, 3, 2)
    assert struct.unpack("<24h", experts.expert_ids) == tuple(range(24))


@pytest.mark.parametrize(("n_tokens", "ids"), [(5, [0] * 24), (0, []), (1, [40000, 1])])
def test_routed_experts_that_do_not_fit_are_refused(n_tokens: int, ids: list[int]) -> None:
    import numpy as np

    with pytest.raises(ValueError, match="expert"):
        routed_experts(np.array(ids, np.int32), n_tokens, 2)


# ---------------------------------------------------------------- arguments over versions


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
def test_every_version_has_what_the_adapter_relies_on(path: Path) -> None:
    has = contract(path)
    fields, methods = has["classes"], has["methods"]
    assert "init_tokenizer_manager_func" in has["override_points"]
    assert {"rids", "output_ids", "finished_reasons", "spec_verify_ct", "routed_experts"} <= set(
        fields["BatchTokenIDOutput"]
    )
    assert {"spec_correct_drafts_histogram", "spec_acceptance_histogram"} & set(has["histograms"])
    assert {"input_ids", "sampling_params", "stream", "rid", "return_routed_experts"} <= set(
        methods["Engine.async_generate"]
    )
    assert methods["TokenizerManager.flush_cache"][0] == "async"
    assert methods["TokenizerManager.handle_loop"] == ["async"]
    assert methods["TokenizerManager.get_internal_state"] == ["async"]
    assert methods["TokenizerManager._handle_batch_output"][-1] == "recv_obj"
    assert "success" in fields["FlushCacheReqOutput"]
    assert {
        "temperature", "top_p", "top_k", "max_new_tokens", "ignore_eos", "stop_token_ids",
    } <= set(fields["SamplingParams"])  # fmt: skip


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("algorithm", [*SglangEngine.algorithms])
def test_no_version_is_given_an_argument_it_lacks(path: Path, algorithm: Any) -> None:
    names = frozenset(contract(path)["classes"]["ServerArgs"])
    settings_ = EngineSettings("t", "d" if algorithm not in ("NGRAM", "NONE") else None, algorithm)
    found, unused = engine_arguments(settings_, names)
    assert set(found) <= names
    assert unused == ()
    graphs = [name for name in found if name.startswith("cuda_graph_max_bs")]
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("EAGLE3", "EAGLE3"), ("EAGLE", "EAGLE"), ("DRAFT_TARGET", "STANDALONE"),
        ("NGRAM", "NGRAM"), ("MTP", "NEXTN"), ("DFLASH", "DFLASH"),
    ],
)  # fmt: skip
def test_every_algorithm_has_its_name_and_one_draft_length(algorithm: Any, name: str) -> None:
    found = arguments(algorithm=algorithm, draft_length=5)
    assert found["speculative_algorithm"] == name == NAMES[algorithm]
    assert found["speculative_num_draft_tokens"] == 6  # the last token is verified, too
    if algorithm == "NGRAM":
        assert found["speculative_ngram_max_bfs_breadth"] == 1
    elif algorithm != "DFLASH":
        assert (found["speculative_num_steps"], found["speculative_eagle_topk"]) == (5, 1)


def test_arms_differ_in_the_speculative_settings_and_nothing_else() -> None:
    base = arguments(concurrency=32)
    spec = arguments(concurrency=32, algorithm="EAGLE3", draft_model_dir="head", draft_length=5)
    differing = {k for k in base.keys() | spec.keys() if base.get(k) != spec.get(k)}
    assert all(name.startswith("speculative_") for name in differing)
    assert spec["speculative_draft_model_path"] == "head"
    assert base["max_running_requests"] == spec["cuda_graph_max_bs_decode"] == 32
    assert base["disable_radix_cache"] is True
    assert arguments(prefix_cache=True)["disable_radix_cache"] is False
    assert arguments(max_seq_len=999)["context_length"] == 999


def test_all_algorithms_are_accounted_for() -> None:
    from typing import get_args

    from speedbench.types import Algorithm

    assert set(SglangEngine.support) == set(get_args(Algorithm))
    absent = {name for name, has in SglangEngine.support.items() if has.proof == "absent"}
    assert absent == set(get_args(Algorithm)) - set(SglangEngine.algorithms)
    assert all(SglangEngine.support[name].note for name in absent)


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"mem_fraction_statik": 0.5}, ["mem_fraction_statik", "mem_fraction_static"]),
        ({"stream_interval": 8}, ["stream_interval", "every step"]),
        ({"max_running_requests": 8}, ["--concurrency"]),
        ({"speculative_num_steps": 9}, ["--draft_length"]),
        ({"speculative_eagle_topk": 4}, ["tree", "draft length"]),
        ({"speculative_adaptive": True}, ["draft length"]),
        ({"disable_radix_cache": False}, ["--prefix_cache"]),
        ({"_radix_eviction_policy_explicitly_set": True}, ["no engine argument"]),
    ],
)
def test_arguments_that_are_not_the_users_are_refused(
    engine_args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        arguments(algorithm="NGRAM", engine_args=engine_args)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_renamed_argument_is_taken_by_both_its_names() -> None:
    for name in ("cuda_graph_max_bs", "cuda_graph_max_bs_decode"):
        assert arguments(engine_args={name: 7})["cuda_graph_max_bs_decode"] == 7
        old = frozenset(contract(CONTRACTS[0])["classes"]["ServerArgs"])
        assert arguments(old, engine_args={name: 7})["cuda_graph_max_bs"] == 7


def test_two_names_of_one_argument_are_refused() -> None:
    """Only one of the two values could be followed."""
    with pytest.raises(UserError, match="both 'cuda_graph_max_bs' and 'cuda_graph_max_bs_decode'"):
        arguments(engine_args={"cuda_graph_max_bs_decode": 8, "cuda_graph_max_bs": 7})


@pytest.mark.parametrize("name", ["SGLANG_SIMULATE_ACC_LEN", "SIMULATE_ACC_LEN"])
def test_made_up_acceptances_are_refused(name: str) -> None:
    for harmless in ({}, {name: "-1"}, {name: ""}, {name: "off"}):
        refuse_simulation(harmless)
    with pytest.raises(UserError, match=f"{name}=2.5 is set"):
        refuse_simulation({name: "2.5"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "EAGLE", "block_size": 4}, ["--block_size", "DFLASH"]),
        ({"algorithm": "DFLASH", "block_size": 3}, ["K + 1"]),
        ({"algorithm": "NGRAM", "draft_model_dir": "d"}, ["--draft_model_dir"]),
        ({"algorithm": "NGRAM", "draft_sample_method": "greedy"}, ["--draft_sample_method"]),
        ({"algorithm": "DRAFT_TARGET", "draft_sample_method": "probabilistic"}, ["leave it out"]),
        ({"engine_args": {"speculative_draft_window_size": 3}}, ["NONE", "algorithm"]),
        ({"draft_sample_method": "greedy"}, ["--draft_sample_method", "NONE"]),
    ],
)
def test_a_flag_without_effect_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        arguments(**{"draft_length": 3, **changes})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_drafts_are_sampled_only_where_sglang_can() -> None:
    sampled = arguments(algorithm="MTP", draft_sample_method="probabilistic")
    assert sampled["speculative_use_rejection_sampling"] is True
    greedy = arguments(algorithm="EAGLE3", draft_sample_method="greedy")
    assert "speculative_use_rejection_sampling" not in greedy
    old = frozenset(contract(CONTRACTS[0])["classes"]["ServerArgs"])
    assert "speculative_use_rejection_sampling" not in old
    with pytest.raises(UserError, match="leave it out"):
        arguments(old, algorithm="MTP", draft_sample_method="probabilistic")


def test_a_drafter_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for name, size in (("target", 100), ("draft", 90)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": size}))
    settings_ = EngineSettings(
        str(tmp_path / "target"), str(tmp_path / "draft"), algorithm="DRAFT_TARGET"
    )
    with pytest.raises(UserError, match="90 tokens"):
        engine_arguments(settings_, NAMES_23)


def test_every_argument_of_ours_says_why() -> None:
    assert all(reason and name == name.lower() for name, reason in OURS.items())


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (ValueError("DFLASH is not supported on device 'cpu'."), None, ["DFLASH", "'cpu'"]),
        (
            RuntimeError("Initialization failed. Please see the error messages above."),
            "Not enough memory. Please try to increase --mem-fraction-static.",
            ["Not enough memory", "--max_seq_len"],
        ),
        (
            RuntimeError("Rank 0 scheduler died during initialization (exit code: -9)."),
            None,
            ["signal 9", "--tp_size"],
        ),
    ],
)
def test_a_failed_start_is_one_sentence_with_cause_and_remedy(
    error: Exception, cause: str | None, words: list[str]
) -> None:
    sentence = why_no_start(error, cause)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("state", "changes", "words"),
    [
        (
            {"speculative_algorithm": "NGRAM", "attention_backend": "fa3"},
            {"algorithm": "NGRAM"},
            ["fa3", "flashinfer"],
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_use_rejection_sampling": True},
            {"algorithm": "EAGLE", "draft_sample_method": "greedy"},
            ["--draft_sample_method"],
        ),
    ],
)
def test_what_sglang_resolved_is_refused_where_it_cannot_be_measured(
    state: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    engine = Stub(K, **changes)
    with pytest.raises(UserError) as refusal:
        engine._refuse_what_came_out(state)
    assert all(word in str(refusal.value) for word in words)
    engine._refuse_what_came_out(
        {**state, "attention_backend": "triton", "speculative_use_rejection_sampling": False}
    )


# ---------------------------------------------------------------- the twin of the n-gram lookup


def test_the_twin_finds_what_a_request_repeats_and_what_another_said() -> None:
    """f is a cycle of six tokens, 10 -> 11 -> ... -> 15 -> 10; K = 2."""
    target = {10: 11, 11: 12, 12: 13, 13: 14, 14: 15, 15: 10}
    following = [target.get(token, 0) for token in range(16)]
    first, second = sglang_ngram_steps([[10], [10]], following, 2, 12, ())
    # Nothing is known in the first round of the cycle; the seventh step comes after 10 again.
    assert [step.accepted for step in first] == [0, 0, 0, 0, 0, 0, 2, 2]
    assert sum(len(step.token_ids) for step in first) == 12
    # The second request knows all of it from its first decode step.
    assert [step.accepted for step in second] == [0, 2, 2, 2, 2]
    assert [len(step.token_ids) for step in second] == [1, 3, 3, 3, 2]


def test_the_twin_alone_on_fresh_tokens_accepts_nothing() -> None:
    following = list(range(1, 200))
    (steps,) = sglang_ngram_steps([[5, 6, 7]], following, 4, 30, ())
    assert [len(step.token_ids) for step in steps] == [1] * 30
