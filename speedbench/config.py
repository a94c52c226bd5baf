"""RunConfig: everything that decides what a run measures. One field per flag, one meaning each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from speedbench.types import Algorithm, EngineSettings, Sampling, UserError

DATASETS = ("speed", "specbench", "mtbench", "random", "jsonl", "mini", "calibration")

BUCKETS = ("1k", "2k", "8k", "16k", "32k")
SPEED_CONFIGS = ("qualitative", *(f"throughput_{bucket}" for bucket in BUCKETS))
SPEED_CATEGORIES: Mapping[str, int] = dict.fromkeys(
    ("coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem",
     "summarization", "writing"),
    80,
)  # fmt: skip
SPEED_TIERS: Mapping[str, int] = dict.fromkeys(("low_entropy", "mixed", "high_entropy"), 512)
"""Rows per category of SPEED-Bench's qualitative configuration, and of each throughput bucket."""

SPEED_PREFIX = "speed_bench_"
PRESETS: Mapping[str, int | None] = {"ci": 88, "short": 264, "full": None}
"""Rows of a preset, spread evenly over the categories: 8 and 24 of each of the eleven, or all."""

NEEDS_DRAFT_MODEL = ("EAGLE3", "EAGLE", "DRAFT_TARGET", "MEDUSA", "PARD", "DFLASH")
"""Algorithms that cannot run without a second checkpoint (MTP may keep its head in the target)."""

TAKES_NO_DRAFT_MODEL = ("NONE", "NGRAM", "SUFFIX")
"""Algorithms that have no draft checkpoint."""

NOT_IDENTITY = frozenset({"save_dir", "show_progress", "max_duration"})
"""Fields that may differ between a run and its resumption: they change nothing measured."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh]?)")
_SHARD = re.compile(r"(\d+)/(\d+)")


def _seconds(value: object) -> object:
    """'90', '90s', '30m' or '2h' -> seconds."""
    if isinstance(value, str):
        if (match := _DURATION.fullmatch(value.strip())) is None:
            raise ValueError(f"--max_duration is '{value}': expected such as 90s, 30m or 2h")
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    return value


def _flag(group: str, text: str, default: Any = ..., **limits: Any) -> Any:
    """A field with its flag's help text and the group it is listed under in `--help`."""
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


