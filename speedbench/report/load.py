"""Load: what a run asked for over time, whether the engine kept up, and how much met its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats as distributions

from speedbench import goodput, metrics
from speedbench.limits import parse_limits
from speedbench.open_loop import RESUMED, Arrivals, arrivals_of
from speedbench.report.figure import Figure
from speedbench.spans import APART, on_one_clock, spans_of, why_no_throughput
from speedbench.store import Run


@dataclass(frozen=True, slots=True)
class Goodput:
    """limits_s  name -> seconds; per_s: requests that kept all of them over the wall time from the
    first submission to the last token; share: of all requests, failed ones included (Wilson).
    There is neither where requests are not in the records: n and n_met are of those that are."""

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
        _arrivals(run) if config.get("request_rate") else None,
        goodput_of(run, limits) if limits else None,
    )


def _arrivals(run: Run) -> Arrivals:
    columns, config = run.columns, run.manifest["config"]
    if why_not := _why_no_rate(run):
        return arrivals_of(columns, config, why_not)
    return arrivals_of(on_one_clock(columns, spans_of(run.manifest)[0]), config)


def goodput_of(run: Run, limits: Mapping[str, float]) -> Goodput:
    columns = run.columns
    good, why_not = goodput.met(columns, limits)
    n, n_met = columns.n_requests, int(good.sum())
    if why_not or not n:
        nothing = Figure(None, why_not=why_not or "there is no request")
        return Goodput(limits, n, 0, nothing, nothing)
    if why_not := _why_not_all(run):
        nothing = Figure(None, why_not=why_not)
        return Goodput(limits, n, n_met, nothing, nothing)
    interval = distributions.binomtest(n_met, n).proportion_ci(0.95, method="wilson")
    share = Figure(n_met / n, (float(interval.low), float(interval.high)))
    return Goodput(limits, n, n_met, _per_s(run, n_met), share)


def _per_s(run: Run, n_met: int) -> Figure:
    if why_not := _why_no_rate(run):
        return Figure(None, why_not=why_not)
    columns = on_one_clock(run.columns, spans_of(run.manifest)[0])
    asked = columns.submitted_ns[columns.submitted_ns >= 0]
    last_ns = columns.time_ns.max()
    wall_s = float(last_ns - asked.min(initial=last_ns)) / 1e9
    if wall_s <= 0:
        return Figure(None, why_not="no time passed")
    return Figure(n_met / wall_s, why_not="one number of one run: repeat it")


def _why_not_all(run: Run) -> str:
    """Why the records are not of all requests that were asked at one load, or not right; or ''."""
    manifest, sessions = run.manifest, run.manifest["sessions"]
    if manifest.get("merged"):
        return APART
    if manifest["status"] != "complete":
        return (
            f"the run is not complete ({manifest['status']}): what was in flight or waited at its "
            "end is not in the records"
        )
    # What an earlier session left in flight was asked again.
    last = max((session["session"] for session in sessions), default=0)
    if any(session.get("n_uncommitted") for session in sessions if session["session"] == last):
        return "conversations were in flight at the end, and are not in the records"
    if run.damage:
        return "a part of the records cannot be read"
    return "" if metrics.timed(run.columns).all() else "the clock runs backwards"


def _why_no_rate(run: Run) -> str:
    """Why the records do not tell, on one clock, of all that was asked; or ''."""
    if len({session["session"] for session in run.manifest["sessions"]}) > 1:
        return RESUMED
    return _why_not_all(run) or why_no_throughput(run) or spans_of(run.manifest)[1]
