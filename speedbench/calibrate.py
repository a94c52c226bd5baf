"""Known answers: stored runs held against the closed form, and the cases that prove an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedbench import checks, inputs, session, store
from speedbench.calibration import checkpoints, closed_form, served, verdict
from speedbench.calibration.closed_form import KNOWN_ANSWER_FILE, Case
from speedbench.calibration.sglang_trie import sglang_ngram_steps
from speedbench.config import SERVER, RunConfig, from_dict
from speedbench.target import Target
from speedbench.types import Algorithm, Engine, EngineSettings, UserError

SAMPLED_LEVEL = 0.999

SERVERS = {"vLLM": "VLLM", "SGLang": "SGLANG"}
"""What a server calls itself -> the engine in it."""


# ---------------------------------------------------------------- one stored run


def observed_requests(run: store.Run, prepared: inputs.Prepared) -> list[verdict.ObservedRequest]:
    """The requests of a stored run with their prompts, which are encoded again and must match
    the stored fingerprints. Raises UserError if one does not."""
    rows = {row.id: row for row in prepared.rows}
    turns = run.turns.take(run.used).to_pylist()
    columns = run.columns
    replies: dict[tuple[str, int], Sequence[int]] = {
        (turn["conversation_id"], turn["turn"]): turn["output_token_ids"] for turn in turns
    }
    bounds = _step_bounds(run)
    found = []
    for r, turn in enumerate(turns):
        name, number = turn["conversation_id"], turn["turn"]
        earlier = [replies[name, t] for t in range(number)]
        prompt = inputs.prompt_of(prepared, rows[name], number, earlier)
        if prompt.sha256 != turn["prompt_sha256"]:
            raise UserError(
                f"the prompt of {name!r}, turn {number}, cannot be reproduced: the tokenizer or "
                f"the dataset is not the one {run.directory} was measured with"
            )
        mine = slice(*bounds[r])
        found.append(
            verdict.ObservedRequest(
                conversation_id=name,
                turn=number,
                category=turn["category"],
                prompt_ids=prompt.token_ids,
                output_ids=turn["output_token_ids"],
                n_tokens=columns.n_tokens[mine].tolist(),
                accepted=columns.accepted[mine].tolist(),
                drafted=columns.drafted[mine].tolist(),
                engine_steps=columns.engine_steps[mine].tolist(),
                finish_reason=turn["finish_reason"],
            )
        )
    return found


def _step_bounds(run: store.Run) -> list[tuple[int, int]]:
    """First and one-past-last step of every request (R)."""
    import numpy as np

    edges = np.searchsorted(run.columns.request, np.arange(run.columns.n_requests + 1))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def case_of(run: store.Run, stop_ids: Sequence[int]) -> Case:
    """What the run asked for, in the closed form's words; K and n-gram sizes as the engine's."""
    config, engine = run.manifest["config"], run.manifest["engine"]
    server = SERVERS.get(engine["settings"].get("server"), engine["name"])
    return Case(
        engine=server if engine["name"] == SERVER else engine["name"],
        algorithm=config["speculative_algorithm"],
        draft_length=engine["draft_length"],
        max_tokens=config["output_length"],
        stop_ids=() if config["ignore_eos"] else tuple(stop_ids),
        ngram_min=int(engine["settings"].get("ngram_min", 1)),
        ngram_max=int(engine["settings"].get("ngram_max", 1)),
        shared_lookup=config["speculative_algorithm"] == "SUFFIX"
        and engine["settings"].get("suffix_decoding_max_cached_requests") != 0,
    )


def judge(run: store.Run, prepared: inputs.Prepared, case: Case | None = None) -> verdict.Verdict:
    """Hold a stored run of a calibration checkpoint against its closed form."""
    found = observed_requests(run, prepared)
    case = case or case_of(run, prepared.stop_token_ids)
    outcome = _judge_steps(run, prepared, found, case)
    ends = (verdict.wrong_end(request, case) for request in found)
    if outcome.ok and (fault := next(filter(None, ends), None)) is not None:
        return replace(outcome, ok=False, fault="wrong end", sentence=fault)
    return outcome


def _judge_steps(
    run: store.Run,
    prepared: inputs.Prepared,
    found: Sequence[verdict.ObservedRequest],
    case: Case,
) -> verdict.Verdict:
    config = run.manifest["config"]
    target = Path(config["model_dir"])
    known = _known(config)
    asked = {(row.id, turn) for row in prepared.rows for turn in range(row.n_turns)}
    if config["temperature"] == 0:
        if case.engine == "SGLANG" and case.algorithm == "NGRAM" and _one_after_another(run):
            return _judge_trie(run, found, known, case, asked)
        if not case.is_known:
            return verdict.judge_consistent(found, known, case, asked)
        found, n_merged = _unmerged(run, found, known, case)
        outcome = verdict.judge_greedy(found, known, case, asked)
        if outcome.ok and n_merged:
            told = f" Of {n_merged} requests some chunks hold several steps; what the server tells "
            return replace(outcome, sentence=f"{outcome.sentence}{told}of them leaves no others.")
        if outcome.ok and config["capture_experts"]:
            return _judge_experts(run, found, known, outcome)
        return outcome
    if config["speculative_algorithm"] != "DRAFT_TARGET":
        raise UserError("sampled known answers exist for DRAFT_TARGET only")
    draft, temperature = Path(config["draft_model_dir"]), float(config["temperature"])
    told = run.manifest["engine"]["settings"]
    is_sampled = told.get("draft_sample_method") == "probabilistic"
    if is_sampled:
        # transformers applies the temperature to its draft model twice.
        squared = told.get("draft_temperature") == "temperature squared"
        chances = closed_form.overlap_probabilities(
            target, draft, temperature, temperature**2 if squared else temperature
        )
    else:
        chances = closed_form.acceptance_probabilities(target, draft, temperature)
    return verdict.judge_sampled(
        found,
        known,
        chances,
        case.draft_length,
        SAMPLED_LEVEL,
        asked,
        drafts_are_sampled=is_sampled,
    )


def _unmerged(
    run: store.Run,
    found: Sequence[verdict.ObservedRequest],
    known: closed_form.KnownAnswer,
    case: Case,
) -> tuple[list[verdict.ObservedRequest], int]:
    """A server's requests with merged chunks taken apart where what it told of them is the known
    answer, and how many those are."""
    names = run.turns.take(run.used)["request_id"].to_pylist()
    told = {row["request_id"]: row for row in store.load_served(run).to_pylist()}
    result, n_merged = [], 0
    for name, request in zip(names, found, strict=True):
        row = told.get(name)
        if row is not None and row["histogram"] and set(request.engine_steps) - {1}:
            steps = case.steps(known, request.prompt_ids)
            apart = served.unmerged(request, steps, row["histogram"], row["accepted"] or ())
            n_merged += apart is not request
            request = apart
        result.append(request)
    return result, n_merged


def _one_after_another(run: store.Run) -> bool:
    """Whether one engine answered all requests, one at a time, from an empty trie."""
    sessions = run.manifest["sessions"]
    return run.manifest["config"]["concurrency"] == 1 and len(sessions) == 1 and run.n_retried == 0


def _judge_trie(
    run: store.Run,
    found: Sequence[verdict.ObservedRequest],
    known: closed_form.KnownAnswer,
    case: Case,
    asked: Collection[tuple[str, int]],
) -> verdict.Verdict:
    """SGLang's n-gram trie is shared by all requests, but what it learned in which order is known
    where they came one after another."""
    submitted = run.turns.take(run.used)["submitted_ns"].to_pylist()
    order = sorted(range(len(found)), key=submitted.__getitem__)
    in_order = [found[i] for i in order]
    steps = list(
        sglang_ngram_steps(
            [request.prompt_ids for request in in_order],
            known.target_next,
            case.draft_length,
            case.max_tokens,
            case.stop_ids,
        )
    )
    return verdict.judge_greedy(in_order, known, case, asked, steps)


def _known(config: Mapping[str, Any]) -> closed_form.KnownAnswer:
    draft = config["draft_model_dir"]
    return closed_form.read_known_answer(
        Path(config["model_dir"]), None if draft is None else Path(draft)
    )


def _judge_experts(
    run: store.Run,
    found: Sequence[verdict.ObservedRequest],
    known: closed_form.KnownAnswer,
    outcome: verdict.Verdict,
) -> verdict.Verdict:
    """The steps are right: are the captured experts those of the tokens, too?"""
    captured = store.load_experts(run.directory)
    names = run.turns.take(run.used)["request_id"].to_pylist()
    for request, name in zip(found, names, strict=True):
        if (fault := verdict.wrong_experts(request, captured.get(name), known)) is not None:
            return replace(outcome, ok=False, fault="wrong experts", sentence=fault)
    sentence = f"{outcome.sentence} The experts of all their tokens are those of the router."
    return replace(outcome, sentence=sentence)


def known_answer(directory: Path, prepared: inputs.Prepared) -> dict[str, Any] | None:
    """The manifest entry for a finished greedy run of a calibration checkpoint, else None."""
    run = store.load(directory)
    config = run.manifest["config"]
    target = Path(config["model_dir"] or "")
    if (
        not (target / KNOWN_ANSWER_FILE).is_file()
        or run.manifest["status"] != "complete"
        or run.manifest["refused"]
        or run.columns.failed.any()
        or config["temperature"] != 0
        or config["sampling_kwargs"]
        or _near_limit(run)
        or not case_of(run, prepared.stop_token_ids).is_known
    ):
        return None
    outcome = judge(run, prepared)
    known = _known(config)
    case = case_of(run, prepared.stop_token_ids)
    by_category: dict[str, list[Any]] = {}
    for request in observed_requests(run, prepared):
        by_category.setdefault(request.category, []).append(case.steps(known, request.prompt_ids))
    lengths = {name: closed_form.expected_al(steps) for name, steps in by_category.items()}
    if run.manifest["engine"].get("fits_drafts"):
        lengths = {}  # of steps that were cut short, so no acceptance length at K
    told = [al for al in lengths.values() if al is not None]
    return {
        "ok": outcome.ok,
        "sentence": outcome.sentence,
        "fault": outcome.fault,
        "by_category": lengths,
        "overall": sum(told) / len(told) if told and len(told) == len(lengths) else None,
    }


def _near_limit(run: store.Run) -> bool:
    """Whether a request came so near to the engine's limit that it drafts fewer tokens there."""
    limit, k = run.manifest["engine"]["max_seq_len"], run.manifest["engine"]["draft_length"]
    longest = (
        int(run.columns.n_prompt_tokens.max(initial=0)) + run.manifest["config"]["output_length"]
    )
    return limit is not None and longest > limit - 2 * (k + 1)


