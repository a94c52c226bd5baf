"""Sweeps as numbers: points, frontier, the best K, break-even, against closed forms and twins."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from speedbench.cli import main
from speedbench.report import console
from speedbench.report.arms import Arm, grouped, load_arms
from speedbench.report.blocks import Chart, Facts, Paragraph, Table
from speedbench.report.break_even import Verdict, crossing, crossings
from speedbench.report.layout_pareto import break_even_sentence, of_sweep
from speedbench.report.pareto import Pareto, Point, frontier, is_sweep, pareto, user_tps
from speedbench.report.summary import Figure
from speedbench.store import Run
from tests.builders import MS, S, conversation, session, stored, turn

T_2 = 4.302652729911275
"""Student's t at 97.5 %, 2 degrees of freedom."""
T_1 = 12.706204736432095
"""1 degree of freedom."""


def figure(value: float | None, low: float | None = None, high: float | None = None) -> Figure:
    return Figure(value, None if low is None or high is None else (low, high), "none was made")


# --- break-even -----------------------------------------------------------------------------------


def test_break_even_is_interpolated_in_the_logarithms() -> None:
    """Speedups of 4 at 1 and 1/4 at 16: half-way in logarithms lies 4; the interval's ends cross 1
    after a quarter and three quarters of the way."""
    found = crossing("", "E", 3, [(1, figure(4, 2, 8)), (16, figure(1 / 4, 1 / 8, 1 / 2))])
    assert found.verdict == "stops"
    assert found.concurrency == pytest.approx(4, rel=1e-12)
    assert found.between == (1, 16)
    assert found.interval is not None
    assert found.interval == (pytest.approx(2, rel=1e-12), pytest.approx(8, rel=1e-12))
    starts = crossing("", "E", 3, [(1, figure(1 / 4, 1 / 8, 1 / 2)), (16, figure(4, 2, 8))])
    assert (starts.verdict, starts.between) == ("starts", (1, 16))
    assert starts.concurrency == pytest.approx(4, rel=1e-12)
    assert starts.interval == (pytest.approx(2, rel=1e-12), pytest.approx(8, rel=1e-12))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.5, 1.2, 1.01), "pays at all"),
        ((0.9, 0.8, 0.7), "pays nowhere"),
        ((1.0, 1.0, 1.0), "pays nowhere"),
        ((1.5, 1.1, 0.9), "stops"),
        ((0.9, 1.1, 1.2), "starts"),
        ((1.5, 0.9, 1.1), "several"),
        ((None, None, None), "unknown"),
        ((None, 1.5, 0.5), "stops"),
    ],
)
def test_verdicts(values: Sequence[float | None], verdict: Verdict) -> None:
    found = crossing("", "E", 3, list(zip((1, 8, 64), map(figure, values), strict=True)))
    assert found.verdict == verdict
    assert (found.concurrency is not None) == (verdict in ("stops", "starts"))
    assert found.measured == tuple(
        c for c, v in zip((1, 8, 64), values, strict=True) if v is not None
    )
    assert found.interval is None  # one throughput of each run


def test_an_end_of_the_interval_beyond_what_was_measured_is_open() -> None:
    low_open = [(1, figure(1.1, 0.9, 1.3)), (8, figure(0.5, 0.4, 0.6))]
    assert crossing("", "E", 3, low_open).interval == (
        None, pytest.approx(8 ** (math.log(1.3) / math.log(1.3 / 0.6))),
    )  # fmt: skip
    high_open = [(1, figure(2, 1.9, 2.1)), (8, figure(0.95, 0.9, 1.1))]
    low, high = crossing("", "E", 3, high_open).interval or (0, 0)
    assert high is None
    assert low == pytest.approx(math.exp(math.log(8) * math.log(1.9) / math.log(1.9 / 0.9)))
    both = [(1, figure(1.1, 0.9, 1.3)), (8, figure(0.95, 0.9, 1.1))]
    assert crossing("", "E", 3, both).interval == (None, None)


