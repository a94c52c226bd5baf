"""Open loop: conversations that came whatever the engine did, and whether it kept up with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Bools, Columns, Floats

BEHIND = 0.1
"""Share of the conversations that came in the second half of the arrivals and that did not end in
it: more is taken for a queue that grows, if chance alone would not leave so many (three standard
errors of a Poisson count). So many that failed were not kept up with, either."""

LONGER = 2.0
"""How much longer than the first third the last third of the conversations lasts where a queue
grows, if all of them last long."""

MIN_ARRIVALS = 20
"""Conversations in the second half of the arrivals, at least, to tell whether a queue grows."""

RESUMED = "the run was resumed, and arrivals began anew: it is told of an uninterrupted run"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How an open loop went; of a run that was resumed or merged, whose replicas have no clock in
    common, or of one arrival, it cannot be told.

    rate_per_s         conversations asked for
    offered_per_s      conversations that came, over the time in which they did
    completed_per_s    those that ended well in the second half of the arrivals, over that half
    n_most_in_flight   conversations that had come and not ended, at most; one that failed ended
                       with its last step, or as it came
    is_behind          whether a queue grew, or too many failed; None: it cannot be told
    why_not            why something cannot
    """

    process: str
    rate_per_s: float
    n: int
    offered_per_s: float | None
    completed_per_s: float | None
    n_most_in_flight: int
    is_behind: bool | None
    why_not: str


def arrivals_of(columns: Columns, config: Mapping[str, object], why_not: str = "") -> Arrivals:
    """`why_not`: why the records do not tell, on one clock, of all that came; '' if they do."""
    came_s, ended_s, left_s = _lives(columns)
    process, rate = str(config.get("arrivals")), float(str(config["request_rate"]))
    if not len(came_s):
        why_not = "no conversation came"
    elif len(np.unique(columns.session)) != 1:
        why_not = RESUMED
    if why_not:
        return Arrivals(process, rate, len(came_s), None, None, 0, None, why_not)
    window_s = float(came_s.max() - came_s.min())
    if window_s <= 0:
        why = "one conversation came: no rate can be told"
        return Arrivals(process, rate, len(came_s), None, None, 1, None, why)
    middle_s = float(came_s.min()) + window_s / 2
    end_s = float(came_s.max())
    n_ended = int(((ended_s >= middle_s) & (ended_s <= end_s)).sum())
    is_behind, why_not = _behind(came_s, ended_s)
    return Arrivals(
        process,
        rate,
        len(came_s),
        (len(came_s) - 1) / window_s,
        n_ended / (window_s / 2),
        _most_at_once(came_s, left_s),
        is_behind,
        why_not,
    )


def _behind(came_s: Floats, ended_s: Floats) -> tuple[bool | None, str]:
    """Whether more came in the second half of the arrivals than ended well in it; where
    conversations last too long for that, whether they last longer and longer."""
    start_s, end_s = float(came_s.min()), float(came_s.max())
    late = came_s >= (start_s + end_s) / 2
    n_came = int(late.sum())
    if n_came < MIN_ARRIVALS:
        return None, (
            f"{n_came} conversations came in the second half of the arrivals, {MIN_ARRIVALS} at "
            "least tell whether a queue grows: measure more"
        )
    well = np.isfinite(ended_s)
    if int((late & ~well).sum()) > BEHIND * n_came:
        return True, ""
    came_s, ended_s = came_s[well], ended_s[well]
    lasted_s = ended_s - came_s
    if float(np.median(lasted_s)) > (end_s - start_s) / 4:
        order = np.argsort(came_s, kind="stable")
        early, late_ones = (lasted_s[order[part]] for part in _thirds(len(order)))
        if np.median(late_ones) > LONGER * np.median(early):
            return True, ""
        return None, (
            "a conversation lasts more than a quarter of the time in which they came: measure for "
            "longer to tell whether a queue grows"
        )
    n_ended = int(((ended_s >= (start_s + end_s) / 2) & (ended_s <= end_s)).sum())
    behind = n_came - n_ended
    return behind > BEHIND * n_came and behind > 3 * math.sqrt(n_came), ""


def _thirds(n: int) -> tuple[slice, slice]:
    """The first and the last."""
    return slice(0, n // 3), slice(n - n // 3, n)


def _lives(columns: Columns) -> tuple[Floats, Floats, Floats]:
    """(A,) when each conversation that was asked came, ended well, and was last heard of, in s.

    One that failed never ended well (infinity); if no step of it came, it is heard of as it comes.
    """
    n = len(columns.conversation_ids)
    asked = columns.submitted_ns >= 0
    came = np.full(n, np.nan)
    arrival = asked & (columns.turn == 0)
    came[columns.conversation[arrival]] = columns.submitted_ns[arrival] / 1e9
    left = came.copy()
    _, last = columns.first_and_last()
    np.fmax.at(left, columns.conversation[columns.request[last]], columns.time_ns[last] / 1e9)
    ended = left.copy()
    ended[columns.conversation[asked & ~columns.finished]] = np.inf
    known: Bools = ~np.isnan(came)
    return came[known], ended[known], left[known]


def _most_at_once(came_s: Floats, ended_s: Floats) -> int:
    """An end and an arrival at one moment: the end is first."""
    moments = np.concatenate([ended_s, came_s])
    change = np.concatenate([np.full(len(ended_s), -1), np.ones(len(came_s), int)])
    order = np.argsort(moments, kind="stable")
    return int(np.cumsum(change[order]).max())
