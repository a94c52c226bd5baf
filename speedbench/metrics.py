"""Columns -> numbers. Pure numpy functions; every definition is DESIGN.md section 2's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speedbench.columns import Bools, Columns, Floats, Ints

PREFILL, VERIFY, PLAIN, DECODE, MERGED = range(5)
"""Kinds of step; DECODE is verify or plain where the engine does not tell which."""

AL_NAMES = ("al", "al_step", "al_conversation", "al_drafted", "al_specdec_bench")
"""Acceptance lengths computed from steps; `al` is the primary one."""


# ---------------------------------------------------------------- steps


def step_kinds(columns: Columns, draft_length: int) -> Ints:
    """(S,) the kind of every step.

    An event that merges engine steps, or may, or that shows or claims more than a step can hold
    (K+1 tokens), is MERGED: it never enters a histogram as one step.
    """
    kind = np.full(len(columns.step), DECODE, np.int8)
    kind[columns.drafted > 0] = VERIFY
    kind[columns.drafted == 0] = PLAIN
    kind[columns.step == 0] = PREFILL
    too_long = (columns.n_tokens > draft_length + 1) | (columns.accepted > draft_length)
    kind[(columns.engine_steps != 1) | too_long] = MERGED
    return kind


def step_lengths(columns: Columns, kinds: Ints, draft_length: int) -> tuple[Ints, Bools]:
    """(S,) length of each step, and whether it is right-censored there.

    A verify step whose accepted count the engine tells has length accepted + 1, whatever the
    end of the request cut from it. Otherwise the length is what it shows, and a request's last
    step is censored if it shows fewer tokens than were drafted plus one (K + 1 where the engine
    does not tell how many were): the engine may have accepted more.
    """
    told = (kinds == VERIFY) & (columns.accepted >= 0)
    length = np.where(told, columns.accepted + 1, columns.n_tokens)
    could_be_cut = ((kinds == VERIFY) | (kinds == DECODE)) & ~told
    return length, could_be_cut & columns.is_last() & (room_left(columns, draft_length) > 0)


def drafts_cut_short(columns: Columns, draft_length: int, max_tokens: int, lookup: bool) -> Bools:
    """(S,) last steps whose draft was made shorter because the request was about to end.

    For engines that draft no more than a request may still show, or up to a stop token: the
    drafter was right as far as it was asked, and what it would have said further is not known.
    With lookup (n-gram drafters, which draft less for other reasons) only the plain step for the
    last token before `max_tokens` is such a step.
    """
    told = (columns.drafted >= 0) & (columns.drafted < draft_length)
    right: Bools = (
        told & (columns.accepted == columns.drafted) & (columns.step > 0) & columns.is_last()
    )
    if not lookup:
        return right
    total = np.bincount(columns.request, columns.n_tokens, columns.n_requests)
    at_limit = total[columns.request] == max_tokens
    right &= (columns.drafted == 0) & (columns.n_tokens == 1) & at_limit
    return right


def room_left(columns: Columns, draft_length: int) -> Ints:
    """(S,) how many more tokens each step could have held, by what was drafted (K if not told)."""
    drafted = np.where(columns.drafted > 0, columns.drafted, draft_length)
    return drafted + 1 - columns.n_tokens


def classified(
    columns: Columns, draft_length: int, cut_short: Bools | None = None
) -> tuple[Ints, Ints, Bools]:
    """(S,) kind and length of every step, and whether it is right-censored at that length.

    cut_short: (S,) steps of `drafts_cut_short`, right-censored at what they show.
    """
    kinds = step_kinds(columns, draft_length)
    length, censored = step_lengths(columns, kinds, draft_length)
    if cut_short is not None:
        length = np.where(cut_short, columns.n_tokens, length)
        censored = censored | cut_short
    return kinds, length, censored


def rejected(columns: Columns, kinds: Ints, length: Ints, censored: Bools, k: int) -> Bools:
    """(S,) steps that ended because a draft token was rejected: it was the length-th one.

    A step that accepted all it had drafted was not rejected; where the engine does not tell what
    it drafted, K tokens are taken for drafted.
    """
    drafted = np.where(columns.drafted >= 0, columns.drafted, k)
    checked = (kinds == VERIFY) | (kinds == DECODE)
    return np.asarray(checked & ~censored & (length <= drafted), bool)


def count_lengths(
    group: Ints, length: Ints, censored: Bools, n_groups: int, draft_length: int
) -> tuple[Ints, Ints]:
    """Steps by length, per group: (uncensored, censored), each (G, K+2); column n is length n.

    group, length, censored: (S',) of the steps to count.
    """
    width = draft_length + 2
    flat = (group * width + length) * 2 + censored
    both = np.bincount(flat, minlength=2 * n_groups * width).reshape(n_groups, width, 2)
    return both[..., 0], both[..., 1]


# ---------------------------------------------------------------- acceptance


def conditional_rates(whole: Floats | Ints, cut: Floats | Ints) -> Floats:
    """Conditional acceptance rates (..., K) by Kaplan-Meier from step counts (..., K+2).

    Of the r_k steps known to have reached position k (length >= k, or cut beyond k), d_k ended
    there: rate 1 - d_k / r_k; NaN where r_k is 0. (Kaplan & Meier 1958, JASA 53:457-481.)
    """
    survived = np.cumsum((whole + cut)[..., ::-1], axis=-1)[..., ::-1][..., 2:]
    # r_k - d_k is summed, not subtracted: with resampling weights it must still be exactly 0.
    return _ratio(survived, survived + whole[..., 1:-1])


def joint_rates(rates: Floats) -> Floats:
    """Running product (..., K) of conditional rates; once it is 0 it stays 0, known or not."""
    joint = np.empty_like(rates)
    product = np.ones(rates.shape[:-1])
    for k in range(rates.shape[-1]):
        product = np.where(product == 0, 0.0, product * rates[..., k])
        joint[..., k] = product
    return joint


def acceptance_length(whole: Floats | Ints, cut: Floats | Ints) -> Floats:
    """Acceptance length (...) from step counts (..., K+2): the sum of joint rates, k = 0..K.

    NaN where a rate that matters is unknown, or where no step was counted. Without censored
    steps this is the mean step length.
    """
    length = 1.0 + joint_rates(conditional_rates(whole, cut)).sum(axis=-1)
    any_step = (np.sum(whole, axis=-1) + np.sum(cut, axis=-1)) > 0
    return np.where(any_step, length, np.nan)


def published_rates(histogram: Ints) -> Floats:
    """(K,) conditional rates the way SPEED-Bench's console counts, from steps by length (K+2,).

    Every step as it looks, prefill and cut-off steps included: the ratio of the shares of steps
    that reach k+1 and k tokens. NaN where no step reaches k. (The shares are rounded before the
    ratio is, as theirs are: the same 16 digits.)
    """
    total = histogram.sum()
    share = np.cumsum(histogram[::-1])[::-1] / total if total else np.zeros(len(histogram))
    return _ratio(share[2:], share[1:-1])


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What each measured conversation (C',) contributes to the acceptance lengths.

    category     (C',) index into the run's categories
    whole, cut   (C', K+2) decode steps by length, uncensored and censored
    whole_verify, cut_verify  the same over verify steps alone
    whole_offered, cut_offered  the same again, where a verify step that accepted all it had
                 drafted, but had drafted fewer than K, is censored: no more was offered to it
    mean_uncut   (C',) mean length of uncensored decode steps, NaN without any
    mean_all     (C',) mean tokens of all events as they look, prefill and merged ones included
    n_verify, n_plain, n_decode  steps of each kind (n_decode: verify, plain and untold)
    is_whole     no decode step can be missing
    n_merged, n_events  events left out of every histogram, and all events
    as_published (K+2 or more,) every event as it looks, by tokens: prefill, cut and merged ones too
    n_cut_unknown  requests that are not in `as_published`: the end cut one of their steps, and it
                 is not known which of those that were told
    """

    n_categories: int
    category: Ints
    whole: Ints
    cut: Ints
    whole_verify: Ints
    cut_verify: Ints
    whole_offered: Ints
    cut_offered: Ints
    mean_uncut: Floats
    mean_all: Floats
    n_verify: int
    n_plain: int
    n_decode: int
    n_merged: int
    n_events: int
    as_published: Ints
    n_cut_unknown: int
    is_whole: bool = True

    @property
    def told_apart(self) -> bool:
        """The engine told of every decode step whether a draft was checked in it."""
        return self.n_verify + self.n_plain == self.n_decode


def acceptance(columns: Columns, draft_length: int, cut_short: Bools | None = None) -> Acceptance:
    """Count the steps of every conversation that did not fail.

    cut_short: (S,) steps of `drafts_cut_short`, right-censored at what they show.
    """
    kinds, length, censored = classified(columns, draft_length, cut_short)
    conversation = columns.conversation[columns.request]
    measured = ~columns.failed
    code = np.cumsum(measured) - 1  # conversation -> C'
    n = int(measured.sum())
    keep = measured[conversation]
    group = code[conversation]
    told = _told_counts(columns, measured, code, draft_length)
    # Steps that are told in total are counted there, not where they show.
    single = keep & ~told.of_step
    decode = single & (kinds != PREFILL) & (kinds != MERGED)
    verify = single & (kinds == VERIFY)

    exhausted = (columns.drafted < draft_length) & (length == columns.drafted + 1)

    def count(mask: Bools, ended: Bools = censored) -> tuple[Ints, Ints]:
        return count_lengths(group[mask], length[mask], ended[mask], n, draft_length)

    whole, cut = count(decode)
    whole_verify, cut_verify = count(verify)
    whole_offered, cut_offered = count(verify, censored | exhausted)
    whole, whole_verify = whole + told.whole, whole_verify + told.whole_verify
    whole_offered = whole_offered + told.whole_verify
    lengths = np.arange(draft_length + 2)
    # An event of unknown steps is none of them: a mean over such would be of chunks.
    unknown = np.bincount(group[single & (columns.engine_steps == 0)], minlength=n) > 0
    n_events = np.bincount(group[single], minlength=n) + told.n_events
    mean_all = _ratio(np.bincount(group[keep], columns.n_tokens[keep], n), n_events)
    n_told = int(told.whole.sum())
    n_told_verify = int(told.whole_verify.sum())
    return Acceptance(
        n_categories=len(columns.categories),
        category=columns.category[measured],
        whole=whole,
        cut=cut,
        whole_verify=whole_verify,
        cut_verify=cut_verify,
        whole_offered=whole_offered,
        cut_offered=cut_offered,
        mean_uncut=_ratio(whole @ lengths, whole.sum(axis=1)),
        mean_all=np.where(unknown, np.nan, mean_all),
        n_verify=int(verify.sum()) + n_told_verify,
        n_plain=int((single & (kinds == PLAIN)).sum()) + n_told - n_told_verify,
        n_decode=int(decode.sum()) + n_told,
        n_merged=int((single & (kinds == MERGED)).sum()),
        n_events=int(n_events.sum()),
        is_whole=columns.told is None or columns.told.is_whole,
        as_published=_added(
            np.bincount(columns.n_tokens[single], minlength=draft_length + 2), told.as_published
        ),
        n_cut_unknown=told.n_cut_unknown,
    )


def _added(longer: Ints, shorter: Ints) -> Ints:
    total: Ints = longer.copy()
    total[: len(shorter)] += shorter
    return total


@dataclass(frozen=True, slots=True)
class _ToldCounts:
    """Of `Columns.told`: which steps it stands for (S,), and their counts per conversation (C',).

    whole, whole_verify  (C', K+2) decode steps and verifications by length
    n_events      (C',) steps, the prefills included
    as_published  (K+2,) the same by length, of requests whose end cut none of them
    n_cut_unknown  the other requests
    """

    of_step: Bools
    whole: Ints
    whole_verify: Ints
    n_events: Ints
    as_published: Ints
    n_cut_unknown: int


def _told_counts(columns: Columns, measured: Bools, code: Ints, draft_length: int) -> _ToldCounts:
    n, width = int(measured.sum()), draft_length + 2
    whole_verify = np.zeros((n, width), np.int64)
    plain = np.zeros(n, np.int64)
    prefills = np.zeros(n, np.int64)
    of_step = np.zeros(len(columns.step), bool)
    published, n_cut_unknown = np.zeros(width, np.int64), 0
    told = columns.told
    if told is not None and told.lengths.shape[1] <= width:  # else K is not what it says
        keep = measured[columns.conversation[told.request]]
        group = code[columns.conversation[told.request[keep]]]
        lengths = np.zeros((len(group), width), np.int64)
        lengths[:, : told.lengths.shape[1]] = told.lengths[keep]
        np.add.at(whole_verify, group, lengths)
        np.add.at(plain, group, told.n_plain[keep])
        np.add.at(prefills, group, 1)
        of_step = np.isin(columns.request, told.request[keep])
        n_tokens = np.bincount(columns.request, columns.n_tokens, columns.n_requests)
        n_plain, shown = told.n_plain[keep], n_tokens[told.request[keep]]
        uncut = (1 + lengths @ np.arange(width) + n_plain == shown) & told.is_whole
        published = lengths[uncut].sum(axis=0)
        published[1] += n_plain[uncut].sum() + uncut.sum()
        n_cut_unknown = int((~uncut).sum())
    whole = whole_verify.copy()
    whole[:, 1] += plain
    return _ToldCounts(
        of_step,
        whole,
        whole_verify,
        whole.sum(axis=1) + prefills,
        published,
        n_cut_unknown,
    )


def _ratio(numerator: Floats | Ints, denominator: Floats | Ints) -> Floats:
    """Element-wise ratio, NaN where the denominator is 0."""
    out: Floats = np.full(np.shape(denominator), np.nan)
    np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)
    return out


