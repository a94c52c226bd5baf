"""The job scripts, run against a stand-in for Slurm's commands; shellcheck over every script."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedbench import store
from tests.launchers import ROOT, clean_environment

SLURM = ROOT / "scripts" / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))
QUICK = ("--random_isl", "4", "--num_requests", "6", "--output_length", "5")
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


class Job:
    """A job in a scratch folder; `log` is what was asked of srun and scontrol, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log_file = folder / "slurm.log"
        self.log_file.touch()

    def environment(self, **more: str) -> dict[str, str]:
        fake = ROOT / "tests" / "fake_slurm"
        return clean_environment(
            PATH=os.pathsep.join([str(fake), os.environ["PATH"]]),
            FAKE_SLURM_LOG=str(self.log_file),
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID="77",
            SLURM_JOB_NUM_NODES="1",
            SLURM_JOB_NODELIST="localhost,there",
            RUN_DIR=str(self.folder / "run"),
            RUN=f"{sys.executable} run.py",
            MEET=str(self.folder),
            **more,
        )

    def command(self, script: str, *words: str) -> list[str]:
        return ["bash", str(SLURM / script), *words]

    def run(self, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, *words), capture_output=True, text=True, check=False,
            timeout=120, env={**self.environment(), **more},
        )  # fmt: skip

    @property
    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def free_port() -> int:
    """A port that is free, as is (nearly always) the next one."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def with_null(script: str, folder: Path) -> str:
    """A copy of a script that asks for the null engine."""
    text = (SLURM / script).read_text()
    changed = re.sub(r"--engine (VLLM|SGLANG|TRTLLM)( )", r"--engine NULL\2", text)
    assert changed != text
    (folder / script).write_text(changed)
    return str(folder / script)


# --- one run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["vllm.sbatch", "sglang.sbatch", "trtllm.sbatch"])
def test_a_job_measures_one_run(script: str, job: Job) -> None:
    done = job.run(with_null(script, job.folder), *QUICK, SLURM_NTASKS_PER_NODE="2")
    assert done.returncode == 0, done.stderr
    run = store.load(job.folder / "run")
    assert run.manifest["status"] == "complete"
    assert len(run.columns.conversation_ids) == 6
    assert done.stdout.count("Acceptance Rate Results") == 1  # of all tasks one measures
    (asked,) = job.log
    options = asked["srun"]
    assert isinstance(options, list)
    assert "--cpu-bind=none" in options
    assert ("--mpi=pmix" in options) == (script == "trtllm.sbatch")
    assert not any("container" in option for option in options)


@pytest.mark.parametrize("script", ["vllm.sbatch", "sglang.sbatch"])
def test_over_two_nodes_the_first_measures_and_all_end_well(script: str, job: Job) -> None:
    words, port = (*QUICK, "--tp_size", "16"), free_port()
    done = job.run(
        with_null(script, job.folder), *words, SLURM_JOB_NUM_NODES="2", PORT=str(port),
        RUN=f"{sys.executable} tests/node_run.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        place = json.loads((job.folder / f"node-{rank}.json").read_text())
        assert place == {"nnodes": 2, "node_rank": rank, "dist_init_addr": f"localhost:{port}"}
    worker = Path("/proc", (job.folder / "worker").read_text(), "cmdline")
    assert not worker.exists() or b"sleep" not in worker.read_bytes()  # ended with the first node
    manifest = store.read_manifest(job.folder / "run")
    assert manifest["status"] == "complete"
    # Another job on other nodes may resume it: where they meet is no part of the configuration.
    assert "localhost" not in json.dumps(manifest["config"])
    assert len(store.load(job.folder / "run").columns.conversation_ids) == 6


def test_a_node_that_fails_ends_the_job(job: Job) -> None:
    """The first node's engine would wait for it for ever."""
    done = job.run(
        with_null("sglang.sbatch", job.folder), *QUICK, SLURM_JOB_NUM_NODES="2", FAILING_NODE="1",
        PORT=str(free_port()),
        RUN=f"{sys.executable} tests/node_run.py",
    )  # fmt: skip
    assert done.returncode != 0
    assert "this node has no GPU" in done.stderr
    assert not (job.folder / "run").exists()


