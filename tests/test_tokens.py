"""Token files: the same prompts, to the fingerprint, without a tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speedbench import cli, cli_base, inputs, store
from speedbench.config import from_dict
from speedbench.datasets import tokens
from speedbench.types import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def single(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The single-turn rows of two categories of the calibration prompts, as a file of their own."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (models / "word/target/calibration_prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    kept = [r for r in rows if len(r["turns"]) == 1 and r["category"] in ("coding", "math")]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


@pytest.fixture(scope="module")
def made(models: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "F.parquet"
    argv = ["data", "tokens", "--model_dir", str(models / "word/target"), "--dataset", "jsonl",
            "--dataset_path", str(single), "--out", str(out)]  # fmt: skip
    assert cli.main(argv) == cli_base.OK
    return out


def test_the_same_fingerprint_and_end_as_from_text(models: Path, single: Path, made: Path) -> None:
    text = inputs.prepare(
        from_dict({"engine": "NULL", "model_dir": str(models / "word/target"), "dataset": "jsonl",
                   "dataset_path": str(single)})
    )  # fmt: skip
    encoded = inputs.prepare(from_dict({"engine": "NULL", "prompts": str(made)}))
    assert encoded.fingerprint == text.fingerprint
    assert encoded.stop_token_ids == text.stop_token_ids != ()
    assert encoded.dataset.sha256 == text.dataset.sha256
    assert dict(encoded.expected) == dict(text.expected) == {"coding": 20, "math": 20}
    for key, prompt in text.prompts.items():
        assert list(encoded.prompts[key].token_ids) == list(prompt.token_ids)


def test_a_run_loads_no_tokenizer(made: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom speedbench.cli import main\n"
        f"code = main(['run', '--engine', 'NULL', '--prompts', {str(made)!r}, '--num_requests', "
        f"'6', '--output_length', '4', '--save_dir', {str(tmp_path / 'run')!r}])\n"
        "assert not {'transformers', 'tokenizers'} & set(sys.modules), 'a tokenizer was loaded'\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = store.load(tmp_path / "run")
    assert run.manifest["status"] == "complete"
    assert len(run.columns.conversation_ids) == 6
    assert run.manifest["dataset"]["name"] == "jsonl"


def test_turns_that_depend_on_replies_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "tokens", "--model_dir", str(models / "word/target"), "--dataset",
            "calibration", "--out", str(tmp_path / "F.parquet")]  # fmt: skip
    assert cli.main(argv) == cli_base.USAGE
    assert "22 conversation(s)" in capsys.readouterr().err
    assert not (tmp_path / "F.parquet").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokenizer", "x"], "--tokenizer has no effect"),
        (["--completions"], "--completions has no effect"),
        (["--dataset_path", "x"], "--dataset_path has no effect"),
    ],
)
def test_flags_of_the_encoding_are_refused(
    made: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert cli.main(["run", "--engine", "NULL", "--prompts", str(made), *flags]) == cli_base.USAGE
    assert words in capsys.readouterr().err


def test_a_changed_or_foreign_file_is_refused(made: Path, tmp_path: Path) -> None:
    table = pq.read_table(made)
    ids = table["token_ids"].to_pylist()
    ids[3] = [*ids[3][:-1], ids[3][-1] + 1]
    at = table.schema.get_field_index("token_ids")
    changed = table.set_column(at, "token_ids", pa.array(ids, pa.list_(pa.int32())))
    pq.write_table(changed, tmp_path / "changed.parquet")
    with pytest.raises(UserError, match="was changed"):
        tokens.read(tmp_path / "changed.parquet")
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="is no token file"):
        tokens.read(tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="does not exist"):
        tokens.read(tmp_path / "nothing.parquet")


def test_the_tokens_of_another_model_are_refused(made: Path, models: Path) -> None:
    other = {"engine": "NULL", "prompts": str(made), "model_dir": str(models / "bpe/target")}
    with pytest.raises(UserError, match=r"whose tokenizer\.json is not that of"):
        inputs.prepare(from_dict(other))
    same = {**other, "model_dir": str(models / "word/target")}
    assert inputs.prepare(from_dict(same)).encoder is None


def test_an_existing_file_is_not_replaced(
    models: Path, single: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = made.read_bytes()
    argv = ["data", "tokens", "--model_dir", str(models / "word/target"), "--dataset", "jsonl",
            "--dataset_path", str(single), "--out", str(made)]  # fmt: skip
    assert cli.main(argv) == cli_base.USAGE
    assert "choose another --out" in capsys.readouterr().err
    assert made.read_bytes() == before
