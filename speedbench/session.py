"""One run, from a configuration to a run directory: the only place where engine, loop and store
meet. Prints nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from speedbench import (
    arrivals,
    chat,
    datasets,
    draft_vocabulary,
    energy,
    environment,
    prompts,
    server_counters,
    server_metrics,
    store,
)
from speedbench.config import RunConfig
from speedbench.datasets import tokens
from speedbench.guardian import UNGUARDED, Guard
from speedbench.loop import EndReason, Loop, LoopEnd, PromptFor
from speedbench.replicas import ALONE, AgreedError, Replicas
from speedbench.types import (
    UNKNOWN,
    Conversation,
    ConversationRecord,
    Engine,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    Prompt,
    PromptRefusedError,
    Sampling,
    UserError,
)
from speedbench.watchdog import Watchdog

STATUS = {"finished": "complete", "stopped": "partial"}
"""Status of a run by how its last session ended; failed otherwise."""

WARMUP_TOKENS = 32
"""Tokens per warm-up request, at most: enough for every code path of a decode step."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's input, complete before any engine starts.

    rows         what is to be asked: the configured share of the selected rows
    prompts      (conversation id, turn) -> prompt, of all first turns, and of all turns where
                 the history is frozen; of the other shares' rows, too
    fingerprint  sha256 over those
    n_selected   category -> rows selected, of which `rows` are a share
    is_chat      the prompts are sent as text, as messages, and fingerprinted as such
    """

    dataset: datasets.Dataset
    rows: tuple[Conversation, ...]
    encoder: prompts.PromptEncoder | None
    prompts: Mapping[tuple[str, int], Prompt]
    fingerprint: str
    all_turns: bool
    stop_token_ids: tuple[int, ...] = ()
    n_selected: Mapping[str, int] = field(default_factory=dict)
    is_chat: bool = False

    @property
    def expected(self) -> Counter[str]:
        return Counter(row.category for row in self.rows)


def prepare(config: RunConfig) -> Prepared:
    """Read, select and encode what will be asked. Raises UserError."""
    refuse_missing_checkpoints(config)
    if config.prompts is not None:
        return _pretokenized(config, Path(config.prompts))
    needs_text = config.dataset != "random"
    has_tokenizer = config.tokenizer is not None or config.model_dir is not None
    if needs_text and not has_tokenizer:
        raise UserError(
            f"--dataset {config.dataset} is text and needs a tokenizer: add --model_dir or "
            "--tokenizer"
        )
    encoder = prompts.PromptEncoder(config) if has_tokenizer else None
    vocabulary: Sequence[int] = encoder.ordinary_token_ids if encoder else range(1000)
    dataset = datasets.load(config, vocabulary)
    rows = datasets.select(dataset, config)
    encoded: dict[tuple[str, int], list[int]]
    if config.history == "frozen":
        replies = _frozen_replies(config)
        rows = _with_replies(rows, replies, config)
        all_turns = _need(encoder).encode_all_turns_frozen(rows, replies)
        encoded = {
            (row.id, turn): ids
            for row, turns in zip(rows, all_turns, strict=True)
            for turn, ids in enumerate(turns)
        }
    elif encoder is not None:
        first = encoder.encode_first_turns(rows)
        encoded = {(row.id, 0): ids for row, ids in zip(rows, first, strict=True)}
    else:
        encoded = {(row.id, 0): list(row.token_turns[0]) for row in rows}
    hashed = {
        key: Prompt(ids, prompts.turn_sha256(key[0], key[1], ids)) for key, ids in encoded.items()
    }
    if config.endpoint == "chat":
        row_of = {row.id: row for row in rows}
        earlier = replies if config.history == "frozen" else {}
        hashed = {
            (name, turn): chat.prompt(row_of[name], turn, earlier.get(name, ()), ids)
            for (name, turn), ids in encoded.items()
        }
    share = _due_rows(rows[config.share], config)
    if not share:
        raise UserError(
            f"--shard {config.shard} of {len(rows)} rows is empty: use at most {len(rows)} shards"
        )
    return Prepared(
        dataset,
        share,
        encoder,
        hashed,
        prompts.fingerprint({key: prompt.sha256 for key, prompt in hashed.items()}),
        config.history == "frozen" or all(row.n_turns == 1 for row in rows),
        encoder.eos_token_ids if encoder else (),
        Counter(row.category for row in rows),
        config.endpoint == "chat",
    )


def _due_rows(rows: Sequence[Conversation], config: RunConfig) -> tuple[Conversation, ...]:
    """Of an open loop, those that come before --duration is over."""
    if config.request_rate is None or config.duration is None:
        return tuple(rows)
    due = arrivals.due_ns(
        config.request_rate, len(rows), config.arrivals, config.seed, config.duration
    )
    return tuple(rows[: len(due)])


NOT_INPUT = frozenset(
    {
        "tp_size", "pp_size", "dp_size", "ep_size", "max_seq_len", "prefix_cache",
        "capture_experts", "engine_args", "speculative_algorithm", "draft_model_dir",
        "draft_length", "draft_sample_method", "block_size", "output_length", "temperature",
        "top_p", "top_k", "ignore_eos", "sampling_kwargs", "concurrency", "max_num_seqs", "warmup",
        "max_duration", "stall_timeout", "goodput", "save_dir", "show_progress",
    }
)  # fmt: skip
"""Configuration fields that change nothing in what `prepare` makes."""


def input_identity(config: RunConfig) -> str:
    """Equal for configurations whose prepared input is the same, so that it is made once."""
    values = config.model_dump(mode="json", exclude=set(NOT_INPUT))
    return json.dumps(values, sort_keys=True)


def refuse_missing_checkpoints(config: RunConfig) -> None:
    """Raise UserError for a checkpoint folder that is none."""
    if config.engine != "NULL":
        _refuse_missing("model_dir", config.model_dir)
        _refuse_missing("draft_model_dir", config.draft_model_dir)


def _pretokenized(config: RunConfig, path: Path) -> Prepared:
    """The prompts of a token file, as they are: no tokenizer is loaded."""
    found = tokens.read(path)
    _same_tokenizer(found, config)
    rows = datasets.select(found.dataset, config)
    kept = {(row.id, turn) for row in rows for turn in range(row.n_turns)}
    hashed = {key: prompt for key, prompt in found.prompts.items() if key in kept}
    share = _due_rows(rows[config.share], config)
    if not share:
        raise UserError(f"--shard {config.shard} of {len(rows)} rows is empty: use fewer shards")
    return Prepared(
        found.dataset,
        share,
        None,
        hashed,
        prompts.fingerprint({key: prompt.sha256 for key, prompt in hashed.items()}),
        True,
        found.eos_token_ids,
        Counter(row.category for row in rows),
    )


def _same_tokenizer(found: tokens.TokenFile, config: RunConfig) -> None:
    """A token file must be of the model's own tokenizer, where the model's folder holds one."""
    folders: list[Mapping[str, Any]] = list(found.about["tokenizer_files"].values())
    made = folders[0].get("files", {}) if folders else {}
    for name in ("tokenizer.json", "tokenizer.model"):
        own = Path(config.model_dir or "") / name
        if config.model_dir and name in made and own.is_file():
            sha256 = hashlib.sha256(own.read_bytes()).hexdigest()
            if sha256 != made[name]:
                raise UserError(
                    f"--prompts {config.prompts} was encoded with {found.about['tokenizer']}, "
                    f"whose {name} is not that of {config.model_dir}: make one for this model"
                )


def _refuse_missing(flag: str, value: str | None) -> None:
    """Raise UserError for a checkpoint folder that is none; a hub id is left to the engine."""
    if value is None:
        return
    if not value:
        raise UserError(f"--{flag} is empty: give a checkpoint's folder or a hub id")
    path = Path(value)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"--{flag} {value} has no config.json: give the folder of a checkpoint in "
                "Hugging Face format"
            )
    elif path.exists() or path.is_absolute() or value[0] in ".~" or value.count("/") > 1:
        raise UserError(f"--{flag} {value} is no folder: give a checkpoint's folder or a hub id")


def _need(encoder: prompts.PromptEncoder | None) -> prompts.PromptEncoder:
    if encoder is None:
        raise UserError("a frozen history is text and needs a tokenizer: add --tokenizer")
    return encoder


def _frozen_replies(config: RunConfig) -> Mapping[str, tuple[str, ...]]:
    """Earlier replies as text, from a JSONL file or from the stored outputs of a run."""
    source = Path(config.history_from or "")
    if not source.is_dir():
        return prompts.read_history(source)
    run = store.load(source)
    told = run.manifest["config"]
    encoder = prompts.PromptEncoder(
        config.model_copy(update={"tokenizer": told["tokenizer"] or told["model_dir"]})
    )
    replies: dict[str, dict[int, str]] = {}
    turns = run.turns.take(run.used)
    for name, turn, reason, ids in zip(
        turns["conversation_id"].to_pylist(),
        turns["turn"].to_pylist(),
        turns["finish_reason"].to_pylist(),
        turns["output_token_ids"].to_pylist(),
        strict=True,
    ):
        if reason not in store.FAILED:
            replies.setdefault(name, {})[turn] = encoder.reply_text(ids)
    return {name: tuple(by[t] for t in sorted(by)) for name, by in replies.items()}


def _with_replies(
    rows: Sequence[Conversation], replies: Mapping[str, Sequence[str]], config: RunConfig
) -> tuple[Conversation, ...]:
    """All rows, checked to have a reply for every turn but the last."""
    short = [row.id for row in rows if len(replies.get(row.id, ())) < row.n_turns - 1]
    if short:
        raise UserError(
            f"--history_from {config.history_from} lacks replies for {len(short)} row(s), first "
            f"{short[0]!r}: give a source that holds every turn, or leave those rows out"
        )
    return tuple(rows)


# ---------------------------------------------------------------- measuring


@dataclass(slots=True)  # mutable: what a progress display reads while the run goes on
class Progress:
    n_rows: int = 0
    failed: Sequence[str] = ()
    started_s: float = 0.0
    loop: Loop | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run goes: a new directory, or one whose committed conversations are kept."""

    directory: Path
    done: frozenset[str] = frozenset()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> int:
        """The number of the session to come."""
        return 1 + max((s["session"] for s in self.manifest.get("sessions", [])), default=-1)

    def is_complete(self, prepared: Prepared) -> bool:
        """Whether a stored run holds all that it can: every row committed, or refused."""
        refused = {row["id"] for row in self.manifest.get("refused", [])}
        return bool(self.manifest) and {row.id for row in prepared.rows} <= self.done | refused


