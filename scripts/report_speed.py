"""How long a report takes, and how much memory: over runs with made-up steps, engine-free.

    .venv/bin/python scripts/report_speed.py                    # 12 runs, 2 million steps
    .venv/bin/python scripts/report_speed.py --keep DIR --html PAGE.html --profile

Makes run directories as the store writes them: a baseline and five speculative arms, each measured
--repeats times, of 880 conversations in 11 categories with 1,138 requests, with a step-length
distribution per category and a slower clock for longer drafts, all from one seed. Then reports them
in a fresh process and prints the seconds, the peak memory and the size of the page.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speedbench import store  # noqa: E402
from tests.builders import MS, counters, manifest, session  # noqa: E402

CATEGORIES = (
    "coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem",
    "summarization", "writing",
)  # fmt: skip
N_PARTS = 40
DRAFT_LENGTHS = (0, 1, 2, 3, 5, 7)
TURNS = (3,) * 73 + (2,) * 112 + (1,) * 695
"""Of the 880 rows of the qualitative split: 1,138 requests."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each arm (default: 2)")
    parser.add_argument("--arms", type=int, default=len(DRAFT_LENGTHS), help="default: 6")
    parser.add_argument("--rows", type=int, default=len(TURNS), help="conversations (default: 880)")
    parser.add_argument("--output_length", type=int, default=285, help="mean tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--keep", type=Path, help="folder for the runs; made if it is not there")
    parser.add_argument("--html", type=Path, help="where to leave the page")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.keep, given.html, given.profile)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "runs"
        if not folder.exists():
            made = [
                make(
                    folder / f"{k:02d}-{repeat}",
                    k,
                    seed=100 * k + repeat,
                    n_rows=given.rows,
                    output_length=given.output_length,
                    concurrency=given.concurrency,
                )
                for k in DRAFT_LENGTHS[: given.arms]
                for repeat in range(given.repeats)
            ]
            print(f"{len(made)} runs with {sum(made)} steps")
        page = given.html or Path(scratch) / "page.html"
        command = [sys.executable, __file__, "--measure", "--keep", str(folder), "--html", page]
        if given.profile:
            command.append("--profile")
        subprocess.run(command, check=True)


class _Plain(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands."""


# ---------------------------------------------------------------- runs


def make(
    directory: Path, k: int, *, seed: int, n_rows: int, output_length: int, concurrency: int
) -> int:
    """One run with drafts of length k; returns its number of steps."""
    # Which prompts, and how long their answers are, is the same in every run.
    same = np.random.default_rng(7)
    turns = same.permutation(np.array(TURNS))[:n_rows]
    row = np.repeat(np.arange(n_rows), turns)
    n = len(row)
    number = np.concatenate([np.arange(t) for t in turns])
    category = row % len(CATEGORIES)
    n_prompt = same.integers(20, 2000, n)
    wanted = np.clip(same.gamma(1.5, output_length / 1.5, n), 2, 4096).astype(int)
    own = np.random.default_rng(seed)
    of_row = np.clip(0.55 + 0.03 * (np.arange(n_rows) % 11) + same.normal(0, 0.08, n_rows), 0, 0.97)
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
        expected=dict(Counter(CATEGORIES[c % 11] for c in range(n_rows))),
        sessions=[session(ended_ns=ended_ns, counters=counters(drafts, taken, k) if k else None)],
        config={"concurrency": concurrency, "save_dir": str(directory)},
    )
    store.write_manifest(directory, about)
    ends = times[np.cumsum(n_steps) - 1]
    starts = np.cumsum(n_steps) - n_steps
    # A conversation is stored whole: with its last turn.
    last_end = np.zeros(n_rows)
    np.maximum.at(last_end, row, ends)
    part_of_row = np.digitize(last_end, np.quantile(last_end, np.linspace(0, 1, N_PARTS + 1)[1:-1]))
    of_turns = (row, number, category, n_prompt, submitted)
    of_steps = (request, index, times, tokens, accepted, drafted)
    for p in range(N_PARTS):
        mine = np.flatnonzero(part_of_row[row] == p)
        rows = (
            np.concatenate([np.arange(starts[r], starts[r] + n_steps[r]) for r in mine])
            if len(mine)
            else np.zeros(0, int)
        )
        write(directory, p, mine, rows, of_turns, of_steps, n_steps)
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
    import heapq

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
    mine: np.ndarray,
    rows: np.ndarray,
    of_turns: tuple[np.ndarray, ...],
    of_steps: tuple[np.ndarray, ...],
    n_steps: np.ndarray,
) -> None:
    """One part, as `store.Writer` lays it out."""
    row, number, category, n_prompt, submitted = (array[mine] for array in of_turns)
    names = [f"row-{c}.{t}" for c, t in zip(row, number, strict=True)]
    request, index, times, tokens, accepted, drafted = (array[rows] for array in of_steps)
    of_request = dict(zip(mine.tolist(), names, strict=True))
    ends = np.cumsum(n_steps[mine])
    summed = np.add.reduceat(tokens, ends - n_steps[mine]) if len(mine) else []
    turns = pa.table(
        {
            "request_id": names,
            "session": np.zeros(len(mine), np.int32),
            "replica": np.zeros(len(mine), np.int32),
            "conversation_id": [f"row-{c}" for c in row],
            "category": [CATEGORIES[c] for c in category],
            "turn": number.astype(np.int32),
            "n_prompt_tokens": n_prompt.astype(np.int32),
            "prompt_sha256": [f"{c:032x}{t:032x}" for c, t in zip(row, number, strict=True)],
            "submitted_ns": submitted,
            "finish_reason": ["stop"] * len(mine),
            "error": [None] * len(mine),
            "output_token_ids": [
                [(c * 31 + i) % 32000 for i in range(n)] for c, n in zip(row, summed, strict=True)
            ],
        },
        schema=store.TURNS,
    )
    steps = pa.table(
        {
            "request_id": [of_request[r] for r in request.tolist()],
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
    pq.write_table(steps, directory / "steps" / f"{part:05d}.parquet", compression="zstd")
    pq.write_table(turns, directory / "turns" / f"{part:05d}.parquet", compression="zstd")


# ---------------------------------------------------------------- the report


def measure(folder: Path, page: Path, profile: bool) -> None:
    """Report all runs of a folder as one page; the imports count."""
    profiler = None
    if profile:
        import cProfile

        profiler = cProfile.Profile()
        profiler.enable()
    begun = time.perf_counter()
    from speedbench.report import html, layout_insights
    from speedbench.report.arms import load_arms
    from speedbench.report.document import document

    arms = load_arms([folder])
    loaded = time.perf_counter()
    text = html.render(document(arms, layout_insights.of_arms(arms)), "speedbench")
    done, cpu_s = time.perf_counter(), time.process_time()
    if profiler is not None:
        import pstats

        profiler.disable()
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)
    page.write_text(text, encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    n_runs = sum(len(arm.runs) for arm in arms)
    n_steps = sum(len(run.columns.step) for arm in arms for run in arm.runs)
    print(
        f"report over {n_runs} runs, {n_steps} steps: {done - begun:.2f} s (loading "
        f"{loaded - begun:.2f} s), {cpu_s:.2f} s of CPU, {peak:.0f} MiB at most, page "
        f"{len(text) / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