def test_a_container_is_given_to_the_step(job: Job) -> None:
    job.run(
        with_null("vllm.sbatch", job.folder), *QUICK, CONTAINER="nvcr.io/x:1", MOUNTS="/a:/b,/c:/c",
    )  # fmt: skip
    options = job.log[0]["srun"]
    assert isinstance(options, list)
    assert "--container-image=nvcr.io/x:1" in options
    assert "--container-mounts=/a:/b,/c:/c" in options
    assert f"--container-workdir={ROOT}" in options


def test_words_with_blanks_reach_run_py_where_they_can(job: Job) -> None:
    done = job.run(with_null("vllm.sbatch", job.folder), *QUICK, "--category", "a b")
    assert "a b" in done.stderr  # understood as one word, and refused as a category
    job = Job(job.folder)
    job.log_file.write_text("")
    done = job.run("trtllm.sbatch", *QUICK, "--category", "a b")
    assert done.returncode == 2
    assert "'a b'" in done.stderr
    assert "--runtime_params" in done.stderr
    assert job.log == []


# --- preemption -----------------------------------------------------------------------------------


def slow(folder: Path) -> str:
    path = folder / "slow.yaml"
    path.write_text(json.dumps({"engine_args": {"real_time": True, "step_ms": 5, "prefill_ms": 5}}))
    return str(path)


