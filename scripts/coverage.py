"""How often the intervals of a comparison hold the truth, and its gates decide rightly.

    python scripts/coverage.py > docs/coverage.md      (minutes; --quick: a smoke test, seconds)

Every number comes from `speedbench.report.compare` and `gate` themselves, fed with simulated arms
whose true ratios are known. What the simulated world is like is said in ABOUT below, which is the
beginning of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

sys.path.insert(0, str(Path(__file__).parent.parent))

from speedbench import metrics, stats
from speedbench.columns import Floats, Ints
from speedbench.report.compare import ArmComparison, CategoryComparison, compare
from speedbench.report.gate import Gate, judge
from speedbench.report.sample import Sample, SampleRun
from speedbench.report.sides import Measured
from speedbench.report.summary import Figure

K, G = 3, 11
ROWS = (2, 8, 20, 80)
LOGIT = np.linspace(-0.5, 1.8, G)
MEDIAN_TOKENS = np.exp(np.linspace(np.log(40), np.log(200), G))
STEP_S, SLOWER = 0.010, 1.15
"""Time of a step without drafting, and by which factor drafting prolongs it."""
N_TRUTH = 100_000
"""Conversations of each category that a truth is computed from."""
NAMES = tuple(f"category {g:02d}" for g in range(G))


# ---------------------------------------------------------------- the world


@dataclass(frozen=True, slots=True)
class Draws:
    """Conversations (C,): decode tokens, step time by itself (log s), and what each of several
    drafters made of them: steps by length (C, 2 (K + 2)), uncensored and then censored."""

    category: Ints
    n_tokens: Ints
    log_step: Floats
    lengths: tuple[Ints, ...]

    def __getitem__(self, part: slice) -> Draws:
        lengths = tuple(rows[part] for rows in self.lengths)
        return Draws(self.category[part], self.n_tokens[part], self.log_step[part], lengths)


def draw(rng: np.random.Generator, category: Ints, worse: Sequence[float]) -> Draws:
    """One conversation for each entry of `category`; `worse`: of each drafter, in logits."""
    n = len(category)
    n_turns = rng.choice([1, 2, 3], n, p=[0.5, 0.3, 0.2])
    of = np.repeat(np.arange(n), n_turns)
    first = np.flatnonzero(np.diff(of, prepend=-1))
    logit = (LOGIT[category] + rng.normal(0, 0.5, n))[of] + rng.normal(0, 0.2, len(of))
    lognormal = MEDIAN_TOKENS[category[of]] * np.exp(rng.normal(0, 0.7, len(of)))
    tokens = np.clip(lognormal, 8, 600).astype(np.int64) - 1  # without the prefill's
    lengths = []
    for less in worse:
        own = rng.normal(0, 0.15, n)[of] - less
        steps = decode(rng, 1 / (1 + np.exp(-logit - own)), tokens)
        lengths.append(np.add.reduceat(steps, first))
    log_step = np.log(STEP_S) + rng.normal(0, 0.10, n)
    return Draws(category, np.add.reduceat(tokens, first), log_step, tuple(lengths))


def decode(rng: np.random.Generator, rate: Floats, tokens: Ints) -> Ints:
    """Steps by length (R, 2 (K + 2)) of requests (R,) with so many tokens to decode."""
    counts = np.zeros((len(rate), 2 * (K + 2)), np.int64)
    left, log_rate = tokens.copy(), np.log(rate)
    live = np.flatnonzero(left > 0)
    while len(live):
        accepted = np.floor(np.log(rng.random(len(live))) / log_rate[live])
        length = 1 + np.minimum(K, accepted).astype(np.int64)
        shown = np.minimum(length, left[live])
        last = length >= left[live]
        censored = last & (shown < K + 1)
        counts[live, shown + censored * (K + 2)] += 1
        left[live] -= shown
        live = live[~last]
    return counts


def without_drafts(n_tokens: Ints) -> Ints:
    """Steps by length (C, 4) of a baseline: as many of one token as there are tokens."""
    return np.stack([0 * n_tokens, n_tokens, 0 * n_tokens, 0 * n_tokens], axis=1)


# ---------------------------------------------------------------- arms


def manifest(draft_length: int) -> dict[str, Any]:
    return {
        "config": {},
        "engine": {"draft_length": draft_length},
        "environment": {},
        "prompts": {"fingerprint": "the same"},
        "dataset": {},
        "sessions": [],
    }


def arm(label: str, draft_length: int, runs: Sequence[Measured]) -> Sample:
    none = Figure(None, why_not="not simulated")
    made = tuple(SampleRun("", (), NAMES, (), none, run, {}) for run in runs)
    return Sample(label, manifest(draft_length), made)


def run(
    rng: np.random.Generator, drawn: Draws, lengths: Ints, log_slower: Floats, own: float = 0.0
) -> Measured:
    """One run: `log_slower` (C,) is the arm's, on each conversation; `own` is the run's."""
    n_steps = lengths.sum(axis=1)
    noise = rng.normal(0, 0.30, len(n_steps)) / np.sqrt(n_steps)
    log_step = drawn.log_step + log_slower + noise + own
    names = [f"row-{i}" for i in range(len(n_steps))]
    return Measured(
        {name: i for i, name in enumerate(names)},
        frozenset(),
        tuple(NAMES[g] for g in drawn.category),
        np.log(drawn.n_tokens / n_steps) - log_step,
        log_step,
        np.full(len(n_steps), np.nan),  # TTFT is not simulated
        np.full((len(n_steps), 3), np.nan),
        lengths,
        dict.fromkeys(names, ((0, "same"),)),
    )


@dataclass(frozen=True, slots=True)
class Scenario:
    """Base and arm: each None (no speculation) or by how much its drafter's logits are lower.

    slower    true ratio of step times
    run_sd    relative standard deviation of the step time of each run, of either arm
    """

    name: str
    arms: tuple[float | None, float]
    slower: float = 1.0
    n_repeats: int = 1
    run_sd: float = 0.0

    @property
    def drafters(self) -> list[float]:
        return [worse for worse in self.arms if worse is not None]


def lengths_by_arm(drawn: Draws, scenario: Scenario) -> list[Ints]:
    drafted = iter(drawn.lengths)
    return [
        without_drafts(drawn.n_tokens) if worse is None else next(drafted)
        for worse in scenario.arms
    ]


def compared(rng: np.random.Generator, drawn: Draws, scenario: Scenario) -> ArmComparison:
    """The comparison that a user would get."""
    arms = []
    for worse, log_slower, lengths in zip(
        scenario.arms, (0.0, np.log(scenario.slower)), lengths_by_arm(drawn, scenario), strict=True
    ):
        of_arm = log_slower + rng.normal(0, 0.05, len(drawn.n_tokens))
        runs = [
            run(rng, drawn, lengths, of_arm, rng.normal(0, scenario.run_sd))
            for _ in range(scenario.n_repeats)
        ]
        arms.append(arm("arm", 0 if worse is None else K, runs))
    return compare(arms[0], arms[1:]).arms[0]


def comparisons(seed: int, n_rows: int, n: int, scenario: Scenario) -> Iterator[ArmComparison]:
    """n independent comparisons of n_rows conversations in each category."""
    rng = np.random.default_rng(seed)
    one = np.repeat(np.arange(G), n_rows)
    at_once = max(1, 20_000 // len(one))
    for start in range(0, n, at_once):
        drawn = draw(rng, np.tile(one, min(at_once, n - start)), scenario.drafters)
        for i in range(0, len(drawn.category), len(one)):
            yield compared(rng, drawn[i : i + len(one)], scenario)


# ---------------------------------------------------------------- truth and what is found

FIGURES: Mapping[str, Callable[[CategoryComparison], Figure]] = {
    "user-TPS speedup": lambda row: row.user_tps,
    "AL ratio": lambda row: row.al_ratio,
    "step-time ratio": lambda row: row.step_time,
    "predicted speedup": lambda row: row.predicted,
    "AL of the arm": lambda row: row.al,
}


def truth(seed: int, scenario: Scenario, n: int) -> dict[str, Floats]:
    """By name of FIGURES (G + 1,): what n conversations of each category give, overall last."""
    drawn = draw(np.random.default_rng(seed), np.repeat(np.arange(G), n), scenario.drafters)
    logs, als = [], []
    for lengths in lengths_by_arm(drawn, scenario):
        width = lengths.shape[1] // 2
        as_they_look = np.log(drawn.n_tokens / lengths.sum(axis=1))
        logs.append(np.bincount(drawn.category, as_they_look) / n)
        sums = np.stack([lengths[drawn.category == g].sum(axis=0) for g in range(G)])
        als.append(metrics.acceptance_length(sums[:, :width], sums[:, width:]))
    if scenario.arms[0] == scenario.arms[1]:  # alike: the same truth, exactly
        logs[0], als[0] = logs[1], als[1]
    slower = np.full(G + 1, scenario.slower)
    al = geometric(als[1] / als[0])
    return {
        "user-TPS speedup": geometric(np.exp(logs[1] - logs[0])) / slower,
        "AL ratio": al,
        "step-time ratio": slower,
        "predicted speedup": al / slower,
        "AL of the arm": np.append(als[1], als[1].mean()),
    }


def geometric(ratios: Floats) -> Floats:
    return np.append(ratios, np.exp(np.log(ratios).mean()))


@dataclass(frozen=True, slots=True)
class Found:
    """Of n comparisons: intervals (n, G + 1, 2) by name of FIGURES, NaN where there is none; of
    the overall speedup with the spread of runs (n, 2); and what each says it can detect (n,)."""

    intervals: Mapping[str, Floats]
    total: Floats
    detectable: Floats


def found(comparisons: Iterator[ArmComparison]) -> Found:
    each = list(comparisons)
    rows = [[*one.by_category, one.overall] for one in each]
    return Found(
        {
            name: np.array([[bounds(of(row)) for row in one] for one in rows])
            for name, of in FIGURES.items()
        },
        np.array([bounds(one.between.total) for one in each]),
        np.array([one.detectable.value or np.nan for one in each]),
    )


def bounds(figure: Figure) -> tuple[float, float]:
    return figure.interval or (np.nan, np.nan)


def held(intervals: Floats, true: Floats | float) -> Floats:
    """Share (...) of the intervals (n, ..., 2) that hold the truth, of those that there are."""
    there = ~np.isnan(intervals).any(axis=-1)
    hit = (intervals[..., 0] <= true) & (true <= intervals[..., 1]) & there
    return np.asarray(hit.sum(axis=0) / there.sum(axis=0))


# ---------------------------------------------------------------- tables


class Report:
    """Markdown, and how many numbers were not as they should be."""

    def __init__(self) -> None:
        self.n_faults = 0

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print(f"| {' | '.join(header)} |")
        print(f"|{'---|' * len(header)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        print(flush=True)

    def covered(self, share: float, n: int) -> str:
        """Between 93 % and 97 %, but for the luck of n comparisons (two standard errors)."""
        chance = 2 * np.sqrt(0.05 * 0.95 / n)
        return self.told(share, 0.93 - chance <= share <= 0.97 + chance)

    def told(self, share: float, right: bool) -> str:
        self.n_faults += not right
        return f"{100 * share:.1f}" + ("" if right else " (!)")


def coverage(
    report: Report, cells: Mapping[tuple[str, int], Found], true: Mapping[str, Any]
) -> None:
    header = ("arm / base", "figure", "rows", "overall", "categories", "lowest", "highest", "none")
    rows = []
    for (scenario, n_rows), cell in cells.items():
        for name, intervals in cell.intervals.items():
            n = len(intervals)
            share = held(intervals, true[scenario][name])
            none = np.isnan(intervals).any(axis=-1).mean()
            rows.append(
                (
                    scenario,
                    name,
                    f"{n_rows}",
                    report.covered(float(share[-1]), n),
                    report.covered(float(share[:-1].mean()), n),
                    f"{100 * share[:-1].min():.1f}",
                    f"{100 * share[:-1].max():.1f}",
                    f"{100 * none:.1f}",
                )
            )
    report.table(header, rows)


def repeats(report: Report, n: int, seed: int) -> None:
    rows = []
    for n_repeats in (2, 3, 5):
        for run_sd in (0.0, 0.005, 0.02):
            scenario = Scenario("", (0.0, 0.0), 1.0, n_repeats, run_sd)
            seed += 1
            cell = found(comparisons(seed, 20, n, scenario))
            alone = held(cell.intervals["user-TPS speedup"][:, -1], 1.0)
            total = held(cell.total, 1.0)
            low = 0.93 - 2 * np.sqrt(0.05 * 0.95 / n)
            width = np.log(cell.total[:, 1] / cell.total[:, 0]) / 2
            rows.append(
                (
                    f"{n_repeats}",
                    f"{100 * run_sd:g} %",
                    f"{100 * alone:.1f}",
                    report.told(float(total), bool(total >= low)),
                    f"{100 * np.median(width):.2f} %",
                )
            )
    header = (
        "repeats",
        "sd of a run",
        "interval over conversations",
        "interval over both",
        "its half-width (median)",
    )
    report.table(header, rows)


def gates(report: Report, cells: Mapping[tuple[str, int], Found], true: Mapping[str, Any]) -> None:
    """At a margin of the true change (a false pass, a false fail), twice and none of it."""
    rows = []
    for figure, metric in (("AL ratio", "al"), ("user-TPS speedup", "speedup")):
        change = float(true["worse"][figure][-1]) - 1
        for n_rows in ROWS:
            for words, scenario, margin in (
                ("at the margin", "worse", -change),
                ("none", "alike", -change),
                ("twice the margin", "worse", -change / 2),
            ):
                gate = Gate(metric, None, "fall", margin)
                intervals = cells[scenario, n_rows].intervals[figure][:, -1]
                said = [
                    "inconclusive" if np.isnan(low) else judge((low, high), gate)
                    for low, high in intervals
                ]
                passed, failed = (float(np.mean([s == o for s in said])) for o in ("pass", "fail"))
                least = 2 * np.sqrt(0.025 * 0.975 / len(said))
                wrong_pass, wrong_fail = words != "none", words == "none"
                most = 0.035 + least
                rows.append(
                    (
                        f"`{metric}=-{100 * margin:.2f}%`",
                        words,
                        f"{n_rows}",
                        report.told(passed, not wrong_pass or passed <= most),
                        report.told(
                            failed, not (wrong_fail or words == "at the margin") or failed <= most
                        ),
                        f"{100 * (1 - passed - failed):.1f}",
                    )
                )
    report.table(("gate", "true change", "rows", "pass", "fail", "inconclusive"), rows)


def detectable(report: Report, cells: Mapping[tuple[str, int], Found]) -> None:
    """How often a change is found that is as large as the report says can be."""
    rows = []
    for n_rows in ROWS:
        cell = cells["alike", n_rows]
        logs = np.log(cell.intervals["user-TPS speedup"][:, -1])
        least = float(np.log1p(np.mean(cell.detectable)))
        power = np.mean([np.mean((logs + shift).prod(axis=1) > 0) for shift in (least, -least)])
        rows.append(
            (
                "speedup, paired",
                f"{n_rows}",
                f"{100 * np.expm1(least):.2f} %",
                report.told(float(power), 0.77 <= power <= 0.83),
            )
        )
        als = cell.intervals["AL of the arm"][:, -1]
        als = als[~np.isnan(als).any(axis=1)]
        centre, half = als.mean(axis=1), np.diff(als, axis=1)[:, 0] / 2
        smallest = float(np.mean([stats.smallest_difference(h, n_runs=2) for h in half]))
        apart = centre - np.roll(centre, 1)
        needed = np.hypot(half, np.roll(half, 1))
        power = np.mean([np.mean(abs(apart + shift) > needed) for shift in (smallest, -smallest)])
        rows.append(
            (
                "AL, two runs on other rows",
                f"{n_rows}",
                f"{smallest:.3f}",
                report.told(float(power), 0.77 <= power <= 0.83),
            )
        )
    report.table(("figure", "rows", "smallest difference (mean)", "found, % of cases"), rows)


# ---------------------------------------------------------------- the whole

ABOUT = """# Coverage: how often intervals hold the truth

