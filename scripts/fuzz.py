#!/usr/bin/env python3
"""Damaged inputs, by the hundred thousand, through every reader of foreign bytes.

    python scripts/fuzz.py                      # 100,000 over all cores: nightly
    python scripts/fuzz.py --seed 7 --readers run sweep --n 5000
    python scripts/fuzz.py --seed 7 --readers sweep --only 123      # one input again

A reader takes an input, or refuses it in one sentence that names the file. Anything else is a
fault: a traceback, a hang, a process that dies, a gigabyte for an input of kilobytes, a number that
damage changed in silence. Inputs that show one are kept, with what was seen; then the exit code is
1. What is tried is decided by --seed alone: the same seed tries the same inputs anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fuzz import campaign
from tests.fuzz.readers import READERS

Case = tuple[str, int]
"""A reader's name and the number of its input."""

CHUNK = 50
GRACE_S = 180.0
"""What a worker gets beyond --limit_s, which no signal ends inside a C library, or where it sleeps:
by the clock on the wall, which goes on while a busy machine does other things."""
WARMING_S = 600.0
"""A reader's first input, which is whole, also imports what it needs: transformers, say."""
MOST_GROWTH_KIB = 1 << 20
"""An input of kilobytes that takes a gigabyte has taken too much."""


def main() -> int:
    given = _arguments()
    names = given.readers or list(READERS)
    chosen = {name: READERS[name] for name in names}
    if given.only is not None:
        cases = [(name, given.only) for name in names]
    else:
        cases = list(_mixed(campaign.shares(chosen, given.n)))
    started_s = time.monotonic()
    outcomes: Counter[tuple[str, str]] = Counter()
    told_s = started_s
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # then the table is of what was tried
        for n_done, ((name, index), found) in enumerate(_outcomes(cases, given), 1):
            outcomes[name, found.outcome] += 1
            if found.outcome == "fault":
                _keep(given.save_dir, name, index, given.seed, found.what)
                last = found.what.strip().splitlines()[-1]
                print(f"FAULT {name} {index}: {last:.300}", flush=True)
            if time.monotonic() - told_s > 60:
                told_s = time.monotonic()
                print(f"{n_done} of {len(cases)} after {told_s - started_s:.0f} s", flush=True)
    _print_table(names, outcomes, time.monotonic() - started_s, given.seed)
    n_faults = sum(n for (_, outcome), n in outcomes.items() if outcome == "fault")
    if n_faults:
        print(f"{n_faults} fault(s): the inputs are in {given.save_dir}")
    return 1 if n_faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--n", type=int, default=100_000, help="inputs over all readers (default: 100000)")
    add("--seed", type=int, default=0)
    add("--readers", nargs="+", choices=list(READERS), metavar="NAME", help="default: all")
    add("--only", type=int, metavar="INDEX", help="this input of each reader, and no other")
    add("--workers", type=int, default=os.cpu_count() or 1)
    add("--limit_s", type=float, default=20.0, help="CPU time that one input may take")
    add("--memory_gib", type=float, default=12.0, help="address space of one worker")
    add("--save_dir", type=Path, default=Path("fuzz-failures"), help="for inputs that fail")
    return parser.parse_args()


def _mixed(shares: dict[str, int]) -> Iterator[Case]:
    """Every reader's cases, spread evenly: a short look at the output shows all of them."""
    places = [((index + 0.5) / n, name, index) for name, n in shares.items() for index in range(n)]
    for _, name, index in sorted(places):
        yield name, index


def _keep(folder: Path, name: str, index: int, seed: int, what: str) -> None:
    place = folder / f"{name}-{seed}-{index}"
    campaign.write(campaign.case(READERS[name], seed, index), place / "input")
    (place / "what.txt").write_text(what, encoding="utf-8", errors="backslashreplace")


def _print_table(
    names: Sequence[str], outcomes: Counter[tuple[str, str]], took_s: float, seed: int
) -> None:
    print(f"\n{'reader':<18}{'inputs':>9}{'read':>9}{'refused':>9}{'faults':>9}")
    total: Counter[str] = Counter()
    for name in names:
        row = [outcomes[name, outcome] for outcome in ("read", "refused", "fault")]
        total.update(dict(zip(("read", "refused", "fault"), row, strict=True)))
        print(f"{name:<18}{sum(row):>9}" + "".join(f"{n:>9}" for n in row))
    row = [total[outcome] for outcome in ("read", "refused", "fault")]
    print(f"{'all':<18}{sum(row):>9}" + "".join(f"{n:>9}" for n in row))
    print(f"seed {seed}, {took_s:.0f} s")


