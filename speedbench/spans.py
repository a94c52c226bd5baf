"""Spans: when each replica of a run measured, on one clock, and why the records cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from speedbench import metrics
from speedbench.columns import Columns
from speedbench.store import Run

APART = "the merged jobs did not start together"


def why_no_throughput(run: Run) -> str:
    """Why the records cannot support a throughput; '' if they can."""
    sessions = run.manifest.get("sessions", [])
    n_sessions = len({session["session"] for session in sessions})
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
    if not metrics.timed(run.columns).all():
        return "the clock runs backwards"
    failed = [s["replica"] for s in sessions if len(sessions) > 1 and s.get("end") != "finished"]
    return f"replica {failed[0]} did not measure its share" if failed else ""


def spans_of(manifest: Mapping[str, Any]) -> tuple[list[metrics.Span], str]:
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
    whose = "merged jobs" if manifest.get("merged") else "replicas"
    return spans, "" if known else f"the {whose} have no clock in common"


def on_one_clock(columns: Columns, spans: Sequence[metrics.Span]) -> Columns:
    """The same records of one session, all in the clock of the replica whose zero is first."""
    first_ns = min(span.zero_ns for span in spans)
    ahead = np.zeros(1 + max(span.replica for span in spans), np.int64)
    for span in spans:
        ahead[span.replica] = span.zero_ns - first_ns
    if not ahead.any():
        return columns
    ahead_ns = ahead[columns.replica]  # (R,)
    submitted = columns.submitted_ns
    return replace(
        columns,
        submitted_ns=np.where(submitted >= 0, submitted - ahead_ns, submitted),
        time_ns=columns.time_ns - ahead_ns[columns.request],
    )
