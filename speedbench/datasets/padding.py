"""Padding: sentences that make a prompt longer without giving a drafter anything to copy.

A drafter that looks its proposals up in the prompt is fast on repeated text, so that padding which
repeats itself measures the padding. Here no N_GRAM words follow one another twice, neither within
the padding nor between the padding and the text it is added to, unless repetition is asked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal

import numpy as np

from speedbench.types import UserError

Kind = Literal["rows", "words", "repeat"]

N_GRAM = 4

SHORTEST, LONGEST = 12, 600  # characters of a sentence

_WORD = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")
"""A run of letters and digits, or one character of scripts without spaces."""

_WIDE_END = "\u3002\uff01\uff1f"  # full stop, exclamation and question mark of Chinese
_PLAIN = rf"[^.!?\n{_WIDE_END}]+"
_SENTENCE = re.compile(rf"{_PLAIN}[.!?{_WIDE_END}]+(?=\s|$)|{_PLAIN}[{_WIDE_END}]+")

_MARKUP = frozenset("<>[]{}|`\\")
"""Signs of code, markup and special tokens: a sentence of other rows that has one is not used."""

_WORD_LIST = """
    able about above account across action active afternoon again agree airport almost along
    already also although always among amount animal answer apple april area around arrive
    artist autumn away baker balance basket beach become before begin behind believe below
    beside better between bicycle bird blanket board boat book border borrow bottle bottom
    branch bread bridge bright bring brother brown build busy butter cabin cable calm camera
    candle canvas capital captain carry castle cause center certain chair chance change cheese
    chicken choose church circle city clean clear clever climb clock close cloud coast coffee
    cold collect color common company compare complete consider copper corner cotton country
    couple course cousin cover create cross crowd culture current curtain dance daughter decide
    deep deliver depend describe desert design detail different dinner direct discover distance
    doctor double doubt dream dress drive during early earth easily eastern edge effort eight
    either electric empty engine enjoy enough entire evening event every exact example except
    expect explain extra face factor fall family famous farmer father favor feather field
    fifteen figure final finger finish fire first fish floor flower follow foreign forest forget
    former forward fourth frame free fresh friend front fruit full future garden gather general
    gentle glass gold good grand grass gray great green ground group grow guard guess guest
    guide habit half hammer happen harbor hardly harvest heavy height help hidden high history
    holiday honest horse hotel hour house however human hundred hungry hunt idea image imagine
    improve include increase indeed industry inside instead invite iron island join journey
    judge juice jump kettle kind kitchen knife ladder lake lamp language large later laugh
    leader leaf learn leather leave left lemon length lesson letter level library light likely
    limit linen lion liquid listen little local lonely long loud lower lucky lunch machine
    manner marble march market master matter maybe meadow meal measure medicine member memory
    metal method middle might mile milk million minute mirror mistake mixture model modern
    moment money month moon morning mother mountain mouth move much museum music narrow nation
    nature near nearly needle neighbor never night nobody noise normal north notice number
    object ocean offer office often older onion open orange order other outside oven owner page
    paint paper parent park part party pass past path patient pattern pencil people pepper
    perhaps person piano picture piece pilot place plain planet plant plate please pocket poem
    point polite pond popular position possible potato powder practice prepare present pretty
    price print private problem produce promise proper protect proud public pull pupil purple
    purpose push quarter question quick quiet quite rabbit radio railway rain raise rather reach
    reader ready reason receive record red region remain remember repair repeat reply report
    rest result return rice rich ride right ring rise river road rock roof room root rope rough
    round route royal rubber sail salt same sand saturday save scale school science sea season
    second secret seem select send sense separate serious seven several shadow shape share sharp
    sheep shelf shell shine ship shirt shoe shop short should shoulder show side signal silent
    silver similar simple since singer sister six size skill sleep slow small smile smoke smooth
    snow soap social soft soil soldier solid some song soon sound soup south space speak special
    speech spend spoon spring square stable stage stamp stand star start station stay steam
    steel step still stone stop store storm story straight strange stream street strong student
    study subject success sudden sugar suggest summer sunday supper supply support sure surface
    surprise sweet swim system table tail talk tall taste teach team tell temple ten thank
    theater therefore thick thin thing think third thirty though thousand thread through thunder
    ticket tiger timber today together tomorrow tongue tonight tool tooth top total touch toward
    tower town trade train travel treasure tree trip trouble true trust truth try turn twelve
    twenty twice type uncle under understand unit until upper useful usual valley value various
    vegetable very view village violin visit voice wagon wait walk wall warm wash watch water
    wave weather wednesday week weight welcome west wheat wheel where whether which while
    whisper white whole wide wild willow window winter wire wise wish within without woman
    wonder wood wool word work world worry worth write yard year yellow yesterday yet young zero
