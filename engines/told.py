"""What a server tells of one request's verifications, and which chunks that proves to be steps.

A chunk is what one read of a socket brought: one engine step, or several that the server or the
network put together. It is a step only where the server's own account of the request leaves
nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from engines.vllm import align
from speedbench.types import UNKNOWN, ToldAcceptance

DETAILED = "vLLM's per-request metrics, each verification"
SUMMARY = "vLLM's per-request metrics, totals"
SGLANG = "SGLang's per-request details, totals"

SOURCES = (DETAILED, SUMMARY, SGLANG)
"""Best first."""


def acceptance(about: Mapping[str, Any]) -> ToldAcceptance | None:
    """From what a response holds beside its chunks; None where it does not tell. Raises ValueError
    for what contradicts itself."""
    spec = _mapping(_mapping(about.get("metrics")).get("speculative_decoding"))
    if spec:
        return _checked(_of_vllm(spec), spec.get("num_spec_steps"))
    spec = _mapping(_mapping(about.get("sglext")).get("spec_tokens_details"))
    if spec.get("spec_correct_drafts_histogram"):
        return _checked(_of_sglang(spec), spec.get("spec_verify_ct"))
    return None


def draft_length(about: Mapping[str, Any]) -> int | None:
    """K, where a response tells it."""
    spec = _mapping(_mapping(about.get("metrics")).get("speculative_decoding"))
    k = spec.get("num_spec_tokens")
    return k if type(k) is int and k >= 0 else None


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a server tells in a form that is none of its own tells nothing."""
    return value if isinstance(value, Mapping) else {}


def _counts(values: Any) -> tuple[int, ...]:
    """Raises ValueError for what are no counts."""
    if not isinstance(values, (list, tuple)) or not all(
        type(value) is int and 0 <= value < 2**31 for value in values
    ):
        raise ValueError(f"{values!r:.60} are no counts")
    return tuple(values)


def _of_vllm(spec: Mapping[str, Any]) -> ToldAcceptance:
    accepted = _counts(spec.get("per_step_accepted") or ())
    (n_drafted,) = _counts([spec["num_draft_tokens"]])
    return ToldAcceptance(
        DETAILED if accepted else SUMMARY,
        _counts(spec["acceptance_histogram"]),
        n_drafted,
        accepted,
        _counts(spec.get("per_step_drafted") or ()),
    )


def _of_sglang(spec: Mapping[str, Any]) -> ToldAcceptance:
    (n_drafted,) = _counts([spec.get("spec_num_proposed_drafts") or 0])
    return ToldAcceptance(SGLANG, _counts(spec["spec_correct_drafts_histogram"]), n_drafted or None)


def _checked(told: ToldAcceptance, n_verify: object) -> ToldAcceptance:
    counts = Counter(told.accepted)
    if n_verify is not None and n_verify != told.n_verify:
        raise ValueError(f"a histogram of {told.n_verify} verifications, of {n_verify} in all")
    if told.accepted and (
        len(told.drafted) != len(told.accepted)
        or any(counts[j] != n for j, n in enumerate(told.histogram))
        or len(told.accepted) != told.n_verify
    ):
        raise ValueError("its list of verifications and its histogram disagree")
    return told


def steps_in(
    n_tokens: Sequence[int], told: ToldAcceptance, k: int, lookup: bool = False
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Of each chunk (C,): its engine steps, and (accepted, drafted) where it is one step; None
    where what is told leaves that open.

    n_tokens  tokens of each chunk
    lookup    a step may have no draft, which no server tells of: as many of them as the end of the
              request cut off tokens would not show in any sum
    """
    if lookup:
        return _with_plain_steps(n_tokens, told)
    if told.accepted or not told.n_verify:
        return _in_order(n_tokens, told)
    return _by_lengths(n_tokens, told, k)


def _in_order(
    n_tokens: Sequence[int], told: ToldAcceptance
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Every verification is told: without plain steps, chunks end where verifications do."""
    pairs = list(zip(told.accepted, told.drafted, strict=True))
    ends = list(accumulate([1, *(a + 1 for a in told.accepted)]))
    step_of = {end: step for step, end in enumerate(ends)}
    n_before, total, engine_steps, detail = -1, 0, [], []
    for chunk, n in enumerate(n_tokens):
        total += n
        step = step_of.get(total)
        if chunk == len(n_tokens) - 1 and total <= ends[-1]:
            step = len(ends) - 1  # the end of a request cuts its last step
            if step and total <= ends[step - 1]:
                step = None
        if step is None:
            return None
        engine_steps.append(step - n_before)
        one = step - n_before == 1
        detail.append(((0, 0) if step == 0 else pairs[step - 1]) if one else (UNKNOWN, UNKNOWN))
        n_before = step
    if n_before != len(ends) - 1:
        return None
    return engine_steps, detail


def _with_plain_steps(
    n_tokens: Sequence[int], told: ToldAcceptance
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Where the last verification accepted nothing, nothing was cut off, and the steps without a
    draft can be counted: as many chunks as steps are these."""
    if not n_tokens or n_tokens[0] != 1 or (told.n_verify and not told.accepted):
        return None
    n_plain = sum(n_tokens) - 1 - sum(a + 1 for a in told.accepted)
    cut = told.accepted[-1] if told.accepted else 0
    if cut or n_plain < 0 or len(n_tokens) != 1 + told.n_verify + n_plain:
        return None
    open_ = [(0, 0), *[(UNKNOWN, UNKNOWN)] * (len(n_tokens) - 1)]
    detail = align(n_tokens, told.accepted, told.drafted, open_)
    return None if detail is None else ([1] * len(n_tokens), detail)


def _by_lengths(
    n_tokens: Sequence[int], told: ToldAcceptance, k: int
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Only how many verifications had which length is told: chunks with just these are they."""
    if not n_tokens or n_tokens[0] != 1 or len(n_tokens) != 1 + told.n_verify:
        return None
    left = Counter({j + 1: n for j, n in enumerate(told.histogram) if n})
    left.subtract(n_tokens[1:-1])
    over = [length for length, n in left.items() if n]
    if len(over) != 1 or left[over[0]] != 1 or over[0] < n_tokens[-1]:
        return None
    drafted = k if told.n_drafted == k * told.n_verify else UNKNOWN
    if drafted == UNKNOWN:  # then a length alone is what is known of a step
        accepted = [(UNKNOWN, UNKNOWN)] * told.n_verify
    else:
        accepted = [(n - 1, drafted) for n in (*n_tokens[1:-1], over[0])]
    return [1] * len(n_tokens), [(0, 0), *accepted]
