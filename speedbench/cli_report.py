"""The command that reports stored runs. It prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedbench.cli_base import OK, Parser
from speedbench.types import UserError


def report_command(argv: list[str], prog: str) -> int:
    parser = Parser(prog=prog, description="Report one stored run, or a baseline and a run.")
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run directories")
    parser.add_argument(
        "--merge",
        nargs="+",
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="directories that hold the shards (--shard r/R) of one run; may be given twice, for a "
        "baseline and a run",
    )
    parser.add_argument(
        "--format", choices=("console", "markdown", "json"), default="console", help="what to print"
    )
    given = parser.parse(argv)
    if not given.runs and not given.merge:
        raise UserError("no run directory was named: name one, or a baseline and another")
    merges = [[Path(run) for run in shards] for shards in given.merge]
    print_report([Path(run) for run in given.runs], given.format, merges)
    return OK


def print_report(
    directories: Sequence[Path], form: str, merges: Sequence[Sequence[Path]] = ()
) -> None:
    """One run, or a baseline and a speculative run side by side, in the given form."""
    import json

    from speedbench import store
    from speedbench.report import as_json, console, markdown
    from speedbench.report.merge import merged
    from speedbench.report.pair import pair
    from speedbench.report.summary import summarize

    runs = [store.load(directory) for directory in directories]
    runs += [merged(shards) for shards in merges]
    both = None
    if len(runs) == 2:
        runs.sort(key=lambda run: run.manifest["engine"]["draft_length"] > 0)
        both = pair(*runs)
        if runs[0].directory.resolve() == runs[1].directory.resolve():
            raise UserError(f"{runs[0].directory} was named twice: name a baseline and another run")
        if runs[1].manifest["engine"]["draft_length"] == 0:
            raise UserError(
                f"neither {runs[0].directory} nor {runs[1].directory} speculates: name a baseline "
                "and a speculative run"
            )
    elif len(runs) > 2:
        raise UserError(
            f"{len(runs)} runs were named: report one, or a baseline and a speculative run"
        )
    if form == "json":
        found = as_json.render_pair(both) if both else as_json.render(summarize(runs[0]))
        print(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    elif form == "markdown":
        print(markdown.render_pair(both) if both else markdown.render(summarize(runs[0])))
    else:
        from rich.console import Console

        screen = Console()
        if both:
            console.render_pair(both, screen)
        else:
            console.render(summarize(runs[0]), screen)
