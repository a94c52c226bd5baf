"""The TensorRT-LLM adapters (1.0 to 1.4): one streamed response per engine step, checked to be one.

TensorRT-LLM tells no acceptance per step, so the tokens of each step are all there is. Its
`decoding_iter` counts the engine steps of a request: a response that holds none, or several, is
known as such. Everything runs in the caller's thread (see `engines.stream`); a step is stamped
when its response arrives. The ranks are the engine's: nothing here touches MPI.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from engines.stream import Streams
from engines.trtllm_arguments import (
    FORCED_ACCEPTANCE,
    Api,
    check_speculative,
    draft_length,
    engine_arguments,
    installed,
    is_set,
    model_config,
    recorded_environment,
    refuse_environment,
    refuse_sampling,
    why_no_start,
)
from speedbench.types import (
    Algorithm,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    EngineSettings,
    FinishReason,
    Request,
    Sampling,
    Step,
    Support,
    UserError,
)
from speedbench.words import first_line, like

SAMPLING_OURS = {
    "max_tokens": "use --output_length",
    "temperature": "use --temperature",
    "top_p": "use --top_p",
    "top_k": "use --top_k",
    "seed": "use --seed",
    "ignore_eos": "use --ignore_eos",
    "end_id": "every end-of-sequence id of the model stops a request",
    "pad_id": "it belongs to end_id",
    "stop": "text-level stop strings are not used",
    "stop_token_ids": "every end-of-sequence id of the model stops a request",
    "include_stop_str_in_output": "the token that stops a request counts",
    "detokenize": "no text is needed",
    "add_special_tokens": "prompts are token IDs",
    "truncate_prompt_tokens": "prompts are never cut",
    "n": "a request has one answer",
    "best_of": "a request has one answer",
    "use_beam_search": "beam search has no acceptance length",
    "beam_width_array": "beam search has no acceptance length",
    "lookahead_config": "use --speculative_algorithm",
    "return_perf_metrics": "what it tells about drafts is zero in most versions",
}
"""Sampling parameters that are not the user's, and why."""

RECORDED = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "moe_expert_parallel_size",
    "world_size",
    "enable_attention_dp",
    "attn_backend",
    "dtype",
    "max_num_tokens",
    "enable_chunked_prefill",
    "stream_interval",
    "num_postprocess_workers",
    "enable_mixed_sampler",
    "enable_autotuner",
    "compile_backend",
)
"""Arguments read back from the engine where it has them."""

HEALTH_CHECK_S = 2.0
"""How often a silent engine is asked whether it still lives: a killed worker says nothing."""

_TABLES = "API tables of 1.0.0, 1.1.0, 1.2.0, main"
_NO_GPU = "its arguments and its stream are as published, no GPU has seen it"


@dataclass(slots=True)  # mutable: one request in flight
class _Live:
    """n_tokens and n_iterations: what has been seen of the request so far."""

    request: Request
    n_tokens: int = 0
    n_iterations: int = 0


