"""The publisher's files: against its formulas written again, and against its own classes."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from speedbench.datasets import preparer
from speedbench.datasets.identity import rows_sha256
from speedbench.report import specdec_bench
from speedbench.report.summary import summarize
from speedbench.report.text import Text
from speedbench.store import Run
from speedbench.types import Conversation, UserError
from tests.builders import MS, S, conversation, session, stored, turn
from tests.test_report import golden_records


def mixed_run(directory: Path, dataset: str = "speed", **about: Any) -> Run:
    """Three categories of one, two and three turns; merged events, cut ends, a failed and a refused
    conversation, answers of one token."""
    draw = random.Random(5)
    records = []
    for i in range(30):
        turns = []
        for t in range(1 + i % 3):
            lengths = [1, *(draw.choice([1, 2, 3, 4, 4]) for _ in range(draw.randrange(0, 12)))]
            exact = [1] * len(lengths)
            if i == 7 and len(lengths) > 1:
                lengths[-1], exact[-1] = 9, 2
            start = draw.randrange(10 * S)
            times = [start + draw.randrange(5 * MS, 90 * MS)]
            times += [times[0] + sum(draw.randrange(MS, 30 * MS) for _ in range(k))
                      for k in range(1, len(lengths))]  # fmt: skip
            turns.append(
                turn(
                    f"{i}.{t}",
                    lengths,
                    number=t,
                    submitted_ns=start,
                    times_ns=sorted(times),
                    engine_steps=exact,
                    finish="stop" if draw.random() < 0.5 else "length",
                )
            )
        if i == 11:
            turns[-1] = turn(f"{i}.x", [1, 2], number=len(turns) - 1, finish="error", error="boom")
        records.append(conversation(str(81 + i), ("qa", "math", "coding")[i % 3], *turns))
    name = {"dataset": {"name": dataset, "path": "d", "sha256": "d" * 64, "expected": {}}}
    return stored(directory, records, **{**name, **about})


def stored_events(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Conversation -> category and, by turn, (tokens of each event, times in s): parts read raw."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((run_dir / "turns").glob("*.parquet")):
        steps = pq.read_table(run_dir / "steps" / path.name).to_pylist()
        turns = pq.read_table(path).to_pylist()
        bad = {row["conversation_id"] for row in turns if row["finish_reason"] == "error"}
        for row in turns:
            if row["conversation_id"] in bad:
                continue
            mine = [s for s in steps if s["request_id"] == row["request_id"]]
            mine.sort(key=lambda s: s["step"])
            of = found.setdefault(
                row["conversation_id"], {"category": row["category"], "turns": {}}
            )
            of["turns"][row["turn"]] = (
                [s["n_tokens"] for s in mine],
                [row["submitted_ns"] / 1e9, *(s["time_ns"] / 1e9 for s in mine)],
            )
    return found


def loaded(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


# --- its formulas, written again ------------------------------------------------------------------


def brute_acceptance(events: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Exact fractions: no order of summation, no rounding in between."""
    request = {
        name: Fraction(sum(sum(t[0]) for t in of["turns"].values()),
                       sum(len(t[0]) for t in of["turns"].values()))
        for name, of in events.items()
    }  # fmt: skip
    groups: dict[str, list[Fraction]] = {}
    for name, of in events.items():
        groups.setdefault(of["category"], []).append(request[name])
    every = [n for of in events.values() for t in of["turns"].values() for n in t[0]]
    at_least = {n: sum(m >= n for m in every) for n in sorted(set(every))}
    before = dict(zip(list(at_least)[1:], at_least.values(), strict=False))
    return {
        "Request_AL": request,
        "Category_AL": {name: sum(als) / len(als) for name, als in groups.items()},
        "Average_AL": sum(request.values()) / len(request),
        "Acceptance_Length_Histogram": {n: every.count(n) for n in at_least},
        "Conditional_Acceptance_Rate": {
            n: Fraction(count, before.get(n, len(every))) for n, count in at_least.items()
        },
        "Joint_Acceptance_Rate": {n: Fraction(c, len(every)) for n, c in at_least.items()},
    }


