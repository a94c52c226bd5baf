"""Whether an engine's recorded steps are the known answer, and if not, what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from speedbench.calibration.closed_form import Case, ExpectedStep, KnownAnswer
from speedbench.types import UNKNOWN, RoutedExperts

Fault = Literal[
    "merged events",
    "prefill counted",
    "final step counted",
    "off-by-one K",
    "swapped drafter",
    "nothing accepted",
    "wrong tokens",
    "missing requests",
    "steps differ",
    "acceptance rate",
    "too few steps",
    "wrong experts",
    "wrong end",
    "counters differ",
]

N_EXACT_TRIALS = 2000
"""Up to so many draws the sum's distribution is computed exactly, beyond it is taken as normal."""


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One request as the store holds it: its tokens, and one entry per recorded step.

    The first step is the prefill. `accepted` and `drafted` are UNKNOWN where not told;
    `engine_steps` is 1 where the event is exactly one engine step, 0 where the engine cannot say.
    `finish_reason` is empty where it is not looked at.
    """

    conversation_id: str
    turn: int
    category: str
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    n_tokens: Sequence[int]
    accepted: Sequence[int]
    drafted: Sequence[int]
    engine_steps: Sequence[int]
    finish_reason: str = ""

    @property
    def name(self) -> str:
        return f"request {self.conversation_id} turn {self.turn}"


@dataclass(frozen=True, slots=True)
class PositionCheck:
    """Draft position k (from 1): trials, acceptances, and the interval they had to fall in."""

    position: int
    n_trials: int
    n_accepted: int
    expected: float
    low: float
    high: float

    @property
    def ok(self) -> bool:
        return self.low <= self.n_accepted <= self.high


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one comparison; `sentence` says it in words.

    kind: "exact": every step is the computed one; "interval": acceptances are as likely as
    computed; "consistent": tokens and counts agree with each other, acceptance is not known.
    The acceptance lengths, per category, are over decode steps; where the engine tells no
    acceptance counts, without final steps shorter than K + 1 (on both sides).
    """

    ok: bool
    n_requests: int
    n_steps: int
    sentence: str
    fault: Fault | None = None
    expected_al: Mapping[str, float] = field(default_factory=dict)
    measured_al: Mapping[str, float] = field(default_factory=dict)
    positions: tuple[PositionCheck, ...] = ()
    kind: Literal["exact", "interval", "consistent"] = "exact"


@dataclass(frozen=True, slots=True)
class _Pairing:
    """A request beside the steps it should have had."""

    request: ObservedRequest
    steps: Sequence[ExpectedStep]
    unordered: bool = False

    @property
    def same_lengths(self) -> bool:
        return list(self.request.n_tokens) == [len(step.token_ids) for step in self.steps]

    @property
    def same_output(self) -> bool:
        return list(self.request.output_ids) == _output(self.steps)


def judge_greedy(
    observed: Sequence[ObservedRequest],
    known: KnownAnswer,
    case: Case,
    expected_requests: Collection[tuple[str, int]] | None = None,
    steps: Sequence[Sequence[ExpectedStep]] | None = None,
) -> Verdict:
    """Every step of every request must be the known one: length, tokens, and counts where told.

    Of consecutive one-token steps an engine may tell how many were drafted and not which; the
    sentence then says for how many requests that was so. `expected_requests` names the
    (conversation, turn) pairs that were asked; None: those observed. `steps` are those of each
    request where they do not follow from its prompt alone.
    """
    pairings = (
        _pair(observed, known, case)
        if steps is None
        else [_in_order(request, own) for request, own in zip(observed, steps, strict=True)]
    )
    wrong = [(pairing, text) for pairing in pairings if (text := _mismatch(pairing)) is not None]
    gaps = _gaps(observed, expected_requests)
    n_steps = sum(len(request.n_tokens) for request in observed)
    expected, measured = _acceptance_lengths(pairings, case)
    fault: Fault | None = None
    if wrong:
        fault, diagnosis = _diagnose(pairings, [pairing for pairing, _ in wrong], known, case)
        sentence = f"{len(wrong)} of {len(observed)} requests differ; first: {wrong[0][1]}. "
        sentence += diagnosis + (f" Besides, {gaps}." if gaps else "")
    elif gaps or not observed:
        fault, sentence = "missing requests", f"{gaps or 'no request was recorded'}."
    else:
        sentence = (
            f"all {n_steps} steps of {len(observed)} requests are exactly as computed "
            f"({case.algorithm}, K={case.draft_length}, at most {case.max_tokens} tokens)."
        )
        if any(count == 0 for request in observed for count in request.engine_steps):
            sentence += " The engine cannot say itself that each event is one step."
        if n_untold := sum(map(_n_untold, observed)):
            sentence += (
                f" Of {n_untold} of them the engine does not tell whether a draft was checked, or "
                "how much of it was accepted."
            )
        if n_unordered := sum(pairing.unordered for pairing in pairings):
            sentence += (
                f" In {n_unordered} of them the engine tells how many of consecutive one-token "
                "steps were drafted, not which."
            )
    return Verdict(
        ok=fault is None,
        n_requests=len(observed),
        n_steps=n_steps,
        sentence=sentence,
        fault=fault,
        expected_al=expected,
        measured_al=measured,
    )


