"""AIPerf: a folder of its artifacts (`profile_export_aiperf.json` and what lies beside it), read
for what it can support.

AIPerf sees chunks of a stream, which servers merge: nothing here takes them for engine steps. An
acceptance length is of what the server told, request by request (`profile_export.jsonl`), or of its
counters (`server_metrics_export.json`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedbench.server_counters import FAMILIES, Family
from speedbench.types import UserError

PROFILE = "profile_export_aiperf.json"
RECORDS = "profile_export.jsonl"
SERVER = "server_metrics_export.json"
DEPTHS = ("", "*/", "*/*/", "*/*/*/")
"""How deep below a folder its runs may lie: AIPerf nests sweeps and repeats."""
CATEGORY_PREFIXES = ("speed_bench_", "speed-bench-")
STATISTICS = ("min", "avg", "std", "p25", "p50", "p75", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class Told:
    """Verifications of one conversation, as the server's responses told them."""

    conversation: str
    n_verifications: int
    n_accepted: int
    n_drafted: int


@dataclass(frozen=True, slots=True)
class Counted:
    """What the server's counters gained. `why_not`: why they are not of this run alone, or tell no
    acceptance; '' if they do.

    gauges  name -> (lowest, highest) seen: over intervals of the server's own
    """

    engine: str
    n_finished: float | None
    n_generated: float | None
    n_drafts: int | None
    n_accepted: int | None
    n_drafted: int | None
    gauges: Mapping[str, tuple[float, float]]
    why_not: str


@dataclass(frozen=True, slots=True)
class AiperfRun:
    """One folder.

    category    the part of SPEED-Bench that was asked; '' where the input does not say
    n_ok, n_errors  requests, as AIPerf judges them
    n_tokens    that the server counted in its answers; None: not told
    n_chunks    reads of the network that held them; None: not told
    values      metric -> statistic -> value, as AIPerf computed it: seconds, tokens and tokens/s
    output_tps  output tokens/s over the run; None: not told
    told        per conversation; empty where responses tell no acceptance
    n_untold    requests that were answered without telling any
    why_not_told  why `told` is empty; '' if it is not
    doubts      what the reader must know
    """

    directory: str
    version: str
    model: str
    category: str
    endpoint: str
    concurrency: str
    n_ok: int
    n_errors: int
    n_tokens: int | None
    n_chunks: int | None
    values: Mapping[str, Mapping[str, float]]
    output_tps: float | None
    told: tuple[Told, ...]
    n_untold: int
    why_not_told: str
    counted: Counted
    doubts: tuple[str, ...]


TIMES: Mapping[str, float] = {
    "time_to_first_token": 1e-3,
    "inter_token_latency": 1e-3,
    "inter_chunk_latency": 1e-3,
    "request_latency": 1e-3,
    "output_token_throughput_per_user": 1.0,
    "output_sequence_length": 1.0,
}
"""Metric -> factor from AIPerf's unit."""
UNITS = {1e-3: ("ms",), 1.0: ("tokens/sec/user", "tokens")}


def folders(place: Path) -> list[Path]:
    """The folders of AIPerf's artifacts at a place or below it; none if there are none."""
    for depth in DEPTHS:
        if found := sorted(path.parent for path in place.glob(depth + PROFILE)):
            return found
    return []


def read(folder: Path) -> AiperfRun:
    """Raises UserError where its profile cannot be read; what else is damaged is a doubt."""
    profile = _object(folder / PROFILE)
    doubts: list[str] = []
    config = _mapping(profile.get("input_config"))
    records = list(_records(folder / RECORDS, doubts))
    told, n_untold, why_not_told = _told(records, (folder / RECORDS).is_file())
    n_ok = int(_stat(profile, "request_count", "avg") or 0)
    n_errors = int(_stat(profile, "error_request_count", "avg") or 0)
    model = _model(config)
    tokens = _stat(profile, "total_usage_completion_tokens", "avg")
    chunks = _stat(profile, "http_req_chunks_received", "sum")
    if profile.get("was_cancelled") or profile.get("is_complete") is False:
        doubts.append("the run was ended before it was complete")
    if n_errors:
        doubts.append(f"{n_errors} request(s) count as errors and are in no time below")
    if told and sum(one.n_verifications for one in told) != (
        total := _stat(profile, "total_spec_decode_steps", "avg")
    ):
        doubts.append(
            f"{RECORDS} holds {sum(one.n_verifications for one in told)} verifications, {PROFILE} "
            f"says {_whole(total)}: one of them is not whole"
        )
    return AiperfRun(
        directory=str(folder),
        version=str(profile.get("aiperf_version", "unknown")),
        model=model,
        category=_category(config),
        endpoint=_endpoint(config),
        concurrency=_concurrency(config),
        n_ok=n_ok,
        n_errors=n_errors,
        n_tokens=None if tokens is None else int(tokens),
        n_chunks=None if chunks is None else int(chunks),
        values={name: found for name in TIMES if (found := _values(profile, name, doubts))},
        output_tps=_stat(profile, "output_token_throughput", "avg"),
        told=told,
        n_untold=n_untold,
        why_not_told=why_not_told,
        counted=_counted(folder / SERVER, model, n_ok + n_errors, n_errors, tokens, doubts),
        doubts=tuple(doubts),
    )


