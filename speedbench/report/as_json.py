"""JSON: a report for programs, at full precision; strict, so every parser reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from speedbench.checks import Check
from speedbench.report.blocks import clean
from speedbench.report.layout import DISTRIBUTIONS, title
from speedbench.report.pair import PairSummary, significant
from speedbench.report.summary import DEFINITIONS, Figure, Summary

SCHEMA = "speedbench.report/1"
SCHEMA_PAIR = "speedbench.pair/1"


def render(summary: Summary) -> dict[str, Any]:
    """The report of one run as plain values (no NaN, no infinity, no control characters)."""
    return _object({"schema": SCHEMA, **_run(summary)})


def render_pair(pair: PairSummary) -> dict[str, Any]:
    """The report of a baseline and a speculative run as plain values."""
    return _object(
        {
            "schema": SCHEMA_PAIR,
            "checks": _checks(pair.checks),
            "speedup": {
                "user_tps": _speedup(pair.overall, sum(pair.n_pairs.values())),
                "by_category": [
                    {"name": name, **_speedup(figure, pair.n_pairs[name])}
                    for name, figure in pair.by_category.items()
                ],
                "system": _figure(pair.system),
                "n_baseline_only": pair.n_base_only,
                "n_speculative_only": pair.n_spec_only,
                "n_untimed": pair.n_untimed,
            },
            "baseline": _run(pair.base),
            "speculative": _run(pair.spec),
        }
    )


def _run(summary: Summary) -> dict[str, Any]:
    return {
        "title": title(summary),
        "run_dir": summary.run_dir,
        "simulated": bool(summary.manifest["engine"].get("simulated")),
        "status": summary.manifest["status"],
        "checks": _checks(summary.checks),
        "draft_length": summary.draft_length,
        "n_conversations": summary.n_conversations,
        "n_failed": summary.n_failed,
        "n_requests": summary.n_requests,
        "n_steps": summary.n_steps,
        "n_output_tokens": summary.n_output_tokens,
        "acceptance": _acceptance(summary),
        "as_published": {
            "histogram": _histogram(summary.published_histogram),
            "conditional_rates": _figures(summary.published_rates),
            "al_token_weighted": _figure(summary.published_al_step),
        },
        "output_tps": {
            "whole": _figure(summary.output_tps),
            "steady": {
                **_figure(summary.output_tps_steady),
                "duration_s": summary.steady_duration_s,
            },
            "per_gpu": _figure(summary.output_tps_per_gpu),
        },
        "timing": {
            name: found or {"n": 0, "why_not": DISTRIBUTIONS[name][2]}
            for name, found in summary.timing.items()
        },
        "manifest": summary.manifest,
    }


def _acceptance(summary: Summary) -> dict[str, Any]:
    return {
        "events": dict(summary.kinds),
        "histogram": _histogram(summary.histogram),
        "n_censored": summary.n_censored,
        "rates_over": summary.rates_over,
        "conditional_rates": _figures(summary.rates),
        "joint_rates": _figures(summary.joint),
        "draft_hit_rate": _figure(summary.draft_hit_rate),
        "al": {
            name: {**_figure(figure), "definition": DEFINITIONS[name]}
            for name, figure in summary.lengths.items()
        },
        "closed_form_al": summary.expected_al,
        "by_category": [
            {
                "name": row.name,
                "n_complete": row.n_complete,
                "n_expected": row.n_expected,
                "n_decode_steps": row.n_steps,
                "al": {name: _figure(figure) for name, figure in row.lengths.items()},
                "conditional_rates": _figures(row.rates),
                "closed_form_al": row.expected_al,
            }
            for row in summary.categories
        ],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    """The reason stands beside whatever is missing, be it the value or only its interval."""
    interval = None if figure.interval is None else list(figure.interval)
    return {"value": figure.value, "interval": interval, "why_not": figure.why_not}


def _figures(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    return [_figure(figure) for figure in figures]


def _speedup(figure: Figure, n_pairs: int) -> dict[str, Any]:
    return {**_figure(figure), "n_pairs": n_pairs, "significant": significant(figure)}


def _histogram(counts: Iterable[int]) -> dict[str, int]:
    return {str(n): count for n, count in enumerate(counts, 1)}


def _checks(checks: Iterable[Check]) -> list[dict[str, str]]:
    return [{"level": check.level, "sentence": check.sentence} for check in checks]


def _object(values: Mapping[str, Any]) -> dict[str, Any]:
    return {clean(str(name)): _strict(value) for name, value in values.items()}


def _strict(value: Any) -> Any:
    """The same value as strict JSON can hold it, its text safe to print."""
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
