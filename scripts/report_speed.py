"""How long a report takes, and how much memory: over runs with made-up steps, engine-free.

    .venv/bin/python scripts/report_speed.py                    # 12 runs, 2 million steps
    .venv/bin/python scripts/report_speed.py --arms 12 --profile console
    .venv/bin/python scripts/report_speed.py --steps 10_000_000 --draft_lengths 3 --repeats 1
    .venv/bin/python scripts/report_speed.py --table docs/scale.md          # 10 million steps
    .venv/bin/python scripts/report_speed.py --table PAGE.md --quick        # 200,000: a minute

Makes run directories as the store writes them, all from one seed. Without --steps: a baseline and
five speculative arms, each measured --repeats times, of 880 conversations in 11 categories with
1,138 requests. With --steps: 1,536 conversations of one turn in the three tiers of a throughput
configuration, prompts of 32k tokens and answers of one length, as long as gives so many steps over
all runs. Then reports them in fresh processes, as `speedbench report` does it, and prints where the
seconds went and the most memory that was resident.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speedbench import environment, store  # noqa: E402
from tests.builders import MS, counters, manifest, session  # noqa: E402

CATEGORIES = (
    "coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem",
    "summarization", "writing",
)  # fmt: skip
TIERS = ("low_entropy", "mixed", "high_entropy")
DRAFT_LENGTHS = (0, 1, 2, 3, 5, 7)
TURNS = (3,) * 73 + (2,) * 112 + (1,) * 695
"""Of the 880 rows of the qualitative split: 1,138 requests."""
N_THROUGHPUT = 1536
LONG_PROMPT = 32_000
FORMS = ("console", "html")
STAGES = ("imports", "load", "insights", "numbers", "drawing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    add = parser.add_argument
    add("--repeats", type=int, default=2, help="runs of each arm (default: 2)")
    add("--arms", type=int, help="draft lengths times concurrencies (default: one concurrency)")
    add("--draft_lengths", default=",".join(map(str, DRAFT_LENGTHS)), help="default: %(default)s")
    add("--rows", type=int, help="conversations (default: 880, with --steps 1536)")
    add("--output_length", type=int, default=285, help="mean tokens of an answer")
    add("--concurrency", type=int, default=32, help="of the first arms; then twice as many, ...")
    add("--steps", type=int, help="about so many steps over all runs")
    add("--parts", type=int, default=40, help="parquet parts of a run (default: 40)")
    add("--keep", type=Path, help="folder for the runs; made if it is not there")
    add("--html", type=Path, help="where to leave the page")
    add("--profile", choices=FORMS, help="print where the time of that report goes, by function")
    add("--table", type=Path, metavar="FILE", help="write the table of the scale cases")
    add("--quick", action="store_true", help="the table's cases, a fiftieth of their size")
    add("--measure", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.keep, given.measure, given.html, given.profile)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if given.table is not None:
            table(given.table, Path(scratch), quick=given.quick)
            return
        folder = given.keep or Path(scratch) / "runs"
        if not folder.exists():
            lengths = tuple(map(int, given.draft_lengths.split(",")))
            make_all(folder, _plan(given, lengths))
        for form in (given.profile,) if given.profile else FORMS:
            print(sentence(reported(folder, form, given.html, given.profile)))


class _Plain(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands."""


# ---------------------------------------------------------------- runs


