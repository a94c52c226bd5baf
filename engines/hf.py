"""The transformers adapter (4.51 to 5.23): the library's own assisted generation, step by step.

One request at a time, answered inside `poll` in the caller's thread: its steps are handed over when
it ends, each stamped when transformers streamed its tokens. The candidate generator that
transformers makes for a request is watched for what it drafted, and proposes nothing in the first
step, so that the first step is the prefill: one token, nothing drafted.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from speedbench.types import (
    Algorithm,
    EngineCounters,
    EngineDiedError,
    EngineInfo,
    EngineSettings,
    FinishReason,
    Request,
    Sampling,
    Step,
    Support,
    UserError,
)
from speedbench.words import first_line, like

OPTIONS = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "device",
    "device_map",
    "max_matching_ngram_size",
)
"""What engine_args may hold."""

SAMPLING = (
    "min_p",
    "typical_p",
    "top_h",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "sequence_bias",
    "renormalize_logits",
    "remove_invalid_values",
)
"""What sampling_kwargs may hold: fields of GenerationConfig that only change the distribution."""

SAMPLING_OURS = (
    "temperature",
    "top_p",
    "top_k",
    "do_sample",
    "max_new_tokens",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "stop_strings",
    "num_beams",
    "num_return_sequences",
    "use_cache",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
)

DEFAULT_NGRAM_MAX = 2  # what transformers takes where it is not set

PROVEN = "transformers 5.19, torch 2.13, CPU"


class _NotAsExpectedError(Exception):
    """transformers did something this adapter does not know: no step can be trusted."""


@dataclass(slots=True)  # mutable: grows with every verification
class _Tally:
    """Sums over what the candidate generators were told; no recorded step enters them."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted: int = 0
    per_position: list[int] = field(default_factory=list)

    def drafted(self, n: int) -> None:
        self.drafts += 1
        self.draft_tokens += n

    def verified(self, n_accepted: int) -> None:
        self.accepted += n_accepted
        for position in range(n_accepted):
            self.per_position[position] += 1


@dataclass(slots=True)  # mutable: filled while the request is decoded
class _Recorder:
    """One request, as the streamer that transformers hands each step's tokens to.

    With `assisted` a step is complete only when the candidate generator was told of it.
    """

    request: Request
    assisted: bool
    steps: list[Step] = field(default_factory=list)
    n_tokens: int = 0
    has_prompt: bool = False
    streamed: tuple[int, list[int]] | None = None

    def put(self, value: Any) -> None:
        """Called with the prompt first, then with the tokens of every step, on the host."""
        time_ns = time.monotonic_ns()
        if not self.has_prompt:
            self.has_prompt = True
            return
        if self.streamed is not None:
            raise _NotAsExpectedError("two steps were streamed for one verification")
        self.streamed = (time_ns, value.reshape(-1).tolist())
        if not self.assisted:
            self.take([], lambda: 0)

    def end(self) -> None:
        """Called when nothing more is streamed."""

    def take(self, draft: Sequence[int], uncut: Callable[[], int | None]) -> None:
        """The step whose tokens came last; `uncut` tells its acceptances where they do not."""
        if self.streamed is None:
            raise _NotAsExpectedError("a verification was not streamed")
        (time_ns, tokens), self.streamed = self.streamed, None
        shown = _n_common(tokens, draft)
        if not 0 < len(tokens) <= shown + 1:
            raise _NotAsExpectedError(f"the draft {list(draft)} was answered by {tokens}")
        # A block that ends with an accepted draft token though more were drafted was cut.
        accepted = shown if shown < len(tokens) or shown == len(draft) else uncut()
        kept = self._kept(tokens)
        self.n_tokens += len(kept)
        self.steps.append(
            Step(
                self.request.request_id,
                time_ns,
                kept,
                accepted=accepted,
                drafted=len(draft),
            )
        )

    def _kept(self, tokens: list[int]) -> list[int]:
        """Older versions overrun the length limit by the rest of a prompt-lookup draft."""
        kept = tokens[: self.request.max_tokens - self.n_tokens]
        if not kept or (self.steps and self._ended(self.steps[-1].token_ids)):
            raise _NotAsExpectedError("tokens were streamed after the end of the answer")
        stops = self.request.sampling.stop_token_ids
        stop = next((i for i, token in enumerate(kept) if token in stops), None)
        return kept if stop is None else kept[: stop + 1]

    def _ended(self, tokens: Sequence[int]) -> FinishReason | None:
        if tokens[-1] in self.request.sampling.stop_token_ids:
            return "stop"
        return "length" if self.n_tokens >= self.request.max_tokens else None

    def finished(self, output: Sequence[int]) -> list[Step]:
        """All steps, held against the sequence (without the prompt) that transformers returned."""
        tokens = [token for step in self.steps for token in step.token_ids]
        if self.streamed is not None or tokens != list(output[: len(tokens)]):
            raise _NotAsExpectedError(
                f"it streamed {len(tokens)} tokens and returned {len(output)}, or other ones"
            )
        reason = self._ended(tokens) if tokens else None
        if reason is None:
            raise _NotAsExpectedError(
                f"it ended after {len(tokens)} of {self.request.max_tokens} tokens without a stop "
                "token"
            )
        return [*self.steps[:-1], self.steps[-1]._replace(finish_reason=reason)]

    def failed(self, why: str) -> list[Step]:
        """What was decoded, and why it went no further."""
        failure = Step(
            self.request.request_id,
            time.monotonic_ns(),
            (),
            finish_reason="error",
            error=why,
        )
        return [*self.steps, failure]


