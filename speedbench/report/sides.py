"""Sides: what each arm of a comparison measured, conversation by conversation, and which of them
count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from speedbench import metrics, stats
from speedbench.checks import counted
from speedbench.columns import Columns, Floats, Ints
from speedbench.store import Run, load_served
from speedbench.types import UNKNOWN


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, conversation by conversation (C'): those that did not fail.

    place      conversation id -> C'
    failed     ids of the others
    log_tps    (C',) of user TPS; NaN where no time passed after the first tokens
    log_step   (C',) of the mean step time in s; NaN there, and where steps cannot be counted
    log_ttft   (C',) mean over its turns of the logarithm of TTFT in s; NaN where one is not known
    seconds    (C', 3) over its turns: to the first tokens, after them, and, of the former, until
               a client had sent the requests; NaN where that is not known
    lengths    (C', 2 (K+2)) decode steps by length, uncensored and then censored
    asked      conversation id -> sha256 of its prompts by turn
    """

    place: Mapping[str, int]
    failed: frozenset[str]
    category: tuple[str, ...]
    log_tps: Floats
    log_step: Floats
    log_ttft: Floats
    seconds: Floats
    lengths: Ints
    asked: Mapping[str, tuple[tuple[int, str], ...]]


def measured(run: Run) -> Measured:
    columns = run.columns
    counts = counted(run)
    tps = metrics.conversation_user_tps(columns)
    conversation = columns.conversation[columns.request]
    later = columns.step > 0
    kinds = metrics.step_kinds(columns, int(run.manifest["engine"]["draft_length"]))
    known = (kinds != metrics.MERGED) | (columns.engine_steps > 1)
    steps = np.where(known, columns.engine_steps, np.nan)
    n_steps, n_tokens = (
        np.bincount(conversation[later], values[later], len(tps))
        for values in (steps, columns.n_tokens)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_tps = np.log(np.where(tps > 0, tps, np.nan))
        log_step = np.log(n_tokens / n_steps) - log_tps
    good = np.flatnonzero(~columns.failed)
    names = [columns.conversation_ids[i] for i in good]
    return Measured(
        {name: i for i, name in enumerate(names)},
        frozenset(columns.conversation_ids) - frozenset(names),
        tuple(columns.categories[columns.category[i]] for i in good),
        log_tps[good],
        log_step[good],
        _log_ttft(columns)[good],
        _seconds(run)[good],
        np.concatenate([counts.whole, counts.cut], axis=1),
        _asked(run),
    )


def _log_ttft(columns: Columns) -> Floats:
    """(C,)"""
    first, _ = columns.first_and_last()
    request = columns.request[first]
    submitted = columns.submitted_ns[request]
    ttft_s = (columns.time_ns[first] - submitted) / 1e9
    known = (submitted != UNKNOWN) & (ttft_s > 0)
    logs = np.log(np.where(known, ttft_s, np.nan))
    conversation, n = columns.conversation[request], len(columns.conversation_ids)
    with np.errstate(invalid="ignore"):
        return np.bincount(conversation, logs, n) / np.bincount(conversation, minlength=n)


def _seconds(run: Run) -> Floats:
    """(C, 3)"""
    columns = run.columns
    first, last = columns.first_and_last()
    request = columns.request[first]
    submitted = columns.submitted_ns[request].astype(float)
    submitted[submitted == UNKNOWN] = np.nan
    sent = _sent_ns(run)[request]
    parts = (
        columns.time_ns[first] - submitted,
        columns.time_ns[last] - columns.time_ns[first],
        sent - submitted,
    )
    conversation, n = columns.conversation[request], len(columns.conversation_ids)
    return np.stack([np.bincount(conversation, part / 1e9, n) for part in parts], axis=1)


def _sent_ns(run: Run) -> Floats:
    """(R,) when a client had sent each request; NaN where there is none."""
    served = load_served(run)
    names = run.turns["request_id"].take(pa.array(run.used)).to_pylist()
    sent_of = dict(
        zip(served["request_id"].to_pylist(), served["sent_ns"].to_pylist(), strict=True)
    )
    return np.array([sent_of.get(name, np.nan) for name in names], float)


def _asked(run: Run) -> dict[str, tuple[tuple[int, str], ...]]:
    names = ["conversation_id", "turn", "prompt_sha256"]
    turns = run.turns.select(names).take(run.used)
    columns = (turns[name].to_pylist() for name in names)
    asked: dict[str, list[tuple[int, str]]] = {}
    for name, number, sha in zip(*columns, strict=True):
        asked.setdefault(name, []).append((number, sha))
    return {name: tuple(sorted(turns)) for name, turns in asked.items()}


@dataclass(frozen=True, slots=True)
class Side:
    """One arm over the chosen conversations (P), in its repeats (R).

    category           (P,) index into the comparison's categories
    log_tps, log_step, log_ttft  (R, P)
    seconds            (R, P, 3)
    n_steps            (P,) decode steps that count for an AL, of all repeats
    al, log_al         (G + 1,) acceptance length, and logarithm, by category and over categories
    al_pseudo, pseudo  (P,) pseudo-values of these two
    """

    category: Ints
    draft_length: int
    log_tps: Floats
    log_step: Floats
    log_ttft: Floats
    seconds: Floats
    n_steps: Floats
    al: Floats
    log_al: Floats
    al_pseudo: Floats
    pseudo: Floats


def side(
    runs: Sequence[Measured], names: Sequence[str], categories: Sequence[str], draft_length: int
) -> Side:
    code = {name: i for i, name in enumerate(categories)}
    places = [np.array([run.place[name] for name in names], np.int64) for run in runs]
    first = [runs[0].category[i] for i in places[0]]
    category = np.array([code[name] for name in first], np.int64)
    lengths = np.sum([run.lengths[at] for run, at in zip(runs, places, strict=True)], axis=0)
    width = lengths.shape[1] // 2

    def al(sums: Floats | Ints) -> Floats:
        return metrics.acceptance_length(sums[..., :width], sums[..., width:])

    def log_al(sums: Floats | Ints) -> Floats:
        return np.log(al(sums))

    n, there = len(categories), np.unique(category)
    als, al_pseudo = stats.of_sums(lengths, category, n, al)
    logs, pseudo = stats.of_sums(lengths, category, n, log_al)
    overall, log_overall = (
        values[there].mean() if len(there) else np.nan for values in (als, logs)
    )
    return Side(
        category,
        draft_length,
        np.stack([run.log_tps[at] for run, at in zip(runs, places, strict=True)]),
        np.stack([run.log_step[at] for run, at in zip(runs, places, strict=True)]),
        np.stack([run.log_ttft[at] for run, at in zip(runs, places, strict=True)]),
        np.stack([run.seconds[at] for run, at in zip(runs, places, strict=True)]),
        np.asarray(lengths.sum(axis=1), float),
        np.append(als, overall),
        np.append(logs, log_overall),
        al_pseudo,
        pseudo,
    )


# ---------------------------------------------------------------- which conversations

IN_BASE_ONLY = "measured in the base only"
IN_ARM_ONLY = "measured in the arm only"
IN_NEITHER = "failed in both arms"
NOT_IN_ALL = "not measured in every repeat"
ASKED_OTHERWISE = "asked with other prompts"
UNTIMED = "without a token after the first"


def pairs(base: Sequence[Measured], arm: Sequence[Measured]) -> tuple[list[str], Mapping[str, int]]:
    """Conversations to pair, and how many are left out by reason."""
    runs = [*base, *arm]
    seen = {name for run in runs for name in (*run.place, *run.failed)}
    chosen: list[str] = []
    left_out: Counter[str] = Counter()
    for name in sorted(seen):
        if why := _why_left_out(name, base, arm):
            left_out[why] += 1
        else:
            chosen.append(name)
    return chosen, dict(sorted(left_out.items()))


def _why_left_out(name: str, base: Sequence[Measured], arm: Sequence[Measured]) -> str:
    mine, theirs = ([name in run.place for run in runs] for runs in (base, arm))
    if not (any(mine) and any(theirs)):
        return IN_BASE_ONLY if any(mine) else IN_ARM_ONLY if any(theirs) else IN_NEITHER
    if not all((*mine, *theirs)):
        return NOT_IN_ALL
    runs = [*base, *arm]
    if len({run.asked[name] for run in runs}) > 1:
        return ASKED_OTHERWISE
    return UNTIMED if any(np.isnan(run.log_tps[run.place[name]]) for run in runs) else ""


def alone(runs: Sequence[Measured]) -> tuple[list[str], Mapping[str, int]]:
    """Conversations of one arm by itself, where the other was asked something else."""
    chosen = []
    left_out: Counter[str] = Counter()
    for name in sorted({name for run in runs for name in (*run.place, *run.failed)}):
        if not all(name in run.place for run in runs):
            left_out[NOT_IN_ALL if any(name in run.place for run in runs) else "failed"] += 1
        elif any(np.isnan(run.log_tps[run.place[name]]) for run in runs):
            left_out[UNTIMED] += 1
        else:
            chosen.append(name)
    return chosen, left_out
