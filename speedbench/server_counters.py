"""Server counters: what the samples of a server's metrics say of one session, and what they do not.

A counter counts; what it gained between a scrape before the session and one after it is of the
session, if the server served nobody else and was not started anew meanwhile. A gauge says what was
so at one moment, or over an interval of the server's own: its lowest and highest value seen are
told, and it is never averaged into an acceptance length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from speedbench import store
from speedbench.prometheus import Sample
from speedbench.types import UNKNOWN, EngineCounters

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A name and its labels."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one server names what we ask. A counter that it lacks is ''.

    drafts, draft_tokens, accepted  cumulative counts of speculative decoding
    per_position  accepted tokens by place in the draft, in the label `position`
    position_drafts  drafted tokens by place in the draft: those of the first are the drafts
    generated, finished  tokens put out and requests ended
    verify_calls  verifications, where accepted tokens are not counted
    running       gauge: requests in work; `running_is_live`: it is true at every scrape
    gauges        of speculation, each over an interval that the server chose
    why_no_al     why these counters alone tell no acceptance length; '' if they do
    """

    engine: str
    prefix: str
    generated: str
    finished: str
    running: str
    drafts: str = ""
    draft_tokens: str = ""
    accepted: str = ""
    per_position: str = ""
    position: str = ""
    position_drafts: str = ""
    verify_calls: str = ""
    running_is_live: bool = True
    gauges: tuple[str, ...] = ()
    why_no_al: str = ""

    @property
    def counters(self) -> tuple[str, ...]:
        """Every counter that is read, by name."""
        names = (
            self.generated, self.finished, self.drafts, self.draft_tokens, self.accepted,
            self.per_position, self.position_drafts, self.verify_calls,
        )  # fmt: skip
        return tuple(self.prefix + name for name in names if name)


FAMILIES = (
    Family(
        engine="vLLM",
        prefix="vllm:",
        generated="generation_tokens_total",
        finished="request_success_total",
        running="num_requests_running",
        drafts="spec_decode_num_drafts_total",
        draft_tokens="spec_decode_num_draft_tokens_total",
        accepted="spec_decode_num_accepted_tokens_total",
        per_position="spec_decode_num_accepted_tokens_per_pos_total",
        position="position",
    ),
    Family(
        engine="SGLang",
        prefix="sglang:",
        generated="generation_tokens_total",
        finished="num_requests_total",
        running="num_running_reqs",
        verify_calls="spec_verify_calls_total",
        running_is_live=False,  # written with its log line, every few dozen steps
        gauges=("spec_accept_length", "spec_accept_rate", "gen_throughput"),
        why_no_al="SGLang counts verifications, but not the tokens that they accepted",
    ),
    *(
        Family(
            engine="TensorRT-LLM",
            prefix=prefix,
            generated="generation_tokens_total",
            finished="request_success_total",
            running="num_requests_running",
            draft_tokens="spec_decode_num_draft_tokens_total",
            accepted="spec_decode_accepted_tokens_total",
            per_position="spec_decode_accepted_tokens_total",
            position="token_position",
            position_drafts="spec_decode_drafted_tokens_total",
            running_is_live=False,  # of the last iteration that was read
            gauges=("spec_decode_acceptance_length", "avg_decoded_tokens_per_iter"),
        )
        for prefix in ("trtllm_", "trtllm:")  # the second where Dynamo passes them on
    ),
)
BORN = "process_start_time_seconds"
OTHERS = "it served others meanwhile"


@dataclass(frozen=True, slots=True)
class Received:
    """What the run has of a session: all that it asked, and what it was given.

    n_requests  that were sent and ended, failed ones not counted
    n_broken    requests and conversations of which not all may be in the records: failed, in
                flight at the end, or unreadable
    most        requests that may have been in flight at once; None: no limit
    """

    n_requests: int
    n_tokens: int
    n_broken: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Gauge:
    """A gauge of one series over the scrapes of a session: what was seen, no mean of anything."""

    name: str
    lowest: float
    highest: float
    n_scrapes: int


@dataclass(frozen=True, slots=True)
class ServerReading:
    """What a server's metrics say of one session.

    gained      counter -> what it gained in the session, over all series and addresses
    counters    those of speculative decoding as every engine's are kept, if they are of this
                session alone; None: `why_not` says why, or `why_no_al`
    n_verify    verifications, where they alone are counted
    per_verification  tokens after the first per verification as they were put out, where only
                verifications are counted: the last of a request may be cut, so it is a lower bound
    most_running  most requests that were in work at any scrape
    why_not     why the counters are not of this session alone, or not known; '' if they are
    why_no_al   why they tell no acceptance length even so; '' if they do
    """

    engine: str
    n_scrapes: int
    n_failed: int
    gained: Mapping[str, float]
    gauges: tuple[Gauge, ...]
    n_generated: float | None
    n_finished: float | None
    most_running: float | None
    counters: EngineCounters | None
    n_verify: float | None
    per_verification: float | None
    why_not: str
    why_no_al: str

    @property
    def served_others(self) -> bool:
        """Then the server's times are not those of this session alone, either."""
        return self.why_not.endswith(OTHERS)


