"""Reports of stored runs: the published golden numbers, every form, no number cut or made up."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from speedbench import stats, store
from speedbench.report import as_json, console, html, layout, markdown
from speedbench.report.arms import grouped
from speedbench.report.blocks import Block, Column, Facts, Table
from speedbench.report.document import document
from speedbench.report.summary import Resamples, Summary, summarize, summarize_repeats
from speedbench.store import Run
from speedbench.types import ConversationRecord, Served, ToldAcceptance
from tests.builders import MS, S, conversation, counters, session, stored, told, turn

CATEGORIES = [
    "coding",
    "humanities",
    "math",
    "multilingual",
    "qa",
    "rag",
    "reasoning",
    "roleplay",
    "stem",
    "summarization",
    "writing",
]


def shown(run: Run, width: int = 80) -> str:
    return printed(lambda out: console.render(summarize(run), out), width)


def printed(draw: Any, width: int) -> str:
    file = io.StringIO()
    draw(Console(file=file, width=width, color_system=None))
    return file.getvalue()


# --- golden numbers -------------------------------------------------------------------------------

GOLDEN = {1: 57385, 2: 36968, 3: 24441, 4: 61182}
"""The published Llama-3.3-70B EAGLE3 run, prefill steps included: 880 rows, 1138 requests."""

N_ROWS, N_REQUESTS = 880, 1138


def golden_records() -> list[ConversationRecord]:
    """880 rows, 258 further turns; a prefill of one token, and a last step of 4, uncut."""
    pool = [
        n for n, count in GOLDEN.items() for _ in range(count - (N_REQUESTS if n in (1, 4) else 0))
    ]
    random.Random(1).shuffle(pool)
    requests = [[1, *pool[i::N_REQUESTS], 4] for i in range(N_REQUESTS)]
    n_turns = [3] * 73 + [2] * 112 + [1] * (N_ROWS - 185)
    random.Random(2).shuffle(n_turns)
    remaining = iter(requests)
    return [
        conversation(f"row-{i}", CATEGORIES[i % 11], *(next(remaining) for _ in range(n)))
        for i, n in enumerate(n_turns)
    ]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return stored(tmp_path_factory.mktemp("golden") / "run", golden_records())


def test_golden_numbers_as_published_to_the_last_digit(golden: Run) -> None:
    summary = summarize(golden)
    assert (summary.n_conversations, summary.n_requests) == (880, 1138)
    assert (summary.n_steps, summary.n_output_tokens) == (179976, 449372)
    assert summary.published_histogram == (57385, 36968, 24441, 61182)
    assert [rate.value for rate in summary.published_rates] == [
        0.681151931368627,
        0.6984444208791836,
        0.7145509968116043,
    ]
    assert summary.published_al_step.value == pytest.approx(2.4968, abs=5e-5)


def test_golden_numbers_without_the_prefill_steps(golden: Run) -> None:
    summary = summarize(golden)
    first, second, third = (rate.value for rate in summary.rates)
    assert first == pytest.approx(0.6854863, abs=5e-8)
    assert second == pytest.approx(0.6984444208791836, abs=1e-14)
    assert third == pytest.approx(0.7145509968116043, abs=1e-14)
    assert summary.lengths["al_step"].value == pytest.approx(2.5064, abs=5e-5)
    assert summary.histogram == (56247, 36968, 24441, 61182)
    assert summary.n_censored == 0


@pytest.mark.parametrize("width", [80, 140])
def test_golden_numbers_are_on_the_console(golden: Run, width: int) -> None:
    text = shown(golden, width)
    assert "{1: 57385, 2: 36968, 3: 24441, 4: 61182}" in text
    for line in (
        "1 1.0",
        "2 0.681151931368627",
        "3 0.6984444208791836",
        "4 0.7145509968116043",
        "Token-weighted AL 2.4968 (449372 tokens in 179976 steps)",
    ):
        assert line in text.splitlines()
    assert re.search(r"al_step\W+2\.5064 ", text)
    assert re.search(r"\W 1 \W+ 0\.6855 ", text)
    assert "179976 steps and 449372 tokens of 1138 requests in 880 conversations" in text


def test_golden_numbers_in_markdown_and_json(golden: Run) -> None:
    summary = summarize(golden)
    assert "\n3 0.6984444208791836\n" in markdown.render(summary)
    found = as_json.render(summary)["as_published"]
    assert found["histogram"] == {"1": 57385, "2": 36968, "3": 24441, "4": 61182}
    assert [f["value"] for f in found["conditional_rates"]] == [
        0.681151931368627,
        0.6984444208791836,
        0.7145509968116043,
    ]


# --- runs to report -------------------------------------------------------------------------------


def arm(
    directory: Path,
    draft_length: int,
    *,
    step_ns: int = 10 * MS,
    names: Sequence[str] = CATEGORIES,
    per_category: int = 4,
    left_out: Sequence[str] = (),
    **about: Any,
) -> Run:
    """Two slots; every conversation makes 21 tokens, and steps take `step_ns`.

    With drafts its decode steps hold 1, 2, 3, 4, 1, 2, 3, 4 tokens; AL is 2.5.
    """
    decode = [1, 2, 3, 4] * 2 if draft_length else [1] * 20
    lengths = [1, *decode]
    records = []
    for c, category in enumerate(names):
        for i in range(per_category):
            name = f"row-{c}-{i}"
            start = (c * per_category + i) * 100 * MS
            record = turn(
                name,
                lengths,
                submitted_ns=start,
                step_ns=step_ns,
                told=told(lengths, 3) if draft_length else [(0, 0)] * len(lengths),
            )
            if name not in left_out:
                records.append(conversation(name, category, record))
    n = len(records)
    counted = counters(8 * n, 12 * n) if draft_length else None
    about.setdefault("sessions", [session(counters=counted, ended_ns=20 * S)])
    about.setdefault("expected", dict.fromkeys(names, per_category))
    return stored(directory, records, draft_length=draft_length, **about)


def forms(run: Run) -> dict[str, str]:
    summary = summarize(run)
    return {
        "80": shown(run, 80),
        "140": shown(run, 140),
        "markdown": markdown.render(summary),
        "json": json.dumps(as_json.render(summary), allow_nan=False, ensure_ascii=False),
    }


def odd_run(directory: Path) -> Run:
    """A run of which much cannot be said: a silent category, a failed one, one not asked."""
    records = [
        conversation("a", "answers", [1, 4, 2]),
        conversation("b", "answers", [1, 1, 1, 2]),
        conversation("c", "silent", [1]),
        conversation("d", "broken", turn("d", [1, 2], finish="error", error="boom")),
    ]
    expected = {"answers": 2, "silent": 1, "broken": 1, "unasked": 2}
    sessions = [session(0), session(1, ended_ns=None)]
    return stored(directory, records, expected=expected, sessions=sessions, status="partial")


# --- the console ----------------------------------------------------------------------------------


def test_long_labels_leave_their_text_two_thirds_of_the_width() -> None:
    label = "dataset random, random ISL 50, temperature 0.7, concurrency 16 DRAFT_TARGET K=3"
    facts = Facts(((label, "it pays " * 30, "plain"), ("short", "words", "plain")))
    text = printed(lambda out: console.draw([facts], out), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 6  # 240 characters in lines of 50, not of 11
    assert label.split() == " ".join(line[:26] for line in text.splitlines()[:4]).split()


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(
    tmp_path: Path, width: int
) -> None:
    known = {"ok": True, "sentence": "exact.", "overall": 2.5, "by_category": {}}
    known["by_category"] = dict.fromkeys(CATEGORIES, 2.5)
    spec = arm(tmp_path / "spec", 3, step_ns=15 * MS, known_answer=known)
    base = arm(tmp_path / "base", 0)
    both = of_all(base, spec)
    for text in (
        shown(spec, width),
        shown(base, width),
        printed(lambda out: console.draw(both, out), width),
    ):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width


def test_narrower_than_its_tables_a_terminal_still_gets_whole_numbers(tmp_path: Path) -> None:
    wide, narrow = (shown(arm(tmp_path / str(w), 3), w) for w in (140, 30))
    numbers = re.compile(r"\d+\.\d{4}")
    assert sorted(numbers.findall(narrow)) == sorted(numbers.findall(wide))


WIDE = Table(
    (
        Column("Arm", words=True),
        Column("User TPS\n(tokens/s)"),
        Column("95 % interval"),
        Column("Saved"),
        Column("Output TPS\n(tokens/s)"),
        Column("95 % interval"),
    ),
    (
        ("EAGLE3 K=3", "101.5000", "100.2500-102.7500", "0.77 (0.71 to 0.82)", "1349.1250",
         "1300.1250-1398.1250"),
        ("with\na break", "201.5000", "200.2500-202.7500", "n/a", "2349.1250", "n/a"),
    ),
    ("a note",),
)  # fmt: skip


def test_a_table_that_is_too_wide_puts_intervals_below_their_values() -> None:
    lines = printed(lambda out: console.draw([WIDE], out), 70).splitlines()
    assert max(map(len, lines)) <= 70
    assert len([line for line in lines if "Arm" in line]) == 1  # still one table
    row = next(i for i, line in enumerate(lines) if "EAGLE3 K=3" in line)
    for value, interval in (
        ("101.5000", "100.2500-102.7500"),
        ("0.77", "(0.71 to 0.82)"),
        ("1349.1250", "1300.1250-1398.1250"),
    ):
        value_ends = lines[row].index(value) + len(value)
        assert lines[row + 1].index(interval) + len(interval) == value_ends
    assert "with a break" in "\n".join(lines)  # the data's own line breaks make no line


def test_a_table_that_is_still_too_wide_comes_in_parts_with_their_first_column() -> None:
    text = printed(lambda out: console.draw([WIDE], out), 34)
    assert max(map(len, text.splitlines())) <= 34
    assert text.count("EAGLE3 K=3") == text.count("Arm") == 3
    for number in re.findall(r"[\d.]{4,}", " ".join(cell for row in WIDE.rows for cell in row)):
        assert number in text
    assert text.count("a note") == 1
    roomy = printed(lambda out: console.draw([WIDE], out), 140)
    assert re.search(r"101\.5000 . 100\.2500-102\.7500", roomy)


def test_the_published_layout_is_recognisable(tmp_path: Path) -> None:
    text = shown(arm(tmp_path / "r", 3))
    places = [
        text.index(words)
        for words in (
            "speedbench: VLLM 0.32.0, EAGLE3 K=3, target target, drafter drafter",
            "Every check passed.",
            "Acceptance Length Histogram\n{1: 88, 2: 88, 3: 88, 4: 88}",
            "Conditional acceptance rate",
            "Acceptance Rate Results",
            "Overall Average",
            "al_specdec_bench",
            "As published",
            "Output TPS, steady",
            "Output TPS/gpu",
            "E2E Request",
            "TTFT Time",
            "fingerprint",
        )
    ]
    assert places == sorted(places)
    assert re.search(r"Category\s+.\s+n/n\s+.\s+Average AL\s+.\s+95 % interval", text)
    assert re.search(r"coding\s+.\s+4/4\s+.\s+2\.5000 .\s+2\.5000-2\.5000", text)
    assert re.search(r"Overall Average\s+.\s+44/44\s+.\s+2\.5000", text)
    first = r"min\W+0\.1300\W+50\.0000\W+10\.0000\W+250\.0000\W+21\.0000"
    assert re.search(first, text)  # s, ms, ms, 1/s, tokens: 1 + 8 steps, 20 tokens in 80 ms
    for label in ("min", "mean", "std", "P25", "P50", "P75", "P90", "P95", "P99", "max"):
        assert re.search(rf"^. {label} ", text, re.MULTILINE)


def test_all_named_lengths_are_shown_with_their_definitions(tmp_path: Path) -> None:
    lines = markdown.render(summarize(arm(tmp_path / "r", 3))).splitlines()
    for name, value, words in (
        ("al (primary)", "2.5000", "Kaplan-Meier"),
        ("al_step", "2.5000", "every step equal"),
        ("al_conversation", "2.5000", "mean per conversation"),
        ("al_drafted", "2.5000", "verify steps only"),
        ("al_specdec_bench", "2.3333", "prefill included"),  # 21 tokens in 9 steps
        ("al_engine", "2.5000", "1 + accepted / drafts"),
    ):
        (line,) = [x for x in lines if x.startswith(f"| {name} | {value} |")]
        assert words in line


def test_a_baseline_has_no_acceptance_to_report(tmp_path: Path) -> None:
    text = shown(arm(tmp_path / "r", 0))
    assert "AL = 1 by definition" in text
    assert "no speculation" in text
    for absent in ("Histogram", "Conditional", "Joint", "al_specdec_bench", "As published"):
        assert absent not in text
    assert "Output TPS" in text
    assert "44/44" in text


def test_a_simulation_is_named_before_anything_else(tmp_path: Path) -> None:
    run = arm(tmp_path / "r", 3, engine={"simulated": True})
    for name, text in forms(run).items():
        if name != "json":
            assert "SIMULATED" in text.split("recorded")[0]
    assert as_json.render(summarize(run))["simulated"] is True


def test_checks_stand_above_every_number_in_words(tmp_path: Path) -> None:
    run = arm(tmp_path / "r", 3, engine={"max_num_seqs": 1}, status="failed")
    text = shown(run)
    assert text.index("WARNING") < text.index("Acceptance Length Histogram")
    assert "at most 1 requests at once" in text.replace("\n         ", " ")
    colours = io.StringIO()
    console.render(summarize(run), Console(file=colours, width=80, force_terminal=True))
    assert "\x1b[33m" in colours.getvalue()


def test_closed_form_stands_beside_the_measurement(tmp_path: Path) -> None:
    known = {"ok": True, "sentence": "exact.", "overall": 2.25, "by_category": {"math": 2.75}}
    text = markdown.render(summarize(arm(tmp_path / "r", 3, known_answer=known)))
    assert "| Closed form |" in text
    assert re.search(r"\| math \| 4/4 \| 2\.5000 \| [\d.-]+ \| 2\.7500 \|", text)
    assert re.search(r"\| coding \| 4/4 \| 2\.5000 \| [\d.-]+ \| n/a \|", text)
    assert re.search(r"Overall Average.*2\.2500", text)
    assert "Closed" not in shown(arm(tmp_path / "plain", 3))


def test_what_is_not_known_is_not_a_number_and_has_a_reason(tmp_path: Path) -> None:
    run = odd_run(tmp_path / "r")
    for name, text in forms(run).items():
        assert not re.search(r"\b(nan|NaN|None|inf|Infinity)\b", text), name
    text = " ".join(shown(run).split())
    assert "n/a: broken, unasked: no conversation was measured" in text
    assert "n/a: silent: no single decode step was recorded" in text
    assert "category broken: no conversation was measured" in text
    assert "throughput is not pooled over 2 sessions" in text
    assert re.search(r"broken . 0/1 . n/a", text)
    assert re.search(r"unasked . 0/2 . n/a", text)


def test_a_run_without_records_is_reported(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [], expected={"a": 3}, status="running", sessions=[])
    for text in forms(run).values():
        assert "0/3" in text or '"n_expected": 3' in text
    assert "killed" in shown(run)


def test_one_structure_for_console_and_markdown(tmp_path: Path) -> None:
    """Every number of one is in the other."""
    run = arm(tmp_path / "r", 3)
    numbers = re.compile(r"\d+\.\d{4}\b")
    made = [sorted(numbers.findall(text)) for text in list(forms(run).values())[:3]]
    assert made[0] == made[1] == made[2]


# --- names from the data --------------------------------------------------------------------------

EVIL = "co|d[red]ing\x1b[31m \x1b]0;title\x07<script>\n# _x_ \u202eabc\ud800 `y` \x9b2J"


def test_names_from_the_data_command_no_terminal_and_form_no_markup(tmp_path: Path) -> None:
    assert layout.clean(EVIL) == "co|d[red]ing <script> # _x_ abc `y` 2J"
    evil = EVIL.replace("\ud800", "")  # which no parquet file can hold
    records = [conversation("a", evil, [1, 4, 4]), conversation("b", evil, [1, 2, 4])]
    run = stored(tmp_path / "r", records)
    path = run.directory / "manifest.json"
    path.write_text(path.read_text().replace('"0.32.0"', r'"1\u001b[2J\ud800"'))
    run = store.load(run.directory)
    assert run.manifest["engine"]["version"] == "1\x1b[2J\ud800"
    for name, text in forms(run).items():
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", text), name
        text.encode("utf-8")
    assert "co|d[red]ing <script> # _x_" in " ".join(shown(run, 140).split())
    row = r"| co\|d\[red\]ing &lt;script&gt; \# \_x\_ abc \`y\` 2J | 2/2 |"
    assert row in markdown.render(summarize(run))


def test_markdown_escapes_what_github_would_take_for_markup() -> None:
    assert markdown.escape("a|b\nc") == r"a\|b c"
    assert markdown.escape("<b>&amp;") == "&lt;b&gt;&amp;amp;"
    assert markdown.escape("math_reasoning") == "math_reasoning"
    assert markdown.escape(r"back\|slash *bold* _it_ [a](b)") == (
        r"back\\\|slash \*bold\* \_it\_ \[a\](b)"
    )


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    lines = markdown.render(summarize(odd_run(tmp_path / "r"))).splitlines()
    previous = 0
    for line in lines:
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert previous == 0 or cells in (0, previous)
        previous = cells


# --- json -----------------------------------------------------------------------------------------


def test_json_is_strict_versioned_and_precise(tmp_path: Path) -> None:
    run = arm(tmp_path / "r", 3)
    found = as_json.render(summarize(run))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema"] == "speedbench.report/2"
    assert found["acceptance"]["al"]["al_specdec_bench"]["value"] == pytest.approx(
        21 / 9, abs=1e-14
    )
    assert found["acceptance"]["al"]["al"].keys() == {"value", "interval", "why_not", "definition"}
    assert found["acceptance"]["histogram"] == {"1": 88, "2": 88, "3": 88, "4": 88}
    assert [row["name"] for row in found["acceptance"]["by_category"]] == CATEGORIES
    assert found["timing"]["ttft_s"]["p50"] == pytest.approx(0.05)
    assert found["manifest"]["prompts"]["fingerprint"] == "f" * 64


def test_json_holds_reasons_and_never_a_number_that_json_lacks(tmp_path: Path) -> None:
    run = odd_run(tmp_path / "r")
    path = run.directory / "manifest.json"
    path.write_text(path.read_text().replace('"dtype": "bfloat16"', '"dtype": NaN'))
    found = as_json.render(summarize(store.load(run.directory)))
    json.dumps(found, allow_nan=False)
    assert found["manifest"]["engine"]["settings"]["dtype"] is None
    al = found["acceptance"]["al"]["al"]
    assert al["value"] is None
    assert "broken" in al["why_not"]
    assert found["output_tps"]["whole"]["why_not"]


# --- several runs ---------------------------------------------------------------------------------


def of_all(*runs: Run) -> list[Block]:
    return list(document(grouped(runs)))


def test_a_pair_shows_the_speedup_beside_the_length(tmp_path: Path) -> None:
    """20 tokens after the first: in 20 steps of 10 ms, or in 8 of 15 ms: 200/120 = 1.6667."""
    base, spec = arm(tmp_path / "base", 0), arm(tmp_path / "spec", 3, step_ns=15 * MS)
    blocks = of_all(base, spec)
    text = printed(lambda out: console.draw(blocks, out), 80)
    row = r"coding\W+4\W+2\.5000\W+2\.5000-2\.5000\W+1\.6667\W+1\.6667-1\.6667"
    assert re.search(row, text)
    assert "all 44 prompts were identical in both arms, token by token" in " ".join(text.split())
    written = markdown.write(blocks)
    assert re.search(r"\| coding \| 4 \| 2\.5000 \| [\d.-]+ \| 1\.6667 \| [\d.-]+ \|", written)
    page = html.render(blocks, "both")
    assert page.count("1.6667-1.6667") >= 12
    first = written.index("Speedup of EAGLE3 K=3")
    assert written.index("WARNING") < first if "WARNING" in written else True
    assert first < written.index("Details: EAGLE3 K=3")


def test_arms_that_cannot_be_compared_are_reported_with_the_reason(tmp_path: Path) -> None:
    base = arm(tmp_path / "base", 0, names=["math"], config={"temperature": 0.7})
    spec = arm(tmp_path / "spec", 3, names=["math"])
    text = markdown.write(of_all(base, spec))
    (line,) = [x for x in text.splitlines() if "is held against no baseline" in x]
    assert line.startswith("EAGLE3 K=3")
    assert "temperature" in line
    assert "Speedup of" not in text
    assert "Details: EAGLE3 K=3" in text
    lone = markdown.write(of_all(spec, arm(tmp_path / "five", 5, names=["math"])))
    assert lone.count("no baseline (--speculative_algorithm NONE) was named") == 2


def test_checks_of_several_runs_say_whose_they_are(tmp_path: Path) -> None:
    names = ["math"]
    base = arm(tmp_path / "base", 0, names=names, engine={"max_num_seqs": 1})
    one = arm(tmp_path / "one", 3, names=names, engine={"max_num_seqs": 1})
    two = arm(tmp_path / "two", 3, names=names, engine={"max_num_seqs": 1}, status="failed")
    text = markdown.write(of_all(base, one, two))
    lines = [x for x in text.splitlines() if x.startswith("- **WARNING**")]
    (slots,) = [x for x in lines if "at most 1 requests at once" in x]
    assert "baseline and EAGLE3 K=3: the engine runs" in slots  # of both of its runs
    (failed,) = [x for x in lines if "the run is failed" in x]
    assert "EAGLE3 K=3, run 2: " in failed


def test_what_all_runs_share_is_told_once(tmp_path: Path) -> None:
    text = markdown.write(of_all(arm(tmp_path / "base", 0), arm(tmp_path / "spec", 3)))
    assert text.count("f" * 64) == 1
    assert text.count("/models/drafter") >= 1
    assert text.count(str(tmp_path / "spec")) == text.count(str(tmp_path / "base")) == 1


# --- repeats --------------------------------------------------------------------------------------


def decoded(lengths: Sequence[Sequence[int]]) -> list[ConversationRecord]:
    """A conversation for each list of decode steps, in turns between two categories."""
    return [
        conversation(f"c{i}", "ab"[i % 2], turn(f"c{i}", [1, *steps], told=told([1, *steps], 3)))
        for i, steps in enumerate(lengths)
    ]


FIRST = [[4, 2, 1], [3, 3], [1, 1, 4], [2, 4, 4, 1], [4, 4], [1, 2, 3]]
SECOND = [[4, 4, 1], [3, 1], [1, 2, 4], [2, 4, 1, 1], [4, 3], [1, 2, 1]]


def pooled_of(*runs: Run) -> Summary:
    return summarize_repeats(runs, [summarize(run) for run in runs])


def test_repeats_are_pooled_step_by_step(tmp_path: Path) -> None:
    runs = [stored(tmp_path / str(i), decoded(steps)) for i, steps in enumerate((FIRST, SECOND))]
    found = pooled_of(*runs)
    steps = [n for one in (*FIRST, *SECOND) for n in one]
    assert found.histogram == tuple(steps.count(n) for n in (1, 2, 3, 4))
    assert found.lengths["al_step"].value == pytest.approx(sum(steps) / len(steps))
    by_category = [
        [n for run in (FIRST, SECOND) for i, one in enumerate(run) if i % 2 == g for n in one]
        for g in (0, 1)
    ]
    means = [sum(group) / len(group) for group in by_category]
    assert [row.lengths["al"].value for row in found.categories] == pytest.approx(means)
    assert found.lengths["al"].value == pytest.approx(sum(means) / 2)
    of_conversation = [
        (sum(a) + sum(b)) / (len(a) + len(b)) for a, b in zip(FIRST, SECOND, strict=True)
    ]
    halves = [sum(of_conversation[g::2]) / 3 for g in (0, 1)]
    assert found.lengths["al_conversation"].value == pytest.approx(sum(halves) / 2)
    each = [
        [(1 + sum(one)) / (1 + len(one)) for one in run] for run in (FIRST, SECOND)
    ]  # with the prefill
    assert found.lengths["al_specdec_bench"].value == pytest.approx(
        sum((a + b) / 2 for a, b in zip(*each, strict=True)) / 6
    )
    assert (found.n_conversations, found.n_requests, found.n_failed) == (6, 12, 0)
    assert [row.n_complete for row in found.categories] == [3, 3]
    assert found.output_tps.value is None
    assert found.output_tps.why_not == "throughput is told run by run"


def test_the_same_run_twice_knows_no_more_than_once(tmp_path: Path) -> None:
    """Conversations are what is resampled: a repeat that says the same narrows no interval."""
    one, two = (stored(tmp_path / name, decoded(FIRST)) for name in "ab")
    once, twice = summarize(one), pooled_of(one, two)
    for name in ("al", "al_step", "al_conversation", "al_drafted"):
        assert twice.lengths[name] == once.lengths[name]
    assert twice.rates == once.rates
    assert twice.joint == once.joint
    assert [row.lengths["al"] for row in twice.categories] == [
        row.lengths["al"] for row in once.categories
    ]


def test_repeats_in_another_order_with_a_failure_are_pooled_by_name(tmp_path: Path) -> None:
    good = stored(tmp_path / "a", decoded(FIRST))
    records = decoded(SECOND)
    bad = turn("c2", [1, 4, 4], finish="error", error="boom")
    records[2] = conversation("c2", "a", bad)
    other = stored(tmp_path / "b", list(reversed(records)))
    found = pooled_of(good, other)
    steps = [n for one in FIRST for n in one]
    steps += [n for i, one in enumerate(SECOND) if i != 2 for n in one]
    assert sum(found.histogram) == len(steps)
    assert found.lengths["al_step"].value == pytest.approx(sum(steps) / len(steps))
    assert (found.n_conversations, found.n_failed) == (6, 1)
    by_category = [
        [n for i, one in enumerate(FIRST) if i % 2 == g for n in one]
        + [n for i, one in enumerate(SECOND) if i % 2 == g and i != 2 for n in one]
        for g in (0, 1)
    ]
    assert [row.lengths["al"].value for row in found.categories] == pytest.approx(
        [sum(group) / len(group) for group in by_category]
    )


def test_repeats_are_timed_run_by_run(tmp_path: Path) -> None:
    runs = [arm(tmp_path / str(ms), 3, step_ns=ms * MS, names=["math"]) for ms in (10, 20)]
    blocks = of_all(*runs)
    assert [run.directory for run in runs] == [tmp_path / "10", tmp_path / "20"]
    text = markdown.write(blocks)
    assert "Acceptance is pooled over 2 runs" in text
    rows = {x.split(" | ")[0][2:]: x for x in text.splitlines() if x.startswith("| ")}
    numbers = {label: [float(n) for n in re.findall(r"\d+\.\d+", x)] for label, x in rows.items()}
    assert numbers["Step time P50 (ms)"] == [10, 20]
    assert numbers["AL"] == [2.5, 2.5]
    assert numbers["TTFT P95 (ms)"] == [50, 50]
    assert numbers["User TPS P50 (tokens/s)"] == [250, 125]


def test_a_terminal_is_spared_the_details_of_many_arms(tmp_path: Path) -> None:
    runs = [arm(tmp_path / str(k), k, names=["math", "qa"]) for k in (0, 1, 2, 3, 4)]
    blocks = of_all(*runs)
    text = " ".join(printed(lambda out: console.draw(blocks, out), 80).split())
    written = markdown.write(blocks)
    assert "Not shown here" in text
    assert "Not shown here" not in written
    for title in (
        "Details: baseline",
        "Details: EAGLE3 K=4",
        "Speedup by category, arm by arm",
        "Losslessness in numbers",
    ):
        assert title in text.split("Not shown here")[1]
        assert f"## {title}" in written
    assert "As published" not in text
    assert "## Speedup of EAGLE3 K=2 over the base" in written
    assert "Speedup of EAGLE3 K=2" not in text
    places = [written.index(f"\n## {title}\n") for title in ("Speedup", "Losslessness", "Arms")]
    assert places == sorted(places)


def test_weights_are_shared_and_stay_what_they_were() -> None:
    shared = Resamples()
    for seed in range(6):
        sizes = [5, 1, 9, 3] if seed % 2 else [4, 4, 2]
        category = np.repeat(np.arange(len(sizes)), sizes)
        np.random.default_rng(seed).shuffle(category)
        ids = [f"row-{i:03d}" for i in range(len(category))]
        expected = stats.bootstrap_weights(category)
        assert (shared.weights(category, ids) == expected).all()
        order = np.random.default_rng(seed + 9).permutation(len(category))
        shuffled = shared.weights(category[order], [ids[i] for i in order])
        assert (shuffled == expected[:, order]).all()  # a conversation keeps its own


def test_the_order_in_which_conversations_end_moves_no_interval(tmp_path: Path) -> None:
    """As another concurrency does: the same records, stored in another order."""
    draw = random.Random(3)
    records = [
        conversation(f"row-{c}-{i}", c, [1, *(draw.choice([1, 2, 3, 4]) for _ in range(9))])
        for c in ("qa", "math")
        for i in range(8)
    ]
    shuffled = records[:]
    draw.shuffle(shuffled)
    first, second = (
        summarize(stored(tmp_path / name, some)) for name, some in (("a", records), ("b", shuffled))
    )
    for name, figure in first.lengths.items():
        assert figure.interval == pytest.approx(second.lengths[name].interval), name
    assert [f.interval for f in first.rates] == [pytest.approx(f.interval) for f in second.rates]


# --- dependencies ---------------------------------------------------------------------------------


def test_only_the_console_needs_rich() -> None:
    code = (
        "import sys, speedbench.report.markdown, speedbench.report.as_json\n"
        "print(sorted(m for m in ('rich', 'engines', 'speedbench.loop', 'torch', 'transformers') "
        "if m in sys.modules))"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_a_preset_says_how_small_a_difference_shows(tmp_path: Path) -> None:
    """(1.96 + 0.84) x sqrt(2) x the standard error that the interval of AL stands for."""
    rows = [conversation(f"c{i}", "a", [1, 4, 2 + i % 2, 4]) for i in range(8)]
    run = stored(tmp_path / "r", rows, config={"preset": "ci"})
    summary = summarize(run)
    low, high = summary.lengths["al"].interval or (0.0, 0.0)
    expected = 2.8016 * 2**0.5 * (high - low) / (2 * 1.96)
    said = re.search(r"5 % level: (\d+\.\d+)", " ".join(shown(run).split()))
    assert said is not None
    assert float(said[1]) == pytest.approx(expected, abs=6e-4)
    assert "Preset" not in shown(stored(tmp_path / "s", rows))


@pytest.mark.parametrize(
    ("endpoint", "hashed"), [("chat", "messages"), ("completions", "token IDs")]
)
def test_the_fingerprint_is_of_what_was_sent(tmp_path: Path, endpoint: str, hashed: str) -> None:
    server = {"engine": "OPENAI", "url": "http://h:1", "model": "m", "endpoint": endpoint}
    prompts = {"fingerprint": "f" * 64, "turns": "first", "tokenizer": "t", "n_prompts": 1}
    rows = [conversation("c0", "a", [1, 4])]
    text = " ".join(shown(stored(tmp_path / "r", rows, config=server, prompts=prompts)).split())
    assert f"of the first turns' {hashed}" in text


def test_where_a_prepared_dataset_came_from_is_shown(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("c0", "a", [1, 4])])
    origin = {"repository": "nvidia/SPEED-Bench", "revision": "fd51e1f5c17d9071"}
    dataset = {**run.manifest["dataset"], "origin": origin}
    store.write_manifest(tmp_path / "r", {**run.manifest, "dataset": dataset})
    text = " ".join(shown(store.load(tmp_path / "r")).split())
    assert "(from nvidia/SPEED-Bench at fd51e1f5c17d)" in text


# --- as published, of a server --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_shown", "histogram"),
    [
        (6, (1, 1, 0, 1)),
        # The end cut a token off: 3 + 2 or 4 + 1 may be what shows.
        (5, ()),
    ],
)
def test_what_the_publisher_would_count_is_what_shows(
    tmp_path: Path, n_shown: int, histogram: tuple[int, ...]
) -> None:
    """A prefill, and two verifications in one chunk that accepted 3 and 1 of 3 drafts, uncut."""
    made = turn("r.0", [1, n_shown], engine_steps=[1, 2], finish="length")
    said = ToldAcceptance("the server", (0, 1, 0, 1), 6)
    served = Served(sent_ns=0, new_connection=False, acceptance=said)
    record = replace(made, steps=[*made.steps[:-1], made.steps[-1]._replace(served=served)])
    where = {"engine": "OPENAI", "url": "http://127.0.0.1:1", "model": "m"}
    found = summarize(stored(tmp_path / "r", [conversation("c", "a", record)], config=where))
    assert list(found.histogram) == [0, 1, 0, 1]
    assert found.published_histogram == histogram
    if histogram:
        assert found.published_al_step.value == 7 / 3
    else:
        assert "which of the steps that the server told" in found.published_al_step.why_not
        assert "Acceptance Length Histogram n/a" in markdown.render(found)
