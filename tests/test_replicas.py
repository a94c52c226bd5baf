"""Replicas under a real mpirun: one run, every conversation once, nothing lost by a failure."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from speedbench import inputs, session, store
from speedbench.cli import main
from speedbench.config import from_dict
from speedbench.replicas import ALONE, AgreedError, Replicas
from speedbench.report.summary import summarize
from speedbench.share import Ended
from speedbench.types import EngineInfo, UserError
from tests.launchers import MPIRUN, NULL, ROOT, clean_environment, mpirun

pytestmark = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python")
FAULTY = "tests/faulty_run.py"
SPECULATIVE = ("--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none")


def asked(directory: Path) -> Counter[str]:
    """How often each conversation has a turn 0 in the stored parts, failed attempts left out."""
    return Counter(
        turn["conversation_id"]
        for turn in store.load(directory).turns.to_pylist()
        if turn["turn"] == 0 and turn["finish_reason"] not in store.FAILED
    )


def slow(path: Path) -> str:
    path.write_text(json.dumps({"engine_args": {"real_time": True, "step_ms": 5, "prefill_ms": 5}}))
    return str(path)


# --- a run of two ---------------------------------------------------------------------------------


def raw(directory: Path) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """All turns and steps, read by nothing of ours."""
    turns, steps = [
        [row for path in sorted((directory / folder).glob("*.parquet"))
         for row in pq.read_table(path).to_pylist()]
        for folder in ("turns", "steps")
    ]  # fmt: skip
    return turns, steps


def test_two_replicas_make_one_run_with_the_throughput_of_both(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = mpirun(2, *NULL, *SPECULATIVE, "--num_requests", "61", "--output_length", "40",
                  "--concurrency", "4", "--save_dir", str(run_dir))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Overall Average") == 1  # one summary, of both
    assert "concurrency 4 in each of 2 replicas" in " ".join(done.stdout.split())
    assert set(asked(run_dir).values()) == {1}
    assert len(asked(run_dir)) == 61
    run = store.load(run_dir)
    assert run.manifest["status"] == "complete"
    assert run.manifest["format"] == store.FORMAT
    sessions = run.manifest["sessions"]
    assert [s["concurrency"] for s in sessions] == [4, 4]
    assert [(s["session"], s["replica"], s["end"]) for s in sessions] == [
        (0, 0, "finished"), (0, 1, "finished"),
    ]  # fmt: skip

    # Each rank measured rows[r::2] of the shuffled order that one process would ask.
    config = from_dict({"engine": "NULL", "dataset": "random", "random_isl": 4, "num_requests": 61})
    order = [row.id for row in inputs.prepare(config).rows]
    turns, steps = raw(run_dir)
    for rank in (0, 1):
        mine = {turn["conversation_id"] for turn in turns if turn["replica"] == rank}
        assert mine == set(order[rank::2])

    # By hand, from the parquet files and the manifest: the clocks are simulated, one per rank, so
    # their common zero is the barrier.
    zero = {s["replica"]: s["met_ns"] for s in sessions}
    assert sessions[0]["clock"] != sessions[1]["clock"]
    n_tokens = sum(step["n_tokens"] for step in steps)
    assert n_tokens == 61 * 40
    start = min(s["started_ns"] - zero[s["replica"]] for s in sessions)
    end = max(s["ended_ns"] - zero[s["replica"]] for s in sessions)
    summary = summarize(run)
    assert summary.output_tps.value == pytest.approx(n_tokens / (end - start) * 1e9, rel=1e-12)
    filled, empty = [], []
    for rank in (0, 1):
        begun = sorted(t["submitted_ns"] - zero[rank] for t in turns if t["replica"] == rank)
        filled.append(begun[3])
        empty.append(begun[-1])
    inside = [
        step["n_tokens"] for step in steps
        if max(filled) < step["time_ns"] - zero[step["replica"]] <= min(empty)
    ]  # fmt: skip
    seconds = (min(empty) - max(filled)) / 1e9
    assert summary.steady_duration_s == pytest.approx(seconds, rel=1e-12)
    assert summary.output_tps_steady.value == pytest.approx(sum(inside) / seconds, rel=1e-12)

    # The engines' own counters are summed.
    parts = [s["counters"] for s in sessions]
    expected = 1 + sum(p["accepted"] for p in parts) / sum(p["drafts"] for p in parts)
    assert summary.lengths["al_engine"].value == pytest.approx(expected, rel=1e-12)
    assert all(p["drafts"] > 0 for p in parts)
    assert [c for c in summary.checks if c.level == "error"] == [
        c for c in summary.checks if "SIMULATED" in c.sentence
    ]


def test_more_replicas_than_rows(tmp_path: Path) -> None:
    done = mpirun(3, *NULL, "--num_requests", "2", "--save_dir", str(tmp_path / "r"),
                  "--output_length", "4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(asked(tmp_path / "r")) == 2


# --- failures -------------------------------------------------------------------------------------

RUN = (*NULL, "--num_requests", "60", "--output_length", "20", "--concurrency", "4")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("1:start", "the engine did not start: RuntimeError: no GPU answers"),
        ("1:refuse", "the engine did not start: the weights are not there"),
        ("1:forget", "the engine did not outlive its warm-up: its GPU is gone"),
        ("1:die:30", "the engine ended"),
        ("0:die:30", "the engine ended"),
        ("1:crash:30", "ZeroDivisionError"),
    ],
)
def test_the_others_finish_when_an_engine_fails_and_a_resumption_completes(
    tmp_path: Path, fault: str, message: str
) -> None:
    run_dir = tmp_path / "run"
    done = mpirun(2, *RUN, "--warmup", "0", "--save_dir", str(run_dir), script=FAULTY,
                  environment={"FAULT": fault})  # fmt: skip
    assert done.returncode == 1, done.stderr
    failed = int(fault[0])
    manifest = store.read_manifest(run_dir)
    ends = {s["replica"]: s["end"] for s in manifest["sessions"]}
    assert ends[1 - failed] == "finished"
    assert ends[failed] in ("engine died", "crashed")
    assert manifest["status"] == "failed"
    assert message in next(s["message"] for s in manifest["sessions"] if s["replica"] == failed)
    run = store.load(run_dir)
    share = Counter(run.columns.replica.tolist())
    assert share[1 - failed] == 30
    assert share[failed] < 30
    summary = summarize(run)
    assert f"replica {failed}" in next(c.sentence for c in summary.checks if message in c.sentence)
    assert summary.output_tps.value is None
    assert f"replica {failed}" in done.stderr

    # Another number of replicas may complete it.
    assert mpirun(3, "--resume", "--save_dir", str(run_dir)).returncode == 0
    assert set(asked(run_dir).values()) == {1}
    assert len(asked(run_dir)) == 60
    run = store.load(run_dir)
    assert run.manifest["status"] == "complete"
    assert {s["session"] for s in run.manifest["sessions"]} == {0, 1}
    assert len(run.columns.conversation_ids) == 60


def test_a_mistake_of_all_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    for arguments, word in (
        (("--engine", "NULL", "--random_isl", "0"), "--random_isl"),
        ((*NULL, "--num_requests", "3", "--max_seq_len", "2"), "exceed"),
    ):
        done = mpirun(2, *arguments, "--save_dir", str(tmp_path / "run"))
        ours = [line for line in done.stderr.splitlines() if line.startswith("run.py:")]
        assert done.returncode == 2, done.stderr
        assert len(ours) == 1
        assert word in ours[0]
        assert not (tmp_path / "run").exists()


def test_all_engines_refusing_is_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "p.yaml"
    bad.write_text("engine_args: {speed: 3}")
    done = mpirun(2, *NULL, "--runtime_params", str(bad), "--save_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if line.startswith("run.py:")]
    assert ours == [line for line in ours if "'speed'" in line]
    assert len(ours) == 1
    assert not (tmp_path / "run").exists()


def test_engines_that_differ_are_refused(tmp_path: Path) -> None:
    done = mpirun(2, *RUN, "--save_dir", str(tmp_path / "run"), script=FAULTY,
                  environment={"FAULT": "1:differ"})  # fmt: skip
    assert done.returncode == 2
    assert "max_num_seqs is 4 in replica 0 and 7 in replica 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_killed_rank_loses_nothing_committed(tmp_path: Path) -> None:
    """mpirun ends all ranks when one is killed: what is on disk is reported, and resumed."""
    run_dir = tmp_path / "run"
    more = (*NULL, "--num_requests", "4000", "--output_length", "20", "--concurrency", "4",
            "--warmup", "0", "--runtime_params", slow(tmp_path / "p.yaml"),
            "--save_dir", str(run_dir))  # fmt: skip
    done = mpirun(2, *more, script=FAULTY, environment={"FAULT": "1:kill:800"})
    assert done.returncode != 0
    kept = asked(run_dir)
    both = store.load(run_dir).columns.replica
    assert set(both.tolist()) == {0, 1}  # both had committed for seconds
    assert set(kept.values()) == {1}
    assert main(["report", str(run_dir)]) == 0
    summary = summarize(store.load(run_dir))
    assert summary.n_conversations == len(kept)
    assert summary.output_tps.value is None
    again = [argument for argument in more if argument != str(tmp_path / "p.yaml")]
    again.remove("--runtime_params")
    done = mpirun(2, *again, "--resume", "--max_duration", "2")
    assert done.returncode == 0, done.stderr
    now = asked(run_dir)
    assert kept.keys() < now.keys()
    assert set(now.values()) == {1}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_to_mpirun_ends_all_replicas_with_their_records(
    tmp_path: Path, number: int, code: int
) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [str(MPIRUN), "-n", "2", "--oversubscribe", sys.executable, str(ROOT / "run.py"), *NULL,
         "--num_requests", "5000", "--output_length", "20", "--concurrency", "4", "--save_dir",
         str(run_dir), "--runtime_params", slow(tmp_path / "p.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list((run_dir / "turns").glob("*.parquet"))) < 2:
        assert time.monotonic() < deadline, "nothing was stored in 60 s"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert len(asked(run_dir)) > 0
    assert set(asked(run_dir).values()) == {1}
    if number == signal.SIGUSR1:  # SIGTERM makes mpirun kill its ranks after a moment
        assert process.returncode == code, err
        manifest = store.read_manifest(run_dir)
        assert manifest["status"] == "partial"
        assert [s["end"] for s in manifest["sessions"]] == ["stopped", "stopped"]
        assert all(s["n_uncommitted"] in (0, 4) for s in manifest["sessions"])
        assert "--resume" in err


# --- the gathering itself -------------------------------------------------------------------------

SCRIPT = """
import sys
from speedbench.launch import of_environment
from speedbench.replicas import AgreedError, join
import os
crew = join(of_environment(os.environ))
def fail_on_last():
    if crew.rank == crew.size - 1:
        raise ValueError("odd")
    return crew.rank
