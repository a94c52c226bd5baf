"""The closed loop: N conversations in flight, turns in order, failures contained."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from speedbench.types import (
    UNKNOWN,
    Conversation,
    ConversationRecord,
    Engine,
    EngineDiedError,
    FinishReason,
    Prompt,
    PromptRefusedError,
    Request,
    Sampling,
    Step,
    TurnRecord,
)

PromptFor = Callable[[Conversation, int, Sequence[Sequence[int]]], Prompt]
"""(row, turn, token IDs of the earlier replies) -> prompt; raises PromptRefusedError."""


EndReason = Literal["finished", "stopped", "engine died", "crashed"]

_NO_PROMPT = Prompt((), "")


@dataclass(slots=True)  # mutable: filled while the conversation is in flight
class _Flight:
    row: Conversation
    request_id: str
    prompt: Prompt
    submitted_ns: int = UNKNOWN
    steps: list[Step] = field(default_factory=list)
    ended: list[TurnRecord] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)

    def end(self, reason: FinishReason, error: str | None) -> TurnRecord:
        return TurnRecord(
            self.request_id,
            len(self.ended),
            len(self.prompt.token_ids),
            self.prompt.sha256,
            self.submitted_ns,
            reason,
            error,
            self.steps,
        )


@dataclass(frozen=True, slots=True)
class LoopEnd:
    """How a loop ended, with what it saw that is in no committed conversation.

    `n_uncommitted_tokens` were received for conversations still in flight at the end;
    `n_stray_steps` came for requests that were not in flight.
    """

    reason: EndReason
    message: str
    started_ns: int
    ended_ns: int
    n_uncommitted: int
    n_uncommitted_tokens: int
    n_stray_steps: int


class Loop:
    """Drives one engine over rows; `commit` receives each conversation when its last turn ends.

    `stop` is asked after every poll and returns why to stop, or None. `n_tokens` and `n_done`
    grow while it runs, for a progress display. `clock` (ns) stamps submissions; it must be the
    clock that the engine's steps are stamped with.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_for: PromptFor,
        sampling: Sampling,
        *,
        output_length: int,
        concurrency: int,
        id_prefix: str,
        commit: Callable[[ConversationRecord], None],
        stop: Callable[[], str | None],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._prompt_for = prompt_for
        self._sampling = sampling
        self._output_length = output_length
        self._concurrency = concurrency
        self._id_prefix = id_prefix
        self._commit = commit
        self._stop = stop
        self._clock = clock
        self._flights: dict[str, _Flight] = {}
        self._ready: list[_Flight] = []
        self._n_admitted = 0
        self._n_stray_steps = 0
        self.n_done = 0
        self.n_tokens = 0

    def run(self, rows: Iterable[Conversation]) -> LoopEnd:
        """Ask every row; returns when all have ended, on `stop`, or when something broke."""
        queue = iter(rows)
        started_ns = self._clock()
        try:
            self._fill(queue)
            while self._flights:
                for step in self._engine.poll():
                    self._take(step)
                while self._ready:
                    self._ask(self._ready.pop(0))
                if (why := self._stop()) is not None:
                    return self._end("stopped", why, started_ns)
                self._fill(queue)
        except EngineDiedError as death:
            return self._end("engine died", str(death), started_ns)
        except Exception as error:  # noqa: BLE001 - whatever it is, what was committed is stored
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (
                f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
            return self._end("crashed", message, started_ns)
        return self._end("finished", "", started_ns)

    def _fill(self, queue: Iterable[Conversation]) -> None:
        """Admit rows until N conversations are in flight or none is left."""
        while len(self._flights) < self._concurrency:
            row = next(iter(queue), None)
            if row is None:
                return
            flight = _Flight(row, f"{self._id_prefix}{self._n_admitted}.0", _NO_PROMPT)
            self._n_admitted += 1
            self._ask(flight)

    def _ask(self, flight: _Flight) -> None:
        """Submit the flight's next turn, or end the conversation if that turn is refused."""
        try:
            flight.prompt = self._prompt_for(flight.row, len(flight.ended), flight.replies)
        except PromptRefusedError as refusal:
            flight.prompt = _NO_PROMPT
            self._end_conversation(flight, flight.end("refused", str(refusal)))
            return
        self._flights[flight.request_id] = flight
        flight.submitted_ns = self._clock()
        self._engine.submit(
            Request(flight.request_id, flight.prompt.token_ids, self._output_length, self._sampling)
        )

    def _take(self, step: Step) -> None:
        flight = self._flights.get(step.request_id)
        if flight is None:
            self._n_stray_steps += 1
            return
        self.n_tokens += len(step.token_ids)
        if step.error is None or step.token_ids:
            flight.steps.append(step)
        if step.finish_reason is not None:
            self._finish_turn(flight, step.finish_reason, step.error)

    def _finish_turn(self, flight: _Flight, reason: FinishReason, error: str | None) -> None:
        del self._flights[flight.request_id]
        record = flight.end(reason, error)
        if reason == "error" or record.turn + 1 == flight.row.n_turns:
            self._end_conversation(flight, record)
            return
        flight.ended.append(record)
        flight.replies.append(record.output_token_ids())
        flight.steps = []
        flight.submitted_ns = UNKNOWN
        flight.request_id = f"{flight.request_id.rpartition('.')[0]}.{len(flight.ended)}"
        self._ready.append(flight)  # asked when all steps of this poll are taken

    def _end_conversation(self, flight: _Flight, last: TurnRecord) -> None:
        self.n_done += 1
        self._commit(ConversationRecord(flight.row.id, flight.row.category, (*flight.ended, last)))

    def _end(self, reason: EndReason, message: str, started_ns: int) -> LoopEnd:
        pending = [*self._flights.values(), *self._ready]
        return LoopEnd(
            reason,
            message,
            started_ns,
            self._clock(),
            len(pending),
            sum(
                len(step.token_ids)
                for flight in pending
                for steps in (flight.steps, *(turn.steps for turn in flight.ended))
                for step in steps
            ),
            self._n_stray_steps,
        )
