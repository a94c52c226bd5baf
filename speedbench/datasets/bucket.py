"""Buckets: throughput splits, each of whose prompts has exactly one length in tokens.

As the publisher has it, 1k is 1,000 tokens, the tier of a row (low_entropy, mixed, high_entropy) is
its category, and a row is one user turn. Unlike there, the length is exact under the tokenizer of
the measured model, as the engine will count it: chat template and BOS included, unless bare text is
asked for. Every length is counted again in the file that was written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from speedbench.config import RunConfig
from speedbench.datasets.fit import Fitted, Inexact, fit
from speedbench.datasets.padding import Padding
from speedbench.datasets.split import SplitRow, read_rows, write_rows
from speedbench.prompts import PromptEncoder
from speedbench.types import Conversation, UserError

K = 1000
"""As in the names of the published splits: 1k is not 1,024."""

TIERS = ("low_entropy", "mixed", "high_entropy")

INTRO = "The following notes have nothing to do with the request, which stands at the end."
"""Opens the padding, so that a padded prompt still asks for one thing."""

CHECKED_ROWS = 64

Counted = Literal["template", "completions", "bare"]

MEANINGS: Mapping[Counted, str] = {
    "template": "as the engine counts it: the user turn in the chat template, with BOS",
    "completions": "as the engine counts it: the text of the user turn, with BOS where the "
    "tokenizer puts one",
    "bare": "the text of the user turn alone, as the publisher counts it",
}


class Ruler:
    """How many tokens a prompt has."""

    def __init__(
        self,
        tokenizer: str,
        counted: Counted,
        chat_template_args: Mapping[str, object],
        trust_remote_code: bool = False,
    ) -> None:
        self._bare = counted == "bare"
        config = RunConfig(
            engine="NULL",
            tokenizer=tokenizer,
            completions=counted != "template",
            chat_template_args=dict(chat_template_args),
            trust_remote_code=trust_remote_code,
        )
        self._encoder = PromptEncoder(config)

    def length(self, text: str) -> int:
        if self._bare:
            return self._bare_lengths([text])[0]
        return len(self._encoder.encode_turn_from_text(_asked(text), 0, ()))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Of many, through the call that encodes the prompts of a run."""
        found: list[int] = []
        for start in range(0, len(texts), CHECKED_ROWS):
            batch = texts[start : start + CHECKED_ROWS]
            if self._bare:
                found += self._bare_lengths(batch)
            else:
                found += map(len, self._encoder.encode_first_turns([_asked(t) for t in batch]))
        return found

    def _bare_lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._encoder._token_ids(list(texts))]


def _asked(text: str) -> Conversation:
    return Conversation("row", "", (text,))


