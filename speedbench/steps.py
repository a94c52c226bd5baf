"""The steps of one turn, kept as columns while its conversation is in flight."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from speedbench.types import UNKNOWN, Step

ROW = struct.Struct("<qiiii")
"""time_ns, n_tokens, engine_steps, accepted, drafted; UNKNOWN where the engine did not tell."""


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
            self.append(step)

    def append(self, step: Step) -> None:
        """Raises ValueError, and holds what it held, if a value is no integer of that size."""
        token_ids, accepted, drafted = step.token_ids, step.accepted, step.drafted
        try:
            row = ROW.pack(
                step.time_ns,
                len(token_ids),
                step.engine_steps,
                UNKNOWN if accepted is None else accepted,
                UNKNOWN if drafted is None else drafted,
            )
            # Twice as fast as `extend`, and takes all or nothing.
            self.token_ids.fromlist(token_ids if type(token_ids) is list else list(token_ids))
        except (TypeError, OverflowError, struct.error) as error:
            raise ValueError(f"a step of {self.request_id}: {error}") from None
        self.rows += row
        self.last = step

    def __len__(self) -> int:
        return len(self.rows) // ROW.size

    def __iter__(self) -> Iterator[Step]:
        start = 0
        for row in islice(ROW.iter_unpack(self.rows), max(len(self) - 1, 0)):
            yield self._step(row, start)
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

    def _step(self, row: tuple[int, int, int, int, int], start: int) -> Step:
        time_ns, n_tokens, engine_steps, accepted, drafted = row
        return Step(
            self.request_id,
            time_ns,
            self.token_ids[start : start + n_tokens].tolist(),
            engine_steps,
            None if accepted == UNKNOWN else accepted,
            None if drafted == UNKNOWN else drafted,
        )
