"""Runs that earlier versions stored (tests/runs): loaded, reported and resumed by this one.

What they say is told by a twin that reads their files with nothing of ours, and pinned: a reader
that reads all of them otherwise than yesterday is seen, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import pytest

from speedbench import draft_vocabulary, environment, store
from speedbench.cli import main
from speedbench.types import UserError

ROOT = Path(__file__).parent.parent
RUNS = Path(__file__).parent / "runs"
K = 3
PINNED: dict[str, tuple[int, int, int, list[int], str]] = {
    "format-1/complete": (16, 126, 240, [45, 20, 12, 29], "2.243401759531"),
    "format-1/partial": (11, 77, 156, [27, 13, 6, 18], "2.453816235907"),
    "format-2/complete": (16, 126, 240, [45, 20, 12, 29], "2.243401759531"),
    "format-2/partial": (11, 77, 156, [27, 13, 6, 18], "2.453816235907"),
    "format-2/replicas": (16, 125, 240, [36, 27, 17, 25], "2.366748499727"),
    "format-3/complete": (16, 126, 240, [45, 20, 12, 29], "2.243401759531"),
    "format-3/partial": (9, 59, 120, [21, 9, 5, 14], "2.467944964322"),
    "format-3/replicas": (16, 125, 240, [36, 27, 17, 25], "2.366748499727"),
    "format-4/complete": (16, 126, 240, [45, 20, 12, 29], "2.243401759531"),
    "format-4/partial": (11, 77, 156, [27, 13, 6, 18], "2.453816235907"),
}
"""Run -> conversations, steps, tokens, decode steps by length, AL: counted when it was stored."""
ALL = sorted(PINNED)
PARTIAL = [name for name in ALL if name.endswith("partial")]

Row = dict[str, Any]


def rows_of(directory: Path, folder: str) -> list[Row]:
    """All rows of a folder's parts, read by nothing of ours."""
    return [
        row
        for path in sorted((directory / folder).glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]


def steps_of_requests(directory: Path) -> list[tuple[Row, list[Row]]]:
    found: dict[str, list[Row]] = {}
    for row in rows_of(directory, "steps"):
        found.setdefault(row["request_id"], []).append(row)
    return [
        (turn, sorted(found[turn["request_id"]], key=lambda row: row["step"]))
        for turn in rows_of(directory, "turns")
    ]


def twin_al(directory: Path) -> tuple[list[int], Fraction]:
    """Decode steps by length, and AL as DESIGN.md has it, step by step in exact fractions."""
    whole: dict[str, Counter[int]] = {}
    cut: dict[str, Counter[int]] = {}
    for turn, steps in steps_of_requests(directory):
        for row in steps[1:]:
            n, told = row["n_tokens"], row["drafted"] > 0 and row["accepted"] >= 0
            censored = not told and row is steps[-1] and n < K + 1
            length = row["accepted"] + 1 if told else n
            kind = cut if censored else whole
            kind.setdefault(turn["category"], Counter())[length] += 1
    als = []
    for category in whole:
        w, c = whole[category], cut.get(category, Counter())
        al = joint = Fraction(1)
        for k in range(1, K + 1):
            at_risk = sum(w[n] for n in range(k, K + 2)) + sum(c[n] for n in range(k + 1, K + 2))
            joint *= 1 - Fraction(w[k], at_risk)
            al += joint
        als.append(al)
    total = sum((*whole.values(), *cut.values()), Counter())
    return [total[n] for n in range(1, K + 2)], sum(als, Fraction(0)) / len(als)


def of_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> Row:
    assert main(["report", str(directory), "--format", "json"]) == 0
    (arm,) = json.loads(capsys.readouterr().out)["arms"]
    (run,) = arm["runs"]
    return dict(run)


def test_every_format_has_runs_here() -> None:
    assert {name.split("/")[0] for name in ALL} >= {
        f"format-{n}" for n in range(1, store.FORMAT + 1)
    }
    for name in ALL:
        about = json.loads((RUNS / name / "manifest.json").read_text(encoding="utf-8"))
        assert f"format-{about['format']}" == name.split("/")[0]
    assert sum(path.stat().st_size for path in RUNS.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("name", ALL)
def test_a_run_says_what_it_said_when_it_was_stored(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RUNS / name
    n_conversations, n_steps, n_tokens, lengths, al = PINNED[name]
    counted, twin = twin_al(directory)
    assert (counted, f"{float(twin):.12f}") == (lengths, al)
    assert len({turn["conversation_id"] for turn in rows_of(directory, "turns")}) == n_conversations
    assert sum(row["n_tokens"] for row in rows_of(directory, "steps")) == n_tokens

    found = of_json(directory, capsys)
    assert (found["n_conversations"], found["n_steps"]) == (n_conversations, n_steps)
    assert found["n_output_tokens"] == n_tokens
    assert list(found["acceptance"]["histogram"].values()) == lengths
    assert found["acceptance"]["al"]["al"]["value"] == pytest.approx(float(twin), rel=1e-12)
    assert found["simulated"]
    assert found["n_failed"] == 0

    assert main(["report", str(directory)]) == 0
    assert f"{float(twin):.4f}" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert main(["report", str(directory), "--format", "html", "--out", str(page)]) == 0
    assert f"{float(twin):.4f}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [n for n in ALL if n.endswith("complete")])
def test_its_times_are_those_that_were_stored(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RUNS / name
    ttft = [
        (steps[0]["time_ns"] - turn["submitted_ns"]) / 1e9
        for turn, steps in steps_of_requests(directory)
    ]
    (session,) = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    took_s = (session["ended_ns"] - session["started_ns"]) / 1e9
    found = of_json(directory, capsys)
    assert found["timing"]["ttft_s"]["p50"] == pytest.approx(median(ttft), rel=1e-12)
    tps = found["output_tps"]["whole"]["value"]
    assert tps == pytest.approx(PINNED[name][2] / took_s, rel=1e-12)


def test_replicas_are_told_apart() -> None:
    for name in ("format-2/replicas", "format-3/replicas"):
        run = store.load(RUNS / name)
        raw = Counter(turn["replica"] for turn in rows_of(RUNS / name, "turns"))
        assert Counter(run.columns.replica.tolist()) == raw
        assert set(raw) == {0, 1}


def test_a_run_before_replicas_is_of_one() -> None:
    assert "replica" not in rows_of(RUNS / "format-1/complete", "turns")[0]
    assert not store.load(RUNS / "format-1/complete").columns.replica.any()


def test_what_format_3_may_hold_beside_the_records_is_read() -> None:
    directory = RUNS / "format-3/complete"
    vocabulary = draft_vocabulary.load(directory)
    assert vocabulary is not None
    assert vocabulary.token_ids.tolist() == list(range(0, 48, 2))
    samples = store.load_energy(store.load(directory))
    assert samples["energy_mj"].to_pylist() == [0, 1000, 2000]


def test_what_format_4_holds_of_a_server_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer took verifications of 1, 3, 2, 4 and 1 tokens, some of them in one chunk: an AL
    of 11/5, which only served/ tells."""
    directory = RUNS / "format-4/served"
    rows = rows_of(directory, "served")
    assert len(rows) == len(rows_of(directory, "turns")) == 20
    assert {tuple(row["histogram"]) for row in rows} == {(2, 1, 1, 1)}
    assert any(row["engine_steps"] != 1 for row in rows_of(directory, "steps"))
    found = of_json(directory, capsys)
    assert found["acceptance"]["al"]["al_drafted"]["value"] == pytest.approx(11 / 5)
    assert list(found["as_published"]["histogram"].values()) == [60, 20, 20, 20]  # and a prefill
    names = set(store.load_server_metrics(directory)["name"].to_pylist())
    assert names == {"up", "vllm:num_requests_running", "vllm:spec_decode_num_drafts_total"}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_run_is_continued(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the prompts of its time, on what passes for the same machine."""
    here = tmp_path / "runs"
    shutil.copytree(RUNS, here)
    directory = here / name
    about = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    machine = environment.capture((), ())
    about["environment"].update({key: machine[key] for key in ("cpu", "gpus")})
    store.write_manifest(directory, about)
    before = {row["request_id"]: row for row in rows_of(directory, "turns")}
    assert 0 < len({row["conversation_id"] for row in before.values()}) < 16

    done = subprocess.run(
        [sys.executable, "-m", "speedbench", "run", "--save_dir", name, "--resume"],
        cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    now = store.read_manifest(directory)
    assert (now["status"], len(now["sessions"])) == ("complete", 2)
    turns = rows_of(directory, "turns")
    asked = Counter(row["conversation_id"] for row in turns if row["turn"] == 0)
    assert asked == Counter({f"q{i}": 1 for i in range(16)})
    kept = {row["request_id"]: row for row in turns if row["request_id"] in before}
    assert kept == before
    found = of_json(directory, capsys)
    assert found["n_conversations"] == 16
    al = float(twin_al(directory)[1])
    assert found["acceptance"]["al"]["al"]["value"] == pytest.approx(al, rel=1e-12)


def test_a_newer_format_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(RUNS / "format-3/complete", directory)
    about = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    (directory / "manifest.json").write_text(json.dumps({**about, "format": store.FORMAT + 1}))
    with pytest.raises(UserError, match=f"has format {store.FORMAT + 1}, this speedbench reads up"):
        store.load(directory)
    assert main(["report", str(directory)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "install a newer one" in told.err
