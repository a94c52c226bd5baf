"""The vLLM adapter without vLLM: arguments over versions, messages, alignment, and refusals."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.overheard import Overheard, cause_in
from engines.vllm import (
    CPU_KV_CACHE,
    METHODS,
    OURS,
    SAMPLES_DRAFTS,
    SAMPLING_OURS,
    Interface,
    VllmEngine,
    _bounded_memory_on_cpu,
    _Drafted,
    _Live,
    align,
    engine_arguments,
    why_no_start,
)
from speedbench.steps import Batch
from speedbench.types import (
    UNKNOWN,
    Algorithm,
    EngineDiedError,
    EngineSettings,
    Request,
    Sampling,
    UserError,
)

CONTRACTS = Path(__file__).parent / "contracts" / "vllm"
VERSIONS = ("0.20.2", "0.26.0", "0.29.0", "0.32.0", "0.33.0")


def contract(version: str) -> dict[str, Any]:
    """Class -> field -> {type, default}, as the release's source has them."""
    found = json.loads((CONTRACTS / f"{version}.json").read_text())
    assert (found["engine"], found["version"]) == ("VLLM", version)
    return {name: entry["fields"] for name, entry in found["classes"].items()}


def values_of(type_text: str) -> frozenset[str]:
    """The values of the Literal in a type."""
    listed = re.search(r"Literal(\[[^\]]*\])", type_text)
    assert listed is not None
    return frozenset(ast.literal_eval(listed[1]))


def interface(version: str) -> Interface:
    classes = contract(version)
    return Interface(
        version,
        frozenset(classes["AsyncEngineArgs"]),
        frozenset(classes["SpeculativeConfig"]),
        values_of(classes["SpeculativeConfig"]["method"]["type"]),
    )


def arguments(version: str = "0.29.0", **changes: Any) -> dict[str, Any]:
    return engine_arguments(EngineSettings("target", **changes), interface(version))[0]


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


# ---------------------------------------------------------------- over versions

ALGORITHMS = [name for name in get_args(Algorithm) if name != "NONE"]
GONE = {("MEDUSA", "0.33.0")}
"""(algorithm, version) of what a release does not have."""


def draft_of(algorithm: str, folder: Path) -> str | None:
    """A draft checkpoint's folder with just what is looked at before the engine starts."""
    if algorithm in ("NGRAM", "SUFFIX", "MTP"):
        return None
    (folder / "config.json").write_text('{"vocab_size": 8, "pard_token": 7}')
    return str(folder)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_argument_exists_in_every_version(
    algorithm: Any, version: str, tmp_path: Path
) -> None:
    known = interface(version)
    asked = EngineSettings(
        "target", draft_of(algorithm, tmp_path), algorithm, draft_length=2, max_seq_len=512
    )
    if (algorithm, version) in GONE:
        with pytest.raises(UserError, match=rf"{version} has no {algorithm}, it has .*EAGLE3"):
            engine_arguments(asked, known)
        return
    found, unused = engine_arguments(asked, known)
    classes = contract(version)
    assert set(found) <= set(classes["AsyncEngineArgs"])
    speculative = found["speculative_config"]
    assert set(speculative) <= set(classes["SpeculativeConfig"])
    assert speculative["method"] in values_of(classes["SpeculativeConfig"]["method"]["type"])
    assert speculative["num_speculative_tokens"] == 2
    assert speculative.get("model") == asked.draft_model_dir
    assert speculative.get("parallel_drafting", False) is (algorithm == "PARD")
    # What per-step acceptance comes from is ours: without it the run goes on, and says so.
    has_metrics = "per_request_spec_decode_metrics" in classes["AsyncEngineArgs"]
    assert has_metrics is (version not in ("0.20.2", "0.26.0"))
    assert ("per_request_spec_decode_metrics" in found) is has_metrics
    assert unused == (() if has_metrics else ("per_request_spec_decode_metrics",))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_recorder_reads_exists_in_every_version(version: str) -> None:
    classes = contract(version)
    assert {"outputs", "timestamp", "scheduler_stats"} <= set(classes["EngineCoreOutputs"])
    assert {"request_id", "new_token_ids", "finish_reason", "routed_experts"} <= set(
        classes["EngineCoreOutput"]
    )
    assert {
        "num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos",
    } <= set(classes["SpecDecodingStats"])  # fmt: skip
    assert "disable_log_stats" in classes["AsyncLLM.from_vllm_config"]
    submitted = list(classes["AsyncLLM.add_request"].items())
    assert [name for name, _ in submitted[:3]] == ["request_id", "prompt", "params"]
    assert all(entry["default"] is not None for _, entry in submitted[3:])
    assert all(e["default"] is not None for e in classes["AsyncLLM.reset_prefix_cache"].values())
    passed = {
        "temperature", "top_p", "top_k", "max_tokens", "stop_token_ids", "ignore_eos",
        "detokenize", "output_kind",
    }  # fmt: skip
    assert passed <= set(classes["SamplingParams"])
    assert passed <= set(SAMPLING_OURS)
    flags = set(VllmEngine.flag_of) | (set(OURS) - {"per_request_spec_decode_metrics"})
    assert flags <= set(classes["AsyncEngineArgs"])


