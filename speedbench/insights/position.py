"""AL along an answer: by output position, thinking against answer, turn by turn.

Later bins and turns hold fewer conversations, and other ones: those with long answers. So each
slice comes with the AL of the first slice over the same conversations, and the difference of the
two, paired. All with the estimator of `metrics` (cut steps are censored), every step equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedbench import metrics
from speedbench.columns import Floats, Ints
from speedbench.insights import rates
from speedbench.insights.figures import LONE, figure
from speedbench.insights.steps import Measured, Steps, Tokens
from speedbench.report.summary import Figure

THINKING, ANSWER, UNDIVIDED = range(3)
LONE_CATEGORY = f"{LONE}: a category has a single one"
"""It is drawn in every resample, so that the spread of its kind would be taken for none."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the answers. Of the conversations that have a step in it:

    al          their AL in this slice
    al_first    their AL in the first slice
    difference  al - al_first; None in the first slice itself
    """

    label: str
    n_conversations: int
    n_steps: int
    al: Figure
    al_first: Figure
    difference: Figure


@dataclass(frozen=True, slots=True)
class Slices:
    """All slices of one arm; `why_not` says why there are none. `notes` are facts about them."""

    label: str
    slices: tuple[Slice, ...]
    why_not: str = ""
    notes: tuple[str, ...] = ()


def by_position(of: Measured, bin_tokens: int = 500) -> Slices:
    """By the place of a step's first token in its request's output, in bins of `bin_tokens`."""
    group = of.steps.position // bin_tokens
    n = int(group.max(initial=-1)) + 1
    labels = [f"{g * bin_tokens}-{(g + 1) * bin_tokens - 1}" for g in range(n)]
    return Slices(of.arm.label, sliced(of, group, labels), "" if n else "no decode step")


def by_turn(of: Measured) -> Slices:
    """By the turn of the request, the first one being turn 1."""
    n = int(of.steps.turn.max(initial=-1)) + 1
    labels = [f"turn {g + 1}" for g in range(n)]
    return Slices(of.arm.label, sliced(of, of.steps.turn, labels), "" if n else "no decode step")


def by_thinking(of: Measured, think_end: Sequence[int]) -> Slices:
    """Steps that begin up to the end of the first `think_end`, against those after it.

    Requests that never say it are of neither kind: they are a third slice.
    """
    label = of.arm.label
    if of.fault:
        return Slices(label, (), of.fault)
    if not len(of.steps.length):
        return Slices(label, (), "no decode step")
    group = _thinking_groups(of.steps, of.tokens, think_end)
    if not (group != UNDIVIDED).any():
        ids = ", ".join(map(str, think_end))
        return Slices(label, (), f"no request says --think_end (token ids {ids})")
    labels = ["thinking", "answer", "requests that never say --think_end"]
    found = sliced(of, group, labels)
    return Slices(label, tuple(one for one in found if one.n_steps))


def _thinking_groups(steps: Steps, tokens: Sequence[Tokens], think_end: Sequence[int]) -> Ints:
    """(D,) THINKING, ANSWER or UNDIVIDED."""
    group = np.full(len(steps.length), UNDIVIDED, np.int64)
    for number, one in enumerate(tokens):
        end = think_ends(one, think_end)
        mine = np.flatnonzero(steps.run == number)
        ends = end[steps.request[mine]]
        inside = np.where(steps.position[mine] < ends, THINKING, ANSWER)
        group[mine] = np.where(ends >= 0, inside, UNDIVIDED)
    return group


def think_ends(tokens: Tokens, think_end: Sequence[int]) -> Ints:
    """(R,) output tokens up to the end of the first `think_end`; -1 where there is none."""
    n, length = len(tokens.start) - 1, len(think_end)
    found = np.full(n, -1, np.int64)
    if not length or len(tokens.ids) < length:
        return found
    places = len(tokens.ids) - length + 1
    same = np.ones(places, bool)
    for i, token in enumerate(think_end):
        same &= tokens.ids[i : i + places] == token
    at = np.flatnonzero(same)
    request = np.searchsorted(tokens.start, at, side="right") - 1
    whole = at + length <= tokens.start[request + 1]  # not half in the next request
    for r, place in zip(request[whole][::-1].tolist(), at[whole][::-1].tolist(), strict=True):
        found[r] = place - tokens.start[r] + length
    return found


def sliced(of: Measured, group: Ints, labels: Sequence[str]) -> tuple[Slice, ...]:
    """One slice per label; group: (D,) which one each step is in."""
    steps, weights = of.steps, of.weights
    whole, cut = steps.counts(group, len(labels))  # (C', G, K+2)
    both = np.concatenate([whole, cut], axis=2)
    present = both.sum(axis=2) > 0  # (C', G)
    once = np.ones((1, len(weights[0])))
    k = steps.draft_length
    lone = rates.lone(steps.conversations)[steps.conversations.category]  # (C',)
    found = []
    for g, label in enumerate(labels):
        members = present[:, g]
        also_first = members & present[:, 0]
        degrees = steps.conversations.degrees(members)

        def al(w: Floats, slice_: int, rows: Ints) -> Floats:
            # The others' steps are left out, not their weights: of these there are many more.
            of_rows = np.zeros_like(both[:, slice_])
            of_rows[rows] = both[rows, slice_]
            sums = w @ of_rows
            return metrics.acceptance_length(sums[:, : k + 2], sums[:, k + 2 :])

        def als(slice_: int, rows: Ints) -> tuple[float, Floats]:
            return float(al(once, slice_, rows)[0]), al(weights, slice_, rows)

        rows, paired = np.flatnonzero(members), np.flatnonzero(also_first)
        here, samples = als(g, rows)
        unknown = "a position was reached only by steps that the end of a request cut off"
        why = unknown if len(rows) else "no step"
        none = LONE_CATEGORY if (lone & members).any() else ""
        value = figure(here, samples, degrees, lowest=1, highest=k + 1, why_not=why, why_none=none)
        if g == 0:
            first = value
            difference = Figure(None, why_not="the first slice itself")
        else:
            same, same_samples = als(g, paired)
            base, base_samples = als(0, paired)
            paired_degrees = steps.conversations.degrees(also_first)
            why = unknown if len(paired) else "no conversation has steps in both"
            none = LONE_CATEGORY if (lone & also_first).any() else ""
            first = figure(
                base, base_samples, paired_degrees,
                lowest=1, highest=k + 1, why_not=why, why_none=none,
            )  # fmt: skip
            difference = figure(
                same - base, same_samples - base_samples, paired_degrees,
                lowest=-k, highest=k, why_not=why, why_none=none,
            )  # fmt: skip
        n_steps = int((whole[:, g] + cut[:, g]).sum())
        found.append(Slice(label, int(members.sum()), n_steps, value, first, difference))
    return tuple(found)
