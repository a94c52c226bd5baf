"""Comparable: what two arms must have in common, by the names that `--allow` takes.

Speculation itself always may differ, and so may what an engine changes because of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from speedbench.checks import Check
from speedbench.config import DEFAULTS
from speedbench.report.arms import Arm, lesser_differences
from speedbench.report.sample import Sample
from speedbench.store import n_replicas_of
from speedbench.types import UserError

CONFIG = (
    "concurrency",
    "request_rate",
    "arrivals",
    "output_length",
    "temperature",
    "top_p",
    "top_k",
    "ignore_eos",
    "sampling_kwargs",
    "seed",
    "order",
    "max_seq_len",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "capture_experts",
)
"""Configuration fields that must agree, by their own names."""

FACTS = ("version", "max_num_seqs", "prefix_cache", "simulated")
"""What an engine says of itself, named `engine.` and this, as are its settings and arguments."""

WARNED = ("warmup", "history", "postprocess")
"""Configuration fields that arms differ in only by mistake, but that change no pair."""

SPECULATIVE = ("speculative", "spec_", "suffix_", "ngram", "draft", "assistant", "num_assistant")
"""How settings and arguments begin that speak of drafting."""

OF_SPECULATION = frozenset(
    {
        "acceptance",  # the null engine's
        "kv_cache_memory_bytes",
        "mem_fraction_static",
        "pads_drafts",
        "parallel_drafting",
        "per_step_acceptance",
        "rejection_sample_method",
    }
)
"""Other settings that drafting brings along, or what memory it leaves."""

SCHEDULING = ("async_scheduling", "disable_overlap_schedule", "overlap_scheduler")
"""Settings that engines change for some drafters: the cost is the drafter's, and is told."""

DEFAULT = "the default"


def same_prompts(base: Arm | Sample, arm: Arm | Sample) -> bool:
    """Whether both were made from the same rows by the same tokenizer and template."""
    mine, theirs = (_fingerprint(one.manifest) for one in (base, arm))
    return mine is not None and mine == theirs


def refuse_unknown(manifests: Sequence[Mapping[str, Any]], allow: Collection[str]) -> None:
    """Raises UserError for a name that no two of these runs can differ in."""
    known = sorted({name for manifest in manifests for name in _named(manifest, manifest)})
    for name in allow:
        if name not in known:
            raise UserError(
                f"--allow names '{name}', which is nothing that arms differ in: expected "
                f"{', '.join(known)}"
            )


def refuse_different(base: Arm | Sample, arm: Arm | Sample, allow: Collection[str] = ()) -> None:
    """Raises UserError, naming every difference that is not allowed."""
    found = {
        name: values
        for name, values in differences(base.manifest, arm.manifest).items()
        if not _allowed(name, allow)
    }
    if found:
        told = "; ".join(_sentence(name, values) for name, values in found.items())
        flags = " ".join(f"--allow {name}" for name in found)
        raise UserError(
            f"'{arm.label}' cannot be compared with the base '{base.label}': {told}; measure both "
            f"alike, or say that it is meant with {flags}"
        )


def _allowed(name: str, allow: Collection[str]) -> bool:
    """Another engine has other settings, too."""
    return name in allow or ("engine" in allow and name.startswith("engine."))


def differences(base: Mapping[str, Any], arm: Mapping[str, Any]) -> Mapping[str, tuple[Any, Any]]:
    """What two manifests differ in beside speculation: name -> (base, arm)."""
    mine, theirs = _named(base, arm), _named(arm, base)
    return {
        name: (mine[name], theirs[name])
        for name in mine
        if mine[name] != theirs[name] or (name == "prompts" and mine[name] is None)
    }


def doubts(base: Arm | Sample, arm: Arm | Sample) -> Iterator[Check]:
    """Sentences about differences: those that were allowed, and those that refuse nothing."""
    if arm.is_baseline and not base.is_baseline:
        yield Check(
            "warning",
            "the base speculates and the arm does not, so that ratios tell what leaving it out "
            "does: for a speedup name the baseline first",
        )
    for name, values in differences(base.manifest, arm.manifest).items():
        told = f"the arms differ in more than speculation: {_sentence(name, values)}"
        yield Check("warning", f"{told} (--allow {name})")
    for what, mine, theirs in _lesser(base.manifest, arm.manifest):
        if mine != theirs:
            told = f"{what} is {mine} in the base and {theirs} in the arm"
            yield Check("warning", f"the arms differ in more than speculation: {told}")
    mine, theirs = (one.manifest["engine"].get("settings", {}) for one in (base, arm))
    for name in SCHEDULING:
        if name in mine and name in theirs and mine[name] != theirs[name]:
            yield Check(
                "note",
                f"the engine's {name} is {mine[name]} in the base and {theirs[name]} in the arm: "
                "engines change it for some drafters, and what that costs is in the step time",
            )


def _lesser(base: Mapping[str, Any], arm: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in WARNED:
        yield f"--{name}", base["config"].get(name), arm["config"].get(name)
    yield from lesser_differences(base, arm)


def _named(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree with another run's, by the names of `--allow`."""
    config, engine, machine = manifest["config"], manifest["engine"], manifest["environment"]
    return {
        "prompts": _fingerprint(manifest),
        "target": _target(manifest),
        **{name: config.get(name, DEFAULTS.get(name)) for name in CONFIG},  # of an older run
        "replicas": n_replicas_of(manifest),
        "gpus": [g.get("name") if isinstance(g, dict) else g for g in machine.get("gpus") or ()],
        "cpu": machine.get("cpu"),
        "engine": engine.get("name"),
        **{f"engine.{name}": engine.get(name) for name in FACTS},
        **_settings(manifest, other),
    }


def _settings(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Engine settings as they were read back where both runs have them, else what was asked for."""
    found: dict[str, Any] = {}
    effective, theirs = (one["engine"].get("settings", {}) for one in (manifest, other))
    arguments, their_arguments = (one["config"].get("engine_args", {}) for one in (manifest, other))
    for name in sorted({*arguments, *their_arguments, *(effective.keys() & theirs.keys())}):
        if name in SCHEDULING and name not in {*arguments, *their_arguments}:
            continue
        if name.startswith(SPECULATIVE) or name in OF_SPECULATION:
            continue
        of_both = name in effective and name in theirs
        found[f"engine.{name}"] = effective[name] if of_both else arguments.get(name, DEFAULT)
    return found


def _fingerprint(manifest: Mapping[str, Any]) -> str | None:
    found = manifest.get("prompts", {}).get("fingerprint")
    return None if found is None else str(found)


def _target(manifest: Mapping[str, Any]) -> str:
    """The target checkpoint: what its files hash to, where they are local, else its name."""
    name = str(manifest["config"].get("model_dir"))
    known = manifest["environment"].get("checkpoints", {}).get(name, {})
    return str(known.get("sha256", name))


def _sentence(name: str, values: tuple[Any, Any]) -> str:
    mine, theirs = (_short(value) if name in ("prompts", "target") else value for value in values)
    of = {
        "prompts": "the fingerprint of the prompts",
        "target": "the target checkpoint",
        "gpus": "the list of GPUs",
        "cpu": "the CPU",
        "replicas": "the number of replicas",
        "engine": "the engine",
    }
    return f"{of.get(name, name)} is {mine} in the base and {theirs} in the arm"


def _short(value: Any) -> str:
    return str(value)[:12]
