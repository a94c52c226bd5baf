"""The command that compares stored arms, and gates what changed. It prints."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from speedbench.cli_base import OK, Parser
from speedbench.types import UserError

if TYPE_CHECKING:
    from speedbench.lossless import Losslessness
    from speedbench.report.arms import Arm
    from speedbench.report.blocks import Block
    from speedbench.report.compare import ArmComparison, Comparison
    from speedbench.report.gate import GateResult
    from speedbench.report.sample import Sample, SampleRun

GATE_FAILED, INCONCLUSIVE = 3, 4
"""Exit codes beside those of cli_base: a gate failed; none failed, but one cannot be told."""

TITLE = "speedbench: comparison"
FORMATS = ("console", "markdown", "json", "html")

ABOUT = """Compare stored arms with a base, conversation by conversation.

Name the base first, then the runs to hold against it. A folder of runs stands for all in it. Runs
that measured the same are repeats of one arm where they lie in one folder, or are named one by one;
what two folders hold stays apart. Of a single folder (what --baseline and sweep write) the arm
without speculation is the base. Of several (before and after a change, say), where one holds both
arms, those that speculate are compared: name runs to compare others."""

GATES = """Gates: al=-1% (may fall by at most 1 %), step_time=+5% (may rise by at most 5 %),
speedup=+-2% (may do neither), al[coding]=-3% (one category). Metrics: al, speedup (user TPS),
output_tps, step_time, ttft, lossless (share of identical outputs, against that between two baseline
runs). A gate passes when the whole 95 % interval is within the margin (exit code 0), fails when the
whole interval is beyond it (3), and is inconclusive else (4): also where there is no interval (one
round of arms says nothing of how much runs differ: gates of times need --repeat),
where more than 1 % of the conversations are in no pair, and where a check says that the records
cannot be right. The worst of several decides."""


def compare_command(argv: list[str], prog: str) -> int:
    given = _parser(prog).parse(argv)
    _refuse_nonsense(given)
    from speedbench import remote

    runs = [remote.localized(run) for run in given.runs]
    merges = [[remote.localized(run) for run in shards] for shards in given.merge]
    if given.pin:
        return _pin(Path(given.pin), runs, merges)
    return _compare(given, runs, merges)


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description=ABOUT,
        epilog=GATES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN_DIR", help="the base, then the runs to compare with it"
    )
    parser.add_argument(
        "--merge", nargs="+", action="append", default=[], metavar="RUN_DIR",
        help="directories that hold the shards (--shard r/R) of one run; after RUN_DIRs",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], metavar="NAME",
        help="let the arms differ in this, which is meant (repeat or comma-separate); the error "
        "that refuses a difference names it",
    )  # fmt: skip
    parser.add_argument(
        "--gate", action="append", default=[], metavar="METRIC=N%",
        help="what may change by how much (repeat): see below",
    )  # fmt: skip
    parser.add_argument("--junit", metavar="FILE", help="write the gates as JUnit XML")
    parser.add_argument("--summary", metavar="FILE", help="append markdown ($GITHUB_STEP_SUMMARY)")
    parser.add_argument("--baseline_file", metavar="FILE", help="use a pinned base (see --pin)")
    parser.add_argument(
        "--pin", metavar="FILE",
        help="write what later comparisons need of these runs, as their base, to FILE, and end",
    )  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="console", help="what to print")
    parser.add_argument("--out", metavar="FILE", help="write it there instead of printing it")
    return parser


def _refuse_nonsense(given: argparse.Namespace) -> None:
    if not given.runs and not given.merge:
        raise UserError("no run directory was named: name a base and the runs to compare with it")
    if given.pin:
        for name in ("gate", "junit", "summary", "baseline_file", "out", "allow"):
            if getattr(given, name):
                raise UserError(
                    f"--pin writes a baseline file and compares nothing: leave out --{name}"
                )
    if given.junit and not given.gate:
        raise UserError("--junit writes what --gate found: add a --gate, such as al=-1%")


def _compare(
    given: argparse.Namespace, runs: Sequence[Path], merges: Sequence[Sequence[Path]]
) -> int:
    from speedbench.report import gate

    gates = [gate.parse_gate(text) for text in given.gate]
    allow = [name for text in given.allow for name in text.split(",") if name]
    found = _found(runs, merges, given.baseline_file, allow)
    results = tuple(
        result
        for one, lossless in zip(found.comparison.arms, found.lossless, strict=True)
        for result in gate.evaluate(
            gates, one, lossless, found.n_expected(one.arm), found.errors(one)
        )
    )
    if given.junit:
        from speedbench.report import junit

        _write(given.junit, junit.render(results, {"base": found.comparison.base.label}))
    if given.summary:
        _append(Path(given.summary), _in_form("markdown", found, results))
    if given.out:
        _write(given.out, _in_form(given.format, found, results))
    elif given.format == "console":
        from rich.console import Console

        from speedbench.report import console

        console.draw(_blocks(found, results), Console())
    else:
        print(_in_form(given.format, found, results), end="")
    if not results:
        return OK
    return {"pass": OK, "fail": GATE_FAILED, "inconclusive": INCONCLUSIVE}[gate.overall(results)]


# ---------------------------------------------------------------- what is compared


@dataclass(frozen=True, slots=True)
class _Found:
    """A comparison, and what gates and report need beside it.

    lossless  of every arm, in order
    note      which arms of the folders are in no comparison
    """

    comparison: Comparison
    base: Sample
    lossless: tuple[Losslessness, ...]
    note: str

    def n_expected(self, arm: Sample) -> Mapping[str, int]:
        """Category -> conversations that a number must come of: those that either arm was to
        measure, but for the ones that every run answered with one token, which took no time."""
        found: Counter[str] = Counter()
        for one in (self.base, arm):
            found |= Counter(one.manifest["dataset"].get("expected", {}))
        category_of, *others = (_untimed(run) for run in (*self.base.runs, *arm.runs))
        everywhere = set(category_of).intersection(*others)
        return found - Counter(category_of[name] for name in everywhere)

    def errors(self, one: ArmComparison) -> tuple[str, ...]:
        """Sentences of the error checks of base and arm."""
        checks = (*self.comparison.checks, *one.checks)
        return tuple(dict.fromkeys(check.sentence for check in checks if check.level == "error"))


def _untimed(run: SampleRun) -> dict[str, str]:
    """Conversation id -> category, of those that no time passed in after their first tokens."""
    found = run.measured
    return {
        name: found.category[i] for name, i in found.place.items() if math.isnan(found.log_tps[i])
    }


def _found(
    runs: Sequence[Path],
    merges: Sequence[Sequence[Path]],
    baseline_file: str | None,
    allow: Sequence[str],
) -> _Found:
    from speedbench import lossless
    from speedbench.report import baseline_file as pinned
    from speedbench.report import sample
    from speedbench.report.arms import load_arms
    from speedbench.report.compare import compare

    arms = load_arms(runs, merges)
    chosen: Sequence[Arm]
    beside: Sequence[Arm]
    if baseline_file:
        base = pinned.load(Path(baseline_file))
        chosen, beside = _speculative_of(arms, _folders(runs))
    else:
        first, chosen, beside = _base_and_others(arms, runs)
        base = sample.of_arm(first)
    samples = [sample.of_arm(arm) for arm in chosen]
    _refuse_copies([base, *samples])
    comparison = compare(base, samples, allow)
    temperature = max(float(s.manifest["config"]["temperature"]) for s in (base, *samples))
    return _Found(
        comparison,
        base,
        tuple(
            lossless.losslessness(
                [run.answers for run in base.runs], [run.answers for run in one.runs], temperature
            )
            for one in samples
        ),
        _beside(beside),
    )


def _base_and_others(
    arms: Sequence[Arm], runs: Sequence[Path]
) -> tuple[Arm, Sequence[Arm], Sequence[Arm]]:
    """The base, the arms to hold against it, and those of their folders that are left out.

    The base is the arm named first. Of a folder that holds several it is the arm without
    speculation if that folder is all there is, else the one that speculates: before and after a
    change of the drafter or the engine. Where all runs measured the same, the first is the base and
    the others are held against it: what two runs of one arm differ by.
    """
    from speedbench.report.arms import is_run

    folders = _folders(runs)
    first = arms[0]
    mine = [arm for arm in arms if arm.series == first.series]
    if first.series not in folders or (runs and is_run(runs[0])):
        others, beside = _speculative_of([arm for arm in arms if arm is not first], folders)
    elif len(mine) == len(arms):
        first = _the_one([arm for arm in mine if arm.is_baseline], mine, "without speculation")
        others, beside = [arm for arm in arms if arm is not first], []
    else:
        first, beside = _only_or_speculative(mine)
        others, left_out = _speculative_of([arm for arm in arms if arm not in mine], folders)
        beside += left_out
    if others:
        return first, others, beside
    if len(first.runs) < 2:
        raise UserError(
            f"there is nothing to compare with {first.runs[0].directory}: name another run after it"
        )
    again = replace(first, label=f"{first.label}, again", runs=first.runs[1:])
    return replace(first, runs=first.runs[:1]), [again], beside


def _folders(runs: Sequence[Path]) -> frozenset[str]:
    """Series that were named as folders, not run by run."""
    from speedbench.report.arms import is_run, series_in

    return frozenset(series for path in runs if not is_run(path) for series in series_in(path))


def _speculative_of(arms: Sequence[Arm], folders: Collection[str]) -> tuple[list[Arm], list[Arm]]:
    """Without the baselines of folders that hold a speculative arm, too; and those."""
    both = {arm.series for arm in arms if arm.series in folders and not arm.is_baseline}
    left_out = [arm for arm in arms if arm.is_baseline and arm.series in both]
    return [arm for arm in arms if arm not in left_out], left_out


def _only_or_speculative(mine: Sequence[Arm]) -> tuple[Arm, list[Arm]]:
    """A folder's only arm, or its only one that speculates; and its others."""
    drafting = [arm for arm in mine if not arm.is_baseline]
    one = mine[0] if len(mine) == 1 else _the_one(drafting, mine, "that speculate")
    return one, [arm for arm in mine if arm is not one]


