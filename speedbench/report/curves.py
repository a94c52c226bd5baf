"""Curves: what the figures of one run draw over a scale: distributions, and what was in flight.

A run has a million values and a page a few hundred pixels: every curve is thinned, but each of its
points is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedbench import metrics
from speedbench.columns import Columns, Floats, Ints

N_POINTS = 100


@dataclass(frozen=True, slots=True)
class Distribution:
    """Points (P,) of an empirical distribution: `shares` of all values are at most `values`."""

    values: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A run in N equal spans; `edges_s` (N + 1,) count from its start.

    requests    (N,) mean number of requests in flight: submitted, their last step not yet come
    tokens      (N,) mean over time of their prompt tokens and what they had put out so far
    output_tps  (N,) tokens of the steps that came in the span, over its length
    steady_s    the steady window: from all slots filled until the queue is empty
    """

    edges_s: tuple[float, ...]
    requests: tuple[float, ...]
    tokens: tuple[float, ...]
    output_tps: tuple[float, ...]
    steady_s: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Curves:
    """`why_no_timeline`: why the records cannot tell what was in flight, where they cannot."""

    step_time_s: Distribution
    ttft_s: Distribution
    timeline: Timeline | None
    why_no_timeline: str


def distribution(values: Floats, n_points: int = N_POINTS) -> Distribution:
    """The smallest value, those at n_points equal ranks, and the share at or below each."""
    n = len(values)
    if n == 0:
        return Distribution((), ())
    ordered = np.sort(values)
    ranks = np.unique(np.ceil(np.linspace(0, n, n_points + 1)).astype(np.int64).clip(1) - 1)
    chosen = np.unique(ordered[ranks])
    shares = np.searchsorted(ordered, chosen, side="right") / n
    return Distribution(tuple(map(float, chosen)), tuple(map(float, shares)))


def timeline(
    columns: Columns, session: int, spans: Sequence[metrics.Span], concurrency: int, n_spans: int
) -> Timeline:
    """What was in flight in one session. A request without a single step is not in it: when it
    ended is not known."""
    started_ns = min(span.started_ns - span.zero_ns for span in spans)
    ended_ns = max(span.ended_ns - span.zero_ns for span in spans)
    zero = np.zeros(1 + max(span.replica for span in spans), np.int64)
    for span in spans:
        zero[span.replica] = span.zero_ns + started_ns
    first, last = columns.first_and_last()
    mine = (columns.session[columns.request[last]] == session) & (
        columns.submitted_ns[columns.request[last]] >= 0
    )
    first, last = first[mine], last[mine]
    request = columns.request[last]
    offset = zero[columns.replica]  # (R,)
    begin = columns.submitted_ns[request] - offset[request]
    end = columns.time_ns[last] - offset[request]
    n_output = np.bincount(columns.request, columns.n_tokens, columns.n_requests).astype(np.int64)
    total = columns.n_prompt_tokens[request] + n_output[request]
    of_mine = np.zeros(columns.n_requests, bool)
    of_mine[request] = True
    seen = of_mine[columns.request]
    step_ns = columns.time_ns[seen] - offset[columns.request[seen]]
    n_tokens = columns.n_tokens[seen]
    edges = np.linspace(0.0, float(ended_ns - started_ns), n_spans + 1)
    ones = np.ones(len(request), np.int64)
    output_tps = _rates(step_ns, n_tokens, edges)
    held = np.concatenate([columns.n_prompt_tokens[request], n_tokens, -total]).astype(np.int32)
    moments = np.concatenate([begin, step_ns, end])
    del seen, step_ns, n_tokens  # of 10 million steps an array is 80 MB
    steady = steady_bounds(columns, session, spans, concurrency)
    return Timeline(
        edges_s=tuple(map(float, edges / 1e9)),
        requests=_means(np.concatenate([begin, end]), np.concatenate([ones, -ones]), edges),
        tokens=_means(moments, held, edges),
        output_tps=output_tps,
        steady_s=None
        if steady is None
        else ((steady[0] - started_ns) / 1e9, (steady[1] - started_ns) / 1e9),
    )


def _means(at_ns: Ints, change: Ints, edges: Floats) -> tuple[float, ...]:
    """(N,) mean over time, between edges (N + 1,), of a level that changes (E,) at moments (E,)."""
    order = np.argsort(at_ns, kind="stable")
    at = at_ns[order].astype(float)
    level = np.cumsum(change[order]).astype(float)
    del order
    area = np.diff(at)
    area *= level[:-1]
    np.cumsum(area, out=area)  # up to the next moment
    before = np.searchsorted(at, edges, side="right") - 1
    inside = before >= 0
    up_to = np.zeros(len(edges))
    reached = before[inside]
    whole = np.zeros(len(reached))
    whole[reached > 0] = area[reached[reached > 0] - 1]
    up_to[inside] = whole + level[reached] * (edges[inside] - at[reached])
    return tuple(map(float, np.diff(up_to) / np.diff(edges)))


def _rates(at_ns: Ints, n_tokens: Ints, edges: Floats) -> tuple[float, ...]:
    """(N,) tokens per second in the spans between edges; one at an edge is of the span before."""
    order = np.argsort(at_ns, kind="stable")
    summed = np.append(0, np.cumsum(n_tokens[order]))
    up_to = summed[np.searchsorted(at_ns[order], edges, side="right")]
    up_to[0] = 0  # a step at the very start is of the first span
    return tuple(map(float, np.diff(up_to) / (np.diff(edges) / 1e9)))


def steady_bounds(
    columns: Columns, session: int, spans: Sequence[metrics.Span], concurrency: int
) -> tuple[int, int] | None:
    """When the steady window of `metrics.steady_window` began and ended, on the common clock."""
    window = metrics.steady_window(columns, session, spans, concurrency)
    if window is None:
        return None
    empty = []
    for span in spans:
        mine = (
            (columns.session == session)
            & (columns.replica == span.replica)
            & (columns.turn == 0)
            & (columns.submitted_ns >= 0)
        )
        empty.append(int(columns.submitted_ns[mine].max()) - span.zero_ns)
    return min(empty) - round(window.duration_s * 1e9), min(empty)