def resumed_target(directory: Path, config: RunConfig, prepared: Prepared) -> Target:
    """Continue a stored run. Raises UserError, naming the field, if it measured something else."""
    manifest = store.read_manifest(directory)
    for name, was, now in (
        ("dataset", manifest["dataset"]["sha256"], prepared.dataset.sha256),
        ("prompts", manifest["prompts"]["fingerprint"], prepared.fingerprint),
    ):
        if was != now:
            raise UserError(
                f"the {name} of {directory} had sha256 {was[:12]}, it is {now[:12]} now: restore "
                "the files it was measured on, or start a new run"
            )
    done = {name for name, ok in store.committed(directory).items() if ok}
    return Target(directory, frozenset(done), manifest)


def call_complete(target: Target) -> None:
    """Correct the status of a run that ended early, but after its last row was committed."""
    if target.manifest["status"] == "complete":
        return
    with store.locked(target.directory):  # refused while that run is still going on
        manifest = store.read_manifest(target.directory)
        store.write_manifest(target.directory, {**manifest, "status": "complete"})


class NotStoredError(AgreedError):
    """Not everything that was measured could be written: no further run could be, either."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a measurement ended, for whoever talks to the user."""

    end: LoopEnd
    n_rows: int
    n_committed: int
    n_failed: int


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
    replicas.agree(lambda: _same_engine(info, target))
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
            _refuse_changed(target)
            made = _manifest(config, prepared, info, refused, target, machine)
            made["sessions"].extend(entries)
            store.write_manifest(target.directory, made)
            draft_vocabulary.store(target.directory, config.draft_model_dir)
            return made

        manifest = replicas.agree(begin)
        if not replicas.is_first:
            lock = store.locked(target.directory, replicas.rank)
        replicas.agree(lambda: None if replicas.is_first else held.enter_context(lock))

        def concluded(ended: _Ended) -> list[_Ended]:
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

        share = _Share(config, prepared, info, target, replicas, rows, clock, stop, guard, due)

        def abandoned(ended: _Ended) -> None:
            with contextlib.suppress(Exception):
                concluded(ended)
            abandon(_outcome([ended]))

        ended: _Ended | None = None
        try:
            ended = share.measured(engine, fault, progress, abandoned)
            all_ended = concluded(ended)
        except BaseException as error:  # ended at once, by the user or a fault
            if replicas.size == 1:
                with contextlib.suppress(Exception):
                    concluded(ended or share.cut(*_why_at_once(error, stop)))
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


