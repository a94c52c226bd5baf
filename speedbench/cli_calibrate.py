"""The commands about engines: prove one by known answers, and list what each supports."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from speedbench.cli_base import FAILED, OK, Parser, numbers, signals_handled
from speedbench.cli_measure import launch_of_process, settle
from speedbench.configure import known_engine, merged_with_file
from speedbench.types import UserError

if TYPE_CHECKING:
    from speedbench.calibrate import Cell
    from speedbench.types import Algorithm


NOT_STARTED = ("NULL", "OPENAI")
"""Adapters of no engine that could be started and calibrated."""


def calibrate_command(argv: list[str], prog: str) -> int:
    if (launched := launch_of_process()).n_replicas > 1:
        raise UserError(
            f"{launched.launcher} started {launched.size} processes, calibrate is one: use "
            "mpirun -n 1"
        )
    settle(launched)
    parser = Parser(
        prog=prog,
        description="Run checkpoints whose every step is known through a real engine, and compare.",
    )
    import engines

    names = ", ".join(name for name in engines.ADAPTERS if name not in NOT_STARTED)
    parser.add_argument(
        "--engine", default="VLLM", metavar="X", help=f"engine to prove: {names} (default: VLLM)"
    )
    parser.add_argument(
        "--algorithm", default="all", help="EAGLE3, MTP, ..., comma-separated, or all (default)"
    )
    parser.add_argument("--draft_length", default="1,3,5", metavar="K,K", help="default: 1,3,5")
    parser.add_argument("--concurrency", default="1,8,64", metavar="N,N", help="default: 1,8,64")
    parser.add_argument("--output_length", default="5,20,128", metavar="N,N", help="5,20,128")
    parser.add_argument("--tp_size", default="1", metavar="N", help="tensor parallel size")
    parser.add_argument("--runtime_params", metavar="FILE", help="YAML with engine_args")
    parser.add_argument("--save_dir", metavar="DIR", help="default: runs/<time>-calibrate-<engine>")
    parser.add_argument(
        "--build_only", action="store_true", help="write the checkpoints to --save_dir and stop"
    )
    given = parser.parse(argv)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = known_engine(given.engine)
    if name == "NULL" and not given.build_only:
        raise UserError(
            "--engine NULL makes up its steps, so there is nothing to prove: name the engine that "
            f"is to be held against known answers ({names})"
        )
    if name == "OPENAI" and not given.build_only:
        raise UserError(
            "a server is not started from here: let it serve a checkpoint of --build_only, and "
            "measure it with --dataset calibration, which is held against the closed form"
        )
    directory = Path(given.save_dir or f"runs/{stamp}-calibrate-{name.lower()}")
    if given.build_only:
        from speedbench.calibration import checkpoints

        checkpoints.build(directory)
        print(f"calibration checkpoints: {directory}")
        return OK
    with signals_handled():
        return _print_verdicts(name, given, directory)


def _print_verdicts(engine: str, given: argparse.Namespace, directory: Path) -> int:
    """Run the cases, a line as each is judged; at the end one table, and the exit code."""
    from rich.console import Console
    from rich.markup import escape

    import engines
    from speedbench import calibrate
    from speedbench.report.support import verdict_table
    from speedbench.types import Support

    adapter = engines.adapter(engine)
    asked = _algorithms(given.algorithm)
    supported = [name for name in asked if name in adapter.algorithms]
    if not supported:
        raise UserError(
            f"{engine} has none of {', '.join(asked)}: it has {', '.join(adapter.algorithms)}"
        )
    if directory.exists():
        raise UserError(f"{directory} exists: choose another --save_dir")
    concurrencies = numbers("--concurrency", given.concurrency)
    if (limit := adapter.max_concurrency) is not None:
        concurrencies = sorted({min(n, limit) for n in concurrencies})
    cases = list(
        calibrate.engine_cases(
            supported,
            numbers("--draft_length", given.draft_length),
            concurrencies,
            numbers("--output_length", given.output_length),
        )
    )
    base = {
        "engine": engine,
        "tp_size": given.tp_size,
        **merged_with_file(given.runtime_params),
    }
    console = Console(highlight=False, soft_wrap=True)
    cells: list[Cell] = []
    found_of_cases = calibrate.calibrate(base, cases, directory, adapter, adapter.calibration_args)
    for cell in _unless_all_refused(found_of_cases, directory):
        if not cells:
            console.print(f"[bold]{'case':<42}{'requests':>9}{'steps':>8}  verdict[/bold]")
        cells.append(cell)
        found = cell.verdict
        if found is None:
            console.print(f"{cell.directory.name:<59}  not on this engine: {escape(cell.refusal)}")
            continue
        word = f"[green]{found.kind}[/green]" if found.ok else f"[red]FAULT: {found.fault}[/red]"
        console.print(f"{cell.directory.name:<42}{found.n_requests:>9}{found.n_steps:>8}  {word}")
        if not found.ok or found.kind != "exact" or not found.sentence.endswith("tokens)."):
            console.print(f"    {escape(found.sentence)}")
    absent = {
        name: adapter.support.get(name, Support("absent"))
        for name in asked
        if name not in supported
    }
    console.print()
    console.print(verdict_table(cells, absent))
    judged = [cell.verdict for cell in cells if cell.verdict is not None]
    n_right = sum(found.ok for found in judged)
    console.print(f"\n{n_right} of {len(judged)} cases are as computed. Records: {directory}/runs")
    refused = [c for c in cells if c.verdict is None and not c.case.subject.capture_experts]
    refused_by_name = given.algorithm != "all" and bool(refused)
    return OK if judged and n_right == len(judged) and not refused_by_name else FAILED


def _unless_all_refused(cells: Iterable[Cell], directory: Path) -> Iterator[Cell]:
    """The cells as they come; those that are refused before any is judged are held back while all
    say the same. Raises UserError if there are no others: the engine does not start at all."""
    held: list[Cell] = []
    holding = True
    for cell in cells:
        holding = holding and cell.verdict is None and _same_refusal([*held, cell])
        if holding:
            held.append(cell)
            continue
        yield from held
        held = []
        yield cell
    if held:
        shutil.rmtree(directory / "models")  # ours: the folder was not there before
        directory.rmdir()
        raise UserError(held[0].refusal)


def _same_refusal(cells: Sequence[Cell]) -> bool:
    return len({cell.refusal for cell in cells}) == 1


def _algorithms(text: str) -> list[Algorithm]:
    """What --algorithm names; 'all' is every algorithm there is."""
    from speedbench.types import Algorithm

    known: tuple[Algorithm, ...] = get_args(Algorithm)
    if text.lower() == "all":
        return list(known)
    named = [name.strip().upper() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise UserError(f"--algorithm is '{name}': expected {', '.join(known)}, or all")
    return [name for name in known if name in named]


def engines_command(argv: list[str], prog: str) -> int:
    parser = Parser(prog=prog, description="What each engine supports, and how it was proven.")
    parser.add_argument(
        "--format", choices=("console", "markdown"), default="console", help="what to print"
    )
    given = parser.parse(argv)
    import engines
    from speedbench.report.support import markdown, support_table

    adapters = {name: engines.adapter(name) for name in engines.ADAPTERS if name not in NOT_STARTED}
    if given.format == "markdown":
        print(markdown(adapters))
    else:
        from rich.console import Console

        Console().print(support_table(adapters))
    return OK