"""
WORDS = tuple(_WORD_LIST.split())
"""Common English words, for padding where no other rows are at hand."""


class Padding:
    """Sentences for any row; which ones follows from the seed and the row's key alone."""

    def __init__(self, kind: Kind, texts: Sequence[str], seed: int, repeated: str = "") -> None:
        """`texts` (N,): the rows' own texts, whose sentences pad one another."""
        self._kind = kind
        self._seed = seed
        self._repeated = repeated
        self._sentences: list[tuple[int, str]] = []  # (row, sentence), shuffled
        if kind == "rows":
            found: dict[str, int] = {}
            for row, text in enumerate(texts):
                for sentence in plain_sentences(text):
                    found.setdefault(sentence, row)
            order = np.random.default_rng(seed).permutation(len(found)).tolist()
            every = [(row, sentence) for sentence, row in found.items()]
            self._sentences = [every[place] for place in order]
        if kind == "repeat" and not repeated.strip():
            raise UserError("--padding repeat needs the text to repeat: add --padding_text TEXT")

    def sentences(self, row: int, key: str, text: str) -> Iterator[str]:
        """For row number `row` with the `text`: none of its own, none twice."""
        generator = np.random.default_rng(_number(f"{self._seed}/{key}"))
        if self._kind == "repeat":
            return (self._repeated.strip() for _ in count())
        if self._kind == "words":
            return _unrepeated(_made_up(generator), text)
        return _unrepeated(self._of_others(row, generator), text)

    def _of_others(self, row: int, generator: np.random.Generator) -> Iterator[str]:
        n = len(self._sentences)
        start = int(generator.integers(n)) if n else 0
        for place in range(start, start + n):
            owner, sentence = self._sentences[place % n]
            if owner != row:
                yield sentence


def plain_sentences(text: str) -> Iterator[str]:
    """The sentences of prose in a text: neither code nor markup."""
    for match in _SENTENCE.finditer(text):
        sentence = match[0].strip()
        if SHORTEST <= len(sentence) <= LONGEST and not _MARKUP & set(sentence):
            yield sentence


def repeated_ngram(text: str) -> str:
    """The first N_GRAM words of a text that occur twice in it; "" if none do."""
    seen: set[tuple[str, ...]] = set()
    for gram in _grams(_words(text)):
        if gram in seen:
            return " ".join(gram)
        seen.add(gram)
    return ""


def _unrepeated(sentences: Iterator[str], text: str) -> Iterator[str]:
    """Those that repeat no N_GRAM words of the text, of earlier ones, or of themselves."""
    seen = set(_grams(_words(text)))
    last: list[str] = []
    for sentence in sentences:
        words = last + _words(sentence)
        grams = list(_grams(words))
        if len(words) == len(last) or len(set(grams)) < len(grams) or not seen.isdisjoint(grams):
            continue
        seen.update(grams)
        last = words[-(N_GRAM - 1) :]
        yield sentence


def _made_up(generator: np.random.Generator) -> Iterator[str]:
    while True:
        words = [WORDS[i] for i in generator.integers(len(WORDS), size=generator.integers(6, 15))]
        yield " ".join([words[0].capitalize(), *words[1:]]) + "."


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + N_GRAM]) for i in range(len(words) - N_GRAM + 1))


def _number(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
