"""Records: the rows of a parquet or JSONL file as they stand, and the files a user may mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from speedbench.types import UserError
from speedbench.words import first_line


class Record(NamedTuple):
    """One row of a file, not yet checked: where it stands, and its fields as they were read."""

    path: Path
    place: str  # "row 3" of a parquet file, "line 3" of a JSONL file
    values: Mapping[str, object]

    @property
    def where(self) -> str:
        return f"{self.path}, {self.place}"


def parquet_files(path: Path) -> list[Path]:
    """A parquet file itself; of a folder `test.parquet`, or else every parquet file in it."""
    if not path.is_dir():
        return [path]
    if (path / "test.parquet").is_file():
        return [path / "test.parquet"]
    if files := sorted(path.glob("*.parquet")):
        return files
    below = sorted({file.parent.name for file in path.glob("*/*.parquet")})
    remedy = f"one of the folders in it ({', '.join(below)})" if below else "another folder"
    raise UserError(f"{path} holds no parquet file, expected test.parquet: give {remedy}")


def parquet_records(paths: Iterable[Path]) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        if not path.is_file():
            raise _missing(path)
        try:
            rows = pq.ParquetFile(path).read().to_pylist()
        # A damaged file fails as any of these, by where the damage is.
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read as parquet ({first_line(error)}): fetch or prepare the "
                "file again; for JSON lines use --dataset jsonl"
            ) from None
        if not rows:
            raise UserError(f"{path} holds 0 rows: fetch or prepare the file again")
        for number, row in enumerate(rows, 1):
            yield Record(path, f"row {number}", row)


def jsonl_records(path: Path) -> Iterator[Record]:
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a JSONL file: name the file in it")
    if not path.exists():
        raise _missing(path)
    n_rows = 0
    # Not splitlines(): JSON strings may hold U+2028 and U+0085, which it takes for line ends.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number} is not JSON ({first_line(error)}): expected one object "
                "per line, mend or remove the line"
            ) from None
        if not isinstance(values, dict):
            raise UserError(
                f"{path}, line {number} holds a {type(values).__name__}, expected an object with "
                "the fields of one row: mend or remove the line"
            )
        n_rows += 1
        yield Record(path, f"line {number}", values)
    if not n_rows:
        raise UserError(f"{path} holds 0 rows: write one JSON object per line")


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): check the file's permissions") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {number} is not UTF-8 (byte {content[error.start]:#04x}): save the "
            "file as UTF-8"
        ) from None


def _missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist: give an existing file or folder as --dataset_path")
