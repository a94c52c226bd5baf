"""Sweep: a grid of run configurations, as named cells. Reads, expands and names; runs nothing."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from speedbench.config import (
    NOT_IDENTITY,
    TAKES_NO_DRAFT_MODEL,
    RunConfig,
    read_yaml,
    refuse_unstorable,
)
from speedbench.environment import redact
from speedbench.types import EngineAdapter, UserError
from speedbench.words import like

Values = Mapping[str, Any]
Configure = Callable[[Values], RunConfig]
"""Configuration fields (and what may stand for them on a command line) -> the configuration."""

STORED = "sweep.json"
"""What a folder of runs keeps of its plan (series.py writes it)."""

SHORTHANDS = ("runtime_params", "mtbench", "specbench")
"""Flags of a run that are no configuration field; they may stand in `base`."""

NOT_SWEPT: Mapping[str, str] = {
    "engine": "engines need installations of their own: make a sweep for each",
    "save_dir": "every cell has its own directory in the sweep's --save_dir",
    "show_progress": "it belongs to the whole sweep",
    "max_duration": "it belongs to the whole sweep",
    "stall_timeout": "it belongs to the whole sweep",
    "shard": "it belongs to the whole sweep",
}
"""Fields that do not vary between cells, and why."""

MAPPINGS = ("engine_args", "sampling_kwargs", "chat_template_args", "dataset_kwargs")

MOST_CELLS = 10_000
"""Of a grid, at most: what is larger is a slip of the keyboard."""

MOST_LETTERS = 150
"""Of a cell's name, so that no file system refuses its directory."""

NAME = re.compile(
    r"(?!.*(?:-run\d+|\.json)$|(?:turns|steps|experts|energy)$)"
    rf"[A-Za-z0-9][A-Za-z0-9._+-]{{0,{MOST_LETTERS - 1}}}"
)
"""Of a cell: a directory that is taken neither for a repeat of another cell, nor for a file of the
sweep, nor for the parts of a run."""


