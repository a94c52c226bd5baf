"""Figures: what is drawn is what was measured, nothing covers anything, and every face is told."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedbench.report import figures
from speedbench.report.blocks import Axis, Chart, Column, Series, Table
from speedbench.report.scales import (
    fitted,
    linear_ticks,
    log_ticks,
    nice_step,
    text_width,
    words_of,
)

TABLE = Table((Column("x"), Column("y")), (("1", "2"),))
NAN = math.nan


def chart(*series: Series, x: Axis | None = None, y: Axis | None = None, **other: object) -> Chart:
    made = Chart("c", "A title", "What it shows.", x or Axis("X", "s"), y or Axis("Y", "ms"),
                 tuple(series), TABLE)  # fmt: skip
    return replace(made, **other)  # type: ignore[arg-type]


# --- reading a drawing back -----------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    words: str
    x: float
    y: float
    anchor: str
    kind: str
    turned: bool

    def box(self) -> tuple[float, float, float, float]:
        size = 11 if self.kind == "name" else 12
        width = text_width(self.words, size)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 9, left + width, self.y + 2.5


class Drawn:
    """An SVG taken apart by its elements alone."""

    def __init__(self, made: Chart) -> None:
        self.source = figures.svg(made)
        self.root = ET.fromstring(self.source)
        self.height = float(self.root.get("viewBox", "").split()[3])
        self.texts = []
        for node in self.root.iter("text"):
            moved = re.findall(r"-?[\d.]+", node.get("transform", ""))
            x, y = (moved[0], moved[1]) if moved else (node.get("x", "0"), node.get("y", "0"))
            self.texts.append(
                Text(
                    node.text or "",
                    float(x),
                    float(y),
                    node.get("text-anchor", "start"),
                    node.get("class", ""),
                    bool(moved),
                )
            )

    def words(self) -> list[str]:
        return [text.words for text in self.texts]

    def paths(self, kind: str) -> list[list[float]]:
        return [
            [float(n) for n in re.findall(r"-?[\d.]+", node.get("d", ""))]
            for node in self.root.iter("path")
            if node.get("class") == kind
        ]

    def marks(self) -> list[tuple[float, float]]:
        """Of the plot: those in the legend have no title."""
        found = []
        for node in self.root.iter("path"):
            if node.get("class") == "mark" and node.find("title") is not None:
                x, y = re.findall(r"-?[\d.]+", node.get("transform", ""))
                found.append((float(x), float(y)))
        return found

    def scales(self, horizontal: bool = False) -> tuple[Linear, Linear]:
        """Places to pixels and values to pixels, read off the ticks' words."""
        ends = [t for t in self.texts if t.anchor == "end" and not t.turned and not t.kind]
        middles = [t for t in self.texts if t.anchor == "middle" and not t.kind]
        across = [(t.x, t.words) for t in middles if t.x + text_width(t.words) / 2 < 399]
        up = [(t.y - 4, t.words) for t in ends]
        return (Linear(up), Linear(across)) if horizontal else (Linear(across), Linear(up))


class Linear:
    """From pixels back to values, by two ticks far apart."""

    def __init__(self, ticks: Sequence[tuple[float, str]]) -> None:
        self.ticks = [
            (at, value(words)) for at, words in ticks if re.match(r"^-?[\d.]+[kMG]?$", words)
        ]

    def back(self, at: float) -> float:
        (p, v), *_, (q, w) = self.ticks
        return v + (at - p) / (q - p) * (w - v)

    def back_log(self, at: float) -> float:
        (p, v), *_, (q, w) = self.ticks
        return math.exp(math.log(v) + (at - p) / (q - p) * (math.log(w) - math.log(v)))


def value(words: str) -> float:
    factor = {"k": 1e3, "M": 1e6, "G": 1e9}.get(words[-1], 1.0)
    return float(words.rstrip("kMG")) * factor


