"""Makes stored runs for tests: records through `store.Writer`, manifests as `run` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speedbench import store
from speedbench.config import from_dict
from speedbench.store import Run
from speedbench.types import ConversationRecord, FinishReason, Step, TurnRecord

MS = 1_000_000
S = 1_000_000_000

Pair = tuple[int, int]


def turn(
    request_id: str,
    lengths: Sequence[int],
    *,
    number: int = 0,
    submitted_ns: int = 0,
    ttft_ns: int = 50 * MS,
    step_ns: int = 10 * MS,
    times_ns: Sequence[int] | None = None,
    engine_steps: Sequence[int] | None = None,
    told: Sequence[Pair] | None = None,
    finish: FinishReason = "stop",
    error: str | None = None,
) -> TurnRecord:
    """A turn whose events have these numbers of tokens, the prefill first.

    told: (accepted, drafted) of every event, as an engine tells when a request ends.
    """
    times = times_ns or [submitted_ns + ttft_ns + i * step_ns for i in range(len(lengths))]
    last = len(lengths) - 1
    steps = [
        Step(
            request_id,
            times[i],
            [7] * n,
            engine_steps[i] if engine_steps else 1,
            finish_reason=finish if i == last else None,
            error=error if i == last else None,
            detail=list(told) if told is not None and i == last else None,
        )
        for i, n in enumerate(lengths)
    ]
    return TurnRecord(request_id, number, 5, "00", submitted_ns, finish, error, steps)


def conversation(
    name: str, category: str, *turns: Sequence[int] | TurnRecord, **about: Any
) -> ConversationRecord:
    """A conversation of turns, given as records or as the lengths of their events."""
    return ConversationRecord(
        name,
        category,
        tuple(
            t if isinstance(t, TurnRecord) else turn(f"{name}.{i}", t, number=i, **about)
            for i, t in enumerate(turns)
        ),
    )


def told(lengths: Sequence[int], draft_length: int, *, last: int | None = None) -> list[Pair]:
    """(accepted, drafted) of a request's events when every decode step was drafted.

    last: what the final step really accepted, where its end was cut.
    """
    pairs = [(0, 0)] + [(n - 1, draft_length) for n in lengths[1:]]
    return pairs if last is None else [*pairs[:-1], (last, draft_length)]


def manifest(
    *,
    draft_length: int = 3,
    expected: dict[str, int] | None = None,
    sessions: Sequence[dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    **other: Any,
) -> dict[str, Any]:
    speculation = (
        {"speculative_algorithm": "EAGLE3", "draft_model_dir": "/models/drafter"}
        if draft_length
        else {"speculative_algorithm": "NONE"}
    )
    chosen = {
        "engine": "VLLM",
        "model_dir": "/models/target",
        "draft_length": draft_length or 3,
        "concurrency": 2,
        **speculation,
        **(config or {}),
    }
    return {
        "format": 2,
        "status": "complete",
        "config": from_dict(chosen).model_dump(mode="json"),
        "environment": {
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "hostname": "node1",
            "cpu": "Some CPU",
            "n_cpus": 2,
            "gpus": [{"name": "NVIDIA H100", "driver_version": "570.1"}],
            "packages": {"numpy": "2.3.5", "vllm": "0.32.0"},
            "git": {"commit": "0123abcd", "dirty": False},
            "checkpoints": {
                "/models/target": {"sha256": "aa"},
                "/models/drafter": {"sha256": "bb"},
            },
            "argv": ["run.py", "--engine", "VLLM", "--model_dir", "/models/target"],
        },
        "engine": {
            "name": "VLLM",
            "version": "0.32.0",
            "draft_length": draft_length,
            "max_seq_len": 8192,
            "max_num_seqs": 64,
            "prefix_cache": False,
            "tells_drafted": True,
            "simulated": False,
            "settings": {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"},
            "unused": [],
            **(engine or {}),
        },
        "dataset": {
            "name": "speed",
            "path": "data/speed/qualitative",
            "sha256": "d" * 64,
            "expected": expected or {},
        },
        "prompts": {
            "fingerprint": "f" * 64,
            "turns": "all",
            "tokenizer": "/models/target",
            "n_prompts": 3,
        },
        "refused": [],
        "sessions": list(sessions) if sessions is not None else [session()],
        **other,
    }


def session(number: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "session": number,
        "started_at": "2026-01-02T03:04:05+00:00",
        "started_ns": 0,
        "ended_ns": 10 * S,
        "end": "finished",
        "message": "",
        "n_uncommitted": 0,
        "n_uncommitted_tokens": 0,
        "n_stray_steps": 0,
        "counters": None,
        **other,
    }


def counters(drafts: int, accepted: int, draft_length: int = 3) -> dict[str, Any]:
    return {
        "drafts": drafts,
        "draft_tokens": drafts * draft_length,
        "accepted": accepted,
        "accepted_per_position": [],
    }


def write_part(
    directory: Path, records: Iterable[ConversationRecord], number: int = 0, replica: int = 0
) -> None:
    """One more part, as session `number` of a replica writes it."""
    writer = store.Writer(directory, number, replica, interval_s=60.0)
    for record in records:
        writer.commit(record)
    writer.close()


def stored(directory: Path, records: Sequence[ConversationRecord], **about: Any) -> Run:
    """Write a run of one session, and load it. `about` goes to `manifest`."""
    about.setdefault("expected", dict(Counter(record.category for record in records)))
    store.create(directory)
    store.write_manifest(directory, manifest(**about))
    write_part(directory, records)
    return store.load(directory)
