"""Prometheus text: what a server's /metrics says (exposition format 0.0.4), read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

Labels = tuple[tuple[str, str], ...]
"""(name, value) of each label, by name."""

KINDS = ("counter", "gauge", "histogram", "summary", "untyped")

_TYPE = re.compile(r"#\s*TYPE\s+(\S+)\s+(\S+)\s*")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\\n]|\\["\\n])*)"\s*(,|(?=\}))')
_OPEN, _CLOSE = re.compile(r"[ \t]*\{"), re.compile(r"\s*\}")
_VALUE = re.compile(r"\s*(\S+)(?:[ \t]+-?\d+)?")  # a time may follow; ours is our own clock's
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|inf|nan)", re.I)
_ESCAPED = re.compile(r"\\(.)")
_SUFFIXES = ("_bucket", "_sum", "_count")
"""What the samples of one histogram or summary end with."""


# A NamedTuple, not a dataclass: a scrape holds a thousand of them, once a second.
class Sample(NamedTuple):
    """One line: a series and its value. `kind` is that of its family."""

    name: str
    labels: Labels
    kind: str
    value: float


class FormatError(ValueError):
    """The text is none that Prometheus would take: one sentence."""


def parse(text: str) -> list[Sample]:
    """The samples of one scrape, in order. Raises FormatError for anything that is not the format,
    a text that was cut off, and a series that stands twice."""
    if text and not text.endswith("\n"):
        raise FormatError("its last line is cut off")
    kinds: dict[str, str] = {}
    samples: list[Sample] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(" \t\r")
        if line.startswith("#"):
            _note_kind(line, kinds, number)
        elif line:
            samples.append(_sample(line, kinds, number))
    if len({(one.name, one.labels) for one in samples}) < len(samples):
        raise FormatError("a series stands in it twice")
    return samples


def _note_kind(line: str, kinds: dict[str, str], number: int) -> None:
    """A `# TYPE` line; every other comment says nothing."""
    found = _TYPE.fullmatch(line)
    if found is None:
        return
    if found[2] not in KINDS:
        raise FormatError(f"line {number} names the kind '{found[2][:40]}', which there is not")
    kinds[found[1]] = found[2]


def _sample(line: str, kinds: Mapping[str, str], number: int) -> Sample:
    name = _NAME.match(line)
    if name is None:
        raise FormatError(f"line {number} begins with no name of a metric")
    labels, place = _labels(line, name.end(), number)
    value = _VALUE.fullmatch(line, place)
    apart = line[place - 1] == "}" or line[place : place + 1].isspace()
    if value is None or not apart or _NUMBER.fullmatch(value[1]) is None:
        raise FormatError(f"line {number} ends with no value")
    return Sample(name[0], labels, _kind(name[0], kinds), float(value[1]))


def _labels(line: str, place: int, number: int) -> tuple[Labels, int]:
    """The labels that begin at a place, by name, and where they end."""
    start = _OPEN.match(line, place)
    if start is None:
        return (), place
    place, found = start.end(), {}
    while (end := _CLOSE.match(line, place)) is None:
        label = _LABEL.match(line, place)
        if label is None or label[1] in found:
            raise FormatError(f"line {number} has labels that cannot be read")
        found[label[1]] = _ESCAPED.sub(_unescaped, label[2])
        place = label.end()
    return tuple(sorted(found.items())), end.end()


def _unescaped(found: re.Match[str]) -> str:
    return "\n" if found[1] == "n" else found[1]


def _kind(name: str, kinds: Mapping[str, str]) -> str:
    """Of the sample's family: its name, or what stands before the suffix of a histogram."""
    if name in kinds:
        return kinds[name]
    for suffix in _SUFFIXES:
        family = name.removesuffix(suffix)
        if family != name and kinds.get(family) in ("histogram", "summary"):
            return kinds[family]
    return "untyped"