Written by `scripts/coverage.py`: {n} simulated comparisons in each cell, on {cpu}; Python {python},
numpy {numpy}, scipy {scipy}.

    {command}

Every interval, gate and smallest difference below comes from `speedbench.report.compare` and
`speedbench.report.gate` themselves, fed with simulated arms whose true ratios are known: in closed
form where both arms are alike, else from {n_truth} conversations of each category. A comparison has
11 categories of `rows` conversations each, paired, K = 3.

- **Acceptance.** The logit of the acceptance rate is the category's (-0.5 to 1.8), plus the
  conversation's own (sd 0.5), the turn's (0.2) and the drafter's on this conversation (0.15).
- **Length.** 1, 2 or 3 turns (50, 30, 20 %); tokens of a turn are lognormal (sd 0.7) around the
  category's median (40 to 200), between 8 and 600; the last step of every turn is cut off.
- **Time.** A step takes 10 ms, times what is the conversation's own (lognormal, sd 0.10, the same
  in both arms), the arm's on this conversation (0.05), each step's (0.30), and each run's (below).

Arms: `drafter / none` is a drafter against no speculation, its steps {slower} times as long;
`alike` are two drafters of one quality; `worse` is one whose logits are 0.07 lower than the base's.

## Intervals

In %: how often the 95 % interval holds the truth, overall; in the mean over categories, in the
category where it does so least often, and most often; and how many numbers have no interval. Of
{n} comparisons, a share near 95 % has a standard error of {error:.2f} %. Marked (!): outside of 93
to 97 by more than two standard errors.

