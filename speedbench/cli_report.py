"""The command that reports stored runs, in every form. It prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from speedbench import cli_aiperf
from speedbench.cli_base import OK, Parser
from speedbench.limits import LIMITED, parse_limits
from speedbench.types import UserError

if TYPE_CHECKING:
    from speedbench.insights.options import InsightOptions
    from speedbench.report.arms import Arm
    from speedbench.report.blocks import Block
    from speedbench.report.rows import Row
    from speedbench.report.written import Form
    from speedbench.store import Run

FORMATS = ("console", "markdown", "json", "csv", "parquet", "html", "specdec_bench")
MATRIX_METRICS = ("accept_length", "accept_rate", "throughput")
TRACKERS = ("mlflow", "wandb")

ABOUT = """\
Report stored runs: one, several, or folders of runs (what --baseline, --repeat and sweep write).
Runs that measured the same are repeats of one arm; a baseline is what the others are held against.
"""
PAGE = "report.html"
MATRIX_CSV = "speed_bench_report.csv"
"""What AIPerf's command writes to if it is not told otherwise."""

WITH_INSIGHTS = ("console", "markdown", "json", "html")


def report_command(argv: list[str], prog: str) -> int:
    given = _parser(prog).parse(argv)
    _refuse_mixture(given)
    if cli_aiperf.reported(given):
        return OK
    arms = _arms(given.runs, given.merge)
    if given.goodput is not None:
        arms = _limited(arms, given.goodput)
    if given.matrix:
        _matrix(arms, given)
    elif given.export:
        _export(arms, given)
    else:
        _report(arms, given)
    return OK


def print_summary(directory: Path, place: str) -> None:
    """Of a run, or a folder of runs, that has just ended: what it comes to, and where all of it is,
    a page included. How the run ended decides its exit code, and no fault of this.

    place  what the user calls the directory
    """
    from rich.console import Console

    from speedbench.report import console, html, written
    from speedbench.report.arms import load_arms
    from speedbench.report.brief import brief

    try:
        blocks = list(_blocks(load_arms([directory]), None))
        console.draw(brief(blocks), Console())
        page = html.render(blocks, "speedbench").encode("utf-8")
        written.save(page, str(directory / PAGE), "html")
    except Exception as error:  # noqa: BLE001 - what was measured is stored
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"speedbench: no whole report: {what}", file=sys.stderr)
        return
    print(
        f"\nAll of it: {place.rstrip('/')}/{PAGE}, or: speedbench report {place}", file=sys.stderr
    )


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog, description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="DIR", help="run directories, folders of runs, or their URLs")
    add(
        "--merge",
        nargs="+",
        action="append",
        default=[],
        metavar="DIR",
        help="directories that hold the shards (--shard r/R) of one run; may be given again for "
        "another run",
    )
    add(
        "--format",
        choices=FORMATS,
        help="console (default), markdown, json and csv are printed, or written to --out; html "
        "goes to report.html in the folder that was named, unless --out says where; parquet needs "
        "--out FILE; specdec_bench writes the files of the publisher's harness to --out FOLDER",
    )
    add("--out", metavar="PLACE", help="file, folder or URL to write to")

    group = parser.add_argument_group("matrix of models by categories, as AIPerf lays it out")
    add = group.add_argument
    add("--matrix", choices=("csv", "table", "both"), help="print a table, write CSV, or both")
    add(
        "--metric",
        choices=MATRIX_METRICS,
        help="acceptance length (default), accepted / drafted tokens, or output tokens/s",
    )

    group = parser.add_argument_group("load")
    group.add_argument(
        "--goodput", metavar="LIMITS",
        help="count the requests that keep these limits, such as ttft=200ms,step_time=30ms, "
        f"instead of those that a run was given ({', '.join(LIMITED)})",
    )  # fmt: skip

    group = parser.add_argument_group("experiment trackers")
    add = group.add_argument
    add("--export", choices=TRACKERS, help="store the runs there, with their report")
    add("--experiment", metavar="NAME", help="experiment or project there (default: speedbench)")

    group = parser.add_argument_group("insights")
    add = group.add_argument
    add("--think_end", metavar="TEXT", help="text, or token ids, that ends an answer's thinking")
    add("--gpu_hour_price", type=_price, metavar="DOLLARS", help="of one GPU for one hour")
    add(
        "--draft_vocabulary",
        metavar="FOLDER",
        help="draft checkpoint whose pruned vocabulary was in use, where runs did not store it",
    )
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="turns token ids into text (specdec_bench) and --think_end into ids",
    )
    return parser


