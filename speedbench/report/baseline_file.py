"""Baseline file: what later comparisons need of a base, without its run directory.

    {"schema": "speedbench.baseline/1", "label": ..., "manifest": {...}, "runs": [...]}

One run: where it was stored, its checks, its throughput, and its conversations, one a line:
    id
    turns     [turn, sha256 of the prompt, tokens of the output, sha256 of the output]; the last two
              are null where the request failed
    category, failed; where it failed nothing follows, and the category may not be known
    log_tps, log_step   natural logarithms of user TPS (1/s) and of the mean step time (s), or null
    seconds    to the first tokens, after them, and until a client had sent the requests, or null
    log_ttft   mean over its turns of the natural logarithm of TTFT (s), or null
    lengths   decode steps by length, uncensored and then censored, K + 2 counts each
Numbers are at full precision. The outputs themselves are not kept: two are the same or they are
not, and where they part is not known.

History
  speedbench.baseline/1  without log_ttft and seconds
  speedbench.baseline/2  as above
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speedbench import manifest as manifests
from speedbench.checks import Check
from speedbench.lossless import Answer
from speedbench.report.sample import Sample, SampleRun
from speedbench.report.sides import Measured
from speedbench.report.summary import Figure
from speedbench.types import UserError

SCHEMA = "speedbench.baseline"
VERSION = 2
NONE = (None, None)

NOT_KEPT = frozenset({"argv", "hostname"})
"""Of a run's environment: what says nothing of the measurement and much of the machine's owner."""


# ---------------------------------------------------------------- writing


def dumps(sample: Sample) -> str:
    """The file's text: strict JSON, with one conversation on each line."""
    return "".join(_lines(sample))


def _lines(sample: Sample) -> Iterator[str]:
    manifest = {
        **sample.manifest,
        "environment": {
            name: value
            for name, value in sample.manifest["environment"].items()
            if name not in NOT_KEPT
        },
        "sessions": [
            {name: value for name, value in session.items() if name not in NOT_KEPT}
            for session in sample.manifest["sessions"]
        ],
    }
    yield f'{{\n"schema": "{SCHEMA}/{VERSION}",\n"label": {_json(sample.label)},\n'
    yield f'"manifest": {_json(manifest)},\n"runs": ['
    for number, run in enumerate(sample.runs):
        about = {
            "source": run.source,
            "started": run.started,
            "categories": run.categories,
            "checks": [[check.level, check.sentence] for check in run.checks],
            "output_tps": [run.output_tps.value, run.output_tps.why_not],
        }
        yield ("," if number else "") + "\n" + _json(about)[:-1] + ', "conversations": [\n'
        yield ",\n".join(_json(row) for row in _conversations(run))
        yield "\n]}"
    yield "\n]\n}\n"


def _conversations(run: SampleRun) -> Iterator[dict[str, Any]]:
    found = run.measured
    category_of = {name: answer.category for (name, _), answer in run.answers.items()}
    for name in sorted(found.asked):
        place = found.place.get(name)
        turns = []
        for turn, prompt in found.asked[name]:
            answer = run.answers.get((name, turn))
            turns.append([turn, prompt, *((answer.n_tokens, answer.sha256) if answer else NONE)])
        row: dict[str, Any] = {"id": name, "turns": turns, "failed": place is None}
        row["category"] = category_of.get(name) if place is None else found.category[place]
        if place is not None:
            row["log_tps"] = _number(found.log_tps[place])
            row["log_step"] = _number(found.log_step[place])
            row["log_ttft"] = _number(found.log_ttft[place])
            row["seconds"] = [_number(value) for value in found.seconds[place]]
            row["lengths"] = [int(n) for n in found.lengths[place]]
        yield row


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------- reading


