"""RunConfig: everything that decides what a run measures. One field per flag, one meaning each."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from speedbench.limits import LIMITED, parse_limits
from speedbench.types import Algorithm, EngineSettings, Sampling, ServerSettings, UserError

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

SERVER = "OPENAI"
"""The engine that is a server under test."""

OF_A_SERVER = (
    "url", "model", "endpoint", "request_timeout", "api_key_env", "metrics_url",
    "no_server_metrics",
)  # fmt: skip
"""Fields that only a server has."""

OF_AN_ENGINE = ("engine_args", "capture_experts", "draft_sample_method", "block_size")
"""Fields that decide how an engine is started, and that nobody could take for a description."""

TAKES_NO_DRAFT_MODEL = ("NONE", "NGRAM", "SUFFIX")
"""Algorithms that have no draft checkpoint."""

NOT_IDENTITY = frozenset(
    {
        "save_dir", "show_progress", "max_duration", "stall_timeout", "goodput", "url",
        "api_key_env", "metrics_url",
    }
)  # fmt: skip
"""Fields that may differ between a run and its resumption: they change nothing measured."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh]?)")
_SHARD = re.compile(r"(\d+)/(\d+)")


def _seconds(value: object, field: ValidationInfo) -> object:
    """'90', '90s', '30m' or '2h' -> seconds."""
    if isinstance(value, str):
        if (match := _DURATION.fullmatch(value.strip())) is None:
            raise ValueError(f"--{field.field_name} is '{value}': expected such as 90s, 30m or 2h")
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

    url: str | None = _flag(
        "server", "of --engine OPENAI: http(s)://host:port, without a key", None
    )
    model: str | None = _flag("server", "the model's name at the server", None)
    endpoint: Literal["completions", "chat"] = _flag(
        "server",
        "completions takes token IDs; chat takes text, which the server templates and encodes: "
        "identical inputs cannot be shown then",
        "completions",
    )
    request_timeout: Annotated[float, BeforeValidator(_seconds)] = _flag(
        "server", "a request that has not ended after so long (90s, 30m, 2h) failed", 1800.0, gt=0
    )
    api_key_env: str | None = _flag(
        "server",
        "environment variable that holds the API key (default: OPENAI_API_KEY, if it is set)",
        None,
    )
    metrics_url: str | None = _flag(
        "server",
        "where the server's Prometheus metrics are, of several workers by commas (default: "
        "/metrics or /prometheus/metrics beside --url)",
        None,
    )
    no_server_metrics: bool = _flag("server", "do not read the server's metrics", False)

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
    request_rate: float | None = _flag(
        "measurement",
        "conversations per second that come whatever the engine does (an open loop); --concurrency "
        "is then how many may be in flight at most, and what waits for a place waits in its TTFT",
        None,
        gt=0,
    )
    arrivals: Literal["poisson", "constant"] = _flag(
        "measurement", "of --request_rate: gaps that are random (exponential) or even", "poisson"
    )
    duration: Annotated[float | None, BeforeValidator(_seconds)] = _flag(
        "measurement", "of --request_rate: no conversation comes after so long (90s, 30m)", None,
        gt=0,
    )  # fmt: skip
    goodput: str | None = _flag(
        "measurement",
        "count the requests that keep these limits, such as ttft=200ms,step_time=30ms "
        f"({', '.join(LIMITED)})",
        None,
    )
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
    stall_timeout: Annotated[float, BeforeValidator(_seconds)] = _flag(
        "measurement",
        "an engine that gives no step for so long while requests are in flight is ended, and what "
        "its processes were doing is stored; 0: never",
        600.0,
        ge=0,
    )

    save_dir: str | None = _flag(
        "output", "run directory to create (default: runs/<time>-...)", None
    )
    show_progress: bool | None = _flag(
        "output",
        "tell on stderr what goes on, before the first token, too (default: a live line on a "
        "terminal, a line every 30 s in a log; --no_show_progress: nothing)",
        None,
    )

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
        if algorithm in NEEDS_DRAFT_MODEL and draft is None and self.engine != SERVER:
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
        self._refuse_misplaced()
        self._refuse_half_a_load()
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

    def _refuse_half_a_load(self) -> None:
        if self.request_rate is None:
            for name in ("arrivals", "duration"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"--{name} belongs to --request_rate: give that, too")
        elif self.concurrency == 1:
            raise ValueError(
                "--request_rate needs --concurrency N: how many conversations may be in flight at "
                "most, more than you expect"
            )

    def _refuse_misplaced(self) -> None:
        """Raise for what belongs to a server without one, or to an engine where a server is asked,
        which was started without us."""
        fields = type(self).model_fields
        names = OF_A_SERVER if self.engine != SERVER else OF_AN_ENGINE
        for name in names:
            if getattr(self, name) == fields[name].default:
                continue
            if self.engine != SERVER:
                raise ValueError(f"--{name} belongs to --engine {SERVER}: leave it out")
            shown = "engine_args" if name == "engine_args" else f"--{name}"
            raise ValueError(
                f"{shown} cannot be set from here: the server at {self.url} was started without "
                "speedbench; leave it out and start the server with it"
            )
        if self.engine != SERVER:
            return
        for name in ("url", "model"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: --engine {SERVER} needs --url and --model")
        _refuse_no_place("url", self.url or "")
        for one in (self.metrics_url or "").split(",") if self.metrics_url is not None else ():
            _refuse_no_place("metrics_url", one.strip())

    @field_validator("speculative_algorithm", mode="before")
    @classmethod
    def _in_capitals(cls, name: Any) -> Any:
        return name.upper() if isinstance(name, str) else name

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

    @field_validator("goodput")
    @classmethod
    def _are_limits(cls, text: str | None) -> str | None:
        if text is not None:
            parse_limits(text)
        return text

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
            server=self._server(),
        )

    def _server(self) -> ServerSettings | None:
        if self.engine != SERVER:
            return None
        return ServerSettings(
            url=self.url or "",
            model=self.model or "",
            endpoint=self.endpoint,
            request_timeout_s=self.request_timeout,
            api_key_env=self.api_key_env,
            metrics_url=self.metrics_url,
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


def _refuse_no_place(flag: str, url: str) -> None:
    """Raise for an address that is none, or that holds what must not be stored."""
    parts = urlsplit(url)
    try:
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"--{flag} is '{url}': {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--{flag} is '{url}': expected such as http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"--{flag} holds more than a place, and would be stored: leave out user, key, query "
            "and fragment (a key comes from the environment, see --api_key_env)"
        )


