"""Served times: what can be said of a served run's steps and of its client, where chunks are no
steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from speedbench import metrics, store
from speedbench.report.arms import Arm
from speedbench.store import Run

Distribution = Mapping[str, float | None]
"""As `metrics.describe` makes it, in seconds."""


@dataclass(frozen=True, slots=True)
class ServedTimes:
    """One run that asked a server.

    n_chunks, n_single  events after the first of each request; those proven to be one engine step
    mean_step_s   per request: decode time / its steps, as told; None where no request's are known
    n_known       requests whose steps are known
    inter_chunk_s between consecutive chunks of one request: no step time
    send_s        from the submission to the moment the request was handed to a connection
    n_connected   requests that a connection was made for
    proofs        how the server proved the prompts ("echoed", "counted", "") -> requests
    n_cached      prompt tokens that the server took from a cache; None: not told
    busiest       part of the busiest second that the busiest client process computed
    """

    label: str
    n_requests: int
    n_chunks: int
    n_single: int
    mean_step_s: Distribution | None
    n_known: int
    inter_chunk_s: Distribution | None
    send_s: Distribution | None
    n_connected: int
    proofs: Mapping[str, int]
    n_cached: int | None
    busiest: float | None


def served_times(arms: Sequence[Arm]) -> tuple[ServedTimes, ...]:
    return tuple(
        of_run(run, arm.label + (f", run {number}" if len(arm.runs) > 1 else ""))
        for arm in arms
        for number, run in enumerate(arm.runs, 1)
        if run.manifest["config"].get("url")
    )


def of_run(run: Run, label: str) -> ServedTimes:
    columns = run.columns
    later = columns.step > 0
    single = later & (columns.engine_steps == 1)
    rows = store.load_served(run).to_pylist()
    request_of = {
        name: r for r, name in enumerate(run.turns.take(run.used)["request_id"].to_pylist())
    }
    rows = [row for row in rows if row["request_id"] in request_of]
    requests = np.array([request_of[row["request_id"]] for row in rows], np.int64)
    sent = np.array([row["sent_ns"] for row in rows], np.int64)
    cached = [row["n_cached_tokens"] for row in rows if row["n_cached_tokens"] is not None]
    busy = [s["client_busy"] for s in run.manifest["sessions"] if s.get("client_busy") is not None]
    k = int(run.manifest["engine"]["draft_length"])
    times = metrics.served_timing(columns)
    return ServedTimes(
        label=label,
        n_requests=columns.n_requests,
        n_chunks=int(later.sum()),
        n_single=int((single & (metrics.step_kinds(columns, k) != metrics.MERGED)).sum()),
        mean_step_s=metrics.describe(times.mean_step_s),
        n_known=len(times.mean_step_s),
        inter_chunk_s=metrics.describe(times.inter_chunk_s),
        send_s=metrics.describe((sent - columns.submitted_ns[requests]) / 1e9),
        n_connected=sum(row["new_connection"] for row in rows),
        proofs=Counter(row["prompt_proof"] for row in rows),
        n_cached=sum(cached) if cached else None,
        busiest=max(busy, default=None),
    )
