"""Overview: what prepared data holds: identity, rows, turns, and lengths under a tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from speedbench.config import RunConfig
from speedbench.datasets import OWN, SPEED, identity
from speedbench.datasets.files import jsonl_records, parquet_records
from speedbench.datasets.rows import to_conversations
from speedbench.types import Conversation, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = ("test.parquet", "question.jsonl", "prompts.jsonl")
"""The files that hold a dataset's rows, in a folder of its own."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How numbers are distributed over rows; p95 is the smallest that 95 % do not exceed."""

    minimum: int
    median: float
    p95: int
    maximum: int

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Spread:
        values = np.sort(np.asarray(numbers, dtype=np.int64))
        p95 = int(np.quantile(values, 0.95, method="inverted_cdf"))
        return cls(int(values[0]), float(np.median(values)), p95, int(values[-1]))


@dataclass(frozen=True, slots=True)
class Part:
    """A category, or the whole. tokens: of each row's longest prompt; None without a tokenizer."""

    name: str
    n_rows: int
    n_requests: int
    turns: Spread
    tokens: Spread | None
    n_over: int | None


@dataclass(frozen=True, slots=True)
class Overview:
    """One dataset. `fault` says why its rows are not (or no longer) those that were prepared."""

    path: Path
    identity: Mapping[str, Any] | None
    fault: str
    sha256: str
    parts: tuple[Part, ...]
    total: Part
    over: tuple[tuple[str, str, int], ...]
    """Rows longer than the limit, the longest first: (id, category, tokens)."""


def files_of(place: Path) -> list[Path]:
    """The datasets at a place: a file itself; else those in a folder, one and two levels below."""
    if place.is_file():
        return [place]
    found = []
    for folder in (place, *sorted(place.glob("*/")), *sorted(place.glob("*/*/"))):
        if any(part.startswith(".") for part in folder.relative_to(place).parts):
            continue  # half prepared
        found += [folder / name for name in NAMES if (folder / name).is_file()]
    return found


def overview(path: Path, lengths: Lengths | None = None, limit: int | None = None) -> Overview:
    """Read one file. Raises UserError for one that no run could read either."""
    parquet = path.suffix == ".parquet"
    records = parquet_records([path]) if parquet else jsonl_records(path)
    rows = to_conversations(records, SPEED if parquet else OWN)
    found, fault = None, ""
    sha256 = identity.rows_sha256(rows)
    try:
        if identity.origin(path, sha256) is not None:
            found = identity.read(path.parent)
            if found is not None and identity.file_sha256(path) != found["file_sha256"]:
                fault = "the rows are those that were prepared, the file is not"
    except UserError as error:
        fault = str(error)
    tokens = lengths.of(rows) if lengths is not None else None
    over = [
        (row.id, row.category, n)
        for row, n in zip(rows, tokens or (), strict=False)
        if limit is not None and n > limit
    ]
    categories = dict.fromkeys(row.category for row in rows)
    members = {c: [i for i, row in enumerate(rows) if row.category == c] for c in categories}
    return Overview(
        path,
        found,
        fault,
        sha256,
        tuple(_part(c, rows, ids, tokens, limit) for c, ids in members.items()),
        _part("all", rows, range(len(rows)), tokens, limit),
        tuple(sorted(over, key=lambda row: -row[2])),
    )


def built_by(found: Overview) -> Path | None:
    """The report of `data select` or `data bucket` that names these very rows, if there is one."""
    for folder in (found.path.parent, found.path.parent.parent):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found.sha256 in (folder / "report.json").read_text(encoding="utf-8"):
                return folder / "report.json"
    return None


def _part(
    name: str,
    rows: Sequence[Conversation],
    members: Sequence[int],
    tokens: Sequence[int] | None,
    limit: int | None,
) -> Part:
    turns = [rows[i].n_turns for i in members]
    lengths = None if tokens is None else [tokens[i] for i in members]
    return Part(
        name,
        len(turns),
        sum(turns),
        Spread.of(turns),
        None if lengths is None else Spread.of(lengths),
        None if lengths is None or limit is None else sum(n > limit for n in lengths),
    )


class Lengths:
    """Counts the tokens of a row's longest prompt, that of its last turn, with empty replies.

    It is encoded as a run encodes it: with the chat template, or as bare text. In a run the
    replies to the earlier turns come on top.
    """

    def __init__(self, tokenizer: str, completions: bool = False) -> None:
        from speedbench.prompts import PromptEncoder

        self.tokenizer, self.completions = tokenizer, completions
        config = RunConfig(
            engine="NULL", dataset="jsonl", tokenizer=tokenizer, completions=completions
        )
        self._encoder = PromptEncoder(config)

    def of(self, rows: Sequence[Conversation]) -> list[int]:
        return [n for start in range(0, len(rows), 256) for n in self._batch(rows[start:][:256])]

    def _batch(self, rows: Sequence[Conversation]) -> Iterator[int]:
        replies = {row.id: ("",) * (row.n_turns - 1) for row in rows}
        for turns in self._encoder.encode_all_turns_frozen(rows, replies):
            yield len(turns[-1])
