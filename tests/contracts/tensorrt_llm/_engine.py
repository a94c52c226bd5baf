"""The scripted engine behind `LLM.generate_async`: it ends requests and streams as published.

A test sets `SCRIPT` (tokens of every engine step of a request, without an end), `FAULT` (changes
the responses before they are sent) and `START_ERROR`. Without a script, a calibration checkpoint
is decoded by its function, and anything else counts up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._models import LLMAPI, NAME, RELEASE, AutoDeployLlmArgs, greedy

TENSORRT_ONLY = ("build_config", "fast_build", "calib_config", "batching_type", "workers")
WORKER_DIED = object()
"""A response that never comes: the worker process is gone."""


class RequestError(RuntimeError):
    """One request failed."""


@dataclass
class Asked:
    """A request as the worker sees it."""

    prompt: list[int]
    params: Any
    arguments: Any
    draft_length: int
    max_tokens: int


@dataclass
class Response:
    """Tokens since the last one, `decoding_iter` so far, and the end if it is the last."""

    tokens: list[int]
    decoding_iter: int
    finish_reason: str | None = None
    cached_tokens: int = 0
    drop_tokens: int = 0  # shrink the list first, as a trimmed stop word does


SCRIPT: Callable[[Asked], Iterable[Sequence[int]]] | None = None
FAULT: Callable[[list[Any]], list[Any]] | None = None
START_ERROR: Exception | None = None
STARTED: list[Any] = []


# ---------------------------------------------------------------- scripts


def play(asked: Asked) -> Iterable[Sequence[int]]:
    if SCRIPT is not None:
        return SCRIPT(asked)
    path = Path(str(asked.arguments.model)) / "known_answer.json"
    if not path.is_file():
        return counting(asked)
    known = json.loads(path.read_text(encoding="utf-8"))
    config = asked.arguments.speculative_config
    draft = Path(str(config.model())) / "known_draft.json" if config is not None else path
    if draft.is_file():
        known |= json.loads(draft.read_text(encoding="utf-8"))
    return bigram(asked, known)


def counting(asked: Asked) -> Iterator[list[int]]:
    """Every draft accepted; tokens count up from 1000."""
    numbers = itertools.count(1000)
    yield [next(numbers)]
    while True:
        yield list(itertools.islice(numbers, asked.draft_length + 1))


def bigram(asked: Asked, known: dict[str, Any]) -> Iterator[list[int]]:
    """A target that computes f and a drafter that computes g, token by token."""
    f, g = known["next"], known["draft_next"]
    history = list(asked.prompt)
    config = asked.arguments.speculative_config
    algorithm = type(config).__name__
    while True:
        drafts: list[int] = []
        if len(history) > len(asked.prompt) and asked.draft_length:
            if algorithm == "NGramDecodingConfig":
                drafts = lookup(history, config.max_matching_ngram_size, asked.draft_length)
            elif algorithm == "PARDDecodingConfig":
                drafts = [g[history[-1]], *[known["after_mask"]] * (asked.draft_length - 1)]
            else:
                last = history[-1]
                for _ in range(asked.draft_length):
                    last = g[last]
                    drafts.append(last)
        step = []
        for draft in drafts:
            if f[history[-1]] != draft:
                break
            history.append(draft)
            step.append(draft)
        history.append(f[history[-1]])
        step.append(history[-1])
        yield step


def lookup(history: list[int], longest: int, draft_length: int) -> list[int]:
    """What followed the first occurrence of the longest suffix that occurred before."""
    for size in range(min(longest, len(history) - 1), 0, -1):
        suffix = history[-size:]
        for start in range(len(history) - size):
            if history[start : start + size] == suffix:
                return history[start + size : start + size + draft_length]
    return []


# ---------------------------------------------------------------- responses


def responses(asked: Asked) -> list[Any]:
    """One response per step until the request ends, then merged as stream_interval says."""
    params = asked.params
    end_id = -1 if params.ignore_eos else params.end_id
    words = [] if params.ignore_eos and RELEASE >= (1, 4) else (params.stop_token_ids or [])
    sent: list[Any] = []
    n, reason = 0, None
    for iteration, step in enumerate(play(asked), start=1):
        kept: list[int] = []
        for token in step:
            kept.append(token)
            if token == end_id or token in words:
                reason = "stop"
            elif n + len(kept) >= asked.max_tokens:
                reason = "length"
            if reason:
                break
        n += len(kept)
        if reason == "stop" and kept[-1] in words and not params.include_stop_str_in_output:
            kept = kept[:-1]
        sent.append(Response(kept, iteration, reason))
        if reason:
            break
    merged = merge(sent, asked.arguments.stream_interval)
    return FAULT(merged) if FAULT is not None else merged


def merge(sent: list[Response], interval: int) -> list[Any]:
    result, held = [], []
    for response in sent:
        held += response.tokens
        last = response.finish_reason is not None
        if response.decoding_iter == 1 or response.decoding_iter % interval == 0 or last:
            result.append(Response(held, response.decoding_iter, response.finish_reason))
            held = []
    return result


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    disaggregated_params: Any = None

    @property
    def length(self) -> int:
        return len(self.token_ids)


class RequestOutput:
    """The one object that every step of the stream yields again."""

    def __init__(self, asked: Asked, llm: Any) -> None:
        self.prompt_token_ids = asked.prompt
        self.outputs = [CompletionOutput(0)]
        self.decoding_iter = 0
        self._done = False
        self._aborted = False
        self._responses = responses(asked)
        self._llm = llm
        try:
            self._loop: Any = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        if NAME not in ("1.0.0", "1.1.0"):  # not seen there
            self.cached_tokens = 0
            self.avg_decoded_tokens_per_iter: float | None = None

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._aborted = True

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        assert self._loop is not None, "The asyncio event loop was not present during init"
        assert asyncio.get_running_loop() is self._loop
        if self._done or not self._responses:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        response = self._responses.pop(0)
        if response is WORKER_DIED:
            self._llm._executor.mpi_futures[0].set_result(None)
            await asyncio.Event().wait()
        if isinstance(response, Exception):
            raise response
        output = self.outputs[0]
        if self._aborted:
            response = Response([], self.decoding_iter, "cancelled")
        if response.drop_tokens:
            output.token_ids = output.token_ids[: -response.drop_tokens]
        output.token_ids.extend(response.tokens)
        self.decoding_iter = response.decoding_iter
        output.finish_reason = response.finish_reason
        self._done = response.finish_reason is not None
        if NAME not in ("1.0.0", "1.1.0"):
            self.cached_tokens = response.cached_tokens
            if self.decoding_iter:
                self.avg_decoded_tokens_per_iter = len(output.token_ids) / self.decoding_iter
        return self


# ---------------------------------------------------------------- LLM


class Executor:
    def __init__(self) -> None:
        self.mpi_futures: list[Future[None]] = [Future()]
        self.doing_shutdown = False


class LLM:
    arguments_class: Any = LLMAPI["TorchLlmArgs"]

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        known = set(self.arguments_class.model_fields)
        for key in kwargs:
            if key not in known and key not in TENSORRT_ONLY:
                raise ValueError(f"{type(self).__name__} got invalid argument: {key}")
        if wrong := [key for key in kwargs if key in TENSORRT_ONLY]:
            raise ValueError(
                "The following arguments are specific to TensorRT backend and are not supported "
                f"by the PyTorch backend: {wrong}"
            )
        self.args: Any = self.arguments_class(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            **kwargs,
        )
        if START_ERROR is not None:
            raise START_ERROR
        self._executor = Executor()
        self.n_shutdowns = 0
        self.asked: list[Asked] = []
        self.decoded_greedily: list[bool] = []
        self.streams: list[RequestOutput] = []
        STARTED.append(self)

    def generate_async(
        self, inputs: list[int], sampling_params: Any = None, streaming: bool = False
    ) -> RequestOutput:
        if self.n_shutdowns:
            raise RuntimeError("LLM is shutting down")
        if sampling_params.end_id is None and self.args.skip_tokenizer_init:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        most = self.args.max_num_tokens or 8192
        if len(inputs) > most and not self.args.enable_chunked_prefill:
            raise ValueError(f"The sum of prompt length ({len(inputs)}) should not exceed {most}")
        limit = self.args.max_seq_len
        if RELEASE >= (1, 4) and limit is not None and len(inputs) >= limit:
            raise RequestError(f"prompt length ({len(inputs)}) >= max_seq_len ({limit})")
        max_tokens = sampling_params.max_tokens
        if RELEASE >= (1, 1) and limit is not None:
            max_tokens = min(max_tokens, limit - len(inputs))
        asked = Asked(inputs, sampling_params, self.args, self.draft_length(), max_tokens)
        self.asked.append(asked)
        self.decoded_greedily.append(self.is_greedy(sampling_params))
        self.streams.append(RequestOutput(asked, self))
        return self.streams[-1]

    def draft_length(self) -> int:
        config = self.args.speculative_config
        if config is None:
            return 0
        if type(config).__name__ == "MTPDecodingConfig" and RELEASE < (1, 2):
            return int(config.num_nextn_predict_layers)
        return int(config.max_draft_len)

    def is_greedy(self, params: Any) -> bool:
        """What the sampler of this version does, whatever the parameters say."""
        config = self.args.speculative_config
        if RELEASE == (1, 0) and not self.args.enable_mixed_sampler:
            return True
        name = type(config).__name__
        inside = name in ("EagleDecodingConfig", "MTPDecodingConfig")
        inside = inside and getattr(config, "eagle3_one_model", True)
        if inside and RELEASE < (1, 2):
            return True
        if inside and RELEASE == (1, 2) and not config.allow_advanced_sampling:
            return True
        if name == "MTPDecodingConfig" and RELEASE == (1, 2):
            return True
        return greedy(params)

    def shutdown(self) -> None:
        self.n_shutdowns += 1


class AutoDeployLLM(LLM):
    arguments_class: Any = AutoDeployLlmArgs


AutoDeployLLM.__name__ = "LLM"
