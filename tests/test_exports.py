"""One run in every form: the same numbers; files where the user wants them; trackers; mistakes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import speedbench
from speedbench.cli import main
from speedbench.report import as_csv, as_json, as_parquet, exporters, rows
from speedbench.report.definitions import TERMS
from speedbench.report.summary import summarize
from speedbench.store import Run
from tests.builders import MS, S, conversation, counters, session, stored, turn
from tests.test_report import GOLDEN, arm, golden_records, odd_run

ROOT = Path(__file__).parent.parent
FORMS = ("console", "markdown", "csv", "json", "parquet", "html")


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def written(tmp_path: Path, *runs: Path, more: tuple[str, ...] = ()) -> dict[str, Path]:
    """The report in every form, in a file of its own."""
    found = {}
    for form in FORMS:
        found[form] = tmp_path / f"out.{form}"
        assert report(*runs, "--format", form, "--out", found[form], *more) == 0
    return found


def csv_rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


class Cells(HTMLParser):
    """Text of a page's table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside = tag == "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found.append(data)


def numbers_of(value: Any) -> Iterator[float]:
    """Every number in a JSON tree."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_of(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def varied(directory: Path, draft_length: int = 3, step_ms: int = 10, concurrency: int = 2) -> Run:
    """Three categories whose numbers differ, and times that do."""
    records = []
    for c, name in enumerate(("coding", "math", "qa")):
        for i in range(5):
            lengths = [1, *((1 + (i * j + c) % (draft_length + 1)) for j in range(1, 9))]
            told = [(0, 0), *((n - 1, draft_length) for n in lengths[1:])]
            records.append(
                conversation(
                    f"{name}-{i}",
                    name,
                    turn(
                        f"{name}-{i}", lengths, told=told, submitted_ns=(5 * c + i) * 70 * MS,
                        ttft_ns=(30 + 7 * i) * MS, step_ns=(step_ms + c) * MS,
                    ),
                )
            )  # fmt: skip
    n = sum(len(t.steps) - 1 for record in records for t in record.turns)
    counted = counters(n, n, draft_length) if draft_length else None
    return stored(
        directory,
        records,
        draft_length=draft_length,
        sessions=[session(counters=counted, ended_ns=3 * S)],
        config={"concurrency": concurrency},
    )


# --- the same numbers in every form ---------------------------------------------------------------


def test_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    varied(tmp_path / "r")
    out = written(tmp_path, tmp_path / "r")
    table = pq.read_table(out["parquet"])
    assert tuple(table.schema.names) == as_csv.HEADER
    typed = table.to_pylist()
    plain = csv_rows(out["csv"].read_text())
    assert len(plain) == len(typed) > 100
    for text, row in zip(plain, typed, strict=True):
        for name, value in row.items():
            if value is None:
                assert text[name] == ""
            elif isinstance(value, str):
                assert text[name] == value
            else:
                assert float(text[name]) == value


def test_every_number_of_the_csv_is_in_the_json_to_its_last_digit(tmp_path: Path) -> None:
    varied(tmp_path / "r")
    out = written(tmp_path, tmp_path / "r")
    known = set(numbers_of(json.loads(out["json"].read_text())))
    for row in csv_rows(out["csv"].read_text()):
        for name in ("value", "low", "high"):
            if row[name]:
                assert float(row[name]) in known, row


def test_what_people_read_says_the_numbers_of_the_csv(tmp_path: Path) -> None:
    """Every number with four decimals on the console, in markdown and in the page's tables is the
    rounding of a number of the JSON, in its unit or in thousandths of it, or the share of a length
    in the histogram."""
    varied(tmp_path / "r")
    out = written(tmp_path, tmp_path / "r")
    found = json.loads(out["json"].read_text())
    histogram = found["arms"][0]["runs"][0]["acceptance"]["histogram"].values()
    exact = [*numbers_of(found), *(count / sum(histogram) for count in histogram)]
    known = {f"{number * factor:.4f}" for number in exact for factor in (1, 1000)}
    page = Cells()
    page.feed(out["html"].read_text())
    texts = {
        "console": out["console"].read_text(),
        "markdown": out["markdown"].read_text(),
        "html": "\n".join(page.found),
    }
    for form, text in texts.items():
        shown = re.findall(r"(?<![\d.])\d+\.\d{4}(?!\d)", text)
        assert len(shown) > 60, form
        assert [number for number in shown if number not in known] == [], form


def test_rows_by_hand(tmp_path: Path) -> None:
    """44 conversations of 1 + 8 steps, 1 2 3 4 twice; times of the builder."""
    arm(tmp_path / "r", 3)
    out = written(tmp_path, tmp_path / "r")
    found = {(row["category"], row["metric"]): row for row in csv_rows(out["csv"].read_text())}

    def value(metric: str, category: str = "") -> float:
        return float(found[category, metric]["value"])

    assert value("al") == pytest.approx(2.5)
    assert value("al_specdec_bench") == pytest.approx(21 / 9)
    assert value("al", "coding") == pytest.approx(2.5)
    assert found["coding", "al"]["n"] == "32"
    assert [value(f"conditional_rate_{k}") for k in (1, 2, 3)] == pytest.approx(
        [3 / 4, 2 / 3, 1 / 2]
    )
    assert [value(f"joint_rate_{k}") for k in (1, 2, 3)] == pytest.approx([3 / 4, 1 / 2, 1 / 4])
    assert [value(f"histogram_{n}") for n in (1, 2, 3, 4)] == [88] * 4
    assert value("published_histogram_1") == 88 + 44
    assert (value("n_prefill"), value("n_verify"), value("n_steps")) == (44, 352, 396)
    assert value("ttft_p50") == pytest.approx(0.05)
    assert found["", "ttft_p50"]["unit"] == "s"
    assert found["", "ttft_p50"]["n"] == "44"
    assert value("step_time_mean") == pytest.approx(0.01)
    assert value("user_tps_max") == pytest.approx(250)
    assert value("output_tokens_min") == 21
    assert value("output_tps") == pytest.approx(44 * 21 / 20)
    assert value("output_tps_per_gpu") == pytest.approx(44 * 21 / 20)
    assert (value("n_complete", "math"), value("n_expected", "math")) == (4, 4)
    assert found["", "al"]["definition"] == "al"
    assert found["", "al"]["run"] == str(tmp_path / "r")


def test_golden_numbers_are_in_every_form(tmp_path: Path) -> None:
    """What the publisher printed of its Llama-3.3-70B EAGLE3 run."""
    stored(tmp_path / "golden", golden_records())
    out = written(tmp_path, tmp_path / "golden")
    rates = ("0.681151931368627", "0.6984444208791836", "0.7145509968116043")
    for form in ("console", "markdown", "html", "json", "csv"):
        text = out[form].read_text()
        assert all(rate in text for rate in rates), form
    typed = {
        row["metric"]: row["value"]
        for row in pq.read_table(out["parquet"]).to_pylist()
        if not row["category"]
    }
    assert {n: typed[f"published_histogram_{n}"] for n in GOLDEN} == GOLDEN
    assert [typed[f"published_rate_{n}"] for n in (2, 3, 4)] == [float(rate) for rate in rates]
    assert typed["published_al_token_weighted"] == 449372 / 179976
    assert (typed["n_steps"], typed["n_output_tokens"]) == (179976, 449372)


def test_names_of_rows_are_unique_and_defined(tmp_path: Path) -> None:
    for run in (varied(tmp_path / "r"), odd_run(tmp_path / "odd")):
        found = list(rows.of_run(summarize(run), "arm"))
        places = [(row.category, row.metric) for row in found]
        assert len(set(places)) == len(places)
        assert {row.definition for row in found} <= set(TERMS)


def test_a_missing_number_is_empty_or_null_and_has_its_reason(tmp_path: Path) -> None:
    found = list(rows.of_run(summarize(odd_run(tmp_path / "r"))))
    missing = [row for row in found if row.value is None]
    assert {"al", "output_tps", "draft_hit_rate"} <= {row.metric for row in missing}
    assert all(row.why_not for row in missing)
    assert all(row.low is None and row.high is None for row in missing)
    text = as_csv.render(found)
    assert not re.search(r"\b(nan|NaN|None|inf)\b", text)
    for row in csv_rows(text):
        assert row["value"] or row["why_not"]
    nulls = [row for row in as_parquet.table(found).to_pylist() if row["value"] is None]
    assert len(nulls) == len(missing)


def test_names_from_the_data_form_no_formula_and_no_command(tmp_path: Path) -> None:
    records = [conversation("a", "=cmd|' /C calc'!A0\x1b[2J", [1, 4, 4])]
    text = as_csv.render(rows.of_run(summarize(stored(tmp_path / "r", records))))
    (row,) = (row for row in csv_rows(text) if row["metric"] == "al" and row["category"])
    assert row["category"] == "'=cmd|' /C calc'!A0"
    assert "\x1b" not in text


# --- arms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two repeats of a baseline and of a speculative arm."""
    folder = tmp_path_factory.mktemp("arms")
    for repeat, faster in enumerate((0, 1)):
        varied(folder / f"base-{repeat}", 0, 20 - faster)
        varied(folder / f"spec-{repeat}", 3, 22 - faster)
    return folder


