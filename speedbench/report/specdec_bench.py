"""Files of the publisher's harness (Model-Optimizer `examples/specdec_bench`), for its viewers.

What it would have written had it seen the same events: its file names, keys and definitions, every
number computed here from the stored steps. Where the records do not hold what it writes, the value
is null, and `configuration.json` says why under "speedbench".
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from speedbench import datasets
from speedbench.config import from_dict
from speedbench.environment import redact
from speedbench.insights.rates import why_no_gpu
from speedbench.store import Run, n_replicas_of
from speedbench.types import UNKNOWN, UserError

Decode = Callable[[Sequence[int]], str]

CONFIGURATION = "configuration.json"
RESPONSES: Mapping[str, str] = {"random": "responses.jsonl", "mtbench": "mtbench_responses.jsonl"}
"""By dataset; `specbench_responses.jsonl` for every other one."""
MTBENCH_FIRST = 81
"""Number of MT-Bench's first question, which that harness calls request 0."""

NOTES = (
    "exported by speedbench from its own records: the publisher's harness did not run",
    "the token that stops an answer counts as a token of its step, which the publisher's harness "
    "takes off",
    "Output TPS/gpu divides by tensor parallel GPUs alone, as the publisher's harness does",
    "no container_image is recorded, which the publisher's upload script asks for",
)
IDS = "no tokenizer was given: each answer is a list of token IDs; --tokenizer FOLDER writes text"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as that harness sees it: tokens of each event, and seconds, submission first."""

    lengths: tuple[int, ...]
    times_s: tuple[float, ...]
    output_token_ids: tuple[int, ...]
    stopped: bool
    prompt_sha256: str
    n_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that did not fail, its turns in order."""

    id: str
    category: str
    turns: tuple[Turn, ...]


def write(run: Run, directory: Path, decode: Decode | None = None) -> list[Path]:
    """Write every file, and return them. Raises UserError where the folder holds something else,
    or nothing can be exported."""
    asked = questions(run)
    if not asked:
        raise UserError(
            f"{run.directory} holds no conversation that was measured to its end: there is nothing "
            "that the publisher's harness would have written"
        )
    refuse_foreign(directory)
    rates = acceptance(asked, str(run.manifest["dataset"]["name"]))
    times, doubts = timing(run, asked)
    texts, why_none = user_turns(run)
    doubts += [why_none] if why_none else []
    files: dict[str, str] = {
        CONFIGURATION: _json(
            configuration(
                run, len(run.columns.failed) - len(asked), [*doubts, *([] if decode else [IDS])]
            )
        ),
        "acceptance_rate.json": _json([rates]),
        "timing.json": _json([times]),
    }
    dataset = str(run.manifest["dataset"]["name"])
    if dataset not in RESPONSES:
        files["specbench_results.json"] = _json(rates)
    name = RESPONSES.get(dataset, "specbench_responses.jsonl")
    files[name] = "".join(
        json.dumps(line, ensure_ascii=False) + "\n"
        for line in responses(asked, dataset, decode, texts)
    )
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in files]