@dataclass(frozen=True, slots=True)
class AcceptanceLengths:
    """One acceptance length under B weightings: per category (B, G) and overall (B,)."""

    per_category: Floats
    overall: Floats


def acceptance_lengths(counts: Acceptance, weights: Floats) -> dict[str, AcceptanceLengths]:
    """Every acceptance length of AL_NAMES, with each conversation counted `weights` (B, C') times.

    Weights of 1 give the estimates; resampled weights give their bootstrap distribution.
    """
    n, b = counts.n_categories, len(weights)
    width = counts.whole.shape[1]
    sums = {
        name: np.zeros((b, n, width)) for name in ("whole", "cut", "whole_verify", "cut_verify")
    }
    uncut, everything = np.full((b, n), np.nan), np.full((b, n), np.nan)
    for g in range(n):
        members = counts.category == g
        w = weights[:, members]
        for name, total in sums.items():
            total[:, g] = w @ getattr(counts, name)[members]
        uncut[:, g] = _weighted_mean(counts.mean_uncut[members], w)
        everything[:, g] = _weighted_mean(counts.mean_all[members], w)
    if not counts.is_whole:  # steps without a draft may be missing
        sums["whole"][:] = sums["cut"][:] = 0
        uncut[:] = everything[:] = np.nan
    by_category = acceptance_length(sums["whole"], sums["cut"])
    if not counts.told_apart:  # those told to be verify steps are not all of them
        sums["whole_verify"][:] = sums["cut_verify"][:] = 0
    drafted = acceptance_length(sums["whole_verify"], sums["cut_verify"])

    def pooled(whole: str, cut: str) -> Floats:
        return acceptance_length(sums[whole].sum(axis=1), sums[cut].sum(axis=1))

    def mean(values: Floats) -> Floats:
        # NaN if one category is: a mean over fewer categories would be another quantity.
        return values.mean(axis=1) if n else np.full(b, np.nan)

    return {
        "al": AcceptanceLengths(by_category, mean(by_category)),
        "al_step": AcceptanceLengths(by_category, pooled("whole", "cut")),
        "al_conversation": AcceptanceLengths(uncut, mean(uncut)),
        "al_drafted": AcceptanceLengths(drafted, pooled("whole_verify", "cut_verify")),
        "al_specdec_bench": AcceptanceLengths(
            everything,
            _weighted_mean(counts.mean_all, weights) if counts.is_whole else np.full(b, np.nan),
        ),
    }


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    """(B,) mean of the known `values` (N,) under weights (B, N); NaN without any."""
    known = ~np.isnan(values)
    return _ratio(weights[:, known] @ values[known], weights[:, known].sum(axis=1))


