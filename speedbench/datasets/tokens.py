"""Token files: the encoded prompts of a run, for runs that load no tokenizer.

One parquet file: a row per turn (conversation_id, category, turn, token_ids, sha256), and in its
metadata what they were made from: dataset, tokenizer, template arguments, end-of-sequence ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speedbench.datasets import Dataset
from speedbench.types import Conversation, Prompt, UserError

FORMAT = 1
KEY = b"speedbench"
SCHEMA = pa.schema(
    [
        ("conversation_id", pa.string()),
        ("category", pa.string()),
        ("turn", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenFile:
    """What a token file holds; `about` is its metadata."""

    dataset: Dataset
    prompts: Mapping[tuple[str, int], Prompt]
    about: Mapping[str, Any]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.about["eos_token_ids"])


def write(
    path: Path,
    rows: Sequence[Conversation],
    prompts: Mapping[tuple[str, int], Prompt],
    about: Mapping[str, Any],
) -> None:
    """Write all turns of `rows`. Raises UserError if a turn is not known, or the file exists."""
    if path.exists():
        raise UserError(f"{path} exists: choose another --out")
    live = [row.id for row in rows if (row.id, row.n_turns - 1) not in prompts]
    if live:
        raise UserError(
            f"{len(live)} conversation(s), first {live[0]!r}, have later turns that depend on the "
            "replies: add --history frozen --history_from with replies to all of them"
        )
    turns = [(row, turn, prompts[row.id, turn]) for row in rows for turn in range(row.n_turns)]
    columns: dict[str, Any] = {
        "conversation_id": [row.id for row, _, _ in turns],
        "category": [row.category for row, _, _ in turns],
        "turn": [turn for _, turn, _ in turns],
        "token_ids": [prompt.token_ids for _, _, prompt in turns],
        "sha256": [prompt.sha256 for _, _, prompt in turns],
    }
    metadata = {KEY: json.dumps({"format": FORMAT, **about}).encode()}
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata(metadata)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}): choose another --out") from None


def read(path: Path) -> TokenFile:
    """The prompts of a token file. Raises UserError if it is none, or was changed."""
    from speedbench.prompts import turn_sha256

    if not path.is_file():
        raise UserError(
            f"--prompts {path} does not exist: make it with `speedbench data tokens --out {path}`"
        )
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[KEY])
        found = table.select(SCHEMA.names).cast(SCHEMA).to_pylist()
    except (OSError, KeyError, ValueError, RecursionError, pa.ArrowException) as error:
        first = (str(error).splitlines() or ["unreadable"])[0]
        first = "its metadata is not ours" if isinstance(error, KeyError) else first
        raise UserError(
            f"--prompts {path} is no token file ({first}): make one with `speedbench data tokens`"
        ) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        number = about.get("format") if isinstance(about, dict) else None
        raise UserError(
            f"--prompts {path} has format {number}, expected {FORMAT}: make it again with this "
            "speedbench"
        )
    if (odd := _odd(about)) or not found:
        raise UserError(
            f"--prompts {path} is not as speedbench wrote it: "
            f"{f'its {odd} is missing or of another form' if odd else 'it holds no prompt'}; make "
            "it again"
        )
    prompts: dict[tuple[str, int], Prompt] = {}
    categories: dict[str, str] = {}
    for number, row in enumerate(found, 1):
        if None in row.values() or row["turn"] < 0 or None in row["token_ids"]:
            raise UserError(f"--prompts {path}, row {number} lacks a value: make it again")
        if min(row["token_ids"], default=0) < 0:
            raise UserError(f"--prompts {path}, row {number} has a token ID below 0: make it again")
        key = (row["conversation_id"], row["turn"])
        sha256 = turn_sha256(*key, row["token_ids"])
        if sha256 != row["sha256"] or key in prompts:
            raise UserError(
                f"--prompts {path} was changed: turn {key[1]} of {key[0]!r} is not what its hash "
                "says; make it again"
            )
        prompts[key] = Prompt(row["token_ids"], sha256)
        categories[key[0]] = row["category"]
    turns: dict[str, list[tuple[int, ...]]] = {}
    for (name, turn), prompt in sorted(prompts.items(), key=lambda item: item[0][1]):
        held = turns.setdefault(name, [])
        if turn != len(held):
            raise UserError(f"--prompts {path} lacks turn {len(held)} of {name!r}: make it again")
        held.append(tuple(prompt.token_ids))
    rows = tuple(
        Conversation(name, category, token_turns=tuple(turns[name]))
        for name, category in categories.items()
    )
    told = about["dataset"]
    dataset = Dataset(told["name"], told["path"], rows, told["sha256"], told.get("origin"))
    return TokenFile(dataset, prompts, about)


def _odd(about: Mapping[str, Any]) -> str | None:
    """What of the metadata is not as `speedbench data tokens` wrote it."""
    told = about.get("dataset")
    eos, files = about.get("eos_token_ids"), about.get("tokenizer_files")
    if not isinstance(told, dict) or not all(
        isinstance(told.get(name), str) for name in ("name", "path", "sha256")
    ):
        return "dataset"
    origin = told.get("origin")
    if origin is not None and not (
        isinstance(origin, dict) and all(isinstance(one, str) for one in origin.values())
    ):
        return "dataset's origin"
    if not isinstance(eos, list) or not all(type(one) is int and one >= 0 for one in eos):
        return "eos_token_ids"
    if not isinstance(files, dict) or not all(
        isinstance(one, dict) and isinstance(one.get("files", {}), dict) for one in files.values()
    ):
        return "tokenizer_files"
    return None
