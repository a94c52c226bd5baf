"""Goodput: requests that met stated limits, over time (DistServe, arXiv:2401.09670, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Bools, Columns, Floats
from speedbench.limits import LIMITED


@dataclass(frozen=True, slots=True)
class Times:
    """Of every request (R,), in seconds; NaN where it is not known, or has none.

    single  (R,) ended with its first event, after which no time passed: it keeps every limit on
            what comes later
    ended   (R,) finished, in a conversation that did not fail
    """

    by_name: Mapping[str, Floats]
    single: Bools
    ended: Bools


def times(columns: Columns) -> Times:
    n = columns.n_requests
    first, last = columns.first_and_last()
    request = columns.request[first]
    ttft, e2e, decode = (np.full(n, np.nan) for _ in range(3))
    submitted = columns.submitted_ns[request]
    ttft[request] = (columns.time_ns[first] - submitted) / 1e9
    e2e[request] = (columns.time_ns[last] - submitted) / 1e9
    decode[request] = (columns.time_ns[last] - columns.time_ns[first]) / 1e9
    later = columns.step > 0
    n_tokens = np.bincount(columns.request[later], columns.n_tokens[later], n)
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where(n_tokens > 0, decode / n_tokens, np.nan)
        n_steps = decode_steps(columns)
        step_time = np.where(n_steps > 0, decode / n_steps, np.nan)
    return Times(
        {"ttft": ttft, "step_time": step_time, "tpot": tpot, "e2e": e2e},
        n_tokens == 0,
        columns.finished & ~columns.failed[columns.conversation],
    )


def decode_steps(columns: Columns) -> Floats:
    """(R,) engine steps after the first event; NaN where an event holds nobody knows how many."""
    n = columns.n_requests
    later = columns.step > 0
    request, engine_steps = columns.request[later], columns.engine_steps[later]
    found = np.bincount(request, engine_steps, n).astype(float)
    found[np.bincount(request, engine_steps <= 0, n) > 0] = np.nan
    if columns.told is not None:
        found[columns.told.request] = columns.told.lengths.sum(axis=1) + columns.told.n_plain
    return found


def met(columns: Columns, limits: Mapping[str, float]) -> tuple[Bools, str]:
    """(R,) requests that kept every limit; what failed, or was not finished, kept none. And why it
    cannot be told, or ''."""
    found = times(columns)
    good = found.ended.copy()
    for name, limit_s in limits.items():
        values = found.by_name[name]
        single = found.single & (name in ("step_time", "tpot"))
        if np.isnan(values[found.ended & ~single]).any():
            return good, f"{LIMITED[name]} is not known of every request"
        with np.errstate(invalid="ignore"):
            good &= single | (values <= limit_s)
    return good, ""
