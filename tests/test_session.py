"""Whole runs over the null engine: what is stored, resumed, refused and repeated."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import engines
import engines.null
from speedbench import inputs, session, store
from speedbench.cli import main
from speedbench.config import from_dict
from speedbench.target import Target, refuse_changed, resumed_target, same_engine
from speedbench.types import (
    EngineDiedError,
    EngineInfo,
    EngineSettings,
    Request,
    Step,
    UserError,
)

ROOT = Path(__file__).parent.parent


def arguments(save_dir: Path, *more: str) -> list[str]:
    return [
        "run", "--engine", "NULL", "--dataset", "random", "--random_isl", "4",
        "--save_dir", str(save_dir), *more,
    ]  # fmt: skip


def parameters(path: Path, **engine_args: object) -> str:
    path.write_text(json.dumps({"engine_args": engine_args}))  # JSON is YAML
    return str(path)


def conversations(directory: Path) -> Counter[str]:
    """How often each conversation has a turn 0 in the stored parts, failed attempts left out."""
    turns = store.load(directory).turns
    return Counter(
        name
        for name, turn, reason in zip(
            turns["conversation_id"].to_pylist(),
            turns["turn"].to_pylist(),
            turns["finish_reason"].to_pylist(),
            strict=True,
        )
        if turn == 0 and reason not in store.FAILED
    )


def test_ten_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    n_rows, k = 1200, 3
    slow = parameters(tmp_path / "p.yaml", real_time=True, step_ms=4, prefill_ms=4)
    command = [
        sys.executable, str(ROOT / "run.py"),
        *arguments(
            run_dir, "--num_requests", str(n_rows), "--output_length", "40", "--concurrency", "8",
            "--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none",
            "--runtime_params", slow, "--warmup", "0",
        )[1:],
    ]  # fmt: skip
    moments = random.Random(20)
    kept: set[str] = set()
    n_kills = 0
    while n_kills < 10:
        resume = ["--resume"] if (run_dir / "manifest.json").exists() else []
        process = subprocess.Popen(
            [*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.6, 3.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        n_kills += 1
        if (run_dir / "manifest.json").exists():
            now = set(conversations(run_dir))
            assert kept <= now, "a committed conversation was lost"
            kept = now
        if process.returncode == 0:
            break
    assert n_kills >= 5, "the run ended before it could be killed often enough to mean anything"
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    stored = conversations(run_dir)
    assert len(stored) == n_rows
    assert set(stored.values()) == {1}
    run = store.load(run_dir)
    assert run.manifest["status"] == "complete"
    assert len(run.columns.conversation_ids) == n_rows
    # Every request is whole: 40 tokens, in steps of at most K + 1.
    assert int(run.columns.n_tokens.sum()) == 40 * n_rows
    assert int(run.columns.n_tokens.max()) <= k + 1
    assert len(run.manifest["sessions"]) >= 2


def test_a_run_can_be_repeated_from_its_manifest(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(arguments(first, "--num_requests", "12", "--output_length", "9")) == 0
    assert main(["run", "--config", str(first / "manifest.json"), "--save_dir", str(second)]) == 0
    a, b = store.load(first), store.load(second)
    assert a.manifest["prompts"]["fingerprint"] == b.manifest["prompts"]["fingerprint"]
    ignored = {"save_dir"}
    config_a = {k: v for k, v in a.manifest["config"].items() if k not in ignored}
    assert config_a == {k: v for k, v in b.manifest["config"].items() if k not in ignored}


def test_a_repetition_with_other_data_is_refused(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"turns": ["What is a step?"]}))
    run = ["run", "--engine", "NULL", "--tokenizer", str(models / "bpe" / "target"), "--dataset",
           "jsonl", "--dataset_path", str(data), "--output_length", "4"]  # fmt: skip
    assert main([*run, "--save_dir", str(tmp_path / "a")]) == 0
    data.write_text(json.dumps({"turns": ["What is a phase?"]}))
    capsys.readouterr()
    repeat = ["run", "--config", str(tmp_path / "a"), "--save_dir", str(tmp_path / "b")]
    assert main(repeat) == 2
    assert "fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main([*repeat, "--output_length", "5"]) == 0  # asks for something new


def test_resume_of_a_finished_run_measures_nothing_more(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, "--num_requests", "5", "--output_length", "4")) == 0
    before = sorted((run_dir / "turns").iterdir())
    assert main(["run", "--save_dir", str(run_dir), "--resume"]) == 0
    assert sorted((run_dir / "turns").iterdir()) == before
    run = store.load(run_dir)
    assert len(run.columns.conversation_ids) == 5
    assert len(run.manifest["sessions"]) == 1  # so its throughput can still be told


def test_resume_with_another_configuration_names_the_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, "--num_requests", "5", "--output_length", "4")) == 0
    stored = (run_dir / "manifest.json").read_bytes()
    capsys.readouterr()
    code = main(["run", "--save_dir", str(run_dir), "--resume", "--output_length", "5"])
    assert code == 2
    error = capsys.readouterr().err
    assert "--output_length" in error
    assert "4" in error
    assert "5" in error
    assert (run_dir / "manifest.json").read_bytes() == stored


def test_what_is_too_long_is_refused_alone_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], models: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [{"question_id": f"r{i}", "turns": ["word " * (5 if i else 500)]} for i in range(4)]
    data.write_text("\n".join(map(json.dumps, lines)))
    run_dir = tmp_path / "run"
    code = main(
        ["run", "--engine", "NULL", "--tokenizer", str(models / "bpe" / "target"), "--dataset",
         "jsonl", "--dataset_path", str(data), "--output_length", "50", "--max_seq_len", "200",
         "--save_dir", str(run_dir)]
    )  # fmt: skip
    assert code == 0
    run = store.load(run_dir)
    assert [row["id"] for row in run.manifest["refused"]] == ["r0"]
    assert sorted(run.columns.conversation_ids) == ["r1", "r2", "r3"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 row(s) were refused" in shown
    assert "3/4" in shown


def test_two_resumptions_at_once_double_nothing(tmp_path: Path) -> None:
    """Both read the run before either locks it: the second must notice and refuse."""
    settings = from_dict({"engine": "NULL", "random_isl": 4, "dataset": "random",
                          "num_requests": 30, "output_length": 4, "concurrency": 2,
                          "save_dir": str(tmp_path / "run")})  # fmt: skip
    prepared = inputs.prepare(settings)

    def measured(target: Target, stop: Callable[[], str | None]) -> None:
        engine = engines.adapter("NULL")(settings.engine_settings())
        session.measure(settings, prepared, engine, target, stop=stop)

    polls = iter([None] * 20)
    measured(Target(tmp_path / "run"), lambda: next(polls, "enough"))
    first, second = (resumed_target(tmp_path / "run", settings, prepared) for _ in "ab")
    assert 0 < len(first.done) < 30
    measured(first, lambda: None)
    with pytest.raises(UserError, match="another process"):
        measured(second, lambda: None)
    assert set(conversations(tmp_path / "run").values()) == {1}
    assert len(conversations(tmp_path / "run")) == 30


def test_a_directory_that_died_before_its_manifest_can_be_used(tmp_path: Path) -> None:
    for name in ("turns", "steps"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert main(arguments(tmp_path / "run", "--num_requests", "3", "--output_length", "4")) == 0


def test_the_null_engine_is_never_taken_for_a_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "r", "--num_requests", "3", "--output_length", "4")) == 0
    top = capsys.readouterr().out.splitlines()[:6]
    assert any("SIMULATED" in line for line in top)


def test_frozen_history_gives_every_arm_the_same_tokens(tmp_path: Path, models: Path) -> None:
    source = tmp_path / "source"
    base = [
        "run", "--engine", "NULL", "--tokenizer", str(models / "bpe" / "target"), "--dataset",
        "mini", "--num_requests", "44", "--output_length", "12", "--concurrency", "4",
    ]  # fmt: skip
    assert main([*base, "--seed", "1", "--save_dir", str(source)]) == 0
    frozen = ["--history", "frozen", "--history_from", str(source)]
    assert main([*base, "--seed", "1", "--save_dir", str(tmp_path / "a"), *frozen]) == 0
    other = ["--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none"]
    assert main([*base, "--seed", "1", "--save_dir", str(tmp_path / "b"), *frozen, *other]) == 0

    def hashes(directory: Path) -> dict[tuple[str, int], str]:
        return {
            (t["conversation_id"], t["turn"]): t["prompt_sha256"]
            for t in store.load(directory).turns.to_pylist()
        }

    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert any(turn > 0 for _, turn in a)
    assert a == b
    # Live, the arms' replies differ, and with them the later prompts.
    assert main([*base, "--seed", "1", "--save_dir", str(tmp_path / "c"), *other]) == 0
    live = hashes(tmp_path / "c")
    assert {k: v for k, v in live.items() if k[1] == 0} == {k: v for k, v in a.items() if k[1] == 0}
    assert {k: v for k, v in live.items() if k[1] > 0} != {k: v for k, v in a.items() if k[1] > 0}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_a_run_in_order(tmp_path: Path, number: int, code: int) -> None:
    run_dir = tmp_path / "run"
    slow = parameters(tmp_path / "p.yaml", real_time=True, step_ms=5, prefill_ms=5)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"),
         *arguments(run_dir, "--num_requests", "5000", "--output_length", "200",
                    "--concurrency", "8", "--runtime_params", slow)[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not list((run_dir / "turns").glob("*.parquet")):
        assert time.monotonic() < deadline, "nothing was stored in 30 s"
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "--resume" in err
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["status"] == "partial"
    assert manifest["sessions"][0]["n_uncommitted"] == 8
    # The whole run's throughput cannot be told: eight requests' tokens are not in the records.
    assert "n/a" in out


def test_max_duration_ends_a_run_that_can_be_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    slow = parameters(tmp_path / "p.yaml", real_time=True, step_ms=2, prefill_ms=2)
    more = ("--num_requests", "300", "--output_length", "20", "--concurrency", "8")
    command = arguments(run_dir, *more, "--runtime_params", slow)
    assert main([*command, "--max_duration", "0.5"]) == 0
    n = len(store.load(run_dir).columns.conversation_ids)
    assert 0 < n < 300
    assert "max_duration" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    run = store.load(run_dir)
    assert len(run.columns.conversation_ids) == 300
    assert len(run.manifest["sessions"]) == 2  # the cap was the first session's alone


class Learner(engines.null.NullEngine):
    """Notes what it is asked, and when it is told to forget."""

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self.events: list[str] = []

    def submit(self, request: Request) -> None:
        self.events.append(request.request_id.partition("-")[0])
        super().submit(request)

    def forget(self) -> None:
        self.events.append("forget")


def test_what_the_warm_up_taught_is_forgotten_before_anything_is_measured(tmp_path: Path) -> None:
    settings = from_dict(
        {"engine": "NULL", "random_isl": 4, "dataset": "random", "num_requests": 5,
         "output_length": 4, "concurrency": 2, "warmup": 3}
    )  # fmt: skip
    engine = Learner(settings.engine_settings())
    session.measure(settings, inputs.prepare(settings), engine, Target(tmp_path / "run"))
    assert engine.events == ["w"] * 3 + ["forget"] + ["s0"] * 5


# --- shards ---------------------------------------------------------------------------------------


def shard(directory: Path, text: str, *more: str) -> int:
    return main([*arguments(directory, "--num_requests", "31", "--output_length", "6",
                            "--concurrency", "2", *more), "--shard", text])  # fmt: skip


def test_shards_are_the_whole_and_are_reported_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [tmp_path / str(r) for r in range(3)]
    for r, directory in enumerate(parts):
        assert shard(directory, f"{r}/3") == 0
    assert main(arguments(tmp_path / "whole", "--num_requests", "31", "--output_length", "6",
                          "--concurrency", "2")) == 0  # fmt: skip
    whole = conversations(tmp_path / "whole")
    assert sum((conversations(part) for part in parts), Counter()) == whole
    assert [len(conversations(part)) for part in parts] == [11, 10, 10]
    manifests = [store.read_manifest(part) for part in parts]
    assert {m["prompts"]["fingerprint"] for m in manifests} == {
        store.read_manifest(tmp_path / "whole")["prompts"]["fingerprint"]
    }
    capsys.readouterr()
    assert main(["report", str(parts[1])]) == 0
    assert "10/10" in capsys.readouterr().out  # of its own share
    assert main(["report", "--merge", *map(str, parts), "--format", "json"]) == 0
    (arm,) = json.loads(capsys.readouterr().out)["arms"]
    (found,) = arm["runs"]
    assert (found["n_conversations"], found["n_steps"], found["status"]) == (31, 31 * 6, "complete")
    (category,) = found["acceptance"]["by_category"]
    assert (category["n_complete"], category["n_expected"]) == (31, 31)
    assert found["output_tps"]["whole"]["value"] is None
    assert "clock" in found["output_tps"]["whole"]["why_not"]
    assert main(["report", "--merge", str(parts[0]), str(parts[2])]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "10 conversation(s) have not been measured yet" in out  # a shard is not among them
    assert "21/31" in out


def test_what_is_no_shard_of_the_same_run_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, same = tmp_path / "a", tmp_path / "b"
    assert shard(first, "0/2") == 0
    assert shard(same, "0/2") == 0
    for name, more, word in (
        ("c", ("--top_p", "0.5"), "--top_p is 1.0 in the first and 0.5"),
        ("d", ("--seed", "9"), "--seed is 0 in the first and 9"),
        ("e", ("--max_seq_len", "500"), "max_seq_len is None in the first and 500"),
    ):
        assert shard(tmp_path / name, "1/2", *more) == 0
        capsys.readouterr()
        assert main(["report", "--merge", str(first), str(tmp_path / name)]) == 2
        assert word in capsys.readouterr().err
    assert shard(tmp_path / "f", "1/2") == 0
    for section, name, word in (
        ("prompts", "fingerprint", "the prompts' fingerprint"),
        ("dataset", "sha256", "the dataset's sha256"),
        ("environment", "gpus", "the list of GPUs"),
        ("engine", "version", "the engine's version"),
    ):
        manifest = store.read_manifest(tmp_path / "f")
        manifest[section][name] = [{"name": "another"}] if name == "gpus" else "another"
        copy = shutil.copytree(tmp_path / "f", tmp_path / f"other-{name}")
        store.write_manifest(copy, manifest)
        assert main(["report", "--merge", str(first), str(copy)]) == 2
        assert word in capsys.readouterr().err
    assert main(["report", "--merge", str(first), str(tmp_path / "f")]) == 0
    assert main(["report", "--merge", str(first), str(same)]) == 2
    assert "both hold the conversation" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_merged_run_is_an_arm_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafted = ("--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none")
    for r in "01":
        assert shard(tmp_path / f"base{r}", f"{r}/2") == 0
        assert shard(tmp_path / f"spec{r}", f"{r}/2", *drafted) == 0
    capsys.readouterr()
    arms = [["--merge", *(str(tmp_path / f"{arm}{r}") for r in "01")] for arm in ("spec", "base")]
    assert main(["report", *arms[0], *arms[1], "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ((compared,),) = [one["arms"] for one in found["comparisons"]]
    assert compared["overall"]["n_pairs"] == 31
    assert {arm["label"]: arm["is_baseline"] for arm in found["arms"]} == {
        "DRAFT_TARGET K=3": False,
        "baseline": True,
    }
    assert compared["output_tps"]["value"] is None


def test_a_shard_without_rows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(tmp_path / "run", "31/32") == 2
    assert "at most 31 shards" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- ends at awkward moments ----------------------------------------------------------------------


class Twisted(engines.null.NullEngine):
    """A null engine whose warm-up ends badly: what it learned cannot be dropped."""

    fault: Exception | None = None

    def forget(self) -> None:
        if self.fault is not None:
            raise self.fault
        super().forget()


@pytest.mark.parametrize("fault", [EngineDiedError("its GPU is gone"), ValueError("odd")])
def test_an_engine_that_does_not_outlive_its_warm_up_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    monkeypatch.setattr(engines.null, "NullEngine", Twisted)
    monkeypatch.setattr(Twisted, "fault", fault)
    assert main(arguments(tmp_path / "run", "--num_requests", "5")) == 1
    manifest = store.read_manifest(tmp_path / "run")
    assert manifest["status"] == "failed"
    assert str(fault) in manifest["sessions"][0]["message"]
    monkeypatch.setattr(Twisted, "fault", None)
    assert main(["run", "--resume", "--save_dir", str(tmp_path / "run")]) == 0
    assert set(conversations(tmp_path / "run").values()) == {1}
    assert len(conversations(tmp_path / "run")) == 5


def test_a_full_disk_is_told_even_where_the_manifest_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, write = tmp_path / "run", store.write_manifest

    def full(directory: Path, manifest: Mapping[str, Any]) -> None:
        if manifest["status"] != "running":
            raise OSError(28, "No space left on device")
        write(directory, manifest)

    monkeypatch.setattr(store, "write_manifest", full)
    assert main(arguments(run_dir, "--num_requests", "5")) == 2
    assert "how the run in" in (err := capsys.readouterr().err)
    assert "--resume" in err
    assert len(conversations(run_dir)) == 5

    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.Writer, "_write_part", no_room)
    assert main(arguments(tmp_path / "b", "--num_requests", "5")) == 2
    assert "5 finished conversation(s) are not stored" in capsys.readouterr().err

    monkeypatch.undo()
    assert main(["run", "--resume", "--save_dir", str(run_dir)]) == 0
    assert store.read_manifest(run_dir)["status"] == "complete"  # nothing was left to measure
    assert main(["run", "--resume", "--save_dir", str(tmp_path / "b")]) == 0
    assert len(conversations(tmp_path / "b")) == 5


def test_a_notice_after_the_last_row_leaves_a_complete_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noticed(engines.null.NullEngine):
        def poll(self) -> Sequence[Step]:
            steps = super().poll()
            if any(step.finish_reason is not None for step in steps):
                os.kill(os.getpid(), signal.SIGUSR1)
            return steps

    monkeypatch.setattr(engines.null, "NullEngine", Noticed)
    assert main(arguments(tmp_path / "r", "--num_requests", "1", "--warmup", "0")) == 138
    manifest = store.read_manifest(tmp_path / "r")
    assert manifest["status"] == "complete"
    assert manifest["sessions"][0]["end"] == "finished"


def test_a_run_that_another_process_made_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    """Between the look at the directory and the lock: the other has come, measured and gone."""
    assert main(arguments(tmp_path / "run", "--num_requests", "3")) == 0
    before = (tmp_path / "run" / "manifest.json").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        refuse_changed(Target(tmp_path / "run"))
    assert (tmp_path / "run" / "manifest.json").read_text() == before


def test_what_an_older_format_does_not_tell_of_its_engine_is_not_compared(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(run_dir, "--num_requests", "300", "--max_duration", "0.001")) == 0
    manifest = store.read_manifest(run_dir)
    assert manifest["status"] == "partial"
    del manifest["engine"]["fits_drafts"]  # as format 1 is
    for entry in manifest["sessions"]:
        del entry["replica"]
    store.write_manifest(run_dir, {**manifest, "format": 1})
    assert main(["run", "--resume", "--save_dir", str(run_dir)]) == 0
    assert set(conversations(run_dir).values()) == {1}
    assert len(conversations(run_dir)) == 300
    changed = {**store.read_manifest(run_dir), "status": "partial"}
    info = EngineInfo(**{**changed["engine"], "max_num_seqs": 999})
    with pytest.raises(UserError, match="max_num_seqs"):
        same_engine(info, Target(run_dir, manifest=changed))


@pytest.mark.parametrize("status", ["running", "partial", "failed"])
def test_a_run_that_holds_all_rows_is_complete_however_it_ended(
    tmp_path: Path, status: str
) -> None:
    """Such as one whose disk was full for its manifest alone."""
    directory = tmp_path / "r"
    assert main(arguments(directory, "--num_requests", "5", "--output_length", "4")) == 0
    manifest = store.read_manifest(directory)
    store.write_manifest(directory, {**manifest, "status": status})
    assert main(["run", "--save_dir", str(directory), "--resume"]) == 0
    assert store.read_manifest(directory)["status"] == "complete"
    assert len(conversations(directory)) == 5
