"""The run directory: round trip, damage, resumption, formats."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speedbench import store
from speedbench.report.summary import summarize
from speedbench.types import ConversationRecord, RoutedExperts, Step, TurnRecord, UserError
from tests.builders import conversation, manifest, session, stored, told, turn, write_part


def run_of_three_parts(directory: Path) -> Path:
    """Conversations a (part 0), b and c (part 1), d (part 2), all of one category."""
    store.create(directory)
    store.write_manifest(directory, manifest(expected={"cat": 4}))
    for names in ("a", "bc", "d"):
        write_part(directory, [conversation(n, "cat", [1, 2, 4], [1, 4]) for n in names])
    return directory


# --- round trip -----------------------------------------------------------------------------------


def test_everything_recorded_comes_back(tmp_path: Path) -> None:
    steps = [
        Step("r0", 1_000, [5], 1, 0, 0),
        Step("r0", 2_000, [6, 7], 1, 1, 3),
        Step("r0", 3_000, [8, 9, 10], 2, None, None, "stop"),
    ]
    first = TurnRecord("r0", 0, 17, "ab", 500, "stop", None, steps)
    second = TurnRecord("r1", 1, 33, "cd", -1, "refused", "too long", [])
    run = stored(tmp_path / "r", [ConversationRecord("c", "math", (first, second))])
    assert run.turns.to_pylist() == [
        {
            "request_id": "r0",
            "session": 0,
            "replica": 0,
            "conversation_id": "c",
            "category": "math",
            "turn": 0,
            "n_prompt_tokens": 17,
            "prompt_sha256": "ab",
            "submitted_ns": 500,
            "finish_reason": "stop",
            "error": None,
            "output_token_ids": [5, 6, 7, 8, 9, 10],
        },
        {
            "request_id": "r1",
            "session": 0,
            "replica": 0,
            "conversation_id": "c",
            "category": "math",
            "turn": 1,
            "n_prompt_tokens": 33,
            "prompt_sha256": "cd",
            "submitted_ns": -1,
            "finish_reason": "refused",
            "error": "too long",
            "output_token_ids": [],
        },
    ]
    columns = run.columns
    assert columns.request.tolist() == [0, 0, 0]
    assert columns.step.tolist() == [0, 1, 2]
    assert columns.time_ns.tolist() == [1_000, 2_000, 3_000]
    assert columns.n_tokens.tolist() == [1, 2, 3]
    assert columns.engine_steps.tolist() == [1, 1, 2]
    assert columns.accepted.tolist() == [0, 1, -1]
    assert columns.drafted.tolist() == [0, 3, -1]
    assert columns.finished.tolist() == [True, False]
    assert columns.failed.tolist() == [True]


def test_detail_told_at_the_end_replaces_what_steps_said(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("c", "a", turn("r", [1, 3], told=told([1, 3], 4)))])
    assert run.columns.accepted.tolist() == [0, 2]
    assert run.columns.drafted.tolist() == [0, 4]


def test_steps_belong_to_their_request_by_name_not_by_place(tmp_path: Path) -> None:
    """Trap 13: the stored order of steps does not matter."""
    records = [conversation("c", "a", [1, 4, 2], [1, 3]), conversation("d", "b", [1, 1, 1, 1])]
    run = stored(tmp_path / "r", records)
    path = run.directory / "steps" / "00000.parquet"
    table = pq.read_table(path)
    order = np.random.default_rng(0).permutation(len(table))
    assert order.tolist() != sorted(order)
    pq.write_table(table.take(order), path)
    columns = store.load(run.directory).columns
    assert columns.n_tokens.tolist() == [1, 4, 2, 1, 3, 1, 1, 1, 1]
    assert columns.request.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert columns.conversation.tolist() == [0, 0, 1]


def test_first_and_last_steps_of_requests_some_of_which_have_none(tmp_path: Path) -> None:
    empty = TurnRecord("e", 0, 1, "", 0, "error", "refused by the engine", [])
    records = [
        conversation("a", "x", [1, 2]),
        ConversationRecord("b", "x", (empty,)),
        conversation("c", "x", [1]),
    ]
    columns = stored(tmp_path / "r", records).columns
    assert columns.n_requests == 3
    first, last = columns.first_and_last()
    assert (first.tolist(), last.tolist()) == ([0, 2], [1, 2])
    assert columns.is_last().tolist() == [False, True, True]


def test_a_run_without_any_record_loads(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [], expected={"cat": 2})
    assert run.columns.n_requests == 0
    assert run.columns.categories == ("cat",)
    first, last = run.columns.first_and_last()
    assert len(first) == len(last) == 0
    assert len(run.columns.is_last()) == 0


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["turns", "steps"])
@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -8, -1])
def test_a_truncated_part_is_told_and_the_others_survive(
    tmp_path: Path, folder: str, keep: float
) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    path = directory / folder / "00001.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    run = store.load(directory)
    (sentence,) = run.damage
    assert "00001" in sentence
    assert run.columns.conversation_ids == ("a", "d")
    assert run.columns.n_tokens.tolist() == [1, 2, 4, 1, 4] * 2
    assert store.committed(directory) == {"a": True, "d": True}


@pytest.mark.parametrize("folder", ["turns", "steps"])
def test_a_missing_or_foreign_part_is_told(tmp_path: Path, folder: str) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    path = directory / folder / "00000.parquet"
    path.write_bytes(b"PAR1 this is no parquet file PAR1")
    assert store.load(directory).columns.conversation_ids == ("b", "c", "d")
    if folder == "steps":
        path.unlink()
        run = store.load(directory)
        assert run.columns.conversation_ids == ("b", "c", "d")
        assert len(run.damage) == 1


def test_what_a_damaged_part_held_is_measured_again_beside_it(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    path = directory / "steps" / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    write_part(directory, [conversation(n, "cat", [1, 3]) for n in "bc"], number=1)
    assert (directory / "turns" / "00003.parquet").exists()
    run = store.load(directory)
    assert set(run.columns.conversation_ids) == {"a", "b", "c", "d"}
    assert run.n_retried == 0


def test_steps_without_turns_are_ignored_and_overwritten_on_resume(tmp_path: Path) -> None:
    """A kill between the two files of a part: steps come first, turns make them count."""
    directory = run_of_three_parts(tmp_path / "r")
    (directory / "turns" / "00002.parquet").unlink()
    orphan = (directory / "steps" / "00002.parquet").read_bytes()
    run = store.load(directory)
    assert run.damage == ()
    assert run.columns.conversation_ids == ("a", "b", "c")
    assert "d" not in store.committed(directory)
    write_part(directory, [conversation("d", "cat", turn("s1-0.0", [1, 1, 1]))], number=1)
    assert (directory / "steps" / "00002.parquet").read_bytes() != orphan
    run = store.load(directory)
    assert run.damage == ()
    assert run.columns.conversation_ids == ("a", "b", "c", "d")
    assert run.columns.n_tokens.tolist() == [1, 2, 4, 1, 4] * 3 + [1, 1, 1]
    assert run.columns.session.tolist() == [0] * 6 + [1]


def test_half_written_temporary_files_are_no_parts(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    for folder in ("turns", "steps"):
        (directory / folder / ".00003.parquet.tmp").write_bytes(b"PAR1")
    (directory / ".manifest.json.tmp").write_text("{")
    run = store.load(directory)
    assert run.damage == ()
    assert len(run.columns.conversation_ids) == 4


# --- several attempts -----------------------------------------------------------------------------


def failing(name: str, session: int) -> ConversationRecord:
    good = turn(f"s{session}-{name}.0", [1, 2])
    bad = turn(f"s{session}-{name}.1", [1], number=1, finish="error", error="lost")
    return conversation(name, "cat", good, bad)


def test_only_the_last_attempt_counts_and_is_asked_about(tmp_path: Path) -> None:
    directory = tmp_path / "r"
    store.create(directory)
    store.write_manifest(directory, manifest())
    write_part(directory, [failing("a", 0), failing("b", 0), conversation("c", "cat", [1, 4])])
    assert store.committed(directory) == {"a": False, "b": False, "c": True}
    write_part(directory, [conversation("a", "cat", turn("s1-a.0", [1, 3])), failing("b", 1)], 1)
    assert store.committed(directory) == {"a": True, "b": False, "c": True}
    run = store.load(directory)
    assert run.n_retried == 2
    assert run.columns.conversation_ids == ("c", "a", "b")
    assert run.columns.failed.tolist() == [False, False, True]
    assert run.columns.n_tokens.tolist() == [1, 4, 1, 3, 1, 2, 1]
    assert len(run.turns) == 8
    assert run.turns.take(run.used)["request_id"].to_pylist()[0] == "c.0"


# --- manifests ------------------------------------------------------------------------------------


def edited(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    edited(directory, format=store.FORMAT + 1)
    for read in (store.load, store.read_manifest):
        with pytest.raises(UserError, match=rf"format {store.FORMAT + 1}.*install a newer one"):
            read(directory)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "one"}', "\x00"])
def test_a_manifest_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    (directory / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        store.load(directory)


def test_a_folder_without_manifest_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        store.load(tmp_path)


def test_a_manifest_cannot_hold_what_json_cannot(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    before = (directory / "manifest.json").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_manifest(directory, {"format": 1, "x": float("nan")})
    assert (directory / "manifest.json").read_text() == before


# --- formats --------------------------------------------------------------------------------------


def directory_of_format_1(directory: Path) -> Path:
    """As speedbench 0.1 wrote it, from that format's own description: no replica anywhere."""
    turns = pa.schema(
        [("request_id", pa.string()), ("session", pa.int32()), ("conversation_id", pa.string()),
         ("category", pa.string()), ("turn", pa.int32()), ("n_prompt_tokens", pa.int32()),
         ("prompt_sha256", pa.string()), ("submitted_ns", pa.int64()),
         ("finish_reason", pa.string()), ("error", pa.string()),
         ("output_token_ids", pa.list_(pa.int32()))]
    )  # fmt: skip
    steps = pa.schema(
        [("request_id", pa.string()), ("session", pa.int32()), ("turn", pa.int32()),
         ("step", pa.int32()), ("time_ns", pa.int64()), ("engine_steps", pa.int32()),
         ("n_tokens", pa.int32()), ("accepted", pa.int32()), ("drafted", pa.int32())]
    )  # fmt: skip
    for folder in ("turns", "steps"):
        (directory / folder).mkdir(parents=True)
    rows = [
        ("s0-0.0", 0, "a", "cat", 0, 5, "00", 0, "stop", None, [7, 7, 7]),
        ("s0-1.0", 0, "b", "cat", 0, 5, "00", 1000, "length", None, [7, 7, 7, 7]),
    ]
    events = [
        ("s0-0.0", 0, 0, 0, 50, 1, 1, 0, 0), ("s0-0.0", 0, 0, 1, 60, 1, 2, 1, 3),
        ("s0-1.0", 0, 0, 0, 1050, 1, 1, 0, 0), ("s0-1.0", 0, 0, 1, 1060, 1, 3, 2, 3),
    ]  # fmt: skip
    for folder, schema, data in (("turns", turns, rows), ("steps", steps, events)):
        table = pa.Table.from_pylist(
            [dict(zip(schema.names, r, strict=True)) for r in data], schema
        )
        pq.write_table(table, directory / folder / "00000.parquet")
    old = manifest(expected={"cat": 3}, sessions=[session()], format=1)
    del old["config"]["shard"]
    (directory / "manifest.json").write_text(json.dumps(old))
    return directory


