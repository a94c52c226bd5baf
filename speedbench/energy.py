"""Energy: what the run's GPUs draw, sampled by a process of its own while the engine works.

`Sampler` starts that process beside a measurement and ends it; `python -m speedbench.energy` is the
process. It reads NVML (package nvidia-ml-py) ten times a second at low priority, ends when its
parent does, and stores what it read once a second. Whatever goes wrong in it costs samples only.
"""

from __future__ import annotations

import argparse
import os
import selectors
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from speedbench import launch, store
from speedbench.beside import Beside, Parts, say
from speedbench.processes import give_way
from speedbench.types import EngineInfo

INTERVAL_S = 0.1
WRITE_EVERY_S = 1.0
MODULE = "pynvml"


class Sampler(Beside):
    """Samples the GPUs of one replica.

    n_gpus  GPUs the replica's engine spreads over
    """

    what = "the sampler"
    module = "speedbench.energy"
    end_timeout_s = 5.0

    def __init__(
        self,
        directory: Path,
        info: EngineInfo,
        *,
        session: int,
        replica: int,
        n_gpus: int,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(environ, _why_not(info))
        self._directory = directory
        self._session, self._replica, self._n_gpus = session, replica, n_gpus

    def _words(self) -> Sequence[str]:
        return [
            *(str(self._directory.resolve()), "--session", str(self._session)),
            *("--replica", str(self._replica), "--n_gpus", str(self._n_gpus)),
            *("--root", str(_root(self._environ))),
        ]


def _why_not(info: EngineInfo) -> str:
    """Why an engine's GPUs cannot be sampled, or ''."""
    if info.name == "OPENAI":
        return "the GPUs of the server are not known"
    if info.simulated or info.settings.get("device") == "cpu":
        return "the engine used no GPU"
    return "" if find_spec(MODULE) else "the package nvidia-ml-py is not installed"


def _root(environ: Mapping[str, str]) -> int:
    """The process whose descendants are the run's: this one, or the launcher that started it
    (which also starts the engine's other ranks)."""
    return os.getppid() if launch.of_environment(environ).launcher else os.getpid()


# ---------------------------------------------------------------- the process


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the run. `whole`: not shared out in MIG slices."""

    index: int
    uuid: str
    handle: Any
    whole: bool


class NoGpuError(Exception):
    """Why there is nothing to sample: one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """The sampling process. Says one line: {"why_not": ""} once it samples, or why it does not."""
    parser = argparse.ArgumentParser(prog="python -m speedbench.energy")
    parser.add_argument("directory", type=Path)
    for name in ("session", "replica", "n_gpus", "parent", "root"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args(argv)
    give_way()
    try:
        nvml = import_module(MODULE)
        nvml.nvmlInit()
        gpus = visible_gpus(nvml, os.environ, given.n_gpus)
    except NoGpuError as reason:
        return say({"why_not": str(reason)})
    except Exception as error:  # noqa: BLE001 - the library fails in its own ways without a driver
        return say({"why_not": f"NVML cannot be used ({type(error).__name__}: {error})"})
    recorder = Recorder(given.directory, given.session, given.replica)
    ours = Processes(nvml, given.root)
    recorder.take(read_all(nvml, gpus, ours))
    recorder.write()
    say({"why_not": ""})
    sample(
        lambda: recorder.take(read_all(nvml, gpus, ours)),
        recorder.write,
        lambda: os.getppid() != given.parent,
    )
    return 0


def sample(
    read: Callable[[], None], write: Callable[[], None], orphaned: Callable[[], bool]
) -> None:
    """Read every tenth of a second and write every second, until the input ends or the parent is
    gone; then once more."""
    due_s = time.monotonic()
    written_s = due_s
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        ended = False
        while not ended:
            due_s = max(due_s + INTERVAL_S, time.monotonic())
            ended = bool(selector.select(max(0.0, due_s - time.monotonic()))) or orphaned()
            read()
            if ended or time.monotonic() - written_s >= WRITE_EVERY_S:
                write()
                written_s = time.monotonic()


def visible_gpus(nvml: Any, environ: Mapping[str, str], n_gpus: int) -> list[Gpu]:
    """The first `n_gpus` that CUDA shows to the engine. Raises NoGpuError where that is not known.

    CUDA_VISIBLE_DEVICES holds numbers or UUIDs, of GPUs or of MIG slices, or the beginnings of
    UUIDs. Numbers are NVML's where CUDA counts by bus id, or all GPUs are of one kind.
    """
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if not every:
        raise NoGpuError("there is no GPU")
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        names = [str(i) for i in range(len(every))]
    else:
        names = [name.strip() for name in shown.split(",")]
        # CUDA stops at the first name that is none.
        valid = [_is_device(name, uuids) for name in names]
        names = names[: valid.index(False)] if False in valid else names
    if len(names) < n_gpus or not names:
        raise NoGpuError(f"the engine uses {n_gpus} GPU(s), {len(names)} are visible here")
    names = names[:n_gpus]
    kinds = {_text(nvml.nvmlDeviceGetName(handle)) for handle in every}
    by_bus = environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if any(name.isdigit() for name in names) and len(kinds) > 1 and not by_bus:
        raise NoGpuError(
            "CUDA numbers GPUs of different kinds in an order of its own: set "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    found: dict[int, Gpu] = {}
    for name in names:
        index, whole = _place(nvml, name, uuids)
        handle = every[index]
        found[index] = Gpu(index, uuids[index], handle, whole and not _is_sliced(nvml, handle))
    return list(found.values())


def _is_device(name: str, uuids: Sequence[str]) -> bool:
    if name.isdigit():
        return int(name) < len(uuids)
    return name.startswith("MIG-") or (bool(name) and any(u.startswith(name) for u in uuids))


def _place(nvml: Any, name: str, uuids: Sequence[str]) -> tuple[int, bool]:
    """NVML's index of a visible device, and whether it is a whole GPU."""
    if name.isdigit():
        return int(name), True
    if not name.startswith("MIG-"):
        return next(i for i, uuid in enumerate(uuids) if uuid.startswith(name)), True
    slice_ = nvml.nvmlDeviceGetHandleByUUID(name)
    parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(slice_)
    return uuids.index(_text(nvml.nvmlDeviceGetUUID(parent))), False


def _is_sliced(nvml: Any, handle: Any) -> bool:
    """MIG is on: what NVML counts is of the whole GPU, the run may have a slice."""
    mode = _or_none(lambda: nvml.nvmlDeviceGetMigMode(handle))
    return mode is not None and int(mode[0]) == 1


def read_all(nvml: Any, gpus: Sequence[Gpu], ours: Processes) -> list[dict[str, Any]]:
    """One row for every GPU; None where NVML does not tell."""
    return [_row(nvml, gpu, *ours.of(gpu)) for gpu in gpus]


def _row(nvml: Any, gpu: Gpu, n_processes: int | None, n_others: int | None) -> dict[str, Any]:
    handle = gpu.handle
    before_ns = time.monotonic_ns()
    energy_mj = _or_none(lambda: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
    after_ns = time.monotonic_ns()
    power_mw = _or_none(lambda: int(nvml.nvmlDeviceGetPowerUsage(handle)))
    return {
        "time_ns": (before_ns + after_ns) // 2,
        "gpu": gpu.index,
        "uuid": gpu.uuid,
        "whole_gpu": gpu.whole,
        "energy_mj": energy_mj,
        "power_mw": power_mw,
        "utilization_percent": _or_none(
            lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        ),
        "sm_clock_mhz": _or_none(
            lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        ),
        "temperature_c": _or_none(
            lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        ),
        "throttle_reasons": _or_none(
            lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        ),
        "n_processes": n_processes,
        "n_others": n_others,
    }


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception:  # noqa: BLE001 - not supported, lost, ...: NVML has an error for each
        return None


def _text(value: Any) -> str:
    """Old versions of the package answer in bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


class Processes:
    """Who else computes on the GPUs; looked up once a second.

    A process is the run's if `root` is among its ancestors. Where none is, the numbers NVML gives
    are of another namespace (a container), and nobody can be told from anybody.
    """

    def __init__(self, nvml: Any, root: int, proc: Path = Path("/proc")) -> None:
        self._nvml, self._root, self._proc = nvml, root, proc
        self._known: dict[int, tuple[float, tuple[int | None, int | None]]] = {}

    def of(self, gpu: Gpu) -> tuple[int | None, int | None]:
        """Processes on the GPU, and those that are not the run's; None where it cannot be told."""
        at_s, found = self._known.get(gpu.index, (-WRITE_EVERY_S, (None, None)))
        if time.monotonic() - at_s >= WRITE_EVERY_S:
            found = self._look(gpu)
            self._known[gpu.index] = (time.monotonic(), found)
        return found

    def _look(self, gpu: Gpu) -> tuple[int | None, int | None]:
        running = _or_none(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle))
        if running is None:
            return None, None
        n_own = sum(self._is_own(int(process.pid)) for process in running)
        return len(running), len(running) - n_own if n_own else None

    def _is_own(self, pid: int) -> bool:
        seen = 0
        while pid > 1 and seen < 64:
            if pid == self._root:
                return True
            try:
                # The name before the last ')' may hold anything; then come state and parent.
                stat = (self._proc / str(pid) / "stat").read_text(
                    encoding="utf-8", errors="replace"
                )
                pid = int(stat.rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                return False
            seen += 1
        return False


class Recorder(Parts):
    """What this sampler read."""

    def __init__(self, directory: Path, session: int, replica: int) -> None:
        super().__init__(
            store.next_energy_part(directory, replica),
            store.ENERGY,
            lambda number, table: store.write_energy_part(directory, number, replica, table),
        )
        self._about = {"session": session, "replica": replica}

    def take(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.extend({**row, **self._about} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
