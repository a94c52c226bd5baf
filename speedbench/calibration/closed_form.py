"""What a known-answer checkpoint must answer, step by step: the independent side of the comparison.

Nothing here is shared with an engine or with `metrics`: greedy decoding of a bigram checkpoint is
iterating a function, so the steps of a request follow from its prompt by a ten-line loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedbench.calibration.suffix import SuffixText
from speedbench.types import Algorithm, UserError

KNOWN_ANSWER_FILE = "known_answer.json"
"""Beside a target: the functions it and its drafters compute."""
KNOWN_DRAFT_FILE = "known_draft.json"
"""Beside a drafter that says something else than the target's file tells."""
CHAINED: tuple[Algorithm, ...] = ("DRAFT_TARGET", "EAGLE", "EAGLE3", "MTP", "MEDUSA")
"""Algorithms that propose g(x), g(g(x)), ... after the last token x."""
MASKED: tuple[Algorithm, ...] = ("PARD", "DFLASH")
"""Algorithms that ask for all drafts at once, masks in the place of those not known yet."""
ALGORITHMS: tuple[Algorithm, ...] = ("NONE", *CHAINED, *MASKED, "NGRAM", "SUFFIX")
"""Algorithms whose steps are known here."""
LOOKUP_ENGINES: Mapping[Algorithm, tuple[str, ...]] = {"NGRAM": ("VLLM", "HF"), "SUFFIX": ("VLLM",)}
"""Engines whose way to look up a request's own tokens is written down here."""
Propose = Callable[[list[int], int], list[int]]
"""(prompt and output so far, tokens still allowed) -> draft"""


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """The functions a calibration pair computes: token id -> next token id.

    target_next     f, what the target says
    draft_next      g, what the drafter says
    eos_token_ids   every id that ends an answer
    densities       category -> share of its cycle on which g equals f
    after_mask      what a drafter that is asked for all drafts at once says after a mask (MASKED)
    experts         (V, layers, top k) experts of each token, for a target that routes
    """

    name: str
    version: int
    target_next: tuple[int, ...]
    draft_next: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    densities: Mapping[str, float] = field(default_factory=dict)
    after_mask: int | None = None
    experts: Sequence[Sequence[Sequence[int]]] = ()


@dataclass(frozen=True, slots=True)
class ExpectedStep:
    """One engine step: the tokens it emits (cut where the request ends), and what was checked.

    `accepted` is the engine's own count, before any cut.
    """

    token_ids: tuple[int, ...]
    accepted: int
    drafted: int


@dataclass(frozen=True, slots=True)
class Case:
    """How a prompt is decoded: everything besides the prompt and the functions f and g.

    `ngram_min` and `ngram_max` bound the length of the looked-up n-gram (NGRAM only), which every
    engine looks up in its own way. `shared_lookup`: what other requests said is looked up, too.
    """

    algorithm: Algorithm
    draft_length: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    ngram_min: int = 1
    ngram_max: int = 1
    engine: str = "VLLM"
    shared_lookup: bool = False

    @property
    def is_known(self) -> bool:
        """Whether every step of such a request follows from its prompt."""
        if self.algorithm in LOOKUP_ENGINES:
            return self.engine in LOOKUP_ENGINES[self.algorithm] and not self.shared_lookup
        return self.algorithm in ALGORITHMS

    def steps(self, known: KnownAnswer, prompt_ids: Sequence[int]) -> list[ExpectedStep]:
        """The steps of one request. Raises UserError where they are not known."""
        if not self.is_known:
            raise UserError(
                f"{self.algorithm} on {self.engine} has no known answer: calibrate with "
                f"{', '.join(ALGORITHMS)} where the engine looks up a request's own tokens only"
            )
        if self.algorithm == "NONE":
            return plain_steps(prompt_ids, known.target_next, self.max_tokens, self.stop_ids)
        if self.algorithm in MASKED and known.after_mask is not None:
            return parallel_draft_steps(
                prompt_ids,
                known.target_next,
                known.draft_next,
                known.after_mask,
                self.draft_length,
                self.max_tokens,
                self.stop_ids,
            )
        if self.algorithm in CHAINED:
            of_engine = hf_draft_target_steps if self.engine == "HF" else draft_target_steps
            return of_engine(
                prompt_ids,
                known.target_next,
                known.draft_next,
                self.draft_length,
                self.max_tokens,
                self.stop_ids,
            )
        if self.algorithm == "NGRAM":
            lookup = hf_ngram_steps if self.engine == "HF" else ngram_steps
            return lookup(
                prompt_ids,
                known.target_next,
                self.draft_length,
                self.ngram_min,
                self.ngram_max,
                self.max_tokens,
                self.stop_ids,
            )
        if self.algorithm == "SUFFIX":
            return suffix_steps(
                prompt_ids, known.target_next, self.draft_length, self.max_tokens, self.stop_ids
            )
        raise UserError(
            f"{self.algorithm} has no known answer: calibrate with {', '.join(ALGORITHMS)}"
        )


