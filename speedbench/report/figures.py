"""Figures: a chart as SVG that takes the page's colours and is readable at every width.

Drawn by hand: a drawing library takes a tenth of a second and twenty kilobytes for each of the
hundred figures that a report over twelve runs has, brings its own colours, and repeats its ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise

from speedbench.report.blocks import Axis, Chart, Series, clean
from speedbench.report.scales import (
    Scale,
    apart,
    fitted,
    linear_ticks,
    log_ticks,
    nice_step,
    scale,
    text_width,
    words_of,
)

WIDTH = 400
"""Of the drawing in its own units: one is about a pixel where the page is that wide."""

INTERVAL = "95 %"
"""What a series' bounds are where it says nothing else."""

LINE = 15.0
PLOT_HEIGHT = 190.0
GAP = 6.0
MOST_LINES = 5
"""Of the name of a place."""
MANY = 40
"""Lines of more points than this have no markers."""

LIGHT = ("#0067a5", "#c24e00", "#00805f", "#a8408c", "#856500", "#3d6fd6", "#595959", "#8a2250")
DARK = ("#5ab4f0", "#ff9a57", "#3fcba1", "#ea9bcd", "#e3c04a", "#a9bdff", "#c2c2c2", "#f08ba8")
"""Told apart by readers with any colour vision: in hue and lightness, after Okabe & Ito."""

MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6L4.4 3.4h-8.8z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.6L4.4-3.4h-8.8z",
    "M-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",
    "M-4.4-2.4h8.8v4.8h-8.8z",
)
DASHES = ("", "7 3", "2 3", "9 3 2 3")

CSS = """
.figure text{font-size:12px;fill:var(--ink)}
.figure .soft{fill:var(--soft)}
.figure .grid{stroke:var(--grid);stroke-width:1;fill:none}
.figure .axis{stroke:var(--soft);stroke-width:1;fill:none}
.figure .reference{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4;fill:none}
.figure .span{fill:var(--soft);fill-opacity:.16}
.figure .line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.figure .whisker{fill:none;stroke:currentColor;stroke-width:1.5}
.figure .bar{fill:currentColor;fill-opacity:.8}
.figure .mark{fill:currentColor;stroke:var(--paper);stroke-width:.7}
.figure .name{font-size:11px;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
""".strip()
"""What a page that holds figures must define, beside --ink, --soft, --grid, --paper, --s0..."""