def judge_consistent(
    observed: Sequence[ObservedRequest],
    known: KnownAnswer,
    case: Case,
    expected_requests: Collection[tuple[str, int]] | None = None,
) -> Verdict:
    """For drafters that learn from other requests: which drafts are right cannot be computed.

    What can: the tokens are those of greedy decoding, one at the prefill; no step is longer than
    K + 1; what is told to be accepted is what the step's tokens show, at the end at least that.
    """
    plain = replace(case, algorithm="NONE")
    n_steps = sum(len(request.n_tokens) for request in observed)
    wrong: list[tuple[Fault, str]] = []
    for request in observed:
        if (broken := _broken(request)) is not None:
            wrong.append(("steps differ", broken))
        elif list(request.output_ids) != _output(plain.steps(known, request.prompt_ids)):
            wrong.append(("wrong tokens", f"{request.name}: its tokens are not the target's"))
        elif (found := _inconsistency(request, case.draft_length)) is not None:
            wrong.append((found[0], f"{request.name}, {found[1]}"))
    fault: Fault | None = None
    if wrong:
        fault = wrong[0][0]
        sentence = f"{len(wrong)} of {len(observed)} requests are wrong; first: {wrong[0][1]}."
    elif (gaps := _gaps(observed, expected_requests)) is not None or not observed:
        fault, sentence = "missing requests", f"{gaps or 'no request was recorded'}."
    else:
        sentence = (
            f"the tokens of {len(observed)} requests are exactly as computed, and tokens and "
            f"counts of all {n_steps} steps agree ({case.algorithm}, K={case.draft_length}; what "
            "it drafts depends on other requests, so acceptance is not known beforehand)."
        )
    return Verdict(fault is None, len(observed), n_steps, sentence, fault, kind="consistent")


def _inconsistency(request: ObservedRequest, k: int) -> tuple[Fault, str] | None:
    """The first step that contradicts itself or K, in words."""
    last = len(request.n_tokens) - 1
    rows = zip(
        request.n_tokens, request.accepted, request.drafted, request.engine_steps, strict=True
    )
    for i, (n, accepted, drafted, engine_steps) in enumerate(rows):
        where = f"step {i}: {n} tokens, accepted {accepted}, drafted {drafted}"
        if engine_steps > 1:
            return "merged events", f"{where}, merged from {engine_steps} engine steps"
        if i == 0 and (n != 1 or accepted > 0 or drafted > 0):
            return "prefill counted", f"{where}, expected one token and no draft"
        if n > k + 1:
            return "merged events", f"{where}, more than K + 1 = {k + 1}"
        if drafted > k:
            return "off-by-one K", f"{where}, asked was K={k}"
        if accepted != UNKNOWN and (accepted < n - 1 or (i not in (0, last) and accepted > n - 1)):
            return "steps differ", f"{where}"
        if drafted != UNKNOWN and accepted > drafted:
            return "steps differ", f"{where}"
    return None