# ---------------------------------------------------------------- the cases


@dataclass(frozen=True, slots=True)
class Subject:
    """What is proven: an algorithm with the folders of its target and drafter."""

    label: str
    algorithm: Algorithm
    target: str
    draft: str | None = None
    capture_experts: bool = False


SUBJECTS = (
    Subject("NONE", "NONE", "word/target"),
    Subject("DRAFT_TARGET", "DRAFT_TARGET", "word/target", "word/draft"),
    Subject("EAGLE", "EAGLE", "word/target", "word/eagle"),
    Subject("EAGLE3", "EAGLE3", "word/target", "word/eagle3"),
    Subject("EAGLE3 pruned", "EAGLE3", "word/target", "word/eagle3-pruned"),
    Subject("MTP", "MTP", "word/mtp"),
    Subject("MEDUSA", "MEDUSA", "word/target", "word/medusa"),
    Subject("PARD", "PARD", "word/target", "word/pard"),
    Subject("DFLASH", "DFLASH", "word/target", "word/dflash"),
    Subject("NGRAM", "NGRAM", "word/target"),
    Subject("SUFFIX", "SUFFIX", "word/target"),
    Subject("routed experts", "NONE", "word/moe", capture_experts=True),
)
SAMPLED = Subject("DRAFT_TARGET sampled", "DRAFT_TARGET", "word/target", "word/draft")
"""At temperature 1; an engine start of its own, for some are started otherwise to sample."""
NATURAL = {
    "NONE": Subject("NONE natural", "NONE", "bpe/target"),
    "NGRAM": Subject("NGRAM natural", "NGRAM", "bpe/target"),
    "DRAFT_TARGET": Subject("DRAFT_TARGET natural", "DRAFT_TARGET", "bpe/target", "bpe/draft"),
}
"""Natural prompts of several turns, for the first of these (from the end) that is asked for."""