assert crew.exchange(crew.rank ** 2) == [r ** 2 for r in range(crew.size)]
big = bytes([crew.rank]) * 3_000_000
assert [part[:1] for part in crew.exchange(big)] == [bytes([r]) for r in range(crew.size)]
assert crew.from_first(lambda: ("made by", crew.rank)) == ("made by", 0)
try:
    crew.agree(fail_on_last)
except AgreedError as error:
    assert str(error) == f"replica {crew.size - 1}: ValueError: odd", error
else:
    raise AssertionError("no error")
crew.meet()
import time
spent = time.process_time()
if crew.rank == 0:
    time.sleep(2)  # the others wait
crew.exchange(None)
spent = time.process_time() - spent
assert spent < 0.5, f"rank {crew.rank} worked {spent:.2f} s while waiting"
print("fine", crew.rank, crew.size, flush=True)
crew.leave()
"""


def test_exchange_agree_and_wait_without_spinning(tmp_path: Path) -> None:
    """The CPU time of a wait is bounded, not its wall time: a spinning wait would use 2 s of it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [str(MPIRUN), "-n", "3", "--oversubscribe", sys.executable, str(tmp_path / "script.py")],
        capture_output=True, text=True, check=False, timeout=100, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("fine")) == [
        "fine 0 3", "fine 1 3", "fine 2 3",
    ]  # fmt: skip


