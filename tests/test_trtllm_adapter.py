"""The TensorRT-LLM adapters on a stand-in of four versions: arguments, streams, faults, whole runs.

The stand-in (`tests/contracts/tensorrt_llm`) plays step sizes written down here.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

import engines
from engines.trtllm import AutoDeployEngine, TrtllmEngine
from engines.trtllm_arguments import (
    AUTO_DEPLOY_OURS,
    OURS,
    SPECULATIVE_OURS,
    accepted_names,
    recorded_environment,
)
from speedbench import calibrate, environment, inputs, session, store
from speedbench.calibration import closed_form
from speedbench.cli import main
from speedbench.config import from_dict
from speedbench.target import Target
from speedbench.types import (
    Algorithm,
    EngineDiedError,
    EngineSettings,
    Request,
    Sampling,
    Step,
    UserError,
)
from tests.trtllm_contract import CONTRACTS, VARIABLE, VERSIONS, contract

ROOT = Path(__file__).parent.parent
OLD: tuple[Algorithm, ...] = ("EAGLE3", "MTP", "NGRAM", "DRAFT_TARGET")
HAS: dict[str, tuple[Algorithm, ...]] = {
    **dict.fromkeys(("1.0.0", "1.1.0", "1.2.0"), OLD),
    "main": (*OLD, "PARD", "DFLASH"),
}
NAMED = {"1.0.0": "1.0.0", "1.1.0": "1.1.0", "1.2.0": "1.2.0", "main": "1.4.0rc1"}
PAIRS = [(version, algorithm) for version in VERSIONS for algorithm in (*HAS[version], "NONE")]
AUTO_DEPLOY = [
    *((version, "NONE") for version in VERSIONS),
    ("1.2.0", "DRAFT_TARGET"),
    ("main", "DRAFT_TARGET"),
    ("main", "EAGLE3"),
    ("main", "MTP"),
]


class Stage:
    """One version of the stand-in and the engines started on it."""

    def __init__(self, api: Any, version: str, folder: Path) -> None:
        self.api, self.version = api, version
        self.model = folder / "target"
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(
            json.dumps({"max_position_embeddings": 4096, "vocab_size": 2000})
        )
        self.engines: list[TrtllmEngine] = []

    def settings(self, algorithm: str = "NONE", **changes: Any) -> EngineSettings:
        needs = algorithm in ("EAGLE3", "DRAFT_TARGET", "PARD", "DFLASH")
        about = {
            "model_dir": str(self.model),
            "algorithm": algorithm,
            "draft_model_dir": "head" if needs else None,
            "concurrency": 4,
            **changes,
        }
        return EngineSettings(**about)

    def start(
        self, algorithm: str = "NONE", kind: type[TrtllmEngine] = TrtllmEngine, **changes: Any
    ) -> Any:
        engine = kind(self.settings(algorithm, **changes))
        self.engines.append(engine)
        return engine

    @property
    def llm(self) -> Any:
        return self.api.STARTED[-1]

    def unverified(self) -> set[tuple[str, str]]:
        return cast("set[tuple[str, str]]", sys.modules["tensorrt_llm._models"].UNVERIFIED_USED)

    def play(self, *sizes: int) -> None:
        """Every request's steps have these sizes, and its tokens count up from 1000."""
        tokens = iter(range(1000, 10**9))
        self.api.SCRIPT = lambda _asked: [[next(tokens) for _ in range(n)] for n in sizes]


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    version = getattr(request, "param", "main")
    with contract(version) as api:
        found = Stage(api, version, tmp_path)
        yield found
        for engine in found.engines:
            engine.close()


every_version = pytest.mark.parametrize("stage", VERSIONS, indirect=True)


def ask(name: str, max_tokens: int, **sampling: Any) -> Request:
    return Request(name, [1, 2, 3], max_tokens, Sampling(**sampling))


