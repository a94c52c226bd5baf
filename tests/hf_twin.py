"""What transformers' assisted generation must do on a known-answer checkpoint, step by step.

A twin of the library's rules, written from reading it and sharing nothing with the adapter. With
`remaining` = the tokens still allowed before the step, and `stop_ids` the ids that end an answer:

first step      the prefill: one token, nothing drafted.
DRAFT_TARGET    the draft model's chain from the last token, at most min(K, remaining - 1) tokens
                long, ended by the first stop id in it, which is still proposed. A draft that ends
                in a stop id and is accepted whole shows len(draft) tokens, not one more.
NGRAM           nothing is proposed with remaining = 1. Otherwise, for n from min(ngram_max, number
                of tokens - 1) down to 1: the earliest earlier occurrence of the last n tokens that
                something follows; the up to K tokens behind it (never beyond the last token) are
                the draft, ended by the first stop id in it, which is not proposed. If that leaves
                nothing the step is plain; no shorter n-gram is tried. K is not lowered near the
                length limit, so the last block may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple


class TwinStep(NamedTuple):
    """Tokens shown, draft tokens accepted before any cut, draft tokens checked."""

    token_ids: tuple[int, ...]
    accepted: int
    drafted: int


Next = Callable[[Sequence[int]], int]
"""prompt and output so far -> most likely next token"""
Propose = Callable[[Sequence[int], int], Sequence[int]]
"""(prompt and output so far, tokens still allowed) -> draft"""


def bigram(next_of: Sequence[int]) -> Next:
    """A model that looks at the last token only."""
    return lambda context: next_of[context[-1]]


def draft_model(draft_next: Next, draft_length: int, stop_ids: Collection[int]) -> Propose:
    """A draft model that decodes greedily."""

    def propose(context: Sequence[int], remaining: int) -> list[int]:
        draft: list[int] = []
        while len(draft) < min(draft_length, remaining - 1):
            draft.append(draft_next([*context, *draft]))
            if draft[-1] in stop_ids:
                break
        return draft

    return propose


def prompt_lookup(draft_length: int, ngram_max: int, stop_ids: Collection[int]) -> Propose:
    """transformers' prompt lookup."""

    def propose(context: Sequence[int], remaining: int) -> list[int]:
        if remaining == 1:
            return []
        text = list(context)
        for n in range(min(ngram_max, len(text) - 1), 0, -1):
            for start in range(len(text) - n):
                if text[start : start + n] == text[-n:]:
                    draft = text[start + n : start + n + draft_length]
                    stop = next((i for i, token in enumerate(draft) if token in stop_ids), None)
                    return draft if stop is None else draft[:stop]
        return []

    return propose


def nothing(_context: Sequence[int], _remaining: int) -> list[int]:
    """Plain decoding."""
    return []


def steps(
    prompt: Sequence[int],
    target_next: Next,
    propose: Propose,
    max_tokens: int,
    stop_ids: Collection[int],
) -> list[TwinStep]:
    """Greedy decoding, step by step."""
    context, found = list(prompt), list[TwinStep]()
    while True:
        remaining = len(prompt) + max_tokens - len(context)
        draft = list(propose(context, remaining)) if found else []
        accepted = 0
        while accepted < len(draft) and draft[accepted] == target_next(
            [*context, *draft[:accepted]]
        ):
            accepted += 1
        block = [*draft[:accepted], target_next([*context, *draft[:accepted]])][:remaining]
        ends = [i for i, token in enumerate(block) if token in stop_ids]
        block = block[: ends[0] + 1] if ends else block
        found.append(TwinStep(tuple(block), accepted, len(draft)))
        context += block
        if ends or len(block) == remaining:
            return found