def read_known_answer(target_dir: Path, draft_dir: Path | None = None) -> KnownAnswer:
    """The functions behind a calibration target and its drafter, as their builder wrote them."""
    path = target_dir / KNOWN_ANSWER_FILE
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        if draft_dir is not None and (draft_dir / KNOWN_DRAFT_FILE).is_file():
            path = draft_dir / KNOWN_DRAFT_FILE
            found |= dict(json.loads(path.read_text(encoding="utf-8")))
        after_mask = found.get("after_mask")
        return KnownAnswer(
            name=str(found["name"]),
            version=_whole(found["version"]),
            target_next=_token_ids(found["next"]),
            draft_next=_token_ids(found["draft_next"]),
            eos_token_ids=_token_ids(found["eos_token_ids"]),
            densities={str(name): float(value) for name, value in found["densities"].items()},
            after_mask=None if after_mask is None else _whole(after_mask),
            experts=found.get("experts", ()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} cannot be read ({what}), expected a folder made by speedbench calibrate: "
            "build the checkpoints again"
        ) from None


def _token_ids(values: Any) -> tuple[int, ...]:
    return tuple(map(_whole, values))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.60} is no whole number from 0")
    return value


def draft_target_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_next: Sequence[int],
    draft_length: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """A drafter iterates g from the last token. Only the last prompt token matters."""

    def propose(context: list[int], _remaining: int) -> list[int]:
        draft = [draft_next[context[-1]]]
        while len(draft) < draft_length:
            draft.append(draft_next[draft[-1]])
        return draft

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def parallel_draft_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_next: Sequence[int],
    after_mask: int,
    draft_length: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """A drafter asked for all drafts at once sees the last token and K - 1 masks behind it."""

    def propose(context: list[int], _remaining: int) -> list[int]:
        return [draft_next[context[-1]], *[after_mask] * (draft_length - 1)]

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def plain_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """Autoregressive decoding: one token a step."""
    return _steps(prompt_ids, target_next, lambda _context, _remaining: [], max_tokens, stop_ids)


def ngram_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_length: int,
    ngram_min: int,
    ngram_max: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """vLLM's prompt lookup: what followed the earliest occurrence of the longest known suffix."""

    def propose(context: list[int], _remaining: int) -> list[int]:
        return _looked_up(context, ngram_min, ngram_max, draft_length)

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def suffix_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_length: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """Suffix decoding that keeps nothing of other requests."""
    text = SuffixText()

    def propose(context: list[int], _remaining: int) -> list[int]:
        text.extend(context[text.n_tokens :])
        return text.draft(draft_length)

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def hf_draft_target_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_next: Sequence[int],
    draft_length: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """transformers' draft model: it drafts no more than may still be shown, and ends its draft at
    the first stop token, which it proposes."""

    def propose(context: list[int], remaining: int) -> list[int]:
        draft: list[int] = []
        token = context[-1]
        for _ in range(min(draft_length, remaining - 1)):
            token = draft_next[token]
            draft.append(token)
            if token in stop_ids:
                break
        return draft

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def hf_ngram_steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    draft_length: int,
    ngram_min: int,
    ngram_max: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """transformers' prompt lookup: what was found ends before its first stop token, and nothing is
    looked up for the last token that may be shown."""

    def propose(context: list[int], remaining: int) -> list[int]:
        if remaining == 1:
            return []
        draft = _looked_up(context, ngram_min, min(ngram_max, len(context) - 1), draft_length)
        stop = next((i for i, token in enumerate(draft) if token in stop_ids), None)
        return draft[:stop]

    return _steps(prompt_ids, target_next, propose, max_tokens, stop_ids)


