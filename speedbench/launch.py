"""Launch: what a launcher (mpirun, srun) made of this process: its rank, its CPUs, its GPUs.

Standard library only, and no MPI: it is read from the environment and from /proc, before any engine
is imported.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedbench import processes
from speedbench.types import UserError

HEAD = "SPEEDBENCH_HEAD"
"""Environment variable, HOST:PORT: the launcher's ranks are the nodes of one engine, which meet
there (and speedbench's own processes at PORT + 1); without it they are replicas."""

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orterun", "orted", "mpiexec.hydra",
             "hydra_pmi_proxy")  # fmt: skip

# Processes of an MPI job must not be forked: the child would share the parent's connections.
ENGINE_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


@dataclass(frozen=True, slots=True)
class Launch:
    """Who started this process, and as which of how many; launcher '' is nobody: one process.

    local_rank, local_size  the same among the ranks on this host
    head                    HOST:PORT where the ranks are nodes of one engine, else ''
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    head: str = ""

    @property
    def n_replicas(self) -> int:
        return 1 if self.head else self.size

    @property
    def node_rank(self) -> int:
        """This process's place among the nodes of one engine; 0 where there is one node."""
        return self.rank if self.head else 0


_NAMES: Sequence[tuple[str, tuple[str, str, str, str]]] = (
    (
        "mpirun",  # Open MPI
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        ),
    ),
    (
        "mpiexec",  # MPICH, Intel
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ),
    # SLURM_NTASKS is set in a batch script, too; SLURM_STEP_NUM_TASKS is set by srun alone.
    (
        "srun",
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ),
)


def of_environment(environ: Mapping[str, str]) -> Launch:
    """The launch of the process that has this environment."""
    for launcher, (rank, size, local_rank, local_size) in _NAMES:
        if all(name in environ for name in (rank, size, local_rank)):
            return Launch(
                launcher,
                int(environ[rank]),
                int(environ[size]),
                int(environ[local_rank]),
                _local_size(environ, local_size),
                environ.get(HEAD, ""),
            )
    return Launch(head=environ.get(HEAD, ""))


def _local_size(environ: Mapping[str, str], name: str) -> int:
    """Ranks on this host; Slurm says '4', '4(x2)' or '4(x2),3' of all nodes, in order."""
    text = environ.get(name, "1")
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[0]


def prepare_environment(launch: Launch, environ: MutableMapping[str, str]) -> None:
    """Set what engines read when they are imported, unless the user has set it."""
    if launch.launcher:
        for name, value in ENGINE_ENVIRONMENT.items():
            environ.setdefault(name, value)


# ---------------------------------------------------------------- CPUs


@dataclass(frozen=True, slots=True)
class Cpus:
    """How many CPUs this process was bound to when it began, and how many it may use now."""

    n_given: int
    n: int


def unbind(launch: Launch) -> Cpus:
    """Undo the binding of mpirun, which gives a rank one core, and with it the whole engine.

    A rank gets the CPUs that its launcher may use itself, shared evenly among the ranks of this
    host, whole cores first. srun binds as the user asked for (--cpus-per-task) and is left alone.
    """
    given = os.sched_getaffinity(0)
    if launch.launcher in ("mpirun", "mpiexec"):
        mine = cpu_share(_by_core(_allowed(given)), launch.local_rank, launch.local_size)
        if launch.local_size == 1 or len(mine) != len(given):
            os.sched_setaffinity(0, mine)
    return Cpus(len(given), len(os.sched_getaffinity(0)))


def cpu_share(cpus: Sequence[int], local_rank: int, local_size: int) -> set[int]:
    """The local rank's consecutive CPUs; one, taken in turns, where there are fewer than ranks."""
    if len(cpus) < local_size:
        return {cpus[local_rank % len(cpus)]}
    first, last = (len(cpus) * r // local_size for r in (local_rank, local_rank + 1))
    return set(cpus[first:last])


def _allowed(given: set[int]) -> set[int]:
    """CPUs of the nearest ancestor that is a launcher; of the cpuset where none is seen."""
    process = os.getppid()
    while process > 1:
        try:
            stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
            name, rest = stat.partition("(")[2].rsplit(")", 1)
            if name in LAUNCHERS:
                return os.sched_getaffinity(process) | given
            process = int(rest.split()[1])
        except (OSError, ValueError, IndexError):
            break
    # The kernel intersects with the cpuset; the process keeps what comes out of it.
    os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))
    return os.sched_getaffinity(0)


def _by_core(cpus: Iterable[int]) -> list[int]:
    """CPUs in the order of package and core, so that a share holds both threads of a core."""

    def place(cpu: int) -> tuple[int, int, int]:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            package = int((folder / "physical_package_id").read_text())
            siblings = (folder / "thread_siblings_list").read_text()
            return package, int(siblings.replace("-", ",").split(",")[0]), cpu
        except (OSError, ValueError):
            return 0, cpu, cpu

    return sorted(cpus, key=place)


