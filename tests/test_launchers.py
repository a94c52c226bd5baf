"""What a launcher makes of a process: its rank, its CPUs, its GPUs, its engine's nodes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engines.null
from speedbench import calibrate, inputs, launch, store
from speedbench.cli import main
from speedbench.config import from_dict
from speedbench.launch import Launch
from speedbench.types import EngineSettings, UserError
from tests.launchers import MPIRUN, NULL, ROOT, clean_environment, mpirun
from tests.processes import is_running

needs_mpirun = pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python")
needs_two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU only")


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8",
             "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Launch("mpirun", 3, 8, 1, 2),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch("mpiexec", 1, 2, 1, 2),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1",
             "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3", "PMI_RANK": "5",
             "PMI_SIZE": "7"},
            Launch("srun", 5, 7, 1, 3),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1",
             "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
            Launch("srun", 3, 4, 1, 2),
        ),
        # A batch script without srun: one process, whatever the job has asked for.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Launch()),
    ],
)  # fmt: skip
def test_the_rank_is_read_from_the_environment(environ: dict[str, str], expected: Launch) -> None:
    assert launch.of_environment(environ) == expected


def test_ranks_are_nodes_of_one_engine_where_a_head_is_named() -> None:
    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}  # fmt: skip
    replica = launch.of_environment(task)
    node = launch.of_environment({**task, "SPEEDBENCH_HEAD": "gpu-7:29500"})
    assert (replica.n_replicas, replica.node_rank) == (2, 0)
    assert (node.n_replicas, node.node_rank) == (1, 1)
    names = {"n_nodes": "nnodes", "node_rank": "node_rank", "host": "master_addr",
             "port": "master_port"}  # fmt: skip
    assert launch.node_arguments(node, names) == {
        "nnodes": 2, "node_rank": 1, "master_addr": "gpu-7", "master_port": 29500,
    }  # fmt: skip
    assert launch.node_arguments(node, {"address": "dist_init_addr"}) == {
        "dist_init_addr": "gpu-7:29500"
    }
    assert launch.node_arguments(replica, names) == {}
    for wrong, word in (
        (Launch("srun", 1, 2, 0, 1, "gpu-7"), "HOST:PORT"),
        (Launch("srun", 1, 4, 1, 2, "gpu-7:1"), "one per node"),
    ):
        with pytest.raises(UserError, match=word):
            launch.node_arguments(wrong, names)
    with pytest.raises(UserError, match="unset it"):
        launch.node_arguments(node, {})


# --- CPUs -----------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 16))
def test_ranks_share_the_cpus_evenly(cpus: set[int], n_ranks: int) -> None:
    order = sorted(cpus)
    shares = [launch.cpu_share(order, rank, n_ranks) for rank in range(n_ranks)]
    assert set().union(*shares) <= cpus
    assert all(shares)
    if len(cpus) >= n_ranks:
        assert set().union(*shares) == cpus
        assert sum(map(len, shares)) == len(cpus)  # no CPU twice
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        assert max(sum(cpu in share for share in shares) for cpu in cpus) <= -(
            -n_ranks // len(cpus)
        )


@needs_mpirun
@needs_two_cpus
@pytest.mark.parametrize("options", [("--bind-to", "core"), ("--bind-to", "none")])
def test_one_rank_gets_back_the_cpus_of_its_launcher(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    n_all = len(os.sched_getaffinity(0))
    n_given = 1 if "core" in options else n_all
    done = mpirun(1, *NULL, "--num_requests", "3", "--output_length", "4", "--save_dir",
                  str(run_dir), options=options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = store.read_manifest(run_dir)
    assert manifest["environment"]["launch"] == {
        "launcher": "mpirun", "n_cpus_given": n_given, "n_cpus": n_all,
    }  # fmt: skip
    assert manifest["environment"]["n_cpus"] == n_all  # what the engine inherits
    told = f"mpirun bound this process to 1 CPU(s); it and its engine use {n_all} now"
    assert (told in done.stderr) == (n_given < n_all)
    assert [s["replica"] for s in manifest["sessions"]] == [0]


@needs_mpirun
@needs_two_cpus
def test_the_cpus_that_the_launcher_itself_may_not_use_stay_out(tmp_path: Path) -> None:
    """A user's taskset, or Slurm's binding of the whole job, is not undone."""
    one = min(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "--cpu-list", str(one), str(MPIRUN), "-n", "1", sys.executable,
         str(ROOT / "run.py"), *NULL, "--num_requests", "2", "--output_length", "3", "--save_dir",
         str(tmp_path / "run")],
        capture_output=True, text=True, check=False, timeout=100, env=clean_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert store.read_manifest(tmp_path / "run")["environment"]["n_cpus"] == 1


@needs_mpirun
@needs_two_cpus
def test_two_ranks_share_the_cpus(tmp_path: Path) -> None:
    n_all = len(os.sched_getaffinity(0))
    done = mpirun(2, *NULL, "--num_requests", "4", "--output_length", "3", "--save_dir",
                  str(tmp_path / "run"), options=("--bind-to", "none"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    sessions = store.read_manifest(tmp_path / "run")["sessions"]
    assert sum(s["n_cpus"] for s in sessions) == n_all


def test_a_process_without_a_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("its CPUs were changed")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    n = len(os.sched_getaffinity(0))
    for launched in (Launch(), Launch("srun", 0, 4, 0, 4)):
        assert launch.unbind(launched) == launch.Cpus(n, n)


# --- GPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "visible", "n_each", "local", "more", "expected"),
    [
        ("mpirun", "0,1,2,3,4,5,6,7", 2, (0, 4), {}, "0,1"),
        ("mpirun", "0,1,2,3,4,5,6,7", 2, (3, 4), {}, "6,7"),
        ("mpirun", "4,5,6,7", 1, (1, 2), {}, "5"),
        ("mpirun", "GPU-a,GPU-b", 1, (1, 2), {}, "GPU-b"),
        ("mpirun", "", 4, (1, 2), {}, None),  # CPUs only
        ("mpirun", "-1", 4, (1, 2), {}, None),
        ("srun", "NoDevFiles", 4, (1, 2), {}, None),
        # Slurm has shared them out.
        ("srun", "0", 1, (3, 4), {"SLURM_GPUS_PER_TASK": "1"}, "0"),
        ("srun", "0,1", 2, (1, 2), {"SLURM_GPUS_PER_TASK": "h100:2"}, "0,1"),
        ("srun", "0", 1, (3, 4), {"SLURM_TRES_PER_TASK": "cpu:8,gres/gpu:1"}, "0"),
        ("srun", "0,1", 2, (1, 2), {"SLURM_TRES_PER_TASK": "gres/gpu:h100=2,cpu=8"}, "0,1"),
        # Slurm says so of the CPUs alone, or of a job in which mpirun started the ranks, or bound
        # none of them: all ranks see all GPUs.
        ("srun", "0,1,2,3", 1, (2, 4), {"SLURM_TRES_PER_TASK": "cpu:16"}, "2"),
        ("mpirun", "0,1,2,3", 1, (2, 4), {"SLURM_GPUS_PER_TASK": "1"}, "2"),
        ("srun", "0,1,2,3", 1, (2, 4), {"SLURM_GPUS_PER_TASK": "1"}, "2"),
    ],
)
def test_each_replica_sees_its_own_gpus(
    launcher: str, visible: str, n_each: int, local: tuple[int, int], more: dict[str, str],
    expected: str | None,
) -> None:  # fmt: skip
    launched = Launch(launcher, local[0], local[1], *local)
    environ = {"CUDA_VISIBLE_DEVICES": visible, **more}
    assert launch.own_devices(launched, n_each, environ) == expected


def test_too_few_gpus_are_refused_and_one_process_keeps_all() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    with pytest.raises(UserError, match=r"2 replica.* 2 GPU.* need 4 .* 3 are visible"):
        launch.own_devices(Launch("mpirun", 0, 2, 0, 2), 2, environ)
    task = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}
    with pytest.raises(UserError, match="2 GPU"):
        launch.own_devices(Launch("srun", 0, 2, 0, 2), 2, task)
    unbound = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "1"}
    with pytest.raises(UserError, match="need 4"):  # not both on GPUs 0 and 1
        launch.own_devices(Launch("srun", 1, 2, 1, 2), 2, unbound)
    assert launch.own_devices(Launch("mpirun", 0, 1, 0, 1), 8, environ) is None
    assert launch.own_devices(Launch("srun", 1, 2, 0, 1, "a:1"), 8, environ) is None


# --- what engines inherit -------------------------------------------------------------------------


def test_mpi_jobs_do_not_fork_engines_and_the_user_has_the_last_word() -> None:
    for launched, before, after in (
        (Launch(), {}, {}),
        (Launch("mpirun"), {}, {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}),
        (Launch("mpirun"), {"VLLM_WORKER_MULTIPROC_METHOD": "fork"},
         {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}),
    ):  # fmt: skip
        environ = dict(before)
        launch.prepare_environment(launched, environ)
        assert environ == after


def test_a_notice_ends_no_process_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm signals every process of a job: one that the engine starts must outlive SIGUSR1, and
    the notice must still end the run, once there is one."""
    codes = []

    class Starting(engines.null.NullEngine):
        def __init__(self, settings: EngineSettings) -> None:
            child = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
            codes.append(subprocess.run([sys.executable, "-c", child], check=False).returncode)
            os.kill(os.getpid(), signal.SIGUSR1)
            super().__init__(settings)

    monkeypatch.setattr(engines.null, "NullEngine", Starting)
    before = signal.getsignal(signal.SIGUSR1)
    code = main(["run", *NULL, "--num_requests", "50", "--save_dir", str(tmp_path / "run")])
    assert codes == [0]
    assert code == 138
    assert store.read_manifest(tmp_path / "run")["status"] == "partial"
    assert "--resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def is_connected(port: int) -> bool:
    """Whether a connection to this port of this host is established."""
    rows = [
        line.split() for name in ("tcp", "tcp6")
        for line in Path("/proc/net", name).read_text().splitlines()[1:]
    ]  # fmt: skip
    return any(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.create_server(("", 0)) as server:
        head = f"localhost:{server.getsockname()[1] - 1}"
        with pytest.raises(UserError, match=r"port \d+ of .*in use.*PORT"):
            launch.hold_nodes(Launch("srun", 0, 2, 0, 1, head))
    with pytest.raises(UserError, match="port 65536"):
        launch.hold_nodes(Launch("srun", 0, 2, 0, 1, "localhost:65535"))


def test_a_further_node_ends_with_the_first_however_that_ends(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = int(server.getsockname()[1])
    head = f"localhost:{port}"
    code = (
        "import subprocess, sys, time\nfrom speedbench import launch\n"
        f"launched = launch.Launch('srun', int(sys.argv[1]), 2, 0, 1, {head!r})\n"
        "launch.hold_nodes(launched) if launched.rank == 0 else launch.follow_head(launched)\n"
        "worker = subprocess.Popen(['sleep', '300'])\nprint(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    nodes = [
        subprocess.Popen([sys.executable, "-c", code, rank], stdout=subprocess.PIPE, text=True,
                         env=clean_environment())
        for rank in "10"
    ]  # fmt: skip
    workers = [int(node.stdout.readline()) for node in nodes if node.stdout is not None]
    deadline = time.monotonic() + 60
    while not is_connected(port + 1):
        assert time.monotonic() < deadline, "the nodes did not meet in 60 s"
        time.sleep(0.05)
    assert nodes[0].poll() is None
    nodes[1].kill()
    assert nodes[0].wait(timeout=30) == 0
    os.kill(workers[1], signal.SIGKILL)  # the killed one's
    deadline = time.monotonic() + 30
    while is_running(workers[0]):  # it has been sent a signal, and needs its moment to end
        assert time.monotonic() < deadline, "the worker outlived its node"
        time.sleep(0.05)


# --- a real engine --------------------------------------------------------------------------------


@pytest.mark.real
@needs_mpirun
def test_two_replicas_of_real_vllm_are_exact(models: Path, tmp_path: Path) -> None:
    eager, run_dir = tmp_path / "eager.yaml", tmp_path / "run"
    eager.write_text("engine_args: {enforce_eager: true}\n")
    done = mpirun(
        2, "--engine", "VLLM", "--model_dir", str(models / "word/target"), "--draft_model_dir",
        str(models / "word/draft"), "--speculative_algorithm", "DRAFT_TARGET", "--draft_length",
        "3", "--dataset", "calibration", "--concurrency", "8", "--output_length", "40",
        "--runtime_params", str(eager), "--save_dir", str(run_dir),
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                     "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"},
        timeout_s=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = store.load(run_dir)
    prepared = inputs.prepare(from_dict(run.manifest["config"]))
    verdict = calibrate.judge(run, prepared)
    assert verdict.ok, verdict.sentence
    assert len(run.columns.conversation_ids) == len(prepared.rows)
    assert sorted(set(run.columns.replica.tolist())) == [0, 1]
    assert run.manifest["known_answer"]["ok"]
    # One host, one clock: nothing needs aligning.
    first, second = run.manifest["sessions"]
    assert first["clock"] == second["clock"]
    assert first["clock"].startswith("boot ")
    assert "Output TPS" in done.stdout