def _looked_up(context: list[int], ngram_min: int, ngram_max: int, n_tokens: int) -> list[int]:
    """What followed the earliest occurrence of the longest suffix that occurred before."""
    text = "".join(map(chr, context))
    for n in range(min(ngram_max, len(text)), ngram_min - 1, -1):
        # Something must follow the occurrence, so it ends before the last token.
        start = text.find(text[-n:], 0, len(text) - 1)
        if start >= 0:
            return context[start + n : start + n + n_tokens]
    return []


def _steps(
    prompt_ids: Sequence[int],
    target_next: Sequence[int],
    propose: Propose,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[ExpectedStep]:
    """Prefill, then propose and verify until a stop token or the length limit.

    Valid while prompt + output stay 2 (K + 1) tokens below the engine's length limit: nearer to it
    vLLM drafts zeros, and from when on depends on the longest request of the batch.
    """
    context, steps, draft = list(prompt_ids), [], list[int]()
    end = len(context) + max_tokens
    while len(context) < end:
        block = [target_next[context[-1]]]
        for token in draft:
            if token != block[-1]:
                break
            block.append(target_next[token])
        kept = block[: end - len(context)]
        stop = next((i for i, token in enumerate(kept) if token in stop_ids), None)
        kept = kept if stop is None else kept[: stop + 1]
        steps.append(ExpectedStep(tuple(kept), len(block) - 1, len(draft)))
        if stop is not None:
            break
        context += kept
        draft = propose(context, end - len(context)) if len(context) < end else []
    return steps


def expected_al(requests: Iterable[Sequence[ExpectedStep]]) -> float | None:
    """Mean tokens per decode step before any cut; None without a decode step."""
    lengths = [step.accepted + 1 for steps in requests for step in steps[1:]]
    return sum(lengths) / len(lengths) if lengths else None


def next_token_logits(model_dir: Path) -> NDArray[np.float64]:
    """(V, V) logits of the token after x, for every x: what the stored weights say, in float64.

    The blocks of a calibration checkpoint add nothing to the residual stream, so only the
    embedding, the last norm and the head are left.
    """
    from safetensors.numpy import load_file

    try:
        weights = load_file(model_dir / "model.safetensors")
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_dir} cannot be read ({error}), expected a calibration checkpoint: "
            "build the checkpoints again"
        ) from None
    added = [name for name in weights if name.endswith(("o_proj.weight", "down_proj.weight"))]
    if any(weights[name].any() for name in added):
        raise UserError(
            f"{model_dir} is no calibration checkpoint: its blocks add to the residual stream"
        )
    hidden = weights["model.embed_tokens.weight"].astype(np.float64)
    mean_square = np.mean(hidden**2, axis=1, keepdims=True)
    normed = hidden / np.sqrt(mean_square + config["rms_norm_eps"]) * weights["model.norm.weight"]
    head = weights["lm_head.weight"].astype(np.float64)
    return np.asarray(normed @ head.T, dtype=np.float64)


def overlap_probabilities(
    target_dir: Path, draft_dir: Path, temperature: float, draft_temperature: float
) -> NDArray[np.float64]:
    """(V,) probability that a sampled draft token after x is accepted, for every context token x.

    A draft from q is accepted with min(1, p/q), so sum over y of min(p(y), q(y)) in all
    (Leviathan et al. 2023, arXiv 2211.17192, section 3.2). Holds without top-p and top-k.
    """
    p = _softmax(next_token_logits(target_dir) / temperature)
    q = _softmax(next_token_logits(draft_dir) / draft_temperature)
    return np.asarray(np.minimum(p, q).sum(axis=1), dtype=np.float64)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def acceptance_probabilities(
    target_dir: Path, draft_dir: Path, temperature: float
) -> NDArray[np.float64]:
    """(V,) probability that the draft token after x is accepted, for every context token x.

    The drafter proposes its most likely token g(x) whatever the temperature (vLLM's default,
    `draft_sample_method` greedy), so it is accepted with the target's probability of it.
    Holds without top-p and top-k. At temperature 0: exactly 0 or 1.
    """
    draft_next = next_token_logits(draft_dir).argmax(axis=1)
    logits = next_token_logits(target_dir)
    if temperature == 0:
        return np.asarray(logits.argmax(axis=1) == draft_next, dtype=np.float64)
    p = _softmax(logits / temperature)
    return np.asarray(p[np.arange(len(p)), draft_next], dtype=np.float64)