@pytest.mark.parametrize("version", VERSIONS)
def test_calibration_arguments_exist_in_every_version(version: str) -> None:
    for algorithm, engine_args in VllmEngine.calibration_args.items():
        found = arguments(version, algorithm=algorithm, engine_args=engine_args)
        assert (
            found["speculative_config"].items() >= dict(engine_args)["speculative_config"].items()
        )  # type: ignore[attr-defined]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_how_drafts_are_sampled_is_passed_on_or_refused(algorithm: Any, tmp_path: Path) -> None:
    changes = {
        "algorithm": algorithm, "draft_model_dir": draft_of(algorithm, tmp_path),
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    if algorithm not in SAMPLES_DRAFTS:
        with pytest.raises(UserError, match=f"--draft_sample_method for {algorithm}"):
            arguments(**changes)
        return
    found = arguments(**changes)["speculative_config"]["draft_sample_method"]
    assert found == "probabilistic"
    assert found in values_of(
        contract("0.29.0")["SpeculativeConfig"]["draft_sample_method"]["type"]
    )
    with pytest.raises(
        UserError, match=r"0\.20\.2 has no speculative_config 'draft_sample_method'"
    ):
        arguments("0.20.2", **changes)


def test_experts_are_captured_only_where_asked_for() -> None:
    name = "enable_return_routed_experts"
    assert arguments(capture_experts=True)[name] is True
    assert name not in arguments()
    assert VllmEngine.flag_of[name] == "capture_experts"


@pytest.mark.parametrize("algorithm", ["PARD", "DFLASH"])
@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({"pard_token": 0}, True),
        ({"mask_token_id": 5}, True),
        ({"ptd_token_id": 5}, True),
        ({"dflash_config": {"mask_token_id": 5}}, True),
        ({"dflash_config": {}, "pard_token": None}, False),
        ({}, False),
    ],
)
def test_a_drafter_without_a_mask_token_is_refused_before_the_start(
    algorithm: Any, config: dict[str, Any], fits: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    changes = {"algorithm": algorithm, "draft_model_dir": str(tmp_path)}
    if fits:
        arguments(**changes)
    else:
        with pytest.raises(UserError, match=rf"{tmp_path}/config.json names no mask token.*pard"):
            arguments(**changes)


def test_a_draft_on_the_hub_is_left_to_the_engine() -> None:
    assert arguments(algorithm="PARD", draft_model_dir="some/name")


def test_every_algorithm_of_the_field_is_accounted_for() -> None:
    assert set(METHODS) == set(ALGORITHMS)
    assert set(VllmEngine.algorithms) == set(get_args(Algorithm))
    assert set(VllmEngine.support) == set(get_args(Algorithm))
    assert all(s.where for s in VllmEngine.support.values() if s.proof == "real")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"enforce_eagre": True}, ["enforce_eagre", "enforce_eager"]),
        ({"stream_interval": 8}, ["stream_interval", "speedbench"]),
        ({"skip_tokenizer_init": False}, ["skip_tokenizer_init"]),
        ({"speculative_config": {"method": "ngram"}}, ["--speculative_algorithm"]),
        ({"speculative_config": {"num_speculative_tokens": 9}}, ["--draft_length"]),
        ({"speculative_config": {"draft_sample_method": "greedy"}}, ["--draft_sample_method"]),
        ({"speculative_config": {"prompt_lookup_mx": 3}}, ["0.29.0", "prompt_lookup_max"]),
        ({"speculative_config": 3}, ["speculative_config"]),
        ({"speculative_config": {"rejection_sample_method": "synthetic"}}, ["made up"]),
        ({"speculative_config": {"synthetic_acceptance_length": 2.5}}, ["made up"]),
        (
            {"speculative_config": {"num_speculative_tokens_per_batch_size": [[1, 9, 1]]}},
            ["draft length"],
        ),
        ({"speculative_config": {"enable_adaptive_verification": True}}, ["draft length"]),
        ({"speculative_config": {"speculative_token_tree": "[(0,)]"}}, ["tree"]),
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


