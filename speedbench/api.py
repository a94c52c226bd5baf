"""The public Python API: a stored run as arrow tables and numbers, and runs compared.

import speedbench

run = speedbench.load("runs/eagle3")
run.metrics["al"].value, run.metrics["al"].interval
run.category_table().to_pandas()
speedbench.compare(speedbench.load("runs/baseline"), run)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from speedbench import remote, store
from speedbench.types import UNKNOWN, UserError

if TYPE_CHECKING:
    from speedbench.report.compare import Comparison
    from speedbench.report.summary import Figure, Summary


# No slots: what is computed is kept.
@dataclass(frozen=True)
class LoadedRun:
    """A stored run. Its tables hold what was measured; what failed and was asked again later is
    there once, as the last attempt left it. Numbers are computed when they are first asked for.

    record  everything that was read, as the modules of this package take it
    """

    record: store.Run

    def __repr__(self) -> str:
        manifest = self.manifest
        engine = manifest["engine"]
        return (
            f"<speedbench run {self.directory}: {engine['name']} {engine['version']}, "
            f"{manifest['config']['speculative_algorithm']} K={engine['draft_length']}, "
            f"{self.turns.num_rows} requests, {manifest['status']}>"
        )

    @property
    def directory(self) -> Path:
        return self.record.directory

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Configuration, engine, dataset, prompts, machine, sessions: manifest.json as stored."""
        return self.record.manifest

    @cached_property
    def turns(self) -> pa.Table:
        """A row for each request, as stored: request_id, conversation_id, category, turn,
        submitted_ns, finish_reason, error, output_token_ids, ..."""
        return self.record.turns.take(pa.array(self.record.used))

    @cached_property
    def steps(self) -> pa.Table:
        """A row for each step, in order within its request; step 0 is the prefill.

        `accepted` and `drafted` are null where the engine did not tell; `engine_steps` is 1 where
        the event is exactly one engine step.
        """
        columns = self.record.columns
        of_request = self.turns.select(
            ["request_id", "conversation_id", "category", "turn", "session", "replica"]
        )
        table = of_request.take(pa.array(columns.request))
        for name in ("step", "time_ns", "engine_steps", "n_tokens"):
            table = table.append_column(name, pa.array(getattr(columns, name)))
        for name in ("accepted", "drafted"):
            values = getattr(columns, name)
            table = table.append_column(name, pa.array(values, mask=values == UNKNOWN))
        return table

    @cached_property
    def summary(self) -> Summary:
        """Every number of the run's report."""
        from speedbench.report.summary import summarize

        return summarize(self.record)

    @cached_property
    def metrics(self) -> Mapping[str, Figure]:
        """The run's numbers by the names that `speedbench report --format csv` gives them: each a
        figure with `value`, `interval` and, where one is missing, `why_not`."""
        from speedbench.report.summary import Figure

        figures = {}
        for row in self.number_table().to_pylist():
            if row["category"] == "":
                interval = None if row["low"] is None else (row["low"], row["high"])
                figures[row["metric"]] = Figure(row["value"], interval, row["why_not"])
        return figures

    def number_table(self) -> pa.Table:
        """Every number of the report as a row: what `--format parquet` writes."""
        from speedbench.report import as_parquet, rows

        return as_parquet.table(list(rows.of_run(self.summary)))

    def category_table(self) -> pa.Table:
        """A row for each category: completeness, acceptance length with its interval, user TPS.

        `user_tps_median` is over the conversations that did not fail.
        """
        from speedbench import metrics

        columns = self.record.columns
        tps = metrics.conversation_user_tps(columns)
        rows = []
        for code, category in enumerate(self.summary.categories):
            al = category.lengths["al"]
            low, high = al.interval or (None, None)
            known = tps[(columns.category == code) & ~np.isnan(tps)]
            rows.append(
                {
                    "category": category.name,
                    "n_complete": category.n_complete,
                    "n_expected": category.n_expected,
                    "n_decode_steps": category.n_steps,
                    "al": al.value,
                    "al_low": low,
                    "al_high": high,
                    "al_why_not": al.why_not,
                    "user_tps_median": float(np.median(known)) if len(known) else None,
                }
            )
        return pa.Table.from_pylist(rows, schema=CATEGORIES)


CATEGORIES = pa.schema(
    [
        ("category", pa.string()),
        *((name, pa.int64()) for name in ("n_complete", "n_expected", "n_decode_steps")),
        *((name, pa.float64()) for name in ("al", "al_low", "al_high")),
        ("al_why_not", pa.string()),
        ("user_tps_median", pa.float64()),
    ]
)


def load(directory: Path | str) -> LoadedRun:
    """A stored run, of a folder or behind a URL. Raises UserError, one sentence, where there is
    none."""
    return LoadedRun(store.load(remote.localized(directory)))


def compare(base: LoadedRun, *runs: LoadedRun, allow: Collection[str] = ()) -> Comparison:
    """Runs held against a baseline, conversation by conversation; repeats of one are one arm.

    Raises UserError, naming the difference, where they are not comparable; `allow` names
    differences that are meant.
    """
    from speedbench.report import arms
    from speedbench.report import compare as comparison

    if not runs:
        raise UserError("nothing to compare: give a baseline and at least one run")
    first, *others = arms.grouped([base.record, *(run.record for run in runs)])
    if not others:
        raise UserError(
            "all runs are repeats of one arm: give a baseline and a run that differs from it"
        )
    return comparison.compare(first, others, allow)
