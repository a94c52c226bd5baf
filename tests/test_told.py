"""Which chunks a server's account proves to be steps: never one that was not."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import told
from speedbench.types import UNKNOWN, ToldAcceptance

K = 3


@st.composite
def requests(
    draw: st.DrawFn, *, plain: bool
) -> tuple[list[int], list[int], list[tuple[int, int]], ToldAcceptance, ToldAcceptance]:
    """Tokens of each chunk, its steps, (accepted, drafted) of each step, and what a server tells of
    each verification and in total. The first step is the prefill; the last may be cut."""
    drafted = st.sampled_from([K, K, K, 0]) if plain else st.just(K)
    steps = [(0, 0)]
    for d in draw(st.lists(drafted, max_size=12)):
        steps.append((draw(st.integers(0, d)), d))
    shown = [a + 1 for a, _ in steps]
    shown[-1] -= draw(st.integers(0, shown[-1] - 1))
    sizes = draw(st.lists(st.integers(1, 3), min_size=len(steps), max_size=len(steps)))
    merged, start = [], 0
    for size in sizes:
        if start < len(steps):
            merged.append(min(size, len(steps) - start))
            start += size
    ends = list(accumulate(merged))
    n_tokens = [sum(shown[e - n : e]) for e, n in zip(ends, merged, strict=True)]
    checked = [(a, d) for a, d in steps if d]
    histogram = tuple(sum(a == j for a, _ in checked) for j in range(K + 1))
    n_drafted = K * len(checked)
    each = ToldAcceptance(
        told.DETAILED, histogram, n_drafted, tuple(a for a, _ in checked), (K,) * len(checked)
    )
    total = ToldAcceptance(told.SUMMARY, histogram, n_drafted)
    return n_tokens, merged, steps, each, total


@settings(max_examples=1500, deadline=None)
@given(requests(plain=False))
def test_every_verification_in_order_gives_every_chunks_steps(request: tuple) -> None:  # type: ignore[type-arg]
    n_tokens, merged, steps, each, _ = request
    found = told.steps_in(n_tokens, each, K)
    assert found is not None
    engine_steps, detail = found
    assert engine_steps == merged
    begins = [0, *accumulate(merged)]
    for chunk, n in enumerate(merged):
        assert detail[chunk] == (steps[begins[chunk]] if n == 1 else (UNKNOWN, UNKNOWN))


@settings(max_examples=3000, deadline=None)
@given(requests(plain=False))
def test_totals_prove_single_steps_or_nothing(request: tuple) -> None:  # type: ignore[type-arg]
    n_tokens, merged, steps, _, total = request
    found = told.steps_in(n_tokens, total, K)
    if set(merged) == {1}:
        assert found == (merged, steps)
    else:
        assert found is None or found[0] == merged


@settings(max_examples=5000, deadline=None)
@given(requests(plain=True))
def test_steps_without_a_draft_never_make_a_merged_chunk_single(request: tuple) -> None:  # type: ignore[type-arg]
    n_tokens, merged, _, each, total = request
    for account in (each, total):
        found = told.steps_in(n_tokens, account, K, lookup=True)
        if found is not None:
            assert found[0] == merged


@pytest.mark.parametrize("n_tokens", [[], [3], [1, 9]])
def test_what_does_not_fit_proves_nothing(n_tokens: list[int]) -> None:
    account = ToldAcceptance(told.DETAILED, (0, 1, 0, 0), 3, (1,), (3,))
    assert told.steps_in(n_tokens, account, K) in (None, ([2], [(UNKNOWN, UNKNOWN)]))
