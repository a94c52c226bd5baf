"""Layout of AIPerf's artifacts: what they say in our words, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from speedbench.aiperf import AiperfRun
from speedbench.report.aiperf_acceptance import accepted
from speedbench.report.blocks import Block, Column, Facts, Heading, Paragraph, Style, Table, clean
from speedbench.report.layout import Cells, number, sentence
from speedbench.report.summary import Figure

COLUMNS: Mapping[str, tuple[str, float]] = {
    "time_to_first_token": ("TTFT\n(ms)", 1e3),
    "inter_token_latency": ("Mean time\nper token\n(ms)", 1e3),
    "inter_chunk_latency": ("Between\nchunks\n(ms)", 1e3),
    "request_latency": ("E2E\n(s)", 1.0),
    "output_token_throughput_per_user": ("User TPS\n(tokens/s)", 1.0),
    "output_sequence_length": ("Output\ntokens", 1.0),
}
"""AIPerf's metric -> header, factor."""
ABOUT = (
    "mean time per token: AIPerf's inter-token latency, each request's (E2E - TTFT) / (tokens - 1)",
    "between chunks: AIPerf's inter-chunk latency. Servers and networks merge engine steps into a "
    "chunk: these are no step times, and chunks are counted as no steps",
)
ROWS = {"n": "n", "min": "min", "avg": "mean", "std": "std", "p25": "P25", "p50": "P50",
        "p75": "P75", "p90": "P90", "p95": "P95", "p99": "P99", "max": "max"}  # fmt: skip


# ---------------------------------------------------------------- blocks


def of_runs(runs: Sequence[AiperfRun]) -> Iterator[Block]:
    """The report of these folders."""
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    yield Heading(f"speedbench: {what} of AIPerf", 1)
    yield Paragraph(
        "Read from AIPerf's artifacts, which hold requests and chunks, not engine steps: step "
        "times, per-position rates and unbiased acceptance need a run of speedbench itself."
    )
    if len(runs) > 1:
        yield Heading("Runs")
        yield _overview(runs)
    for run in runs:
        if len(runs) > 1:
            yield Heading(_label(run))
        yield from _of_run(run)


def _label(run: AiperfRun) -> str:
    return f"{run.model}, {run.category}" if run.category else f"{run.model}, {run.directory}"


def _overview(runs: Sequence[AiperfRun]) -> Table:
    """A row for each run; a mean over categories where one model was asked several."""
    cells = Cells()
    rows = []
    for run in runs:
        found, where = accepted(run), _label(run)
        times = [
            cells.plain(f"{clean(COLUMNS[name][0])} of {where}", _p50(run, name), "not told")
            for name in ("time_to_first_token", "inter_token_latency")
        ]
        rows.append(
            (
                run.model,
                run.category or "not told",
                f"{run.n_ok}/{run.n_ok + run.n_errors}",
                cells.value(f"AL by responses, {where}", found.al_responses),
                cells.interval(f"AL by responses, {where}", found.al_responses),
                cells.value(f"AL by counters, {where}", found.al_counters),
                *times,
                cells.plain(f"output TPS of {where}", run.output_tps, "not told"),
            )
        )
    rows += _means(runs, cells)
    columns = (
        Column("Model", words=True), Column("Category", words=True), Column("n/n"),
        Column("AL by\nresponses"), Column("95 % interval"), Column("AL by\ncounters"),
        Column("TTFT P50\n(ms)"), Column("Time per\ntoken P50 (ms)"),
        Column("Output TPS\n(tokens/s)"),
    )  # fmt: skip
    return Table(columns, tuple(rows), cells.notes())


def _means(runs: Sequence[AiperfRun], cells: Cells) -> Iterator[tuple[str, ...]]:
    """Over the categories of each model that has several, each once; n/a if one is."""
    for model in dict.fromkeys(run.model for run in runs):
        mine = [run for run in runs if run.model == model]
        names = [run.category for run in mine]
        if len(mine) < 2 or "" in names or len(set(names)) < len(names):
            continue
        each = [accepted(run) for run in mine]
        where = f"mean over the categories of {model}"
        mean = _mean([one.al_responses for one in each])
        yield (
            model, "mean over categories", f"{len(mine)} runs",
            cells.value(f"AL by responses, {where}", mean),
            cells.interval(f"AL by responses, {where}", mean),
            cells.value(f"AL by counters, {where}", _mean([o.al_counters for o in each])),
            "", "", "",
        )  # fmt: skip