def wrong_end(request: ObservedRequest, case: Case) -> str | None:
    """Why a request cannot have ended as is recorded, or None: at a stop id, or else at the limit
    (where both fall together engines name either)."""
    n_tokens = len(request.output_ids)
    reasons = {
        "stop": n_tokens > 0 and request.output_ids[-1] in case.stop_ids,
        "length": n_tokens == case.max_tokens,
    }
    if reasons.get(request.finish_reason, False):
        return None
    stops = "a stop id" if reasons["stop"] else "no stop id"
    return (
        f"{request.name} is recorded to have ended by {request.finish_reason!r}: it holds "
        f"{n_tokens} of {case.max_tokens} tokens, the last of them {stops}."
    )


def wrong_experts(
    request: ObservedRequest, captured: RoutedExperts | None, known: KnownAnswer
) -> str | None:
    """Why captured experts are not those of the request's tokens, or None.

    The engine ran the target on the prompt and on every output token but the last. The order of
    a token's experts is not compared: engines sort them differently.
    """
    tokens = [*request.prompt_ids, *request.output_ids[:-1]]
    if captured is None:
        return f"{request.name}: no experts were captured."
    shape = (captured.n_tokens, captured.n_layers, captured.top_k)
    expected = np.asarray([known.experts[token] for token in tokens], np.int64)
    if shape != expected.shape:
        return f"{request.name}: experts of shape {shape} were captured, expected {expected.shape}."
    found = np.frombuffer(captured.expert_ids, "<i2").reshape(shape)
    differ = (np.sort(found, axis=2) != np.sort(expected, axis=2)).any(axis=2)
    if differ.any():
        token, layer = (int(i) for i in np.argwhere(differ)[0])
        return (
            f"{request.name}: {int(differ.sum())} of {differ.size} choices differ; first: token "
            f"{token}, layer {layer}: {found[token, layer].tolist()}, expected "
            f"{expected[token, layer].tolist()}."
        )
    return None


def _pair(observed: Iterable[ObservedRequest], known: KnownAnswer, case: Case) -> list[_Pairing]:
    return [_in_order(request, case.steps(known, request.prompt_ids)) for request in observed]


def _in_order(request: ObservedRequest, steps: Sequence[ExpectedStep]) -> _Pairing:
    """The pairing, with the counts of consecutive one-token steps in the known order, if what is
    told of them is the same but for the order (drafted without success, or not drafted)."""
    told = list(zip(request.accepted, request.drafted, strict=False))
    known = [(step.accepted, step.drafted) for step in steps]
    if len(told) != len(known) or len(told) != len(request.n_tokens):
        return _Pairing(request, steps)
    ordered = list(told)
    start = 1
    for i in range(1, len(told) + 1):
        in_run = i < len(told) and request.n_tokens[i] == 1 and told[i][0] == known[i][0] == 0
        if not in_run:
            if sorted(told[start:i]) == sorted(known[start:i]):
                ordered[start:i] = known[start:i]
            start = i + 1
    if ordered == told:
        return _Pairing(request, steps)
    accepted, drafted = zip(*ordered, strict=True)
    return _Pairing(replace(request, accepted=accepted, drafted=drafted), steps, unordered=True)


def _output(steps: Iterable[ExpectedStep]) -> list[int]:
    return [token for step in steps for token in step.token_ids]


def _gaps(
    observed: Sequence[ObservedRequest], expected: Collection[tuple[str, int]] | None
) -> str | None:
    """What is missing, doubled or unasked among the recorded requests."""
    found = Counter((request.conversation_id, request.turn) for request in observed)
    if doubled := sorted(key for key, count in found.items() if count > 1):
        return f"request {doubled[0][0]} turn {doubled[0][1]} is recorded more than once"
    if expected is None:
        return None
    if missing := sorted(set(expected) - found.keys()):
        return (
            f"{len(missing)} of {len(set(expected))} requests are missing, "
            f"first {missing[0][0]} turn {missing[0][1]}"
        )
    if unasked := sorted(found.keys() - set(expected)):
        return f"{len(unasked)} requests were never asked, first {unasked[0][0]}"
    return None