# ---------------------------------------------------------------- files


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from a copy") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object: restore it from a copy")
    return found


def _records(path: Path, doubts: list[str]) -> Iterator[Mapping[str, Any]]:
    """One for every request of the profiling phase."""
    if not path.is_file():
        return
    n_bad = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                found = json.loads(line)
                phase = found["metadata"]["benchmark_phase"]
            except (ValueError, KeyError, TypeError, RecursionError):
                n_bad += 1
                continue
            if phase == "profiling":
                yield found
    if n_bad:
        doubts.append(f"{n_bad} line(s) of {RECORDS} cannot be read")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: object) -> float | None:
    """What can be a number of tokens or steps; None of anything else."""
    found = _number(value)
    return found if found is not None and 0 <= found < 2**31 else None


def _whole(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f}"


# ---------------------------------------------------------------- the profile


def _stat(profile: Mapping[str, Any], metric: str, statistic: str) -> float | None:
    return _number(_mapping(profile.get(metric)).get(statistic))


def _values(profile: Mapping[str, Any], metric: str, doubts: list[str]) -> dict[str, float]:
    """The statistics of a metric, in our unit; none where its unit is not the one that is known."""
    about, factor = _mapping(profile.get(metric)), TIMES[metric]
    if not about:
        return {}
    if about.get("unit") not in UNITS[factor]:
        doubts.append(f"{metric} is in {about.get('unit')!r}, which is not known: it is left out")
        return {}
    found = {name: _number(about.get(name)) for name in STATISTICS}
    made = {name: value * factor for name, value in found.items() if value is not None}
    n = _number(about.get("count"))
    return made if n is None else {"n": n, **made}


def _category(config: Mapping[str, Any]) -> str:
    """The part of SPEED-Bench, if the input is one and no other."""
    names: set[str] = set()
    datasets = config.get("datasets")
    for one in datasets if isinstance(datasets, list) else ():
        about = _mapping(one)
        name = str(about.get("format") or about.get("dataset") or "")
        names.update(
            name.removeprefix(prefix).replace("-", "_")
            for prefix in CATEGORY_PREFIXES
            if name.startswith(prefix)
        )
    return names.pop() if len(names) == 1 else ""


def _model(config: Mapping[str, Any]) -> str:
    items = _mapping(config.get("models")).get("items")
    first = items[0] if isinstance(items, list) and items else {}
    return str(_mapping(first).get("name", "")) or "unknown"


def _endpoint(config: Mapping[str, Any]) -> str:
    endpoint = _mapping(config.get("endpoint"))
    urls = endpoint.get("urls")
    shown = ", ".join(map(str, urls)) if isinstance(urls, list) else "unknown"
    how = "streaming" if endpoint.get("streaming") else "not streaming"
    return f"{shown}, {endpoint.get('type', 'unknown')}, {how}"


def _concurrency(config: Mapping[str, Any]) -> str:
    phases = config.get("phases")
    told = [
        str(one["concurrency"])
        for one in (phases if isinstance(phases, list) else ())
        if isinstance(one, dict) and one.get("kind") == "profiling" and one.get("concurrency")
    ]
    return ", ".join(told) or "not told"


# ---------------------------------------------------------------- acceptance


