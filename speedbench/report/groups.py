"""Groups: which arms differ in nothing but speculation and load, and which drafter each has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from speedbench.report.arms import LABELLED, NOT_IDENTITY, SHORT, Arm, identity, shortened
from speedbench.store import n_replicas_of

OF_SPECULATION = (
    "speculative_algorithm", "draft_model_dir", "draft_length", "draft_sample_method", "block_size",
)  # fmt: skip
OF_LOAD = ("concurrency", "max_num_seqs", "warmup")


def settings(arms: Sequence[Arm]) -> list[str]:
    """A label for each arm's setting: what tells it from the others, '' where there is one.

    Folders that hold the same arm are settings of their own: they were measured at two times.
    """
    keys = [_setting(arm.manifest) for arm in arms]
    if _is_repeated(keys, arms):
        keys = [f"{arm.series}\n{key}" for key, arm in zip(keys, arms, strict=True)]
    first = dict(reversed(list(zip(keys, arms, strict=True))))
    manifests = [arm.manifest for arm in first.values()]
    folders = dict(zip(first, shortened([arm.series for arm in first.values()]), strict=True))
    labels: dict[str, str] = {}
    for number, key in enumerate(dict.fromkeys(keys), 1):
        words = _words(first[key].manifest, manifests)
        if len(set(folders.values())) > 1 and folders[key]:
            words = f"{words}, {folders[key]}" if words else folders[key]
        taken = words in labels.values() or not words
        labels[key] = f"{words} ({number})".strip() if taken and len(first) > 1 else words
    return [labels[key] for key in keys]


def _is_repeated(keys: Sequence[str], arms: Sequence[Arm]) -> bool:
    """Whether one arm is there in two series."""
    each = {(key, identity(arm.manifest)) for key, arm in zip(keys, arms, strict=True)}
    return len(each) < len(arms)


def _words(manifest: Mapping[str, Any], all_of_them: Sequence[Mapping[str, Any]]) -> str:
    config = manifest["config"]
    parts = []
    for word, name in LABELLED:
        values = {str(one["config"].get(name)) for one in all_of_them}
        if name in (*OF_SPECULATION, *OF_LOAD) or len(values) < 2 or config.get(name) is None:
            continue
        parts.append(f"{word} {PurePath(config[name]).name if word in SHORT else config[name]}")
    engines = {(one["engine"]["name"], one["engine"]["version"]) for one in all_of_them}
    if len(engines) > 1:
        parts.insert(0, f"{manifest['engine']['name']} {manifest['engine']['version']}")
    return ", ".join(parts)


def _setting(manifest: Mapping[str, Any]) -> str:
    """Equal for arms that may be held against each other at one concurrency."""
    left_out = {*OF_SPECULATION, *OF_LOAD, *NOT_IDENTITY, "engine_args"}
    config = {k: v for k, v in manifest["config"].items() if k not in left_out}
    arguments = manifest["config"].get("engine_args", {})
    machine = manifest["environment"]
    found = {
        "config": config,
        "engine_args": {k: v for k, v in arguments.items() if not k.startswith("speculative_")},
        "engine": [manifest["engine"].get(name) for name in ("name", "version")],
        "fingerprint": manifest["prompts"].get("fingerprint"),
        "n_replicas": n_replicas_of(manifest),
        "machine": [machine.get("cpu"), machine.get("gpus")],
    }
    return json.dumps(found, sort_keys=True, default=str)


def drafters(arms: Sequence[Arm]) -> list[str]:
    """What drafts in each arm, as short as tells them apart; '' without speculation."""
    keys = [_drafter(arm.manifest) for arm in arms]
    known = dict.fromkeys(key for key in keys if key is not None)
    algorithms = [key[0] for key in known]
    names: dict[tuple[str, ...], str] = {}
    for key in known:
        name = key[0]
        if algorithms.count(name) > 1 and key[1]:
            name = f"{name} {PurePath(key[1]).name}"
        if name in names.values():
            name = f"{name} ({sum(other.startswith(name) for other in names.values()) + 1})"
        names[key] = name
    return ["" if key is None else names[key] for key in keys]


def _drafter(manifest: Mapping[str, Any]) -> tuple[str, ...] | None:
    config = manifest["config"]
    if int(manifest["engine"]["draft_length"]) == 0:
        return None
    arguments = config.get("engine_args", {})
    spoken = {k: v for k, v in arguments.items() if k.startswith("speculative_")}
    return (
        str(config["speculative_algorithm"]),
        str(config.get("draft_model_dir") or ""),
        json.dumps([config.get("draft_sample_method"), spoken], sort_keys=True, default=str),
    )