@dataclass(frozen=True, slots=True)
class _Ended:
    """How one replica ended: its entry in the manifest, and why not all could be stored."""

    end: LoopEnd
    n_rows: int
    n_committed: int
    n_failed: int
    entry: Mapping[str, Any]
    not_stored: str = ""


@dataclass(slots=True)  # mutable: what is going on, for whoever must end it from outside
class _Going:
    loop: Loop | None = None
    writer: store.Writer | None = None
    met_ns: int = 0
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one replica measures."""

    config: RunConfig
    prepared: Prepared
    info: EngineInfo
    target: Target
    replicas: Replicas
    rows: Sequence[Conversation]
    clock: Callable[[], int]
    stop: Callable[[], str | None]
    guard: Guard
    arrivals: Sequence[int] | None
    going: _Going = field(default_factory=_Going)

    def measured(
        self,
        engine: Engine | None,
        fault: str,
        progress: Progress | None,
        abandoned: Callable[[_Ended], None],
    ) -> _Ended:
        """Measure it, once all replicas are warm."""
        sampling = self.config.sampling(self.prepared.stop_token_ids)
        reason: EndReason = "engine died"
        message = f"the engine did not start: {fault}"
        if engine is not None:
            reason, message = self._warmed(engine, sampling, abandoned)
        if engine is None or message:
            self.replicas.meet()
            met_ns = self.clock()
            return self._ended(LoopEnd(reason, message, met_ns, met_ns, 0, 0, 0), met_ns)
        sampler = energy.Sampler(
            self.target.directory,
            self.info,
            session=self.target.session,
            replica=self.replicas.rank,
            n_gpus=self.config.n_gpus,
        )
        scraper = _scraper(self.config, self.target, self.replicas)
        with sampler, scraper:  # they take a moment to start: before the replicas meet
            self.replicas.meet()
            ended = self._looped(engine, sampling, self.clock(), progress, abandoned)
        entry = {**ended.entry, "energy": sampler.why_not}
        if self.config.url is not None:
            entry.update(_of_server(self.config, self.target, entry, scraper))
            entry["client_busy"] = _client_busy(engine)
        return dataclasses.replace(ended, entry=entry)

    def cut(self, reason: EndReason, message: str) -> _Ended:
        """How it ends where it is ended from outside: what was committed is stored."""
        going, not_stored = self.going, ""
        if going.writer is not None:
            try:
                going.writer.close()
            except UserError as error:
                not_stored = str(error)
        now_ns = self.clock()
        end = LoopEnd(reason, message, now_ns, now_ns, 0, 0, 0)
        if going.loop is not None:
            end = going.loop.cut(reason, message)
        n_done = 0 if going.loop is None else going.loop.n_done
        return self._ended(end, going.met_ns, None, n_done, len(going.failed), not_stored)

    def _looped(
        self,
        engine: Engine,
        sampling: Sampling,
        met_ns: int,
        progress: Progress | None,
        abandoned: Callable[[_Ended], None],
    ) -> _Ended:
        before = engine.counters()
        going, name = self.going, f"s{self.target.session}"
        writer = store.Writer(self.target.directory, self.target.session, self.replicas.rank)
        stop = _first_of(_deadline(self.config.max_duration), lambda: _broken(writer), self.stop)
        loop = Loop(
            engine,
            _prompt_source(self.config, self.prepared, self.info),
            sampling,
            output_length=self.config.output_length,
            concurrency=self.config.concurrency,
            id_prefix=f"{name}-" if self.replicas.size == 1 else f"{name}r{self.replicas.rank}-",
            commit=_noting_failures(writer, going.failed),
            stop=_first_of(stop, lambda: watchdog.fault or None),
            clock=self.clock,
            arrivals=self.arrivals,
        )
        going.loop, going.writer, going.met_ns = loop, writer, met_ns
        if progress is not None:
            progress.n_rows, progress.failed = len(self.rows), going.failed
            progress.started_s, progress.loop = time.monotonic(), loop
        watchdog = self._watchdog(loop, stop, abandoned)
        with watchdog:
            end = loop.run(self.rows)
        end = self._explained(end, watchdog, loop.n_done == len(self.rows))
        not_stored = ""
        try:
            writer.close()
        except UserError as error:
            not_stored = str(error)
        counted = _counted(engine, before)
        n_failed = len(going.failed) + writer.n_spoilt
        return self._ended(end, met_ns, counted, loop.n_done, n_failed, not_stored)

    def _watchdog(
        self, loop: Loop, stop: Callable[[], str | None], abandoned: Callable[[_Ended], None]
    ) -> Watchdog:
        """One that ends the run in our name if the engine cannot be left."""
        replica = f"-r{self.replicas.rank}" if self.replicas.rank else ""
        return Watchdog(
            loop,
            self.config.stall_timeout,
            stacks=self.target.directory / "stalls" / f"{self.target.session:05d}{replica}.txt",
            stop=stop,
            abandon=lambda dog: abandoned(self.cut(_fault_of(dog), dog.fault)),
            guard=self.guard,
        )

    def _explained(self, end: LoopEnd, watchdog: Watchdog, is_all_done: bool) -> LoopEnd:
        """The end by its cause, which is not always what the loop saw."""
        if end.reason == "stopped" and is_all_done:
            # The reason to stop came when nothing was left to stop.
            return dataclasses.replace(end, reason="finished", message="")
        if watchdog.fault and end.reason != "finished":
            return dataclasses.replace(end, reason=_fault_of(watchdog), message=watchdog.fault)
        if end.reason == "engine died" and (why := self.stop()) is not None:
            # A terminal's Ctrl-C reaches the engine's processes, too.
            return dataclasses.replace(end, reason="stopped", message=why)
        return end

    def _warmed(
        self, engine: Engine, sampling: Sampling, abandoned: Callable[[_Ended], None]
    ) -> tuple[EndReason, str]:
        """Warm the engine up; why it can measure nothing now, or ''. The other replicas wait."""
        loop = _warm_up_loop(self.config, self.prepared, engine, sampling, self.clock, self.stop)
        watchdog = self._watchdog(loop, self.stop, abandoned)
        try:
            with watchdog:
                end = loop.run(_warm_up_rows(self.config, self.prepared, engine))
            if end.reason == "finished":
                engine.forget()
        except Exception as error:
            if self.replicas.size == 1 and isinstance(error, UserError):
                raise
            told = isinstance(error, (UserError, EngineDiedError))
            what = str(error) if told else f"{type(error).__name__}: {error}"
            return "engine died", f"the engine did not outlive its warm-up: {what}"
        if watchdog.fault:
            return _fault_of(watchdog), f"in the warm-up, {watchdog.fault}"
        return "finished", ""

    def _ended(
        self,
        end: LoopEnd,
        met_ns: int,
        counted: EngineCounters | None = None,
        n_committed: int = 0,
        n_failed: int = 0,
        not_stored: str = "",
    ) -> _Ended:
        entry = {
            "started_ns": end.started_ns,
            "ended_ns": end.ended_ns,
            "met_ns": met_ns if self.replicas.size > 1 else None,
            "end": end.reason,
            "message": end.message,
            "n_uncommitted": end.n_uncommitted,
            "n_uncommitted_tokens": end.n_uncommitted_tokens,
            "n_stray_steps": end.n_stray_steps,
            "counters": None if counted is None else dataclasses.asdict(counted),
        }
        return _Ended(end, len(self.rows), n_committed, n_failed, entry, not_stored)


def _scraper(config: RunConfig, target: Target, replicas: Replicas) -> server_metrics.Scraper:
    """What reads the server's metrics beside the measurement; nothing where there is no server."""
    why_not = "there is no server" if config.url is None else ""
    if config.no_server_metrics:
        why_not = "--no_server_metrics was given"
    elif replicas.size > 1:
        why_not = "several replicas ask one server, and its counters cannot tell them apart"
    return server_metrics.Scraper(
        target.directory,
        server=config.url or "",
        addresses=server_metrics.addresses_of(config.metrics_url),
        session=target.session,
        why_not=why_not,
    )


