"""A run directory: write it while the engine runs, load it, resume it.

Format history
  1  manifest.json, turns/NNNNN.parquet, steps/NNNNN.parquet
  2  a `replica` in turns, steps and sessions (0 in format 1); replica R > 0 writes
     NNNNN-rR.parquet; experts/ beside steps/, only where routed experts were asked for
  3  two optional things: draft_vocabulary.parquet (what a pruned drafter can draft) and energy/
     (what each GPU drew, sampled while the session went on)
  4  three optional things: stalls/ (what the processes of an engine that fell silent were doing),
     served/ beside steps/ (what a server told of each request) and
     server_metrics/ (what the server's /metrics said while the session went on)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import queue
import tempfile
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from speedbench import manifest as manifests
from speedbench import part
from speedbench.columns import Columns, Ints, Told
from speedbench.environment import redact, redact_text
from speedbench.processes import give_way
from speedbench.steps import ROWS, Steps
from speedbench.types import (
    UNKNOWN,
    ConversationRecord,
    FinishReason,
    RoutedExperts,
    Step,
    ToldAcceptance,
    TurnRecord,
    UserError,
)

FORMAT = 4
FAILED = ("error", "refused")
LOOKUP = ("NGRAM", "SUFFIX")
"""Algorithms that draft what was found, fewer than K tokens or none."""

TURNS = pa.schema(
    [
        ("request_id", pa.string()),
        ("session", pa.int32()),
        ("replica", pa.int32()),
        ("conversation_id", pa.string()),
        ("category", pa.string()),
        ("turn", pa.int32()),
        ("n_prompt_tokens", pa.int32()),
        ("prompt_sha256", pa.string()),
        ("submitted_ns", pa.int64()),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
        ("output_token_ids", pa.list_(pa.int32())),
    ]
)
STEPS = pa.schema(
    [
        ("request_id", pa.string()),
        ("session", pa.int32()),
        ("replica", pa.int32()),
        ("turn", pa.int32()),
        ("step", pa.int32()),
        ("time_ns", pa.int64()),
        ("engine_steps", pa.int32()),
        ("n_tokens", pa.int32()),
        ("accepted", pa.int32()),
        ("drafted", pa.int32()),
    ]
)
CODED_STEPS = STEPS.set(0, pa.field("request_id", pa.dictionary(pa.int32(), pa.string())))
"""Steps as they are read: their request's id 10 million times is hundreds of megabytes of text."""
OF_STEPS = pa.schema(
    CODED_STEPS.field(name)
    for name in ("request_id", "step", "time_ns", "engine_steps", "n_tokens", "accepted", "drafted")
)
"""What is kept of them: the rest follows from the request."""
EXPERTS = pa.schema(
    [
        ("request_id", pa.string()),
        ("session", pa.int32()),
        ("replica", pa.int32()),
        ("n_tokens", pa.int32()),
        ("n_layers", pa.int32()),
        ("top_k", pa.int32()),
        ("expert_ids", pa.binary()),  # int16, little-endian: (n_tokens, n_layers, top_k)
    ]
)
SERVED = pa.schema(
    [
        ("request_id", pa.string()),
        ("session", pa.int32()),
        ("replica", pa.int32()),
        ("sent_ns", pa.int64()),
        ("new_connection", pa.bool_()),
        ("prompt_proof", pa.string()),
        ("n_prompt_tokens", pa.int32()),  # as the server counts; null: not told
        ("n_cached_tokens", pa.int32()),
        ("acceptance_source", pa.string()),  # null: nothing told, and so below
        ("histogram", pa.list_(pa.int32())),  # [j]: verifications that accepted j, uncut
        ("n_drafted", pa.int32()),
        ("accepted", pa.list_(pa.int32())),  # of each verification in order, where told
        ("drafted", pa.list_(pa.int32())),
    ]
)
ENERGY = pa.schema(
    [
        ("time_ns", pa.int64()),  # monotonic: the clock of the steps
        ("session", pa.int32()),
        ("replica", pa.int32()),
        ("gpu", pa.int32()),  # NVML's index
        ("uuid", pa.string()),
        ("whole_gpu", pa.bool_()),  # False: the run has a MIG slice of what is counted here
        ("energy_mj", pa.int64()),  # since the driver was loaded
        ("power_mw", pa.int64()),
        ("utilization_percent", pa.int32()),
        ("sm_clock_mhz", pa.int32()),
        ("temperature_c", pa.int32()),
        ("throttle_reasons", pa.int64()),  # NVML's bits
        ("n_processes", pa.int32()),
        ("n_others", pa.int32()),  # processes that are not the run's; null: cannot be told
    ]
)
"""One row per sample and GPU; null where NVML does not tell."""
SERVER_METRICS = pa.schema(
    [
        ("time_ns", pa.int64()),  # monotonic, when it was asked for: the clock of the steps
        ("took_ns", pa.int64()),
        ("session", pa.int32()),
        ("source", pa.int32()),  # which of the addresses that the session's manifest entry names
        ("name", pa.string()),
        ("labels", pa.string()),  # a JSON object, sorted by name
        ("kind", pa.string()),  # counter, gauge, histogram, summary or untyped
        ("value", pa.float64()),
    ]
)
"""One row per scrape and series; a scrape that failed is `up` = 0 alone, its error a label. Only
the scrapes before and after the requests hold the buckets of histograms."""
_ORIGIN = {"session": 0, "replica": 0}
_MOST_ORIGIN = {"session": part.MOST, "replica": part.MOST}
LIMITS: Mapping[str, part.Limits] = {
    "turns": part.Limits(
        {**_ORIGIN, "turn": 0, "n_prompt_tokens": 0, "submitted_ns": UNKNOWN},
        {**_MOST_ORIGIN, "turn": part.MOST},
        ("replica", "error"),  # format 1 has no replica
    ),
    "steps": part.Limits(
        {
            **_ORIGIN, "turn": 0, "step": 0, "engine_steps": 0, "n_tokens": 0,
            "accepted": UNKNOWN, "drafted": UNKNOWN,
        },
        {
            **_MOST_ORIGIN, "turn": part.MOST, "engine_steps": part.MOST, "n_tokens": part.MOST,
            "accepted": part.MOST, "drafted": part.MOST,
        },
        ("replica",),
    ),
    "experts": part.Limits({**_ORIGIN, "n_tokens": 0, "n_layers": 0, "top_k": 0}, _MOST_ORIGIN),
    "served": part.Limits(
        {
            **_ORIGIN, "sent_ns": 0, "n_prompt_tokens": 0, "n_cached_tokens": 0, "n_drafted": 0,
            "histogram": 0, "accepted": UNKNOWN, "drafted": UNKNOWN,
        },
        _MOST_ORIGIN,
        (
            "n_prompt_tokens", "n_cached_tokens", "acceptance_source", "histogram", "n_drafted",
            "accepted", "drafted",
        ),
    ),
    "energy": part.Limits(
        {**_ORIGIN, "time_ns": 0, "gpu": 0, "energy_mj": 0, "power_mw": 0},
        {**_MOST_ORIGIN, "gpu": part.MOST},
        tuple(set(ENERGY.names) - {"time_ns", "session", "replica", "gpu"}),
    ),
    "server_metrics": part.Limits(
        {"session": 0, "time_ns": 0, "took_ns": 0, "source": 0}, {"session": part.MOST}
    ),
}  # fmt: skip
"""What the parts of each folder can hold."""

