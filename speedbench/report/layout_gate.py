"""Layout of gates: what passed, what failed, what cannot be told, as blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from speedbench.report.blocks import Block, Column, Heading, Paragraph, Style, Table
from speedbench.report.gate import GateResult, Outcome, change_in_words, overall

WORDS: Mapping[Outcome, tuple[str, Style]] = {
    "pass": ("PASSED: every interval lies within its margin.", "plain"),
    "fail": ("FAILED: {n} of {all} lie beyond their margin.", "error"),
    "inconclusive": ("INCONCLUSIVE: {n} of {all} cannot be told.", "warning"),
}

NOTE = (
    "A gate passes when the whole 95 % interval of the change lies within its margin, fails when "
    "it lies beyond, and is inconclusive else: more conversations or repeats narrow the interval. "
    "Of lossless, changes are differences of shares in percentage points."
)


def of_gates(results: Sequence[GateResult]) -> Iterator[Block]:
    """The verdict, then one row for each gate and arm; nothing without gates."""
    if not results:
        return
    outcome = overall(results)
    text, style = WORDS[outcome]
    n = sum(result.outcome == outcome for result in results)
    yield Heading("Gate")
    yield Paragraph(text.format(n=n, all=len(results)), style)
    arms = {result.arm for result in results}
    headers = [
        Column("Gate", words=True),
        Column("Outcome", words=True),
        Column("Change"),
        Column("Allowed"),
    ]
    if len(arms) > 1:
        headers.insert(0, Column("Arm", words=True))
    yield Table(
        (*headers, Column("Why", words=True)),
        tuple(
            (
                *((result.arm,) if len(arms) > 1 else ()),
                result.gate.name,
                result.outcome,
                change_in_words(result),
                result.gate.allowed,
                result.why,
            )
            for result in results
        ),
        (NOTE,),
    )
