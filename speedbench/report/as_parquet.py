"""Parquet: the same rows as CSV, typed."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from speedbench.report.blocks import clean
from speedbench.report.rows import Row, plain

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("arm", "run", "base", "category", "metric")),
        ("definition", pa.string()),
        *((name, pa.float64()) for name in ("value", "low", "high")),
        ("n", pa.int64()),
        ("unit", pa.string()),
        ("why_not", pa.string()),
    ],
    metadata={"speedbench": "report/2"},
)
"""What is not known is null, and `why_not` says why."""


def table(rows: Sequence[Row]) -> pa.Table:
    """The rows as an arrow table."""
    columns = plain(rows)
    return pa.table(
        {
            field.name: [clean(text) for text in columns[field.name]]
            if field.type == pa.string()
            else columns[field.name]
            for field in SCHEMA
        },
        schema=SCHEMA,
    )


def render(rows: Sequence[Row]) -> bytes:
    """The file."""
    out = io.BytesIO()
    pq.write_table(table(rows), out)
    return out.getvalue()
