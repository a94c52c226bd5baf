"""The commands about data: prepare a benchmark, and show what is prepared. It prints."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedbench.cli_base import OK, USAGE, Parser, signals_handled
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.datasets.overview import Overview
    from speedbench.datasets.prepare import Watcher
    from speedbench.report.blocks import Block

LOG_INTERVAL_S = 30.0
SUBCOMMANDS: Mapping[str, str] = {
    "select": "select_command",
    "bucket": "bucket_command",
    "tokens": "tokens_command",
}


# ---------------------------------------------------------------- prepare


def prepare_command(argv: list[str], prog: str) -> int:
    from speedbench.config import SPEED_CONFIGS

    parser = Parser(
        prog=prog,
        description="Fetch a benchmark, check every row, and put it in place with its identity.",
    )
    parser.add_argument(
        "--dataset", choices=("speed", "specbench", "mtbench"), default="speed",
        help="default: speed",
    )  # fmt: skip
    parser.add_argument(
        "--config", choices=(*SPEED_CONFIGS, "all"), metavar="NAME",
        help=f"of speed: {', '.join(SPEED_CONFIGS)} or all",
    )  # fmt: skip
    parser.add_argument(
        "--revision", metavar="R", help="commit, branch or tag (default: a pinned commit)"
    )
    parser.add_argument("--out", metavar="DIR", help="default: data/<dataset>")
    parser.add_argument(
        "--accept_license", action="store_true", help="accept the licences that are shown"
    )
    parser.add_argument(
        "--git_url", metavar="URL",
        help="a mirror of the repository that holds the preparer (speed) or the file (others)",
    )  # fmt: skip
    parser.add_argument(
        "--preparer_commit", metavar="COMMIT", help="of the publisher's preparer, if not the pinned"
    )
    parser.add_argument("--sha256", metavar="HEX", help="refuse rows with another hash than this")
    given = parser.parse(argv)
    if (given.dataset == "speed") != (given.config is not None):
        raise UserError(
            f"--config is missing: name one of {', '.join(SPEED_CONFIGS)}, or all"
            if given.config is None
            else f"--dataset {given.dataset} has no configurations: leave out --config"
        )
    if given.preparer_commit is not None and given.dataset != "speed":
        raise UserError(f"--dataset {given.dataset} has no preparer: leave out --preparer_commit")
    if given.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", given.sha256):
        raise UserError(
            f"--sha256 is '{given.sha256:.70}': expected 64 hex digits in lower case, as "
            "`speedbench data` shows them"
        )
    from speedbench.datasets import prepare, preparer

    order = prepare.Order(
        given.dataset,
        given.config or "",
        given.revision,
        None if given.out is None else Path(given.out),
        given.git_url,
        given.preparer_commit or preparer.COMMIT,
        given.sha256,
    )
    with signals_handled(), _watching() as watcher:

        def accept(licences: Sequence[Mapping[str, str]], must: bool) -> None:
            _accept(licences, must, given.accept_license)

        done = prepare.prepare(order, watcher, accept)
    for each in done:
        found = each.identity
        state = "is there already, unchanged" if each.was_there else "prepared"
        print(
            f"{each.folder}: {state}; {found['rows']} rows, {found['requests']} requests, sha256 "
            f"{found['sha256']}, revision {found['source']['revision']}"
        )
    return OK


def _accept(licences: Sequence[Mapping[str, str]], must: bool, accepted: bool) -> None:
    """Show licences; ask on a terminal. Raises UserError where they are not accepted."""
    width = max(len(licence["of"]) for licence in licences)
    for licence in licences:
        print(f"{licence['of']:<{width}}  {licence['name']}  {licence['page']}", file=sys.stderr)
    if not must or accepted:
        return
    print(
        "Whether these licences fit your purpose is for you to check. Prepared files are for your "
        "own use: do not pass them on.",
        file=sys.stderr,
    )
    if sys.stdin.isatty() and sys.stderr.isatty():
        print("Do you accept them? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise UserError(
        "the licences above were not accepted: read them at their pages and add --accept_license"
    )


class _Lines:
    """Progress in a log: a line per stage, and now and then what a long one is doing."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def stage(self, text: str) -> None:
        self._print(text)

    def detail(self, text: str, share: float | None) -> None:
        if time.monotonic() - self._shown_s >= LOG_INTERVAL_S:
            self._print(f"  {text[:100]}" if share is None else f"  {share:4.0%} {text[:100]}")

    def _print(self, text: str) -> None:
        self._shown_s = time.monotonic()
        print(f"speedbench: {text}", file=sys.stderr, flush=True)