def _client_busy(engine: Engine) -> float | None:
    """Part of its busiest second that the process which asked the server computed."""
    busy: Callable[[], float | None] = getattr(engine, "client_busy", lambda: None)
    try:
        return busy()
    except Exception:  # noqa: BLE001 - of a dead engine: what was measured must be described
        return None


def _of_server(
    config: RunConfig,
    target: Target,
    entry: Mapping[str, Any],
    scraper: server_metrics.Scraper,
) -> Mapping[str, Any]:
    """What the server's own counters say of this session, for its entry in the manifest: they are
    kept as every engine's are, where they are of this session alone."""
    told = {"sources": list(scraper.sources), "why_not": scraper.why_not}
    whole = {**entry, "session": target.session, "server_metrics": told}
    try:
        reading = server_counters.of_session(
            target.directory, config.model_dump(mode="json"), whole
        )
    except Exception as error:  # noqa: BLE001 - what was measured must still be described
        return {
            "server_metrics": told,
            "counters": None,
            "why_no_counters": f"they cannot be read ({error})",
        }
    counters = None if reading.counters is None else dataclasses.asdict(reading.counters)
    why = reading.why_not or reading.why_no_al
    return {
        "server_metrics": told,
        "counters": counters,
        "why_no_counters": why,
        "served_others": reading.served_others,
    }


