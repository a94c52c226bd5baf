"""Arms: stored runs grouped by what they measured; the runs of one arm are its repeats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from speedbench import store
from speedbench.checks import Check
from speedbench.config import DEFAULTS, NEEDS_DRAFT_MODEL
from speedbench.report.merge import merged
from speedbench.store import Run
from speedbench.types import UserError

NOT_IDENTITY = frozenset(
    {"save_dir", "show_progress", "max_duration", "stall_timeout", "goodput", "request_timeout",
     "api_key_env", "metrics_url", "no_server_metrics"}
)  # fmt: skip
"""Configuration fields in which repeats of one arm may differ. Not the shard: two shards of one run
asked different rows, and neither repeats the other."""

OF_DRAFTING = ("draft_length", "draft_sample_method", "block_size")
"""Configuration fields that mean nothing where nothing is drafted."""

MANIFEST = "manifest.json"
SERIES_FILE = "sweep.json"
"""Beside the runs of a folder that were measured together."""

OF_THE_MOMENT = ("kv_cache_memory_bytes",)
"""Engine settings that follow from what memory was free."""


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that measured the same: one, or its repeats in the order they were made.

    label   what tells it from the other arms of the same report, such as 'EAGLE3 K=3'
    series  the folder whose runs were measured together, in rounds; '' of runs named one by one
    """

    label: str
    runs: tuple[Run, ...]
    series: str = ""

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

    Runs alike are repeats of one arm within their folder: what two folders hold was measured at
    two times, and stays apart. Arms come in the order in which they are first named. Raises
    UserError where a path holds no run, or a run is named twice.
    """
    placed = [found for path in paths for found in _placed(path)]
    seen: set[Path] = set()
    for directory, _ in placed:
        if directory.resolve() in seen:
            raise UserError(f"{directory} was named twice: name each run once")
        seen.add(directory.resolve())
    runs = [store.load(directory) for directory, _ in placed]
    shards = [merged(some) for some in merges]
    return grouped([*runs, *shards], [*(series for _, series in placed), *("" for _ in shards)])


def _placed(path: Path) -> Iterator[tuple[Path, str]]:
    """Run directories, each with the series that it belongs to."""
    for directory in run_directories(path):
        parent = directory.resolve().parent
        together = directory != path or (parent / SERIES_FILE).is_file()
        yield directory, str(parent) if together else ""


def is_run(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def series_in(path: Path) -> list[str]:
    """Of a folder of runs: the folders in it that hold some."""
    return list(dict.fromkeys(series for _, series in _placed(path)))


def run_directories(path: Path) -> list[Path]:
    """The run itself, or the runs in a folder and in its folders, in the order they began."""
    if is_run(path) or not path.is_dir():
        return [path]
    inside = list(_runs_in(path))
    if not inside:
        raise UserError(
            f"{path} is no run directory (it has no manifest.json) and holds none: name the "
            "--save_dir of a run, or a folder of runs"
        )
    return sorted(inside, key=lambda one: (_started(store.read_manifest(one)), str(one)))


def _runs_in(path: Path) -> Iterator[Path]:
    for folder, inside, files in os.walk(path):
        if MANIFEST in files:
            inside.clear()
            yield Path(folder)


def _started(manifest: Mapping[str, Any]) -> str:
    starts = [str(session.get("started_at")) for session in manifest["sessions"]]
    return min(starts, default="")


def grouped(runs: Sequence[Run], series: Sequence[str] = ()) -> tuple[Arm, ...]:
    """Runs alike become one arm, its repeats in the order they began.

    series  of each run; none: they were named one by one
    """
    by_identity: dict[tuple[str, str], list[Run]] = {}
    for run, one in zip(runs, series or [""] * len(runs), strict=True):
        by_identity.setdefault((one, identity(run.manifest)), []).append(run)
    groups = [
        sorted(group, key=lambda run: _started(run.manifest)) for group in by_identity.values()
    ]
    places = [place for place, _ in by_identity]
    labels = _labels([group[0].manifest for group in groups], places)
    return tuple(
        Arm(label, tuple(group), place)
        for label, group, place in zip(labels, groups, places, strict=True)
    )


def unlike(arm: Arm) -> Iterator[Check]:
    """What its repeats differ in that should change nothing measured, and might."""
    first, *others = (run.manifest for run in arm.runs)
    if others and _has_unknown_drafter(first["config"]):
        yield Check(
            "warning",
            "which drafter the server ran is not known: the repeats are alike as far as it tells; "
            "give --draft_model_dir",
        )
    for number, other in enumerate(others, 2):
        for what, mine, theirs in lesser_differences(first, other):
            if mine != theirs:
                yield Check(
                    "warning",
                    f"the repeats differ: {what} is {mine} in run 1 and {theirs} in run {number}",
                )


def _has_unknown_drafter(config: Mapping[str, Any]) -> bool:
    """A server may have been started again with another one."""
    needs_one = config.get("speculative_algorithm") in NEEDS_DRAFT_MODEL
    return needs_one and bool(config.get("url")) and config.get("draft_model_dir") is None


def lesser_differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Software of two manifests: (what, one, the other), equal or not."""
    packages = [one["environment"].get("packages") or {} for one in (mine, theirs)]
    for name in sorted(packages[0].keys() & packages[1].keys()):
        yield f"the package {name}", packages[0][name], packages[1][name]
    yield "the GPU driver", _drivers(mine), _drivers(theirs)


def _drivers(manifest: Mapping[str, Any]) -> list[Any]:
    gpus = manifest["environment"].get("gpus") or ()
    return [gpu.get("driver_version") for gpu in gpus if isinstance(gpu, dict)]


def nearest(arm: Arm, bases: Sequence[Arm]) -> list[Arm]:
    """Those of its own series, which were measured in turn with it; if there are none, all."""
    return [base for base in bases if base.series == arm.series] or list(bases)


def identity(manifest: Mapping[str, Any]) -> str:
    """What two runs must have in common to be repeats: configuration, inputs, engine, machine."""
    config = {
        name: value
        for name, value in manifest["config"].items()
        if name not in NOT_IDENTITY and value != DEFAULTS.get(name)  # older runs have fewer fields
    }
    if manifest["config"].get("speculative_algorithm") == "NONE":
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
    ("server", "url"),
    ("concurrency", "concurrency"),
    ("conversations per s", "request_rate"),
    ("arrivals", "arrivals"),
    ("temperature", "temperature"),
    ("random ISL", "random_isl"),
    ("configuration", "speed_config"),
    ("output length", "output_length"),
    ("shard", "shard"),
)
"""Configuration fields that a label names where arms differ in them, by the words it uses."""


def _labels(manifests: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
    """What was drafted, and what else tells the arms apart: where nothing in the configuration
    does, the folder, and at last a number."""
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
    folders = shortened(places)
    labels = [
        f"{label}, {folder}" if labels.count(label) > 1 and folder else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def shortened(places: Sequence[str]) -> list[str]:
    """Folders by their names; by their whole paths where two share one."""
    names = {place: PurePath(place).name for place in places}
    shared = {name for name in names.values() if list(names.values()).count(name) > 1}
    return [place if names[place] in shared else names[place] for place in places]


SHORT = ("target", "drafter")
"""Fields that are paths, of which the last part is told."""