# ---------------------------------------------------------------- workers


@dataclass(slots=True)
class _Worker:
    """A process, and what it was given: `todo[0]` is what it is at."""

    process: multiprocessing.process.BaseProcess
    pipe: Connection
    todo: list[Case] = field(default_factory=list)
    heard_s: float = field(default_factory=time.monotonic)


def _outcomes(
    cases: Sequence[Case], given: argparse.Namespace
) -> Iterator[tuple[Case, campaign.Result]]:
    """Every case with its result, in the order in which they end."""
    chunks = [list(cases[i : i + CHUNK]) for i in range(0, len(cases), CHUNK)][::-1]
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as scratch:
        workers = [_started(given, scratch, i) for i in range(min(given.workers, len(chunks)))]
        while any(worker.todo for worker in workers) or chunks:
            for number, worker in enumerate(workers):
                if not worker.todo and chunks:
                    worker.todo = chunks.pop()
                    worker.heard_s = time.monotonic()
                    worker.pipe.send(worker.todo)
                silent_s = time.monotonic() - worker.heard_s
                if worker.todo and silent_s > given.limit_s + GRACE_S:
                    worker.process.kill()
                    yield worker.todo[0], campaign.Result("fault", f"silent for {silent_s:.0f} s")
                    workers[number] = _replaced(worker, given, scratch, number)
            for pipe in wait([worker.pipe for worker in workers if worker.todo], timeout=1.0):
                number = next(i for i, worker in enumerate(workers) if worker.pipe is pipe)
                worker = workers[number]
                try:
                    found = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    what = f"the process ended with code {worker.process.exitcode}"
                    yield worker.todo[0], campaign.Result("fault", what)
                    workers[number] = _replaced(worker, given, scratch, number)
                    continue
                worker.heard_s = time.monotonic()
                if isinstance(found, float):  # it asks for so much patience
                    worker.heard_s += found
                    continue
                yield worker.todo.pop(0), found
        for worker in workers:
            worker.pipe.send(None)
            worker.process.join(10)
            worker.process.kill()


def _memory_disk() -> str | None:
    """Inputs are small and many: they need no disk."""
    place = Path("/dev/shm")
    return str(place) if place.is_dir() and os.access(place, os.W_OK) else None


def _started(given: argparse.Namespace, scratch: str, number: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work,
        args=(theirs, f"{scratch}/{number}", given.seed, given.limit_s, given.memory_gib),
        daemon=True,
    )
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _replaced(worker: _Worker, given: argparse.Namespace, scratch: str, number: int) -> _Worker:
    """A new worker for what the old one left."""
    fresh = _started(given, scratch, number)
    fresh.todo = worker.todo[1:]
    if fresh.todo:
        fresh.pipe.send(fresh.todo)
    return fresh


def _work(pipe: Connection, scratch: str, seed: int, limit_s: float, memory_gib: float) -> None:
    most = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pa.set_cpu_count(1)  # as many workers as cores: threads of each would only wait for others
    pa.set_io_thread_count(1)
    folder = Path(scratch) / "input"
    warm: set[str] = set()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while (chunk := pipe.recv()) is not None:
            _try_each(chunk, pipe, folder, warm, seed, limit_s)


def _try_each(
    chunk: Sequence[Case],
    pipe: Connection,
    folder: Path,
    warm: set[str],
    seed: int,
    limit_s: float,
) -> None:
    for name, index in chunk:
        reader = READERS[name]
        if name not in warm:  # what it imports, and how long that takes, is nobody's fault
            pipe.send(WARMING_S)
            campaign.write(reader.seeds()[0], folder)
            campaign.result(reader, folder)
            warm.add(name)
            pipe.send(0.0)
        campaign.write(campaign.case(reader, seed, index), folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = campaign.result(reader, folder, limit_s)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > MOST_GROWTH_KIB and found.outcome != "fault":
            found = campaign.Result("fault", f"took {grown / 2**20:.1f} GiB")
        pipe.send(found)
        for path in folder.parent.iterdir():  # what the reader wrote beside its input
            if path != folder:
                path.unlink() if path.is_file() else shutil.rmtree(path)


if __name__ == "__main__":
    sys.exit(main())
