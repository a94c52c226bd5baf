"""Definitions: what every number of a report means, in which unit, and by which source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from speedbench.report.blocks import clean


@dataclass(frozen=True, slots=True)
class Term:
    """One word that reports use.

    id       what links point at; the key in `TERMS`
    formula  how it is computed, where words are longer
    unit     '' for a pure number
    source   paper or program that it is taken from; '' for our own: then the text says it all
    aliases  headers and labels that mean it, in small letters, without their units
    """

    id: str
    name: str
    text: str
    formula: str = ""
    unit: str = ""
    source: str = ""
    aliases: tuple[str, ...] = ()


KAPLAN_MEIER = "Kaplan & Meier 1958, JASA 53:457-481"
PUBLISHED = "SPEED-Bench's console"

_TERMS = (
    # ------------------------------------------------------------ acceptance
    Term(
        "al",
        "Acceptance length (AL)",
        "decode steps, cut-off steps censored (Kaplan-Meier); steps equal within a category, "
        "then the mean over categories",
        "AL = sum of the joint rates of positions 0..K; 1 <= AL <= K+1",
        "tokens per decode step, the bonus token included",
        KAPLAN_MEIER,
        (
            "al",
            "al (primary)",
            "average al",
            "acceptance length",
            "al base",
            "al_base",
            "baseline al",
            "accept_length",
            "mean al",
        ),
    ),
    Term(
        "al_step",
        "al_step",
        "decode steps, cut-off steps censored (Kaplan-Meier); every step equal",
        "",
        "tokens per decode step",
        KAPLAN_MEIER,
        ("al_step",),
    ),
    Term(
        "al_conversation",
        "al_conversation",
        "uncut decode steps; mean per conversation, per category, over categories",
        "",
        "tokens per decode step",
        "",
        ("al_conversation",),
    ),
    Term(
        "al_drafted",
        "al_drafted",
        "verify steps only (a draft was checked); every step equal",
        "",
        "tokens per verify step",
        "",
        ("al_drafted",),
    ),
    Term(
        "al_specdec_bench",
        "al_specdec_bench",
        "all steps as they look, prefill included; mean per conversation, then over "
        "conversations: the published SPEED-Bench console number, with EOS as a token",
        "",
        "tokens per event",
        PUBLISHED,
        ("al_specdec_bench",),
    ),
    Term(
        "al_engine",
        "al_engine",
        "the engine's own counters: 1 + accepted / drafts",
        "",
        "tokens per drafted step",
        "",
        ("al_engine",),
    ),
    Term(
        "closed_form",
        "Closed form",
        "the acceptance length that a known-answer checkpoint must have, computed from its weights "
        "alone",
        "",
        "tokens per decode step",
        "",
        ("closed form", "closed-form al", "expected al"),
    ),
    Term(
        "al_ratio",
        "AL ratio",
        "acceptance length of an arm over that of the baseline, paired per conversation",
        "AL / AL of the baseline",
        "",
        "",
        ("ratio of al",),
    ),
    Term(
        "draft_length",
        "Draft length K",
        "draft tokens proposed per verification step; one meaning across engines",
        "",
        "tokens",
        "",
        ("k", "draft length", "draft length k", "draft tokens", "best k"),
    ),
    Term(
        "step",
        "Step",
        "one engine iteration's output for one request: prefill (the first token), verify (drafted "
        "tokens were checked) or plain (decoded without a draft); verify and plain ones are decode "
        "steps",
        "",
        "",
        "",
        ("steps", "decode steps", "n steps", "number of steps", "share of steps"),
    ),
    Term(
        "histogram",
        "Acceptance histogram",
        "decode steps by how many tokens they hold; cut-off ones by what they show",
        "",
        "steps",
        "",
        ("histogram", "acceptance length histogram", "tokens in the step", "uncut", "cut off"),
    ),
    Term(
        "censored",
        "Cut-off (censored) step",
        "a request's last step that shows fewer tokens than it could hold: the engine may have "
        "accepted more, so its length is known from below only",
        "",
        "",
        KAPLAN_MEIER,
        ("censored",),
    ),
    Term(
        "conditional_rate",
        "Conditional acceptance rate",
        "probability that the draft token at position k is accepted, given that those before it "
        "were, over verify steps (over decode steps, and so labelled, where an engine does not "
        "tell verify from plain)",
        "rate k = P(length > k | length >= k) = 1 - d_k / r_k",
        "probability",
        KAPLAN_MEIER,
        ("conditional", "conditional rate", "conditional rates"),
    ),
    Term(
        "acceptance_rate",
        "Acceptance rate",
        "share of drafted tokens that were accepted: a probability, not a length",
        "accepted draft tokens / drafted tokens",
        "probability",
        "",
        ("accept_rate", "accept rate"),
    ),
    Term(
        "joint_rate",
        "Joint acceptance rate",
        "probability that all of the first k draft tokens are accepted",
        "joint k = rate 1 x ... x rate k",
        "probability",
        "",
        ("joint", "joint rate"),
    ),
    Term(
        "position",
        "Position k",
        "the k-th draft token of a step, k = 1..K",
        "",
        "",
        "",
        ("position", "draft position"),
    ),
    Term(
        "draft_hit_rate",
        "Draft hit rate",
        "share of decode steps in which a draft was checked",
        "verify steps / decode steps",
        "",
        "",
        ("draft hit rate", "hit rate"),
    ),
    Term(
        "completeness",
        "n/n",
        "conversations measured / conversations that were to be measured; failed ones are missing",
        "",
        "conversations",
        "",
        ("n/n", "complete", "completeness", "n complete"),
    ),
    Term(
        "run",
        "Runs",
        "starts of the benchmark with the same configuration, inputs, engine and machine: repeats "
        "of one arm",
        aliases=("runs", "repeats", "run"),
    ),
    Term(
        "conversation",
        "Conversations",
        "rows of the dataset, each with its turns: the unit of resampling",
        aliases=("conversations", "n conversations"),
    ),
    Term(
        "as_published",
        "As published",
        "every event as it looks, prefill and cut-off steps included: what the publisher's harness "
        "counts",
        source=PUBLISHED,
        aliases=("as published",),
    ),
    Term(
        "count",
        "n",
        "how many values a number rests on",
        aliases=("n", "count", "samples"),
    ),
    # ------------------------------------------------------------ time
    Term(
        "ttft",
        "TTFT",
        "time to first token",
        "first step - submitted",
        "s or ms, as the header says",
        "",
        ("ttft", "ttft time", "time to first token", "ttft p50", "ttft p95", "ttft p99"),
    ),
    Term(
        "step_time",
        "Step time",
        "gap between consecutive steps of one request; the prefill's wait and merged events are "
        "left out",
        "",
        "s or ms, as the header says",
        "",
        (
            "step time",
            "request generation step time",
            "mean step time",
            "step time p50",
            "step time p95",
            "step time p99",
        ),
    ),
    Term(
        "e2e",
        "E2E request time",
        "time from the submission of a request to its last step",
        "last step - submitted",
        "s",
        "",
        ("e2e", "e2e request time"),
    ),
    Term(
        "user_tps",
        "User TPS",
        "what one user sees: tokens after the first step over the time after the first step, per "
        "request (per conversation where arms are paired)",
        "",
        "tokens/s",
        "",
        (
            "user tps",
            "request generation tokens per second",
            "user tps p50",
        ),
    ),
    Term(
        "output_tokens",
        "Output tokens",
        "tokens that a request, or a run, put out; the token that stops it counts",
        "",
        "tokens",
        "",
        ("number of output tokens", "output tokens", "tokens"),
    ),
    Term(
        "output_tps",
        "Output TPS",
        "all output tokens over wall time, from the run's start to its end",
        "",
        "tokens/s",
        "",
        ("output tps", "throughput", "output tps, whole", "output tps (whole)"),
    ),
    Term(
        "output_tps_steady",
        "Output TPS, steady",
        "output tokens within the steady window over its duration",
        "",
        "tokens/s",
        "",
        ("output tps, steady", "output tps (steady)", "steady output tps"),
    ),
    Term(
        "steady_window",
        "Steady window",
        "from the moment all slots are filled until the queue is empty; of replicas, the time that "
        "all of them share",
        "",
        "s",
        "",
        ("steady window",),
    ),
    Term(
        "output_tps_per_gpu",
        "Output TPS per GPU",
        "output TPS divided by the GPUs used (tp x pp x dp, times replicas)",
        "",
        "tokens/s and GPU",
        "",
        ("output tps/gpu", "output tps per gpu", "output tps/gpu, steady"),
    ),
    Term(
        "output_rate",
        "Output tokens per second over time",
        "tokens whose step fell into each of equal spans of the run, over the span's length",
        "",
        "tokens/s",
        "",
        ("output rate", "tokens put out"),
    ),
    Term(
        "in_flight",
        "Requests in flight",
        "requests that were submitted and whose last step had not come, as a mean over each of "
        "equal spans of the run; of stored requests alone",
        "",
        "requests",
        "",
        ("requests in flight", "in flight"),
    ),
    Term(
        "tokens_in_flight",
        "Tokens in flight",
        "prompt tokens of the requests in flight, and what they have put out so far, as a mean "
        "over each of equal spans of the run: what the key-value cache holds, without prefix "
        "sharing and drafts",
        "",
        "tokens",
        "",
        ("tokens in flight",),
    ),
    Term(
        "run_time",
        "Time since the start",
        "time since the run's first measured request could be submitted (warm-up is over)",
        "",
        "s",
        "",
        ("time since the start",),
    ),
    Term(
        "share_at_most",
        "Share at or below",
        "empirical distribution: share of values that are at most the one named",
        "",
        "",
        "",
        ("share at or below", "share of steps at or below", "share of requests at or below"),
    ),
    Term(
        "percentile",
        "Percentile",
        "P50 is the value that half of all values do not exceed, P95 and P99 likewise (linear "
        "interpolation between neighbours)",
        aliases=("p25", "p50", "p75", "p90", "p95", "p99", "percentile"),
    ),
    Term(
        "spread",
        "min, mean, std, max",
        "over all values; std is the sample's, with n - 1",
        aliases=("min", "mean", "std", "max"),
    ),
    Term(
        "concurrency",
        "Concurrency",
        "conversations in flight at once, per replica: the closed loop keeps so many slots filled",
        "",
        "conversations",
        "",
        ("concurrency", "slots", "batch size"),
    ),
    # ------------------------------------------------------------ comparison
    Term(
        "speedup",
        "Speedup",
        "user TPS of an arm over that of the baseline on the same prompts, paired per "
        "conversation: the geometric mean of the ratios, within and then over categories; of two "
        "independent samples, and so labelled, where prompts differ",
        "exp(mean of log(user TPS / baseline's user TPS))",
        "",
        "",
        ("user-tps speedup", "user-tps ratio", "user tps speedup"),
    ),
    Term(
        "system_speedup",
        "System speedup",
        "ratio of steady output TPS at equal concurrency; an interval needs repeats of both arms",
        "steady output TPS / baseline's",
        "",
        "",
        ("output-tps speedup", "output-tps ratio", "output tps speedup"),
    ),
    Term(
        "arrivals",
        "Arrivals",
        "conversations that came per second whatever the engine did (an open loop), and those that "
        "ended well in the second half of the time in which they came; a turn that had to wait for "
        "a place was submitted when it was due",
        "",
        "1/s",
        "",
        ("offered rate", "completed rate"),
    ),
    Term(
        "goodput",
        "Goodput",
        "requests that kept every stated limit, over the wall time from the first submission to "
        "the last token, and as a share of all requests (Wilson's interval); what failed kept none",
        "",
        "1/s",
        "Zhong et al. 2024 (DistServe), arXiv:2401.09670, section 2",
    ),
    Term(
        "ttft_ratio",
        "TTFT ratio",
        "geometric mean of the paired ratios of TTFT, of a conversation the geometric mean over "
        "its turns; less is faster",
        "TTFT / baseline's TTFT",
        "",
        "",
        ("ratio of ttft",),
    ),
    Term(
        "step_time_ratio",
        "Step-time ratio",
        "what a decode step with drafting costs: geometric mean of the paired ratios of a "
        "conversation's mean step time, which is its time from first to last step over its decode "
        "steps",
        "step time / baseline's step time",
        "",
        "Leviathan et al. 2023, arXiv:2211.17192, section 3.3",
        ("ratio of step times",),
    ),
    Term(
        "predicted_speedup",
        "Predicted speedup",
        "the speedup that acceptance and step time alone would give",
        "AL ratio / step-time ratio",
        "",
        "Leviathan et al. 2023, arXiv:2211.17192, section 3.3",
        ("predicted",),
    ),
    Term(
        "residual",
        "Residual",
        "what the predicted speedup leaves unexplained: last steps that show fewer tokens than "
        "were accepted, and that a conversation counts once in a speedup, but as often as it has "
        "steps in an acceptance length",
        "speedup / predicted speedup",
    ),
    Term(
        "interval",
        "95 % interval",
        "how much depends on the choice of conversations. Of one run's numbers: stratified cluster "
        "bootstrap (whole conversations drawn again within their category), percentile bounds, "
        "widened by Student's t where conversations are few. Of comparisons: Student's t over "
        "conversations, on logarithms for ratios, acceptance lengths by the jackknife. Of a "
        "share of identical outputs: Wilson's. Of AL along the answer, draft vocabularies, "
        "experts and savings: Student's t around the value with the bootstrap's standard error. "
        "Where a number can vary from run to run only, such as output TPS: Student's t over "
        "repeats. In a sweep, and in the total of a comparison of repeated runs, both spreads "
        "are joined, so that it is wider than over conversations alone",
        "",
        "",
        "Rao & Wu 1988, JASA 83:231-241; Hesterberg 2015, The American Statistician 69:371-386; "
        "Wilson 1927, JASA 22:209-212; how often each holds the truth: docs/coverage.md",
        (
            "95% interval",
            "interval",
            "intervals",
            "95 %",
            "95 % from",
            "95 % to",
        ),
    ),
    Term(
        "no_interval",
        "Without an interval",
        "its interval cannot be told, mostly because a single run has one number of it; whether it "
        "differs is not known, which is not the same as alike",
        aliases=("not known",),
    ),
    Term(
        "not_told_apart",
        "Not told apart from the best",
        "the 95 % interval of the ratio to the best contains 1: these draft lengths may be as good",
        aliases=("not told apart",),
    ),
    Term(
        "wilson",
        "Wilson interval",
        "95 % interval of a share, which stays within 0 and 1 and is not empty where all or none "
        "are alike; comparisons of one conversation count as fewer than they are, as far as they "
        "agree with one another",
        source="Wilson 1927, JASA 22:209-212",
    ),
    Term(
        "not_significant",
        "Not significant (ns)",
        "the 95 % interval of a ratio contains 1",
        aliases=("ns", "significant", "not significant"),
    ),
    Term(
        "between_run",
        "Between-run spread",
        "relative standard deviation of the overall ratio from round to round of repeated runs: "
        "what intervals over conversations do not hold",
        "",
        "",
        "",
        ("between runs", "between-run sd"),
    ),
    Term(
        "n_pairs",
        "Pairs",
        "conversations measured in both arms with the same prompts, token by token (of chats: with "
        "the same messages)",
        "",
        "conversations",
        "",
        ("n pairs", "paired"),
    ),
    Term(
        "detectable",
        "Detectable difference",
        "smallest true change that a comparison of this size finds four times out of five (80 % "
        "power, 5 % level), runs that do not differ taken for granted",
        "",
        "",
        "Cohen 1988, Statistical Power Analysis, chapter 2",
        ("detectable",),
    ),
    Term(
        "gate",
        "Gate",
        "passes if the whole 95 % interval of a change lies within the allowed margin, fails if "
        "all of it lies beyond, and is inconclusive else",
        aliases=("change", "allowed"),
    ),
    # ------------------------------------------------------------ losslessness
    Term(
        "identical_share",
        "Identical outputs",
        "comparisons in which both outputs have the same token IDs to the end. A comparison is one "
        "request in one run of each side, where both were asked the very same prompt; over all: "
        "the mean over categories",
        "",
        "share of comparisons",
        aliases=("identical", "share", "losslessness"),
    ),
    Term(
        "noise_floor",
        "Noise floor",
        "the same share between two runs of the baseline: how often an engine repeats itself, "
        "speculation or not",
        "",
        "share of comparisons",
        aliases=("floor",),
    ),
    Term(
        "identical_difference",
        "Points",
        "share identical less the noise floor",
        "",
        "percentage points",
    ),
    Term(
        "first_divergence",
        "First divergence",
        "number of the first token in which two outputs differ, the first token being 1; where one "
        "ends and the other goes on, the token after its end",
        "",
        "tokens",
        aliases=("first difference", "first", "differ"),
    ),
    Term(
        "two_sample",
        "Two-sample test",
        "at temperature > 0: both arms' answers are swapped within conversations, which changes "
        "nothing if both answer with the same distribution; p is the probability of a difference "
        "at least as large by such swaps. Unchanged: conversations answered alike on both sides. "
        "Adjusted: for the number of categories (Holm)",
        aliases=("tokens: p", "lengths: p", "adjusted", "unchanged", "p value", "p"),
    ),
    # ------------------------------------------------------------ sweep
    Term(
        "pareto",
        "On the frontier",
        "no other arm of the same kind (with, or without speculation) beats it in both user TPS "
        "and output TPS; output TPS is told per GPU, or of the whole engine where it used no GPU, "
        "as the axis and the header say",
        aliases=("pareto", "pareto curve", "frontier"),
    ),
    Term(
        "break_even",
        "Break-even concurrency",
        "where speculation stops paying: where the output-TPS speedup falls to 1, interpolated "
        "between measured concurrencies on logarithms",
        "",
        "conversations",
        aliases=("break-even",),
    ),
    Term(
        "runner_up",
        "Next / best",
        "TPS of the second-best draft length over that of the best, whichever TPS the line is by",
        aliases=("next",),
    ),
    # ------------------------------------------------------------ insights
    Term(
        "outside_vocabulary",
        "Outside the draft vocabulary",
        "share of output tokens that a drafter with a pruned vocabulary cannot draft",
        "",
        "share of output tokens",
        aliases=("tokens outside", "share of tokens"),
    ),
    Term(
        "unavoidable_rejections",
        "Unavoidable rejections",
        "share of the rejected steps whose target token the drafter cannot draft",
    ),
    Term(
        "predicted_al",
        "Predicted AL",
        "acceptance length if the drafter had the whole vocabulary and were right on the tokens it "
        "lacks, and after them, as often as at the same position elsewhere; those tokens are rarer "
        "than others, so it leans high. Cost in AL: predicted less measured",
        "",
        "tokens per decode step",
        aliases=("cost in al",),
    ),
    Term(
        "overestimate",
        "Random over real",
        "what a run on random tokens shows over what one on real prompts shows, on the same engine "
        "and drafter. Of AL: the overall AL of the one over that of the other, means over their "
        "categories; a comparison's AL ratio is of geometric means",
        "random / real",
    ),
    Term(
        "same_first_part",
        "Same, first part",
        "acceptance length, in the first part of their answers, of the conversations that have "
        "steps in the later part. Difference: the later part's less this",
        "",
        "tokens per decode step",
        aliases=("difference",),
    ),
    Term(
        "saving",
        "Minutes saved",
        "what the baseline would have taken for the same tokens, at its own pace in each paired "
        "conversation, less what the arm took. They are minutes that requests waited, added up, "
        "not minutes of the clock. Share saved: of the baseline's minutes",
        "",
        "minutes",
        aliases=("baseline minutes", "share saved"),
    ),
    Term(
        "energy_per_token",
        "Energy",
        "what the run's GPUs drew from the start to the end of its sessions, together and per "
        "million output tokens; from their own counters, else from sampled power. Lowered clocks: "
        "for want of power or cooling",
        "",
        "J, and W in the mean",
        "NVML, sampled by a process of its own",
        (
            "joules",
            "joules per million output tokens",
            "mean watts, all gpus",
            "samples at lowered clocks",
        ),
    ),
    Term(
        "cost",
        "Cost per million tokens",
        "GPU time of the whole run, without start and warm-up, at --gpu_hour_price, over its "
        "output tokens",
        "",
        "dollars per million output tokens",
        aliases=("dollars per million output tokens",),
    ),
    Term(
        "expert_activation",
        "Expert activation",
        "how a Mixture-of-Experts layer spreads tokens over its experts. Activated: share of them "
        "that a batch of so many of the run's tokens, drawn at random, goes to. Experts used: by "
        "any token. Imbalance: tokens of the most used expert over the mean. Entropy: of the "
        "experts' shares, 1 if all are used alike",
        "activated = sum over experts of 1 - C(N - m, b) / C(N, b), over their number",
        aliases=("experts used", "imbalance", "entropy"),
    ),
    # ------------------------------------------------------------ identity
    Term(
        "fingerprint",
        "Fingerprint",
        "sha256 over the token IDs of the prompts that are known before a run: of all turns, or, "
        "where replies become history, of the first turns; the page says which. The same in two "
        "runs, and the engines received the same there",
        "",
        "",
        "",
        ("fingerprint",),
    ),
)

TERMS: Mapping[str, Term] = {term.id: term for term in _TERMS}

DEFINITIONS: Mapping[str, str] = {
    name: TERMS[name].text
    for name in ("al", "al_step", "al_conversation", "al_drafted", "al_specdec_bench", "al_engine")
}
"""The acceptance lengths by name, primary first."""

_UNIT = re.compile(r"\s*\([^()]*\)\s*$")
_ALIASES: Mapping[str, str] = {
    alias: term.id for term in _TERMS for alias in (term.name.lower(), *term.aliases)
}


def term_of(words: str, given: str = "") -> Term | None:
    """What a header or label means: the term named, or else the one whose name the words are.

    A unit, or '(95 %)', in brackets at the end of the words is no part of the name.
    """
    if given in TERMS:
        return TERMS[given]
    found = clean(words).lower()
    return next(
        (TERMS[_ALIASES[form]] for form in (found, _UNIT.sub("", found)) if form in _ALIASES), None
    )


def in_order(ids: Iterable[str]) -> tuple[Term, ...]:
    """The terms of these ids, in the order of this file."""
    wanted = set(ids)
    return tuple(term for term in _TERMS if term.id in wanted)
