"""Pair: a baseline and a speculative run of the same prompts, and how much faster the second is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from speedbench import metrics, stats
from speedbench.checks import Check
from speedbench.columns import Floats
from speedbench.report.summary import Figure, Summary, summarize
from speedbench.store import Run, n_replicas_of
from speedbench.types import UserError

MUST_AGREE = ("output_length", "temperature", "top_p", "top_k", "ignore_eos", "concurrency")
"""Configuration fields without which two runs are no pair."""

SHOULD_AGREE = (
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "sampling_kwargs",
    "seed",
    "order",
    "history",
)
"""Configuration fields that a pair differs in only by mistake: warned of."""

ENGINE_FACTS = ("name", "version", "max_num_seqs", "max_seq_len", "prefix_cache", "simulated")
CHANGED_BY_SPECULATION = ("per_step_acceptance", "kv_cache_memory_bytes")
"""Engine settings that say nothing about how alike two arms are."""


@dataclass(frozen=True, slots=True)
class PairSummary:
    """Both arms and their speedups.

    checks      sentences about the two as a pair
    by_category category -> user-TPS speedup, geometric mean over its pairs
    n_pairs     category -> conversations paired
    overall     geometric mean over categories
    system      ratio of steady output TPS: one number of each run, hence no interval
    n_base_only, n_spec_only  conversations measured in one arm only, left out
    n_untimed   conversations of both arms with no time after their first token, left out
    n_other     conversations of both arms with another prompt in some turn, left out
    """

    base: Summary
    spec: Summary
    checks: tuple[Check, ...]
    by_category: Mapping[str, Figure]
    n_pairs: Mapping[str, int]
    overall: Figure
    system: Figure
    n_base_only: int
    n_spec_only: int
    n_untimed: int
    n_other: int


def significant(speedup: Figure) -> bool | None:
    """Whether the interval leaves out 1; None without an interval."""
    if speedup.interval is None:
        return None
    low, high = speedup.interval
    return not low <= 1 <= high


def pair(base: Run, spec: Run) -> PairSummary:
    """Compare two runs conversation by conversation. Raises UserError if they are no pair."""
    _refuse(base, spec)
    mine, theirs = _conversation_tps(base), _conversation_tps(spec)
    other = _asked_otherwise(base, spec)
    both = sorted((mine.keys() & theirs.keys()) - other)
    timed = [n for n in both if mine[n][1] > 0 and theirs[n][1] > 0]  # False for NaN, too
    names = spec.columns.categories
    code = {name: i for i, name in enumerate(names)}
    result = stats.paired_speedup(
        np.array([mine[n][1] for n in timed], float),
        np.array([theirs[n][1] for n in timed], float),
        np.array([code[theirs[n][0]] for n in timed], np.int64),
        len(names),
    )
    base_summary, spec_summary = summarize(base), summarize(spec)
    n_base_only, n_spec_only = (
        len(a.keys() - b.keys()) for a, b in ((mine, theirs), (theirs, mine))
    )
    return PairSummary(
        base=base_summary,
        spec=spec_summary,
        checks=tuple(_doubts(base, spec, n_base_only, n_spec_only, len(both) - len(timed))),
        by_category={
            name: _speedup(result.per_category[i], result.per_category_interval[i])
            for i, name in enumerate(names)
        },
        n_pairs={name: int(result.n_pairs[i]) for i, name in enumerate(names)},
        overall=_speedup(result.overall, result.overall_interval),
        system=_system(base_summary, spec_summary),
        n_base_only=n_base_only,
        n_spec_only=n_spec_only,
        n_untimed=len(both) - len(timed),
        n_other=len(other),
    )


def _conversation_tps(run: Run) -> dict[str, tuple[str, float]]:
    """Conversation id -> (category, user TPS) of every conversation that did not fail."""
    columns = run.columns
    tps = metrics.conversation_user_tps(columns)
    return {
        name: (columns.categories[columns.category[i]], float(tps[i]))
        for i, name in enumerate(columns.conversation_ids)
        if not columns.failed[i]
    }


def _speedup(value: float, interval: Floats) -> Figure:
    if np.isnan(value):
        return Figure(None, why_not="no conversation was measured in both arms")
    if np.isnan(interval).any():
        return Figure(float(value), why_not="an interval needs two pairs in a category")
    return Figure(float(value), (float(interval[0]), float(interval[1])))


def _system(base: Summary, spec: Summary) -> Figure:
    n_base, n_spec = (n_replicas_of(arm.manifest) for arm in (base, spec))
    if n_base != n_spec:
        differ = f"the baseline has {n_base} replica(s), the speculative run {n_spec}"
        return Figure(None, why_not=differ)
    mine, theirs = base.output_tps_steady, spec.output_tps_steady
    if mine.value and theirs.value:
        return Figure(theirs.value / mine.value, why_not="one throughput of each run")
    arm, figure = ("speculative run", theirs) if mine.value else ("baseline", mine)
    return Figure(None, why_not=f"{arm}: {figure.why_not or 'no token in the steady window'}")


# ---------------------------------------------------------------- are they a pair?


def _refuse(base: Run, spec: Run) -> None:
    k = base.manifest["engine"]["draft_length"]
    if k != 0:
        raise UserError(
            f"{base.directory} drafts {k} tokens per step and is no baseline: give a run with "
            "--speculative_algorithm NONE first, then the speculative one"
        )
    mine, theirs = (_fingerprint(run) for run in (base, spec))
    if mine != theirs or mine is None:
        raise UserError(
            f"the prompts differ: their fingerprint is {_short(mine)} in {base.directory} and "
            f"{_short(theirs)} in {spec.directory}; compare runs of the same rows and tokenizer"
        )
    for name in MUST_AGREE:
        mine, theirs = (run.manifest["config"].get(name) for run in (base, spec))
        if mine != theirs:
            raise UserError(
                f"--{name} differs: it is {mine} in {base.directory} and {theirs} in "
                f"{spec.directory}; measure both arms alike"
            )


def _fingerprint(run: Run) -> Any:
    return run.manifest.get("prompts", {}).get("fingerprint")


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:12]


def _doubts(
    base: Run, spec: Run, n_base_only: int, n_spec_only: int, n_untimed: int
) -> Iterator[Check]:
    mine, theirs = _comparable(base.manifest), _comparable(spec.manifest)
    for what in [name for name in mine if name in theirs]:
        if mine[what] != theirs[what]:
            yield Check(
                "warning",
                f"the arms differ in more than speculation: {what} is {mine[what]} in the baseline "
                f"and {theirs[what]} in the speculative run",
            )
    if n_base_only or n_spec_only:
        yield Check(
            "warning",
            f"{n_base_only + n_spec_only} conversation(s) were measured in one arm only "
            f"({n_base_only} in the baseline, {n_spec_only} in the speculative run) and are in no "
            "speedup",
        )
    if n_untimed:
        yield Check(
            "note",
            f"{n_untimed} conversation(s) have no token after the first in an arm, and are in no "
            "user-TPS speedup",
        )
    yield _inputs(base, spec)


def _inputs(base: Run, spec: Run) -> Check:
    """Whether the two arms were asked the same, turn by turn, by the stored prompt hashes."""
    n, other = (
        len(_prompt_hashes(base).keys() & _prompt_hashes(spec).keys()),
        _asked_otherwise(base, spec),
    )
    if not other:
        return Check("note", f"all {n} prompts were identical in both arms, token by token")
    return Check(
        "warning",
        f"{len(other)} conversation(s) had other prompts in the two arms, where later turns hold "
        "each arm's own replies, and are in no speedup (--history frozen makes them identical)",
    )


def _asked_otherwise(base: Run, spec: Run) -> set[str]:
    """Conversations that both arms hold with another prompt in some turn."""
    mine, theirs = _prompt_hashes(base), _prompt_hashes(spec)
    return {turn[0] for turn in mine.keys() & theirs.keys() if mine[turn] != theirs[turn]}


def _prompt_hashes(run: Run) -> dict[tuple[str, int], str]:
    """(conversation id, turn) -> sha256 of its prompt, of every turn that was asked."""
    turns = run.turns.take(run.used)
    names, numbers, hashes = (
        turns[name].to_pylist() for name in ("conversation_id", "turn", "prompt_sha256")
    )
    return {
        (name, number): sha for name, number, sha in zip(names, numbers, hashes, strict=True) if sha
    }


def _comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two arms should have in common, by the words a warning uses."""
    config, engine, machine = manifest["config"], manifest["engine"], manifest["environment"]
    return {
        "the target": _target(manifest),
        **{f"--{name}": config.get(name) for name in SHOULD_AGREE},
        "--engine_args": {
            name: value
            for name, value in config.get("engine_args", {}).items()
            if name != "speculative_config"
        },
        **{f"the engine's {name}": engine.get(name) for name in ENGINE_FACTS},
        **{
            f"the engine's {name}": value
            for name, value in engine.get("settings", {}).items()
            if name not in CHANGED_BY_SPECULATION
        },
        "the number of replicas": n_replicas_of(manifest),
        "the GPU": [g.get("name") if isinstance(g, dict) else g for g in machine.get("gpus") or ()],
        "the CPU": machine.get("cpu"),
    }


def _target(manifest: Mapping[str, Any]) -> str:
    """The target checkpoint: what its files hash to, where they are local, else its name."""
    name = str(manifest["config"].get("model_dir"))
    known = manifest["environment"].get("checkpoints", {}).get(name, {})
    return str(known.get("sha256", name))
