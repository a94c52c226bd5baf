"""Energy: the sampling process on a stand-in for NVML, and joules against closed forms."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from speedbench import energy, store
from speedbench.insights.energy import MAX_GAP_S, energy_of, run_energy
from speedbench.insights.options import InsightOptions
from speedbench.report.arms import Arm
from speedbench.report.blocks import Table
from speedbench.report.layout_insights import of_arms
from speedbench.report.merge import merged
from speedbench.store import Run
from speedbench.types import EngineInfo, UserError
from tests.builders import S, conversation, session, stored

ROOT = Path(__file__).parent.parent
WATTS = (100, 250)
"""What the stand-in's two GPUs draw."""

STAND_IN = '''
"""A stand-in for NVML: two GPUs whose counters follow the clock."""
import os
import time
from types import SimpleNamespace

NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
WATTS = (100, 250)

class NVMLError(Exception):
    pass

def nvmlInit():
    if os.environ.get("STAND_IN") == "no driver":
        raise NVMLError("Driver Not Loaded")

def nvmlDeviceGetCount():
    return 2

def nvmlDeviceGetHandleByIndex(index):
    return index

def nvmlDeviceGetName(handle):
    return "NVIDIA H100"

def nvmlDeviceGetUUID(handle):
    return "GPU-%d%d" % (handle, handle)

def nvmlDeviceGetMigMode(handle):
    raise NVMLError("Not Supported")

def nvmlDeviceGetTotalEnergyConsumption(handle):
    if os.environ.get("STAND_IN") == "no counter":
        raise NVMLError("Not Supported")
    return int(WATTS[handle] * time.monotonic_ns() / 1e6)

def nvmlDeviceGetPowerUsage(handle):
    return WATTS[handle] * 1000

def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=90 + handle)

def nvmlDeviceGetClockInfo(handle, kind):
    assert kind == NVML_CLOCK_SM
    return 1500

def nvmlDeviceGetTemperature(handle, sensor):
    raise NVMLError("GPU is lost")

def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return 4

def nvmlDeviceGetComputeRunningProcesses(handle):
    return [SimpleNamespace(pid=os.getppid())]
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a sampler that finds the stand-in."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "pynvml.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "OMPI_", "SLURM"))}
    return {**environ, "PYTHONPATH": str(folder)}


def info(**other: Any) -> EngineInfo:
    return EngineInfo("VLLM", "1", 3, None, None, None, **other)


def sampled(directory: Path, environ: dict[str, str], n_gpus: int = 2, number: int = 0) -> str:
    """Sample for a while; why nothing was sampled. The directory then holds the samples."""
    with energy.Sampler(
        directory, info(), session=number, replica=0, n_gpus=n_gpus, environ=environ
    ) as sampler:
        end_s = time.monotonic() + 20
        while not sampler.why_not and time.monotonic() < end_s:
            parts = list((directory / "energy").glob("[0-9]*.parquet"))
            if parts and pa.parquet.read_table(max(parts)).num_rows > 5 * n_gpus:
                break
            time.sleep(0.05)
    return sampler.why_not


def a_run(directory: Path, start_ns: int, end_ns: int, **about: Any) -> Run:
    """A run of 8 output tokens whose session lasted from start to end."""
    about.setdefault("sessions", [session(started_ns=start_ns, ended_ns=end_ns)])
    about.setdefault("config", {"tp_size": 2})
    return stored(directory, [conversation("c", "x", [1, 3, 4])], **about)


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "no counter"])
def test_joules_of_a_sampled_session_are_watts_times_seconds(
    tmp_path: Path, stand_in: dict[str, str], kind: str
) -> None:
    directory = tmp_path / "r"
    directory.mkdir()
    assert sampled(directory, {**stand_in, "STAND_IN": kind}) == ""
    table = pa.parquet.read_table(directory / "energy" / "00000.parquet")
    times = np.sort(table["time_ns"].to_numpy())
    start_ns, end_ns = int(times[3]), int(times[-3])
    samples = directory / "energy"
    samples.rename(tmp_path / "energy")
    directory.rmdir()
    run = a_run(directory, start_ns, end_ns)
    (tmp_path / "energy").rename(samples)
    found = run_energy(run)
    assert found.fault == ""
    assert found.by_counter is (kind == "")
    seconds = (end_ns - start_ns) / 1e9
    # A sampler that is held up between its clock and a reading errs by so much of a second.
    assert found.joules == pytest.approx(sum(WATTS) * seconds, abs=sum(WATTS) * 0.05)
    assert found.seconds == seconds
    assert found.n_tokens == 8
    arm = energy_of(Arm("a", (run,)))
    assert arm.joules_per_million.value == pytest.approx(found.joules / 8 * 1e6)
    assert arm.slowed.value == 1.0  # throttle reason 4: power cap
    rows = table.to_pylist()
    assert {row["gpu"]: row["uuid"] for row in rows} == {0: "GPU-00", 1: "GPU-11"}
    assert {row["utilization_percent"] for row in rows} == {90, 91}
    assert {row["temperature_c"] for row in rows} == {None}
    assert {(row["n_processes"], row["n_others"]) for row in rows} == {(1, 0)}
    assert {row["whole_gpu"] for row in rows} == {True}


def test_a_resumed_session_goes_on_behind_the_first_ones_parts(
    tmp_path: Path, stand_in: dict[str, str]
) -> None:
    for number in range(2):
        assert sampled(tmp_path, stand_in, n_gpus=1, number=number) == ""
    names = sorted(path.name for path in (tmp_path / "energy").iterdir())
    assert names == ["00000.parquet", "00001.parquet"]
    for number, name in enumerate(names):
        table = pa.parquet.read_table(tmp_path / "energy" / name)
        assert set(table["session"].to_pylist()) == {number}
        assert set(table["gpu"].to_pylist()) == {0}


def test_only_visible_gpus_are_sampled(tmp_path: Path, stand_in: dict[str, str]) -> None:
    assert sampled(tmp_path, {**stand_in, "CUDA_VISIBLE_DEVICES": "GPU-1"}, n_gpus=1) == ""
    table = pa.parquet.read_table(tmp_path / "energy" / "00000.parquet")
    assert set(table["uuid"].to_pylist()) == {"GPU-11"}


def test_without_a_driver_the_reason_is_told(tmp_path: Path, stand_in: dict[str, str]) -> None:
    why = sampled(tmp_path, {**stand_in, "STAND_IN": "no driver"})
    assert why == "NVML cannot be used (NVMLError: Driver Not Loaded)"
    assert not (tmp_path / "energy").exists()
    why = sampled(tmp_path, stand_in, n_gpus=4)
    assert why == "the engine uses 4 GPU(s), 2 are visible here"


def test_nothing_is_started_where_there_is_nothing_to_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(energy, "find_spec", lambda name: None)
    with energy.Sampler(tmp_path, info(), session=0, replica=0, n_gpus=1) as sampler:
        assert sampler.why_not == "the package nvidia-ml-py is not installed"
    monkeypatch.setattr(energy, "find_spec", lambda name: object())
    for idle in (info(simulated=True), info(settings={"device": "cpu"})):
        with energy.Sampler(tmp_path, idle, session=0, replica=0, n_gpus=1) as sampler:
            assert sampler.why_not == "the engine used no GPU"


def test_a_process_that_cannot_start_costs_nothing_but_samples(
    tmp_path: Path, stand_in: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with energy.Sampler(
        tmp_path, info(), session=0, replica=0, n_gpus=1, environ=stand_in
    ) as sampler:
        assert sampler.why_not == "the sampler could not start (OSError: no memory)"


def test_an_error_in_the_measurement_passes_through(
    tmp_path: Path, stand_in: dict[str, str]
) -> None:
    processes: list[Any] = []

    def measure() -> None:
        with energy.Sampler(
            tmp_path, info(), session=0, replica=0, n_gpus=1, environ=stand_in
        ) as sampler:
            processes.append(sampler._process)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure()
    assert processes[0].poll() == 0


PARENT = """
import sys, time
from pathlib import Path
from speedbench import energy
from speedbench.types import EngineInfo

info = EngineInfo("VLLM", "1", 3, None, None, None)
with energy.Sampler(Path(sys.argv[1]), info, session=0, replica=0, n_gpus=1) as sampler:
    print(sampler._process.pid, flush=True)
    time.sleep(600)
"""


def test_the_sampler_ends_with_its_parent_and_keeps_what_it_read(
    tmp_path: Path, stand_in: dict[str, str]
) -> None:
    environ = {**stand_in, "PYTHONPATH": f"{stand_in['PYTHONPATH']}{os.pathsep}{ROOT}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path)],
        stdout=subprocess.PIPE,
        env=environ,
    )
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert (tmp_path / "energy" / "00000.parquet").exists()  # before the clock starts
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    end_s = time.monotonic() + 30
    while running(pid) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert not running(pid)
    assert pa.parquet.read_table(tmp_path / "energy" / "00000.parquet").num_rows > 0


def running(pid: int) -> bool:
    """Whether the process lives; a zombie that nobody waits for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# --- parts of the process -------------------------------------------------------------------------


class FakeNvml:
    """GPUs by UUID: index in the list, kind, and whether MIG is on."""

    def __init__(self, uuids: Sequence[str], kinds: Sequence[str] = (), mig: Sequence[int] = ()):
        self._uuids, self._mig = list(uuids), set(mig)
        self._kinds = list(kinds) or ["H100"] * len(self._uuids)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        return self._uuids[handle].encode()

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self._kinds[handle]

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return (int(handle in self._mig), 0)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        return int(handle[-1])


FOUR = ["GPU-aa", "GPU-ab", "GPU-ba", "GPU-bb"]


@pytest.mark.parametrize(
    ("shown", "n_gpus", "expected"),
    [
        (None, 1, [0]),
        (None, 4, [0, 1, 2, 3]),
        ("2,3", 2, [2, 3]),
        ("3,1,0", 2, [3, 1]),
        (" 1 , 2 ", 2, [1, 2]),
        ("GPU-ba,GPU-aa", 2, [2, 0]),
        ("GPU-ab", 1, [1]),
        ("1,-1,2", 1, [1]),  # CUDA stops at what is no device
        ("0,9,1", 1, [0]),
    ],
)
def test_cuda_visible_devices(shown: str | None, n_gpus: int, expected: list[int]) -> None:
    environ = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    found = energy.visible_gpus(FakeNvml(FOUR), environ, n_gpus)
    assert [gpu.index for gpu in found] == expected
    assert [gpu.uuid for gpu in found] == [FOUR[i] for i in expected]
    assert all(gpu.whole for gpu in found)


@pytest.mark.parametrize(
    ("shown", "n_gpus", "reason"),
    [("", 1, "0 are visible"), ("-1", 1, "0 are visible"), ("1,-1,2", 2, "1 are visible")],
)
def test_gpus_that_are_not_there(shown: str, n_gpus: int, reason: str) -> None:
    with pytest.raises(energy.NoGpuError, match=reason):
        energy.visible_gpus(FakeNvml(FOUR), {"CUDA_VISIBLE_DEVICES": shown}, n_gpus)


def test_numbers_of_unlike_gpus_need_an_order() -> None:
    mixed = FakeNvml(FOUR, ["H100", "H100", "A100", "A100"])
    with pytest.raises(energy.NoGpuError, match="PCI_BUS_ID"):
        energy.visible_gpus(mixed, {"CUDA_VISIBLE_DEVICES": "0"}, 1)
    by_bus = {"CUDA_VISIBLE_DEVICES": "2", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert [gpu.index for gpu in energy.visible_gpus(mixed, by_bus, 1)] == [2]
    by_name = {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert [gpu.index for gpu in energy.visible_gpus(mixed, by_name, 1)] == [2]


def test_a_mig_slice_is_part_of_its_gpu() -> None:
    (found,) = energy.visible_gpus(FakeNvml(FOUR), {"CUDA_VISIBLE_DEVICES": "MIG-of-3"}, 1)
    assert (found.index, found.whole) == (3, False)
    (found,) = energy.visible_gpus(FakeNvml(FOUR, mig=[1]), {"CUDA_VISIBLE_DEVICES": "1"}, 1)
    assert (found.index, found.whole) == (1, False)


def test_processes_of_the_run_are_told_from_others(tmp_path: Path) -> None:
    """10 is the run; 11 and 12 descend from it; 20 does not; 99 is not there."""
    for pid, parent in ((10, 1), (11, 10), (12, 11), (20, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) c) S {parent} 1 1 0")

    def asked(*pids: int) -> tuple[int | None, int | None]:
        running_ = [SimpleNamespace(pid=pid) for pid in pids]
        nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda handle: running_)
        return energy.Processes(nvml, 10, tmp_path).of(energy.Gpu(0, "GPU-a", 0, True))

    assert asked(12) == (1, 0)
    assert asked(10, 11) == (2, 0)
    assert asked(12, 20) == (2, 1)
    assert asked(12, 99) == (2, 1)
    # None of ours: the numbers are of another namespace, and nobody can be told from anybody.
    assert asked(20) == (1, None)
    assert asked(99) == (1, None)
    assert asked() == (0, None)
    assert energy.Processes(SimpleNamespace(), 10, tmp_path).of(
        energy.Gpu(0, "GPU-a", 0, True)
    ) == (None, None)


def row(time_ns: int, **other: Any) -> dict[str, Any]:
    return {
        "time_ns": time_ns, "gpu": 0, "uuid": "GPU-a", "whole_gpu": True, "energy_mj": None,
        "power_mw": None, "utilization_percent": None, "sm_clock_mhz": None, "temperature_c": None,
        "throttle_reasons": None, "n_processes": 1, "n_others": 0, **other,
    }  # fmt: skip


def test_a_part_is_written_again_until_it_holds_a_minute(tmp_path: Path) -> None:
    recorder = energy.Recorder(tmp_path, 0, 1)
    for second in range(0, 150):
        recorder.take([row(second * S)])
        recorder.write()
    names = sorted(path.name for path in (tmp_path / "energy").iterdir())
    assert names == ["00000-r1.parquet", "00001-r1.parquet", "00002-r1.parquet"]
    tables = [pa.parquet.read_table(tmp_path / "energy" / name) for name in names]
    times = [t for table in tables for t in table["time_ns"].to_pylist()]
    assert times == [second * S for second in range(150)]


def test_a_full_disk_loses_samples_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = energy.Recorder(tmp_path, 0, 0)
    real = store.write_energy_part

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_energy_part", full)
    for second in range(0, 70):  # the minute that could not be written is given up
        recorder.take([row(second * S)])
        recorder.write()
    monkeypatch.setattr(store, "write_energy_part", real)
    recorder.take([row(70 * S)])
    recorder.write()
    (path,) = (tmp_path / "energy").iterdir()
    assert pa.parquet.read_table(path)["time_ns"].to_pylist() == [s * S for s in range(61, 71)]


def test_the_loop_reads_once_more_when_its_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    calls: list[str] = []
    with os.fdopen(reading, "rb") as ended:
        monkeypatch.setattr(sys, "stdin", ended)
        energy.sample(lambda: calls.append("r"), lambda: calls.append("w"), lambda: False)
    assert calls == ["r", "w"]


# --- joules ---------------------------------------------------------------------------------------


def with_samples(directory: Path, rows: Sequence[dict[str, Any]], **about: Any) -> Run:
    about.setdefault("config", {})
    run = a_run(directory, about.pop("start_ns", 2 * S), about.pop("end_ns", 8 * S), **about)
    table = pa.Table.from_pylist(
        [{"session": 0, "replica": 0, **one} for one in rows], schema=store.ENERGY
    )
    store.write_energy_part(run.directory, 0, 0, table)
    return run


def every(step_ns: int, **of: Any) -> Iterator[dict[str, Any]]:
    """Samples from 0 to 10 s; each value a number or a function of the seconds."""
    for t in range(0, 10 * S + 1, step_ns):
        values = {name: value(t / 1e9) if callable(value) else value for name, value in of.items()}
        yield row(t, **values)


def test_the_counter_is_interpolated_at_both_ends(tmp_path: Path) -> None:
    """200 W from a counter of any start, read at odd times: 6 s are 1200 J."""
    rows = list(every(S * 7 // 10, energy_mj=lambda t: 123_456_789 + round(200_000 * t)))
    found = run_energy(with_samples(tmp_path / "r", rows))
    assert found.fault == ""
    assert found.by_counter
    assert found.joules == pytest.approx(1200.0, abs=1e-2)


def test_power_is_integrated_by_trapezoids(tmp_path: Path) -> None:
    """A ramp of 100 W + 50 W/s from 2 to 8 s: 600 + 25 (64 - 4) = 2100 J, exact for a ramp."""
    rows = list(every(S * 3 // 10, power_mw=lambda t: round(100_000 + 50_000 * t)))
    found = run_energy(with_samples(tmp_path / "r", rows))
    assert found.fault == ""
    assert not found.by_counter
    assert found.joules == pytest.approx(2100.0, abs=1e-2)


def test_a_counter_that_was_reset_gives_way_to_power(tmp_path: Path) -> None:
    rows = list(
        every(S // 2, energy_mj=lambda t: round(1000 * (t % 5)), power_mw=lambda t: 300_000)
    )
    found = run_energy(with_samples(tmp_path / "r", rows))
    assert not found.by_counter
    assert found.joules == pytest.approx(1800.0)


def faults(tmp_path: Path, rows: Sequence[dict[str, Any]], **about: Any) -> str:
    return run_energy(with_samples(tmp_path / "r", rows, **about)).fault


def test_a_gap_in_power_is_no_number_but_one_in_the_counter_is_harmless(tmp_path: Path) -> None:
    gap = [
        one
        for one in every(S // 4, energy_mj=lambda t: round(2e5 * t), power_mw=200_000)
        if not 3 * S < one["time_ns"] < 3 * S + (MAX_GAP_S + 1) * S
    ]
    found = run_energy(with_samples(tmp_path / "a", gap))
    assert found.fault == ""
    assert found.joules == pytest.approx(1200.0)
    assert "leave more than 1 s of the session out" in faults(
        tmp_path, [{**one, "energy_mj": None} for one in gap]
    )


@pytest.mark.parametrize("kept", [slice(15, None), slice(0, 25)], ids=["late", "died"])
def test_samples_that_miss_an_end_are_no_number(tmp_path: Path, kept: slice) -> None:
    rows = list(every(S // 4, energy_mj=lambda t: round(2e5 * t), power_mw=200_000))[kept]
    assert "leave more than 1 s of the session out" in faults(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_others": 1}, "other processes used it"),
        ({"whole_gpu": False}, "MIG slice"),
    ],
)
def test_a_gpu_that_others_use_is_no_number(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    rows = list(every(S // 4, energy_mj=lambda t: round(2e5 * t), **change))
    assert reason in faults(tmp_path, rows)


def test_others_before_the_session_do_not_matter(tmp_path: Path) -> None:
    rows = list(every(S // 4, energy_mj=lambda t: round(2e5 * t), n_others=lambda t: int(t < 2)))
    assert run_energy(with_samples(tmp_path / "r", rows)).fault == ""


def test_others_that_cannot_be_told_are_told_so(tmp_path: Path) -> None:
    rows = list(every(S // 4, energy_mj=lambda t: round(2e5 * t), n_others=None))
    arm = energy_of(Arm("a", (with_samples(tmp_path / "r", rows),)))
    assert arm.joules.value == pytest.approx(1200.0)
    assert "cannot be told" in arm.unsure


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"config": {"tp_size": 2}}, "not all GPUs of the run were sampled"),
        (
            {"sessions": [session(started_ns=2 * S, ended_ns=None)]},
            "a session did not end in order",
        ),
        (
            {"sessions": [session(started_ns=2 * S, ended_ns=8 * S, n_uncommitted=1)]},
            "in flight at the end",
        ),
    ],
)
def test_records_that_cannot_support_a_number(
    tmp_path: Path, about: dict[str, Any], reason: str
) -> None:
    rows = list(every(S // 4, energy_mj=lambda t: round(2e5 * t)))
    assert reason in faults(tmp_path, rows, **about)


def test_without_samples_the_manifest_says_why(tmp_path: Path) -> None:
    why = "the package nvidia-ml-py is not installed"
    run = a_run(tmp_path / "r", 0, S, sessions=[session(energy=why)])
    assert run_energy(run).fault == why
    plain = a_run(tmp_path / "p", 0, S)
    assert run_energy(plain).fault == "no energy was sampled"
    cpu = a_run(tmp_path / "c", 0, S, engine={"settings": {"device": "cpu"}})
    assert run_energy(cpu).fault == "the engine used no GPU"
    assert list(of_arms([Arm("a", (run,))])) == []


def test_two_sessions_and_replicas_add_up(tmp_path: Path) -> None:
    """100 W in each of two replicas' own clocks, 200 W in a later session alone."""
    sessions = [
        session(0, started_ns=2 * S, ended_ns=8 * S, replica=0),
        session(0, started_ns=1 * S, ended_ns=9 * S, replica=1),
        session(1, started_ns=3 * S, ended_ns=4 * S, replica=0),
    ]
    of_place = {(0, 0): 100, (0, 1): 100, (1, 0): 200}
    rows = [
        {**one, "session": number, "replica": replica, "uuid": f"GPU-{replica}"}
        for (number, replica), watts in of_place.items()
        for one in every(S // 2, energy_mj=lambda t, w=watts: round(1e3 * w * t))
    ]
    run = with_samples(tmp_path / "r", rows, sessions=sessions)
    found = run_energy(run)
    assert found.joules == pytest.approx(600 + 800 + 200)
    assert found.seconds == pytest.approx(8 + 1)
    shared = [{**one, "uuid": "GPU-0"} for one in rows]
    assert "share GPU GPU-0" in faults(tmp_path / "x", shared, sessions=sessions)


def test_shards_that_were_merged_add_up(tmp_path: Path) -> None:
    for i in range(2):
        rows = list(every(S // 2, energy_mj=lambda t: round(1e5 * t), uuid=f"GPU-{i}"))
        run = stored(
            tmp_path / str(i),
            [conversation(f"c{i}", "x", [1, 3, 4])],
            sessions=[session(started_ns=2 * S, ended_ns=8 * S)],
        )
        table = pa.Table.from_pylist(
            [{**one, "session": 0, "replica": 0} for one in rows], schema=store.ENERGY
        )
        store.write_energy_part(run.directory, 0, 0, table)
    both = merged([tmp_path / "0", tmp_path / "1"])
    found = run_energy(both)
    assert found.joules == pytest.approx(1200.0)
    assert found.n_tokens == 16


def test_repeats_give_an_interval(tmp_path: Path) -> None:
    runs = [
        with_samples(
            tmp_path / str(watts), list(every(S, energy_mj=lambda t, w=watts: round(1e3 * w * t)))
        )
        for watts in (100, 300)
    ]
    found = energy_of(Arm("a", tuple(runs)))
    # 600 J and 1800 J for 8 tokens each; t of one degree of freedom is 12.7062.
    assert found.joules.value == pytest.approx(1200.0)
    assert found.joules.interval == pytest.approx((1200 - 12.7062 * 600, 1200 + 12.7062 * 600))
    assert found.joules_per_million.value == pytest.approx(1.5e8)
    assert found.watts.value == pytest.approx(200.0)
    one = energy_of(Arm("a", (runs[0],)))
    assert one.joules.interval is None
    assert "repeats" in one.joules.why_not


def test_slowed_clocks_are_told_but_idle_ones_are_not(tmp_path: Path) -> None:
    rows = list(
        every(
            S, energy_mj=lambda t: round(1e5 * t), throttle_reasons=lambda t: 0x20 if t < 5 else 1
        )
    )
    run = with_samples(tmp_path / "r", rows)
    found = energy_of(Arm("a", (run,)))
    assert found.slowed.value == pytest.approx(3 / 7)  # at 2, 3 and 4 s of 2..8 s
    blocks = list(of_arms([Arm("a", (run,))], InsightOptions()))
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows[0][-1] == "42.86 %"


def test_a_damaged_part_is_one_sentence(tmp_path: Path) -> None:
    run = a_run(tmp_path / "r", 0, S)
    (run.directory / "energy").mkdir()
    (run.directory / "energy" / "00000.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="restore it from a copy"):
        run_energy(run)