@dataclass(frozen=True, slots=True)
class Shape:
    """What all runs have in common: rows and their turns, prompts, answers, parts.

    output_length  mean tokens of an answer; of every answer, where they are `fixed`
    """

    turns: tuple[int, ...]
    categories: tuple[str, ...]
    longest_prompt: int
    output_length: int
    fixed: bool
    n_parts: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Arms (draft length, concurrency), each measured `repeats` times."""

    shape: Shape
    arms: tuple[tuple[int, int], ...]
    repeats: int


def _plan(given: argparse.Namespace, lengths: tuple[int, ...]) -> Plan:
    n_arms = given.arms or len(lengths)
    arms = tuple(
        (lengths[i % len(lengths)], given.concurrency * 2 ** (i // len(lengths)))
        for i in range(n_arms)
    )
    if given.steps is not None:
        return scale_plan(
            given.steps, arms, given.repeats, given.rows or N_THROUGHPUT, n_parts=given.parts
        )
    turns = tuple(np.random.default_rng(7).permutation(np.array(TURNS))[: given.rows].tolist())
    shape = Shape(turns, CATEGORIES, 2000, given.output_length, False, given.parts)
    return Plan(shape, arms, given.repeats)


def scale_plan(
    n_steps: int, arms: tuple[tuple[int, int], ...], repeats: int, n_rows: int, *, n_parts: int
) -> Plan:
    """Rows of a throughput configuration with answers so long that the runs have n_steps."""
    of_row = _rates_of_rows(n_rows)
    steps_per_token = sum(float(np.mean(1 / _mean_length(of_row, k))) for k, _ in arms) * repeats
    length = round(n_steps / (n_rows * steps_per_token))
    shape = Shape((1,) * n_rows, TIERS, LONG_PROMPT, max(2, length), True, n_parts)
    return Plan(shape, arms, repeats)


def _rates_of_rows(n_rows: int) -> np.ndarray:
    own = np.random.default_rng(8)
    of_row = 0.55 + 0.03 * (np.arange(n_rows) % 11) + own.normal(0, 0.08, n_rows)
    return np.asarray(np.clip(of_row, 0, 0.97))


def _mean_length(rate: np.ndarray, k: int) -> np.ndarray:
    return np.asarray((1 - rate ** (k + 1)) / (1 - rate))


def make_all(folder: Path, plan: Plan) -> None:
    made = [
        make(
            folder / f"{arm:02d}-{repeat}",
            k,
            plan.shape,
            seed=100 * arm + repeat,
            concurrency=concurrency,
        )
        for arm, (k, concurrency) in enumerate(plan.arms)
        for repeat in range(plan.repeats)
    ]
    print(f"{len(made)} runs in {len(plan.arms)} arms with {sum(made):,} steps", flush=True)


def make(directory: Path, k: int, shape: Shape, *, seed: int, concurrency: int) -> int:
    """One run with drafts of length k; returns its number of steps."""
    # Which prompts, and how long their answers are, is the same in every run.
    same = np.random.default_rng(7)
    turns, n_rows = np.array(shape.turns), len(shape.turns)
    row = np.repeat(np.arange(n_rows), turns)
    n = len(row)
    number = np.concatenate([np.arange(t) for t in turns])
    category = row % len(shape.categories)
    n_prompt = same.integers(20, shape.longest_prompt, n)
    wanted = np.full(n, shape.output_length)
    if not shape.fixed:
        wanted = np.clip(same.gamma(1.5, shape.output_length / 1.5, n), 2, 4096).astype(int)
    own = np.random.default_rng(seed)
    of_row = _rates_of_rows(n_rows)
    lengths = [_steps(own, int(wanted[r]), k, float(of_row[row[r]])) for r in range(n)]
    n_steps = np.array([len(one) for one in lengths])
    step_ns = (9 + 0.8 * k) * MS * own.normal(1, 0.01)
    submitted, times = _clock(own, row, number, n_steps, step_ns, n_prompt, concurrency)
    request = np.repeat(np.arange(n), n_steps)
    index = np.concatenate([np.arange(s) for s in n_steps])
    tokens = np.concatenate(lengths)
    drafted = np.where(index > 0, k, 0)
    accepted = np.where(index > 0, tokens - 1, 0)
    store.create(directory)
    ended_ns = int(times.max()) + MS
    drafts, taken = int((index > 0).sum()), int(accepted.sum())
    about = manifest(
        draft_length=k,
        expected=dict(Counter(shape.categories[c % len(shape.categories)] for c in range(n_rows))),
        sessions=[session(ended_ns=ended_ns, counters=counters(drafts, taken, k) if k else None)],
        config={
            "concurrency": concurrency,
            "save_dir": str(directory),
            "output_length": max(4096, shape.output_length),
        },
        engine={"max_seq_len": shape.longest_prompt + max(8192, 2 * shape.output_length)},
    )
    store.write_manifest(directory, about)
    ends = times[np.cumsum(n_steps) - 1]
    starts = np.cumsum(n_steps) - n_steps
    # A conversation is stored whole: with its last turn.
    last_end = np.zeros(n_rows)
    np.maximum.at(last_end, row, ends)
    edges = np.quantile(last_end, np.linspace(0, 1, shape.n_parts + 1)[1:-1])
    part_of_row = np.digitize(last_end, edges)
    of_turns = (row, number, category, n_prompt, submitted)
    of_steps = (request, index, times, tokens, accepted, drafted)
    for p in range(shape.n_parts):
        mine = np.flatnonzero(part_of_row[row] == p)
        rows = (
            np.concatenate([np.arange(starts[r], starts[r] + n_steps[r]) for r in mine])
            if len(mine)
            else np.zeros(0, int)
        )
        write(directory, p, shape.categories, mine, rows, of_turns, of_steps, n_steps)
    return len(tokens)


def _steps(own: np.random.Generator, wanted: int, k: int, rate: float) -> np.ndarray:
    """Tokens of every step of an answer; its last step is cut to the answer's end."""
    if k == 0:
        return np.ones(wanted, np.int64)
    drawn = np.minimum(own.geometric(1 - rate, wanted), k + 1)
    upto = 1 + np.cumsum(drawn)
    n = int(np.searchsorted(upto, wanted)) + 1
    decode = drawn[:n].copy()
    decode[-1] -= int(upto[n - 1]) - wanted
    return np.append(1, decode[decode > 0])