def _mismatch(pairing: _Pairing) -> str | None:
    """The first difference between a request and its known answer, in words, or None."""
    request, steps = pairing.request, pairing.steps
    if broken := _broken(request):
        return broken
    start = 0
    rows = zip(
        request.n_tokens, request.accepted, request.drafted, request.engine_steps, strict=True
    )
    for i, (n, accepted, drafted, engine_steps) in enumerate(rows):
        tokens = tuple(request.output_ids[start : start + n])
        start += n
        found = f"{request.name}, step {i}: found {_counted(tokens, accepted, drafted)}"
        if i >= len(steps):
            return f"{found} after the answer's end"
        step = steps[i]
        expected = _counted(step.token_ids, step.accepted, step.drafted)
        if (
            tokens != step.token_ids
            or accepted not in (UNKNOWN, step.accepted)
            or drafted not in (UNKNOWN, step.drafted)
        ):
            return f"{found}, expected {expected}"
        if engine_steps > 1:
            return f"{found} merged from {engine_steps} engine steps"
    if len(request.n_tokens) < len(steps):
        return f"{request.name}: ends after {len(request.n_tokens)} of {len(steps)} steps"
    return None


def _broken(request: ObservedRequest) -> str | None:
    """Why a record contradicts itself, or None."""
    columns = {
        "n_tokens": request.n_tokens,
        "accepted": request.accepted,
        "drafted": request.drafted,
        "engine_steps": request.engine_steps,
    }
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        return f"{request.name}: its columns differ in length ({lengths})"
    if sum(request.n_tokens) != len(request.output_ids):
        return (
            f"{request.name}: its steps hold {sum(request.n_tokens)} tokens, "
            f"its output {len(request.output_ids)}"
        )
    return None


def _n_untold(request: ObservedRequest) -> int:
    """Decode steps of which the engine does not tell what was drafted or accepted."""
    told = zip(request.accepted[1:], request.drafted[1:], strict=True)
    return sum(UNKNOWN in counts for counts in told)


def _counted(token_ids: Sequence[int], accepted: int, drafted: int) -> str:
    told = [
        "accepted unknown" if accepted == UNKNOWN else f"accepted {accepted}",
        "drafted unknown" if drafted == UNKNOWN else f"drafted {drafted}",
    ]
    return f"{len(token_ids)} tokens {list(token_ids)} ({', '.join(told)})"


def _diagnose(
    pairings: Sequence[_Pairing], wrong: Sequence[_Pairing], known: KnownAnswer, case: Case
) -> tuple[Fault, str]:
    """The fault that explains every observed request, and a sentence about it."""
    k = case.draft_length
    requests = [pairing.request for pairing in pairings]
    if any(_broken(request) for request in requests):
        return "steps differ", "The record contradicts itself."
    if any(count > 1 for request in requests for count in request.engine_steps):
        return "merged events", "Events hold several engine steps each: read every step's output."
    if any(not pairing.same_output for pairing in pairings):
        exchanged = replace(known, target_next=known.draft_next, draft_next=known.target_next)
        if case.algorithm == "DRAFT_TARGET" and _all_fit(_pair(requests, exchanged, case)):
            return "swapped drafter", "The steps are those of target and draft exchanged."
        return "wrong tokens", "The output is not what the target's weights say."
    same_lengths = all(pairing.same_lengths for pairing in pairings)
    if case.algorithm != "NONE" and case.is_known:
        for other in (k + 1, k - 1):
            trial = _pair(requests, known, replace(case, draft_length=other)) if other else []
            # Where all lengths fit K too, only the told counts can speak for another K.
            fits = all(_mismatch(p) is None for p in trial) if same_lengths else _all_fit(trial)
            if trial and fits:
                return "off-by-one K", f"The steps are those of K={other}, asked was K={k}."
    if same_lengths:
        return _diagnose_counts(wrong)
    if case.algorithm == "DRAFT_TARGET":
        itself = replace(known, draft_next=known.target_next)
        if _all_fit(_pair(requests, itself, case)):
            return "swapped drafter", "The steps are those of the target drafting for itself."
    if all(n == 1 for request in requests for n in request.n_tokens):
        return "nothing accepted", "No draft was ever accepted: the drafter is another model."
    if all(_is_merged(p.request.n_tokens, [len(s.token_ids) for s in p.steps]) for p in wrong):
        if all(_prefill_merged(p) for p in pairings if len(p.steps) > 1):
            return "prefill counted", "The prefill's token is recorded with the first decode step."
        return "merged events", "Several steps arrive as one: read every step's output."
    return "steps differ", "No known fault explains it."


