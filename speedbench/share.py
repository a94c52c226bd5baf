"""What one replica measures: its engine warmed up, driven over its rows, watched, its end told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from speedbench import (
    energy,
    server_counters,
    server_metrics,
    store,
)
from speedbench.config import RunConfig
from speedbench.guardian import Guard
from speedbench.inputs import Prepared, prompt_source, unfit
from speedbench.loop import EndReason, Loop, LoopEnd
from speedbench.replicas import Replicas
from speedbench.target import Target
from speedbench.types import (
    Conversation,
    ConversationRecord,
    Engine,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    Prompt,
    Sampling,
    UserError,
)
from speedbench.watchdog import Watchdog

WARMUP_TOKENS = 32
"""Tokens per warm-up request, at most: enough for every code path of a decode step."""


@dataclass(slots=True)  # mutable: what a progress display reads while the run goes on
class Progress:
    n_rows: int = 0
    failed: Sequence[str] = ()
    started_s: float = 0.0
    loop: Loop | None = None


@dataclass(frozen=True, slots=True)
class Ended:
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
class Share:
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
        abandoned: Callable[[Ended], None],
    ) -> Ended:
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

    def cut(self, reason: EndReason, message: str) -> Ended:
        """How it ends where it is ended from outside: what was committed is stored."""
        going, not_stored = self.going, ""
        now_ns = self.clock()
        end = LoopEnd(reason, message, now_ns, now_ns, 0, 0, 0)
        try:
            if going.loop is not None:  # it commits what has ended: before the writer is closed
                end = going.loop.cut(reason, message)
        finally:
            if going.writer is not None:
                try:
                    going.writer.close()
                except UserError as error:
                    not_stored = str(error)
        n_committed = 0 if going.loop is None else going.loop.n_committed
        return self._ended(end, going.met_ns, None, n_committed, len(going.failed), not_stored)

    def _looped(
        self,
        engine: Engine,
        sampling: Sampling,
        met_ns: int,
        progress: Progress | None,
        abandoned: Callable[[Ended], None],
    ) -> Ended:
        before = engine.counters()
        going, name = self.going, f"s{self.target.session}"
        writer = store.Writer(self.target.directory, self.target.session, self.replicas.rank)
        stop = first_of(deadline(self.config.max_duration), lambda: broken(writer), self.stop)
        loop = Loop(
            engine,
            prompt_source(self.config, self.prepared, self.info),
            sampling,
            output_length=self.config.output_length,
            concurrency=self.config.concurrency,
            id_prefix=f"{name}-" if self.replicas.size == 1 else f"{name}r{self.replicas.rank}-",
            commit=_noting_failures(writer, going.failed),
            stop=first_of(stop, lambda: watchdog.fault or None),
            clock=self.clock,
            arrivals=self.arrivals,
            idle=writer.give_turn,
        )
        going.loop, going.writer, going.met_ns = loop, writer, met_ns
        if progress is not None:
            progress.n_rows, progress.failed = len(self.rows), going.failed
            progress.started_s, progress.loop = time.monotonic(), loop
        watchdog = self._watchdog(loop, stop, abandoned)
        with watchdog:
            end = loop.run(self.rows)
        end = self._explained(end, watchdog, loop.n_committed == len(self.rows))
        not_stored = ""
        try:
            writer.close()
        except UserError as error:
            not_stored = str(error)
        counted = _counted(engine, before)
        n_failed = len(going.failed) + writer.n_spoilt
        return self._ended(end, met_ns, counted, loop.n_committed, n_failed, not_stored)

    def _watchdog(
        self, loop: Loop, stop: Callable[[], str | None], abandoned: Callable[[Ended], None]
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
        self, engine: Engine, sampling: Sampling, abandoned: Callable[[Ended], None]
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
    ) -> Ended:
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
        return Ended(end, len(self.rows), n_committed, n_failed, entry, not_stored)


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
    return [r for r in rows if not unfit(Prompt(r.token_turns[0], ""), output_length, info)]


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


def deadline(max_duration_s: float | None) -> Callable[[], str | None]:
    """Why to stop once that time is over."""
    end_s = None if max_duration_s is None else time.monotonic() + max_duration_s

    def check() -> str | None:
        if end_s is not None and time.monotonic() > end_s:
            return f"--max_duration of {max_duration_s:g} s was reached"
        return None

    return check


def broken(writer: store.Writer) -> str | None:
    """Why to stop once nothing can be stored."""
    return None if writer.failure is None else f"storing failed: {writer.failure}"


def first_of(*checks: Callable[[], str | None]) -> Callable[[], str | None]:
    """The first reason that any of them has."""

    def check() -> str | None:
        for one in checks:  # a generator would cost three times as much, at every poll
            if (why := one()) is not None:
                return why
        return None

    return check
