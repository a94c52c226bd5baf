"""A null engine that can be driven hard: whole steps of all its requests at once, on the real clock
from a process of its own, or as fast as it is polled. Made to measure what a harness costs.

Its tokens mean nothing. What it says of time is true: `Paced` stamps every step with the monotonic
clock in its own process, when it is made, and keeps those stamps beside the steps. Tokens are not
sent; those of steps of one length are one list.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any, Literal

from speedbench.steps import ROW, ROWS, Batch
from speedbench.types import (
    UNKNOWN,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    Request,
    Step,
)

HEAD = struct.Struct("<qii")
"""Of a message: the engine's stamp (ns), requests in it, first steps among them."""

STAMP = struct.Struct("<q")
"""The first field of HEAD, filled in when the message is made."""

N_LENGTHS = 1 << 16
"""Step lengths drawn beforehand, used in turn."""

START_S = 60.0
"""A process that does not answer in so long has not started."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How it steps.

    draft_length  K: every decode step adds 1..K+1 tokens
    step_ns       period of its steps; 0: as fast as it is polled
    prefill_ns    from a request's arrival to its first token, at least
    batches       its steps are handed over in columns, as engines do that step many requests at
                  once; else each is an object
    stamps        what its steps are stamped with: the engine's own clock, as engines that tell it
                  allow, or their arrival in the process that polls, as the others force
    """

    draft_length: int = 3
    step_ns: int = 0
    prefill_ns: int = 0
    stamps: Literal["engine", "arrival"] = "arrival"
    acceptance: float = 0.7
    seed: int = 0
    batches: bool = True


def step_lengths(pace: Pace) -> Any:
    """Tokens of N_LENGTHS decode steps, int32."""
    import numpy as np

    random = np.random.default_rng(pace.seed)
    rejected = random.random((N_LENGTHS, pace.draft_length)) >= pace.acceptance
    all_kept = np.full((N_LENGTHS, 1), True)
    return np.hstack([rejected, all_kept]).argmax(axis=1).astype(np.int32) + 1


class Requests:
    """The requests in flight, as arrays; one call makes the next step of all of them."""

    def __init__(self, pace: Pace) -> None:
        import numpy as np

        self._np = np
        self._lengths = step_lengths(pace)
        self._at = 0
        self._number = np.empty(0, np.int32)
        self._left = np.empty(0, np.int32)
        self._fresh = np.empty(0, bool)
        self._arrived_ns = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._number)

    def add(self, arrivals: Sequence[tuple[int, int, int]]) -> None:
        """(number, tokens to make, when it arrived) of each."""
        np = self._np
        number, left, arrived_ns = zip(*arrivals, strict=True)
        self._number = np.append(self._number, np.array(number, np.int32))
        self._left = np.append(self._left, np.array(left, np.int32))
        self._fresh = np.append(self._fresh, np.full(len(arrivals), True))
        self._arrived_ns = np.append(self._arrived_ns, np.array(arrived_ns, np.int64))

    def step(self) -> bytearray:
        """The message of one step, not stamped yet."""
        np, n = self._np, len(self._number)
        if self._at + n > N_LENGTHS:
            self._at = 0
        lengths = self._lengths[self._at : self._at + n].copy()
        self._at += n
        lengths[self._fresh] = 1
        np.minimum(lengths, self._left, out=lengths)
        self._left -= lengths
        ended = self._left == 0
        message = bytearray().join(
            (
                HEAD.pack(UNKNOWN, n, int(self._fresh.sum())),
                self._arrived_ns[self._fresh].tobytes(),
                self._number.tobytes(),
                lengths.tobytes(),
                ended.astype(np.int32).tobytes(),
            )
        )
        going_on = ~ended
        self._number, self._left = self._number[going_on], self._left[going_on]
        self._arrived_ns = self._arrived_ns[going_on]
        self._fresh = np.full(len(self._number), False)
        return message