def counted(samples: Sequence[Sample]) -> dict[Series, float]:
    """The counters that are read, of one scrape: two that are equal have settled."""
    names = {name for family in FAMILIES for name in family.counters}
    return {(one.name, one.labels): one.value for one in samples if one.name in names}


# ---------------------------------------------------------------- scrapes


@dataclass(slots=True)  # mutable: filled row by row
class _Scrape:
    time_ns: int
    end_ns: int
    is_up: bool = True
    values: dict[Series, float] = field(default_factory=dict)
    counters: dict[Series, float] = field(default_factory=dict)


def _scrapes(table: pa.Table, session: int) -> dict[int, list[_Scrape]]:
    """Address -> its scrapes in order, of one session."""
    found: dict[int, dict[int, _Scrape]] = {}
    labels: dict[str, tuple[tuple[str, str], ...]] = {}
    names = ("source", "time_ns", "took_ns", "name", "labels", "kind", "value")
    mine = table.filter(
        pc.and_(
            pc.equal(table["session"], session), pc.invert(pc.ends_with(table["name"], "_bucket"))
        )
    )
    for source, time_ns, took_ns, name, text, kind, value in zip(
        *(mine[column].to_pylist() for column in names), strict=True
    ):
        if text not in labels:
            labels[text] = _labels(text)
        scrapes = found.setdefault(source, {})
        one = scrapes.setdefault(time_ns, _Scrape(time_ns, time_ns + took_ns))
        if name == "up":
            one.is_up = value == 1.0
            continue
        one.values[name, labels[text]] = value
        if kind == "counter":
            one.counters[name, labels[text]] = value
    return {source: list(by.values()) for source, by in found.items()}


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    """Of a stored series; what no scraper wrote has none."""
    try:
        found = json.loads(text)
    except ValueError:
        return ()
    return tuple(sorted(found.items())) if isinstance(found, dict) else ()


@dataclass(frozen=True, slots=True)
class _Source:
    """One address: what it said from the last scrape before the session to the last after it."""

    inside: Sequence[_Scrape]
    before: _Scrape
    after: _Scrape


def _source(scrapes: Sequence[_Scrape], start_ns: int, end_ns: int) -> _Source | str:
    """Of one address, or why it does not cover the session."""
    up = [one for one in scrapes if one.is_up]
    before = [one for one in up if one.end_ns <= start_ns]
    after = [one for one in up if one.time_ns >= end_ns]
    if not before:
        return "there is no scrape from before the first request"
    if not after:
        return "there is no scrape from after the last request: the server, or the run, was gone"
    # Servers count a moment late: the last of the scrapes after the end is the settled one.
    span = [one for one in up if before[-1].time_ns <= one.time_ns <= after[-1].time_ns]
    return _Source(span, before[-1], after[-1])


def _restarted(source: _Source) -> bool:
    """Whether the server began to count anew between the two scrapes."""
    for earlier, later in zip(source.inside, source.inside[1:], strict=False):
        if _born(earlier) != _born(later):
            return True
        if any(later.counters.get(key, 0.0) < value for key, value in earlier.counters.items()):
            return True
    return False


def _born(scrape: _Scrape) -> list[tuple[Series, float]]:
    """When the server's processes, and its counters, say that they began."""
    return sorted(
        (key, value)
        for key, value in scrape.values.items()
        if key[0] == BORN
        or (key[0].endswith("_created") and key[0].removesuffix("_created") + "_total" in COUNTED)
    )


COUNTED = frozenset(name for family in FAMILIES for name in family.counters)


# ---------------------------------------------------------------- one session


def of_session(
    directory: Path, config: Mapping[str, Any], entry: Mapping[str, Any]
) -> ServerReading:
    """What is stored of one session (its entry in the manifest), read. Raises UserError if a part
    cannot be read."""
    told = entry.get("server_metrics") or {}
    turns, damage = store.load_turns(directory)
    return read(
        store.load_server_metrics(directory),
        int(entry["session"]),
        int(entry["started_ns"]),
        None if entry.get("ended_ns") is None else int(entry["ended_ns"]),
        received(turns, entry, config, len(damage)),
        config.get("model"),
        why_none=str(told.get("why_not", "")),
    )


