"""Joules of an arm: what its GPUs drew between the start and the end of each session.

From the GPU's own counter where it has one (interpolated at both ends), else from its power, which
is integrated by the trapezoid rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speedbench import store
from speedbench.columns import Floats
from speedbench.insights import rates
from speedbench.insights.figures import of_repeats
from speedbench.report.arms import Arm
from speedbench.report.summary import Figure
from speedbench.store import Run

MAX_GAP_S = 1.0
"""Longest time between samples over which power is taken for a straight line, and longest time by
which the counter may miss an end of the session."""
SLOWDOWN = 0x4 | 0x8 | 0x20 | 0x40 | 0x80
"""NVML's reasons for lower clocks: power cap, hardware slowdown, software and hardware thermal
slowdown, power brake. (Idle, and clocks that were asked for, are none.)"""
ONE_RUN = "one run: only repeats can tell how much it varies"


@dataclass(frozen=True, slots=True)
class ArmEnergy:
    """Energy of one arm, the mean of its repeats.

    joules                from session start to end, all GPUs of the run
    joules_per_million    per million output tokens
    watts                 mean power of all GPUs together
    slowed                share of samples in which a GPU ran at lower clocks for want of power or
                          cooling
    source                'the GPUs' counters' or 'sampled power'
    unsure                what could not be told of other users of the GPUs; '' if they were alone
    """

    label: str
    joules: Figure
    joules_per_million: Figure
    watts: Figure
    slowed: Figure
    source: str = ""
    unsure: str = ""


@dataclass(frozen=True, slots=True)
class RunEnergy:
    """Of one run; `fault` says why there is no number."""

    joules: float
    seconds: float
    n_tokens: int
    n_slowed: int
    n_clocked: int
    by_counter: bool
    unsure: bool
    fault: str = ""


def energy_of(arm: Arm) -> ArmEnergy:
    found = [run_energy(run) for run in arm.runs]
    fault = next((one.fault for one in found if one.fault), "")
    if fault:
        nothing = Figure(None, why_not=fault)
        return ArmEnergy(arm.label, nothing, nothing, nothing, nothing)
    tokens = [one.n_tokens for one in found]
    per_million = (
        of_repeats([o.joules / o.n_tokens * 1e6 for o in found], ONE_RUN)
        if all(tokens)
        else Figure(None, why_not="no token was put out")
    )
    clocked = sum(one.n_clocked for one in found)
    return ArmEnergy(
        arm.label,
        of_repeats([one.joules for one in found], ONE_RUN),
        per_million,
        of_repeats([one.joules / one.seconds for one in found], ONE_RUN),
        Figure(
            sum(one.n_slowed for one in found) / clocked if clocked else None,
            why_not="a share of samples" if clocked else "NVML does not tell of clocks",
        ),
        "the GPUs' counters" if all(one.by_counter for one in found) else "sampled power",
        "whether other processes used the GPUs cannot be told here"
        if any(one.unsure for one in found)
        else "",
    )


def run_energy(run: Run) -> RunEnergy:
    """Joules of a run from its stored samples. Raises UserError if a part cannot be read."""
    table = store.load_energy(run)
    if why := _why_none(run, table):
        return _fault(why)
    joules, n_slowed, n_clocked = 0.0, 0, 0
    by_counter, unsure = True, False
    seconds: dict[int, float] = {}
    seen: set[tuple[int, str]] = set()
    for session in run.manifest["sessions"]:
        number, replica = session["session"], session.get("replica", 0)
        start_ns, end_ns = int(session["started_ns"]), int(session["ended_ns"])
        seconds[number] = max(seconds.get(number, 0.0), (end_ns - start_ns) / 1e9)
        mine = table.filter(
            pc.and_(pc.equal(table["session"], number), pc.equal(table["replica"], replica))
        )
        of_gpus = pc.unique(mine["uuid"]).to_pylist()
        if len(of_gpus) != _gpus_each(run):
            told = session.get("energy") or "not all GPUs of the run were sampled"
            return _fault(str(told))
        for uuid in of_gpus:
            if (number, uuid) in seen:
                return _fault(f"two replicas share GPU {uuid}")
            seen.add((number, uuid))
            one = _gpu_energy(mine.filter(pc.equal(mine["uuid"], uuid)), start_ns, end_ns)
            if isinstance(one, str):
                return _fault(f"GPU {uuid}: {one}")
            joules += one.joules
            n_slowed, n_clocked = n_slowed + one.n_slowed, n_clocked + one.n_clocked
            by_counter, unsure = by_counter and one.by_counter, unsure or one.unsure
    return RunEnergy(
        joules, sum(seconds.values()), _n_tokens(run), n_slowed, n_clocked, by_counter, unsure
    )


@dataclass(frozen=True, slots=True)
class _GpuEnergy:
    joules: float
    n_slowed: int
    n_clocked: int
    by_counter: bool
    unsure: bool


def _gpu_energy(samples: pa.Table, start_ns: int, end_ns: int) -> _GpuEnergy | str:
    """Of one GPU in one session, or why it is not known."""
    inside = samples.filter(
        pc.and_(
            pc.greater_equal(samples["time_ns"], start_ns),
            pc.less_equal(samples["time_ns"], end_ns),
        )
    )
    if not pc.all(samples["whole_gpu"]).as_py():
        return "the run had a MIG slice, and NVML counts the energy of whole GPUs"
    if (pc.max(inside["n_others"]).as_py() or 0) > 0:
        return "other processes used it during the session"
    found = _joules(samples, start_ns, end_ns)
    if found is None:
        return f"its samples leave more than {MAX_GAP_S:g} s of the session out"
    reasons = inside["throttle_reasons"].drop_null().to_numpy()
    return _GpuEnergy(
        found[0],
        int(((reasons & SLOWDOWN) != 0).sum()),
        len(reasons),
        found[1],
        inside["n_others"].null_count > 0,
    )


def _gpus_each(run: Run) -> int:
    """GPUs that each replica's engine spreads over."""
    config = run.manifest["config"]
    return int(config["tp_size"]) * int(config["pp_size"]) * int(config["dp_size"])


