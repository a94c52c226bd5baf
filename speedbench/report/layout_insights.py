"""Layout of the insights: a sentence that says what was found, then the numbers, then a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from speedbench.insights.collected import Insights, collect
from speedbench.insights.experts import ExpertUse
from speedbench.insights.options import InsightOptions
from speedbench.insights.position import Slice, Slices
from speedbench.insights.saving import Saving
from speedbench.insights.vocabulary import ASSUMPTION, Coverage
from speedbench.report import layout_served_times, layout_server
from speedbench.report.arms import Arm
from speedbench.report.blocks import (
    Axis,
    Block,
    Chart,
    Column,
    Facts,
    Heading,
    Paragraph,
    Series,
    Table,
)
from speedbench.report.summary import Figure

NO_VALUE = "n/a"
MANY_ARMS = 3
"""Of more arms than this no sentences are made: the tables say the same in less room."""
FEW_LAYERS = 12
"""So many are named one by one below a figure."""
BRACKETS = "in brackets: 95 % intervals"
TYPICAL_BATCH = 32
"""Tokens in the batch that is told in words and drawn; the table has the others."""


def of_arms(arms: Sequence[Arm], options: InsightOptions | None = None) -> Iterator[Block]:
    """What the records of these arms tell; nothing of what they do not hold."""
    yield from of_insights(collect(arms, options or InsightOptions()))


def of_insights(found: Insights) -> Iterator[Block]:
    """The same, already computed."""
    for sentence in found.faults:
        yield Paragraph(sentence, "warning")
    for sentence in found.wanted:
        yield Paragraph(sentence, "note")
    yield from layout_server.of_served(found.served)
    yield from layout_served_times.of_served_times(found.served_times)
    yield from _vocabulary(found)
    yield from _random(found)
    yield from _experts(found)
    yield from _along(found)
    yield from _saving(found)


# ---------------------------------------------------------------- cells


class _Cells:
    """Cells that hold a value and its interval, and footnotes of the reasons why one is missing."""

    def __init__(self) -> None:
        self._why: dict[str, list[str]] = {}
        self._n_intervals = 0

    def of(self, where: str, figure: Figure, form: Callable[[float], str]) -> str:
        if figure.value is None:
            self._note(where, figure.why_not)
            return NO_VALUE
        if figure.interval is None:
            self._note(f"interval of {where}", figure.why_not)
        self._n_intervals += figure.interval is not None
        return in_words(figure, form)

    def _note(self, where: str, why_not: str) -> None:
        places = self._why.setdefault(why_not or "not known", [])
        if where not in places:
            places.append(where)

    def notes(self) -> tuple[str, ...]:
        """The reasons, and what the brackets hold if there are any."""
        reasons = (f"{NO_VALUE}: {_some(places)}: {why}" for why, places in self._why.items())
        return (*reasons, *((BRACKETS,) if self._n_intervals else ()))


def _some(places: Sequence[str]) -> str:
    shown = ", ".join(places[:3])
    return shown + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def in_words(figure: Figure, form: Callable[[float], str]) -> str:
    """'2.41 (2.30 to 2.52)'; no brackets without an interval."""
    if figure.value is None:
        return NO_VALUE
    text = form(figure.value)
    if figure.interval is None:
        return text
    return f"{text} ({form(figure.interval[0])} to {form(figure.interval[1])})"


def sure(figure: Figure, form: Callable[[float], str]) -> str:
    """'2.41 (95 % 2.30 to 2.52)', or the value and why it has no interval, or why it is missing."""
    if figure.value is None:
        return f"{NO_VALUE} ({figure.why_not})"
    if figure.interval is None:
        return f"{form(figure.value)} (no interval: {figure.why_not})"
    return f"{form(figure.value)} (95 % {in_words(figure, form).partition('(')[2]}"


def plain(value: float) -> str:
    return f"{value:.4f}"


def short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def signed(value: float) -> str:
    return f"{value:+.4f}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


# In tables, whose headers tell the unit.


def three(value: float) -> str:
    return f"{value:.3f}"


def signed_three(value: float) -> str:
    return f"{value:+.3f}"


def hundred(value: float) -> str:
    return f"{100 * value:.2f}"


def _low(figure: Figure) -> float:
    return figure.interval[0] if figure.interval else math.nan


def _high(figure: Figure) -> float:
    return figure.interval[1] if figure.interval else math.nan


def _series(
    label: str, figures: Sequence[Figure], mark: str, x: Sequence[float] | None = None
) -> Series:
    places = tuple(float(i) for i in range(len(figures))) if x is None else tuple(x)
    values = tuple(math.nan if f.value is None else f.value for f in figures)
    lows, highs = tuple(map(_low, figures)), tuple(map(_high, figures))
    if mark == "line":
        return Series(label, "line", places, values, lows, highs)
    return Series(label, "bar" if mark == "bar" else "point", places, values, lows, highs)


TERMS = {
    "Share of tokens": "outside_vocabulary",
    "Measured AL": "al",
    "AL random/real": "overestimate",
    "User TPS random/real": "overestimate",
    "Output TPS random/real": "overestimate",
    "Imbalance": "expert_activation",
    "Entropy": "expert_activation",
    "Experts used": "expert_activation",
    "Dollars per million output tokens": "cost",
    "Joules per million output tokens": "energy_per_token",
}
"""Header without its unit -> id of what is defined under another name."""


def _columns(*headers: str, words: int = 1) -> tuple[Column, ...]:
    """The first `words` of them hold words, which may wrap."""
    return tuple(
        Column(
            header,
            words=i < words,
            term=TERMS.get(header.replace("\n", " ").partition(" (")[0], ""),
        )
        for i, header in enumerate(headers)
    )


# ---------------------------------------------------------------- draft vocabulary


def _vocabulary(found: Insights) -> Iterator[Block]:
    if not found.coverage:
        return
    yield Heading("Draft vocabulary")
    for number, one in enumerate(found.coverage):
        if one.overall is None:
            yield Paragraph(f"{one.label}: {one.why_not}.", "note")
            continue
        yield Paragraph(_vocabulary_finding(one))
        table = _vocabulary_table(one)
        yield table
        rows = one.by_category
        shares = [row.outside for row in rows]
        yield Chart(
            f"insight-vocabulary-{number}",
            f"Output tokens outside the draft vocabulary: {one.label}",
            _vocabulary_finding(one),
            Axis("Category", ticks=tuple(row.name for row in rows)),
            Axis("Outside the draft vocabulary", "share of output tokens", low=0.0),
            (_series("outside", shares, "bar"),),
            table,
            horizontal=True,
            repeated=True,
        )


def _vocabulary_finding(one: Coverage) -> str:
    overall = one.overall
    if overall is None:
        return f"{one.label}: {one.why_not}."
    size = f"{one.n_draftable}" + (f" of {one.n_vocabulary}" if one.n_vocabulary else "")
    known = [row for row in one.by_category if row.outside.value is not None]
    most = max(known, key=lambda row: row.outside.value or 0.0, default=None)
    text = (
        f"{one.label}: the drafter can draft {size} tokens ({one.origin}); "
        f"{sure(overall.outside, percent)} of the output tokens are others"
    )
    if most is not None and len(known) > 1 and most.outside.value:
        text += f", most in {most.name}: {in_words(most.outside, percent)}"
    if overall.cost.value is None:
        return f"{text}. What that costs is not known: {overall.cost.why_not}."
    return (
        f"{text}. That costs {sure(overall.cost, plain)} in AL: with the whole vocabulary "
        f"{sure(overall.predicted_al, plain)} is predicted instead of "
        f"{in_words(overall.al, plain)}."
    )


def _vocabulary_table(one: Coverage) -> Table:
    cells = _Cells()
    rows = []
    for row in (*one.by_category, *((one.overall,) if one.overall else ())):
        rows.append(
            (
                row.name,
                f"{row.n_outside}/{row.n_tokens}",
                cells.of(f"outside, {row.name}", row.outside, hundred),
                cells.of(f"unavoidable, {row.name}", row.unavoidable, hundred),
                cells.of(f"AL, {row.name}", row.al, three),
                cells.of(f"predicted AL, {row.name}", row.predicted_al, three),
                cells.of(f"cost, {row.name}", row.cost, signed_three),
            )
        )
    headers = _columns(
        "Category", "Tokens\noutside", "Share of\ntokens (%)",
        "Unavoidable\nrejections (%)", "Measured AL", "Predicted AL",
        "Cost in AL",
    )  # fmt: skip
    return Table(headers, tuple(rows), (*cells.notes(), ASSUMPTION), total=True)


# ---------------------------------------------------------------- random tokens


OVER_ALL = (
    "over every conversation of each arm that did not fail. AL: the overall AL of the one over "
    "that of the other, which are means over categories; the AL ratio of `compare --allow prompts` "
    "is of geometric means, over conversations of every repeat, and may differ a little"
)


def _random(found: Insights) -> Iterator[Block]:
    if not found.overestimates and not found.unpaired:
        return
    yield Heading("Random tokens against real prompts")
    for random, real, differ in found.unpaired:
        yield Paragraph(
            f"{random} and {real} are not comparable: {', '.join(differ)} differ, too; measure "
            "both on one engine with one drafter.",
            "note",
        )
    if not found.overestimates:
        return
    cells, rows = _Cells(), []
    for one in found.overestimates:
        where = f"{one.random} / {one.real}"
        yield Paragraph(
            f"Random prompts ({one.random}) against real ones ({one.real}): user TPS is "
            f"{sure(one.user_tps, plain)} times, output TPS {sure(one.output_tps, plain)} times, "
            f"the overall AL {sure(one.al, plain)} times as high."
        )
        (random_in, random_out), (real_in, real_out) = one.lengths
        rows.append(
            (
                one.random,
                one.real,
                cells.of(f"AL, {where}", one.al, three),
                cells.of(f"user TPS, {where}", one.user_tps, three),
                cells.of(f"output TPS, {where}", one.output_tps, three),
                f"{random_in:.0f}/{random_out:.0f}",
                f"{real_in:.0f}/{real_out:.0f}",
            )
        )
    also = sorted({name for one in found.overestimates for name in one.differ})
    notes = [f"the arms also differ in {', '.join(f'--{name}' for name in also)}"] if also else []
    headers = _columns(
        "Random", "Real", "AL\nrandom/real", "User TPS\nrandom/real", "Output TPS\nrandom/real",
        "Prompt/output\ntokens, random", "Prompt/output\ntokens, real", words=2,
    )  # fmt: skip
    yield Table(headers, tuple(rows), (*cells.notes(), OVER_ALL, *notes))


# ---------------------------------------------------------------- experts


def _experts(found: Insights) -> Iterator[Block]:
    if not found.experts:
        return
    yield Heading("Expert activation")
    for one in found.experts:
        if one.mean is None:
            yield Paragraph(f"{one.label}, {one.phase} tokens: {one.why_not}.", "note")
    told = [one for one in found.experts if one.mean is not None]
    if not told:
        return
    for compared in found.expert_differences:
        if compared.phase == "output" and compared.ratios:
            size, ratio = min(compared.ratios, key=lambda one: abs(one[0] - TYPICAL_BATCH))
            yield Paragraph(
                f"A batch of {size} output tokens activates {sure(ratio, plain)} times as many "
                f"experts after random prompts ({compared.random}) as after real ones "
                f"({compared.real}), mean over layers."
            )
    table = _expert_table(told)
    yield table
    output = [one for one in told if one.phase == "output"]
    if output:
        yield _expert_chart(output)


def _expert_table(told: Sequence[ExpertUse]) -> Table:
    cells, rows = _Cells(), []
    sizes = sorted({b for one in told for b, _ in (one.mean.activated if one.mean else ())})
    for one in told:
        if one.mean is None:
            continue
        where = f"{one.label}, {one.phase}"
        activated = dict(one.mean.activated)
        unknown = Figure(None, why_not="fewer tokens than that were captured")
        rows.append(
            (
                one.label,
                one.phase,
                str(one.n_tokens),
                f"{one.mean.n_used:.1f}/{one.n_experts}",
                *(
                    cells.of(f"{b} tokens, {where}", activated.get(b, unknown), hundred)
                    for b in sizes
                ),
                cells.of(f"imbalance, {where}", one.mean.imbalance, three),
                cells.of(f"entropy, {where}", one.mean.entropy, three),
            )
        )
    notes = [
        "means over the routed layers; experts: the highest id seen anywhere, plus one",
        "activated by a batch: of tokens drawn from all requests at random, none twice",
        "imbalance: tokens of the most used expert over the mean of all; entropy: 1 if all are "
        "used alike",
    ]
    for one in told:
        if one.unrouted:
            layers = _some([str(layer) for layer in one.unrouted])
            notes.append(
                f"{one.label}, {one.phase}: layers {layers} do not route, and are left out"
            )
        if one.n_left_out:
            notes.append(
                f"{one.label}: {one.n_left_out} request(s) came with the experts of another number "
                "of tokens than prompt + output - 1, and are left out"
            )
    headers = _columns(
        "Arm", "Tokens of", "Tokens", "Experts\nused",
        *(f"Activated by\n{b} tokens (%)" for b in sizes),
        "Imbalance", "Entropy", words=2,
    )  # fmt: skip
    return Table(headers, tuple(rows), (*cells.notes(), *dict.fromkeys(notes)))


def _expert_chart(told: Sequence[ExpertUse]) -> Chart:
    """Activated share by layer, of the batch nearest to TYPICAL_BATCH that all arms have."""
    sizes = set.intersection(
        *({b for b, _ in layer.activated} for one in told for layer in one.layers)
    )
    size = min(sizes, key=lambda b: abs(b - TYPICAL_BATCH), default=1)
    series, rows, cells = [], [], _Cells()
    every = sorted({layer.layer or 0 for one in told for layer in one.layers})
    names = tuple(map(str, every)) if len(every) <= FEW_LAYERS else ()
    for one in told:
        figures = [dict(layer.activated).get(size, Figure(None)) for layer in one.layers]
        numbers = [layer.layer or 0 for layer in one.layers]
        places = [float(names.index(str(n)) if names else n) for n in numbers]
        series.append(_series(one.label, figures, "line", places))
        for layer, share in zip(one.layers, figures, strict=True):
            where = f"{one.label}, layer {layer.layer}"
            rows.append(
                (
                    one.label,
                    str(layer.layer),
                    f"{layer.n_used:.0f}/{one.n_experts}",
                    cells.of(where, share, hundred),
                    cells.of(f"imbalance, {where}", layer.imbalance, three),
                    cells.of(f"entropy, {where}", layer.entropy, three),
                )
            )
    headers = _columns(
        "Arm", "Layer", "Experts\nused", f"Activated by\n{size} tokens (%)",
        "Imbalance", "Entropy",
    )  # fmt: skip
    means = "; ".join(
        f"{one.label} {in_words(dict(one.mean.activated).get(size, Figure(None)), percent)}"
        for one in told
        if one.mean
    )
    return Chart(
        "insight-experts",
        f"Experts activated by a batch of {size} output tokens, by layer",
        f"Share of each layer's experts that {size} output tokens activate; mean over layers: "
        f"{means}.",
        Axis("Layer", ticks=names),
        Axis("Activated", "share of experts", low=0.0, high=1.0),
        tuple(series),
        Table(headers, tuple(rows), cells.notes()),
    )


# ---------------------------------------------------------------- along the answer


def _along(found: Insights) -> Iterator[Block]:
    groups = (
        ("By output position", "position", found.by_position),
        ("Thinking against answer", "thinking", found.by_thinking),
        ("Turn by turn", "turn", found.by_turn),
    )
    if not any(slices for _, _, slices in groups):
        return
    yield Heading("AL along the answer")
    yield Paragraph(
        "Every step equal, cut-off steps censored. Later parts hold other conversations (those "
        "with long answers), so each is also held against the first part of the same "
        "conversations."
    )
    for title, word, of_arms_ in groups:
        for one in of_arms_:
            if one.why_not:
                yield Paragraph(f"{title}, {one.label}: {one.why_not}.", "note")
        shown = [one for one in of_arms_ if one.slices]
        if len(shown) <= MANY_ARMS:
            for one in shown:
                yield Paragraph(_along_finding(title, one))
        if shown:
            yield _along_chart(title, word, shown)


def _along_finding(title: str, one: Slices) -> str:
    first = one.slices[0]
    told = [s for s in one.slices[1:] if s.difference.value is not None]
    # Of several later parts, the last one that has an interval says most.
    last = next((s for s in reversed(told) if s.difference.interval), told[-1] if told else None)
    text = f"{title}, {one.label}: AL is {sure(first.al, plain)} in '{first.label}'"
    if last is None:
        return f"{text}; no later part can be held against it."
    verdict = ""
    if last.difference.interval:
        low, high = last.difference.interval
        verdict = ", not significant" if low <= 0 <= high else ""
    return (
        f"{text} and {sure(last.al, plain)} in '{last.label}': a difference of "
        f"{sure(last.difference, signed)} from the first part of the same conversations{verdict}."
    )


def _along_chart(title: str, word: str, shown: Sequence[Slices]) -> Chart:
    labels = list(dict.fromkeys(s.label for one in shown for s in one.slices))
    series = []
    cells, rows = _Cells(), []
    for one in shown:
        by_label = {s.label: s for s in one.slices}
        figures = [_al_of(by_label.get(label)) for label in labels]
        series.append(_series(one.label, figures, "point"))
        for s in one.slices:
            where = f"{one.label}, {s.label}"
            first = s is one.slices[0]
            rows.append(
                (
                    one.label,
                    s.label,
                    str(s.n_conversations),
                    str(s.n_steps),
                    cells.of(where, s.al, three),
                    "" if first else cells.of(f"first part, {where}", s.al_first, three),
                    "" if first else cells.of(f"difference, {where}", s.difference, signed_three),
                )
            )
    headers = _columns(
        "Arm", "Output tokens before" if word == "position" else "Part", "Conversations",
        "Steps", "al_step", "Same, first\npart", "Difference", words=2,
    )  # fmt: skip
    axes = {
        "position": Axis("Output tokens before the step", "tokens", ticks=tuple(labels)),
        "turn": Axis("Turn of the conversation", ticks=tuple(labels)),
    }
    return Chart(
        f"insight-{word}",
        f"AL along the answer: {title[0].lower()}{title[1:]}",
        " ".join(_along_finding(title, one) for one in shown[:MANY_ARMS]),
        axes.get(word, Axis("Part of the answer", ticks=tuple(labels))),
        Axis("AL with 95 % intervals", "tokens per decode step", low=1.0),
        tuple(series),
        Table(headers, tuple(rows), cells.notes()),
    )


def _al_of(one: Slice | None) -> Figure:
    return Figure(None, why_not="no step") if one is None else one.al


# ---------------------------------------------------------------- saving


def _saving(found: Insights) -> Iterator[Block]:
    if not found.savings and not found.costs and not found.energy:
        return
    yield Heading("What speculation saves")
    if found.savings:
        if len(found.savings) <= MANY_ARMS:
            for one in found.savings:
                yield Paragraph(_saving_finding(one))
        yield _saving_table(found.savings)
    if found.costs:
        cells = _Cells()
        rows = tuple(
            (one.label, cells.of(one.label, one.dollars_per_million, short)) for one in found.costs
        )
        note = "GPU time of the whole run without start and warm-up, at --gpu_hour_price"
        yield Table(
            _columns("Arm", "Dollars per million\noutput tokens"),
            rows,
            (*cells.notes(), note),
        )
    if found.energy:
        yield from _energy(found)


def _saving_finding(one: Saving) -> str:
    if one.minutes.value is None:
        return f"{one.arm} against {one.base}: {one.minutes.why_not}."
    word = "saves" if one.minutes.value >= 0 else "costs"
    size = Figure(
        abs(one.minutes.value),
        one.minutes.interval
        if one.minutes.value >= 0 or one.minutes.interval is None
        else (-one.minutes.interval[1], -one.minutes.interval[0]),
        one.minutes.why_not,
    )
    return (
        f"{one.arm} {word} {sure(size, short)} minutes of decoding for the same {one.n_tokens} "
        f"tokens, of the {in_words(one.baseline_minutes, short)} that {one.base} would take: "
        f"{sure(one.share, percent)}. Minutes that requests waited, added up."
    )


def _saving_table(savings: Sequence[Saving]) -> Table:
    cells = _Cells()
    rows = tuple(
        (
            one.arm,
            one.base,
            str(one.n_conversations),
            cells.of(f"minutes saved, {one.arm}", one.minutes, short),
            cells.of(f"baseline, {one.arm}", one.baseline_minutes, short),
            cells.of(f"share, {one.arm}", one.share, hundred),
        )
        for one in savings
    )
    headers = _columns(
        "Arm", "Baseline", "Conversations", "Minutes\nsaved",
        "Baseline\nminutes", "Share\nsaved (%)", words=2,
    )  # fmt: skip
    return Table(headers, rows, cells.notes())


def _energy(found: Insights) -> Iterator[Block]:
    cells, rows = _Cells(), []
    for one in found.energy:
        rows.append(
            (
                one.label,
                cells.of(f"joules, {one.label}", one.joules, short),
                cells.of(f"per million tokens, {one.label}", one.joules_per_million, short),
                cells.of(f"watts, {one.label}", one.watts, short),
                NO_VALUE if one.slowed.value is None else percent(one.slowed.value),
            )
        )
    notes = [f"{one.label}: {one.unsure}" for one in found.energy if one.unsure]
    notes += [f"{one.label}: from {one.source}" for one in found.energy if one.source]
    headers = _columns(
        "Arm", "Joules", "Joules per million\noutput tokens",
        "Mean watts,\nall GPUs", "Samples at\nlowered clocks",
    )  # fmt: skip
    yield Table(headers, tuple(rows), (*cells.notes(), *notes))
    slowed = [(o.label, o.slowed.value) for o in found.energy if (o.slowed.value or 0) > 0.05]
    if slowed:
        yield Facts(
            tuple(
                (label, f"a GPU ran at lowered clocks (power cap, heat) in {percent(share or 0)} "
                 "of the samples: times are not those of a cool, uncapped GPU", "warning")
                for label, share in slowed
            )
        )  # fmt: skip
