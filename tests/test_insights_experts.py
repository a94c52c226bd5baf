"""Expert activation: counts against the router's own table, batches against enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedbench import store
from speedbench.calibration.closed_form import Case, KnownAnswer, read_known_answer
from speedbench.calibration.weights import N_EXPERTS, N_ROUTED_LAYERS, TOP_K
from speedbench.insights import experts
from speedbench.insights.options import InsightOptions
from speedbench.report.arms import Arm
from speedbench.report.blocks import Chart, Table
from speedbench.report.layout_insights import of_arms
from speedbench.report.merge import merged
from speedbench.store import Run
from speedbench.types import ConversationRecord, RoutedExperts, Step, TurnRecord, UserError
from tests.builders import MS, stored

PROMPT = [3, 5, 8, 13, 21]
"""As many tokens as the builders' requests have."""


def captured(ids: Sequence[Sequence[Sequence[int]]]) -> RoutedExperts:
    array = np.array(ids, "<i2")
    return RoutedExperts(*array.shape, array.tobytes())


def routed(
    name: str,
    output: Sequence[int],
    ids: Sequence[Sequence[Sequence[int]]],
    prompt: Sequence[int] = PROMPT,
    category: str = "x",
) -> ConversationRecord:
    """A conversation of one request that says `output`, one token a step."""
    last = len(output) - 1
    steps = [
        Step(
            f"{name}.0",
            (i + 1) * MS,
            [token],
            accepted=0,
            drafted=0,
            finish_reason="stop" if i == last else None,
            routed_experts=captured(ids) if i == last else None,
        )
        for i, token in enumerate(output)
    ]
    turn = TurnRecord(f"{name}.0", 0, len(prompt), "00", 0, "stop", None, steps)
    return ConversationRecord(name, category, (turn,))


def of_known(
    tmp: Path, models: Path, starts: Sequence[int], **config: Any
) -> tuple[Run, KnownAnswer]:
    """A run of the calibration's Mixture-of-Experts target, with the experts its router gives."""
    known = read_known_answer(models / "word" / "moe")
    case = Case("NONE", 0, 20, known.eos_token_ids)
    records = []
    for i, start in enumerate(starts):
        prompt = [*PROMPT[:4], start]
        output = [t for step in case.steps(known, prompt) for t in step.token_ids]
        ids = [known.experts[token] for token in [*prompt, *output[:-1]]]
        records.append(routed(f"c{i}", output, ids, prompt))
    return stored(tmp, records, draft_length=0, config=config), known


def by_label(found: Sequence[experts.ExpertUse], phase: str) -> experts.ExpertUse:
    (one,) = [use for use in found if use.phase == phase]
    return one


# --- counts ---------------------------------------------------------------------------------------


def test_a_known_router_is_counted_token_by_token(tmp_path: Path, models: Path) -> None:
    starts = range(100, 130)
    run, known = of_known(tmp_path / "r", models, starts)
    tokens: dict[str, list[int]] = {"prompt": [], "output": []}
    case = Case("NONE", 0, 20, known.eos_token_ids)
    for start in starts:
        tokens["prompt"] += [*PROMPT[:4], start]
        output = [t for step in case.steps(known, [start]) for t in step.token_ids]
        tokens["output"] += output[:-1]
    found, _ = experts.uses([Arm("moe", (run,))], [1, 8])
    for phase, of_phase in tokens.items():
        use = by_label(found, phase)
        assert (use.n_tokens, use.n_experts, use.top_k) == (len(of_phase), N_EXPERTS, TOP_K)
        assert len(use.layers) == N_ROUTED_LAYERS
        assert use.unrouted == ()
        for layer in use.layers:
            assert layer.layer is not None
            counts = Counter(e for token in of_phase for e in known.experts[token][layer.layer])
            assert layer.n_used == len(counts)
            mean = sum(counts.values()) / N_EXPERTS
            assert layer.imbalance.value == pytest.approx(max(counts.values()) / mean)
            shares = [n / sum(counts.values()) for n in counts.values()]
            bits = -sum(p * math.log(p) for p in shares)
            assert layer.entropy.value == pytest.approx(bits / math.log(N_EXPERTS))
            one, eight = dict(layer.activated)[1], dict(layer.activated)[8]
            assert one.value == pytest.approx(TOP_K / N_EXPERTS)
            assert eight.value == pytest.approx(
                sum(
                    1 - math.comb(len(of_phase) - n, 8) / math.comb(len(of_phase), 8)
                    for n in counts.values()
                )
                / N_EXPERTS
            )
            for share in (eight, layer.imbalance, layer.entropy):
                assert share.interval is not None
                assert share.value is not None
                assert share.interval[0] <= share.value <= share.interval[1]