def _counted(engine: Engine, before: EngineCounters | None) -> EngineCounters | None:
    try:
        after = engine.counters()
    except Exception:  # noqa: BLE001 - of a dead engine: what was measured must still be described
        return None
    return None if before is None or after is None else after.since(before)


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
        for name, value in _plain(dataclasses.asdict(info)).items():
            if (found := _plain(dataclasses.asdict(other))[name]) != value:
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


def _status(all_ended: Sequence[_Ended]) -> str:
    """Of the run: complete, partial, or failed, by its worst replica."""
    found = {"failed" if one.not_stored else STATUS.get(one.end.reason, "failed")
             for one in all_ended}  # fmt: skip
    return next(status for status in ("failed", "partial", "complete") if status in found)


def _write_end(directory: Path, manifest: Mapping[str, Any], all_ended: Sequence[_Ended]) -> None:
    """The manifest at the end. A disk that was full for the records is full for it, too."""
    try:
        store.write_manifest(directory, manifest)
    except OSError as error:
        if not any(one.not_stored for one in all_ended):  # else that is told
            raise NotStoredError(
                f"how the run in {directory} ended could not be stored ({error}): free space or "
                "mend the path, then --resume"
            ) from None


def _raise_not_stored(all_ended: Sequence[_Ended]) -> None:
    for rank, one in enumerate(all_ended):
        if one.not_stored:
            raise NotStoredError(
                one.not_stored if len(all_ended) == 1 else f"replica {rank}: {one.not_stored}"
            )