class RunConfig(BaseModel):
    """A validated run configuration; `model_dump(mode="json")` and `from_dict` round-trip it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    engine: str = _flag("engine", "engine that decodes")
    model_dir: str | None = _flag("engine", "target checkpoint: folder or hub id", None)
    tp_size: int = _flag("engine", "tensor parallel size", 1, ge=1)
    pp_size: int = _flag("engine", "pipeline parallel size", 1, ge=1)
    dp_size: int = _flag("engine", "data parallel size", 1, ge=1)
    ep_size: int = _flag("engine", "expert parallel size", 1, ge=1)
    max_seq_len: int | None = _flag(
        "engine",
        "longest prompt + output the engine must hold (default: the model's own)",
        None,
        ge=1,
    )
    prefix_cache: bool = _flag("engine", "let the engine reuse KV of earlier prompts", False)
    trust_remote_code: bool = _flag("engine", "run code shipped with a checkpoint", False)
    capture_experts: bool = _flag(
        "engine", "store which experts a Mixture-of-Experts target used", False
    )
    engine_args: dict[str, Any] = _flag("", "engine arguments, in its own names", {})

    speculative_algorithm: Algorithm = _flag("speculation", "drafting algorithm", "NONE")
    draft_model_dir: str | None = _flag("speculation", "draft checkpoint: folder or hub id", None)
    draft_length: int = _flag("speculation", "K: draft tokens per verification step", 3)
    draft_sample_method: Literal["greedy", "probabilistic"] | None = _flag(
        "speculation", "how drafts are chosen at temperature > 0 (default: the engine's)", None
    )
    block_size: int | None = _flag(
        "speculation", "block size of a block-diffusion drafter (DFLASH)", None, ge=1
    )

    dataset: str = _flag(
        "data",
        f"what is asked: {', '.join(DATASETS)}, or a part of SPEED-Bench by the name that AIPerf "
        "gives it, such as speed_bench_coding or speed_bench_throughput_1k_low_entropy",
        "mini",
    )
    dataset_path: str | None = _flag("data", "file or folder of the dataset", None)
    speed_config: str | None = _flag(
        "data",
        f"configuration of --dataset speed: {', '.join(SPEED_CONFIGS)} (default: qualitative, or "
        "the file that --dataset_path names)",
        None,
    )
    random_isl: int | None = _flag(
        "data", "length in tokens of each random prompt (implies --dataset random)", None, ge=1
    )
    num_requests: int | None = _flag(
        "data", "measure so many rows, spread evenly over categories (default: all)", None, ge=1
    )
    category: tuple[str, ...] = _flag(
        "data", "only these categories or tiers (repeat or comma-separate)", ()
    )
    preset: Literal["ci", "short", "full"] | None = _flag(
        "data",
        "instead of --num_requests: 88 rows, 264 or all, spread evenly over categories; the report "
        "says how small a difference so many rows can show",
        None,
    )
    order: Literal["shuffle", "dataset"] = _flag("data", "order of rows", "shuffle")
    dataset_kwargs: dict[str, Any] = _flag("", "options of the dataset reader", {})

    prompts: str | None = _flag(
        "prompts",
        "token file of `speedbench data tokens`: ask these prompts, and load no tokenizer",
        None,
    )
    tokenizer: str | None = _flag(
        "prompts", "tokenizer folder or hub id (default: the model's)", None
    )
    completions: bool = _flag("prompts", "send the bare text, without a chat template", False)
    postprocess: Literal["base", "gptoss"] = _flag(
        "prompts", "how a reply is cleaned before it becomes history", "base"
    )
    history: Literal["live", "frozen"] = _flag(
        "prompts",
        "earlier replies in later turns: the engine's own, or those of --history_from",
        "live",
    )
    history_from: str | None = _flag(
        "prompts", "run directory or JSONL file {question_id, replies} for --history frozen", None
    )
    chat_template_args: dict[str, Any] = _flag("", "variables of the chat template", {})

    output_length: int = _flag("sampling", "most tokens per reply", 4096, ge=1)
    temperature: float = _flag("sampling", "0 is greedy", 0.0, ge=0)
    top_p: float = _flag("sampling", "nucleus mass", 1.0, gt=0, le=1)
    top_k: int = _flag("sampling", "0 is no limit", 0, ge=0)
    seed: int = _flag("sampling", "seed of row order, random prompts and the engine", 0, ge=0)
    ignore_eos: bool = _flag("sampling", "decode to --output_length whatever the model says", False)
    sampling_kwargs: dict[str, Any] = _flag("", "further sampling parameters, engine's names", {})

    concurrency: int = _flag("measurement", "conversations in flight (in each replica)", 1, ge=1)
    max_num_seqs: int | None = _flag(
        "measurement",
        "requests the engine is started for (default: --concurrency); a sweep sets it, so that "
        "runs of several concurrencies have the same engine",
        None,
        ge=1,
    )
    shard: str | None = _flag(
        "measurement",
        "measure this share of the rows, r/R (0/4 to 3/4): one of several jobs that `speedbench "
        "report --merge` puts together",
        None,
    )
    warmup: int | None = _flag(
        "measurement",
        "requests before the clock starts (default: min(concurrency, 32))",
        None,
        ge=0,
    )
    max_duration: Annotated[float | None, BeforeValidator(_seconds)] = _flag(
        "measurement",
        "stop after so long (90s, 30m, 2h); what is committed can be resumed",
        None,
        gt=0,
    )

    save_dir: str | None = _flag(
        "output", "run directory to create (default: runs/<time>-...)", None
    )
    show_progress: bool = _flag("output", "print progress to stderr", False)

    @model_validator(mode="before")
    @classmethod
    def _in_our_names(cls, values: Any) -> Any:
        """`speed_bench_...` becomes the dataset, configuration and category that it names."""
        name = values.get("dataset") if isinstance(values, Mapping) else None
        if not isinstance(name, str) or not name.startswith(SPEED_PREFIX):
            return values
        config, category = speed_part(name)
        for flag, given, meant in (
            ("speed_config", values.get("speed_config"), config),
            ("category", tuple(values.get("category") or ()), (category,) if category else ()),
        ):
            if given and given != meant:
                raise ValueError(
                    f"--dataset {name} already says which {flag} is meant: leave out --{flag}, or "
                    "use --dataset speed"
                )
        parts = {"dataset": "speed", "speed_config": config}
        return {**values, **parts, **({"category": (category,)} if category else {})}

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        algorithm, draft = self.speculative_algorithm, self.draft_model_dir
        if algorithm == "NONE" and draft is not None:
            raise ValueError(
                f"--draft_model_dir {draft} is given without --speculative_algorithm: "
                f"name one of {', '.join(a for a in get_args(Algorithm) if a != 'NONE')}"
            )
        if algorithm in NEEDS_DRAFT_MODEL and draft is None:
            raise ValueError(f"{algorithm} needs a draft checkpoint: add --draft_model_dir")
        if self.draft_length < 1 and (algorithm != "NONE" or self.draft_length < 0):
            raise ValueError(
                f"--draft_length is {self.draft_length}, expected at least 1: for decoding without "
                "drafts use --speculative_algorithm NONE"
            )
        if self.history == "frozen" and self.history_from is None:
            raise ValueError(
                "--history frozen needs the replies: add --history_from RUN_DIR or FILE.jsonl"
            )
        if self.history == "live" and self.history_from is not None:
            raise ValueError("--history_from is only used with --history frozen: add that")
        if self.prompts is not None:
            made: dict[str, Any] = {
                "tokenizer": None, "completions": False, "history": "live", "random_isl": None,
                "dataset_path": None, "chat_template_args": {}, "dataset_kwargs": {},
            }  # fmt: skip
            for name, default in made.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"--prompts {self.prompts} is encoded already, and --{name} has no effect "
                        "on it: leave one of them out"
                    )
        if (self.dataset == "random") != (self.random_isl is not None):
            raise ValueError("--dataset random and --random_isl LENGTH belong together: give both")
        if self.speed_config is not None and self.dataset != "speed":
            raise ValueError(
                f"--speed_config belongs to --dataset speed, but --dataset is {self.dataset}: "
                "leave one of them out"
            )
        if self.preset is not None and self.num_requests is not None:
            raise ValueError("--preset and --num_requests both say how many rows: give one of them")
        if self.max_num_seqs is not None and self.max_num_seqs < self.concurrency:
            raise ValueError(
                f"--max_num_seqs is {self.max_num_seqs}, fewer than --concurrency "
                f"{self.concurrency}: requests would wait inside the engine, raise it or leave it "
                "out"
            )
        return self

    @field_validator("dataset")
    @classmethod
    def _is_dataset(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(
                f"--dataset is '{name}': expected {', '.join(DATASETS)}, or speed_bench_..."
            )
        return name

    @field_validator("speed_config")
    @classmethod
    def _is_speed_config(cls, name: str | None) -> str | None:
        if name is not None and name not in SPEED_CONFIGS:
            raise ValueError(
                f"--speed_config is '{name}': expected one of {', '.join(SPEED_CONFIGS)}"
            )
        return name

    @field_validator("shard")
    @classmethod
    def _is_share(cls, shard: str | None) -> str | None:
        if shard is not None:
            match = _SHARD.fullmatch(shard)
            if match is None or int(match[1]) >= int(match[2]):
                raise ValueError(
                    f"--shard is '{shard}': expected r/R with r from 0 to R - 1, such as 0/4"
                )
        return shard

    @property
    def share(self) -> slice:
        """The rows of the run's order that `shard` names; all without one."""
        if self.shard is None:
            return slice(None)
        first, step = map(int, self.shard.split("/"))
        return slice(first, None, step)

    @property
    def effective_draft_length(self) -> int:
        """K asked for: 0 without speculation."""
        return 0 if self.speculative_algorithm == "NONE" else self.draft_length

    def baseline(self) -> RunConfig:
        """The arm without speculation: the speculative configuration is left out, all else is
        the same."""
        fields = type(self).model_fields
        names = ("speculative_algorithm", "draft_model_dir", "draft_length", "draft_sample_method",
                 "block_size")  # fmt: skip
        arguments = {k: v for k, v in self.engine_args.items() if not _is_speculative(k)}
        return self.model_copy(
            update={**{name: fields[name].default for name in names}, "engine_args": arguments}
        )

    @property
    def n_warmup(self) -> int:
        return min(self.concurrency, 32) if self.warmup is None else self.warmup

    @property
    def n_gpus(self) -> int:
        """Devices the engine spreads over (experts share the tensor-parallel ranks)."""
        return self.tp_size * self.pp_size * self.dp_size

    def engine_settings(self) -> EngineSettings:
        """The adapter's share of this configuration."""
        return EngineSettings(
            model_dir=self.model_dir or "",
            draft_model_dir=self.draft_model_dir,
            algorithm=self.speculative_algorithm,
            draft_length=self.draft_length,
            draft_sample_method=self.draft_sample_method,
            block_size=self.block_size,
            concurrency=self.max_num_seqs or self.concurrency,
            max_seq_len=self.max_seq_len,
            tp_size=self.tp_size,
            pp_size=self.pp_size,
            dp_size=self.dp_size,
            ep_size=self.ep_size,
            prefix_cache=self.prefix_cache,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            capture_experts=self.capture_experts,
            engine_args=self.engine_args,
            sampling=self.sampling(()),
        )

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling:
        """The run's one sampling object."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=() if self.ignore_eos else stop_token_ids,
            extra=self.sampling_kwargs,
        )

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that would measure something else, by name: (self, other)."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {
            name: (mine[name], theirs[name])
            for name in mine
            if name not in NOT_IDENTITY and mine[name] != theirs[name]
        }


def _is_speculative(argument: str) -> bool:
    """Whether an engine argument, in any engine's spelling, says how to draft."""
    return argument.startswith("speculative_") or argument == "max_matching_ngram_size"