Two rows in each category are few for an AL: the ratio of two sums that it is leans upwards by 0.4
of its standard error there. A ratio of the ALs of two drafters does not lean.
"""

REPEATS = """## Repeats

Two drafters that are alike, 20 rows in each category, every run of either arm slower or faster as a
whole by a normal factor of the given standard deviation. The interval over conversations (the one
beside every speedup) does not hold what differs from run to run; the one over both
(`between.total`) adds the squares of two half-widths, and may hold the truth more often than 95 %,
never much less. In %.
"""

GATES = """## Gates

`al=-m%` and `speedup=-m%` on the overall ratio, in %. A true change at the margin passes or fails
wrongly in at most 2.5 % of the cases each, by construction; none must not fail, twice the margin
must not pass. Marked (!): more than 3.5 % by more than two standard errors. Few rows make a gate
inconclusive, not wrong.
"""

DETECTABLE = """## Smallest differences

How often a true change is found (the interval leaves out no change) that is as large as the report
says can be found in 80 % of cases: for the speedup the `Detectable` line of a comparison, for the
AL the sentence of `--preset`, for two runs that have no row in common. Marked (!): not 77 to 83 %.
"""


def heading(n: int) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    print(
        ABOUT.format(
            n=n,
            cpu=cpu or platform.machine(),
            python=platform.python_version(),
            numpy=np.__version__,
            scipy=scipy.__version__,
            command=" ".join(["python", "scripts/coverage.py", *sys.argv[1:]]),
            n_truth=f"{N_TRUTH:,}",
            slower=SLOWER,
            error=100 * np.sqrt(0.05 * 0.95 / n),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--comparisons", type=int, default=2000, help="simulated in each cell")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test: proves nothing")
    given = parser.parse_args()
    n, n_truth = (40, 2000) if given.quick else (given.comparisons, N_TRUTH)
    began_s = time.perf_counter()
    report = Report()
    scenarios = (
        Scenario("drafter / none", (None, 0.0), SLOWER),
        Scenario("alike", (0.0, 0.0)),
        Scenario("worse", (0.0, 0.07)),
    )
    true = {s.name: truth(given.seed, s, n_truth) for s in scenarios}
    cells = {
        (s.name, rows): found(comparisons(given.seed + 1000 * i + rows, rows, n, s))
        for i, s in enumerate(scenarios, 1)
        for rows in ROWS
    }
    heading(n)
    coverage(report, cells, true)
    print(REPEATS)
    repeats(report, max(n // 2, 20), given.seed + 10_000)
    print(GATES)
    gates(report, cells, true)
    print(DETECTABLE)
    detectable(report, cells)
    print(
        f"{report.n_faults} numbers are marked (!). It took {time.perf_counter() - began_s:.0f} s."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
