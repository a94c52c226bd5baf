"""Progress: rates by hand, and an acceptance length that is the report's."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from speedbench import cli_measure, store
from speedbench.cli import main
from speedbench.cli_measure import _show, showing
from speedbench.loop import Loop
from speedbench.progress import Meter, Moment, StoredAcceptance, duration, line
from speedbench.report.summary import summarize
from speedbench.share import Progress
from tests.builders import conversation, manifest, session, turn, write_part


def begun(directory: Path, **about: Any) -> Path:
    store.create(directory)
    store.write_manifest(directory, manifest(expected={"x": 2, "y": 3}, **about))
    return directory


# --- acceptance -----------------------------------------------------------------------------------


def test_al_so_far_is_of_what_is_stored_and_in_the_end_the_reports(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    followed = StoredAcceptance(directory)
    followed.refresh()
    assert math.isnan(followed.al()[0])

    write_part(directory, [conversation("a", "x", [1, 4, 2, 4], [1, 3, 3, 4])])
    followed.refresh()
    assert followed.al()[0] == pytest.approx(20 / 6)  # every step whole: the mean
    assert followed.al()[1:] == (1, 2)

    write_part(directory, [conversation("b", "y", [1, 1, 1, 4], finish="length")])
    write_part(directory, [conversation("c", "y", [1, 4, 2, 2, 1])])  # cut at 1
    followed.refresh()
    al, n_known, n_categories = followed.al()
    assert (n_known, n_categories) == (2, 2)
    # y: 1 1 4, 4 2 2 whole; one cut at 1: conditional 4/6, 2/4, 2/2 -> 1 + 2/3 + 1/3 + 1/3
    assert al == pytest.approx((20 / 6 + 7 / 3) / 2)
    assert al == summarize(store.load(directory)).lengths["al"].value


def test_a_failed_conversation_counts_once_it_has_been_asked_again(tmp_path: Path) -> None:
    sessions = [session(0), session(1)]
    directory = begun(tmp_path / "run", sessions=sessions)
    write_part(directory, [conversation("a", "x", [1, 4, 4, 4])])
    failed = turn("b.0", [1, 1, 1, 4], finish="error", error="boom")
    write_part(directory, [conversation("b", "y", failed)])
    followed = StoredAcceptance(directory)
    followed.refresh()
    assert followed.al() == (4.0, 1, 2)
    again = turn("b.0.again", [1, 2, 2, 4])
    write_part(directory, [conversation("b", "y", again)], 1)
    followed.refresh()
    assert followed.al()[0] == summarize(store.load(directory)).lengths["al"].value
    assert followed.al()[0] == pytest.approx((4 + 8 / 3) / 2)


def test_all_replicas_and_what_an_engine_tells_are_in_it(tmp_path: Path) -> None:
    sessions = [session(0, replica=0), session(0, replica=1)]
    directory = begun(tmp_path / "run", sessions=sessions, engine={"fits_drafts": True})
    followed = StoredAcceptance(directory)
    for replica in (0, 1):
        records = [
            conversation(
                f"{replica}{i}", "xy"[i % 2],
                turn(f"{replica}{i}.0", [1, 3, 2, 1 + i % 3],
                     told=[(0, 0), (2, 3), (1, 3), (i % 3, i % 3 + 1 - i % 2)]),
            )
            for i in range(6)
        ]  # fmt: skip
        write_part(directory, records, 0, replica)
        followed.refresh()
    assert followed.al()[0] == summarize(store.load(directory)).lengths["al"].value


def test_a_part_that_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    write_part(directory, [conversation("a", "x", [1, 4, 4, 4])])
    (directory / "steps" / "00000.parquet").write_bytes(b"PAR1")
    followed = StoredAcceptance(directory)
    followed.refresh()
    assert math.isnan(followed.al()[0])
    StoredAcceptance(tmp_path / "nothing").refresh()


def test_without_drafts_there_is_no_al(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run", draft_length=0)
    write_part(directory, [conversation("a", "x", [1, 1, 1])])
    followed = StoredAcceptance(directory)
    followed.refresh()
    assert math.isnan(followed.al()[0])


# --- rates ----------------------------------------------------------------------------------------


def test_rates_are_of_the_last_half_minute_and_of_all() -> None:
    meter = Meter(40, 100.0)
    assert meter.at(101.0, 0, 0, 0) == Moment(0, 40, 0, 1.0, None, None, None, 0.0)
    for second in range(2, 61):  # 50 tokens/s, and 100 from the 31st second on
        n_tokens = 50 * second + 50 * max(0, second - 30)
        found = meter.at(100.0 + second, second // 6, n_tokens, 1)
    assert found.recent_tps == pytest.approx(100.0)
    assert found.output_tps == pytest.approx(75.0)
    assert (found.n_done, found.n_failed) == (10, 1)
    assert found.eta_s == pytest.approx(60.0 * 30 / 10)


def test_a_stall_grows_until_a_token_comes() -> None:
    meter = Meter(4, 0.0)
    assert [meter.at(t, 0, n, 0).stall_s for t, n in ((1, 5), (2, 5), (9, 5), (10, 6))] == [
        0, 1, 8, 0,
    ]  # fmt: skip


def test_a_line_says_what_it_cannot_tell(tmp_path: Path) -> None:
    nothing = StoredAcceptance(tmp_path)
    waiting = line(Moment(0, 8, 0, 7.0, None, None, None, 7.0), nothing)
    assert waiting == (
        "0/8 conversations, TPS n/a (no token yet), 7 s gone, ETA n/a (nothing ended yet), "
        "NO TOKEN for 7 s"
    )
    directory = begun(tmp_path / "run")
    write_part(directory, [conversation("a", "x", [1, 4, 2, 4])])
    followed = StoredAcceptance(directory)
    followed.refresh()
    assert line(Moment(3, 8, 2, 61.0, 1234.5, 999.4, 3601.0, 0.0), followed) == (
        "3/8 conversations, 2 FAILED, AL 3.333 so far (1 of 2 categories), "
        "TPS 1,234 (999 since the start), 1 min 01 s gone, ETA 1 h 00 min"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7260, "2 h 01 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- shown ----------------------------------------------------------------------------------------


class Ticks(threading.Event):
    """Lets a display show itself so often, without waiting."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n
        self.waited_s: set[float | None] = set()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_s.add(timeout)
        self.left -= 1
        return self.left < 0