class _Null:
    """What both kinds share: names for numbers, and messages made into steps.

    engine_ns   the engine's own stamp of every step it handed over
    seen_ns     when each was seen here
    arrived_ns  request -> when it reached the engine, by the engine's clock
    """

    def __init__(self, pace: Pace) -> None:
        import numpy as np

        self._np = np
        self._pace = pace
        self._names: dict[int, str] = {}
        self._in_order: list[str] = []  # of the requests that the last message was about
        self._tokens = [[7] * n for n in range(pace.draft_length + 2)]  # of a step of n tokens
        self._n_submitted = 0
        self.engine_ns = array("q")
        self.seen_ns = array("q")
        self.arrived_ns: dict[str, int] = {}

    @property
    def n_live(self) -> int:
        """Requests whose end was not handed over yet."""
        return len(self._names)

    def _enter(self, request: Request) -> int:
        number = self._n_submitted
        self._names[number] = request.request_id
        self._n_submitted += 1
        return number

    def _stamp(self, message: bytes, seen_ns: int) -> int:
        """What the steps of a message are stamped with."""
        (engine_ns,) = STAMP.unpack_from(message)
        self.engine_ns.append(engine_ns)
        self.seen_ns.append(seen_ns)
        return engine_ns if self._pace.stamps == "engine" else seen_ns

    def _fields(self, message: bytes) -> tuple[Any, Any, Any]:
        """Numbers of the requests in a message, tokens of each, and whether it ended: (n,)."""
        np = self._np
        _, n, n_fresh = HEAD.unpack_from(message)
        at = HEAD.size + 8 * n_fresh
        numbers, lengths, ended = np.frombuffer(message, np.int32, 3 * n, at).reshape(3, n)
        if n_fresh:  # requests enter at the end
            arrived = np.frombuffer(message, np.int64, n_fresh, HEAD.size).tolist()
            names = [self._names[number] for number in numbers[-n_fresh:].tolist()]
            self._in_order = [*self._in_order, *names]
            self.arrived_ns.update(zip(names, arrived, strict=True))
        return numbers, lengths, ended

    def _steps(self, message: bytes, seen_ns: int, into: list[Step]) -> None:
        stamp_ns = self._stamp(message, seen_ns)
        numbers, lengths, ended = (column.tolist() for column in self._fields(message))
        names = self._names
        # As a tuple from columns: a fifth of what a call of Step takes for each.
        columns = (
            map(names.__getitem__, numbers),
            repeat(stamp_ns),
            map(self._tokens.__getitem__, lengths),
            repeat(1),
            repeat(None),
            repeat(None),
            map((None, "length").__getitem__, ended),
            *[repeat(None)] * (len(Step._fields) - 7),
        )
        into.extend(map(partial(tuple.__new__, Step), zip(*columns, strict=False)))
        self._let_go(numbers, ended)

    def _batch(self, message: bytes, seen_ns: int, into: Batch) -> None:
        stamp_ns = self._stamp(message, seen_ns)
        numbers, lengths, ended = self._fields(message)
        rows = self._np.empty(len(numbers), ROWS)
        rows["time_ns"], rows["n_tokens"], rows["engine_steps"] = stamp_ns, lengths, 1
        rows["accepted"] = rows["drafted"] = UNKNOWN
        for i in self._np.flatnonzero(ended).tolist():
            tokens = self._tokens[lengths[i]]
            last = Step(self._in_order[i], stamp_ns, tokens, finish_reason="length")
            into.ended.append((len(into.request_ids) + i, last))
        into.request_ids += self._in_order
        into.rows += rows.tobytes()
        into.token_ids += array("i", [7]) * int(lengths.sum())
        self._let_go(numbers.tolist(), ended.tolist())

    def _let_go(self, numbers: Sequence[int], ended: Sequence[int]) -> None:
        if not any(ended):
            return
        for number, end in zip(numbers, ended, strict=True):
            if end:
                del self._names[number]
        self._in_order = [name for name, end in zip(self._in_order, ended, strict=True) if not end]

    def counters(self) -> EngineCounters | None:
        return None

    def describe(self) -> EngineInfo:
        return EngineInfo(
            "NULL", "simulated", self._pace.draft_length, None, None, False, simulated=True
        )

    def forget(self) -> None:
        """It learns nothing."""