def brute_statistics(values: Sequence[float]) -> dict[str, Any]:
    ordered, n = sorted(values), len(values)
    mean = math.fsum(ordered) / n

    def quantile(q: float) -> float:
        place = q * (n - 1)
        low = int(place)
        high = min(low + 1, n - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "std": math.sqrt(math.fsum((v - mean) ** 2 for v in ordered) / n),
        "quantiles": {str(q): quantile(q) for q in (0.25, 0.5, 0.75)},
    }


def brute_timing(events: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    turns = [t for of in events.values() for t in of["turns"].values()]
    tokens = [sum(lengths) for lengths, _ in turns]
    times = [t for _, t in turns]
    longer = [(t, n) for t, n in zip(times, tokens, strict=True) if len(t) > 2]
    gaps = [t[i + 1] - t[i] for t, _ in longer for i in range(len(t) - 1)]
    tps = sum(tokens) / (max(t[-1] for t in times) - min(t[0] for t in times))
    return {
        "Output TPS": tps,
        "Output TPS/gpu": tps,
        "E2E Request Time": brute_statistics([t[-1] - t[0] for t in times]),
        "TTFT Time": brute_statistics([t[1] - t[0] for t in times]),
        "Request Generation Step Time": brute_statistics(gaps),
        "Request Generation Tokens Per Second": brute_statistics(
            [(n - 1) / (t[-1] - t[1]) for t, n in longer]
        ),
        "Number of Output Tokens": brute_statistics(tokens),
    }


def assert_close(found: Any, expected: Any, *, decimals: bool = False) -> None:
    """Same keys, same numbers; texts are numbers with four decimals."""
    if isinstance(expected, Mapping):
        assert set(map(str, found)) == set(map(str, expected))
        for key, value in expected.items():
            assert_close(found[str(key)], value, decimals=decimals)
    elif isinstance(found, str):
        assert len(found.partition(".")[2]) == 4
        assert float(found) == pytest.approx(float(expected), abs=5.1e-5)
    else:
        assert found == pytest.approx(float(expected), rel=1e-12)


def test_files_hold_what_its_formulas_give(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    written = specdec_bench.write(run, tmp_path / "out")
    assert {path.name for path in written} == {
        "configuration.json", "acceptance_rate.json", "timing.json", "specbench_results.json",
        "specbench_responses.jsonl",
    }  # fmt: skip
    events = stored_events(run.directory)
    assert len(events) == 29
    results = loaded(tmp_path / "out", "specbench_results.json")
    assert_close(results, brute_acceptance(events))
    assert max(map(int, results["Acceptance_Length_Histogram"])) == 9
    assert loaded(tmp_path / "out", "acceptance_rate.json") == [results]
    (timing,) = loaded(tmp_path / "out", "timing.json")
    assert_close(timing, brute_timing(events))


def test_the_published_golden_run(tmp_path: Path) -> None:
    """The histogram and the rates that the publisher printed, to their last digit."""
    run = stored(tmp_path / "golden", golden_records())
    specdec_bench.write(run, tmp_path / "out")
    found = loaded(tmp_path / "out", "specbench_results.json")
    assert found["Acceptance_Length_Histogram"] == {
        "1": 57385, "2": 36968, "3": 24441, "4": 61182,
    }  # fmt: skip
    assert found["Conditional_Acceptance_Rate"] == {
        "1": 1.0, "2": 0.681151931368627, "3": 0.6984444208791836, "4": 0.7145509968116043,
    }  # fmt: skip
    assert found["Joint_Acceptance_Rate"]["4"] == pytest.approx(61182 / 179976, rel=1e-14)
    assert len(found["Request_AL"]) == 880
    assert found["Average_AL"] == pytest.approx(
        summarize(run).lengths["al_specdec_bench"].value, rel=1e-12
    )


def test_random_prompts_have_lengths_per_turn_and_no_categories(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", dataset="random")
    written = specdec_bench.write(run, tmp_path / "out")
    assert {path.name for path in written} == {
        "configuration.json", "acceptance_rate.json", "timing.json", "responses.jsonl",
    }  # fmt: skip
    (found,) = loaded(tmp_path / "out", "acceptance_rate.json")
    expected = [
        {t: Fraction(sum(lengths), len(lengths)) for t, (lengths, _) in of["turns"].items()}
        for of in stored_events(run.directory).values()
    ]
    assert_close(found["Request_AL"], dict(enumerate(expected)))
    every = [al for turns in expected for al in turns.values()]
    assert found["Average_AL"] == pytest.approx(float(sum(every) / len(every)), rel=1e-12)
    assert "Category_AL" not in found


def test_mtbench_counts_its_questions_from_0_in_results_and_from_81_in_responses(
    tmp_path: Path,
) -> None:
    run = mixed_run(tmp_path / "run", dataset="mtbench")
    specdec_bench.write(run, tmp_path / "out")
    (found,) = loaded(tmp_path / "out", "acceptance_rate.json")
    assert set(found["Request_AL"]) == {str(i) for i in range(30) if i != 11}
    lines = (tmp_path / "out" / "mtbench_responses.jsonl").read_text().splitlines()
    assert {json.loads(line)["question_id"] for line in lines} == set(range(81, 111)) - {92}
    assert not (tmp_path / "out" / "specbench_results.json").exists()


# --- its own classes ------------------------------------------------------------------------------

DRIVER = """
import json, sys, types
folder, given, kind = sys.argv[1:4]
sys.path.insert(0, folder)
sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # for a figure that is not drawn
from specdec_bench import metrics
from specdec_bench.metrics.specbench import SpecBench
SpecBench._create_visualizations = lambda *args, **kwargs: None
rows = json.load(open(given))
requests = [types.SimpleNamespace(question_id=r["id"], category=r["category"], turns=r["turns"])
            for r in rows]
found = [{"speed": lambda: metrics.SpecBench(requests=requests),
          "random": metrics.AcceptanceRate}[kind](), metrics.Timing(1)]
for i, row in enumerate(rows):
    for t, (lengths, times) in enumerate(row["turns"]):
        step = {"output_ids": [[[7] * n for n in lengths]], "token_times": times}
        for metric in found:
            metric.process_step(step, i, t)
texts = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] for _ in rows]
for metric in found:
    metric.process_final(texts)
"""


def publisher() -> Path:
    """Its folder: named by SPECDEC_BENCH_DIR, or the commit that `speedbench prepare` keeps."""
    given = os.environ.get("SPECDEC_BENCH_DIR")
    kept = preparer.cache_dir() / "git" / preparer.COMMIT / preparer.FOLDER
    folder = Path(given) if given else kept
    if not (folder / "specdec_bench" / "metrics" / "specbench.py").is_file():
        pytest.skip("no checkout of examples/specdec_bench: set SPECDEC_BENCH_DIR to one")
    return folder


def its_files(run: Run, kind: str, directory: Path) -> None:
    """Run its metric classes on the stored events, in a folder."""
    events = stored_events(run.directory)
    rows = [
        {
            "id": name,
            "category": of["category"],
            "turns": [t for _, t in sorted(of["turns"].items())],
        }
        for name, of in events.items()
    ]
    directory.mkdir()
    (directory / "given.json").write_text(json.dumps(rows))
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(publisher()), "given.json", kind],
        cwd=directory, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["speed", "random"])
def test_its_own_classes_compute_the_same_from_the_same_events(tmp_path: Path, kind: str) -> None:
    run = mixed_run(tmp_path / "run", dataset=kind)
    its_files(run, kind, tmp_path / "theirs")
    specdec_bench.write(run, tmp_path / "ours")
    for name in ("acceptance_rate.json", "timing.json"):
        mine, theirs = (loaded(tmp_path / folder, name) for folder in ("ours", "theirs"))
        assert len(mine) == len(theirs) == 1
        assert_close(mine[0], theirs[0])
    if kind == "speed":
        mine, theirs = (
            loaded(tmp_path / folder, "specbench_results.json") for folder in ("ours", "theirs")
        )
        assert list(mine) == list(theirs)
        assert_close(mine, theirs)
    theirs_lines, mine_lines = (
        [json.loads(line) for line in next((tmp_path / folder).glob("*responses.jsonl")).open()]
        for folder in ("theirs", "ours")
    )
    assert len(theirs_lines) == len(mine_lines)
    assert set(theirs_lines[0]) <= set(mine_lines[0])


def test_its_own_code_reads_and_continues_the_files(tmp_path: Path) -> None:
    """It appends a later run's results to the files, and takes the folder for a run of its own."""
    specdec_bench.write(mixed_run(tmp_path / "run"), tmp_path / "out")
    code = (
        "import importlib.util, json, sys\n"
        "from pathlib import Path\n"
        "folder, out = sys.argv[1:3]\n"
        "sys.path.insert(0, folder)\n"
        "from specdec_bench.metrics.base import Metric\n"
        "Metric.update_directory(out)\n"
        "for name in ('acceptance_rate', 'timing'):\n"
        "    metric = Metric()\n"
        "    metric.name, metric.out = name, {'again': 1}\n"
        "    metric.write()\n"
        "spec = importlib.util.spec_from_file_location('u', folder + '/upload_to_s3.py')\n"
        "upload = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(upload)\n"
        "assert upload._is_run_dir(Path(out))\n"
        "assert upload._check_provenance(Path(out)) == ['container_image']\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(publisher()), str(tmp_path / "out")], check=True
    )
    for name in ("acceptance_rate.json", "timing.json"):
        assert loaded(tmp_path / "out", name)[1:] == [{"again": 1}]


# --- what cannot be exported ----------------------------------------------------------------------


def test_answers_are_text_with_a_tokenizer_and_ids_without(tmp_path: Path, models: Path) -> None:
    records = [
        conversation("a", "qa", turn("a.0", [1, 2], finish="stop")),
        conversation("b", "qa", turn("b.0", [1, 2], finish="length")),
    ]
    run = stored(tmp_path / "run", records)
    specdec_bench.write(run, tmp_path / "ids")
    specdec_bench.write(run, tmp_path / "text", lambda ids: "".join(f"<{i}>" for i in ids))
    for folder, answers in (("ids", [[7, 7, 7], [7, 7, 7]]), ("text", ["<7><7>", "<7><7><7>"])):
        lines = [
            json.loads(line)
            for line in (tmp_path / folder / "specbench_responses.jsonl").read_text().splitlines()
        ]
        assert [line["choices"][0]["turns"] for line in lines] == [[answer] for answer in answers]
        assert [line["turns"] for line in lines] == [[], []]
        assert lines[0]["prompt_sha256"] == ["00"]
        notes = " ".join(loaded(tmp_path / folder, "configuration.json")["speedbench"]["notes"])
        assert ("--tokenizer" in notes) == (folder == "ids")
    words = Text(str(models / "word" / "target"))
    known = words.encode(words.decode([7, 7, 9]))
    assert known == [7, 7, 9]
    with pytest.raises(UserError, match="--tokenizer"):
        Text(str(tmp_path / "nowhere")).decode([5])


def test_turns_are_the_user_s_words_while_the_dataset_still_holds_them(tmp_path: Path) -> None:
    """The publisher's lines name what was asked: from the dataset, if its rows are still those."""
    rows = tmp_path / "rows.jsonl"
    asked = {"a": ["Why?", "And then?"], "b": ["How?"]}
    rows.write_text(
        "".join(json.dumps({"question_id": k, "category": "qa", "turns": v}) + "\n"
                for k, v in asked.items())
    )  # fmt: skip
    sha256 = rows_sha256([Conversation(name, "qa", tuple(turns)) for name, turns in asked.items()])
    records = [
        conversation("b", "qa", turn("b.0", [1, 2])),
        conversation("a", "qa", turn("a.0", [1, 2]), turn("a.1", [1, 2], number=1)),
    ]
    dataset = {"name": "jsonl", "path": str(rows), "sha256": sha256, "expected": {"qa": 2}}
    config = {"dataset": "jsonl", "dataset_path": "elsewhere.jsonl"}
    run = stored(tmp_path / "run", records, dataset=dataset, config=config)

    def exported(name: str) -> tuple[dict[str, list[str]], str]:
        specdec_bench.write(run, tmp_path / name)
        lines = (tmp_path / name / "specbench_responses.jsonl").read_text().splitlines()
        about = loaded(tmp_path / name, "configuration.json")["speedbench"]
        found = {line["question_id"]: line["turns"] for line in map(json.loads, lines)}
        return found, " ".join(about["notes"])

    found, notes = exported("same")
    assert found == asked
    assert "`turns`" not in notes
    rows.write_text(rows.read_text().replace("How?", "How not?"))
    found, notes = exported("changed")
    assert found == {"a": [], "b": []}
    assert "holds other rows than were asked" in notes
    rows.unlink()
    found, notes = exported("gone")
    assert found == {"a": [], "b": []}
    assert "cannot be read any more" in notes


@pytest.mark.parametrize(
    "about",
    [
        {"engine": {"settings": {"device": "cpu"}}},
        {"engine": {"simulated": True}},
        {"environment": {"python": "3.11", "packages": {}, "gpus": []}},
    ],
)
def test_nothing_is_told_per_gpu_where_none_was_used(tmp_path: Path, about: dict[str, Any]) -> None:
    run = mixed_run(tmp_path / "run", **about)
    specdec_bench.write(run, tmp_path / "out")
    (timing,) = loaded(tmp_path / "out", "timing.json")
    assert timing["Output TPS"] > 0
    assert timing["Output TPS/gpu"] is None
    notes = loaded(tmp_path / "out", "configuration.json")["speedbench"]["notes"]
    assert any(note.startswith("Output TPS/gpu is null: ") for note in notes)


def test_a_throughput_that_is_none_is_null_with_its_reason(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run", sessions=[session(0), session(1)])
    specdec_bench.write(run, tmp_path / "out")
    (timing,) = loaded(tmp_path / "out", "timing.json")
    assert timing["Output TPS"] is None
    assert timing["Output TPS/gpu"] is None
    assert float(timing["TTFT Time"]["min"]) > 0
    notes = loaded(tmp_path / "out", "configuration.json")["speedbench"]["notes"]
    assert any("2 sessions" in note for note in notes)


def test_the_configuration_says_what_ran_and_holds_no_secret(tmp_path: Path) -> None:
    token = "hf_" + "a" * 30
    run = mixed_run(
        tmp_path / "run", config={"engine_args": {"hf_token": "x", "extra": token}, "tp_size": 2}
    )
    specdec_bench.write(run, tmp_path / "out")
    text = (tmp_path / "out" / "configuration.json").read_text()
    assert token not in text
    found = json.loads(text)
    assert found["runtime_params"]["engine_args"]["hf_token"] == "<redacted>"
    assert (found["engine"], found["draft_length"], found["tp_size"]) == ("VLLM", 3, 2)
    assert (found["engine_version"], found["gpu"]) == ("0.32.0", "NVIDIA H100")
    assert found["serving_config"]["max_num_seqs"] == 64
    assert found["speedbench"]["fingerprint"] == "f" * 64
    assert found["speedbench"]["n_left_out"] == 1
    (timing,) = loaded(tmp_path / "out", "timing.json")
    assert timing["Output TPS/gpu"] == timing["Output TPS"] / 2


def test_answers_of_which_only_the_length_is_known_are_not_written(tmp_path: Path) -> None:
    """A server that tells usage alone: -1 for each token, which no tokenizer takes."""
    whole = turn("a.0", [1, 2])
    unknown = [step._replace(token_ids=[-1] * len(step.token_ids)) for step in whole.steps]
    run = stored(tmp_path / "run", [conversation("a", "qa", replace(whole, steps=unknown))])
    with pytest.raises(UserError, match="holds no answers: its server told how many tokens came"):
        specdec_bench.write(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_no_export_is_overwritten(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "timing.json").write_text("[]")
    with pytest.raises(UserError, match="no earlier export"):
        specdec_bench.write(run, tmp_path / "theirs")
    with pytest.raises(UserError, match="no earlier export"):
        specdec_bench.write(run, run.directory)
    assert (tmp_path / "theirs" / "timing.json").read_text() == "[]"
    for _ in range(2):
        specdec_bench.write(run, tmp_path / "out")
    assert len(loaded(tmp_path / "out", "timing.json")) == 1
    nothing = stored(tmp_path / "empty", [], expected={"a": 1})
    with pytest.raises(UserError, match="no conversation"):
        specdec_bench.write(nothing, tmp_path / "none")
