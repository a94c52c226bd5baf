"""A run directory: write it while the engine runs, load it, resume it.

Format history
  1  manifest.json, turns/NNNNN.parquet, steps/NNNNN.parquet
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
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speedbench.columns import Columns, Ints
from speedbench.types import UNKNOWN, ConversationRecord, TurnRecord, UserError

FORMAT = 1
FAILED = ("error", "refused")

TURNS = pa.schema(
    [
        ("request_id", pa.string()),
        ("session", pa.int32()),
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
        ("turn", pa.int32()),
        ("step", pa.int32()),
        ("time_ns", pa.int64()),
        ("engine_steps", pa.int32()),
        ("n_tokens", pa.int32()),
        ("accepted", pa.int32()),
        ("drafted", pa.int32()),
    ]
)


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
    skeleton = {"turns", "steps", ".lock"}
    return any(
        path.name not in skeleton or (path.is_dir() and any(path.iterdir()))
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
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; released by the kernel however the process ends."""
    with (directory / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise UserError(
                f"{directory} is being written by {owner}: wait for it or choose another --save_dir"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        yield


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
    """Writes committed conversations in a thread of its own, as numbered pairs of parts.

    `commit` returns at once. A part is written about once a second at first, more rarely as the
    run grows long (at most a minute's worth is at stake), steps before turns: a conversation
    counts as stored when its turns part has its final name.
    """

    def __init__(self, directory: Path, session: int, interval_s: float | None = None) -> None:
        self._directory = directory
        self._session = session
        self._interval_s = interval_s
        self._started_s = time.monotonic()
        self._next_part = _last_part(directory) + 1
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
        self._thread.join()
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
        name = f"{self._next_part:05d}.parquet"
        turns = [(record, turn) for record in records for turn in record.turns]
        for folder, table in (
            ("steps", _steps_table([turn for _, turn in turns], self._session)),
            ("turns", _turns_table(turns, self._session)),
        ):
            with _replacing(self._directory / folder / name) as path:
                pq.write_table(table, path, compression="zstd")
        self._next_part += 1


def _turns_table(turns: Sequence[tuple[ConversationRecord, TurnRecord]], session: int) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "request_id": turn.request_id,
                "session": session,
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


def _steps_table(turns: Sequence[TurnRecord], session: int) -> pa.Table:
    steps = [step for turn in turns for step in turn.steps]
    detail = [pair for turn in turns for pair in _acceptance(turn)]
    columns: dict[str, Any] = {
        "request_id": [turn.request_id for turn in turns for _ in turn.steps],
        "session": np.full(len(steps), session, np.int32),
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


def _last_part(directory: Path) -> int:
    """Number of the last complete part; a steps part without its turns part does not count."""
    return max(
        (int(path.stem) for path in (directory / "turns").glob("[0-9]*.parquet")), default=-1
    )


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
    done: dict[str, bool] = {}
    parts, _ = _read_parts(directory, with_steps=False)
    for turns, _steps in parts:
        attempt: dict[str, bool] = {}
        for name, reason in zip(
            turns["conversation_id"].to_pylist(), turns["finish_reason"].to_pylist(), strict=True
        ):
            # A refused later turn would be refused again; a failed request is tried again.
            attempt[name] = attempt.get(name, True) and reason != "error"
        done.update(attempt)
    return done


def load(directory: Path | str) -> Run:
    """Read a run directory whole. Raises UserError if it is none; damage is told, not raised."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    parts, damage = _read_parts(directory, with_steps=True)
    turns = pa.concat_tables([part[0] for part in parts]) if parts else TURNS.empty_table()
    steps = pa.concat_tables([part[1] for part in parts]) if parts else STEPS.empty_table()
    used, n_retried = _latest_attempts(turns)
    return Run(
        directory,
        manifest,
        turns,
        used,
        _columns(turns.take(pa.array(used)), steps, manifest),
        n_retried,
        tuple(damage),
    )


def _read_parts(
    directory: Path, *, with_steps: bool
) -> tuple[list[tuple[pa.Table, pa.Table]], list[str]]:
    """The readable (turns, steps) pairs in order, and a sentence for each that is not."""
    parts, damage = [], []
    for path in sorted((directory / "turns").glob("[0-9]*.parquet")):
        try:
            turns = pq.read_table(path, schema=TURNS)
            steps_path = directory / "steps" / path.name
            if with_steps:
                steps = pq.read_table(steps_path, schema=STEPS)
            else:  # a truncated file has no footer, so reading that is proof enough
                pq.read_metadata(steps_path)
                steps = STEPS.empty_table()
        except (OSError, pa.ArrowException) as error:
            first = (str(error).splitlines() or ["unreadable"])[0]
            damage.append(
                f"part {path.stem} cannot be read ({first}); its conversations are missing here, "
                "and --resume measures them again"
            )
            continue
        parts.append((turns, steps))
    return parts, damage


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