@dataclass(frozen=True, slots=True)
class EngineCase:
    """One engine start; `cells` are (concurrency, output length, rows, temperature) run on it."""

    subject: Subject
    draft_length: int
    cells: tuple[tuple[int, int, int | None, float], ...]

    @property
    def k(self) -> int:
        return 0 if self.subject.algorithm == "NONE" else self.draft_length


def engine_cases(
    algorithms: Collection[Algorithm],
    draft_lengths: Sequence[int],
    concurrencies: Sequence[int],
    output_lengths: Sequence[int],
) -> Iterator[EngineCase]:
    """Every engine start of a calibration: all concurrencies x output lengths on each.

    Low concurrencies are slow, so they get fewer rows: 33 at 1, 88 up to 8, else all.
    """
    grid = tuple(
        (n, length, 33 if n == 1 else 88 if n <= 8 else None, 0.0)
        for n in concurrencies
        for length in output_lengths
    )
    for subject in SUBJECTS:
        if subject.algorithm not in algorithms:
            continue
        is_plain = subject.algorithm == "NONE"
        for k in draft_lengths[-1:] if is_plain else draft_lengths:
            yield EngineCase(subject, k, grid[-1:] if subject.capture_experts else grid)
    if "DRAFT_TARGET" in algorithms:
        cell = (max(concurrencies), max(output_lengths), None, 1.0)
        yield EngineCase(SAMPLED, draft_lengths[-1], (cell,))
    for name in reversed(NATURAL):
        if name in algorithms:
            cell = (min(8, max(concurrencies)), max(output_lengths), None, 0.0)
            yield EngineCase(NATURAL[name], draft_lengths[-1], (cell,))
            return


