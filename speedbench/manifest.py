"""Manifest: what manifest.json must hold to be read. Standard library only.

A manifest is data: it may come from another machine, another version, or a disk that turned a bit.
Whoever reads one gets every value in the form that it is written in, or one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from speedbench.limits import parse_limits
from speedbench.types import UserError

DEEPEST = 50
"""Levels of lists and mappings within one another: engines' settings have five at most."""

LARGEST = 2**63 - 1
MOST = 2**31 - 1
MOST_DRAFTED = 1024
"""K, at most: histograms are as wide as it says."""

MOST_SESSIONS = 1_000_000


class Kind(NamedTuple):
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _whole(least: int = 0, most: int = LARGEST) -> Kind:
    return Kind(
        f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most
    )


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.holds(v))


def _each(kind: Kind) -> Kind:
    return Kind(
        f"a list, each {kind.words}", lambda v: isinstance(v, list) and all(map(kind.holds, v))
    )


def _by_name(kind: Kind) -> Kind:
    return Kind(
        f"a mapping, each value {kind.words}",
        lambda v: isinstance(v, dict) and all(map(kind.holds, v.values())),
    )


def _are_limits(text: str) -> bool:
    try:
        parse_limits(text)
    except ValueError:
        return False
    return True


TEXT = Kind("text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NUMBER = Kind(
    "a number from 0",
    lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < math.inf,
)
POSITIVE = Kind("a number above 0", lambda v: NUMBER.holds(v) and v > 0)
LIMITS = Kind("limits such as ttft=200ms", lambda v: isinstance(v, str) and _are_limits(v))
MAPPING = Kind("a mapping", lambda v: isinstance(v, dict))
COUNT = _whole(0, MOST)
SIZE = _whole(1, MOST)
TIME_NS = _whole()

Shape = Mapping[str, Kind]
"""Dotted path -> what stands there."""

REQUIRED: Shape = {
    "status": TEXT,
    "config": MAPPING,
    "config.engine": TEXT,
    "config.speculative_algorithm": TEXT,
    "config.draft_length": _whole(0, MOST),
    "config.concurrency": SIZE,
    "config.output_length": SIZE,
    "config.temperature": NUMBER,
    "config.prefix_cache": FLAG,
    "config.trust_remote_code": FLAG,
    "config.tp_size": SIZE,
    "config.pp_size": SIZE,
    "config.dp_size": SIZE,
    "engine": MAPPING,
    "engine.name": TEXT,
    "engine.version": TEXT,
    "engine.draft_length": _whole(0, MOST_DRAFTED),
    "engine.settings": MAPPING,
    "dataset": MAPPING,
    "dataset.name": TEXT,
    "dataset.path": _or_none(TEXT),
    "dataset.sha256": TEXT,
    "dataset.expected": _by_name(COUNT),
    "prompts": MAPPING,
    "prompts.fingerprint": TEXT,
    "prompts.turns": TEXT,
    "prompts.tokenizer": _or_none(TEXT),
    "prompts.n_prompts": COUNT,
    "environment": MAPPING,
    "environment.python": TEXT,
    "environment.packages": _by_name(TEXT),
    "sessions": _each(MAPPING),
}
"""What no manifest lacks, of any format."""

OPTIONAL: Shape = {
    "config.model_dir": _or_none(TEXT),
    "config.draft_model_dir": _or_none(TEXT),
    "config.dataset": TEXT,
    "config.dataset_path": _or_none(TEXT),
    "config.tokenizer": _or_none(TEXT),
    "config.prompts": _or_none(TEXT),
    "config.speed_config": _or_none(TEXT),
    "config.preset": _or_none(TEXT),
    "config.shard": _or_none(TEXT),
    "config.category": _each(TEXT),
    "config.engine_args": MAPPING,
    "config.dataset_kwargs": MAPPING,
    "config.chat_template_args": MAPPING,
    "config.sampling_kwargs": MAPPING,
    "config.ep_size": SIZE,
    "config.max_num_seqs": _or_none(SIZE),
    "config.max_seq_len": _or_none(SIZE),
    "config.num_requests": _or_none(SIZE),
    "config.random_isl": _or_none(SIZE),
    "config.block_size": _or_none(SIZE),
    "config.warmup": _or_none(COUNT),
    "config.top_k": COUNT,
    "config.top_p": NUMBER,
    "config.seed": TIME_NS,
    "config.ignore_eos": FLAG,
    "config.draft_sample_method": _or_none(TEXT),
    "config.url": _or_none(TEXT),
    "config.model": _or_none(TEXT),
    "config.endpoint": TEXT,
    "config.request_timeout": NUMBER,
    "config.api_key_env": _or_none(TEXT),
    "config.metrics_url": _or_none(TEXT),
    "config.no_server_metrics": FLAG,
    "config.order": TEXT,
    "config.postprocess": TEXT,
    "config.history": TEXT,
    "config.history_from": _or_none(TEXT),
    "config.request_rate": _or_none(POSITIVE),
    "config.arrivals": Kind("poisson or constant", lambda v: v in ("poisson", "constant")),
    "config.duration": _or_none(POSITIVE),
    "config.goodput": _or_none(LIMITS),
    "config.max_duration": _or_none(NUMBER),
    "config.stall_timeout": NUMBER,
    "config.save_dir": _or_none(TEXT),
    "config.show_progress": _or_none(FLAG),
    "config.completions": FLAG,
    "config.capture_experts": FLAG,
    "engine.unused": _each(TEXT),
    "engine.sampling_fault": TEXT,
    "engine.max_seq_len": _or_none(SIZE),
    "engine.max_num_seqs": _or_none(SIZE),
    "engine.vocab_size": _or_none(SIZE),
    "engine.prefix_cache": _or_none(FLAG),
    "engine.tells_drafted": FLAG,
    "engine.fits_drafts": FLAG,
    "engine.simulated": FLAG,
    "dataset.selected": _by_name(COUNT),
    "dataset.origin": _or_none(_by_name(TEXT)),
    "refused": _each(MAPPING),
    "merged": _each(TEXT),
    "missing_shards": _each(TEXT),
    "known_answer": _or_none(MAPPING),
    "known_answer.sentence": TEXT,
    "known_answer.by_category": _by_name(_or_none(NUMBER)),
    "environment.argv": _each(TEXT),
    "environment.gpus": _each(_by_name(_or_none(TEXT))),
    "environment.checkpoints": _by_name(MAPPING),
    "environment.git": _or_none(MAPPING),
    "environment.launch": MAPPING,
    "environment.hostname": TEXT,
    "environment.cpu": TEXT,
    "environment.platform": TEXT,
    "environment.n_cpus": SIZE,
}
"""What is of this form where it is there."""

