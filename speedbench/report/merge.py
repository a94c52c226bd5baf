"""Merge: runs that measured shares (shards) of one set of rows, as one run to report."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedbench import store
from speedbench.config import DEFAULTS
from speedbench.store import Run
from speedbench.types import UserError

NOT_COMPARED = frozenset(
    {"save_dir", "show_progress", "max_duration", "stall_timeout", "goodput", "shard"}
)
"""Configuration fields in which shards of one run may differ."""

WORST_FIRST = ("failed", "running", "partial", "complete")


def merged(directories: Sequence[Path]) -> Run:
    """The union of several runs. Raises UserError, naming the difference, if they are no shards of
    one run. Their acceptance is pooled; how their times compare is told by their clocks."""
    runs = [store.load(directory) for directory in directories]
    for run in runs[1:]:
        _refuse_other(runs[0], run)
    _refuse_overlap(runs)
    return store.union(directories, _manifest(runs))


def _refuse_other(first: Run, other: Run) -> None:
    mine, theirs = first.manifest, other.manifest
    compared: dict[str, tuple[Any, Any]] = {}
    for section, prefix in (("config", "--"), ("engine", "the engine's ")):
        for name in sorted({*mine[section], *theirs[section]} - NOT_COMPARED):
            default = DEFAULTS.get(name) if section == "config" else None  # of an older run
            compared[f"{prefix}{name}"] = (
                mine[section].get(name, default), theirs[section].get(name, default),
            )  # fmt: skip
    for what, section, name in (
        ("the dataset's sha256", "dataset", "sha256"),
        ("the prompts' fingerprint", "prompts", "fingerprint"),
        ("the CPU", "environment", "cpu"),
        ("the list of GPUs", "environment", "gpus"),
        ("the hash of the checkpoints", "environment", "checkpoints"),
    ):
        compared[what] = (mine[section].get(name), theirs[section].get(name))
    for what, (was, found) in compared.items():
        if was != found:
            raise UserError(
                f"{first.directory} and {other.directory} are no shards of one run: {what} is "
                f"{was!r} in the first and {found!r} in the second; merge runs that differ in "
                "--shard alone"
            )


def _refuse_overlap(runs: Sequence[Run]) -> None:
    whose: dict[str, Run] = {}
    for run in runs:
        for name in run.columns.conversation_ids:
            if name in whose:
                raise UserError(
                    f"{whose[name].directory} and {run.directory} both hold the conversation "
                    f"{name!r}: merge shards that have no row in common"
                )
            whose[name] = run


def missing_shards(shards: Sequence[str | None]) -> list[str]:
    """Of the shares that 'r/R' are of, those that are not among them; none of runs that are no
    shares, or are shares of different cuts."""
    cuts = {shard.partition("/")[2] for shard in shards if shard}
    if None in shards or len(cuts) != 1:
        return []
    (cut,) = cuts
    return [share for r in range(int(cut)) if (share := f"{r}/{cut}") not in shards]


def _manifest(runs: Sequence[Run]) -> dict[str, Any]:
    """Of the union: what all have in common, and the sum of what they hold."""
    manifests = [run.manifest for run in runs]
    first = manifests[0]
    n_replicas = [store.n_replicas_of(manifest) for manifest in manifests]
    offsets = itertools.accumulate([0, *n_replicas[:-1]])
    selected = first["dataset"].get("selected")
    expected = sum((Counter(m["dataset"]["expected"]) for m in manifests), Counter[str]())
    known = [manifest.get("known_answer") for manifest in manifests]
    union = {
        **first,
        "status": min((m["status"] for m in manifests), key=WORST_FIRST.index),
        "merged": [str(run.directory) for run in runs],
        "missing_shards": missing_shards([m["config"].get("shard") for m in manifests]),
        "config": {**first["config"], "save_dir": None, "shard": None},
        # Against all rows, so that a shard that is not among them is missed.
        "dataset": {**first["dataset"], "expected": dict(selected or expected)},
        "refused": [row for manifest in manifests for row in manifest.get("refused", [])],
        "sessions": [
            {**session, "replica": session.get("replica", 0) + offset}
            for manifest, offset in zip(manifests, offsets, strict=True)
            for session in manifest["sessions"]
        ],
    }
    union.pop("known_answer", None)
    if all(known):
        wrong = [answer for answer in known if answer and not answer.get("ok")]
        right = f"each of the {len(runs)} merged runs is exactly as computed"
        sentence = wrong[0]["sentence"] if wrong else right
        union["known_answer"] = {"ok": not wrong, "sentence": sentence}
    return union
