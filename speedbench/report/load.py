"""Load: what a run asked for over time, whether the engine kept up, and how much met its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from speedbench import goodput
from speedbench.columns import Columns
from speedbench.limits import parse_limits
from speedbench.open_loop import RESUMED, Arrivals, arrivals_of
from speedbench.report.figure import Figure
from speedbench.store import Run


@dataclass(frozen=True, slots=True)
class Goodput:
    """limits_s  name -> seconds; per_s: requests that kept all of them over the wall time from the
    first submission to the last token; share: of all requests, failed ones included (Wilson)."""

    limits_s: Mapping[str, float]
    n: int
    n_met: int
    per_s: Figure
    share: Figure


@dataclass(frozen=True, slots=True)
class Load:
    arrivals: Arrivals | None
    goodput: Goodput | None


NOTHING = Load(None, None)


def load_of(run: Run, limits: Mapping[str, float] | None = None) -> Load:
    """limits: of the report; None: those that the run was given."""
    config = run.manifest["config"]
    if limits is None:
        limits = parse_limits(config["goodput"]) if config.get("goodput") else {}
    return Load(
        arrivals_of(run.columns, config) if config.get("request_rate") else None,
        goodput_of(run.columns, limits) if limits else None,
    )


def goodput_of(columns: Columns, limits: Mapping[str, float]) -> Goodput:
    good, why_not = goodput.met(columns, limits)
    n, n_met = columns.n_requests, int(good.sum())
    if why_not or not n:
        nothing = Figure(None, why_not=why_not or "there is no request")
        return Goodput(limits, n, 0, nothing, nothing)
    interval = distributions.binomtest(n_met, n).proportion_ci(0.95, method="wilson")
    share = Figure(n_met / n, (float(interval.low), float(interval.high)))
    if len(np.unique(columns.session)) != 1:
        return Goodput(limits, n, n_met, Figure(None, why_not=RESUMED), share)
    last = columns.time_ns.max(initial=0)
    wall_s = float(last - columns.submitted_ns[columns.submitted_ns >= 0].min(initial=last)) / 1e9
    if wall_s <= 0:
        return Goodput(limits, n, n_met, Figure(None, why_not="no time passed"), share)
    return Goodput(
        limits, n, n_met, Figure(n_met / wall_s, why_not="one number of one run: repeat it"), share
    )
