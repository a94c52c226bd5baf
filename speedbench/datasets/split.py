"""A split: rows in the benchmark's schema, read from a user's own file and written as parquet."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedbench.datasets.files import Record, jsonl_records, parquet_files, parquet_records
from speedbench.datasets.rows import Schema, to_conversation
from speedbench.types import Conversation, UserError

COLUMNS = (
    "question_id",
    "category",
    "sub_category",
    "turns",
    "source",
    "src_id",
    "difficulty",
    "multiturn",
)
"""The benchmark's schema, in its order."""

LOOSE_TURNS = ("prompt", "messages")
"""Other names of `turns`, under which one string, or a list of user messages, is understood too."""

SCHEMA = Schema(
    turns=("turns", *LOOSE_TURNS),
    default_id=True,
    default_category="default",
    loose_turns=LOOSE_TURNS,
)


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One row in the benchmark's schema; `extra` holds the further columns that were asked for."""

    question_id: str
    category: str
    turns: tuple[str, ...]
    sub_category: str = ""
    source: str = ""
    src_id: str = ""
    difficulty: str = ""
    extra: tuple[object, ...] = ()

    @property
    def values(self) -> dict[str, object]:
        own = {name: getattr(self, name) for name in COLUMNS if name not in ("turns", "multiturn")}
        return {**own, "turns": list(self.turns), "multiturn": len(self.turns) > 1}

    @property
    def conversation(self) -> Conversation:
        return Conversation(
            self.question_id, self.category, self.turns, sub_category=self.sub_category
        )


def read_rows(
    path: Path, extra: Sequence[str] = (), ignored: Sequence[str] = ()
) -> tuple[SplitRow, ...]:
    """Every row of a JSONL or parquet file. A column that is neither of the schema, nor in `extra`,
    nor `ignored` is refused: it would be lost in silence.
    """
    for name in ignored:
        if name in (*COLUMNS, *LOOSE_TURNS, *extra):
            raise UserError(
                f"--ignore_columns names '{name}', which is read: rename it in {path}, or leave it "
                "out of --ignore_columns"
            )
    rows: dict[str, SplitRow] = {}
    first: dict[str, str] = {}
    for record in _records(path):
        row = _row(record, extra, ignored)
        if row.question_id in rows:
            raise UserError(
                f"{record.where} repeats the id {row.question_id!r} of {first[row.question_id]}: "
                "give every row an id of its own"
            )
        rows[row.question_id], first[row.question_id] = row, record.where
    return tuple(rows.values())


def _records(path: Path) -> Iterator[Record]:
    if not path.exists():
        raise UserError(f"--from {path} does not exist: give a JSONL or parquet file")
    if path.is_dir() or path.suffix == ".parquet":
        return parquet_records(parquet_files(path))
    return jsonl_records(path)


def _row(record: Record, extra: Sequence[str], ignored: Sequence[str]) -> SplitRow:
    known = {*COLUMNS, *LOOSE_TURNS, *extra, *ignored}
    for name in record.values:
        if name not in known:
            raise UserError(
                f"{record.where} has the unknown column '{name}': name it in --ignore_columns, or "
                f"use the columns {', '.join(COLUMNS)}"
            )
    found = to_conversation(record, SCHEMA)
    multiturn = record.values.get("multiturn")
    if multiturn is not None and multiturn is not (found.n_turns > 1):
        raise UserError(
            f"{record.where} says multiturn {multiturn!r}, but has {found.n_turns} turn(s): mend "
            "or leave out multiturn"
        )
    return SplitRow(
        question_id=found.id,
        category=found.category,
        turns=found.turns,
        sub_category=found.sub_category,
        source=_word(record, "source"),
        src_id=_word(record, "src_id"),
        difficulty=_word(record, "difficulty"),
        extra=tuple(record.values.get(name) for name in extra),
    )


def _word(record: Record, name: str) -> str:
    value = record.values.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None or isinstance(value, str):
        return value or ""
    raise UserError(
        f"{record.where} has {value!r:.60} as '{name}', expected a string or a whole number: mend "
        "the row"
    )


def write_rows(path: Path, rows: Sequence[SplitRow]) -> None:
    """Parquet in the benchmark's schema, on the disk when this returns, and read back."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"turns": pa.list_(pa.string()), "multiturn": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row.values for row in rows], schema=schema), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    found = [row.values for row in read_rows(path)]
    if found != [row.values for row in rows]:
        raise UserError(f"{path} does not hold the rows that were written: write to another disk")


def write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, values: Mapping[str, object]) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def refuse_existing(out: Path) -> None:
    """Before the long work, not after it."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} exists and is no folder: name a new folder")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists and is not empty: name a new folder, or remove it")
    refuse_unwritable(out, "--out")


def refuse_unwritable(path: Path, flag: str) -> None:
    """Before the long work: a file is made where `path`, or its first new folder, is to be."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be written ({error.strerror} at {above}): name another place"
        ) from None