# --- what is drawn is what was measured -----------------------------------------------------------


def test_points_and_their_intervals_stand_where_they_should() -> None:
    x, y = (1.0, 2.5, 4.0, 9.0), (0.3, 0.55, 0.41, 0.97)
    low, high = tuple(v - 0.1 for v in y), tuple(v + 0.02 for v in y)
    drawn = Drawn(chart(Series("a", "point", x, y, low, high)))
    place, val = drawn.scales()
    assert [place.back(at) for at, _ in drawn.marks()] == pytest.approx(x, abs=0.02)
    assert [val.back(at) for _, at in drawn.marks()] == pytest.approx(y, abs=0.002)
    # M left lowest h6 M middle lowest V highest M left highest h6
    whiskers = drawn.paths("whisker")
    assert [val.back(w[4]) for w in whiskers] == pytest.approx(low, abs=0.002)
    assert [val.back(w[5]) for w in whiskers] == pytest.approx(high, abs=0.002)
    assert [place.back(w[3]) for w in whiskers] == pytest.approx(x, abs=0.02)


@pytest.mark.parametrize("horizontal", [False, True])
def test_an_interval_far_wider_than_the_others_ends_in_an_arrow(horizontal: bool) -> None:
    x, y = (1.0, 2.0, 3.0, 4.0), (100.0, 120.0, 90.0, 110.0)
    low, high = (95.0, 115.0, -4000.0, 105.0), (105.0, 125.0, 5000.0, 115.0)
    made = chart(Series("a", "point", x, y, low, high))
    made = replace(made, y=Axis("speed", "tokens/s", low=0.0), horizontal=horizontal)
    drawn = Drawn(made)
    _, scale_of_values = drawn.scales(horizontal)
    ticks = [v for _, v in scale_of_values.ticks]
    assert min(ticks) == 0  # no speed is below
    assert 125 <= max(ticks) <= 250  # the values keep their room
    assert "interval goes on: see the numbers" in " ".join(drawn.words())
    assert "(95 % -4000 to 5000)" in drawn.source  # in full for a pointer
    whole = Series("a", "point", x, y, low, high, bounds="all")  # data, not doubt
    assert "goes on" not in " ".join(Drawn(replace(made, series=(whole,))).words())
    told = Drawn(chart(Series("a", "point", x[:2], y[:2], low[:2], high[:2])))
    assert "goes on" not in " ".join(told.words())


def test_log_axes_are_logarithmic() -> None:
    x, y = (1.0, 2.0, 4.0, 8.0, 64.0), (2.0, 30.0, 450.0, 7000.0, 12000.0)
    drawn = Drawn(chart(Series("a", "line", x, y), x=Axis("X", "", log=True),
                        y=Axis("Y", "", log=True)))  # fmt: skip
    place, val = drawn.scales()
    assert set(drawn.words()) >= {"1", "2", "4", "8", "64"}  # the places themselves
    assert [place.back_log(at) for at, _ in drawn.marks()] == pytest.approx(x, rel=0.005)
    assert [val.back_log(at) for _, at in drawn.marks()] == pytest.approx(y, rel=0.01)
    path = drawn.paths("line")[0]
    assert [val.back_log(v) for v in path[1::2]] == pytest.approx(y, rel=0.01)


