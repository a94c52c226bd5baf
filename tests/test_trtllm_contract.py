"""The stand-in for TensorRT-LLM refuses what each version refuses: a published adapter's keywords
are taken and rejected as they were by the recorded interface."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.trtllm_contract import VERSIONS, contract

REFERENCE_LLM = {
    "model": "target", "kv_cache_config": None, "speculative_config": None,
    "cuda_graph_config": None, "moe_config": None, "moe_expert_parallel_size": 2,
    "max_batch_size": 8, "max_seq_len": 4096, "enable_attention_dp": False,
    "disable_overlap_scheduler": False, "skip_tokenizer_init": True, "tensor_parallel_size": 4,
}  # fmt: skip
"""Names a published adapter passes to LLM(...), before its `sampler_type`."""

DRAFT = {"max_draft_len": 3, "speculative_model_dir": "head"}
REFERENCE_EAGLE3 = {**DRAFT, "eagle3_one_model": True, "eagle3_layers_to_capture": None,
                    "num_eagle_layers": 1}  # fmt: skip

Rejected = Mapping[str, str]

CASES: dict[str, tuple[str, Mapping[str, Any], Rejected]] = {
    # case: (class, keywords, version -> a name in the refusal). Unlisted versions take them.
    "reference LLM": (
        "LLM",
        {**REFERENCE_LLM, "sampler_type": "TorchSampler"},
        {"1.0.0": "sampler_type", "main": "sampler_type"},
    ),
    "reference LLM, no sampler_type": ("LLM", REFERENCE_LLM, {}),
    "with orchestrator_type": (
        "LLM",
        {**REFERENCE_LLM, "orchestrator_type": None, "env_overrides": None},
        {"1.0.0": "orchestrator_type"},
    ),
    "with max_stats_len": (
        "LLM",
        {**REFERENCE_LLM, "max_stats_len": 10},
        {"1.0.0": "max_stats_len", "1.1.0": "max_stats_len"},
    ),
    "reference EAGLE3": (
        "EagleDecodingConfig",
        REFERENCE_EAGLE3,
        {"1.0.0": "eagle3_layers_to_capture"},
    ),
    "EAGLE3 by speculative_model_dir": ("EagleDecodingConfig", DRAFT, {}),
    "EAGLE3 by speculative_model": (
        "EagleDecodingConfig",
        {"max_draft_len": 3, "speculative_model": "head"},
        {"1.0.0": "speculative_model", "1.1.0": "speculative_model"},
    ),
    "EAGLE3 with allow_advanced_sampling": (
        "EagleDecodingConfig",
        {**DRAFT, "allow_advanced_sampling": True},
        {"1.0.0": "allow_advanced_sampling", "1.1.0": "allow_advanced_sampling"},
    ),
    "Eagle3DecodingConfig": (
        "Eagle3DecodingConfig",
        DRAFT,
        dict.fromkeys(("1.0.0", "1.1.0", "1.2.0"), "no class"),
    ),
    "reference MTP": (
        "MTPDecodingConfig",
        {"num_nextn_predict_layers": 3, "use_relaxed_acceptance_for_thinking": False,
         "relaxed_topk": 10, "relaxed_delta": 0.6},
        {},
    ),
    "MTP by max_draft_len": ("MTPDecodingConfig", {"max_draft_len": 3}, {}),
    "reference NGRAM": (
        "NGramDecodingConfig",
        {"max_draft_len": 3, "max_matching_ngram_size": 2, "is_keep_all": True,
         "is_use_oldest": True, "is_public_pool": True},
        {},
    ),
    "NGRAM with max_concurrency": (
        "NGramDecodingConfig",
        {"max_draft_len": 3, "max_matching_ngram_size": 2, "max_concurrency": 8},
        {"1.0.0": "max_concurrency"},
    ),
    "reference DRAFT_TARGET": ("DraftTargetDecodingConfig", DRAFT, {}),
    "draft_len_schedule": (
        "DraftTargetDecodingConfig",
        {**DRAFT, "draft_len_schedule": {1: 3}},
        {"1.0.0": "draft_len_schedule", "1.1.0": "draft_len_schedule"},
    ),
    **{
        name: (
            f"{name}DecodingConfig",
            {"max_draft_len": 3},
            dict.fromkeys(("1.0.0", "1.1.0", "1.2.0"), "no class"),
        )
        for name in ("SA", "PARD", "DFlash")
    },
}  # fmt: skip


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    with contract(request.param):
        yield request.param


def build(class_name: str, keywords: Mapping[str, Any]) -> Any:
    if class_name == "LLM":
        kept = {k: v for k, v in keywords.items() if v is not None or not k.endswith("_config")}
        return importlib.import_module("tensorrt_llm").LLM(**kept)
    return getattr(importlib.import_module("tensorrt_llm.llmapi"), class_name)(**keywords)


@pytest.mark.parametrize("case", CASES)
def test_keywords_are_taken_and_rejected_as_recorded(version: str, case: str) -> None:
    class_name, keywords, rejected = CASES[case]
    word = rejected.get(version)
    if word is None:
        build(class_name, keywords)
    elif word == "no class":
        with pytest.raises(AttributeError):
            build(class_name, keywords)
        with pytest.raises(ImportError):
            exec(f"from tensorrt_llm.llmapi import {class_name}")
    else:
        with pytest.raises(ValueError, match=word):
            build(class_name, keywords)


def test_mtp_takes_max_draft_len_and_ignores_it_up_to_1_2(version: str) -> None:
    config = build("MTPDecodingConfig", {"max_draft_len": 3})
    if version == "main":
        assert config.max_draft_len == 3
    else:
        assert config.num_nextn_predict_layers == 1  # a user who asked for 3 would silently get 1


def test_the_three_gates_have_their_texts(version: str) -> None:
    package = importlib.import_module("tensorrt_llm")
    with pytest.raises(ValueError, match=r"^LLM got invalid argument: batch_sizes$"):
        package.LLM(model="target", batch_sizes=[1])
    with pytest.raises(ValueError, match=r"not supported by the PyTorch backend: \['build_config'"):
        package.LLM(model="target", build_config=1)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        package.LLM(model="target", kv_cache_config={"block_reuse": False})
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        package.SamplingParams(max_new_tokens=3)
    with pytest.raises(TypeError, match="positional"):
        package.SamplingParams(3)


def test_classes_check_what_they_are_recorded_to_check(version: str) -> None:
    llmapi = importlib.import_module("tensorrt_llm.llmapi")
    llm = importlib.import_module("tensorrt_llm").LLM
    with pytest.raises(ValueError, match="max_batch_size"):
        llmapi.CudaGraphConfig(batch_sizes=[1, 2], max_batch_size=4)
    with pytest.raises(ValueError, match="stream_interval"):
        llm(model="target", stream_interval=0)
    ngram = llmapi.NGramDecodingConfig(max_draft_len=3)
    if version == "main":  # where the default size is 2
        assert llm(model="target", speculative_config=ngram).args.speculative_config is ngram
    else:
        with pytest.raises(ValueError, match="max_matching_ngram_size"):
            llm(model="target", speculative_config=ngram)
    with pytest.raises(ValueError, match="Draft model"):
        llm(model="target", speculative_config=llmapi.DraftTargetDecodingConfig(max_draft_len=3))
    auto_deploy = importlib.import_module("tensorrt_llm._torch.auto_deploy").LLM
    with pytest.raises(ValueError, match="world_size"):
        auto_deploy(model="target", tensor_parallel_size=2)
    ngram = llmapi.NGramDecodingConfig(max_draft_len=3, max_matching_ngram_size=2)
    with pytest.raises(ValueError, match="does not support backend _autodeploy"):
        auto_deploy(model="target", speculative_config=ngram)


def test_the_engine_needs_a_running_loop_and_an_end_id(version: str) -> None:
    package = importlib.import_module("tensorrt_llm")
    llm = package.LLM(model="target", skip_tokenizer_init=True)
    outside = llm.generate_async([1], package.SamplingParams(end_id=0, max_tokens=2))

    async def follow() -> None:
        async for _ in outside:
            pass

    with pytest.raises(AssertionError, match="event loop"):
        asyncio.run(follow())
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate_async([1], package.SamplingParams(max_tokens=2))
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        llm.generate_async([1], package.SamplingParams(end_id=0))


def stream(version: str, steps: list[list[int]], **params: Any) -> tuple[list[list[int]], str]:
    """Token lists after each response, and the reason of the end; the object is one throughout."""
    package = importlib.import_module("tensorrt_llm")
    engine = importlib.import_module("tensorrt_llm._engine")
    engine.SCRIPT = lambda _asked: steps
    interval = params.pop("interval", 1)
    llm = package.LLM(model="target", max_seq_len=params.pop("limit", 99), stream_interval=interval)

    async def run() -> tuple[list[list[int]], str]:
        result = llm.generate_async([1, 2], package.SamplingParams(**params), streaming=True)
        seen = []
        async for item in result:
            assert item is result
            assert item.outputs[0] is result.outputs[0]
            seen.append(list(item.outputs[0].token_ids))
        return seen, result.outputs[0].finish_reason

    return asyncio.run(run())


def test_the_engine_ends_requests_as_published(version: str) -> None:
    steps = [[5], [6, 7, 8], [9, 10, 11]]
    seen, reason = stream(version, steps, end_id=7, max_tokens=9)
    assert (seen, reason) == ([[5], [5, 6, 7]], "stop")
    seen, reason = stream(version, steps, end_id=0, stop_token_ids=[7], max_tokens=9)
    assert (seen, reason) == ([[5], [5, 6]], "stop")  # trimmed
    seen, reason = stream(
        version, steps, end_id=0, stop_token_ids=[7], max_tokens=9, include_stop_str_in_output=True
    )
    assert (seen, reason) == ([[5], [5, 6, 7]], "stop")
    seen, reason = stream(version, steps, end_id=7, ignore_eos=True, max_tokens=6)
    assert (seen[-1], reason) == ([5, 6, 7, 8, 9, 10], "length")
    params = {"end_id": 7, "ignore_eos": True, "stop_token_ids": [8], "max_tokens": 6}
    seen, _ = stream(version, steps, **params, include_stop_str_in_output=True)
    assert seen[-1] == ([5, 6, 7, 8, 9, 10] if version == "main" else [5, 6, 7, 8])


def test_the_engine_clips_and_merges_as_published(version: str) -> None:
    steps = [[n] for n in range(5, 20)]
    seen, reason = stream(version, steps, end_id=0, max_tokens=8, limit=5)
    assert (len(seen[-1]), reason) == (8 if version == "1.0.0" else 3, "length")
    seen, _ = stream(version, steps, end_id=0, max_tokens=13, interval=4)
    lengths = [len(tokens) for tokens in seen]
    assert [b - a for a, b in zip([0, *lengths], lengths, strict=False)] == [1, 3, 4, 4, 1]
