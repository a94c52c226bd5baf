"""Losslessness: whether an arm still gives the baseline's answers, told from stored outputs.

At temperature 0 outputs are compared token by token, and what differs is held against what differs
between two runs of the baseline: the noise floor, for engines do not repeat themselves exactly when
requests share a batch. At temperature > 0 no output repeats, and a two-sample test stands instead.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from speedbench.columns import Floats, Ints
from speedbench.permutation import Int32s, PValue, holm, swap_test, token_distances
from speedbench.report.summary import Figure
from speedbench.stats import LEVEL
from speedbench.store import FAILED, Run

CLOSE = 0.05
"""Share of requests by which an arm may diverge more than the baseline from itself, and still be
called no worse: five points in a hundred, told in the verdict."""

SIGNIFICANT = 0.05
MAX_CURVE = 200
"""Points of a curve of first divergences at most; between them it is thinned evenly."""

ONE_BASELINE = "one baseline run only: measure it twice (--repeat 2)"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request was answered: a hash of its token IDs, and the IDs where they were kept."""

    category: str
    prompt_sha256: str
    n_tokens: int
    sha256: str
    token_ids: Int32s | None = None


Answers = Mapping[tuple[str, int], Answer]
"""(conversation id, turn) -> the answer, of every request of a run that did not fail."""


def answers(run: Run) -> Answers:
    """What a stored run answered."""
    turns = run.turns.take(run.used)
    lists = turns["output_token_ids"].combine_chunks()
    ids = np.asarray(lists.flatten().to_numpy(), np.int32)
    ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy())
    names = ("conversation_id", "turn", "category", "prompt_sha256", "finish_reason")
    found: dict[tuple[str, int], Answer] = {}
    begin = 0
    for name, turn, category, prompt, reason, end in zip(
        *(turns[column].to_pylist() for column in names), ends, strict=True
    ):
        # A server that tells counts only leaves UNKNOWN for each token: no answer to compare.
        if reason not in FAILED and (ids[begin:end] >= 0).all():
            found[name, turn] = answer(category, prompt, ids[begin:end])
        begin = end
    return found


def answer(category: str, prompt_sha256: str, token_ids: Int32s) -> Answer:
    """One answer with its hash: sha256 over the IDs as 32-bit little-endian integers."""
    digest = hashlib.sha256(token_ids.astype("<i4").tobytes()).hexdigest()
    return Answer(category, prompt_sha256, len(token_ids), digest, token_ids)


# ---------------------------------------------------------------- what is found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the numbers say, in one sentence.

    same     every output is the baseline's
    no more  no more divergence than between two baseline runs
    more     diverges more than the baseline from itself, or (sampled) in distribution
    unseen   a two-sample test found no difference, which proves none
    unknown  cannot be told
    """

    kind: Literal["same", "no more", "more", "unseen", "unknown"]
    sentence: str


@dataclass(frozen=True, slots=True)
class Identical:
    """Outputs that are the same to the last token, of one category or over all.

    A comparison is one request in one run of each side: R x S comparisons of a request that the
    baseline was asked in R runs and the arm in S, R (R - 1) / 2 for the floor.

    n_compared   comparisons where both were asked the very same prompt
    n_identical  those that came to the same output
    n_left_out   comparisons of other prompts: an earlier turn's replies had differed
    share        share identical with the arm; over all: the mean over categories
    floor        the same between two baseline runs
    difference   share - floor
    """

    name: str
    n_compared: int
    n_identical: int
    n_left_out: int
    share: Figure
    floor: Figure
    difference: Figure


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where outputs first differ: the number of the token, the first being 1; where one output ends
    and the other goes on, the token after its end.

    quantiles  25, 50, 75 -> token number, over the outputs that differ; empty if none does
    at, share  after `at` tokens, `share` of all comparisons were still identical (a falling step)
    why_not    why nothing is known
    """

    n_compared: int
    n_diverged: int
    first: int | None
    quantiles: Mapping[int, float]
    at: tuple[int, ...]
    share: tuple[float, ...]
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Greedy:
    """Losslessness at temperature 0. `n_missing`: requests answered on one side only."""

    overall: Identical
    by_category: tuple[Identical, ...]
    positions: Divergence
    floor_positions: Divergence
    n_missing: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class TwoSample:
    """Two samples of answers held together, of one category or over all.

    n_conversations  answered on both sides after the same first prompt
    n_unchanged      of these, answered with the same tokens on both sides
    tokens           do tokens occur as often?  lengths: are the answers as long?
    """

    name: str
    n_conversations: int
    n_unchanged: int
    tokens: PValue
    lengths: PValue