def received(
    turns: pa.Table, entry: Mapping[str, Any], config: Mapping[str, Any], n_damaged: int = 0
) -> Received:
    """What the records (rows of store.TURNS) hold of a session."""
    mine = turns.filter(pc.equal(turns["session"], entry["session"]))
    sent = mine.filter(pc.not_equal(mine["submitted_ns"], UNKNOWN))
    n_failed = pc.sum(pc.equal(sent["finish_reason"], "error")).as_py() or 0
    lost = sum(int(entry.get(name) or 0) for name in ("n_uncommitted", "n_stray_steps"))
    return Received(
        sent.num_rows - n_failed,
        pc.sum(pc.list_value_length(sent["output_token_ids"])).as_py() or 0,
        n_failed + lost + n_damaged,
        int(config["concurrency"]),
    )


def read(
    table: pa.Table,
    session: int,
    start_ns: int,
    end_ns: int | None,
    received: Received,
    model: str | None = None,
    *,
    why_none: str = "",
) -> ServerReading:
    """What the samples (rows of store.SERVER_METRICS) say of the requests between two times.

    model     the name that requests ask for, where a server has several
    why_none  why nothing was scraped
    """
    by_source = _scrapes(table, session)
    every = [one for scrapes in by_source.values() for one in scrapes]
    family = _family(every)
    if not every or family is None:
        why = why_none or (
            "no metrics were scraped" if not every else "its metrics hold no counter that is known"
        )
        return _nothing(every, why)
    if end_ns is None:
        return _nothing(every, "the session did not end in order")
    sources = [_source(scrapes, start_ns, end_ns) for scrapes in by_source.values()]
    faults = [one for one in sources if isinstance(one, str)]
    whole = [one for one in sources if not isinstance(one, str)]
    models, why_model = _models(family, every, model)
    gained = {} if faults else _gained(family, whole, models)
    seen = [one for source in whole for one in source.inside] if whole else every
    running = _running(family, whole, models)
    generated = gained.get(family.prefix + family.generated)
    finished = gained.get(family.prefix + family.finished)
    why = (
        why_none
        or next(iter(faults), "")
        or why_model
        or _why_spoilt(family, whole, received, generated, finished, running)
    )
    counters, per_verification, why_no_al = (None, None, "")
    if not why:
        counters, per_verification, why_no_al = _speculation(family, gained, whole, models)
    return ServerReading(
        engine=family.engine,
        n_scrapes=len(every),
        n_failed=sum(not one.is_up for one in every),
        gained=gained,
        gauges=_gauges(family, seen, models),
        n_generated=generated,
        n_finished=finished,
        most_running=max(running, default=None),
        counters=counters,
        n_verify=None if why else gained.get(family.prefix + family.verify_calls),
        per_verification=per_verification,
        why_not=why,
        why_no_al=why_no_al,
    )


def nothing(why: str) -> ServerReading:
    """Where the samples are of no use."""
    return _nothing((), why)


def _nothing(every: Sequence[_Scrape], why: str) -> ServerReading:
    n_failed = sum(not one.is_up for one in every)
    return ServerReading(
        "", len(every), n_failed, {}, (), None, None, None, None, None, None, why, ""
    )


def _family(every: Sequence[_Scrape]) -> Family | None:
    """The server whose counters are there."""
    names = {name for one in every for name, _ in one.values}
    for family in FAMILIES:
        if any(name.startswith(family.prefix) for name in names):
            return family
    return None


def _models(
    family: Family, every: Sequence[_Scrape], wanted: str | None
) -> tuple[frozenset[str], str]:
    """Which models' series are ours, and why that is not known."""
    found = {
        dict(labels).get("model_name", "")
        for one in every
        for name, labels in one.values
        if name in family.counters
    }
    if len(found) <= 1:
        return frozenset(found), ""
    if wanted in found:
        return frozenset([wanted]), ""
    named = ", ".join(sorted(found))
    return frozenset(), f"the server counts for several models ({named}), none of them {wanted}"


def _of(scrape: _Scrape, name: str, models: frozenset[str]) -> dict[Series, float]:
    """The series of a name, of those models, of all engines of the server."""
    return {
        key: value
        for key, value in scrape.values.items()
        if key[0] == name and dict(key[1]).get("model_name", "") in models
    }


def _gained(family: Family, sources: Sequence[_Source], models: frozenset[str]) -> dict[str, float]:
    """Counter -> what it gained over all series and addresses. A series that a server makes when
    it first counts begins at 0."""
    gained: dict[str, float] = {}
    for name in dict.fromkeys(family.counters):
        for source in sources:
            before, after = _of(source.before, name, models), _of(source.after, name, models)
            if after:
                more = sum(value - before.get(key, 0.0) for key, value in after.items())
                gained[name] = gained.get(name, 0.0) + more
    return gained