def test_alone_needs_no_mpi() -> None:
    code = (
        "import sys\nfrom speedbench.launch import Launch\n"
        "from speedbench.replicas import ALONE, join\n"
        "assert join(Launch('mpirun', 0, 1, 0, 1)) is ALONE\n"
        "assert ALONE.exchange(3) == [3] and ALONE.agree(lambda: 4) == 4\n"
        "assert 'mpi4py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=clean_environment())


def test_processes_that_mpi_does_not_see_together_are_refused(tmp_path: Path) -> None:
    """As under srun without --mpi=pmix: two tasks, each of which MPI takes for one alone."""
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *NULL, "--save_dir", str(tmp_path / "run")],
        capture_output=True, text=True, check=False, timeout=100, env=clean_environment(**task),
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "srun started 2 processes, MPI sees 1" in line
    assert "--mpi=pmix" in line
    assert not (tmp_path / "run").exists()


def test_an_engine_with_ranks_of_its_own_is_no_replica(tmp_path: Path) -> None:
    done = mpirun(2, "--engine", "TRTLLM", "--model_dir", "m", "--save_dir", str(tmp_path / "r"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("run.py:")]
    assert "--shard" in line
    assert "--merge" in line


def test_infos_that_differ_name_the_field() -> None:
    info = EngineInfo("E", "1", 3, 100, 8, False, settings={"a": (1, 2)})
    assert session._one_engine([None, info, info]) is info
    with pytest.raises(AgreedError, match="version is '1' in replica 1 and '2' in replica 2"):
        session._one_engine([None, info, replace(info, version="2")])


def test_of_replicas_the_worst_end_and_status_count() -> None:
    from speedbench.loop import LoopEnd

    def ended(reason: str, not_stored: str = "") -> Ended:
        end = LoopEnd(reason, f"it {reason}", 0, 1, 0, 0, 0)  # type: ignore[arg-type]
        return Ended(end, 5, 4, 1, {}, not_stored)

    for reasons, status in (
        (("finished", "finished"), "complete"),
        (("finished", "stopped"), "partial"),
        (("stopped", "engine died"), "failed"),
        (("crashed", "finished"), "failed"),
    ):
        assert session._status([ended(r) for r in reasons]) == status
    outcome = session._outcome([ended("finished"), ended("stopped"), ended("engine died")])
    assert outcome.end.message == "replica 2: it engine died"
    assert (outcome.n_rows, outcome.n_committed, outcome.n_failed) == (15, 12, 3)
    assert session._status([ended("finished", "disk full")]) == "failed"
    with pytest.raises(UserError, match="replica 1: disk full"):
        session._raise_not_stored([ended("finished"), ended("finished", "disk full")])


def test_replicas_write_parts_of_their_own(tmp_path: Path) -> None:
    """Kill-proof by construction: no two writers ever use one name, whatever the interleaving."""
    from tests.builders import conversation, manifest, write_part
    from tests.builders import session as entry

    directory = tmp_path / "run"
    store.create(directory)
    entries = [entry(n, replica=r) for n in (0, 1) for r in range(3)]
    store.write_manifest(directory, manifest(expected={"cat": 30}, sessions=entries))
    draw = random.Random(3)
    names = [f"c{i}" for i in range(30)]
    for name in names:
        write_part(directory, [conversation(name, "cat", [1, 2])], draw.randrange(2),
                   draw.randrange(3))  # fmt: skip
    assert len(list((directory / "turns").glob("*.parquet"))) == 30
    run = store.load(directory)
    assert sorted(run.columns.conversation_ids) == sorted(names)
    assert store.committed(directory) == dict.fromkeys(names, True)
    assert np.unique(run.columns.replica).tolist() == [0, 1, 2]


def test_a_resumption_meets_no_replica_that_still_writes(tmp_path: Path) -> None:
    store.create(tmp_path / "run")
    held = store.locked(tmp_path / "run", 2)
    refused = pytest.raises(UserError, match=f"being written by process {os.getpid()}")
    with held, refused, store.locked(tmp_path / "run"):
        pass
    with store.locked(tmp_path / "run"), store.locked(tmp_path / "run", 2):
        pass


def test_one_replica_is_itself() -> None:
    assert (ALONE.rank, ALONE.size, ALONE.is_first) == (0, 1, True)
    assert Replicas().from_first(lambda: 5) == 5