ENCODED: Mapping[str, Mapping[str, Any]] = {
    "experts": {},
    "served": {},
    "turns": {"row_group_size": 1024},
    "steps": {
        "row_group_size": 1 << 17,
        "use_dictionary": ["request_id"],
        "column_encoding": dict.fromkeys(set(STEPS.names) - {"request_id"}, "DELTA_BINARY_PACKED"),
        "write_statistics": ["time_ns"],
        "store_schema": False,  # names are strings, however they were handed to arrow
    },
}
"""How a part is written, beside what all have in common. Numbers that hardly differ from those of
the step before take a third of the space and half of the time like this; groups of rows are small,
because memory for a whole part's was 100 MB more."""

DRAFT_VOCABULARY = pa.schema([("token_id", pa.int32())])
DRAFT_VOCABULARY_FILE = "draft_vocabulary.parquet"
MOST_TOKENS = 1 << 24
"""Of a vocabulary: what is larger is no size of one."""
FOLDERS = ("turns", "steps", "experts", "served", "energy", "server_metrics")
OPTIONAL = ("experts", "served")
"""Folders of records that only some runs have."""
SKELETON = (".lock", ".manifest.json", ".sweep.json")
"""How the names begin of what a run, or a folder of runs, that ended before it began may leave."""


PROBE_BYTES = 1 << 16
"""What must fit where a run is to be written: its manifest and a first part."""


# ---------------------------------------------------------------- writing


def refuse_existing(directory: Path) -> None:
    """Raise UserError if a new run would meet something in its directory."""
    if directory.exists() and (not directory.is_dir() or _holds_anything(directory)):
        what = "a run" if (directory / "manifest.json").exists() else "something"
        raise UserError(
            f"{directory} already holds {what}: choose another --save_dir, or continue that run "
            "with --resume"
        )


def _holds_anything(directory: Path) -> bool:
    """Whether there is more than the empty skeleton of a run that ended before it began."""
    return any(
        (path.name not in FOLDERS and not path.name.startswith(SKELETON))
        or (path.is_dir() and any(path.iterdir()))
        for path in directory.iterdir()
    )


def create(directory: Path) -> None:
    """Make a new run directory. Raises UserError if something is there already."""
    refuse_existing(directory)
    try:
        for name in ("turns", "steps"):
            (directory / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be created ({error}): choose another --save_dir"
        ) from None


@contextlib.contextmanager
def locked(directory: Path, replica: int = 0) -> Iterator[None]:
    """Hold a replica's part of the directory; released by the kernel however the process ends.

    Replica 0 holds the directory: it also makes sure that no other replica of an earlier start is
    still writing.
    """
    name = ".lock" if replica == 0 else f".lock-r{replica}"
    if not directory.is_dir():
        raise UserError(
            f"{directory} is not there on {os.uname().nodename}: name a --save_dir that every host "
            "sees"
        )
    with _lock_file(directory / name) as handle:
        _lock(handle, directory)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} of {_user()} on {os.uname().nodename}")
        handle.flush()
        if replica == 0:
            for path in directory.glob(".lock-r*"):
                with _lock_file(path) as other:
                    _lock(other, directory)
        yield


def _lock_file(path: Path) -> IO[str]:
    """Whatever it holds, an owner's name or bytes of a damaged disk, it can be read and locked."""
    try:
        return path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({error.strerror}): mend that, or choose another --save_dir"
        ) from None


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may have no name for it
        return f"user {os.getuid()}"


def refuse_unwritable(directory: Path) -> None:
    """Before an engine is started, which takes minutes: raise UserError if a run could not be
    written there, or another process is writing it. Leaves nothing behind."""
    nearest = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written ({error.strerror}): mend that, or choose another "
            "--save_dir"
        ) from None
    for path in sorted(directory.glob(".lock*")):
        with _lock_file(path) as handle:
            _lock(handle, directory)