def speed_part(name: str) -> tuple[str, str | None]:
    """AIPerf's name of a part of SPEED-Bench -> its configuration and category (None: all)."""
    part = name.removeprefix(SPEED_PREFIX)
    if part in SPEED_CONFIGS:
        return part, None
    if part in SPEED_CATEGORIES:
        return "qualitative", part
    for config in SPEED_CONFIGS[1:]:
        if (tier := part.removeprefix(f"{config}_")) in SPEED_TIERS:
            return config, tier
    raise ValueError(
        f"--dataset is '{name}', which SPEED-Bench does not have: expected {SPEED_PREFIX} followed "
        f"by {', '.join(SPEED_CATEGORIES)}, qualitative, or throughput_{{{'|'.join(BUCKETS)}}} "
        f"with or without _{{{'|'.join(SPEED_TIERS)}}}"
    )


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Validate plain values. Raises UserError with one sentence for the first fault found."""
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """The first fault of a validation error, in our words."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":
        return message
    if fault["type"] == "missing":
        return f"--{name} is missing: say which {name} to use"
    if fault["type"] == "extra_forbidden":
        return f"'{name}' is no field of a run configuration: see run.py --help"
    return f"--{name} is {fault['input']!r}: {message[0].lower()}{message[1:]}"


RUNTIME_SECTIONS = ("engine_args", "sampling_kwargs", "chat_template_args", "dataset_kwargs")