@dataclass(slots=True)  # mutable: one request's drafts, one after the other
class _Watched:
    """The candidate generator of one request, between transformers' loop and its own generator.

    prefill_drafter  the generator is a model with a prompt to read
    hide_logits      verify drafts as given tokens, not as samples of the drafter's distribution
    """

    generator: Any
    recorder: _Recorder
    tally: _Tally
    prefill_drafter: bool
    hide_logits: bool
    requires_model_outputs: bool = False  # asked by transformers 5.x
    draft: list[int] = field(default_factory=list)
    is_first: bool = True

    # The further arguments differ between versions and are the generator's alone.
    def get_candidates(self, input_ids: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.is_first:
            self.is_first = False
            if self.prefill_drafter:
                self._read_prompt(input_ids, *args, **kwargs)
            return input_ids, None
        candidates, logits = self.generator.get_candidates(input_ids, *args, **kwargs)
        self.draft = candidates[0, input_ids.shape[1] :].tolist()
        if self.draft:
            self.tally.drafted(len(self.draft))
        return candidates, None if self.hide_logits else logits

    def _read_prompt(self, input_ids: Any, *args: Any, **kwargs: Any) -> None:
        """The assistant reads the prompt in the prefill; the one token it drafts is dropped."""
        n = self.generator.num_assistant_tokens
        self.generator.num_assistant_tokens = 1
        self.generator.get_candidates(input_ids, *args, **kwargs)
        self.generator.num_assistant_tokens = n

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: Any) -> None:
        """Called once per step, after its tokens were streamed."""
        n = int(num_matches)
        draft, self.draft = self.draft, []

        def uncut() -> int | None:
            if self.recorder.request.sampling.temperature > 0:
                return None  # what was sampled behind the cut is gone
            return _n_common(scores.argmax(dim=-1)[0].tolist(), draft)

        if draft:
            self.generator.update_candidate_strategy(input_ids, scores, num_matches)
            accepted: int | None = n
            if n < len(draft) and int(input_ids[0, -1]) == draft[n]:  # cut behind this token
                accepted = n + 1 if n + 1 == len(draft) else uncut()
            self.tally.verified(n + 1 if accepted is None else accepted)
        self.recorder.take(draft, uncut)


