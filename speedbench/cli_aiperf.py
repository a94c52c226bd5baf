"""The report of AIPerf's artifacts, where `speedbench report` was given such folders. It prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from speedbench.types import UserError

if TYPE_CHECKING:
    from speedbench.aiperf import AiperfRun

Form = Literal["console", "markdown", "json", "html"]
OF_OUR_RUNS = (
    "matrix", "metric", "export", "experiment", "think_end", "gpu_hour_price", "draft_vocabulary",
    "tokenizer", "goodput",
)  # fmt: skip
"""Flags of the report that need engine steps, or a run directory."""


def reported(given: argparse.Namespace) -> bool:
    """Report AIPerf's artifacts if these are what was named; whether they were."""
    from speedbench import aiperf

    below = {run: aiperf.folders(Path(run)) for run in given.runs if _may_be(run)}
    found = [folder for run in below for folder in below[run]]
    if not found:
        return False
    others = [run for run in given.runs if not below.get(run)]
    others += [run for merged in given.merge for run in merged]
    if others:
        raise UserError(
            f"{found[0]} is of AIPerf and {others[0]} is not: report them one after the other"
        )
    form = _form(given)
    runs = [aiperf.read(folder) for folder in dict.fromkeys(found)]
    if form == "console" and given.out is None:
        from rich.console import Console

        from speedbench.report import console, layout_aiperf

        console.draw(layout_aiperf.of_runs(runs), Console())
    elif form == "html" or given.out is not None:
        from speedbench.report import written

        place = given.out or _default_place(given.runs)
        written.save(_text(runs, form).encode("utf-8"), place, form)
        print(f"wrote {place}", file=sys.stderr)
    else:
        print(_text(runs, form), end="")
    return True


def _may_be(named: str) -> bool:
    """Whether it may be a folder of AIPerf's: one of ours has a manifest."""
    return "://" not in named and Path(named).is_dir() and not Path(named, "manifest.json").exists()


def _form(given: argparse.Namespace) -> Form:
    for name in OF_OUR_RUNS:
        if getattr(given, name, None) is not None:
            raise UserError(
                f"--{name} needs a run of speedbench, and {given.runs[0]} is of AIPerf: leave it "
                "out"
            )
    form: Form = given.format or "console"
    if form not in get_args(Form):
        raise UserError(
            f"--format {form} needs a run of speedbench, and {given.runs[0]} is of AIPerf: use "
            "console, markdown, json or html"
        )
    return form


def _default_place(named: Sequence[str]) -> str:
    if len(named) == 1:
        return f"{named[0].rstrip('/')}/report.html"
    raise UserError("a page of runs from several places needs a place of its own: add --out FILE")


def _text(runs: Sequence[AiperfRun], form: Form) -> str:
    from speedbench.report import aiperf_acceptance, html, layout_aiperf, markdown

    if form == "json":
        import json

        whole = aiperf_acceptance.as_plain(runs)
        return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "markdown":
        return markdown.write(layout_aiperf.of_runs(runs))
    if form == "html":
        return html.render(layout_aiperf.of_runs(runs), "speedbench")
    import io

    from rich.console import Console

    from speedbench.report import console

    out = io.StringIO()
    console.draw(layout_aiperf.of_runs(runs), Console(file=out, width=120, color_system=None))
    return out.getvalue()
