"""Columns: the stored records of one run as numpy arrays, ready for the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Told:
    """Steps that a server told in total, of requests (T,) whose events are not single steps.

    request  (T,) index of the request
    lengths  (T, W) its verifications by length, uncut: column n is length n
    n_plain  (T,) its further decode steps, as many as its tokens need at least
    is_whole  no steps can be missing from these; else the end of a request may have cut off as
              many tokens as steps without a draft made
    """

    request: Ints
    lengths: Ints
    n_plain: Ints
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Columns:
    """Requests (R,), steps (S,) sorted by request and step, and what their codes mean (C,).

    A long run has 10 million steps: what is counted of each is int32, as it is stored; sums of
    them are int64 (numpy's), and so is everything else.

    conversation  (R,) index into `conversation_ids`; one conversation appears once
    category      (C,) index into `categories`, of each conversation
    failed        (C,) some turn of the conversation ended in an error or was refused
    session       (R,) which start of the run asked it; clocks compare only within one
    replica       (R,) which of the engines that measured side by side asked it
    finished      (R,) the request ended by a stop token or its length limit
    request       (S,) index of the step's request, non-decreasing
    step          (S,) 0 is the request's first event, the prefill
    accepted      (S,) draft tokens the engine accepted, UNKNOWN (-1) where it does not tell
    drafted       (S,) draft tokens it checked, UNKNOWN (-1) where it does not tell
    engine_steps  (S,) 1 exact; >1 so many steps merged; 0 the engine cannot say
    told          the steps of requests whose events hold several, or may; None: of no request
    """

    categories: tuple[str, ...]
    conversation_ids: tuple[str, ...]
    category: Ints
    failed: Bools
    conversation: Ints
    session: Ints
    replica: Ints
    turn: Ints
    n_prompt_tokens: Ints
    submitted_ns: Ints
    finished: Bools
    request: Ints
    step: Ints
    time_ns: Ints
    engine_steps: Ints
    n_tokens: Ints
    accepted: Ints
    drafted: Ints
    told: Told | None = None

    @property
    def n_requests(self) -> int:
        return len(self.conversation)

    def first_and_last(self) -> tuple[Ints, Ints]:
        """Indices (S) of each request's first and last step, for requests that have any: (R',)."""
        new = np.diff(self.request, prepend=-1) != 0
        ends = np.diff(self.request, append=-1) != 0
        return np.flatnonzero(new), np.flatnonzero(ends)

    def is_last(self) -> Bools:
        """(S,) True on each request's last step."""
        flags = np.zeros(len(self.step), bool)
        flags[self.first_and_last()[1]] = True
        return flags
