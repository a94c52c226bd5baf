"""A run directory: write it while the engine runs, load it, resume it.

Format history
  1  manifest.json, turns/NNNNN.parquet, steps/NNNNN.parquet
  2  a `replica` in turns, steps and sessions (0 in format 1); replica R > 0 writes
     NNNNN-rR.parquet; experts/ beside steps/, only where routed experts were asked for
  3  two optional things: draft_vocabulary.parquet (what a pruned drafter can draft) and energy/
     (what each GPU drew, sampled while the session went on)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speedbench.columns import Columns, Ints
from speedbench.types import UNKNOWN, ConversationRecord, RoutedExperts, TurnRecord, UserError

FORMAT = 3
FAILED = ("error", "refused")

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
DRAFT_VOCABULARY = pa.schema([("token_id", pa.int32())])
DRAFT_VOCABULARY_FILE = "draft_vocabulary.parquet"
FOLDERS = ("turns", "steps", "experts", "energy")
SKELETON = (".lock", ".manifest.json", ".sweep.json")
"""How the names begin of what a run, or a folder of runs, that ended before it began may leave."""


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
    with (directory / name).open("a+") as handle:
        _lock(handle, directory)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        if replica == 0:
            for path in directory.glob(".lock-r*"):
                with path.open("a+") as other:
                    _lock(other, directory)
        yield


def _lock(handle: IO[str], directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        raise UserError(
            f"{directory} is being written by {owner}: wait for it or choose another --save_dir"
        ) from None
    except OSError as error:  # Lustre without -o flock, say
        raise UserError(
            f"{directory} cannot be locked ({error}): choose a --save_dir on a file system with "
            "locks"
        ) from None


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Replace manifest.json in one step: readers see the old or the new one, never half."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
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


class Writer:
    """Writes one replica's committed conversations in a thread of its own, as numbered parts.

    `commit` returns at once. A part is written about once a second at first, more rarely as the
    run grows long (at most a minute's worth is at stake), turns last: a conversation counts as
    stored when its turns part has its final name.
    """

    def __init__(
        self, directory: Path, session: int, replica: int = 0, interval_s: float | None = None
    ) -> None:
        self._directory = directory
        self._origin = _Origin(session, replica)
        self._interval_s = interval_s
        self._started_s = time.monotonic()
        self._next_part = _last_part(directory, replica) + 1
        self._queue: queue.SimpleQueue[ConversationRecord | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._unwritten: list[ConversationRecord] = []
        self._thread = threading.Thread(target=self._work, name="speedbench-writer", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Why writing stopped (a full disk, say), or None while all is well."""
        return self._failure

    def commit(self, record: ConversationRecord) -> None:
        self._queue.put(record)

    def close(self) -> None:
        """Write what is pending. Raises UserError if it could not all be written."""
        self._queue.put(None)
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
            if (record := self._queue.get()) is not None:
                waiting.append(record)
        for record in waiting:
            try:
                self._write_part([record])
            except Exception:  # noqa: BLE001 - counted, and told by close()
                self._unwritten.append(record)

    def _work(self) -> None:
        pending: list[ConversationRecord] = []
        due_s: float | None = None
        while True:
            try:
                wait_s = None if due_s is None else max(0.0, due_s - time.monotonic())
                record = self._queue.get(timeout=wait_s)
                if record is not None:
                    pending.append(record)
                    if due_s is None:
                        due_s = time.monotonic() + self._interval()
                    continue
            except queue.Empty:
                record = pending[0]
            if pending:
                try:
                    self._write_part(pending)
                except Exception as error:  # noqa: BLE001 - handed to the loop, which stops
                    self._failure, self._unwritten = error, pending
                    return
            pending, due_s = [], None
            if record is None:
                return

    def _interval(self) -> float:
        """Seconds a committed conversation may wait: 1 s at first, a sixtieth of the run, 60 s."""
        if self._interval_s is not None:
            return self._interval_s
        return max(1.0, min(60.0, (time.monotonic() - self._started_s) / 60))

    def _write_part(self, records: Sequence[ConversationRecord]) -> None:
        name = f"{self._next_part:05d}{_suffix(self._origin.replica)}.parquet"
        turns = [(record, turn) for record in records for turn in record.turns]
        tables = {
            "experts": _experts_table([turn for _, turn in turns], self._origin),
            "steps": _steps_table([turn for _, turn in turns], self._origin),
            "turns": _turns_table(turns, self._origin),
        }
        for folder, table in tables.items():
            if folder == "experts" and not table.num_rows:
                continue
            # Empty folders are lost where a run is copied, or fetched from an object store.
            (self._directory / folder).mkdir(exist_ok=True)
            with _replacing(self._directory / folder / name) as path:
                pq.write_table(table, path, compression="zstd")
        self._next_part += 1


class _Origin(NamedTuple):
    """Which start of the run, and which replica in it, a record is of."""

    session: int
    replica: int


def _suffix(replica: int) -> str:
    """What tells the parts of replicas apart, so that each numbers its own."""
    return f"-r{replica}" if replica else ""


def _experts_table(turns: Sequence[TurnRecord], origin: _Origin) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "request_id": turn.request_id,
                "session": origin.session,
                "replica": origin.replica,
                "n_tokens": found.n_tokens,
                "n_layers": found.n_layers,
                "top_k": found.top_k,
                "expert_ids": found.expert_ids,
            }
            for turn in turns
            if turn.steps and (found := turn.steps[-1].routed_experts) is not None
        ],
        schema=EXPERTS,
    )