def test_a_folder_of_runs_is_reported_by_arm_in_every_form(tmp_path: Path, arms: Path) -> None:
    out = written(tmp_path, arms)
    found = json.loads(out["json"].read_text())
    assert [(one["label"], len(one["runs"])) for one in found["arms"]] == [
        ("baseline", 2), ("EAGLE3 K=3", 2),
    ]  # fmt: skip
    (comparison,) = found["comparisons"]
    assert comparison["base"] == "baseline"
    assert [one["arm"] for one in comparison["arms"]] == ["EAGLE3 K=3"]
    assert found["not_compared"] == {}
    plain = csv_rows(out["csv"].read_text())
    (speedup,) = (
        row
        for row in plain
        if row["metric"] == "speedup" and (row["category"], row["run"]) == ("", "")
    )
    assert (speedup["arm"], speedup["base"]) == ("EAGLE3 K=3", "baseline")
    overall = comparison["arms"][0]["between"]["total"]  # as every form tells it
    assert [float(speedup[n]) for n in ("value", "low", "high")] == [
        overall["value"], *overall["interval"],
    ]  # fmt: skip
    (identical,) = (r for r in plain if (r["metric"], r["category"]) == ("identical_share", ""))
    assert float(identical["value"]) == found["lossless"]["EAGLE3 K=3"]["overall"]["share"]["value"]
    assert {row["definition"] for row in plain} <= set(TERMS)
    by_run = {row["run"] for row in plain if row["metric"] == "al" and row["arm"] == "baseline"}
    assert by_run == {str(arms / "base-0"), str(arms / "base-1"), ""}


