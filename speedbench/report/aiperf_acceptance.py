"""Acceptance of AIPerf's runs: what the server's responses, and its counters, told of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speedbench import stats
from speedbench.aiperf import AiperfRun
from speedbench.columns import Floats, Ints
from speedbench.report import as_json
from speedbench.report.summary import Figure

SCHEMA = "speedbench.aiperf/1"
TOTALS = "the counters are totals of the run"


@dataclass(frozen=True, slots=True)
class Accepted:
    """The acceptance of one run, by who told it.

    al_responses, rate_responses  1 + accepted / verifications, accepted / drafted, of all requests'
                                  own accounts together: every verification equal
    al_counters, rate_counters    the same of the server's counters
    agree  both hold the same verifications and accepted tokens; None where either does not tell
    """

    al_responses: Figure
    rate_responses: Figure
    al_counters: Figure
    rate_counters: Figure
    agree: bool | None


def accepted(run: AiperfRun) -> Accepted:
    counted = run.counted
    al_responses = rate_responses = Figure(None, why_not=run.why_not_told)
    if run.told:
        rows = np.array(
            [(o.n_verifications, o.n_accepted, o.n_drafted) for o in run.told], np.int64
        )
        al_responses = _ratio(rows[:, [0, 1]], 1.0, "no draft was checked")
        rate_responses = _ratio(rows[:, [2, 1]], 0.0, "no token was drafted")
    al_counters = rate_counters = Figure(None, why_not=counted.why_not)
    agree = None
    if counted.n_drafts and counted.n_accepted is not None:
        al_counters = Figure(1 + counted.n_accepted / counted.n_drafts, why_not=TOTALS)
        rate_counters = Figure(None, why_not="drafted tokens are not counted")
        if counted.n_drafted:
            rate_counters = Figure(counted.n_accepted / counted.n_drafted, why_not=TOTALS)
        if run.told and not run.n_untold:
            mine = (sum(o.n_verifications for o in run.told), sum(o.n_accepted for o in run.told))
            agree = mine == (counted.n_drafts, counted.n_accepted)
    return Accepted(al_responses, rate_responses, al_counters, rate_counters, agree)


def _ratio(rows: Ints, plus: float, why_not: str) -> Figure:
    """plus + sum of the second / sum of the first column (C, 2), with the jackknife's interval over
    conversations."""
    if not rows[:, 0].sum():
        return Figure(None, why_not=why_not)
    value = plus + float(rows[:, 1].sum() / rows[:, 0].sum())
    kept = rows[rows[:, 0] > 0]
    if len(kept) < stats.MIN_CONVERSATIONS:
        return Figure(value, why_not="a single conversation has none")

    def ratio(sums: Floats | Ints) -> Floats:
        return np.asarray(plus + sums[..., 1] / sums[..., 0])

    category = np.zeros(len(kept), np.int64)
    values, pseudo = stats.of_sums(kept, category, 1, ratio)
    estimate = stats.category_means(pseudo, category, 1, np.asarray(kept[:, 0], float)).at(values)
    low, high = np.clip(estimate.interval()[0], plus, None)
    return Figure(value, (float(low), float(high)))


def as_plain(runs: Sequence[AiperfRun]) -> dict[str, Any]:
    """The report of these runs for programs, at full precision."""
    each = [{"run": run, "acceptance": accepted(run)} for run in runs]
    return as_json.plain(SCHEMA, {"runs": each})
