"""Configure: from flags, files and stored runs to the configuration of a run. Prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedbench.config import SERVER, RunConfig, from_dict, read_runtime_params
from speedbench.environment import redact
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.series import Kept

OUTSIDE_CONFIG = (
    "runtime_params", "config", "resume", "mtbench", "specbench", "baseline", "repeat",
)  # fmt: skip
"""Flags of a run that are no field of its configuration."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line of a run asks for.

    resume_dir   where to continue
    fingerprint  the prompts' of a run that is to be repeated exactly
    baseline     measure the arm without speculation, too
    repeat       measure each arm so often
    """

    config: RunConfig
    resume_dir: Path | None = None
    fingerprint: str | None = None
    baseline: bool = False
    repeat: int = 1
    is_series: bool = False


def configuration(given: Mapping[str, Any]) -> Asked:
    """The run's configuration from flags, files and a stored manifest. Raises UserError."""
    from speedbench import remote, store

    outside = {name: given[name] for name in OUTSIDE_CONFIG if name in given}
    flags = _normalised({k: v for k, v in given.items() if k not in outside}, outside)
    values: dict[str, Any] = {}
    resume_dir = fingerprint = kept = None
    if outside.get("resume"):
        if "save_dir" not in flags:
            raise UserError("--resume needs --save_dir: name the run directory to continue")
        resume_dir = Path(flags["save_dir"])
        if "config" in outside:
            raise UserError("--resume continues a run as it was configured: leave out --config")
        kept = _kept_series(resume_dir, outside)
        values = dict(store.read_manifest(resume_dir)["config"] if kept is None else kept.spec.base)
        values.update(max_duration=None, show_progress=False)  # of that session, not of the run
    elif "config" in outside:
        path = remote.localized(outside["config"])
        _refuse_plan(path)
        manifest = (
            store.read_manifest(path)
            if path.is_dir()
            else store.read_manifest(path.parent, path.name)
        )
        values = {**manifest["config"], "save_dir": None}
        fingerprint = str(manifest["prompts"]["fingerprint"])
    stored = from_dict(values, str(outside.get("config", resume_dir))) if values else None
    values.update(merged_with_file(outside.get("runtime_params")))
    refuse_redacted(values)
    values.update(flags)
    config = configured(values, flags)
    refuse_unsupported(config)
    if resume_dir is not None and stored is not None:
        refuse_changed(stored, config, resume_dir)
    if stored is None or stored.differences(config):
        fingerprint = None  # something new was asked for
    baseline = bool(outside.get("baseline")) or (kept is not None and kept.spec.baseline)
    repeat = _repeat(outside.get("repeat"), 1 if kept is None else kept.spec.repeat)
    if baseline and config.speculative_algorithm == "NONE":
        raise UserError(
            "--baseline measures the arm without speculation beside a speculative one: add "
            "--speculative_algorithm, or leave --baseline out"
        )
    if baseline and config.engine == SERVER:
        raise UserError(
            "--baseline would ask the same server twice, which speculates or does not: measure a "
            "server without speculation as a run of its own, and compare the two"
        )
    is_series = baseline or repeat > 1 or kept is not None
    return Asked(config, resume_dir, fingerprint, baseline, repeat, is_series)


def _refuse_plan(path: Path) -> None:
    """Raise UserError for the plan of a folder of runs, where a run is asked for."""
    from speedbench.sweep import STORED

    plan = path / STORED if path.is_dir() else path
    if plan.name == STORED and plan.is_file() and not (path / "manifest.json").is_file():
        raise UserError(
            f"--config {path} holds several runs: name one of them, the folder beside {plan}, or "
            f"measure all again with `speedbench sweep --config {plan}`"
        )


def _kept_series(directory: Path, outside: Mapping[str, Any]) -> Kept | None:
    """The series that --resume continues; None for a single run."""
    from speedbench import series

    if (directory / "manifest.json").is_file():
        if "baseline" in outside or "repeat" in outside:
            raise UserError(
                f"{directory} is one run, not a series: leave out --baseline and --repeat to "
                "continue it, or choose another --save_dir"
            )
        return None
    kept = series.read(directory)
    if kept is not None and kept.kind == "sweep":
        raise UserError(
            f"{directory} holds a sweep: continue it with `speedbench sweep --resume --save_dir "
            f"{directory}`"
        )
    return kept


def _repeat(text: str | None, default: int) -> int:
    if text is None:
        return default
    try:
        repeat = int(text)
    except ValueError:
        repeat = 0
    if not 1 <= repeat <= 100:
        raise UserError(f"--repeat is '{text}': expected a whole number from 1 to 100")
    return repeat


