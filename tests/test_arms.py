"""Arms: which stored runs are repeats of one another, in which order, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from speedbench.report.arms import Arm, grouped, load_arms, unlike
from speedbench.report.compared import compared
from speedbench.store import Run
from speedbench.types import UserError
from tests.builders import conversation, session, stored


def run(directory: Path, k: int = 3, *, at: str = "", **about: Any) -> Run:
    if at:
        about["sessions"] = [session(started_at=f"2026-01-02T{at}:00+00:00")]
    return stored(directory, [conversation("a0", "a", [1, 1])], draft_length=k, **about)


def test_repeats_are_in_the_order_they_began_whatever_order_they_are_named_in(
    tmp_path: Path,
) -> None:
    """ABBA: each arm has a first and a second run; the arm named first comes first."""
    made = {
        name: run(tmp_path / name, k, at=at, config={"save_dir": name})
        for name, k, at in (
            ("A1", 0, "03:00"),
            ("B1", 3, "04:00"),
            ("B2", 3, "05:00"),
            ("A2", 0, "06:00"),
        )
    }
    arms = grouped([made[name] for name in ("B2", "A2", "B1", "A1")])
    assert [[found.directory.name for found in arm.runs] for arm in arms] == [
        ["B1", "B2"],
        ["A1", "A2"],
    ]
    assert [arm.label for arm in arms] == ["EAGLE3 K=3", "baseline"]
    assert [arm.is_baseline for arm in arms] == [False, True]
    assert [arm.draft_length for arm in arms] == [3, 0]


def test_repeats_of_a_server_with_an_unknown_drafter_are_doubted(tmp_path: Path) -> None:
    """It may have been started again with another one."""
    where = {"engine": "OPENAI", "url": "http://h:1", "model": "m", "draft_model_dir": None}
    for name, config, n in (
        ("unknown", where, 1),
        ("named", {**where, "draft_model_dir": "/models/drafter"}, 0),
        ("lookup", {**where, "speculative_algorithm": "NGRAM"}, 0),
        ("embedded", {}, 0),
    ):
        for at in ("03:00", "04:00"):
            run(tmp_path / name / at, at=at, config=config)
        (arm,) = load_arms([tmp_path / name])
        found = list(unlike(arm))
        assert len(found) == n
        assert all("which drafter the server ran is not known" in c.sentence for c in found)
    assert list(unlike(Arm("alone", arm.runs[:1]))) == []


@pytest.mark.parametrize(
    ("change", "n_arms"),
    [
        ({"config": {"save_dir": "x", "max_duration": 60.0}}, 1),
        ({"engine": {"settings": {"dtype": "bfloat16", "kv_cache_memory_bytes": 1}}}, 1),
        ({"config": {"concurrency": 9}}, 2),
        ({"config": {"draft_length": 5}}, 2),
        ({"engine": {"version": "0.33.0"}}, 2),
        ({"engine": {"settings": {"dtype": "float16"}}}, 2),
        ({"engine": {"draft_length": 2}}, 2),
    ],
)
def test_what_makes_another_arm(tmp_path: Path, change: dict[str, Any], n_arms: int) -> None:
    first = run(
        tmp_path / "1", engine={"settings": {"dtype": "bfloat16", "kv_cache_memory_bytes": 2}}
    )
    change.setdefault("engine", {"settings": {"dtype": "bfloat16"}})
    change["engine"].setdefault("settings", {"dtype": "bfloat16"})
    assert len(grouped([first, run(tmp_path / "2", **change)])) == n_arms


def software(**packages: str) -> dict[str, Any]:
    return {"python": "3.11.7", "packages": packages}


def test_repeats_of_other_software_are_told(tmp_path: Path) -> None:
    """They are one arm, as nothing that was measured says otherwise."""
    for name, version in (("1", "2.11.0"), ("2", "2.13.0")):
        run(tmp_path / name, environment=software(torch=version, numpy="2.3"))
    (arm,) = load_arms([tmp_path])
    (found,) = unlike(arm)
    assert found.level == "warning"
    assert "the package torch is 2.11.0 in run 1 and 2.13.0 in run 2" in found.sentence


def test_a_report_holds_every_drafter_against_the_baseline_of_its_own_folder(
    tmp_path: Path,
) -> None:
    for series in ("old", "new"):
        run(tmp_path / series / "base", 0)
        run(tmp_path / series / "spec", 3)
    run(tmp_path / "lone" / "spec", 3)
    arms = load_arms([tmp_path])
    found = compared(arms)
    assert {(c.base.label, one.arm.label) for c in found.comparisons for one in c.arms} == {
        ("baseline, old", "EAGLE3 K=3, old"),
        ("baseline, new", "EAGLE3 K=3, new"),
    }
    assert found.not_compared == {
        "EAGLE3 K=3, lone": "2 baselines fit it: name one with `speedbench compare`"
    }


def test_shards_are_no_repeats_of_one_another(tmp_path: Path) -> None:
    """They asked different rows; the same shard again is a repeat."""
    runs = [
        run(tmp_path / str(i), config={"shard": shard}) for i, shard in enumerate(("0/2", "1/2"))
    ]
    runs.append(run(tmp_path / "again", at="04:00", config={"shard": "1/2"}))
    arms = grouped(runs)
    assert [(arm.label, len(arm.runs)) for arm in arms] == [
        ("EAGLE3 K=3, shard 0/2", 1),
        ("EAGLE3 K=3, shard 1/2", 2),
    ]


def test_a_draft_length_that_nobody_used_makes_no_other_baseline(tmp_path: Path) -> None:
    """What --draft_length was asked for says nothing where nothing is drafted."""
    runs = [run(tmp_path / str(k), 0, config={"draft_length": k}) for k in (3, 5)]
    assert [len(arm.runs) for arm in grouped(runs)] == [2]


def test_labels_say_what_differs_and_nothing_else(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "1", 0, config={"concurrency": 2}),
        run(tmp_path / "2", 3, config={"concurrency": 2}),
        run(tmp_path / "3", 3, config={"concurrency": 8}),
        run(tmp_path / "4", 3, config={"concurrency": 8, "draft_model_dir": "/other/head"}),
        run(
            tmp_path / "5",
            3,
            config={"concurrency": 8, "draft_model_dir": "/other/head", "top_p": 0.5},
        ),
    ]
    assert [arm.label for arm in grouped(runs)] == [
        "baseline, concurrency 2",
        "EAGLE3 K=3, drafter drafter, concurrency 2",
        "EAGLE3 K=3, drafter drafter, concurrency 8",
        "EAGLE3 K=3, drafter head, concurrency 8 (1)",
        "EAGLE3 K=3, drafter head, concurrency 8 (2)",
    ]


def test_a_folder_of_runs_stands_for_all_in_it(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "second", 3, at="04:00")
    run(tmp_path / "runs" / "first", 0, at="03:00")
    run(tmp_path / "runs" / "third", 3, at="05:00")
    base, arm = load_arms([tmp_path / "runs"])
    assert [found.directory.name for found in base.runs] == ["first"]
    assert [found.directory.name for found in arm.runs] == ["second", "third"]
    assert base.series == arm.series == str(tmp_path / "runs")


def test_folders_in_a_folder_are_read_and_each_is_a_series(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        run(tmp_path / "runs" / day / "base", 0)
        run(tmp_path / "runs" / day / "spec", 3)
    run(tmp_path / "runs" / "alone", 3)
    arms = load_arms([tmp_path / "runs"])
    assert [arm.label for arm in arms] == [
        "EAGLE3 K=3, runs",
        "baseline, monday",
        "EAGLE3 K=3, monday",
        "baseline, tuesday",
        "EAGLE3 K=3, tuesday",
    ]
    assert [len(arm.runs) for arm in arms] == [1] * 5


def test_runs_named_one_by_one_are_repeats_unless_two_series_hold_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, 3)
        run(tmp_path / "old" / name, 3)
        run(tmp_path / "new" / name, 3)
    for series in ("old", "new"):
        (tmp_path / series / "sweep.json").write_text("{}")
    names = ("one", "two", "old/one", "old/two", "new/one", "new/two")
    arms = load_arms([tmp_path / name for name in names])
    assert [len(arm.runs) for arm in arms] == [2, 2, 2]
    assert [Path(arm.series).name for arm in arms] == ["", "old", "new"]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        run(tmp_path / parent / "runs" / "one", 3)
    arms = load_arms([tmp_path / parent / "runs" for parent in ("a", "b")])
    assert [arm.label for arm in arms] == [
        f"EAGLE3 K=3, {tmp_path / parent / 'runs'}" for parent in ("a", "b")
    ]


def test_what_holds_no_run_is_refused_and_so_is_a_run_named_twice(tmp_path: Path) -> None:
    run(tmp_path / "runs" / "one")
    with pytest.raises(UserError, match=r"runs/one was named twice: name each run once"):
        load_arms([tmp_path / "runs", tmp_path / "runs" / "one"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no run directory .* and holds none"):
        load_arms([tmp_path / "empty"])