def test_a_sweep_is_in_the_json(tmp_path: Path) -> None:
    for concurrency in (1, 2):
        for k in (0, 3):
            varied(tmp_path / "runs" / f"c{concurrency}-k{k}", k, concurrency=concurrency)
    out = written(tmp_path, tmp_path / "runs")
    found = json.loads(out["json"].read_text())
    assert len(found["arms"]) == len(found["sweep"]["points"]) == 4
    assert len(found["comparisons"]) == 2  # a baseline for each concurrency


def test_pooled_repeats_are_what_both_runs_hold_together(tmp_path: Path, arms: Path) -> None:
    out = written(tmp_path, arms)
    found = json.loads(out["json"].read_text())["arms"][1]
    pooled, each = found["pooled"], found["runs"]
    for n in ("1", "2", "3", "4"):
        counts = [run["acceptance"]["histogram"][n] for run in each]
        assert pooled["acceptance"]["histogram"][n] == sum(counts)


def test_arms_that_cannot_be_compared_are_reported_with_the_reason(tmp_path: Path) -> None:
    varied(tmp_path / "runs" / "a")
    stored(
        tmp_path / "runs" / "b",
        [conversation("a", "qa", [1, 1])],
        draft_length=0,
        config={"temperature": 0.7},
    )
    out = written(tmp_path, tmp_path / "runs")
    found = json.loads(out["json"].read_text())
    assert found["comparisons"] == []
    ((label, why),) = found["not_compared"].items()
    assert label.startswith("EAGLE3")
    assert "temperature" in why
    assert not [row for row in csv_rows(out["csv"].read_text()) if row["base"]]


# --- the schema -----------------------------------------------------------------------------------