@dataclass(frozen=True, slots=True)
class Sampled:
    """Losslessness at temperature > 0: the arm's answers against the baseline's.

    by_category  exploratory; Holm-adjusted over the categories
    check        the same test between two halves of the baseline's runs, which must find nothing
    n_left_out   conversations that were not answered in every run after the same first prompt
    n_rounds     runs of each side that were used
    """

    overall: TwoSample
    by_category: tuple[TwoSample, ...]
    check: TwoSample | None
    why_no_check: str
    n_left_out: int
    n_rounds: int
    verdict: Verdict


Losslessness = Greedy | Sampled


def losslessness(
    base: Sequence[Answers], arm: Sequence[Answers], temperature: float
) -> Losslessness:
    """Hold the runs of an arm against those of the base. temperature: the higher of both."""
    return sampled(base, arm) if temperature > 0 else greedy(base, arm)


# ---------------------------------------------------------------- temperature 0


def greedy(base: Sequence[Answers], arm: Sequence[Answers]) -> Greedy:
    """Every run of the base against every run of the arm; the floor: base against base."""
    names = sorted({one.category for run in (*base, *arm) for one in run.values()})
    conversations = _conversations([*base, *arm])
    of_arm = _Tally.of(itertools.product(base, arm), conversations)
    of_base = _Tally.of(itertools.combinations(base, 2), conversations)
    category = np.array([names.index(group) for group in conversations.values()], np.int64)
    why_floor = "" if len(base) > 1 else ONE_BASELINE
    rows = [
        _identical(name, [np.flatnonzero(category == g)], [name], of_arm, of_base, why_floor)
        for g, name in enumerate(names)
    ]
    groups = [np.flatnonzero(category == g) for g in range(len(names))]
    overall = _identical("overall", groups, names, of_arm, of_base, why_floor)
    return Greedy(
        overall=overall,
        by_category=tuple(rows),
        positions=of_arm.divergence(""),
        floor_positions=of_base.divergence(why_floor),
        n_missing=of_arm.n_missing,
        verdict=_verdict(overall),
    )


def _conversations(runs: Sequence[Answers]) -> dict[str, str]:
    """Conversation id -> category, in a fixed order."""
    found = {name: one.category for run in runs for (name, _), one in run.items()}
    return dict(sorted(found.items()))


class _Tally:
    """Comparisons counted by conversation (C,): all, the identical, those of other prompts."""

    def __init__(self, n_conversations: int) -> None:
        self.n = np.zeros(n_conversations)
        self.n_same = np.zeros(n_conversations)
        self.n_left_out = np.zeros(n_conversations)
        self.n_missing = 0
        self.positions: list[int] = []
        self.hashes_only = False

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[Answers, Answers]], conversations: Mapping[str, str]
    ) -> _Tally:
        place = {name: i for i, name in enumerate(conversations)}
        tally = cls(len(place))
        for mine, theirs in pairs:
            tally.n_missing += len(mine.keys() ^ theirs.keys())
            for key in mine.keys() & theirs.keys():
                tally._count(place[key[0]], mine[key], theirs[key])
        return tally

    def _count(self, conversation: int, mine: Answer, theirs: Answer) -> None:
        if mine.prompt_sha256 != theirs.prompt_sha256:
            self.n_left_out[conversation] += 1
            return
        self.n[conversation] += 1
        if mine.sha256 == theirs.sha256:
            self.n_same[conversation] += 1
        elif mine.token_ids is None or theirs.token_ids is None:
            self.hashes_only = True
        else:
            self.positions.append(first_difference(mine.token_ids, theirs.token_ids))

    def divergence(self, why_not: str) -> Divergence:
        n = int(self.n.sum())
        n_diverged = n - int(self.n_same.sum())
        if self.hashes_only:
            why_not = "of the pinned baseline only hashes of the outputs were kept"
        if why_not:
            return Divergence(n, n_diverged, None, {}, (), (), why_not)
        at, counts = np.unique(np.array(self.positions, np.int64), return_counts=True)
        share = 1 - np.cumsum(counts) / max(n, 1)
        keep = _thinned(len(at))
        quantiles = np.percentile(self.positions, (25, 50, 75)) if self.positions else ()
        return Divergence(
            n,
            n_diverged,
            min(self.positions, default=None),
            dict(zip((25, 50, 75), map(float, quantiles), strict=False)),
            tuple(int(i) for i in at[keep]),
            tuple(float(s) for s in share[keep]),
        )


