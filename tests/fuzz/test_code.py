"""What the source itself shows: YAML is loaded safely, no checkpoint's code is run unsaid."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from speedbench import checks, cli
from speedbench.config import RunConfig, from_dict
from speedbench.types import EngineSettings
from tests.builders import conversation, stored

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "run.py", *sorted((ROOT / "speedbench").rglob("*.py")),
         *sorted((ROOT / "engines").glob("*.py")),
         *sorted((ROOT / "scripts").glob("*.py"))]  # fmt: skip


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(name as it is written, call) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_yaml_is_loaded_safely() -> None:
    unsafe = ("unsafe_load", "full_load", "unsafe_load_all", "full_load_all", "load_all")
    for path in FILES:
        for name, call in calls(path):
            module, _, function = name.rpartition(".")
            if module.endswith("yaml"):
                assert function not in unsafe, f"{path}:{call.lineno}"
                if function == "load":  # the loader is a SafeLoader that refuses what is ambiguous
                    assert [ast.unparse(k.value) for k in call.keywords] == ["Loader"], path
                    source = path.read_text(encoding="utf-8")
                    assert "class Loader(yaml.SafeLoader)" in source, path


def test_nothing_is_unpickled_or_evaluated() -> None:
    """Tensors aside, which torch reads as tensors alone."""
    for path in FILES:
        for name, call in calls(path):
            where = f"{path}:{call.lineno}"
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), where
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name.endswith("torch.load"):
                assert given.get("weights_only") == "True", where
            if name.endswith(("numpy.load", "np.load")):
                assert given.get("allow_pickle", "False") == "False", where


@pytest.mark.parametrize("loaded", ["True", "'true'", "1"])
def test_a_checkpoints_code_is_run_only_where_it_was_asked_for(loaded: str) -> None:
    """No call in the source says so by itself."""
    for path in FILES:
        for name, call in calls(path):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) != loaded, f"{path}:{call.lineno} {name}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                        assert ast.unparse(value) != loaded, f"{path}:{node.lineno}"


def test_it_is_off_by_default() -> None:
    assert RunConfig.model_fields["trust_remote_code"].default is False
    assert EngineSettings("m").trust_remote_code is False
    assert from_dict({"engine": "NULL"}).trust_remote_code is False


def test_a_report_says_that_it_was_on(tmp_path: Path) -> None:
    records = [conversation("a", "math", [1, 4, 4])]
    quiet = stored(tmp_path / "off", records)
    loud = stored(tmp_path / "on", records, config={"trust_remote_code": True})
    said = [[c.sentence for c in checks.all_checks(run) if "--trust_remote_code" in c.sentence]
            for run in (quiet, loud)]  # fmt: skip
    assert list(map(len, said)) == [0, 1]


@pytest.mark.parametrize("command", ["run", "series", "tokens", "bucket"])
def test_a_terminal_says_so_before_anything_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command with the flag; none gets as far as a tokenizer here, for there is none."""
    empty = tmp_path / "model"
    empty.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "question_id": "1", "category": "x"}\n')
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"question_id": "1", "category": "low_entropy", "turns": ["a b c"]}\n')
    of_run = ["--engine", "NULL", "--model_dir", str(empty), "--dataset", "jsonl",
              "--dataset_path", str(rows), "--save_dir", str(tmp_path / "run")]  # fmt: skip
    argv = {
        "run": ["run", *of_run],
        "series": ["run", *of_run, "--repeat", "2"],
        "tokens": ["data", "tokens", *of_run[2:-2], "--out", str(tmp_path / "t.parquet")],
        "bucket": ["data", "bucket", "--from", str(pool), "--tokenizer", str(empty),
                   "--isl", "16", "--out", str(tmp_path / "b")],
    }[command]  # fmt: skip
    for flag in ([], ["--trust_remote_code"]):
        assert cli.main([*argv, *flag]) == 2
        err = capsys.readouterr().err
        assert "gives no tokenizer" in err
        assert err.count("warning: --trust_remote_code runs code") == len(flag)
        if flag:
            assert err.index("warning: --trust_remote_code") < err.index("gives no tokenizer")
