"""Draft-vocabulary coverage: what a pruned drafter cannot say, and what that costs in AL.

Where a draft token was rejected, the last token of the step is the target's own. If a pruned
drafter lacks that token, the rejection could not have been avoided. The AL of a drafter with the
whole vocabulary is predicted by taking such steps out of the risk set at the rejected position, as
if they had been cut off there: at position k, 1 - d_k / r_k with neither d_k nor r_k holding them.

Assumption: with the whole vocabulary the drafter would have been right on those tokens, and after
them, as often as it is at the same position elsewhere. Tokens that were pruned are rare ones, which
are harder than others, so the prediction leans high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from speedbench import draft_vocabulary, metrics, stats, store
from speedbench.columns import Bools, Floats, Ints
from speedbench.draft_vocabulary import DraftVocabulary
from speedbench.insights.figures import figure
from speedbench.insights.options import InsightOptions
from speedbench.insights.steps import (
    Conversations,
    Measured,
    Steps,
    Tokens,
    by_category,
    conversations_of,
)
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure
from speedbench.types import UserError

ASSUMPTION = (
    "predicted: if the drafter had the whole vocabulary and were right on the tokens it lacks, and "
    "after them, as often as at the same position elsewhere; those tokens are rarer than others, "
    "so this leans high; the interval holds the spread of conversations, not that doubt"
)


@dataclass(frozen=True, slots=True)
class CategoryCoverage:
    """One category, or the mean over categories.

    outside       share of output tokens that the drafter cannot draft
    unavoidable   share of the rejected steps whose target token it cannot draft
    al            AL as measured (`al`)
    predicted_al  AL that the whole vocabulary would reach, under ASSUMPTION
    cost          predicted_al - al
    """

    name: str
    n_tokens: int
    n_outside: int
    outside: Figure
    unavoidable: Figure
    al: Figure
    predicted_al: Figure
    cost: Figure


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one arm's drafter cannot draft.

    why_not  why there are no numbers; '' if there are
    origin   where the vocabulary was read
    """

    label: str
    n_draftable: int
    n_vocabulary: int | None
    origin: str
    by_category: tuple[CategoryCoverage, ...]
    overall: CategoryCoverage | None
    why_not: str = ""


def coverage(of: Measured, options: InsightOptions) -> Coverage | None:
    """None for an arm without a drafter, and for one whose drafter is not known to be pruned."""
    arm = of.arm
    if arm.is_baseline:
        return None
    found = vocabulary_of(arm, options)
    if found is None:
        return None
    vocabulary, origin = found
    size = len(vocabulary.token_ids)
    if not vocabulary.is_pruned:
        why = f"its vocabulary is not pruned: it can draft all {size} tokens"
        return Coverage(arm.label, size, vocabulary.n_tokens, origin, (), None, why)
    why = of.fault or _wrong_vocabulary(of.steps, of.tokens, vocabulary)
    if not why and not len(of.steps.conversations.ids):
        why = "no conversation was measured"
    if why:
        return Coverage(arm.label, size, vocabulary.n_tokens, origin, (), None, why)
    rows, overall = _rows(of, vocabulary)
    return Coverage(arm.label, size, vocabulary.n_tokens, origin, rows, overall)


def vocabulary_of(arm: Arm, options: InsightOptions) -> tuple[DraftVocabulary, str] | None:
    """What the arm's runs stored of their drafter, or what the user named; None without either.

    Raises UserError where runs of one arm stored different ones, or what was named cannot be read.
    """
    stored = [
        draft_vocabulary.load(directory) for run in arm.runs for _, directory in store.sources(run)
    ]
    known = [one for one in stored if one is not None]
    if known:
        first = known[0]
        if any(not np.array_equal(one.token_ids, first.token_ids) for one in known):
            raise UserError(
                f"the runs of {arm.label} stored different draft vocabularies: report runs of one "
                "drafter together"
            )
        return first, f"{first.source} of the drafter, stored with the run"
    # What drafts without a checkpoint of its own (n-grams) drafts from the whole vocabulary.
    if options.draft_vocabulary is None or not arm.manifest["config"].get("draft_model_dir"):
        return None
    read = draft_vocabulary.read(options.draft_vocabulary)
    if read is None:
        raise UserError(
            f"--draft_vocabulary {options.draft_vocabulary} drafts from the whole vocabulary: name "
            "the checkpoint of a pruned drafter, or leave it out"
        )
    return read, f"{read.source} of {options.draft_vocabulary}"