def _all_fit(pairings: Sequence[_Pairing]) -> bool:
    return all(pairing.same_output and pairing.same_lengths for pairing in pairings)


def _diagnose_counts(wrong: Sequence[_Pairing]) -> tuple[Fault, str]:
    """All lengths and tokens are right, told counts are not."""
    if any(p.request.accepted[0] > 0 or p.request.drafted[0] > 0 for p in wrong):
        return "prefill counted", "The prefill is recorded as a step that checked drafts."
    if all(_final_counted(pairing) for pairing in wrong):
        return (
            "final step counted",
            "Where a request ends inside a block, the cut length is reported as accepted.",
        )
    return "steps differ", "Lengths are right, the told acceptance counts are not."


def _final_counted(pairing: _Pairing) -> bool:
    """The request is right but for its cut final step, whose visible length is the count told."""
    request, last = pairing.request, pairing.steps[-1]
    mended = replace(request, accepted=[*request.accepted[:-1], last.accepted])
    return request.accepted[-1] == len(last.token_ids) - 1 and (
        _mismatch(_Pairing(mended, pairing.steps)) is None
    )


def _is_merged(found: Sequence[int], expected: Sequence[int]) -> bool:
    """Each found length is the sum of one or more adjacent expected ones."""
    edges = set(np.cumsum(expected).tolist())
    return sum(found) == sum(expected) and set(np.cumsum(found).tolist()) < edges


def _prefill_merged(pairing: _Pairing) -> bool:
    lengths = [len(step.token_ids) for step in pairing.steps]
    return list(pairing.request.n_tokens) == [sum(lengths[:2]), *lengths[2:]]


def _acceptance_lengths(
    pairings: Iterable[_Pairing], case: Case
) -> tuple[dict[str, float], dict[str, float]]:
    """Category -> expected and measured mean tokens per decode step, over comparable steps."""
    full = 1 if case.algorithm == "NONE" else case.draft_length + 1
    expected: dict[str, list[int]] = defaultdict(list)
    measured: dict[str, list[int]] = defaultdict(list)
    for pairing in pairings:
        category, request, steps = pairing.request.category, pairing.request, pairing.steps
        told = all(accepted != UNKNOWN for accepted in request.accepted[1:])
        if told:
            expected[category] += [step.accepted + 1 for step in steps[1:]]
            measured[category] += [accepted + 1 for accepted in request.accepted[1:]]
        else:
            expected[category] += _uncut([len(step.token_ids) for step in steps], full)
            measured[category] += _uncut(request.n_tokens, full)
    return _means(expected), _means(measured)


def _uncut(n_tokens: Sequence[int], full: int) -> list[int]:
    """Lengths of decode steps, without a final one that may have been cut."""
    lengths = list(n_tokens[1:])
    return lengths[:-1] if lengths and lengths[-1] < full else lengths


def _means(values: Mapping[str, list[int]]) -> dict[str, float]:
    return {name: sum(found) / len(found) for name, found in values.items() if found}


