"""Summary: every number of one stored run, each with its interval or the reason it is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from speedbench import metrics, stats
from speedbench.checks import Check, all_checks, counted
from speedbench.columns import Floats, Ints
from speedbench.report.curves import N_POINTS, Curves, Timeline, distribution, timeline
from speedbench.report.definitions import DEFINITIONS
from speedbench.report.figure import Figure
from speedbench.report.load import NOTHING, Load, load_of
from speedbench.report.pooled import pooled
from speedbench.spans import APART, spans_of, why_no_throughput
from speedbench.store import Run, expected_conversations

__all__ = (
    "DEFINITIONS",
    "CategoryRow",
    "Figure",
    "Resamples",
    "Summary",
    "summarize",
    "summarize_repeats",
    "throughput",
)


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """One category: completeness and acceptance lengths; `expected_al` is the closed form's."""

    name: str
    n_complete: int
    n_expected: int
    n_steps: int
    lengths: Mapping[str, Figure]
    rates: tuple[Figure, ...]
    expected_al: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All that a report of one run says. `timing` maps a name to metrics.describe's keys.

    `n_requests`, `n_steps` and `n_output_tokens` are all that was recorded, failed ones included;
    every other number is of the `n_conversations` that did not fail.
    """

    run_dir: str
    load: Load
    manifest: Mapping[str, Any]
    checks: tuple[Check, ...]
    draft_length: int
    n_conversations: int
    n_failed: int
    n_requests: int
    n_steps: int
    n_output_tokens: int
    kinds: Mapping[str, int]
    categories: tuple[CategoryRow, ...]
    lengths: Mapping[str, Figure]
    histogram: tuple[int, ...]
    n_censored: int
    rates: tuple[Figure, ...]
    joint: tuple[Figure, ...]
    rates_over: str
    draft_hit_rate: Figure
    published_histogram: tuple[int, ...]
    published_rates: tuple[Figure, ...]
    published_al_step: Figure
    timing: Mapping[str, Mapping[str, float | None] | None]
    output_tps: Figure
    output_tps_steady: Figure
    steady_duration_s: float | None
    output_tps_per_gpu: Figure
    curves: Curves
    expected_al: float | None


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The fields of a Summary that are told by steps and their lengths alone."""

    kinds: Mapping[str, int]
    categories: tuple[CategoryRow, ...]
    lengths: Mapping[str, Figure]
    histogram: tuple[int, ...]
    n_censored: int
    rates: tuple[Figure, ...]
    joint: tuple[Figure, ...]
    rates_over: str
    draft_hit_rate: Figure
    published_histogram: tuple[int, ...]
    published_rates: tuple[Figure, ...]
    published_al_step: Figure


