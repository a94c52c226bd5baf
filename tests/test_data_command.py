"""`speedbench data`: what is prepared, its identity, and its lengths; presets."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import datasets, presets
from speedbench.cli_data import data_command
from speedbench.config import RunConfig
from speedbench.datasets import Dataset, identity, select
from speedbench.datasets.files import parquet_records
from speedbench.datasets.overview import Lengths, Spread, files_of, overview
from speedbench.datasets.rows import to_conversations
from speedbench.report.blocks import Chart
from speedbench.report.layout_data import of_overview
from speedbench.types import Conversation, UserError
from tests.hub import parquet, qualitative_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A prepared folder whose rows are resolved, and an own JSONL beside it."""
    rows = [{**r, "turns": [t.split("\n")[-1] for t in r["turns"]]} for r in qualitative_rows()]
    place = tmp_path / "data" / "speed" / "qualitative"
    place.mkdir(parents=True)
    file = place / "test.parquet"
    file.write_bytes(parquet(rows))
    seal(file)
    return tmp_path / "data"


def seal(file: Path) -> None:
    records = parquet_records([file])
    found = {
        "format": 1,
        "dataset": "speed",
        "config": "qualitative",
        "source": {"repository": "nvidia/SPEED-Bench", "revision": "f" * 40},
        "preparer": {"repository": "https://example.org/p", "commit": "e" * 40},
        **identity.of_rows(to_conversations(records, datasets.SPEED), file),
        "licences": [{"of": "x", "name": "a licence", "page": "p"}],
        "prepared_utc": "2026-01-01T00:00:00+00:00",
    }
    (file.parent / "identity.json").write_text(json.dumps(found))


