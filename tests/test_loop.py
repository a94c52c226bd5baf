"""The closed loop, driven by scripted engines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedbench import loop as loop_module
from speedbench import store
from speedbench.guardian import UNGUARDED
from speedbench.loop import Loop, LoopEnd
from speedbench.replicas import ALONE
from speedbench.share import Share, _Going
from speedbench.steps import Batch, Intake
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
    assert list(refused.steps) == []
    assert len(by_id["c0"].turns[0].steps) == 2
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


def as_committed(record: ConversationRecord) -> ConversationRecord:
    """With the steps that it has now: a writer may look at them at once."""
    return replace(record, turns=tuple(replace(t, steps=list(t.steps)) for t in record.turns))


class Batches(ScriptedEngine):
    """The same engine, which hands over its steps in columns."""

    def poll(self) -> Batch:
        return Batch(super().poll())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=20),
    st.integers(1, 9),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([0, 1, 5, 10**6]),
)
def test_batches_are_recorded_as_the_same_steps_one_by_one(
    turns: list[int], concurrency: int, sizes: list[list[int]], at_once: int, waiting: int
) -> None:
    """However many steps wait before they are handed out, to however many requests at a time."""

    def script(request: Request) -> list[Step]:
        steps = plain(request, [1, *sizes[request.token_ids[0] % len(sizes)]])
        told = [(1, 3)] * len(steps)
        return [*steps[:-1], steps[-1]._replace(detail=told)]

    recorded = []
    for engine in (ScriptedEngine(script), Batches(script)):
        done: list[ConversationRecord] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop_module, "HAND_OUT_AT_ONCE", at_once)
            patched.setattr(loop_module, "HAND_OUT_ROWS", waiting)
            patched.setattr(loop_module, "HAND_OUT_NS", 10**15)
            end = Loop(
                engine, prompt_for, Sampling(), output_length=99, concurrency=concurrency,
                id_prefix="t", commit=lambda r, to=done: to.append(as_committed(r)),
                stop=lambda: None, clock=engine.now_ns,
            ).run(rows(*turns))  # fmt: skip
        assert (end.reason, end.n_stray_steps, end.n_uncommitted) == ("finished", 0, 0)
        recorded.append({r.conversation_id: r for r in done})
        assert len(recorded[-1]) == len(done) == len(turns)
    one_by_one, batches = recorded
    for name, record in one_by_one.items():
        for turn, same in zip(record.turns, batches[name].turns, strict=True):
            assert list(turn.steps) == list(same.steps)
            assert [len(s.token_ids) for s in turn.steps] == [
                1, *sizes[int(name[1:]) % len(sizes)]
            ]  # fmt: skip
            assert turn.steps[-1].detail == [(1, 3)] * len(turn.steps)
            assert (turn.submitted_ns, turn.finish_reason) == (same.submitted_ns, "length")
            times = [step.time_ns for step in turn.steps]
            assert times == list(range(times[0], times[-1] + 1, 1_000_000))


def test_what_a_batch_holds_of_others_is_stray() -> None:
    engine = Batches(lambda r: plain(r, [1, 2]))
    engine.extra = [
        Step("nobody", 5, [1, 2, 3]),
        Step("nobody else", 5, (), finish_reason="error", error="it failed"),
    ]
    done: list[ConversationRecord] = []
    end = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=2, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    ).run(rows(1, 2))  # fmt: skip
    assert end.n_stray_steps == 2
    assert [t.output_token_ids() for r in done for t in r.turns] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("why", [None, "enough"])
def test_a_batch_whose_tokens_are_not_those_of_its_rows_ends_the_run_and_commits_nothing(
    why: str | None,
) -> None:
    class Wrong(Batches):
        def poll(self) -> Batch:
            batch = super().poll()
            batch.token_ids.pop()
            return batch

    engine = Wrong(lambda r: plain(r, [2]))
    done: list[ConversationRecord] = []
    end = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=1, id_prefix="t",
        commit=done.append, stop=lambda: why, clock=engine.now_ns,
    ).run(rows(1, 1, 1))  # fmt: skip
    assert end.reason == "crashed"
    assert "tokens for steps of" in end.message
    assert done == []
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (1, 0)


def test_what_waits_for_its_next_turn_is_counted_once() -> None:
    """Two conversations in their second turn, of which the first cannot be asked."""

    def prompts(row: Conversation, turn: int, replies: Sequence[Sequence[int]]) -> Prompt:
        if turn == 1:
            raise KeyError("surprise")
        return prompt_for(row, turn, replies)

    end, done, _ = run(lambda r: plain(r, [1, 2]), rows(2, 2), prompts=prompts)
    assert (end.reason, done) == ("crashed", [])
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (2, 6)


@pytest.mark.parametrize("n_turns", [1, 2])
def test_what_an_engine_spoils_later_loses_nothing_that_came_before(n_turns: int) -> None:
    """Its third poll contradicts itself; c0 had ended in the second, with two more in flight."""

    class Wrong(Batches):
        def poll(self) -> Batch:
            batch = super().poll()
            if len(self.in_flight) == 3:
                batch.token_ids.append(5)
            return batch

    engine = Wrong(lambda r: plain(r, [1, 1] if r.token_ids[0] == 0 else [1, 1, 1]))
    done: list[ConversationRecord] = []
    loop = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=3, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    )  # fmt: skip
    end = loop.run(rows(1, n_turns, n_turns))
    assert end.reason == "crashed"
    assert [r.conversation_id for r in done] == ["c0"]
    assert (loop.n_committed, end.n_uncommitted, end.n_uncommitted_tokens) == (1, 2, 4)


@pytest.mark.parametrize("n_polls", range(1, 7))
def test_an_end_at_any_moment_commits_what_had_ended_and_counts_the_rest(
    monkeypatch: pytest.MonkeyPatch, n_polls: int
) -> None:
    """Nothing is handed out meanwhile but two requests' steps at a time; c0 to c2 end at the second
    poll, c3 to c5 at the fourth, c6 not before the end."""
    monkeypatch.setattr(loop_module, "HAND_OUT_AT_ONCE", 2)
    monkeypatch.setattr(loop_module, "HAND_OUT_ROWS", 5)
    lengths = [2, 2, 2, 4, 4, 4, 8]
    polls = iter([*[None] * (n_polls - 1), "enough"])
    engine = Batches(lambda r: plain(r, [1] * lengths[r.token_ids[0]]))
    done: list[ConversationRecord] = []
    end = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=7, id_prefix="t",
        commit=lambda r: done.append(as_committed(r)), stop=lambda: next(polls),
        clock=engine.now_ns,
    ).run(rows(*[1] * 7))  # fmt: skip
    ended = [i for i, n in enumerate(lengths) if n <= n_polls]
    assert sorted(r.conversation_id for r in done) == [f"c{i}" for i in ended]
    for record in done:
        n = lengths[int(record.conversation_id[1:])]
        assert record.turns[0].output_token_ids() == list(range(n))
    n_left = 7 - len(ended)
    assert (end.n_uncommitted, end.n_uncommitted_tokens) == (n_left, n_left * n_polls)


def test_a_run_that_is_cut_from_outside_keeps_what_had_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A watchdog ends it from another thread while the engine hangs."""
    monkeypatch.setattr(loop_module, "HAND_OUT_NS", 10**15)
    cut: list[LoopEnd] = []

    class Hanging(Batches):
        def poll(self) -> Batch:
            if len(self.in_flight) == 3:
                thread = threading.Thread(
                    target=lambda: cut.append(loop.cut("stalled", "no step came"))
                )
                thread.start()
                thread.join()
                raise EngineDiedError("ended by the watchdog")
            return super().poll()

    engine = Hanging(lambda r: plain(r, [1, 1] if r.token_ids[0] == 0 else [1] * 8))
    done: list[ConversationRecord] = []
    loop = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=2, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    )  # fmt: skip
    loop.run(rows(1, 1))
    assert [r.conversation_id for r in done] == ["c0"]
    assert done[0].turns[0].output_token_ids() == [0, 1]
    assert (cut[0].reason, cut[0].n_uncommitted, cut[0].n_uncommitted_tokens) == ("stalled", 1, 3)