def _wrong_vocabulary(steps: Steps, tokens: Sequence[Tokens], vocabulary: DraftVocabulary) -> str:
    """Why this cannot be the vocabulary of the drafter that ran, or ''.

    Draft tokens that were accepted are the drafter's own: it can draft them all.
    """
    n_wrong = n_accepted = 0
    for number, one in enumerate(tokens):
        mine = steps.run == number
        # Of a step that showed n tokens, n - 1 at least were drafted (none, if it was plain).
        first, count = steps.first_token[mine], np.maximum(steps.n_shown[mine] - 1, 0)
        accepted = one.ids[_ranges(first, count)]
        n_accepted += len(accepted)
        n_wrong += int(vocabulary.lacks(accepted).sum())
    if not n_wrong:
        return ""
    return (
        f"{n_wrong} of {n_accepted} accepted draft tokens are not in the vocabulary: it is not "
        "that of the drafter that ran"
    )


def _ranges(start: Ints, count: Ints) -> Ints:
    """start[i], start[i] + 1, ... count[i] of them, for every i, one after the other."""
    total = np.cumsum(count)
    offsets = np.arange(int(total[-1]) if len(total) else 0) - np.repeat(total - count, count)
    return np.asarray(np.repeat(start, count) + offsets, np.int64)


def unavoidable_rejections(
    steps: Steps, tokens: Sequence[Tokens], vocabulary: DraftVocabulary
) -> Bools:
    """(D,) rejected steps whose target token cannot be drafted."""
    outside = np.zeros(len(steps.length), bool)
    for number, one in enumerate(tokens):
        mine = np.flatnonzero((steps.run == number) & steps.rejected)
        own = one.ids[steps.first_token[mine] + steps.n_shown[mine] - 1]
        outside[mine] = vocabulary.lacks(own)
    return outside


