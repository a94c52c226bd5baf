"""One run, from a configuration to a run directory: the only place where engine, loop and store
meet. Prints nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from speedbench import (
    arrivals,
    draft_vocabulary,
    environment,
    store,
)
from speedbench.config import RunConfig
from speedbench.guardian import UNGUARDED, Guard
from speedbench.inputs import Prepared, within_limit
from speedbench.loop import EndReason, LoopEnd
from speedbench.replicas import ALONE, AgreedError, Replicas
from speedbench.share import Ended, Progress, Share
from speedbench.target import MACHINE, Target, refuse_changed, same_engine, same_machine
from speedbench.types import (
    Conversation,
    Engine,
    EngineInfo,
    UserError,
)

STATUS = {"finished": "complete", "stopped": "partial"}
"""Status of a run by how its last session ended; failed otherwise."""


class NotStoredError(AgreedError):
    """Not everything that was measured could be written: no further run could be, either."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a measurement ended, for whoever talks to the user."""

    end: LoopEnd
    n_rows: int
    n_committed: int
    n_failed: int
    not_stored: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process measures: for the manifest, so that times can be told comparable.

    n_cpus_given, n_cpus  CPUs its launcher bound it to, and those it used
    devices               its GPUs where they were shared out among replicas
    """

    launcher: str = ""
    n_cpus_given: int | None = None
    n_cpus: int | None = None
    devices: str | None = None


def _exit(_outcome: Outcome) -> NoReturn:
    os._exit(1)


def measure(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine | None,
    target: Target,
    *,
    argv: Sequence[str] = (),
    stop: Callable[[], str | None] = lambda: None,
    progress: Progress | None = None,
    replicas: Replicas = ALONE,
    place: Place | None = None,
    fault: str = "",
    guard: Guard = UNGUARDED,
    abandon: Callable[[Outcome], NoReturn] = _exit,
) -> Outcome:
    """Measure what is not yet committed, into the target's directory.

    `stop` is asked between steps and returns why to stop. Raises UserError if nothing can be
    measured or nothing more can be stored; what was committed stays. `abandon` ends the process,
    and is called in another thread, where the engine hangs and cannot be left. Among replicas each
    measures every size-th row, and the outcome is of them all; one whose engine did not start
    (`engine` is None, `fault` says why) takes part without measuring.
    """
    info = engine_info(engine, replicas)
    replicas.agree(lambda: same_engine(info, target))
    rows, refused = replicas.agree(lambda: within_limit(config, prepared, info))
    rows = [row for row in rows if row.id not in target.done]
    due = _arrivals(config, prepared, rows)
    rows = rows[replicas.rank :: replicas.size]
    due = None if due is None else due[replicas.rank :: replicas.size]
    clock: Callable[[], int] = getattr(engine, "now_ns", time.monotonic_ns)
    machine = _one_machine(config, argv, replicas, place or Place())
    entry = _entry(engine, target, replicas, place or Place(), argv, clock)
    entries = replicas.exchange({**entry, "concurrency": config.concurrency})  # of each replica
    with contextlib.ExitStack() as held:

        def begin() -> dict[str, Any] | None:
            if not replicas.is_first:
                return None
            if not target.manifest:
                store.create(target.directory)
            held.enter_context(store.locked(target.directory))
            refuse_changed(target)
            made = _manifest(config, prepared, info, refused, target, machine)
            made["sessions"].extend(entries)
            store.write_manifest(target.directory, made)
            draft_vocabulary.store(target.directory, config.draft_model_dir)
            return made

        manifest = replicas.agree(begin)
        if not replicas.is_first:
            lock = store.locked(target.directory, replicas.rank)
        replicas.agree(lambda: None if replicas.is_first else held.enter_context(lock))

        def concluded(ended: Ended) -> list[Ended]:
            """How all replicas ended, once that is in the manifest."""
            all_ended = replicas.exchange(ended)

            def finish() -> None:
                if manifest is not None:
                    for one_entry, one in zip(entries, all_ended, strict=True):
                        one_entry.update(one.entry)
                    manifest["status"] = _status(all_ended)
                    _write_end(target.directory, manifest, all_ended)

            replicas.agree(finish)
            return all_ended

        share = Share(config, prepared, info, target, replicas, rows, clock, stop, guard, due)

        def abandoned(ended: Ended) -> None:
            with contextlib.suppress(Exception):
                concluded(ended)
            abandon(_outcome([ended]))

        ended: Ended | None = None
        try:
            ended = share.measured(engine, fault, progress, abandoned)
            all_ended = concluded(ended)
        except BaseException as error:  # ended at once, by the user or a fault
            if replicas.size == 1:
                with contextlib.suppress(Exception):
                    ended = ended or share.cut(*_why_at_once(error, stop))
                    concluded(ended)
                if ended is not None and ended.not_stored:
                    raise NotStoredError(ended.not_stored) from None
            raise
    _raise_not_stored(all_ended)
    return _outcome(all_ended)


def _arrivals(
    config: RunConfig, prepared: Prepared, rows: Sequence[Conversation]
) -> list[int] | None:
    """When each of these rows is due, ns after the first of them; None in a closed loop."""
    if config.request_rate is None:
        return None
    every = arrivals.due_ns(
        config.request_rate, len(prepared.rows), config.arrivals, config.seed, config.duration
    )
    due_of = {row.id: int(due) for row, due in zip(prepared.rows, every, strict=True)}
    due = [due_of[row.id] for row in rows]
    return [one - due[0] for one in due]


def _why_at_once(error: BaseException, stop: Callable[[], str | None]) -> tuple[EndReason, str]:
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return "stopped", f"{stop() or 'it was interrupted'}, at once"
    what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return "crashed", what


def _entry(
    engine: Engine | None,
    target: Target,
    replicas: Replicas,
    place: Place,
    argv: Sequence[str],
    clock: Callable[[], int],
) -> dict[str, Any]:
    """A replica's entry among the manifest's sessions, as it is before its end is known."""
    own_clock = hasattr(engine, "now_ns")
    return {
        "session": target.session,
        "replica": replicas.rank,
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "started_ns": clock(),
        "ended_ns": None,
        "argv": environment.redact_argv(argv),
        "hostname": os.uname().nodename,
        "clock": f"simulated {uuid.uuid4()}" if own_clock else f"boot {_boot_id()}",
        "n_cpus": place.n_cpus,
        "devices": place.devices,
    }


def _boot_id() -> str:
    """Which start of which machine: the monotonic clock is one within it. Never the same twice."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"unknown {uuid.uuid4()}"