class HfEngine:
    """A transformers model, and its assistant, driven by `generate`."""

    algorithms: Sequence[Algorithm] = ("DRAFT_TARGET", "NGRAM", "NONE")
    versions = "transformers 4.51 to 5.23"
    owns_ranks = False
    node_args: Mapping[str, str] = {}
    max_concurrency: int | None = 1
    samples_as_started = False
    remembers: Sequence[Algorithm] = ()
    forgets_prompts = True
    support: Mapping[Algorithm, Support] = {
        "DRAFT_TARGET": Support(
            "real",
            PROVEN,
            "near the length limit, and at a stop token, the assistant drafts fewer than K tokens; "
            "at temperature T it samples its drafts at T squared",
        ),
        "NGRAM": Support("real", PROVEN, "prompt lookup: the shortest n-gram looked up is 1 token"),
        "NONE": Support("real", PROVEN),
        **{
            algorithm: Support("absent", note=f"transformers has no {algorithm} drafter")
            for algorithm in ("EAGLE3", "EAGLE", "MEDUSA", "PARD", "SUFFIX")
        },
        **{
            algorithm: Support(
                "absent", note=f"transformers 5.x has {algorithm} drafters, not driven here yet"
            )
            for algorithm in ("MTP", "DFLASH")
        },
    }
    flag_of: Mapping[str, str] = {
        "pretrained_model_name_or_path": "model_dir",
        "assistant_model": "draft_model_dir",
        "num_assistant_tokens": "draft_length",
        "prompt_lookup_num_tokens": "draft_length",
        "trust_remote_code": "trust_remote_code",
    }
    calibration_args: Mapping[Algorithm, Mapping[str, object]] = {
        "NGRAM": {"max_matching_ngram_size": 3}
    }

    def __init__(self, settings: EngineSettings) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"transformers cannot be imported ({error}): install it and torch (pip install "
                "transformers torch)"
            ) from None
        refuse_flags(settings)
        check_options(settings)
        self._settings = settings
        self._k = 0 if settings.algorithm == "NONE" else settings.draft_length
        self._tally = _Tally(per_position=[0] * self._k)
        self._waiting: deque[Request] = deque()
        self._recorder: _Recorder | None = None
        self._torch: Any = torch
        self._transformers: Any = transformers
        self.version = str(transformers.__version__)
        self._ngram_max = _ngram_max(settings)
        self._generation_config(settings.sampling, 1)  # refuses what it does not know
        self._transformers.logging.set_verbosity_error()
        self._transformers.logging.disable_progress_bar()
        torch.manual_seed(settings.seed)
        self._model: Any = self._load(settings.model_dir)
        self._assistant: Any = None
        if settings.algorithm == "DRAFT_TARGET":
            self._assistant = self._load(settings.draft_model_dir or "")
            self._assistant.generation_config = self._transformers.GenerationConfig(
                num_assistant_tokens=self._k,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
            )
        self._check_models()
        if self._k:
            self._watch_candidates()

    # ------------------------------------------------------------ the models

    def _load(self, model_dir: str) -> Any:
        """A checkpoint, stripped of its generation defaults: what is not asked for does not act."""
        options = dict(self._settings.engine_args)
        options.pop("max_matching_ngram_size", None)
        device = options.pop("device", None)
        dtype = options.pop("dtype", options.pop("torch_dtype", "auto"))
        name = "torch_dtype" if _version(self.version) < (4, 56) else "dtype"
        try:
            model, loaded = self._transformers.AutoModelForCausalLM.from_pretrained(
                model_dir,
                trust_remote_code=self._settings.trust_remote_code,
                output_loading_info=True,
                **{name: dtype},
                **options,
            )
            _refuse_made_up_weights(model_dir, loaded)
            if "device_map" not in options:
                model = model.to(device or ("cuda" if self._torch.cuda.is_available() else "cpu"))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"transformers {self.version} cannot load {model_dir}: {first_line(error)}"
            ) from error
        model.eval()
        model.generation_config = self._transformers.GenerationConfig()
        return model

    def _check_models(self) -> None:
        limit = self._position_limit()
        asked = self._settings.max_seq_len
        if limit is not None and asked is not None and asked > limit:
            raise UserError(
                f"--max_seq_len is {asked}, the model has {limit} positions "
                f"(max_position_embeddings): use at most {limit}"
            )
        if self._k and getattr(self._model, "_is_stateful", False):
            raise UserError(
                f"transformers has no assisted generation for {type(self._model).__name__}, whose "
                "state cannot be taken back: use --speculative_algorithm NONE"
            )
        if self._assistant is not None and _vocab(self._model) != _vocab(self._assistant):
            raise UserError(
                f"the draft model {self._settings.draft_model_dir} has a vocabulary of "
                f"{_vocab(self._assistant)} tokens, the target {self._settings.model_dir} one of "
                f"{_vocab(self._model)}: use a draft model made for it"
            )

    def _position_limit(self) -> int | None:
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def _max_seq_len(self) -> int | None:
        return self._settings.max_seq_len or self._position_limit()

    def _watch_candidates(self) -> None:
        """See every draft: wrap the candidate generator that transformers makes per request."""
        make = getattr(self._model, "_get_candidate_generator", None)
        if make is None:
            raise UserError(
                f"transformers {self.version} makes its candidate generators in a way that is not "
                f"known here, expected {self.versions}: install one of those"
            )
        hide_logits = self._settings.draft_sample_method == "greedy"

        def watched(*args: Any, **kwargs: Any) -> _Watched:
            if hide_logits:
                # The assistant takes its most likely token; verified as a given token, like the
                # library's own prompt lookup: accepted with the target's probability of it.
                config = copy.copy(kwargs["generation_config"])
                config.do_sample = False
                kwargs["generation_config"] = config
            if self._recorder is None:
                raise _NotAsExpectedError("a candidate generator was made without a request")
            return _Watched(
                make(*args, **kwargs),
                self._recorder,
                self._tally,
                prefill_drafter=self._assistant is not None,
                hide_logits=hide_logits,
            )

        self._model._get_candidate_generator = watched

    # ------------------------------------------------------------ the interface

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def poll(self) -> Sequence[Step]:
        """Answer the oldest request from prompt to end."""
        if self._model is None or not self._waiting:
            raise EngineDiedError("transformers has no request to answer: none can end any more")
        recorder = _Recorder(self._waiting.popleft(), assisted=self._k > 0)
        if refusal := self._refusal(recorder.request):
            return recorder.failed(refusal)
        self._recorder = recorder
        try:
            return recorder.finished(self._generate(recorder))
        except _NotAsExpectedError as error:
            raise EngineDiedError(
                f"transformers {self.version} does not decode as this adapter expects: {error}"
            ) from error
        except Exception as error:
            if _is_fatal(error):
                raise EngineDiedError(f"transformers cannot go on: {first_line(error)}") from error
            return recorder.failed(self._why(error, recorder.request))
        finally:
            self._recorder = None

    def _refusal(self, request: Request) -> str | None:
        n, limit = len(request.token_ids), self._max_seq_len()
        if n == 0:
            return "transformers refused the request: its prompt is empty"
        if limit is not None and n + request.max_tokens > limit:
            return (
                f"transformers refused the request: its prompt of {n} tokens and an output of "
                f"{request.max_tokens} exceed the limit of {limit}"
            )
        stops = request.sampling.stop_token_ids
        if self._k and _version(self.version) < (5, 19) and request.token_ids[-1] in stops:
            return (
                f"transformers {self.version} takes a prompt that ends with a stop token for an "
                "ended answer: use 5.19 or later, or --ignore_eos"
            )
        return None

    def _generate(self, recorder: _Recorder) -> list[int]:
        """Decode; the new tokens as transformers returns them."""
        request, torch = recorder.request, self._torch
        prompt = torch.tensor([list(request.token_ids)], device=self._model.device)
        output = self._model.generate(
            prompt,
            # Given, because transformers would take a token that equals a padding id for padding.
            attention_mask=torch.ones_like(prompt),
            generation_config=self._generation_config(request.sampling, request.max_tokens),
            streamer=recorder,
            **({} if self._assistant is None else {"assistant_model": self._assistant}),
        )
        return [int(token) for token in output[0, prompt.shape[1] :].tolist()]

    def _why(self, error: Exception, request: Request) -> str:
        if not isinstance(error, self._torch.cuda.OutOfMemoryError):
            return f"transformers failed: {type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(Exception):
            self._torch.cuda.empty_cache()
        return (
            f"the GPU's memory is too small for a prompt of {len(request.token_ids)} tokens and "
            f"an output of {request.max_tokens}: lower --output_length or --max_seq_len, or set "
            "dtype or device_map in engine_args"
        )

    def _generation_config(self, sampling: Sampling, max_tokens: int) -> Any:
        check_sampling(sampling, set(vars(self._transformers.GenerationConfig())), self.version)
        values: dict[str, Any] = {
            "max_new_tokens": max_tokens,
            "do_sample": sampling.temperature > 0,
            "eos_token_id": list(sampling.stop_token_ids) or None,
            **sampling.extra,
        }
        if sampling.temperature > 0:
            values |= {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,  # 0 is "no limit" here too; unset would be 50
            }
        if self._settings.algorithm == "NGRAM":
            values["prompt_lookup_num_tokens"] = self._k
            values["max_matching_ngram_size"] = self._ngram_max
            if not sampling.stop_token_ids:
                values["eos_token_id"] = [-1]  # before 5.9 prompt lookup fails without any
        return self._transformers.GenerationConfig(**values)

    def counters(self) -> EngineCounters | None:
        if self._k == 0:
            return None
        tally = self._tally
        return EngineCounters(
            tally.drafts, tally.draft_tokens, tally.accepted, tuple(tally.per_position)
        )

    def forget(self) -> None:
        """Nothing to forget: no request leaves anything behind, neither keys nor n-grams."""

    def describe(self) -> EngineInfo:
        model, assistant = self._model, self._assistant
        config = self._generation_config(self._settings.sampling, 1)
        settings: dict[str, object] = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attn_implementation": str(model.config._attn_implementation),
            "quantization": _quantization(model),
            "torch": str(self._torch.__version__),
            "torch_threads": int(self._torch.get_num_threads()),
            "cache_implementation": config.cache_implementation or "dynamic",
            "steps_delivered": "when their request ends",
        }
        if getattr(model, "hf_device_map", None):
            settings["device_map"] = {k: str(v) for k, v in model.hf_device_map.items()}
        k = 0
        if assistant is not None:
            own = assistant.generation_config
            k = int(own.num_assistant_tokens)
            settings |= {
                "num_assistant_tokens_schedule": str(own.num_assistant_tokens_schedule),
                "assistant_confidence_threshold": float(own.assistant_confidence_threshold),
                "draft_dtype": str(assistant.dtype).removeprefix("torch."),
                "draft_device": str(assistant.device),
                "draft_attn_implementation": str(assistant.config._attn_implementation),
                "draft_sample_method": self._settings.draft_sample_method or "probabilistic",
            }
            if settings["draft_sample_method"] == "probabilistic":
                settings["draft_temperature"] = "temperature squared"
        elif self._settings.algorithm == "NGRAM":
            k = int(config.prompt_lookup_num_tokens)
            settings |= {"ngram_min": 1, "ngram_max": int(config.max_matching_ngram_size)}
        return EngineInfo(
            name="HF",
            version=self.version,
            draft_length=k,
            max_seq_len=self._max_seq_len(),
            max_num_seqs=1,
            prefix_cache=False,
            vocab_size=_vocab(model),
            tells_drafted=True,
            fits_drafts=True,
            settings=settings,
        )

    def close(self) -> None:
        self._model = self._assistant = None
        self._waiting.clear()
        gc.collect()  # the watched candidate generator refers back to this engine
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()


