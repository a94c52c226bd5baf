"""Options of the insights: what only the user can say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedbench.types import UserError

_IDS = re.compile(r"\d+(\s*,\s*\d+)*")


@dataclass(frozen=True, slots=True)
class InsightOptions:
    """What only the user can say.

    think_end         token ids that end the thinking part of an answer
    gpu_hour_price    dollars for one GPU for one hour
    draft_vocabulary  folder of the draft checkpoint, for runs that did not store its vocabulary
    bin_tokens        width of the bins of AL by output position
    batch_tokens      batches, in tokens, for which activated experts are told
    """

    think_end: tuple[int, ...] = ()
    gpu_hour_price: float | None = None
    draft_vocabulary: Path | None = None
    bin_tokens: int = 500
    batch_tokens: tuple[int, ...] = (1, 8, 32, 128, 512)


def think_end_ids(
    given: str, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> tuple[int, ...]:
    """`--think_end` as token ids: '151668' and '1,2' are ids, anything else is text for `encode`,
    which adds no special tokens of its own. Raises UserError where that gives no token, or others
    than the text's: a tokenizer that lacks a text makes one of it that stands for all it lacks."""
    if _IDS.fullmatch(given.strip()):
        return tuple(int(part) for part in given.split(","))
    ids = tuple(int(token) for token in encode(given))
    if not ids:
        raise UserError(
            f"--think_end is {given!r}, which the tokenizer makes no token of: give the text that "
            "ends the thinking, such as </think>, or its token ids"
        )
    if "".join(decode(ids).split()) != "".join(given.split()):
        raise UserError(
            f"--think_end is {given!r}, which the tokenizer does not have: it reads it as "
            f"{decode(ids)!r} (token {', '.join(map(str, ids))}); give the text that ends the "
            "thinking in this model's answers, or its token ids"
        )
    return ids
