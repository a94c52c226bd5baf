"""Requests of a server beside their known steps, where a chunk holds several of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from speedbench.calibration.closed_form import ExpectedStep
from speedbench.calibration.verdict import ObservedRequest


def unmerged(
    request: ObservedRequest,
    steps: Sequence[ExpectedStep],
    histogram: Sequence[int],
    accepted: Sequence[int],
) -> ObservedRequest:
    """The request with its chunks taken apart into its known steps, if what the server told leaves
    no other: its tokens are theirs, its chunks end where steps do, and its verifications are those
    of the steps, one by one (`accepted`) or in total (`histogram` by accepted drafts). As it is
    otherwise, so that it is found to differ.
    """
    verifications = [step.accepted for step in steps if step.drafted]
    ends = set(accumulate(len(step.token_ids) for step in steps))
    fits = (
        list(request.output_ids) == [token for step in steps for token in step.token_ids]
        and set(accumulate(request.n_tokens)) <= ends
        and Counter(verifications) == Counter({j: n for j, n in enumerate(histogram) if n})
        and (not accepted or list(accepted) == verifications)
    )
    if not fits:
        return request
    return replace(
        request,
        n_tokens=[len(step.token_ids) for step in steps],
        accepted=[step.accepted for step in steps],
        drafted=[step.drafted for step in steps],
        engine_steps=[1] * len(steps),
    )