class Spec(BaseModel):
    """What a sweep is asked to measure.

    base      fields of every cell
    grid      field -> its values; every combination is a cell
    cells     further cells, each as the fields in which it differs from `base`
    baseline  measure the arm without speculation, too, wherever it differs
    repeat    measure every cell so often, each time on a newly started engine
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: dict[str, Any] = {}
    grid: dict[str, tuple[Union[str, int, float, bool, None], ...]] = {}  # noqa: UP007 - 3.10
    cells: tuple[dict[str, Any], ...] = ()
    baseline: bool = False
    repeat: int = Field(default=1, ge=1, le=100)


@dataclass(frozen=True, slots=True)
class Cell:
    """One configuration of a sweep. `values`: what tells it from `base`, as it was asked for."""

    name: str
    config: RunConfig
    values: Values

    @property
    def is_baseline(self) -> bool:
        return self.config.speculative_algorithm == "NONE"


# ---------------------------------------------------------------- reading


def read_spec(path: Path) -> Spec:
    """A sweep from its YAML file, or from what a measured one stored (its folder, or the sweep.json
    in it). Raises UserError with one sentence for the first fault."""
    path = path / STORED if path.is_dir() else path
    found = read_yaml(path, "--config", tuple(Spec.model_fields))
    if "kind" in found and isinstance(found.get("spec"), dict):
        found = found["spec"]
    return spec_of(found, f"--config {path}")


def spec_of(values: Mapping[str, Any], where: str) -> Spec:
    """A validated sweep. Raises UserError; `where` says where the values stand."""
    refuse_unstorable(values, where)
    try:
        spec = Spec.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None
    known = {*RunConfig.model_fields, *SHORTHANDS}
    for name in spec.base:
        _refuse_unknown(name, known, f"{where}: base")
        if name == "save_dir":
            raise UserError(f"{where}: base has save_dir, but {NOT_SWEPT[name]}: leave it out")
    for name, found in spec.grid.items():
        _refuse_not_swept(name, f"{where}: grid")
        if name in MAPPINGS:
            raise UserError(
                f"{where}: grid has {name}, which is no single value: name it in `cells`"
            )
        if not found:
            raise UserError(f"{where}: grid {name} is empty: give its values")
        texts = [str(value) for value in found]
        if len(set(texts)) < len(texts):
            twice = next(text for text in texts if texts.count(text) > 1)
            raise UserError(f"{where}: grid {name} has {twice} twice: name each value once")
    if (n_cells := math.prod(map(len, spec.grid.values()))) > MOST_CELLS:
        raise UserError(
            f"{where}: grid has {n_cells} combinations, expected at most {MOST_CELLS}: name fewer "
            "values, or make several sweeps"
        )
    for cell in spec.cells:
        for name in cell:
            if name != "name":
                _refuse_not_swept(name, f"{where}: a cell")
        _refuse_bad_name(cell.get("name"), where)
    return spec


def _sentence(error: ValidationError) -> str:
    fault = error.errors()[0]
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        fields = ", ".join(Spec.model_fields)
        return f"'{name}' is unknown{like(name, Spec.model_fields, f'expected {fields}')}"
    if fault["type"] == "tuple_type":
        return f"{name} is {fault['input']!r:.200}, expected a list: [{fault['input']}]"
    message = fault["msg"]
    return f"{name} is {fault['input']!r:.200}: {message[0].lower()}{message[1:]}"


def _refuse_unknown(name: str, known: set[str], where: str) -> None:
    if name not in known:
        raise UserError(
            f"{where} has '{name}', which is no flag of a run"
            f"{like(name, known, 'see run.py --help')}"
        )


def _refuse_not_swept(name: str, where: str) -> None:
    _refuse_unknown(name, set(RunConfig.model_fields), where)
    if name in NOT_SWEPT:
        raise UserError(f"{where} has {name}, but {NOT_SWEPT[name]}")


def _refuse_bad_name(name: Any, where: str) -> None:
    if name is not None and (not isinstance(name, str) or NAME.fullmatch(name) is None):
        raise UserError(
            f"{where}: a cell's name is {name!r}: expected at most {MOST_LETTERS} letters, digits "
            "and . _ + -, to name a directory, no -run2 or .json at its end, and no word for the "
            "parts of a run"
        )


# ---------------------------------------------------------------- expanding


def expanded(
    spec: Spec,
    configure: Configure,
    most_requests: Callable[[RunConfig], int | None],
    kept: Sequence[Cell] = (),
) -> tuple[Cell, ...]:
    """Every cell of a sweep once, the baselines first.

    most_requests  how many requests a configuration's engine takes at a time; None: any number
    kept           cells that were planned before: those asked for again keep their names and the
                   size of the engine they are measured on

    Raises UserError where a combination is no configuration.
    """
    asked = [(_configured({**spec.base, **own}, configure), own) for own in _combinations(spec)]
    if spec.baseline:
        baselines = [(config.baseline(), _without_speculation(own)) for config, own in asked]
        asked = [*baselines, *asked]
    configs = _with_slots([config for config, _ in asked], most_requests, kept)
    _refuse_one_server_as_several(configs)
    if "draft_length" in spec.grid and all(c.speculative_algorithm == "NONE" for c in configs):
        raise UserError(
            "draft_length is swept, but nothing drafts: add speculative_algorithm, which is NONE"
        )
    unique: dict[str, tuple[RunConfig, Values]] = {}
    for config, (_, own) in zip(configs, asked, strict=True):
        unique.setdefault(identity(config), (config, own))
    ordered = sorted(unique.values(), key=lambda one: one[0].speculative_algorithm != "NONE")
    return tuple(_named(ordered, list(spec.grid), kept))


def _refuse_one_server_as_several(configs: Sequence[RunConfig]) -> None:
    """A server drafts as it was started: cells of other speculation ask other servers."""
    seen: dict[str, RunConfig] = {}
    for config in configs:
        if config.url is None:
            continue
        first = seen.setdefault(config.url, config)
        for name in SPECULATION:
            found, other = getattr(first, name), getattr(config, name)
            if found != other:
                raise UserError(
                    f"cells ask the server at {config.url} with --{name} {found} and {other}, but "
                    "it drafts as it was started: start a server for each, and name them in "
                    "`cells`, each with its url"
                )


def identity(config: RunConfig) -> str:
    """Equal for configurations that measure the same; secrets, which are not stored, aside.

    A run may be resumed at another url, but cells that differ in it ask two servers.
    """
    values = config.model_dump(mode="json", exclude=set(NOT_IDENTITY - {"url"}))
    return json.dumps(redact(values), sort_keys=True)


def _combinations(spec: Spec) -> Iterator[Values]:
    """The fields in which each cell differs from `base`.

    One drafter in `base` or in the grid, beside several algorithms, is meant for those that take
    one.
    """
    names = list(spec.grid)
    if names or not spec.cells:
        for combination in itertools.product(*spec.grid.values()):
            own = dict(zip(names, combination, strict=True))
            if _takes_no_drafter(own):
                own["draft_model_dir"] = None
            yield own
    for cell in spec.cells:
        if _takes_no_drafter(cell):
            yield {"draft_model_dir": None, **cell}
        else:
            yield cell


def _takes_no_drafter(own: Values) -> bool:
    return str(own.get("speculative_algorithm", "")).upper() in TAKES_NO_DRAFT_MODEL


def _configured(values: Values, configure: Configure) -> RunConfig:
    config = configure({name: value for name, value in values.items() if name != "name"})
    return config.baseline() if config.speculative_algorithm == "NONE" else config


SPECULATION = ("speculative_algorithm", "draft_model_dir", "draft_length", "draft_sample_method",
               "block_size")  # fmt: skip


def _without_speculation(own: Values) -> Values:
    return {name: value for name, value in own.items() if name not in (*SPECULATION, "name")}


def _with_slots(
    configs: Sequence[RunConfig],
    most_requests: Callable[[RunConfig], int | None],
    kept: Sequence[Cell],
) -> list[RunConfig]:
    """Each with the number of requests its engine is started for.

    Arms that may be compared have engines alike: the largest concurrency of all cells that differ
    in speculation and load only. What cells measured before had stays theirs, and is used for new
    ones that fit into it. A cell that its engine will refuse counts for itself alone.
    """
    known: dict[str, set[int]] = {}
    for cell in kept:
        if cell.config.max_num_seqs is not None:
            known.setdefault(_alike(cell.config), set()).add(cell.config.max_num_seqs)
    largest: dict[str, int] = {}
    for config in configs:
        most = most_requests(config)
        if most is None or config.concurrency <= most:
            key = _alike(config)
            largest[key] = max(largest.get(key, 0), config.concurrency)
    return [
        config.model_copy(update={"max_num_seqs": _slots(config, known, largest)})
        if config.max_num_seqs is None
        else config
        for config in configs
    ]


def _slots(config: RunConfig, known: Mapping[str, set[int]], largest: Mapping[str, int]) -> int:
    """The smallest engine of before that is large enough, else one for the largest cell."""
    key = _alike(config)
    enough = [n for n in known.get(key, ()) if n >= config.concurrency]
    return min(enough, default=max(largest.get(key, 0), config.concurrency))


def _alike(config: RunConfig) -> str:
    """Equal for cells whose engines differ in nothing but speculation and size."""
    return engine_identity(config.baseline().model_copy(update={"max_num_seqs": 1}))


def engine_identity(config: RunConfig) -> str:
    """Equal for configurations that one running engine can measure one after the other."""
    settings = config.engine_settings()
    sampling = settings.sampling
    values = {
        **{name: getattr(settings, name) for name in settings.__dataclass_fields__},
        "engine": config.engine,
        "sampling": dict(sampling.extra),
        "sampled": _adapter(config).samples_as_started and sampling.temperature > 0,
    }
    return json.dumps(values, sort_keys=True, default=str)


def remembers(config: RunConfig) -> bool:
    """Whether an engine keeps of one run what could help the next, and cannot be told to forget."""
    adapter = _adapter(config)
    keeps_prompts = config.prefix_cache and not adapter.forgets_prompts
    return keeps_prompts or config.speculative_algorithm in adapter.remembers


def _adapter(config: RunConfig) -> EngineAdapter:
    import engines

    return engines.adapter(config.engine)


# ---------------------------------------------------------------- naming

WORDS: Mapping[str, str] = {
    "temperature": "t", "random_isl": "isl", "output_length": "osl", "speed_config": "",
    "dataset": "", "draft_model_dir": "", "tp_size": "tp", "pp_size": "pp", "dp_size": "dp",
    "ep_size": "ep", "num_requests": "n",
}  # fmt: skip
"""Field -> what stands before its value in a name; others are named in full."""


def _named(
    asked: Sequence[tuple[RunConfig, Values]], grid: Sequence[str], kept: Sequence[Cell]
) -> Iterator[Cell]:
    names = {identity(cell.config): cell.name for cell in kept}
    wanted = {identity(config) for config, _ in asked}
    by_name = {cell.name: cell for cell in kept}
    taken = {cell.name for cell in kept if identity(cell.config) in wanted}
    config_fields = RunConfig.model_fields.keys() - set(MAPPINGS)
    for config, values in asked:
        name = names.get(identity(config))
        if name is None:
            # What the cell itself varies, too; mappings have no short name.
            varied = [*grid, *(k for k in values if k in config_fields and k not in grid)]
            name = plain = str(values.get("name") or readable_name(config, varied))
            if plain in taken and values.get("name"):
                raise UserError(f"two cells are named '{plain}': give each a name of its own")
            number = itertools.count(2)
            while name in taken:
                name = f"{plain}-{next(number)}"
            if name in by_name:
                _refuse_changed(by_name[name], config)
            taken.add(name)
        yield Cell(name, config, dict(values))


def _refuse_changed(was: Cell, now: RunConfig) -> None:
    """A name that stands for a cell of before which is not asked for any more: `base` changed."""
    for field, (old, new) in was.config.differences(now).items():
        raise UserError(
            f"the cell {was.name} was measured with --{field} {old!r}, you ask for {new!r}: "
            "restore that, or choose another --save_dir"
        )


def readable_name(config: RunConfig, grid: Sequence[str]) -> str:
    """Such as 'eagle3-k3-c8-t0.7': what was drafted, the load, and what else varies (`grid`)."""
    baseline = config.speculative_algorithm == "NONE"
    parts = ["baseline" if baseline else config.speculative_algorithm.lower()]
    if not baseline:
        if "draft_model_dir" in grid and config.draft_model_dir:
            parts.append(PurePath(config.draft_model_dir).name)
        parts.append(f"k{config.draft_length}")
    parts.append(f"c{config.concurrency}")
    for name in grid:
        if name not in (*SPECULATION, "concurrency"):
            value = getattr(config, name)
            parts.append(f"{WORDS.get(name, f'{name}-')}{_plain(name, value)}")
        elif name in ("draft_sample_method", "block_size") and not baseline:  # as it was asked for
            parts.append(f"{name}-{getattr(config, name)}")
    name = "-".join(re.sub(r"[^A-Za-z0-9._+-]+", "_", part).strip("-") for part in parts)
    # A value may be the directory of another sweep's run: what ends its name is no repeat of ours.
    return re.sub(r"-(run\d+)$|\.(json)$", r"_\1\2", name[:MOST_LETTERS])


def _plain(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "all"
    if isinstance(value, float):
        return f"{value:g}"
    if name.endswith(("_dir", "_path")) or name in ("tokenizer", "prompts", "history_from"):
        return PurePath(str(value)).name
    return str(value)
