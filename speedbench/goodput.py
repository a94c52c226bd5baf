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

    single  (R,) ended with its first event, which is one step: no time passed after it, and it
            keeps every limit on what comes later
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
    several = np.zeros(n, bool)
    several[request] = (columns.n_tokens[first] > 1) & (columns.engine_steps[first] != 1)
    return Times(
        {"ttft": ttft, "step_time": step_time, "tpot": tpot, "e2e": e2e},
        (n_tokens == 0) & ~several,
        columns.finished & ~columns.failed[columns.conversation],
    )


def decode_steps(columns: Columns) -> Floats:
    """(R,) engine steps after the first event; NaN where nobody knows how many.

    Steps that were told in total are those after the first event where that holds the prefill's
    token alone, and where none can be missing.
    """
    n = columns.n_requests
    later = columns.step > 0
    request, engine_steps = columns.request[later], columns.engine_steps[later]
    found = np.bincount(request, engine_steps, n).astype(float)
    unknown = np.bincount(request, engine_steps <= 0, n) > 0
    found[unknown] = np.nan
    told = columns.told
    if told is not None and told.is_whole:
        first, _ = columns.first_and_last()
        wanted = np.zeros(n, bool)
        wanted[columns.request[first]] = columns.n_tokens[first] == 1
        of = (wanted & unknown)[told.request]
        found[told.request[of]] = (told.lengths.sum(axis=1) + told.n_plain)[of]
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