@settings(max_examples=200, deadline=None)
@given(
    logs=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-6), min_size=2, max_size=6),
    factor=st.integers(2, 9),
)
def test_crossings_lie_where_the_sign_changes_and_scale_with_the_load(
    logs: list[float], factor: int
) -> None:
    loads = [2**i for i in range(len(logs))]
    found = crossings(loads, logs)
    changes = [i for i in range(len(logs) - 1) if (logs[i] > 0) != (logs[i + 1] > 0)]
    assert len(found) == len(changes)
    for place, i in zip(found, changes, strict=True):
        assert loads[i] <= place <= loads[i + 1]
        # On the line between the two in log-log, the speedup there is 1.
        share = math.log(place / loads[i]) / math.log(loads[i + 1] / loads[i])
        assert logs[i] + share * (logs[i + 1] - logs[i]) == pytest.approx(0, abs=1e-9)
    scaled = crossings([factor * c for c in loads], logs)
    assert scaled == pytest.approx([factor * place for place in found])


def test_what_is_said_of_break_even() -> None:
    def said(*speedups: tuple[int, Figure], unsure: Sequence[str] = ()) -> str:
        return break_even_sentence(crossing("", "E", 3, speedups), unsure)

    told = said((1, figure(4, 2, 8)), (16, figure(1 / 4, 1 / 8, 1 / 2)))
    assert "stops paying at a concurrency of about 4, between 1 and 16" in told
    assert "95 % interval: 2-8" in told
    assert "needs repeats" in said((1, figure(4)), (16, figure(1 / 4)))
    assert "at every concurrency, measured at 1 and 16" in said((1, figure(4)), (16, figure(2)))
    assert "it pays nowhere" in said((1, figure(0.5)))
    assert "more than once" in said((1, figure(2)), (2, figure(0.5)), (4, figure(2)))
    assert said((1, figure(None))) == "n/a: none was made."
    assert "not significant at 8" in said((8, figure(1.1)), unsure=["8"])
    lone = break_even_sentence(crossing("", "E", 3, ((1, figure(4)),)), untold=["1"])
    assert lone.endswith("At 1 it has no interval.")


# --- frontier -------------------------------------------------------------------------------------


def point(user: float | None, output: float | None) -> Point:
    return Point(cast(Arm, None), "", "", 1, figure(user), figure(output))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_frontier_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [point(*pair) for pair in pairs]
    found = frontier(points)
    brute = [
        (u, o)
        for u, o in pairs
        if not any(a >= u and b >= o and (a, b) != (u, o) for a, b in pairs)
    ]
    assert sorted((p.user_tps.value, p.output_tps.value) for p in found) == sorted(brute)
    users = [p.user_tps.value or 0 for p in found]
    assert users == sorted(users)


def test_a_point_without_a_number_is_on_no_frontier() -> None:
    points = [point(1, None), point(None, 5), point(1, 1)]
    assert frontier(points) == [points[2]]


# --- one arm --------------------------------------------------------------------------------------


def arm_run(
    directory: Path, step_ms: Sequence[float], *, k: int = 0, concurrency: int = 2,
    tokens: int = 2, seconds: float = 10, categories: Sequence[str] = ("c",), **config: Any,
) -> Run:  # fmt: skip
    """A run of one conversation per entry: 1 prefill token, then 10 steps of `tokens` tokens."""
    records = [
        conversation(
            f"q{i}",
            categories[i % len(categories)],
            turn(f"q{i}.0", [1] + [tokens] * 10, step_ns=int(ms * MS), finish="length"),
        )
        for i, ms in enumerate(step_ms)
    ]
    return stored(
        directory,
        records,
        draft_length=k,
        sessions=[session(ended_ns=int(seconds * S))],
        config={"concurrency": concurrency, "output_length": 99, "draft_length": k or 3, **config},
    )