def words_file(tmp_path: Path, models: Path) -> Path:
    """Rows of 1, 2, ... 20 words that the calibration tokenizer knows, a token each."""
    vocabulary = json.loads((models / "word" / "target" / "tokenizer.json").read_text())
    word = next(w for w in vocabulary["model"]["vocab"] if re.fullmatch(r"\w+", w))
    place = tmp_path / "own"
    place.mkdir()
    rows = [
        {"question_id": f"r{n}", "category": "even" if n % 2 == 0 else "odd",
         "turns": [" ".join([word] * n)]}
        for n in range(1, 21)
    ]  # fmt: skip
    (place / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return place


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert data_command([*arguments, "--format", "json"], "speedbench data") == 0
    return json.loads(capsys.readouterr().out)


def test_rows_requests_and_identity(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = as_json(capsys, str(folder))
    assert found["path"] == str(folder / "speed" / "qualitative" / "test.parquet")
    assert [part["n_rows"] for part in found["parts"]] == [80] * 11
    assert [part["n_requests"] for part in found["parts"]] == [96] * 11
    assert (found["total"]["n_rows"], found["total"]["n_requests"]) == (880, 1056)
    assert found["total"]["turns"] == {"minimum": 1, "median": 1.0, "p95": 2, "maximum": 2}
    assert found["total"]["tokens"] is None
    assert found["identity"]["source"]["revision"] == "f" * 40
    assert found["identity"]["sha256"] == found["sha256"]
    assert found["fault"] == ""


def test_a_changed_file_is_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "speed" / "qualitative" / "test.parquet"
    rows = [{**r, "turns": ["changed"]} for r in qualitative_rows()]
    file.write_bytes(parquet(rows))
    (found,) = as_json(capsys, str(file))
    assert "was changed since it was prepared" in found["fault"]
    assert found["identity"] is None
    seal(file)
    table = parquet_records([file])  # the same rows, other bytes
    file.write_bytes(parquet([dict(r.values) | {"src_id": "other"} for r in table]))
    assert as_json(capsys, str(file))[0]["fault"].startswith("the rows are those")


@pytest.mark.parametrize("lost", ["sha256", "file", "source", "licences", "prepared_utc"])
def test_a_damaged_identity_is_one_sentence(
    folder: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "speed" / "qualitative" / "identity.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in values.items() if k != lost}))
    (found,) = as_json(capsys, str(folder))
    assert found["identity"] is None
    assert f"lacks '{lost}'" in found["fault"]
    assert "\n" not in found["fault"]


def test_an_interruption_is_no_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("speedbench.datasets.overview.overview", interrupted)
    monkeypatch.setattr("speedbench.cli_build.select_command", interrupted)
    for arguments in ([str(folder)], ["select", "--from", "x"]):
        with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
            data_command(arguments, "speedbench data")
        assert repr(ended.value) == f"SystemExit({128 + signal.SIGINT})"


def test_the_figure_draws_the_lengths_of_every_category(models: Path, tmp_path: Path) -> None:
    place = words_file(tmp_path, models)
    lengths = Lengths(str(models / "word" / "target"), completions=True)
    found = overview(place / "prompts.jsonl", lengths, 17)
    head = lengths.of([Conversation("r", "c", ("",))])[0] if found.total.tokens else 0
    (chart,) = (b for b in of_overview(found, None, "tokens: of them", 17) if isinstance(b, Chart))
    assert chart.x.ticks == ("odd", "even", "all")
    assert chart.y.unit == "tokens"
    assert chart.reference == 17
    spread, p95 = chart.series
    # 1, 3, ... 19 and 2, 4, ... 20 and 1, 2, ... 20 words
    assert [v - head for v in spread.y] == [10, 11, 10.5]
    assert [v - head for v in spread.low] == [1, 2, 1]
    assert [v - head for v in spread.high] == [19, 20, 20]
    assert [v - head for v in p95.y] == [19, 20, 19]
    drawn = [[float(cell) for cell in row[1:]] for row in chart.table.rows]
    assert drawn == [list(v) for v in zip(spread.low, spread.y, p95.y, spread.high, strict=True)]


def test_token_lengths_and_rows_over_a_limit(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = words_file(tmp_path, models)
    tokenizer = str(models / "word" / "target")
    base = ["--tokenizer", tokenizer, "--completions", "--limit", "17"]
    (found,) = as_json(capsys, str(place), *base)
    head = found["total"]["tokens"]["minimum"] - 1  # a BOS, if this tokenizer puts one
    assert head in (0, 1)
    lengths = {k: v - head for k, v in found["total"]["tokens"].items()}
    # 1 ... 20: the 19th smallest is the first that 95 % of twenty do not exceed.
    assert lengths == {"minimum": 1, "median": 10.5, "p95": 19, "maximum": 20}
    over = [(row["id"], row["tokens"] - head) for row in found["over"]]
    assert over == [(f"r{n}", n) for n in range(20, 17 - head, -1)]
    by_name = {part["name"]: part["n_over"] for part in found["parts"]}
    assert by_name == dict(Counter("even" if n % 2 == 0 else "odd" for n in range(18 - head, 21)))


def test_a_later_turn_holds_the_earlier_ones(models: Path) -> None:
    lengths = Lengths(str(models / "word" / "target"), completions=True)
    vocabulary = json.loads((models / "word" / "target" / "tokenizer.json").read_text())
    word = next(w for w in vocabulary["model"]["vocab"] if re.fullmatch(r"\w+", w))
    one, two = lengths.of([Conversation("a", "c", (word,)), Conversation("b", "c", (word, word))])
    assert two > one


def test_spread_of_one_and_of_many() -> None:
    assert Spread.of([7]) == Spread(7, 7.0, 7, 7)
    assert Spread.of(list(range(100, 0, -1))) == Spread(1, 50.5, 95, 100)


def test_only_what_is_whole_is_found(folder: Path) -> None:
    for name in (".qualitative.partial-x", ".hidden"):
        (folder / "speed" / name).mkdir()
        (folder / "speed" / name / "test.parquet").write_bytes(b"half")
    assert files_of(folder) == [folder / "speed" / "qualitative" / "test.parquet"]
    assert files_of(folder / "speed" / "qualitative") == files_of(folder)


@pytest.mark.parametrize("form", ["console", "markdown"])
def test_tables(
    form: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = words_file(tmp_path, models)
    arguments = ["--tokenizer", str(models / "word" / "target"), "--completions", "--limit", "1"]
    assert data_command([str(place), *arguments, "--format", form], "speedbench data") == 0
    text = capsys.readouterr().out
    assert "rows exceed 1 tokens" in text
    assert "bare text" in text
    for word in ("even", "odd", "all", "r20"):
        assert word in text


def test_a_page_that_needs_no_other_file(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = words_file(tmp_path, models)
    rows = (place / "prompts.jsonl").read_text().replace('"even"', '"<b>&even"')
    (place / "prompts.jsonl").write_text(rows)
    out = tmp_path / "page.html"
    arguments = ["--tokenizer", str(models / "word" / "target"), "--completions", "--limit", "9"]
    data_command([str(place), *arguments, "--format", "html", "--out", str(out)], "data")
    page = out.read_text()
    assert page.count("<svg") == 1
    assert '<th scope="row">&lt;b&gt;&amp;even</th>' in page
    assert "11 rows exceed 9 tokens" in page or "12 rows exceed 9 tokens" in page  # a BOS counts
    assert "<b>&even" not in page
    assert not re.search(r'(src|href)="https?://', page)
    assert "<script" not in page
    again = tmp_path / "again.html"
    data_command([str(place), "--format", "html", "--out", str(again)], "data")
    assert "<svg" not in again.read_text()  # no tokenizer, no lengths


def test_one_that_cannot_be_read_does_not_hide_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mtbench").mkdir()
    (folder / "mtbench" / "question.jsonl").write_text("{}\n")
    assert data_command([str(folder), "--format", "json"], "speedbench data") == 2
    shown = capsys.readouterr()
    assert [found["total"]["n_rows"] for found in json.loads(shown.out)] == [880]
    assert "question.jsonl, line 1 has no turns" in shown.err
    with pytest.raises(UserError, match="line 1 has no turns"):
        data_command([str(folder / "mtbench")], "speedbench data")


def test_refusals(tmp_path: Path) -> None:
    for arguments, words in (
        ([str(tmp_path / "none")], "does not exist: name a folder"),
        ([str(tmp_path)], "holds no test.parquet, question.jsonl or prompts.jsonl"),
        ([str(tmp_path), "--limit", "5"], "--limit is in tokens: add --tokenizer"),
        ([str(tmp_path), "--limit", "x", "--tokenizer", "t"], "--limit is 'x'"),
    ):
        with pytest.raises(UserError, match=words):
            data_command(arguments, "speedbench data")


def test_shipped_mini_is_shown() -> None:
    found = overview(datasets.DEFAULT_MINI / "prompts.jsonl")
    assert found.identity is None
    assert found.total.n_rows == sum(part.n_rows for part in found.parts)
    assert len(found.parts) == 11


# Presets


def benchmark() -> Dataset:
    rows = tuple(Conversation(r["question_id"], r["category"], ("?",)) for r in qualitative_rows())
    return Dataset("speed", "", rows, "")


def chosen(**fields: Any) -> Counter[str]:
    config = RunConfig(engine="NULL", dataset="speed", **fields)
    return Counter(row.category for row in select(benchmark(), config))


def test_presets_are_stratified_and_within_one_another() -> None:
    assert set(chosen(preset="ci").values()) == {8}
    assert set(chosen(preset="short").values()) == {24}
    assert set(chosen(preset="full").values()) == {80}
    assert len(chosen(preset="ci")) == 11
    assert chosen(preset="ci", category=("rag",)) == {"rag": 80}  # no more than there are
    config = RunConfig(engine="NULL", dataset="speed", preset="ci")
    ids = [
        {row.id for row in select(benchmark(), config.model_copy(update={"preset": name}))}
        for name in ("ci", "short", "full")
    ]
    assert ids[0] < ids[1] < ids[2]


def test_preset_and_number_of_rows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        RunConfig(engine="NULL", preset="ci", num_requests=5)


def test_smallest_difference_has_the_power_it_claims() -> None:
    """Two runs that differ by just so much, compared as the sentence says, 100,000 times."""
    standard_error = 0.04
    margin = 1.96 * standard_error
    difference = presets.smallest_difference((2.4 - margin, 2.4 + margin))
    assert difference == pytest.approx(2.8016 * 2**0.5 * standard_error, rel=1e-3)
    generator = np.random.default_rng(0)
    base, other = generator.normal([2.4, 2.4 + difference], standard_error, (100_000, 2)).T
    found = np.abs(other - base) > 1.96 * 2**0.5 * standard_error
    # Standard error of a share of 0.8 in 100,000: 0.0013; four of them.
    assert abs(found.mean() - 0.80) < 0.0052


def test_sentence_of_a_preset() -> None:
    text = presets.sentence("ci", 88, (2.3, 2.5))
    assert "Preset ci (88 rows)" in text
    assert ": 0.202 (" in text  # 2.8016 x 1.41421 x 0.2 / (2 x 1.95996)
    assert "not known" in presets.sentence("ci", 3, None)


def test_names_that_do_not_exist() -> None:
    for name in ("speed_bench_cooking", "speed_bench_throughput_4k", "speed_bench_coding_mixed"):
        with pytest.raises(ValueError, match=f"--dataset is '{name}', which SPEED-Bench does not"):
            RunConfig(engine="NULL", dataset=name)
    with pytest.raises(ValueError, match="already says which category is meant"):
        RunConfig(engine="NULL", dataset="speed_bench_rag", category=("math",))
    with pytest.raises(ValueError, match="already says which speed_config is meant"):
        RunConfig(engine="NULL", dataset="speed_bench_rag", speed_config="throughput_1k")
    with pytest.raises(ValueError, match="--speed_config is 'throughput_4k': expected one of"):
        RunConfig(engine="NULL", dataset="speed", speed_config="throughput_4k")
    with pytest.raises(ValueError, match="--speed_config belongs to --dataset speed"):
        RunConfig(engine="NULL", dataset="mini", speed_config="throughput_1k")