# ---------------------------------------------------------------- GPUs


def own_devices(launch: Launch, n_each: int, environ: Mapping[str, str]) -> str | None:
    """CUDA_VISIBLE_DEVICES of this replica: its `n_each` of the host's; None to leave it as it is.

    Raises UserError if there are not enough for every replica on this host.
    """
    if launch.n_replicas == 1:
        return None
    visible = visible_devices(environ)
    if not visible:  # an engine on CPUs; one that needs GPUs says so itself
        return None
    # Where enough for all ranks are visible, sharing them out is right however Slurm bound them.
    own = launch.launcher == "srun" and 0 < len(visible) <= _gpus_per_task(environ)
    per_task = own and len(visible) < n_each * launch.local_size
    n_ranks = 1 if per_task else launch.local_size
    if len(visible) < n_each * n_ranks:
        raise UserError(
            f"{n_ranks} replica(s) of {n_each} GPU(s) each need {n_each * n_ranks} on "
            f"{os.uname().nodename}, {len(visible)} are visible: start fewer per host, or lower "
            "--tp_size, --pp_size or --dp_size"
        )
    first = 0 if per_task else n_each * launch.local_rank
    return ",".join(visible[first : first + n_each])


def _gpus_per_task(environ: Mapping[str, str]) -> int:
    """GPUs that srun gave to each task alone, 0 if it did not; words such as '2', 'h100:2' and
    'cpu:4,gres/gpu:2' (which Slurm also sets where CPUs alone are asked for)."""
    for name, pattern in (
        ("SLURM_GPUS_PER_TASK", r"(\d+)$"),
        ("SLURM_TRES_PER_TASK", r"\bgpu\b[^,]*?(\d+)(?:,|$)"),
    ):
        if found := re.search(pattern, environ.get(name, "")):
            return int(found[1])
    return 0


def visible_devices(environ: Mapping[str, str]) -> list[str]:
    """The GPUs this process may use, in CUDA's words; empty without any."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        return [name for name in names if name and name not in ("-1", "NoDevFiles")]
    try:
        done = subprocess.run(
            ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader"),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()


# ---------------------------------------------------------------- nodes of one engine


def node_arguments(launch: Launch, names: Mapping[str, str]) -> dict[str, object]:
    """Engine arguments that tell an engine its nodes; empty where it has one.

    names  our word (n_nodes, node_rank, host, port, address) -> the engine's argument
    """
    if not launch.head or launch.size == 1:
        return {}
    host, _, port = launch.head.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{HEAD} is '{launch.head}': expected HOST:PORT of the first node")
    if launch.local_size != 1:
        raise UserError(
            f"{launch.local_size} processes were started on {os.uname().nodename}: one engine over "
            "several nodes needs one per node (srun --ntasks-per-node=1)"
        )
    if not names:
        raise UserError(
            f"{HEAD} is set, but this engine is not spread over nodes in that way: unset it"
        )
    words: dict[str, object] = {
        "n_nodes": launch.size,
        "node_rank": launch.rank,
        "host": host,
        "port": int(port),
        "address": launch.head,
    }
    return {name: words[word] for word, name in names.items()}


def hold_nodes(launch: Launch) -> None:
    """On the first node: let the others see when this process ends, however it does.

    They hold a connection, which the kernel closes. Engines' workers on other nodes do not notice
    the end by themselves: vLLM's wait for ever.
    """
    if not launch.head or launch.size == 1:
        return
    port = _port_beside(launch)
    try:
        server = socket.create_server(("", port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of {os.uname().nodename}, by which the other nodes see the end, cannot "
            f"be used ({error}): name another first port in {HEAD} (PORT of the job scripts)"
        ) from None
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            held.append(server.accept()[0])

    threading.Thread(target=accept, name="speedbench-nodes", daemon=True).start()


def follow_head(launch: Launch, patience_s: float = 1800) -> None:
    """On a further node: end this process and all it started, with code 0, when the first ends."""
    host = launch.head.rpartition(":")[0]

    def follow() -> None:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                connection = socket.create_connection((host, _port_beside(launch)))
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    return  # that port is closed to us: the job's end will end this process
                time.sleep(0.05)  # a short run must not end unseen
        with connection, contextlib.suppress(OSError):
            connection.recv(1)  # nothing is ever sent
        for process in processes.descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        os._exit(0)

    threading.Thread(target=follow, name="speedbench-head", daemon=True).start()


def _port_beside(launch: Launch) -> int:
    """The port after the engine's own."""
    return int(launch.head.rpartition(":")[2]) + 1