def _clock(
    own: np.random.Generator,
    row: np.ndarray,
    number: np.ndarray,
    n_steps: np.ndarray,
    step_ns: float,
    n_prompt: np.ndarray,
    concurrency: int,
) -> tuple[np.ndarray, np.ndarray]:
    """When each request was submitted (R,), and when each step came (S,): a closed loop."""
    free = [0] * concurrency
    heapq.heapify(free)
    submitted = np.zeros(len(row), np.int64)
    times: list[np.ndarray] = []
    now = 0
    for r in range(len(row)):
        now = heapq.heappop(free) if number[r] == 0 else now
        submitted[r] = now
        ttft = int((15 + 0.05 * n_prompt[r]) * MS * own.lognormal(0, 0.3))
        gaps = step_ns * own.lognormal(0, 0.08, int(n_steps[r]) - 1)
        gaps *= np.where(own.random(len(gaps)) < 0.01, 4, 1)
        of_request = now + ttft + np.append(0, np.cumsum(gaps)).astype(np.int64)
        times.append(of_request)
        now = int(of_request[-1]) + MS
        if r + 1 == len(row) or number[r + 1] == 0:
            heapq.heappush(free, now)
    return submitted, np.concatenate(times)


def write(
    directory: Path,
    part: int,
    categories: tuple[str, ...],
    mine: np.ndarray,
    rows: np.ndarray,
    of_turns: tuple[np.ndarray, ...],
    of_steps: tuple[np.ndarray, ...],
    n_steps: np.ndarray,
) -> None:
    """One part, as `store.Writer` lays it out."""
    row, number, category, n_prompt, submitted = (array[mine] for array in of_turns)
    names = pa.array([f"row-{c}.{t}" for c, t in zip(row, number, strict=True)], pa.string())
    request, index, times, tokens, accepted, drafted = (array[rows] for array in of_steps)
    n_of = n_steps[mine]
    summed = np.add.reduceat(tokens, np.cumsum(n_of) - n_of) if len(mine) else np.zeros(0, int)
    ids = (np.arange(int(summed.sum())) * 31 + 7) % 32000
    turns = pa.table(
        {
            "request_id": names,
            "session": np.zeros(len(mine), np.int32),
            "replica": np.zeros(len(mine), np.int32),
            "conversation_id": [f"row-{c}" for c in row],
            "category": [categories[c] for c in category],
            "turn": number.astype(np.int32),
            "n_prompt_tokens": n_prompt.astype(np.int32),
            "prompt_sha256": [f"{c:032x}{t:032x}" for c, t in zip(row, number, strict=True)],
            "submitted_ns": submitted,
            "finish_reason": ["stop"] * len(mine),
            "error": [None] * len(mine),
            "output_token_ids": pa.ListArray.from_arrays(
                pa.array(np.append(0, np.cumsum(summed)), pa.int32()), pa.array(ids, pa.int32())
            ),
        },
        schema=store.TURNS,
    )
    steps = pa.table(
        {
            "request_id": names.take(pa.array(np.repeat(np.arange(len(mine)), n_of))),
            "session": np.zeros(len(rows), np.int32),
            "replica": np.zeros(len(rows), np.int32),
            "turn": of_turns[1][request].astype(np.int32),
            "step": index.astype(np.int32),
            "time_ns": times,
            "engine_steps": np.ones(len(rows), np.int32),
            "n_tokens": tokens.astype(np.int32),
            "accepted": accepted.astype(np.int32),
            "drafted": drafted.astype(np.int32),
        },
        schema=store.STEPS,
    )
    for folder, table in (("steps", steps), ("turns", turns)):
        path = directory / folder / f"{part:05d}.parquet"
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)