def test_a_run_of_format_1_is_read_and_can_go_on(tmp_path: Path) -> None:
    directory = directory_of_format_1(tmp_path / "r")
    run = store.load(directory)
    assert run.damage == ()
    assert run.columns.conversation_ids == ("a", "b")
    assert run.columns.replica.tolist() == [0, 0]
    assert run.columns.n_tokens.tolist() == [1, 2, 1, 3]
    assert store.committed(directory) == {"a": True, "b": True}
    assert summarize(run).output_tps.value == pytest.approx(7 / 10)
    write_part(directory, [conversation("c", "cat", turn("s1r2-0.0", [1, 4]))], 1, replica=2)
    run = store.load(directory)
    assert run.columns.conversation_ids == ("a", "b", "c")
    assert run.columns.replica.tolist() == [0, 0, 2]
    assert sorted(names_in(directory)) == ["00000-r2.parquet", "00000.parquet"]


# --- experts --------------------------------------------------------------------------------------


def with_experts(name: str, value: int, session_number: int = 0) -> ConversationRecord:
    """A conversation of one turn whose 3 tokens used experts 256 * value + (0, 1, 2, ...)."""
    ids = np.arange(3 * 2 * 4, dtype="<i2") + 256 * value
    made = turn(f"s{session_number}-{name}.0", [1, 2])
    last = made.steps[-1]._replace(routed_experts=RoutedExperts(3, 2, 4, ids.tobytes()))
    return conversation(name, "cat", replace(made, steps=[made.steps[0], last]))


