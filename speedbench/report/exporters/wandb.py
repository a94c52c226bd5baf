"""Weights & Biases: one of its runs for each stored run, online or offline (WANDB_MODE).

What it gathers of its own accord, such as the machine's state, code and git remote, is switched
off: nothing leaves but the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speedbench.report.exporters import Record, load_package
from speedbench.types import UserError


def export(records: Sequence[Record], experiment: str) -> list[str]:
    """Store the records in the project `experiment`. Returns, for each, where it is."""
    wandb = load_package("wandb")
    try:
        return [_one(wandb, record, experiment) for record in records]
    except (wandb.Error, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Weights & Biases refused ({reason}): log in with `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from None


def _one(wandb: Any, record: Record, experiment: str) -> str:
    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    with wandb.init(
        project=experiment,
        name=record.name,
        config={**record.params, **{f"tag.{name}": text for name, text in record.tags.items()}},
        settings=settings,
    ) as run:
        run.summary.update(dict(record.metrics))
        artifact = wandb.Artifact("report", type="speedbench")
        for name, text in record.artifacts.items():
            with artifact.new_file(name, encoding="utf-8") as file:
                file.write(text)
        run.log_artifact(artifact)
        return str(Path(run.dir).parent if run.offline else run.url)
