"""The closed loop, driven by scripted engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedbench.loop import Loop, LoopEnd
from speedbench.types import (
    Conversation,
    ConversationRecord,
    EngineDiedError,
    Prompt,
    PromptRefusedError,
    Request,
    Sampling,
    Step,
)
from tests.scripted import Script, ScriptedEngine, plain


def rows(*n_turns: int) -> list[Conversation]:
    return [
        Conversation(f"c{i}", "cat", token_turns=tuple((i, t) for t in range(n)))
        for i, n in enumerate(n_turns)
    ]


def prompt_for(row: Conversation, turn: int, replies: Sequence[Sequence[int]]) -> Prompt:
    return Prompt(row.token_turns[turn], f"{row.id}/{turn}/{len(replies)}")


def run(
    script: Script,
    conversations: Sequence[Conversation],
    *,
    concurrency: int = 2,
    dies_at: int | None = None,
    stop: Callable[[], str | None] = lambda: None,
    prompts: Callable[..., Prompt] = prompt_for,
) -> tuple[LoopEnd, list[ConversationRecord], ScriptedEngine]:
    engine = ScriptedEngine(script, dies_at)
    done: list[ConversationRecord] = []
    loop = Loop(
        engine,
        prompts,
        Sampling(),
        output_length=8,
        concurrency=concurrency,
        id_prefix="t",
        commit=done.append,
        stop=stop,
        clock=engine.now_ns,
    )
    return loop.run(conversations), done, engine


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
    st.integers(1, 7),
    st.data(),
)
def test_exactly_n_in_flight_and_every_conversation_once(
    turns: list[int], concurrency: int, data: st.DataObject
) -> None:
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=5)
    end, done, engine = run(
        lambda r: plain(r, data.draw(sizes)), rows(*turns), concurrency=concurrency
    )
    assert end.reason == "finished"
    assert sorted(r.conversation_id for r in done) == sorted(f"c{i}" for i in range(len(turns)))
    assert {r.conversation_id: len(r.turns) for r in done} == {
        f"c{i}": n for i, n in enumerate(turns)
    }
    # While rows are queued every slot is taken; afterwards the number only falls.
    admitted = min(concurrency, len(turns))
    assert engine.in_flight[0] == admitted
    assert all(n <= concurrency for n in engine.in_flight)
    assert len({r.request_id for r in engine.submitted}) == sum(turns)
    tail = engine.in_flight[engine.in_flight.index(max(engine.in_flight)) :]
    drops = [i for i, n in enumerate(tail) if n < admitted]
    if drops:
        assert tail[drops[0] :] == sorted(tail[drops[0] :], reverse=True)


def test_turns_are_asked_in_order_with_the_replies_before_them() -> None:
    seen: list[tuple[str, int, list[list[int]]]] = []

    def prompts(row: Conversation, turn: int, replies: Sequence[Sequence[int]]) -> Prompt:
        seen.append((row.id, turn, [list(r) for r in replies]))
        return prompt_for(row, turn, replies)

    end, done, _ = run(lambda r: plain(r, [1, 2]), rows(3), prompts=prompts)
    assert seen == [("c0", 0, []), ("c0", 1, [[0, 1, 2]]), ("c0", 2, [[0, 1, 2], [0, 1, 2]])]
    assert [t.turn for t in done[0].turns] == [0, 1, 2]
    assert end.n_uncommitted == 0


def test_a_failed_request_is_recorded_and_the_others_go_on() -> None:
    def script(request: Request) -> Sequence[Step]:
        if request.token_ids[0] == 1:
            return [
                Step(request.request_id, 0, [5]),
                Step(request.request_id, 0, (), finish_reason="error", error="out of memory"),
            ]
        return plain(request, [1, 3])

    end, done, _ = run(script, rows(1, 2, 1))
    by_id = {r.conversation_id: r for r in done}
    assert end.reason == "finished"
    assert len(done) == 3
    assert by_id["c1"].turns[-1].error == "out of memory"
    assert by_id["c1"].turns[-1].finish_reason == "error"
    assert by_id["c1"].turns[-1].output_token_ids() == [5]
    assert len(by_id["c1"].turns) == 1  # its second turn is not asked
    assert [t.finish_reason for t in by_id["c2"].turns] == ["length"]


def test_a_reply_that_ends_at_once_is_no_failure() -> None:
    _, done, _ = run(lambda r: plain(r, [1], "stop"), rows(1, 1))
    assert [t.finish_reason for r in done for t in r.turns] == ["stop", "stop"]
    assert all(len(t.steps) == 1 for r in done for t in r.turns)


def test_a_refused_later_turn_ends_its_conversation_alone() -> None:
    def prompts(row: Conversation, turn: int, replies: Sequence[Sequence[int]]) -> Prompt:
        if row.id == "c0" and turn == 1:
            raise PromptRefusedError("too long by 7 tokens")
        return prompt_for(row, turn, replies)

    _, done, _ = run(lambda r: plain(r, [1, 3]), rows(2, 2), prompts=prompts)
    by_id = {r.conversation_id: r for r in done}
    assert [t.finish_reason for t in by_id["c0"].turns] == ["length", "refused"]
    assert by_id["c0"].turns[1].error == "too long by 7 tokens"
    refused = by_id["c0"].turns[1]
    assert (refused.submitted_ns, refused.prompt_sha256, refused.n_prompt_tokens) == (-1, "", 0)
    assert [t.finish_reason for t in by_id["c1"].turns] == ["length", "length"]


def test_a_dead_engine_keeps_what_was_committed_and_counts_the_rest() -> None:
    # c0 ends at the second poll; c1 goes on; the engine dies at the third.
    def script(request: Request) -> Sequence[Step]:
        return plain(request, [1, 2] if request.token_ids[0] == 0 else [1, 4, 4, 4])

    end, done, _ = run(script, rows(1, 1), dies_at=3)
    assert end.reason == "engine died"
    assert "as told" in end.message
    assert [r.conversation_id for r in done] == ["c0"]
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (1, 5)


def test_a_death_while_asking_keeps_what_the_same_poll_finished() -> None:
    """c0's second turn cannot be submitted; c1 and c2 ended in the same poll."""
    engine = ScriptedEngine(lambda r: plain(r, [2]))
    submit = engine.submit

    def dying(request: Request) -> None:
        if request.token_ids[1] == 1:
            raise EngineDiedError("gone")
        submit(request)

    engine.submit = dying  # type: ignore[method-assign]
    done: list[ConversationRecord] = []
    end = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=3, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    ).run(rows(2, 1, 1))  # fmt: skip
    assert (end.reason, end.message) == ("engine died", "gone")
    assert [r.conversation_id for r in done] == ["c1", "c2"]
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (1, 2)