def _running(family: Family, sources: Sequence[_Source], models: frozenset[str]) -> list[float]:
    """Requests in work at each second, over all addresses: of scrapes made together."""
    series = [
        [sum(_of(one, family.prefix + family.running, models).values()) for one in source.inside]
        for source in sources
        if any(_of(one, family.prefix + family.running, models) for one in source.inside)
    ]
    if len({len(one) for one in series}) > 1:  # a scrape of one failed: each by itself
        return [max(one) for one in series]
    return [sum(together) for together in zip(*series, strict=True)]


def _why_spoilt(
    family: Family,
    sources: Sequence[_Source],
    received: Received,
    generated: float | None,
    finished: float | None,
    running: Sequence[float],
) -> str:
    """Why the counters are not of this session alone; '' if they are."""
    if any(_restarted(source) for source in sources):
        return (
            "the server's counters began anew meanwhile: it was started again, or several servers "
            "answer at one address"
        )
    if family.running_is_live and running and running[0] > 0:
        return f"the server had {running[0]:.0f} request(s) in work at the start: {OTHERS}"
    most = math.inf if received.most is None else received.most
    if family.running_is_live and max(running, default=0.0) > most:
        return (
            f"the server had {max(running):.0f} requests in work, the run at most {received.most}: "
            + OTHERS
        )
    if received.n_broken:
        return (
            f"{received.n_broken} request(s) failed or were cut off: what the server did for them "
            "cannot be told from what it did for others"
        )
    if generated is None or finished is None:
        return "the server does not count tokens and requests: whom else it served is not known"
    if (finished, generated) != (received.n_requests, received.n_tokens):
        more = finished > received.n_requests or generated > received.n_tokens
        return (
            f"the server counted {finished:.0f} requests and {generated:.0f} tokens, this run "
            f"received {received.n_requests} and {received.n_tokens}: "
            + (OTHERS if more else "not all of its workers are counted here")
        )
    return ""


def _speculation(
    family: Family,
    gained: Mapping[str, float],
    sources: Sequence[_Source],
    models: frozenset[str],
) -> tuple[EngineCounters | None, float | None, str]:
    """The counters of speculative decoding; tokens per verification; why there are none."""

    def of(name: str) -> float | None:
        return gained.get(family.prefix + name) if name else None

    positions = _by_position(family, family.per_position, sources, models)
    drafts, accepted, per_verification = of(family.drafts), of(family.accepted), None
    if family.position_drafts:
        at = _by_position(family, family.position_drafts, sources, models)
        drafts = at[0] if at else None
        if accepted is None and drafts is not None:
            accepted = 0.0  # a server that accepted nothing has made no such series
    if (calls := of(family.verify_calls)) and (tokens := of(family.generated)) is not None:
        per_verification = (tokens - (of(family.finished) or 0.0)) / calls
    if family.why_no_al:
        return None, per_verification, family.why_no_al
    if drafts is None or accepted is None:
        return None, None, f"{family.engine} counts no drafts here"
    made = EngineCounters(
        int(drafts), int(of(family.draft_tokens) or 0), int(accepted), tuple(map(int, positions))
    )
    if positions and sum(positions) != accepted:
        return None, None, f"{family.engine}'s counters by position do not add up to their total"
    return made, None, ""


def _by_position(
    family: Family, name: str, sources: Sequence[_Source], models: frozenset[str]
) -> list[float]:
    """What a counter gained at each place of a draft."""
    gained: dict[int, float] = {}
    for source in sources if name else ():
        full = family.prefix + name
        before, after = _of(source.before, full, models), _of(source.after, full, models)
        for key, value in after.items():
            told = dict(key[1]).get(family.position, "")
            place = int(told) if told.isdecimal() else -1
            gained[place] = gained.get(place, 0.0) + value - before.get(key, 0.0)
    if not gained or min(gained) < 0:
        return []
    return [gained.get(place, 0.0) for place in range(max(gained) + 1)]


def _gauges(family: Family, seen: Sequence[_Scrape], models: frozenset[str]) -> tuple[Gauge, ...]:
    """The lowest and highest value of each gauge that any scrape saw; of several engines, over all
    of them."""
    found = []
    for name in (*family.gauges, family.running):
        full = family.prefix + name
        values = [
            (one, value)
            for one in seen
            for value in _of(one, full, models).values()
            if math.isfinite(value)
        ]
        if values:
            only = [value for _, value in values]
            n_scrapes = len({id(one) for one, _ in values})
            found.append(Gauge(full, min(only), max(only), n_scrapes))
    return tuple(found)
