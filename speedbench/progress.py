"""Progress: how far a run has come, told from the loop's counts and from what is stored already.

Nothing here runs in the loop's thread: the loop keeps two counts for itself, and acceptance is read
from the parts that the writer has finished, by the code that reports them. So the acceptance length
shown last is the report's, and showing it costs the run nothing but a moment of a second thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speedbench import metrics, store
from speedbench.checks import counted
from speedbench.columns import Ints
from speedbench.types import UserError

WINDOW_S = 30.0
"""What 'recent' is for output tokens/s."""
STALL_S = 5.0
"""A pause this long is told; prefills of long prompts make shorter ones."""


@dataclass(slots=True)  # mutable: grows with the parts of a run
class StoredAcceptance:
    """Decode steps by length of every conversation stored so far, by category.

    It is of the whole run: of all replicas, and of earlier sessions.
    """

    directory: Path
    whole: dict[str, Ints] = field(default_factory=dict)
    cut: dict[str, Ints] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _manifest: Mapping[str, Any] = field(default_factory=dict)

    def refresh(self) -> None:
        """Count what was stored since the last time. A part that cannot be read is the report's to
        tell."""
        try:
            self._manifest = self._manifest or store.read_manifest(self.directory)
            run = store.load_new(self.directory, self._manifest, self._seen)
        except (OSError, UserError):
            return
        counts = counted(run)
        for g, name in enumerate(run.columns.categories):
            members = counts.category == g
            for sums, rows in ((self.whole, counts.whole), (self.cut, counts.cut)):
                sums[name] = sums.get(name, 0) + rows[members].sum(axis=0)

    def al(self) -> tuple[float, int, int]:
        """`al` of DESIGN.md over the categories that have one yet, how many these are, and of how
        many; NaN without any, and where nothing is drafted. With all of them it is the report's."""
        if not self._manifest or not self._manifest["engine"]["draft_length"]:
            return math.nan, 0, len(self.whole)
        names = sorted(self.whole)
        each = [metrics.acceptance_length(self.whole[name], self.cut[name]) for name in names]
        known = [value for value in each if not np.isnan(value)]
        al = float(np.array([known]).mean(axis=1)[0]) if known else math.nan
        return al, len(known), len(names)

    @property
    def is_simulated(self) -> bool:
        return bool(self._manifest and self._manifest["engine"].get("simulated"))


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known at one moment. None: cannot be told yet.

    recent_tps   output tokens/s of the last WINDOW_S
    output_tps   the same since the start
    stall_s      since the last token came
    """

    n_done: int
    n_rows: int
    n_failed: int
    elapsed_s: float
    recent_tps: float | None
    output_tps: float | None
    eta_s: float | None
    stall_s: float


@dataclass(slots=True)  # mutable: remembers the last WINDOW_S
class Meter:
    """Rates from two counts and a clock."""

    n_rows: int
    started_s: float
    _seen: deque[tuple[float, int]] = field(default_factory=deque)
    _last_token_s: float | None = None
    _n_tokens: int = 0

    def at(self, now_s: float, n_done: int, n_tokens: int, n_failed: int) -> Moment:
        if not self._seen:
            self._seen.append((self.started_s, 0))
        if n_tokens != self._n_tokens or self._last_token_s is None:
            self._last_token_s, self._n_tokens = now_s, n_tokens
        self._seen.append((now_s, n_tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - WINDOW_S:
            self._seen.popleft()
        then_s, before = self._seen[0]
        elapsed_s = now_s - self.started_s
        eta_s = elapsed_s * (self.n_rows - n_done) / n_done if n_done else None
        return Moment(
            n_done,
            self.n_rows,
            n_failed,
            elapsed_s,
            (n_tokens - before) / (now_s - then_s) if n_tokens and now_s > then_s else None,
            n_tokens / elapsed_s if n_tokens and elapsed_s > 0 else None,
            eta_s,
            now_s - self._last_token_s,
        )


def line(moment: Moment, stored: StoredAcceptance) -> str:
    """The moment in one line; why a number is missing stands in its place."""
    parts = [f"{moment.n_done}/{moment.n_rows} conversations"]
    if moment.n_failed:
        parts.append(f"{moment.n_failed} FAILED")
    al, n_known, n_categories = stored.al()
    if not math.isnan(al):
        some = f" ({n_known} of {n_categories} categories)" if n_known < n_categories else ""
        parts.append(f"AL {al:.3f} so far{some}")
    if stored.is_simulated:
        parts.append("TPS n/a (simulated clock)")
    elif moment.output_tps is None or moment.recent_tps is None:
        parts.append("TPS n/a (no token yet)")
    else:
        parts.append(f"TPS {moment.recent_tps:,.0f} ({moment.output_tps:,.0f} since the start)")
    parts.append(f"{duration(moment.elapsed_s)} gone")
    eta = "n/a (nothing ended yet)" if moment.eta_s is None else duration(moment.eta_s)
    parts.append(f"ETA {eta}")
    if moment.stall_s >= STALL_S:
        parts.append(f"NO TOKEN for {duration(moment.stall_s)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
