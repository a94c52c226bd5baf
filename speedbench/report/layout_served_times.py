"""Layout of a served run's times: of its steps, of its chunks, of its client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speedbench.insights.served_times import Distribution, ServedTimes
from speedbench.report.blocks import Block, Facts, Heading, Style
from speedbench.report.layout import NO_VALUE, number

BUSY = 0.8
"""A client process that computes so much of a second reads late."""


def of_served_times(found: Sequence[ServedTimes]) -> Iterator[Block]:
    """Nothing where no server was asked."""
    for one in found:
        yield Heading("Chunks, steps and the client" + (f": {one.label}" if len(found) > 1 else ""))
        yield Facts(tuple(_facts(one)))


def _facts(one: ServedTimes) -> Iterator[tuple[str, str, Style]]:
    share = f" ({one.n_single / one.n_chunks:.1%})" if one.n_chunks else ""
    yield (
        "chunks",
        f"{one.n_chunks} after the first ones, {one.n_single} of them{share} are known to be one "
        "engine step each",
        "plain",
    )
    yield (
        "mean step time",
        f"{NO_VALUE}: the server does not tell how many steps a request took"
        if one.mean_step_s is None
        else f"{_ms(one.mean_step_s)}; per request, decode time / its steps, of {one.n_known} of "
        f"{one.n_requests} requests",
        "plain",
    )
    yield (
        "inter-chunk latency",
        f"{NO_VALUE}: no request has two chunks"
        if one.inter_chunk_s is None
        else f"{_ms(one.inter_chunk_s)}; a chunk may hold several steps, so this is no step time",
        "plain",
    )
    if one.send_s is not None:
        yield (
            "client, before sending",
            f"{_ms(one.send_s)}, in TTFT; {one.n_connected} request(s) made a connection",
            "plain",
        )
    if one.busiest is not None:
        style: Style = "warning" if one.busiest > BUSY else "plain"
        late = ": it may have read late" if one.busiest > BUSY else ""
        told = f"computed {one.busiest:.0%} of its busiest second{late}"
        yield "client process", told, style
    yield "prompts", _proofs(one), "plain"
    if one.n_cached is not None:
        yield (
            "cached prompt tokens",
            f"{one.n_cached}, as the server tells",
            "warning" if one.n_cached else "plain",
        )


def _ms(found: Distribution) -> str:
    return ", ".join(
        f"{name.upper()} {NO_VALUE if (value := found[name]) is None else number(value * 1e3)} ms"
        for name in ("p50", "p95", "mean")
    )


def _proofs(one: ServedTimes) -> str:
    said = {
        "echoed": "the server returned the token IDs it was asked, which are those sent",
        "counted": "the server counted as many prompt tokens as were sent",
        "": "the server tells nothing of the prompt tokens",
    }
    return "; ".join(f"{said[proof]}: {n} request(s)" for proof, n in sorted(one.proofs.items()))
