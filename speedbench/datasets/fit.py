"""Fitting: a text is cut or padded until the prompt made of it has an exact number of tokens.

How many tokens a text has is only known by encoding it: pieces merge where they meet, templates
strip, normalizers rewrite. So that nothing is computed here, only searched: the right place is
approached from both sides, then its neighbours are tried, then a few small words. What is found is
exact because it was counted; what is not found is given up, with the reason.

A text is cut in its middle, or in its marked context, so that its beginning and its end (the
question) stay. It is padded before its beginning, or at the end of its marked context.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as count_up
from typing import Literal, TypeVar

from speedbench.datasets.padding import repeated_ngram

Count = Callable[[str], int]
"""Tokens of the prompt that a text becomes."""

Found = TypeVar("Found")

SEAM = "\n\n"
"""What stands where a piece was cut out, and between padding and text."""

N_BESIDE = 12
"""Neighbouring places tried on each side of the nearest one."""

SMALL_WORDS: tuple[str, ...] = (
    *(" so", " and", " now", " a", " I", " the", " or", " then", " it", " yes", " one"),
    *".,;:!?-()/+=*~_#%",
)
"""Added once each at the seam where no place is exact: mostly one token in any vocabulary."""

MAX_CHARS_PER_TOKEN = 200
"""Padding that needs more adds no tokens: the tokenizer drops what it does not know."""

N_TOPPED_UP = 4
"""Texts that are short of the target, each by another number of tokens, that words are added to."""

FEW_TOKENS = 20
"""A text that is no more than this too short may be cut where it cannot be padded."""

_OPEN_ENDED = frozenset("\u200d\ufe0e\ufe0f")
_LINE_END = re.compile(r"\n+")
_SENTENCE_END = re.compile(r"[.!?]\s+|[\u3002\uff01\uff1f]")
_WORD_START = re.compile(r"(?<=\s)(?=\S)|(?<=[\u3040-\u30ff\u3400-\u9fff])")


@dataclass(frozen=True, slots=True)
class Fitted:
    """A text of the exact length, and what was done to it."""

    text: str
    how: Literal["kept", "cut", "padded"]
    n_cut_chars: int = 0
    padding: str = ""  # small words of a cut text's seam, too


@dataclass(frozen=True, slots=True)
class Inexact:
    """Why a text cannot be made exact."""

    reason: str


def fit(
    text: str,
    target: int,
    count: Count,
    sentences: Iterator[str],
    intro: str = "",
    mark: tuple[str, str] | None = None,
    may_repeat: bool = False,
    n_tokens: int | None = None,
) -> Fitted | Inexact:
    """`text` at exactly `target` tokens. `sentences` pad it, after `intro`; `mark` is what opens
    and closes the context that alone may change; `may_repeat`: the padding may repeat itself;
    `n_tokens`: of `text`, where it is known.
    """
    context = None
    if mark is not None:
        context = _context(text, mark)
        if context is None:
            return Inexact(f"it has no context between {mark[0]!r} and {mark[1]!r}")
    n_tokens = count(text) if n_tokens is None else n_tokens
    if n_tokens == target:
        return Fitted(text, "kept")
    if n_tokens > target:
        return _cut(text, n_tokens, target, count, context)
    n_missing = target - n_tokens
    fitted = _pad(text, n_missing, target, count, sentences, intro, context)
    if isinstance(fitted, Inexact) and n_missing <= FEW_TOKENS:
        # Too short for padding, but not for a small cut with small words in its seam.
        shorter = _cut(text, n_tokens, target, count, context)
        fitted = shorter if isinstance(shorter, Fitted) else fitted
    if isinstance(fitted, Fitted) and not may_repeat and (gram := repeated_ngram(fitted.padding)):
        return Inexact(f"its padding would repeat {gram!r}")
    return fitted


def _context(text: str, mark: tuple[str, str]) -> tuple[int, int] | None:
    """Where the context begins and ends, the marks excluded."""
    opened = text.find(mark[0])
    closed = text.rfind(mark[1])
    start = opened + len(mark[0])
    return None if opened < 0 or closed < start else (start, closed)


# ---------------------------------------------------------------- cutting


def _cut(
    text: str, n_tokens: int, target: int, count: Count, context: tuple[int, int] | None
) -> Fitted | Inexact:
    reason = ""
    for start, end in [context] if context else _cuttable(text, target, count):
        n_least = count(text[:start] + SEAM + text[end:])
        if n_least > target:
            what = "outside its context" if context else "with no text at all"
            reason = reason or f"it has {n_least} tokens {what}, more than {target}"
            continue
        for places in (word_places, character_places):
            cutter = _Cutter(text, start, end, [start + p for p in places(text[start:end])])
            if (found := cutter.cut(target, count, n_least, n_tokens)) is not None:
                return found
        reason = f"no cut makes it exactly {target} tokens"
    return Inexact(reason)


def _cuttable(text: str, target: int, count: Count) -> Iterator[tuple[int, int]]:
    """Spans that may lose a piece: first between the opening and the question, at last anywhere."""
    start = next((end for end in _openings(text) if count(text[:end]) <= target / 4), 0)
    end = next((at for at in _questions(text) if count(text[at:]) <= target / 2), len(text))
    spans = [(start, end), (0, end), (0, len(text))]
    yield from dict.fromkeys(span for span in spans if span[0] < span[1])


def _openings(text: str) -> Iterator[int]:
    """Ends of the first line and of the first sentence."""
    lead = len(text) - len(text.lstrip())
    for pattern in (_LINE_END, _SENTENCE_END):
        if match := pattern.search(text, lead):
            yield match.end()


def _questions(text: str) -> Iterator[int]:
    """Beginnings of the last line and of the last sentence."""
    body = text.rstrip()
    for pattern in (_LINE_END, _SENTENCE_END):
        ends = [match.end() for match in pattern.finditer(body) if match.end() < len(body)]
        if ends:
            yield ends[-1]


class _Cutter:
    """A text, the span of it that may lose a piece, and the places where it may be cut."""

    def __init__(self, text: str, start: int, end: int, places: Sequence[int]) -> None:
        self._text, self._start, self._end = text, start, end
        self._places = places  # from start to end, both in it

    def cut(self, target: int, count: Count, n_least: int, n_most: int) -> Fitted | None:
        """`n_least` and `n_most`: tokens with nothing of the span, and with all of it."""
        top = len(self._places) - 1
        near = _approach(lambda n: count(self._without(n, n)), top // 2, target, n_least, n_most)
        short: dict[int, tuple[int, int]] = {}  # tokens below the target -> (front, back)
        for front, back in _around(near):
            if min(front, back) < 0 or front + back >= top:
                continue
            n_tokens = count(self._without(front, back))
            if n_tokens == target and self._without(front, back).strip():
                return self._fitted(front, back, "")
            if n_tokens < target:
                short.setdefault(n_tokens, (front, back))
        for front, back in _nearest(short):
            without = partial(self._without, front, back)
            if (words := _small_words(without, target, count)) is not None:
                return self._fitted(front, back, words)
        return None

    def _spans(self, front: int, back: int) -> tuple[int, int]:
        """The piece to go: `front` places of the span stay before it, `back` behind it."""
        return self._places[front], self._places[len(self._places) - 1 - back]

    def _without(self, front: int, back: int, words: str = "") -> str:
        gone, again = self._spans(front, back)
        seam = SEAM + words.strip() + SEAM if words else SEAM
        return self._text[:gone].rstrip() + seam + self._text[again:].lstrip()

    def _fitted(self, front: int, back: int, words: str) -> Fitted:
        gone, again = self._spans(front, back)
        return Fitted(self._without(front, back, words), "cut", again - gone, words.strip())


def _around(near: int) -> Iterator[tuple[int, int]]:
    """Pairs of places beside (near, near); first those that keep as many words in all."""
    moved = sorted(range(-N_BESIDE, N_BESIDE + 1), key=abs)
    for more in (0, -1, 1, -2):
        yield from ((near + front, near - front + more) for front in moved)


# ---------------------------------------------------------------- padding


def _pad(
    text: str,
    n_missing: int,
    target: int,
    count: Count,
    sentences: Iterator[str],
    intro: str,
    context: tuple[int, int] | None,
) -> Fitted | Inexact:
    pool = _Pool(sentences)
    reason = f"it is {n_missing} token(s) short, less than any padding adds"
    for before, after in _frames(text, intro, context):
        frame = _Frame(before, after)
        n_least = count(frame.around(""))
        if n_least > target:
            continue
        n_most = pool.fill(frame, n_missing, target, count)
        if n_most < target:
            return Inexact(
                f"the padding ends {target - n_most} token(s) short of "
                f"{target}: the other rows have too little prose"
            )
        padding = _exact_padding(frame, pool.text, target, count, n_least, n_most)
        if padding is not None:
            return Fitted(frame.around(padding), "padded", padding=padding)
        reason = f"no padding makes it exactly {target} tokens"
    return Inexact(reason)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands before and after the padding."""

    before: str
    after: str

    def around(self, padding: str, words: str = "") -> str:
        return self.before + padding + words + self.after


