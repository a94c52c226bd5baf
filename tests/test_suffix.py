"""The model of suffix decoding, against the library that vLLM uses."""

from __future__ import annotations

import random

import numpy as np
import pytest

from speedbench.calibration.closed_form import ExpectedStep, suffix_steps
from speedbench.calibration.suffix import DEPTH, MIN_PROBABILITY, SPEC_FACTOR, SuffixText


def test_a_draft_follows_the_most_frequent_continuation() -> None:
    text = SuffixText()
    text.extend([1, 2, 3, 1, 2, 4, 1, 2, 4, 9, 1, 2])
    # "1 2" was followed twice by 4, once by 3; two tokens matched allow two drafted.
    assert text.draft(5)[0] == 4
    assert len(text.draft(5)) == 2
    assert text.draft(1) == [4]
    text.extend([7])  # never seen before
    assert text.draft(5) == []


def test_steps_of_a_repeating_answer() -> None:
    ring = [1, 2, 3, 0]
    steps = suffix_steps([0, 1, 2, 3, 0], ring, 3, 9, ())
    # "0 1" was seen: two tokens matched, two drafted, both right; then more is known.
    assert steps[:2] == [ExpectedStep((1,), 0, 0), ExpectedStep((2, 3, 0), 2, 2)]
    assert sum(len(step.token_ids) for step in steps) == 9


@pytest.mark.parametrize("seed", range(40))
def test_drafts_are_those_of_the_library(seed: int) -> None:
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    rng = random.Random(seed)
    n_words = rng.choice([2, 3, 5, 20])
    k = rng.choice([1, 3, 5, 24])
    prompt = [rng.randrange(n_words) for _ in range(rng.randint(1, 60))]
    library, text = SuffixDecodingCache(DEPTH, 0), SuffixText()
    library.start_request("r", prompt)
    text.extend(prompt)
    tokens = list(prompt)
    for _ in range(30):
        new = [rng.randrange(n_words) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.5 and len(tokens) > 8:
            at = rng.randrange(len(tokens) - 4)
            new = tokens[at : at + 4]
        tokens += new
        library.add_active_response("r", new)
        text.extend(new)
        theirs = library.speculate(
            "r",
            np.array(tokens[-DEPTH:], np.int32),
            max_spec_tokens=k,
            max_spec_factor=SPEC_FACTOR,
            min_token_prob=MIN_PROBABILITY,
        )
        assert text.draft(k) == list(theirs.token_ids)
