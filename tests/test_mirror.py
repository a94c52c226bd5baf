"""A run's copy behind a URL: whole at the end whatever the store does, valid at every moment, and
continued from nothing but it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from speedbench import mirror, remote, remote_lock, store
from speedbench.cli import main
from speedbench.cli_upload import upload_command
from speedbench.mirror import Mirror, opened
from speedbench.mirror_process import mirrored
from speedbench.remote import Store, local_path
from speedbench.remote_lock import Lock, TakenOverError
from speedbench.types import UserError
from tests.builders import conversation, manifest, session, write_part
from tests.faulty_store import FaultyStore
from tests.processes import is_running

ROOT = Path(__file__).parent.parent
MOVED, OBJECTS = "faulty://bucket/run", "oss://bucket/run"
"""A store where files are moved to their places, and one that is taken for an object store."""
URLS = (MOVED, OBJECTS)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(remote_lock, "SETTLE_S", 0.0)
    FaultyStore.reset()
    yield
    FaultyStore.reset()


def files(directory: Path) -> dict[str, bytes]:
    """What a directory holds under final names."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


class WrittenRun:
    """A run that goes on when it is told to, as `session.measure` writes it."""

    def __init__(self, directory: Path, host: str = "node1") -> None:
        self.directory = directory
        self.host = host
        self.sessions: list[dict[str, Any]] = []
        self.n_done = 0

    @classmethod
    def found(cls, directory: Path, host: str) -> WrittenRun:
        """The run that is in a directory, to be continued on a host."""
        run = cls(directory, host)
        run.sessions = store.read_manifest(directory)["sessions"]
        run.n_done = len(store.committed(directory))
        return run

    def begin(self) -> None:
        number = len(self.sessions)
        if not number:
            store.create(self.directory)
        started = f"2026-01-02T03:04:{number:02d}+00:00"
        self.sessions.append(
            session(number, hostname=self.host, started_at=started, ended_ns=None, end=None)
        )
        self._describe("running")

    def commit(self, n: int = 1) -> None:
        for _ in range(n):
            record = conversation(f"{self.host}-{self.n_done}", "code", [1, 2, 3])
            write_part(self.directory, [record], number=len(self.sessions) - 1)
            self.n_done += 1

    def end(self, status: str = "complete") -> None:
        # The clock starts anew once the engine is warm, as `session` tells it.
        self.sessions[-1].update(started_ns=5, ended_ns=10, end="finished")
        self._describe(status)

    def _describe(self, status: str) -> None:
        made = manifest(sessions=self.sessions, expected={"code": self.n_done}, status=status)
        store.write_manifest(self.directory, made)


def whole_run(directory: Path, n_parts: int = 3, host: str = "node1") -> WrittenRun:
    run = WrittenRun(directory, host)
    run.begin()
    run.commit(n_parts)
    run.end()
    return run


def assert_valid(found: dict[str, bytes]) -> None:
    """What is listed could be a run directory at some moment of its run."""
    turns = {name for name in found if name.startswith("turns/")}
    assert {name.replace("turns", "steps") for name in turns} <= set(found)
    if not turns:
        return
    described = json.loads(found["manifest.json"])
    sessions = {entry["session"] for entry in described["sessions"]}
    stored = 0
    for name in turns:
        with pq.ParquetFile(_buffer(found[name])) as part:
            rows = part.read()
        assert set(rows["session"].to_pylist()) <= sessions
        stored += rows.num_rows
    if described["status"] != "running":
        assert stored >= described["dataset"]["expected"]["code"]


