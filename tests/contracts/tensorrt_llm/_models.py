"""The classes of one version, made from its recorded interface, with the checks they make."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

VARIABLE = "SPEEDBENCH_CONTRACT_TRTLLM"
NAME = os.environ.get(VARIABLE, "main")
API: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "trtllm" / f"{NAME}.json").read_text(encoding="utf-8")
)["classes"]
MAIN_VERSION = "1.4.0rc1"

UNVERIFIED_USED: set[tuple[str, str]] = set()
"""(class, field) that a caller set although nobody has seen it in this version."""


def version() -> str:
    return MAIN_VERSION if NAME == "main" else NAME


RELEASE = tuple(int(part) for part in version().split(".")[:2])


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _count_unverified(cls, values: Any) -> Any:
        count_unverified(cls.__name__, values)
        return values


def count_unverified(class_name: str, values: dict[str, Any]) -> None:
    fields = API.get(class_name, {"fields": {}})["fields"]
    UNVERIFIED_USED.update(
        (class_name, name) for name in values if fields.get(name, {}).get("unverified")
    )


class Mode:
    """What a decoding mode says about itself (from 1.2 on)."""

    def __init__(self, one_engine: bool, overlap: bool) -> None:
        self._one_engine, self._overlap = one_engine, overlap

    def use_one_engine(self) -> bool:
        return self._one_engine

    def support_overlap_scheduler(self) -> bool:
        return self._overlap


class Decoding(Strict):
    needs_model: ClassVar[bool] = False
    one_engine: ClassVar[bool] = True

    def supports_backend(self, backend: str) -> bool:
        return backend in API[type(self).__name__].get("backends", [backend])

    def model(self) -> Any:
        found = getattr(self, "speculative_model", None)
        return found or getattr(self, "speculative_model_dir", None)

    def validate_for_engine(self) -> None:
        """validate_speculative_config of the LLM arguments."""
        if not (self.max_draft_len or 0) > 0:  # type: ignore[attr-defined]
            raise ValueError("max_draft_len must be > 0")
        if self.needs_model and self.model() is None:
            raise ValueError("Draft model must be provided")


class Eagle(Decoding):
    needs_model: ClassVar[bool] = True

    @model_validator(mode="after")
    def _eagle(self) -> Any:
        if RELEASE >= (1, 2) and self.max_draft_len is None:  # type: ignore[attr-defined]
            raise ValueError("max_draft_len is required for Eagle")
        if RELEASE >= (1, 2):
            self.num_eagle_layers = self.max_draft_len  # type: ignore[attr-defined]
            self.max_total_draft_tokens = self.max_draft_len  # type: ignore[attr-defined]
        if RELEASE >= (1, 4) and self.model() is None:
            raise ValueError("Draft model must be provided for EAGLE")
        return self


class Mtp(Decoding):
    @model_validator(mode="before")
    @classmethod
    def _remap(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if RELEASE >= (1, 4) and "num_nextn_predict_layers" in values:
            values["max_draft_len"] = values.pop("num_nextn_predict_layers")
        return values

    @model_validator(mode="after")
    def _copy(self) -> Any:
        if RELEASE == (1, 2):
            self.max_draft_len = self.num_nextn_predict_layers  # type: ignore[attr-defined]
        return self

    def validate_for_engine(self) -> None:
        length = (
            self.max_draft_len  # type: ignore[attr-defined]
            if RELEASE >= (1, 4)
            else self.num_nextn_predict_layers  # type: ignore[attr-defined]
        )
        if not (length or 0) > 0:
            raise ValueError("num_nextn_predict_layers must be > 0")


class NGram(Decoding):
    one_engine: ClassVar[bool] = RELEASE >= (1, 4)

    def validate_for_engine(self) -> None:
        super().validate_for_engine()
        if not self.max_matching_ngram_size > 0:  # type: ignore[attr-defined]
            raise ValueError("max_matching_ngram_size must be > 0")


class DraftTarget(Decoding):
    needs_model: ClassVar[bool] = True
    one_engine: ClassVar[bool] = RELEASE >= (1, 4)


class DrafterInside(Decoding):
    needs_model: ClassVar[bool] = True


class Dspark(Decoding):
    @model_validator(mode="after")
    def _block(self) -> Any:
        if self.block_size not in (None, self.max_draft_len):  # type: ignore[attr-defined]
            raise ValueError("block_size must equal max_draft_len")
        return self


class CudaGraph(Strict):
    @model_validator(mode="after")
    def _sizes(self) -> Any:
        sizes, most = self.batch_sizes, self.max_batch_size  # type: ignore[attr-defined]
        if sizes and most not in (0, max(sizes)):
            raise ValueError("max_batch_size must be 0 or max(batch_sizes)")
        return self


class TorchArgs(Strict):
    @model_validator(mode="after")
    def _check(self) -> Any:
        arguments: Any = self
        if arguments.stream_interval <= 0:
            raise ValueError("stream_interval must be positive")
        if NAME == "1.2.0" and arguments.max_batch_size is None:
            arguments.max_batch_size = 2048
        spec = arguments.speculative_config
        if spec is not None:
            if not isinstance(spec, Decoding):
                raise ValueError(f"speculative_config is a {type(spec).__name__}")
            if not spec.supports_backend(self.own_backend):
                raise ValueError(
                    f"Speculation type {type(spec).__name__} does not support backend "
                    f"{self.own_backend}"
                )
            spec.validate_for_engine()
            if type(spec).__name__ == "EagleDecodingConfig" and "Eagle3DecodingConfig" in LLMAPI:
                told = {name: getattr(spec, name) for name in spec.model_fields_set}
                arguments.speculative_config = LLMAPI["Eagle3DecodingConfig"](**told)
        return self

    own_backend: ClassVar[str] = "pytorch"


class AutoDeployArgs(TorchArgs):
    own_backend: ClassVar[str] = "_autodeploy"
    fixed: ClassVar[tuple[str, ...]] = (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "context_parallel_size",
        "moe_cluster_parallel_size",
        "moe_tensor_parallel_size",
        "moe_expert_parallel_size",
        "enable_attention_dp",
        "cp_config",
    )

    @model_validator(mode="after")
    def _parallel(self) -> Any:
        for name in self.fixed:
            if getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(
                    "AutoDeploy only supports parallelization via the `world_size` argument."
                )
        if (self.max_beam_width or 1) > 1:  # type: ignore[attr-defined]
            raise ValueError("AutoDeploy does not support beam search (max_beam_width > 1).")
        return self


BASES: dict[str, type[Strict]] = {
    "TorchLlmArgs": TorchArgs,
    "AutoDeployLlmArgs": AutoDeployArgs,
    "CudaGraphConfig": CudaGraph,
    "EagleDecodingConfig": Eagle,
    "Eagle3DecodingConfig": Eagle,
    "MTPDecodingConfig": Mtp,
    "NGramDecodingConfig": NGram,
    "DraftTargetDecodingConfig": DraftTarget,
    "PARDDecodingConfig": DrafterInside,
    "DFlashDecodingConfig": DrafterInside,
    "DSparkDecodingConfig": Dspark,
}

SIMPLE = {
    "int": int, "bool": bool, "float": float, "str": str, "None": None, "dict": dict,
    "list": list, "Path": Path, "list[int]": list[int], "set[int]": set[int],
    "list[list[int]]": list[list[int]], "dict[int,int]": dict[int, int],
    "dict[str,str]": dict[str, str],
}  # fmt: skip


def python_type(text: str) -> Any:
    """The type a table names, as far as it is one; else anything."""
    literal = re.fullmatch(r"Literal\[('.+')\](\|None)?", text)
    if literal:
        values = tuple(part.strip("'") for part in literal[1].split(","))
        return Literal[values] | None if literal[2] else Literal[values]
    parts = text.split("|")
    known = {**SIMPLE, **MODELS}
    if not all(part in known for part in parts):
        return Any
    union = known[parts[0]]
    for part in parts[1:]:
        union = union | known[part]
    return union


def field_of(name: str, about: dict[str, Any]) -> tuple[Any, Any]:
    default, more = about["default"], {}
    if "aliases" in about:
        more["validation_alias"] = AliasChoices(name, *about["aliases"])
    if default == "<required>":
        return python_type(about["type"]), Field(..., **more)
    if isinstance(default, str) and default.endswith("()"):
        return python_type(about["type"]), Field(default_factory=stub(default[:-2]), **more)
    return python_type(about["type"]), Field(default, validate_default=False, **more)


def stub(name: str) -> Any:
    """A class that the tables only name."""
    if name not in MODELS:
        MODELS[name] = create_model(name, __base__=Strict)
    return MODELS[name]


MODELS: dict[str, Any] = {}


def build() -> None:
    first = ("KvCacheConfig", "CudaGraphConfig", "MoeConfig", "SAEnhancerConfig")
    ordered = [n for n in first if n in API] + [n for n in API if n not in first]
    for class_name in ordered:
        about = API[class_name]
        if about["kind"] != "pydantic":
            continue
        fields = {name: field_of(name, field) for name, field in about["fields"].items()}
        is_decoding = class_name.endswith("DecodingConfig")
        base = BASES.get(class_name, Decoding if is_decoding else Strict)
        MODELS[class_name] = create_model(class_name, __base__=base, **fields)
        if is_decoding and RELEASE >= (1, 2):
            MODELS[class_name].spec_dec_mode = property(mode_of)


def mode_of(config: Decoding) -> Mode:
    one_engine = config.one_engine
    if not getattr(config, "eagle3_one_model", True) and RELEASE < (1, 4):
        one_engine = False
    overlap = RELEASE >= (1, 4) or not isinstance(config, NGram)
    return Mode(one_engine, overlap)


build()
AutoDeployLlmArgs = MODELS["AutoDeployLlmArgs"]
LLMAPI = {name: MODELS[name] for name in API if name in MODELS and name != "AutoDeployLlmArgs"}
"""What `tensorrt_llm.llmapi` exports."""


# ---------------------------------------------------------------- sampling parameters


def _check_sampling(self: Any) -> None:
    given = {
        f.name: getattr(self, f.name)
        for f in dataclasses.fields(self)
        if getattr(self, f.name) != f.default
    }
    count_unverified("SamplingParams", given)
    if self.pad_id is None:
        self.pad_id = self.end_id
    self.best_of = self.best_of or self.n
    if self.best_of < self.n:
        raise ValueError("best_of should be >= n")
    if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1:
        raise ValueError("truncate_prompt_tokens must be >= 1")
    if RELEASE >= (1, 2) and self.temperature is not None and self.temperature < 0:
        raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")
    if self.best_of > 1 and greedy(self) and "TLLM_ALLOW_N_GREEDY_DECODING" not in os.environ:
        raise ValueError("Greedy decoding in the LLM API does not allow multiple returns")


def greedy(params: Any) -> bool:
    """Whether these parameters say greedy decoding; up to 1.1 the temperature is not asked."""
    k, p, t = params.top_k, params.top_p, params.temperature
    if RELEASE < (1, 2):
        return k in (None, 1) and p in (None, 0)
    return (k is None and p is None and t is None) or k == 1 or p == 0 or t == 0


SamplingParams = dataclasses.make_dataclass(
    "SamplingParams",
    [
        (name, python_type(about["type"]), dataclasses.field(default=about["default"]))
        for name, about in API["SamplingParams"]["fields"].items()
    ],
    namespace={"__post_init__": _check_sampling, "__module__": "tensorrt_llm"},
    kw_only=True,
)
