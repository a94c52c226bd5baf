"""An engine that plays a script: one list of steps per request, one step of each per poll."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from speedbench.types import (
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    Request,
    Step,
)

Script = Callable[[Request], Sequence[Step]]


def plain(request: Request, tokens_per_step: Sequence[int], reason: str = "length") -> list[Step]:
    """Steps of the given sizes; token IDs count up from 0; times are filled in by the engine."""
    steps, token = [], 0
    for i, n in enumerate(tokens_per_step):
        last = i == len(tokens_per_step) - 1
        steps.append(
            Step(
                request.request_id,
                0,
                list(range(token, token + n)),
                finish_reason=reason if last else None,  # type: ignore[arg-type]
            )
        )
        token += n
    return steps


class ScriptedEngine:
    """Plays `script(request)`; every poll returns the next step of every request in flight.

    `in_flight` records how many requests were live at each poll; `submitted` the requests in
    order. With `dies_at` the n-th poll raises EngineDiedError.
    """

    def __init__(self, script: Script, dies_at: int | None = None, draft_length: int = 3) -> None:
        self._script = script
        self._dies_at = dies_at
        self._draft_length = draft_length
        self._live: dict[str, list[Step]] = {}
        self._clock_ns = 1000
        self.extra: list[Step] = []
        self.in_flight: list[int] = []
        self.submitted: list[Request] = []
        self.n_forgotten = 0
        self.closed = False

    def now_ns(self) -> int:
        return self._clock_ns

    def submit(self, request: Request) -> None:
        assert request.request_id not in self._live
        self.submitted.append(request)
        self._live[request.request_id] = list(self._script(request))

    def poll(self) -> Sequence[Step]:
        self.in_flight.append(len(self._live))
        if self._dies_at is not None and len(self.in_flight) >= self._dies_at:
            raise EngineDiedError("the scripted engine died as told")
        self._clock_ns += 1_000_000
        steps, self.extra = self.extra, []
        for name in list(self._live):
            steps.append(self._live[name].pop(0)._replace(time_ns=self._clock_ns))
            if not self._live[name]:
                del self._live[name]
        return steps

    def counters(self) -> EngineCounters | None:
        return None

    def describe(self) -> EngineInfo:
        return EngineInfo("SCRIPTED", "1", self._draft_length, None, None, False)

    def forget(self) -> None:
        self.n_forgotten += 1

    def close(self) -> None:
        self.closed = True