def _lock(handle: IO[str], directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read(200).strip() or "another process"
        raise UserError(
            f"{directory} is being written by {owner}: wait for it or choose another --save_dir"
        ) from None
    except OSError as error:  # Lustre without -o flock, say
        raise UserError(
            f"{directory} cannot be locked ({error}): choose a --save_dir on a file system with "
            "locks"
        ) from None


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Replace manifest.json in one step: readers see the old or the new one, never half. No secret
    gets there, wherever in the manifest it stands."""
    text = json.dumps(redact(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    with _replacing(directory / "manifest.json") as path:
        path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary path that becomes `target`, durably, when the block succeeds."""
    temporary = target.with_name(f".{target.name}.tmp")
    yield temporary
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


PART_STEPS = 1 << 18
"""So many steps are written without waiting for the time to come: what waits takes memory."""

TICK_S = 0.05
"""Between two looks at what was committed. A thread that is woken for every conversation takes the
interpreter from the loop each time."""

AT_ONCE_STEPS = 8_192
"""Steps made into a table at once, if no single conversation has more, which takes about a
millisecond of the interpreter: what arrives meanwhile would be stamped late."""

TURN_STEPS = 32
"""A turn takes the time of so many steps, beside its own."""

REST = 1.0
"""After that the writer rests for so many times what it took, also where the loop never waits:
each of two threads that want the interpreter has half of it, and the loop needs more."""

PATIENCE_S = 0.05
"""So long it waits for the loop to have nothing to do."""

BEHIND_STEPS = 1_000_000
"""When so many steps were committed while a part is made, it waits and rests no more."""

OVERRUN_STEPS, OVERRUN_WAIT_S = 2_000_000, 0.0002
"""When so many are, the loop waits a little before each poll: memory is not to grow without end.
That takes more than a million steps a second."""


class Writer:
    """Writes one replica's committed conversations in a thread of its own, as numbered parts.

    `commit` returns at once. A part is written about once a second at first, more rarely as the run
    grows long (at most a minute's worth is at stake), turns last: a conversation counts as stored
    when its turns part has its final name. `give_turn` is called before the engine is waited for:
    the writer needs the interpreter in such moments only.
    """

    def __init__(
        self, directory: Path, session: int, replica: int = 0, interval_s: float | None = None
    ) -> None:
        self._directory = directory
        self._origin = _Origin(session, replica)
        self._interval_s = interval_s
        self._started_s = time.monotonic()
        self._next_part = _last_part(directory, replica) + 1
        self._queue: queue.SimpleQueue[ConversationRecord] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._turn, self._wants_turn = threading.Event(), False
        self._is_overrun = False
        self._mean_steps = 0.0  # of a conversation, in the part that is being written
        self._failure: BaseException | None = None
        self._unwritten: list[ConversationRecord] = []
        self.n_spoilt = 0
        self._is_at = _identity(directory)
        self._thread = threading.Thread(target=self._work, name="speedbench-writer", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Why writing stopped (a full disk, say), or None while all is well."""
        return self._failure

    def commit(self, record: ConversationRecord) -> None:
        self._queue.put(record)

    def give_turn(self) -> None:
        if self._wants_turn:
            self._wants_turn = False
            self._turn.set()
        if self._is_overrun and self._failure is None:
            time.sleep(OVERRUN_WAIT_S)

    def close(self) -> None:
        """Write what is pending. Raises UserError if it could not all be written."""
        self._closing.set()
        self._turn.set()
        try:
            self._thread.join()
        except BaseException:  # a second signal: what is measured is stored before the end
            self._thread.join()
            raise
        if self._failure is not None:
            self._salvage()
            lost = len(self._unwritten)
            raise UserError(
                f"{self._directory} could not be written any more ({self._failure}): {lost} "
                "finished conversation(s) are not stored, all earlier ones are; free space or mend "
                "the path, then --resume"
            )

    def _salvage(self) -> None:
        """After a failed write: everything that waits once more, one conversation at a time."""
        waiting, self._unwritten = self._unwritten, []
        while not self._queue.empty():
            waiting.append(self._queue.get())
        for record in waiting:
            try:
                self._write([record])
            except Exception:  # noqa: BLE001 - counted, and told by close()
                self._unwritten.append(record)

    def _work(self) -> None:
        give_way()
        pending: list[ConversationRecord] = []
        n_steps, due_s, closing = 0, 0.0, False
        while not closing:
            closing = self._closing.wait(TICK_S)
            if not pending:
                due_s = time.monotonic() + self._interval()
            while n_steps < PART_STEPS and not self._queue.empty():
                record = self._queue.get()
                pending.append(record)
                n_steps += sum(len(turn.steps) for turn in record.turns)
            closing = closing and self._queue.empty()
            if pending and (closing or n_steps >= PART_STEPS or time.monotonic() >= due_s):
                try:
                    self._write(pending)
                except Exception as error:  # noqa: BLE001 - handed to the loop, which stops
                    self._failure, self._unwritten = error, pending
                    return
                pending, n_steps = [], 0

    def _interval(self) -> float:
        """Seconds a committed conversation may wait: 1 s at first, a sixtieth of the run, 60 s."""
        if self._interval_s is not None:
            return self._interval_s
        return max(1.0, min(60.0, (time.monotonic() - self._started_s) / 60))

    def _write(self, records: Sequence[ConversationRecord]) -> None:
        """One part. What an engine gave in place of numbers is stored as that turn's failure."""
        if _identity(self._directory) != self._is_at:
            raise OSError(f"{self._directory} is no longer the directory that the run began in")
        try:
            self._write_part(records)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # not of the disk
            sound = [_sound(record) for record in records]
            self.n_spoilt += sum(a is not b for a, b in zip(records, sound, strict=True))
            self._write_part(sound)

    def _in_turn(self, records: Sequence[ConversationRecord]) -> Mapping[str, pa.Table]:
        """The tables of a few records, made when the loop has nothing to do."""
        polite = self._is_polite()
        if polite:
            self._turn.clear()
            self._wants_turn = True
            if not self._closing.is_set():
                self._turn.wait(PATIENCE_S)
        began_s = time.thread_time()
        tables = _tables(records, self._origin)
        if polite:
            self._closing.wait(REST * (time.thread_time() - began_s))
        return tables

    def _is_polite(self) -> bool:
        """Whether there is a loop to be kept from disturbing, and time for that."""
        n_steps = self._queue.qsize() * self._mean_steps
        self._is_overrun = n_steps >= OVERRUN_STEPS
        return n_steps < BEHIND_STEPS and not self._closing.is_set()

    def _at_once(self) -> int:
        return PART_STEPS if self._closing.is_set() else AT_ONCE_STEPS

    def _write_part(self, records: Sequence[ConversationRecord]) -> None:
        name = f"{self._next_part:05d}{_suffix(self._origin.replica)}.parquet"
        n_steps = sum(len(turn.steps) for record in records for turn in record.turns)
        self._mean_steps = n_steps / len(records)
        pieces = [self._in_turn(few) for few in _in_small_numbers(records, self._at_once)]
        tables = {name: pa.concat_tables(piece[name] for piece in pieces) for name in pieces[0]}
        _refuse_odd(tables)
        for folder, table in tables.items():
            if folder in OPTIONAL and not table.num_rows:
                # Of an attempt at this part that failed, and held other conversations.
                (self._directory / folder / name).unlink(missing_ok=True)
                continue
            # Empty folders are lost where a run is copied, or fetched from an object store.
            (self._directory / folder).mkdir(exist_ok=True)
            with _replacing(self._directory / folder / name) as path:
                pq.write_table(
                    table, path, compression="zstd", write_page_checksum=True, **ENCODED[folder]
                )
        self._next_part += 1


def _identity(directory: Path) -> tuple[int, int] | None:
    """Which directory a path leads to: where a mount vanished, it is another one, or none."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _sound(record: ConversationRecord) -> ConversationRecord:
    """The record; its turns with something else where numbers must be become failures."""
    turns = tuple(_sound_turn(turn) for turn in record.turns)
    same = all(a is b for a, b in zip(turns, record.turns, strict=True))
    return record if same else replace(record, turns=turns)


def _sound_turn(turn: TurnRecord) -> TurnRecord:
    try:
        _refuse_odd(_tables([ConversationRecord("", "", (turn,))], _Origin(0, 0)))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        sentence = f"what the engine gave cannot be stored as numbers ({told})"
        return replace(turn, finish_reason="error", error=sentence, steps=())
    return turn


class _Origin(NamedTuple):
    """Which start of the run, and which replica in it, a record is of."""

    session: int
    replica: int


def _suffix(replica: int) -> str:
    """What tells the parts of replicas apart, so that each numbers its own."""
    return f"-r{replica}" if replica else ""


def _tables(records: Sequence[ConversationRecord], origin: _Origin) -> Mapping[str, pa.Table]:
    """What each folder gets of them, in the order in which it is written."""
    turns = [turn for record in records for turn in record.turns]
    return {
        "experts": _experts_table(turns, origin),
        "served": _served_table(turns, origin),
        "steps": _steps_table(turns, origin),
        "turns": _turns_table(records, turns, origin),
    }


def _refuse_odd(tables: Mapping[str, pa.Table]) -> None:
    """Raise ValueError for what would not be read again, a whole part with it."""
    for folder, table in tables.items():
        part.refuse_odd(table, LIMITS[folder])
    if (reason := _odd_reason(tables["turns"])) is not None:
        raise ValueError(f"{reason!r} is no reason to finish")


def _experts_table(turns: Sequence[TurnRecord], origin: _Origin) -> pa.Table:
    rows = [
        {
            "request_id": turn.request_id,
            "session": origin.session,
            "replica": origin.replica,
            "n_tokens": found.n_tokens,
            "n_layers": found.n_layers,
            "top_k": found.top_k,
            "expert_ids": found.expert_ids,
        }
        for turn, last in _told_last(turns)
        if (found := last.routed_experts) is not None
    ]
    return pa.Table.from_pylist(rows, schema=EXPERTS) if rows else EXPERTS.empty_table()


def _served_table(turns: Sequence[TurnRecord], origin: _Origin) -> pa.Table:
    rows = [
        {
            "request_id": turn.request_id,
            "session": origin.session,
            "replica": origin.replica,
            "sent_ns": found.sent_ns,
            "new_connection": found.new_connection,
            "prompt_proof": found.prompt_proof,
            "n_prompt_tokens": found.n_prompt_tokens,
            "n_cached_tokens": found.n_cached_tokens,
            **_told(found.acceptance),
        }
        for turn, last in _told_last(turns)
        if (found := last.served) is not None
    ]
    return pa.Table.from_pylist(rows, schema=SERVED) if rows else SERVED.empty_table()


def _told_last(turns: Sequence[TurnRecord]) -> Iterator[tuple[TurnRecord, Step]]:
    """Turns with their last steps as the engine made them: what is told as a turn ends is there."""
    return ((turn, last) for turn in turns if (last := _kept(turn).last) is not None)


def _told(acceptance: ToldAcceptance | None) -> dict[str, Any]:
    if acceptance is None:
        return {}
    return {
        "acceptance_source": acceptance.source,
        "histogram": acceptance.histogram,
        "n_drafted": acceptance.n_drafted,
        "accepted": acceptance.accepted or None,
        "drafted": acceptance.drafted or None,
    }


def _turns_table(
    records: Sequence[ConversationRecord], turns: Sequence[TurnRecord], origin: _Origin
) -> pa.Table:
    """`turns` are those of the records, in order."""
    token_ids = [_kept(turn).token_ids for turn in turns]
    columns: dict[str, Any] = {
        "request_id": [turn.request_id for turn in turns],
        "session": np.full(len(turns), origin.session, np.int32),
        "replica": np.full(len(turns), origin.replica, np.int32),
        "conversation_id": [record.conversation_id for record in records for _ in record.turns],
        "category": [record.category for record in records for _ in record.turns],
        "turn": [turn.turn for turn in turns],
        "n_prompt_tokens": [turn.n_prompt_tokens for turn in turns],
        "prompt_sha256": [turn.prompt_sha256 for turn in turns],
        "submitted_ns": [turn.submitted_ns for turn in turns],
        "finish_reason": [turn.finish_reason for turn in turns],
        "error": [None if t.error is None else redact_text(t.error) for t in turns],
        "output_token_ids": pa.ListArray.from_arrays(
            np.append(0, np.cumsum([len(ids) for ids in token_ids])).astype(np.int32),
            np.frombuffer(b"".join(token_ids), np.int32),
        ),
    }
    return pa.table(columns, schema=TURNS)


def _in_small_numbers(
    records: Sequence[ConversationRecord], at_once: Callable[[], int]
) -> Iterator[Sequence[ConversationRecord]]:
    """The records in order, in groups of about so many steps; one group at least."""
    group: list[ConversationRecord] = []
    size = 0
    for record in records:
        own = sum(TURN_STEPS + len(turn.steps) for turn in record.turns)
        if group and size + own > AT_ONCE_STEPS and size + own > at_once():
            yield group
            group, size = [], 0
        group.append(record)
        size += own
    yield group


def _steps_table(turns: Sequence[TurnRecord], origin: _Origin) -> pa.Table:
    """One row per step, from rows put end to end: this runs beside the loop, and whatever makes an
    object per step holds up the poll."""
    steps = [_kept(turn) for turn in turns]
    n_steps = np.array([len(of) for of in steps], np.int64)
    first = np.append(0, n_steps.cumsum())
    of_turn = np.repeat(np.arange(len(turns)), n_steps)
    rows = np.frombuffer(bytearray().join([of.rows for of in steps]), ROWS)
    for of, start, end in zip(steps, first, first[1:], strict=False):
        last = of.last
        if last is not None and (last.merged is not None or last.detail is not None):
            _replace_by_what_was_told_last(rows[start:end], of, last)
    columns: dict[str, Any] = {
        "request_id": pa.DictionaryArray.from_arrays(
            pa.array(of_turn.astype(np.int32)), pa.array([t.request_id for t in turns], pa.string())
        ),
        "session": _constant(origin.session, len(rows)),
        "replica": _constant(origin.replica, len(rows)),
        "turn": _compact(np.array([turn.turn for turn in turns], np.int32)[of_turn]),
        "step": (np.arange(len(rows)) - first[of_turn]).astype(np.int32),
        "time_ns": np.ascontiguousarray(rows["time_ns"]),
        **{name: _compact(rows[name]) for name in ROWS.names or () if name != "time_ns"},
    }
    return pa.table(columns, schema=CODED_STEPS)


@lru_cache(maxsize=16)
def _constants(value: int, length: int) -> pa.Array:
    return pa.array(np.full(length, value, np.int32))


def _constant(value: int, n: int) -> pa.Array:
    """(n,) int32, all the same. Most columns of a part are; kept once, they take no memory."""
    return _constants(value, max(AT_ONCE_STEPS, 1 << (n - 1).bit_length()))[:n]


def _compact(values: Ints) -> pa.Array:
    """(n,) int32."""
    if len(values) and (values == values[0]).all():
        return _constant(int(values[0]), len(values))
    return pa.array(np.ascontiguousarray(values))


def _kept(turn: TurnRecord) -> Steps:
    steps = turn.steps
    return steps if isinstance(steps, Steps) else Steps(turn.request_id, steps)


def _replace_by_what_was_told_last(rows: np.ndarray[Any, Any], steps: Steps, last: Step) -> None:
    """Acceptance and engine steps of every event of a turn, where they are told as it ends.

    An array refuses what is no integer; numpy would cut a fraction off.
    """
    if last.merged is not None:
        _refuse_other_length("counts", last.merged, steps)
        rows["engine_steps"] = array("i", last.merged)
    if last.detail is not None:
        _refuse_other_length("details", last.detail, steps)
        rows["accepted"] = array("i", [accepted for accepted, _ in last.detail])
        rows["drafted"] = array("i", [drafted for _, drafted in last.detail])


def _refuse_other_length(what: str, told: Sequence[object], steps: Steps) -> None:
    if len(told) != len(steps):
        raise ValueError(f"{steps.request_id}: {len(told)} {what} for {len(steps)} steps")


def _last_part(directory: Path, replica: int, folder: str = "turns") -> int:
    """Number of a replica's last complete part; one without its turns does not count."""
    numbers = (path.stem.partition("-") for path in (directory / folder).glob("[0-9]*.parquet"))
    mine = _suffix(replica).lstrip("-")
    return max((int(number) for number, _, owner in numbers if owner == mine), default=-1)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Run:
    """A loaded run directory.

    turns       all committed turns, as stored (an arrow table with the TURNS schema)
    used        row numbers of `turns` that `columns` holds, in its order: (R,)
    n_retried   failed conversations that a later session asked again
    damage      sentences about parts that could not be read
    computed    what was computed of this very run, by name, so that it is computed once: a report
                asks for some of it six times. `dataclasses.replace` begins with none
    """

    directory: Path
    manifest: Mapping[str, Any]
    turns: pa.Table
    used: Ints
    columns: Columns
    n_retried: int
    damage: tuple[str, ...]
    computed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


def read_manifest(directory: Path, name: str = "manifest.json") -> dict[str, Any]:
    """The manifest of a stored run. Raises UserError if there is none that can be read."""
    path = directory / name
    try:
        manifest = manifests.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is no run directory (it has no manifest.json): name the --save_dir of "
            "a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from a copy") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found < 1 or not isinstance(manifest, dict):
        raise UserError(f"{path} is no speedbench manifest: it lacks a format number")
    if found > FORMAT:
        raise UserError(
            f"{path} has format {found}, this speedbench reads up to {FORMAT}: install a newer one"
        )
    manifests.refuse_damaged(manifest, str(path))
    return manifest


def committed(directory: Path) -> dict[str, bool]:
    """Conversation id -> whether its last attempt needs no other, from the parts on disk."""
    attempts: dict[str, dict[int, bool]] = {}
    parts, _ = _read_parts(directory, with_steps=False)
    for turns, _steps in parts:
        for name, session, reason in zip(
            *(
                turns[column].to_pylist()
                for column in ("conversation_id", "session", "finish_reason")
            ),
            strict=True,
        ):
            # A refused later turn would be refused again; a failed request is tried again.
            of_name = attempts.setdefault(name, {})
            of_name[session] = of_name.get(session, True) and reason != "error"
    return {name: of_name[max(of_name)] for name, of_name in attempts.items()}


def load(directory: Path | str) -> Run:
    """Read a run directory whole. Raises UserError if it is none; damage is told, not raised."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    run = _assembled(directory, manifest, *_read_tables(directory))
    # What reading took is as much again as what it made, and the pool would keep it.
    pa.default_memory_pool().release_unused()
    return run


def load_new(directory: Path, manifest: Mapping[str, Any], seen: set[str]) -> Run:
    """The parts of a run that are not named in `seen`; afterwards they are. For who follows a run
    while it is written: conversations are whole in what this gives, the run is not."""
    new = [path for path in _parts_of(directory, "turns") if path.name not in seen]
    names = {path.name for path in new}
    seen |= names
    return _assembled(directory, manifest, *_read_tables(directory, names), names)


def union(directories: Sequence[Path], manifest: Mapping[str, Any]) -> Run:
    """Runs of several directories as one, described by `manifest`; whether they may be is asked
    elsewhere. The replicas of each are numbered on from those of the one before."""
    tables = []
    n_replicas = 0
    for number, directory in enumerate(directories):
        turns, steps, damage = _read_tables(directory)
        tables.append(
            (
                _renamed(turns, f"{number}:", n_replicas),
                _renamed_steps(steps, f"{number}:"),
                [f"{directory}: {sentence}" for sentence in damage],
            )
        )
        n_replicas += n_replicas_of(read_manifest(directory))
    return _assembled(
        Path(" + ".join(map(str, directories))),
        manifest,
        pa.concat_tables([turns for turns, _, _ in tables]),
        pa.concat_tables([steps for _, steps, _ in tables]),
        [sentence for _, _, damage in tables for sentence in damage],
    )


def n_replicas_of(manifest: Mapping[str, Any]) -> int:
    """Most engines that measured side by side in any session of a run."""
    return 1 + max((s.get("replica", 0) for s in manifest["sessions"]), default=0)


def _renamed(table: pa.Table, prefix: str, first_replica: int) -> pa.Table:
    """The same records under request ids and replica numbers that no other run has."""
    names = pa.array([prefix + name for name in table["request_id"].to_pylist()], pa.string())
    replicas = pa.array(table["replica"].to_numpy() + first_replica, pa.int32())
    return table.set_column(
        table.schema.get_field_index("request_id"), table.schema.field("request_id"), names
    ).set_column(table.schema.get_field_index("replica"), table.schema.field("replica"), replicas)


def _renamed_steps(steps: pa.Table, prefix: str) -> pa.Table:
    """Steps (OF_STEPS) under the request ids that `_renamed` gives."""
    chunks = [
        pa.DictionaryArray.from_arrays(
            chunk.indices,
            pa.array([prefix + name for name in chunk.dictionary.to_pylist()], pa.string()),
        )
        for chunk in steps["request_id"].chunks
    ]
    kind = OF_STEPS.field("request_id")
    return steps.set_column(0, kind, pa.chunked_array(chunks, kind.type))


def _assembled(
    directory: Path,
    manifest: Mapping[str, Any],
    turns: pa.Table,
    steps: pa.Table,
    damage: Sequence[str],
    only: Collection[str] | None = None,
) -> Run:
    used, n_retried = _latest_attempts(turns)
    about = turns.select([name for name in turns.column_names if name != "output_token_ids"])
    columns = _columns(about.take(pa.array(used)), steps, manifest)
    told_apart = (*damage, *_contradictions(turns, columns))
    run = Run(directory, manifest, turns, used, columns, n_retried, told_apart)
    served, unread = _read_served(run, only)
    told = _told_steps(run, served)
    return replace(run, columns=replace(columns, told=told), damage=(*run.damage, *unread))


def load_served(run: Run) -> pa.Table:
    """What a server told of the run's requests: rows of SERVED, in no order. Parts that cannot be
    read are told by `load`, and missing here."""
    return _read_served(run)[0]


def _read_served(run: Run, only: Collection[str] | None = None) -> tuple[pa.Table, list[str]]:
    tables, damage = [SERVED.empty_table()], []
    for prefix, directory in sources(run):
        for path in _parts_of(directory, "served", only):
            try:
                table = part.read(path, SERVED, LIMITS["served"])
                source, counts = table["acceptance_source"], table["histogram"]
                if pc.any(pc.and_(source.is_valid(), counts.is_null())).as_py():
                    raise part.DamagedError("acceptance was told, but not of how many")
            except part.READ_ERRORS as error:
                damage.append(f"{_unreadable(str(path), error)}: restore it from a copy")
                continue
            tables.append(_renamed(table, prefix, 0) if prefix else table)
    return pa.concat_tables(tables), damage


def _told_steps(run: Run, served: pa.Table) -> Told | None:
    """The steps of requests of whose events not each is known to be one step."""
    if not served.num_rows:
        return None
    columns = run.columns
    n = columns.n_requests
    mixed = np.bincount(columns.request[columns.engine_steps != 1], minlength=n) > 0
    n_output = np.bincount(columns.request, columns.n_tokens, n)
    names = run.turns["request_id"].take(pa.array(run.used)).to_pylist()
    request_of = {name: r for r, name in enumerate(names) if mixed[r]}
    rows = [
        (request_of[name], histogram)
        for name, histogram in zip(
            served["request_id"].to_pylist(), served["histogram"].to_pylist(), strict=True
        )
        if name in request_of and histogram is not None
    ]
    width = 1 + max((len(histogram) for _, histogram in rows), default=0)
    lengths = np.zeros((len(rows), width), np.int64)
    for row, (_, histogram) in enumerate(rows):
        lengths[row, 1 : 1 + len(histogram)] = histogram
    request = np.array([r for r, _ in rows], np.int64)
    further = n_output[request] - 1 - lengths @ np.arange(width)
    lookup = run.manifest["config"]["speculative_algorithm"] in LOOKUP
    return Told(request, lengths, further.clip(0).astype(np.int64), not (lookup and len(rows)))


def load_experts(directory: Path | str) -> dict[str, RoutedExperts]:
    """Request id -> routed experts, of the requests that `load` uses and that have any. Raises
    UserError if a part cannot be read."""
    directory = Path(directory)
    turns, _, _ = _read_tables(directory)
    used, _ = _latest_attempts(turns)
    wanted = set(turns.take(pa.array(used))["request_id"].to_pylist())
    return {name: found for name, found in _experts_in(directory) if name in wanted}


def experts_of(run: Run) -> Iterator[tuple[str, RoutedExperts]]:
    """(request id, routed experts) of every request of the run that has any, part by part: of a
    long run they are gigabytes. Raises UserError if a part cannot be read."""
    wanted = set(run.turns.take(pa.array(run.used))["request_id"].to_pylist())
    for prefix, directory in sources(run):
        for name, found in _experts_in(directory):
            if prefix + name in wanted:
                yield prefix + name, found


def _experts_in(directory: Path) -> Iterator[tuple[str, RoutedExperts]]:
    for path in _parts_of(directory, "experts"):
        for row in _read_whole(path, EXPERTS).to_pylist():
            size = 2 * row["n_tokens"] * row["n_layers"] * row["top_k"]
            if len(row["expert_ids"]) != size:
                raise UserError(
                    f"{path} holds {len(row['expert_ids'])} bytes of experts of "
                    f"{row['request_id']!r}, expected {size}: restore it from a copy"
                )
            yield (
                row["request_id"],
                RoutedExperts(row["n_tokens"], row["n_layers"], row["top_k"], row["expert_ids"]),
            )


def sources(run: Run) -> list[tuple[str, Path]]:
    """The directories a run was read from, with what its request ids begin with (see `union`)."""
    merged = run.manifest.get("merged")
    if not merged:
        return [("", run.directory)]
    return [(f"{number}:", Path(directory)) for number, directory in enumerate(merged)]


def load_energy(run: Run) -> pa.Table:
    """What the run's GPUs drew: rows of ENERGY by time, replicas numbered as in the run. Raises
    UserError if a part cannot be read."""
    tables, n_replicas = [ENERGY.empty_table()], 0
    for _, directory in sources(run):
        for path in _parts_of(directory, "energy"):
            table = _read_whole(path, ENERGY)
            place = ENERGY.get_field_index("replica")
            replicas = pa.array(table["replica"].to_numpy() + n_replicas, pa.int32())
            tables.append(table.set_column(place, ENERGY.field(place), replicas))
        if run.manifest.get("merged"):
            n_replicas += n_replicas_of(read_manifest(directory))
    return pa.concat_tables(tables).sort_by("time_ns")


def next_energy_part(directory: Path, replica: int) -> int:
    """The number that a new sampler's first part gets: earlier sessions' parts are kept."""
    return 1 + _last_part(directory, replica, "energy")


def write_energy_part(directory: Path, number: int, replica: int, table: pa.Table) -> None:
    """Write, or write again, one part of energy/."""
    _write_sampled(directory / "energy", f"{number:05d}{_suffix(replica)}", table)


def load_turns(directory: Path) -> tuple[pa.Table, list[str]]:
    """All committed turns of every session, and a sentence for each part that cannot be read."""
    parts, damage = _read_parts(directory, with_steps=False)
    return (
        pa.concat_tables([turns for turns, _ in parts]) if parts else TURNS.empty_table(),
        damage,
    )


def load_server_metrics(directory: Path) -> pa.Table:
    """What the server's /metrics said: rows of SERVER_METRICS by time. Raises UserError if a part
    cannot be read."""
    parts = _parts_of(directory, "server_metrics")
    tables = [SERVER_METRICS.empty_table(), *(_read_whole(path, SERVER_METRICS) for path in parts)]
    return pa.concat_tables(tables).sort_by("time_ns")


def next_server_metrics_part(directory: Path) -> int:
    """The number that a new session's first part gets."""
    return 1 + _last_part(directory, 0, "server_metrics")


def write_server_metrics_part(directory: Path, number: int, table: pa.Table) -> None:
    """Write, or write again, one part of server_metrics/."""
    _write_sampled(directory / "server_metrics", f"{number:05d}", table)


def _write_sampled(folder: Path, name: str, table: pa.Table) -> None:
    """Not flushed to the disk: who samples must not make the run wait for it."""
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}.parquet"
    temporary = target.with_name(f".{target.name}.tmp")
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    temporary.replace(target)