def test_an_interruption_while_steps_are_handed_out_commits_no_conversation_without_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second Ctrl-C, say: what had ended is counted as lost, never stored in part."""
    engine = Batches(lambda r: plain(r, [1, 1]))
    done: list[ConversationRecord] = []
    loop = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=3, id_prefix="t",
        commit=done.append, stop=lambda: None, clock=engine.now_ns,
    )  # fmt: skip
    monkeypatch.setattr(loop_module, "HAND_OUT_ROWS", 6)
    in_order = Intake._in_order

    def interrupted(*given: Any) -> Iterator[None]:
        whole = in_order(*given)
        yield next(whole)
        raise KeyboardInterrupt

    monkeypatch.setattr(Intake, "_in_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(rows(1, 1, 1))
    end = loop.cut("stopped", "at once")
    assert done == []
    assert (loop.n_committed, end.n_uncommitted) == (0, 3)


def test_what_had_ended_when_a_run_is_ended_at_once_is_stored(tmp_path: Path) -> None:
    """Through the share that owns the loop and the writer, as a second signal goes."""

    class Interrupted(Batches):
        def poll(self) -> Batch:
            if len(self.in_flight) == 2:
                raise SystemExit(143)
            return super().poll()

    engine = Interrupted(lambda r: plain(r, [1, 1]))
    directory = tmp_path / "run"
    store.create(directory)
    writer = store.Writer(directory, 0)
    loop = Loop(
        engine, prompt_for, Sampling(), output_length=8, concurrency=2, id_prefix="t",
        commit=writer.commit, stop=lambda: None, clock=engine.now_ns,
    )  # fmt: skip
    nothing: Any = None
    share = Share(
        nothing, nothing, nothing, nothing, ALONE, rows(*[1] * 6), engine.now_ns, lambda: None,
        UNGUARDED, None, _Going(loop, writer),
    )  # fmt: skip
    with pytest.raises(SystemExit):
        loop.run(rows(*[1] * 6))
    ended = share.cut("stopped", "at once")
    assert (ended.n_committed, ended.end.n_uncommitted, ended.not_stored) == (2, 2, "")
    assert store.committed(directory) == {"c0": True, "c1": True}
