"""The SGLang adapter (0.5.12 to 0.5.23): every engine step, seen where messages arrive.

The scheduler sends one message for each engine step; SGLang's own stream merges those that a slow
consumer has not fetched. Steps are therefore taken from the messages, in a subclass of SGLang's
tokenizer manager, which lives in the caller's process; where that hook is missing, from the merged
stream, and marked so. Everything runs in the caller's thread: the event loop turns only inside
`submit`, `poll` and `forget`. Messages carry no time, so a step is stamped when its message is
read: a caller that does not poll stamps late.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import inspect
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from engines.checkpoint import refuse_other_vocabulary
from engines.overheard import Overheard
from speedbench.types import (
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

NAMES: Mapping[Algorithm, str] = {
    "EAGLE3": "EAGLE3",
    "EAGLE": "EAGLE",
    "DRAFT_TARGET": "STANDALONE",
    "NGRAM": "NGRAM",
    "MTP": "NEXTN",
    "DFLASH": "DFLASH",
}

OURS = {
    "skip_tokenizer_init": "prompts are token IDs and no text is needed",
    "stream_interval": "every step is recorded",
    "stream_output": "every step is recorded",
    "incremental_streaming_output": "every step is recorded",
    "tokenizer_worker_num": "steps are recorded in one process",
    "custom_sigquit_handler": "a failing engine must not take the records along",
    "max_running_requests": "use --max_num_seqs, or --concurrency, in both arms",
    "disable_radix_cache": "use --prefix_cache",
    "enable_return_routed_experts": "use --capture_experts",
    "speculative_algorithm": "use --speculative_algorithm",
    "speculative_num_steps": "use --draft_length",
    "speculative_num_draft_tokens": "use --draft_length",
    "speculative_dflash_block_size": "use --block_size",
    "speculative_use_rejection_sampling": "use --draft_sample_method",
    "speculative_eagle_topk": "a tree of drafts has no one draft length",
    "speculative_ngram_max_bfs_breadth": "a tree of drafts has no one draft length",
    "speculative_ngram_external_corpus_path": "a tree of drafts has no one draft length",
    "speculative_adaptive": "it changes the draft length while it is measured",
    "enable_dp_attention": "throughput per GPU is counted over tp x pp x dp of them",
}
"""Engine arguments that the measurement itself sets or cannot bear, and why."""

RENAMED = {
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "speculative_dflash_draft_window_size": "speculative_draft_window_size",
    "mamba_scheduler_strategy": "mamba_radix_cache_strategy",
}
"""Engine arguments by their old name -> the new one; either is taken, whichever is installed."""

SAMPLING_OURS = (
    "n",
    "beam_width",
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "ignore_eos",
    "temperature",
    "top_p",
    "top_k",
    "stream_interval",
)
SAMPLING_INTERNAL = (
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
    "ebnf_full_assistant",
)

CHAIN_ONLY = ("fa3", "fa4", "trtllm_mha", "aiter", "intel_xpu")
"""Attention backends that take drafts of breadth 1 for one chain (read in 0.5.23). SGLang's n-gram
trie may still branch: where a long match ends, a shorter one goes on from the root."""

ARGMAX_VERIFICATION = (
    "on this device SGLang takes the target's most likely token wherever drafts are verified, "
    "whatever the temperature (read in 0.5.23): use temperature 0 or another device"
)

SIMULATED = ("SGLANG_SIMULATE_ACC_LEN", "SIMULATE_ACC_LEN")
"""Environment variables that make SGLang make up how many drafts it accepts."""

FLUSH_S = 30.0
"""How long the engine may take to become idle, so that its caches can be dropped."""


class Seen(NamedTuple):
    """What SGLang has told of a request so far: verifications, and how many accepted k drafts."""

    verify_ct: int
    histogram: tuple[int, ...] = ()


class Told(NamedTuple):
    """What one message says of its tokens, in the words of `Step`."""

    engine_steps: int
    accepted: int | None = None
    drafted: int | None = None


@dataclass(slots=True)  # mutable: one request in flight
class _Live:
    request_id: str
    n_prompt: int
    stop_token_ids: Collection[int]
    seen: Seen | None = None
    n_tokens: int = 0


class SglangEngine:
    """SGLang's Engine, driven from one thread, which must be the main one."""

    algorithms: Sequence[Algorithm] = (*NAMES, "NONE")
    versions = "0.5.12 to 0.5.23"
    support: Mapping[Algorithm, Support] = {
        "NONE": Support("real", "0.5.23, CPU"),
        "DRAFT_TARGET": Support(
            "real",
            "0.5.23, CPU",
            "its draft model never sees the first prompt token, so even a copy of the target is "
            "not always right; the known answers depend on the last token only",
        ),
        "EAGLE": Support("real", "0.5.23, CPU"),
        "EAGLE3": Support("real", "0.5.23, CPU", "a pruned draft vocabulary, too"),
        "MTP": Support("real", "0.5.23, CPU", "with one head, which drafts all K tokens"),
        "NGRAM": Support(
            "real",
            "0.5.23, CPU, concurrency 1",
            "all requests share one trie, which learns from their outputs: acceptance depends on "
            "what ran before; a step with nothing to look up counts as K drafts that were rejected",
        ),
        "DFLASH": Support("contract", "0.5.12 to 0.5.23", "SGLang refuses it on a CPU"),
        "MEDUSA": Support("absent", note="SGLang has no Medusa heads"),
        "SUFFIX": Support("absent", note="SGLang has no suffix decoding"),
        "PARD": Support("absent", note="SGLang has no parallel draft model"),
    }
    owns_ranks = False
    node_args: Mapping[str, str] = {
        "n_nodes": "nnodes",
        "node_rank": "node_rank",
        "address": "dist_init_addr",
    }
    max_concurrency: int | None = None
    samples_as_started = False
    remembers: Sequence[Algorithm] = ()
    forgets_prompts = True
    flag_of: Mapping[str, str] = {
        "model_path": "model_dir",
        "tp_size": "tp_size",
        "pp_size": "pp_size",
        "dp_size": "dp_size",
        "ep_size": "ep_size",
        "context_length": "max_seq_len",
        "random_seed": "seed",
        "trust_remote_code": "trust_remote_code",
        "speculative_draft_model_path": "draft_model_dir",
    }
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {}

    _hook = "_handle_batch_output"
    """SGLang's method that is given every message of the scheduler."""

    def __init__(self, settings: EngineSettings) -> None:
        try:
            import sglang
            from sglang.srt.entrypoints import engine as engine_module
            from sglang.srt.managers.tokenizer_manager import TokenizerManager
            from sglang.srt.server_args import ServerArgs
        except Exception as error:  # noqa: BLE001 - missing kernels show as errors of any kind
            raise UserError(
                f"SGLang cannot be imported ({first_line(error)}): install it (pip install "
                "sglang), or run inside SGLang's container"
            ) from None
        self._settings = settings
        self._events: list[Step] = []
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_submitted = 0
        self._death: str | None = None
        self._closed = False
        self._finished: list[int] = []  # verifications of finished requests, by accepted drafts
        self.version = str(sglang.__version__)

        self._k = 0 if settings.algorithm == "NONE" else settings.draft_length
        arguments, self._unused = engine_arguments(settings, _fields(ServerArgs))
        self._refuse_unknown_sampling(settings.sampling)
        if self._k:
            refuse_simulation(os.environ)
        self._hooked = hasattr(TokenizerManager, self._hook) and hasattr(
            engine_module.Engine, "init_tokenizer_manager_func"
        )
        logging.getLogger(engine_module.__name__).addFilter(_is_no_handler_notice)
        self._handlers = {n: signal.getsignal(n) for n in (signal.SIGQUIT, signal.SIGTERM)}
        self._others = set(multiprocessing.active_children())
        self._asyncio = asyncio.new_event_loop()
        asyncio.set_event_loop(self._asyncio)  # SGLang takes the current one
        self._arrived = asyncio.Event()
        self._llm: Any = None
        self._children: list[Any] = []
        overheard = Overheard()
        try:
            with overheard:
                self._llm = self._engine_class(engine_module, TokenizerManager)(**arguments)
            self._children = self._new_children()
            manager = self._llm.tokenizer_manager
            self._state = self._run(self._or_death(manager.get_internal_state()))
            self._own_signals()
            self._info = self._read_back()
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):
                raise UserError(why_no_start(error, overheard.cause())) from error
            raise

    def _engine_class(self, engine_module: Any, manager: Any) -> Any:
        """SGLang's Engine with a tokenizer manager that shows us every message.

        SGLang kills the whole process if that manager raises; ours records a death instead.
        """
        if not self._hooked:
            return engine_module.Engine
        original = getattr(manager, self._hook)

        def take(this: Any, message: Any) -> Any:
            self._take(message)
            return original(this, message)  # a coroutine in some versions, in others not

        async def handle_loop(this: Any) -> None:
            try:
                await manager.handle_loop(this)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told
                self._die(f"SGLang's message loop ended ({type(error).__name__}: {error})")

        recording = type("Recording", (manager,), {self._hook: take, "handle_loop": handle_loop})

        def start(server_args: Any, port_args: Any) -> Any:
            return engine_module.init_tokenizer_manager(server_args, port_args, recording)

        func = {"init_tokenizer_manager_func": staticmethod(start)}
        return type("Engine", (engine_module.Engine,), func)

    # ------------------------------------------------------------ the event loop

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._asyncio.run_until_complete(coroutine)

    async def _or_death(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; EngineDiedError if the engine ends first."""
        task = asyncio.ensure_future(coroutine)
        while not task.done():
            await asyncio.wait({task}, timeout=1.0)
            if not task.done() and not self._is_alive():
                task.cancel()
                raise EngineDiedError(self._death)
        return task.result()

    def _is_alive(self) -> bool:
        codes = [process.exitcode for process in self._children]
        failed = next((code for code in codes if code), None)
        if failed is not None or (codes and None not in codes):
            code = failed or 0
            self._die(
                f"a process of SGLang ended with exit code {code}: its own log, above, names the "
                "cause"
            )
        return self._death is None

    def _die(self, why: str) -> None:
        if self._death is None:
            self._death = why
        self._arrived.set()

    def _own_signals(self) -> None:
        """Undo SGLang's handlers: SIGTERM is the caller's, and SIGQUIT, by which SGLang's processes
        tell that they failed, must not kill what is recorded."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._handlers:
            self._asyncio.remove_signal_handler(number)
        signal.signal(signal.SIGTERM, self._handlers[signal.SIGTERM])
        self._asyncio.add_signal_handler(signal.SIGQUIT, self._on_sigquit)

    def _on_sigquit(self) -> None:
        if self._is_alive():
            self._die("a process of SGLang failed: its own log, above, names the cause")

    # ------------------------------------------------------------ the recording

    def _take(self, message: Any) -> None:
        """One message of the scheduler: one engine step of each request in it. Never raises."""
        time_ns = time.monotonic_ns()
        try:
            outputs = getattr(message, "output_ids", None)
            if outputs is None:
                return
            for i, rid in enumerate(message.rids):
                live = self._live.get(rid)
                if live is not None:
                    self._take_one(rid, live, message, i, time_ns)
        except Exception as error:  # noqa: BLE001 - would kill this process
            self._die(
                f"a message of SGLang {self.version} is not as expected "
                f"({type(error).__name__}: {error})"
            )
        if self._events:
            self._arrived.set()

    def _take_one(self, rid: str, live: _Live, message: Any, i: int, time_ns: int) -> None:
        tokens = list(message.output_ids[i])
        now = _seen(message, i, self._k)
        told = read_message(live.seen, now, len(tokens), self._k)
        live.seen = now
        live.n_tokens += len(tokens)
        reason, error = _finish(message.finished_reasons[i], live.stop_token_ids)
        experts = None
        if reason is not None:
            self._end(rid, now)
            found = getattr(message, "routed_experts", None)
            if self._settings.capture_experts and found and found[i] is not None:
                experts = routed_experts(
                    found[i], live.n_prompt + live.n_tokens - 1, self._experts_per_token()
                )
        self._events.append(
            Step(live.request_id, time_ns, tokens, *told, reason, error, None, experts)
        )

    def _end(self, rid: str, last: Seen | None) -> None:
        del self._live[rid]
        for accepted, n in enumerate(last.histogram if last is not None else ()):
            self._finished += [0] * (accepted + 1 - len(self._finished))
            self._finished[accepted] += n

    def _take_chunk(self, rid: str, live: _Live, chunk: Any, time_ns: int) -> None:
        """A chunk of SGLang's own stream, which may hold several steps; only where there is no
        hook. With drafts no chunk is taken for one step, not even of one token: those that merge
        are the long ones, and what is left would look like few accepted drafts."""
        about = chunk["meta_info"]
        ids = list(chunk["output_ids"][: about["completion_tokens"]])
        tokens = ids[live.n_tokens :]
        first = live.n_tokens == 0
        live.n_tokens = len(ids)
        is_one = len(tokens) == 1 and (first or not self._k)
        told = Told(1, 0, 0) if is_one else Told(0)
        reason, error = _finish(about.get("finish_reason"), live.stop_token_ids)
        if reason is not None:
            histogram = about.get(
                "spec_correct_drafts_histogram", about.get("spec_accept_histogram", ())
            )
            self._end(rid, Seen(about.get("spec_verify_ct", 0), tuple(histogram)))
        self._events.append(Step(live.request_id, time_ns, tokens, *told, reason, error))
        self._arrived.set()

    async def _consume(self, rid: str, request: Request) -> None:
        """Start a request and empty its stream, so that nothing is held back."""
        live = self._live[rid]
        why = "SGLang ended the request without a word"
        try:
            stream = await self._llm.async_generate(
                input_ids=list(request.token_ids),
                sampling_params=self._sampling_params(request.sampling, request.max_tokens),
                stream=True,
                rid=rid,
                **({"return_routed_experts": True} if self._settings.capture_experts else {}),
            )
            async for chunk in stream:
                if rid not in self._live:
                    continue
                if not self._hooked:
                    self._take_chunk(rid, live, chunk, time.monotonic_ns())
                elif (told := chunk["meta_info"].get("finish_reason")) is not None:
                    why = _finish(told, ())[1] or why  # ended before a scheduler saw it
        except Exception as error:  # noqa: BLE001 - told as the request's failure
            why = f"SGLang refused the request: {first_line(error)}"
        if rid in self._live:
            self._end(rid, live.seen)
            self._events.append(
                Step(live.request_id, time.monotonic_ns(), (), finish_reason="error", error=why)
            )
            self._arrived.set()

    def _experts_per_token(self) -> int:
        config = self._llm.tokenizer_manager.model_config.hf_text_config
        for name in ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_top_k"):
            if (found := getattr(config, name, None)) is not None:
                return int(found)
        raise ValueError("the model's configuration does not say how many experts a token has")

    # ------------------------------------------------------------ the interface

    def submit(self, request: Request) -> None:
        if not self._is_alive():
            return  # told by `poll`, after what arrived before
        # A name of its own for each request: SGLang keeps what its n-gram trie matched by name.
        rid = f"speedbench-{self._n_submitted}"
        self._n_submitted += 1
        self._live[rid] = _Live(
            request.request_id, len(request.token_ids), request.sampling.stop_token_ids
        )
        task = self._asyncio.create_task(self._consume(rid, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._run(asyncio.sleep(0))  # up to where it waits for its first token

    def poll(self) -> Sequence[Step]:
        while not self._events and self._is_alive():
            self._arrived.clear()
            self._run(self._wait())
        if not self._events:
            raise EngineDiedError(self._death)
        events, self._events = self._events, []
        return events

    async def _wait(self) -> None:
        """Until something arrived, for a second at most: then somebody looks after the engine."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), 1.0)

    def counters(self) -> EngineCounters | None:
        """Sums over finished requests; the engine counts them per request."""
        if self._k == 0:
            return None
        by_accepted = self._finished
        return EngineCounters(
            drafts=sum(by_accepted),
            draft_tokens=self._k * sum(by_accepted),
            accepted=sum(k * n for k, n in enumerate(by_accepted)),
            accepted_per_position=tuple(sum(by_accepted[k + 1 :]) for k in range(self._k)),
        )

    def forget(self) -> None:
        """Drop what the engine learned: its prefix cache and n-gram trie."""
        if not self._is_alive():
            raise EngineDiedError(self._death)
        self._run(self._or_death(self._flush()))

    async def _flush(self) -> None:
        manager = self._llm.tokenizer_manager
        deadline_s = time.monotonic() + FLUSH_S
        while not (await manager.flush_cache()).success:  # refused while a request is in flight
            if time.monotonic() > deadline_s:
                raise UserError(
                    f"SGLang did not drop its caches within {FLUSH_S:g} s: it still has requests "
                    "in flight; start it anew"
                )
            await asyncio.sleep(0.05)

    def describe(self) -> EngineInfo:
        return self._info

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._llm is not None:
            with contextlib.suppress(Exception):
                self._llm.shutdown()
        for process in self._new_children():  # after a failed start there is no engine to ask
            with contextlib.suppress(Exception):
                from sglang.srt.utils import kill_process_tree

                kill_process_tree(process.pid)
            process.kill()
            process.join(30)
        for task in asyncio.all_tasks(self._asyncio):
            task.cancel()
        with contextlib.suppress(Exception):
            self._run(asyncio.sleep(0))
        self._asyncio.close()
        asyncio.set_event_loop(None)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handlers[signal.SIGTERM])
            # A process that failed may tell so twice: after a death its signal is ignored for good.
            quiet = self._death is not None
            signal.signal(
                signal.SIGQUIT, ignore_sigquit if quiet else self._handlers[signal.SIGQUIT]
            )

    def _new_children(self) -> list[Any]:
        return [p for p in multiprocessing.active_children() if p not in self._others]

    # ------------------------------------------------------------ sampling

    def _refuse_unknown_sampling(self, sampling: Sampling) -> None:
        from sglang.srt.sampling.sampling_params import SamplingParams

        known = _fields(SamplingParams) - set(SAMPLING_INTERNAL)
        for name in sampling.extra:
            if name in SAMPLING_OURS:
                raise UserError(
                    f"sampling_kwargs sets '{name}', which speedbench sets: use its flag"
                )
            if name not in known:
                raise UserError(
                    f"SGLang {self.version} has no sampling parameter '{name}'{like(name, known)}"
                )
        try:
            SamplingParams(**self._sampling_params(sampling, 1)).verify(1 << 31)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"SGLang refuses the sampling parameters: {first_line(error)}"
            ) from None

    def _sampling_params(self, sampling: Sampling, max_tokens: int) -> dict[str, Any]:
        """With `ignore_eos` SGLang ignores stop ids, too, so it is set only where there are none;
        an end of its own that is no stop id of ours is told as an error (`_finish`)."""
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "max_new_tokens": max_tokens,
            "ignore_eos": not sampling.stop_token_ids,
            **sampling.extra,
        }
        if sampling.stop_token_ids:
            params["stop_token_ids"] = list(sampling.stop_token_ids)
        return params

    # ------------------------------------------------------------ what is running

    def _read_back(self) -> EngineInfo:
        state = self._state[0]
        manager = self._llm.tokenizer_manager
        spec = state.get("speculative_algorithm")
        width = int(state.get("speculative_num_draft_tokens") or 1) if spec else 1
        if width - 1 != self._k:
            raise UserError(
                f"SGLang drafts {width - 1} tokens per step, --draft_length is {self._k}: ask for "
                "what this model can draft"
            )
        self._refuse_what_came_out(state)
        settings: dict[str, object] = {
            "steps": "scheduler messages" if self._hooked else "public chunks",
            "device": str(state.get("device")),
            "dtype": str(manager.model_config.dtype).removeprefix("torch."),
        }
        for name in READ_BACK:
            if state.get(name) is not None:
                settings[name] = state[name]
        if spec == "NGRAM":
            settings["pads_drafts"] = True  # a miss looks like K rejected drafts
            settings.update({n: v for n, v in state.items() if n.startswith("speculative_ngram_")})
        per_rank = state.get("effective_max_running_requests_per_dp")
        if per_rank is None:
            per_rank = state.get("max_running_requests")
        argmax = state.get("device") in ("cpu", "xpu")
        return EngineInfo(
            name="SGLANG",
            version=self.version,
            draft_length=width - 1,
            max_seq_len=self._max_seq_len(state),
            max_num_seqs=None if per_rank is None else int(per_rank) * len(self._state),
            prefix_cache=not state["disable_radix_cache"],
            vocab_size=int(manager.model_config.vocab_size),
            tells_drafted=self._hooked,
            sampling_fault=ARGMAX_VERIFICATION if self._k and argmax else "",
            settings=settings,
            unused=self._unused,
        )

    def _max_seq_len(self, state: Mapping[str, Any]) -> int:
        """Longest prompt + output. SGLang cuts `max_new_tokens` in silence where a request would
        come nearer to its limits than this (`init_req_max_new_tokens` in its scheduler)."""
        manager = self._llm.tokenizer_manager
        limits = [int(manager.context_len) - int(getattr(manager, "num_reserved_tokens", 0))]
        if manager.max_req_input_len is not None:
            limits.append(int(manager.max_req_input_len) + 5 - 1)  # it lies 5 below its limit
        capacity = (state.get("memory_usage") or {}).get("token_capacity")
        if capacity is not None:
            limits.append(int(capacity) - 2 * int(state.get("page_size") or 1) - 1)
        return min(limits)

    def _refuse_what_came_out(self, state: Mapping[str, Any]) -> None:
        """Raise UserError for what SGLang made of its arguments and cannot be measured."""
        if state.get("speculative_algorithm") == "NGRAM":
            backend = state.get("prefill_attention_backend") or state.get("attention_backend")
            if backend in CHAIN_ONLY:
                raise UserError(
                    f"SGLang verifies n-gram drafts as one chain with attention backend {backend} "
                    "though they may branch, which changes the output: set attention_backend to "
                    "flashinfer or triton in engine_args, in both arms"
                )
        sampled = bool(state.get("speculative_use_rejection_sampling"))
        if self._settings.draft_sample_method == "greedy" and sampled:
            raise UserError(
                "SGLang samples its drafts on this device, --draft_sample_method is greedy: leave "
                "it out, or ask for probabilistic"
            )


READ_BACK = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_algorithm",
    "speculative_num_steps",
    "speculative_eagle_topk",
    "speculative_use_rejection_sampling",
    "speculative_attention_mode",
    "speculative_accept_threshold_single",
    "speculative_accept_threshold_acc",
    "disable_overlap_schedule",
    "disable_cuda_graph",
    "chunked_prefill_size",
    "enable_mixed_chunk",
    "quantization",
    "kv_cache_dtype",
    "page_size",
    "mem_fraction_static",
    "schedule_policy",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
)
"""Resolved engine arguments worth comparing between runs."""


# ---------------------------------------------------------------- pure parts


def read_message(before: Seen | None, now: Seen, n_tokens: int, draft_length: int) -> Told:
    """What a message of `n_tokens` new tokens stands for, from the counts before and after it.

    before  what the request's last message told; None: this is the first one

    A verification that accepted k drafts shows k + 1 tokens (fewer where the request ends). Any
    further token is a step of its own, without a draft: the prefill, or a prefill again after
    SGLang put the request back.
    """
    is_first, was = before is None, before or Seen(0)
    n_verified = now.verify_ct - was.verify_ct
    earlier = [*was.histogram, *[0] * (len(now.histogram) - len(was.histogram))]
    risen = [n - n_was for n, n_was in zip(now.histogram, earlier, strict=False)]
    fell = n_verified < 0 or len(earlier) > len(risen) or min(risen, default=0) < 0
    if fell or n_tokens < 1:
        return Told(0)
    if sum(risen) != n_verified:  # a version without histograms
        is_one = not is_first and n_verified == 1 and n_tokens <= draft_length + 1
        return Told(1, None, draft_length) if is_one else Told(0)
    in_verified = sum((k + 1) * n for k, n in enumerate(risen))
    n_steps = n_verified + max(n_tokens - in_verified, 1 if is_first else 0)
    if n_steps > 1:
        return Told(n_steps)
    return Told(1, risen.index(1), draft_length) if n_verified else Told(1, 0, 0)


def _seen(message: Any, i: int, draft_length: int) -> Seen:
    if draft_length == 0:
        return Seen(0)
    verify_ct = int(message.spec_verify_ct[i])
    for name in ("spec_correct_drafts_histogram", "spec_acceptance_histogram"):
        if found := getattr(message, name, None):
            return Seen(verify_ct, tuple(found[i]))
    return Seen(verify_ct)


def _finish(
    told: Mapping[str, Any] | None, stop_token_ids: Collection[int]
) -> tuple[FinishReason | None, str | None]:
    """SGLang's finish reason in our words. An end at a token that is no stop id of the request
    (an end of SGLang's own, or its guard against NaN) is an error."""
    if told is None:
        return None, None
    kind, matched = told.get("type"), told.get("matched")
    if kind == "length":
        return "length", None
    if kind == "stop" and matched in stop_token_ids:
        return "stop", None
    if kind == "stop":
        return "error", (
            f"SGLang ended the request at {matched!r}, which is none of its stop ids: compare the "
            "end-of-sequence ids of the model's config.json and generation_config.json"
        )
    return "error", f"SGLang ended the request: {told.get('message') or kind}"


def routed_experts(found: Any, n_tokens: int, top_k: int) -> RoutedExperts:
    """SGLang's experts of a request, a tensor or its bytes in base64, (n_tokens, layers, top k)."""
    import numpy as np

    if isinstance(found, (str, bytes)):
        flat = np.frombuffer(base64.b64decode(found), np.int32)
    else:
        flat = np.asarray(found, np.int32).reshape(-1)
    if n_tokens < 1 or flat.size % (n_tokens * top_k):
        raise ValueError(
            f"{flat.size} routed experts are no whole number of layers for {n_tokens} tokens with "
            f"{top_k} experts each"
        )
    if flat.size and not 0 <= flat.min() <= flat.max() < 1 << 15:
        raise ValueError(f"expert ids lie in {flat.min()}..{flat.max()}, expected 0..32767")
    n_layers = flat.size // (n_tokens * top_k)
    return RoutedExperts(n_tokens, n_layers, top_k, flat.astype("<i2").tobytes())


def engine_arguments(
    settings: EngineSettings, names: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """ServerArgs for these settings, and our defaults that this version lacks.

    names: the argument names the installed SGLang knows. Raises UserError for any other of the
    user's, and for one that the measurement itself must set.
    """
    user = _installed_names(settings.engine_args, names)
    _refuse_flags_without_effect(settings)
    defaults: dict[str, Any] = {
        "tp_size": settings.tp_size,
        "pp_size": settings.pp_size,
        "dp_size": settings.dp_size,
        "ep_size": settings.ep_size,
        "max_running_requests": settings.concurrency,
        "disable_radix_cache": not settings.prefix_cache,
        "random_seed": settings.seed,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "stream_interval": 1,
        "custom_sigquit_handler": ignore_sigquit,
        "log_level": "error",
    }
    graphs = "cuda_graph_max_bs"
    defaults[graphs if graphs in names else RENAMED[graphs]] = settings.concurrency
    if settings.max_seq_len is not None:
        defaults["context_length"] = settings.max_seq_len
    unused = tuple(sorted(name for name in defaults if name not in names))
    arguments = {
        "model_path": settings.model_dir,
        **{name: value for name, value in defaults.items() if name in names},
        **user,
    }
    if settings.capture_experts:
        if "enable_return_routed_experts" not in names:
            raise UserError("this SGLang cannot tell routed experts: leave out --capture_experts")
        arguments["enable_return_routed_experts"] = True
    if settings.algorithm != "NONE":
        arguments.update(_speculative_arguments(settings, names))
    elif speculative := sorted(name for name in user if name.startswith("speculative_")):
        raise UserError(
            f"engine_args sets '{speculative[0]}' but --speculative_algorithm is NONE: name the "
            "algorithm"
        )
    return arguments, unused


def _installed_names(user: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The user's arguments under the names that are installed."""
    found = {}
    for name, value in user.items():
        if name in OURS:
            raise UserError(
                f"engine_args sets '{name}', which speedbench does not leave open: {OURS[name]}"
            )
        other = {**RENAMED, **{new: old for old, new in RENAMED.items()}}.get(name)
        if name not in names and other in names:
            if other in user:
                raise UserError(
                    f"engine_args sets both '{name}' and '{other}', two names of one argument: "
                    "keep one of them"
                )
            found[str(other)] = value
        elif name not in names or name.startswith("_"):
            raise UserError(f"SGLang has no engine argument '{name}'{like(name, names)}")
        else:
            found[name] = value
    return found


def refuse_simulation(environment: Mapping[str, str]) -> None:
    """Raise UserError where SGLang would not verify drafts but follow a number it is given."""
    for name in SIMULATED:
        value = environment.get(name, "")
        with contextlib.suppress(ValueError):
            if float(value or -1) > 0:
                raise UserError(
                    f"{name}={value} is set, by which SGLang makes up what it accepts: unset it"
                )


def _refuse_flags_without_effect(settings: EngineSettings) -> None:
    if settings.draft_sample_method is not None and settings.algorithm == "NONE":
        raise UserError("--draft_sample_method is for drafts, the algorithm is NONE: leave it out")
    if settings.block_size is not None:
        if settings.algorithm != "DFLASH":
            raise UserError(
                f"--block_size belongs to DFLASH, the algorithm is {settings.algorithm}: leave it "
                "out"
            )
        if settings.block_size != settings.draft_length + 1:
            raise UserError(
                f"--block_size is {settings.block_size}, --draft_length {settings.draft_length}: a "
                "block of SGLang's DFLASH holds the last token and K drafts, so give K + 1"
            )


def _speculative_arguments(settings: EngineSettings, names: Collection[str]) -> dict[str, Any]:
    algorithm, k = settings.algorithm, settings.draft_length
    found: dict[str, Any] = {
        "speculative_algorithm": NAMES[algorithm],
        "speculative_num_draft_tokens": k + 1,
    }
    if algorithm == "NGRAM":
        found["speculative_ngram_max_bfs_breadth"] = 1
        if settings.draft_model_dir is not None:
            raise UserError("NGRAM takes no draft model: leave out --draft_model_dir")
    elif algorithm != "DFLASH":
        found.update(speculative_num_steps=k, speculative_eagle_topk=1)
    if settings.draft_model_dir is not None:
        found["speculative_draft_model_path"] = settings.draft_model_dir
    if settings.block_size is not None:
        found["speculative_dflash_block_size"] = settings.block_size
    if algorithm == "DRAFT_TARGET":
        refuse_other_vocabulary(settings)
    if settings.draft_sample_method is not None:
        found.update(_draft_sampling(settings, names))
    for name in found:
        if name not in names:
            raise UserError(
                f"this SGLang has no argument '{name}', which {algorithm} needs: use a newer one"
            )
    return found


def _draft_sampling(settings: EngineSettings, names: Collection[str]) -> dict[str, Any]:
    """SGLang drafts the most likely token; only its EAGLE family can draw drafts instead."""
    method, name = settings.draft_sample_method, "speculative_use_rejection_sampling"
    can_draw = settings.algorithm in ("EAGLE", "EAGLE3", "MTP") and name in names
    if method == "probabilistic" and can_draw:
        return {name: True}
    if method == "greedy" and (can_draw or settings.algorithm == "DRAFT_TARGET"):
        return {}
    raise UserError(
        f"SGLang has no --draft_sample_method {method} for {settings.algorithm}: leave it out"
    )


def ignore_sigquit(_number: int, _frame: FrameType | None) -> None:
    """SGLang's processes signal their failure to the one that started them, and its own handler
    kills that one. The start notices by itself. (Processes are given this function by name.)"""


def _is_no_handler_notice(record: logging.LogRecord) -> bool:
    """SGLang reports as an error that it was given `ignore_sigquit`."""
    return "custom SIGQUIT handler" not in record.getMessage()


def _fields(kind: Any) -> set[str]:
    """Argument names of a class of SGLang: a struct, a dataclass or a plain class by version."""
    if hasattr(kind, "__struct_fields__"):
        return set(kind.__struct_fields__)
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind).parameters)


def why_no_start(error: Exception, cause: str | None) -> str:
    """One sentence: what SGLang says, and what to do where that is known.

    cause  what a process of SGLang wrote before it ended; the error then only says that it did
    """
    if isinstance(error, UserError):
        return str(error)
    message = first_line(error)
    if re.search("initialization", message, re.IGNORECASE) or isinstance(error, EngineDiedError):
        killed = re.search(r"exit code: -(\d+)", message)
        if killed and cause is None:
            message = f"a process of it was killed by signal {killed[1]}"
        else:
            message = cause or f"{message} (its own log, above, names the cause)"
    remedy = next((what for sign, what in REMEDIES if re.search(sign, message, re.IGNORECASE)), "")
    first = message.split(". ")[0].rstrip(".")
    return f"SGLang did not start: {first}" + (f": {remedy}" if remedy else "")


REMEDIES = (
    (
        r"not enough memory|no gpu memory|memory pool|out of memory|cannot allocate|signal 9$",
        "lower --max_seq_len or --concurrency, set mem_fraction_static in engine_args, or raise "
        "--tp_size",
    ),
    (r"sgl_kernel|sgl-kernel|sglang-kernel", "install the kernels that belong to this SGLang"),
)
"""What a start-up message contains -> what to do."""
