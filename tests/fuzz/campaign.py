"""Campaign: mutated inputs through a reader, and what counts as a fault of it."""

from __future__ import annotations

import shutil
import signal
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from types import FrameType
from typing import Literal

from speedbench.types import UserError
from tests.fuzz.mutate import mutated
from tests.fuzz.readers import Reader
from tests.fuzz.seeds import Files

LONGEST_SENTENCE = 20_000
"""Characters; hostile names of 5,000 may stand in it."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a reader made of one input.

    read      it took it
    refused   it raised UserError with one sentence
    fault     `what` is wrong: a traceback, or what the sentence lacks
    """

    outcome: Literal["read", "refused", "fault"]
    what: str = ""


class TooLongError(BaseException):
    """A reader did not end in time. No Exception: a reader's own net must not catch it."""


def case(reader: Reader, seed: int, index: int) -> Files:
    """The index-th input of a reader: the same whenever and wherever it is asked for."""
    random = Random(f"{seed}/{reader.name}/{index}")
    seeds = reader.seeds()
    files = dict(seeds[index % len(seeds)])
    targets = [name for name in files if any(fnmatch(name, p) for p in reader.targets)]
    others = list(files.values())
    for name in random.sample(targets, min(len(targets), random.choice((1, 1, 1, 2)))):
        kind = random.random()
        if kind < 0.01:
            del files[name]
        elif kind < 0.02:  # a folder stands where a file is expected
            files[f"{name}/inside"] = files.pop(name)
        elif reader.mutate is not None:
            files[name] = reader.mutate(random, name, files[name])
        else:
            files[name] = mutated(random, name, files[name], others)
    return files


def write(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def result(reader: Reader, folder: Path, limit_s: float | None = None) -> Result:
    """What a reader makes of the input in a folder."""
    try:
        with warnings.catch_warnings(), _limited(limit_s):
            # A cast of NaN to an integer is a number from nowhere.
            warnings.simplefilter("error", RuntimeWarning)
            reader.read(folder)
    except UserError as error:
        return _judged(str(error), (str(folder), *reader.names))
    except TooLongError:
        return Result(
            "fault", f"it did not end within {limit_s:g} s of its own\n{traceback.format_exc()}"
        )
    except Exception:  # noqa: BLE001 - this is what is looked for
        return Result("fault", traceback.format_exc())
    return Result("read")


def _judged(sentence: str, names: Sequence[str]) -> Result:
    """A refusal must be one sentence, on one line, and name what was read."""
    if not sentence.strip() or len(sentence.splitlines()) != 1:
        return Result("fault", f"not one line: {sentence!r:.2000}")
    if len(sentence) > LONGEST_SENTENCE:
        return Result("fault", f"{len(sentence)} letters: {sentence[:500]!r}")
    if not sentence.isprintable():
        odd = {c for c in sentence if not c.isprintable()}
        return Result("fault", f"holds {odd!r}: {sentence!r:.2000}")
    if not any(name in sentence for name in names):
        return Result("fault", f"does not name the file: {sentence[:2000]}")
    return Result("refused")


@contextmanager
def _limited(limit_s: float | None) -> Iterator[None]:
    if limit_s is None:
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TooLongError

    # Of this process's own time: a machine that is busy otherwise is no fault of a reader.
    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def shares(readers: Mapping[str, Reader], n: int, least: int = 1) -> dict[str, int]:
    """How many of n inputs each reader gets, by weight, at least so many."""
    total = sum(reader.weight for reader in readers.values())
    return {name: max(least, round(n * reader.weight / total)) for name, reader in readers.items()}
