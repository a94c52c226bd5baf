"""Where a run goes: a new directory, or a stored run that goes on as it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speedbench import (
    environment,
    store,
)
from speedbench.config import RunConfig
from speedbench.inputs import Prepared
from speedbench.types import (
    EngineInfo,
    UserError,
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run goes: a new directory, or one whose committed conversations are kept."""

    directory: Path
    done: frozenset[str] = frozenset()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def session(self) -> int:
        """The number of the session to come."""
        return 1 + max((s["session"] for s in self.manifest.get("sessions", [])), default=-1)

    def is_complete(self, prepared: Prepared) -> bool:
        """Whether a stored run holds all that it can: every row committed, or refused."""
        refused = {row["id"] for row in self.manifest.get("refused", [])}
        return bool(self.manifest) and {row.id for row in prepared.rows} <= self.done | refused


def resumed_target(directory: Path, config: RunConfig, prepared: Prepared) -> Target:
    """Continue a stored run. Raises UserError, naming the field, if it measured something else."""
    manifest = store.read_manifest(directory)
    for name, was, now in (
        ("dataset", manifest["dataset"]["sha256"], prepared.dataset.sha256),
        ("prompts", manifest["prompts"]["fingerprint"], prepared.fingerprint),
    ):
        if was != now:
            raise UserError(
                f"the {name} of {directory} had sha256 {was[:12]}, it is {now[:12]} now: restore "
                "the files it was measured on, or start a new run"
            )
    done = {name for name, ok in store.committed(directory).items() if ok}
    return Target(directory, frozenset(done), manifest)


def call_complete(target: Target) -> None:
    """Correct the status of a run that ended early, but after its last row was committed."""
    if target.manifest["status"] == "complete":
        return
    with store.locked(target.directory):  # refused while that run is still going on
        manifest = store.read_manifest(target.directory)
        store.write_manifest(target.directory, {**manifest, "status": "complete"})


def refuse_changed(target: Target) -> None:
    """Under the lock: the stored run must be as it was when its committed rows were read."""
    if not target.manifest:
        store.refuse_existing(target.directory)
        return
    now = store.read_manifest(target.directory)
    if now["sessions"] != target.manifest["sessions"]:
        raise UserError(
            f"{target.directory} was continued by another process meanwhile: start --resume again"
        )


def same_engine(info: EngineInfo, target: Target) -> None:
    """A resumed run must go on with the engine it began with."""
    was = target.manifest.get("engine")
    if was is None:
        return
    now = environment.redact(environment.plain(dataclasses.asdict(info)))  # as it was stored
    for name, value in now.items():
        if name in was and was[name] != value:  # an older format does not tell them all
            raise UserError(
                f"{target.directory} was measured with {name} = {was.get(name)!r}, the engine now "
                f"says {value!r}: resume on the same engine and machine, or start a new run"
            )


MACHINE = ("cpu", "gpus", "checkpoints")
"""What in the environment must be the same: times of two machines are not one distribution."""


def same_machine(machine: Mapping[str, Any], target: Target) -> None:
    was = target.manifest.get("environment", {})
    for name in MACHINE:
        if target.manifest and was.get(name) != machine[name]:
            raise UserError(
                f"{target.directory} was measured with other {name} ({was.get(name)!r}) than are "
                f"here ({machine[name]!r}): resume where it began, or start a new run"
            )
