"""Arrivals: when the conversations of an open loop are due, whatever the engine does meanwhile."""

from __future__ import annotations

from typing import Literal

import numpy as np

from speedbench.columns import Ints

Process = Literal["poisson", "constant"]


def due_ns(
    rate_per_s: float, n: int, process: Process, seed: int, duration_s: float | None = None
) -> Ints:
    """(N',) nanoseconds after the start at which conversations are due, the first at 0.

    poisson: gaps are exponential with mean 1 / rate, independent, and the same for one seed;
    constant: all gaps are 1 / rate. N' <= n: those due before `duration_s`.
    """
    if process == "constant":
        due_s = np.arange(n) / rate_per_s
    else:
        gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, max(n - 1, 0))
        due_s = np.append(0.0, np.cumsum(gaps))[:n]
    if duration_s is not None:
        due_s = due_s[due_s < duration_s]
    return np.round(due_s * 1e9).astype(np.int64)