def test_a_log_axis_cannot_show_zero_and_is_none_then() -> None:
    drawn = Drawn(chart(Series("a", "line", (1, 2, 3), (0.0, 5.0, 10.0)), y=Axis("Y", log=True)))
    _, val = drawn.scales()
    assert [val.back(at) for _, at in drawn.marks()] == pytest.approx((0, 5, 10), abs=0.03)


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_begin_at_zero_and_are_as_long_as_their_values(horizontal: bool) -> None:
    counts = (56247.0, 36968.0, 0.0, 61182.0)
    names = ("one", "two", "three", "four")
    made = chart(
        Series("a", "bar", (0, 1, 2, 3), counts),
        x=Axis("Tokens", ticks=names),
        y=Axis("Steps", "steps"),
        horizontal=horizontal,
    )
    drawn = Drawn(made)
    _, val = drawn.scales(horizontal)
    bars = [node for node in drawn.root.iter("rect") if node.get("class") == "bar"]
    size, start = ("width", "x") if horizontal else ("height", "y")
    lengths = [float(bar.get(size, "")) for bar in bars]
    unit = abs(val.back(1.0) - val.back(0.0))
    assert [length * unit for length in lengths] == pytest.approx(counts, abs=300)
    zero = [
        float(bar.get(start, "")) + (0 if horizontal else n)
        for bar, n in zip(bars, lengths, strict=True)
    ]
    assert [val.back(at) for at in zero] == pytest.approx([0] * 4, abs=300)


def test_places_go_down_where_it_is_horizontal() -> None:
    names, y = ("coding", "math", "a b"), (2.0, 3.0, 2.5)
    drawn = Drawn(
        chart(
            Series("a", "point", (0, 1, 2), y, (1.9, NAN, 2.1), (2.2, NAN, 2.6)),
            x=Axis("Category", ticks=names),
            y=Axis("AL", "tokens"),
            horizontal=True,
        )
    )
    _, val = drawn.scales(horizontal=True)
    of_name = {t.words: t.y - 4 for t in drawn.texts if t.words in names}
    assert [at for _, at in drawn.marks()] == pytest.approx([of_name[n] for n in names], abs=0.1)
    assert [val.back(at) for at, _ in drawn.marks()] == pytest.approx(y, abs=0.005)
    first, second = drawn.paths("whisker")  # and none of the one without an interval
    # M low above v6 M low middle H high M high above v6
    assert [val.back(first[0]), val.back(first[5])] == pytest.approx([1.9, 2.2], abs=0.005)
    assert val.back(second[0]) == pytest.approx(2.1, abs=0.005)


def test_what_is_not_known_is_not_drawn() -> None:
    made = chart(
        Series("a", "point", (0, 1, 2), (1.0, NAN, 3.0)),
        Series("b", "line", (0, 1, 2, 3, 4), (1.0, 2.0, NAN, 4.0, 5.0)),
    )
    drawn = Drawn(made)
    assert len(drawn.marks()) == 2 + 4
    (path,) = (n.get("d", "") for n in drawn.root.iter("path")
               if n.get("class") == "line" and n.get("d", "").count("M") > 1)  # fmt: skip
    assert path.count("M") == 2
    assert "nan" not in drawn.source
    empty = Drawn(chart(Series("a", "point", (0.0,), (NAN,))))
    assert any("nothing to draw" in words for words in empty.words())
    assert any("nothing to draw" in words for words in Drawn(chart()).words())


def test_a_step_holds_its_value_to_the_next_place() -> None:
    drawn = Drawn(chart(Series("a", "step", (0, 1, 3), (5.0, 7.0, 6.0))))
    place, val = drawn.scales()
    (d,) = (n.get("d", "") for n in drawn.root.iter("path") if n.get("class") == "line")
    move, *steps = re.findall(r"[MHV][-\d. ]+", d)
    ys = [float(move[1:].split()[1]), *(float(s[1:]) for s in steps if s[0] == "V")]
    xs = [float(s[1:]) for s in steps if s[0] == "H"]
    assert [s[0] for s in steps] == ["H", "V", "H", "V"]
    assert [val.back(y) for y in ys] == pytest.approx((5, 7, 6), abs=0.05)
    assert [place.back(x) for x in xs] == pytest.approx((1, 3), abs=0.02)