# ---------------------------------------------------------------- pure parts


def refuse_flags(settings: EngineSettings) -> None:
    """Raise UserError for a flag that transformers has no way to follow."""
    if settings.algorithm not in HfEngine.algorithms:
        raise UserError(
            f"{HfEngine.support[settings.algorithm].note}: use one of "
            f"{', '.join(HfEngine.algorithms)}"
        )
    if settings.concurrency > 1:
        raise UserError(
            f"transformers decodes one assisted request at a time, --concurrency is "
            f"{settings.concurrency}: use --concurrency 1, in both arms"
        )
    for flag, size in (
        ("tp_size", settings.tp_size),
        ("pp_size", settings.pp_size),
        ("dp_size", settings.dp_size),
        ("ep_size", settings.ep_size),
    ):
        if size > 1:
            raise UserError(
                f"transformers runs here in one process, --{flag} is {size}: use 1; "
                "engine_args: {device_map: auto} spreads the layers of a large model over GPUs"
            )
    if settings.prefix_cache:
        raise UserError(
            "transformers computes every prompt anew and has no --prefix_cache: leave it out"
        )
    if settings.capture_experts:
        raise UserError(
            "transformers records no experts here: leave --capture_experts out, or use VLLM or "
            "SGLANG"
        )
    if settings.block_size is not None:
        raise UserError("transformers drafts --draft_length tokens: leave --block_size out")
    if settings.algorithm == "NGRAM" and settings.draft_model_dir is not None:
        raise UserError("NGRAM takes no draft model: leave out --draft_model_dir")
    method = settings.draft_sample_method
    if method is not None and settings.algorithm != "DRAFT_TARGET":
        raise UserError(
            f"--draft_sample_method is for a draft model, the algorithm is {settings.algorithm}: "
            "leave it out"
        )
    if method not in (None, "greedy", "probabilistic"):
        raise UserError(
            f"--draft_sample_method is '{method}', expected greedy or probabilistic: use one"
        )
    if settings.algorithm == "DRAFT_TARGET" and not settings.draft_model_dir:
        raise UserError("DRAFT_TARGET needs a draft model: add --draft_model_dir")


