"""Layout of what a server told: whose word the acceptance is, the counters beside it, gauges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speedbench.insights.served import ServedSession
from speedbench.report.blocks import Block, Column, Facts, Heading, Paragraph, Style, Table
from speedbench.report.layout import NO_VALUE, number
from speedbench.report.summary import Figure

GAUGES = (
    "What each scrape saw, over an interval of the server's own choice (0: not written yet). A "
    "gauge is never averaged into an acceptance length."
)
LOWER_BOUND = "tokens after the first / verifications: the last of a request may be cut"


def of_served(found: Sequence[ServedSession]) -> Iterator[Block]:
    """Nothing where no server was asked."""
    if not found:
        return
    yield Heading("What the server told")
    for one in found:
        if len(found) > 1:
            yield Heading(one.label, 3)
        yield Facts(tuple(_facts(one)))
    gauges = [(one, gauge) for one in found for gauge in one.reading.gauges]
    if gauges:
        yield Paragraph(GAUGES)
        several = len(found) > 1
        yield Table(
            (
                *([Column("Session", words=True)] if several else []),
                Column("Gauge"),
                Column("Lowest seen"),
                Column("Highest seen"),
                Column("Scrapes"),
            ),
            tuple(
                (
                    *([one.label] if several else []),
                    gauge.name,
                    number(gauge.lowest),
                    number(gauge.highest),
                    str(gauge.n_scrapes),
                )
                for one, gauge in gauges
            ),
        )


def _facts(one: ServedSession) -> Iterator[tuple[str, str, Style]]:
    yield "acceptance", *_acceptance(one)
    yield "AL by counters", *_counters(one)
    if one.per_verification.value is not None:
        told = f"{number(one.per_verification.value)}, a lower bound: {LOWER_BOUND}"
        yield "tokens per verification", told, "plain"
    if one.agree is not None:
        yield "counters and responses", *_agreement(one)
    yield "requests and tokens", *_requests(one)
    if one.sources:
        reading = one.reading
        failed = f", {reading.n_failed} of them without an answer" if reading.n_failed else ""
        told = f"{', '.join(one.sources)}: {reading.n_scrapes} scrapes{failed}"
        yield "metrics", told, "plain"


def _acceptance(one: ServedSession) -> tuple[str, Style]:
    if not one.acceptance_from:
        return f"{NO_VALUE} from the responses: {one.why_no_acceptance}", "plain"
    whole = one.n_telling == one.n_requests
    return (
        f"from {' and '.join(one.acceptance_from)}, in {one.n_telling} of {one.n_requests} "
        "responses",
        "plain" if whole else "warning",
    )


def _counters(one: ServedSession) -> tuple[str, Style]:
    counters = one.reading.counters
    if one.al_counters.value is None or counters is None:
        return _untold(one.al_counters), "warning" if one.reading.why_not else "plain"
    return (
        f"{number(one.al_counters.value)} from {one.reading.engine}'s counters: 1 + "
        f"{counters.accepted} accepted / {counters.drafts} drafts, gained from before the first "
        "request to after the last",
        "plain",
    )


def _untold(figure: Figure) -> str:
    return f"{NO_VALUE}: {figure.why_not}"


def _agreement(one: ServedSession) -> tuple[str, Style]:
    counters = one.reading.counters
    if counters is None:
        counted, told = f"{one.reading.n_verify or 0:.0f} verifications", one.n_verifications
        if one.agree:
            return f"agree: {counted} in both; accepted tokens are not counted", "plain"
        return f"the server counted {counted}, the responses tell {told}", "error"
    if one.agree:
        return (
            f"agree: {counters.drafts} verifications and {counters.accepted} accepted tokens in "
            "both",
            "plain",
        )
    return (
        f"the counters hold {counters.drafts} verifications and {counters.accepted} accepted "
        f"tokens, the responses {one.n_verifications} and {one.n_accepted}",
        "error",
    )


def _requests(one: ServedSession) -> tuple[str, Style]:
    reading = one.reading
    mine = f"this run received {one.n_requests} and {one.n_tokens}"
    if reading.n_finished is None or reading.n_generated is None:
        return f"{mine}; the server's count is not known", "plain"
    text = f"the server counted {reading.n_finished:.0f} and {reading.n_generated:.0f}, {mine}"
    equal = (reading.n_finished, reading.n_generated) == (one.n_requests, one.n_tokens)
    return text, "plain" if equal else "warning"