def _outcome(all_ended: Sequence[_Ended]) -> Outcome:
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
    )


def _refuse_changed(target: Target) -> None:
    """Under the lock: the stored run must be as it was when its committed rows were read."""
    if not target.manifest:
        store.refuse_existing(target.directory)
        return
    now = store.read_manifest(target.directory)
    if now["sessions"] != target.manifest["sessions"]:
        raise UserError(
            f"{target.directory} was continued by another process meanwhile: start --resume again"
        )


def _same_engine(info: EngineInfo, target: Target) -> None:
    """A resumed run must go on with the engine it began with."""
    was = target.manifest.get("engine")
    if was is None:
        return
    now = environment.redact(_plain(dataclasses.asdict(info)))  # as it was stored
    for name, value in now.items():
        if name in was and was[name] != value:  # an older format does not tell them all
            raise UserError(
                f"{target.directory} was measured with {name} = {was.get(name)!r}, the engine now "
                f"says {value!r}: resume on the same engine and machine, or start a new run"
            )


MACHINE = ("cpu", "gpus", "checkpoints")
"""What in the environment must be the same: times of two machines are not one distribution."""


def _same_machine(machine: Mapping[str, Any], target: Target) -> None:
    was = target.manifest.get("environment", {})
    for name in MACHINE:
        if target.manifest and was.get(name) != machine[name]:
            raise UserError(
                f"{target.directory} was measured with other {name} ({was.get(name)!r}) than are "
                f"here ({machine[name]!r}): resume where it began, or start a new run"
            )