@pytest.mark.parametrize("algorithm", ["NGRAM", "SUFFIX"])
def test_a_lookup_takes_no_draft_model(algorithm: Any) -> None:
    with pytest.raises(UserError, match="leave out --draft_model_dir"):
        arguments(algorithm=algorithm, draft_model_dir="d")


def test_other_ways_to_verify_are_the_users_choice() -> None:
    config = {"rejection_sample_method": "block"}
    found = arguments("0.32.0", algorithm="NGRAM", engine_args={"speculative_config": dict(config)})
    assert found["speculative_config"]["rejection_sample_method"] == "block"


def test_whether_experts_are_spread_is_said_by_the_flag_only() -> None:
    """engine_args would override --ep_size, and the manifest would hold the flag's number."""
    assert VllmEngine.flag_of["enable_expert_parallel"] == "ep_size"


def test_tokens_that_are_forced_are_no_answer() -> None:
    """vLLM takes them as a sampling parameter: the model would not be asked."""
    assert "trace_decode_token_ids" in SAMPLING_OURS


def test_a_draft_model_becomes_pard_by_its_flag_only() -> None:
    with pytest.raises(UserError, match="--speculative_algorithm PARD or DRAFT_TARGET"):
        arguments(
            algorithm="DRAFT_TARGET", draft_model_dir="d",
            engine_args={"speculative_config": {"parallel_drafting": True}},
        )  # fmt: skip


def test_a_baseline_takes_no_speculative_config() -> None:
    with pytest.raises(UserError, match="NONE"):
        arguments(engine_args={"speculative_config": {"prompt_lookup_max": 3}})


# ---------------------------------------------------------------- messages


def output(request_id: str, token_ids: list[int], **more: Any) -> Any:
    return SimpleNamespace(request_id=request_id, new_token_ids=token_ids,
                           finish_reason=more.pop("finish_reason", None), **more)  # fmt: skip


def listening(algorithm: Algorithm = "NONE", draft_length: int = 3, **more: Any) -> Any:
    """An adapter with one request "a" in flight and no vLLM behind it."""
    engine: Any = VllmEngine.__new__(VllmEngine)
    engine._settings = EngineSettings(
        "target", algorithm=algorithm, draft_length=draft_length, **more
    )
    engine._k = 0 if algorithm == "NONE" else draft_length
    engine._drafted, engine._known = _Drafted(engine._k), {}
    engine._events, engine._death = Batch(), None
    engine._arrived = SimpleNamespace(set=lambda: None)
    engine._totals = {"counts": [0, 0, 0], "per_position": []}
    engine._live = {"a": _Live("a")}
    return engine


