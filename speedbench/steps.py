"""Steps as columns: those of one turn, those that one poll brought, and how these become those."""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple, overload

import numpy as np

from speedbench.columns import Ints
from speedbench.types import UNKNOWN, Step

ROW = struct.Struct("<qiiii")
"""time_ns, n_tokens, engine_steps, accepted, drafted; UNKNOWN where the engine did not tell."""

ROWS = np.dtype(
    [
        ("time_ns", "<i8"),
        ("n_tokens", "<i4"),
        ("engine_steps", "<i4"),
        ("accepted", "<i4"),
        ("drafted", "<i4"),
    ]
)
"""The same, for numpy."""

FEW = 16
"""Rows that are summed faster one by one."""

NARROW = 1 << 16
"""Numbers below it are sorted by radix."""


def packed(step: Step) -> tuple[bytes, array[int]]:
    """A step's ROW, and its tokens. Raises ValueError if a value is no integer of that size."""
    name, time_ns, token_ids, engine_steps, accepted, drafted, *_ = step
    try:
        tokens = array("i", token_ids if type(token_ids) is list else list(token_ids))
        row = ROW.pack(
            time_ns,
            len(tokens),
            engine_steps,
            UNKNOWN if accepted is None else accepted,
            UNKNOWN if drafted is None else drafted,
        )
    except (TypeError, OverflowError, struct.error) as error:
        raise ValueError(f"a step of {name}: {error}") from None
    return row, tokens


def _unpacked(request_id: str, row: tuple[int, int, int, int, int], token_ids: array[int]) -> Step:
    time_ns, _n_tokens, engine_steps, accepted, drafted = row
    return Step(
        request_id,
        time_ns,
        token_ids.tolist(),
        engine_steps,
        None if accepted == UNKNOWN else accepted,
        None if drafted == UNKNOWN else drafted,
    )


class Steps(Sequence[Step]):
    """Reads as a sequence of Step, and holds 24 bytes for each and 4 for each token.

    A Step object with its list of tokens takes about 300 bytes, and the garbage collector looks at
    both: with 4,096 requests of 16k tokens in flight, that is gigabytes, and pauses of seconds.

    rows       one ROW for each step
    token_ids  (T,) int32, of all steps in a row
    last       the last step as the engine made it: what is told at the end is only there
    """

    __slots__ = ("last", "request_id", "rows", "token_ids")

    def __init__(self, request_id: str, steps: Iterable[Step] = ()) -> None:
        self.request_id = request_id
        self.rows = bytearray()
        self.token_ids = array("i")
        self.last: Step | None = None
        for step in steps:
            row, token_ids = packed(step)
            self.rows += row
            self.token_ids += token_ids
            self.last = step

    def __len__(self) -> int:
        return len(self.rows) // ROW.size

    def __iter__(self) -> Iterator[Step]:
        start, n_as_rows = 0, len(self) - (self.last is not None)
        for row in islice(ROW.iter_unpack(self.rows), n_as_rows):
            yield _unpacked(self.request_id, row, self.token_ids[start : start + row[1]])
            start += row[1]
        if self.last is not None:
            yield self.last

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        if self.last is not None and (index == -1 or index == len(self) - 1):
            return self.last
        return list(self)[index]