@pytest.mark.parametrize("horizontal", [False, True])
def test_reference_and_spans_stand_at_their_values(horizontal: bool) -> None:
    made = chart(
        Series("a", "line", (0, 10), (0.5, 2.0)),
        spans=((2.0, 7.5, "steady window"),),
        reference=1.0,
        horizontal=horizontal,
    )
    drawn = Drawn(made)
    place, val = drawn.scales(horizontal)
    (line,) = drawn.paths("reference")
    assert val.back(line[0 if horizontal else 1]) == pytest.approx(1, abs=0.01)
    span = next(node for node in drawn.root.iter("rect") if node.get("class") == "span")
    start, size = ("y", "height") if horizontal else ("x", "width")
    begin, width = float(span.get(start, "")), float(span.get(size, ""))
    assert [place.back(begin), place.back(begin + width)] == pytest.approx([2, 7.5], abs=0.05)
    assert "steady window" in drawn.words()


def test_bars_of_several_series_stand_side_by_side() -> None:
    ticks = ("a", "b", "c")
    made = chart(*(Series(f"s{i}", "bar", (0, 1, 2), (1.0, 2.0, 3.0)) for i in range(4)),
                 x=Axis("X", ticks=ticks))  # fmt: skip
    bars = [n for n in Drawn(made).root.iter("rect") if n.find("title") is not None]
    edges = sorted(
        (float(b.get("x", "")), float(b.get("x", "")) + float(b.get("width", ""))) for b in bars
    )
    assert len(edges) == 12
    assert all(end <= begin for (_, end), (begin, _) in pairwise(edges))


# --- nothing covers anything ----------------------------------------------------------------------

LONG = "a category with quite a long name that nobody shortened"


def crowded() -> dict[str, Chart]:
    twelve = [f"EAGLE3 K={k}, concurrency {c}" for k in (1, 3, 5) for c in (1, 8, 32, 128)]
    names = [f"{LONG} {i}" for i in range(11)]
    places = tuple(float(i) for i in range(11))

    def many(mark: Literal["bar", "point", "line", "step"], n: int) -> list[Series]:
        return [
            Series(twelve[i], mark, places, tuple(1 + 0.1 * i + p for p in places))
            for i in range(n)
        ]

    return {
        "12 lines": chart(*many("line", 12)),
        "12 points in 11 categories": chart(
            *many("point", 12), x=Axis("Category", ticks=tuple(names)), horizontal=True
        ),
        "12 bars upright": chart(*many("bar", 12), x=Axis("Category", ticks=tuple(names))),
        "60 categories": chart(
            Series("a", "bar", tuple(range(60)), tuple(range(60))),
            x=Axis("Category", ticks=tuple(f"{LONG}{i}" for i in range(60))),
        ),
        "long labels": chart(
            Series(LONG * 3, "line", (0, 1), (1.0, 2.0)),
            Series(LONG * 4, "line", (0, 1), (2.0, 1.0)),
            x=Axis(LONG * 3, "s"),
            y=Axis(LONG * 3, "tokens/s"),
            spans=((0.2, 0.4, LONG * 2),),
        ),
        "large numbers": chart(
            Series("a", "line", (1e9, 2e9, 3.5e9), (1.23e6, 5.5e7, 9.9e7)), reference=12_345_678.0
        ),
        "close together": chart(Series("a", "line", (0, 1), (1.000001, 1.000002))),
        "named points": chart(
            Series(
                "cells",
                "point",
                tuple(1 + i / 50 for i in range(30)),
                tuple(2 + i / 70 for i in range(30)),
                names=tuple(f"K={i}, concurrency 128" for i in range(30)),
            )
        ),
        "wide log": chart(
            Series("a", "line", (1, 1e7), (1e-6, 1e6)),
            x=Axis("X", "s", log=True),
            y=Axis("Y", "s", log=True),
        ),
        "all the same": chart(Series("a", "line", (2, 2), (3.0, 3.0))),
        "all zero": chart(Series("a", "bar", (0, 1), (0.0, 0.0)), x=Axis("X", ticks=("a", "b"))),
        "many concurrencies": chart(
            Series("a", "line", tuple(2.0**i for i in range(12)), tuple(map(float, range(12)))),
            x=Axis("Concurrency", "conversations", log=True),
        ),
        "chinese": chart(
            Series("a", "bar", (0, 1, 2), (1.0, 2.0, 3.0)),
            x=Axis("X", ticks=("多语言的类别名称很长很长", "数学", "编程")),
            horizontal=True,
        ),
    }