class Resamples:
    """Bootstrap weights, drawn once for all runs of the same rows: drawing is what takes longest.

    What is drawn for a conversation depends on its name and on how many each category has, not on
    the order in which a run ended them: the same records in another order have the same intervals.
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.int64)
        self._weights = np.zeros((stats.N_RESAMPLES, 0))

    def weights(self, category: Ints, ids: Sequence[str]) -> Floats:
        """`stats.bootstrap_weights` (B, C) of the conversations of these names and categories
        (C,)."""
        order = np.lexsort((np.array(ids, str), category))
        if not np.array_equal(category[order], self._sorted):
            self._sorted = category[order]
            self._weights = stats.bootstrap_weights(self._sorted)
        return self._weights[:, np.argsort(order)]


def summarize(run: Run, resamples: Resamples | None = None) -> Summary:
    """Compute every number from the run's records alone; `resamples` may be shared by several."""
    manifest, columns = run.manifest, run.columns
    k = int(manifest["engine"]["draft_length"])
    counts = counted(run)
    found = _accepted(
        counts,
        columns.categories,
        expected_conversations(run),
        manifest,
        _engine_length([manifest]),
        resamples or Resamples(),
        [columns.conversation_ids[i] for i in np.flatnonzero(~columns.failed)],
    )
    timing = metrics.timing(columns, k)
    output, steady, per_gpu = throughput(run)
    why_no_timeline, over_time = _timeline(run)
    return Summary(
        run_dir=str(run.directory),
        load=load_of(run),
        manifest=manifest,
        checks=tuple(all_checks(run)),
        draft_length=k,
        n_conversations=len(counts.category),
        n_failed=int(columns.failed.sum()),
        n_requests=columns.n_requests,
        n_steps=len(columns.step),
        n_output_tokens=int(columns.n_tokens.sum()),
        kinds=found.kinds,
        categories=found.categories,
        lengths=found.lengths,
        histogram=found.histogram,
        n_censored=found.n_censored,
        rates=found.rates,
        joint=found.joint,
        rates_over=found.rates_over,
        draft_hit_rate=found.draft_hit_rate,
        published_histogram=found.published_histogram,
        published_rates=found.published_rates,
        published_al_step=found.published_al_step,
        timing={
            "ttft_s": metrics.describe(timing.ttft_s),
            "step_time_s": metrics.describe(timing.step_time_s),
            "e2e_s": metrics.describe(timing.e2e_s),
            "user_tps": metrics.describe(timing.user_tps),
            "output_tokens": metrics.describe(timing.n_output_tokens),
        },
        output_tps=output,
        output_tps_steady=steady[0],
        steady_duration_s=steady[1],
        output_tps_per_gpu=per_gpu,
        curves=Curves(
            distribution(timing.step_time_s),
            distribution(timing.ttft_s),
            over_time,
            why_no_timeline,
        ),
        expected_al=_expected(manifest).get("overall"),
    )


def summarize_repeats(
    runs: Sequence[Run], each: Sequence[Summary], resamples: Resamples | None = None
) -> Summary:
    """Repeats of one arm as one: acceptance over the steps of all, a conversation's repeats kept
    together; what time decides is told run by run, in `each`, and has no number here."""
    if len(runs) == 1:
        return each[0]
    counts, categories, ids = pooled(runs)
    expected: Counter[str] = Counter()
    for run in runs:
        expected |= expected_conversations(run)
    manifests = [run.manifest for run in runs]
    found = _accepted(
        counts,
        categories,
        expected,
        manifests[0],
        _engine_length(manifests),
        resamples or Resamples(),
        ids,
    )
    apart = Figure(None, why_not="throughput is told run by run")
    return replace(
        each[0],
        run_dir=", ".join(summary.run_dir for summary in each),
        load=NOTHING,
        checks=tuple(dict.fromkeys(check for summary in each for check in summary.checks)),
        n_conversations=len(counts.category),
        n_failed=sum(summary.n_failed for summary in each),
        n_requests=sum(summary.n_requests for summary in each),
        n_steps=sum(summary.n_steps for summary in each),
        n_output_tokens=sum(summary.n_output_tokens for summary in each),
        kinds=found.kinds,
        categories=found.categories,
        lengths=found.lengths,
        histogram=found.histogram,
        n_censored=found.n_censored,
        rates=found.rates,
        joint=found.joint,
        rates_over=found.rates_over,
        draft_hit_rate=found.draft_hit_rate,
        published_histogram=found.published_histogram,
        published_rates=found.published_rates,
        published_al_step=found.published_al_step,
        timing=dict.fromkeys(each[0].timing),
        output_tps=apart,
        output_tps_steady=apart,
        steady_duration_s=None,
        output_tps_per_gpu=apart,
        curves=Curves(distribution(np.zeros(0)), distribution(np.zeros(0)), None, apart.why_not),
    )