def test_experts_come_back_and_only_where_there_are_any(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    assert not (directory / "experts").exists()
    assert store.load_experts(directory) == {}
    write_part(directory, [with_experts("e", 1), conversation("f", "cat", [1, 1])])
    write_part(directory, [with_experts("g", 2)], replica=1)
    found = store.load_experts(directory)
    assert sorted(found) == ["s0-e.0", "s0-g.0"]
    for name, value in (("s0-e.0", 1), ("s0-g.0", 2)):
        assert (found[name].n_tokens, found[name].n_layers, found[name].top_k) == (3, 2, 4)
        read = np.frombuffer(found[name].expert_ids, "<i2").reshape(3, 2, 4)
        assert read.ravel().tolist() == [256 * value + i for i in range(24)]
    raw = pq.read_table(directory / "experts" / "00000-r1.parquet").to_pylist()
    assert [(row["request_id"], row["session"], row["replica"]) for row in raw] == [
        ("s0-g.0", 0, 1)
    ]
    assert store.load(directory).columns.n_requests == 4 * 2 + 3


def test_experts_without_turns_do_not_count(tmp_path: Path) -> None:
    """A kill between the files of a part: turns are written last and make it count."""
    directory = tmp_path / "r"
    store.create(directory)
    store.write_manifest(directory, manifest())
    write_part(directory, [with_experts("e", 1)])
    (directory / "turns" / "00000.parquet").unlink()
    assert store.load_experts(directory) == {}
    assert store.committed(directory) == {}
    write_part(directory, [with_experts("e", 2, 1)], number=1)
    assert list(store.load_experts(directory)) == ["s1-e.0"]
    path = directory / "experts" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"experts/00000\.parquet cannot be read"):
        store.load_experts(directory)
    assert store.load(directory).damage == ()  # acceptance does not need them