def read_yaml(path: str | Path, flag: str, expected: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file, loaded safely. Raises UserError where there is none, where a key
    stands twice (the first would be lost), or where it holds what no JSON file can."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key}' stands twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read ({error}): give a YAML file") from None
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{flag} {path} is not YAML ({what}): mend the file") from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise UserError(
            f"{flag} {path} holds a {type(found).__name__}, expected a mapping with "
            f"{', '.join(expected)}"
        )
    refuse_unstorable(found, f"{flag} {path}")
    return found


def refuse_unstorable(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError for what no manifest could hold as it was asked for."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"{where} holds what no JSON file can ({error}): give finite numbers, put quotes "
            "around dates, and let nothing contain itself"
        ) from None


def read_runtime_params(path: str) -> dict[str, dict[str, Any]]:
    """The sections of a `--runtime_params` YAML file, checked for unknown names."""
    found = read_yaml(path, "--runtime_params", RUNTIME_SECTIONS)
    for section, values in found.items():
        if section not in RUNTIME_SECTIONS:
            raise UserError(
                f"--runtime_params {path} has the unknown section '{section}': expected "
                f"{', '.join(RUNTIME_SECTIONS)}"
            )
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UserError(
                f"--runtime_params {path}: section '{section}' must map names to values"
            )
    return found