def _the_one(fitting: Sequence[Arm], arms: Sequence[Arm], what: str) -> Arm:
    """Raises UserError unless one fits."""
    if len(fitting) == 1:
        return fitting[0]
    held = "; ".join(arm.label for arm in arms[:4]) + ("; ..." if len(arms) > 4 else "")
    raise UserError(
        f"{arms[0].series} holds {len(arms)} arms ({held}), {len(fitting)} of them {what}: name "
        "the runs of the base first, one by one, then the others"
    )


def _beside(arms: Sequence[Arm]) -> str:
    if not arms:
        return ""
    held = "; ".join(f"{arm.label} ({arm.series})" for arm in arms)
    return (
        f"Not compared here: {held}. Of a folder that holds both, the arms that speculate are "
        "compared; name the runs of others one by one to compare those."
    )


def _refuse_copies(samples: Sequence[Sample]) -> None:
    """One run twice, in two places, would be taken for a repeat that agrees to the last digit."""
    seen = [run for sample in samples for run in sample.runs]
    for mine, theirs in itertools.combinations(seen, 2):
        if mine.started == theirs.started and _times(mine) == _times(theirs):
            raise UserError(
                f"{mine.source} and {theirs.source} are copies of one run: name it once"
            )


def _times(run: SampleRun) -> dict[str, str]:
    """Conversation id -> its user TPS to the last digit; the same of nothing but copies."""
    return {name: repr(run.measured.log_tps[i]) for name, i in run.measured.place.items()}


