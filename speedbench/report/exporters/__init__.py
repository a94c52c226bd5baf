"""Exporters: a stored run in the words of an experiment tracker, without any secret."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from speedbench.environment import redact
from speedbench.report import rows
from speedbench.report.summary import Summary, summarize
from speedbench.store import Run
from speedbench.types import UserError

Tracker = Literal["mlflow", "wandb"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
PACKAGES: Mapping[Tracker, str] = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
DEFAULT_EXPERIMENT = "speedbench"

LONGEST = 500
"""Characters of a parameter or a tag: what every version of the trackers takes."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a tracker is told of one run.

    metrics    'al' of the run, 'coding/al' of a category; their intervals as 'al_low', 'al_high'
    params     the configuration, nested names joined by dots
    tags       what identifies inputs, engine and program
    artifacts  file name -> text
    """

    name: str
    metrics: Mapping[str, float]
    params: Mapping[str, str]
    tags: Mapping[str, str]
    artifacts: Mapping[str, str]


def without_secrets(run: Run) -> Run:
    """The run with a manifest from which credentials are blanked out once more."""
    return replace(run, manifest=redact(run.manifest))


def record(arm: str, run: Run, artifacts: Mapping[str, str]) -> Record:
    """Of a run that `without_secrets` made."""
    summary = summarize(run)
    return Record(
        name=f"{arm}: {run.directory.name}",
        metrics=_metrics(rows.of_run(summary, arm)),
        params={name: _short(value) for name, value in _flat(run.manifest["config"])},
        tags={name: _short(value) for name, value in _tags(arm, summary).items() if value},
        artifacts={**artifacts, "manifest.json": json.dumps(run.manifest, indent=1, default=str)},
    )


def load_package(tracker: Tracker) -> Any:
    """The tracker's package. Raises UserError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module(tracker)
    except ImportError as error:
        raise UserError(
            f"--export {tracker} needs the package {PACKAGES[tracker]}, which cannot be imported "
            f"({error}): pip install 'speedbench[{tracker}]'"
        ) from None


def _metrics(found: Iterable[rows.Row]) -> dict[str, float]:
    """Known values alone: a tracker has no place for the reason why there is none."""
    metrics: dict[str, float] = {}
    prefixes = {"": ""}
    for row in found:
        if row.value is None:
            continue
        if row.category not in prefixes:
            prefixes[row.category] = _unused(f"{_allowed(row.category)}/", tuple(prefixes.values()))
        prefix = prefixes[row.category]
        parts = {"": row.value, "_low": row.low, "_high": row.high}
        for suffix, value in parts.items():
            if value is not None:
                metrics[f"{prefix}{row.metric}{suffix}"] = float(value)
    return metrics


def _unused(name: str, taken: Sequence[str]) -> str:
    """The name, or, where another category has it already, the name with underscores before it."""
    return name if name not in taken else _unused(f"_{name}", taken)


def _allowed(name: str) -> str:
    """A category as trackers take it in a metric's name."""
    return re.sub(r"[^\w .-]", "_", name, flags=re.ASCII)


def _tags(arm: str, summary: Summary) -> dict[str, Any]:
    manifest = summary.manifest
    return {
        "arm": arm,
        "run_dir": summary.run_dir,
        "status": manifest["status"],
        "simulated": "yes" if manifest["engine"].get("simulated") else "",
        "engine": manifest["engine"]["name"],
        "engine_version": manifest["engine"]["version"],
        "draft_length": str(summary.draft_length),
        "fingerprint": manifest["prompts"].get("fingerprint"),
        "dataset_sha256": manifest["dataset"].get("sha256"),
        "speedbench_version": (manifest["environment"].get("packages") or {}).get("speedbench"),
        "git_commit": (manifest["environment"].get("git") or {}).get("commit"),
        "warnings": str(sum(check.level != "note" for check in summary.checks)),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) of every leaf, nested names joined by dots."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        path = f"{prefix}{_allowed(str(name))}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{path}.")
        else:
            found.append((path, value))
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"({len(text)} characters: see manifest.json)"