def _buffer(data: bytes) -> Any:
    import pyarrow as pa

    return pa.BufferReader(data)


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("url", [*URLS, "file"])
def test_the_copy_is_the_run_byte_for_byte(url: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/far/run" if url == "file" else url
    run = WrittenRun(tmp_path / "run")
    copy = Mirror(tmp_path / "run", Store(url))
    assert copy.round() == 0  # nothing is there yet
    run.begin()
    assert copy.round() == 1
    run.commit(2)
    assert copy.round() == 4
    assert copy.round() == 0
    run.commit()
    run.end()
    uploaded = copy.finish()
    assert uploaded.missing == ()
    there = files(tmp_path / "far/run") if url.startswith("file") else FaultyStore.files()
    assert there == files(tmp_path / "run")
    assert uploaded.n_files == len(there) == 1 + 2 * 3
    assert uploaded.n_bytes == sum(map(len, there.values()))


@pytest.fixture
def watched() -> Iterator[Callable[[], None]]:
    """Looks at what is listed when it is called; what was wrong then fails the test at its end,
    whoever catches it meanwhile."""
    wrong: list[str] = []

    def look() -> None:
        try:
            assert_valid(FaultyStore.files())
        except Exception as error:  # noqa: BLE001 - raised below
            wrong.append(repr(error))

    yield look
    assert wrong == []


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("seed", range(12))
def test_at_every_moment_it_is_a_run_whatever_fails(
    url: str, seed: int, tmp_path: Path, watched: Callable[[], None]
) -> None:
    """One call in four fails, at times for long; rounds come at any moment of three sessions."""
    chance = random.Random(seed)
    n_faults = [0]
    is_down = [False]

    def falter(_what: str, _path: str) -> None:
        watched()
        if is_down[0] or chance.random() < 0.25:
            n_faults[0] += 1
            raise chance.choice((ConnectionResetError("by peer"), TimeoutError("slow"), OSError(5)))

    FaultyStore.fault = staticmethod(falter)
    run = WrittenRun(tmp_path / "run")
    copy = Mirror(tmp_path / "run", Store(url))

    def go_round() -> None:
        is_down[0] = chance.random() < 0.3
        with contextlib.suppress(OSError):
            copy.round()

    for _ in range(3):
        run.begin()
        for _ in range(4):
            if chance.random() < 0.7:
                go_round()
            run.commit(chance.randint(0, 2))
        run.end("partial")
        if chance.random() < 0.5:
            go_round()
    assert n_faults[0] > 2
    FaultyStore.fault = staticmethod(lambda _what, _path: watched())
    assert copy.finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")


@pytest.mark.parametrize("url", URLS)
def test_every_single_call_may_fail_once(url: str, tmp_path: Path) -> None:
    whole_run(tmp_path / "run", 2)
    n_calls = 0
    while True:
        FaultyStore.reset()
        left = [n_calls]

        def fail_once(_what: str, _path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError("once")

        FaultyStore.fault = staticmethod(fail_once)
        uploaded = Mirror(tmp_path / "run", Store(url)).finish()
        assert uploaded.missing == ()
        assert FaultyStore.files() == files(tmp_path / "run")
        if left[0] >= 0:
            break
        n_calls += 1
    assert n_calls >= 3 * len(files(tmp_path / "run"))


@pytest.mark.parametrize("url", URLS)
def test_truncated_and_garbled_uploads_are_found_and_mended(url: str, tmp_path: Path) -> None:
    whole_run(tmp_path / "run", 2)
    n_spoilt: Counter[str] = Counter()

    def spoil(path: str, data: bytes) -> bytes:
        n_spoilt[path] += 1
        if sum(n_spoilt.values()) % 3:
            return data
        return data[: len(data) // 2] if sum(n_spoilt.values()) % 2 else bytes(len(data))

    FaultyStore.spoil = staticmethod(spoil)
    assert Mirror(tmp_path / "run", Store(url)).finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")
    assert sum(n_spoilt.values()) > len(files(tmp_path / "run")) + 2


def test_a_folder_that_holds_no_run_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no run directory \(it has no manifest\.json\)"):
        mirror.upload(tmp_path / "papers", OBJECTS)
    assert FaultyStore.files() == {}


def test_a_lost_object_is_uploaded_again(tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    copy = Mirror(tmp_path / "run", Store(OBJECTS))
    copy.round()
    del FaultyStore.store["/bucket/run/steps/00001.parquet"]
    FaultyStore.store["/bucket/run/turns/00002.parquet"].truncate(3)
    assert copy.finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")


def test_what_cannot_be_uploaded_is_named_and_stays_here(tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    before = files(tmp_path / "run")

    def denied(what: str, path: str) -> None:
        if what == "put" and "turns/00001" in path:
            raise PermissionError("Access Denied")

    FaultyStore.fault = staticmethod(denied)
    uploaded = Mirror(tmp_path / "run", Store(OBJECTS)).finish()
    # The manifest tells that the run is complete, and so waits for all of it; the parts after the
    # one that failed wait, too.
    assert set(uploaded.missing) == {
        "manifest.json", "turns/00001.parquet", "turns/00002.parquet",
    }  # fmt: skip
    assert "PermissionError: Access Denied" in uploaded.why
    assert json.loads(FaultyStore.files()["manifest.json"])["status"] == "running"
    assert_valid(FaultyStore.files())
    sentence = mirror.verdict(uploaded, OBJECTS, tmp_path / "run")
    assert "3 of 7 files are not at" in sentence
    assert f"speedbench upload {tmp_path / 'run'} {OBJECTS}" in sentence
    assert files(tmp_path / "run") == before
    FaultyStore.fault = staticmethod(lambda _what, _path: None)
    assert mirror.upload(tmp_path / "run", OBJECTS).missing == ()
    assert FaultyStore.files() == before


def test_what_a_mirror_left_undone_is_completed_once_its_run_has_ended(tmp_path: Path) -> None:
    """What the URL knows of the session is from its beginning."""
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.commit()
    Mirror(tmp_path / "run", Store(OBJECTS)).round()
    run.commit(2)
    run.end()
    assert mirror.upload(tmp_path / "run", OBJECTS).missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")


def test_a_session_has_one_identity_from_its_first_manifest_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = store.write_manifest

    def noting(directory: Path, made: Any) -> None:
        write(directory, made)
        written.append((directory / "manifest.json").read_bytes())

    monkeypatch.setattr(store, "write_manifest", noting)
    command = ["run", "--engine", "NULL", "--random_isl", "4", "--num_requests", "2"]
    assert main([*command, "--output_length", "4", "--save_dir", str(tmp_path / "run")]) == 0
    assert [json.loads(text)["status"] for text in written] == ["running", "complete"]
    (key,) = mirror._session_keys(written[0])
    assert mirror._session_keys(written[-1]) == [key]


def test_objects_that_keep_vanishing_are_told(tmp_path: Path) -> None:
    whole_run(tmp_path / "run", 1)

    def loses(what: str, _path: str) -> None:
        if what == "list":
            FaultyStore.store.pop("/bucket/run/steps/00000.parquet", None)

    FaultyStore.fault = staticmethod(loses)
    uploaded = Mirror(tmp_path / "run", Store(OBJECTS)).finish()
    assert uploaded.missing == ("steps/00000.parquet",)
    assert "vanished" in uploaded.why


def test_one_run_of_a_folder_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    whole_run(folder / "cell-1")
    whole_run(folder / "cell-2")
    (folder / "series.json").write_text("{}")

    def denied(what: str, path: str) -> None:
        if what == "put" and "cell-1/steps" in path:
            raise PermissionError("Access Denied")

    FaultyStore.fault = staticmethod(denied)
    uploaded = Mirror(folder, Store(OBJECTS)).finish()
    assert uploaded.missing
    assert all(name.startswith("cell-1/") for name in uploaded.missing)
    FaultyStore.fault = staticmethod(lambda _what, _path: None)
    assert Mirror(folder, Store(OBJECTS)).finish().missing == ()
    assert FaultyStore.files() == files(folder)


def test_a_part_is_seen_with_what_it_refers_to_even_if_it_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: Callable[[], None]
) -> None:
    """Between any two looks of a round at the directory, the run goes on."""
    run = WrittenRun(tmp_path / "run")
    run.begin()
    FaultyStore.fault = staticmethod(lambda _what, _path: watched())
    copy = Mirror(tmp_path / "run", Store(OBJECTS))
    scandir = os.scandir

    def goes_on(path: Any) -> Any:
        entries = scandir(path)
        monkeypatch.setattr(os, "scandir", scandir)  # once per look
        if run.n_done < 12:
            if run.sessions[-1]["end"] is not None:
                run.begin()
            run.commit()
            if run.n_done % 2:
                run.end("partial")
        monkeypatch.setattr(os, "scandir", goes_on)
        return entries

    monkeypatch.setattr(os, "scandir", goes_on)
    while run.n_done < 12:
        copy.round()
    monkeypatch.setattr(os, "scandir", scandir)
    run.end()
    assert copy.finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")


def test_a_part_of_another_run_is_never_replaced(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    copy = Mirror(tmp_path / "run", Store(OBJECTS))
    copy.round()
    whole_run(tmp_path / "other", 1, host="node2")
    theirs = {name: data for name, data in files(tmp_path / "other").items() if "/" in name}
    for name, data in theirs.items():
        FaultyStore().pipe_file(f"/bucket/run/{name}", data)
    run.commit()
    with pytest.raises(TakenOverError, match=r"another turns/00000\.parquet"):
        copy.round()
    assert set(copy.finish().missing) == {"steps/00000.parquet", "turns/00000.parquet"}
    assert {n: d for n, d in FaultyStore.files().items() if "/" in n} == theirs


def test_steps_that_were_left_without_turns_are_replaced(tmp_path: Path) -> None:
    """A run was killed between its steps and its turns; the next session writes that part anew."""
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.commit()
    (tmp_path / "run/steps/00001.parquet").write_bytes(b"PAR1 of a killed session")
    copy = Mirror(tmp_path / "run", Store(OBJECTS))
    copy.round()
    run.begin()
    run.commit()
    run.end()
    with opened(tmp_path / "run", OBJECTS, "resume") as (again, _news):
        assert again.finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "run")
    assert store.load(tmp_path / "run").damage == ()


# ---------------------------------------------------------------- before a run


@pytest.mark.parametrize(
    ("what", "error", "named"),
    [
        ("put", PermissionError("Access Denied"), "right to list, read, write and delete"),
        ("remove", PermissionError("no DeleteObject"), "right to list, read, write and delete"),
        ("list", PermissionError("no ListBucket"), "right to list, read, write and delete"),
        ("put", FileNotFoundError("The specified bucket does not exist"), "create its bucket"),
        ("put", ConnectionError("cannot connect to host"), "check the URL, the network"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(
    what: str, error: Exception, named: str, tmp_path: Path
) -> None:
    def refuse(done: str, _path: str) -> None:
        if done == what:
            raise error

    FaultyStore.fault = staticmethod(refuse)
    with pytest.raises(UserError, match=named) as refused, opened(tmp_path / "run", OBJECTS, "new"):
        pass
    assert str(error) in str(refused.value)
    assert OBJECTS in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", URLS)
def test_probe_and_lock_leave_nothing(url: str, tmp_path: Path) -> None:
    with opened(tmp_path / "run", url, "new"):
        assert "/bucket/run/.lock" in FaultyStore.store
    assert FaultyStore.store == {}


def test_a_new_run_is_refused_where_something_is(tmp_path: Path) -> None:
    whole_run(tmp_path / "run")
    mirror.upload(tmp_path / "run", OBJECTS)
    with (
        pytest.raises(UserError, match=r"already holds a run: .* --resume"),
        opened(tmp_path / "other", OBJECTS, "new"),
    ):
        pass
    with (
        pytest.raises(UserError, match="staged copy of an earlier run"),
        opened(tmp_path / "run", "oss://bucket/new", "new"),
    ):
        pass


@pytest.mark.parametrize("url", URLS)
def test_a_fresh_machine_continues_where_the_url_is(url: str, tmp_path: Path) -> None:
    first = WrittenRun(tmp_path / "a")
    first.begin()
    first.commit(2)
    with opened(tmp_path / "a", url, "resume") as (copy, _):
        assert copy.finish().missing == ()
    with opened(tmp_path / "b", url, "resume") as (copy, news):
        assert files(tmp_path / "b") == files(tmp_path / "a")
        assert news.startswith("5 file(s)")
        second = WrittenRun.found(tmp_path / "b", "node2")
        second.begin()
        second.commit(2)
        second.end()
        assert copy.finish().missing == ()
    assert FaultyStore.files() == files(tmp_path / "b")
    # Back on the first, whose staged copy is behind, and holds nothing of its own.
    with opened(tmp_path / "a", url, "resume") as (copy, news):
        assert files(tmp_path / "a") == files(tmp_path / "b")
        assert news.startswith("5 file(s)")  # two parts, and the manifest
        assert copy.finish().missing == ()


def test_what_was_fetched_is_not_uploaded_again(tmp_path: Path) -> None:
    whole_run(tmp_path / "a")
    mirror.upload(tmp_path / "a", OBJECTS)
    with opened(tmp_path / "b", OBJECTS, "resume") as (copy, _):
        FaultyStore.calls.clear()
        assert copy.round() == 0
        assert copy.finish().missing == ()
        assert [path for what, path in FaultyStore.calls if what == "put"] == []


def test_fetching_that_is_cut_off_goes_on(tmp_path: Path) -> None:
    whole_run(tmp_path / "a", 4)
    mirror.upload(tmp_path / "a", OBJECTS)
    n_left = [5]

    def cut(what: str, path: str) -> None:
        if what == "get" and not path.rpartition("/")[2].startswith("."):
            n_left[0] -= 1
            if n_left[0] < 0:
                raise PermissionError("token expired")

    FaultyStore.fault = staticmethod(cut)
    with pytest.raises(UserError, match="token expired"), opened(tmp_path / "b", OBJECTS, "resume"):
        pass
    assert "manifest.json" not in files(tmp_path / "b")  # it comes last: this is no run yet
    FaultyStore.fault = staticmethod(lambda _what, _path: None)
    with opened(tmp_path / "b", OBJECTS, "resume"):
        assert files(tmp_path / "b") == files(tmp_path / "a")


def test_a_file_that_came_garbled_does_not_count(tmp_path: Path) -> None:
    whole_run(tmp_path / "a", 1)
    mirror.upload(tmp_path / "a", OBJECTS)
    get_file = FaultyStore.get_file
    n_got = [0]

    def garbled(self: FaultyStore, rpath: str, lpath: str, **kwargs: Any) -> None:
        get_file(self, rpath, lpath, **kwargs)
        n_got[0] += 1
        if n_got[0] % 2:
            Path(lpath).write_bytes(bytes(Path(lpath).stat().st_size))

    try:
        FaultyStore.get_file = garbled  # type: ignore[method-assign]
        with opened(tmp_path / "b", OBJECTS, "resume"):
            assert files(tmp_path / "b") == files(tmp_path / "a")
    finally:
        FaultyStore.get_file = get_file  # type: ignore[method-assign]
    assert n_got[0] > 3


def diverged(tmp_path: Path) -> None:
    """a/ and the URL: the same session 0, then each another session 1 with a part of its own."""
    run = WrittenRun(tmp_path / "a")
    run.begin()
    run.commit()
    mirror.upload(tmp_path / "a", OBJECTS)
    with opened(tmp_path / "b", OBJECTS, "resume") as (copy, _):
        other = WrittenRun.found(tmp_path / "b", "node2")
        other.begin()
        other.commit()
        other.end()
        copy.finish()
    run.begin()
    run.commit()
    run.end()


def test_two_machines_that_both_continued_are_told_apart(tmp_path: Path) -> None:
    diverged(tmp_path)
    there, here = FaultyStore.files(), files(tmp_path / "a")
    for do in (
        lambda: opened(tmp_path / "a", OBJECTS, "resume").__enter__(),
        lambda: mirror.upload(tmp_path / "a", OBJECTS),
    ):
        with pytest.raises(UserError, match=r"went different ways: 1 part.* on node2") as refused:
            do()
        assert str(tmp_path / "a") in str(refused.value)
    assert FaultyStore.files() == there
    assert files(tmp_path / "a") == here


def test_parts_only_here_are_not_lost_where_the_url_is_ahead(tmp_path: Path) -> None:
    """The copy has session 0 with two parts, of which one never got there; session 1 is there."""
    run = WrittenRun(tmp_path / "a")
    run.begin()
    run.commit()
    mirror.upload(tmp_path / "a", OBJECTS)
    with opened(tmp_path / "b", OBJECTS, "resume") as (copy, _):
        other = WrittenRun.found(tmp_path / "b", "node2")
        other.begin()
        other.commit()
        copy.finish()
    run.commit()
    with (
        pytest.raises(UserError, match="went different ways: 1 part"),
        opened(tmp_path / "a", OBJECTS, "resume"),
    ):
        pass


def test_another_run_at_the_url_is_not_mixed_in(tmp_path: Path) -> None:
    whole_run(tmp_path / "a")
    whole_run(tmp_path / "b", host="node2")
    mirror.upload(tmp_path / "a", OBJECTS)
    with pytest.raises(UserError, match="went different ways"):
        mirror.upload(tmp_path / "b", OBJECTS)
    assert FaultyStore.files() == files(tmp_path / "a")


def test_a_folder_of_runs_is_continued_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    whole_run(folder / "cell-1", 2)
    begun = WrittenRun(folder / "cell-2")
    begun.begin()
    begun.commit()
    (folder / "series.json").write_text('{"cells": 3}')
    mirror.upload(folder, OBJECTS)
    with opened(tmp_path / "b", OBJECTS, "resume") as (copy, _):
        assert files(tmp_path / "b") == files(folder)
        again = WrittenRun.found(tmp_path / "b/cell-2", "node2")
        again.begin()
        again.commit()
        again.end()
        whole_run(tmp_path / "b/cell-3")
        (tmp_path / "b/series.json").write_text('{"cells": 4}')
        copy.finish()
    assert FaultyStore.files() == files(tmp_path / "b")
    with opened(folder, OBJECTS, "resume"):
        assert files(folder) == files(tmp_path / "b")


def test_uploading_a_folder_fetches_nothing(tmp_path: Path) -> None:
    whole_run(tmp_path / "a/mine")
    whole_run(tmp_path / "b/theirs", host="node2")
    mirror.upload(tmp_path / "b", OBJECTS)
    mirror.upload(tmp_path / "a", OBJECTS)
    assert {name.partition("/")[0] for name in files(tmp_path / "a")} == {"mine"}
    assert {name.partition("/")[0] for name in FaultyStore.files()} == {"mine", "theirs"}


# ---------------------------------------------------------------- the lock


def other_lock(**about: object) -> dict[str, Any]:
    """A lock of a process on another machine, written to the URL."""
    content = {
        "id": "other", "owner": "process 7 on node2", "pid": 7, "place": "node2 boot pid",
        "beat_at": time.time(), **about,
    }  # fmt: skip
    FaultyStore().pipe_file("/bucket/run/.lock", json.dumps(content).encode())
    return content


def test_a_url_that_another_writes_to_is_refused(tmp_path: Path) -> None:
    other_lock(beat_at=time.time() - 40)
    with (
        pytest.raises(UserError, match=r"written by process 7 on node2 .*\.lock") as refused,
        opened(tmp_path / "run", OBJECTS, "resume"),
    ):
        pass
    assert 40 <= int(str(refused.value).partition("last sign of life ")[2].split()[0]) <= 45


def test_two_that_begin_at_one_time_are_not_both_let_in() -> None:
    first, second = Lock(Store(OBJECTS)), Lock(Store(OBJECTS))
    reads: list[str] = []
    read = second._read

    def interleaved() -> Any:
        """The second looks before the first has written, and writes after it."""
        found = read()
        if not reads:
            reads.append("once")
            first._write()
        return found

    second._read = interleaved  # type: ignore[method-assign]
    second.take()
    first.beat()
    with pytest.raises(TakenOverError):
        first.check()
    second.check()


def test_of_two_that_saw_no_lock_the_one_that_wrote_first_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _settling: other_lock())
    with pytest.raises(UserError, match="is being written by process 7 on node2"):
        Lock(Store(OBJECTS)).take()


def test_a_lock_of_a_process_that_is_gone_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    other_lock(pid=int(ended.stdout), place=remote_lock._place())
    with opened(tmp_path / "run", OBJECTS, "resume"):
        pass
    assert sum(waits) < remote_lock.BEAT_S  # of this machine: it can be known at once
    other_lock(pid=os.getpid(), place=remote_lock._place())
    with pytest.raises(UserError, match="is being written"), opened(tmp_path, OBJECTS, "resume"):
        pass
    other_lock(beat_at=time.time() - 10 * remote_lock.STALE_S)
    with opened(tmp_path / "run", OBJECTS, "resume") as (_, news):
        assert "process 7 on node2 ended without leaving" in news
    assert sum(waits) >= remote_lock.BEAT_S  # elsewhere: it was watched first


def test_an_old_lock_that_is_renewed_is_only_of_a_wrong_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_lock(beat_at=1000.0)

    def renewed(seconds: float) -> None:
        if seconds >= remote_lock.BEAT_S:
            other_lock(beat_at=1020.0)

    monkeypatch.setattr(time, "sleep", renewed)
    with (
        pytest.raises(UserError, match="is being written"),
        opened(tmp_path / "run", OBJECTS, "resume"),
    ):
        pass


def test_who_lost_the_lock_uploads_nothing_more(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.begin()
    there = Store(OBJECTS)
    lock = Lock(there)
    lock.take()
    copy = Mirror(tmp_path / "run", there, check=lock.check)
    copy.round()
    lock.beat()
    run.commit()
    other_lock()
    lock.beat()
    before = FaultyStore.files()
    uploaded = copy.finish()
    assert set(uploaded.missing) == {"steps/00000.parquet", "turns/00000.parquet"}
    assert "taken over by process 7 on node2" in uploaded.why
    assert FaultyStore.files() == before
    lock.release()
    assert json.loads(FaultyStore.store["/bucket/run/.lock"].getvalue())["id"] == "other"


# ---------------------------------------------------------------- the process


def test_a_path_needs_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_kwargs: pytest.fail("started"))
    with mirrored(str(tmp_path), resume=False, tell=pytest.fail) as state:
        pass
    assert state.is_whole
    with mirrored(None, resume=False, tell=pytest.fail) as state:
        pass
    assert state.is_whole


def test_a_run_is_never_held_up_and_all_is_there_in_the_end(tmp_path: Path) -> None:
    """The mirror stands still from before the first part until after the last: as with a store
    that hangs, the run is written all the same."""
    url = f"file://{tmp_path}/far"
    said: list[str] = []
    with mirrored(url, resume=False, tell=said.append) as state:
        (child,) = _mirrors_of(os.getpid())
        assert os.getpgid(child) != os.getpgid(0)  # a terminal's Ctrl-C does not reach it
        os.kill(child, signal.SIGSTOP)
        run = whole_run(local_path(url), 20)
        assert not (tmp_path / "far/manifest.json").exists()
        os.kill(child, signal.SIGCONT)
    assert state.is_whole
    assert files(tmp_path / "far") == files(run.directory)
    assert len(said) == 1
    assert "holds all 41 files" in said[0]
    assert str(run.directory) in said[0]


def _mirrors_of(pid: int) -> list[int]:
    done = subprocess.run(
        ["pgrep", "-P", str(pid), "-f", "speedbench.mirror_process"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [int(word) for word in done.stdout.split()]


def test_a_mirror_that_was_killed_is_told_with_what_completes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/far"
    said: list[str] = []
    with mirrored(url, resume=False, tell=said.append) as state:
        (child,) = _mirrors_of(os.getpid())
        os.kill(child, signal.SIGKILL)
        run = whole_run(local_path(url))
    assert not state.is_whole
    assert f"speedbench upload {run.directory} {url}" in said[-1]
    assert upload_command([str(run.directory), url], "speedbench upload") == 0
    assert "holds all 7 files" in capsys.readouterr().out
    assert files(tmp_path / "far") == files(run.directory)


def test_what_is_refused_is_refused_before_anything_starts(tmp_path: Path) -> None:
    whole_run(tmp_path / "far")
    with (
        pytest.raises(UserError, match="already holds a run"),
        mirrored(f"file://{tmp_path}/far", resume=False, tell=pytest.fail),
    ):
        pytest.fail("it began")
    with (
        pytest.raises(UserError, match="ends with its process"),
        mirrored("memory://bucket/run", resume=False, tell=pytest.fail),
    ):
        pytest.fail("it began")


def test_a_command_that_fails_is_not_hidden_by_its_mirror(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        pytest.raises(UserError, match="no such model"),
        mirrored(f"file://{tmp_path}/far", resume=False, tell=said.append),
    ):
        raise UserError("no such model")
    assert said == []
    assert files(tmp_path / "far") == {}
    assert not (tmp_path / "far/.lock").exists()


def conversations(directory: Path) -> Counter[str]:
    turns = store.load(directory).turns
    return Counter(turns["conversation_id"].to_pylist())


def test_killed_runs_go_on_from_the_url_alone(tmp_path: Path) -> None:
    """Killed by SIGKILL again and again, each time continued by a machine that has nothing."""
    far, n_rows = tmp_path / "far", 200
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        json.dumps({"engine_args": {"real_time": True, "step_ms": 4, "prefill_ms": 4}})
    )
    moments = random.Random(7)
    kept: set[str] = set()
    n_kills = 0
    for machine in range(40):
        command = [
            sys.executable, "run.py", "--save_dir", f"file://{far}",
            "--engine", "NULL", "--dataset", "random",
            "--random_isl", "4", "--num_requests", str(n_rows), "--output_length", "60",
            "--concurrency", "4", "--runtime_params", str(settings), "--warmup", "0",
            *(["--resume"] if kept else []),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / f"machine-{machine}")},
        )  # fmt: skip
        before = len(kept)
        deadline_s = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(moments.uniform(0.1, 0.5))
            if (far / "manifest.json").is_file():
                run = store.load(far)  # at any moment it is a run
                assert run.damage == ()
                if n_kills < 3 and len(run.columns.conversation_ids) > before:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    n_kills += 1
        assert process.stderr is not None
        said = process.stderr.read()  # ends when the mirror, which inherits nothing of it, may not
        while (far / ".lock").exists():  # what was committed is still uploaded
            time.sleep(0.1)
        now = set(conversations(far))
        assert kept <= now, "a stored conversation was lost"
        assert files(far).keys() == files(_staged(tmp_path / f"machine-{machine}")).keys()
        kept = now
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert n_kills == 3
    stored = conversations(far)
    assert len(stored) == n_rows
    assert set(stored.values()) == {1}
    assert files(far) == files(_staged(tmp_path / f"machine-{machine}"))
    described = store.read_manifest(far)
    assert described["status"] == "complete"
    assert len(described["sessions"]) == 4


def _staged(cache: Path) -> Path:
    (found,) = [path for path in (cache / "speedbench/staged").iterdir() if path.is_dir()]
    return found


def test_the_process_looks_every_second_and_ends_with_its_parent(tmp_path: Path) -> None:
    """Without a word, and though a process that it forked still has the other end of its pipe."""
    url = f"file://{tmp_path}/far"
    code = (
        "import os, signal, sys, time\n"
        "from speedbench import mirror_process as m\n"
        "p = m._start(m.local_path(sys.argv[1]), sys.argv[1], False)\n"
        "m._ready(p, sys.argv[1], m.local_path(sys.argv[1]))\n"
        "if os.fork() == 0:\n"
        "    end = time.monotonic() + 30\n"
        "    while os.path.exists(f'/proc/{p.pid}') and time.monotonic() < end: time.sleep(0.1)\n"
        "    os._exit(0)\n"
        "print(p.pid, flush=True)\n"
        "sys.stdin.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdin is not None
    child = int(process.stdout.readline())
    run = WrittenRun(local_path(url))
    run.begin()
    run.commit()
    while not (tmp_path / "far/turns/00000.parquet").exists():
        time.sleep(0.05)
    run.commit()
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    deadline_s = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not is_running(child)
    assert files(tmp_path / "far") == files(run.directory)
    assert not (tmp_path / "far/.lock").exists()
