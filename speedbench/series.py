"""Series: the order in which runs are measured, on which engine starts, and what is left of them.

Of two arms (`run --baseline`) as of a sweep. Runs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from speedbench import store
from speedbench.config import RunConfig, from_dict
from speedbench.configure import known_engine
from speedbench.environment import redact
from speedbench.sweep import STORED, Cell, Spec, engine_identity, identity, remembers, spec_of
from speedbench.types import UserError

FORMAT = 1
"""Of sweep.json. 1: format, kind, spec, cells (name, runs, values, config), not_measured."""

FILE = STORED

Kind = Literal["series", "sweep"]


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One measurement of a cell; `name` is its directory's."""

    name: str
    cell: Cell
    repeat: int


@dataclass(frozen=True, slots=True)
class EngineStart:
    """Runs that are measured one after the other on one running engine."""

    runs: tuple[PlannedRun, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A folder of runs to be measured.

    kind  "series": one or two arms of `run`; "sweep": the cells of a sweep
    """

    kind: Kind
    directory: Path
    spec: Spec
    cells: tuple[Cell, ...]

    def run(self, cell: Cell, repeat: int) -> PlannedRun:
        """The repeat-th (from 1) measurement of a cell."""
        name = f"{cell.name}-{repeat}" if self.kind == "series" else cell.name
        if self.kind == "sweep" and repeat > 1:
            name = f"{cell.name}-run{repeat}"
        return PlannedRun(name, cell, repeat)

    def starts(self) -> list[EngineStart]:
        """Every engine start in order, and what is measured on it.

        Each round measures every cell once, on engines that are started for it; every second round
        goes backwards (ABBA), so that what drifts slowly meets all cells alike.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            key = engine_identity(cell.config)
            if remembers(cell.config):
                key += identity(cell.config)
            groups.setdefault(key, []).append(cell)
        found = []
        for repeat in range(1, self.spec.repeat + 1):
            forward = 1 if repeat % 2 else -1
            found += [
                EngineStart(tuple(self.run(cell, repeat) for cell in group[::forward]))
                for group in list(groups.values())[::forward]
            ]
        return found

    def runs(self) -> list[PlannedRun]:
        return [run for start in self.starts() for run in start.runs]

    def config_of(self, run: PlannedRun) -> RunConfig:
        return run.cell.config.model_copy(update={"save_dir": str(self.directory / run.name)})


def arms(config: RunConfig, baseline: bool) -> tuple[Cell, ...]:
    """The cells of a series: the run itself, and the same without speculation."""
    speculates = config.speculative_algorithm != "NONE"
    own = Cell("speculative" if speculates else "baseline", config, {})
    return (Cell("baseline", config.baseline(), {}), own) if baseline and speculates else (own,)


# ---------------------------------------------------------------- what is stored


@dataclass(frozen=True, slots=True)
class Kept:
    """What sweep.json holds: the plan of a folder, and why some of its runs could not be measured.

    Cells of an earlier, larger grid are kept among `cells`.
    """

    kind: Kind
    spec: Spec
    cells: tuple[Cell, ...]
    not_measured: Mapping[str, str] = field(default_factory=dict)


def read(directory: Path) -> Kept | None:
    """The plan stored in a folder; None without one. Raises UserError if it cannot be read."""
    path = directory / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it from a copy") from None
    number = found.get("format") if isinstance(found, dict) else None
    if not isinstance(number, int):
        raise UserError(f"{path} lacks a format number: restore it from a copy")
    if number > FORMAT:
        raise UserError(
            f"{path} has format {number}, this speedbench reads up to {FORMAT}: install a newer one"
        )
    try:
        cells = tuple(_cell(cell, str(path)) for cell in found["cells"])
        kind: Kind = "series" if found["kind"] == "series" else "sweep"
        return Kept(kind, spec_of(found["spec"], str(path)), cells, dict(found["not_measured"]))
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: restore it from a copy") from None
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not as speedbench wrote it ({error}): restore it from a copy"
        ) from None