# ---------------------------------------------------------------- time


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds and rates. Of requests (R',) that ended well; of gaps (G,) between their steps.

    User TPS exists only for requests with more than one step; `step_time_s` leaves out the wait
    for the prefill, and gaps that end in a merged event.
    """

    ttft_s: Floats
    e2e_s: Floats
    user_tps: Floats
    step_time_s: Floats
    n_output_tokens: Ints


def timed(columns: Columns) -> Bools:
    """(R,) requests whose times can be right: none lies before the one before it, nor before the
    request was asked."""
    good = np.ones(columns.n_requests, bool)
    back = (np.diff(columns.time_ns) < 0) & (np.diff(columns.request) == 0)
    good[columns.request[1:][back]] = False
    first, _ = columns.first_and_last()
    request = columns.request[first]
    good[request[columns.time_ns[first] < columns.submitted_ns[request]]] = False
    return good


def timing(columns: Columns, draft_length: int) -> Timing:
    """Times of every finished request of conversations that did not fail; of none whose clock ran
    backwards."""
    first, last = columns.first_and_last()
    request = columns.request[first]
    good = columns.finished[request] & ~columns.failed[columns.conversation[request]]
    good &= timed(columns)[request]
    first, last, request = first[good], last[good], request[good]
    tokens_up_to = np.append(0, np.cumsum(columns.n_tokens))
    n_output = tokens_up_to[last + 1] - tokens_up_to[first]
    n_later = n_output - columns.n_tokens[first]
    decode_s = (columns.time_ns[last] - columns.time_ns[first]) / 1e9
    longer = decode_s > 0
    gap = np.diff(columns.time_ns)
    inside = np.diff(columns.request) == 0
    exact = step_kinds(columns, draft_length)[1:] != MERGED
    of_good = np.zeros(columns.n_requests, bool)
    of_good[request] = True
    wanted = of_good[columns.request[1:]] & inside & exact
    if columns.told is not None and not _stand_for_all(columns, wanted, of_good):
        wanted[:] = False
    submitted = columns.submitted_ns[request]
    return Timing(
        ttft_s=(columns.time_ns[first] - submitted) / 1e9,
        e2e_s=(columns.time_ns[last] - submitted) / 1e9,
        user_tps=n_later[longer] / decode_s[longer],
        step_time_s=gap[wanted] / 1e9,
        n_output_tokens=n_output,
    )


SINGLE = 0.9
"""So many steps of a served run must come singly, for the times between them to be its step
times: those that come together are not any."""


def _stand_for_all(columns: Columns, wanted: Bools, of_good: Bools) -> bool:
    """Whether the gaps (S-1,) are those of nearly all steps of requests `of_good` (R,)."""
    n_steps = _steps_after_first(columns)[of_good]
    return bool(wanted.sum() >= SINGLE * n_steps.sum()) if n_steps.min(initial=0) >= 0 else False


def _steps_after_first(columns: Columns) -> Ints:
    """(R,) decode steps of each request, those that were told in total too; -1 where not known."""
    n = columns.n_requests
    steps = np.bincount(columns.request[columns.step > 0], minlength=n)
    steps[columns.request[columns.engine_steps == 0]] = -1
    merged = columns.engine_steps > 1
    np.add.at(steps, columns.request[merged], columns.engine_steps[merged] - 1)
    if columns.told is not None:
        n_told = columns.told.lengths.sum(axis=1) + columns.told.n_plain
        steps[columns.told.request] = n_told if columns.told.is_whole else -1
    return steps


@dataclass(frozen=True, slots=True)
class ServedTiming:
    """Seconds. Of requests (R'',) whose steps are known, and that began with one token; of gaps
    (G,) between chunks, whatever these hold."""

    mean_step_s: Floats
    inter_chunk_s: Floats


def served_timing(columns: Columns) -> ServedTiming:
    """Of finished requests of conversations that did not fail."""
    first, last = columns.first_and_last()
    request = columns.request[first]
    good = columns.finished[request] & ~columns.failed[columns.conversation[request]]
    good &= timed(columns)[request]
    of_good = np.zeros(columns.n_requests, bool)
    of_good[request[good]] = True
    steps = _steps_after_first(columns)[request]
    known = good & (steps > 0) & (columns.n_tokens[first] == 1)
    decode_s = (columns.time_ns[last] - columns.time_ns[first]) / 1e9
    inside = (np.diff(columns.request) == 0) & of_good[columns.request[1:]]
    return ServedTiming(
        mean_step_s=decode_s[known] / steps[known],
        inter_chunk_s=np.diff(columns.time_ns)[inside] / 1e9,
    )


def conversation_user_tps(columns: Columns) -> Floats:
    """(C,) tokens after the first step / time after it, summed over a conversation's turns.

    NaN for conversations that failed, for those that spent no time after their first steps, and
    for those whose clock ran backwards.
    """
    n = len(columns.conversation_ids)
    first, last = columns.first_and_last()
    conversation = columns.conversation[columns.request]
    later = columns.step > 0
    tokens = np.bincount(conversation[later], columns.n_tokens[later], n).astype(float)
    decode_ns = np.bincount(conversation[first], columns.time_ns[last] - columns.time_ns[first], n)
    tokens[columns.failed] = np.nan
    tokens[columns.conversation[~timed(columns)]] = np.nan
    return _ratio(tokens, decode_ns / 1e9)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens (failed requests' included) seen in a span of time of one session."""

    n_tokens: int
    duration_s: float

    @property
    def output_tps(self) -> float:
        return self.n_tokens / self.duration_s


@dataclass(frozen=True, slots=True)
class Span:
    """When one replica measured, in its own clock; `zero_ns` is a moment that all share.

    Times of several replicas compare once each has its `zero_ns` taken off; replicas on one clock
    all have the same (0, say).
    """

    replica: int
    started_ns: int
    ended_ns: int
    zero_ns: int = 0


def whole_window(columns: Columns, session: int, spans: Sequence[Span]) -> Window:
    """All tokens of a session, from its replicas' first start to their last end."""
    mine = columns.session[columns.request] == session
    started_ns = min(span.started_ns - span.zero_ns for span in spans)
    ended_ns = max(span.ended_ns - span.zero_ns for span in spans)
    return Window(int(columns.n_tokens[mine].sum()), (ended_ns - started_ns) / 1e9)


def steady_window(
    columns: Columns, session: int, spans: Sequence[Span], concurrency: int
) -> Window | None:
    """Tokens from the moment all slots of all replicas are filled until the first replica's queue
    is empty; None without such.

    A replica's slots are filled when its concurrency-th conversation is submitted; its queue is
    empty when its last one is.
    """
    filled, empty = [], []
    for span in spans:
        starts = np.sort(
            columns.submitted_ns[
                (columns.session == session)
                & (columns.replica == span.replica)
                & (columns.turn == 0)
                & (columns.submitted_ns >= 0)
            ]
        )
        if len(starts) <= concurrency:
            return None
        filled.append(int(starts[concurrency - 1]) - span.zero_ns)
        empty.append(int(starts[-1]) - span.zero_ns)
    filled_ns, empty_ns = max(filled), min(empty)
    if empty_ns <= filled_ns:
        return None
    n_tokens = 0
    for span in spans:
        inside = (
            (columns.session[columns.request] == session)
            & (columns.replica[columns.request] == span.replica)
            & (columns.time_ns > filled_ns + span.zero_ns)
            & (columns.time_ns <= empty_ns + span.zero_ns)
        )
        n_tokens += int(columns.n_tokens[inside].sum())
    return Window(n_tokens, (empty_ns - filled_ns) / 1e9)


QUANTILES = (25, 50, 75, 90, 95, 99)


def describe(values: Floats | Ints) -> dict[str, float | None] | None:
    """n, min, mean, std (n - 1), max and percentiles (linear interpolation); None if empty.

    One value alone has no std: None.
    """
    if len(values) == 0:
        return None
    return {
        "n": float(len(values)),
        "min": float(np.min(values)),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        **{
            f"p{q}": float(v)
            for q, v in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)
        },
        "max": float(np.max(values)),
    }
