"""The null engine: a simulated clock and a stated acceptance law. Nothing it says is measured."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speedbench.types import (
    Algorithm,
    EngineCounters,
    EngineInfo,
    EngineSettings,
    Request,
    Step,
    Support,
    UserError,
)

DEFAULTS: Mapping[str, object] = {
    "acceptance": 0.7,  # conditional acceptance rate at every position
    "step_ms": 10.0,  # period of its steps
    "prefill_ms": 30.0,  # from submission to the first token
    "vocab_size": 1000,
    "tells_accepted": False,  # report the uncut accepted count of every step
    "real_time": False,  # wait for each step instead of jumping to it
}


@dataclass(slots=True)  # mutable: one request in flight
class _Live:
    request: Request
    due_ns: int
    random: random.Random
    n_tokens: int = 0


def _number(options: Mapping[str, object], name: str, low: float, high: float) -> float:
    value = options[name]
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name} is {value!r}: expected a number from {low:g} to {high:g}")
    return float(value)


class NullEngine:
    """Every request steps once per period, each step accepting drafts by independent coins.

    The clock is simulated: it starts at the host's monotonic clock and jumps from step to step,
    without waiting unless `real_time` is set. `now_ns` is that clock; whoever stamps submissions
    must read it.
    """

    algorithms: Sequence[Algorithm] = ("DRAFT_TARGET", "NONE")
    versions = "simulated"
    owns_ranks = False
    node_args: Mapping[str, str] = {}
    max_concurrency: int | None = None
    samples_as_started = False
    remembers: Sequence[Algorithm] = ()
    forgets_prompts = True
    support: Mapping[Algorithm, Support] = {}
    flag_of: Mapping[str, str] = {}
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {}

    def __init__(self, settings: EngineSettings) -> None:
        for name in settings.engine_args:
            if name not in DEFAULTS:
                raise UserError(
                    f"the null engine has no argument '{name}': it takes {', '.join(DEFAULTS)}"
                )
        if settings.block_size is not None:
            raise UserError("the null engine has no --block_size: leave it out")
        if settings.sampling.extra:
            raise UserError("the null engine takes no sampling_kwargs: leave them out")
        options = {**DEFAULTS, **settings.engine_args}
        self._k = 0 if settings.algorithm == "NONE" else settings.draft_length
        self._acceptance = _number(options, "acceptance", 0, 1)
        self._step_ns = int(_number(options, "step_ms", 1e-3, 1e9) * 1e6)
        self._prefill_ns = int(_number(options, "prefill_ms", 1e-3, 1e9) * 1e6)
        self._vocab_size = int(_number(options, "vocab_size", 1, 1e9))
        self._tells_accepted = bool(options["tells_accepted"])
        self._real_time = bool(options["real_time"])
        self._settings = settings
        self._options = options
        self._now_ns = time.monotonic_ns()
        self._live: dict[str, _Live] = {}
        self._counters = EngineCounters(0, 0, 0, (0,) * self._k)

    def now_ns(self) -> int:
        return self._now_ns

    def submit(self, request: Request) -> None:
        prompt = ",".join(map(str, request.token_ids))
        seed = hashlib.sha256(f"{self._settings.seed}:{request.request_id}:{prompt}".encode())
        self._live[request.request_id] = _Live(
            request, self._now_ns + self._prefill_ns, random.Random(seed.digest())
        )

    def poll_for(self, timeout_s: float) -> Sequence[Step]:
        until_ns = self._now_ns + max(round(timeout_s * 1e9), 1)
        if any(live.due_ns <= until_ns for live in self._live.values()):
            return self.poll()
        self._now_ns = until_ns
        if self._real_time:
            time.sleep(max(0, until_ns - time.monotonic_ns()) / 1e9)
        return []

    def poll(self) -> Sequence[Step]:
        self._now_ns = min(live.due_ns for live in self._live.values())
        if self._real_time:
            time.sleep(max(0, self._now_ns - time.monotonic_ns()) / 1e9)
        due = [live for live in self._live.values() if live.due_ns <= self._now_ns]
        return [self._step(live) for live in due]

    def _step(self, live: _Live) -> Step:
        drafted = self._k if live.n_tokens else 0
        accepted = 0
        while accepted < drafted and live.random.random() < self._acceptance:
            accepted += 1
        self._count(drafted, accepted)
        n = min(accepted + 1, live.request.max_tokens - live.n_tokens)
        live.n_tokens += n
        live.due_ns += self._step_ns
        ended = live.n_tokens == live.request.max_tokens
        if ended:
            del self._live[live.request.request_id]
        return Step(
            live.request.request_id,
            self._now_ns,
            [live.random.randrange(self._vocab_size) for _ in range(n)],
            accepted=accepted if self._tells_accepted else None,
            drafted=drafted if self._tells_accepted else None,
            finish_reason="length" if ended else None,
        )

    def _count(self, drafted: int, accepted: int) -> None:
        if drafted:
            was = self._counters
            self._counters = EngineCounters(
                was.drafts + 1,
                was.draft_tokens + drafted,
                was.accepted + accepted,
                tuple(n + (k < accepted) for k, n in enumerate(was.accepted_per_position)),
            )

    def counters(self) -> EngineCounters | None:
        return self._counters if self._k else None

    def describe(self) -> EngineInfo:
        return EngineInfo(
            name="NULL",
            version="simulated",
            draft_length=self._k,
            max_seq_len=self._settings.max_seq_len,
            max_num_seqs=self._settings.concurrency,
            prefix_cache=False,
            tells_drafted=self._tells_accepted,
            simulated=True,
            settings=dict(self._options),
        )

    def forget(self) -> None:
        """It learns nothing."""

    def close(self) -> None:
        self._live.clear()