def judge_sampled(
    observed: Sequence[ObservedRequest],
    known: KnownAnswer,
    probabilities: NDArray[np.float64],
    draft_length: int,
    level: float = 0.999,
    expected_requests: Collection[tuple[str, int]] | None = None,
    *,
    drafts_are_sampled: bool = False,
) -> Verdict:
    """DRAFT_TARGET with sampling: at every draft position acceptances must be as many as likely.

    `probabilities` (V,) are `closed_form.acceptance_probabilities`: the draft token after context
    token x is accepted with probability a(x). The chain of drafts is x, g(x), g(g(x)), ..., so the
    tokens of a step show which drafts were accepted: one that was not cannot be emitted in its
    place. A correct engine passes with probability `level`, all positions together.

    Sampled drafts are no known chain: `probabilities` are then `overlap_probabilities`, and how
    many drafts were accepted is what the engine tells.
    """
    n_steps = sum(len(request.n_tokens) for request in observed)

    def verdict(fault: Fault | None, text: str, checks: Sequence[PositionCheck] = ()) -> Verdict:
        return Verdict(
            fault is None,
            len(observed),
            n_steps,
            text,
            fault,
            positions=tuple(checks),
            kind="interval",
        )

    if gaps := _gaps(observed, expected_requests):
        return verdict("missing requests", f"{gaps}.")
    if broken := next((text for request in observed if (text := _broken(request))), None):
        return verdict("steps differ", f"{broken}.")
    if found := _too_long(observed, known, draft_length):
        return verdict(*found)
    longest = max((n for request in observed for n in request.n_tokens[1:]), default=0)
    trials = _Trials([[] for _ in range(draft_length)], [0] * draft_length, longest)
    add = trials.add_sampled if drafts_are_sampled else trials.add
    for request in observed:
        if found := add(request, known, probabilities):
            return verdict(*found)
    n_positions = sum(1 for position in trials.chances if position)
    if n_positions == 0:
        return verdict("too few steps", "no draft was checked: ask for longer answers.")
    checks = [
        _check_position(k, np.asarray(chances), hits, (1 - level) / n_positions)
        for k, (chances, hits) in enumerate(
            zip(trials.chances, trials.n_accepted, strict=True), start=1
        )
        if chances
    ]
    table = "; ".join(
        f"position {c.position}: {c.n_accepted} of {c.n_trials} accepted, expected "
        f"{c.low:.0f} to {c.high:.0f}"
        for c in checks
    )
    sentence = f"{table} (level {level:g} over all positions)."
    if all(check.ok for check in checks):
        return verdict(None, f"acceptances are as likely as computed: {sentence}", checks)
    return verdict("acceptance rate", f"acceptances are not as computed: {sentence}", checks)


def _n_matches(tokens: Sequence[int], context: int, known: KnownAnswer) -> int:
    """How many leading tokens are the drafter's chain from `context`."""
    for i, token in enumerate(tokens):
        if token != known.draft_next[context]:
            return i
        context = token
    return len(tokens)


def _too_long(
    observed: Iterable[ObservedRequest], known: KnownAnswer, draft_length: int
) -> tuple[Fault, str] | None:
    """Steps longer than K + 1: one more draft each, if the drafter's chain says so; else merged."""
    texts: list[str] = []
    is_one_more = True
    for request in observed:
        start = 0
        for i, n in enumerate(request.n_tokens):
            if i > 0 and n > draft_length + 1:
                tokens = request.output_ids[start : start + n]
                context = request.output_ids[start - 1]
                texts.append(f"{request.name}, step {i}: {n} tokens {list(tokens)}")
                chain = _n_matches(tokens, context, known)
                is_one_more &= n == draft_length + 2 and chain >= n - 1
            start += n
    if not texts:
        return None
    fault: Fault = "off-by-one K" if is_one_more else "merged events"
    return fault, f"{len(texts)} steps exceed K + 1 = {draft_length + 1}; first: {texts[0]}."