def test_user_tps_is_the_mean_over_conversations_with_students_interval(tmp_path: Path) -> None:
    """20 tokens in 10 steps of 10, 20 and 40 ms: 200, 100 and 50 tokens/s."""
    found = user_tps([arm_run(tmp_path / "a", (10, 20, 40))])
    mean = (200 + 100 + 50) / 3
    sd = math.sqrt(((200 - mean) ** 2 + (100 - mean) ** 2 + (50 - mean) ** 2) / 2)
    half = T_2 * sd / math.sqrt(3)
    assert found.value == pytest.approx(mean, rel=1e-9)
    off = math.exp(half / mean)  # on the logarithm, by the delta method
    assert found.interval == (pytest.approx(mean / off), pytest.approx(mean * off))
    # Repeats: conversations averaged over them, and what the runs differ by is added.
    again = user_tps([arm_run(tmp_path / "b", (10, 20, 40)), arm_run(tmp_path / "c", (20, 40, 80))])
    assert again.value == pytest.approx(0.75 * mean, rel=1e-9)
    between = T_1 * (mean / 2 / math.sqrt(2)) / math.sqrt(2)
    assert again.interval is not None
    both = math.hypot(0.75 * half, between)
    off = math.exp(both / (0.75 * mean))
    assert again.interval == (pytest.approx(0.75 * mean / off), pytest.approx(0.75 * mean * off))
    assert user_tps([arm_run(tmp_path / "d", (10,))]).interval is None


# --- a sweep --------------------------------------------------------------------------------------


def sweep_runs(tmp_path: Path, *, repeats: int = 1, wobble: float = 0.0) -> tuple[Arm, ...]:
    """Concurrency 1 and 16, K 0, 1 and 3. A step takes 10 ms at 1, whatever K: it shows K + 1
    tokens. At 16 it takes 20 ms with no drafts, 50 ms with K = 1 and 160 ms with K = 3.

    Whole-run output TPS: all tokens of 4 conversations over the session, made so that the speedups
    of K = 1 are 2 and 1/2, those of K = 3 are 4 and 1/8.
    """
    step_ms = {(1, 0): 10, (1, 1): 10, (1, 3): 10, (16, 0): 20, (16, 1): 50, (16, 3): 160}
    speedup = {(1, 0): 1, (1, 1): 2, (1, 3): 4, (16, 0): 1, (16, 1): 1 / 2, (16, 3): 1 / 8}
    runs = []
    for (c, k), ms in step_ms.items():
        for r in range(repeats):
            n_tokens = 4 * (1 + 10 * (k + 1))
            tps = (100 if c == 1 else 400) * speedup[c, k] * (1 + wobble * r)
            runs.append(
                arm_run(
                    tmp_path / f"{c}-{k}-{r}", [ms * (1 + i / 100) for i in range(4)], k=k,
                    concurrency=c, tokens=k + 1, seconds=n_tokens / tps,
                )
            )  # fmt: skip
    return grouped(runs)


def test_a_sweep_is_told_as_it_was_made(tmp_path: Path) -> None:
    found = pareto(sweep_runs(tmp_path))
    assert not found.is_steady  # all were submitted at once: nobody waited for a slot
    assert "no steady window" in found.why_whole
    assert found.per_gpu
    assert [(p.concurrency, p.draft_length, p.setting) for p in found.points] == [
        (c, k, "") for c in (1, 16) for k in (0, 1, 3)
    ]  # fmt: skip
    outputs = [p.output_tps.value for p in found.points]
    assert outputs == pytest.approx([100, 200, 400, 400, 200, 50])
    assert all(p.output_tps.interval is None for p in found.points)
    shape = sum(1 / (1 + i / 100) for i in range(4)) / 4
    users = [p.user_tps.value for p in found.points]
    assert users == pytest.approx(
        [n / ms * 1000 * shape for n, ms in ((1, 10), (2, 10), (4, 10), (1, 20), (2, 50), (4, 160))]
    )
    assert [
        (one.speculates, [(p.concurrency, p.draft_length) for p in one.points])
        for one in found.frontiers
    ] == [(False, [(16, 0), (1, 0)]), (True, [(1, 3)])]
    speedups = {(s.concurrency, s.draft_length): s for s in found.speedups}
    assert {key: s.output_tps.value for key, s in speedups.items()} == {
        (1, 1): pytest.approx(2), (1, 3): pytest.approx(4),
        (16, 1): pytest.approx(1 / 2), (16, 3): pytest.approx(1 / 8),
    }  # fmt: skip
    assert {key: s.user_tps.value for key, s in speedups.items()} == {
        (1, 1): pytest.approx(2), (1, 3): pytest.approx(4),
        (16, 1): pytest.approx(0.8), (16, 3): pytest.approx(0.5),
    }  # fmt: skip
    even = {one.draft_length: one for one in found.break_even}
    assert even[1].concurrency == pytest.approx(4)  # half-way from 1 to 16
    assert even[3].concurrency == pytest.approx(16 ** (2 / 5))  # log2: from 2 to -3