def _price(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


_price.__name__ = "price above 0"


# ---------------------------------------------------------------- mistakes


def _refuse_mixture(given: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go together."""
    if given.goodput is not None:
        try:
            parse_limits(given.goodput)
        except ValueError as error:
            raise UserError(str(error)) from None
    if not given.runs and not given.merge:
        raise UserError("no run was named: name a run directory, or a folder of runs")
    whole = [f"--{name}" for name in ("matrix", "export", "format") if getattr(given, name)]
    if len(whole) > 1:
        raise UserError(f"{' and '.join(whole)} exclude one another: give one of them")
    form = given.format or "console"
    needs = {
        "metric": (given.matrix, "--matrix csv, table or both"),
        "experiment": (given.export, "--export mlflow or wandb"),
        **{
            name: (whole in ([], ["--format"]) and form in WITH_INSIGHTS, _one_of(WITH_INSIGHTS))
            for name in ("think_end", "gpu_hour_price", "draft_vocabulary")
        },
        "tokenizer": (
            given.think_end or form == "specdec_bench",
            "--think_end or --format specdec_bench",
        ),
    }
    for name, (met, what) in needs.items():
        if getattr(given, name) is not None and not met:
            raise UserError(f"--{name} belongs to {what}: add that, or leave --{name} out")
    if given.out is not None and (given.export or given.matrix == "table"):
        raise UserError(f"{whole[0]} writes no file, but --out is {given.out}: leave --out out")
    if given.out is None and form in ("parquet", "specdec_bench"):
        what = "FOLDER" if form == "specdec_bench" else "FILE"
        raise UserError(f"--format {form} writes no text to print: add --out {what}")


def _one_of(forms: Sequence[str]) -> str:
    return f"--format {', '.join(forms[:-1])} or {forms[-1]}"


def _arms(runs: Sequence[str], merges: Sequence[Sequence[str]]) -> tuple[Arm, ...]:
    from speedbench.report.arms import load_arms

    return load_arms([_place(run) for run in runs], [[_place(r) for r in some] for some in merges])


def _limited(arms: Sequence[Arm], limits: str) -> tuple[Arm, ...]:
    """The same arms, as if their runs had been given these limits."""

    def limited(run: Run) -> Run:
        config = {**run.manifest["config"], "goodput": limits}
        return replace(run, manifest={**run.manifest, "config": config})

    return tuple(replace(arm, runs=tuple(map(limited, arm.runs))) for arm in arms)


def _place(named: str) -> Path:
    """The folder that was named, or a copy of what is behind its URL."""
    from speedbench import remote

    path = remote.localized(named)
    if not path.exists():
        raise UserError(f"{named} does not exist: name a run directory, or a folder of runs")
    if not path.is_dir():
        raise UserError(
            f"{named} is a file: name the run directory that it lies in, {path.parent}, or a "
            "folder of runs"
        )
    return path


# ---------------------------------------------------------------- the report


def _report(arms: Sequence[Arm], given: argparse.Namespace) -> None:
    form: Form | Literal["specdec_bench"] = given.format or "console"
    options = _options(arms, given)
    if form == "specdec_bench":
        _specdec_bench(arms, given)
    elif form == "html" or given.out is not None:
        place = given.out or _default_place(given)
        _write(_bytes(arms, form, options), place, form)
    else:
        _print(arms, form, options)


def _options(arms: Sequence[Arm], given: argparse.Namespace) -> InsightOptions | None:
    """What only the user can say; None if nothing was said."""
    from speedbench.insights.options import InsightOptions, think_end_ids
    from speedbench.report.text import Text

    if not (given.think_end or given.gpu_hour_price or given.draft_vocabulary):
        return None
    words = Text(given.tokenizer or str(arms[0].manifest["prompts"].get("tokenizer")))
    think_end = given.think_end and think_end_ids(given.think_end, words.encode, words.decode)
    return InsightOptions(
        think_end=think_end or (),
        gpu_hour_price=given.gpu_hour_price,
        draft_vocabulary=Path(given.draft_vocabulary) if given.draft_vocabulary else None,
    )


def _default_place(given: argparse.Namespace) -> str:
    if len(given.runs) == 1 and not given.merge:
        return f"{given.runs[0].rstrip('/')}/{PAGE}"
    raise UserError("a page of runs from several places needs a place of its own: add --out FILE")


def _print(arms: Sequence[Arm], form: str, options: InsightOptions | None) -> None:
    if form == "console":
        from rich.console import Console

        from speedbench.report import console

        console.draw(_blocks(arms, options), Console())
    else:
        print(_text(arms, form, options), end="")


def _write(data: bytes, place: str, form: Form) -> None:
    from speedbench.report import written

    written.save(data, place, form)
    print(f"wrote {place}", file=sys.stderr)


def _bytes(arms: Sequence[Arm], form: str, options: InsightOptions | None) -> bytes:
    if form != "parquet":
        return _text(arms, form, options).encode("utf-8")
    from speedbench.report import as_parquet

    return as_parquet.render(_rows(arms))


def _text(arms: Sequence[Arm], form: str, options: InsightOptions | None) -> str:
    """A form that is text, whole."""
    if form == "csv":
        from speedbench.report import as_csv

        return as_csv.render(_rows(arms))
    if form == "json":
        return _json(arms, options)
    if form == "markdown":
        from speedbench.report import markdown

        return markdown.write(_blocks(arms, options))
    if form == "html":
        from speedbench.report import html

        return html.render(_blocks(arms, options), "speedbench")
    import io

    from rich.console import Console

    from speedbench.report import console

    out = io.StringIO()
    console.draw(_blocks(arms, options), Console(file=out, width=120, color_system=None))
    return out.getvalue()


def _blocks(arms: Sequence[Arm], options: InsightOptions | None) -> Iterator[Block]:
    """What is wrong with the options is told before anything is printed."""
    from speedbench.insights.collected import collect
    from speedbench.insights.options import InsightOptions
    from speedbench.report import layout_insights
    from speedbench.report.document import document

    insights = collect(arms, options or InsightOptions())
    yield from document(arms, layout_insights.of_insights(insights))


def _json(arms: Sequence[Arm], options: InsightOptions | None) -> str:
    import json

    from speedbench.report import as_json
    from speedbench.report.found import found

    whole = as_json.report(found(arms, options))
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rows(arms: Sequence[Arm]) -> list[Row]:
    from speedbench.report import rows
    from speedbench.report.found import found

    return list(rows.of_report(found(arms)))


# ---------------------------------------------------------------- matrix, exports


def _matrix(arms: Sequence[Arm], given: argparse.Namespace) -> None:
    from rich.console import Console

    from speedbench.report import console, layout_matrix
    from speedbench.report.matrix import matrix

    found = matrix(arms, given.metric or "accept_length")
    if given.matrix in ("table", "both"):
        console.draw(layout_matrix.of_matrix(found), Console())
    if given.matrix == "csv" and given.out is None:
        print(layout_matrix.to_csv(found), end="")
    elif given.matrix != "table":
        data = layout_matrix.to_csv(found).encode("utf-8")
        _write(data, given.out or MATRIX_CSV, "matrix")


def _specdec_bench(arms: Sequence[Arm], given: argparse.Namespace) -> None:
    """One run into the folder; several into a folder each, named as their own are."""
    from speedbench import remote
    from speedbench.report import specdec_bench
    from speedbench.report.text import Text

    if remote.is_url(given.out):
        raise UserError(f"--out is {given.out}: give a folder on this machine, and copy it there")
    runs = [run for arm in arms for run in arm.runs]
    names = [Path(str(run.manifest.get("merged", [run.directory])[0])).name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{number:02d}-{name}" for number, name in enumerate(names, 1)]
    decode = Text(given.tokenizer).decode if given.tokenizer else None
    for run, name in zip(runs, names, strict=True):
        folder = Path(given.out) if len(runs) == 1 else Path(given.out) / name
        specdec_bench.write(run, folder, decode)
        print(f"wrote {folder}", file=sys.stderr)


def _export(arms: Sequence[Arm], given: argparse.Namespace) -> None:
    import importlib
    from dataclasses import replace

    from speedbench.report import exporters

    exporters.load_package(given.export)  # before what takes time
    safe = [
        replace(arm, runs=tuple(exporters.without_secrets(run) for run in arm.runs)) for arm in arms
    ]
    page = _text(safe, "html", None)
    records = [
        exporters.record(arm.label, run, {"report.html": page}) for arm in safe for run in arm.runs
    ]
    tracker = importlib.import_module(f"speedbench.report.exporters.{given.export}")
    for place in tracker.export(records, given.experiment or exporters.DEFAULT_EXPERIMENT):
        print(f"stored {place}", file=sys.stderr)