def write_draft_vocabulary(directory: Path, token_ids: Ints, about: Mapping[str, Any]) -> None:
    """Store which target tokens the run's drafter can draft, and where that was read."""
    metadata = {"draft_vocabulary": json.dumps(about, sort_keys=True)}
    table = pa.table({"token_id": pa.array(token_ids, pa.int32())}, schema=DRAFT_VOCABULARY)
    with _replacing(directory / DRAFT_VOCABULARY_FILE) as path:
        pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def load_draft_vocabulary(directory: Path) -> tuple[Ints, dict[str, Any]] | None:
    """What `write_draft_vocabulary` stored; None if nothing was. Raises UserError if it cannot be
    read."""
    path = directory / DRAFT_VOCABULARY_FILE
    if not path.exists():
        return None
    try:
        limits = part.Limits({"token_id": 0}, {"token_id": MOST_TOKENS})
        table = part.read(path, DRAFT_VOCABULARY, limits)
        about = manifests.parse(pq.read_schema(path).metadata[b"draft_vocabulary"].decode("utf-8"))
        token_ids = table["token_id"].to_numpy().astype(np.int64)
        n_tokens = about["n_tokens"]
        if n_tokens is not None and not (
            type(n_tokens) is int and token_ids.max(initial=-1) < n_tokens <= MOST_TOKENS
        ):
            raise part.DamagedError(f"its tokens are not below {n_tokens!r}")
        if (np.diff(token_ids) <= 0).any():
            raise part.DamagedError("its tokens do not ascend")
    except (*part.READ_ERRORS, KeyError, TypeError) as error:
        raise UserError(f"{_unreadable(str(path), error)}: restore it from a copy") from None
    return token_ids, about