# ---------------------------------------------------------------- forms


def _blocks(found: _Found, results: Sequence[GateResult]) -> Iterator[Block]:
    """The title, the gates, and then what they were answered from."""
    from speedbench.report import layout_compare, layout_gate, layout_lossless
    from speedbench.report.blocks import Heading, Paragraph

    comparison = list(layout_compare.of_comparison(found.comparison))
    titled = bool(comparison) and isinstance(comparison[0], Heading) and comparison[0].level == 1
    yield comparison[0] if titled else Heading(TITLE, 1)
    if found.note:
        yield Paragraph(found.note, "note")
    yield from layout_gate.of_gates(results)
    yield from comparison[1:] if titled else comparison
    yield from layout_lossless.of_losslessness(
        [
            (one.arm.label, lossless)
            for one, lossless in zip(found.comparison.arms, found.lossless, strict=True)
        ]
    )


def _in_form(form: str, found: _Found, results: Sequence[GateResult]) -> str:
    if form == "json":
        from speedbench.report import comparison_json

        document = comparison_json.render(found.comparison, found.lossless, results, found.base)
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if form == "html":
        from speedbench.report import html

        return html.render(_blocks(found, results), TITLE)
    if form == "markdown":
        from speedbench.report import markdown

        return markdown.write(_blocks(found, results))
    from rich.console import Console

    from speedbench.report import console

    text = io.StringIO()
    console.draw(_blocks(found, results), Console(file=text, width=120, color_system=None))
    return text.getvalue()


# ---------------------------------------------------------------- files


def _pin(path: Path, runs: Sequence[Path], merges: Sequence[Sequence[Path]]) -> int:
    from speedbench.report import baseline_file, sample
    from speedbench.report.arms import load_arms

    arms = load_arms(runs, merges)
    if len(arms) > 1 and len(_folders(runs) & {arm.series for arm in arms}) != 1:
        raise UserError(
            f"{len(arms)} arms were named ({'; '.join(arm.label for arm in arms)}): pin the runs "
            "of one"
        )
    arm, beside = _only_or_speculative(arms)
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or pin to another file")
    found = sample.of_arm(arm)
    _refuse_copies([found])
    _write(str(path), baseline_file.dumps(found))
    n = len({name for run in found.runs for name in run.measured.place})
    print(
        f"{path}: {found.label}, {len(found.runs)} run(s) of {n} conversations, "
        f"{path.stat().st_size / 1000:.0f} kB"
    )
    if beside:
        print(
            f"Not pinned: {'; '.join(one.label for one in beside)}, beside it in {arm.series}; to "
            "pin that, name its runs one by one."
        )
    for sentence in dict.fromkeys(
        check.sentence for run in found.runs for check in run.checks if check.level == "error"
    ):
        print(f"ERROR in these runs, so that no gate will be answered from them: {sentence}")
    return OK


def _write(place: str, text: str) -> None:
    """In one step: no reader sees half a file."""
    from speedbench import remote

    remote.write_bytes(place, text.encode())


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as handle:
        handle.write(text)