def _mean(figures: Sequence[Figure]) -> Figure:
    values = [figure.value for figure in figures]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Figure(None, why_not="a category has none")
    return Figure(sum(known) / len(known), why_not="not computed over runs of AIPerf")


def _p50(run: AiperfRun, metric: str) -> float | None:
    value = run.values.get(metric, {}).get("p50")
    return None if value is None else value * COLUMNS[metric][1]


def _of_run(run: AiperfRun) -> Iterator[Block]:
    if run.doubts:
        yield Facts(tuple(("WARNING", doubt, "warning") for doubt in run.doubts))
    yield Facts(tuple((name, text, "plain") for name, text in _about(run)))
    yield Heading("Acceptance", 3)
    yield Facts(tuple(_acceptance(run)))
    yield Heading("Timing, as AIPerf computed it", 3)
    yield Facts((("Output TPS", sentence(_tps(run), "tokens/s over the whole run"), "plain"),))
    yield _times(run)


def _tps(run: AiperfRun) -> Figure:
    return Figure(run.output_tps, why_not="AIPerf does not tell it")


def _about(run: AiperfRun) -> Iterator[tuple[str, str]]:
    yield "AIPerf", run.version
    yield "model", run.model
    yield "category", run.category or "not told by the input: all requests together"
    yield "endpoint", run.endpoint
    yield "concurrency", run.concurrency
    yield "requests", f"{run.n_ok} of {run.n_ok + run.n_errors} without an error"
    if run.n_tokens is not None and run.n_chunks is not None:
        yield "chunks", f"{run.n_tokens} tokens came in {run.n_chunks} reads of the network"
    yield "folder", run.directory


def _acceptance(run: AiperfRun) -> Iterator[tuple[str, str, Style]]:
    found, counted = accepted(run), run.counted
    yield "AL by responses", _with_source(run, found.al_responses), "plain"
    yield "AL by counters", sentence(found.al_counters, "tokens per draft"), "plain"
    yield "accepted / drafted by responses", sentence(found.rate_responses), "plain"
    yield "accepted / drafted by counters", sentence(found.rate_counters), "plain"
    if found.agree is not None:
        text = "agree: the same verifications and accepted tokens"
        if not found.agree:
            mine = sum(o.n_verifications for o in run.told), sum(o.n_accepted for o in run.told)
            text = (
                f"differ: {counted.n_drafts} drafts and {counted.n_accepted} accepted tokens are "
                f"counted, the responses tell {mine[0]} and {mine[1]}"
            )
        yield "counters and responses", text, "plain" if found.agree else "error"
    for name, (low, high) in counted.gauges.items():
        text = f"gauge, from {number(low)} to {number(high)}: of the server's last intervals, no AL"
        yield name, text, "note"


def _with_source(run: AiperfRun, figure: Figure) -> str:
    text = sentence(figure, "tokens per verification")
    if run.n_untold and figure.value is not None:
        text += f"; {run.n_untold} request(s) told nothing and are not in it"
    return text


def _times(run: AiperfRun) -> Table:
    cells = Cells()
    rows = []
    for key, label in ROWS.items():
        row = [label]
        for metric, (header, factor) in COLUMNS.items():
            of = run.values.get(metric, {})
            if key == "n":
                row.append(f"{of['n']:.0f}" if "n" in of else "")
                continue
            value = of.get(key)
            why = "AIPerf does not tell it (is the endpoint streaming?)"
            where = clean(header) if not of else f"{label} of {clean(header)}"
            row.append(cells.plain(where, None if value is None else value * factor, why))
        rows.append(tuple(row))
    headers = tuple(Column(header) for header, _ in COLUMNS.values())
    return Table((Column(""), *headers), tuple(rows), (*cells.notes(), *ABOUT))
