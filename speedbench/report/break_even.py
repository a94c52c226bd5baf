"""Break-even: the concurrency at which speculation stops paying, by output TPS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speedbench.report.summary import Figure


@dataclass(frozen=True, slots=True)
class Speedup:
    """A speculative arm over the arm without speculation, at its concurrency."""

    setting: str
    drafter: str
    draft_length: int
    concurrency: int
    user_tps: Figure
    output_tps: Figure


Verdict = Literal["pays at all", "pays nowhere", "stops", "starts", "several", "unknown"]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where the output-TPS speedup of a K crosses 1.

    concurrency  interpolated: the logarithm of the speedup, linear in that of the concurrency
    between      the measured concurrencies on either side
    interval     where the ends of the speedups' intervals cross 1; None for an end beyond what was
                 measured. No interval at all without repeats.
    measured     concurrencies with a speedup
    """

    setting: str
    drafter: str
    draft_length: int
    verdict: Verdict
    measured: tuple[int, ...]
    concurrency: float | None = None
    between: tuple[int, int] | None = None
    interval: tuple[float | None, float | None] | None = None
    why_not: str = ""


def break_even(speedups: Sequence[Speedup]) -> Iterator[BreakEven]:
    keys = dict.fromkeys((s.setting, s.drafter, s.draft_length) for s in speedups)
    for key in keys:
        mine = sorted(
            (s for s in speedups if (s.setting, s.drafter, s.draft_length) == key),
            key=lambda s: s.concurrency,
        )
        yield crossing(*key, [(s.concurrency, s.output_tps) for s in mine])


def crossing(
    setting: str, drafter: str, draft_length: int, speedups: Sequence[tuple[int, Figure]]
) -> BreakEven:
    """From (concurrency, output-TPS speedup) by rising concurrency."""
    known = [(c, f) for c, f in speedups if f.value]
    measured = tuple(c for c, _ in known)

    def found(verdict: Verdict, **more: Any) -> BreakEven:
        return BreakEven(setting, drafter, draft_length, verdict, measured, **more)

    if not known:
        why = speedups[0][1].why_not if speedups else "no concurrency has both arms"
        return found("unknown", why_not=why)
    logs = [math.log(f.value or 1) for _, f in known]
    places = crossings(measured, logs)
    if not places:
        return found("pays at all" if logs[0] > 0 else "pays nowhere")
    if len(places) > 1:
        return found("several")
    at = places[0]
    stops = logs[0] > 0
    between = next((a, b) for a, b in itertools.pairwise(measured) if a <= at <= b)
    return found(
        "stops" if stops else "starts",
        concurrency=at,
        between=between,
        interval=_interval(known, stops),
    )


def crossings(concurrencies: Sequence[int], logs: Sequence[float]) -> list[float]:
    """Where a curve of log speedups, linear in log concurrency, turns positive or ceases to be."""
    found = []
    for i in range(len(logs) - 1):
        if (logs[i] > 0) != (logs[i + 1] > 0):
            share = logs[i] / (logs[i] - logs[i + 1])
            low, high = math.log(concurrencies[i]), math.log(concurrencies[i + 1])
            found.append(math.exp(low + share * (high - low)))
    return found


def _interval(
    known: Sequence[tuple[int, Figure]], stops: bool
) -> tuple[float | None, float | None] | None:
    """Concurrencies around the crossing at which the speedup's own interval contains 1."""
    if any(figure.interval is None or figure.interval[0] <= 0 for _, figure in known):
        return None
    measured = [c for c, _ in known]
    low, high = (
        [math.log(figure.interval[i]) for _, figure in known if figure.interval] for i in (0, 1)
    )
    first, last = (low, high) if stops else (high, low)
    begins = crossings(measured, first) if (first[0] > 0) == stops else []
    ends = crossings(measured, last) if (last[-1] > 0) != stops else []
    return (begins[0] if begins else None), (ends[-1] if ends else None)
