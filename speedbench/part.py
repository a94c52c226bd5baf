"""Part: a parquet file of a run's records, read whole and held against what can have been written.

Parquet fills in nulls for a column that is not there, and numpy makes numbers of nulls: what is
lacking must be told before it is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

READ_ERRORS = (OSError, ValueError, pa.ArrowException)
"""What reading a damaged part raises; DamagedError is among them."""

MOST = 1 << 20
"""Tokens of a step, turns, sessions: nothing has more, and arrays are as long as some of them."""


class DamagedError(ValueError):
    """One clause: what is wrong with the part."""


class Limits(NamedTuple):
    """What values a kind of part can hold.

    least     column -> its smallest value, or that in its lists; columns not named here have none
    most      column -> its largest
    nullable  columns in which values may be missing
    """

    least: Mapping[str, int]
    most: Mapping[str, int]
    nullable: Collection[str] = ()


def read(path: Path, schema: pa.Schema, limits: Limits) -> pa.Table:
    """A part as it was written. Raises one of READ_ERRORS."""
    table = pq.read_table(path, schema=schema, page_checksum_verification=True)
    table.validate(full=True)
    refuse_odd(table, limits)
    return table


def refuse_odd(table: pa.Table, limits: Limits) -> None:
    """Raise DamagedError for values that no part of the kind can hold."""
    for field, column in zip(table.schema, table.columns, strict=True):
        name = field.name
        if column.null_count and name not in limits.nullable:
            raise DamagedError(f"{column.null_count} of its rows have no {name}")
        if pa.types.is_list(field.type):
            column = pc.list_flatten(column)
            if column.null_count:
                raise DamagedError(f"a list in its column {name} lacks values")
        _refuse_beyond(name, column, limits)


def _refuse_beyond(name: str, column: pa.ChunkedArray, limits: Limits) -> None:
    low, high = limits.least.get(name), limits.most.get(name)
    if low is None and high is None:
        return
    ends = pc.min_max(column)
    least, most = ends["min"].as_py(), ends["max"].as_py()
    if least is not None and low is not None and least < low:
        raise DamagedError(f"its column {name} holds {least}, expected at least {low}")
    if most is not None and high is not None and most > high:
        raise DamagedError(f"its column {name} holds {most}, expected at most {high}")
