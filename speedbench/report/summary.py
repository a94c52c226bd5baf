"""Summary: every number of one stored run, each with its interval or the reason it is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speedbench import metrics, stats
from speedbench.checks import Check, all_checks, counted
from speedbench.columns import Floats
from speedbench.store import Run, expected_conversations

DEFINITIONS: Mapping[str, str] = {
    "al": "decode steps, cut-off steps censored (Kaplan-Meier); steps equal within a category, "
    "then the mean over categories",
    "al_step": "decode steps, cut-off steps censored (Kaplan-Meier); every step equal",
    "al_conversation": "uncut decode steps; mean per conversation, per category, over categories",
    "al_drafted": "verify steps only (a draft was checked); every step equal",
    "al_specdec_bench": "all steps as they look, prefill included; mean per conversation, then "
    "over conversations: the published SPEED-Bench console number, with EOS as a token",
    "al_engine": "the engine's own counters: 1 + accepted / drafts",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95 % interval; `why_not` says why the number, or its interval, is None."""

    value: float | None
    interval: tuple[float, float] | None = None
    why_not: str = ""


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
    expected_al: float | None


def summarize(run: Run) -> Summary:
    """Compute every number from the run's records alone."""
    manifest, columns = run.manifest, run.columns
    k = int(manifest["engine"]["draft_length"])
    counts = counted(run)
    once = metrics.acceptance_lengths(counts, np.ones((1, len(counts.category))))
    weights = stats.bootstrap_weights(counts.category)
    resampled = metrics.acceptance_lengths(counts, weights)
    timing = metrics.timing(columns, k)
    whole = counts.whole_offered if counts.told_apart else counts.whole
    cut = counts.cut_offered if counts.told_apart else counts.cut
    of_lengths = _pooled_spread(counts, columns.categories, 1, k + 1)
    of_rates = _pooled_spread(counts, columns.categories, 0, 1)
    categories = _categories(run, counts, once, resampled)
    rates = metrics.conditional_rates(whole.sum(axis=0), cut.sum(axis=0))
    rate_samples = metrics.conditional_rates(weights @ whole, weights @ cut)
    joint = metrics.joint_rates(rates)
    output, steady, per_gpu = _throughput(run)
    published = counts.as_published
    n_published = int(published.sum())
    return Summary(
        run_dir=str(run.directory),
        manifest=manifest,
        checks=tuple(all_checks(run)),
        draft_length=k,
        n_conversations=len(counts.category),
        n_failed=int(columns.failed.sum()),
        n_requests=columns.n_requests,
        n_steps=len(columns.step),
        n_output_tokens=int(columns.n_tokens.sum()),
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
                )
                for name in metrics.AL_NAMES
            },
            "al_engine": _engine_length(manifest),
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
        published_histogram=tuple(int(n) for n in published[1:]),
        published_rates=_figures(
            metrics.published_rates(published), None, "no step reached this position", of_rates
        ),
        published_al_step=Figure(float(published @ np.arange(len(published))) / n_published)
        if n_published
        else Figure(None, why_not="no steps"),
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
        expected_al=_expected(manifest).get("overall"),
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