def _read_whole(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return part.read(path, schema, LIMITS[path.parent.name])
    except part.READ_ERRORS as error:
        raise UserError(f"{_unreadable(str(path), error)}: restore it from a copy") from None


def _parts_of(directory: Path, folder: str, only: Collection[str] | None = None) -> list[Path]:
    """The parts of a folder: by replica, and by number within one. only: of these names."""

    def place(path: Path) -> tuple[str, str]:
        number, _, owner = path.stem.partition("-")
        return owner, number

    found = sorted((directory / folder).glob("[0-9]*.parquet"), key=place)
    return found if only is None else [path for path in found if path.name in only]


def _unreadable(what: str, error: Exception) -> str:
    first = (str(error).splitlines() or ["unreadable"])[0]
    return f"{what} cannot be read ({first})"


def _read_tables(
    directory: Path, only: Collection[str] | None = None
) -> tuple[pa.Table, pa.Table, list[str]]:
    """All committed turns, their steps, and a sentence for each part that cannot be read."""
    parts, damage = _read_parts(directory, with_steps=True, only=only)
    return (
        pa.concat_tables([turns for turns, _ in parts]) if parts else TURNS.empty_table(),
        pa.concat_tables([steps for _, steps in parts]) if parts else OF_STEPS.empty_table(),
        damage,
    )


def _read_parts(
    directory: Path, *, with_steps: bool, only: Collection[str] | None = None
) -> tuple[list[tuple[pa.Table, pa.Table]], list[str]]:
    """The readable (turns, steps) pairs in order, and a sentence for each that is not."""
    parts, damage = [], []
    for path in _parts_of(directory, "turns", only):
        try:
            turns = _read(path, TURNS)
            # Read even where only the turns are asked for: steps that are damaged anywhere in the
            # file are not committed.
            steps = _read(directory / "steps" / path.name, CODED_STEPS).select(OF_STEPS.names)
            if (reason := _odd_reason(turns)) is not None:
                raise part.DamagedError(f"it knows a finish reason {reason!r}")
        except part.READ_ERRORS as error:
            damage.append(
                f"{_unreadable(f'part {path.stem}', error)}; its conversations are missing here, "
                "and --resume measures them again"
            )
            continue
        parts.append((turns, steps if with_steps else OF_STEPS.empty_table()))
    return parts, damage


def _odd_reason(turns: pa.Table) -> str | None:
    """A finish reason that no writer writes, if there is one."""
    found = set(turns["finish_reason"].unique().to_pylist()) - set(get_args(FinishReason))
    return next(iter(sorted(found)), None)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """One part; where it was stored in format 1, its replica is 0."""
    table = part.read(path, schema, LIMITS[path.parent.name])
    place = schema.get_field_index("replica")
    return table.set_column(place, schema.field(place), table["replica"].fill_null(0))


def _latest_attempts(turns: pa.Table) -> tuple[Ints, int]:
    """Rows of each conversation's last session, and how many conversations have earlier ones."""
    names = turns["conversation_id"].to_pylist()
    sessions = turns["session"].to_pylist()
    latest: dict[str, int] = {}
    for name, session in zip(names, sessions, strict=True):
        latest[name] = max(session, latest.get(name, session))
    rows = [
        row
        for row, (name, session) in enumerate(zip(names, sessions, strict=True))
        if session == latest[name]
    ]
    older = {name for name, session in zip(names, sessions, strict=True) if session != latest[name]}
    return np.array(rows, np.int64), len(older)


def _columns(turns: pa.Table, steps: pa.Table, manifest: Mapping[str, Any]) -> Columns:
    """Integer codes for names; steps (OF_STEPS) ordered by request (R) and step."""
    names = turns["conversation_id"].to_pylist()
    ids = tuple(dict.fromkeys(names))
    conversation_of = {name: code for code, name in enumerate(ids)}
    conversation = np.array([conversation_of[name] for name in names], np.int64)

    row_categories = turns["category"].to_pylist()
    expected = manifest.get("dataset", {}).get("expected", {})
    categories = tuple(sorted({*row_categories, *expected}))
    code_of = {name: code for code, name in enumerate(categories)}
    category = np.zeros(len(ids), np.int64)
    category[conversation] = [code_of[name] for name in row_categories]

    reasons = np.array(turns["finish_reason"].to_pylist(), dtype=object)
    bad = np.isin(reasons, FAILED) if len(reasons) else np.zeros(0, bool)
    failed = np.zeros(len(ids), bool)
    failed[conversation[bad]] = True

    order, request = _requests_of_steps(turns, steps)

    def of_steps(name: str) -> Ints:
        kind = np.int64 if name == "time_ns" else np.int32
        values = np.asarray(steps[name].to_numpy(), kind)
        return values if order is None else values[order]

    return Columns(
        categories=categories,
        conversation_ids=ids,
        category=category,
        failed=failed,
        conversation=conversation,
        session=turns["session"].to_numpy().astype(np.int64),
        replica=turns["replica"].to_numpy().astype(np.int64),
        turn=turns["turn"].to_numpy().astype(np.int64),
        n_prompt_tokens=turns["n_prompt_tokens"].to_numpy().astype(np.int64),
        submitted_ns=turns["submitted_ns"].to_numpy().astype(np.int64),
        finished=~bad,
        request=request,
        step=of_steps("step"),
        time_ns=of_steps("time_ns"),
        engine_steps=of_steps("engine_steps"),
        n_tokens=of_steps("n_tokens"),
        accepted=of_steps("accepted"),
        drafted=of_steps("drafted"),
    )


def _requests_of_steps(turns: pa.Table, steps: pa.Table) -> tuple[Ints | None, Ints]:
    """Which step rows to take, in order, and the request (R) that each belongs to. None for all,
    as they are: so they were written, unless requests were asked again or replicas wrote them."""
    request_of = {name: row for row, name in enumerate(turns["request_id"].to_pylist())}
    request = np.empty(len(steps), np.int32)
    begin = 0
    for chunk in steps["request_id"].chunks:
        names = chunk.dictionary.to_pylist()
        rows = np.array([request_of.get(name, -1) for name in names], np.int32)
        request[begin : begin + len(chunk)] = rows[chunk.indices.to_numpy()]
        begin += len(chunk)
    step = np.asarray(steps["step"].to_numpy(), np.int32)
    further = np.diff(request)
    in_order = (further > 0) | ((further == 0) & (np.diff(step) >= 0))
    if (request[:1] >= 0).all() and in_order.all():
        return None, request
    order = np.lexsort((step, request))
    order = order[request[order] >= 0]
    return order, request[order]


def _contradictions(turns: pa.Table, columns: Columns) -> Iterator[str]:
    """A sentence for each thing that parts cannot say together, if nothing was damaged."""
    if (n_twice := turns.num_rows - pc.count_distinct(turns["request_id"]).as_py()) > 0:
        yield f"{n_twice} turn(s) stand twice in the parts"
    turn_of = columns.conversation * (part.MOST + 1) + columns.turn
    if len(np.unique(turn_of)) < len(turn_of):
        yield "a conversation has one of its turns twice"
    if (n_odd := _n_out_of_place(columns)) > 0:
        yield f"{n_odd} step(s) are not where their number says: others are missing, or stand twice"


def _n_out_of_place(columns: Columns) -> int:
    """Steps whose number is not how many of their request come before them."""
    begins = np.diff(columns.request, prepend=-1) != 0
    follows = np.diff(columns.step, prepend=-1) == 1
    if np.where(begins, columns.step == 0, follows).all():
        return 0
    first = np.searchsorted(columns.request, columns.request, "left")
    return int((columns.step != np.arange(len(columns.step)) - first).sum())


def n_output_tokens(run: Run) -> Ints:
    """(R,) output tokens of every request, as its turn holds them."""
    lengths = pc.list_value_length(run.turns["output_token_ids"]).fill_null(0)
    return np.asarray(lengths.to_numpy(), np.int64)[run.used]


def expected_conversations(run: Run) -> Counter[str]:
    """Rows per category that the run was to measure."""
    return Counter(run.manifest.get("dataset", {}).get("expected", {}))
