"""Steps kept as columns read as the list of Step objects they were made from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedbench.steps import Steps
from speedbench.types import RoutedExperts, Step

INT32 = st.integers(0, 2**31 - 1)
TOLD = st.none() | st.integers(0, 100)
STEPS = st.lists(
    st.tuples(
        st.integers(-(2**63), 2**63 - 1),
        st.lists(INT32, max_size=9),
        st.integers(0, 9),
        TOLD,
        TOLD,
    ).map(lambda values: Step("r", *values)),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS, st.data())
def test_reads_as_the_list_it_was_made_from(steps: list[Step], data: st.DataObject) -> None:
    kept = Steps("r", steps)
    assert len(kept) == len(steps)
    assert list(kept) == steps
    assert kept.token_ids.tolist() == [token for step in steps for token in step.token_ids]
    n = len(steps)
    for i in range(-n, n):
        assert kept[i] == steps[i]
    for i in (n, -n - 1):
        with pytest.raises(IndexError):
            kept[i]
    cut = data.draw(st.slices(n))
    assert list(kept[cut]) == steps[cut]


def test_what_is_told_at_the_end_is_kept_as_it_came() -> None:
    experts = RoutedExperts(1, 1, 1, b"\0\0")
    last = Step("r", 2, [5], 1, None, None, "stop", None, [(0, 0), (1, 3)], experts, [1, 2])
    kept = Steps("r", [Step("r", 1, [4]), last])
    assert kept[-1] is kept[1] is kept.last is last
    assert list(kept)[-1] is last


@pytest.mark.parametrize(
    "spoilt",
    [
        {"time_ns": float("nan")},
        {"time_ns": 1.0},
        {"time_ns": 2**63},
        {"time_ns": None},
        {"token_ids": [1, 2.0]},
        {"token_ids": [1, None]},
        {"token_ids": [1, 2**31]},
        {"token_ids": None},
        {"token_ids": "ab"},
        {"engine_steps": 0.5},
        {"engine_steps": -(2**31) - 1},
        {"accepted": float("inf")},
        {"drafted": "3"},
    ],
)
def test_what_is_no_number_is_refused_and_nothing_of_it_is_kept(spoilt: dict[str, object]) -> None:
    good = [Step("r", 1, [4, 5]), Step("r", 2, [6], 2, 1, 3)]
    kept = Steps("r", good)
    with pytest.raises(ValueError, match="a step of r: "):
        kept.append(Step("r", 3, [7, 8], 1, 1, 3)._replace(**spoilt))  # type: ignore[arg-type]
    assert list(kept) == good
    kept.append(Step("r", 4, (9,)))
    assert list(kept) == [*good, Step("r", 4, (9,))]
    assert kept.token_ids.tolist() == [4, 5, 6, 9]


def test_a_step_takes_24_bytes_and_4_for_each_token() -> None:
    """67 million of them are in flight at 4,096 requests of 16k tokens."""
    kept = Steps("r", (Step("r", i, [1, 2]) for i in range(1000)))
    assert len(kept.rows) == 24_000
    assert kept.token_ids.itemsize * len(kept.token_ids) == 8_000