def _cell(stored: Mapping[str, Any], where: str) -> Cell:
    config = from_dict(stored["config"], where)
    try:
        known_engine(config.engine)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    name = stored["name"]
    if name != Path(name).name or name in ("", "..") or not name.isprintable():
        raise ValueError(f"the cell's name {name!r} is no directory's")
    return Cell(name, config, dict(stored["values"]))


def measured(kept: Kept, directory: Path) -> tuple[Cell, ...]:
    """The cells of which anything was measured; those that could not be may be mended."""

    def is_begun(cell: Cell) -> bool:
        names = (cell.name, f"{cell.name}-run[0-9]*")
        return any(any(directory.glob(f"{name}/manifest.json")) for name in names)

    return tuple(cell for cell in kept.cells if is_begun(cell))


def write(plan: Plan, not_measured: Mapping[str, str], kept: Kept | None = None) -> None:
    """Replace sweep.json in one step; cells of before that are not asked for any more stay."""
    here = {cell.name for cell in plan.cells}
    others = () if kept is None else tuple(cell for cell in kept.cells if cell.name not in here)
    names = {run.name for run in plan.runs()}
    earlier = {} if kept is None else kept.not_measured
    faults = {name: why for name, why in earlier.items() if name not in names}
    found = {
        "format": FORMAT,
        "kind": plan.kind,
        "spec": redact(plan.spec.model_dump(mode="json")),
        "cells": [_stored(plan, cell) for cell in (*plan.cells, *others)],
        "not_measured": redact({**faults, **not_measured}),
    }
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    temporary = plan.directory / f".{FILE}.tmp"
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(plan.directory / FILE)


def _stored(plan: Plan, cell: Cell) -> dict[str, Any]:
    repeats = range(1, plan.spec.repeat + 1)
    return {
        "name": cell.name,
        "runs": [plan.run(cell, repeat).name for repeat in repeats],
        "values": redact(dict(cell.values)),
        "config": redact(cell.config.model_dump(mode="json")),
    }


def refuse_other_runs(plan: Plan) -> None:
    """Raise UserError if a run's directory holds one that measured something else."""
    for run in plan.runs():
        directory = plan.directory / run.name
        if not (directory / "manifest.json").is_file():
            continue
        stored = from_dict(store.read_manifest(directory)["config"], str(directory))
        wanted = from_dict(redact(run.cell.config.model_dump(mode="json")))
        for name, (was, now) in stored.differences(wanted).items():
            raise UserError(
                f"{directory} was measured with --{name} {was!r}, you ask for {now!r}: restore "
                "that, or choose another --save_dir"
            )


def is_kept(directory: Path) -> bool:
    """Whether a run needs no further session: it went to its end, and measured something.

    Conversations that failed in it are not asked again: another session would cost the run its
    throughput, which is not pooled over sessions.
    """
    if not (directory / "manifest.json").is_file():
        return False
    if store.read_manifest(directory)["status"] != "complete":
        return False
    found = store.committed(directory)
    return any(found.values()) and _n_lost(directory, len(found)) <= 0


def _n_lost(directory: Path, n_committed: int) -> int:
    """Conversations of a complete run whose parts cannot be read any more: they are asked again."""
    manifest = store.read_manifest(directory)
    n_rows = int(sum(manifest["dataset"].get("expected", {}).values()))
    return n_rows - len(manifest.get("refused", [])) - n_committed


def refuse_headless(directory: Path) -> None:
    """Raise UserError for what is no run any more: to measure there anew would mix the two."""
    if not (directory / "manifest.json").is_file():
        try:
            store.refuse_existing(directory)
        except UserError:
            raise UserError(
                f"{directory} holds something, but no manifest.json: restore that from a copy, or "
                "move the directory away to measure anew"
            ) from None


def left(plan: Plan) -> list[PlannedRun]:
    """The runs that are still to be measured, or to be continued."""
    return [run for run in plan.runs() if not is_kept(plan.directory / run.name)]


def n_starts(plan: Plan, runs: Sequence[PlannedRun]) -> int:
    """How many engine starts these runs need."""
    names = {run.name for run in runs}
    return sum(any(run.name in names for run in start.runs) for start in plan.starts())
