"""Served: whose word a served run's acceptance is, and what the server's metrics add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speedbench import server_counters, store
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure
from speedbench.server_counters import ServerReading
from speedbench.store import Run

TOTALS = "the counters are totals of the session"
MERGED = "shards that were merged asked the server apart: report each by itself"


@dataclass(frozen=True, slots=True)
class ServedSession:
    """One session of a run that asked a server.

    sources        addresses of the server's metrics
    acceptance_from  who told the acceptance that the report's numbers are of, as named in the
                   records; empty: nobody did, and `why_no_acceptance` says so
    n_requests, n_tokens  that the run received
    n_telling      requests of which the responses told acceptance
    n_verifications, n_accepted  as those responses told them; None where not every request did
    al_counters    1 + accepted / drafts of the server's counters
    per_verification  tokens per verification as they were put out: a lower bound of the AL
    agree          the counters and the responses hold the same verifications and accepted tokens
                   (verifications, where only they are counted); None where either does not tell
    """

    label: str
    sources: tuple[str, ...]
    acceptance_from: tuple[str, ...]
    why_no_acceptance: str
    n_requests: int
    n_tokens: int
    n_telling: int
    n_verifications: int | None
    n_accepted: int | None
    al_counters: Figure
    per_verification: Figure
    agree: bool | None
    reading: ServerReading


def served(arms: Sequence[Arm]) -> tuple[ServedSession, ...]:
    """Of every session of the arms' runs that asked a server. Raises UserError if a part cannot be
    read."""
    found: list[ServedSession] = []
    for arm in arms:
        for number, run in enumerate(arm.runs, 1):
            if not run.manifest["config"].get("url"):
                continue
            name = arm.label + (f", run {number}" if len(arm.runs) > 1 else "")
            entries = run.manifest["sessions"]
            for entry in entries:
                more = f", session {entry['session']}" if len(entries) > 1 else ""
                found.append(_session(name + more, run, entry))
    return tuple(found)


def _session(label: str, run: Run, entry: dict[str, Any]) -> ServedSession:
    config = run.manifest["config"]
    told = entry.get("server_metrics") or {}
    if run.manifest.get("merged"):
        reading = server_counters.nothing(MERGED)
        received = server_counters.received(run.turns, entry, config)
    else:
        reading = server_counters.of_session(run.directory, config, entry)
        received = server_counters.received(run.turns, entry, config, len(run.damage))
    of_requests = _of_requests(run, int(entry["session"]))
    whole = of_requests.n_telling == received.n_requests > 0
    why = reading.why_not or reading.why_no_al
    counters = reading.counters
    agree = None
    if counters is not None and whole:
        mine = (of_requests.n_verifications, of_requests.n_accepted)
        agree = mine == (counters.drafts, counters.accepted)
    elif reading.n_verify is not None and whole:
        agree = of_requests.n_verifications == reading.n_verify
    al = Figure(None, why_not=why)
    if counters is not None:
        al = Figure(None, why_not="the server counted no draft")
        if counters.drafts:
            al = Figure(1 + counters.accepted / counters.drafts, why_not=TOTALS)
    return ServedSession(
        label=label,
        sources=tuple(told.get("sources", ())),
        acceptance_from=of_requests.sources,
        why_no_acceptance="" if of_requests.sources else _why_no_acceptance(run),
        n_requests=received.n_requests,
        n_tokens=received.n_tokens,
        n_telling=of_requests.n_telling,
        n_verifications=of_requests.n_verifications if whole else None,
        n_accepted=of_requests.n_accepted if whole else None,
        al_counters=al,
        per_verification=Figure(
            reading.per_verification,
            why_not=TOTALS if reading.per_verification is not None else why or "not counted",
        ),
        agree=agree,
        reading=reading,
    )


@dataclass(frozen=True, slots=True)
class _OfRequests:
    """What the responses of a session told."""

    sources: tuple[str, ...]
    n_telling: int
    n_verifications: int
    n_accepted: int


def _of_requests(run: Run, session: int) -> _OfRequests:
    table: pa.Table = store.load_served(run)
    ended = run.turns.filter(pc.not_equal(run.turns["finish_reason"], "error"))
    table = table.filter(
        pc.and_(
            pc.and_(pc.equal(table["session"], session), pc.is_valid(table["acceptance_source"])),
            pc.is_in(table["request_id"], ended["request_id"].combine_chunks()),
        )
    )
    n_verifications = n_accepted = 0
    sources: dict[str, bool] = {}  # whether it told of any verification
    for source, histogram in zip(
        table["acceptance_source"].to_pylist(), table["histogram"].to_pylist(), strict=True
    ):
        sources[source] = sources.get(source, False) or sum(histogram) > 0
        n_verifications += sum(histogram)
        n_accepted += int(np.arange(len(histogram)) @ np.asarray(histogram, np.int64))
    telling = [name for name, told in sources.items() if told] or list(sources)
    return _OfRequests(tuple(sorted(telling)), table.num_rows, n_verifications, n_accepted)


def _why_no_acceptance(run: Run) -> str:
    """Why no response told any."""
    if int(run.manifest["engine"]["draft_length"]) == 0:
        return "nothing was drafted"
    columns = run.columns
    if len(columns.step) and (columns.engine_steps == 1).all():
        return "the responses tell only which tokens each chunk holds"
    server = run.manifest["engine"].get("settings", {}).get("server")
    hint = HINTS.get(str(server), "")
    return f"the responses tell none{hint}; chunks may merge steps, and are not counted as steps"


HINTS: Mapping[str, str] = {
    "vLLM": ": start vLLM with --per-request-spec-decode-metrics detailed",
    "SGLang": ": use an SGLang whose requests take return_spec_tokens_details",
}
"""How a server is brought to tell."""
