"""Brief: the part of a report that is told when a run has just ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speedbench.report import layout_lossless
from speedbench.report.blocks import Block, Chart, Heading, Paragraph, Section, Table

HEADLINES = ("In short", "Acceptance Rate Results", "Speedup", "Timing, run by run")
"""Parts that are shown down to their first table."""

SPEEDUP_OF = "Speedup of "
DETAILS = "Details: "
"""How titles begin: of the part about an arm, and of what a page folds away of it."""


def brief(blocks: Sequence[Block]) -> Iterator[Block]:
    """The head of a report, with all that is wrong, the headline parts, and the verdict on every
    arm's outputs; where all parts are folded away, what is folded is told so."""
    yield from _headlines(blocks)
    if not any(_is_headline(block) for block in blocks):
        for block in blocks:
            if isinstance(block, Section) and block.title.startswith(DETAILS):
                yield from _headlines(block.blocks)


def _is_headline(block: Block) -> bool:
    return isinstance(block, Heading) and (
        block.text in HEADLINES or block.text.startswith(SPEEDUP_OF)
    )


def _headlines(blocks: Sequence[Block]) -> Iterator[Block]:
    shown, on_top = True, True
    for block in blocks:
        if isinstance(block, Heading) and block.level > 1:
            on_top = False
            shown = _is_headline(block) or block.text == layout_lossless.TITLE
        if isinstance(block, Paragraph) and block.text in layout_lossless.HOW:
            shown = False  # the verdicts are told, not the numbers
        if shown and not isinstance(block, Chart | Section):
            yield block
        if isinstance(block, Table) and not on_top:
            shown = False
