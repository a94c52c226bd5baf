"""MLflow: one of its runs for each stored run, through its client, on MLFLOW_TRACKING_URI."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from speedbench.report.exporters import Record, load_package
from speedbench.types import UserError

BATCH = 100
"""Parameters or metrics of one request: what servers take."""


def export(records: Sequence[Record], experiment: str) -> list[str]:
    """Store the records. Returns, for each, where it is. Raises UserError if the server fails."""
    mlflow = load_package("mlflow")
    try:
        client = mlflow.MlflowClient()
        found = client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else client.create_experiment(experiment)
        return [_one(mlflow, client, number, record) for record in records]
    except (mlflow.exceptions.MlflowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(
            f"MLflow at {mlflow.get_tracking_uri()} refused ({reason}): set MLFLOW_TRACKING_URI to "
            "a server that takes the experiment"
        ) from None


def _one(mlflow: Any, client: Any, experiment_id: str, record: Record) -> str:
    run = client.create_run(experiment_id, tags=dict(record.tags), run_name=record.name)
    number = run.info.run_id
    now_ms = int(time.time() * 1000)
    entities = mlflow.entities
    try:
        for some in _batches(record.params):
            params = [entities.Param(name, value) for name, value in some.items()]
            client.log_batch(number, params=params)
        for batch in _batches(record.metrics):
            metrics = [entities.Metric(name, value, now_ms, 0) for name, value in batch.items()]
            client.log_batch(number, metrics=metrics)
        for name, text in record.artifacts.items():
            client.log_text(number, text, name)
    except BaseException:
        client.set_terminated(number, "FAILED")
        raise
    client.set_terminated(number, "FINISHED")
    return f"{mlflow.get_tracking_uri()}, experiment {experiment_id}, run {number}"


def _batches(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    items = iter(values.items())
    while batch := dict(islice(items, BATCH)):
        yield batch