def run(engine: Any, *requests: Request) -> dict[str, list[Step]]:
    """All steps of these requests, asked together."""
    found: dict[str, list[Step]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    n_open = len(requests)
    while n_open:
        for step in engine.poll():
            found[step.request_id].append(step)
            n_open -= step.finish_reason is not None
    return found


def sizes(steps: Sequence[Step]) -> list[int]:
    return [len(step.token_ids) for step in steps]


# ---------------------------------------------------------------- what is started


@pytest.mark.parametrize(("stage", "algorithm"), PAIRS, indirect=["stage"])
def test_every_algorithm_of_every_version_starts_and_streams(
    stage: Stage, algorithm: Algorithm
) -> None:
    k = 0 if algorithm == "NONE" else 3
    played = [1, 1, 4, 2, 3] if k else [1, 1, 1, 1, 1]
    stage.play(*played)
    engine = stage.start(algorithm, tp_size=2)
    found = run(engine, ask("a", sum(played)))["a"]
    assert sizes(found) == played
    assert [step.engine_steps for step in found] == [1] * 5
    assert [step.finish_reason for step in found] == [None] * 4 + ["length"]
    told = {(step.accepted, step.drafted) for step in found}
    assert told == ({(None, None)} if k else {(0, 0)})
    info = engine.describe()
    assert (info.name, info.version, info.draft_length) == ("TRTLLM", NAMED[stage.version], k)
    assert (info.max_num_seqs, info.max_seq_len, info.vocab_size) == (4, 4096, 2000)
    assert info.prefix_cache is False
    assert not info.tells_drafted
    assert not info.simulated
    assert info.unused == ()
    assert engine.counters() is None
    json.dumps(environment.plain(info.settings))
    assert stage.unverified() == set()
    config = stage.llm.args.speculative_config
    if algorithm == "NONE":
        assert config is None
    elif algorithm == "MTP" and stage.version in ("1.0.0", "1.1.0"):
        assert config.num_nextn_predict_layers == 3
    else:
        assert config.max_draft_len == 3
    if algorithm == "EAGLE3":
        new = stage.version == "main"
        assert type(config).__name__ == ("Eagle3DecodingConfig" if new else "EagleDecodingConfig")
        assert config.model() == "head"


@pytest.mark.parametrize(("stage", "algorithm"), AUTO_DEPLOY, indirect=["stage"])
def test_auto_deploy_starts_and_streams(stage: Stage, algorithm: str) -> None:
    played = [1, 1, 1] if algorithm == "NONE" else [1, 4, 2]
    stage.play(*played)
    engine = stage.start(algorithm, AutoDeployEngine)
    assert sizes(run(engine, ask("a", sum(played)))["a"]) == played
    assert engine.describe().name == "AUTO_DEPLOY"
    assert stage.llm.arguments_class.__name__ == "AutoDeployLlmArgs"
    assert stage.unverified() == set()


def test_auto_deploy_spreads_by_world_size(stage: Stage) -> None:
    stage.start(kind=AutoDeployEngine, tp_size=2)
    assert (stage.llm.args.world_size, stage.llm.args.tensor_parallel_size) == (2, 1)
    with pytest.raises(UserError, match="one device"):
        stage.start("DRAFT_TARGET", AutoDeployEngine, tp_size=2)
    for name in AUTO_DEPLOY_OURS:
        with pytest.raises(UserError, match=name):
            stage.start(kind=AutoDeployEngine, engine_args={name: 1})


@pytest.mark.parametrize(
    ("stage", "algorithm"),
    [("1.0.0", "DRAFT_TARGET"), ("1.1.0", "DRAFT_TARGET"), ("1.2.0", "EAGLE3"), ("1.2.0", "MTP"),
     ("main", "NGRAM"), ("main", "PARD"), ("main", "DFLASH")],
    indirect=["stage"],
)  # fmt: skip
def test_auto_deploy_lacks_what_its_version_lacks(stage: Stage, algorithm: str) -> None:
    with pytest.raises(UserError, match=f"AutoDeploy.*{NAMED[stage.version]}.*{algorithm}"):
        stage.start(algorithm, AutoDeployEngine)


@pytest.mark.parametrize(
    ("stage", "algorithm"),
    [(v, a) for v in VERSIONS for a in ("PARD", "DFLASH", "EAGLE", "MEDUSA", "SUFFIX")
     if a not in HAS[v]],
    indirect=["stage"],
)  # fmt: skip
def test_an_algorithm_a_version_lacks_is_refused(stage: Stage, algorithm: str) -> None:
    with pytest.raises(
        UserError, match=f"{NAMED[stage.version]} has no {algorithm}: it has EAGLE3"
    ):
        stage.start(algorithm)


def test_support_says_something_of_every_algorithm() -> None:
    for kind in (TrtllmEngine, AutoDeployEngine):
        have = {a for a, found in kind.support.items() if found.proof != "absent"}
        assert have == set(kind.algorithms)
        assert all(found.note for found in kind.support.values() if found.proof == "absent")
        assert kind.owns_ranks


@every_version
def test_the_engine_is_set_up_to_be_measured(stage: Stage) -> None:
    engine = stage.start(concurrency=6, max_seq_len=20000, ep_size=2, trust_remote_code=True)
    arguments = stage.llm.args
    assert arguments.stream_interval == 1
    assert arguments.num_postprocess_workers == 0
    assert arguments.kv_cache_config.enable_block_reuse is False
    assert arguments.cuda_graph_config.batch_sizes == [1, 2, 4, 6]
    assert arguments.cuda_graph_config.enable_padding is True
    assert arguments.max_batch_size == 6
    assert arguments.max_seq_len == engine.describe().max_seq_len == 20000
    assert (arguments.max_num_tokens, arguments.enable_chunked_prefill) == (8192, True)
    assert arguments.skip_tokenizer_init is True
    assert arguments.moe_expert_parallel_size == 2
    assert arguments.trust_remote_code is True
    given = arguments.model_fields_set
    assert not given & {"sampler_type", "backend", "orchestrator_type"}
    assert getattr(arguments, "enable_early_first_token_response", False) is False
    stage.start(concurrency=8, max_seq_len=8192, prefix_cache=True)
    assert stage.llm.args.cuda_graph_config.batch_sizes == [1, 2, 4, 8]
    assert stage.llm.args.enable_chunked_prefill is False
    assert stage.llm.args.kv_cache_config.enable_block_reuse is True


@every_version
def test_arms_differ_in_speculation_and_nothing_else(stage: Stage) -> None:
    stage.start("NONE")
    base = stage.llm.args
    stage.start("EAGLE3")
    spec = stage.llm.args
    differing = {n for n in type(base).model_fields if getattr(base, n) != getattr(spec, n)}
    assert differing == {"speculative_config"}


@every_version
def test_nested_arguments_of_the_user_are_merged(stage: Stage) -> None:
    stage.start(
        "NGRAM",
        engine_args={
            "kv_cache_config": {"free_gpu_memory_fraction": 0.5},
            "cuda_graph_config": None,
            "speculative_config": {"max_matching_ngram_size": 4, "is_keep_all": False},
            "max_num_tokens": 512,
        },
    )
    arguments = stage.llm.args
    assert arguments.kv_cache_config.free_gpu_memory_fraction == 0.5
    assert arguments.kv_cache_config.enable_block_reuse is False
    assert arguments.cuda_graph_config is None
    assert arguments.max_num_tokens == 512
    assert arguments.enable_chunked_prefill is True  # 4096 > 512
    config = arguments.speculative_config
    told = (config.max_matching_ngram_size, config.is_keep_all, config.is_public_pool)
    assert told == (4, False, False)
    settings = stage.engines[-1].describe().settings
    assert (settings["ngram_min"], settings["ngram_max"]) == (1, 4)


@every_version
def test_arguments_of_the_measurement_are_refused_with_the_reason(stage: Stage) -> None:
    for name, why in OURS.items():
        with pytest.raises(UserError, match=f"'{name}', which speedbench sets itself: {why}"):
            stage.start(engine_args={name: 1})
    assert stage.api.STARTED == []


@every_version
def test_speculative_fields_that_are_not_the_users_are_refused(stage: Stage) -> None:
    for name, why in SPECULATIVE_OURS.items():
        with pytest.raises(UserError, match=f"'{name}': {why}"):
            stage.start("EAGLE3", engine_args={"speculative_config": {name: 1}})


@every_version
@pytest.mark.parametrize(
    ("engine_args", "words"),
    [
        ({"attn_backand": "x"}, ["attn_backand", "attn_backend"]),
        ({"kv_cache_config": {"enable_block_reuse": True}}, ["enable_block_reuse", "--prefix_cac"]),
        ({"kv_cache_config": {"free_gpu_memory": 1}}, ["free_gpu_memory_fraction"]),
        ({"kv_cache_config": 3}, ["kv_cache_config"]),
        ({"cuda_graph_config": {"batch_sizes": [1]}}, ["batch_sizes", "--concurrency"]),
        ({"cuda_graph_config": {"max_batch_size": 1}}, ["max_batch_size", "--concurrency"]),
        ({"speculative_config": {"is_keep_al": True}}, ["is_keep_al", "is_keep_all"]),
        ({"speculative_config": []}, ["speculative_config"]),
        ({"disable_overlap_scheduler": "perhaps"}, ["disable_overlap_scheduler"]),
        ({"max_num_tokens": 15}, ["max_num_tokens", "--concurrency 4", "4 tokens"]),
    ],
)
def test_an_unknown_or_wrong_argument_is_refused(
    stage: Stage, engine_args: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        stage.start("NGRAM", engine_args=engine_args)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("stage", "engine_args"),
    [
        ("1.0.0", {"max_stats_len": 5}),
        ("1.0.0", {"batch_wait_timeout_ms": 1}),
        ("1.1.0", {"nvfp4_gemm_config": {}}),
        ("main", {"enable_sleep": True}),
        ("1.0.0", {"speculative_config": {"load_format": "auto"}}),
    ],
    indirect=["stage"],
)
def test_what_a_version_lacks_is_an_error_that_names_it(
    stage: Stage, engine_args: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"LLM {NAMED[stage.version]} has no (engine argument )?'"):
        stage.start("EAGLE3", engine_args=engine_args)


@every_version
@pytest.mark.parametrize(
    ("algorithm", "changes", "word"),
    [
        ("EAGLE3", {"block_size": 4}, "--block_size"),
        ("EAGLE3", {"draft_sample_method": "greedy"}, "--draft_sample_method"),
        ("NONE", {"capture_experts": True}, "--capture_experts"),
        ("NONE", {"dp_size": 2}, "--dp_size"),
        ("MTP", {"pp_size": 2}, "--pp_size"),
        ("MTP", {"draft_model_dir": "head"}, "--draft_model_dir"),
        ("NGRAM", {"draft_model_dir": "head"}, "--draft_model_dir"),
        ("NONE", {"engine_args": {"speculative_config": {"is_keep_all": True}}}, "NONE"),
        ("NONE", {"model_dir": "some/hub-id"}, "--max_seq_len"),
    ],
)
def test_a_flag_without_effect_is_refused(
    stage: Stage, algorithm: str, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        stage.start(algorithm, **changes)


def test_a_dflash_block_is_k_plus_one(stage: Stage) -> None:
    stage.start("DFLASH", draft_length=7, block_size=8)
    assert stage.llm.args.speculative_config.max_draft_len == 7
    with pytest.raises(UserError, match=r"--draft_length \+ 1 = 8"):
        stage.start("DFLASH", draft_length=7, block_size=7)
    with pytest.raises(UserError, match="eagle3_one_model"):
        stage.start("EAGLE3", engine_args={"speculative_config": {"eagle3_one_model": False}})


OVERLAP = {
    "1.0.0": {"EAGLE3": "on", "MTP": "on", "NGRAM": "off", "DRAFT_TARGET": "off", "NONE": "on"},
    "1.1.0": {"EAGLE3": "on", "MTP": "on", "NGRAM": "off", "DRAFT_TARGET": "off", "NONE": "on"},
    "1.2.0": {"EAGLE3": "on", "MTP": "on", "NGRAM": "off", "DRAFT_TARGET": "on", "NONE": "on"},
    "main": dict.fromkeys((*HAS["main"], "NONE"), "on"),
}


@pytest.mark.parametrize(("stage", "algorithm"), PAIRS, indirect=["stage"])
def test_the_effective_overlap_is_known_and_recorded(stage: Stage, algorithm: Algorithm) -> None:
    expected = OVERLAP[stage.version][algorithm]
    engine = stage.start(algorithm)
    assert engine.describe().settings["overlap_scheduler"] == expected
    assert stage.llm.args.disable_overlap_scheduler is (expected == "off")
    engine = stage.start(algorithm, engine_args={"disable_overlap_scheduler": True})
    assert engine.describe().settings["overlap_scheduler"] == "off"
    if expected == "off":
        with pytest.raises(UserError, match="disable_overlap_scheduler"):
            stage.start(algorithm, engine_args={"disable_overlap_scheduler": False})


class Aliased(BaseModel):
    plain: int = 0
    renamed: int = Field(0, alias="old")
    widened: int = Field(0, validation_alias=AliasChoices("widened", "before"))


class ByName(Aliased):
    model_config = ConfigDict(populate_by_name=True)


@pytest.mark.parametrize("model", [Aliased, ByName])
def test_accepted_names_are_those_a_model_takes(model: type[BaseModel]) -> None:
    names = ("plain", "renamed", "old", "widened", "before", "other")
    forbidding = type("Strict", (model,), {"model_config": ConfigDict(extra="forbid")})
    taken = set()
    for name in names:
        with contextlib.suppress(ValidationError):
            forbidding(**{name: 1})
            taken.add(name)
    assert accepted_names(model) == taken


# ---------------------------------------------------------------- environment


def test_held_back_responses_are_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_EXECUTOR_PERIODICAL_RESP_IN_AWAIT", "1")
    with pytest.raises(UserError, match="TLLM_EXECUTOR_PERIODICAL_RESP_IN_AWAIT"):
        stage.start()


def test_forced_acceptance_makes_a_run_simulated(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS"
    monkeypatch.setenv(name, "2")
    info = stage.start("EAGLE3").describe()
    assert info.simulated
    assert cast("dict[str, str]", info.settings["environment"])[name] == "2"


def test_what_a_launcher_sets_is_no_setting() -> None:
    found = recorded_environment(
        {
            "TLLM_LOG_LEVEL": "INFO",
            "TRTLLM_WORKER_DISABLE_GC": "1",
            "FORCE_DETERMINISTIC": "1",
            "TLLM_SPAWN_PROXY_PROCESS": "1",
            "TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY": "secret",
            "TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR": "tcp://127.0.0.1:10012",
            "HOME": "somewhere",
        }
    )
    assert set(found) == {"TLLM_LOG_LEVEL", "TRTLLM_WORKER_DISABLE_GC", "FORCE_DETERMINISTIC"}


# ---------------------------------------------------------------- sampling

GREEDY_ONLY = {  # decodes greedily whatever the temperature
    "1.0.0": ("EAGLE3", "MTP"),
    "1.1.0": ("EAGLE3", "MTP"),
    "1.2.0": ("MTP",),
    "main": (),
}


@pytest.mark.parametrize(("stage", "algorithm"), PAIRS, indirect=["stage"])
def test_no_sampled_request_is_decoded_greedily(stage: Stage, algorithm: Algorithm) -> None:
    sampled = {"temperature": 0.8}
    stage.play(1, 1)
    if algorithm in GREEDY_ONLY[stage.version]:
        with pytest.raises(UserError, match="greedily"):
            stage.start(algorithm, sampling=Sampling(**sampled))
        assert stage.api.STARTED == []
        return
    engine = stage.start(algorithm, sampling=Sampling(**sampled))
    run(engine, ask("a", 2, **sampled), ask("b", 2, temperature=0.8, top_p=0.9, top_k=5))
    assert stage.llm.decoded_greedily == [False, False]
    params = [asked.params for asked in stage.llm.asked]
    assert [(p.temperature, p.top_p, p.top_k) for p in params] == [(0.8, 1.0, 0), (0.8, 0.9, 5)]
    assert params[0].seed != params[1].seed
    stage.play(1, 1)
    run(engine, ask("c", 2))
    assert stage.llm.decoded_greedily[2:] == [True]
    greedy = stage.llm.asked[2].params
    assert (greedy.temperature, greedy.top_k) == (0, 1)  # both: versions read one or the other
    assert stage.unverified() == set()


@pytest.mark.parametrize(("stage", "algorithm"), PAIRS, indirect=["stage"])
def test_a_sampled_request_to_an_engine_started_for_greedy_is_never_greedy(
    stage: Stage, algorithm: Algorithm
) -> None:
    stage.play(1, 1)
    engine = stage.start(algorithm)
    step = run(engine, ask("a", 2, temperature=1.0))["a"][-1]
    if stage.llm.asked:
        assert step.finish_reason == "length"
        assert stage.llm.decoded_greedily == [False]
    else:
        assert step.finish_reason == "error"
        assert "temperature" in str(step.error)


@every_version
def test_every_stop_id_stops_and_is_kept(stage: Stage) -> None:
    stage.api.SCRIPT = lambda _asked: [[5], [6, 7, 8], [9, 10, 11], [12]]
    engine = stage.start("EAGLE3")
    for stops, kept in (((7,), [5, 6, 7]), ((99, 7), [5, 6, 7]), ((7, 99), [5, 6, 7])):
        found = run(engine, ask(f"r{stops}", 9, stop_token_ids=stops))[f"r{stops}"]
        assert [token for step in found for token in step.token_ids] == kept
        assert (found[-1].finish_reason, found[-1].error) == ("stop", None)
    found = run(engine, ask("all", 8))["all"]  # ignore_eos: no stop id at all
    assert sizes(found) == [1, 3, 3, 1]
    assert found[-1].finish_reason == "length"


@every_version
def test_sampling_parameters_of_the_user(stage: Stage) -> None:
    extra = Sampling(extra={"repetition_penalty": 1.5})
    engine = stage.start(sampling=extra)
    stage.play(1, 1)
    engine.submit(Request("a", [1], 2, extra))
    assert stage.llm.asked[0].params.repetition_penalty == 1.5
    for name, word in (
        ("repetition_penalti", "repetition_penalty"),
        ("n", "one answer"),
        ("use_beam_search", "beam search"),
        ("stop_token_ids", "end-of-sequence"),
        ("max_tokens", "--output_length"),
        ("seed", "--seed"),
        ("truncate_prompt_tokens", "never cut"),
    ):
        with pytest.raises(UserError, match=f"'{name}'.*{word}"):
            stage.start(sampling=Sampling(extra={name: 2}))
    with pytest.raises(UserError, match="logprobs"):
        stage.start("EAGLE3", sampling=Sampling(extra={"logprobs": 1}))


@every_version
def test_a_penalty_that_speculation_would_ignore_is_refused(stage: Stage) -> None:
    asked = Sampling(extra={"repetition_penalty": 1.5})
    stage.start(sampling=asked)
    stage.start("EAGLE3", sampling=Sampling(extra={"repetition_penalty": 1.0}))
    with pytest.raises(UserError, match="asks for repetition_penalty"):
        stage.start("EAGLE3", sampling=asked)
    if stage.version == "main":
        switch = {"speculative_config": {"enable_penalty": True}}
        stage.start("EAGLE3", sampling=asked, engine_args=switch)
    else:  # its drafter is a model of its own there, and the target's sampler the usual one
        stage.start("DRAFT_TARGET", sampling=asked)


@pytest.mark.parametrize("stage", ["1.1.0"], indirect=True)
def test_vanilla_mtp_drafts_inside_the_target(stage: Stage) -> None:
    config = {"speculative_config": {"use_mtp_vanilla": True, "mtp_eagle_one_model": False}}
    with pytest.raises(UserError, match="greedily whatever the temperature"):
        stage.start("MTP", engine_args=config, sampling=Sampling(temperature=0.7))


@pytest.mark.parametrize("stage", ["1.0.0"], indirect=True)
def test_a_draft_length_by_heuristic_is_refused(stage: Stage) -> None:
    with pytest.raises(UserError, match="'is_auto_heuristic': it makes acceptance depend"):
        stage.start("NGRAM", engine_args={"speculative_config": {"is_auto_heuristic": True}})


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("seed", range(5))
def test_requests_in_flight_together_keep_their_own_steps(stage: Stage, seed: int) -> None:
    rng = random.Random(seed)
    plans = {
        f"r{i}": [1] + [rng.randint(1, 4) for _ in range(rng.randint(0, 30))] for i in range(12)
    }
    stage.api.SCRIPT = lambda asked: [[asked.prompt[0]] * n for n in plans[f"r{asked.prompt[0]}"]]
    engine = stage.start("EAGLE3", concurrency=12)
    requests = [
        Request(name, [i], sum(plan), Sampling()) for i, (name, plan) in enumerate(plans.items())
    ]
    found = run(engine, *requests)
    for i, (name, plan) in enumerate(plans.items()):
        assert sizes(found[name]) == plan
        assert {token for step in found[name] for token in step.token_ids} == {i}
        times = [step.time_ns for step in found[name]]
        assert times == sorted(times)


def respond(stage: Stage, *plan: Any) -> None:
    """Responses as (tokens, decoding_iter[, finish reason]), or an exception, or a Response."""

    def fault(_sent: list[Any]) -> list[Any]:
        tokens = iter(range(1000, 2000))
        return [
            stage.api.Response([next(tokens) for _ in range(part[0])], *part[1:])
            if isinstance(part, tuple)
            else part
            for part in plan
        ]

    stage.api.FAULT = fault


@every_version
def test_merged_responses_are_known_as_such(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), (5, 3), (4, 4), (2, 6, "length"))
    found = run(engine, ask("a", 12))["a"]
    assert [(len(s.token_ids), s.engine_steps) for s in found] == [(1, 1), (5, 2), (4, 1), (2, 2)]
    assert [s.finish_reason for s in found] == [None, None, None, "length"]
    respond(stage, (4, 2), (2, 3, "length"))  # the prefill and the first decode step
    found = run(engine, ask("b", 6))["b"]
    assert [(len(s.token_ids), s.engine_steps) for s in found] == [(4, 2), (2, 1)]


@every_version
def test_a_response_without_a_step_and_tokens_is_no_step(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (0, 0), (1, 1), (0, 1), (3, 2, "length"))
    found = run(engine, ask("a", 4))["a"]
    assert [(len(s.token_ids), s.engine_steps) for s in found] == [(1, 1), (3, 1)]


FAULTS: dict[str, tuple[tuple[Any, ...], str]] = {
    # what arrives for a request of at most 9 tokens, and a word of the recorded error
    "duplicate response": (((1, 1), (3, 2), (3, 2), (3, 3, "length")), "no engine step"),
    "zero-token final chunk": (((1, 1), (4, 2), (4, 3), (0, 3, "stop")), "no engine step"),
    "zero-token step": (((1, 1), (0, 2), (4, 3, "length")), "0 tokens of 1 engine steps"),
    "decoding_iter goes back": (((1, 1), (2, 2), (2, 1), (4, 3, "length")), "no engine step|back"),
    "too many tokens": (((1, 1), (5, 2), (3, 3, "length")), "at most 4"),
    "two prefill tokens": (((2, 1), (4, 2), (3, 3, "length")), "at most 1"),
    "too many merged": (((1, 1), (9, 3, "length")), "at most 8"),
    "clipped length": (((1, 1), (4, 2), (3, 3, "length")), "at 8 tokens, asked were 9"),
    "beyond max_tokens": (((1, 1), (4, 2), (4, 3), (1, 4, "stop")), "stop token"),
    "finish cancelled": (((1, 1), (4, 2), (0, 2, "cancelled")), "cancelled"),
    "finish timeout": (((1, 1), (4, 2, "timeout")), "timeout"),
    "stop without a stop token": (((1, 1), (4, 2, "stop")), "not at a stop token"),
    "stream ends early": (((1, 1), (4, 2)), "ended the stream"),
}


@every_version
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_invariant_ends_the_request_as_an_error(stage: Stage, fault: str) -> None:
    plan, word = FAULTS[fault]
    engine = stage.start("EAGLE3")
    respond(stage, *plan)
    last = run(engine, ask("a", 9))["a"][-1]
    assert last.finish_reason == "error"
    assert last.error is not None
    assert any(w in last.error for w in word.split("|")), last.error
    assert "\n" not in last.error
    stage.api.FAULT = None  # the next request is not touched by it
    stage.play(1, 4, 4)
    assert sizes(run(engine, ask("b", 9))["b"]) == [1, 4, 4]


def test_a_request_that_is_given_up_is_aborted_in_the_engine(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), (5, 2), (4, 3, "length"))
    run(engine, ask("a", 9))
    assert stage.llm.streams[-1]._aborted
    respond(stage, (1, 1), (4, 2), (3, 3, "length"))
    run(engine, ask("b", 9))
    assert not stage.llm.streams[-1]._aborted  # it had ended


@every_version
def test_a_shrinking_list_is_an_error(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    shrunk = stage.api.Response([], 3, "stop", drop_tokens=1)
    respond(stage, (1, 1), (4, 2), shrunk)
    last = run(engine, ask("a", 9, stop_token_ids=(1003,)))["a"][-1]
    assert last.finish_reason == "error"
    assert "back from 5 tokens to 4" in str(last.error)


@every_version
def test_an_engine_that_goes_on_after_a_stop_token_is_found_out(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), (4, 2), (4, 3, "length"))
    last = run(engine, ask("a", 9, stop_token_ids=(1002,)))["a"][-1]
    assert last.finish_reason == "error"
    assert "went on after a stop token" in str(last.error)


@pytest.mark.parametrize("stage", ["1.2.0", "main"], indirect=True)
def test_a_cache_that_should_be_off_is_found_out(stage: Stage) -> None:
    respond(stage, (1, 1), stage.api.Response([1, 2, 3], 2, "length", cached_tokens=32))
    last = run(stage.start("EAGLE3"), ask("a", 4))["a"][-1]
    assert last.finish_reason == "error"
    assert "32 prompt tokens from its cache" in str(last.error)
    last = run(stage.start("EAGLE3", prefix_cache=True), ask("b", 4))["b"][-1]
    assert last.finish_reason == "length"


@pytest.mark.parametrize("stage", ["1.2.0", "main"], indirect=True)
def test_a_count_of_the_engine_that_contradicts_its_output_is_found_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stage.start("EAGLE3")
    stage.play(1, 4, 4)
    wrong = property(lambda self: 3.5, lambda self, value: None)
    monkeypatch.setattr(
        stage.api.RequestOutput, "avg_decoded_tokens_per_iter", wrong, raising=False
    )
    last = run(engine, ask("a", 9))["a"][-1]
    assert last.finish_reason == "error"
    assert "3.5 tokens per step over 3 steps" in str(last.error)


@every_version
def test_a_request_that_would_be_clipped_is_never_sent(stage: Stage) -> None:
    engine = stage.start(max_seq_len=10)
    found = run(engine, Request("a", [1] * 7, 4, Sampling()))["a"]
    assert stage.llm.asked == []
    assert (found[0].finish_reason, found[0].token_ids) == ("error", ())
    assert "11 tokens exceed max_seq_len 10" in str(found[0].error)
    stage.play(1, 1, 1)
    assert sizes(run(engine, Request("b", [1] * 7, 3, Sampling()))["b"]) == [1, 1, 1]


@every_version
def test_a_refused_request_fails_alone(stage: Stage) -> None:
    engine = stage.start(
        max_seq_len=100, engine_args={"max_num_tokens": 16, "enable_chunked_prefill": False}
    )
    stage.play(1, 1)
    found = run(engine, Request("long", [1] * 20, 2, Sampling()), ask("good", 2))
    assert "should not exceed 16" in str(found["long"][0].error)
    assert sizes(found["good"]) == [1, 1]


@every_version
def test_a_request_error_fails_alone_and_keeps_what_came(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), (3, 2), stage.api.RequestError("out of blocks\nmore"))
    engine.submit(ask("bad", 9))
    stage.api.FAULT = None
    stage.play(1, 4, 4)
    found = run(engine, ask("good", 9)) if not engine._live else None
    engine.submit(ask("good", 9))
    seen: list[Step] = []
    while sum(step.finish_reason is not None for step in seen) < 2:
        seen += engine.poll()
    bad = [step for step in seen if step.request_id == "bad"]
    assert found is None
    assert sizes(bad) == [1, 3, 0]
    assert bad[-1].error == f"TensorRT-LLM {NAMED[stage.version]} failed the request: out of blocks"
    assert sizes([step for step in seen if step.request_id == "good"]) == [1, 4, 4]


