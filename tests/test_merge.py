"""Merging shards: what is not among them is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from speedbench.checks import all_checks
from speedbench.report.merge import merged, missing_shards
from tests.builders import conversation, stored


def shards(tmp: Path, present: Sequence[int], n: int) -> list[Path]:
    """Shares of six rows, three of which each of two categories holds."""
    rows = [(f"r{i}", ("qa", "math")[i % 2]) for i in range(6)]
    found = []
    for r in present:
        mine = [conversation(name, category, [1, 2]) for name, category in rows[r::n]]
        expected = {c: sum(one.category == c for one in mine) for c in ("qa", "math")}
        dataset = {
            "name": "speed", "path": "d", "sha256": "d" * 64, "expected": expected,
            "selected": {"qa": 3, "math": 3},
        }  # fmt: skip
        config = {"shard": f"{r}/{n}"}
        found.append(stored(tmp / f"s{r}", mine, dataset=dataset, config=config).directory)
    return found


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        ((0,), "4 conversation(s) have not been measured yet: the merged runs lack --shard 1/3, "
               "2/3"),
        ((0, 2), "2 conversation(s) have not been measured yet: the merged runs lack --shard 1/3"),
        ((0, 1, 2), ""),
    ],
)  # fmt: skip
def test_a_missing_shard_is_named(tmp_path: Path, present: Sequence[int], sentence: str) -> None:
    run = merged(shards(tmp_path, present, 3))
    told = [check.sentence for check in all_checks(run) if "not been measured" in check.sentence]
    assert told == ([sentence] if sentence else [])


def test_runs_that_are_no_shares_of_one_cut_lack_none() -> None:
    assert missing_shards([None, "0/2"]) == []
    assert missing_shards(["0/2", "1/3"]) == []
    assert missing_shards(["3/4", "0/4"]) == ["1/4", "2/4"]