def _accepted(
    counts: metrics.Acceptance,
    names: Sequence[str],
    expected: Mapping[str, int],
    manifest: Mapping[str, Any],
    engine_length: Figure,
    resamples: Resamples,
    ids: Sequence[str],
) -> _Accepted:
    """Everything about acceptance; `expected`: category -> conversations that were to be there;
    `ids`: (C',) names of the conversations."""
    k = int(manifest["engine"]["draft_length"])
    once = metrics.acceptance_lengths(counts, np.ones((1, len(counts.category))))
    weights = resamples.weights(counts.category, ids)
    resampled = metrics.acceptance_lengths(counts, weights)
    whole = counts.whole_offered if counts.told_apart else counts.whole
    cut = counts.cut_offered if counts.told_apart else counts.cut
    of_lengths = _pooled_spread(counts, names, 1, k + 1)
    of_rates = _pooled_spread(counts, names, 0, 1)
    al_bounds = _al_bounds(counts)
    categories = _categories(
        names, expected, _expected(manifest), counts, once, resampled, al_bounds
    )
    rates = metrics.conditional_rates(whole.sum(axis=0), cut.sum(axis=0))
    rate_samples = metrics.conditional_rates(weights @ whole, weights @ cut)
    joint = metrics.joint_rates(rates)
    published = counts.as_published
    n_published = int(published.sum())
    cut_off = (
        f"of {counts.n_cut_unknown} request(s) it is not known which of the steps that the server "
        "told the end cut off"
        if counts.n_cut_unknown
        else ""
    )
    return _Accepted(
        kinds={
            "verify": counts.n_verify,
            "plain": counts.n_plain,
            "decode (draft not told)": counts.n_decode - counts.n_verify - counts.n_plain,
            "merged": counts.n_merged,
            "prefill": counts.n_events - counts.n_decode - counts.n_merged,
        },
        categories=categories,
        lengths={
            **{
                name: _figure(
                    once[name].overall[0],
                    resampled[name].overall,
                    _why_overall(counts, name, categories),
                    of_lengths,
                    al_bounds[-1] if name == "al" else None,
                )
                for name in metrics.AL_NAMES
            },
            "al_engine": engine_length,
        },
        histogram=tuple(int(n) for n in (counts.whole + counts.cut).sum(axis=0)[1:]),
        n_censored=int(counts.cut.sum()),
        rates=_figures(rates, rate_samples, "no step reached this position", of_rates),
        joint=_figures(
            joint, metrics.joint_rates(rate_samples), "an earlier rate is unknown", of_rates
        ),
        rates_over="verify steps"
        if counts.told_apart
        else "decode steps (verify and plain not told apart)",
        draft_hit_rate=_hit_rate(counts),
        published_histogram=() if cut_off else tuple(int(n) for n in published[1:]),
        published_rates=tuple(Figure(None, why_not=cut_off) for _ in published[2:])
        if cut_off
        else _figures(
            metrics.published_rates(published), None, "no step reached this position", of_rates
        ),
        published_al_step=Figure(float(published @ np.arange(len(published))) / n_published)
        if n_published and not cut_off
        else Figure(None, why_not=cut_off or "no steps"),
    )


def _expected(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The closed form's acceptance lengths, for a run on a known-answer checkpoint."""
    found = manifest.get("known_answer") or {}
    return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True, slots=True)
class _Spread:
    """What an interval needs beside the resamples: how many conversations told it, and its range.

    why_none  why there can be no interval; empty if there can
    """

    degrees: int
    lowest: float
    highest: float
    why_none: str = ""


def _figure(
    value: float,
    samples: Floats | None,
    why_not: str,
    spread: _Spread,
    bounds: Floats | None = None,
) -> Figure:
    """A figure from its estimate and its resamples (B,), or from `bounds` that are known already;
    `why_not` is why it would be NaN."""
    if math.isnan(value):
        return Figure(None, why_not=why_not)
    if samples is None or spread.why_none:
        return Figure(float(value), why_not=spread.why_none)
    if bounds is None:
        bounds = stats.widened(stats.percentile_interval(samples), value, spread.degrees)
    if np.isnan(bounds).any():
        return Figure(float(value), why_not=RARE)
    low, high = np.clip(bounds, min(spread.lowest, value), max(spread.highest, value))
    return Figure(float(value), (float(low), float(high)))


