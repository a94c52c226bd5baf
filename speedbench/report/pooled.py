"""Pooled: the steps of an arm's repeats as one measurement, conversation by conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from speedbench import metrics
from speedbench.checks import counted
from speedbench.columns import Floats, Ints
from speedbench.store import Run


def pooled(runs: Sequence[Run]) -> tuple[metrics.Acceptance, tuple[str, ...], tuple[str, ...]]:
    """What each conversation contributes over all repeats, the categories' names, and the
    conversations'.

    A conversation's steps of all runs are added up, so that it stays one unit of resampling: its
    repeats say little new of other prompts. Where it failed in one run, the others tell of it.
    `mean_all` is the mean over repeats of what each run by itself would say.
    """
    each = [counted(run) for run in runs]
    categories = tuple(sorted({name for run in runs for name in run.columns.categories}))
    code_of = {name: code for code, name in enumerate(categories)}
    place: dict[str, int] = {}
    category: list[int] = []
    places: list[Ints] = []
    for run in runs:
        columns = run.columns
        mine = []
        for c in np.flatnonzero(~columns.failed):
            name = columns.conversation_ids[c]
            if name not in place:
                place[name] = len(place)
                category.append(code_of[columns.categories[columns.category[c]]])
            mine.append(place[name])
        places.append(np.array(mine, np.int64))

    def summed(name: str) -> Ints:
        total = np.zeros((len(place), each[0].whole.shape[1]), np.int64)
        for rows, one in zip(places, each, strict=True):
            total[rows] += getattr(one, name)
        return total

    whole = summed("whole")
    longest = max(len(one.as_published) for one in each)
    return (
        metrics.Acceptance(
            n_categories=len(categories),
            category=np.array(category, np.int64),
            whole=whole,
            cut=summed("cut"),
            whole_verify=summed("whole_verify"),
            cut_verify=summed("cut_verify"),
            whole_offered=summed("whole_offered"),
            cut_offered=summed("cut_offered"),
            mean_uncut=_ratio(whole @ np.arange(whole.shape[1]), whole.sum(axis=1)),
            mean_all=_mean_over_runs(len(place), places, [one.mean_all for one in each]),
            n_verify=sum(one.n_verify for one in each),
            n_plain=sum(one.n_plain for one in each),
            n_decode=sum(one.n_decode for one in each),
            n_merged=sum(one.n_merged for one in each),
            n_events=sum(one.n_events for one in each),
            as_published=np.sum(
                [np.pad(one.as_published, (0, longest - len(one.as_published))) for one in each],
                axis=0,
            ),
            n_cut_unknown=sum(one.n_cut_unknown for one in each),
            is_whole=all(one.is_whole for one in each),
        ),
        categories,
        tuple(place),
    )


def _mean_over_runs(n: int, places: Sequence[Ints], values: Sequence[Floats]) -> Floats:
    """(n,) mean of what each run says of a conversation, of those that say anything."""
    total, count = np.zeros(n), np.zeros(n)
    for rows, found in zip(places, values, strict=True):
        known = ~np.isnan(found)
        total[rows[known]] += found[known]
        count[rows[known]] += 1
    return _ratio(total, count)


def _ratio(numerator: Floats | Ints, denominator: Floats | Ints) -> Floats:
    out: Floats = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out
