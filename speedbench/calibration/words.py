"""The language of the word pair: eleven categories of numbered words, and prompts in it.

Each category is a cycle of words (after coding_017 comes coding_018) and a tail (coding_end_03 is
three tokens from the end of the answer). Target and drafter know the same words; they disagree on
a fixed share of them, so that every category has its own acceptance length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from speedbench.calibration.tokenizers import WORD_SPECIALS

DENSITIES = {
    "coding": 0.95,
    "humanities": 0.53,
    "math": 0.65,
    "multilingual": 0.35,
    "qa": 0.47,
    "rag": 0.89,
    "reasoning": 0.77,
    "roleplay": 0.41,
    "stem": 0.59,
    "summarization": 0.71,
    "writing": 0.83,
}
"""Category -> share of its cycle on which the drafter agrees with the target."""

N_CYCLE = 100  # so that every density is met exactly
N_TAIL = 16
N_ROWS = 20
N_MULTI_TURN_ROWS = 2
SHORTEST_PROMPT, LONGEST_PROMPT = 3, 60  # words


@dataclass(frozen=True, slots=True)
class Words:
    """Words by token id, and the two functions on them: word -> next word."""

    vocabulary: tuple[str, ...]
    target_next: dict[str, str]
    draft_next: dict[str, str]


def words() -> Words:
    """The whole language. Token ids are shuffled: an id tells nothing about its successor."""
    target: dict[str, str] = {}
    draft: dict[str, str] = {}
    for category in DENSITIES:
        steps = _category_steps(category)
        target |= steps
        draft |= steps | _disagreements(category, steps)
    # A draft does not stop at the end of an answer, so what follows there has an answer too.
    unknown, begin, end, pad = WORD_SPECIALS
    specials = {
        unknown: _cycle("qa")[0],
        begin: _cycle("rag")[0],
        end: _cycle("math")[0],
        pad: _cycle("roleplay")[0],
    }
    vocabulary = list(target)
    random.Random(1).shuffle(vocabulary)
    return Words((*WORD_SPECIALS, *vocabulary), target | specials, draft | specials)


def prompt_rows() -> list[dict[str, object]]:
    """Calibration prompts in SPEED-Bench's schema: per category 20 single turns, 2 multi-turn."""
    rows: list[dict[str, object]] = []
    for index, category in enumerate(DENSITIES):
        rng = random.Random(f"prompts of {category}")
        for i in range(N_ROWS):
            n_words = SHORTEST_PROMPT + (LONGEST_PROMPT - SHORTEST_PROMPT) * i // (N_ROWS - 1)
            if i % 4 == 1:
                kind, turn = "tail", _tail_prompt(rng, category, n_words, 5 * index + i // 4)
            elif i >= 4 and i % 2 == 0:
                kind, turn = "echo", _echo_prompt(rng, category, n_words)
            else:
                kind, turn = "plain", " ".join(rng.choices(_cycle(category), k=n_words))
            rows.append(_row(category, i, kind, [turn]))
        for i in range(N_ROWS, N_ROWS + N_MULTI_TURN_ROWS):
            turns = [
                _echo_prompt(rng, category, 20),
                _tail_prompt(rng, category, 8, 2 * index + i),
                _echo_prompt(rng, category, 30),
            ]
            rows.append(_row(category, i, "multiturn", turns[: 3 - i % 2]))
    return rows


def _row(category: str, index: int, kind: str, turns: list[str]) -> dict[str, object]:
    return {
        "question_id": f"{category}-{index:02d}",
        "category": category,
        "sub_category": kind,
        "turns": turns,
        "source": "speedbench-calibration",
        "src_id": f"word/{category}/{index:02d}",
        "difficulty": "",
        "multiturn": len(turns) > 1,
    }


def _cycle(category: str) -> list[str]:
    return [f"{category}_{i:03d}" for i in range(N_CYCLE)]


def _tail(category: str) -> list[str]:
    """From the word N_TAIL tokens before the end of the answer to the word one token before."""
    return [f"{category}_end_{i:02d}" for i in range(N_TAIL, 0, -1)]


def _category_steps(category: str) -> dict[str, str]:
    cycle, tail = _cycle(category), _tail(category)
    after_tail = WORD_SPECIALS[2]
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True)) | dict(
        zip(tail, [*tail[1:], after_tail], strict=True)
    )


def _disagreements(category: str, steps: dict[str, str]) -> dict[str, str]:
    """Words on which the drafter is wrong: each takes the successor of the next such word.

    The near half of the tail is agreed upon, so that answers end inside accepted blocks.
    """
    rng = random.Random(f"disagreements of {category}")
    far_tail = _tail(category)[: N_TAIL // 2]
    share = 1 - DENSITIES[category]
    wrong = rng.sample(_cycle(category), round(share * N_CYCLE))
    wrong += rng.sample(far_tail, round(share * len(far_tail)))
    return {word: steps[other] for word, other in zip(wrong, [*wrong[1:], wrong[0]], strict=True)}


def _tail_prompt(rng: random.Random, category: str, n_words: int, number: int) -> str:
    """Ends 1 to N_TAIL tokens before the end of the answer; long ones hold a piece of the tail."""
    tail = _tail(category)
    start = N_TAIL - 1 - number % N_TAIL
    filler = rng.choices(_cycle(category), k=n_words - 1)
    if n_words > 20:
        filler[5:11] = [*tail[max(0, start - 1) :][:5], rng.choice(_cycle(category))]
        filler = filler[: n_words - 1]
    return " ".join([*filler, tail[start]])


def _echo_prompt(rng: random.Random, category: str, n_words: int) -> str:
    """Holds pieces of its own answer, each followed by a wrong word: an n-gram drafter hits,
    partly hits and misses."""
    cycle = _cycle(category)
    start = rng.randrange(N_CYCLE)
    held: list[str] = []
    while len(held) < n_words - 1:
        offset, length = rng.randrange(24), rng.randrange(2, 10)
        held += [cycle[(start + offset + i) % N_CYCLE] for i in range(length)]
        held.append(rng.choice(cycle))
    return " ".join([*held[: n_words - 1], cycle[start]])