def _figure(value: float, samples: Floats | None, why_not: str, spread: _Spread) -> Figure:
    """A figure from its estimate and its resamples (B,); `why_not` is why it would be NaN."""
    if math.isnan(value):
        return Figure(None, why_not=why_not)
    if samples is None or spread.why_none:
        return Figure(float(value), why_not=spread.why_none)
    bounds = stats.widened(stats.percentile_interval(samples), value, spread.degrees)
    if np.isnan(bounds).any():
        return Figure(float(value), why_not=RARE)
    low, high = np.clip(bounds, min(spread.lowest, value), max(spread.highest, value))
    return Figure(float(value), (float(low), float(high)))


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
    run: Run,
    counts: metrics.Acceptance,
    once: Mapping[str, metrics.AcceptanceLengths],
    resampled: Mapping[str, metrics.AcceptanceLengths],
) -> tuple[CategoryRow, ...]:
    expected = expected_conversations(run)
    closed_form = _expected(run.manifest).get("by_category", {})
    rows = []
    for g, name in enumerate(run.columns.categories):
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
                max(expected[name], n),
                n_steps,
                {
                    al: _figure(
                        once[al].per_category[0, g],
                        resampled[al].per_category[:, g],
                        _why(counts, al, n_steps) if n else "no conversation was measured",
                        spread,
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


def _engine_length(manifest: Mapping[str, Any]) -> Figure:
    drafts = accepted = 0
    for session in manifest.get("sessions", []):
        counters = session.get("counters")
        if counters is None:
            return Figure(None, why_not="the engine's own counters are not stored")
        drafts += counters["drafts"]
        accepted += counters["accepted"]
    if drafts == 0:
        return Figure(None, why_not="the engine counted no draft")
    return Figure(1 + accepted / drafts, why_not="the counters are totals of the run")


def _throughput(run: Run) -> tuple[Figure, tuple[Figure, float | None], Figure]:
    """Output TPS over the whole run, over the steady window (with its seconds), and per GPU."""
    sessions = run.manifest.get("sessions", [])
    numbers = {session["session"] for session in sessions}
    if why := _why_no_throughput(run, len(numbers)):
        return (
            Figure(None, why_not=why),
            (Figure(None, why_not=why), None),
            Figure(None, why_not=why),
        )
    number, config = numbers.pop(), run.manifest["config"]
    spans, why = _spans(run.manifest)
    window = metrics.steady_window(run.columns, number, spans, config["concurrency"])
    if why:
        steady: tuple[Figure, float | None] = (Figure(None, why_not=why), None)
    elif window is None:
        short = "there were no more conversations than slots"
        if len(spans) > 1:
            short = "the replicas never had all their slots filled at the same time"
        steady = (Figure(None, why_not=short), None)
    else:
        steady = (Figure(window.output_tps), window.duration_s)
    if run.manifest.get("merged"):
        apart = "the merged jobs did not start together: only a steady window can be common"
        return Figure(None, why_not=why or apart), steady, Figure(None, why_not=why or apart)
    whole = metrics.whole_window(run.columns, number, spans).output_tps
    n_gpus = int(config["tp_size"]) * int(config["pp_size"]) * int(config["dp_size"]) * len(spans)
    engine = run.manifest["engine"]
    if not run.manifest["environment"].get("gpus"):
        per_gpu = Figure(None, why_not="no GPU was found on this machine")
    elif engine.get("simulated") or engine.get("settings", {}).get("device") == "cpu":
        per_gpu = Figure(None, why_not="the engine used no GPU")
    else:
        per_gpu = Figure(whole / n_gpus)
    return Figure(whole), steady, per_gpu


def _why_no_throughput(run: Run, n_sessions: int) -> str:
    """Why the records cannot support a throughput; '' if they can."""
    sessions = run.manifest.get("sessions", [])
    if n_sessions != 1:
        return f"throughput is not pooled over {n_sessions} sessions"
    if any(session.get("ended_ns") is None for session in sessions):
        return "the session did not end in order"
    if any(session.get("n_uncommitted") for session in sessions):
        return "conversations were in flight at the end, and their tokens are not in the records"
    if run.damage:
        return "a part of the records cannot be read"
    if not len(run.columns.step):
        return "no step was recorded"
    failed = [s["replica"] for s in sessions if len(sessions) > 1 and s.get("end") != "finished"]
    return f"replica {failed[0]} did not measure its share" if failed else ""


def _spans(manifest: Mapping[str, Any]) -> tuple[list[metrics.Span], str]:
    """When each replica measured, on a common clock, and why there is none ('' if there is)."""
    sessions = manifest["sessions"]
    one_clock = len({session.get("clock") for session in sessions}) == 1
    met = not manifest.get("merged") and all(s.get("met_ns") is not None for s in sessions)
    known = len(sessions) == 1 or met or (one_clock and sessions[0].get("clock"))
    spans = [
        metrics.Span(
            session.get("replica", 0),
            session["started_ns"],
            session["ended_ns"],
            0 if one_clock or not met else session["met_ns"],
        )
        for session in sessions
    ]
    return spans, "" if known else "the merged jobs have no clock in common"