def take(engine: Any, outputs: list[Any], stats: Any = None) -> list[Any]:
    """The steps of one message, whose outputs carry vLLM's own request ids."""
    states = {"a-0f0f0f0f": SimpleNamespace(external_req_id="a")}
    engine._take(SimpleNamespace(timestamp=1.5, outputs=outputs, scheduler_stats=stats), states)
    steps, engine._events = list(engine._events), Batch()
    return list(steps)


@pytest.mark.parametrize("whole", [True, False], ids=["when it ends", "step by step"])
def test_routed_experts_come_with_the_last_step(whole: bool) -> None:
    """vLLM up to 0.20 sends them when a request ends, later ones with every output."""
    # A prompt of 3 tokens and 4 of output: 6 were run through 2 layers of top-2 routing.
    rows = np.arange(6 * 2 * 2).reshape(6, 2, 2) % 7
    chunks = [None, None, rows] if whole else [rows[:3], rows[3:5], rows[5:]]
    engine = listening(capture_experts=True)
    messages = [([5], None), ([6, 7], None), ([8], "length")]
    steps = [
        take(engine, [output("a-0f0f0f0f", ids, finish_reason=reason, routed_experts=chunk)])[0]
        for (ids, reason), chunk in zip(messages, chunks, strict=True)
    ]
    assert [step.routed_experts for step in steps[:2]] == [None, None]
    experts = steps[2].routed_experts
    assert (experts.n_tokens, experts.n_layers, experts.top_k) == (6, 2, 2)
    stored = np.frombuffer(experts.expert_ids, dtype="<i2").reshape(6, 2, 2)
    assert (stored == rows).all()


def test_messages_without_experts_make_none() -> None:
    steps = take(listening(), [output("a-0f0f0f0f", [5], finish_reason="length")])
    assert (steps[0].time_ns, steps[0].routed_experts) == (1_500_000_000, None)


def test_what_a_request_ended_with_is_never_taken_for_an_answer() -> None:
    steps = take(listening(), [output("a-0f0f0f0f", [], finish_reason="abort")])
    assert (steps[0].finish_reason, steps[0].error) == ("error", "vLLM ended the request: abort")


@given(seed=st.integers(0, 2**32), k=st.integers(1, 5), share=st.sampled_from([0.0, 0.5, 1.0]),
       padded=st.booleans())  # fmt: skip
def test_step_totals_tell_what_was_drafted_or_nothing(
    seed: int, k: int, share: float, padded: bool
) -> None:
    """A batch whose truth is known: of each step, what is told is that, or UNKNOWN; and where all
    were drafted and at most one request ended, all of it is told.

    share   of the decode steps are plain
    padded  a first step may hold a draft that nobody made (vLLM's, after a prefix-cache hit)
    """
    rng = random.Random(seed)
    engine = listening("DRAFT_TARGET", k, prefix_cache=padded)
    names = [f"r{i}" for i in range(5)]
    engine._live = {name: _Live(name) for name in names}
    lives, states = (
        dict(engine._live),
        {f"{n}-0f": SimpleNamespace(external_req_id=n) for n in names},
    )
    truth: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    whole: dict[str, list[bool]] = {name: [] for name in names}
    drafts_seen = accepted_seen = 0
    while engine._live:
        batch, outputs, drafts, accepted, ended = [], [], 0, 0, 0
        for name in [n for n in engine._live if rng.random() < 0.8]:
            first, last = not truth[name], rng.random() < 0.2
            drafted = (
                rng.random() < 0.3 if first and padded else not first and rng.random() >= share
            )
            n = rng.randint(0, k) if drafted and not first else 0
            truth[name].append((n, k if drafted else 0))
            drafts, accepted, ended = drafts + drafted, accepted + n, ended + (last and not first)
            shown = rng.randint(1, n + 1) if last else n + 1
            outputs.append(
                output(f"{name}-0f", [7] * shown, finish_reason="length" if last else None)
            )
            batch.append((name, first, drafted))
        spec = SimpleNamespace(
            num_drafts=drafts, num_draft_tokens=k * drafts, num_accepted_tokens=accepted,
            num_accepted_tokens_per_pos=[0] * k,
        )  # fmt: skip
        stats = SimpleNamespace(spec_decoding_stats=spec if drafts else None)
        message = SimpleNamespace(timestamp=1.0, outputs=outputs, scheduler_stats=stats)
        engine._take(message, states)
        drafts_seen, accepted_seen = drafts_seen + drafts, accepted_seen + accepted
        plain = all(drafted is not first for _, first, drafted in batch)
        is_known = plain and ended < 2 and not (padded and any(first for _, first, _ in batch))
        for name, _, _ in batch:
            whole[name].append(is_known)
    counters = engine.counters()
    assert (counters.drafts, counters.accepted) == (drafts_seen, accepted_seen)
    assert {step.request_id for step in engine._events if step.finish_reason} == set(names)
    for name, live in lives.items():
        assert len(live.told) == len(truth[name])
        for told, true, known in zip(live.told, truth[name], whole[name], strict=True):
            assert all(a in (UNKNOWN, b) for a, b in zip(told, true, strict=True))
            assert told == true or not known