def _told(
    records: Sequence[Mapping[str, Any]], is_there: bool
) -> tuple[tuple[Told, ...], int, str]:
    """Per conversation what the responses told, how many told nothing, and why none did."""
    sums: dict[str, list[int]] = {}
    n_untold = 0
    for record in records:
        if record.get("error"):
            continue
        metrics = _mapping(record.get("metrics"))
        names = (
            "spec_decode_steps",
            "spec_decode_accepted_draft_tokens",
            "spec_decode_draft_tokens",
        )
        numbers = [_count(_mapping(metrics.get(name)).get("value")) for name in names]
        steps, accepted, drafted = numbers
        if steps is None or accepted is None or drafted is None:
            n_untold += 1
            continue
        metadata = record["metadata"]
        name = str(metadata.get("x_correlation_id") or metadata.get("session_num"))
        own = sums.setdefault(name, [0, 0, 0])
        for place, value in enumerate((steps, accepted, drafted)):
            own[place] += int(value)
    why = (
        "" if sums else "the responses tell none (vLLM's do with --per-request-spec-decode-metrics)"
    )
    if not is_there:
        why = f"{RECORDS} is missing: run AIPerf with --export-level records"
    return tuple(Told(name, *own) for name, own in sums.items()), n_untold, why


def _counted(
    path: Path,
    model: str,
    n_sent: int,
    n_errors: int,
    tokens: float | None,
    doubts: list[str],
) -> Counted:
    """The counters of a server, if they are of this run alone."""
    if not path.is_file():
        return _uncounted(f"{path.name} is missing: AIPerf found no metrics of the server")
    try:
        metrics = _mapping(_object(path).get("metrics"))
    except UserError as error:
        doubts.append(str(error))
        return _uncounted(f"{path.name} cannot be read")
    names = set(metrics)
    family = next((f for f in FAMILIES if any(n.startswith(f.prefix) for n in names)), None)
    if family is None:
        return _uncounted("the server's metrics hold no counter that is known")
    series = _Series(metrics, family, model)
    finished, generated = series.total(family.finished), series.total(family.generated)
    drafts, accepted = series.total(family.drafts), series.total(family.accepted)
    if family.position_drafts:
        drafts = series.total(family.position_drafts, (family.position, "0"))
    why = family.why_no_al
    counts = (
        f"the server counted {_whole(finished)} requests and {_whole(generated)} tokens, AIPerf "
        f"{n_sent} and {_whole(tokens)}"
    )
    if finished is None or generated is None:
        why = "the server does not count tokens and requests: whom else it served is not known"
    elif finished != n_sent or (not n_errors and tokens is not None and generated != tokens):
        why = f"{counts}: the server served others, or not all of its workers are counted"
    elif n_errors and generated != tokens:
        why = (
            f"{counts}, and {n_errors} request(s) count as errors: what the server did for them "
            "cannot be told from what it did for others"
        )
    elif not why and (drafts is None or accepted is None):
        why = f"{family.engine} counts no drafts here"
    elif not why and not drafts:
        why = "the server counted no draft"
    usable = not why and drafts is not None and accepted is not None
    drafted = series.total(family.draft_tokens)
    return Counted(
        family.engine,
        finished,
        generated,
        int(drafts) if usable and drafts is not None else None,
        int(accepted) if usable and accepted is not None else None,
        int(drafted) if usable and drafted is not None else None,
        series.gauges(),
        why,
    )


def _uncounted(why: str) -> Counted:
    return Counted("", None, None, None, None, None, {}, why)


@dataclass(frozen=True, slots=True)
class _Series:
    """The exported metrics of one server; its names lack the `_total` of counters."""

    metrics: Mapping[str, Any]
    family: Family
    model: str

    def of(self, name: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """(labels, statistics) of each series of a metric; of our model where there are several."""
        about = _mapping(self.metrics.get(self.family.prefix + name.removesuffix("_total")))
        series = about.get("series")
        found = [
            (_mapping(one.get("labels")), _mapping(one.get("stats")))
            for one in (series if isinstance(series, list) else ())
            if isinstance(one, dict)
        ]
        if len({labels.get("model_name") for labels, _ in found}) > 1:
            found = [one for one in found if one[0].get("model_name") == self.model]
        return found

    def total(self, name: str, label: tuple[str, str] | None = None) -> float | None:
        """What a counter gained in all of its series; None where it is not there, or fell."""
        values = [
            _number(stats.get("total"))
            for labels, stats in (self.of(name) if name else ())
            if label is None or labels.get(label[0]) == label[1]
        ]
        known = [value for value in values if value is not None and value >= 0]
        return sum(known) if known and len(known) == len(values) else None

    def gauges(self) -> dict[str, tuple[float, float]]:
        found = {}
        for name in self.family.gauges:
            ends = [(_number(s.get("min")), _number(s.get("max"))) for _, s in self.of(name)]
            known = [(low, high) for low, high in ends if low is not None and high is not None]
            if known:
                found[self.family.prefix + name] = (
                    min(low for low, _ in known),
                    max(high for _, high in known),
                )
        return found