def salvaged(directory: Path, *records: ConversationRecord) -> int:
    """Experts' rows that a part had written when its steps could not be; the writer is closed once
    they can, and has lost nothing."""
    store.create(directory)
    store.write_manifest(directory, manifest())
    writer = store.Writer(directory, 0, interval_s=60)
    blocker = directory / "steps" / ".00000.parquet.tmp"
    blocker.mkdir()
    for record in records:
        writer.commit(record)
    writer._closing.set()
    writer._thread.join()  # it has failed
    n_rows = pq.read_table(directory / "experts" / "00000.parquet").num_rows
    blocker.rmdir()
    with pytest.raises(UserError, match="0 finished conversation"):
        writer.close()
    return int(n_rows)


def test_a_failed_write_is_salvaged_with_its_experts(tmp_path: Path) -> None:
    assert salvaged(tmp_path / "r", with_experts("e", 1)) == 1
    assert list(store.load_experts(tmp_path / "r")) == ["s0-e.0"]
    assert store.committed(tmp_path / "r") == {"e": True}


def test_salvaging_counts_nothing_twice(tmp_path: Path) -> None:
    """What a failed part wrote before it failed is of other conversations than the salvaged part of
    the same number."""
    directory = tmp_path / "r"
    assert salvaged(directory, conversation("plain", "cat", [1, 2]), with_experts("e", 1)) == 1
    parts = [pq.read_table(path) for path in (directory / "experts").glob("*.parquet")]
    assert [name for part in parts for name in part["request_id"].to_pylist()] == ["s0-e.0"]
    assert store.committed(directory) == {"plain": True, "e": True}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"engine_steps": -1}, "engine_steps holds -1"),
        ({"accepted": -2}, "accepted holds -2"),
        ({"finish_reason": "abort"}, "'abort' is no reason to finish"),
    ],
)
def test_what_no_reader_takes_fails_alone(
    tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    """Else the whole part would be refused when it is read, the sound conversations with it."""
    directory = tmp_path / "r"
    store.create(directory)
    store.write_manifest(directory, manifest())
    made = turn("bad.0", [1, 2])
    last = made.steps[-1]._replace(**changed)
    reason = changed.get("finish_reason", made.finish_reason)
    odd = replace(made, steps=[made.steps[0], last], finish_reason=reason)
    writer = store.Writer(directory, 0, interval_s=60)
    writer.commit(conversation("good", "cat", [1, 2, 3]))
    writer.commit(conversation("bad", "cat", odd))
    writer.close()
    run = store.load(directory)
    assert run.damage == ()
    assert store.committed(directory) == {"good": True, "bad": False}
    (error,) = [row["error"] for row in run.turns.to_pylist() if row["error"]]
    assert told in error


# --- writing --------------------------------------------------------------------------------------


def test_a_directory_in_which_the_first_manifest_was_not_finished_is_new(tmp_path: Path) -> None:
    store.create(tmp_path / "run")
    (tmp_path / "run" / ".manifest.json.tmp").write_text("{")  # killed, or the disk was full
    store.create(tmp_path / "run")


def test_a_directory_that_cannot_be_locked_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UserError, match=r"is not there on .*every host sees"),
        store.locked(tmp_path / "elsewhere", 1),
    ):
        pass

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked .*--save_dir"), store.locked(tmp_path):
        pass