DEFAULTS: Mapping[str, Any] = {
    name: field.default for name, field in RunConfig.model_fields.items()
}
"""What a field is where a run was stored before there was such a field."""


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


def from_dict(values: Mapping[str, Any], where: str = "") -> RunConfig:
    """Validate plain values. Raises UserError with one sentence for the first fault found; `where`:
    the file that they were stored in."""
    try:
        return RunConfig.model_validate(dict(values))
    except (ValueError, TypeError) as error:  # a lone surrogate is no ValidationError
        told = _sentence(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{where}: {told}" if where else told) from None


def _sentence(error: ValidationError) -> str:
    """The first fault of a validation error, in our words."""
    fault = error.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":
        return message
    if fault["type"] == "missing":
        return f"--{name} is missing: say which {name} to use"
    if fault["type"] == "tuple_type":
        return f"--{name} is {fault['input']!r:.200}, expected a list: [{fault['input']}]"
    if fault["type"] == "extra_forbidden":
        return f"'{name}' is no field of a run configuration: see run.py --help"
    return f"--{name} is {fault['input']!r:.200}: {message[0].lower()}{message[1:]}"


MOST_VALUES = 100_000
"""Of a YAML file, its aliases followed."""

RUNTIME_SECTIONS = ("engine_args", "sampling_kwargs", "chat_template_args", "dataset_kwargs")


def read_yaml(path: str | Path, flag: str, expected: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file, loaded safely. Raises UserError where there is none, where a key
    stands twice (the first would be lost), or where it holds what no JSON file can."""
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None and _n_values(node) > MOST_VALUES:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"it stands for more than {MOST_VALUES} values: let nothing contain itself",
                    node.start_mark,
                )
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, Hashable):
                    continue  # refused below, in its own words
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key}' stands twice", node.start_mark
                    )
                seen.add(key)
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


def _n_values(root: Any) -> int:
    """Values a YAML node stands for once its aliases are followed: a page of them can stand for
    more than a machine holds. Of one that contains itself, too many."""
    known: dict[int, int] = {}

    def counted(node: Any) -> int:
        if id(node) not in known:
            known[id(node)] = MOST_VALUES + 1  # met again inside itself
            inner = node.value if isinstance(node.value, list) else ()
            parts = [part for pair in inner for part in (pair if type(pair) is tuple else (pair,))]
            known[id(node)] = min(MOST_VALUES + 1, 1 + sum(map(counted, parts)))
        return known[id(node)]

    return counted(root)


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