SESSION: Shape = {
    "session": _whole(0, MOST_SESSIONS),
    "started_ns": TIME_NS,
    "ended_ns": _or_none(TIME_NS),
}
SESSION_OPTIONAL: Shape = {
    "replica": _whole(0, MOST_SESSIONS),
    "started_at": TEXT,
    "met_ns": _or_none(TIME_NS),
    "end": _or_none(TEXT),
    "message": _or_none(TEXT),
    "n_uncommitted": _or_none(COUNT),
    "n_uncommitted_tokens": _or_none(TIME_NS),
    "n_stray_steps": _or_none(TIME_NS),
    "counters": _or_none(MAPPING),
    "hostname": TEXT,
    "clock": TEXT,
    "n_cpus": _or_none(COUNT),
    "devices": _or_none(TEXT),
    "energy": _or_none(TEXT),
    "argv": _each(TEXT),
    "concurrency": COUNT,
    "client_busy": _or_none(NUMBER),
    "server_metrics": _or_none(MAPPING),
    "server_metrics.sources": _each(TEXT),
    "why_no_counters": _or_none(TEXT),
    "served_others": _or_none(FLAG),
}
COUNTERS: Shape = {
    "counters.drafts": TIME_NS,
    "counters.draft_tokens": TIME_NS,
    "counters.accepted": TIME_NS,
}
COUNTERS_OPTIONAL: Shape = {"counters.accepted_per_position": _each(TIME_NS)}
REFUSED: Shape = {"id": TEXT, "reason": TEXT}


def parse(text: str) -> Any:
    """JSON in which no key stands twice (the first would be lost); numbers that are not finite, for
    which JSON has no word, are null. Raises ValueError."""
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=lambda _: None, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it holds too many lists within one another") from None


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one mapping")
    return found


def refuse_damaged(manifest: Any, where: str) -> None:
    """Raise UserError for what is no manifest, or is not as it was written. `where`: the file."""
    if not isinstance(manifest, dict):
        raise UserError(f"{where} is no speedbench manifest: it lacks a format number")
    _refuse_deep(manifest, where)
    _check(manifest, REQUIRED, OPTIONAL, where)
    for number, session in enumerate(manifest["sessions"]):
        place = f"{where}, sessions[{number}]"
        _check(session, SESSION, SESSION_OPTIONAL, place)
        if session.get("counters") is not None:
            _check(session, COUNTERS, COUNTERS_OPTIONAL, place)
    starts = [(one["session"], one.get("replica", 0)) for one in manifest["sessions"]]
    if len(set(starts)) < len(starts):
        raise UserError(
            f"{where} tells of one session twice, and its counters would count twice: restore it "
            "from a copy"
        )
    for number, row in enumerate(manifest.get("refused", ())):
        _check(row, REFUSED, {}, f"{where}, refused[{number}]")


def _check(found: Mapping[str, Any], required: Shape, optional: Shape, where: str) -> None:
    for shape, must in ((required, True), (optional, False)):
        for path, kind in shape.items():
            value, is_there = _at(found, path)
            if (is_there and not kind.holds(value)) or (must and not is_there):
                what = f"is {_shown(value)}" if is_there else "is missing"
                raise UserError(
                    f"{where} is not as speedbench wrote it: '{path}' {what}, expected "
                    f"{kind.words}; restore it from a copy"
                )


def _at(found: Any, path: str) -> tuple[Any, bool]:
    """The value at a dotted path, and whether there is one."""
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            return None, False
        found = found[name]
    return found, True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_deep(manifest: Mapping[str, Any], where: str) -> None:
    if _is_deeper(manifest, DEEPEST):
        raise UserError(
            f"{where} holds more than {DEEPEST} lists or mappings within one another: restore it "
            "from a copy"
        )


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(one, levels - 1) for one in inner)
