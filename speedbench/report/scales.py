"""Scales: from values to pixels, with ticks at round values whose words do not touch."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from speedbench.report.blocks import clean

FONT = 12.0


def text_width(text: str, size: float = FONT) -> float:
    """Of a line in a wide sans-serif face: what is left free for it suits narrower ones, too."""
    return sum(_advance(char) for char in text) * size


def _advance(char: str) -> float:
    """Width of a character in units of the font size."""
    if unicodedata.east_asian_width(char) in "WF":
        return 1.05
    if char in "iljI.,:;|!'()[] ":
        return 0.4
    if char in "mwMW@%":
        return 0.98
    return 0.7 if char.isupper() else 0.64


def fitted(text: str, width: float, lines: int = 1, size: float = FONT) -> list[str]:
    """Text in at most so many lines of this width; what does not fit ends in an ellipsis."""
    made: list[str] = []
    rest = clean(text)
    while rest:
        if text_width(rest, size) <= width:
            return [*made, rest]
        last = len(made) == lines - 1
        room = width - (text_width("…", size) if last else 0)
        end = _fitting(rest, room, size)
        if last:
            return [*made, rest[:end].rstrip() + "…"]
        space = rest.rfind(" ", 0, end + 1)
        end = space if space > 0 else end
        made.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return made or [""]


def _fitting(text: str, width: float, size: float) -> int:
    """How many characters of the text fit, at least one."""
    used = 0.0
    for i, char in enumerate(text):
        used += _advance(char) * size
        if used > width:
            return max(1, i)
    return len(text)


@dataclass(frozen=True, slots=True)
class Scale:
    """Values low..high on pixels start..end; `ticks` are (value, words)."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_step(span: float, n: int) -> float:
    """The smallest of 1, 2, 2.5, 5 x 10^i that cuts `span` into at most n parts."""
    rough = span / max(n, 1)
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def linear_ticks(low: float, high: float, n: int) -> list[float]:
    """Round values from low to high, about n."""
    step = nice_step(high - low, n)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, n: int) -> list[float]:
    """1, 2, 5 x 10^i where there are few decades, decades where many; round values within one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**d for d in decades for m in steps]
        found = [v for v in found if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= n:
            break
    found = found[:: math.ceil(len(found) / n)] if len(found) > n else found
    return found if len(found) >= 2 else linear_ticks(low, high, n)


def words_of(values: Sequence[float]) -> list[str]:
    """Ticks in the fewest digits that tell them apart; thousands as k, millions as M."""
    largest = max((abs(v) for v in values), default=0.0)
    factor, suffix = 1.0, ""
    for limit, divisor, letter in ((1e10, 1e9, "G"), (1e7, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= limit:
            factor, suffix = divisor, letter
            break
    scaled = [v / factor for v in values]
    for digits in range(10):
        words = [f"{v:.{digits}f}" for v in scaled]
        if all(
            abs(float(w) - v) <= 1e-6 * max(abs(v), 1e-12)
            for w, v in zip(words, scaled, strict=True)
        ):
            break
    else:
        return [f"{v:g}" for v in values]
    return [w + suffix if float(w) else "0" for w in words]


def scale(
    low: float, high: float, start: float, end: float, ticks: Sequence[float], *, log: bool = False
) -> Scale:
    words = words_of(ticks)
    if log:  # decades apart, each in its own unit
        words = [words_of([tick])[0] for tick in ticks]
    return Scale(low, high, start, end, log, tuple(zip(ticks, words, strict=True)))


def apart(scale: Scale) -> bool:
    """Whether no tick's words touch the next one's."""
    spans = [(scale.at(value), text_width(words) / 2) for value, words in scale.ticks]
    return all(x + half + 6 <= next_x - next_half for (x, half), (next_x, next_half)
               in pairwise(spans))  # fmt: skip