def _frames(text: str, intro: str, context: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    """The roomiest first; the narrow ones are for a text that is a few tokens short."""
    if context is not None:
        before, after = text[: context[1]], text[context[1] :]
        yield from ((before + seam, after) for seam in (SEAM, "\n", " "))
        return
    if intro:
        yield intro + SEAM, SEAM + text
    yield from (("", seam + text) for seam in (SEAM, "\n", " "))


class _Pool:
    """The sentences taken so far."""

    def __init__(self, sentences: Iterator[str]) -> None:
        self._sentences = sentences
        self.text = ""

    def fill(self, frame: _Frame, n_missing: int, target: int, count: Count) -> int:
        """Take sentences until they are too long, or end; the tokens with all of them."""
        n_chars = 4 * n_missing + 40
        while True:
            more = self._take(n_chars)
            n_tokens = count(frame.around(self.text))
            too_many_chars = len(self.text) > MAX_CHARS_PER_TOKEN * n_missing + 20_000
            if n_tokens > target or not more or too_many_chars:
                return n_tokens
            n_added = max(1, n_tokens - (target - n_missing))
            per_token = len(self.text) / n_added
            n_chars = max(n_chars + 40, int(1.05 * per_token * n_missing) + 40)

    def _take(self, n_chars: int) -> bool:
        parts, n = [self.text] if self.text else [], len(self.text)
        more = n >= n_chars
        while n < n_chars:
            sentence = next(self._sentences, None)
            more = sentence is not None
            if sentence is None:
                break
            parts.append(sentence)
            n += len(sentence) + 1
        self.text = " ".join(parts)
        return more


def _exact_padding(
    frame: _Frame, pool: str, target: int, count: Count, n_least: int, n_most: int
) -> str | None:
    """`n_least` and `n_most`: tokens with nothing of the pool, and with all of it."""

    def cut_at(place: int) -> str:
        return pool[:place].rstrip()

    places = word_places(pool)
    top = len(places) - 1
    near = _approach(lambda n: count(frame.around(cut_at(places[n]))), top, target, n_least, n_most)
    short: dict[int, str] = {}
    beside = range(max(0, near - 3), min(len(places), near + 5))
    for n in sorted(beside, key=lambda n: abs(n - near)):
        padding = cut_at(places[n])
        n_tokens = count(frame.around(padding))
        if n_tokens == target and padding:
            return padding
        if n_tokens < target:
            short.setdefault(n_tokens, padding)
    for padding in _nearest(short):
        words = _small_words(partial(frame.around, padding), target, count)
        if words is not None:
            return padding + words
    everywhere = character_places(pool)
    first = bisect_left(everywhere, places[max(0, near - 1)])
    last = bisect_right(everywhere, places[min(len(places) - 1, near + 2)])
    parts = (pool[:place] for place in everywhere[first:last])
    return next((part for part in parts if part and count(frame.around(part)) == target), None)


# ---------------------------------------------------------------- searching


def _approach(
    count_at: Callable[[int], int], top: int, target: int, at_low: int, at_high: int
) -> int:
    """A place n of 0 to top where count_at(n) is the target, or steps over it from n to n + 1.

    at_low and at_high are about what it is at 0 (at most the target) and at the top (more). It need
    not rise steadily: a step over the target is found.
    """
    low, high = 0, top
    per_place = max(at_high - at_low, 1) / max(top, 1)
    n, at = low, at_low
    for attempt in count_up():
        if high - low <= 1:
            break
        # From the last place as the mean slope has it; now and then by halves, which always ends.
        n = (low + high) // 2 if attempt % 6 == 5 else n + round((target - at) / per_place)
        n = min(high - 1, max(low + 1, n))
        at = count_at(n)
        if at == target:
            return n
        low, high = (n, high) if at < target else (low, n)
    return low


def _nearest(short: Mapping[int, Found]) -> list[Found]:
    """What is least short, by its tokens; a few, because words may add two tokens each."""
    return [short[n_tokens] for n_tokens in sorted(short, reverse=True)[:N_TOPPED_UP]]


def _small_words(text_with: Callable[[str], str], target: int, count: Count) -> str | None:
    """Small words that fill up to the target exactly; None if they do not."""
    words = ""
    for word in SMALL_WORDS:
        n_tokens = count(text_with(words + word))
        if n_tokens == target:
            return words + word
        if n_tokens < target:
            words += word
    return None


def word_places(text: str) -> list[int]:
    """Where a text may be cut between two words, its two ends included; after any character of a
    script without spaces, too.
    """
    inner = [match.start() for match in _WORD_START.finditer(text)]
    inner = [i for i in inner if 0 < i < len(text)]
    if not text.isascii():
        inner = [i for i in inner if _is_between_characters(text, i)]
    return [0, *inner, len(text)] if text else [0]


def character_places(text: str) -> list[int]:
    """Where a text may be cut between two characters as they are seen, its two ends included."""
    inner = (i for i in range(1, len(text)) if _is_between_characters(text, i))
    return [0, *inner, len(text)] if text else [0]


def _is_between_characters(text: str, i: int) -> bool:
    """Whether text[i] begins a character of its own: no accent, no joined or tinted emoji, no half
    of a flag, no inner part of a Hangul syllable."""
    before, after = text[i - 1], text[i]
    if before < "\u0300" and after < "\u0300":
        return not (before == "\r" and after == "\n")
    if before == "\u200d" or after in _OPEN_ENDED:
        return False
    if unicodedata.category(after) in ("Mn", "Mc", "Me"):
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f":
        return False
    if _is_flag_half(before) and _is_flag_half(after):
        return False
    return not ("\u1160" <= after <= "\u11ff")


def _is_flag_half(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
