"""Processes: those that an engine started, what each is doing, and how they are ended.

Standard library and /proc only, so that it works beside an engine that does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

NOT_OF_ENGINE = (
    "speedbench.guardian",
    "speedbench.mirror_process",
    "speedbench.energy",
    "speedbench.server_metrics",
    "multiprocessing.resource_tracker",
)
"""Helpers that end by themselves when the run does: what they have left to do is worth doing."""

NICENESS = 10

ABORT_S = 3.0
"""How long a process may take to print its stacks."""

PY_SPY_S = 20.0


def of_engine(parent: int | None = None) -> list[int]:
    """All processes that this one (or `parent`) started, and those they started, helpers apart."""
    return [p for p in descendants(parent or os.getpid()) if not _is_helper(p)]


def descendants(process: int) -> list[int]:
    """All processes that one started, and those they started."""
    found = []
    for folder in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in map(int, (folder / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def _is_helper(process: int) -> bool:
    command = command_of(process)
    return any(name in command for name in NOT_OF_ENGINE)


def give_way() -> None:
    """Where the CPUs are all busy, what is measured goes before this thread and what it starts.
    Only Linux has priorities of threads: elsewhere a thread beside the main one keeps its own."""
    if sys.platform == "linux" or threading.current_thread() is threading.main_thread():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)


def command_of(process: int) -> str:
    return _read(process, "cmdline").replace("\0", " ").strip()


def started(process: int) -> str:
    """When a process began: with its number, what tells it from a later one. '' of one that ended
    (and may wait to be reaped)."""
    fields = _read(process, "stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def is_suspended(process: int) -> bool:
    return _read(process, "stat").rpartition(")")[2].split()[:1] in (["T"], ["t"])


def told(process: int) -> str:
    """What a process is doing, as far as that is told without its help."""
    lines = [f"process {process}: {command_of(process) or 'ended'}"]
    wanted = ("State", "Threads", "VmRSS")
    status = _read(process, "status").splitlines()
    lines += [line for line in status if line.partition(":")[0] in wanted]
    if (channel := _read(process, "wchan").strip()) not in ("", "0"):
        lines.append(f"waits in the kernel at {channel}")
    if stack := _read(process, "stack"):
        lines += ["kernel stack:", *(f"  {line}" for line in stack.splitlines()[:12])]
    if shutil.which("py-spy"):
        lines.append(_spied(process))
    return "\n".join(lines) + "\n"


def _spied(process: int) -> str:
    try:
        done = subprocess.run(
            ("py-spy", "dump", "--pid", str(process)),
            capture_output=True, text=True, timeout=PY_SPY_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"py-spy: {error}"
    return done.stdout or done.stderr


def end(processes: Sequence[int]) -> str:
    """End processes, at once. What those that print their stacks at SIGABRT said, where that went
    to a file; elsewhere it stands in the log."""
    begun = {process: started(process) for process in processes}
    logs = {path: path.stat().st_size for p in processes if (path := _log_of(p)) is not None}
    speaking = [process for process in processes if _prints_stacks(process)]
    for process in speaking:
        with contextlib.suppress(OSError, ValueError):
            hard = resource.prlimit(process, resource.RLIMIT_CORE)[1]
            resource.prlimit(process, resource.RLIMIT_CORE, (0, hard))  # no dump of its memory
        for number in (signal.SIGABRT, signal.SIGCONT):
            _send(process, number)
    limit_s = time.monotonic() + ABORT_S
    while any(started(process) for process in speaking) and time.monotonic() < limit_s:
        time.sleep(0.05)
    kill(begun.items())
    return "".join(_added(path, size) for path, size in logs.items())


def kill(begun: Iterable[tuple[int, str]]) -> None:
    """SIGKILL to those of (process, when it began) that are still the same."""
    for process, when in begun:
        if when and started(process) == when:
            _send(process, signal.SIGKILL)


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(process, number)


def _prints_stacks(process: int) -> bool:
    """Whether it catches SIGABRT, as Python's fault handler does (see cli_measure.settle)."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", _read(process, "status"), re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGABRT - 1) & 1)


def _log_of(process: int) -> Path | None:
    """Where its stderr goes, if that is a file."""
    with contextlib.suppress(OSError):
        path = Path(f"/proc/{process}/fd/2").resolve()
        return path if path.is_file() else None
    return None


def _added(path: Path, size: int) -> str:
    """What was written to a file since it had that size; at most 100 kB."""
    try:
        with path.open("rb") as file:
            file.seek(size)
            text = file.read(100_000).decode(errors="replace")
    except OSError:
        return ""
    return f"\nmeanwhile in {path}:\n{text}\n" if text else ""


def _read(process: int, name: str) -> str:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""