def test_the_best_k_and_what_it_beats(tmp_path: Path) -> None:
    found = pareto(sweep_runs(tmp_path))
    told = {(one.concurrency, one.of): one for one in found.best}
    assert {key: (one.best, one.runner_up) for key, one in told.items()} == {
        (1, "user TPS"): (3, 1), (1, "output TPS"): (3, 1),
        (16, "user TPS"): (0, 1), (16, "output TPS"): (0, 1),
    }  # fmt: skip
    assert told[1, "user TPS"].ratio.value == pytest.approx(1 / 2)  # 2 tokens a step against 4
    assert told[16, "user TPS"].ratio.value == pytest.approx(0.8)  # 2 / 50 ms against 1 / 20 ms
    # Every conversation has the same ratio: the interval has no width, and nothing is unsure.
    assert told[1, "user TPS"].ratio.interval == (pytest.approx(1 / 2), pytest.approx(1 / 2))
    assert told[1, "user TPS"].alike == ()
    assert told[1, "user TPS"].untold == ()
    assert told[1, "output TPS"].ratio.value == pytest.approx(1 / 2)
    assert told[1, "output TPS"].ratio.interval is None  # one throughput of each run
    assert told[1, "output TPS"].untold == (0, 1)
    assert told[1, "user TPS"].draft_lengths == (0, 1, 3)


def test_k_that_noise_hides_are_listed(tmp_path: Path) -> None:
    """K = 3 is 1 % faster than K = 1 on average, by twice as much one way as the other: not to be
    told apart. No speculation is half as fast, surely."""
    even = [10 * f for f in (1.2, 1 / 1.2) * 4]
    runs = [
        arm_run(tmp_path / "b", [10] * 8, k=0, tokens=1, seconds=1),
        arm_run(tmp_path / "1", [10] * 8, k=1, seconds=1),
        arm_run(tmp_path / "3", [ms / 1.01 for ms in even], k=3, seconds=1),
    ]
    best = {one.of: one for one in pareto(grouped(runs)).best}["user TPS"]
    assert (best.best, best.runner_up, best.alike) == (3, 1, (1,))
    assert best.ratio.value == pytest.approx(1 / 1.01)
    assert best.ratio.interval is not None
    assert best.ratio.interval[0] < 1 < best.ratio.interval[1]


def test_k_that_cannot_be_held_against_the_best_are_listed(tmp_path: Path) -> None:
    """K = 1 failed where K = 3 did not, and the other way round; the run of K = 5 has no throughput
    of its own: none of them may vanish from the choice."""
    runs = []
    for k, names in ((0, "abcd"), (1, "ab"), (3, "cd"), (5, "abcd")):
        records = [
            conversation(name, "a", turn(f"{name}.0", [1] + [k + 1] * 6, step_ns=(20 - k) * MS))
            for name in names
        ]
        about: dict[str, Any] = {"sessions": [session(ended_ns=None)]} if k == 5 else {}
        runs.append(stored(tmp_path / str(k), records, draft_length=k, **about))
    user, output = pareto(grouped(runs)).best
    assert (user.best, user.of, user.draft_lengths) == (5, "user TPS", (0, 1, 3, 5))
    assert user.untold == ()
    assert (output.of, output.draft_lengths) == ("output TPS", (0, 1, 3, 5))
    assert set(output.untold) == {0, 1, 3, 5} - {output.best}
    user, _ = pareto(grouped(runs[:3])).best
    assert (user.best, user.runner_up, user.untold) == (3, 0, (1,))


def test_repeats_give_break_even_an_interval(tmp_path: Path) -> None:
    """Every arm's second run is 10 % faster: its ratios to the baseline are the same in both."""
    found = pareto(sweep_runs(tmp_path, repeats=2, wobble=0.1))
    assert [len(p.arm.runs) for p in found.points] == [2] * 6
    even = {one.draft_length: one for one in found.break_even}
    assert even[1].concurrency == pytest.approx(4)
    assert even[1].interval == (pytest.approx(4), pytest.approx(4))
    mean, sd = 105.0, 10 / math.sqrt(2)
    half = T_1 * sd / math.sqrt(2)
    assert found.points[0].output_tps.value == pytest.approx(mean)
    assert found.points[0].output_tps.interval == (
        pytest.approx(mean / math.exp(half / mean)), pytest.approx(mean * math.exp(half / mean)),
    )  # fmt: skip
    best = {(one.concurrency, one.of): one for one in found.best}[1, "output TPS"]
    assert (best.best, best.alike, best.untold) == (3, (), ())