def check_options(settings: EngineSettings) -> None:
    """Raise UserError for an engine argument that would not be followed."""
    options = settings.engine_args
    for name in options:
        if name in HfEngine.flag_of:
            raise UserError(f"engine_args sets '{name}': use --{HfEngine.flag_of[name]}")
        if name not in OPTIONS:
            raise UserError(
                f"transformers has no engine argument here named '{name}'{like(name, set(OPTIONS))}"
            )
    for one, other in (("dtype", "torch_dtype"), ("device", "device_map")):
        if one in options and other in options:
            raise UserError(f"engine_args sets both '{one}' and '{other}': keep one of them")
    _ngram_max(settings)


def _refuse_made_up_weights(model_dir: str, loaded: Mapping[str, Any]) -> None:
    """transformers fills in weights that a checkpoint lacks with random ones, and goes on."""
    missing = sorted(map(str, loaded.get("missing_keys") or ()))
    if missing:
        raise UserError(
            f"{model_dir} lacks {len(missing)} weight(s) of its architecture, first {missing[0]}: "
            "give a whole checkpoint of a causal language model (EAGLE and other heads are none)"
        )


def _ngram_max(settings: EngineSettings) -> int:
    value = settings.engine_args.get("max_matching_ngram_size", DEFAULT_NGRAM_MAX)
    if "max_matching_ngram_size" in settings.engine_args and settings.algorithm != "NGRAM":
        raise UserError(
            "engine_args sets 'max_matching_ngram_size', which only NGRAM uses: leave it out"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"engine_args: max_matching_ngram_size is {value!r}, expected a whole number from 1"
        )
    return value


def check_sampling(sampling: Sampling, fields: set[str], version: str) -> None:
    """Raise UserError for a sampling parameter that would not be followed.

    fields: the names the installed GenerationConfig knows; it takes any other without a word.
    """
    known = set(SAMPLING) & fields
    for name in sampling.extra:
        if name in SAMPLING_OURS:
            raise UserError(
                f"sampling_kwargs sets '{name}', which speedbench sets: use its flag or leave it"
            )
        if name not in known:
            raise UserError(
                f"the adapter of transformers {version} takes no sampling parameter '{name}'"
                f"{like(name, known)}"
            )


def _n_common(tokens: Sequence[int], draft: Sequence[int]) -> int:
    """How many leading tokens are those of the draft."""
    n = 0
    while n < min(len(tokens), len(draft)) and tokens[n] == draft[n]:
        n += 1
    return n


def _vocab(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _quantization(model: Any) -> str | None:
    found = getattr(model.config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = text.split(".")
    return int(major), int(minor)


def _is_fatal(error: Exception) -> bool:
    """After an error inside a CUDA kernel every later call fails, too."""
    text = str(error)
    return "CUDA error" in text and "out of memory" not in text