@dataclass(frozen=True, slots=True)
class _Trials:
    """Draft by draft, position by position: the chance of acceptance, and how many there were."""

    chances: list[list[float]]
    n_accepted: list[int]
    longest: int  # tokens of the longest decode step of the run

    def add_sampled(
        self, request: ObservedRequest, _known: KnownAnswer, probabilities: NDArray[np.float64]
    ) -> tuple[Fault, str] | None:
        """Count a request's drafts by what is told: position k was tried if those before it were
        accepted. Each context is a token that was emitted."""
        start = 0
        rows = zip(request.n_tokens, request.accepted, request.drafted, strict=True)
        for i, (n, accepted, drafted) in enumerate(rows):
            context = [*request.output_ids[max(0, start - 1) : start + n]]
            start += n
            where = f"{request.name}, step {i}: {n} tokens, accepted {accepted}, drafted {drafted}"
            if request.engine_steps[i] > 1:
                return "merged events", f"{where}."
            if i == 0:
                if n != 1 or accepted > 0 or drafted > 0:
                    return "prefill counted", f"{where}, expected one token and no draft."
                continue
            is_final = i == len(request.n_tokens) - 1
            if accepted == UNKNOWN or drafted == UNKNOWN:
                return "steps differ", f"{where}: the engine tells no counts."
            if drafted > len(self.chances):
                return "off-by-one K", f"{where}, asked was K={len(self.chances)}."
            if accepted > drafted or (accepted != n - 1 and not (is_final and accepted >= n - 1)):
                return "steps differ", f"{where}."
            for k in range(min(accepted + 1, drafted, n)):  # later contexts were not shown
                self.chances[k].append(float(probabilities[context[k]]))
                self.n_accepted[k] += k < accepted
        return None

    def add(
        self, request: ObservedRequest, known: KnownAnswer, probabilities: NDArray[np.float64]
    ) -> tuple[Fault, str] | None:
        """Count a request's drafts. Returns a fault if this drafter and K cannot have made them."""
        k = len(self.chances)
        start = 0
        for i, n in enumerate(request.n_tokens):
            tokens = request.output_ids[start : start + n]
            told, drafted = request.accepted[i], request.drafted[i]
            where = f"{request.name}, step {i}: found {_counted(tokens, told, drafted)}"
            start += n
            if request.engine_steps[i] > 1:
                return "merged events", f"{where} merged from {request.engine_steps[i]} steps."
            if i == 0:
                if n != 1 or told > 0 or drafted > 0:
                    return "prefill counted", f"{where}, expected one token and no draft."
                continue
            if drafted not in (UNKNOWN, 0, k):
                return "off-by-one K", f"{where}, asked was K={k}."
            context = request.output_ids[start - n - 1]
            tried = tokens[: k if drafted == UNKNOWN else drafted]
            matches = _n_matches(tried, context, known)
            is_final = i == len(request.n_tokens) - 1
            if n == 0 or matches < n - 1:
                return "swapped drafter", f"{where}: the drafter does not propose these tokens."
            if matches == n and not is_final:
                if drafted == UNKNOWN and n == k == self.longest:
                    return "off-by-one K", f"{where}: ends after an accepted draft, as with K - 1."
                return "wrong tokens", f"{where}: a rejected draft cannot be emitted in its place."
            if told != UNKNOWN and is_final and told < matches:
                return "final step counted", f"{where}: {matches} accepted drafts are visible."
            if told != UNKNOWN and not is_final and told != matches:
                return "steps differ", f"{where}: {matches} accepted drafts are visible."
            for position, token in enumerate(tried):
                chance = float(probabilities[context])
                hit = position < matches
                if chance == float(not hit):
                    return (
                        "acceptance rate",
                        f"{where}, but draft {position + 1} has chance {chance:g}.",
                    )
                self.chances[position].append(chance)
                self.n_accepted[position] += hit
                context = token
        return None


def _check_position(
    position: int, chances: NDArray[np.float64], n_accepted: int, error: float
) -> PositionCheck:
    """The interval that the sum of draws with the given chances misses with probability `error`.

    Which contexts are met depends on earlier draws, so their sum is a martingale; with as many
    draws as a run has, it is distributed like a sum of independent ones.
    """
    expected = float(chances.sum())
    variance = float((chances * (1 - chances)).sum())
    if variance == 0:
        low = high = expected
    elif len(chances) <= N_EXACT_TRIALS:
        below = np.cumsum(_poisson_binomial(chances))
        low = float(np.searchsorted(below, error / 2, side="right"))
        high = float(np.searchsorted(below, 1 - error / 2, side="left"))
    else:
        half = float(stats.norm.isf(error / 2)) * variance**0.5 + 0.5  # continuity
        low, high = expected - half, expected + half
    return PositionCheck(position, len(chances), n_accepted, expected, low, high)


def _poisson_binomial(chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N + 1,) probability of each number of successes among N independent draws."""
    mass = np.zeros(len(chances) + 1)
    mass[0] = 1
    for chance in chances:
        mass[1:] = mass[1:] * (1 - chance) + mass[:-1] * chance
        mass[0] *= 1 - chance
    return mass