def schema_program() -> Any:
    spec = importlib.util.spec_from_file_location(
        "report_schema", ROOT / "scripts" / "report_schema.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_are_what_the_program_writes() -> None:
    for path, text in schema_program().files().items():
        assert path.read_text(encoding="utf-8") == text, f"run scripts/report_schema.py for {path}"
        assert as_json.SCHEMA in text


@pytest.mark.parametrize("kind", ["one", "odd", "baseline", "empty", "arms"])
def test_reports_follow_their_schema(tmp_path: Path, arms: Path, kind: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    make: dict[str, Callable[[Path], object]] = {
        "one": lambda path: varied(path),
        "odd": odd_run,
        "baseline": lambda path: arm(path, 0),
        "empty": lambda path: stored(path, [], expected={"a": 3}, sessions=[]),
        "arms": lambda path: path.symlink_to(arms),
    }
    make[kind](tmp_path / "r")
    assert report(tmp_path / "r", "--format", "json", "--out", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    schema = json.loads((ROOT / "docs" / "report_schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    assert [error.json_path + error.message for error in validator.iter_errors(found)] == []
    found["arms"][0]["runs"][0]["al"] = 1
    assert not validator.is_valid(found)


# --- where reports go -----------------------------------------------------------------------------


def test_a_page_goes_to_the_folder_that_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = varied(tmp_path / "runs" / "r").directory
    assert report(run, "--format", "html") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.strip() == f"wrote {run}/report.html"
    page = (run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert report(run, "--format", "html") == 0  # its own page is written again
    assert report(tmp_path / "runs", "--format", "html") == 0
    assert (tmp_path / "runs" / "report.html").is_file()
    assert report(run) == 0  # a page beside the parts disturbs nothing


@pytest.mark.parametrize("form", [*FORMS, "matrix"])
def test_nothing_but_a_report_is_overwritten(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = varied(tmp_path / "r").directory
    flags = ("--matrix", "csv") if form == "matrix" else ("--format", form)
    place = tmp_path / "mine"
    place.write_bytes(b"import speedbench  # not yours\n")
    assert report(run, *flags, "--out", place) == 2
    assert place.read_bytes() == b"import speedbench  # not yours\n"
    assert "is no" in capsys.readouterr().err
    place.unlink()
    for _ in range(2):
        assert report(run, *flags, "--out", place) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "r"]


def test_a_report_goes_behind_a_url(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    run = varied(tmp_path / "r").directory
    memory = fsspec.filesystem("memory")
    place = f"memory://reports-{os.getpid()}/report.csv"
    for _ in range(2):
        assert report(run, "--format", "csv", "--out", place) == 0
    assert memory.cat_file(place).decode().startswith("arm,run,base")
    memory.pipe_file(place, b"mine")
    assert report(run, "--format", "csv", "--out", place) == 2
    assert memory.cat_file(place) == b"mine"


def test_a_run_behind_a_url_is_reported_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = varied(tmp_path / "r").directory
    url = f"memory://runs-{os.getpid()}/r"
    fsspec.filesystem("memory").put(str(run), url, recursive=True)
    outs = []
    for place in (run, url):
        assert report(place, "--matrix", "csv") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert speedbench.load(url).steps.num_rows == speedbench.load(run).steps.num_rows
    assert report(url, "--format", "html") == 0
    page = fsspec.filesystem("memory").cat_file(f"{url}/report.html")
    assert page.lower().startswith(b"<!doctype html>")


def test_text_goes_to_the_terminal_where_no_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = varied(tmp_path / "r").directory
    for form, beginning in (
        ("console", "speedbench: "),
        ("markdown", "# speedbench: "),
        ("csv", "arm,run,"),
        ("json", "{"),
    ):
        assert report(run, "--format", form) == 0
        assert capsys.readouterr().out.startswith(beginning)
    assert report(run, "--matrix", "csv") == 0
    assert capsys.readouterr().out.splitlines()[0] == "Model,coding,math,qa,Overall"


def test_the_matrix_as_aiperf_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = varied(tmp_path / "r").directory
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert report(run, "--matrix", "both", "--metric", "accept_rate") == 0
    told = capsys.readouterr()
    assert told.out.startswith("Acceptance Rate Report")
    assert "wrote speed_bench_report.csv" in told.err
    (header, line) = csv.reader((tmp_path / "cwd" / "speed_bench_report.csv").open())
    assert header == ["Model", "coding", "math", "qa", "Overall"]
    assert line[0] == "target"
    cells = [float(cell) for cell in line[1:]]
    assert cells[3] == pytest.approx(sum(cells[:3]) / 3, abs=1e-4)
    assert report(run, "--matrix", "table") == 0
    assert capsys.readouterr().out.startswith("Acceptance Length Report")


def test_publisher_files_of_several_runs_go_to_a_folder_each(tmp_path: Path, arms: Path) -> None:
    assert report(arms, "--format", "specdec_bench", "--out", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["base-0", "base-1", "spec-0", "spec-1"]
    for name in names:
        assert json.loads((tmp_path / "out" / name / "acceptance_rate.json").read_text())
    assert report(arms / "spec-0", "--format", "specdec_bench", "--out", tmp_path / "one") == 0
    assert (tmp_path / "one" / "timing.json").is_file()


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "nothing named": ([], ["no run was named"]),
    "no such place": (["{tmp}/nowhere"], ["nowhere does not exist"]),
    "a file": (["{run}/manifest.json"], ["is a file", "{run}"]),
    "an empty folder": (["{tmp}/empty"], ["holds none", "--save_dir"]),
    "named twice": (["{run}", "{run}"], ["named twice"]),
    "unknown format": (["{run}", "--format", "pdf"], ["pdf", "html"]),
    "unknown metric": (["{run}", "--matrix", "csv", "--metric", "tps"], ["tps", "throughput"]),
    "format and matrix": (["{run}", "--format", "csv", "--matrix", "csv"], ["--matrix and"]),
    "export and format": (["{run}", "--format", "csv", "--export", "mlflow"], ["--export"]),
    "a metric alone": (["{run}", "--metric", "throughput"], ["--metric belongs to --matrix"]),
    "an experiment alone": (["{run}", "--experiment", "x"], ["--experiment belongs to --export"]),
    "a tokenizer alone": (["{run}", "--tokenizer", "x"], ["--tokenizer belongs to"]),
    "parquet to nowhere": (["{run}", "--format", "parquet"], ["add --out FILE"]),
    "publisher's files to nowhere": (
        ["{run}", "--format", "specdec_bench"], ["add --out FOLDER"],
    ),
    "publisher's files to a URL": (
        ["{run}", "--format", "specdec_bench", "--out", "s3://a/b"], ["folder on this machine"],
    ),
    "a table to a file": (["{run}", "--matrix", "table", "--out", "x"], ["--out is x"]),
    "a folder as a file": (["{run}", "--format", "csv", "--out", "{tmp}"], ["is a folder"]),
    "no such folder": (
        ["{run}", "--format", "csv", "--out", "{tmp}/no/such/f.csv"], ["cannot be written"],
    ),
    "a page of two places": (["{run}", "{tmp}/b", "--format", "html"], ["add --out FILE"]),
    "insights in a table of numbers": (
        ["{run}", "--format", "csv", "--gpu_hour_price", "2"], ["--gpu_hour_price belongs to"],
    ),
    "insights in a matrix": (
        ["{run}", "--matrix", "csv", "--think_end", "1"], ["--think_end belongs to"],
    ),
    "a price of nothing": (["{run}", "--gpu_hour_price", "0"], ["price above 0"]),
    "no such draft vocabulary": (
        ["{run}", "--draft_vocabulary", "{tmp}/nowhere"], ["{tmp}/nowhere", "draft checkpoint"],
    ),
    "no such tokenizer": (
        ["{run}", "--think_end", "</think>", "--tokenizer", "{tmp}/empty"], ["--tokenizer"],
    ),
    "shards that are none": (["--merge", "{run}", "{tmp}/b"], ["no shards of one run"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arm(tmp_path / "r", 3, names=["math"])
    arm(tmp_path / "b", 0, names=["math"])
    (tmp_path / "empty").mkdir()
    arguments, words = MISTAKES[name]
    put = {"tmp": str(tmp_path), "run": str(tmp_path / "r")}
    before = sorted(tmp_path.rglob("*"))
    assert report(*(argument.format(**put) for argument in arguments)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    for word in words:
        assert word.format(**put) in told.err
    assert sorted(tmp_path.rglob("*")) == before


# --- trackers -------------------------------------------------------------------------------------

SECRET = "hf_" + "x" * 30


def secretive(directory: Path) -> Run:
    """A run whose manifest was edited so that it holds a credential again."""
    run = arm(directory, 3, names=["math", "odd/cat: x", "odd/cat; x"])
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["engine_args"] = {"hf_token": "hush-hush", "nested": {"header": SECRET}}
    manifest["environment"]["argv"] += ["--header", SECRET]
    path.write_text(json.dumps(manifest))
    return run


def test_a_record_holds_every_known_number_and_no_secret(tmp_path: Path) -> None:
    from speedbench import store

    secretive(tmp_path / "r")
    run = exporters.without_secrets(store.load(tmp_path / "r"))
    found = exporters.record("arm", run, {"report.html": "<p>"})
    assert found.metrics["al"] == pytest.approx(2.5)
    assert found.metrics["math/al"] == pytest.approx(2.5)
    assert found.metrics["odd_cat_ x/al"] == found.metrics["_odd_cat_ x/al"] == pytest.approx(2.5)
    al = summarize(run).lengths["al"]
    assert (found.metrics["al_low"], found.metrics["al_high"]) == al.interval
    assert "draft_vocabulary" not in found.metrics
    assert found.params["concurrency"] == "2"
    assert found.params["engine_args.hf_token"] == "<redacted>"
    assert found.params["engine_args.nested.header"] == "<redacted>"
    assert found.tags["fingerprint"] == "f" * 64
    assert found.tags["engine_version"] == "0.32.0"
    assert set(found.artifacts) == {"report.html", "manifest.json"}
    everything = json.dumps(
        [dict(found.metrics), dict(found.params), dict(found.tags), dict(found.artifacts)]
    )
    assert SECRET not in everything
    assert "hush-hush" not in everything
    assert all(len(value) <= 500 for value in (*found.params.values(), *found.tags.values()))


@pytest.mark.parametrize("tracker", exporters.TRACKERS)
def test_a_missing_package_is_one_sentence_that_names_the_extra(
    tmp_path: Path,
    tracker: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)
    run = arm(tmp_path / "r", 3, names=["math"]).directory
    assert report(run, "--export", tracker) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert f"speedbench[{tracker}]" in told


def exported(tmp_path: Path, tracker: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Through the command, in a process of its own."""
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{exporters.PACKAGES[tracker]} is not installed here")  # type: ignore[index]
    secretive(tmp_path / "r")
    return subprocess.run(
        [sys.executable, "-m", "speedbench", "report", str(tmp_path / "r"), "--export", tracker,
         "--experiment", "trial"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
             **environment},
    )  # fmt: skip


def test_mlflow_holds_the_run(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/mlruns"
    known = {"MLFLOW_TRACKING_URI": store, "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = exported(tmp_path, "mlflow", **known)
    assert done.returncode == 0, done.stderr
    assert "stored file://" in done.stderr
    code = (
        "import json, mlflow\n"
        "client = mlflow.MlflowClient()\n"
        "found = client.get_experiment_by_name('trial')\n"
        "(run,) = client.search_runs([found.experiment_id])\n"
        "files = [a.path for a in client.list_artifacts(run.info.run_id)]\n"
        "print(json.dumps([run.info.status, run.data.metrics, run.data.params, run.data.tags,"
        " files]))\n"
    )
    read = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **known},
    )  # fmt: skip
    status, metrics, params, tags, files = json.loads(read.stdout)
    assert status == "FINISHED"
    assert metrics["al"] == pytest.approx(2.5)
    assert metrics["math/al"] == pytest.approx(2.5)
    assert params["engine"] == "VLLM"
    assert tags["fingerprint"] == "f" * 64
    assert sorted(files) == ["manifest.json", "report.html"]
    stored_text = "".join(
        path.read_text(errors="replace")
        for path in (tmp_path / "mlruns").rglob("*")
        if path.is_file()
    )
    assert SECRET not in stored_text


def test_wandb_holds_the_run(tmp_path: Path) -> None:
    done = exported(
        tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path),
        WANDB_DATA_DIR=str(tmp_path / "data"), WANDB_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.rglob("*.wandb")
    data = log.read_bytes()
    for word in (b"math/al", b"f" * 64, b"concurrency", b"trial"):
        assert word in data
    assert SECRET.encode() not in data
    assert not list(log.parent.rglob("requirements.txt"))  # nothing but the record
    pages = [path for path in tmp_path.rglob("*") if path.is_file() and "data" in path.parts]
    texts = [path.read_text(errors="replace") for path in pages]
    assert any(text.lower().startswith("<!doctype html>") for text in texts)
    assert not any(SECRET in text for text in texts)