def drain(engine: Any) -> list[Step]:
    """Steps until the engine says that it died."""
    seen: list[Step] = []
    try:
        while True:
            seen += engine.poll()
    except EngineDiedError:
        return seen


@every_version
def test_a_dead_executor_ends_the_run_and_keeps_what_came(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), (3, 2), RuntimeError("Executor worker died"))
    engine.submit(ask("a", 9))
    assert sizes(drain(engine)) == [1, 3]


@every_version
def test_a_worker_that_vanishes_in_silence_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.trtllm.HEALTH_CHECK_S", 0.01)
    engine = stage.start("EAGLE3")
    respond(stage, (1, 1), stage.api.WORKER_DIED)
    engine.submit(ask("a", 9))
    assert sizes(drain(engine)) == [1]


def test_an_answer_of_an_unknown_form_is_not_taken_for_tokens(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stage.start("EAGLE3")
    stage.play(1, 4)
    engine.submit(ask("a", 5))
    monkeypatch.delattr(stage.api.RequestOutput, "finished")
    with pytest.raises(EngineDiedError, match="AttributeError"):
        engine.poll()


def test_an_engine_that_has_shut_down_is_dead(stage: Stage) -> None:
    engine = stage.start()
    stage.llm.shutdown()
    with pytest.raises(EngineDiedError, match="shutting down"):
        engine.submit(ask("a", 2))


# ---------------------------------------------------------------- starts and ends


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried 3 GiB\nlong"), ["out of memory", "--max_seq_len"]),
        (RuntimeError("No CUDA GPUs are available"), ["No CUDA GPUs", "NVIDIA GPU"]),
        (RuntimeError("MPI_Comm_spawn failed"), ["MPI_Comm_spawn", "mpirun -n 1"]),
        (ValueError("bad value"), ["bad value", "mend the argument"]),
        (AssertionError(), ["AssertionError", "log"]),
    ],
)
def test_a_start_that_fails_is_one_sentence(
    stage: Stage, error: Exception, words: list[str]
) -> None:
    stage.api.START_ERROR = error
    with pytest.raises(UserError) as refusal:
        stage.start()
    assert all(word in str(refusal.value) for word in ["1.4.0rc1 did not start", *words])
    assert "\n" not in str(refusal.value)