def _al_bounds(counts: metrics.Acceptance) -> Floats:
    """95 % bounds (G + 1, 2) of `al`, by category and over categories, by the jackknife: where
    conversations are few it holds the truth more often than resamples do (docs/coverage.md)."""
    rows, width = np.concatenate([counts.whole, counts.cut], axis=1), counts.whole.shape[1]

    def al(sums: Floats | Ints) -> Floats:
        return metrics.acceptance_length(sums[..., :width], sums[..., width:])

    n = counts.n_categories
    values, pseudo = stats.of_sums(rows, counts.category, n, al)
    n_steps = np.asarray(rows.sum(axis=1), float)
    found = stats.category_means(pseudo, counts.category, n, n_steps).at(values)
    return stats.with_overall(found, np.bincount(counts.category, minlength=n) > 0).interval()


RARE = "too few conversations reach it for an interval"


def _figures(
    values: Floats, samples: Floats | None, why_not: str, spread: _Spread
) -> tuple[Figure, ...]:
    return tuple(
        _figure(value, None if samples is None else samples[:, i], why_not, spread)
        for i, value in enumerate(values)
    )


def _pooled_spread(
    counts: metrics.Acceptance, names: Sequence[str], lowest: float, highest: float
) -> _Spread:
    """Of what is pooled over categories."""
    sizes = np.bincount(counts.category, minlength=counts.n_categories)
    lone = np.flatnonzero((sizes > 0) & (sizes < stats.MIN_CONVERSATIONS))
    why = f"category {names[lone[0]]} has a single conversation" if len(lone) else ""
    return _Spread(int((sizes[sizes > 0] - 1).sum()), lowest, highest, why)


def _why(counts: metrics.Acceptance, name: str, n_steps: int) -> str:
    """Why an acceptance length over `n_steps` decode steps is unknown."""
    if name == "al_specdec_bench":
        return "no step was recorded"
    if name == "al_drafted" and not counts.told_apart:
        return "the engine does not tell verify from plain"
    if n_steps == 0:
        return "no single decode step was recorded"
    if name == "al_drafted" and counts.n_verify == 0:
        return "no draft was checked"
    if name == "al_conversation":
        return "no conversation has an uncut decode step"
    return "a position was reached only by steps that the end of a request cut off"


def _why_overall(counts: metrics.Acceptance, name: str, categories: Sequence[CategoryRow]) -> str:
    """Why an acceptance length of the run is unknown; of a mean, which category lacks it."""
    if name in ("al", "al_conversation"):
        for row in categories:
            if row.lengths[name].value is None:
                return f"category {row.name}: {row.lengths[name].why_not}"
    return _why(counts, name, counts.n_decode)


def _categories(
    names: Sequence[str],
    expected: Mapping[str, int],
    known_answer: Mapping[str, Any],
    counts: metrics.Acceptance,
    once: Mapping[str, metrics.AcceptanceLengths],
    resampled: Mapping[str, metrics.AcceptanceLengths],
    al_bounds: Floats,
) -> tuple[CategoryRow, ...]:
    closed_form = known_answer.get("by_category", {})
    rows = []
    for g, name in enumerate(names):
        members = counts.category == g
        n = int(members.sum())
        whole, cut = counts.whole[members].sum(axis=0), counts.cut[members].sum(axis=0)
        n_steps = int((whole + cut).sum())
        lone = "a single conversation has none" if n < stats.MIN_CONVERSATIONS else ""
        spread = _Spread(n - 1, 1, counts.whole.shape[1] - 1, lone)
        rows.append(
            CategoryRow(
                name,
                n,
                max(expected.get(name, 0), n),
                n_steps,
                {
                    al: _figure(
                        once[al].per_category[0, g],
                        resampled[al].per_category[:, g],
                        _why(counts, al, n_steps) if n else "no conversation was measured",
                        spread,
                        al_bounds[g] if al == "al" else None,
                    )
                    for al in metrics.AL_NAMES
                },
                _figures(metrics.conditional_rates(whole, cut), None, "not reached", spread),
                closed_form.get(name),
            )
        )
    return tuple(rows)