def refuse_foreign(directory: Path) -> None:
    """Raise UserError if the folder holds anything but an earlier export."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        ours = "speedbench" in json.loads((directory / CONFIGURATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(
            f"{directory} is no empty folder and no earlier export: give another one as --out"
        )


def _json(value: object) -> str:
    return json.dumps(value, indent=4, ensure_ascii=False, allow_nan=False) + "\n"


# ---------------------------------------------------------------- what was seen


def questions(run: Run) -> tuple[Question, ...]:
    """The conversations that did not fail. Events without a token are none to that harness. Raises
    UserError for a served run of whose chunks not each is known to be a step."""
    columns = run.columns
    if run.manifest["config"].get("url") and (columns.engine_steps != 1).any():
        raise UserError(
            f"{run.directory} asked a server, and {int((columns.engine_steps != 1).sum())} chunks "
            "may hold several engine steps: in that format they would be taken for one each"
        )
    turns = run.turns.take(run.used)
    ids = turns["output_token_ids"].to_pylist()
    if any(UNKNOWN in some for some in ids):
        raise UserError(
            f"{run.directory} holds no answers: its server told how many tokens came, not which"
        )
    sha256, reasons = turns["prompt_sha256"].to_pylist(), turns["finish_reason"].to_pylist()
    starts = np.searchsorted(columns.request, np.arange(columns.n_requests))
    ends = np.searchsorted(columns.request, np.arange(columns.n_requests), side="right")
    by_conversation: dict[int, list[tuple[int, Turn]]] = defaultdict(list)
    for r in range(columns.n_requests):
        if columns.failed[columns.conversation[r]]:
            continue
        n_tokens = columns.n_tokens[starts[r] : ends[r]]
        seen = n_tokens > 0
        times = columns.time_ns[starts[r] : ends[r]][seen]
        turn = Turn(
            lengths=tuple(int(n) for n in n_tokens[seen]),
            times_s=(columns.submitted_ns[r] / 1e9, *(int(t) / 1e9 for t in times)),
            output_token_ids=tuple(ids[r]),
            stopped=reasons[r] == "stop",
            prompt_sha256=sha256[r],
            n_prompt_tokens=int(columns.n_prompt_tokens[r]),
        )
        by_conversation[int(columns.conversation[r])].append((int(columns.turn[r]), turn))
    return tuple(
        Question(
            columns.conversation_ids[c],
            columns.categories[columns.category[c]],
            tuple(turn for _, turn in sorted(found, key=lambda one: one[0])),
        )
        for c, found in by_conversation.items()
        if all(turn.lengths for _, turn in found)
    )


# ---------------------------------------------------------------- acceptance


def acceptance(asked: Sequence[Question], dataset: str) -> dict[str, Any]:
    """Mean tokens per event, prefill and cut-off ones included; histogram and rates over all.

    Per conversation and category; of random prompts per turn, as that harness does.
    """
    if dataset == "random":
        of_turns = {
            str(number): {str(t): mean(turn.lengths) for t, turn in enumerate(question.turns)}
            for number, question in enumerate(asked)
        }
        found: dict[str, Any] = {
            "Request_AL": of_turns,
            "Average_AL": mean(al for turns in of_turns.values() for al in turns.values()),
        }
    else:
        of_question, by_category = {}, defaultdict(list)
        for question in asked:
            al = mean(n for turn in question.turns for n in turn.lengths)
            of_question[_key(question, dataset)] = al
            by_category[question.category].append(al)
        found = {
            "Request_AL": of_question,
            "Category_AL": {name: mean(lengths) for name, lengths in by_category.items()},
            "Average_AL": mean(of_question.values()),
        }
    histogram = Counter(n for question in asked for turn in question.turns for n in turn.lengths)
    return {**found, **_rates(histogram)}


def _key(question: Question, dataset: str) -> str:
    """What that harness calls a conversation in its results."""
    if dataset == "mtbench" and question.id.isdigit():
        return str(int(question.id) - MTBENCH_FIRST)
    return question.id


def _rates(histogram: Mapping[int, int]) -> dict[str, Any]:
    """By number of tokens n: events, P(n or more | as many as the next smaller n that occurs), and
    the running product. The shares are rounded before their ratio is, as theirs are."""
    lengths = sorted(histogram)
    total = sum(histogram.values())
    conditional, joint = {}, {}
    reached, before, product = total, 1.0, 1.0
    for n in lengths:
        share = reached / total
        conditional[str(n)] = share / before
        product *= conditional[str(n)]
        joint[str(n)] = product
        before = share
        reached -= histogram[n]
    return {
        "Acceptance_Length_Histogram": {str(n): histogram[n] for n in lengths},
        "Conditional_Acceptance_Rate": conditional,
        "Joint_Acceptance_Rate": joint,
    }


# ---------------------------------------------------------------- time


def timing(run: Run, asked: Sequence[Question]) -> tuple[dict[str, Any], list[str]]:
    """Throughput and distributions, in seconds; and why a number is missing.

    Step time holds the wait for the first token, and the rate of a request takes its first event
    for one token, as in that harness.
    """
    turns = [turn for question in asked for turn in question.turns]
    n_tokens = [sum(turn.lengths) for turn in turns]
    doubt = _no_common_clock(run)
    throughput = None
    if not doubt:
        wall_s = max(turn.times_s[-1] for turn in turns) - min(turn.times_s[0] for turn in turns)
        throughput = sum(n_tokens) / wall_s if wall_s > 0 else None
        doubt = "" if wall_s > 0 else "Output TPS is null: no time passed between the events"
    doubts = [doubt] if doubt else []
    no_gpu = why_no_gpu(run.manifest)
    if throughput is not None and no_gpu:
        doubts.append(f"Output TPS/gpu is null: {no_gpu}")
    tp_size = int(run.manifest["config"]["tp_size"])
    per_gpu = None if throughput is None or no_gpu else throughput / tp_size
    longer = [
        (turn.times_s, n) for turn, n in zip(turns, n_tokens, strict=True) if len(turn.times_s) > 2
    ]
    found: dict[str, Any] = {
        "Output TPS": throughput,
        "Output TPS/gpu": per_gpu,
        "E2E Request Time": _statistics([turn.times_s[-1] - turn.times_s[0] for turn in turns]),
        "TTFT Time": _statistics([turn.times_s[1] - turn.times_s[0] for turn in turns]),
    }
    if longer:
        gaps = [later - earlier for times, _ in longer for earlier, later in pairwise(times)]
        found["Request Generation Step Time"] = _statistics(gaps)
    timed = [(n - 1) / (times[-1] - times[1]) for times, n in longer if times[-1] > times[1]]
    if timed:
        found["Request Generation Tokens Per Second"] = _statistics(timed)
    found["Number of Output Tokens"] = _statistics(n_tokens)
    return found, doubts


def _no_common_clock(run: Run) -> str:
    sessions = run.manifest["sessions"]
    n_sessions = len({session["session"] for session in sessions})
    if n_sessions != 1:
        return f"Output TPS is null: throughput is not pooled over {n_sessions} sessions"
    clocks = {session.get("clock") for session in sessions}
    if n_replicas_of(run.manifest) > 1 and (len(clocks) > 1 or None in clocks):
        return "Output TPS is null: the replicas have no clock in common"
    return ""


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    """As text with four decimals; the deviation is that of the values alone (divided by n)."""
    data = np.asarray(values, float)
    quartiles = {q: np.percentile(data, 100 * float(q)) for q in ("0.25", "0.5", "0.75")}
    return {
        "min": f"{data.min():.4f}",
        "max": f"{data.max():.4f}",
        "mean": f"{data.mean():.4f}",
        "std": f"{data.std():.4f}",
        "quantiles": {q: f"{value:.4f}" for q, value in quartiles.items()},
    }


# ---------------------------------------------------------------- responses


def user_turns(run: Run) -> tuple[Mapping[str, tuple[str, ...]], str]:
    """What the user said by conversation, and why that is not known ('' if it is): prompts are not
    stored, so it is read from the dataset again, whose rows must be those that were asked."""
    dataset = run.manifest["dataset"]
    empty = "`turns` is empty, and prompt_sha256 names the prompts:"
    if dataset["name"] == "random":
        return {}, f"{empty} random prompts are tokens, no text"
    asked = {
        **run.manifest["config"],
        "dataset": dataset["name"],
        "dataset_path": dataset.get("path") or None,
        "prompts": None,  # a file of tokens, made of the same rows
    }
    try:
        found = datasets.load(from_dict(asked))
    except (UserError, OSError) as error:
        return {}, f"{empty} the dataset cannot be read any more ({error})"
    if found.sha256 != dataset.get("sha256"):
        return {}, f"{empty} {found.path} holds other rows than were asked"
    return {row.id: row.turns for row in found.rows}, ""


def responses(
    asked: Sequence[Question],
    dataset: str,
    decode: Decode | None,
    texts: Mapping[str, tuple[str, ...]],
) -> list[dict[str, Any]]:
    """A line for each conversation: its answers as text, or as token IDs without a tokenizer."""
    lines = []
    for number, question in enumerate(asked):
        line: dict[str, Any] = {"question_id": question.id}
        if dataset == "random":
            line["question_id"] = number
        elif dataset == "mtbench":
            line["question_id"] = int(question.id) if question.id.isdigit() else question.id
        if dataset != "random":
            line["category"] = question.category
        line["turns"] = list(texts.get(question.id, ()))
        line["choices"] = [
            {"index": 0, "turns": [_answer(turn, decode) for turn in question.turns]}
        ]
        line["prompt_sha256"] = [turn.prompt_sha256 for turn in question.turns]
        line["n_prompt_tokens"] = [turn.n_prompt_tokens for turn in question.turns]
        lines.append(line)
    return lines


def _answer(turn: Turn, decode: Decode | None) -> str | list[int]:
    """Text without the token that stopped it; IDs with it, as they were measured."""
    ids = list(turn.output_token_ids)
    if decode is None:
        return ids
    return decode(ids[:-1] if turn.stopped else ids)


# ---------------------------------------------------------------- configuration


def configuration(run: Run, n_left_out: int, doubts: Sequence[str]) -> dict[str, Any]:
    """Its arguments as far as ours mean the same, what the engine really used, and our own facts.

    n_left_out: conversations that failed, or answered a turn with no token at all
    """
    manifest = run.manifest
    config, engine, machine = manifest["config"], manifest["engine"], manifest["environment"]
    dataset = str(manifest["dataset"]["name"])
    path = manifest["dataset"].get("path")
    same = (
        "engine", "model_dir", "draft_model_dir", "speculative_algorithm", "temperature",
        "max_seq_len", "output_length", "block_size", "tp_size", "ep_size", "concurrency",
        "trust_remote_code", "ignore_eos", "show_progress", "completions", "postprocess",
        "num_requests", "random_isl",
    )  # fmt: skip
    arguments = {
        **{name: config.get(name) for name in same},
        "tokenizer": manifest["prompts"].get("tokenizer"),
        "mtbench": path if dataset == "mtbench" else None,
        "specbench": path if dataset == "specbench" else None,
        "dataset": dataset,
        "dataset_path": path,
        "draft_length": engine["draft_length"],
        "runtime_params": {
            "engine_args": config.get("engine_args"),
            "sampling_kwargs": {
                **{name: config.get(name) for name in ("temperature", "top_p", "top_k")},
                **(config.get("sampling_kwargs") or {}),
            },
        },
        "aa_timing": False,
        "save_dir": config.get("save_dir"),
    }
    gpus = machine.get("gpus") or [{}]
    checkpoint = (machine.get("checkpoints") or {}).get(config.get("model_dir")) or {}
    provenance = {
        "serving_config": engine,
        "engine_version": engine["version"],
        "gpu": gpus[0].get("name"),
        "python_version": machine.get("python"),
        "argv": machine.get("argv"),
        "specdec_bench_version": None,
        "specdec_bench_sha": None,
        "modelopt_version": None,
        "modelopt_sha": None,
        "nmm_sandbox_sha": None,
        "container_image": None,
        "checkpoint": {
            "path": config.get("model_dir"),
            "size_bytes": None,
            "index_sha256": None,
            "index_source": None,
        },
        "timestamp": min((str(s.get("started_at")) for s in manifest["sessions"]), default=None),
        "jira_ticket": None,
        "huggingface_model_id": None,
    }
    ours = {
        "version": (machine.get("packages") or {}).get("speedbench"),
        "run_dir": str(run.directory),
        "status": manifest["status"],
        "simulated": bool(engine.get("simulated")),
        "fingerprint": manifest["prompts"].get("fingerprint"),
        "dataset_sha256": manifest["dataset"].get("sha256"),
        "checkpoint_sha256": checkpoint.get("sha256"),
        "n_left_out": n_left_out,
        "notes": [*NOTES, *doubts],
    }
    found: dict[str, Any] = redact({**arguments, **provenance, "speedbench": ours})
    return found
