"""Baseline file: what later comparisons need of a base, without its run directory.

    {"schema": "speedbench.baseline/1", "label": ..., "manifest": {...}, "runs": [...]}

One run: where it was stored, its checks, its throughput, and its conversations, one a line:
    id
    turns     [turn, sha256 of the prompt, tokens of the output, sha256 of the output]; the last two
              are null where the request failed
    category, failed; where it failed nothing follows, and the category may not be known
    log_tps, log_step   natural logarithms of user TPS (1/s) and of the mean step time (s), or null
    log_ttft   mean over its turns of the natural logarithm of TTFT (s), or null
    lengths   decode steps by length, uncensored and then censored, K + 2 counts each
Numbers are at full precision. The outputs themselves are not kept: two are the same or they are
not, and where they part is not known.

History
  speedbench.baseline/1  without log_ttft
  speedbench.baseline/2  as above
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there: make it with `speedbench compare --pin {path} RUN_DIR`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): pin the baseline again") from None
    schema, _, version = str(found.get("schema") if isinstance(found, dict) else "").partition("/")
    if schema != SCHEMA or not version.isdigit():
        raise UserError(
            f"{path} is no baseline file: make one with `speedbench compare --pin FILE RUN_DIR`"
        )
    if int(version) > VERSION:
        raise UserError(
            f"{path} has version {version}, this speedbench reads up to {VERSION}: install a newer "
            "one, or pin the baseline again"
        )
    try:
        return Sample(
            str(found["label"]),
            found["manifest"],
            tuple(_run(run) for run in found["runs"]),
            str(path),
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): pin the baseline again"
        ) from None


def _run(found: Mapping[str, Any]) -> SampleRun:
    value, why_not = found["output_tps"]
    rows = found["conversations"]
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


def _measured(rows: Sequence[Mapping[str, Any]]) -> Measured:
    good = [row for row in rows if not row["failed"]]
    if len({len(row["lengths"]) for row in good}) > 1:
        raise ValueError("the histograms are not of one width")
    return Measured(
        place={row["id"]: i for i, row in enumerate(good)},
        failed=frozenset(row["id"] for row in rows if row["failed"]),
        category=tuple(str(row["category"]) for row in good),
        log_tps=_floats([row["log_tps"] for row in good]),
        log_step=_floats([row["log_step"] for row in good]),
        log_ttft=_floats([row.get("log_ttft") for row in good]),  # not in version 1
        lengths=np.array([row["lengths"] for row in good], np.int64).reshape(len(good), -1),
        asked={row["id"]: tuple((int(t[0]), str(t[1])) for t in row["turns"]) for row in rows},
    )


def _floats(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([math.nan if value is None else value for value in values], np.float64)
