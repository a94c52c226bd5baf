"""What a user meets: help, and for every mistake one sentence, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speedbench.cli import main
from speedbench.config import RunConfig, from_dict
from speedbench.types import UserError

ROOT = Path(__file__).parent.parent
Mistake = Callable[[Path, Path], list[str]]
"""(a scratch folder, the calibration checkpoints) -> arguments of `run` beside the usual ones."""


def text_run(models: Path, *more: str) -> list[str]:
    return ["--engine", "NULL", "--tokenizer", str(models / "bpe" / "target"), *more]


def parquet(path: Path, columns: dict[str, list[object]]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def rows(n: int = 2, **changes: list[object]) -> dict[str, list[object]]:
    return {
        "question_id": [f"q{i}" for i in range(n)],
        "category": ["qa"] * n,
        "sub_category": [""] * n,
        "turns": [["hello there"]] * n,
        **changes,
    }


def corrupt(path: Path) -> str:
    whole = Path(parquet(path, rows()))
    whole.write_bytes(whole.read_bytes()[:-40])
    return str(whole)


def speed(build: Callable[[Path], str]) -> Mistake:
    return lambda tmp, models: text_run(
        models, "--dataset", "speed", "--dataset_path", build(tmp / "test.parquet")
    )


def other_vocabulary(tmp: Path, models: Path) -> list[str]:
    draft = tmp / "draft"
    shutil.copytree(models / "word" / "draft", draft)
    config = json.loads((draft / "config.json").read_text())
    config["vocab_size"] += 64
    (draft / "config.json").write_text(json.dumps(config))
    return [
        "--engine", "VLLM", "--model_dir", str(models / "word" / "target"), "--draft_model_dir",
        str(draft), "--speculative_algorithm", "DRAFT_TARGET", "--dataset", "calibration",
    ]  # fmt: skip


def vllm_arguments(yaml: str) -> Mistake:
    def build(tmp: Path, models: Path) -> list[str]:
        file = tmp / "p.yaml"
        file.write_text(yaml)
        return [
            "--engine", "VLLM", "--model_dir", str(models / "word" / "target"), "--dataset",
            "calibration", "--runtime_params", str(file),
        ]  # fmt: skip

    return build


def yaml_file(text: str) -> Mistake:
    def build(tmp: Path, models: Path) -> list[str]:
        file = tmp / "p.yaml"
        file.write_text(text)
        return ["--engine", "NULL", "--random_isl", "4", "--runtime_params", str(file)]

    return build


def without_template(tmp: Path, models: Path) -> list[str]:
    folder = tmp / "bare"
    shutil.copytree(models / "bpe" / "target", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return ["--engine", "NULL", "--tokenizer", str(folder), "--dataset", "mini"]


def foreign(tmp: Path) -> str:
    (tmp / "foreign.json").write_text('{"format": 1}')
    return str(tmp / "foreign.json")


def a_plan(tmp: Path) -> str:
    (tmp / "sweep.json").write_text('{"format": 1, "kind": "sweep", "spec": {}}')
    return str(tmp / "sweep.json")


def always(*arguments: str) -> Mistake:
    return lambda tmp, models: list(arguments)


NULL = ("--engine", "NULL", "--random_isl", "4")
MISTAKES: dict[str, tuple[Mistake, list[str]]] = {
    "no engine": (always("--model_dir", "x"), ["--engine", "VLLM"]),
    "unknown engine": (always("--engine", "VLM"), ["VLM", "VLLM"]),
    "no model named": (always("--engine", "VLLM"), ["--model_dir"]),
    "no such model": (
        always("--engine", "VLLM", "--model_dir", "./nowhere"), ["--model_dir", "./nowhere"]
    ),
    "no such draft": (
        lambda tmp, models: ["--engine", "VLLM", "--model_dir", str(models / "word/target"),
                             "--draft_model_dir", "./nowhere", "--speculative_algorithm", "EAGLE3"],
        ["--draft_model_dir", "./nowhere"],
    ),
    "a model folder without a checkpoint": (
        lambda tmp, models: ["--engine", "VLLM", "--model_dir", str(tmp)], ["config.json"]
    ),
    "draft without algorithm": (
        always(*NULL, "--draft_model_dir", "d"), ["--speculative_algorithm", "EAGLE3"]
    ),
    "algorithm without draft": (
        always(*NULL, "--speculative_algorithm", "DRAFT_TARGET"), ["--draft_model_dir"]
    ),
    "another vocabulary": (other_vocabulary, ["vocabulary"]),
    "algorithm the engine lacks": (
        always(*NULL, "--speculative_algorithm", "NGRAM"), ["NGRAM", "DRAFT_TARGET"]
    ),
    "unknown algorithm": (always(*NULL, "--speculative_algorithm", "EAGLE9"), ["EAGLE9", "EAGLE3"]),
    "K = 0": (
        always(*NULL, "--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "d",
               "--draft_length", "0"),
        ["--draft_length", "0", "NONE"],
    ),
    "K negative": (always(*NULL, "--draft_length", "-2"), ["--draft_length", "-2"]),
    "shard that is none": (always(*NULL, "--shard", "4/4"), ["--shard", "4/4", "0/4"]),
    "shard in words": (always(*NULL, "--shard", "first"), ["--shard", "first"]),
    "concurrency 0": (always(*NULL, "--concurrency", "0"), ["--concurrency"]),
    "concurrency no number": (always(*NULL, "--concurrency", "many"), ["--concurrency", "many"]),
    "no such dataset": (
        lambda tmp, models: text_run(
            models, "--dataset", "speed", "--dataset_path", "none.parquet"
        ),
        ["none.parquet"],
    ),
    "unknown dataset": (always(*NULL, "--dataset", "humaneval"), ["humaneval", "speed"]),
    "empty parquet": (speed(lambda p: parquet(p, rows(0))), ["test.parquet"]),
    "corrupt parquet": (speed(corrupt), ["test.parquet"]),
    "row without turns": (speed(lambda p: parquet(p, rows(turns=[["a"], []]))), ["row 2", "turns"]),
    "sentinel": (
        speed(lambda p: parquet(p, rows(turns=[["a"], [
            "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH | x"]]))),
        ["speedbench prepare"],
    ),
    "unknown category": (
        lambda tmp, models: text_run(models, "--dataset", "mini", "--category", "cooking"),
        ["cooking", "coding"],
    ),
    "more rows than there are": (
        lambda tmp, models: text_run(models, "--dataset", "mini", "--num_requests", "9999"),
        ["9999"],
    ),
    "no chat template": (without_template, ["--completions"]),
    "template variable that is not there": (
        lambda tmp, models: [*text_run(models), *yaml_file("chat_template_args: {thinking: 1}")(
            tmp, models)[4:]],
        ["thinking"],
    ),
    "every row too long": (
        always(*NULL, "--max_seq_len", "8", "--output_length", "100"), ["limit", "--output_length"]
    ),
    "text without tokenizer": (always("--engine", "NULL"), ["--tokenizer"]),
    "null engine argument": (yaml_file("engine_args: {speed: 3}"), ["speed", "step_ms"]),
    "unknown vLLM argument": (
        vllm_arguments("engine_args: {enforce_eagre: true}"), ["enforce_eagre", "enforce_eager"]
    ),
    "unknown vLLM sampling parameter": (
        vllm_arguments("sampling_kwargs: {min_pee: 0.1}"), ["min_pee", "min_p"]
    ),
    "infinite temperature": (always(*NULL, "--temperature", "inf"), ["--temperature", "inf"]),
    "yaml with NaN": (yaml_file("engine_args: {x: .nan}"), ["finite"]),
    "yaml with a key twice": (
        yaml_file("engine_args: {step_ms: 1, step_ms: 2}"), ["'step_ms' stands twice"]
    ),
    "yaml that contains itself": (yaml_file("engine_args: &a {x: *a}"), ["contain itself"]),
    "null engine argument of another type": (yaml_file("engine_args: {step_ms: abc}"), ["step_ms"]),
    "empty category": (always(*NULL, "--category", ""), ["--category"]),
    "vLLM's own slots": (vllm_arguments("engine_args: {max_num_seqs: 256}"), ["--concurrency"]),
    "config of something else": (
        lambda tmp, models: ["--config", foreign(tmp)], ["foreign.json", "status"]
    ),
    "yaml section": (yaml_file("engine: {a: 1}"), ["engine", "engine_args"]),
    "yaml broken": (yaml_file("engine_args: ["), ["YAML"]),
    "yaml is a list": (yaml_file("[1, 2]"), ["list"]),
    "yaml missing": (always(*NULL, "--runtime_params", "./none.yaml"), ["./none.yaml"]),
    "unknown flag": (
        always(*NULL, "--temprature", "1"), ["no --temprature", "did you mean --temperature"]
    ),
    "unknown flag with its value": (
        always(*NULL, "--draft-lenght=3"), ["no --draft_lenght: did you mean --draft_length"]
    ),
    "unknown flag like none": (always(*NULL, "--xyzzy"), ["no --xyzzy: see --help"]),
    "config of several runs": (
        lambda tmp, models: ["--config", a_plan(tmp)], ["several runs", "speedbench sweep --config"]
    ),
    "resume without directory": (always(*NULL, "--resume"), ["--save_dir"]),
    "config that is none": (always("--config", "./none/manifest.json"), ["manifest"]),
    "frozen without replies": (always(*NULL, "--history", "frozen"), ["--history_from"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, words = MISTAKES[name]
    save_dir = tmp_path / "run"
    arguments = build(tmp_path, models)
    if "--resume" not in arguments:
        arguments += ["--save_dir", str(save_dir)]
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    assert not save_dir.exists(), "a mistake must leave nothing behind"


def test_an_existing_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "something.txt").write_text("mine")
    assert main(["run", *NULL, "--save_dir", str(tmp_path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["something.txt"]


def test_a_mistake_shows_no_traceback_in_a_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "--engine", "VLLM", "--model_dir", "./nowhere"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_no_arguments_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"], prog="run.py") == 0
    out = capsys.readouterr().out
    assert "run.py --engine VLLM" in out
    assert "--help" in out


def test_hyphens_and_underscores_mean_the_same(tmp_path: Path) -> None:
    common = ["--num-requests", "3", "--output-length=4"]
    for name, isl in (("a", "--random-isl"), ("b", "--random_isl")):
        run = ["run", "--engine", "null", isl, "4", *common, "--save-dir", str(tmp_path / name)]
        assert main(run) == 0
    read = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in "ab"]
    assert read[0]["prompts"] == read[1]["prompts"]
    assert read[0]["config"]["output_length"] == 4


def test_words_of_a_flag_are_taken_in_any_case(tmp_path: Path) -> None:
    draft = ["--speculative_algorithm", "draft_target", "--draft_model_dir", "d"]
    common = ["--random_isl", "4", "--num_requests", "2", "--output_length", "4"]
    where = ["--save_dir", str(tmp_path / "run")]
    assert main(["run", "--engine", "null", *draft, "--order", "Dataset", *common, *where]) == 0
    config = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    assert config["speculative_algorithm"] == "DRAFT_TARGET"
    assert config["order"] == "dataset"
    asked = from_dict({"engine": "NULL", "speculative_algorithm": "ngram", "model_dir": "x"})
    assert asked.speculative_algorithm == "NGRAM"


def test_one_name_where_a_list_belongs_is_told_as_such() -> None:
    with pytest.raises(UserError, match=r"--category is 7, expected a list: \[7\]$"):
        from_dict({"engine": "NULL", "category": 7})


def test_help_names_the_engines(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "sweep", "calibrate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert "VLLM, SGLANG, TRTLLM" in out, command


def test_every_flag_of_the_field_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    out = capsys.readouterr().out
    flags = """engine model_dir tokenizer draft_model_dir speculative_algorithm draft_length
        block_size dataset dataset_path mtbench specbench random_isl num_requests category
        output_length concurrency tp_size pp_size dp_size ep_size max_seq_len temperature top_p
        top_k seed ignore_eos completions postprocess runtime_params trust_remote_code
        show_progress save_dir warmup order prefix_cache history max_duration resume config
        shard capture_experts"""
    for flag in flags.split():
        assert f"--{flag}" in out, flag


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "engine_args: {step_ms: 5}\nsampling_kwargs: {temperature: 0.5, top_p: 0.9}\n"
        "dataset_kwargs: {n_rows: 3}\n"
    )
    run = ["run", *NULL, "--output_length", "2", "--runtime_params", str(file)]
    assert main([*run, "--temperature", "0.25", "--save_dir", str(tmp_path / "r")]) == 0
    config = json.loads((tmp_path / "r" / "manifest.json").read_text())["config"]
    assert (config["temperature"], config["top_p"]) == (0.25, 0.9)
    assert config["engine_args"] == {"step_ms": 5}
    assert config["sampling_kwargs"] == {}


def test_a_configuration_survives_json() -> None:
    config = from_dict(
        {"engine": "VLLM", "model_dir": "m", "category": ["a", "b"], "max_duration": "30m",
         "engine_args": {"x": [1, {"y": None}]}}
    )  # fmt: skip
    assert config.max_duration == 1800
    assert from_dict(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert RunConfig.model_fields.keys() == config.model_dump().keys()


SWALLOWED = """
import signal, time
from speedbench.cli_base import signals_handled

class Dropped:
    def __del__(self):
        signal.raise_signal({number})

with signals_handled():
    Dropped()
    {then}
print("went on")
"""


@pytest.mark.parametrize("then", ["time.sleep(60)", "pass"], ids=["while it runs", "at its end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_destructor_ends_it_all_the_same(number: signal.Signals, then: str) -> None:
    """Python drops what is raised there, the end of the process with it."""
    script = SWALLOWED.format(number=int(number), then=then)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          timeout=30, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr.split("\n") == ["", f"speedbench: ended by {number.name}", ""]


FOREIGN = """
import signal, sys, time
from speedbench.cli_base import signals_handled

class Foreign:
    def __del__(self):
        sys.exit(7)

with signals_handled() as signals, signals.graceful():
    signal.raise_signal(signal.SIGINT)
    Foreign()
    time.sleep(0.1)
    print("stopped in order")
"""


def test_what_others_raise_in_a_destructor_is_not_taken_for_a_signal() -> None:
    done = subprocess.run([sys.executable, "-c", FOREIGN], cwd=ROOT, capture_output=True, text=True,
                          timeout=30, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "stopped in order\n")