@dataclass(frozen=True, slots=True)
class Cell:
    """One judged run, or why its engine could not be started."""

    case: EngineCase
    config: RunConfig
    directory: Path
    verdict: verdict.Verdict | None
    refusal: str = ""


Start = Callable[[EngineSettings], Engine]


def calibrate(
    base: Mapping[str, Any],
    cases: Sequence[EngineCase],
    directory: Path,
    start: Start,
    engine_args_of: Mapping[Algorithm, Mapping[str, Any]],
) -> Iterator[Cell]:
    """Build the checkpoints, run every case on the engine that `start` makes, judge every run.

    base            RunConfig values that hold for all cases (engine, engine_args, tp_size, ...)
    engine_args_of  further engine arguments an algorithm needs for its answer to be known
    """
    models = directory / "models"
    checkpoints.build(models)
    for case in cases:
        configs = [
            _config(base, case, cell, models, directory, engine_args_of) for cell in case.cells
        ]
        widest = max(configs, key=lambda config: config.concurrency)
        try:
            _refuse_missing_heads(case)
            engine = start(widest.engine_settings())
        except UserError as refusal:
            yield Cell(case, widest, Path(widest.save_dir or ""), None, str(refusal))
            continue
        try:
            for config in configs:
                prepared = inputs.prepare(config)
                run_dir = Path(config.save_dir or "")
                outcome = session.measure(config, prepared, engine, Target(run_dir))
                if outcome.end.reason != "finished":
                    what = {
                        "engine died": "the engine died",
                        "stalled": "the engine fell silent",
                        "crashed": "the run crashed",
                    }
                    how = what.get(outcome.end.reason, "the run was stopped")
                    raise UserError(f"{how} in {run_dir}: {outcome.end.message}")
                run = store.load(run_dir)
                found = _unless_contradicted(judge(run, prepared), run, case.k)
                yield Cell(case, config, run_dir, found)
        finally:
            engine.close()


def _unless_contradicted(outcome: verdict.Verdict, run: store.Run, k: int) -> verdict.Verdict:
    """A right record of another K than was asked for, or one that the engine's own counters
    contradict, proves nothing."""
    if not outcome.ok:
        return outcome
    if (used := run.manifest["engine"]["draft_length"]) != k:
        sentence = f"the engine drafts {used} tokens per step, asked was K={k}."
        return replace(outcome, ok=False, fault="off-by-one K", sentence=sentence)
    if k == 0 or None in [entry.get("counters") for entry in run.manifest["sessions"]]:
        return outcome
    books = checks.reconcile(run)
    drafts, accepted = books["unexplained_drafts"], books["unexplained_accepted"]
    if drafts or accepted:
        sentence = (
            f"every step is right, but the engine's own counters say {drafts:+d} drafts and "
            f"{accepted:+d} accepted tokens beside them."
        )
        return replace(outcome, ok=False, fault="counters differ", sentence=sentence)
    return outcome


def _refuse_missing_heads(case: EngineCase) -> None:
    if case.subject.algorithm == "MEDUSA" and case.k > checkpoints.MEDUSA_HEADS:
        raise UserError(
            f"the calibration checkpoint of MEDUSA has {checkpoints.MEDUSA_HEADS} heads, "
            f"--draft_length is {case.k}: use at most {checkpoints.MEDUSA_HEADS}"
        )


def _config(
    base: Mapping[str, Any],
    case: EngineCase,
    cell: tuple[int, int, int | None, float],
    models: Path,
    directory: Path,
    engine_args_of: Mapping[Algorithm, Mapping[str, Any]],
) -> RunConfig:
    concurrency, output_length, n_rows, temperature = cell
    subject = case.subject
    k = f"-k{case.k}" if case.k else ""
    label = subject.label.replace(" ", "-")
    name = f"{label}{k}-n{concurrency}-o{output_length}-t{temperature:g}".lower()
    return from_dict(
        {
            **base,
            "model_dir": str(models / subject.target),
            "draft_model_dir": _draft_folder(subject, models, base["engine"]),
            "speculative_algorithm": subject.algorithm,
            "draft_length": case.draft_length,
            "capture_experts": subject.capture_experts,
            "dataset": "mini" if subject.target.startswith("bpe") else "calibration",
            "num_requests": n_rows,
            "concurrency": concurrency,
            "output_length": output_length,
            "temperature": temperature,
            "warmup": min(concurrency, 8),
            "save_dir": str(directory / "runs" / name),
            "engine_args": {
                **base.get("engine_args", {}),
                **engine_args_of.get(subject.algorithm, {}),
            },
        }
    )


def _draft_folder(subject: Subject, models: Path, engine: str) -> str | None:
    """The drafter's folder, in the form that the engine reads where there are several."""
    if subject.draft is None:
        return None
    form = models / f"{subject.draft}-{engine.lower()}"
    return str(form if form.is_dir() else models / subject.draft)
