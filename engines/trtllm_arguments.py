"""TensorRT-LLM's constructor arguments: our settings in the names of the installed version.

Every name is looked up in the installed classes. What a user asked for and the version lacks is
an error; what we would set and it lacks is left out and reported.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from speedbench.types import Algorithm, EngineSettings, UserError
from speedbench.words import first_line, like

CLASSES: Mapping[Algorithm, tuple[str, ...]] = {
    "EAGLE3": ("Eagle3DecodingConfig", "EagleDecodingConfig"),  # the first from 1.3 on
    "MTP": ("MTPDecodingConfig",),
    "NGRAM": ("NGramDecodingConfig",),
    "DRAFT_TARGET": ("DraftTargetDecodingConfig",),
    "PARD": ("PARDDecodingConfig",),
    "DFLASH": ("DFlashDecodingConfig",),
}
"""Configuration classes of each algorithm, newest first."""

NEEDS_DRAFT_MODEL = ("EAGLE3", "DRAFT_TARGET", "PARD", "DFLASH")

OURS = {
    "stream_interval": "every step is recorded",
    "num_postprocess_workers": "with workers, responses no longer say how many steps they hold",
    "max_batch_size": "use --max_num_seqs, or --concurrency, in both arms",
    "skip_tokenizer_init": "prompts are token IDs and no text is needed",
    "tokenizer": "prompts are token IDs and no text is needed",
    "speculative_model": "it is --draft_model_dir",
    "max_beam_width": "beam search has no acceptance length",
    "enable_early_first_token_response": "a first token sent before its step has ended has no time",
    "sampler_type": "versions disagree about it, and 'auto' is the sampler of speculation",
    "enable_trtllm_sampler": "that sampler does not speculate",
    "backend": "it is --engine TRTLLM or AUTO_DEPLOY",
    "orchestrator_type": "with Ray, responses overwrite each other and steps are lost",
    "ray_worker_extension_cls": "Ray loses steps",
    "ray_placement_config": "Ray loses steps",
    "env_overrides": "set variables outside, so that the run records them",
    "return_perf_metrics": "what it tells about drafts is zero in most versions",
    "cuda_graph_batch_sizes": "they are 1, 2, 4, ... --concurrency",
    "generation_config": "sampling is said by flags",
}
"""Engine arguments that the measurement itself sets or cannot bear, and why."""

AUTO_DEPLOY_OURS = {"runtime": "the other runtime is not the one that serves"} | dict.fromkeys(
    (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "context_parallel_size",
        "moe_cluster_parallel_size",
        "moe_tensor_parallel_size",
        "moe_expert_parallel_size",
        "enable_attention_dp",
        "cp_config",
    ),
    "AutoDeploy spreads over --tp_size devices (its world_size) and in no other way",
)

_LOAD = "it makes acceptance depend on the load"
_TREE = "a tree of drafts has no draft length"
SPECULATIVE_OURS = {
    "max_draft_len": "use --draft_length",
    "num_nextn_predict_layers": "use --draft_length",
    "max_total_draft_tokens": "use --draft_length",
    "num_eagle_layers": "use --draft_length",
    "speculative_model": "use --draft_model_dir",
    "speculative_model_dir": "use --draft_model_dir",
    "decoding_type": "use --speculative_algorithm",
    "allow_advanced_sampling": "it follows --temperature",
    "max_concurrency": _LOAD,
    "draft_len_schedule": _LOAD,
    "acceptance_window": _LOAD,
    "acceptance_length_threshold": _LOAD,
    "acceptance_rate_window_size": _LOAD,
    "acceptance_rate_threshold": _LOAD,
    "eagle_choices": _TREE,
    "use_dynamic_tree": _TREE,
    "dynamic_tree_max_topK": _TREE,
    "max_non_leaves_per_layer": _TREE,
    "is_auto_heuristic": _LOAD,
}
"""Fields of a speculative_config that are not the user's, and why."""

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sampling parameters that drafts made inside the target do without, and their neutral values."""

REFUSED_ENVIRONMENT = "TLLM_EXECUTOR_PERIODICAL_RESP_IN_AWAIT"
FORCED_ACCEPTANCE = "TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS"
MAX_NUM_TOKENS = 8192
"""Tokens per engine step, where the user says nothing: the engine's own default."""


