"""Layout: what a report says, in order, as blocks that every textual form draws in its own way."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

from speedbench import presets
from speedbench.checks import Check, is_chat
from speedbench.report import layout_charts
from speedbench.report.blocks import (
    Block,
    Column,
    Facts,
    Heading,
    Paragraph,
    Section,
    Table,
    Verbatim,
    clean,
)
from speedbench.report.definitions import DEFINITIONS
from speedbench.report.layout_load import of_load
from speedbench.report.layout_stalls import of_stalls
from speedbench.report.summary import Figure, Summary, why_no_time
from speedbench.store import n_replicas_of

NOT_A_MEASUREMENT = "SIMULATED: the engine made everything up; nothing here is a measurement."
NO_VALUE = "n/a"
NOT_SIGNIFICANT = "ns"
NOBODY: Mapping[str, Sequence[str]] = {}


# ---------------------------------------------------------------- reports


def of_run(summary: Summary) -> Iterator[Block]:
    """The report of one run."""
    yield Heading(f"speedbench: {title(summary)}", 1)
    if summary.manifest["engine"].get("simulated"):
        yield Paragraph(NOT_A_MEASUREMENT, "error")
    yield Paragraph(totals(summary))
    yield from checks([("", summary.checks)])
    yield provenance({"": summary})
    yield from of_stalls(Path(summary.run_dir))
    yield Heading("In short")
    yield in_short(summary)
    yield from acceptance(summary)
    yield from timing(summary)


def timing(summary: Summary, prefix: str = "") -> Iterator[Block]:
    """All about time, of one run."""
    yield Heading("Timing")
    yield _throughput(summary)
    yield _distributions(summary)
    yield from of_load(summary.load)
    yield from layout_charts.of_timing(summary, prefix)
    if summary.curves.timeline is None:
        yield Paragraph(f"Nothing is drawn over time: {summary.curves.why_no_timeline}.", "note")


def provenance(runs: Mapping[str, Summary]) -> Section:
    """Where the numbers come from: inputs, engine, machine, command; of several runs, what they
    share is told once."""
    each = {name: _provenance(run).items for name, run in runs.items()}
    if len(each) == 1:
        return Section("Provenance", tuple(Facts(items) for items in each.values()))
    first, *others = (set(items) for items in each.values())
    shared = first.intersection(*others)
    blocks: list[Block] = [Heading("All runs")]
    blocks.append(Facts(tuple(item for item in next(iter(each.values())) if item in shared)))
    for name, items in each.items():
        blocks += [Heading(name), Facts(tuple(item for item in items if item not in shared))]
    return Section("Provenance", tuple(blocks))


def in_short(summary: Summary) -> Facts:
    """The numbers that most readers come for."""
    items = [("AL", sentence(summary.lengths["al"]))] if summary.draft_length else []
    for name, key, factor, unit in (
        ("User TPS P50", "user_tps", 1.0, "tokens/s"),
        ("Step time P50", "step_time_s", 1e3, "ms"),
        ("TTFT P50", "ttft_s", 1e3, "ms"),
    ):
        found = (summary.timing[key] or {}).get("p50")
        figure = Figure(None, why_not=why_no_time(summary.manifest, key))
        items.append((name, sentence(figure if found is None else Figure(found * factor), unit)))
    items.append(("Output TPS", sentence(summary.output_tps, "tokens/s over the whole run")))
    return Facts(tuple((name, text, "plain") for name, text in items))


def title(summary: Summary) -> str:
    """What ran, in one line."""
    return ", ".join(title_parts(summary))


def title_parts(summary: Summary) -> list[str]:
    engine, config = summary.manifest["engine"], summary.manifest["config"]
    algorithm = config["speculative_algorithm"]
    drafter = config.get("draft_model_dir")
    return [
        f"{engine['name']} {engine['version']}",
        "no speculation"
        if algorithm == "NONE" and summary.draft_length == 0
        else f"{algorithm} K={summary.draft_length}",
        f"target {_base_name(config.get('model_dir'))}",
        *([f"drafter {_base_name(drafter)}"] if drafter else []),
        f"dataset {summary.manifest['dataset']['name']}",
        f"concurrency {config['concurrency']}" + _times_replicas(summary.manifest),
        *([f"shard {config['shard']}"] if config.get("shard") else []),
        summary.manifest["status"],
    ]


def _times_replicas(manifest: Mapping[str, Any]) -> str:
    n = n_replicas_of(manifest)
    return f" in each of {n} replicas" if n > 1 else ""


def _base_name(path: str | None) -> str:
    return PurePath(path).name if path else "none"


def totals(summary: Summary) -> str:
    events = "chunks" if summary.manifest["config"].get("url") else "steps"
    text = (
        f"{summary.n_steps} {events} and {summary.n_output_tokens} tokens of {summary.n_requests} "
        f"requests in {summary.n_conversations + summary.n_failed} conversations were recorded"
    )
    if summary.n_failed:
        text += f"; {summary.n_failed} of the conversations failed and are in no number below"
    return text + "."


def checks(
    groups: Sequence[tuple[str, Sequence[Check]]], together: Mapping[str, Sequence[str]] = NOBODY
) -> Iterator[Block]:
    """Errors first; a sentence that several groups share is told once.

    together: a name for these groups, all of them and no other
    """
    one_name = {frozenset(names): name for name, names in together.items() if len(names) > 2}
    whose: dict[Check, dict[str, None]] = {}
    for name, found in groups:
        for check in found:
            whose.setdefault(check, {})[name] = None
    order: tuple[Literal["error", "warning", "note"], ...] = ("error", "warning", "note")
    words = {"error": "ERROR", "warning": "WARNING", "note": "note"}
    items = []
    for level in order:
        for check, names in whose.items():
            if check.level == level:
                arms = one_name.get(frozenset(names)) or listed([name for name in names if name])
                sentence = f"{arms}: {check.sentence}" if arms else check.sentence
                items.append((words[level], sentence, level))
    yield Facts(tuple(items)) if items else Paragraph("Every check passed.")


def listed(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'; 'a, 1; b, 2 and c, 3' where names hold commas."""
    comma = "; " if any(", " in name for name in names) else ", "
    return " and ".join([comma.join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---------------------------------------------------------------- cells


class Cells:
    """Makes cells of figures, and footnotes of the reasons why some have no number."""

    def __init__(self) -> None:
        self._why: dict[str, list[str]] = {}

    def value(self, where: str, figure: Figure) -> str:
        if figure.value is None:
            self._note(where, figure.why_not)
            return NO_VALUE
        return number(figure.value)

    def interval(self, where: str, figure: Figure) -> str:
        if figure.interval is None:
            if figure.value is not None:
                self._note(f"interval of {where}", figure.why_not)
            return NO_VALUE
        return interval(figure.interval)

    def plain(self, where: str, value: float | None, why_not: str) -> str:
        return self.value(where, Figure(value, why_not=why_not))

    def _note(self, where: str, why_not: str) -> None:
        places = self._why.setdefault(why_not or "not known", [])
        if where not in places:
            places.append(where)

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{NO_VALUE}: {_some(places)}: {why}" for why, places in self._why.items())


def _some(places: Sequence[str]) -> str:
    shown = list(places[:3])
    return ", ".join(shown) + (f" and {len(places) - 3} more" if len(places) > 3 else "")


def number(value: float) -> str:
    return f"{value:.4f}"


def interval(bounds: tuple[float, float]) -> str:
    between = " to " if bounds[0] < 0 else "-"
    return f"{number(bounds[0])}{between}{number(bounds[1])}"


def sentence(figure: Figure, unit: str = "") -> str:
    """A figure in running text: its value with unit and interval, or why there is none."""
    if figure.value is None:
        return f"{NO_VALUE}: {figure.why_not}"
    text = number(figure.value) + (f" {unit}" if unit else "")
    return text + (f" (95 % {interval(figure.interval)})" if figure.interval else "")


# ---------------------------------------------------------------- acceptance


def acceptance(summary: Summary, prefix: str = "") -> Iterator[Block]:
    """All about accepted tokens; the ids of its figures begin with `prefix`."""
    categories = _category_table(summary)
    charts = layout_charts.of_acceptance(summary, prefix)
    if summary.draft_length == 0:
        yield Heading("Acceptance Rate Results")
        yield Paragraph("AL = 1 by definition: nothing was drafted.")
        yield categories
        return
    yield Heading("Acceptance Length Histogram")
    yield Verbatim((_histogram(summary.histogram),))
    yield Paragraph(_steps(summary))
    if "histogram" in charts:
        yield charts["histogram"]
    yield Heading("Conditional acceptance rate")
    yield Paragraph(
        f"Over {summary.rates_over}. Position k: the k-th draft token, where one was "
        "drafted, given that those before it were accepted; joint: all of the first k."
    )
    yield _rate_table(summary)
    if "rates" in charts:
        yield charts["rates"]
    yield Heading("Acceptance Rate Results")
    yield categories
    if "categories" in charts:
        yield charts["categories"]
    if (preset := summary.manifest["config"].get("preset")) is not None:
        interval = summary.lengths["al"].interval
        yield Paragraph(presets.sentence(preset, summary.n_conversations, interval))
    yield Heading("Acceptance lengths, by name")
    yield _length_table(summary)
    yield _length_by_category_table(summary)
    yield Heading("As published")
    yield Paragraph(
        "What the published harness counts: every event as it looks, prefill and cut-off steps "
        "included."
    )
    yield _published(summary)


def _histogram(counts: Sequence[int]) -> str:
    return str(dict(enumerate(counts, 1)))


def _steps(summary: Summary) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in summary.kinds.items() if n)
    text = f"Events: {kinds or 'none'}. The histogram holds the decode steps"
    if summary.n_censored:
        text += f", {summary.n_censored} of them cut off by the end of a request"
    if summary.draft_hit_rate.value is not None:
        text += f". Draft hit rate {number(summary.draft_hit_rate.value)}"
    return text + "."


def _rate_table(summary: Summary) -> Table:
    cells = Cells()
    rows = []
    for k, (rate, joint) in enumerate(zip(summary.rates, summary.joint, strict=True), 1):
        rate_at, joint_at = f"position {k}", f"joint rate {k}"
        rows.append(
            (
                str(k),
                cells.value(rate_at, rate),
                cells.interval(rate_at, rate),
                cells.value(joint_at, joint),
                cells.interval(joint_at, joint),
            )
        )
    headers = ("Position", "Conditional", "95 % interval", "Joint", "95 % interval")
    return Table(tuple(Column(h) for h in headers), tuple(rows), cells.notes())


def _category_table(summary: Summary) -> Table:
    """The published table, with completeness, intervals and closed form."""
    cells = Cells()
    baseline = summary.draft_length == 0
    known = any(row.expected_al is not None for row in summary.categories)
    columns = [Column("Category", words=True), Column("n/n"), Column("Average AL")]
    columns += [] if baseline else [Column("95 % interval")]
    columns += [Column("Closed\nform")] if known else []

    def row(name: str, complete: str, al: Figure, closed: float | None) -> tuple[str, ...]:
        made = [name, complete, cells.value(name, al)]
        made += [] if baseline else [cells.interval(name, al)]
        made += [cells.plain(f"closed form, {name}", closed, "not computed")] if known else []
        return tuple(made)

    rows = [
        row(
            category.name,
            f"{category.n_complete}/{category.n_expected}",
            category.lengths["al"],
            category.expected_al,
        )
        for category in summary.categories
    ]
    n_complete = sum(category.n_complete for category in summary.categories)
    n_expected = sum(category.n_expected for category in summary.categories)
    complete = f"{n_complete}/{n_expected}"
    rows.append(row("Overall Average", complete, summary.lengths["al"], summary.expected_al))
    return Table(tuple(columns), tuple(rows), cells.notes(), total=True)


def _length_table(summary: Summary) -> Table:
    cells = Cells()
    rows = tuple(
        (
            f"{name} (primary)" if name == "al" else name,
            cells.value(name, figure),
            cells.interval(name, figure),
            DEFINITIONS[name],
        )
        for name, figure in summary.lengths.items()
    )
    columns = (Column("Name"), Column("AL"), Column("95 % interval"))
    return Table(
        (*columns, Column("Over which steps, and how weighted", words=True)), rows, cells.notes()
    )


def _length_by_category_table(summary: Summary) -> Table:
    """Those acceptance lengths that differ within a category (`al_step` does not from `al`)."""
    cells = Cells()
    names = ("al", "al_conversation", "al_drafted", "al_specdec_bench")

    def row(label: str, lengths: Mapping[str, Figure]) -> tuple[str, ...]:
        return (label, *(cells.value(f"{name} of {label}", lengths[name]) for name in names))

    return Table(
        (Column("Category", words=True), *(Column(name) for name in names)),
        (
            *(row(category.name, category.lengths) for category in summary.categories),
            row("Overall", summary.lengths),
        ),
        cells.notes(),
        total=True,
    )


def _published(summary: Summary) -> Verbatim:
    """In the published console's own spelling: key n of the rates is P(n tokens | n - 1)."""
    histogram = summary.published_histogram
    average = f"Average AL {sentence(summary.lengths['al_specdec_bench'])}"
    if not histogram:
        why_not = summary.published_al_step.why_not
        return Verbatim((f"Acceptance Length Histogram {NO_VALUE} ({why_not})", average))
    tokens = sum(n * count for n, count in enumerate(histogram, 1))
    rates = [
        f"{n} {NO_VALUE} ({rate.why_not})" if rate.value is None else f"{n} {rate.value!r}"
        for n, rate in enumerate(summary.published_rates, 2)
    ]
    return Verbatim(
        (
            "Acceptance Length Histogram",
            _histogram(histogram),
            "Conditional acceptance rate",
            "1 1.0" if sum(histogram) else f"1 {NO_VALUE} (no steps)",
            *rates,
            f"Token-weighted AL {sentence(summary.published_al_step)} "
            f"({tokens} tokens in {sum(histogram)} steps)",
            average,
        )
    )


# ---------------------------------------------------------------- time

DISTRIBUTIONS: Mapping[str, tuple[str, float]] = {
    "e2e_s": ("E2E Request\nTime (s)", 1),
    "ttft_s": ("TTFT Time\n(ms)", 1e3),
    "step_time_s": ("Request\nGeneration\nStep\nTime (ms)", 1e3),
    "user_tps": ("Request\nGeneration\nTokens Per\nSecond (1/s)", 1),
    "output_tokens": ("Number of\nOutput\nTokens", 1),
}
"""By their published names: header, and factor from the stored unit."""

STATISTICS: Mapping[str, str] = {
    "min": "min",
    "mean": "mean",
    "std": "std",
    **{f"p{q}": f"P{q}" for q in (25, 50, 75, 90, 95, 99)},
    "max": "max",
}


def _throughput(summary: Summary) -> Facts:
    return Facts(
        tuple((name, sentence(figure, unit), "plain") for name, figure, unit in _rates(summary))
    )


def _rates(summary: Summary) -> tuple[tuple[str, Figure, str], ...]:
    seconds = summary.steady_duration_s
    window = "" if seconds is None else f" over the {seconds:.1f} s when all slots were filled"
    return (
        ("Output TPS", summary.output_tps, "tokens/s over the whole run"),
        ("Output TPS, steady", summary.output_tps_steady, f"tokens/s{window}"),
        ("Output TPS/gpu", summary.output_tps_per_gpu, "tokens/s and GPU over the whole run"),
    )


def _distributions(summary: Summary) -> Table:
    """A column for each distribution, so that no number is cut on a narrow terminal."""
    cells = Cells()
    shown = [
        (summary.timing[name], *about, why_no_time(summary.manifest, name))
        for name, about in DISTRIBUTIONS.items()
    ]
    rows = [("n", *(f"{found['n']:.0f}" if found else "0" for found, *_ in shown))]
    for key, label in STATISTICS.items():
        row = [label]
        for found, header, factor, why_not in shown:
            value = found[key] if found else None
            row.append(
                cells.plain(
                    clean(header) if found is None else f"{label} of {clean(header)}",
                    None if value is None else value * factor,
                    why_not if found is None else "there is one value only",
                )
            )
        rows.append(tuple(row))
    columns = (Column(""), *(Column(header) for _, header, *_ in shown))
    return Table(columns, tuple(rows), cells.notes())


# ---------------------------------------------------------------- provenance


def _origin(origin: Mapping[str, str] | None) -> str:
    """Where a prepared dataset came from, for the line that names it."""
    if not origin:
        return ""
    return f" (from {origin['repository']} at {origin['revision'][:12]})"


def _provenance(summary: Summary) -> Facts:
    manifest = summary.manifest
    config, engine, dataset = manifest["config"], manifest["engine"], manifest["dataset"]
    machine, prompts = manifest["environment"], manifest["prompts"]
    turns = {"first": "first turns only", "all": "all turns"}
    hashed = "messages" if is_chat(manifest) else "token IDs"
    facts = {
        "prompts": f"{prompts['n_prompts']} prompts, {turns.get(prompts['turns'], '')}; "
        f"tokenizer {prompts['tokenizer']}",
        "fingerprint": prompts["fingerprint"]
        + (f", of the first turns' {hashed}" if prompts["turns"] == "first" else ""),
        "dataset": f"{dataset['name']}, {sum(dataset['expected'].values())} rows, "
        f"{dataset['path']}{_origin(dataset.get('origin'))}",
        "sha256": dataset["sha256"],
        "target": config.get("model_dir"),
        "drafter": config.get("draft_model_dir"),
        "sampling": _pairs(config, ("temperature", "top_p", "top_k", "ignore_eos", "seed"))
        + f" output_length={config['output_length']}",
        "engine": _pairs(
            engine, ("draft_length", "max_num_seqs", "max_seq_len", "prefix_cache", "tells_drafted")
        ),
        "settings": _pairs(engine.get("settings", {})),
        "absent": ", ".join(engine.get("unused", ())),
        "versions": _pairs({"python": machine["python"], **machine["packages"]}),
        "machine": _plain(machine.get("platform")),
        "cpu": _plain(machine.get("cpu")),
        "gpus": _counted(machine.get("gpus") or ()) or "none",
        "git": _plain(machine.get("git")) or "not a checkout",
        "command": shlex.join(machine.get("argv") or ()),
        "sessions": ", ".join(_starts(manifest["sessions"])),
        "replicas": _replicas(manifest),
        "run": summary.run_dir,
    }
    return Facts(tuple((name, str(text), "plain") for name, text in facts.items() if text))


def _starts(sessions: Sequence[Mapping[str, Any]]) -> list[str]:
    """When each session began; of replicas, when the first did."""
    starts: dict[int, str] = {}
    for session in sessions:
        starts.setdefault(session["session"], str(session.get("started_at")))
    return list(starts.values())


def _replicas(manifest: Mapping[str, Any]) -> str:
    """Where each replica of the last session ran; nothing of one alone."""
    if n_replicas_of(manifest) == 1:
        return ""
    last = max(session["session"] for session in manifest["sessions"])
    return "; ".join(
        f"{session.get('replica', 0)} on {session.get('hostname', 'an unknown host')}"
        + (f", GPUs {session['devices']}" if session.get("devices") else "")
        + (f", {session['n_cpus']} CPUs" if session.get("n_cpus") else "")
        for session in manifest["sessions"]
        if session["session"] == last or manifest.get("merged")
    )


def _pairs(values: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """'a=1 b=two': wraps between settings, not within one."""
    chosen = values if names is None else {name: values.get(name) for name in names}
    return " ".join(f"{name}={_plain(value)}" for name, value in chosen.items())


def _counted(values: Sequence[Any]) -> str:
    """Each different value once, with how often it occurs."""
    counts = Counter(_plain(value) for value in values)
    return "; ".join(f"{n} x {value}" for value, n in counts.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(_plain(inner) for inner in value)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