class TrtllmEngine:
    """TensorRT-LLM's LLM on the PyTorch backend, driven from one thread."""

    name = "TRTLLM"
    backend = "pytorch"
    max_concurrency: int | None = None
    samples_as_started = True  # its sampler is chosen when it starts
    remembers: Sequence[Algorithm] = ("NGRAM",)  # its pool may be asked to keep earlier requests
    forgets_prompts = False  # no version offers to empty the blocks that it reuses
    owns_ranks = True  # under mpirun or trtllm-llmapi-launch the other ranks are the engine's
    node_args: Mapping[str, str] = {}
    algorithms: Sequence[Algorithm] = (
        "EAGLE3",
        "MTP",
        "NGRAM",
        "DRAFT_TARGET",
        "PARD",
        "DFLASH",
        "NONE",
    )
    versions = "1.0 to 1.4"
    support: Mapping[Algorithm, Support] = {
        "NONE": Support("contract", _TABLES, _NO_GPU),
        "EAGLE3": Support("contract", _TABLES, "temperature > 0 needs 1.2 or newer"),
        "MTP": Support("contract", _TABLES, "temperature > 0 needs 1.4 or newer"),
        "NGRAM": Support("contract", _TABLES, "each request has its own n-gram pool"),
        "DRAFT_TARGET": Support("contract", _TABLES, _NO_GPU),
        "PARD": Support("contract", "API table of main", "newer than 1.2"),
        "DFLASH": Support("contract", "API table of main", "newer than 1.2"),
        "EAGLE": Support("absent", note="its PyTorch backend has EAGLE3 heads only"),
        "MEDUSA": Support("absent", note="it was for TensorRT engines only, and is removed"),
        "SUFFIX": Support("absent", note="it has no suffix decoding under this name"),
    }
    flag_of: Mapping[str, str] = {
        "model": "model_dir",
        "tensor_parallel_size": "tp_size",
        "pipeline_parallel_size": "pp_size",
        "moe_expert_parallel_size": "ep_size",
        "max_seq_len": "max_seq_len",
        "trust_remote_code": "trust_remote_code",
    }
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {
        # One match per n-gram, the longest of the oldest, from this request alone: then a draft is
        # what followed the earliest occurrence of the longest known suffix.
        "NGRAM": {
            "speculative_config": {
                "max_matching_ngram_size": 3,
                "is_public_pool": False,
                "is_keep_all": False,
                "is_use_oldest": True,
            }
        }
    }

    def __init__(self, settings: EngineSettings) -> None:
        refuse_environment(os.environ)
        self._api: Api = installed(self.backend)
        self._settings = settings
        self._events: list[Step] = []
        self._live: dict[str, _Live] = {}
        self._handles: dict[str, Any] = {}
        self._death: str | None = None
        self._closed = False
        self._llm: Any = None
        self._streams: Streams[Any] = Streams(self._take, self._end)
        try:
            self._refuse_sampling(settings.sampling)
            self._arguments = engine_arguments(settings, self._api)
            refuse_sampling(settings, self._arguments.speculative, self._api)
            self._llm = self._api.llm(**self._arguments.keywords)
            self._speculative = self._read_back()
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            raise UserError(why_no_start(error, self._api)) from error
        self._k = draft_length(self._speculative)

    def _read_back(self) -> Any:
        """The decoding configuration the engine has, which must still say what was asked."""
        asked = self._arguments.speculative
        arguments = getattr(self._llm, "args", None)
        found = getattr(arguments, "speculative_config", None) if arguments is not None else asked
        if (found is None) != (asked is None):
            raise UserError(
                f"{self._api.name} {'dropped' if found is None else 'invented'} the speculative "
                "configuration: this version is not known to speedbench, use another"
            )
        if found is not None:
            check_speculative(found, self._settings, self._api)
        return found

    # ------------------------------------------------------------ the recording

    def _take(self, request_id: str, result: Any) -> bool:
        """One response. Returns whether the request goes on.

        `result` is the same object every time and its list grows in place: copy at once.
        """
        time_ns = time.monotonic_ns()
        live = self._live[request_id]
        output = result.outputs[0]
        n_tokens = len(output.token_ids)
        new = list(output.token_ids[live.n_tokens :])
        n_steps = int(result.decoding_iter) - live.n_iterations
        fault = self._fault(live, n_tokens, n_steps)
        reason: FinishReason | None = None
        if fault is None and result.finished:
            reason, fault = self._finish(live, result)
        if fault is not None:
            reason = "error"
            if not result.finished:
                with contextlib.suppress(Exception):
                    result.abort()
        if reason is None and n_steps == 0:
            return True  # not of a sampling step: nothing new in it
        live.n_tokens, live.n_iterations = n_tokens, live.n_iterations + n_steps
        told = 0 if self._k == 0 else None
        self._events.append(
            Step(
                request_id,
                time_ns,
                new,
                engine_steps=max(n_steps, 0),
                accepted=told,
                drafted=told,
                finish_reason=reason,
                error=fault,
            )
        )
        if reason is not None:
            self._drop(request_id)
        return reason is None

    def _fault(self, live: _Live, n_tokens: int, n_steps: int) -> str | None:
        """Why a response cannot be what the engine did, or None."""
        n_new = n_tokens - live.n_tokens
        is_first = live.n_iterations == 0
        # The first step is the prefill: one token.
        most = n_steps * (self._k + 1) - (self._k if is_first and n_steps else 0)
        if n_new < 0 or n_steps < 0:
            found = f"went back from {live.n_tokens} tokens to {n_tokens}"
            found += f", and by {n_steps} engine steps"
        elif n_steps == 0 and n_new:
            found = f"holds {n_new} new tokens but no engine step"
        elif n_new < n_steps:
            found = f"holds {n_new} tokens of {n_steps} engine steps"
        elif n_new > most:
            found = f"holds {n_new} tokens of {n_steps} engine steps, at most {most} are possible"
        else:
            return None
        return (
            f"a response {found}: steps of this request are lost or doubled, report it with "
            f"{self._api.name}"
        )

    def _finish(self, live: _Live, result: Any) -> tuple[FinishReason | None, str | None]:
        """How a finished request ended: its reason, or why it cannot be used."""
        ids, reason = result.outputs[0].token_ids, result.outputs[0].finish_reason
        request, stops = live.request, live.request.sampling.stop_token_ids
        name = self._api.name
        average = getattr(result, "avg_decoded_tokens_per_iter", None)
        n_cached = getattr(result, "cached_tokens", 0) or 0
        if reason not in ("stop", "length"):
            return None, f"{name} ended the request: {reason or 'no reason given'}"
        if int(result.decoding_iter) == live.n_iterations:
            return None, (
                f"the last response of {name} holds no engine step: what the request's last step "
                "was cannot be told"
            )
        if reason == "stop" and (not ids or ids[-1] not in stops):
            return None, f"{name} says that the request stopped, but not at a stop token"
        if not set(stops).isdisjoint(ids[:-1]):
            return None, f"{name} went on after a stop token"
        if len(ids) > request.max_tokens or (reason == "length" and len(ids) < request.max_tokens):
            return None, (
                f"{name} ended the request for its length at {len(ids)} tokens, asked were "
                f"{request.max_tokens}: lower --output_length or raise --max_seq_len"
            )
        if n_cached and not self._settings.prefix_cache:
            return None, (
                f"{name} took {n_cached} prompt tokens from its cache, which was turned off"
            )
        if average and round(average * result.decoding_iter) != len(ids):
            return None, (
                f"{name} counts {average:g} tokens per step over {result.decoding_iter} steps, "
                f"its output holds {len(ids)}: they contradict each other"
            )
        return cast(FinishReason, reason), None

    def _end(self, request_id: str, error: Exception | None) -> None:
        """A stream ended without a finished response."""
        if error is None:
            self._fail(request_id, f"{self._api.name} ended the stream before the request")
        elif _is_request_error(error):
            self._fail(request_id, f"{self._api.name} failed the request: {first_line(error)}")
        else:
            self._death = (
                f"{self._api.name} ended, or answers in a way this adapter does not know "
                f"({type(error).__name__}: {first_line(error)})"
            )

    def _fail(self, request_id: str, why: str) -> None:
        self._drop(request_id)
        self._events.append(
            Step(request_id, time.monotonic_ns(), (), finish_reason="error", error=why)
        )

    def _drop(self, request_id: str) -> None:
        del self._live[request_id]
        self._handles.pop(request_id, None)

    # ------------------------------------------------------------ the interface

    def submit(self, request: Request) -> None:
        self._live[request.request_id] = _Live(request)
        if (why := self._refusal(request)) is not None:
            self._fail(request.request_id, why)
            return

        def start() -> Any:
            handle = self._llm.generate_async(
                list(request.token_ids), self._sampling_params(request), streaming=True
            )
            self._handles[request.request_id] = handle
            return handle

        try:
            self._streams.open(request.request_id, start)
        except Exception as error:
            if not isinstance(error, ValueError) and not _is_request_error(error):
                raise EngineDiedError(f"{self._api.name} ended: {first_line(error)}") from error
            self._fail(
                request.request_id, f"{self._api.name} refused the request: {first_line(error)}"
            )

    def _refusal(self, request: Request) -> str | None:
        """Why a request would silently become another one, or None."""
        limit = self._max_seq_len()
        n_asked = len(request.token_ids) + request.max_tokens
        if n_asked > limit:
            return (
                f"prompt and output of {n_asked} tokens exceed max_seq_len {limit}, and the engine "
                "would cut the output: lower --output_length or raise --max_seq_len"
            )
        if request.sampling.temperature > 0 and self._arguments.greedy_because:
            return self._arguments.greedy_because
        return None

    def poll(self) -> Sequence[Step]:
        while not self._events and self._death is None:
            self._streams.wait(HEALTH_CHECK_S)
            if not self._events and self._death is None:
                self._death = _silent_death(self._llm)
        if not self._events:
            raise EngineDiedError(self._death or "TensorRT-LLM sends nothing any more")
        events, self._events = self._events, []
        return events

    def counters(self) -> EngineCounters | None:
        # Its statistics are per batch, in a ring that overflows, and cost throughput.
        return None

    def forget(self) -> None:
        """Nothing to drop: n-gram pools are per request and block reuse is off, unless the user
        asked for them, and no version offers to empty them."""

    def _refuse_sampling(self, sampling: Sampling) -> None:
        try:
            self._sampling_params(Request("", (), 1, sampling))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._api.name} refuses the sampling parameters: {first_line(error)}"
            ) from None

    def _sampling_params(self, request: Request) -> Any:
        sampling = request.sampling
        known = self._api.sampling_fields()
        for name in sampling.extra:
            if name in SAMPLING_OURS:
                raise UserError(
                    f"sampling_kwargs sets '{name}', which speedbench sets: {SAMPLING_OURS[name]}"
                )
            if name not in known:
                raise UserError(
                    f"{self._api.name} has no sampling parameter '{name}'{like(name, known)}"
                )
        stops = sampling.stop_token_ids
        values: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            # The engine demands an end id without a tokenizer; ignore_eos makes it mean nothing.
            "end_id": stops[0] if stops else 0,
            "pad_id": stops[0] if stops else 0,
            "ignore_eos": not stops,
            "detokenize": False,
            "add_special_tokens": False,
            **sampling.extra,
        }
        if stops[1:]:
            # Without the latter, the token that stops a request is cut from its last step.
            values |= {"stop_token_ids": list(stops[1:]), "include_stop_str_in_output": True}
        if sampling.temperature == 0:
            values |= {"temperature": 0.0, "top_k": 1}  # up to 1.1 it is top_k that says greedy
        else:
            values |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,  # 0 is no limit here, too
                # One seed for all would give every request the same random numbers.
                "seed": zlib.crc32(f"{self._settings.seed}:{request.request_id}".encode()),
            }
        return self._api.sampling_params(**values)

    def _max_seq_len(self) -> int:
        found = getattr(getattr(self._llm, "args", None), "max_seq_len", None)
        return int(found if found is not None else self._arguments.keywords["max_seq_len"])

    def describe(self) -> EngineInfo:
        arguments = getattr(self._llm, "args", None)
        keywords = self._arguments.keywords

        def effective(name: str) -> Any:
            return getattr(arguments, name, keywords.get(name))

        told = recorded_environment(os.environ)
        settings: dict[str, object] = {
            name: _plain(value) for name in RECORDED if (value := effective(name)) is not None
        }
        settings["overlap_scheduler"] = self._arguments.overlap
        settings["per_step_acceptance"] = "from step sizes"
        settings["environment"] = told
        graphs, cache = effective("cuda_graph_config"), effective("kv_cache_config")
        settings["cuda_graph_batch_sizes"] = _plain(
            getattr(graphs, "batch_sizes", keywords.get("cuda_graph_batch_sizes"))
        )
        for name in ("dtype", "free_gpu_memory_fraction", "tokens_per_block"):
            if (value := getattr(cache, name, None)) is not None:
                settings[f"kv_cache_{name}"] = _plain(value)
        moe = effective("moe_config")
        if (value := getattr(moe, "backend", None)) is not None:
            settings["moe_backend"] = _plain(value)
        if self._speculative is not None:
            settings |= _speculative_settings(self._speculative, self._settings.algorithm)
        vocab_size = model_config(self._settings.model_dir).get("vocab_size")
        return EngineInfo(
            name=self.name,
            version=self._api.version,
            draft_length=self._k,
            max_seq_len=self._max_seq_len(),
            max_num_seqs=effective("max_batch_size"),
            prefix_cache=bool(getattr(cache, "enable_block_reuse", self._settings.prefix_cache)),
            vocab_size=vocab_size if isinstance(vocab_size, int) else None,
            tells_drafted=False,
            simulated=is_set(FORCED_ACCEPTANCE, os.environ),
            settings=settings,
            unused=self._arguments.unused,
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            for handle in self._handles.values():
                with contextlib.suppress(Exception):
                    handle.abort()
            with contextlib.suppress(Exception):
                self._streams.drop()
        finally:
            # Its threads notify our event loop until it has shut down: end the loop after it.
            try:
                if self._llm is not None:
                    with contextlib.suppress(Exception):
                        self._llm.shutdown()
            finally:
                self._streams.close()


class AutoDeployEngine(TrtllmEngine):
    """TensorRT-LLM's LLM on the AutoDeploy backend."""

    name = "AUTO_DEPLOY"
    backend = "_autodeploy"
    algorithms: Sequence[Algorithm] = ("DRAFT_TARGET", "EAGLE3", "MTP", "NONE")
    support: Mapping[Algorithm, Support] = {
        "NONE": Support("contract", "API table of main", _NO_GPU),
        "DRAFT_TARGET": Support("contract", "API tables of 1.2.0, main", "on one device only"),
        "EAGLE3": Support("contract", "API table of main", "newer than 1.2"),
        "MTP": Support("contract", "API table of main", "newer than 1.2"),
        **{
            name: Support("absent", note="AutoDeploy does not speculate with it")
            for name in ("NGRAM", "PARD", "DFLASH", "EAGLE", "MEDUSA", "SUFFIX")
        },
    }
    flag_of: Mapping[str, str] = {
        "model": "model_dir",
        "world_size": "tp_size",
        "max_seq_len": "max_seq_len",
        "trust_remote_code": "trust_remote_code",
    }
    remembers: Sequence[Algorithm] = ()
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {}


# ---------------------------------------------------------------- pure parts


def _is_request_error(error: Exception) -> bool:
    """TensorRT-LLM's RequestError, by name: where it lives differs between versions."""
    return any(kind.__name__ == "RequestError" for kind in type(error).__mro__)


def _silent_death(llm: Any) -> str | None:
    """Why no response can come any more, as far as this version lets one see."""
    executor = getattr(llm, "_executor", None)
    with contextlib.suppress(Exception):
        if any(future.done() for future in getattr(executor, "mpi_futures", ())):
            return "a worker process of TensorRT-LLM ended: see its own log, above"
        if getattr(executor, "doing_shutdown", False):
            return "TensorRT-LLM has shut itself down: see its own log, above"
    return None


def _speculative_settings(config: Any, algorithm: Algorithm) -> dict[str, object]:
    """What the decoding configuration says, for the record; empty fields left out."""
    fields = {name: getattr(config, name, None) for name in type(config).model_fields}
    settings: dict[str, object] = {
        "speculative_class": type(config).__name__,
        "speculative_config": {k: _plain(v) for k, v in fields.items() if v is not None},
    }
    if algorithm == "NGRAM":
        pool = "all requests" if config.is_public_pool else "request"
        size = config.max_matching_ngram_size
        settings |= {"ngram_min": 1, "ngram_max": size, "ngram_pool": pool}
    return settings


def _plain(value: Any) -> object:
    """JSON-able: numbers, texts and lists of them; anything else its text."""
    if isinstance(value, (bool, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(getattr(value, "value", value))