class Batch(Sequence[Step]):
    """What one poll brought, oldest first: reads as a sequence of Step, and makes none.

    An engine that steps hundreds of requests at once gives these; it leaves out what came for
    requests that are not in flight, or no longer.

    request_ids  (S,) whose each row is
    rows         (S,) ROW
    token_ids    (T,) int32, of all rows in a row
    ended        of each request that ended: rows before its last step, and that step as the engine
                 made it; an error that brought no token has no row
    """

    __slots__ = ("ended", "request_ids", "rows", "token_ids")

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self.request_ids: list[str] = []
        self.rows = bytearray()
        self.token_ids = array("i")
        self.ended: list[tuple[int, Step]] = []
        for step in steps:
            self.append(step)

    @classmethod
    def of_many(cls, steps: Sequence[Step]) -> Batch:
        """Of steps none of which is an error: a third of what appending each takes. Raises
        ValueError if one is, or has a value that is no integer of its size."""
        names, time_ns, token_ids, engine_steps, accepted, drafted, reasons, errors, *_ = zip(
            *steps, strict=True
        )
        if errors.count(None) < len(steps):
            raise ValueError("one of them is an error")
        batch, rows = cls(), np.empty(len(steps), ROWS)
        try:  # arrays refuse what numpy would round
            rows["time_ns"] = array("q", time_ns)
            rows["n_tokens"] = array("i", map(len, token_ids))
            rows["engine_steps"] = array("i", engine_steps)
            rows["accepted"], rows["drafted"] = _told(accepted), _told(drafted)
            batch.token_ids = array("i", list(chain.from_iterable(token_ids)))
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        batch.request_ids += names
        batch.rows += rows.tobytes()
        if reasons.count(None) < len(steps):
            batch.ended = [(i, step) for i, step in enumerate(steps) if step.finish_reason]
        return batch

    def append(self, step: Step) -> None:
        """Raises ValueError, and holds what it held, if a value is no integer of its size."""
        if step.finish_reason is not None:
            before = len(self.request_ids)
        if step.error is None or step.token_ids:
            row, token_ids = packed(step)
            self.token_ids += token_ids
            self.rows += row
            self.request_ids.append(step.request_id)
        if step.finish_reason is not None:
            self.ended.append((before, step))

    def __len__(self) -> int:
        n = len(self.request_ids)
        return n + sum(not is_kept(step) for _, step in self.ended) if self.ended else n

    def __iter__(self) -> Iterator[Step]:
        start, ended = 0, iter([*self.ended, None])
        end = next(ended)
        for i, row in enumerate(ROW.iter_unpack(self.rows)):
            while end is not None and end[0] == i and not is_kept(end[1]):
                yield end[1]
                end = next(ended)
            token_ids = self.token_ids[start : start + row[1]]
            start += row[1]
            if end is not None and end[0] == i:
                yield end[1]
                end = next(ended)
            else:
                yield _unpacked(self.request_ids[i], row, token_ids)
        while end is not None:
            yield end[1]
            end = next(ended)

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...

    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        return list(self)[index]

    def refuse_contradictions(self) -> None:
        """Raise ValueError if its columns are not about the same steps: a wrong one would be taken
        for another request's."""
        n = len(self.request_ids)
        if len(self.rows) != n * ROW.size:
            raise ValueError(f"the engine gave {n} names and {len(self.rows)} bytes for their rows")
        if n < FEW:
            n_tokens = 0
            for row in ROW.iter_unpack(self.rows):
                n_tokens += row[1]
        else:
            n_tokens = int(np.frombuffer(self.rows, ROWS)["n_tokens"].sum())
        if n_tokens != len(self.token_ids):
            raise ValueError(
                f"the engine gave {len(self.token_ids)} tokens for steps of {n_tokens}"
            )
        if not self.ended:
            return
        if len({step.request_id for _, step in self.ended}) < len(self.ended):
            raise ValueError("the engine ended a request twice in one step")
        for i, step in self.ended:
            if is_kept(step) and (
                i >= n
                or self.request_ids[i] != step.request_id
                or ROW.unpack_from(self.rows, i * ROW.size)[1] != len(step.token_ids)
            ):
                raise ValueError(f"the engine gave a last step of {step.request_id} without a row")


def _told(counts: tuple[int | None, ...]) -> array[int] | int:
    """What an engine told of each step, or of none."""
    if counts.count(None) == len(counts):
        return UNKNOWN
    return array("i", [UNKNOWN if n is None else n for n in counts])


def is_kept(step: Step) -> bool:
    """Whether it gets a row: a failure that brought no token is none of the engine's steps."""
    return step.error is None or bool(step.token_ids)


class TornError(Exception):
    """Steps are lost: handing them out was interrupted, or another thread is at it."""


class _Waiting:
    """Rows in order of arrival; `of` tells by number which request each is of."""

    __slots__ = ("of", "rows", "token_ids")

    def __init__(self) -> None:
        self.of = array("i")
        self.rows = bytearray()
        self.token_ids = array("i")


class _Closed(NamedTuple):
    number: int
    last: Step | None
    at: int


