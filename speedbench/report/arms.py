"""Arms: stored runs grouped by what they measured; the runs of one arm are its repeats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from speedbench import store
from speedbench.report.merge import merged
from speedbench.store import Run
from speedbench.types import UserError

NOT_IDENTITY = frozenset({"save_dir", "show_progress", "max_duration"})
"""Configuration fields in which repeats of one arm may differ. Not the shard: two shards of one run
asked different rows, and neither repeats the other."""

OF_DRAFTING = ("draft_length", "draft_sample_method", "block_size")
"""Configuration fields that mean nothing where nothing is drafted."""

OF_THE_MOMENT = ("kv_cache_memory_bytes",)
"""Engine settings that follow from what memory was free."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that measured the same: one, or its repeats in the order they were made.

    label  what tells it from the other arms of the same report, such as 'EAGLE3 K=3, concurrency 8'
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Of the first repeat; in all that identifies an arm the others have the same."""
        return self.runs[0].manifest

    @property
    def draft_length(self) -> int:
        return int(self.manifest["engine"]["draft_length"])

    @property
    def is_baseline(self) -> bool:
        return self.draft_length == 0


def load_arms(paths: Sequence[Path], merges: Sequence[Sequence[Path]] = ()) -> tuple[Arm, ...]:
    """The arms in run directories and in folders of such (what --baseline and sweep write).

    Arms come in the order in which they are first named. Raises UserError where a path holds no
    run, or a run is named twice.
    """
    directories = [found for path in paths for found in run_directories(path)]
    seen: set[Path] = set()
    for directory in directories:
        if directory.resolve() in seen:
            raise UserError(f"{directory} was named twice: name each run once")
        seen.add(directory.resolve())
    runs = [store.load(directory) for directory in directories]
    return grouped([*runs, *(merged(shards) for shards in merges)])


def run_directories(path: Path) -> list[Path]:
    """The run itself, or the runs in a folder of runs, in the order they began."""
    if (path / "manifest.json").is_file() or not path.is_dir():
        return [path]
    inside = [one.parent for one in path.glob("*/manifest.json")]
    if not inside:
        raise UserError(
            f"{path} is no run directory (it has no manifest.json) and holds none: name the "
            "--save_dir of a run, or a folder of runs"
        )
    return sorted(inside, key=lambda one: (_started(store.read_manifest(one)), one.name))


def _started(manifest: Mapping[str, Any]) -> str:
    starts = [str(session.get("started_at")) for session in manifest["sessions"]]
    return min(starts, default="")


def grouped(runs: Iterable[Run]) -> tuple[Arm, ...]:
    """Runs alike become one arm, its repeats in the order they began."""
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(identity(run.manifest), []).append(run)
    groups = [
        sorted(group, key=lambda run: _started(run.manifest)) for group in by_identity.values()
    ]
    labels = _labels([group[0].manifest for group in groups])
    return tuple(Arm(label, tuple(group)) for label, group in zip(labels, groups, strict=True))


def identity(manifest: Mapping[str, Any]) -> str:
    """What two runs must have in common to be repeats: configuration, inputs, engine, machine."""
    config = {k: v for k, v in manifest["config"].items() if k not in NOT_IDENTITY}
    if config.get("speculative_algorithm") == "NONE":
        config = {k: v for k, v in config.items() if k not in OF_DRAFTING}
    engine, machine = manifest["engine"], manifest["environment"]
    settings = {k: v for k, v in engine.get("settings", {}).items() if k not in OF_THE_MOMENT}
    found = {
        "config": config,
        "engine": {**engine, "settings": settings},
        "fingerprint": manifest["prompts"].get("fingerprint"),
        "dataset": manifest["dataset"].get("sha256"),
        "n_replicas": store.n_replicas_of(manifest),
        **{name: machine.get(name) for name in ("cpu", "gpus", "checkpoints")},
    }
    return json.dumps(found, sort_keys=True, default=str)


LABELLED = (
    ("target", "model_dir"),
    ("drafter", "draft_model_dir"),
    ("dataset", "dataset"),
    ("concurrency", "concurrency"),
    ("temperature", "temperature"),
    ("random ISL", "random_isl"),
    ("configuration", "speed_config"),
    ("output length", "output_length"),
    ("shard", "shard"),
)
"""Configuration fields that a label names where arms differ in them, by the words it uses."""


def _labels(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was drafted, and what else tells the arms apart; numbered where nothing does."""
    configs = [manifest["config"] for manifest in manifests]
    differing = [
        (word, name)
        for word, name in LABELLED
        if len({str(c.get(name)) for c in configs if c.get(name) is not None}) > 1
    ]
    engines = {f"{m['engine']['name']} {m['engine']['version']}" for m in manifests}
    labels = []
    for manifest, config in zip(manifests, configs, strict=True):
        k = int(manifest["engine"]["draft_length"])
        parts = [f"{config['speculative_algorithm']} K={k}" if k else "baseline"]
        if len(engines) > 1:
            parts.insert(0, f"{manifest['engine']['name']} {manifest['engine']['version']}")
        for word, name in differing:
            if (value := config.get(name)) is not None:
                parts.append(f"{word} {PurePath(value).name if word in SHORT else value}")
        labels.append(", ".join(parts))
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


SHORT = ("target", "drafter")
"""Fields that are paths, of which the last part is told."""