# --- batches --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True), min_size=1, max_size=7
    ),
    st.integers(1, 7),
)
def test_batches_activate_as_many_as_in_every_subset(choices: list[list[int]], b: int) -> None:
    counts = np.bincount(np.ravel(choices), minlength=5).astype(float)
    found = experts.expected_distinct(counts, np.array(len(choices)), b)
    if b > len(choices):
        assert math.isnan(found)
        return
    sizes = [len(set(itertools.chain(*batch))) for batch in itertools.combinations(choices, b)]
    assert found == pytest.approx(sum(sizes) / len(sizes))


def test_resampled_counts_that_are_no_integers_lie_between_their_neighbours() -> None:
    for b in (1, 2, 5):
        low, middle, high = (
            float(experts.expected_distinct(np.array([n]), np.array(10.0), b))
            for n in (3.0, 3.5, 4.0)
        )
        assert low < middle < high
    # 9.5 of 10 tokens: a batch of one misses with half a token, one of two never misses.
    assert experts.expected_distinct(np.array([9.5]), np.array(10.0), 1) == pytest.approx(0.95)
    assert 0.99 < experts.expected_distinct(np.array([9.5]), np.array(10.0), 2) <= 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(any))
def test_imbalance_and_entropy_are_bounded(counts: list[int]) -> None:
    values = np.array(counts, float)
    assert 1 <= experts.imbalance(values) <= len(counts) + 1e-9
    assert -1e-12 <= experts.entropy(values) <= 1 + 1e-12
    if len(set(counts)) == 1:
        assert experts.imbalance(values) == 1
        assert experts.entropy(values) == pytest.approx(1)
    if sum(n > 0 for n in counts) == 1:
        assert experts.imbalance(values) == pytest.approx(len(counts))
        assert experts.entropy(values) == pytest.approx(0)


# --- random against real --------------------------------------------------------------------------


def test_random_prompts_against_real_ones(tmp_path: Path) -> None:
    """Real tokens all go to experts 0 and 1, random ones to 0..7 in turn: a batch of 4 activates 2
    of 8, and as many as C(8, 4) subsets say."""
    n = 8
    real = stored(
        tmp_path / "real",
        [routed(f"c{i}", [1] * 5, [[[0, 1]]] * 9) for i in range(n)],
        draft_length=0,
    )
    spread = [[[2 * j % 8, (2 * j + 1) % 8]] for j in range(9)]
    random = stored(
        tmp_path / "random",
        [routed(f"r{i}", [1] * 5, spread) for i in range(n)],
        draft_length=0,
        config={"dataset": "random", "random_isl": 5},
    )
    found, compared = experts.uses([Arm("real", (real,)), Arm("random", (random,))], [4])
    of = {(one.label, one.phase): one for one in found}
    assert all(one.n_experts == 8 for one in found)
    mean = of["real", "output"].mean
    assert mean is not None
    assert dict(mean.activated)[4].value == pytest.approx(2 / 8)
    # 32 output tokens in 4 pairs of experts, 8 of each: a pair is missed with C(24,4)/C(32,4).
    share = 1 - math.comb(24, 4) / math.comb(32, 4)
    mean = of["random", "output"].mean
    assert mean is not None
    assert dict(mean.activated)[4].value == pytest.approx(share)
    ratio = {one.phase: dict(one.ratios)[4] for one in compared}
    assert ratio["output"].value == pytest.approx(share * 8 / 2)
    assert ratio["output"].interval == pytest.approx((share * 4, share * 4))
    # The ratio is that of the tokens, not of prompts: 5 prompt tokens take expert pairs 0-3, 0.
    assert ratio["prompt"].value != pytest.approx(share * 4)


