"""The fault campaign: every fault of tests/faults/cases.py on real processes, as often as it says,
and docs/faults.md with what was promised and what was seen.

    python scripts/faults.py            the whole of it, about half an hour on two cores
    python scripts/faults.py --quick    each fault once, without rewriting the page
    python scripts/faults.py --only NAME
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults.cases import FAULTS, Fault  # noqa: E402
from tests.faults.scene import CannotError, Scene  # noqa: E402

PAGE = ROOT / "docs" / "faults.md"

HEAD = """\
# The fault campaign

Each fault is made to happen to a run in a process of its own (the null engine, with one thing that
goes wrong), at a random moment or place where it has one. Afterwards, whatever the fault was:

- every answer that had been stored is still there, with the same tokens, and none is there twice;
- `--resume` completes the run, or the command that was refused has changed nothing;
- the report can be made, and says what happened;
- the exit code is the documented one (137, 139, 134: ended by SIGKILL, SIGSEGV, SIGABRT);
- no process that the run had started is left after ten seconds, and there was no traceback.

The same faults, once each, are among the tests (`tests/faults/`), with some on real vLLM.

"""


@dataclass(slots=True)  # mutable: filled try by try
class Tally:
    fault: Fault
    n: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    cannot: str = ""

    @property
    def verdict(self) -> str:
        if self.broken:
            return f"**BROKEN {len(self.broken)} time(s)**: {self.broken[0]}"
        if self.cannot:
            return f"not tried: {self.cannot}"
        return summed(self.seen)


def summed(seen: Counter[str]) -> str:
    """What was seen, with the range where only numbers differ."""
    groups: dict[str, list[list[int]]] = {}
    for text, times in seen.items():
        numbers = [int(word) for word in re.findall(r"\d+", text)]
        groups.setdefault(re.sub(r"\d+", "{}", text), []).extend([numbers] * times)
    shown = []
    for form, rows in groups.items():
        ranges = [
            str(low) if (low := min(column)) == max(column) else f"{low}-{max(column)}"
            for column in zip(*rows, strict=True)
        ]
        prefix = f"{len(rows)} x " if len(groups) > 1 else ""
        shown.append(prefix + form.format(*ranges))
    return "; or ".join(shown)


def tried(fault: Fault, times: int, seed: int) -> Tally:
    tally = Tally(fault)
    for turn in range(times):
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            tally.n += 1
            scene = Scene(Path(folder), Random(f"{seed}:{turn}"))
            try:
                tally.seen[fault.happen(scene)] += 1
            except CannotError as reason:
                tally.cannot = str(reason)
                tally.n = 0
                break
            except Exception as broken:  # noqa: BLE001 - what no promise foresaw breaks one
                what = " ".join(f"{type(broken).__name__}: {broken}".split())
                tally.broken.append(f"try {turn}: {what[:300]}")
                with contextlib.suppress(AssertionError):
                    scene.nobody_is_left()
    return tally


def page(tallies: Iterable[Tally], seconds: float, command: str) -> str:
    tallies = list(tallies)
    n = sum(tally.n for tally in tallies)
    n_broken = sum(len(tally.broken) for tally in tallies)
    lines = [
        f"{n} tries of {len(tallies)} faults in {seconds / 60:.0f} minutes, {n_broken} broken "
        f"promise(s). {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}: `{command}`.",
        "",
        "| fault | promised | seen | tried |",
        "|---|---|---|---|",
        *(
            f"| {tally.fault.name} | {tally.fault.promised} | {tally.verdict} | {tally.n} |"
            for tally in tallies
        ),
    ]
    return HEAD + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="each fault once")
    parser.add_argument("--tries", type=int, default=10**6, metavar="N", help="N of each at most")
    parser.add_argument("--only", metavar="NAME", help="faults with this in their name")
    parser.add_argument("--seed", type=int, default=20261122)
    given = parser.parse_args(argv)
    command = " ".join(["python scripts/faults.py", *(sys.argv[1:] if argv is None else argv)])
    started_s = time.monotonic()
    tallies = []
    for fault in FAULTS:
        times = min(given.tries, fault.n_quick if given.quick else fault.n_full)
        if times == 0 or (given.only and given.only not in fault.name):
            continue
        tally = tried(fault, times, given.seed)
        tallies.append(tally)
        print(f"{tally.n:4d} x {fault.name}: {tally.verdict}", flush=True)
    if not given.quick and not given.only:
        PAGE.write_text(page(tallies, time.monotonic() - started_s, command))
        print(f"written: {PAGE.relative_to(ROOT)}")
    return 1 if any(tally.broken for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
