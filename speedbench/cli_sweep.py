"""The command that measures a grid of configurations. It prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedbench.cli_base import OK, Parser, Signals
from speedbench.cli_measure import Destination, Start, is_silent_replica
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.series import Kept, Plan
    from speedbench.sweep import Spec

ABOUT = """\
Measure every combination of the values in a grid: one run directory per cell, one engine start per
engine configuration, prompts encoded once.

  {prog} --engine VLLM --model_dir TARGET --draft_model_dir DRAFT --speculative_algorithm EAGLE3 \\
      --grid draft_length=1,3,5 --grid concurrency=1,8,32 --baseline --save_dir runs/sweep
  {prog} --config sweep.yaml --save_dir runs/sweep                 the same from a file:

      base: {{engine: VLLM, model_dir: TARGET, draft_model_dir: D, speculative_algorithm: EAGLE3}}
      grid: {{draft_length: [1, 3, 5], concurrency: [1, 8, 32]}}
      cells: [{{speculative_algorithm: NGRAM, draft_length: 5, concurrency: 8}}]
      baseline: true
      repeat: 2
"""


@dataclass(frozen=True, slots=True)
class SweepAsked:
    """What the command line of a sweep asks for. `given`: flags of runs by name, as text."""

    given: Mapping[str, Any]
    directory: Path
    resume: bool


def sweep_command(argv: list[str], prog: str) -> int:
    from speedbench.cli_run import measuring

    parser = sweep_parser(prog)
    if not argv:
        print(ABOUT.format(prog=prog))
        return OK
    given = vars(parser.parse(argv))
    dry_run = given.pop("dry_run", False)
    destination = Destination(given.pop("save_dir", None), given.pop("resume", False))
    if destination.resume and destination.save_dir is None:
        raise UserError("--resume needs --save_dir: name the sweep's folder to continue")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = Path(destination.local() or f"runs/{stamp}-sweep")
    asked = SweepAsked(given, directory, destination.resume)
    if dry_run:
        if not is_silent_replica():
            _print_plan(*_plan(asked))
        return OK
    return measuring(destination, lambda: asked, _run_sweep, prog)


def sweep_parser(prog: str) -> Parser:
    """The flags of a run, which hold for every cell, and those of a sweep."""
    from speedbench.cli_run import run_parser

    parser = run_parser(prog, for_sweep=True)
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--grid",
        action="append",
        metavar="FLAG=V,V",
        help="a flag of a run and the values it takes; every combination of all grids is a cell",
    )
    sweep.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with base (flags of every cell), grid (flag: values), cells (further ones, as "
        "flags that differ from base), baseline, repeat; flags given here win over the file",
    )
    sweep.add_argument(
        "--resume",
        action="store_true",
        help="measure what is missing in --save_dir; the grid may have grown",
    )
    sweep.add_argument(
        "--dry_run", action="store_true", help="list the cells and engine starts, measure nothing"
    )
    return parser


def _run_sweep(asked: SweepAsked, signals: Signals, start: Start) -> int:
    from speedbench.cli_run import refuse_nodes
    from speedbench.cli_series import measure_all

    refuse_nodes(start.launch)
    replicas = start.replicas
    plan, kept = replicas.from_first(lambda: _plan(asked))
    return measure_all(plan, kept, signals, start)


# ---------------------------------------------------------------- the plan


def _plan(asked: SweepAsked) -> tuple[Plan, Kept | None]:
    """The sweep that is asked for, and what its folder holds of it. Raises UserError."""
    from speedbench import series, store, sweep
    from speedbench.configure import cell_configuration, most_requests

    directory = asked.directory
    kept = _kept(directory) if asked.resume else None
    if not asked.resume:
        store.refuse_existing(directory)
    spec = _spec(asked.given, kept)
    measured = () if kept is None else series.measured(kept, directory)
    cells = sweep.expanded(spec, cell_configuration, most_requests, measured)
    return series.Plan("sweep", directory, spec, cells), kept


def _kept(directory: Path) -> Kept:
    from speedbench import series

    kept = series.read(directory)
    if kept is None:
        raise UserError(
            f"{directory} holds no sweep (it has no {series.FILE}): leave out --resume to begin it"
        )
    if kept.kind != "sweep":
        raise UserError(
            f"{directory} holds the arms of one run: continue it with `run.py --resume --save_dir "
            f"{directory}`"
        )
    return kept


def _spec(given: Mapping[str, Any], kept: Kept | None) -> Spec:
    """From the file, or what the folder holds, and the flags, which win."""
    from speedbench.configure import refuse_redacted
    from speedbench.sweep import Spec, read_spec, spec_of

    flags = dict(given)
    grid: dict[str, Any] = dict(_grid(flags.pop("grid", ())))
    spec = kept.spec if kept is not None else Spec()
    if "config" in flags:
        spec = read_spec(Path(flags.pop("config")))
    baseline = flags.pop("baseline", spec.baseline)
    repeat = flags.pop("repeat", spec.repeat)
    grid = {**spec.grid, **grid}
    for name in () if spec.cells else sorted(flags.keys() & grid.keys()):
        if str(flags[name]) not in map(str, grid[name]):  # else it would be measured nowhere
            raise UserError(
                f"--{name} {flags[name]} is given, but the grid has other values of {name}: leave "
                f"it out, or add it to --grid {name}="
            )
    refuse_redacted({"base": spec.base, "cells": spec.cells})
    of_session = ("max_duration", "show_progress") if kept is not None else ()
    base = {name: value for name, value in spec.base.items() if name not in of_session}
    return spec_of(
        {
            "base": {**base, **flags},
            "grid": grid,
            "cells": spec.cells,
            "baseline": baseline,
            "repeat": repeat,
        },
        "the sweep",
    )


def _grid(words: Sequence[str]) -> dict[str, list[str]]:
    """'concurrency=1,8' -> its values, as text."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        values = [value.strip() for value in text.split(",")]
        if not equals or not name or not all(values):
            raise UserError(f"--grid is '{word}': expected FLAG=V,V such as concurrency=1,8,32")
        if name in found:
            raise UserError(f"--grid {name} is given twice: name all its values in one")
        found[name] = values
    return found


def _print_plan(plan: Plan, kept: Kept | None) -> None:
    """Every engine start, and the runs on it."""
    from speedbench import series
    from speedbench.cli_series import describe, started_as

    series.refuse_other_runs(plan)
    left = series.left(plan)
    names = {run.name for run in left}
    for number, start in enumerate(plan.starts(), 1):
        config = start.runs[0].cell.config
        print(f"engine start {number}: {config.engine}{started_as(config)}")
        for run in start.runs:
            print(f"  {run.name}" + ("" if run.name in names else " (complete)"))
    print(describe(plan, left))
    if kept is not None:
        here = {cell.name for cell in plan.cells}
        if others := [cell.name for cell in kept.cells if cell.name not in here]:
            print(f"kept, but not asked for any more: {', '.join(others)}", file=sys.stderr)