class _Bars:
    """Progress on a terminal: a bar per stage, pulsing where nobody knows how long it takes."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._task: Any = None

    def stage(self, text: str) -> None:
        self._progress.start()  # not before: a question may come first, and be answered
        self.end()
        self._task = self._progress.add_task(text, total=None, now="")

    def detail(self, text: str, share: float | None) -> None:
        from rich.markup import escape

        shown = {} if share is None else {"total": 1.0, "completed": share}
        self._progress.update(self._task, now=escape(text[:60]), **shown)

    def end(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1.0, completed=1.0, now="")


@contextmanager
def _watching() -> Iterator[Watcher]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    progress = Progress(
        *columns, TextColumn("[dim]{task.fields[now]}"), console=Console(stderr=True)
    )
    bars = _Bars(progress)
    try:
        yield bars
        bars.end()
    finally:
        progress.stop()


# ---------------------------------------------------------------- data


def data_command(argv: list[str], prog: str) -> int:
    with signals_handled():
        return _subcommand(argv, prog) if argv and argv[0] in SUBCOMMANDS else _show(argv, prog)


def _show(argv: list[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description="Show prepared data: identity, rows, requests, turns and token lengths.",
        epilog="`data select`, `data bucket` and `data tokens` build data: see their --help.",
    )
    parser.add_argument("places", nargs="*", metavar="DIR", help="folders or files (default: data)")
    parser.add_argument("--tokenizer", metavar="T", help="folder or hub id: count tokens, too")
    parser.add_argument(
        "--completions", action="store_true", help="count the bare text, without a chat template"
    )
    parser.add_argument("--limit", metavar="N", help="list the rows longer than N tokens")
    parser.add_argument(
        "--format", choices=("console", "markdown", "json", "html"), default="console",
        help="html draws the token lengths (default: console)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write to FILE instead of printing")
    given = parser.parse(argv)
    limit = _limit(given)
    from speedbench.datasets import DATA
    from speedbench.datasets.overview import Lengths, files_of, overview

    places = [Path(place) for place in given.places] or [DATA]
    for place in places:
        if not place.exists():
            raise UserError(
                f"{place} does not exist: name a folder with data, or run `speedbench prepare`"
            )
    files = list(dict.fromkeys(file for place in places for file in files_of(place)))
    if not files:
        raise UserError(
            f"{', '.join(map(str, places))} holds no test.parquet, question.jsonl or "
            "prompts.jsonl: name another folder, or run `speedbench prepare`"
        )
    lengths = Lengths(given.tokenizer, given.completions) if given.tokenizer else None
    found, code = [], OK
    for file in files:
        try:
            found.append(overview(file, lengths, limit))
        except UserError as error:
            if len(files) == 1:
                raise
            print(f"{prog}: {error}", file=sys.stderr)  # and the others are shown
            code = USAGE
    _write(found, given, limit)
    return code


def _subcommand(argv: list[str], prog: str) -> int:
    function = SUBCOMMANDS[argv[0]]
    module = importlib.import_module("speedbench.cli_build")
    if not hasattr(module, function):
        raise UserError(f"`data {argv[0]}` is not in this version: see `speedbench data --help`")
    return int(getattr(module, function)(argv[1:], f"{prog} {argv[0]}"))


def _limit(given: argparse.Namespace) -> int | None:
    if given.limit is None:
        return None
    if not given.limit.isdecimal() or int(given.limit) < 1:
        raise UserError(f"--limit is '{given.limit}': expected a number of tokens from 1")
    if given.tokenizer is None:
        raise UserError("--limit is in tokens: add --tokenizer")
    return int(given.limit)


def _write(found: Sequence[Overview], given: argparse.Namespace, limit: int | None) -> None:
    if given.format == "console" and given.out is None:
        from rich.console import Console

        from speedbench.report.console import draw

        draw(_blocks(found, given, limit), Console())
        return
    text = _rendered(found, given, limit)
    if given.out is None:
        print(text, end="")
        return
    out = Path(given.out)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    print(f"written: {out}")


def _rendered(found: Sequence[Overview], given: argparse.Namespace, limit: int | None) -> str:
    if given.format == "json":
        return json.dumps([_plain(each) for each in found], indent=1, ensure_ascii=False) + "\n"
    if given.format == "html":
        from speedbench.report.html import render

        return render(_blocks(found, given, limit), "speedbench data")
    if given.format == "markdown":
        from speedbench.report.markdown import write

        return write(_blocks(found, given, limit))
    import io

    from rich.console import Console

    from speedbench.report.console import draw

    buffer = io.StringIO()
    draw(_blocks(found, given, limit), Console(file=buffer, width=120))
    return buffer.getvalue()


def _plain(found: Overview) -> dict[str, Any]:
    """An overview for a program to read."""
    values = asdict(found)
    values.update(path=str(found.path))
    if found.identity is not None:
        values["identity"] = {k: v for k, v in found.identity.items() if k != "row_sha256"}
    values["over"] = [
        {"id": name, "category": category, "tokens": n} for name, category, n in found.over
    ]
    return values


def _blocks(
    found: Sequence[Overview], given: argparse.Namespace, limit: int | None
) -> Iterator[Block]:
    from speedbench.datasets.overview import built_by
    from speedbench.report.layout_data import of_overview

    tokens = ""
    if given.tokenizer is not None:
        form = "bare text" if given.completions else "with the chat template"
        tokens = (
            f"tokens: the last turn's prompt of each row under {given.tokenizer}, {form}, replies "
            "to earlier turns left empty; a run adds them"
        )
    for number, each in enumerate(found, 1):
        yield from of_overview(each, built_by(each), tokens, limit, number)