def _token_counts(of: Measured, vocabulary: DraftVocabulary) -> tuple[Ints, Ints]:
    """(C',) output tokens of each conversation, and those that cannot be drafted."""
    n = len(of.steps.conversations.ids)
    total, outside = np.zeros(n, np.int64), np.zeros(n, np.int64)
    _, codes = conversations_of(of.arm)
    for run, own, one in zip(of.arm.runs, codes, of.tokens, strict=True):
        of_request = own[run.columns.conversation]
        of_token = np.repeat(of_request, np.diff(one.start))
        kept = of_token >= 0
        total += np.bincount(of_token[kept], minlength=n)
        lacking = kept & vocabulary.lacks(one.ids)
        outside += np.bincount(of_token[lacking], minlength=n)
    return total, outside


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Under B weightings, per category: (B, G) each."""

    outside: Floats
    unavoidable: Floats
    al: Floats
    predicted: Floats


def _rows(
    of: Measured, vocabulary: DraftVocabulary
) -> tuple[tuple[CategoryCoverage, ...], CategoryCoverage]:
    steps, conversations = of.steps, of.steps.conversations
    n_tokens, n_outside = _token_counts(of, vocabulary)
    unavoidable = unavoidable_rejections(steps, of.tokens, vocabulary)
    one_group = np.zeros(len(steps.length), np.int64)
    measured = steps.counts(one_group, 1)
    predicted = _with_whole_vocabulary(steps, unavoidable).counts(one_group, 1)
    of_kind = [
        np.bincount(steps.conversation[kind], minlength=len(conversations.ids))
        for kind in (steps.rejected, unavoidable)
    ]
    columns = (n_tokens, n_outside, *of_kind, *measured, *predicted)

    def numbers(weights: Floats) -> _Numbers:
        tokens_, outside, rejected, unavoidable_, whole, cut, whole_p, cut_p = (
            by_category(one, conversations, weights) for one in columns
        )
        return _Numbers(
            _share(outside, tokens_),
            _share(unavoidable_, rejected),
            metrics.acceptance_length(whole, cut)[..., 0],
            metrics.acceptance_length(whole_p, cut_p)[..., 0],
        )

    once = numbers(np.ones((1, len(conversations.ids))))
    resampled = numbers(of.weights)
    k = steps.draft_length
    rows = []
    for g, name in enumerate(conversations.categories):
        members = conversations.category == g
        if members.any():
            rows.append(
                _row(
                    name,
                    (int(n_tokens[members].sum()), int(n_outside[members].sum())),
                    _pick(once, g),
                    _pick(resampled, g),
                    _degrees(conversations, members),
                    k,
                )
            )
    present = np.unique(conversations.category)
    overall = _row(
        "mean over categories",
        (int(n_tokens.sum()), int(n_outside.sum())),
        _mean(once, present),
        _mean(resampled, present),
        _degrees(conversations, np.ones(len(conversations.ids), bool)),
        k,
    )
    return tuple(rows), overall


def _with_whole_vocabulary(steps: Steps, unavoidable: Bools) -> Steps:
    """The steps as far as they tell of a drafter with the whole vocabulary.

    Unavoidable rejections are censored where they were rejected. Where the end of a request hides
    the target's token, a rejection may be of either kind; such steps are censored after the tokens
    they show, those that went on included, or only their successes would count.
    """
    return replace(
        steps,
        length=np.where(steps.hidden, steps.n_shown + 1, steps.length),
        censored=steps.censored | unavoidable | steps.hidden,
    )


def _share(part: Floats, whole: Floats) -> Floats:
    out: Floats = np.full(whole.shape, np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def _pick(numbers: _Numbers, g: int) -> _Numbers:
    return _Numbers(*(getattr(numbers, name)[:, g] for name in _Numbers.__slots__))


def _mean(numbers: _Numbers, present: Ints) -> _Numbers:
    """(B,): NaN if one category's number is."""
    return _Numbers(
        *(getattr(numbers, name)[:, present].mean(axis=1) for name in _Numbers.__slots__)
    )


def _degrees(conversations: Conversations, members: Bools) -> int:
    """0, and so no interval, where a category has a single conversation."""
    sizes = np.bincount(conversations.category[members])
    lone = (sizes > 0) & (sizes < stats.MIN_CONVERSATIONS)
    return 0 if lone.any() else conversations.degrees(members)


def _row(
    name: str,
    n_tokens: tuple[int, int],
    once: _Numbers,
    samples: _Numbers,
    degrees: int,
    k: int,
) -> CategoryCoverage:
    unknown = "a position was reached only by steps that tell nothing of it"
    none_rejected = "no draft token was rejected"

    def of(value: Floats, spread: Floats, why_not: str, lowest: float, highest: float) -> Figure:
        return figure(
            float(value[0]), spread, degrees, lowest=lowest, highest=highest, why_not=why_not
        )

    return CategoryCoverage(
        name,
        *n_tokens,
        of(once.outside, samples.outside, "no token was put out", 0, 1),
        of(once.unavoidable, samples.unavoidable, none_rejected, 0, 1),
        of(once.al, samples.al, unknown, 1, k + 1),
        of(once.predicted, samples.predicted, unknown, 1, k + 1),
        of(once.predicted - once.al, samples.predicted - samples.al, unknown, -k, k),
    )
