"""AIPerf's artifacts: what a report reads from them, and what it does not.

`tests/aiperf/vllm` is genuine (see its README). The same 22 prompts, asked without AIPerf, were
answered with 348 verifications and 466 accepted tokens of 1044 drafted (tests/test_server_metrics).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import aiperf
from speedbench.aiperf import AiperfRun
from speedbench.cli import main
from speedbench.report import layout_aiperf, markdown
from speedbench.report.aiperf_acceptance import accepted
from speedbench.types import UserError
from tests import builders

GENUINE = Path(__file__).parent / "aiperf" / "vllm"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GENUINE, tmp_path / "artifacts" / "run"))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def set_total(name: str, total: float) -> Callable[[dict[str, Any]], None]:
    def edit(found: dict[str, Any]) -> None:
        series = found["metrics"][name]["series"]
        for one in series:
            one["stats"]["total"] = 0.0
        series[0]["stats"]["total"] = total

    return edit


@pytest.fixture
def agreed(copy: Path) -> Path:
    """As if the answer that AIPerf counts as an error had held no token, not one."""
    change(copy / aiperf.SERVER, set_total("vllm:generation_tokens", 810.0))
    return copy


def page(*runs: AiperfRun) -> str:
    return markdown.write(layout_aiperf.of_runs(runs))


# ---------------------------------------------------------------- what was recorded


def test_acceptance_is_what_the_server_told_request_by_request(agreed: Path) -> None:
    run = aiperf.read(agreed)
    assert sum(one.n_verifications for one in run.told) == 348
    assert sum(one.n_accepted for one in run.told) == 466
    assert sum(one.n_drafted for one in run.told) == 1044
    found = accepted(run)
    assert found.al_responses.value == pytest.approx(1 + 466 / 348)
    assert found.rate_responses.value == pytest.approx(466 / 1044)
    assert found.al_counters.value == pytest.approx(1 + 466 / 348)
    assert found.agree is True


def test_the_interval_is_the_jackknife_over_conversations() -> None:
    """A brute-force twin: every conversation left out in turn."""
    run = aiperf.read(GENUINE)
    rows = np.array([(one.n_accepted, one.n_verifications) for one in run.told], float)
    n, whole = len(rows), rows.sum(axis=0)
    left = np.array([1 + (whole - row)[0] / (whole - row)[1] for row in rows])
    error = np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum())
    interval = accepted(run).al_responses.interval
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 2.0860 * error, rel=0.02)  # t, 20 degrees


def test_requests_tokens_and_chunks() -> None:
    run = aiperf.read(GENUINE)
    assert (run.n_ok, run.n_errors, run.n_tokens) == (21, 1, 810)
    assert run.n_chunks == 167  # neither tokens nor the 348 verifications
    assert (run.version, run.model, run.category, run.concurrency) == ("0.13.0", "word", "", "4")
    [doubt] = run.doubts
    assert "1 request(s) count as errors" in doubt


def test_times_are_those_of_the_records() -> None:
    run = aiperf.read(GENUINE)
    records = [json.loads(line) for line in (GENUINE / aiperf.RECORDS).read_text().splitlines()]
    for metric in ("time_to_first_token", "request_latency", "output_sequence_length"):
        values = [r["metrics"][metric]["value"] for r in records if metric in r["metrics"]]
        factor = 1.0 if metric == "output_sequence_length" else 1e-3
        assert run.values[metric]["p50"] == pytest.approx(np.percentile(values, 50) * factor)
        assert run.values[metric]["n"] == len(values) == 21
    assert run.output_tps == pytest.approx(809 / 6.061077)  # its end_time - start_time


def test_the_page_says_what_chunks_are(agreed: Path) -> None:
    text = page(aiperf.read(agreed))
    assert "2.3391 tokens per verification (95 %" in text
    assert "2.3391 tokens per draft" in text
    assert "chunks are counted as no steps" in text
    assert "248.2175" in text  # TTFT P50, ms
    assert "step time" not in text.replace("no step times", "").replace(
        "engine steps: step times", ""
    )


# ---------------------------------------------------------------- what is not there


def test_without_records_or_metrics_there_is_a_reason(copy: Path) -> None:
    (copy / aiperf.RECORDS).unlink()
    (copy / aiperf.SERVER).unlink()
    run = aiperf.read(copy)
    found = accepted(run)
    assert found.al_responses.value is None
    assert "--export-level records" in found.al_responses.why_not
    assert found.al_counters.value is None
    assert "no metrics of the server" in found.al_counters.why_not
    assert found.agree is None
    assert run.values["time_to_first_token"]["n"] == 21


def test_a_server_that_served_others_has_no_acceptance_by_counters(copy: Path) -> None:
    change(copy / aiperf.SERVER, set_total("vllm:request_success", 25.0))
    found = accepted(aiperf.read(copy))
    assert found.al_counters.value is None
    assert "counted 25 requests and 811 tokens, AIPerf 22 and 810" in found.al_counters.why_not
    assert found.al_responses.value == pytest.approx(1 + 466 / 348)


def test_what_an_error_cost_the_server_is_not_told_from_what_others_did() -> None:
    """Of 21 answers and an error AIPerf has 810 tokens, the server 811: its end alone, or the token
    of somebody else while the request was refused."""
    found = accepted(aiperf.read(GENUINE))
    assert found.al_counters.value is None
    assert found.agree is None
    assert found.al_counters.why_not == (
        "the server counted 22 requests and 811 tokens, AIPerf 22 and 810, and 1 request(s) count "
        "as errors: what the server did for them cannot be told from what it did for others"
    )
    assert found.al_responses.value == pytest.approx(1 + 466 / 348)


def test_without_errors_tokens_must_agree_too(copy: Path) -> None:
    def no_errors(found: dict[str, Any]) -> None:
        del found["error_request_count"]
        found["request_count"]["avg"] = 22.0

    change(copy / aiperf.PROFILE, no_errors)
    assert "811 tokens, AIPerf 22 and 810" in aiperf.read(copy).counted.why_not
    change(copy / aiperf.SERVER, set_total("vllm:generation_tokens", 810.0))
    assert aiperf.read(copy).counted.why_not == ""


def test_counters_and_responses_that_differ_are_an_error(agreed: Path) -> None:
    change(agreed / aiperf.SERVER, set_total("vllm:spec_decode_num_accepted_tokens", 460.0))
    run = aiperf.read(agreed)
    assert accepted(run).agree is False
    assert "348 drafts and 460 accepted tokens are counted, the responses tell 348 and 466" in page(
        run
    )


def test_a_gauge_is_never_an_acceptance_length(copy: Path) -> None:
    """AIPerf's own matrix takes the mean of this one."""

    def sglang(found: dict[str, Any]) -> None:
        def metric(kind: str, **stats: float) -> dict[str, Any]:
            labels = {"model_name": "word"}
            return {"type": kind, "series": [{"labels": labels, "stats": stats}]}

        found["metrics"] = {
            "sglang:spec_accept_length": metric("gauge", avg=2.2, min=0.0, max=2.43),
            "sglang:spec_verify_calls": metric("counter", total=348.0),
            "sglang:generation_tokens": metric("counter", total=810.0),
            "sglang:num_requests": metric("counter", total=22.0),
        }

    change(copy / aiperf.SERVER, sglang)
    run = aiperf.read(copy)
    assert accepted(run).al_counters.value is None
    assert "not the tokens that they accepted" in run.counted.why_not
    text = page(run)
    assert "gauge, from 0.0000 to 2.4300" in text
    assert "2.2000" not in text