def engine_info(engine: Engine | None, replicas: Replicas = ALONE) -> EngineInfo:
    """What the engines of all replicas say of themselves; `engine` is None where one did not start.
    Raises UserError, on all, if they differ."""
    own = replicas.agree(lambda: None if engine is None else engine.describe())
    return _one_engine(replicas.exchange(own))


def _one_engine(infos: Sequence[EngineInfo | None]) -> EngineInfo:
    """What all replicas' engines say of themselves. Raises UserError, on all, if they differ."""
    known = {rank: info for rank, info in enumerate(infos) if info is not None}
    (first, info), *others = known.items()
    for rank, other in others:
        for name, value in environment.plain(dataclasses.asdict(info)).items():
            if (found := environment.plain(dataclasses.asdict(other))[name]) != value:
                raise AgreedError(
                    f"the engines differ: {name} is {value!r} in replica {first} and {found!r} in "
                    f"replica {rank}; give every replica the same GPUs and installation"
                )
    return info


def _one_machine(
    config: RunConfig, argv: Sequence[str], replicas: Replicas, place: Place
) -> Mapping[str, Any]:
    """The environment of replica 0. Raises UserError, on all, if another's is not comparable."""
    machine = replicas.agree(
        lambda: environment.capture(argv, (config.model_dir, config.draft_model_dir))
    )
    identities = replicas.exchange({name: machine[name] for name in MACHINE})
    for rank, identity in enumerate(identities):
        for name in MACHINE:
            if identity[name] != identities[0][name]:
                raise AgreedError(
                    f"the machines differ: {name} is {identities[0][name]!r} for replica 0 and "
                    f"{identity[name]!r} for replica {rank}; their times are not one distribution"
                )
    launched = {
        "launcher": place.launcher,
        "n_cpus_given": place.n_cpus_given,
        "n_cpus": place.n_cpus,
    }
    return {**machine, "launch": launched}


def _status(all_ended: Sequence[Ended]) -> str:
    """Of the run: complete, partial, or failed, by its worst replica."""
    found = {"failed" if one.not_stored else STATUS.get(one.end.reason, "failed")
             for one in all_ended}  # fmt: skip
    return next(status for status in ("failed", "partial", "complete") if status in found)


def _write_end(directory: Path, manifest: Mapping[str, Any], all_ended: Sequence[Ended]) -> None:
    """The manifest at the end. A disk that was full for the records is full for it, too."""
    try:
        store.write_manifest(directory, manifest)
    except OSError as error:
        if not any(one.not_stored for one in all_ended):  # else that is told
            raise NotStoredError(
                f"how the run in {directory} ended could not be stored ({error}): free space or "
                "mend the path, then --resume"
            ) from None


def _raise_not_stored(all_ended: Sequence[Ended]) -> None:
    for rank, one in enumerate(all_ended):
        if one.not_stored:
            raise NotStoredError(
                one.not_stored if len(all_ended) == 1 else f"replica {rank}: {one.not_stored}"
            )


def _outcome(all_ended: Sequence[Ended]) -> Outcome:
    """Of all replicas; the end is that of the first of those that fared worst."""
    order = ("crashed", "engine died", "stalled", "stopped", "finished")
    rank = min(range(len(all_ended)), key=lambda r: order.index(all_ended[r].end.reason))
    end = all_ended[rank].end
    if len(all_ended) > 1 and end.message:
        end = dataclasses.replace(end, message=f"replica {rank}: {end.message}")
    return Outcome(
        end,
        sum(one.n_rows for one in all_ended),
        sum(one.n_committed for one in all_ended),
        sum(one.n_failed for one in all_ended),
        next(filter(None, (one.not_stored for one in all_ended)), ""),
    )


def _manifest(
    config: RunConfig,
    prepared: Prepared,
    info: EngineInfo,
    refused: Sequence[Mapping[str, Any]],
    target: Target,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    same_machine(machine, target)
    return {
        "format": store.FORMAT,
        "status": "running",
        "config": environment.redact(config.model_dump(mode="json")),
        "engine": environment.plain(dataclasses.asdict(info)),
        "dataset": {
            "name": prepared.dataset.name,
            "path": prepared.dataset.path,
            "sha256": prepared.dataset.sha256,
            "origin": prepared.dataset.origin,
            "expected": dict(sorted(prepared.expected.items())),
            "selected": dict(sorted(prepared.n_selected.items())),
        },
        "prompts": {
            "fingerprint": prepared.fingerprint,
            "turns": "all" if prepared.all_turns else "first",
            "n_prompts": len(prepared.prompts),
            "tokenizer": config.prompts or config.tokenizer or config.model_dir,
        },
        "refused": list(refused),
        "environment": target.manifest.get("environment", machine),
        "sessions": [dict(s) for s in target.manifest.get("sessions", [])],
    }