def _hit_rate(counts: metrics.Acceptance) -> Figure:
    if not counts.told_apart:
        return Figure(None, why_not="the engine does not tell verify from plain")
    if counts.n_decode == 0:
        return Figure(None, why_not="no single decode step was recorded")
    return Figure(counts.n_verify / counts.n_decode)


def _engine_length(manifests: Sequence[Mapping[str, Any]]) -> Figure:
    drafts = accepted = 0
    for session in (one for manifest in manifests for one in manifest.get("sessions", [])):
        counters = session.get("counters")
        if counters is None:
            untold = "the engine's own counters are not stored"
            return Figure(None, why_not=str(session.get("why_no_counters") or untold))
        drafts += counters["drafts"]
        accepted += counters["accepted"]
    if drafts == 0:
        return Figure(None, why_not="the engine counted no draft")
    return Figure(1 + accepted / drafts, why_not="the counters are totals of the run")


def why_no_time(manifest: Mapping[str, Any], key: str) -> str:
    """Why a run has none of a time, of those in `Summary.timing`."""
    if key == "step_time_s" and manifest["config"].get("url"):
        return "times between a server's chunks are no step times"
    return "no request has two steps" if key in ("step_time_s", "user_tps") else "no request ended"


OPEN_LOOP = "in an open loop arrivals set it, and not the engine"


def throughput(run: Run) -> tuple[Figure, tuple[Figure, float | None], Figure]:
    """Output TPS over the whole run, over the steady window (with its seconds), and per GPU."""
    if why := why_no_throughput(run):
        return (
            Figure(None, why_not=why),
            (Figure(None, why_not=why), None),
            Figure(None, why_not=why),
        )
    number, config = run.manifest["sessions"][0]["session"], run.manifest["config"]
    spans, why = spans_of(run.manifest)
    window = metrics.steady_window(run.columns, number, spans, config["concurrency"])
    if why:
        steady: tuple[Figure, float | None] = (Figure(None, why_not=why), None)
    elif config.get("request_rate"):
        steady = (Figure(None, why_not=OPEN_LOOP), None)
    elif window is None:
        short = "there were no more conversations than slots"
        if len(spans) > 1:
            short = "the replicas never had all their slots filled at the same time"
        steady = (Figure(None, why_not=short), None)
    else:
        steady = (Figure(window.output_tps), window.duration_s)
    if why or run.manifest.get("merged"):
        untold = Figure(None, why_not=why or f"{APART}: only a steady window can be common")
        return untold, steady, untold
    whole = metrics.whole_window(run.columns, number, spans).output_tps
    n_gpus = int(config["tp_size"]) * int(config["pp_size"]) * int(config["dp_size"]) * len(spans)
    engine = run.manifest["engine"]
    if config.get("url"):
        per_gpu = Figure(None, why_not="the GPUs of the server are not known")
    elif not run.manifest["environment"].get("gpus"):
        per_gpu = Figure(None, why_not="no GPU was found on this machine")
    elif engine.get("simulated") or engine.get("settings", {}).get("device") == "cpu":
        per_gpu = Figure(None, why_not="the engine used no GPU")
    else:
        per_gpu = Figure(whole / n_gpus)
    return Figure(whole), steady, per_gpu


def _timeline(run: Run) -> tuple[str, Timeline | None]:
    """What was in flight over time, and why the records cannot tell ('' if they can)."""
    if why := why_no_throughput(run):
        return why, None
    spans, why = spans_of(run.manifest)
    if why:
        return why, None
    config, number = run.manifest["config"], run.manifest["sessions"][0]["session"]
    found = timeline(run.columns, number, spans, config["concurrency"], N_POINTS)
    return "", replace(found, steady_s=None) if config.get("request_rate") else found