def test_responses_that_tell_nothing_have_no_acceptance(copy: Path) -> None:
    lines = []
    for line in (copy / aiperf.RECORDS).read_text().splitlines():
        record = json.loads(line)
        record["metrics"] = {
            name: value for name, value in record["metrics"].items() if "spec_decode" not in name
        }
        lines.append(json.dumps(record))
    (copy / aiperf.RECORDS).write_text("\n".join(lines) + "\n")
    run = aiperf.read(copy)
    assert "--per-request-spec-decode-metrics" in accepted(run).al_responses.why_not
    assert run.n_untold == 21


def test_lines_that_are_lost_are_told(copy: Path) -> None:
    path = copy / aiperf.RECORDS
    path.write_text(path.read_text()[:-3000])
    doubts = " ".join(aiperf.read(copy).doubts)
    assert "1 line(s) of profile_export.jsonl cannot be read" in doubts
    assert "one of them is not whole" in doubts


def test_a_unit_that_is_not_known_is_left_out(copy: Path) -> None:
    change(copy / aiperf.PROFILE, lambda found: found["request_latency"].update(unit="us"))
    run = aiperf.read(copy)
    assert "request_latency" not in run.values
    assert any("'us'" in doubt for doubt in run.doubts)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul"])
def test_a_profile_that_cannot_be_read_is_one_sentence(copy: Path, text: str) -> None:
    (copy / aiperf.PROFILE).write_text(text)
    with pytest.raises(UserError, match=r"restore it from a copy$"):
        aiperf.read(copy)


