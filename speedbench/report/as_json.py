"""JSON: a report for programs, at full precision; strict, so every parser reads it.

Its schema is docs/report_schema.json, and docs/report_schema.md in words.

History
  speedbench.report/1  one run; a pair of runs was `speedbench.pair/1`
  speedbench.report/2  any number of runs, by arm, and what compares them
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from speedbench.checks import Check
from speedbench.lossless import Greedy, Losslessness
from speedbench.report.arms import Arm
from speedbench.report.blocks import clean
from speedbench.report.layout import title
from speedbench.report.sample import Sample
from speedbench.report.summary import DEFINITIONS, Figure, Summary, why_no_time

if TYPE_CHECKING:
    from speedbench.report.found import Found

SCHEMA = "speedbench.report/2"


def report(found: Found) -> dict[str, Any]:
    """The report of arms as plain values (no NaN, no infinity, no control characters)."""
    return _object(
        {
            "schema": SCHEMA,
            "arms": [
                {
                    "label": one.arm.label,
                    "is_baseline": one.arm.is_baseline,
                    "runs": [_run(summary) for summary in one.runs],
                    "pooled": _pooled(one.whole) if len(one.runs) > 1 else None,
                }
                for one in found.told
            ],
            "comparisons": [_mirror(one) for one in found.compared.comparisons],
            "not_compared": dict(found.compared.not_compared),
            "lossless": {label: _lossless(one) for label, one in found.lossless.items()},
            "sweep": _mirror(found.sweep),
            "insights": _mirror(found.insights),
        }
    )


def render(summary: Summary) -> dict[str, Any]:
    """One run as plain values: what stands in `arms[].runs[]` of a report."""
    return _object({"schema": SCHEMA, **_run(summary)})


def plain(schema: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dataclasses as plain values, under the names of their fields."""
    return _object({"schema": schema, **_mirror(values)})


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
        "as_published": _published(summary),
        "output_tps": {
            "whole": _figure(summary.output_tps),
            "steady": {
                **_figure(summary.output_tps_steady),
                "duration_s": summary.steady_duration_s,
            },
            "per_gpu": _figure(summary.output_tps_per_gpu),
        },
        "timing": {
            name: found or {"n": 0, "why_not": why_no_time(summary.manifest, name)}
            for name, found in summary.timing.items()
        },
        "load": _mirror(summary.load),
        "curves": _mirror(summary.curves),
        "manifest": summary.manifest,
    }


def _lossless(found: Losslessness) -> dict[str, Any]:
    method = "identical" if isinstance(found, Greedy) else "two-sample"
    return {"method": method, **_mirror(found)}


def _pooled(whole: Summary) -> dict[str, Any]:
    """Repeats together: what steps tell, and nothing of time."""
    return {
        "n_conversations": whole.n_conversations,
        "acceptance": _acceptance(whole),
        "as_published": _published(whole),
    }


def _published(summary: Summary) -> dict[str, Any]:
    return {
        "histogram": _histogram(summary.published_histogram),
        "conditional_rates": _figures(summary.published_rates),
        "al_token_weighted": _figure(summary.published_al_step),
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


def _mirror(value: Any) -> Any:
    """A tree of dataclasses as plain values, under the names of their fields; an arm is its label.

    What is not shown (private fields) is left out.
    """
    if isinstance(value, Figure):
        return _figure(value)
    if isinstance(value, (Arm, Sample)):
        return value.label
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _mirror(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not field.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return {str(name): _mirror(inner) for name, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_mirror(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [_mirror(inner) for inner in value]
    return value


def _figures(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    return [_figure(figure) for figure in figures]


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