@pytest.mark.parametrize("script", ["vllm.sbatch", "trtllm.sbatch", "array.sbatch"])
def test_a_preempted_job_is_queued_again_and_goes_on(script: str, job: Job) -> None:
    words = ["--random_isl", "4", "--num_requests", "700", "--output_length", "20",
             "--concurrency", "4", "--runtime_params", slow(job.folder)]  # fmt: skip
    run_dir = job.folder / "run"
    more = {"SLURM_NTASKS_PER_NODE": "2"}
    if script == "array.sbatch":
        (job.folder / "runs.txt").write_text("# first\n--engine NULL --warmup 0\n")
        more = {"RUNS": str(job.folder / "runs.txt"), "RUNS_DIR": str(job.folder),
                "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_JOB_ID": "70"}  # fmt: skip
        run_dir = job.folder / "2"
        path = str(SLURM / script)
    else:
        path = with_null(script, job.folder)
    process = subprocess.Popen(
        job.command(path, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**job.environment(), **more},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((run_dir / "turns").glob("*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing was stored in 60 s"
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)  # to the job script alone, as --signal=B:USR1 does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 138, err
    assert "goes on when the job starts again" in out
    assert job.log[-1] == {"scontrol": "requeue 77"}
    manifest = store.read_manifest(run_dir)
    assert manifest["status"] == "partial"
    (entry,) = manifest["sessions"]
    assert entry["end"] == "stopped"  # in order, not killed
    assert entry["n_uncommitted"] in (0, 4)  # the null engine's requests run in step
    kept = set(store.committed(run_dir))
    assert 0 < len(kept) < 700

    (job.folder / "slurm.log.done").unlink(missing_ok=True)
    n_requeues = len(job.log)
    fast = [word for word in words if word not in ("--runtime_params", str(slow(job.folder)))]
    done = job.run(path, *fast, "--max_duration", "2", **more)
    assert done.returncode == 0, done.stderr
    assert "--resume" in str(job.log[-1]["words"])
    assert not any("scontrol" in entry for entry in job.log[n_requeues:])
    assert kept < set(store.committed(run_dir))


def test_a_notice_leaves_the_further_nodes_to_the_first(job: Job) -> None:
    """srun passes it on to all nodes: one that ended at once would take the engine with it."""
    process = subprocess.Popen(
        job.command(with_null("vllm.sbatch", job.folder), "--random_isl", "4", "--num_requests",
                    "700", "--output_length", "20", "--concurrency", "4", "--runtime_params",
                    slow(job.folder)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**job.environment(), "SLURM_JOB_NUM_NODES": "2", "PORT": str(free_port()),
             "RUN": f"{sys.executable} tests/node_run.py"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((job.folder / "run" / "turns").glob("*.parquet")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing was stored in 60 s"
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 138, err
    assert "ended by SIGUSR1" not in err
    assert not (job.folder / "worker-ended").exists()  # by the signal: the first node ends it
    (entry,) = store.read_manifest(job.folder / "run")["sessions"]
    assert entry["end"] == "stopped"


def test_a_notice_before_the_step_queues_the_job_again_without_it(job: Job) -> None:
    words = (
        f"set -euo pipefail; SPEEDBENCH={ROOT} CONTAINER=; . {SLURM}/common.sh; begin; "
        "kill -USR1 $$; step -- true; finish"
    )
    done = subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, check=False, timeout=30,
        env={**job.environment(), "GRACE_S": "1"},
    )  # fmt: skip
    assert done.returncode == 143, done.stderr
    assert job.log == [{"scontrol": "requeue 77"}]


def test_a_step_that_does_not_end_is_not_waited_for(job: Job) -> None:
    """An engine that is still starting holds the notice back: the job is queued again without."""
    stuck = job.folder / "stuck.py"
    stuck.write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "print('begun', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        job.command("vllm.sbatch"), stdout=subprocess.PIPE, text=True,
        env={**job.environment(), "RUN": f"{sys.executable} {stuck}", "GRACE_S": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGUSR1)
    process.stdout.readline()
    assert process.wait(timeout=30) == 137  # of the step, which was ended
    assert job.log[-1] == {"scontrol": "requeue 77"}


def test_a_job_that_fails_is_not_queued_again(job: Job) -> None:
    done = job.run(with_null("vllm.sbatch", job.folder), "--random_isl", "0")
    assert done.returncode == 2
    assert len(job.log) == 1


# --- sweeps ---------------------------------------------------------------------------------------


def test_an_array_runs_the_line_of_its_number(job: Job) -> None:
    (job.folder / "runs.txt").write_text(
        "--engine NULL --concurrency 1\n\n# not now\n--engine NULL --concurrency 3 --seed 5\n"
    )
    more = {"RUNS": str(job.folder / "runs.txt"), "RUNS_DIR": str(job.folder / "out"),
            "SLURM_ARRAY_JOB_ID": "70"}  # fmt: skip
    for number in "1234":
        done = job.run("array.sbatch", *QUICK, SLURM_ARRAY_TASK_ID=number, **more)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (job.folder / "out").iterdir()) == ["1", "4"]
    configs = [store.read_manifest(job.folder / "out" / n)["config"] for n in "14"]
    assert [(c["concurrency"], c["seed"], c["num_requests"]) for c in configs] == [
        (1, 0, 6), (3, 5, 6),
    ]  # fmt: skip


# --- the scripts themselves -----------------------------------------------------------------------


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="no shellcheck beside this Python")
def test_shellcheck_finds_nothing() -> None:
    tracked = [ROOT / ".ci" / "run", *(ROOT / "scripts").rglob("*.sh"), *SLURM.glob("*.sbatch"),
               ROOT / "tests" / "fake_slurm" / "scontrol",
               ROOT / "tests" / "fake_slurm" / "trtllm-llmapi-launch"]  # fmt: skip
    assert len(tracked) >= 9
    done = subprocess.run(
        [str(SHELLCHECK), "--external-sources", "--shell=bash", *map(str, tracked)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_job_can_be_requeued_and_is_told_in_time(script: str) -> None:
    text = (SLURM / script).read_text()
    options = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
    assert "--requeue" in options
    notice = next(int(o.rpartition("@")[2]) for o in options if o.startswith("--signal=B:USR1@"))
    grace = re.search(r"GRACE_S:-(\d+)", text)
    assert grace is not None
    assert int(grace[1]) < notice