def test_whatever_stands_in_a_profile_is_read_without_a_traceback(copy: Path) -> None:
    """Values of any other type are missing values."""
    whole = json.loads((GENUINE / aiperf.PROFILE).read_text())
    for odd in (None, 7, "x", [], {}, [{}], True):
        for name in whole:
            (copy / aiperf.PROFILE).write_text(json.dumps({**whole, name: odd}))
            page(aiperf.read(copy))


# ---------------------------------------------------------------- several, and the command


def of_category(place: Path, category: str, n_accepted: float) -> None:
    shutil.copytree(GENUINE, place)

    def edit(found: dict[str, Any]) -> None:
        found["input_config"]["datasets"][0]["format"] = f"speed_bench_{category}"

    change(place / aiperf.PROFILE, edit)
    change(place / aiperf.SERVER, set_total("vllm:spec_decode_num_accepted_tokens", n_accepted))
    change(place / aiperf.SERVER, set_total("vllm:generation_tokens", 810.0))


def test_a_run_for_each_category_makes_a_table_and_a_mean(tmp_path: Path) -> None:
    of_category(tmp_path / "one", "coding", 348.0)
    of_category(tmp_path / "two", "math", 696.0)
    runs = [aiperf.read(folder) for folder in aiperf.folders(tmp_path)]
    assert [run.category for run in runs] == ["coding", "math"]
    row = next(line for line in page(*runs).splitlines() if "mean over categories" in line)
    assert "2.5000" in row  # of the counters' 2 and 3
    assert "2.3391" in row


def test_the_command_reports_a_folder_or_what_lies_below_it(
    agreed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(agreed)]) == 0
    assert "2.3391" in capsys.readouterr().out
    assert main(["report", str(agreed.parent), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "speedbench.aiperf/1"
    assert found["runs"][0]["acceptance"]["al_counters"]["value"] == 1 + 466 / 348
    assert main(["report", str(agreed), "--format", "html"]) == 0
    assert b"2.3391" in (agreed / "report.html").read_bytes()
    out = str(agreed / "out.json")
    for _ in range(2):  # a report may be written over a report
        assert main(["report", str(agreed), "--format", "json", "--out", out]) == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--matrix", "csv"], "--matrix needs a run of speedbench"),
        (["--format", "csv"], "--format csv needs a run of speedbench"),
        (["OURS"], "report them one after the other"),
    ],
)
def test_what_needs_engine_steps_is_refused(
    copy: Path, tmp_path: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    builders.stored(tmp_path / "ours", [builders.conversation("c", "a", [1, 2])])
    words = [str(tmp_path / "ours") if word == "OURS" else word for word in words]
    assert main(["report", str(copy), *words]) == 2
    assert why in capsys.readouterr().err