@dataclass(frozen=True, slots=True)
class Options:
    """What is done to every text."""

    intro: str = INTRO
    mark: tuple[str, str] | None = None
    may_repeat: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to one row: `how` is kept, cut or padded."""

    question_id: str
    tier: str
    how: str
    n_tokens_before: int
    n_tokens: int
    n_cut_chars: int
    n_padding_chars: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """rows and changes go together; inexact: (id, tier, reason) of the rows that are not in it."""

    name: str
    target: int
    rows: tuple[SplitRow, ...]
    changes: tuple[Change, ...]
    inexact: tuple[tuple[str, str, str], ...]

    def count(self, tier: str, how: str = "") -> int:
        return sum(c.tier == tier and how in ("", c.how) for c in self.changes)


def read_lengths(text: str) -> tuple[int, ...]:
    """'1k,2k,500' -> (1000, 2000, 500)."""
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(k?)", part.strip())
        if match is None:
            raise UserError(
                f"--isl has '{part}', expected lengths in tokens such as 1k,2k,32k (1k is {K})"
            )
        lengths.append(int(match[1]) * (K if match[2] else 1))
    if len(set(lengths)) < len(lengths):
        raise UserError(f"--isl {text} names a length twice: name each once")
    return tuple(lengths)


def bucket_name(target: int) -> str:
    return f"throughput_{target // K}k" if target % K == 0 else f"throughput_{target}"


def measure(rows: Sequence[SplitRow], ruler: Ruler) -> list[int | Inexact]:
    """(N,): tokens of every row as it stands; or why it fits no bucket."""
    return [_length(row, ruler) for row in rows]


def _length(row: SplitRow, ruler: Ruler) -> int | Inexact:
    if len(row.turns) > 1:
        return Inexact(f"it has {len(row.turns)} turns, and a throughput row has one")
    try:
        return ruler.length(row.turns[0])
    except UserError as error:  # the tokenizer or the template refuses this text
        return Inexact(str(error))


def build(
    rows: Sequence[SplitRow],
    tiers: Sequence[str],
    lengths: Sequence[int | Inexact],
    target: int,
    ruler: Ruler,
    padding: Padding,
    options: Options,
    per_tier: int | None,
) -> Bucket:
    """`rows` (N,) with their `tiers`, and `lengths` as `measure` has them.

    Of each tier `per_tier` rows (None: all), those first that need the least change.
    """
    made: dict[int, tuple[SplitRow, Change]] = {}
    inexact: dict[int, tuple[str, str, str]] = {}
    n_made = dict.fromkeys(TIERS, 0)
    for place, n_tokens in _by_change(lengths, target):
        row, tier = rows[place], tiers[place]
        if isinstance(n_tokens, Inexact):
            inexact[place] = (row.question_id, tier, n_tokens.reason)
            continue
        if n_made[tier] == per_tier:
            continue
        sentences = padding.sentences(place, f"{target}/{row.question_id}", row.turns[0])
        found = _fit(row.turns[0], n_tokens, target, ruler, sentences, options)
        if isinstance(found, Inexact):
            inexact[place] = (row.question_id, tier, found.reason)
            continue
        made[place] = _written(row, tier, found), _change(row, tier, found, n_tokens, target)
        n_made[tier] += 1
    order = sorted(made, key=lambda place: (TIERS.index(tiers[place]), place))
    return Bucket(
        bucket_name(target),
        target,
        tuple(made[place][0] for place in order),
        tuple(made[place][1] for place in order),
        tuple(inexact[place] for place in sorted(inexact)),
    )


def _by_change(lengths: Sequence[int | Inexact], target: int) -> list[tuple[int, int | Inexact]]:
    """(place, length) of every row: those that fit nowhere, then those next to the target."""

    def change(item: tuple[int, int | Inexact]) -> int:
        return -1 if isinstance(item[1], Inexact) else abs(item[1] - target)

    return sorted(enumerate(lengths), key=change)


def _fit(
    text: str,
    n_tokens: int,
    target: int,
    ruler: Ruler,
    sentences: Iterator[str],
    options: Options,
) -> Fitted | Inexact:
    try:
        return fit(
            text,
            target,
            ruler.length,
            sentences,
            options.intro,
            options.mark,
            options.may_repeat,
            n_tokens,
        )
    except UserError as error:  # the tokenizer or the template refuses a changed text
        return Inexact(str(error))


def _written(row: SplitRow, tier: str, fitted: Fitted) -> SplitRow:
    """The row as the publisher has it: the tier is the category, which becomes the sub-category."""
    sub_category = row.sub_category if row.category == tier else row.category
    return replace(row, category=tier, sub_category=sub_category, turns=(fitted.text,), extra=())


def _change(row: SplitRow, tier: str, fitted: Fitted, n_before: int, n_tokens: int) -> Change:
    return Change(
        row.question_id,
        tier,
        fitted.how,
        n_before,
        n_tokens,
        fitted.n_cut_chars,
        len(fitted.padding),
    )


def write(bucket: Bucket, folder: Path, ruler: Ruler) -> None:
    """folder/NAME/test.parquet; every row of the file is encoded again and must be exact."""
    path = folder / bucket.name / "test.parquet"
    write_rows(path, bucket.rows)
    found = read_rows(path)
    lengths = ruler.lengths([row.turns[0] for row in found])
    for row, length in zip(found, lengths, strict=True):
        if length != bucket.target:
            raise UserError(
                f"row {row.question_id} of {bucket.name} has {length} tokens once it is written, "
                f"expected {bucket.target}: the tokenizer is not steady, nothing was written"
            )


# ---------------------------------------------------------------- tiers


@dataclass(frozen=True, slots=True)
class Tiers:
    """of_rows (N,); given_by: where they are from; thresholds: the terciles, where computed."""

    of_rows: tuple[str, ...]
    given_by: str
    thresholds: tuple[float, float] | None = None


def named_tiers(rows: Sequence[SplitRow], values: Sequence[object], given_by: str) -> Tiers | None:
    """Tiers by their names, or by terciles of numbers; None if no row has a value at all."""
    if all(value is None for value in values):
        return None
    names = tuple(value for value in values if isinstance(value, str) and value in TIERS)
    if len(names) == len(rows):
        return Tiers(names, given_by)
    numbers = [_finite(value) for value in values]
    for row, value, number in zip(rows, values, numbers, strict=True):
        if number is None:
            raise UserError(
                f"row {row.question_id} has {value!r:.60} as its {given_by}, expected one of "
                f"{', '.join(TIERS)} in every row, or a number in every row: mend the row"
            )
    return terciles([number for number in numbers if number is not None], given_by)


def terciles(values: Sequence[float], given_by: str) -> Tiers:
    """A third of the rows each, by rising value; equal values share a tier."""
    ordered = sorted(values)
    low, high = (ordered[max(0, math.ceil(len(ordered) * third / 3) - 1)] for third in (1, 2))
    of_rows = tuple(TIERS[(value > low) + (value > high)] for value in values)
    if missing := [tier for tier in TIERS if tier not in of_rows]:
        raise UserError(
            f"the {given_by} of {len(values)} row(s) makes no tier {missing[0]} (thresholds "
            f"{low:.4g} and {high:.4g}): give more rows, or rows that differ"
        )
    return Tiers(of_rows, given_by, (low, high))


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def shortfalls(bucket: Bucket, per_tier: int | None) -> Iterator[str]:
    """One sentence per tier that holds fewer rows than were asked for, or none."""
    for tier in TIERS:
        n, left_out = bucket.count(tier), [row for row in bucket.inexact if row[1] == tier]
        if n < (per_tier or 1):
            why = f"; of {left_out[0][0]}: {left_out[0][2]}" if left_out else ""
            yield (
                f"{bucket.name} has {n} row(s) of {tier}"
                + (f", {per_tier} were asked for" if per_tier else "")
                + f" ({len(left_out)} cannot be made exact{why})"
            )