def test_the_interval_is_over_conversations(tmp_path: Path) -> None:
    """Half of the conversations use experts 0 and 1 alone, half all of them: which ones were drawn
    decides, so there must be a wide interval; of alike conversations there is none to speak of."""
    narrow, wide = [[[0, 1]]] * 9, [[[2 * j % 8, (2 * j + 1) % 8]] for j in range(9)]
    mixed = [routed(f"c{i}", [1] * 5, narrow if i % 2 else wide) for i in range(8)]
    found, _ = experts.uses([Arm("mixed", (stored(tmp_path / "m", mixed, draft_length=0),))], [4])
    mean = by_label(found, "output").mean
    assert mean is not None
    share = dict(mean.activated)[4]
    assert share.interval is not None
    assert share.interval[1] - share.interval[0] > 0.05


# --- what cannot be counted -----------------------------------------------------------------------


def test_layers_that_do_not_route_are_told(tmp_path: Path) -> None:
    """A dense layer's buffer holds zeros: the same expert twice for one token."""
    ids = [[[0, 0], [1, 2]]] * 9
    run = stored(tmp_path / "r", [routed(f"c{i}", [1] * 5, ids) for i in range(3)], draft_length=0)
    found, _ = experts.uses([Arm("a", (run,))], [2])
    use = by_label(found, "output")
    assert use.unrouted == (0,)
    assert [layer.layer for layer in use.layers] == [1]
    only = stored(
        tmp_path / "s",
        [routed(f"c{i}", [1] * 5, [[[0, 0]]] * 9) for i in range(3)],
        draft_length=0,
    )
    found, _ = experts.uses([Arm("a", (only,))], [2])
    assert by_label(found, "output").mean is None
    assert "same expert twice" in by_label(found, "output").why_not


def test_requests_with_the_experts_of_other_tokens_are_left_out(tmp_path: Path) -> None:
    records = [routed("a", [1] * 5, [[[0, 1]]] * 9), routed("b", [1] * 5, [[[2, 3]]] * 8)]
    run = stored(tmp_path / "r", records, draft_length=0)
    found, _ = experts.uses([Arm("a", (run,))], [1])
    use = by_label(found, "output")
    assert use.n_left_out == 1
    assert use.n_tokens == 4
    assert use.n_experts == 2


def test_two_models_in_one_arm_are_refused(tmp_path: Path) -> None:
    records = [routed("a", [1] * 5, [[[0, 1]]] * 9), routed("b", [1] * 5, [[[0], [1]]] * 9)]
    run = stored(tmp_path / "r", records, draft_length=0)
    with pytest.raises(UserError, match="1 layers x 2 and of 2 x 1"):
        experts.uses([Arm("a", (run,))], [1])


def test_merged_shards_have_the_experts_of_both(tmp_path: Path) -> None:
    for i, ids in enumerate(([[[0, 1]]] * 9, [[[2, 3]]] * 9)):
        stored(tmp_path / str(i), [routed(f"c{i}", [1] * 5, ids)], draft_length=0)
    both = merged([tmp_path / "0", tmp_path / "1"])
    assert [len(list(store.experts_of(both)))] == [2]
    found, _ = experts.uses([Arm("a", (both,))], [1])
    use = by_label(found, "output")
    assert use.mean is not None
    assert use.mean.n_used == 4
    assert use.n_tokens == 8


def test_the_report_draws_a_line_per_arm(tmp_path: Path, models: Path) -> None:
    run, _ = of_known(tmp_path / "r", models, range(100, 106))
    blocks = list(of_arms([Arm("moe", (run,))], InsightOptions(batch_tokens=(1, 8, 10**6))))
    (chart,) = [block for block in blocks if isinstance(block, Chart)]
    assert chart.series[0].x == (0.0, 1.0)
    assert "8 output tokens" in chart.title
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert len(table.rows) == 2
    assert all(len(row) == len(table.columns) for row in table.rows)
