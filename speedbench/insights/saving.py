"""What speculation saves: minutes of decoding for the same tokens, and dollars per million tokens.

Minutes: every paired conversation's tokens (after each first step) at the baseline's own pace in
that conversation, less the time that the speculative arm took. They are minutes that requests
waited, added up; requests run side by side, so they are not minutes of the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Floats
from speedbench.insights import rates
from speedbench.insights.figures import figure, of_repeats
from speedbench.insights.pairing import beside_speculation
from speedbench.insights.steps import Conversations, conversations_of
from speedbench.report.arms import Arm, nearest
from speedbench.report.summary import Figure, Resamples


@dataclass(frozen=True, slots=True)
class Saving:
    """A speculative arm against the baseline, over the conversations that both have.

    minutes           of decoding saved in a run of the arm (its repeats' mean)
    baseline_minutes  what the baseline would have taken for the same tokens
    share             minutes / baseline_minutes
    """

    arm: str
    base: str
    n_conversations: int
    n_tokens: int
    minutes: Figure
    baseline_minutes: Figure
    share: Figure


def savings(arms: Sequence[Arm]) -> tuple[Saving, ...]:
    """Every speculative arm against the baseline that differs from it in speculation alone."""
    resamples = Resamples()
    return tuple(
        saving(base, arm, resamples)
        for arm in arms
        if not arm.is_baseline
        for base in nearest(
            arm, [b for b in arms if b.is_baseline and not beside_speculation(b, arm)]
        )
    )


def saving(base: Arm, arm: Arm, resamples: Resamples | None = None) -> Saving:
    mine, theirs = _decoding(arm), _decoding(base)
    of_base = {name: i for i, name in enumerate(theirs.conversations.ids)}
    rows = [
        (i, of_base[name])
        for i, name in enumerate(mine.conversations.ids)
        if name in of_base
        and mine.tokens[i] > 0
        and mine.seconds[i] > 0
        and theirs.tokens[of_base[name]] > 0
        and theirs.seconds[of_base[name]] > 0
    ]
    if not rows:
        nothing = Figure(None, why_not="no conversation was timed in both arms")
        return Saving(arm.label, base.label, 0, 0, nothing, nothing, nothing)
    here, there = (np.array(index, np.int64) for index in zip(*rows, strict=True))
    pace = theirs.seconds[there] / theirs.tokens[there]
    would = mine.tokens[here] * pace / 60
    took = mine.seconds[here] / 60
    conversations = Conversations(
        tuple(mine.conversations.ids[i] for i in here),
        mine.conversations.categories,
        mine.conversations.category[here],
    )
    weights = (resamples or Resamples()).weights(conversations.category, conversations.ids)
    everyone = np.ones(len(here), bool)
    degrees = 0 if rates.lone(conversations).any() else conversations.degrees(everyone)
    samples_would, samples_saved = weights @ would, weights @ (would - took)
    value_would, value_saved = float(would.sum()), float((would - took).sum())
    return Saving(
        arm.label,
        base.label,
        len(here),
        round(float(mine.tokens[here].sum())),
        figure(value_saved, samples_saved, degrees),
        figure(value_would, samples_would, degrees, lowest=0.0),
        figure(value_saved / value_would, samples_saved / samples_would, degrees, highest=1.0),
    )


@dataclass(frozen=True, slots=True)
class _Decoding:
    """(C',) tokens after the first steps of each conversation, and the seconds they took: means
    over the runs that have it."""

    conversations: Conversations
    tokens: Floats
    seconds: Floats


def _decoding(arm: Arm) -> _Decoding:
    conversations, codes = conversations_of(arm)
    n = len(conversations.ids)
    tokens, seconds, runs = np.zeros(n), np.zeros(n), np.zeros(n)
    for run, own in zip(arm.runs, codes, strict=True):
        columns = run.columns
        first, last = columns.first_and_last()
        of_step = own[columns.conversation[columns.request]]
        later = (columns.step > 0) & (of_step >= 0)
        tokens += np.bincount(of_step[later], columns.n_tokens[later], n)
        spent = (columns.time_ns[last] - columns.time_ns[first]) / 1e9
        good = of_step[first] >= 0
        seconds += np.bincount(of_step[first][good], spent[good], n)
        runs += np.bincount(own[own >= 0], minlength=n)
    return _Decoding(conversations, tokens / runs, seconds / runs)


# ---------------------------------------------------------------- dollars


def dollars_per_million(arm: Arm, gpu_hour_price: float) -> Figure:
    """Dollars of GPU time per million output tokens, over whole runs (their warm-up left out).

    Of one run there is no interval: a run's output TPS is a single number.
    """
    n_gpus, why = rates.n_gpus(arm)
    if why:
        return Figure(None, why_not=why)
    found = []
    for run in arm.runs:
        whole, _ = rates.output_tps(run)
        if whole.value is None:
            return Figure(None, why_not=whole.why_not)
        if whole.value == 0:
            return Figure(None, why_not="no token was put out")
        found.append(gpu_hour_price * n_gpus / 3600 / whole.value * 1e6)
    return of_repeats(found, "one run: only repeats can tell how much it varies")