class FakeCore:
    """An engine core with one message to tell; then it ends, or is silent for ever."""

    def __init__(self, message: Any, end: Exception | None = None) -> None:
        self.message, self.end = message, end

    async def get_output_async(self) -> Any:
        message, self.message = self.message, None
        if message is None:
            if self.end is not None:
                raise self.end
            await asyncio.Event().wait()
        return message


def connected(core: FakeCore) -> Any:
    """An adapter that listens to a core through a handler like vLLM's own."""
    engine = listening()
    engine.version, engine._asyncio = "0.32.0", asyncio.new_event_loop()
    engine._arrived = asyncio.Event()
    states = {"a-0f0f0f0f": SimpleNamespace(external_req_id="a")}
    processor = SimpleNamespace(request_states=states)
    engine._llm = SimpleNamespace(engine_core=core, output_processor=processor)
    engine._listen(engine._llm)

    async def handler() -> None:
        with contextlib.suppress(Exception):  # vLLM's logs what it did not expect, and ends
            while True:
                await core.get_output_async()

    engine._llm.output_handler = engine._asyncio.create_task(handler())
    return engine


@pytest.mark.parametrize(
    ("output_", "end", "words"),
    [
        (
            SimpleNamespace(request_id="a-0f0f0f0f", finish_reason=None),
            None,
            ["0.32.0", "new_token_ids"],
        ),
        (None, RuntimeError("CUDA error"), ["engine core ended", "CUDA error"]),
    ],
    ids=["a message of another shape", "a core that ends"],
)
def test_what_cannot_go_on_is_told_and_does_not_hang(
    output_: Any, end: Exception | None, words: list[str]
) -> None:
    message = SimpleNamespace(timestamp=1.0, outputs=[output_], scheduler_stats=None)
    engine = connected(FakeCore(message if output_ is not None else None, end))
    with pytest.raises(EngineDiedError) as death:
        engine.poll()
    engine._asyncio.close()
    assert all(word in str(death.value) for word in words)


def test_what_arrived_before_the_end_is_not_lost() -> None:
    told = output("a-0f0f0f0f", [5, 6])
    message = SimpleNamespace(timestamp=1.0, outputs=[told], scheduler_stats=None)
    engine = connected(FakeCore(message, RuntimeError("gone")))
    assert [list(step.token_ids) for step in engine.poll()] == [[5, 6]]
    with pytest.raises(EngineDiedError, match="gone"):
        engine.poll()
    engine._asyncio.close()