@pytest.mark.parametrize("name", sorted(crowded()))
def test_no_words_cover_others_or_leave_the_drawing(name: str) -> None:
    drawn = Drawn(crowded()[name])
    flat = [text for text in drawn.texts if not text.turned]
    for text in flat:
        left, top, right, bottom = text.box()
        assert left >= -0.5, text
        assert right <= figures.WIDTH + 0.5, text
        assert top >= 0, text
        assert bottom <= drawn.height, text
    for a, b in combinations(flat, 2):
        mine, theirs = a.box(), b.box()
        apart = (
            mine[2] <= theirs[0]
            or theirs[2] <= mine[0]
            or mine[3] <= theirs[1]
            or theirs[3] <= mine[1]
        )
        assert apart, (a, b)
    turned = sorted(text.x for text in drawn.texts if text.turned)
    # Lines of turned words are apart by their distance along the axis times the sine of the angle.
    assert all((b - a) * math.sin(math.radians(35)) >= 8 for a, b in pairwise(turned))
    for text in drawn.texts:
        if text.turned:
            assert text.x - text_width(text.words) * math.cos(math.radians(35)) >= -1
            assert text.y + text_width(text.words) * math.sin(math.radians(35)) <= drawn.height


@pytest.mark.parametrize("name", sorted(crowded()))
def test_marks_lie_in_the_drawing(name: str) -> None:
    drawn = Drawn(crowded()[name])
    for x, y in drawn.marks():
        assert 0 <= x <= figures.WIDTH
        assert 0 <= y <= drawn.height


def test_names_are_cut_with_a_sign_and_told_whole_to_a_pointer() -> None:
    made = crowded()["12 bars upright"]
    drawn = Drawn(made)
    assert any(words.endswith("…") for words in drawn.words())
    titles = [node.text or "" for node in drawn.root.iter("title")]
    assert any(f"{LONG} 10" in title for title in titles)


def test_arms_that_differ_at_the_end_of_their_names_are_told_apart() -> None:
    """Cut to two lines, all three would be called the same."""
    arms = tuple(f"DRAFT_TARGET K=1, dataset mini, concurrency {c}" for c in (1, 4, 16))
    places = (0.0, 1.0, 2.0)
    made = chart(Series("a", "point", places, places), x=Axis("Arm", ticks=arms), horizontal=True)
    drawn = Drawn(made)
    words = " ".join(drawn.words())
    for arm in arms:
        assert arm in words
    boxes = [text.box() for text in drawn.texts if text.anchor == "end"]
    assert not any(
        a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
        for a, b in itertools.combinations(boxes, 2)
    )


def test_twelve_series_differ_in_more_than_colour() -> None:
    drawn = Drawn(crowded()["12 lines"])
    styles = set()
    for group in drawn.root.iter("g"):
        (line,) = (p for p in group.iter("path") if p.get("class") == "line")
        mark = next(p for p in group.iter("path") if p.get("class") == "mark")
        styles.add((group.get("style"), line.get("stroke-dasharray"), mark.get("d")))
    assert len(styles) == 12
    legend = [text.words for text in drawn.texts if text.words.startswith("EAGLE3")]
    assert len(legend) == 12


# --- colours and words ----------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Of sRGB, by WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("colours", "paper"), [(figures.LIGHT, "#ffffff"), (figures.DARK, "#14171b")]
)
def test_colours_stand_out_from_the_paper(colours: Sequence[str], paper: str) -> None:
    """WCAG 2.2, 1.4.11: graphics need a contrast of 3 to 1."""
    for colour in colours:
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
    assert len(set(colours)) == len(colours) == 8