def _thinned(n: int) -> Ints:
    """At most MAX_CURVE of n places, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, MAX_CURVE)).astype(np.int64))


def first_difference(mine: Int32s, theirs: Int32s) -> int:
    """Number of the first token (from 1) in which two outputs differ; they must differ."""
    n = min(len(mine), len(theirs))
    unlike = np.flatnonzero(mine[:n] != theirs[:n])
    return int(unlike[0]) + 1 if len(unlike) else n + 1


def _identical(
    name: str,
    groups: Sequence[Ints],
    names: Sequence[str],
    of_arm: _Tally,
    of_base: _Tally,
    why_floor: str,
) -> Identical:
    """Of one category, or over several: places (C,) of each category's conversations."""
    everyone = np.concatenate(groups) if groups else np.zeros(0, np.int64)
    mine = _Share.of(groups, names, of_arm)
    floor = _Share.without(why_floor) if why_floor else _Share.of(groups, names, of_base)
    return Identical(
        name,
        int(of_arm.n[everyone].sum()),
        int(of_arm.n_same[everyone].sum()),
        int(of_arm.n_left_out[everyone].sum()),
        mine.figure(),
        floor.figure(),
        _difference(mine, floor),
    )


def _verdict(overall: Identical) -> Verdict:
    share, floor, difference = overall.share, overall.floor, overall.difference
    if share.value is None:
        return Verdict("unknown", f"Cannot be told: {share.why_not}.")
    if overall.n_identical == overall.n_compared:
        return Verdict(
            "same",
            f"All {overall.n_compared} outputs that were compared are the baseline's, to the last "
            "token: no more divergence than between two baseline runs.",
        )
    if floor.value is None:
        return Verdict(
            "unknown",
            f"Cannot be told: {_percent(1 - share.value)} of the outputs differ from the "
            f"baseline's, and there is no noise floor to hold that against ({floor.why_not}).",
        )
    figures = f"{_percent(1 - share.value)} against {_percent(1 - floor.value)}"
    if difference.interval is None:
        return Verdict("unknown", f"Cannot be told ({figures}): {difference.why_not}.")
    low, high = difference.interval
    if high < 0:
        return Verdict("more", f"Diverges more than the baseline from itself ({figures}).")
    if low >= -CLOSE:
        return Verdict(
            "no more",
            f"No more divergence than between two baseline runs ({figures}; at most "
            f"{100 * max(0, -low):.1f} points more, within the {100 * CLOSE:g} that are let pass).",
        )
    return Verdict(
        "unknown",
        f"Cannot be told: {figures} differ, and the interval of the difference reaches from "
        f"{-100 * high:+.1f} to {-100 * low:+.1f} points; measure more rows or more repeats.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---------------------------------------------------------------- intervals of shares


@dataclass(frozen=True, slots=True)
class _Stratum:
    """The share of one category: of `n` comparisons in so many conversations, and its variance.

    residuals  of each of its conversations: what it adds to the estimate's error
    certain    all comparisons came out alike, so that they show no variance of their own
    """

    share: float
    n: float
    n_conversations: int
    variance: float
    residuals: Floats
    one_each: bool
    certain: bool

    @classmethod
    def of(cls, n: Floats, same: Floats) -> _Stratum:
        """From comparisons, and identical ones, of each conversation (C,)."""
        clusters, total = len(n), float(n.sum())
        share = float(same.sum()) / total
        error = (same - share * n) / total * np.sqrt(clusters / max(clusters - 1, 1))
        one_each, certain = bool((n == 1).all()), share in (0, 1)
        shrunk = (share * clusters + 0.5) / (clusters + 1) if certain else share
        binomial = shrunk * (1 - shrunk) / clusters
        variance = binomial if certain or one_each else float(error @ error)
        return cls(share, total, clusters, variance, error, one_each, certain)


@dataclass(frozen=True, slots=True)
class _Share:
    """A mean of shares, and how many independent requests would know it as well (0: no interval).

    residuals  (C,) of every conversation, by which two shares of the same ones are correlated
    """

    value: float
    n_effective: float
    residuals: Floats
    why_not: str = ""

    @classmethod
    def without(cls, why_not: str) -> _Share:
        return cls(float("nan"), 0, np.zeros(0), why_not)

    @classmethod
    def of(cls, groups: Sequence[Ints], names: Sequence[str], tally: _Tally) -> _Share:
        """Mean over categories of the shares identical.

        Requests of one conversation, and one request in several runs, are no independent trials:
        the variance is that of a ratio of conversation totals (linearized), and the number of
        independent requests that would have the same variance takes their place in Wilson's
        interval (Korn & Graubard 1998, Survey Methodology 24:193-201). Where every conversation has
        one comparison that is Wilson's interval itself. A percentile bootstrap is not used: where
        all outputs are identical it has no width, however few they are.
        """
        residuals = np.zeros(len(tally.n))
        strata: list[_Stratum] = []
        for places, name in zip(groups, names, strict=True):
            members = places[tally.n[places] > 0]
            if not len(members):
                return cls.without(f"category {name}: no request was asked alike on both sides")
            one = _Stratum.of(tally.n[members], tally.n_same[members])
            residuals[members] = one.residuals / len(groups)
            strata.append(one)
        if not strata:
            return cls.without("no request was answered")
        mean = float(np.mean([one.share for one in strata]))
        return cls(mean, _n_effective(strata, mean), residuals, "there is one conversation only")

    def figure(self) -> Figure:
        if np.isnan(self.value):
            return Figure(None, why_not=self.why_not)
        if not self.n_effective:
            return Figure(self.value, why_not=self.why_not)
        return Figure(self.value, wilson(self.value, self.n_effective))


def _n_effective(strata: Sequence[_Stratum], mean: float) -> float:
    """Independent requests that would know the mean of the strata's shares as well as they do."""
    from scipy.special import ndtri, stdtrit

    one_each = all(one.one_each for one in strata)
    degrees = sum(one.n_conversations - 1 for one in strata)
    if degrees < 1 and not one_each:
        return 0.0
    most = len(strata) ** 2 / sum(
        1 / (one.n_conversations if one.certain else one.n) for one in strata
    )
    variance = sum(one.variance for one in strata) / len(strata) ** 2
    if mean in (0, 1) or variance == 0:
        return most
    found = min(mean * (1 - mean) / variance, most)
    if one_each:
        return found
    tail = (1 + LEVEL) / 2  # the design effect is itself estimated, from few conversations badly
    return float(found * (ndtri(tail) / stdtrit(degrees, tail)) ** 2)


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a share seen in n independent trials (1927, JASA 22:209-212)."""
    from scipy.special import ndtri

    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Rounding must not leave the share itself, or 0 or 1, outside.
    return float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))


def _difference(mine: _Share, floor: _Share) -> Figure:
    """share - floor with its interval, from both intervals and the correlation of the two.

    Each bound is as far from the difference as the bounds of both shares are, added in squares less
    their correlation (Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10: a positive
    correlation is corrected for continuity; Zou & Donner 2008, ibid. 27:1693-1702, for any pair of
    intervals).
    """
    if np.isnan(mine.value) or np.isnan(floor.value):
        return Figure(None, why_not=mine.why_not if np.isnan(mine.value) else floor.why_not)
    value = mine.value - floor.value
    if not (mine.n_effective and floor.n_effective):
        return Figure(value, why_not=mine.why_not or floor.why_not)
    together = float(mine.residuals @ floor.residuals)
    apart = np.sqrt((mine.residuals @ mine.residuals) * (floor.residuals @ floor.residuals))
    r = together / float(apart) if apart > 0 else 0.0
    if r > 0:
        trials = min(mine.n_effective, floor.n_effective)
        spread = np.prod([one.value * (1 - one.value) for one in (mine, floor)])
        r = max(0.0, r - 1 / (2 * trials * float(np.sqrt(spread)))) if spread > 0 else 0.0
    (low_a, high_a), (low_b, high_b) = (wilson(one.value, one.n_effective) for one in (mine, floor))

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(0.0, a * a - 2 * r * a * b + b * b)))

    down = reach(mine.value - low_a, high_b - floor.value)
    up = reach(high_a - mine.value, floor.value - low_b)
    return Figure(value, (max(-1.0, value - down), min(1.0, value + up)))


# ---------------------------------------------------------------- temperature > 0


def sampled(base: Sequence[Answers], arm: Sequence[Answers]) -> Sampled:
    """As many runs of each side as both have; the check: the baseline's own, in two halves."""
    n = min(len(base), len(arm))
    overall, rows, n_left_out = _two_sample(base[:n], arm[:n])
    half = len(base) // 2
    check = None
    if half:
        check, _, _ = _two_sample(base[0 : 2 * half : 2], base[1 : 2 * half : 2])
    return Sampled(
        overall,
        rows,
        check,
        "" if check else ONE_BASELINE,
        n_left_out,
        n,
        _sampled_verdict(overall, check),
    )


def _two_sample(
    base: Sequence[Answers], arm: Sequence[Answers]
) -> tuple[TwoSample, tuple[TwoSample, ...], int]:
    """Overall, per category, and how many conversations are left out."""
    samples, n_left_out = _paired_samples(base, arm)
    overall = _tested("overall", samples)
    names = sorted({sample.category for sample in samples})
    rows = [_tested(name, [s for s in samples if s.category == name]) for name in names]
    tokens = holm([row.tokens for row in rows])
    lengths = holm([row.lengths for row in rows])
    both = holm([overall.tokens, overall.lengths])
    return (
        replace(overall, tokens=both[0], lengths=both[1]),
        tuple(
            replace(row, tokens=t, lengths=n)
            for row, t, n in zip(rows, tokens, lengths, strict=True)
        ),
        n_left_out,
    )


class _Sample(NamedTuple):
    """One conversation: its output tokens on each side, all turns and repeats together.

    tokens is None where only hashes were kept; hashes tell whether both sides answered the same.
    """

    category: str
    lengths: tuple[int, int]
    unchanged: bool
    tokens: tuple[Int32s, Int32s] | None


def _paired_samples(base: Sequence[Answers], arm: Sequence[Answers]) -> tuple[list[_Sample], int]:
    """Conversations that every run answered, in as many turns, after the same first prompt.

    Later prompts may differ where they hold earlier replies: they are part of what was answered.
    """
    runs = [_by_conversation(run) for run in (*base, *arm)]
    names = sorted(set().union(*runs))
    samples = []
    for name in names:
        found = [run.get(name, []) for run in runs]
        first = {turns[0].prompt_sha256 for turns in found if turns}
        if len({len(turns) for turns in found}) > 1 or len(first) > 1:
            continue
        sides = (
            [one for turns in found[: len(base)] for one in turns],
            [one for turns in found[len(base) :] for one in turns],
        )
        samples.append(
            _Sample(
                found[0][0].category,
                (sum(a.n_tokens for a in sides[0]), sum(a.n_tokens for a in sides[1])),
                [a.sha256 for a in sides[0]] == [a.sha256 for a in sides[1]],
                _joined(sides),
            )
        )
    return samples, len(names) - len(samples)


def _by_conversation(run: Answers) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for name, turn in sorted(run):
        found.setdefault(name, []).append(run[name, turn])
    return found


def _joined(sides: tuple[list[Answer], list[Answer]]) -> tuple[Int32s, Int32s] | None:
    kept = [[a.token_ids for a in side if a.token_ids is not None] for side in sides]
    if any(len(ids) < len(side) for ids, side in zip(kept, sides, strict=True)):
        return None
    return np.concatenate(kept[0]), np.concatenate(kept[1])


def _tested(name: str, samples: Sequence[_Sample]) -> TwoSample:
    n_unchanged = sum(sample.unchanged for sample in samples)
    pairs = [sample.tokens for sample in samples if sample.tokens is not None]
    lengths = np.array([s.lengths for s in samples], float).reshape(-1, 2)
    if len(samples) < 2:
        few = PValue(None, None, 0, False, "fewer than two conversations")
        return TwoSample(name, len(samples), n_unchanged, few, few)
    tokens = (
        swap_test(token_distances(pairs))
        if len(pairs) == len(samples)
        else PValue(None, None, 0, False, "of the pinned baseline only hashes were kept")
    )
    gap = lengths[:, 1] - lengths[:, 0]
    return TwoSample(name, len(samples), n_unchanged, tokens, swap_test(gap))


def rejects(test: TwoSample) -> bool:
    """Whether either of its two tests finds a difference, both taken together."""
    found = [one.adjusted for one in (test.tokens, test.lengths) if one.adjusted is not None]
    return any(p < SIGNIFICANT for p in found)


def _sampled_verdict(overall: TwoSample, check: TwoSample | None) -> Verdict:
    told = [one for one in (overall.tokens, overall.lengths) if one.adjusted is not None]
    if not told:
        return Verdict("unknown", f"Cannot be told: {overall.tokens.why_not}.")
    p = ", ".join(
        f"{what} p = {one.adjusted:.4f}"
        for what, one in (("tokens", overall.tokens), ("lengths", overall.lengths))
        if one.adjusted is not None
    )
    if not rejects(overall):
        return Verdict(
            "unseen",
            f"No difference from the baseline's answers was found ({p}), which does not prove that "
            "there is none.",
        )
    if check is not None and rejects(check):
        return Verdict(
            "unknown",
            f"Cannot be told: the answers differ ({p}), but so do those of two baseline runs, so "
            "the runs differ in something beside the arm.",
        )
    return Verdict("more", f"The answers are not distributed as the baseline's ({p}).")
