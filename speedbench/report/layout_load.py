"""Layout of the load: what came, whether it was kept up with, and what kept its limits."""

from __future__ import annotations

from collections.abc import Iterator

from speedbench.open_loop import Arrivals
from speedbench.report.blocks import Block, Facts, Heading, Style
from speedbench.report.load import Goodput, Load

NO_VALUE = "n/a"
GREW = (
    "The queue grew, or conversations failed: fewer ended well than came. Latencies say how long "
    "was measured, or leave out what was turned away, and not how fast the engine is. Lower "
    "--request_rate."
)
KEPT = "as many conversations ended as came: no queue grew"


def of_load(load: Load) -> Iterator[Block]:
    """Nothing of a closed loop without limits."""
    items: list[tuple[str, str, Style]] = []
    if load.arrivals is not None:
        items += _arrivals(load.arrivals)
    if load.goodput is not None:
        items.append(("Goodput", _goodput(load.goodput), "plain"))
    if items:
        yield Heading("Load")
        yield Facts(tuple(items))


def _arrivals(found: Arrivals) -> Iterator[tuple[str, str, Style]]:
    law = "at random (Poisson)" if found.process == "poisson" else "evenly"
    came = f"{found.n} conversations, {law}, {_rate(found.rate_per_s)} per s asked for"
    if found.offered_per_s is not None:
        came += (
            f", {_rate(found.offered_per_s)} per s came; at most {found.n_most_in_flight} at a "
            "time were not answered"
        )
    yield "Arrivals", f"{came}.", "plain"
    if found.is_behind is None:
        yield "Kept up", f"{NO_VALUE}: {found.why_not}.", "plain"
    else:
        ended = _rate(found.completed_per_s or 0.0)
        told = GREW if found.is_behind else f"{KEPT}."
        style: Style = "warning" if found.is_behind else "plain"
        yield "Kept up", f"{ended} per s ended while they came, in the second half. {told}", style


def _goodput(found: Goodput) -> str:
    limits = ", ".join(f"{name} {_duration(limit)}" for name, limit in found.limits_s.items())
    if found.share.value is None:
        return f"{NO_VALUE} ({limits}): {found.share.why_not}."
    low, high = found.share.interval or (found.share.value, found.share.value)
    per_s = (
        f"{NO_VALUE} requests/s ({found.per_s.why_not})"
        if found.per_s.value is None
        else f"{_rate(found.per_s.value)} requests/s"
    )
    return (
        f"{per_s} kept {limits}: {found.n_met} of {found.n}, "
        f"{100 * found.share.value:.1f} % (95 % {100 * low:.1f}-{100 * high:.1f} %)."
    )


def _rate(per_s: float) -> str:
    return f"{per_s:.4g}"


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:g} ms" if seconds < 1 else f"{seconds:g} s"