class Unpaced(_Null):
    """In this process, a step per poll: what it costs can be measured and taken off. Made step by
    step in Python, which for few requests costs a tenth of what arrays do."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self._lengths: list[int] = step_lengths(pace).tolist()
        self._at = 0
        self._fresh: dict[str, int] = {}  # tokens left
        self._live: dict[str, int] = {}
        self._rows = [  # of a step of n tokens, without its stamp
            ROW.pack(0, n, 1, UNKNOWN, UNKNOWN)[STAMP.size :] for n in range(pace.draft_length + 2)
        ]

    @property
    def n_live(self) -> int:
        return len(self._fresh) + len(self._live)

    def submit(self, request: Request) -> None:
        self._fresh[request.request_id] = request.max_tokens

    def poll(self) -> Sequence[Step]:
        if self._at + len(self._live) > N_LENGTHS:
            self._at = 0
        steps = self._batch_of_all() if self._pace.batches else self._steps_of_all()
        self._fresh = {}
        return steps

    def _batch_of_all(self) -> Batch:
        now_ns, live, lengths, rows = time.monotonic_ns(), self._live, self._lengths, self._rows
        batch, at, n_tokens = Batch(), self._at, 0
        parts: list[bytes] = []
        batch.request_ids = [*live, *self._fresh]
        for name, left in live.items():
            length = lengths[at]
            at += 1
            if length < left:
                live[name] = left - length
            else:
                length = left
                last = Step(name, now_ns, self._tokens[left], finish_reason="length")
                batch.ended.append((len(parts), last))
            parts.append(rows[length])
            n_tokens += length
        self._at = at
        for name, left in self._fresh.items():
            if left > 1:
                live[name] = left - 1
            else:
                last = Step(name, now_ns, self._tokens[1], finish_reason="length")
                batch.ended.append((len(parts), last))
            parts.append(rows[1])
            n_tokens += 1
        for _, last in batch.ended:
            live.pop(last.request_id, None)
        stamp = STAMP.pack(now_ns)
        batch.rows += stamp.join([b"", *parts])
        batch.token_ids = array("i", [7]) * n_tokens
        return batch

    def _steps_of_all(self) -> Sequence[Step]:
        now_ns, live, lengths, tokens = time.monotonic_ns(), self._live, self._lengths, self._tokens
        steps, ended, at, new = [], [], self._at, tuple.__new__
        nothing = (None,) * (len(Step._fields) - 7)
        for name, left in live.items():
            length = lengths[at]
            at += 1
            if length < left:
                live[name] = left - length
                step = (name, now_ns, tokens[length], 1, None, None, None, *nothing)
                steps.append(new(Step, step))
            else:
                ended.append(name)
                steps.append(Step(name, now_ns, tokens[left], finish_reason="length"))
        self._at = at
        for name in ended:
            del live[name]
        for name, left in self._fresh.items():
            if left > 1:
                live[name] = left - 1
            steps.append(
                Step(name, now_ns, tokens[1], finish_reason=None if left > 1 else "length")
            )
        return steps

    def close(self) -> None:
        """Nothing to end."""


class Paced(_Null):
    """In a process of its own, a step per period, whether anyone looks or not."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: Any = context.Process(target=_core, args=(theirs, pace), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_S) or self._pipe.recv_bytes() != b"ready":
            raise EngineDiedError("the null engine's process did not start")

    def fileno(self) -> int:
        """To be waited for by an event loop; readable when a poll would not block."""
        return self._pipe.fileno()

    def submit(self, request: Request) -> None:
        with contextlib.suppress(OSError):  # of a process that is gone: `poll` tells
            self._pipe.send((self._enter(request), request.max_tokens))

    def poll(self) -> Sequence[Step]:
        messages: list[tuple[bytes, int]] = []
        try:
            while not messages or self._pipe.poll(0):
                messages.append((self._pipe.recv_bytes(), time.monotonic_ns()))
        except (EOFError, OSError):
            raise EngineDiedError("the null engine's process is gone") from None
        if self._pace.batches:
            batch = Batch()
            for message, seen_ns in messages:
                self._batch(message, seen_ns, batch)
            return batch
        steps: list[Step] = []
        for message, seen_ns in messages:
            self._steps(message, seen_ns, steps)
        return steps

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _core(pipe: Connection, pace: Pace) -> None:
    """The engine's process: one thread takes requests in, one sends, and this one steps."""
    requests = Requests(pace)
    arrivals: deque[tuple[int, int, int]] = deque()
    outgoing: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    left = threading.Event()

    def take_in() -> None:
        try:
            while True:
                number, n_tokens = pipe.recv()
                arrivals.append((number, n_tokens, time.monotonic_ns()))
        except (EOFError, OSError):
            left.set()

    def send() -> None:
        try:
            while True:
                pipe.send_bytes(outgoing.get())
        except OSError:
            left.set()

    pipe.send_bytes(b"ready")
    for work in (take_in, send):
        threading.Thread(target=work, daemon=True).start()
    next_ns = time.monotonic_ns()
    while not left.is_set():
        next_ns = max(next_ns + pace.step_ns, time.monotonic_ns())
        time.sleep(max(0, next_ns - time.monotonic_ns()) / 1e9)
        now_ns = time.monotonic_ns()
        ready = []
        while arrivals and arrivals[0][2] + pace.prefill_ns <= now_ns:
            ready.append(arrivals.popleft())
        if ready:
            requests.add(ready)
        if len(requests):
            message = requests.step()
            # The step is over when it is made: a reader that is late does not make it later.
            STAMP.pack_into(message, 0, time.monotonic_ns())
            outgoing.put(message)