def test_an_unexpected_exception_ends_the_loop_in_order() -> None:
    def script(request: Request) -> Sequence[Step]:
        if request.token_ids[0] == 1:
            raise KeyError("surprise")
        return plain(request, [1])

    end, done, _ = run(script, rows(1, 1, 1), concurrency=1)
    assert end.reason == "crashed"
    assert "KeyError: 'surprise'" in end.message
    assert [r.conversation_id for r in done] == ["c0"]


def test_stop_ends_the_run_between_polls() -> None:
    polls = iter([None, None, "enough"])
    end, done, _ = run(lambda r: plain(r, [1] * 8), rows(1, 1, 1), stop=lambda: next(polls))
    assert (end.reason, end.message) == ("stopped", "enough")
    assert done == []
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (2, 6)


def test_steps_for_unknown_requests_are_counted_and_nothing_else() -> None:
    engine = ScriptedEngine(lambda r: plain(r, [1, 2]))
    engine.extra = [Step("nobody", 5, [1, 2, 3])]
    done: list[ConversationRecord] = []
    end = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=1, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    ).run(rows(1))  # fmt: skip
    assert end.n_stray_steps == 1
    assert done[0].turns[0].output_token_ids() == [0, 1, 2]


def test_no_rows_is_no_work() -> None:
    end, done, engine = run(lambda r: plain(r, [1]), [])
    assert (end.reason, done, engine.in_flight) == ("finished", [], [])


@pytest.mark.parametrize("concurrency", [1, 3])
def test_one_sampling_object_and_fresh_ids(concurrency: int) -> None:
    _, _, engine = run(lambda r: plain(r, [1]), rows(2, 2, 2), concurrency=concurrency)
    assert len({id(r.sampling) for r in engine.submitted}) == 1
    assert len({r.request_id for r in engine.submitted}) == 6


def test_a_step_that_is_no_step_fails_its_request_alone() -> None:
    """Its earlier steps are kept, and what still comes for it is stray."""

    def script(request: Request) -> Sequence[Step]:
        steps = plain(request, [1, 2, 2])
        if request.token_ids[0] == 1:
            steps[1] = steps[1]._replace(token_ids=[float("nan")])  # type: ignore[list-item]
        return steps

    end, done, _ = run(script, rows(1, 1, 1), concurrency=3)
    by_id = {r.conversation_id: r.turns[0] for r in done}
    assert (end.reason, end.n_stray_steps) == ("finished", 1)
    assert by_id["c1"].finish_reason == "error"
    assert "cannot be stored as numbers" in (by_id["c1"].error or "")
    assert by_id["c1"].output_token_ids() == [0]
    assert [by_id[c].output_token_ids() for c in ("c0", "c2")] == [[0, 1, 2, 3, 4]] * 2
