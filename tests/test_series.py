"""Folders of runs, measured by real processes on the null engine: killed, faulty, grown."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from speedbench import inputs, series, store
from speedbench.cli import main
from speedbench.config import RunConfig
from tests.launchers import MPIRUN, ROOT, clean_environment, mpirun

NULL = ("--engine", "NULL", "--random_isl", "4")
DRAFTS = ("--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none")
SMALL = (*NULL, *DRAFTS, "--num_requests", "12", "--output_length", "10", "--warmup", "2")


def conversations(directory: Path) -> Counter[str]:
    """How often each conversation has a turn 0 in the stored parts, failed attempts left out."""
    return Counter(
        turn["conversation_id"]
        for turn in store.load(directory).turns.to_pylist()
        if turn["turn"] == 0 and turn["finish_reason"] not in store.FAILED
    )


def runs_in(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob("*/manifest.json"))


def slow(path: Path, step_ms: float = 5) -> str:
    arguments = {"real_time": True, "step_ms": step_ms, "prefill_ms": step_ms}
    path.write_text(json.dumps({"engine_args": arguments}))  # JSON is YAML
    return str(path)


def counted(
    starts: Path, *arguments: str, fault: str = "-1:", code: int | None = 0
) -> tuple[list[str], str]:
    """Run a command on the counting engine: what that wrote down, and stderr."""
    starts.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "counting_run.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=300,
        env=clean_environment(STARTS=str(starts), FAULT=fault),
    )  # fmt: skip
    assert code is None or done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return starts.read_text().splitlines() if starts.exists() else [], done.stderr


# --- two arms -------------------------------------------------------------------------------------


def test_two_arms_in_one_command_are_interleaved_on_engines_of_their_own(tmp_path: Path) -> None:
    d = tmp_path / "d"
    log, err = counted(
        tmp_path / "log", "run", *SMALL, "--concurrency", "4", "--baseline", "--repeat", "2",
        "--save_dir", str(d),
    )  # fmt: skip
    base = ["start k=0 slots=4", "forget", "close"]
    spec = ["start k=3 slots=4", "forget", "close"]
    assert log == [*base, *spec, *spec, *base]
    names = ["baseline-1", "baseline-2", "speculative-1", "speculative-2"]
    assert runs_in(d) == names
    manifests = {name: store.read_manifest(d / name) for name in names}
    for name, manifest in manifests.items():
        assert manifest["status"] == "complete"
        assert set(conversations(d / name).values()) == {1}
        assert len(conversations(d / name)) == 12
        assert manifest["config"]["save_dir"] == str(d / name)
    assert len({m["prompts"]["fingerprint"] for m in manifests.values()}) == 1
    different = {
        field
        for field in manifests["baseline-1"]["config"]
        if manifests["baseline-1"]["config"][field] != manifests["speculative-1"]["config"][field]
    }
    assert different == {"speculative_algorithm", "draft_model_dir", "save_dir"}
    assert "several turns" not in err  # random prompts have one
    # Nothing is left to do.
    log, err = counted(tmp_path / "log", "run", "--save_dir", str(d), "--resume")
    assert log == []
    # A third round: the rounds go on to and fro.
    log, _ = counted(
        tmp_path / "log", "run", *SMALL, "--concurrency", "4", "--baseline", "--repeat", "3",
        "--save_dir", str(d), "--resume",
    )  # fmt: skip
    assert log == [*base, *spec]
    assert len(runs_in(d)) == 6


def test_repeats_of_one_arm(tmp_path: Path) -> None:
    log, _ = counted(
        tmp_path / "log", "run", *SMALL, "--repeat", "3", "--save_dir", str(tmp_path / "d")
    )
    assert [line for line in log if line.startswith("start")] == ["start k=3 slots=1"] * 3
    assert runs_in(tmp_path / "d") == [f"speculative-{i}" for i in (1, 2, 3)]


def test_live_history_is_hinted_at_once(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "--engine", "NULL", "--tokenizer", str(models / "bpe" / "target"), *DRAFTS,
           "--dataset", "mini", "--num_requests", "11", "--output_length", "3", "--repeat", "2",
           "--save_dir"]  # fmt: skip
    assert main([*run, str(tmp_path / "a"), "--baseline"]) == 0
    assert capsys.readouterr().err.count("--history frozen") == 1
    assert main([*run, str(tmp_path / "b")]) == 0  # one arm
    assert "--history frozen" not in capsys.readouterr().err


def test_an_engine_that_dies_loses_neither_its_records_nor_the_other_runs(tmp_path: Path) -> None:
    d = tmp_path / "d"
    log, err = counted(
        tmp_path / "log", "run", *SMALL, "--baseline", "--repeat", "2", "--save_dir", str(d),
        fault="3:40", code=1,
    )  # fmt: skip
    assert [line for line in log if line.startswith("start")] == [
        f"start k={k} slots=1" for k in (0, 3, 3, 0)
    ]
    assert {n: store.read_manifest(d / n)["status"] for n in runs_in(d)} == {
        "baseline-1": "complete", "baseline-2": "complete",
        "speculative-1": "failed", "speculative-2": "failed",
    }  # fmt: skip
    assert "its GPU fell off the bus" in err
    before = conversations(d / "speculative-1")
    assert 0 < len(before) < 12
    log, _ = counted(tmp_path / "log", "run", "--save_dir", str(d), "--resume")
    assert [line for line in log if line.startswith("start")] == ["start k=3 slots=1"] * 2
    for name in runs_in(d):
        assert set(conversations(d / name).values()) == {1}
        assert len(conversations(d / name)) == 12


@pytest.mark.parametrize(
    ("arguments", "fault", "word"),
    [
        (("--baseline",), "3:start", "no memory for so many drafts"),
        (("--baseline", "--max_seq_len", "3"), "-1:", "exceed the engine's limit"),
    ],
)
def test_a_mistake_ends_a_series_with_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], fault: str, word: str
) -> None:
    _, err = counted(
        tmp_path / "log", "run", *SMALL, *arguments, "--repeat", "2", "--save_dir",
        str(tmp_path / "d"), fault=fault, code=2,
    )  # fmt: skip
    assert word in err.splitlines()[-1]
    if fault == "3:start":
        assert runs_in(tmp_path / "d") == ["baseline-1"]
    else:
        assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*NULL, "--baseline"), ["--speculative_algorithm"]),
        ((*NULL, "--repeat", "0"), ["--repeat", "0"]),
        ((*NULL, "--repeat", "two"), ["--repeat", "two"]),
        ((*NULL, "--max_num_seqs", "2", "--concurrency", "3"), ["--max_num_seqs", "2", "3"]),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["run", *arguments, "--save_dir", str(tmp_path / "d")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "d").exists()


def test_what_is_there_is_neither_written_over_nor_taken_for_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, arms, grid = (str(tmp_path / name) for name in ("one", "arms", "grid"))
    sweep = ["sweep", *SMALL, "--grid", "concurrency=1,2"]
    assert main(["run", *SMALL, "--save_dir", one]) == 0
    assert main(["run", *SMALL, "--baseline", "--save_dir", arms]) == 0
    assert main([*sweep, "--save_dir", grid]) == 0
    for command, word in (
        (["run", *SMALL, "--baseline", "--save_dir", arms], "--resume"),
        ([*sweep, "--save_dir", grid], "--resume"),
        (["run", *SMALL, "--baseline", "--save_dir", one, "--resume"], "one run, not a series"),
        (["run", "--save_dir", grid, "--resume"], "holds a sweep"),
        (["sweep", "--save_dir", arms, "--resume"], "arms of one run"),
        (["sweep", "--save_dir", one, "--resume"], "no sweep"),
        (["run", "--save_dir", arms, "--resume", "--output_length", "11"], "--output_length"),
        (["sweep", "--save_dir", grid, "--resume", "--output_length", "11"], "--output_length"),
    ):
        capsys.readouterr()
        assert main(command) == 2, command
        assert word in capsys.readouterr().err.strip().splitlines()[-1]


def test_further_nodes_cannot_follow_a_series(tmp_path: Path) -> None:
    node = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
            "SPEEDBENCH_HEAD": "localhost:29999"}  # fmt: skip
    for command in (("run", *SMALL, "--baseline"), ("sweep", *SMALL)):
        for rank in "01":
            done = subprocess.run(
                [sys.executable, "-m", "speedbench", *command, "--save_dir", str(tmp_path / "d")],
                capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
                env=clean_environment(**{**node, "SLURM_PROCID": rank}),
            )  # fmt: skip
            assert done.returncode == 2, done.stderr
            assert "further nodes" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python")
def test_replicas_measure_every_run_together(tmp_path: Path) -> None:
    d = tmp_path / "d"
    done = mpirun(2, *SMALL, "--concurrency", "2", "--baseline", "--repeat", "2", "--save_dir",
                  str(d))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(runs_in(d)) == 4
    for name in runs_in(d):
        assert set(conversations(d / name).values()) == {1}
        assert len(conversations(d / name)) == 12
        sessions = store.read_manifest(d / name)["sessions"]
        assert [s["replica"] for s in sessions] == [0, 1]
    assert done.stderr.count("4/4 baseline-2") == 1  # said once
    # An engine that fails on one replica: the series goes on, and says so at the end.
    done = mpirun(2, *SMALL, "--repeat", "2", "--save_dir", str(tmp_path / "e"), "--warmup", "0",
                  script="tests/faulty_run.py", environment={"FAULT": "1:die:3"})  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert runs_in(tmp_path / "e") == ["speculative-1", "speculative-2"]
    assert mpirun(2, "--resume", "--save_dir", str(tmp_path / "e")).returncode == 0
    for name in runs_in(tmp_path / "e"):
        assert set(conversations(tmp_path / "e" / name).values()) == {1}
        assert len(conversations(tmp_path / "e" / name)) == 12


# --- sweeps ---------------------------------------------------------------------------------------

GRID = ("--grid", "draft_length=1,3", "--grid", "concurrency=1,4", "--baseline")


def test_a_sweep_starts_one_engine_per_engine_configuration(tmp_path: Path) -> None:
    d = tmp_path / "d"
    log, err = counted(
        tmp_path / "log", "sweep", *SMALL, *GRID, "--grid", "temperature=0,1", "--save_dir", str(d)
    )
    assert log == [
        line for k in (0, 1, 3) for line in (f"start k={k} slots=4", *["forget"] * 4, "close")
    ]  # every cell's warm-up is forgotten
    assert "12 cell(s), 12 run(s); 3 engine start(s)" in err.splitlines()[0]
    assert len(runs_in(d)) == 12
    for name in runs_in(d):
        manifest = store.read_manifest(d / name)
        assert manifest["engine"]["max_num_seqs"] == 4
        assert len(conversations(d / name)) == 12
        k, c = manifest["engine"]["draft_length"], manifest["config"]["concurrency"]
        label = f"draft_target-k{k}" if k else "baseline"
        assert name == f"{label}-c{c}-t{manifest['config']['temperature']:g}"
        assert manifest["sessions"][0]["concurrency"] == c
        # Steps are those of this cell alone, and no more requests were in flight than asked for.
        columns = store.load(d / name).columns
        assert int(columns.n_tokens.sum()) == 12 * 10
        assert int(columns.n_tokens.max()) <= k + 1


def test_repeats_of_a_sweep_and_its_growth(tmp_path: Path) -> None:
    d = tmp_path / "d"
    log, _ = counted(
        tmp_path / "log", "sweep", *SMALL, *GRID, "--repeat", "2", "--save_dir", str(d)
    )
    starts = [line.split()[1] for line in log if line.startswith("start")]
    assert starts == [f"k={k}" for k in (0, 1, 3, 3, 1, 0)]
    assert len(runs_in(d)) == 12
    assert "draft_target-k1-c4-run2" in runs_in(d)
    before = {name: (d / name / "manifest.json").read_bytes() for name in runs_in(d)}
    log, err = counted(
        tmp_path / "log", "sweep", "--save_dir", str(d), "--resume", "--grid", "draft_length=1,3,5"
    )
    assert [line for line in log if line.startswith("start")] == ["start k=5 slots=4"] * 2
    assert "16 run(s), of which 12 are complete; 2 engine start(s)" in err
    assert len(runs_in(d)) == 16
    assert before == {name: (d / name / "manifest.json").read_bytes() for name in before}


def test_what_was_damaged_in_a_complete_run_is_measured_again_and_nothing_else(
    tmp_path: Path,
) -> None:
    d = tmp_path / "d"
    command = ("sweep", *SMALL, "--grid", "concurrency=1,4", "--save_dir", str(d))
    counted(tmp_path / "log", *command)
    run = d / "draft_target-k3-c4"
    rows = store.load(run).turns
    for folder in ("turns", "steps"):  # in two parts, the second of which a disk garbles
        table = pq.read_table(run / folder / "00000.parquet")
        second = pc.is_in(table["request_id"], rows["request_id"].slice(7).combine_chunks())
        pq.write_table(table.filter(pc.invert(second)), run / folder / "00000.parquet")
        pq.write_table(table.filter(second), run / folder / "00001.parquet")
    log, _ = counted(tmp_path / "log", *command, "--resume")
    assert log == []
    (run / "turns/00001.parquet").write_bytes(b"PAR1")
    log, err = counted(tmp_path / "log", *command, "--resume")
    assert "of which 1 are complete" in err
    assert "draft_target-k3-c4: 5 of 5 conversations" in err
    assert set(conversations(run).values()) == {1}
    assert len(conversations(run)) == 12


def test_empty_folders_that_a_copy_left_out_are_made_again(tmp_path: Path) -> None:
    """As an object store does: a run that was killed before its first part."""
    d = tmp_path / "d"
    command = ("sweep", *SMALL, "--save_dir", str(d))
    counted(tmp_path / "log", *command)
    run = d / "draft_target-k3-c1"
    for folder in ("turns", "steps"):
        (run / folder / "00000.parquet").unlink()
        (run / folder).rmdir()
    counted(tmp_path / "log", *command, "--resume")
    assert len(conversations(run)) == 12


def test_what_could_not_be_measured_may_be_mended_and_what_was_may_not(tmp_path: Path) -> None:
    d, wrong, right = tmp_path / "d", tmp_path / "wrong.yaml", tmp_path / "right.yaml"
    wrong.write_text("engine_args: {acceptance: 7}")
    right.write_text("engine_args: {acceptance: 0.7}")
    command = ("sweep", *SMALL, "--grid", "concurrency=1,4", "--save_dir", str(d))
    _, err = counted(tmp_path / "log", *command, "--runtime_params", str(wrong), code=1)
    assert "2 run(s) could not be measured" in err
    counted(tmp_path / "log", *command, "--resume", "--runtime_params", str(right))
    assert len(runs_in(d)) == 2
    kept = series.read(d)
    assert kept is not None
    assert kept.not_measured == {}
    assert {cell.config.engine_args["acceptance"] for cell in kept.cells} == {0.7}
    _, err = counted(tmp_path / "log", *command, "--resume", "--runtime_params", str(wrong), code=2)
    assert "was measured with --engine_args" in err


def test_a_run_without_its_manifest_is_neither_measured_into_nor_in_the_others_way(
    tmp_path: Path,
) -> None:
    d = tmp_path / "d"
    command = ("sweep", *SMALL, "--grid", "draft_length=1,3", "--save_dir", str(d))
    counted(tmp_path / "log", *command)
    run = d / "draft_target-k1-c1"
    (run / "manifest.json").unlink()
    parts = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    log, err = counted(tmp_path / "log", *command, "--resume", code=1)
    assert log == []  # no engine is started for it
    assert "holds something, but no manifest.json" in err
    assert parts == {path: path.read_bytes() for path in run.rglob("*.parquet")}


@pytest.mark.parametrize("command", ["sweep", "run"])
def test_what_a_killed_beginning_leaves_is_in_nobodys_way(command: str, tmp_path: Path) -> None:
    d = tmp_path / "d"
    d.mkdir()
    for name in (".lock", ".sweep.json.tmp"):
        (d / name).touch()
    counted(tmp_path / "log", command, *SMALL, "--repeat", "2", "--save_dir", str(d))
    assert len(runs_in(d)) == 2


def test_prompts_are_encoded_once_for_all_cells_that_ask_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int | None] = []
    prepare = inputs.prepare

    def counting(config: RunConfig) -> inputs.Prepared:
        made.append(config.random_isl)
        return prepare(config)

    monkeypatch.setattr(inputs, "prepare", counting)
    command = ["sweep", *SMALL, *GRID, "--grid", "random_isl=4,9", "--grid", "temperature=0,1"]
    assert main([*command, "--save_dir", str(tmp_path / "d")]) == 0
    assert sorted(made) == [4, 9]
    assert len(runs_in(tmp_path / "d")) == 24
    lengths = {
        (name.partition("isl")[2].partition("-")[0], turn["n_prompt_tokens"])
        for name in runs_in(tmp_path / "d")
        for turn in store.load(tmp_path / "d" / name).turns.to_pylist()
    }
    assert lengths == {("4", 4), ("9", 9)}


def test_a_dry_run_lists_what_would_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    d = tmp_path / "d"
    assert main(["sweep", *SMALL, *GRID, "--dry_run", "--save_dir", str(d)]) == 0
    out = capsys.readouterr().out
    assert out.count("engine start ") == 3
    assert "6 cell(s), 6 run(s); 3 engine start(s) to come" in out
    assert not d.exists()


def test_cells_that_cannot_be_measured_are_told_and_stored_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    """An algorithm that the engine lacks, prompts over its limit, an engine that does not start,
    one that dies under the third cell: four reasons, and every other cell is complete."""
    d = tmp_path / "d"
    yaml = tmp_path / "s.yaml"
    yaml.write_text(json.dumps({
        "base": {"engine": "NULL", "random_isl": 4, "num_requests": 12, "output_length": 10,
                 "warmup": 0, "max_seq_len": 50, "speculative_algorithm": "DRAFT_TARGET",
                 "draft_model_dir": "none"},
        "grid": {"draft_length": [1, 3, 5], "concurrency": [1, 2]},
        "cells": [{"speculative_algorithm": "NGRAM"}, {"random_isl": 99, "draft_length": 1}],
        "baseline": True,
    }))  # fmt: skip
    command = ("sweep", "--config", str(yaml), "--save_dir", str(d))
    log, err = counted(tmp_path / "log", *command, fault="3:start", code=1)
    complete = {"baseline-c1", "baseline-c2", "draft_target-k1-c1", "draft_target-k1-c2",
                "draft_target-k5-c1", "draft_target-k5-c2"}  # fmt: skip
    assert set(runs_in(d)) == complete
    told = json.loads((d / "sweep.json").read_text())["not_measured"]
    refused = {name: why for name, why in told.items() if name not in complete}
    assert refused == told
    assert "does not support --speculative_algorithm NGRAM" in told["ngram-k3-c1"]
    assert "no memory" in told["draft_target-k3-c1"]
    assert told["draft_target-k3-c1"] == told["draft_target-k3-c2"]  # not tried twice
    assert "exceed the engine's limit of 50" in told["draft_target-k1-c1-isl99"]
    assert "exceed" in told["baseline-c1-isl99"]
    for why in told.values():
        assert why in err
    assert [line for line in log if line.startswith("start")] == [
        f"start k={k} slots=2" for k in (0, 1, 5)
    ]
    # The cause is gone: only what was missing is measured, and no longer told.
    log, _ = counted(tmp_path / "log", *command, "--resume", code=1)
    starts = [line for line in log if line.startswith("start")]
    assert starts == ["start k=0 slots=2", "start k=1 slots=2", "start k=3 slots=2"]
    assert {"draft_target-k3-c1", "draft_target-k3-c2"} <= set(runs_in(d))
    told = json.loads((d / "sweep.json").read_text())["not_measured"]
    assert set(told) == {"ngram-k3-c1", "draft_target-k1-c1-isl99", "baseline-c1-isl99"}


def test_an_engine_that_dies_is_started_again_for_the_next_cell(tmp_path: Path) -> None:
    d = tmp_path / "d"
    command = ("sweep", *SMALL, "--grid", "concurrency=1,2,4", "--save_dir", str(d))
    log, err = counted(tmp_path / "log", *command, "--warmup", "0", fault="3:60", code=1)
    starts = [line for line in log if line.startswith("start")]
    assert len(starts) >= 2
    assert log.count("close") == len(starts)
    statuses = [store.read_manifest(d / f"draft_target-k3-c{c}")["status"] for c in (1, 2, 4)]
    assert "failed" in statuses
    assert "its GPU fell off the bus" in err
    log, _ = counted(tmp_path / "log", *command, "--warmup", "0", "--resume")
    assert len([line for line in log if line.startswith("start")]) == 1
    for name in runs_in(d):
        assert set(conversations(d / name).values()) == {1}
        assert len(conversations(d / name)) == 12


def test_a_cell_in_which_nothing_was_measured_hides_no_other(tmp_path: Path) -> None:
    d = tmp_path / "d"
    command = ("sweep", *SMALL, *GRID, "--warmup", "0", "--save_dir", str(d))
    _, err = counted(tmp_path / "log", *command, fault="1:1", code=1)
    assert len(runs_in(d)) == 6
    assert {name: len(conversations(d / name)) for name in runs_in(d)} == {
        f"{arm}-c{c}": 0 if arm[-1] == "1" else 12
        for arm in ("baseline", "draft_target-k1", "draft_target-k3")
        for c in (1, 4)
    }
    assert "0 run(s) could not be measured and 2 failed" in err
    counted(tmp_path / "log", *command, "--resume")
    assert {len(conversations(d / name)) for name in runs_in(d)} == {12}


def test_an_unforeseen_end_of_a_start_concerns_its_cells_alone(tmp_path: Path) -> None:
    d = tmp_path / "d"
    _, err = counted(tmp_path / "log", "sweep", *SMALL, *GRID, "--save_dir", str(d),
                     fault="1:raise", code=1)  # fmt: skip
    assert "RuntimeError: CUDA is gone" in err
    assert runs_in(d) == sorted(
        f"{arm}-c{c}" for arm in ("baseline", "draft_target-k3") for c in (1, 4)
    )


def kill_until_done(
    command: list[str], directory: Path, moments: random.Random, numbers: list[signal.Signals]
) -> tuple[int, int]:
    """Kill and resume until it ends by itself: how often it was killed, and its last exit code.
    What was committed once must never be missing."""
    kept: set[tuple[str, str]] = set()
    n_kills = 0
    while True:
        resume = ["--resume"] if (directory / "sweep.json").exists() else []
        process = subprocess.Popen(
            [*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=clean_environment(),
        )  # fmt: skip
        try:
            _, err = process.communicate(timeout=moments.uniform(0.7, 2.2) if n_kills < 12 else 120)
        except subprocess.TimeoutExpired:
            process.send_signal(numbers[n_kills % len(numbers)])
            _, err = process.communicate(timeout=60)
            n_kills += 1
        assert "Traceback" not in err, err
        now = {
            (name, conversation)
            for name in runs_in(directory)
            for conversation in conversations(directory / name)
        }
        assert kept <= now, "a committed conversation was lost"
        kept = now
        if process.returncode in (0, 1, 2):
            return n_kills, process.returncode


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGINT, signal.SIGTERM]])
@pytest.mark.parametrize("what", ["sweep", "series"])
def test_kills_between_and_inside_runs_lose_nothing_and_double_nothing(
    tmp_path: Path, what: str, numbers: list[signal.Signals]
) -> None:
    d = tmp_path / "d"
    arguments = [*NULL, *DRAFTS, "--num_requests", "60", "--output_length", "40", "--warmup", "0",
                 "--concurrency", "4", "--runtime_params", slow(tmp_path / "p.yaml", 4),
                 "--baseline", "--save_dir", str(d)]  # fmt: skip
    if what == "sweep":
        arguments += ["--grid", "draft_length=1,3", "--grid", "concurrency=4,8"]
    else:
        arguments += ["--repeat", "2"]
    command = "sweep" if what == "sweep" else "run"
    n_kills, code = kill_until_done(
        [sys.executable, "-m", "speedbench", command, *arguments], d,
        random.Random(len(numbers) + len(what)), numbers,
    )  # fmt: skip
    assert code == 0
    assert n_kills >= 3, "it ended before it was killed often enough to mean anything"
    names = runs_in(d)
    assert len(names) == (6 if what == "sweep" else 4)
    for name in names:
        run = store.load(d / name)
        assert run.manifest["status"] == "complete"
        assert set(conversations(d / name).values()) == {1}
        assert len(run.columns.conversation_ids) == 60
        assert int(run.columns.n_tokens.sum()) == 60 * 40
        k = run.manifest["engine"]["draft_length"]
        assert int(run.columns.n_tokens.max()) <= k + 1


def test_the_first_ctrl_c_ends_the_run_and_the_series_in_order(tmp_path: Path) -> None:
    d = tmp_path / "d"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *NULL, *DRAFTS, "--num_requests", "2000",
         "--output_length", "20", "--baseline", "--runtime_params", slow(tmp_path / "p.yaml"),
         "--save_dir", str(d)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(d.glob("*/turns/*.parquet"))) < 2:
        assert time.monotonic() < deadline, "nothing was stored in 60 s"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert runs_in(d) == ["baseline-1"]
    manifest = store.read_manifest(d / "baseline-1")
    assert (manifest["status"], manifest["sessions"][0]["end"]) == ("partial", "stopped")
    assert "--resume" in err


def test_max_duration_bounds_all_runs_together(tmp_path: Path) -> None:
    d = tmp_path / "d"
    command = ["run", *NULL, *DRAFTS, "--num_requests", "2000", "--output_length", "20",
               "--baseline", "--save_dir", str(d), "--runtime_params",
               slow(tmp_path / "p.yaml")]  # fmt: skip
    _, err = counted(tmp_path / "log", *command, "--max_duration", "1s")
    assert runs_in(d) == ["baseline-1"]
    assert store.read_manifest(d / "baseline-1")["status"] == "partial"
    assert "--max_duration" in err.splitlines()[-1]


def test_two_processes_do_not_measure_one_folder(tmp_path: Path) -> None:
    d = tmp_path / "d"
    command = [sys.executable, "-m", "speedbench", "sweep", *NULL, *DRAFTS, "--num_requests", "999",
               "--output_length", "20", "--grid", "draft_length=1,3", "--runtime_params",
               slow(tmp_path / "p.yaml"), "--save_dir", str(d)]  # fmt: skip
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=clean_environment())
    try:
        deadline = time.monotonic() + 60
        while not runs_in(d):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(
            [*command, "--resume"], capture_output=True, text=True, check=False, timeout=60,
            env=clean_environment(),
        )  # fmt: skip
    finally:
        first.send_signal(signal.SIGINT)
        first.wait(60)
    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr.splitlines()[-1]
