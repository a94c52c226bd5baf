"""What the processes of an engine that fell silent were doing, as the watchdog wrote it down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from speedbench.report.blocks import Block, Heading, Section, Verbatim, clean

MOST_LINES = 400
"""Of one stall: engines have hundreds of threads, and the file has them all."""


def of_stalls(directory: Path) -> Iterator[Block]:
    """A folded part with the stacks of each stall; nothing of a run without one."""
    blocks: list[Block] = []
    for path in sorted((directory / "stalls").glob("*.txt")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines = [f"cannot be read: {error}"]
        shown = [_indented(line) for line in lines[:MOST_LINES]]
        if len(lines) > MOST_LINES:
            shown.append(f"... {len(lines) - MOST_LINES} more lines in {path}")
        blocks += [Heading(f"stalls/{path.name}", 3), Verbatim(tuple(shown))]
    if blocks:
        yield Section("Where the engine was when it fell silent", tuple(blocks), long=True)


def _indented(line: str) -> str:
    text = line.lstrip(" ")
    return " " * min(8, len(line) - len(text)) + clean(text)