def test_vllm_itself_is_shown_only_outputs_that_end_a_request() -> None:
    """It must let go of those; what it would make of all others nobody reads."""
    outputs = [
        output("a-0f0f0f0f", [5, 6]),
        output("b-0f0f0f0f", [7], finish_reason="length"),
        output("c-0f0f0f0f", []),
        output("d-0f0f0f0f", [], finish_reason="abort"),
    ]
    message = SimpleNamespace(timestamp=1.0, outputs=list(outputs), scheduler_stats=None)
    engine = connected(FakeCore(message))
    assert [list(step.token_ids) for step in engine.poll()] == [[5, 6]]  # only "a" is in flight
    assert message.outputs == [outputs[1], outputs[3]]
    engine._llm.output_handler.cancel()
    engine._asyncio.run_until_complete(asyncio.sleep(0))
    engine._asyncio.close()


def test_a_prompt_is_rendered_by_vllms_own_renderer_where_it_has_one() -> None:
    def render_cmpl(prompts: Any, parameters: Any) -> list[Any]:
        return [{"type": "token", "asked": (prompt, parameters)} for prompt in prompts]

    engine = listening()
    renderer = SimpleNamespace(render_cmpl=render_cmpl, default_cmpl_tok_params="default")
    engine._llm = SimpleNamespace(renderer=renderer)
    bare = {"prompt_token_ids": [3, 4]}
    assert engine._rendered((3, 4)) == {"type": "token", "asked": (bare, "default")}
    for without in (SimpleNamespace(), SimpleNamespace(renderer=SimpleNamespace())):
        engine._llm = without
        assert engine._rendered((3, 4)) == bare


def test_what_arrived_before_a_submission_that_fails_is_not_lost() -> None:
    """vLLM may die inside `submit`, where messages that arrived before are waiting for a poll."""
    told = output("a-0f0f0f0f", [5, 6])
    message = SimpleNamespace(timestamp=1.0, outputs=[told], scheduler_stats=None)
    engine = connected(FakeCore(message, RuntimeError("gone")))

    async def add_request(*_: Any) -> None:
        await engine._llm.output_handler  # the message, and then the end
        raise RuntimeError("the engine is dead")

    engine._llm.add_request = add_request
    engine._sampling_params = lambda *_: None
    engine.submit(Request("b", [1], 1, Sampling()))
    assert [list(step.token_ids) for step in engine.poll()] == [[5, 6]]
    with pytest.raises(EngineDiedError, match="gone"):
        engine.poll()
    engine._asyncio.close()


# ---------------------------------------------------------------- forgetting


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("answer", [True, None, False])
def test_the_prefix_cache_is_dropped_where_there_is_one(
    prefix_cache: bool, answer: bool | None
) -> None:
    engine = listening()
    engine._settings = replace(engine._settings, prefix_cache=prefix_cache)
    calls = []
    engine._llm = SimpleNamespace(reset_prefix_cache=lambda: calls.append(1))
    engine._run = lambda _: answer
    if prefix_cache and answer is False:
        with pytest.raises(UserError, match="prefix cache"):
            engine.forget()
    else:
        engine.forget()
    assert len(calls) == prefix_cache


# ---------------------------------------------------------------- memory on a CPU


@pytest.mark.parametrize(
    ("on_cpu", "exported", "asked", "during"),
    [
        (True, None, None, "2"),  # vLLM would take nearly all memory
        (True, "7", None, "7"),
        (True, None, 1 << 30, None),
        (False, None, None, None),
        (False, "7", 1 << 30, "7"),
    ],
)
def test_the_kv_cache_on_a_cpu_is_bounded_while_it_starts(
    on_cpu: bool, exported: str | None, asked: int | None, during: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    platform_is(on_cpu, exported, monkeypatch)
    arguments_ = {} if asked is None else {"kv_cache_memory_bytes": asked}
    with _bounded_memory_on_cpu(arguments_):
        assert os.environ.get(CPU_KV_CACHE) == during
    assert os.environ.get(CPU_KV_CACHE) == exported


def test_a_size_that_the_environment_overrides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    platform_is(True, "7", monkeypatch)
    with (
        pytest.raises(UserError, match=f"{CPU_KV_CACHE}=7 .*kv_cache_memory_bytes=5: unset one"),
        _bounded_memory_on_cpu({"kv_cache_memory_bytes": 5}),
    ):
        pass


def platform_is(on_cpu: bool, exported: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: on_cpu))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=platforms))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.delenv(CPU_KV_CACHE, raising=False)
    if exported is not None:
        monkeypatch.setenv(CPU_KV_CACHE, exported)