def within_limit(
    config: RunConfig, prepared: Prepared, info: EngineInfo
) -> tuple[list[Conversation], list[dict[str, Any]]]:
    """Rows whose known prompts the engine can take, and a record of each that is refused. Raises
    UserError if there is none."""
    rows: list[Conversation] = []
    refused: list[dict[str, Any]] = []
    for row in prepared.rows:
        known = [p for t in range(row.n_turns) if (p := prepared.prompts.get((row.id, t)))]
        longest = max(known, key=lambda prompt: len(prompt.token_ids))
        reasons = (_unfit(prompt, config.output_length, info) for prompt in known)
        if reason := next(filter(None, reasons), ""):
            refused.append(
                {
                    "id": row.id,
                    "category": row.category,
                    "n_prompt_tokens": len(longest.token_ids),
                    "reason": reason,
                }
            )
        else:
            rows.append(row)
    if not rows:
        raise UserError(
            f"none of the {len(refused)} rows can be asked, the first because "
            f"{refused[0]['reason']}"
        )
    return rows, refused


def _unfit(prompt: Prompt, output_length: int, info: EngineInfo) -> str:
    """Why the engine cannot take a prompt, or ''. A token outside the vocabulary would not fail
    its own request: it kills the engine."""
    n_prompt = len(prompt.token_ids)
    if info.max_seq_len is not None and n_prompt + output_length > info.max_seq_len:
        return (
            f"its prompt of {n_prompt} tokens and an output of {output_length} exceed the engine's "
            f"limit of {info.max_seq_len}: lower --output_length, or raise --max_seq_len as far as "
            "the model allows"
        )
    if info.vocab_size is not None and max(prompt.token_ids, default=0) >= info.vocab_size:
        return (
            f"it holds token {max(prompt.token_ids)}, the model's vocabulary ends at "
            f"{info.vocab_size}: use the tokenizer that belongs to the model"
        )
    return ""


def _prompt_source(config: RunConfig, prepared: Prepared, info: EngineInfo) -> PromptFor:
    """First (or frozen) turns from memory; a live later turn is encoded when it is asked for."""

    def prompt_for(row: Conversation, turn: int, replies: Sequence[Sequence[int] | str]) -> Prompt:
        try:
            prompt = prompt_of(prepared, row, turn, replies)
        except UserError as refusal:  # a template that does not take this turn
            raise PromptRefusedError(str(refusal)) from None
        if turn and (reason := _unfit(prompt, config.output_length, info)):
            raise PromptRefusedError(f"turn {turn} was refused: {reason}")
        return prompt

    return prompt_for


def prompt_of(
    prepared: Prepared, row: Conversation, turn: int, replies: Sequence[Sequence[int] | str]
) -> Prompt:
    """The prompt of a turn, given the earlier replies: token IDs, or the text of a chat. Raises
    UserError for a turn that cannot be asked."""
    known = prepared.prompts.get((row.id, turn))
    if known is not None:
        return known
    if row.token_turns or prepared.encoder is None:
        ids = list(row.token_turns[turn])
    else:
        texts = [_reply_text(reply, prepared.encoder) for reply in replies]
        ids = prepared.encoder.encode_turn_from_text(row, turn, texts)
        if prepared.is_chat:
            return chat.prompt(row, turn, texts, ids)
    return Prompt(ids, prompts.turn_sha256(row.id, turn, ids))