def refuse_changed(stored: RunConfig, config: RunConfig, directory: Path) -> None:
    """Raise UserError if a run to be continued would be another one."""
    shown = from_dict(redact(config.model_dump(mode="json")))
    for name, (was, now) in stored.differences(shown).items():
        raise UserError(
            f"--resume cannot change --{name}: the run in {directory} has {was!r}, you ask "
            f"for {now!r}; leave it out, or start a new run"
        )


def refuse_redacted(values: Mapping[str, Any]) -> None:
    if "<redacted>" in str(values):
        raise UserError(
            "the stored configuration lacks a secret that was redacted: give --runtime_params again"
        )


def cell_configuration(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of a sweep's cell, from fields and what may stand for them."""
    outside = {name: values[name] for name in OUTSIDE_CONFIG if name in values}
    flags = _normalised({k: v for k, v in values.items() if k not in outside}, outside)
    return configured({**merged_with_file(outside.get("runtime_params")), **flags}, flags)


def configured(values: Mapping[str, Any], flags: Mapping[str, Any]) -> RunConfig:
    """A validated configuration; `flags` are the values that win over engine arguments."""
    if "engine" not in values:
        raise UserError(f"--engine is missing: use one of {', '.join(_engine_names())}")
    values = {**values, "engine": known_engine(str(values["engine"]))}
    config = from_dict(_with_engine_arguments_absorbed(values, flags))
    if config.engine not in ("NULL", SERVER) and config.model_dir is None:
        raise UserError("--model_dir is missing: name the target checkpoint")
    return config


def _normalised(given: Mapping[str, Any], outside: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as configuration values: dataset shorthands, split categories."""
    flags = dict(given)
    for name in ("mtbench", "specbench"):
        if name in outside:
            if flags.get("dataset", name) != name or "dataset_path" in flags:
                raise UserError(f"--{name} already names the dataset: leave out --dataset")
            flags.update(dataset=name, dataset_path=outside[name])
    if flags.get("random_isl") is not None:
        flags.setdefault("dataset", "random")
    if "category" in flags:
        named = flags["category"]
        named = [named] if isinstance(named, str) else named
        parts = [name.strip() for part in named for name in str(part).split(",")]
        if not all(parts):
            raise UserError("--category has an empty name: separate names by single commas")
        flags["category"] = parts
    return flags


def merged_with_file(path: str | None) -> dict[str, Any]:
    """Sections of the YAML file; sampling names that have a flag move to it."""
    if path is None:
        return {}
    sections: dict[str, Any] = dict(read_runtime_params(path))
    sampling = dict(sections.get("sampling_kwargs", {}))
    for name, field in (
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("ignore_eos", "ignore_eos"),
        ("max_tokens", "output_length"),
    ):
        if name in sampling:
            sections[field] = sampling.pop(name)
    if "sampling_kwargs" in sections:
        sections["sampling_kwargs"] = sampling
    return sections


def _with_engine_arguments_absorbed(
    values: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """An engine argument that a flag owns becomes that flag's value, unless the flag was given."""
    import engines

    absorbed = dict(values)
    arguments = values.get("engine_args") or {}
    if not isinstance(arguments, Mapping):
        return absorbed  # refused where the configuration is validated
    arguments = dict(arguments)
    for name, field in engines.adapter(values["engine"]).flag_of.items():
        if name in arguments:
            value = arguments.pop(name)
            if field not in flags:
                absorbed[field] = value
    if "engine_args" in values:
        absorbed["engine_args"] = arguments
    return absorbed


def _engine_names() -> list[str]:
    import engines

    return list(engines.ADAPTERS)


def known_engine(name: str) -> str:
    names = _engine_names()
    if name.upper() not in names:
        raise UserError(f"--engine is '{name}': expected one of {', '.join(names)}")
    return name.upper()


def refuse_unsupported(config: RunConfig) -> None:
    """Raise UserError for what the engine cannot do, however it is started."""
    import engines

    adapter = engines.adapter(config.engine)
    if config.speculative_algorithm not in adapter.algorithms:
        raise UserError(
            f"{config.engine} does not support --speculative_algorithm "
            f"{config.speculative_algorithm}: it has {', '.join(adapter.algorithms)}"
        )
    if config.request_rate is not None and not hasattr(adapter, "poll_for"):
        raise UserError(
            f"{config.engine} cannot be asked at given moments: leave out --request_rate, or ask "
            "its server (--engine OPENAI)"
        )
    most = adapter.max_concurrency
    if most is not None and config.concurrency > most:
        raise UserError(
            f"{config.engine} decodes at most {most} request(s) at a time, --concurrency is "
            f"{config.concurrency}: use --concurrency {most}, in both arms"
        )


def most_requests(config: RunConfig) -> int | None:
    """How many requests the engine decodes at a time, at most; None: as many as are asked for."""
    import engines

    return engines.adapter(config.engine).max_concurrency
