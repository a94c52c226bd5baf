"""Steps kept as columns read as the list of Step objects they were made from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedbench.steps import ROW, Batch, Intake, Steps, TornError
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


SPOILT: list[dict[str, object]] = [
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
]


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_no_number_is_refused_and_nothing_of_it_is_kept(spoilt: dict[str, object]) -> None:
    good = [Step("r", 1, [4, 5]), Step("r", 2, [6], 2, 1, 3)]
    kept = Batch(good)
    odd = Step("r", 3, [7, 8], 1, 1, 3, "stop")._replace(**spoilt)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a step of r: "):
        kept.append(odd)
    with pytest.raises(ValueError, match="a step of r: "):
        Steps("r", [odd])
    assert list(kept) == good
    kept.append(Step("r", 4, (9,)))
    assert list(kept) == [*good, Step("r", 4, [9])]
    assert kept.token_ids.tolist() == [4, 5, 6, 9]


def test_a_step_takes_24_bytes_and_4_for_each_token() -> None:
    """67 million of them are in flight at 4,096 requests of 16k tokens."""
    kept = Steps("r", (Step("r", i, [1, 2]) for i in range(1000)))
    assert len(kept.rows) == 24_000
    assert kept.token_ids.itemsize * len(kept.token_ids) == 8_000


def step_of(name: str, time_ns: int, token_ids: list[int], end: str, told: int | None) -> Step:
    if end == "failed":  # without a token, it is no step
        return Step(name, time_ns, (), finish_reason="error", error="it failed")
    if end == "cut off":
        return Step(name, time_ns, token_ids, 1, told, told, "error", "it failed")
    return Step(name, time_ns, token_ids, 1, told, told, "stop" if end == "ended" else None)


ARRIVING = st.lists(
    st.builds(
        step_of,
        st.sampled_from([f"r{i}" for i in range(9)]),
        st.integers(0, 2**62),
        st.lists(INT32, max_size=4),
        st.sampled_from(["", "", "", "ended", "cut off", "failed"]),
        TOLD,
    ),
    max_size=60,
)


@settings(deadline=None)
@given(ARRIVING)
def test_a_batch_reads_as_the_list_it_was_made_from(steps: list[Step]) -> None:
    batch = Batch(steps)
    assert len(batch) == len(steps)
    assert list(batch) == steps
    assert [step for _, step in batch.ended] == [s for s in steps if s.finish_reason is not None]
    for i in (0, -1, len(steps) // 2):
        if steps:
            assert batch[i] == steps[i]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]),
            st.integers(-(2**63), 2**63 - 1),
            st.lists(INT32, max_size=4) | st.lists(INT32, max_size=4).map(tuple),
            st.integers(0, 9),
            TOLD,
            TOLD,
            st.sampled_from([None, "stop", "length"]),
        ).map(lambda values: Step(*values)),
        min_size=1,
        max_size=40,
    )
)
def test_many_at_once_make_the_batch_that_each_in_turn_makes(steps: list[Step]) -> None:
    at_once, one_by_one = Batch.of_many(steps), Batch(steps)
    for column in Batch.__slots__:
        assert getattr(at_once, column) == getattr(one_by_one, column)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_many_are_refused_where_one_would_be(spoilt: dict[str, object]) -> None:
    good = [Step(f"r{i}", 1, [4, 5], 1, 1, 3) for i in range(40)]
    Batch.of_many(good)
    with pytest.raises(ValueError):  # noqa: PT011 - whatever python says of it
        Batch.of_many([*good, good[0]._replace(**spoilt)])  # type: ignore[arg-type]


@settings(deadline=None)
@given(ARRIVING, st.data())
def test_every_request_is_handed_its_own_steps_in_order(
    steps: list[Step], data: st.DataObject
) -> None:
    """Against one list for each request, whatever comes together and whenever it is handed out;
    a name that was used before is another request."""
    intake, open_, told = Intake(), {}, []
    expected: list[list[Step]] = []
    waiting: list[Step] = []

    def take() -> None:
        nonlocal waiting
        batch = Batch(waiting)
        intake.take(batch)
        for at, step in batch.ended:
            failed = step.error is not None and not step.token_ids
            intake.close(step.request_id, None if failed else step, at)
        waiting = []

    for step in steps:
        if any(s.request_id == step.request_id and s.finish_reason is not None for s in waiting):
            take()  # the request that it is of is not open yet
        if step.request_id not in open_:
            open_[step.request_id] = len(expected)
            told.append(intake.open(step.request_id))
            expected.append([])
        waiting.append(step)
        if step.error is None or step.token_ids:
            expected[open_[step.request_id]].append(step)
        if step.finish_reason is not None:
            del open_[step.request_id]
        if data.draw(st.booleans()):
            take()
            most = data.draw(st.sampled_from([0, 1, 2, 1000]))
            if most and intake.hand_out(most) and intake.hand_out():
                assert intake.n_waiting == 0
                assert [list(s) for s in told] == expected
    take()
    while not (intake.hand_out(3) and not intake.n_waiting):
        pass
    assert [list(s) for s in told] == expected


def test_requests_far_apart_in_number_are_sorted_as_well() -> None:
    intake = Intake()
    first = intake.open("first")
    for i in range(70_000):
        intake.open(f"r{i}")
        intake.close(f"r{i}", None, 0)
    last = intake.open("last")
    intake.take(Batch([Step("last", 1, [1]), Step("first", 2, [2, 3]), Step("last", 4, [5])]))
    intake.hand_out()
    assert list(first) == [Step("first", 2, [2, 3])]
    assert list(last) == [Step("last", 1, [1]), Step("last", 4, [5])]


def test_what_is_of_no_open_request_is_not_taken() -> None:
    intake = Intake()
    kept = intake.open("a")
    for stray in (
        Batch([Step("a", 1, [1]), Step("b", 1, [2])]),
        Batch([Step("a", 1, [1]), Step("b", 1, (), finish_reason="error", error="no")]),
    ):
        with pytest.raises(KeyError):
            intake.take(stray)
    intake.hand_out()
    assert list(kept) == []


def two_requests() -> Batch:
    return Batch([Step("a", 1, [1, 2]), Step("b", 1, [3]), Step("a", 2, [4, 5], 1, 1, 3, "stop")])


def other_tokens(batch: Batch, n: int) -> None:
    ROW.pack_into(batch.rows, 0, 1, n, 1, 0, 0)


@pytest.mark.parametrize("n_more", [0, 40])  # rows; few are looked at in another way
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda b: other_tokens(b, 0), "tokens for steps of"),
        (lambda b: other_tokens(b, 3), "tokens for steps of"),
        (lambda b: other_tokens(b, -2), "tokens for steps of"),
        (lambda b: other_tokens(b, 2**31 - 1), "tokens for steps of"),
        (lambda b: b.token_ids.pop(), "tokens for steps of"),
        (lambda b: b.token_ids.append(1), "tokens for steps of"),
        (lambda b: b.request_ids.append("b"), "bytes for their rows"),
        (lambda b: b.request_ids.pop(), "bytes for their rows"),
        (lambda b: b.rows.extend(bytes(8)), "bytes for their rows"),
        (lambda b: b.ended.append(b.ended[0]), "twice"),
        (lambda b: b.ended.__setitem__(0, (1, b.ended[0][1])), "without a row"),
        (lambda b: b.ended.__setitem__(0, (99, b.ended[0][1])), "without a row"),
        (
            lambda b: b.ended.__setitem__(0, (2, b.ended[0][1]._replace(token_ids=[4]))),
            "without a row",
        ),
    ],
)
def test_a_batch_that_contradicts_itself_is_not_taken(
    spoil: Callable[[Batch], object], told: str, n_more: int
) -> None:
    intake = Intake()
    kept = intake.open("a"), intake.open("b")
    good, more = [Step("b", 0, [9]), Step("a", 0, [8])], [Step("b", 3, [7])] * n_more
    intake.take(Batch(good))
    batch = Batch([*two_requests(), *more])
    spoil(batch)
    with pytest.raises(ValueError, match=told):
        intake.take(batch)
    intake.hand_out()
    assert [list(steps) for steps in kept] == [good[1:], good[:1]]


@pytest.mark.parametrize("in_next", [False, True])
def test_what_comes_for_a_request_after_its_end_is_no_part_of_it(in_next: bool) -> None:
    """An adapter that does not leave it out is told; nothing after that is believed."""
    intake = Intake()
    kept = intake.open("a")
    intake.open("b")
    batch = two_requests()
    more = Batch([Step("a", 3, [6])])
    if not in_next:
        batch.request_ids += more.request_ids
        batch.rows += more.rows
        batch.token_ids += more.token_ids
    intake.take(batch)
    intake.close("a", batch.ended[0][1], 2)
    if in_next:
        with pytest.raises(KeyError):
            intake.take(more)
        intake.hand_out()
        assert [step.time_ns for step in kept] == [1, 2]
        return
    with pytest.raises(ValueError, match="went on with a after its end"):
        intake.hand_out()
    with pytest.raises(TornError):
        intake.hand_out()


@pytest.mark.parametrize("columns", [("token_ids",), ("token_ids", "rows")])
def test_what_was_being_taken_when_it_was_interrupted_was_not_taken(columns: list[str]) -> None:
    """A second Ctrl-C, say, after one or two of three columns: what came before is whole."""
    intake = Intake()
    kept = intake.open("a"), intake.open("b")
    intake.take(two_requests())
    batch = Batch([Step("b", 5, [9, 9])])
    for name in columns:
        column = getattr(intake._waiting, name)
        column += getattr(batch, name)
    intake.hand_out()
    assert [[step.time_ns for step in steps] for steps in kept] == [[1, 2], [1]]
    assert [list(steps.token_ids) for steps in kept] == [[1, 2, 4, 5], [3]]


@pytest.mark.parametrize("interrupted", ["argsort", "append"])
def test_nothing_is_handed_out_twice_after_an_interruption(
    monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    intake = Intake()
    kept = intake.open("a")

    def interrupt(*_: object, **_options: object) -> None:
        raise KeyboardInterrupt

    intake.take(Batch([Step("a", 1, [1, 2])]))
    with monkeypatch.context() as patched:
        patched.setattr(np, interrupted, interrupt)
        with pytest.raises(KeyboardInterrupt):
            intake.hand_out()
    with pytest.raises(TornError):
        intake.hand_out()
    assert list(kept) == []