def test_an_interrupted_close_still_stores_all(tmp_path: Path) -> None:
    """A second signal ends the process at once, and with it the writing thread."""
    store.create(tmp_path / "run")
    writer = store.Writer(tmp_path / "run", 0, interval_s=60.0)
    writer.commit(conversation("c", "cat", [1, 2]))
    join, calls = writer._thread.join, []

    def interrupted(timeout: float | None = None) -> None:
        calls.append(timeout)
        if len(calls) == 1:
            raise SystemExit(143)
        join(timeout)

    writer._thread.join = interrupted  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        writer.close()
    assert not writer._thread.is_alive()
    store.write_manifest(tmp_path / "run", manifest())
    assert store.committed(tmp_path / "run") == {"c": True}


def test_an_existing_run_is_never_written_over(tmp_path: Path) -> None:
    """Trap 16."""
    directory = run_of_three_parts(tmp_path / "r")
    with pytest.raises(UserError, match="already holds a run"):
        store.create(directory)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="already holds something"):
        store.create(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    store.create(tmp_path / "empty")


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    held = store.locked(directory)
    refused = pytest.raises(UserError, match="being written by process")
    with held, refused, store.locked(directory):
        pass
    with store.locked(directory):
        pass


def names_in(directory: Path) -> Sequence[str]:
    return sorted(path.name for path in (directory / "turns").iterdir())


def test_a_writer_that_cannot_write_says_so_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    writer = store.Writer(directory, 1, interval_s=60)
    (directory / "steps" / ".00003.parquet.tmp").mkdir()
    writer.commit(conversation("e", "cat", [1, 2]))
    with pytest.raises(UserError, match="could not be written any more"):
        writer.close()
    assert writer.failure is not None
    assert names_in(directory) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert len(store.load(directory).columns.conversation_ids) == 4


def test_detail_of_another_length_is_that_request_s_failure(tmp_path: Path) -> None:
    """No number of it is stored, and nothing else is lost."""
    directory = run_of_three_parts(tmp_path / "r")
    n_before = len(store.load(directory).columns.conversation_ids)
    spoilt = turn("e", [1, 2, 2], told=[(0, 0)] * 2)
    write_part(directory, [conversation("e", "cat", spoilt), conversation("f", "cat", [1, 2])])
    run = store.load(directory)
    rows = {row["conversation_id"]: row for row in run.turns.to_pylist()}
    assert rows["e"]["finish_reason"] == "error"
    assert "2 details for 3 steps" in rows["e"]["error"]
    assert rows["e"]["output_token_ids"] == []
    assert rows["f"]["finish_reason"] != "error"
    assert len(run.columns.conversation_ids) == n_before + 2
    assert store.committed(directory)["e"] is False  # so --resume asks it again


def test_committed_conversations_reach_the_disk_without_being_asked(tmp_path: Path) -> None:
    directory = run_of_three_parts(tmp_path / "r")
    writer = store.Writer(directory, 1, interval_s=0.01)
    writer.commit(conversation("e", "cat", [1, 2]))
    deadline = time.monotonic() + 60
    while "e" not in store.committed(directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "e" in store.committed(directory)
    writer.close()


# --- large runs -----------------------------------------------------------------------------------


def test_many_steps_are_written_before_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for its part takes memory: 4 conversations of 5 steps, at most 8 steps wait."""
    monkeypatch.setattr(store, "PART_STEPS", 8)
    store.create(tmp_path / "r")
    writer = store.Writer(tmp_path / "r", 0, interval_s=3600)
    for name in "abcd":
        writer.commit(conversation(name, "cat", [1, 2, 2, 2, 1]))
    writer.close()
    parts = sorted((tmp_path / "r" / "steps").glob("*.parquet"))
    assert [pq.read_metadata(part).num_rows for part in parts] == [10, 10]


def test_a_table_made_in_pieces_is_the_table_made_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        conversation(f"c{i}", "cat", [1, 2, 4][: 1 + i % 3], [1] * (i % 5), ttft_ns=i)
        for i in range(20)
    ]
    for name, at_once in (("whole", 10**6), ("pieces", 4)):
        monkeypatch.setattr(store, "AT_ONCE_STEPS", at_once)
        monkeypatch.setattr(store.Writer, "_at_once", lambda _self, n=at_once: n)
        stored(tmp_path / name, records)
    for folder, n_rows in (("steps", sum(1 + i % 3 + i % 5 for i in range(20))), ("turns", 2 * 20)):
        whole, pieces = (pq.read_table(tmp_path / n / folder) for n in ("whole", "pieces"))
        assert whole.num_rows == n_rows
        assert pieces.equals(whole)


def test_the_writer_makes_its_tables_when_the_loop_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tables, each in a turn of its own: at no time are there more of them than turns."""
    n_tables = 0
    make = store._tables

    def counted(*given: Any) -> Any:
        nonlocal n_tables
        n_tables += 1
        return make(*given)

    monkeypatch.setattr(store, "_tables", counted)
    monkeypatch.setattr(store, "PATIENCE_S", 3600)
    monkeypatch.setattr(store, "AT_ONCE_STEPS", 1)
    store.create(tmp_path / "r")
    store.write_manifest(tmp_path / "r", manifest())
    writer = store.Writer(tmp_path / "r", 0, interval_s=0)
    for name in "abcde":
        writer.commit(conversation(name, "cat", [1, 2]))
    n_turns, give, deadline = 0, writer._turn.set, time.monotonic() + 60

    def given() -> None:
        nonlocal n_turns
        n_turns += 1
        give()

    monkeypatch.setattr(writer._turn, "set", given)
    while len(store.committed(tmp_path / "r")) < 5 and time.monotonic() < deadline:
        assert n_tables <= n_turns
        writer.give_turn()
        time.sleep(0.001)
    assert (n_tables, n_turns) == (5, 5)
    writer.close()


def test_a_writer_that_is_given_no_turn_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine whose steps take seconds, say."""
    monkeypatch.setattr(store, "PATIENCE_S", 0.01)
    monkeypatch.setattr(store, "AT_ONCE_STEPS", 1)
    store.create(tmp_path / "r")
    store.write_manifest(tmp_path / "r", manifest())
    writer = store.Writer(tmp_path / "r", 0, interval_s=0)
    writer.commit(conversation("a", "cat", [1, 2]))
    deadline = time.monotonic() + 60
    while not store.committed(tmp_path / "r") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(store.committed(tmp_path / "r")) == {"a"}
    writer.close()


def test_a_loop_that_overruns_the_writer_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations of 2 steps: not while 99 of them wait, but while 100 do, and no more once
    nothing can be stored. (A writer without a thread, that only looks at what waits.)"""
    monkeypatch.setattr(store, "OVERRUN_STEPS", 199)
    slept: list[float] = []
    monkeypatch.setattr(store.time, "sleep", slept.append)
    writer: Any = store.Writer.__new__(store.Writer)
    writer._closing, writer._wants_turn, writer._failure = threading.Event(), False, None
    writer._mean_steps = 2.0
    for n_waiting, n_slept in ((99, 0), (100, 1), (99, 1)):
        writer._queue = SimpleNamespace(qsize=lambda n=n_waiting: n)
        assert writer._is_polite()
        writer.give_turn()
        assert slept == [store.OVERRUN_WAIT_S] * n_slept
    writer._queue, writer._failure = SimpleNamespace(qsize=lambda: 100), OSError("full")
    assert writer._is_polite()
    writer.give_turn()
    assert len(slept) == 1
