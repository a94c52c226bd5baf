"""Open loops over the null engine, whose clock is simulated: when what was submitted, and what the
report makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speedbench import store
from speedbench.arrivals import due_ns
from speedbench.cli import main
from speedbench.store import Run

MS = 1_000_000


def measured(directory: Path, *more: str, code: int = 0, **engine_args: object) -> Run:
    """Each conversation takes 10 ms for its first token, and 10 ms for each of 19 more."""
    parameters = directory.with_suffix(".yaml")
    parameters.parent.mkdir(parents=True, exist_ok=True)
    timing = {"step_ms": 10, "prefill_ms": 10, **engine_args}
    parameters.write_text(json.dumps({"engine_args": timing}))
    done = main(
        [
            "run", "--engine", "NULL", "--dataset", "random", "--random_isl", "4",
            "--output_length", "20", "--warmup", "0", "--save_dir", str(directory),
            "--runtime_params", str(parameters), *more,
        ]
    )  # fmt: skip
    assert done == code
    return store.load(directory)


def submitted(run: Run) -> list[int]:
    """ns after the first, rising."""
    times = np.sort(run.columns.submitted_ns)
    return [int(t) for t in times - times[0]]


def ttft_ms(run: Run) -> list[float]:
    """In the order of submission."""
    first, _ = run.columns.first_and_last()
    at = run.columns.submitted_ns[run.columns.request[first]]
    return [float(t) / MS for t in (run.columns.time_ns[first] - at)[np.argsort(at)]]


def test_conversations_come_when_they_are_due(tmp_path: Path) -> None:
    run = measured(
        tmp_path / "r", "--request_rate", "8", "--arrivals", "constant",
        "--num_requests", "40", "--concurrency", "64",
    )  # fmt: skip
    assert submitted(run) == [i * 125 * MS for i in range(40)]
    assert ttft_ms(run) == pytest.approx([10.0] * 40)


def test_random_arrivals_are_those_of_the_seed(tmp_path: Path) -> None:
    run = measured(
        tmp_path / "r", "--request_rate", "50", "--seed", "7",
        "--num_requests", "30", "--concurrency", "64",
    )  # fmt: skip
    assert submitted(run) == due_ns(50, 30, "poisson", 7).tolist()


def test_what_waits_for_a_place_waits_in_its_ttft(tmp_path: Path) -> None:
    """Two places, each of which is taken for 200 ms; one comes every 50 ms, twice as many as can be
    served: the i-th pair waits 100 ms longer than the one before it."""
    run = measured(
        tmp_path / "r", "--request_rate", "20", "--arrivals", "constant",
        "--num_requests", "6", "--concurrency", "2",
    )  # fmt: skip
    assert submitted(run) == [i * 50 * MS for i in range(6)]
    # Sent at 0, 50, 200, 250, 400, 450 ms.
    assert ttft_ms(run) == pytest.approx([10, 10, 110, 110, 210, 210])


def test_nothing_comes_after_the_duration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = measured(
        tmp_path / "r", "--request_rate", "10", "--arrivals", "constant", "--duration", "2s",
        "--num_requests", "100", "--concurrency", "64",
    )  # fmt: skip
    assert len(submitted(run)) == 20
    assert run.manifest["status"] == "complete"
    assert sum(run.manifest["dataset"]["expected"].values()) == 20


def reported(run: Run, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", str(run.directory), "--format", "json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_the_report_tells_a_load_that_was_kept_up_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = measured(
        tmp_path / "r", "--request_rate", "10", "--arrivals", "constant",
        "--num_requests", "100", "--concurrency", "64", "--goodput", "ttft=10ms,step_time=10ms",
    )  # fmt: skip
    found = reported(run, capsys)
    (told,) = (found["load"],) if "load" in found else (found["arms"][0]["runs"][0]["load"],)
    assert told["arrivals"]["is_behind"] is False
    assert told["arrivals"]["offered_per_s"] == pytest.approx(10)
    assert told["arrivals"]["n_most_in_flight"] == 2  # 200 ms each, of which the last 0 ms overlap
    assert told["goodput"]["n_met"] == 100
    assert told["goodput"]["per_s"]["value"] == pytest.approx(100 / 10.1)
    other = reported(run, capsys, "--goodput", "ttft=9ms")
    (told,) = (other["load"],) if "load" in other else (other["arms"][0]["runs"][0]["load"],)
    assert told["goodput"]["n_met"] == 0
    assert main(["report", str(run.directory)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no queue grew" in text
    assert "100 of 100, 100.0 %" in text


def test_the_report_warns_of_a_load_that_grew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two places, 200 ms each: 10 per s are served, 40 come."""
    run = measured(
        tmp_path / "r", "--request_rate", "40", "--num_requests", "200", "--concurrency", "2",
    )  # fmt: skip
    capsys.readouterr()
    assert main(["report", str(run.directory)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "WARNING over-saturated" in text
    assert "The queue grew" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--request_rate", "5"], "--request_rate needs --concurrency N"),
        (["--request_rate", "0", "--concurrency", "4"], "--request_rate is '0'"),
        (["--duration", "5s"], "--duration belongs to --request_rate"),
        (["--arrivals", "constant"], "--arrivals belongs to --request_rate"),
        (["--goodput", "ttft"], "--goodput is 'ttft'"),
    ],
)
def test_half_a_load_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    command = ["run", "--engine", "NULL", "--dataset", "random", "--random_isl", "4"]
    assert main([*command, "--save_dir", str(tmp_path / "r"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_an_engine_that_cannot_be_asked_at_given_moments_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    command = ["run", "--engine", "HF", "--model_dir", str(tmp_path / "m"), "--dataset", "mini"]
    flags = ["--request_rate", "5", "--concurrency", "4", "--save_dir", str(tmp_path / "r")]
    assert main([*command, *flags]) == 2
    assert "HF cannot be asked at given moments" in capsys.readouterr().err