def test_a_reader_who_sees_nothing_is_told_what_it_shows() -> None:
    made = replace(
        chart(Series("a", "point", (1,), (2.0,))), title="AL <b>", alt='At "most" 4 & more'
    )
    source = figures.svg(made, "other id")
    root = ET.fromstring(source)
    assert root.get("role") == "img"
    ids = {node.get("id"): node.text for node in root.iter() if node.get("id")}
    assert [ids[name] for name in root.get("aria-labelledby", "").split()] == [
        "AL <b>",
        'At "most" 4 & more',
    ]
    assert all(name and name.startswith("other-id-") for name in ids)


def test_text_from_the_data_forms_no_markup() -> None:
    evil = '</svg><script>alert(1)</script>\x1b[31m"&\u202e'
    made = chart(
        Series(evil, "point", (0, 1), (1.0, 2.0), names=(evil, "b")),
        Series("b", "line", (0, 1), (1.0, 2.0)),
        x=Axis(evil, evil, ticks=(evil, "b")),
        spans=((0, 1, evil),),
        horizontal=True,
    )
    source = figures.svg(made)
    ET.fromstring(source)
    assert "<script" not in source
    assert "\x1b" not in source
    assert "\u202e" not in source


def test_the_same_chart_gives_the_same_drawing() -> None:
    for made in crowded().values():
        assert figures.svg(made) == figures.svg(made)


# --- scales ---------------------------------------------------------------------------------------

FINITE = st.floats(-1e9, 1e9, allow_nan=False).map(lambda v: round(v, 6))


@given(FINITE, st.floats(1e-5, 1e9), st.integers(2, 12))
def test_linear_ticks_are_round_even_and_inside(low: float, relative: float, n: int) -> None:
    span = relative * max(1.0, abs(low))  # of what a float can hold
    step = nice_step(span, n)
    assert step * n >= span * (1 - 1e-6)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 2.5, 5, 10))
    ticks = linear_ticks(low, low + span, n)
    assert len(ticks) <= n + 1
    slack = 1e-6 * max(step, abs(low) * 1e-6)
    assert all(low - slack - step * 1e-6 <= t <= low + span + slack + step * 1e-6 for t in ticks)
    for a, b in pairwise(ticks):
        assert b - a == pytest.approx(step, rel=1e-3)


@given(st.floats(1e-6, 1e6), st.floats(1.01, 1e9), st.integers(2, 10))
def test_log_ticks_rise_within_the_ends(low: float, factor: float, n: int) -> None:
    ticks = log_ticks(low, low * factor, n)
    assert ticks == sorted(set(ticks))
    assert all(low * (1 - 1e-6) <= t <= low * factor * (1 + 1e-6) for t in ticks)
    assert len(ticks) <= n + 1


@given(st.lists(st.integers(-20, 20), min_size=1, unique=True), st.sampled_from([1, 2, 2.5, 5]),
       st.integers(-8, 10))  # fmt: skip
def test_ticks_in_words_are_the_ticks(multiples: list[int], digit: float, power: int) -> None:
    ticks = [m * digit * 10.0**power for m in multiples]
    words = words_of(ticks)
    assert [value(w) for w in words] == pytest.approx(ticks, rel=1e-6, abs=10.0**power * 1e-6)
    assert len(set(words)) == len(words)


@given(st.text(max_size=80), st.floats(20, 300), st.integers(1, 3))
def test_fitted_lines_fit(text: str, width: float, lines: int) -> None:
    made = fitted(text, width, lines)
    assert 1 <= len(made) <= lines
    assert all(text_width(line) <= width + 1e-9 or len(line.rstrip("…")) <= 1 for line in made)
    if not made[-1].endswith("…"):
        assert "".join(made).replace(" ", "") == figures.clean(text).replace(" ", "")
