"""Figure: a number of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95 % interval; `why_not` says why the number, or its interval, is None."""

    value: float | None
    interval: tuple[float, float] | None = None
    why_not: str = ""