# ---------------------------------------------------------------- the report


@dataclass(frozen=True, slots=True)
class Cost:
    """What one report took; `seconds` by stage, all in a process of its own."""

    form: str
    n_runs: int
    n_steps: int
    seconds: dict[str, float]
    wall_s: float
    cpu_s: float
    peak_mib: float
    n_bytes: int


def reported(folder: Path, form: str, page: Path | None, profile: str | None) -> Cost:
    """Report a folder in a fresh process; its start and its imports count."""
    command = [sys.executable, __file__, "--measure", form, "--keep", str(folder)]
    if page is not None:
        command += ["--html", str(page)]
    if profile:
        command += ["--profile", profile]
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    wall_s = time.perf_counter() - begun
    *others, last = done.stdout.splitlines()
    print("\n".join(others), end="\n" if others else "")
    return Cost(**json.loads(last), wall_s=wall_s)


def measure(folder: Path, form: str, page: Path | None, profile: str | None) -> None:
    """Report all runs of a folder as `speedbench report` does; the last line printed is a Cost."""
    marks = [time.perf_counter()]
    from speedbench.insights.collected import collect
    from speedbench.insights.options import InsightOptions
    from speedbench.report import console, html, layout_insights
    from speedbench.report.arms import load_arms
    from speedbench.report.document import document

    profiler = None
    if profile:
        import cProfile

        profiler = cProfile.Profile(time.process_time)
        profiler.enable()
    marks.append(time.perf_counter())
    arms = load_arms([folder])
    marks.append(time.perf_counter())
    insights = collect(arms, InsightOptions())
    marks.append(time.perf_counter())
    blocks = list(document(arms, layout_insights.of_insights(insights)))
    marks.append(time.perf_counter())
    if form == "html":
        text = html.render(blocks, "speedbench")
    else:
        import io

        from rich.console import Console

        out = io.StringIO()
        console.draw(blocks, Console(file=out, width=120, color_system=None))
        text = out.getvalue()
    marks.append(time.perf_counter())
    if profiler is not None:
        import pstats

        profiler.disable()
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)
    if page is not None and form == "html":
        page.write_text(text, encoding="utf-8")
    found = {
        "form": form,
        "n_runs": sum(len(arm.runs) for arm in arms),
        "n_steps": sum(len(run.columns.step) for arm in arms for run in arm.runs),
        "seconds": dict(zip(STAGES, np.diff(marks).tolist(), strict=True)),
        "cpu_s": time.process_time(),
        "peak_mib": _peak_mib(),
        "n_bytes": len(text.encode("utf-8")),
    }
    print(json.dumps(found))


