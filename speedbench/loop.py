"""The closed loop: N conversations in flight, turns in order, failures contained."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from speedbench.collector import kept_short
from speedbench.steps import FEW, Batch, Intake, Steps, TornError, is_kept
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
    TimedEngine,
    TurnRecord,
)

PromptFor = Callable[[Conversation, int, Sequence[Sequence[int] | str]], Prompt]
"""(row, turn, the earlier replies: token IDs, or the text of a chat) -> prompt; raises
PromptRefusedError."""


EndReason = Literal["finished", "stopped", "engine died", "stalled", "crashed"]
"""`stalled` is said by whoever watches the loop: inside it, a call that hangs never returns."""

HAND_OUT_ROWS, HAND_OUT_NS = 1 << 15, 50_000_000
"""Steps are given to their requests when so many wait, or some did for so long."""

HAND_OUT_AT_ONCE = 512
"""Requests that get theirs between two polls, which takes about a millisecond."""

LONGEST_WAIT_S = 0.2
"""Between arrivals that are far apart somebody must still be able to stop it."""

_NO_PROMPT = Prompt((), "")


@dataclass(slots=True)  # mutable: filled while the conversation is in flight
class _Flight:
    row: Conversation
    request_id: str
    steps: Steps = field(default_factory=lambda: Steps(""))
    prompt: Prompt = _NO_PROMPT
    submitted_ns: int = UNKNOWN
    ended: list[TurnRecord] = field(default_factory=list)
    replies: list[Sequence[int] | str] = field(default_factory=list)
    just_ended: TurnRecord | None = None

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

    def go_on(self) -> None:
        """To the next turn, once all steps of the last one are there."""
        assert self.just_ended is not None
        self.ended.append(self.just_ended)
        self.replies.append(self.just_ended.reply())
        self.just_ended = None
        self.submitted_ns = UNKNOWN
        self.request_id = f"{self.request_id.rpartition('.')[0]}.{len(self.ended)}"
        self.steps = Steps(self.request_id)

    def n_tokens(self) -> int:
        return sum(map(_n_tokens, self.ended)) + len(self.steps.token_ids)


def _n_tokens(turn: TurnRecord) -> int:
    """Those that the turn was handed."""
    steps = turn.steps
    return len(steps.token_ids) if isinstance(steps, Steps) else len(turn.output_token_ids())


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
    """Drives one engine over rows; `commit` receives each conversation soon after its last turn.

    `stop` is asked after every poll and returns why to stop, or None. `n_tokens` and `n_done` grow
    while it runs, for a progress display; `n_committed` of those that are done follows. `clock`
    (ns) stamps submissions; it must be the clock that the engine's steps are stamped with. `idle`
    is called before the engine is waited for: what must not happen while steps are taken has its
    time then.

    arrivals  ns after the start at which each row is due, rising: an open loop, whose rows are
              submitted as of then, however late they can be sent. None: as soon as there is room
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
        arrivals: Sequence[int] | None = None,
        idle: Callable[[], None] = lambda: None,
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
        self._idle = idle
        self._flights: dict[str, _Flight] = {}
        self._intake = Intake()
        self._hand_out_ns = 0  # at the latest
        self._finished: deque[ConversationRecord] = deque()  # their steps are not complete
        self._n_complete = 0  # of these, once all that is being handed out is
        self._handing_out = threading.Lock()
        self._ready: deque[_Flight] = deque()
        self._arrivals = arrivals
        self._next: tuple[Conversation, int] | None = None  # the row that is not admitted yet
        self._n_admitted = 0
        self._n_stray_steps = 0
        self._started_ns = clock()
        self.n_done = 0
        self.n_committed = 0
        self.n_tokens = 0

    def run(self, rows: Iterable[Conversation]) -> LoopEnd:
        """Ask every row; returns when all have ended, on `stop`, or when something broke."""
        with kept_short():
            return self._run(rows)

    def _run(self, rows: Iterable[Conversation]) -> LoopEnd:
        started_ns = self._started_ns = self._clock()
        if self._arrivals is None:
            queue = ((row, UNKNOWN) for row in rows)
        else:
            queue = ((row, started_ns + due) for row, due in zip(rows, self._arrivals, strict=True))
        why = None
        try:
            self._fill(queue)
            while self._flights or self._next is not None:
                self._hand_out_some()
                self._idle()
                self._take(self._poll())
                while self._ready:
                    self._ask(self._ready[0])
                    self._ready.popleft()
                if (why := self._stop()) is not None:
                    break
                self._fill(queue)
            self._hand_out_all()
        except EngineDiedError as death:
            return self._end("engine died", str(death), started_ns)
        except Exception as error:  # noqa: BLE001 - whatever it is, what was committed is stored
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = (
                f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
            return self._end("crashed", message, started_ns)
        return self._end("finished" if why is None else "stopped", why or "", started_ns)

    @property
    def n_in_flight(self) -> int:
        return len(self._flights)

    def overlong(self) -> str | None:
        """A request with more steps than it may have tokens: it may never end. Asked now and then
        by another thread, where every step would be too often."""
        for flight in list(self._flights.values()):
            if len(flight.steps) > self._output_length:
                return (
                    f"request {flight.request_id} has {len(flight.steps)} steps, "
                    f"{self._output_length} tokens were asked for"
                )
        return None

    def cut(self, reason: EndReason, message: str) -> LoopEnd:
        """How it ends now, for whoever ends it from outside."""
        return self._end(reason, message, self._started_ns)

    def _poll(self) -> Sequence[Step]:
        """What the engine gave, at the latest when the next row is due and there is room for it."""
        if self._next is None or len(self._flights) >= self._concurrency:
            return self._engine.poll()
        wait_ns = self._next[1] - self._clock()
        assert isinstance(self._engine, TimedEngine)  # the configuration asks for nothing else
        return self._engine.poll_for(min(max(wait_ns, 0) / 1e9, LONGEST_WAIT_S))

    def _fill(self, queue: Iterator[tuple[Conversation, int]]) -> None:
        """Admit the rows that are due until N conversations are in flight or none is left."""
        while len(self._flights) < self._concurrency:
            self._next = self._next or next(queue, None)
            if self._next is None:
                return
            row, due_ns = self._next
            if due_ns != UNKNOWN and due_ns > self._clock():
                return
            self._next = None
            request_id = f"{self._id_prefix}{self._n_admitted}.0"
            flight = _Flight(row, request_id)
            self._n_admitted += 1
            self._ask(flight, due_ns)

    def _ask(self, flight: _Flight, due_ns: int = UNKNOWN) -> None:
        """Submit the flight's next turn, or end the conversation if that turn is refused. A turn
        that was due earlier was submitted then: that it had to wait is in its TTFT."""
        try:
            flight.prompt = self._prompt_for(flight.row, len(flight.ended), flight.replies)
        except PromptRefusedError as refusal:
            flight.prompt = _NO_PROMPT
            self._end_conversation(flight, flight.end("refused", str(refusal)))
            return
        self._flights[flight.request_id] = flight
        flight.steps = self._intake.open(flight.request_id)
        flight.submitted_ns = self._clock() if due_ns == UNKNOWN else due_ns
        self._engine.submit(
            Request(
                flight.request_id,
                flight.prompt.token_ids,
                self._output_length,
                self._sampling,
                flight.prompt.messages,
            )
        )

    def _take(self, steps: Sequence[Step]) -> None:
        """What one poll brought. Nothing here runs for every step if it came as a batch."""
        batch = steps if isinstance(steps, Batch) else self._known(steps)
        try:
            self._intake.take(batch)
        except KeyError:
            batch = self._known(batch)
            self._intake.take(batch)
        self.n_tokens += len(batch.token_ids)
        for at, step in batch.ended:
            self._finish_turn(step, at)
        if self._ready:
            self._hand_out_all()  # their answers are wanted
            for flight in self._ready:
                flight.go_on()

    def _known(self, steps: Sequence[Step]) -> Batch:
        """Of these steps, those of requests in flight that can be stored as numbers."""
        flights = self._flights
        if len(steps) >= FEW and flights.keys() >= {step.request_id for step in steps}:
            with contextlib.suppress(ValueError):
                batch = Batch.of_many(steps)
                if not batch.ended or len(set(batch.request_ids)) == len(steps):
                    return batch
        batch, ended = Batch(), set()
        for step in steps:
            if step.request_id not in flights or step.request_id in ended:
                self._n_stray_steps += 1
                continue
            try:
                batch.append(step)
            except ValueError as fault:
                what = f"what the engine gave cannot be stored as numbers ({fault})"
                step = Step(step.request_id, UNKNOWN, (), finish_reason="error", error=what)
                batch.append(step)
            if step.finish_reason is not None:
                ended.add(step.request_id)
        return batch

    def _hand_out(self, most: int = sys.maxsize) -> None:
        """Give so many requests their steps. When each has what came before this was begun, commit
        the conversations that had ended then."""
        with self._handing_out:  # another thread may end the loop
            if not self._intake.is_handing_out:
                self._n_complete = len(self._finished)
            if not self._intake.hand_out(most):
                return
            self._hand_out_ns = time.monotonic_ns() + HAND_OUT_NS
            for _ in range(self._n_complete):
                record = self._finished.popleft()
                self._commit(record)
                self.n_committed += 1
            self._n_complete = 0

    def _hand_out_all(self) -> None:
        if self._intake.is_handing_out:
            self._hand_out()
        self._hand_out()

    def _hand_out_some(self) -> None:
        """In time, and never so many that the next step would be seen late."""
        waits = self._intake.n_waiting >= HAND_OUT_ROWS or time.monotonic_ns() >= self._hand_out_ns
        if waits or self._intake.is_handing_out:
            self._hand_out(HAND_OUT_AT_ONCE)

    def _finish_turn(self, last: Step, at: int) -> None:
        """`at` rows of the batch came before its last one."""
        reason = last.finish_reason
        assert reason is not None
        flight = self._flights.pop(last.request_id)
        self._intake.close(last.request_id, last if is_kept(last) else None, at)
        record = flight.end(reason, last.error)
        if reason == "error" or record.turn + 1 == flight.row.n_turns:
            self._end_conversation(flight, record)
            return
        flight.just_ended = record
        self._ready.append(flight)  # asked when all steps of this poll are taken

    def _end_conversation(self, flight: _Flight, last: TurnRecord) -> None:
        self.n_done += 1
        self._finished.append(
            ConversationRecord(flight.row.id, flight.row.category, (*flight.ended, last))
        )

    def _end(self, reason: EndReason, message: str, started_ns: int) -> LoopEnd:
        with contextlib.suppress(TornError, ValueError):  # what is lost is counted below
            self._hand_out_all()
        pending = {id(flight): flight for flight in (*self._flights.values(), *self._ready)}
        return LoopEnd(
            reason,
            message,
            started_ns,
            self._clock(),
            len(pending) + len(self._finished),
            sum(flight.n_tokens() for flight in pending.values())
            + sum(_n_tokens(turn) for record in self._finished for turn in record.turns),
            self._n_stray_steps,
        )