def load(path: Path) -> Sample:
    """A pinned base. Raises UserError if the file is none, or is of a newer speedbench."""
    try:
        found = manifests.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: make it with `speedbench compare --pin {path} RUN_DIR`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): pin the baseline again") from None
    schema, _, version = str(found.get("schema") if isinstance(found, dict) else "").partition("/")
    if schema != SCHEMA or re.fullmatch("[0-9]{1,6}", version) is None:
        raise UserError(
            f"{path} is no baseline file: make one with `speedbench compare --pin FILE RUN_DIR`"
        )
    if int(version) > VERSION:
        raise UserError(
            f"{path} has version {version}, this speedbench reads up to {VERSION}: install a newer "
            "one, or pin the baseline again"
        )
    manifests.refuse_damaged(found.get("manifest"), str(path))
    try:
        return Sample(
            str(found["label"]),
            found["manifest"],
            tuple(_run(run, found["manifest"]) for run in _filled(found["runs"])),
            str(path),
        )
    except (
        AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError
    ) as error:  # fmt: skip
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): pin the baseline again"
        ) from None


def _filled(runs: Any) -> list[Any]:
    if not isinstance(runs, list) or not runs:
        raise ValueError("it holds no run")
    return runs


def _run(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> SampleRun:
    value, why_not = found["output_tps"]
    rows = found["conversations"]
    for row in rows:
        _refuse_odd(row, int(manifest["engine"]["draft_length"]), found["categories"])
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError("a conversation stands twice")
    if value is not None and not (_is_number(value) and value > 0):
        raise ValueError(f"output_tps is {value!r:.60}")
    if any(level not in LEVELS for level, _ in found["checks"]):
        raise ValueError("a check has no level that there is")
    return SampleRun(
        source=str(found["source"]),
        started=tuple((str(at), int(ns)) for at, ns in found["started"]),
        categories=tuple(map(str, found["categories"])),
        checks=tuple(Check(level, str(sentence)) for level, sentence in found["checks"]),
        output_tps=Figure(None if value is None else float(value), why_not=str(why_not)),
        measured=_measured(rows),
        answers={
            (row["id"], int(turn)): Answer(str(row["category"]), str(prompt), int(n), str(sha))
            for row in rows
            for turn, prompt, n, sha in row["turns"]
            if sha is not None
        },
    )


LEVELS = ("error", "warning", "note")


def _refuse_odd(row: Mapping[str, Any], draft_length: int, categories: Sequence[str]) -> None:
    """Raise ValueError for a conversation that `_conversations` cannot have written."""
    name = row["id"]
    if not isinstance(name, str) or not isinstance(row["failed"], bool):
        raise ValueError(f"a conversation has the id {name!r:.60}, or does not say if it failed")
    for turn, prompt, n_tokens, answer in row["turns"]:
        known = (_is_count(n_tokens), isinstance(answer, str))
        told = known == (True, True) or (n_tokens, answer) == NONE
        if not (_is_count(turn) and isinstance(prompt, str) and told):
            raise ValueError(f"a turn of {name!r:.60} is not as it was written")
    if row["failed"]:
        return
    lengths = row["lengths"]
    if row["category"] not in categories:
        raise ValueError(f"{name!r:.60} has the category {row['category']!r:.60}, unknown here")
    if len(lengths) != 2 * (draft_length + 2) or not all(map(_is_count, lengths)):
        raise ValueError(f"{name!r:.60} has no 2 (K + 2) counts of steps by length")
    for field in ("log_tps", "log_step", "log_ttft"):
        value = row.get(field)
        if value is not None and not (_is_number(value) and abs(value) < LARGEST_LOG):
            raise ValueError(f"{field} of {name!r:.60} is {value!r:.60}")


LARGEST_LOG = 100.0
"""Of a rate or a time in seconds: e^100 is longer than the universe is old."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _measured(rows: Sequence[Mapping[str, Any]]) -> Measured:
    good = [row for row in rows if not row["failed"]]
    return Measured(
        place={row["id"]: i for i, row in enumerate(good)},
        failed=frozenset(row["id"] for row in rows if row["failed"]),
        category=tuple(str(row["category"]) for row in good),
        log_tps=_floats([row["log_tps"] for row in good]),
        log_step=_floats([row["log_step"] for row in good]),
        log_ttft=_floats([row.get("log_ttft") for row in good]),  # not in version 1
        seconds=np.array([_floats(row.get("seconds", [None] * 3)) for row in good]).reshape(-1, 3),
        lengths=np.array([row["lengths"] for row in good], np.int64).reshape(len(good), -1),
        asked={row["id"]: tuple((int(t[0]), str(t[1])) for t in row["turns"]) for row in rows},
    )


def _floats(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([math.nan if value is None else value for value in values], np.float64)