@dataclass
class Counts:
    n_done: int = 2
    n_tokens: int = 90


def shown(directory: Path, ticks: Ticks) -> None:
    counts = cast(Loop, Counts())
    _show(Progress(5, ["b"], time.monotonic(), counts), directory, ticks)


def test_a_log_has_a_plain_line_each_half_minute_on_stderr_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = begun(tmp_path / "run")
    write_part(directory, [conversation("a", "x", [1, 4, 2, 4])])
    ticks = Ticks(3)
    shown(directory, ticks)
    told = capfd.readouterr()
    assert told.out == ""
    assert ticks.waited_s == {30.0}
    lines = told.err.splitlines()
    assert len(lines) == 3
    start = "speedbench: 2/5 conversations, 1 FAILED, AL 3.333 so far (1 of 2 categories), TPS "
    assert all(text.startswith(start) for text in lines)
    assert "\x1b" not in told.err


def test_a_terminal_has_one_line_that_is_written_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = begun(tmp_path / "run")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    ticks = Ticks(3)
    shown(directory, ticks)
    told = capfd.readouterr()
    assert told.out == ""
    assert ticks.waited_s == {1.0}
    assert told.err.count("\r\x1b[2K") == 3
    assert told.err.count("2/5 conversations") == 3
    assert told.err.count("\n") == 1
    assert "\x1b[?25l" not in told.err  # the cursor stays: a run may end at once


def test_nothing_is_shown_before_the_loop_begins(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _show(Progress(), begun(tmp_path / "run"), Ticks(3))
    assert capfd.readouterr() == ("", "")


def test_progress_can_be_turned_off(tmp_path: Path) -> None:
    with showing(Progress(), tmp_path, False):
        assert "speedbench-progress" not in {thread.name for thread in threading.enumerate()}
    with showing(Progress(), tmp_path, True):
        assert "speedbench-progress" in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("flag", "wanted"), [((), True), (("--no_show_progress",), False)])
def test_it_is_shown_unless_that_is_refused(
    flag: tuple[str, ...], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    @contextmanager
    def noted(_progress: object, _directory: Path, show: bool) -> Iterator[None]:
        asked.append(show)
        yield

    monkeypatch.setattr(cli_measure, "showing", noted)
    argv = [
        "run", "--engine", "NULL", "--dataset", "random", "--random_isl", "4", "--num_requests",
        "2", "--output_length", "4", "--save_dir", str(tmp_path / "r"),
    ]  # fmt: skip
    assert main([*argv, *flag]) == 0
    assert asked == [wanted]