class Intake:
    """Batches in order of arrival, until each request in flight is given its own rows.

    Handing 16,000 of them out at once takes a tenth of what handing out each as it comes does, and
    can be done a little at a time. Whatever interrupts it, nobody is told that a request has all
    its rows while it has not, or has one twice.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._steps: dict[int, Steps] = {}
        self._n_opened = 0
        self._closed: list[_Closed] = []
        self._waiting = _Waiting()
        self._n_before = 0  # rows that waited before the last batch
        self._handing_out: Iterator[None] | None = None
        self._free = threading.Lock()  # never released by who was interrupted

    @property
    def n_waiting(self) -> int:
        """Rows that nobody has begun to hand out."""
        return len(self._waiting.of)

    @property
    def is_handing_out(self) -> bool:
        """Whether some requests lack rows that others of the same time were given."""
        return self._handing_out is not None

    def open(self, request_id: str) -> Steps:
        """From now on rows of this request may come; they will be in what this returns."""
        number = self._numbers[request_id] = self._n_opened
        self._n_opened += 1
        self._steps[number] = steps = Steps(request_id)
        return steps

    def close(self, request_id: str, last: Step | None, at: int) -> None:
        """No more rows come; `last` is the last one as the engine made it, and the one before which
        `at` rows of the batch that was just taken came; None if it has none."""
        number = self._numbers.pop(request_id)
        self._closed.append(_Closed(number, last, self._n_before + at))

    def take(self, batch: Batch) -> None:
        """Raises KeyError, and takes nothing, if some of it is of a request that is not open;
        ValueError if it contradicts itself."""
        for _, step in batch.ended:
            self._numbers[step.request_id]
        # By way of a list: a quarter less than from the map itself.
        of = array("i", list(map(self._numbers.__getitem__, batch.request_ids)))
        batch.refuse_contradictions()
        waiting = self._waiting  # `of` comes last: what it does not cover was not taken
        self._n_before = len(waiting.of)
        waiting.token_ids += batch.token_ids
        waiting.rows += batch.rows
        waiting.of += of

    def hand_out(self, most: int = sys.maxsize) -> bool:
        """Give so many requests their rows, of all that waited when this was first called for them.
        True if no other is left. Raises ValueError if rows came for a request after its end, and
        TornError ever after that, or after another interruption."""
        if not self._free.acquire(blocking=False):
            raise TornError
        self._handing_out = self._handing_out or self._handed_out()
        n = sum(1 for _ in islice(self._handing_out, most))
        if n < most:
            self._handing_out = None
        self._free.release()
        return n < most

    def _handed_out(self) -> Iterator[None]:
        """One request a time."""
        waiting, self._waiting = self._waiting, _Waiting()
        closed, self._closed = self._closed, []
        if waiting.of:
            yield from self._in_order(
                np.frombuffer(waiting.of, np.int32),
                np.frombuffer(waiting.rows, np.int64),
                np.frombuffer(waiting.token_ids.tobytes(), np.int32),
                {number: at for number, last, at in closed if last is not None},
            )
        for number, last, _ in closed:
            self._steps.pop(number).last = last

    def _in_order(
        self, of: Ints, rows: Ints, token_ids: Ints, last_at: Mapping[int, int]
    ) -> Iterator[None]:
        """of: (S,) numbers of requests; rows: as words of 8 bytes, of S rows at least; token_ids:
        (T,) at least; last_at: which row was the last one of requests that ended."""
        rows = rows[: len(of) * ROW.size // 8]
        n_tokens = rows.view(ROWS)["n_tokens"]
        first_token = np.cumsum(n_tokens) - n_tokens
        token_ids = token_ids[: n_tokens.sum()]
        low, high = of.min(), of.max()
        order = np.argsort(of - low if high - low >= NARROW else (of - low).astype(np.uint16),
                           kind="stable")  # fmt: skip
        of, n_tokens = of[order], n_tokens[order]
        last_row = np.append(np.flatnonzero(np.diff(of)), len(of) - 1)
        end_token = np.cumsum(n_tokens)
        at = np.arange(len(token_ids)) + np.repeat(
            first_token[order] - (end_token - n_tokens), n_tokens
        )
        sorted_rows = rows.reshape(-1, 3).take(order, axis=0).data.cast("B")
        sorted_tokens = token_ids.take(at).data.cast("B")
        row_from = token_from = 0
        numbers = of[last_row].tolist()
        found = dict(zip(numbers, order[last_row].tolist(), strict=True))
        for number, at in last_at.items():
            if found.get(number) != at:
                raise ValueError(
                    f"the engine went on with {self._steps[number].request_id} after its end"
                )
        for number, row_to, token_to in zip(
            numbers,
            ((last_row + 1) * ROW.size).tolist(),
            (end_token[last_row] * token_ids.itemsize).tolist(),
            strict=True,
        ):
            steps = self._steps[number]
            steps.rows += sorted_rows[row_from:row_to]
            steps.token_ids.frombytes(sorted_tokens[token_from:token_to])
            row_from, token_from = row_to, token_to
            yield