def test_what_differs_otherwise_is_a_setting_of_its_own(tmp_path: Path) -> None:
    runs = []
    for t in (0, 1):
        for k in (0, 1, 3):
            runs.append(arm_run(tmp_path / f"{t}-{k}", [10] * 3, k=k, temperature=t))
    found = pareto(grouped(runs))
    assert {p.setting for p in found.points} == {"temperature 0.0", "temperature 1.0"}
    assert len(found.best) == 2 * 2  # user and output TPS in each
    assert {one.draft_lengths for one in found.best} == {(0, 1, 3)}
    drafters = [
        arm_run(tmp_path / f"d{d}{c}", [10] * 3, k=3, draft_model_dir=f"/m/{d}", concurrency=c)
        for d in "ab"
        for c in (1, 2)
    ]
    found = pareto(grouped(drafters))
    assert {p.drafter for p in found.points} == {"EAGLE3 a", "EAGLE3 b"}
    assert found.best == ()  # one K each, and no baseline
    assert found.break_even == ()


def test_output_tps_is_per_gpu_only_where_gpus_worked(tmp_path: Path) -> None:
    def outputs(**about: Any) -> Pareto:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        runs = []
        for k in (1, 3):
            records = [conversation("q", "c", turn("q.0", [1, 2, 2], finish="length"))]
            runs.append(stored(folder / str(k), records, draft_length=k, **about))
        return pareto(grouped(runs))

    ten_s = [session()]
    two = outputs(sessions=ten_s, config={"tp_size": 2})
    assert two.per_gpu
    assert [p.output_tps.value for p in two.points] == pytest.approx([5 / 10 / 2] * 2)
    cpu = outputs(sessions=ten_s, config={"tp_size": 2}, engine={"settings": {"device": "cpu"}})
    assert not cpu.per_gpu
    assert cpu.why_no_gpu == "the engine used no GPU"
    assert [p.output_tps.value for p in cpu.points] == pytest.approx([5 / 10] * 2)
    assert not outputs(engine={"simulated": True}).per_gpu


def test_an_arm_without_throughput_is_told_and_drawn_nowhere(tmp_path: Path) -> None:
    runs = [
        arm_run(tmp_path / "1", [10] * 3, k=1),
        stored(
            tmp_path / "3", [conversation("q0", "c", turn("q0.0", [1, 2], finish="length"))],
            draft_length=3, sessions=[session(0), session(1)],
            config={"output_length": 99, "concurrency": 2},
        ),
    ]  # fmt: skip
    arms = grouped(runs)
    found = pareto(arms)
    assert found.points[1].output_tps.value is None
    assert "2 sessions" in found.points[1].output_tps.why_not
    assert [[p.draft_length for p in one.points] for one in found.frontiers] == [[1]]
    table = next(block for block in of_sweep(arms) if isinstance(block, Table))
    assert any("2 sessions" in note for note in table.notes)


def test_arrivals_make_no_k_the_best_in_output_tps(tmp_path: Path) -> None:
    """In an open loop as many tokens come as conversations do, whatever the engine."""
    rates = [arm_run(tmp_path / str(k), [10 + k] * 3, k=k, request_rate=8.0) for k in (1, 3)]
    found = pareto(grouped(rates))
    assert {p.output_tps.why_not for p in found.points} == {
        "in an open loop arrivals set it, and not the engine"
    }
    assert {one.of: one.best for one in found.best} == {"user TPS": 1, "output TPS": None}


# --- layout ---------------------------------------------------------------------------------------


def test_a_pair_is_no_sweep(tmp_path: Path) -> None:
    runs = [arm_run(tmp_path / str(k), [10] * 3, k=k) for k in (0, 3)]
    arms = grouped(runs)
    assert not is_sweep(arms)
    assert list(of_sweep(arms)) == []
    more = grouped([*runs, arm_run(tmp_path / "1", [10] * 3, k=1)])
    assert is_sweep(more)