@dataclass(frozen=True, slots=True)
class Api:
    """What the installed TensorRT-LLM offers.

    backend  "pytorch" or "_autodeploy"
    fields   names its constructor takes
    release  (major, minor)
    """

    version: str
    release: tuple[int, int]
    backend: str
    llm: Any
    sampling_params: Any
    configs: Any
    fields: frozenset[str]

    @property
    def name(self) -> str:
        return f"TensorRT-LLM {self.version}"

    def config_class(self, names: Iterable[str]) -> Any | None:
        """The first of these configuration classes that it has."""
        return next((c for n in names if (c := getattr(self.configs, n, None)) is not None), None)

    def sampling_fields(self) -> set[str]:
        return {
            f.name for f in dataclasses.fields(self.sampling_params) if not f.name.startswith("_")
        }


def installed(backend: str) -> Api:
    """Import TensorRT-LLM and look at it. Raises UserError where that fails."""
    try:
        package = importlib.import_module("tensorrt_llm")
        configs = importlib.import_module("tensorrt_llm.llmapi")
        if backend == "_autodeploy":
            llm = importlib.import_module("tensorrt_llm._torch.auto_deploy").LLM
            arguments = importlib.import_module("tensorrt_llm._torch.auto_deploy.llm_args").LlmArgs
        else:
            llm, arguments = package.LLM, configs.TorchLlmArgs
        version = str(package.__version__)
        sampling_params = package.SamplingParams
    except Exception as error:  # noqa: BLE001 - a missing driver raises anything
        raise UserError(
            f"TensorRT-LLM cannot be imported ({first_line(error)}): run inside NVIDIA's release "
            "container, on a machine with an NVIDIA GPU"
        ) from None
    return Api(
        version=version,
        release=_release(version),
        backend=backend,
        llm=llm,
        sampling_params=sampling_params,
        configs=configs,
        fields=frozenset(arguments.model_fields),
    )