def _turns_table(
    turns: Sequence[tuple[ConversationRecord, TurnRecord]], origin: _Origin
) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "request_id": turn.request_id,
                "session": origin.session,
                "replica": origin.replica,
                "conversation_id": record.conversation_id,
                "category": record.category,
                "turn": turn.turn,
                "n_prompt_tokens": turn.n_prompt_tokens,
                "prompt_sha256": turn.prompt_sha256,
                "submitted_ns": turn.submitted_ns,
                "finish_reason": turn.finish_reason,
                "error": turn.error,
                "output_token_ids": turn.output_token_ids(),
            }
            for record, turn in turns
        ],
        schema=TURNS,
    )


def _steps_table(turns: Sequence[TurnRecord], origin: _Origin) -> pa.Table:
    steps = [step for turn in turns for step in turn.steps]
    detail = [pair for turn in turns for pair in _acceptance(turn)]
    columns: dict[str, Any] = {
        "request_id": [turn.request_id for turn in turns for _ in turn.steps],
        "session": np.full(len(steps), origin.session, np.int32),
        "replica": np.full(len(steps), origin.replica, np.int32),
        "turn": [turn.turn for turn in turns for _ in turn.steps],
        "step": [index for turn in turns for index in range(len(turn.steps))],
        "time_ns": [step.time_ns for step in steps],
        "engine_steps": [step.engine_steps for step in steps],
        "n_tokens": [len(step.token_ids) for step in steps],
        "accepted": [accepted for accepted, _ in detail],
        "drafted": [drafted for _, drafted in detail],
    }
    return pa.table(columns, schema=STEPS)


