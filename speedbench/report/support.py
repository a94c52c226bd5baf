"""What engines support and how it was proven; and the table at the end of a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from rich import box
from rich.table import Table

from speedbench.types import Algorithm, EngineAdapter, Support

if TYPE_CHECKING:
    from speedbench.calibrate import Cell

HOW = {
    "real": "real engine",
    "contract": "contract",
    "mapped": "mapped",
    "absent": "-",
}
"""Words for `Support.proof`, as tables show them."""

LEGEND = (
    "real engine: its steps were held against the closed form there. contract: its arguments and "
    "messages were held against the engine's recorded interface, nothing was decoded. mapped: "
    "named as the engine's documentation says, no more. -: the engine does not have it."
)


def rows(
    adapters: Mapping[str, EngineAdapter],
) -> list[tuple[str, str, str, str, str]]:
    """(engine with versions, algorithm, how proven, where, note), one per engine and algorithm."""
    found = []
    for name, adapter in adapters.items():
        for algorithm in get_args(Algorithm):
            support = adapter.support.get(algorithm, Support("absent"))
            engine = f"{name} ({adapter.versions})"
            found.append((engine, algorithm, HOW[support.proof], support.where, support.note))
    return found


def support_table(adapters: Mapping[str, EngineAdapter]) -> Table:
    """For a terminal."""
    table = Table(box=box.SIMPLE_HEAD, caption=LEGEND, caption_justify="left")
    for title in ("engine", "algorithm", "proven", "where", "note"):
        table.add_column(title, overflow="fold")
    last = ""
    for engine, *cells in rows(adapters):
        table.add_row(engine if engine != last else "", *cells)
        last = engine
    return table


def markdown(adapters: Mapping[str, EngineAdapter]) -> str:
    """For the README: algorithms by engines, what the words mean, and what a user must know."""
    names = list(adapters)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines.append(f"| versions | {' | '.join(a.versions for a in adapters.values())} |")
    for algorithm in get_args(Algorithm):
        told = [a.support.get(algorithm, Support("absent")) for a in adapters.values()]
        lines.append(f"| {algorithm} | {' | '.join(HOW[support.proof] for support in told)} |")
    lines += ["", LEGEND, ""]
    for name, adapter in adapters.items():
        places = sorted({s.where for s in adapter.support.values() if s.proof == "real"})
        if places:
            lines.append(f"- {name}, where it ran: {'; '.join(places)}.")
    for name, adapter in adapters.items():
        by_note: dict[str, list[str]] = {}
        for algorithm, support in adapter.support.items():
            if support.note and support.proof != "absent":
                by_note.setdefault(support.note, []).append(algorithm)
        lines += [f"- {name} {', '.join(which)}: {note}." for note, which in by_note.items()]
    return "\n".join(lines)


def verdict_table(cells: Sequence[Cell], absent: Mapping[Algorithm, Support]) -> Table:
    """Algorithm, K and what was found, over all runs of each; then what the engine lacks."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("algorithm", no_wrap=True)
    table.add_column("K", justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("requests", justify="right")
    table.add_column("steps", justify="right")
    table.add_column("why", overflow="fold")
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.case.subject.label, cell.case.k), []).append(cell)
    for (label, k), group in groups.items():
        table.add_row(label, str(k), *_summary(group))
    for name, support in absent.items():
        table.add_row(name, "", "not on this engine", "", "", support.note)
    return table


def _summary(cells: Sequence[Cell]) -> tuple[str, str, str, str]:
    """Verdict, requests, steps and the reason, of the runs of one algorithm and K."""
    found = [cell.verdict for cell in cells if cell.verdict is not None]
    n_requests, n_steps = sum(v.n_requests for v in found), sum(v.n_steps for v in found)
    wrong = [v for v in found if not v.ok]
    kinds = sorted({v.kind for v in found if v.ok})
    words = [*kinds, *sorted({f"FAULT: {v.fault}" for v in wrong})]
    if refused := [cell.refusal for cell in cells if cell.verdict is None]:
        return "not on this engine", "", "", refused[0]
    why = wrong[0].sentence if wrong else ""
    return ", ".join(words), str(n_requests), str(n_steps), why