def _release(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise UserError(f"TensorRT-LLM calls itself version '{version}': expected 1.0 or newer")
    release = int(match[1]), int(match[2])
    if release < (1, 0):
        raise UserError(f"TensorRT-LLM {version} is too old: use 1.0 or newer")
    return release


def is_set(name: str, environment: Mapping[str, str]) -> bool:
    """Whether a number-valued variable says more than nothing."""
    return environment.get(name, "0") not in ("", "0")


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Refuse a variable that would merge responses."""
    if is_set(REFUSED_ENVIRONMENT, environment):
        raise UserError(
            f"{REFUSED_ENVIRONMENT} is set, which holds responses back: unset it, so that a step "
            "is seen when it happens"
        )


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that change what the engine does; those of a launcher change with every start."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name.startswith(("TLLM_", "TRTLLM_")) or name == "FORCE_DETERMINISTIC")
        and not name.startswith("TLLM_SPAWN_PROXY")
        and not any(word in name for word in ("KEY", "TOKEN_", "SECRET", "PASSWORD", "ADDR"))
    }


# ---------------------------------------------------------------- the arguments


@dataclass(frozen=True, slots=True)
class Arguments:
    """How an engine is to be started.

    keywords       of its constructor
    speculative    its decoding configuration object, already checked; None in a baseline
    greedy_because why a request at temperature > 0 would be decoded greedily, or ''
    overlap        whether its overlap scheduler runs: "on", "off", "the engine's choice"
    unused         defaults of ours that this version does not have
    """

    keywords: Mapping[str, Any]
    speculative: Any | None
    greedy_because: str
    overlap: str
    unused: tuple[str, ...]


def engine_arguments(settings: EngineSettings, api: Api) -> Arguments:
    """The arguments for these settings. Raises UserError for what this version does not take."""
    user = dict(settings.engine_args)
    _refuse_engine_arguments(user, api)
    _refuse_flags(settings, api)
    extra = user.pop("speculative_config", {})
    if not isinstance(extra, dict):
        raise UserError("engine_args: speculative_config must map names to values")
    if settings.algorithm == "NONE" and extra:
        raise UserError(
            "engine_args has a speculative_config but --speculative_algorithm is NONE: name the "
            "algorithm"
        )
    speculative = None if settings.algorithm == "NONE" else _speculative(settings, extra, api)
    overlap = _overlap(settings, speculative, user, api)
    defaults = _defaults(settings, user, api)
    if overlap == "off":
        defaults["disable_overlap_scheduler"] = True
    sampled = settings.sampling.temperature > 0
    if sampled and api.release < (1, 1):
        defaults["enable_mixed_sampler"] = True  # 1.0 takes the likeliest token without it
    greedy_because = _greedy_because(settings, speculative, {**defaults, **user}, api)
    if sampled and greedy_because:
        raise UserError(f"--temperature {settings.sampling.temperature:g}: {greedy_because}")
    unused = tuple(name for name in defaults if name not in api.fields)
    keywords = {k: v for k, v in {**defaults, **user}.items() if k in api.fields}
    if speculative is not None:
        keywords["speculative_config"] = speculative
    return Arguments(keywords, speculative, greedy_because, overlap, unused)


def _refuse_engine_arguments(user: Mapping[str, object], api: Api) -> None:
    ours = OURS | (AUTO_DEPLOY_OURS if api.backend == "_autodeploy" else {})
    for name in user:
        if name in ours:
            raise UserError(
                f"engine_args sets '{name}', which speedbench sets itself: {ours[name]}"
            )
        if name not in api.fields:
            raise UserError(f"{api.name} has no engine argument '{name}'{like(name, api.fields)}")


def _refuse_flags(settings: EngineSettings, api: Api) -> None:
    """Flags that this engine, or this version, would not obey."""
    speculates = settings.algorithm != "NONE"
    k = settings.draft_length
    if settings.block_size is not None and settings.algorithm != "DFLASH":
        raise UserError(
            "--block_size is for DFLASH: TensorRT-LLM's other drafters propose --draft_length "
            "tokens"
        )
    if settings.block_size not in (None, k + 1):
        raise UserError(
            f"--block_size is {settings.block_size}, a DFLASH block is --draft_length + 1 = "
            f"{k + 1} tokens: make them agree, or leave --block_size out"
        )
    if settings.draft_sample_method is not None:
        raise UserError(
            f"{api.name} has no choice of --draft_sample_method: leave it out (on new versions see "
            "use_rejection_sampling in speculative_config)"
        )
    if settings.capture_experts:
        raise UserError(f"{api.name} does not tell routed experts: leave --capture_experts out")
    if settings.dp_size > 1:
        raise UserError(
            f"{api.name} has no --dp_size: start one run per replica, or set enable_attention_dp "
            "in engine_args"
        )
    if speculates and settings.pp_size > 1:
        raise UserError(
            f"{api.name} does not speculate over pipeline stages (--pp_size {settings.pp_size}): "
            "use --tp_size"
        )
    if api.backend == "_autodeploy" and (settings.pp_size > 1 or settings.ep_size > 1):
        raise UserError(f"AutoDeploy has no --pp_size and no --ep_size: {api.name} uses --tp_size")
    if settings.algorithm in ("NGRAM", "MTP") and settings.draft_model_dir is not None:
        raise UserError(
            f"{settings.algorithm} takes no draft checkpoint here: leave --draft_model_dir out"
        )


def _defaults(settings: EngineSettings, user: dict[str, Any], api: Api) -> dict[str, Any]:
    """What we set, with the user's nested configurations (taken out of `user`) merged in."""
    max_seq_len = settings.max_seq_len or _model_limit(settings.model_dir)
    max_num_tokens = user.get("max_num_tokens") or MAX_NUM_TOKENS
    k = 0 if settings.algorithm == "NONE" else settings.draft_length
    if settings.concurrency * (k + 1) > max_num_tokens:
        raise UserError(
            f"--concurrency {settings.concurrency} with {k + 1} tokens each does not fit into one "
            f"engine step of {max_num_tokens} tokens: raise max_num_tokens in engine_args, in both "
            "arms"
        )
    defaults: dict[str, Any] = {
        "model": settings.model_dir,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "max_batch_size": settings.concurrency,
        "max_seq_len": max_seq_len,
        "max_num_tokens": max_num_tokens,
        # Without it a prompt beyond max_num_tokens is refused. The same in both arms.
        "enable_chunked_prefill": max_seq_len > max_num_tokens,
        "stream_interval": 1,
        "num_postprocess_workers": 0,
        "kv_cache_config": _nested(
            api,
            "kv_cache_config",
            "KvCacheConfig",
            {"enable_block_reuse": settings.prefix_cache},
            user.pop("kv_cache_config", {}),
        ),
        **_cuda_graphs(settings.concurrency, user, api),
    }
    if "enable_early_first_token_response" in api.fields:
        defaults["enable_early_first_token_response"] = False
    if api.backend == "_autodeploy":
        if settings.tp_size > 1:
            defaults["world_size"] = settings.tp_size
        return defaults
    defaults["tensor_parallel_size"] = settings.tp_size
    defaults["pipeline_parallel_size"] = settings.pp_size
    if settings.ep_size > 1:
        defaults["moe_expert_parallel_size"] = settings.ep_size
    return defaults


def _cuda_graphs(concurrency: int, user: dict[str, Any], api: Api) -> dict[str, Any]:
    """One graph per power of two up to the concurrency; null in engine_args turns them off."""
    sizes = [1 << i for i in range(concurrency.bit_length()) if 1 << i < concurrency]
    sizes.append(concurrency)
    if "cuda_graph_config" not in api.fields:  # an older AutoDeploy
        return {"cuda_graph_batch_sizes": sizes}
    given = user.pop("cuda_graph_config", {})
    if given is None:
        return {"cuda_graph_config": None}
    ours = {"batch_sizes": sizes, "enable_padding": True}
    refused = {"max_batch_size": 0}
    return {
        "cuda_graph_config": _nested(
            api, "cuda_graph_config", "CudaGraphConfig", ours, given, refused
        )
    }


def _nested(
    api: Api,
    argument: str,
    class_name: str,
    ours: Mapping[str, Any],
    given: object,
    refused: Mapping[str, object] | None = None,
) -> Any:
    """A nested configuration: ours, and what the user adds to it."""
    if not isinstance(given, dict):
        raise UserError(f"engine_args: {argument} must map names to values")
    config_class = api.config_class([class_name])
    names = accepted_names(config_class)
    for name in given:
        if name in ours or name in (refused or {}):
            raise UserError(
                f"engine_args: {argument} sets '{name}', which speedbench sets itself (from "
                "--prefix_cache and --concurrency)"
            )
        if name not in names:
            raise UserError(f"{api.name} has no '{name}' in {argument}{like(name, names)}")
    return cast(Any, config_class)(**{**ours, **given})


def _model_limit(folder: str) -> int:
    """Longest sequence of a checkpoint. The engine must be told: it would guess, and clip."""
    config = model_config(folder)
    found = config.get("max_position_embeddings")
    if not isinstance(found, int):
        raise UserError(
            f"how long a sequence {folder} takes is not known (no max_position_embeddings in a "
            "local config.json): give --max_seq_len, the longest prompt plus output"
        )
    return found


def model_config(folder: str) -> Mapping[str, Any]:
    """A local checkpoint's config.json, that of its language model where it has several."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        return {}
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


# ---------------------------------------------------------------- speculation


def _speculative(settings: EngineSettings, extra: Mapping[str, Any], api: Api) -> Any:
    """The decoding configuration, constructed and then checked: the engine may have ignored a
    name that it accepts."""
    algorithm = settings.algorithm
    _refuse_auto_deploy(settings, api)
    config_class = api.config_class(CLASSES.get(algorithm, ()))
    if config_class is None:
        has = [a for a in CLASSES if api.config_class(CLASSES[a]) is not None]
        raise UserError(f"{api.name} has no {algorithm}: it has {', '.join(has)}")
    names = accepted_names(config_class)
    for name in extra:
        if name in SPECULATIVE_OURS:
            raise UserError(f"speculative_config sets '{name}': {SPECULATIVE_OURS[name]}")
        if name not in names:
            raise UserError(
                f"{api.name} has no '{name}' in the speculative_config of {algorithm}"
                f"{like(name, names)}"
            )
    if config_class.__name__ == "Eagle3DecodingConfig" and not extra.get("eagle3_one_model", True):
        raise UserError(f"{api.name} ignores eagle3_one_model false: leave it out")
    config = config_class(**{**_speculative_defaults(settings, names, api), **extra})
    check_speculative(config, settings, api)
    supports = getattr(config, "supports_backend", None)
    if supports is not None and not supports(api.backend):
        raise UserError(f"{api.name} does not offer {algorithm} on its backend '{api.backend}'")
    return config


def _speculative_defaults(settings: EngineSettings, names: set[str], api: Api) -> dict[str, Any]:
    """Names of every version: the old spellings, while they are taken (as alias or remapped)."""
    values: dict[str, Any] = {}
    old_length = settings.algorithm == "MTP" and "num_nextn_predict_layers" in names
    values["num_nextn_predict_layers" if old_length else "max_draft_len"] = settings.draft_length
    if settings.algorithm in NEEDS_DRAFT_MODEL:
        old_model = "speculative_model_dir" in names
        key = "speculative_model_dir" if old_model else "speculative_model"
        values[key] = settings.draft_model_dir
    if settings.algorithm == "EAGLE3" and "eagle3_one_model" in names:
        values["eagle3_one_model"] = True
    if settings.algorithm == "NGRAM":
        # The default size is 0 up to 1.2, which is refused; 2 later. A pool of all requests would
        # make acceptance depend on their order and number.
        values |= {"max_matching_ngram_size": 2, "is_public_pool": False}
    sampled = settings.sampling.temperature > 0
    if sampled and "allow_advanced_sampling" in names and api.release < (1, 4):
        values["allow_advanced_sampling"] = True  # without effect from 1.4 on
    return values


def check_speculative(config: Any, settings: EngineSettings, api: Api) -> None:
    """The object must say what was asked, whichever names this version uses."""
    length = draft_length(config)
    if length != settings.draft_length:
        raise UserError(
            f"{api.name} took --draft_length {settings.draft_length} as {length}: this version is "
            "not known to speedbench, use another"
        )
    if settings.algorithm in NEEDS_DRAFT_MODEL:
        found = getattr(config, "speculative_model", None)
        found = found or getattr(config, "speculative_model_dir", None)
        asked = Path(str(settings.draft_model_dir))
        # A hub id becomes the folder it was downloaded to.
        if found is None or (asked.exists() and Path(str(found)) != asked):
            raise UserError(
                f"{api.name} took --draft_model_dir {asked} as {found}: this version is not known "
                "to speedbench, use another"
            )


def draft_length(config: Any) -> int:
    """K of a decoding configuration. MTP up to 1.1 leaves max_draft_len empty."""
    if config is None:
        return 0
    found = getattr(config, "max_draft_len", None)
    return int(found if found is not None else getattr(config, "num_nextn_predict_layers", 0))


def _refuse_auto_deploy(settings: EngineSettings, api: Api) -> None:
    if api.backend != "_autodeploy":
        return
    since = {"DRAFT_TARGET": (1, 2), "EAGLE3": (1, 3), "MTP": (1, 3)}.get(settings.algorithm)
    if since is None or api.release < since:
        raise UserError(
            f"AutoDeploy of {api.name} has no {settings.algorithm}: use --engine TRTLLM"
        )
    if settings.algorithm == "DRAFT_TARGET" and settings.tp_size > 1:
        raise UserError("AutoDeploy runs DRAFT_TARGET on one device only: use --tp_size 1")


def _mode_says(speculative: Any, question: str) -> bool | None:
    """What the engine's own decoding mode says about itself; None where it cannot be asked."""
    try:
        return bool(getattr(speculative.spec_dec_mode, question)())
    except Exception:  # noqa: BLE001 - internal, moves between versions; a table stands in
        return None


def _is_one_model(settings: EngineSettings, speculative: Any) -> bool:
    """Whether drafts are made inside the target's forward pass."""
    if (says := _mode_says(speculative, "use_one_engine")) is not None:
        return says
    if settings.algorithm == "EAGLE3":
        return bool(getattr(speculative, "eagle3_one_model", True))
    if settings.algorithm == "MTP":
        vanilla = bool(getattr(speculative, "use_mtp_vanilla", False))
        return vanilla or bool(getattr(speculative, "mtp_eagle_one_model", True))
    return settings.algorithm in ("PARD", "DFLASH")


def _greedy_because(
    settings: EngineSettings, speculative: Any, keywords: Mapping[str, Any], api: Api
) -> str:
    """Why this engine would take the likeliest token whatever the temperature, or ''."""
    other_start = "this engine was started for temperature 0: start it with the one you want"
    if "enable_mixed_sampler" in api.fields and not keywords.get("enable_mixed_sampler"):
        return other_start
    if speculative is None or api.release >= (1, 4):
        return ""
    if not _is_one_model(settings, speculative):
        return ""
    if settings.algorithm == "MTP" or api.release < (1, 2):
        return (
            f"{api.name} decodes {settings.algorithm} greedily whatever the temperature: use "
            "temperature 0 or a newer version"
        )
    if not getattr(speculative, "allow_advanced_sampling", False):
        return other_start
    return ""


def refuse_sampling(settings: EngineSettings, speculative: Any, api: Api) -> None:
    """Refuse sampling parameters that speculation would ignore in silence."""
    if speculative is None:
        return
    extra = settings.sampling.extra
    if asked := [name for name in ("logprobs", "prompt_logprobs") if extra.get(name)]:
        raise UserError(
            f"sampling_kwargs asks for {asked[0]}, which {api.name} does not compute with "
            "speculation: leave it out"
        )
    asked = [name for name, nothing in PENALTIES.items() if extra.get(name, nothing) != nothing]
    if not asked or not _is_one_model(settings, speculative):
        return
    if "enable_penalty" not in accepted_names(type(speculative)):
        raise UserError(
            f"sampling_kwargs asks for {asked[0]}, which {api.name} does not apply where drafts "
            "are made inside the target: leave it out, in both arms"
        )
    if not speculative.enable_penalty:
        raise UserError(
            f"sampling_kwargs asks for {asked[0]}, which {api.name} applies to speculation only "
            "with enable_penalty: add enable_penalty true to speculative_config in engine_args"
        )


def _overlap(settings: EngineSettings, speculative: Any, user: Mapping[str, Any], api: Api) -> str:
    """Whether the overlap scheduler runs. Versions from 1.1 on turn it off themselves where
    speculation lacks it, with a warning; saying so ourselves makes it known."""
    asked = user.get("disable_overlap_scheduler")
    if asked:
        return "off"
    supported = speculative is None or _mode_says(speculative, "support_overlap_scheduler")
    if supported is None:
        supported = _overlap_of_version(settings, speculative, api)
    if supported is False and asked is False:
        raise UserError(
            f"{api.name} runs {settings.algorithm} without its overlap scheduler only: leave "
            "disable_overlap_scheduler out"
        )
    return {True: "on", False: "off", None: "the engine's choice"}[supported]


def _overlap_of_version(settings: EngineSettings, speculative: Any, api: Api) -> bool | None:
    if _is_one_model(settings, speculative):
        return True
    if api.release < (1, 2):
        return False
    if api.release < (1, 3):
        return settings.algorithm != "NGRAM"
    return None


# ---------------------------------------------------------------- small things


def accepted_names(model: Any) -> set[str]:
    """Names a pydantic model takes as input: its fields', or their aliases where it has some."""
    by_name = model.model_config.get("populate_by_name") or model.model_config.get(
        "validate_by_name"
    )
    names: set[str] = set()
    for name, field in model.model_fields.items():
        alias = field.validation_alias or field.alias
        if alias is None or by_name:
            names.add(name)
        if alias is not None:
            choices = getattr(alias, "choices", [alias])
            names.update(choice for choice in choices if isinstance(choice, str))
    return names


def why_no_start(error: Exception, api: Api) -> str:
    """One sentence: what happened, and what may mend it."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__} {error}".lower()
    if "out of memory" in text or "insufficient gpu memory" in text or "outofmemory" in text:
        remedy = "lower --max_seq_len or --concurrency, or raise --tp_size"
    elif isinstance(error, ValueError):  # of which pydantic's ValidationError is one
        remedy = "mend the argument"
    elif "mpi" in text or "pmi" in text or "spawn" in text:
        remedy = "start with `mpirun -n 1 --oversubscribe python run.py ...`"
    elif "cuda" in text or "nvidia" in text or "nvml" in text:
        remedy = "it needs an NVIDIA GPU that this process can see"
    else:
        remedy = "its own log, above, tells more"
    return f"{api.name} did not start: {first_line(error)} ({remedy})"