def test_a_missing_vllm_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # what it sets ends with the test
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"vLLM cannot be imported .*pip install vllm"):
        VllmEngine(EngineSettings("target"))


# ---------------------------------------------------------------- why it did not start

CORE = RuntimeError(
    "Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore': 1}"
)
LOG = """(EngineCore pid=7) ERROR 11-22 08:57:28 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 08:57:28 [core.py:1510] ValueError: To serve at least one request \
with the model's max seq len (4096), 0.5 GiB KV cache is needed.
Process EngineCore:
Traceback (most recent call last):
  File "core.py", line 1, in run
ValueError: To serve at least one request with the model's max seq len (4096), 0.5 GiB KV cache is \
needed.
"""


def test_the_cause_is_taken_from_the_log_and_not_from_the_report_of_it() -> None:
    assert (cause_in(LOG) or "").startswith("To serve at least one request with")
    assert cause_in(LOG + f"RuntimeError: {CORE}\n") == cause_in(LOG)
    assert cause_in("nothing of note\nKeyError: 'layers.9'") == "KeyError: 'layers.9'"
    assert cause_in("all is well") is None


def test_stderr_is_overheard_and_still_arrives(capfd: pytest.CaptureFixture[str]) -> None:
    with Overheard() as overheard:
        os.system("echo 'ValueError: from a child' >&2")
    os.system("echo afterwards >&2")
    assert overheard.cause() == "from a child"
    err = capfd.readouterr().err
    assert "ValueError: from a child" in err
    assert "afterwards" in err


@pytest.mark.parametrize(
    ("error", "cause", "words"),
    [
        (CORE, cause_in(LOG), ["max seq len (4096)", "--max_seq_len"]),
        (CORE, None, ["its own log"]),
        (RuntimeError(str(CORE).replace("': 1", "': -9")), "x", ["signal 9", "memory"]),
        (ValueError("AuxOutput Connector requires Model Runner V2"), None, ["--capture_experts"]),
        (CORE, "size mismatch for fc.weight", ["size mismatch", "draft checkpoint head", "EAGLE3"]),
        (
            ValueError(
                "1 validation error for SpeculativeConfig\ndraft_sample_method\n"
                "  Input should be 'greedy' or 'probabilistic' [type=literal_error, input='x']"
            ),
            None,
            ["draft_sample_method: Input should be 'greedy' or 'probabilistic'"],
        ),
    ],
)
def test_why_it_did_not_start_is_one_sentence(
    error: Exception, cause: str | None, words: list[str]
) -> None:
    found = why_no_start(error, cause, EngineSettings("target", "head", "EAGLE3"))
    assert found.startswith("vLLM did not start: ")
    assert "\n" not in found
    assert all(word in found for word in words), found


def test_a_message_that_lists_everything_is_cut() -> None:
    error = ValueError(f"not supported. Supported: {', '.join(map(str, range(1000)))}")
    assert len(why_no_start(error, None, EngineSettings("target"))) < 500


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


def test_a_phantom_draft_does_not_displace_a_step_known_to_be_plain() -> None:
    # A prompt cached but for one token, then a lookup that misses (the totals say so), one that
    # is rejected, one that is accepted.
    told = [(UNKNOWN, UNKNOWN), (0, 0), (0, 3), (2, 3)]
    found = align([1, 1, 1, 3], [0, 0, 2], [3, 3, 3], told)
    assert found == [(0, 3), (0, 0), (0, 3), (2, 3)]


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
