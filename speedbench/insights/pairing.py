"""Pairing: two arms of a report that differ in one thing only; what else they differ in."""

from __future__ import annotations

from speedbench.report import comparable
from speedbench.report.arms import Arm

SPECULATION = (
    "speculative_algorithm", "draft_model_dir", "draft_length", "draft_sample_method", "block_size",
)  # fmt: skip
OF_PROMPTS = frozenset({"prompts", "seed", "order"})
LENGTH = frozenset({"output_length", "ignore_eos"})
"""Random prompts are mostly run to a fixed length: told, not refused."""


def beside_speculation(base: Arm, arm: Arm) -> tuple[str, ...]:
    """In what else than speculation two arms differ, prompts included."""
    return tuple(comparable.differences(base.manifest, arm.manifest))


def beside_prompts(random: Arm, real: Arm) -> tuple[str, ...]:
    """In what else than their prompts, and how long answers may be, two arms differ."""
    mine, theirs = random.manifest, real.manifest
    found = [
        name
        for name in comparable.differences(mine, theirs)
        if name not in OF_PROMPTS and name not in LENGTH
    ]
    found += [
        name for name in SPECULATION if mine["config"].get(name) != theirs["config"].get(name)
    ]
    if random.draft_length != real.draft_length and "draft_length" not in found:
        found.append("draft_length")
    return tuple(found)


def is_random(arm: Arm) -> bool:
    return bool(arm.manifest["config"].get("dataset") == "random")