def test_why_there_is_no_interval_is_said_once_for_all(tmp_path: Path) -> None:
    """Two drafters' lines, each measured at 1 and 16 in a single run."""
    blocks = list(of_sweep(sweep_runs(tmp_path)))
    facts = [text for block in blocks if isinstance(block, Facts) for _, text, _ in block.items]
    lacking = [text for text in facts if "has no interval" in text]
    assert len(lacking) == 2
    assert all(text.endswith("At 1 and 16 it has no interval.") for text in lacking)
    said = [b.text for b in blocks if isinstance(b, Paragraph) and "another run may" in b.text]
    assert len(said) == 1


def test_the_figure_names_its_points_and_its_axes_have_units(tmp_path: Path) -> None:
    blocks = list(of_sweep(sweep_runs(tmp_path)))
    charts = [block for block in blocks if isinstance(block, Chart)]
    assert [chart.id for chart in charts] == ["pareto", "speedup-by-load"]
    curve, by_load = charts
    assert (curve.x.unit, curve.y.unit) == ("tokens/s", "tokens/s and GPU")
    assert curve.y.label == "Output TPS per GPU"
    series = {one.label: one for one in curve.series}
    assert set(series) == {
        "frontier without speculation",
        "baseline",
        "EAGLE3 K=1",
        "EAGLE3 K=3",
    }  # the frontier with speculation is one point
    assert series["EAGLE3 K=3"].names == ("K=3, c=1", "K=3, c=16")
    assert series["EAGLE3 K=3"].y == pytest.approx((400, 50))
    assert by_load.reference == 1
    assert by_load.x.log
    assert {one.label: one.y for one in by_load.series} == {
        "EAGLE3 K=1": (pytest.approx(2), pytest.approx(0.5)),
        "EAGLE3 K=3": (pytest.approx(4), pytest.approx(0.125)),
    }
    for chart in charts:
        assert chart.alt.endswith(".")
        for one in chart.series:
            assert len(one.x) == len(one.y)
    tables = [block for block in blocks if isinstance(block, Table)]
    assert curve.table in tables  # every number that is drawn, once in text
    facts = next(block for block in blocks if isinstance(block, Facts))
    assert [label for label, _, _ in facts.items] == ["EAGLE3 K=1", "EAGLE3 K=3"]
    assert "about 4, between 1 and 16" in facts.items[0][1]
    assert [row[0] for row in curve.table.rows] == [
        f"{arm}, concurrency {c}" for arm in ("baseline", "EAGLE3 K=1", "EAGLE3 K=3")
        for c in (1, 16)
    ]  # fmt: skip
    shown = io.StringIO()
    console.draw(blocks, Console(file=shown, width=100, color_system=None))
    text = " ".join(shown.getvalue().split())
    assert "over whole runs, because" in text
    assert "400.0000" in text
    assert all(isinstance(block, Paragraph) or block for block in blocks)


def test_a_sweep_on_the_null_engine_ends_with_its_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its steps take 10 ms whatever K and load: drafting pays everywhere, the more the better."""
    command = ["sweep", "--engine", "NULL", "--random_isl", "4", "--num_requests", "40",
               "--output_length", "60", "--speculative_algorithm", "DRAFT_TARGET",
               "--draft_model_dir", "none", "--grid", "draft_length=1,7", "--grid",
               "concurrency=1,4", "--baseline", "--save_dir", str(tmp_path / "d")]  # fmt: skip
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not per GPU, because the engine is simulated" in out
    assert "all runs: SIMULATED" in out[:300]
    assert out.count("it pays (output TPS higher than without speculation) at every") == 2
    found = pareto(load_arms([tmp_path / "d"]))
    assert found.is_steady
    # K=7 at acceptance 0.7: (1 - 0.7^8) / 0.3 tokens a step; its point beats all others.
    best = {(one.concurrency, one.of): one.best for one in found.best}
    assert set(best.values()) == {7}
    user = {(p.concurrency, p.draft_length): p.user_tps.value or 0 for p in found.points}
    assert user[1, 0] == pytest.approx(100)  # one token per 10 ms
    assert 200 < user[1, 7] < 100 * (1 - 0.7**8) / 0.3 * 1.15