def _fault(why: str) -> RunEnergy:
    return RunEnergy(0.0, 0.0, 0, 0, 0, False, False, why)


def _why_none(run: Run, table: pa.Table) -> str:
    """Why the records cannot support a number; '' if they can."""
    sessions = run.manifest["sessions"]
    if not len(table):
        told = [session["energy"] for session in sessions if session.get("energy")]
        return str(told[0]) if told else _no_gpu(run) or "no energy was sampled"
    if any(session.get("ended_ns") is None for session in sessions):
        return "a session did not end in order"
    if any(session.get("n_uncommitted") for session in sessions):
        return "conversations were in flight at the end, and their tokens are not in the records"
    return "a part of the records cannot be read" if run.damage else ""


def _no_gpu(run: Run) -> str:
    return rates.n_gpus(Arm("", (run,)))[1]


def _joules(samples: pa.Table, start_ns: int, end_ns: int) -> tuple[float, bool] | None:
    """Joules between two times, and whether the counter told them; None where samples lack."""
    length_s = (end_ns - start_ns) / 1e9
    times_s, energy_mj = _series(samples, "energy_mj", start_ns)
    if _covers(times_s, length_s) and not (np.diff(energy_mj) < 0).any():
        at = np.interp([0.0, length_s], times_s, energy_mj)
        return float(at[1] - at[0]) / 1e3, True
    times_s, power_mw = _series(samples, "power_mw", start_ns)
    if not _covers(times_s, length_s):
        return None
    first = int(np.searchsorted(times_s, 0.0, side="right")) - 1
    last = int(np.searchsorted(times_s, length_s, side="left"))
    if (np.diff(times_s[first : last + 1]) > MAX_GAP_S).any():
        return None
    inside = (times_s > 0) & (times_s < length_s)
    at = np.concatenate([[0.0], times_s[inside], [length_s]])
    power = np.interp(at, times_s, power_mw)
    return float((np.diff(at) * (power[1:] + power[:-1]) / 2).sum()) / 1e3, False


def _series(samples: pa.Table, name: str, start_ns: int) -> tuple[Floats, Floats]:
    """Seconds since the start and what was told then, by time; untold samples left out."""
    told = samples.filter(pc.is_valid(samples[name])).sort_by("time_ns")
    # Subtracted as integers: a clock of years in nanoseconds does not fit a float.
    seconds = (np.asarray(told["time_ns"].to_numpy(), np.int64) - start_ns) / 1e9
    return seconds, np.asarray(told[name].to_numpy(), float)


def _covers(times_s: Floats, length_s: float) -> bool:
    """There is a sample shortly before the start and one shortly after the end."""
    before, after = times_s[times_s <= 0], times_s[times_s >= length_s]
    return (
        len(before) > 0
        and len(after) > 0
        and bool(-before[-1] <= MAX_GAP_S and after[0] - length_s <= MAX_GAP_S)
    )


def _n_tokens(run: Run) -> int:
    """All output tokens, also of requests that failed and of attempts that were made again: the
    GPUs worked for them, too."""
    return int(pc.sum(pc.list_value_length(run.turns["output_token_ids"])).as_py() or 0)