def svg(chart: Chart, id: str = "") -> str:
    """One <svg> element; `id` replaces the chart's own where the page needs another."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", id or chart.id)
    body, height = _Drawing(chart).drawn()
    return (
        f'<svg class="figure" role="img" viewBox="0 0 {WIDTH} {_px(height)}" '
        f'aria-labelledby="{name}-t {name}-d"><title id="{name}-t">{_text(chart.title)}</title>'
        f'<desc id="{name}-d">{_text(chart.alt)}</desc>{body}</svg>'
    )


def _text(text: str) -> str:
    return escape(clean(text))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _label(axis: Axis) -> str:
    return f"{axis.label} ({axis.unit})" if axis.unit else axis.label


# ---------------------------------------------------------------- the drawing


Box = tuple[float, float, float, float]
"""left, top, right, bottom"""


class _Drawing:
    """Lays a chart out and draws it: y label, plot, ticks, x label, legend, from the top down."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        self.out: list[str] = []
        self.place_axis, self.value_axis = chart.x, chart.y
        self.slots = chart.x.ticks
        self.dodged = [s for s in chart.series if self.slots and s.mark in ("bar", "point")]
        self.bars = [s for s in chart.series if s.mark == "bar"]
        self.reach = self._reach()
        self.is_cut = False

    def drawn(self) -> tuple[str, float]:
        """The elements, and how high the drawing is."""
        if next(self._values(), None) is None:
            self._words(WIDTH / 2, 40, "nothing to draw: see the table", "middle", "soft")
            return "".join(self.out), 70.0
        top = self._top_label()
        bottom = self._across(top) if self.chart.horizontal else self._upright(top)
        self._spans()
        self._reference()
        boxes = [box for i, s in enumerate(self.chart.series) for box in self._series(i, s)]
        self._names(boxes)
        end = self._legend(bottom)
        return "".join(self.out), end + 4

    # -------- layout

    def _top_label(self) -> float:
        axis = self.place_axis if self.chart.horizontal else self.value_axis
        lines = fitted(_label(axis), WIDTH - 4, 2)
        for i, line in enumerate(lines):
            self._words(2, 12 + LINE * i, line, "start", "soft")
        return 12 + LINE * len(lines)

    def _upright(self, top: float) -> float:
        """Places go right, values up. Returns where the next thing below may begin."""
        bottom = top + PLOT_HEIGHT
        self.value = self._value_scale(bottom, top, int(PLOT_HEIGHT / 34))
        left = max(text_width(words) for _, words in self.value.ticks) + GAP + 4
        right = WIDTH - 10.0
        if self.chart.reference is not None:
            right -= text_width(self._reference_words()) + 2
        rotated, names = self._slot_names((right - left) / max(1, len(self.slots)))
        if rotated:  # the first name may reach beyond the axis
            slot = (right - left) / len(self.slots)
            left = max(left, max(text_width(n) for n in names[:2]) * COS - slot / 2 + 8)
        self.place = self._place_scale(left, right, names)
        self.plot: Box = (left, top, right, bottom)
        for value, words in self.value.ticks:
            y = self.value.at(value)
            self._line(left, y, right, y, "grid")
            self._words(left - GAP, y + 4, words, "end")
        self._line(left, bottom, right, bottom, "axis")
        lowest = bottom + LINE
        for value, words in self.place.ticks:
            x = self.place.at(value)
            self._line(x, bottom, x, bottom + 4, "axis")
            if rotated:
                self._words(x + 3, bottom + 14, words, "end", turned=True)
                lowest = max(lowest, bottom + 14 + text_width(words) * SIN)
            else:
                half = text_width(words) / 2
                self._words(min(x, WIDTH - half), bottom + LINE + 1, words, "middle")
        return self._axis_label(self.place_axis, (left + right) / 2, lowest)

    def _across(self, top: float) -> float:
        """Places go down, values right."""
        most = 0.42 * WIDTH
        names = self._told_apart(most - GAP)
        left = GAP + 4 + max((text_width(line) for lines in names for line in lines), default=20.0)
        right = WIDTH - 14.0
        height = max(22.0, 11.0 * len(self.dodged) + 8) * max(1, len(self.slots))
        if (n_lines := max(map(len, names), default=1)) > 1:
            height = max(height, (n_lines * LINE + 4) * len(self.slots))
        if not self.slots:
            height = PLOT_HEIGHT
        bottom = top + height
        self.value = self._value_scale(left, right, int((right - left) / 60))
        self.place = self._place_scale(top, bottom, [])
        self.plot = (left, top, right, bottom)
        for value, words in self.value.ticks:
            x = self.value.at(value)
            self._line(x, top, x, bottom, "grid")
            half = text_width(words) / 2
            self._words(min(x, WIDTH - half), bottom + LINE + 1, words, "middle")
        self._line(left, top, left, bottom, "axis")
        if not self.slots:
            for value, words in self.place.ticks:
                self._words(left - GAP, self.place.at(value) + 4, words, "end")
        for i, lines in enumerate(names):
            first = self.place.at(i) + 4 - LINE / 2 * (len(lines) - 1)
            for j, line in enumerate(lines):
                self._words(left - GAP, first + LINE * j, line, "end")
        return self._axis_label(self.value_axis, (left + right) / 2, bottom + LINE)

    def _told_apart(self, width: float) -> list[list[str]]:
        """Names of the places in as many lines as it takes for no two to be cut to the same."""
        for n_lines in range(2, MOST_LINES + 1):
            names = [fitted(name, width, n_lines) for name in self.slots]
            if len(set(map(tuple, names))) == len(set(self.slots)):
                break
        return names

    def _axis_label(self, axis: Axis, middle: float, lowest: float) -> float:
        lines = fitted(_label(axis), WIDTH - 8, 2)
        for i, line in enumerate(lines):
            half = text_width(line) / 2
            x = min(max(middle, half + 2), WIDTH - half - 2)
            self._words(x, lowest + LINE * (i + 1) + 3, line, "middle", "soft")
        return lowest + LINE * len(lines) + 3

    def _slot_names(self, slot: float) -> tuple[bool, list[str]]:
        """Names of the places, and whether they must be turned to fit side by side."""
        if all(text_width(clean(name)) <= slot - 4 for name in self.slots):
            return False, [clean(name) for name in self.slots]
        return True, [fitted(name, 120)[0] for name in self.slots]

    # -------- scales

    def _reach(self) -> tuple[float, float]:
        """From where to where intervals are drawn. One that is far wider than the others, or goes
        beyond what is possible, would leave no room for the values: it ends in an arrow."""
        axis, many = self.value_axis, self.chart.series
        core = [y for series in many for y in series.y if math.isfinite(y)]
        if not core or axis.log:
            return -math.inf, math.inf
        core += [v for s in many if s.bounds != INTERVAL for v in (*s.low, *s.high) if v == v]
        core += [v for v in (self.chart.reference, axis.low, axis.high) if v is not None]
        halves = sorted(
            (high - low) / 2
            for series in many
            if series.bounds == INTERVAL
            for low, high in zip(series.low, series.high, strict=True)
            if math.isfinite(high - low)
        )
        low, high = min(core), max(core)
        usual = 2 * halves[len(halves) // 2] if halves else 0.0
        reach = max((high - low) / 2, abs(high) / 2, abs(low) / 2, usual)
        return (
            low - reach if axis.low is None else axis.low,
            high + reach if axis.high is None else axis.high,
        )

    def _bounds(self, series: Series, i: int) -> tuple[float, float]:
        """The interval of a value as far as it is drawn; a range of data is drawn whole."""
        low, high = self.reach if series.bounds == INTERVAL else (-math.inf, math.inf)
        return max(series.low[i], low), min(series.high[i], high)

    def _values(self) -> Iterator[float]:
        for series in self.chart.series:
            bounds = (v for i in range(len(series.low)) for v in self._bounds(series, i))
            for value in (*series.y, *bounds):
                if math.isfinite(value):
                    yield value

    def _value_scale(self, start: float, end: float, n: int) -> Scale:
        axis = self.value_axis
        values = list(self._values())
        if self.chart.reference is not None:
            values.append(self.chart.reference)
        natural = [v for v in (axis.low, axis.high) if v is not None]
        log = axis.log and min(values) > 0 and not self.bars
        if self.bars:
            natural.append(0.0)
        low, high = min([*values, *natural]), max([*values, *natural])
        if high == low:
            low, high = (low * 0.9, high * 1.1) if low > 0 else (low - 1, high + 1)
        if log:
            low, high = low / 1.1, high * 1.1
            return scale(low, high, start, end, log_ticks(low, high, n), log=True)
        step = nice_step(high - low, n)
        low, high = step * math.floor(low / step + 1e-6), step * math.ceil(high / step - 1e-6)
        return scale(low, high, start, end, linear_ticks(low, high, n))

    def _place_scale(self, start: float, end: float, names: Sequence[str]) -> Scale:
        if self.slots:
            every = max(1, math.ceil(LINE * len(names) / (end - start))) if names else 1
            ticks = tuple((float(i), name) for i, name in enumerate(names) if i % every == 0)
            return Scale(-0.5, len(self.slots) - 0.5, start, end, log=False, ticks=ticks)
        axis = self.place_axis
        found = [x for series in self.chart.series for x in series.x if math.isfinite(x)]
        places = sorted(set(found))
        natural = [v for v in (axis.low, axis.high) if v is not None]
        low, high = min([*places, *natural]), max([*places, *natural])
        log = axis.log and low > 0
        if high == low:
            low, high = (low / 1.5, high * 1.5) if low > 0 else (low - 1, high + 1)
        elif self.bars:
            half = min((b - a for a, b in pairwise(places)), default=1.0) / 2
            low, high = low - half, high + half
        elif log:
            low, high = low / 1.05, high * 1.05
        elif any(s.mark == "point" for s in self.chart.series):
            pad = 0.04 * (high - low)
            low, high = low - (0 if axis.low is not None else pad), high + pad
        drawn = [p for p in places if low <= p <= high]
        if len(drawn) <= 12 and (log or self.bars):  # the places themselves, if they fit
            made = scale(low, high, start, end, drawn, log=log)
            if apart(made):
                return made
        for n in range(max(2, int(abs(end - start) / 45)), 1, -1):
            round_ones = log_ticks(low, high, n) if log else linear_ticks(low, high, n)
            made = scale(low, high, start, end, round_ones, log=log)
            if apart(made):
                break
        return made

    # -------- marks

    def _point(self, place: float, value: float, shift: float = 0.0) -> tuple[float, float]:
        if self.chart.horizontal:
            return self.value.at(value), self.place.at(place) + shift
        return self.place.at(place) + shift, self.value.at(value)

    def _slot(self) -> float:
        """Pixels between neighbouring places."""
        if self.slots:
            return abs(self.place.at(1) - self.place.at(0))
        places = sorted({x for series in self.bars for x in series.x})
        return min(
            (abs(self.place.at(b) - self.place.at(a)) for a, b in pairwise(places)),
            default=abs(self.place.end - self.place.start) / 2,
        )

    def _shift(self, series: Series) -> float:
        """How far a series stands beside its place, so that none covers another."""
        group = self.dodged if self.slots else (self.bars if series.mark == "bar" else [])
        index = next((i for i, other in enumerate(group) if other is series), None)
        if index is None:
            return 0.0
        return (index - (len(group) - 1) / 2) * min(0.8 * self._slot() / len(group), 40.0)

    def _series(self, index: int, series: Series) -> list[Box]:
        """Draw it; returns the boxes that its markers and intervals fill."""
        known = [i for i, y in enumerate(series.y) if math.isfinite(y)]
        self.out.append(f'<g style="color:var(--s{index % len(LIGHT)})">')
        shift = self._shift(series)
        boxes: list[Box] = []
        if series.mark in ("line", "step"):
            self._path(series, DASHES[(index + index // len(LIGHT)) % len(DASHES)])
        if series.mark == "bar":
            boxes += [self._bar(series, i, shift) for i in known]
        for i in known:
            if series.low and math.isfinite(series.low[i]) and math.isfinite(series.high[i]):
                boxes.append(self._whisker(series, i, shift))
        if series.mark == "point" or (series.mark == "line" and len(series.x) <= MANY):
            for i in known:
                x, y = self._point(series.x[i], series.y[i], shift)
                title = f"<title>{_text(self._told(series, i))}</title>"
                self.out.append(
                    f'<path class="mark" transform="translate({_px(x)} {_px(y)})" '
                    f'd="{_marker(index)}">{title}</path>'
                )
                boxes.append((x - 5, y - 5, x + 5, y + 5))
        self.out.append("</g>")
        return boxes

    def _told(self, series: Series, i: int) -> str:
        """What a pointer that rests on a point is told."""
        axis = self.place_axis
        place = self.slots[int(series.x[i])] if self.slots else f"{axis.label} {series.x[i]:.6g}"
        named = f"{series.names[i]}: " if series.names else ""
        text = f"{series.label}: {named}{place}, {self.value_axis.label} {series.y[i]:.6g}"
        if series.low and math.isfinite(series.low[i]):
            text += f" ({series.bounds} {series.low[i]:.6g} to {series.high[i]:.6g})"
        return text

    def _path(self, series: Series, dash: str) -> None:
        """A line, broken where a value is unknown; a step holds its value to the next place."""
        parts: list[str] = []
        pen = False
        for x, y in zip(series.x, series.y, strict=True):
            if not math.isfinite(y):
                pen = False
                continue
            px, py = (_px(v) for v in self._point(x, y))
            if not pen:
                parts.append(f"M{px} {py}")
            elif series.mark == "line":
                parts.append(f"L{px} {py}")
            else:
                parts.append(f"V{py}H{px}" if self.chart.horizontal else f"H{px}V{py}")
            pen = True
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.out.append(f'<path class="line"{dashes} d="{"".join(parts)}"/>')

    def _bar(self, series: Series, i: int, shift: float) -> Box:
        n = len(self.dodged if self.slots else self.bars)
        half = min(0.8 * self._slot() / n, 40.0) / 2 * 0.94
        x, y = self._point(series.x[i], series.y[i], shift)
        zero = self.value.at(min(max(0.0, self.value.low), self.value.high))
        box = (min(x, zero), y - half, max(x, zero), y + half)
        if not self.chart.horizontal:
            box = (x - half, min(y, zero), x + half, max(y, zero))
        left, top, right, bottom = box
        self.out.append(
            f'<rect class="bar" x="{_px(left)}" y="{_px(top)}" width="{_px(right - left)}" '
            f'height="{_px(bottom - top)}"><title>{_text(self._told(series, i))}</title></rect>'
        )
        return box

    def _whisker(self, series: Series, i: int, shift: float) -> Box:
        """A line from bound to bound, with a bar at its ends, or an arrow where it goes on."""
        bounds = self._bounds(series, i)
        (x1, y1), (x2, y2) = (self._point(series.x[i], bound, shift) for bound in bounds)
        down, up = bounds[0] > series.low[i], bounds[1] < series.high[i]
        self.is_cut |= down or up
        to = f"H{_px(x2)}" if self.chart.horizontal else f"V{_px(y2)}"
        stem = f"M{_px(x1)} {_px(y1)}{to}"
        path = self._end(x1, y1, 5.0 * down) + stem + self._end(x2, y2, -5.0 * up)
        self.out.append(f'<path class="whisker" d="{path}"/>')
        return (x1, y1 - 3, x2, y1 + 3) if self.chart.horizontal else (x1 - 3, y2, x1 + 3, y1)

    def _end(self, x: float, y: float, back: float) -> str:
        """The end of an interval: a bar, or an arrow whose head begins so far back."""
        if self.chart.horizontal:
            if back:
                return f"M{_px(x + back)} {_px(y - 3)}L{_px(x)} {_px(y)}l{_px(back)} 3"
            return f"M{_px(x)} {_px(y - 3)}v6"
        if back:
            return f"M{_px(x - 3)} {_px(y - back)}L{_px(x)} {_px(y)}l3 {_px(-back)}"
        return f"M{_px(x - 3)} {_px(y)}h6"

    def _spans(self) -> None:
        left, top, right, bottom = self.plot
        for start, end, _ in self.chart.spans:
            low, high = (
                self.place.at(min(max(v, self.place.low), self.place.high)) for v in (start, end)
            )
            x, y, width, height = low, top, high - low, bottom - top
            if self.chart.horizontal:
                x, y, width, height = left, low, right - left, high - low
            self.out.append(
                f'<rect class="span" x="{_px(x)}" y="{_px(y)}" width="{_px(width)}" '
                f'height="{_px(height)}"/>'
            )

    def _reference_words(self) -> str:
        assert self.chart.reference is not None
        return words_of([self.chart.reference])[0]

    def _reference(self) -> None:
        if self.chart.reference is None:
            return
        left, top, right, bottom = self.plot
        at = self.value.at(self.chart.reference)
        if self.chart.horizontal:
            self._line(at, top, at, bottom, "reference")
        else:
            self._line(left, at, right, at, "reference")
            self._words(right + 3, at + 4, self._reference_words(), "start", "soft")

    # -------- names and legend

    def _names(self, taken: list[Box]) -> None:
        """Names beside their points where there is room; all of them are in the table."""
        left, top, _, bottom = self.plot
        for series in self.chart.series:
            for i, name in enumerate(series.names):
                if not name or not math.isfinite(series.y[i]):
                    continue
                x, y = self._point(series.x[i], series.y[i], self._shift(series))
                width = text_width(clean(name), 11)
                for dx, dy in ((8, 4), (-8 - width, 4), (-width / 2, -9), (-width / 2, 17),
                               (7, -7), (7, 15), (-7 - width, -7), (-7 - width, 15)):  # fmt: skip
                    box = (x + dx, y + dy - 10, x + dx + width, y + dy + 3)
                    inside = box[0] >= left and box[2] <= WIDTH - 2 and box[1] >= top - 4
                    if inside and box[3] <= bottom and not any(_meet(box, b) for b in taken):
                        self._words(x + dx, y + dy, clean(name), "start", "name")
                        taken.append(box)
                        break

    def _legend(self, top: float) -> float:
        """Samples and labels in rows below the plot. Returns where they end."""
        entries: list[tuple[Callable[[float, float], None], str]] = []
        if len(self.chart.series) > 1:
            entries += [(self._sampler(i, s), s.label) for i, s in enumerate(self.chart.series)]
        whats = dict.fromkeys(what for _, _, what in self.chart.spans)
        entries += [(self._span_sample, what) for what in whats]
        if self.is_cut:
            entries.append((self._cut_sample, "interval goes on: see the numbers"))
        x, y = 4.0, top + LINE + 8
        for draw, label in entries:
            lines = fitted(label, WIDTH - 44, 2)
            width = 30 + max(text_width(line) for line in lines) + 14
            if x > 4 and x + width > WIDTH:
                x, y = 4.0, y + LINE + 3
            draw(x, y)
            for i, line in enumerate(lines):
                self._words(x + 30, y + 4 + LINE * i, line, "start")
            x += width
            if len(lines) > 1:
                x, y = float(WIDTH), y + LINE * (len(lines) - 1)
        return y + 10 if entries else top + 8

    def _sampler(self, index: int, series: Series) -> Callable[[float, float], None]:
        def draw(x: float, y: float) -> None:
            self.out.append(f'<g style="color:var(--s{index % len(LIGHT)})">')
            if series.mark == "bar":
                self.out.append(
                    f'<rect class="bar" x="{_px(x + 4)}" y="{_px(y - 5)}" width="16" height="10"/>'
                )
            if series.mark in ("line", "step"):
                dash = DASHES[(index + index // len(LIGHT)) % len(DASHES)]
                dashes = f' stroke-dasharray="{dash}"' if dash else ""
                self.out.append(f'<path class="line"{dashes} d="M{_px(x)} {_px(y)}h25"/>')
            if series.mark == "point" or (series.mark == "line" and len(series.x) <= MANY):
                self.out.append(
                    f'<path class="mark" transform="translate({_px(x + 12)} {_px(y)})" '
                    f'd="{_marker(index)}"/>'
                )
            self.out.append("</g>")

        return draw

    def _span_sample(self, x: float, y: float) -> None:
        self.out.append(
            f'<rect class="span" x="{_px(x + 4)}" y="{_px(y - 6)}" width="16" height="12"/>'
        )

    def _cut_sample(self, x: float, y: float) -> None:
        path = f"M{_px(x)} {_px(y)}h24m-5-3l5 3l-5 3"
        self.out.append(f'<path class="whisker" style="color:var(--soft)" d="{path}"/>')

    # -------- elements

    def _line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.out.append(f'<path class="{kind}" d="M{_px(x1)} {_px(y1)}L{_px(x2)} {_px(y2)}"/>')

    def _words(
        self, x: float, y: float, text: str, anchor: str, kind: str = "", *, turned: bool = False
    ) -> None:
        style = f' class="{kind}"' if kind else ""
        place = f'x="{_px(x)}" y="{_px(y)}"'
        if turned:
            place = f'transform="translate({_px(x)} {_px(y)}) rotate(-{ANGLE})"'
        end = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.out.append(f"<text{style} {place}{end}>{_text(text)}</text>")


ANGLE = 35
COS, SIN = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE))


def _marker(index: int) -> str:
    return MARKERS[(index + index // len(LIGHT)) % len(MARKERS)]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
