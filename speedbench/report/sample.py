"""Sample: an arm as comparisons see it, by conversation: its own records are needed no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from speedbench import lossless
from speedbench.checks import Check, all_checks
from speedbench.lossless import Answers
from speedbench.report import sides
from speedbench.report.arms import Arm, unlike
from speedbench.report.sides import Measured
from speedbench.report.summary import Figure, throughput
from speedbench.store import Run


@dataclass(frozen=True, slots=True)
class SampleRun:
    """One repeat.

    source      where it was stored
    started     (wall clock, monotonic ns) of each session: no two runs share them
    categories  all that it has, or was to have
    output_tps  steady, or why there is none
    """

    source: str
    started: tuple[tuple[str, int], ...]
    categories: tuple[str, ...]
    checks: tuple[Check, ...]
    output_tps: Figure
    measured: Measured
    answers: Answers


@dataclass(frozen=True, slots=True)
class Sample:
    """An arm's runs. file: the baseline file they were read from; '' if they were not."""

    label: str
    manifest: Mapping[str, Any]
    runs: tuple[SampleRun, ...]
    file: str = ""

    @property
    def draft_length(self) -> int:
        return int(self.manifest["engine"]["draft_length"])

    @property
    def is_baseline(self) -> bool:
        return self.draft_length == 0


def of_arm(arm: Arm) -> Sample:
    first, *others = (_of_run(run) for run in arm.runs)
    first = replace(first, checks=(*first.checks, *unlike(arm)))
    return Sample(arm.label, arm.manifest, (first, *others))


def _of_run(run: Run) -> SampleRun:
    return SampleRun(
        source=str(run.directory),
        started=tuple(
            (str(session.get("started_at")), int(session.get("started_ns") or 0))
            for session in run.manifest["sessions"]
        ),
        categories=run.columns.categories,
        checks=tuple(all_checks(run)),
        output_tps=throughput(run)[1][0],
        measured=sides.measured(run),
        answers=lossless.answers(run),
    )