def test_an_engine_that_changed_what_was_asked_is_ended(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = stage.api.LLM.__init__

    def other_length(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.args.speculative_config.max_draft_len = 1

    monkeypatch.setattr(stage.api.LLM, "__init__", other_length)
    with pytest.raises(UserError, match="--draft_length 3 as 1"):
        stage.start("EAGLE3")
    assert stage.llm.n_shutdowns == 1

    def no_speculation(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.args.speculative_config = None

    monkeypatch.setattr(stage.api.LLM, "__init__", no_speculation)
    with pytest.raises(UserError, match="dropped"):
        stage.start("EAGLE3")
    assert stage.llm.n_shutdowns == 1


def test_a_drafter_from_the_hub_may_become_a_folder(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    init = stage.api.LLM.__init__
    other = tmp_path / "other"

    def downloaded(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.args.speculative_config.speculative_model = other

    monkeypatch.setattr(stage.api.LLM, "__init__", downloaded)
    stage.start("EAGLE3", draft_model_dir="some/hub-id")
    with pytest.raises(UserError, match="other"):  # a folder that is here stays what it is
        stage.start("EAGLE3", draft_model_dir=str(stage.model))


def test_closing_twice_shuts_down_once_even_with_requests_in_flight(stage: Stage) -> None:
    engine = stage.start("EAGLE3")
    stage.play(1, 4, 4)
    engine.submit(ask("a", 9))
    engine.forget()
    engine.close()
    engine.close()
    assert stage.llm.n_shutdowns == 1


def test_a_missing_engine_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be imported.*container"):
        TrtllmEngine(EngineSettings(str(tmp_path)))
    with pytest.raises(UserError, match=r"cannot be imported.*container"):
        AutoDeployEngine(EngineSettings(str(tmp_path)))


@pytest.mark.parametrize("version", ["0.21.0", "unknown"])
def test_another_version_is_refused(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt_llm"], "__version__", version)
    with pytest.raises(UserError, match=version):
        stage.start()


def test_the_adapter_leaves_mpi_alone() -> None:
    code = "import sys, engines.trtllm; print('mpi4py' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["False", "False"]


# ---------------------------------------------------------------- whole runs


def measured(models: Path, folder: Path, **changes: Any) -> tuple[store.Run, inputs.Prepared]:
    """A stored run of the word pair, K = 3, 40 tokens."""
    config = from_dict(
        {
            "engine": "TRTLLM",
            "model_dir": str(models / "word" / "target"),
            "draft_model_dir": str(models / "word" / "draft"),
            "speculative_algorithm": "DRAFT_TARGET",
            "draft_length": 3,
            "dataset": "calibration",
            "concurrency": 8,
            "num_requests": 44,
            "output_length": 40,
            "save_dir": str(folder / "run"),
            **changes,
        }
    )
    prepared = inputs.prepare(config)
    engine = engines.adapter(config.engine)(config.engine_settings())
    try:
        session.measure(config, prepared, engine, Target(folder / "run"))
    finally:
        engine.close()
    return store.load(folder / "run"), prepared


@pytest.mark.parametrize(
    ("version", "engine"),
    [*((version, "TRTLLM") for version in VERSIONS), ("1.2.0", "AUTO_DEPLOY"),
     ("main", "AUTO_DEPLOY")],
)  # fmt: skip
def test_a_whole_run_records_the_closed_form(
    version: str, engine: str, models: Path, tmp_path: Path
) -> None:
    """The stand-in drafts and verifies; every stored step must be the closed form's."""
    with contract(version) as api:
        found, prepared = measured(models, tmp_path, engine=engine)
        assert [llm.n_shutdowns for llm in api.STARTED] == [1]
    assert found.manifest["status"] == "complete"
    assert found.manifest["engine"]["version"] == NAMED[version]
    known = closed_form.read_known_answer(models / "word" / "target")
    case = closed_form.Case("DRAFT_TARGET", 3, 40, prepared.stop_token_ids)
    requests = calibrate.observed_requests(found, prepared)
    for request in requests:
        expected = case.steps(known, request.prompt_ids)
        assert request.n_tokens == [len(step.token_ids) for step in expected]
        assert request.output_ids == [token for step in expected for token in step.token_ids]
    assert len(requests) == found.columns.n_requests >= 44
    reasons = found.turns["finish_reason"].to_pylist()
    assert set(reasons) == {"stop", "length"}
    assert set(found.columns.engine_steps.tolist()) == {1}


def test_run_py_ends_well_and_says_exact(models: Path, tmp_path: Path) -> None:
    """The command itself, in its own process, with the stand-in on the path."""
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--engine", "TRTLLM",
         "--model_dir", str(models / "word" / "target"),
         "--draft_model_dir", str(models / "word" / "draft"),
         "--speculative_algorithm", "DRAFT_TARGET", "--draft_length", "3",
         "--dataset", "calibration", "--num_requests", "22", "--concurrency", "4",
         "--output_length", "30", "--save_dir", str(run_dir)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, VARIABLE: "1.2.0", "PYTHONPATH": str(CONTRACTS)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["engine"]["name"] == "TRTLLM"
    assert manifest["known_answer"]["ok"] is True, manifest["known_answer"]


@pytest.mark.parametrize(
    ("version", "algorithms"), [("1.0.0", "EAGLE3,MTP,NGRAM"), ("main", "EAGLE3,MTP,PARD,NGRAM")]
)
def test_calibrate_finds_every_algorithm_right(
    version: str, algorithms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contract(version):
        code = main(
            ["calibrate", "--engine", "TRTLLM", "--algorithm", algorithms, "--draft_length", "3",
             "--concurrency", "8", "--output_length", "40", "--save_dir", str(tmp_path / "c")]
        )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    for name in algorithms.lower().split(","):
        assert f"{name}-k3-n8-o40-t0" in printed
    assert "FAULT" not in printed


def test_merged_responses_do_not_pass_for_exact(models: Path, tmp_path: Path) -> None:
    """Were the engine to merge responses, the stored run would say so."""

    def merge(sent: list[Any]) -> list[Any]:
        if len(sent) > 3:
            first, second = sent[1:3]
            sent[1:3] = [replace(second, tokens=first.tokens + second.tokens)]
        return sent

    with contract("main") as api:
        api.FAULT = merge
        found, _ = measured(models, tmp_path)
    assert 2 in set(found.columns.engine_steps.tolist())
    assert not found.columns.failed.any()


# ---------------------------------------------------------------- the n-gram pool


def pool_draft(history: list[int], pool: dict[tuple[int, ...], list[int]], longest: int, k: int
               ) -> list[int]:  # fmt: skip
    """The published pool with one match kept: a longer continuation replaces a shorter one."""
    for size in range(1, longest + 1):
        for start in range(len(history) - size):
            key = tuple(history[start : start + size])
            match = history[start + size : start + size + k]
            if len(match) > len(pool.get(key, [])):
                pool[key] = match
    for size in range(min(longest, len(history) - 1), 0, -1):
        if tuple(history[-size:]) in pool:
            return pool[tuple(history[-size:])]
    return []


@pytest.mark.parametrize("seed", range(20))
def test_a_pool_that_keeps_one_match_drafts_as_the_closed_form_does(seed: int) -> None:
    """Why `calibration_args` ask for is_keep_all false: then TensorRT-LLM's incremental pool is
    prompt lookup from the earliest occurrence."""
    rng = random.Random(seed)
    k, longest = rng.randint(1, 5), rng.randint(1, 3)
    target = [rng.randrange(12) for _ in range(12)]
    prompt = [rng.randrange(12) for _ in range(rng.randint(2, 40))]
    expected = closed_form.ngram_steps(prompt, target, k, 1, longest, 60, ())
    history, pool = list(prompt), {}
    pool_draft(history, pool, longest, k)
    sizes_found = []
    while len(history) < len(prompt) + 60:
        draft = pool_draft(history, pool, longest, k) if sizes_found else []
        step = []
        for token in [*draft, None]:
            step.append(target[(history + step)[-1]])
            if token != step[-1]:
                break
        step = step[: len(prompt) + 60 - len(history)]
        history += step
        sizes_found.append(len(step))
    assert sizes_found == [len(step.token_ids) for step in expected]
