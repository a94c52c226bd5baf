"""Identity: which rows a dataset holds, whence they came, and the file beside them that says so."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speedbench.types import Conversation, UserError

FORMAT = 1
NAME = "identity.json"
"""The identity file of a prepared folder:

    format             1
    dataset, config    what was prepared ("speed", "qualitative"; config is "" where there is none)
    source             where the rows came from: repository, revision (a commit), asked (what the
                       user named), files (path -> sha256 of the bytes that were downloaded)
    preparer           repository and commit of the publisher's preparer, its Python and its
                       packages; null where no preparer ran
    rows, requests     conversations, and user turns over all of them
    rows_per_category  in the order of the file
    sha256             over the rows' content, as in a run's manifest
    file, file_sha256  the file beside this one
    row_sha256         id -> sha256 of the row's content, in the order of the file
    licences           what was shown before anything was downloaded
    prepared_utc       when
"""


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "dataset": str, "config": str, "source": dict, "preparer": (dict, type(None)),
    "sha256": str, "file": str, "file_sha256": str, "licences": list, "prepared_utc": str,
}  # fmt: skip
"""What an identity file must hold to be used; `source` and `preparer` name a commit each."""

_NAMED = (
    ("source", "repository"), ("source", "revision"), ("preparer", "repository"),
    ("preparer", "commit"),
)  # fmt: skip


def row_line(row: Conversation) -> bytes:
    """Canonical JSON of a row's content: keys sorted, no spaces, ASCII, one newline."""
    turns = {"turns": row.turns} if row.turns else {"token_turns": row.token_turns}
    content = {"id": row.id, "category": row.category, "sub_category": row.sub_category, **turns}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def rows_sha256(rows: Iterable[Conversation]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_line(row))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def of_rows(rows: Sequence[Conversation], file: Path) -> dict[str, Any]:
    """The part of an identity that the rows and their file decide."""
    return {
        "rows": len(rows),
        "requests": sum(row.n_turns for row in rows),
        "rows_per_category": dict(Counter(row.category for row in rows)),
        "sha256": rows_sha256(rows),
        "file": file.name,
        "file_sha256": file_sha256(file),
        "row_sha256": {row.id: hashlib.sha256(row_line(row)).hexdigest() for row in rows},
    }


def read(folder: Path) -> Mapping[str, Any] | None:
    """The identity file of a folder; None where there is none."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): prepare the dataset again"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(
            f"{path} has another format than {FORMAT}, the one this version writes: prepare the "
            "dataset again"
        )
    odd = [name for name, kind in _KINDS.items() if not isinstance(found.get(name), kind)]
    for name, key in _NAMED:
        holder = found.get(name)
        if not odd and holder is not None and not isinstance(holder.get(key), str):
            odd.append(f"{name}.{key}")
    if not odd and not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in found["licences"]
    ):
        odd.append("licences")
    if odd:
        raise UserError(
            f"{path} lacks '{odd[0]}', or has it in another form: prepare the dataset again"
        )
    return {"preparer": None, **found}


def origin(path: Path, sha256: str) -> Mapping[str, str] | None:
    """Where the rows of a prepared file came from, for a run's manifest; None for any other file.

    Raises UserError where the rows are not those that were prepared.
    """
    found = read(path if path.is_dir() else path.parent)
    if found is None or (path.is_file() and path.name != found["file"]):
        return None
    if found["sha256"] != sha256:
        raise UserError(
            f"{path} was changed since it was prepared (its rows have sha256 {sha256[:12]}, "
            f"{NAME} says {found['sha256'][:12]}): prepare it again, or remove {NAME}"
        )
    preparer = found.get("preparer") or {}
    return {
        "dataset": found["dataset"],
        "config": found["config"],
        "repository": found["source"]["repository"],
        "revision": found["source"]["revision"],
        "preparer": preparer.get("commit", ""),
    }