def _reply_text(reply: Sequence[int] | str, encoder: prompts.PromptEncoder) -> str:
    if isinstance(reply, str):
        return reply
    if UNKNOWN in reply:
        raise UserError(
            "the server tells no token IDs, so what it replied cannot become history: use "
            "--history frozen, or --endpoint chat"
        )
    return encoder.reply_text(reply)


def _warm_up_rows(config: RunConfig, prepared: Prepared, engine: Engine) -> list[Conversation]:
    """First prompts backwards, so that no cache or n-gram table holds anything of use."""
    firsts = [prepared.prompts[row.id, 0].token_ids for row in prepared.rows]
    rows = [
        Conversation(
            f"warmup-{i}", "warmup", token_turns=(tuple(reversed(firsts[i % len(firsts)])),)
        )
        for i in range(config.n_warmup)
    ]
    info, output_length = engine.describe(), min(config.output_length, WARMUP_TOKENS)
    return [r for r in rows if not _unfit(Prompt(r.token_turns[0], ""), output_length, info)]


def _warm_up_messages(prepared: Prepared, row: Conversation) -> tuple[tuple[str, str], ...]:
    if not prepared.is_chat:
        return ()
    of = prepared.rows[int(row.id.rpartition("-")[2]) % len(prepared.rows)]
    return (("user", " ".join(reversed(of.turns[0].split()))),)


def _warm_up_loop(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine,
    sampling: Sampling,
    clock: Callable[[], int],
    stop: Callable[[], str | None],
) -> Loop:
    """For requests that are not measured; what the engine learned from them is to be dropped."""
    return Loop(
        engine,
        lambda row, turn, _replies: Prompt(
            row.token_turns[turn], "", _warm_up_messages(prepared, row)
        ),
        dataclasses.replace(sampling, stop_token_ids=()),
        output_length=min(config.output_length, WARMUP_TOKENS),
        concurrency=config.concurrency,
        id_prefix="w-",
        commit=lambda _record: None,
        stop=stop,
        clock=clock,
    )


def _fault_of(watchdog: Watchdog) -> EndReason:
    """Silence is a stall, or the end that was asked for; all else is an engine of no use."""
    return "stalled" if watchdog.stalled else "stopped" if watchdog.silenced else "engine died"


def _noting_failures(
    writer: store.Writer, failed: list[str]
) -> Callable[[ConversationRecord], None]:
    def commit(record: ConversationRecord) -> None:
        if any(turn.finish_reason in store.FAILED for turn in record.turns):
            failed.append(record.conversation_id)
        writer.commit(record)

    return commit


def _deadline(max_duration_s: float | None) -> Callable[[], str | None]:
    end_s = None if max_duration_s is None else time.monotonic() + max_duration_s

    def check() -> str | None:
        if end_s is not None and time.monotonic() > end_s:
            return f"--max_duration of {max_duration_s:g} s was reached"
        return None

    return check


def _broken(writer: store.Writer) -> str | None:
    return None if writer.failure is None else f"storing failed: {writer.failure}"


def _first_of(*checks: Callable[[], str | None]) -> Callable[[], str | None]:
    def check() -> str | None:
        for one in checks:  # a generator would cost three times as much, at every poll
            if (why := one()) is not None:
                return why
        return None

    return check


def _manifest(
    config: RunConfig,
    prepared: Prepared,
    info: EngineInfo,
    refused: Sequence[Mapping[str, Any]],
    target: Target,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    _same_machine(machine, target)
    return {
        "format": store.FORMAT,
        "status": "running",
        "config": environment.redact(config.model_dump(mode="json")),
        "engine": _plain(dataclasses.asdict(info)),
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


def _plain(value: Any) -> Any:
    """JSON-able: mappings and tuples become dicts and lists, anything odd its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