def _peak_mib() -> float:
    """Most resident memory of this process. (ru_maxrss would begin with its parent's.)"""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def sentence(cost: Cost) -> str:
    stages = ", ".join(f"{name} {cost.seconds[name]:.2f}" for name in STAGES)
    return (
        f"{cost.form}: {cost.n_runs} runs, {cost.n_steps:,} steps: {cost.wall_s:.2f} s ({stages}), "
        f"{cost.cpu_s:.2f} s of CPU, {cost.peak_mib:,.0f} MiB at most, {cost.n_bytes / 1e6:.2f} MB"
    )


# ---------------------------------------------------------------- the table


CASES = (
    ("one run: K = 3", ((3, 32),), 1, 300),
    ("a sweep: K = 0, 1, 2, 3, 5, 7", tuple((k, 32) for k in DRAFT_LENGTHS), 1, 100),
    ("12 arms: the same at two concurrencies",
     tuple((k, c) for c in (32, 64) for k in DRAFT_LENGTHS), 1, 60),
)  # fmt: skip
"""Name, arms, repeats, parts of a run: what the writer leaves of a run so long."""


def table(target: Path, scratch: Path, *, quick: bool) -> None:
    n_steps = 200_000 if quick else 10_000_000
    load = f"{os.getloadavg()[0]:.1f}"
    lines: list[str] = []
    for name, arms, repeats, n_parts in CASES:
        folder = scratch / str(len(lines))
        make_all(folder, scale_plan(n_steps, arms, repeats, N_THROUGHPUT, n_parts=n_parts))
        for form in FORMS:
            cost = reported(folder, form, None, None)
            print(sentence(cost), flush=True)
            cells = [
                name, form, str(cost.n_runs), f"{cost.n_steps:,}", f"**{cost.wall_s:.1f}**",
                f"{cost.cpu_s:.1f}",
                *(f"{cost.seconds[stage]:.1f}" for stage in STAGES), f"**{cost.peak_mib:,.0f}**",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    target.write_text(
        PAGE.format(**_about(quick), load=load, stages=" | ".join(STAGES), rows="\n".join(lines)),
        encoding="utf-8",
    )
    print(f"wrote {target}")


def _about(quick: bool) -> dict[str, str]:
    versions = (platform.python_version(), np.__version__, pa.__version__)
    return {
        "machine": f"{environment.capture((), ())['cpu']}, {os.cpu_count()} CPUs",
        "versions": "Python {}, numpy {}, pyarrow {}".format(*versions),
        "date": date.today().isoformat(),
        "flag": " --quick" if quick else "",
        "n_steps": "200,000" if quick else "10 million",
    }


PAGE = """\
# Scale: a report over {n_steps} steps

    python scripts/report_speed.py --table docs/scale.md{flag}

{date}; {machine}; {versions}. Load average before the first report:
{load}.

Every report is made in a fresh process from runs on the disk (in the page cache), as
`speedbench report` makes it; its start and its imports count. The runs are made up: 1,536
conversations each, prompts of up to 32k tokens, answers of one length. Target: 15 s and 2,048 MiB.

| Runs | Report | n | Steps | Seconds | CPU s | {stages} | Peak MiB |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

*CPU s*: of the whole process; what the machine was doing besides is not in it. *load*: parquet to
arrays, all runs, every value checked. *insights*: acceptance by position and turn, savings, and the
like. *numbers*: summaries with their intervals, checks, comparisons, curves. *drawing*: tables and
figures as text or HTML. *Peak*: most memory resident at any moment.
"""


if __name__ == "__main__":
    main()