def _acceptance(turn: TurnRecord) -> Sequence[tuple[int, int]]:
    """(accepted, drafted) of every step of a turn, UNKNOWN where the engine did not tell."""
    if turn.steps and turn.steps[-1].detail is not None:
        detail = turn.steps[-1].detail
        if len(detail) != len(turn.steps):
            raise ValueError(
                f"{turn.request_id}: {len(detail)} details for {len(turn.steps)} steps"
            )
        return detail
    return [
        (
            UNKNOWN if step.accepted is None else step.accepted,
            UNKNOWN if step.drafted is None else step.drafted,
        )
        for step in turn.steps
    ]


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
    """

    directory: Path
    manifest: Mapping[str, Any]
    turns: pa.Table
    used: Ints
    columns: Columns
    n_retried: int
    damage: tuple[str, ...]


SECTIONS = {
    "status": str, "config": dict, "engine": dict, "dataset": dict, "prompts": dict,
    "environment": dict, "sessions": list,
}  # fmt: skip
"""What every manifest holds, whatever else."""


def read_manifest(directory: Path, name: str = "manifest.json") -> dict[str, Any]:
    """The manifest of a stored run. Raises UserError if there is none that can be read."""
    path = directory / name
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} is no run directory (it has no manifest.json): name the --save_dir of "
            "a run"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from a copy") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(found, int) or not isinstance(manifest, dict):
        raise UserError(f"{path} is no speedbench manifest: it lacks a format number")
    if found > FORMAT:
        raise UserError(
            f"{path} has format {found}, this speedbench reads up to {FORMAT}: install a newer one"
        )
    for section, kind in SECTIONS.items():
        if not isinstance(manifest.get(section), kind):
            raise UserError(
                f"{path} is no manifest of a run: its '{section}' is missing or no "
                f"{kind.__name__}; restore it from a copy"
            )
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
    turns, steps, damage = _read_tables(directory)
    return _assembled(directory, manifest, turns, steps, damage)


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
                _renamed(steps, f"{number}:", n_replicas),
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


def _assembled(
    directory: Path,
    manifest: Mapping[str, Any],
    turns: pa.Table,
    steps: pa.Table,
    damage: Sequence[str],
) -> Run:
    used, n_retried = _latest_attempts(turns)
    columns = _columns(turns.take(pa.array(used)), steps, manifest)
    return Run(directory, manifest, turns, used, columns, n_retried, tuple(damage))


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
    """Write, or write again, one part of energy/. Not flushed to the disk: the sampler must not
    make the run wait for it."""
    folder = directory / "energy"
    folder.mkdir(exist_ok=True)
    target = folder / f"{number:05d}{_suffix(replica)}.parquet"
    temporary = target.with_name(f".{target.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
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
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"draft_vocabulary"])
        return table["token_id"].to_numpy().astype(np.int64), about
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{_unreadable(str(path), error)}: restore it from a copy") from None


def _read_whole(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        return pq.read_table(path, schema=schema)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{_unreadable(str(path), error)}: restore it from a copy") from None


def _parts_of(directory: Path, folder: str) -> list[Path]:
    """The parts of a folder: by replica, and by number within one."""

    def place(path: Path) -> tuple[str, str]:
        number, _, owner = path.stem.partition("-")
        return owner, number

    return sorted((directory / folder).glob("[0-9]*.parquet"), key=place)


def _unreadable(what: str, error: Exception) -> str:
    first = (str(error).splitlines() or ["unreadable"])[0]
    return f"{what} cannot be read ({first})"


def _read_tables(directory: Path) -> tuple[pa.Table, pa.Table, list[str]]:
    """All committed turns, their steps, and a sentence for each part that cannot be read."""
    parts, damage = _read_parts(directory, with_steps=True)
    return (
        pa.concat_tables([turns for turns, _ in parts]) if parts else TURNS.empty_table(),
        pa.concat_tables([steps for _, steps in parts]) if parts else STEPS.empty_table(),
        damage,
    )


def _read_parts(
    directory: Path, *, with_steps: bool
) -> tuple[list[tuple[pa.Table, pa.Table]], list[str]]:
    """The readable (turns, steps) pairs in order, and a sentence for each that is not."""
    parts, damage = [], []
    for path in _parts_of(directory, "turns"):
        try:
            turns = _read(path, TURNS)
            steps_path = directory / "steps" / path.name
            if with_steps:
                steps = _read(steps_path, STEPS)
            else:  # a truncated file has no footer, so reading that is proof enough
                pq.read_metadata(steps_path)
                steps = STEPS.empty_table()
        except (OSError, pa.ArrowException) as error:
            damage.append(
                f"{_unreadable(f'part {path.stem}', error)}; its conversations are missing here, "
                "and --resume measures them again"
            )
            continue
        parts.append((turns, steps))
    return parts, damage


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    """One part; where it was stored in format 1, its replica is 0."""
    table = pq.read_table(path, schema=schema)
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
    """Integer codes for names; steps ordered by request (R) and step."""
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
        return np.asarray(steps[name].to_numpy(), np.int64)[order]

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


def _requests_of_steps(turns: pa.Table, steps: pa.Table) -> tuple[Ints, Ints]:
    """Which step rows to take, in order, and the request (R) that each belongs to."""
    request_of = {name: row for row, name in enumerate(turns["request_id"].to_pylist())}
    encoded = steps["request_id"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    rows = np.array([request_of.get(name, -1) for name in encoded.dictionary.to_pylist()], np.int64)
    request = rows[encoded.indices.to_numpy()] if len(rows) else np.zeros(0, np.int64)
    step = steps["step"].to_numpy()
    order = np.lexsort((step, request))
    order = order[request[order] >= 0]
    return order, request[order]


def expected_conversations(run: Run) -> Counter[str]:
    """Rows per category that the run was to measure."""
    return Counter(run.manifest.get("dataset", {}).get("expected", {}))
