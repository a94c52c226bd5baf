"""What campaigns found, each by its smallest input: it stays mended whatever inputs are drawn."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speedbench import draft_vocabulary, manifest, store
from speedbench.checks import all_checks
from speedbench.config import RunConfig, from_dict, read_runtime_params
from speedbench.prompts import PromptEncoder, template_variables
from speedbench.store import Run
from speedbench.types import UserError
from tests import builders
from tests.builders import conversation, stored
from tests.fuzz import seeds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return stored(tmp_path / "run", [conversation(f"c{i}", "math", [1, 4, 2, 4]) for i in range(4)])


def change(run: Run, edit: Any) -> Path:
    path = run.directory / "manifest.json"
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))
    return path


def with_column(path: Path, name: str, values: Any) -> None:
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    column = None if values is None else pa.array(values, table.schema.field(place).type)
    table = (
        table.remove_column(place)
        if column is None
        else table.set_column(place, table.schema.field(place), column)
    )
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("time_ns", None, "have no time_ns"),  # parquet fills in nulls, numpy -2^63
        ("accepted", [None] + [1] * 15, "1 of its rows have no accepted"),
        ("n_tokens", [-1] + [1] * 15, "holds -1, expected at least 0"),
        ("n_tokens", [2**31 - 1] + [1] * 15, "expected at most"),  # a histogram of 16 GiB
        ("drafted", [-2] + [1] * 15, "holds -2, expected at least -1"),
        ("engine_steps", [2**31 - 1] + [1] * 15, "expected at most"),
    ],
)
def test_steps_that_lack_values_are_no_numbers(
    run: Run, column: str, values: list[int | None] | None, told: str
) -> None:
    with_column(run.directory / "steps/00000.parquet", column, values)
    found = store.load(run.directory)
    (sentence,) = found.damage
    assert told in sentence
    assert found.columns.n_requests == 0
    assert store.committed(run.directory) == {}  # --resume measures them again


def test_a_bit_that_turned_in_a_number_is_told(tmp_path: Path) -> None:
    """Compressed pages have checksums: without them a turned bit is another number, silently."""
    records = [conversation(f"c{i}", "math", [1, *[3] * 200]) for i in range(5)]
    whole = stored(tmp_path / "run", records)
    path = whole.directory / "steps/00000.parquet"
    data = path.read_bytes()
    n_told = 0
    end = len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # of the pages
    places = range(4, end, max(1, end // 100))
    assert len(places) >= 100
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        found = store.load(whole.directory)
        if found.damage:
            n_told += 1
        else:  # in what says nothing of the numbers
            assert (found.columns.time_ns == whole.columns.time_ns).all()
            assert (found.columns.n_tokens == whole.columns.n_tokens).all()
    assert n_told > 0.5 * len(places)


def test_steps_that_stand_twice_are_told(run: Run) -> None:
    path = run.directory / "steps/00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(2, 1)]), path)
    checks = [check.sentence for check in all_checks(store.load(run.directory))]
    assert any("not where their number says" in sentence for sentence in checks)


def test_turns_that_stand_twice_are_told(run: Run) -> None:
    path = run.directory / "turns/00000.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), path)
    checks = [check.sentence for check in all_checks(store.load(run.directory))]
    assert "1 turn(s) stand twice in the parts" in checks


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("engine.draft_length", 2**31),  # as wide as this is every histogram
        ("engine.draft_length", "3"),
        ("engine.draft_length", True),
        ("engine.settings", None),
        ("config.concurrency", 0),
        ("config.temperature", [0]),
        ("config.trust_remote_code", "no"),
        ("dataset.expected", {"math": "4"}),
        ("dataset.expected", {"math": -4}),
        ("sessions", [{"session": 0, "started_ns": 0}] * 2),
        ("sessions", [{"session": 0, "started_ns": 0, "ended_ns": 1.5}]),
        ("sessions", [{"session": 0, "started_ns": 0, "ended_ns": 1, "counters": {"drafts": 1}}]),
        ("sessions", ["0"]),
        ("refused", [{"id": 7, "reason": "x"}]),
        ("format", True),
        ("format", 0),
    ],
)
def test_a_manifest_of_another_form_is_refused_by_name(run: Run, path: str, value: Any) -> None:
    def edit(found: dict[str, Any]) -> None:
        *holders, name = path.split(".")
        for holder in holders:
            found = found[holder]
        found[name] = value

    where = change(run, edit)
    with pytest.raises(UserError) as refused:
        store.load(run.directory)
    assert str(where) in str(refused.value)
    last = path.rpartition(".")[2]
    assert last.rstrip("s") in str(refused.value)


def test_a_key_that_stands_twice_is_refused(run: Run) -> None:
    """Which of the two was meant, nobody knows."""
    path = run.directory / "manifest.json"
    path.write_text(path.read_text().replace('"status"', '"format": 1, "status"', 1))
    with pytest.raises(UserError, match="'format' stands twice"):
        store.load(run.directory)


def test_nesting_without_end_is_refused(run: Run) -> None:
    path = run.directory / "manifest.json"
    text = path.read_text()
    for depth, told in ((60, "within one another"), (100_000, "within one another")):
        path.write_text(text.replace('"bfloat16"', "[" * depth + "]" * depth))
        with pytest.raises(UserError, match=told):
            store.load(run.directory)


NINES = "".join(
    f"{c}: &{c} [{', '.join(9 * ['*' + p])}]\n"
    for p, c in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\n" + NINES,  # 9^9 values once its aliases are followed
        "a: &a {k: 1}\n" + NINES.replace("[", "{<<: [").replace("]", "]}"),
        "engine_args: &a {x: *a}\n",
    ],
    ids=["aliases", "merges", "itself"],
)
def test_a_page_of_yaml_does_not_fill_the_memory(text: str, tmp_path: Path) -> None:
    """In a process of its own, which may not take more than 4 GiB."""
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "from speedbench.config import read_runtime_params\n"
        "from speedbench.types import UserError\n"
        f"try:\n    read_runtime_params({str(path)!r})\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "stands for more than" in done.stdout, done.stderr


def test_a_yaml_that_is_only_long_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("engine_args:\n" + "".join(f"  k{i}: {i}\n" for i in range(3000)))
    assert len(read_runtime_params(str(path))["engine_args"]) == 3000


def test_a_token_id_that_nobody_gave_is_refused(tmp_path: Path) -> None:
    """The library counts up to it, for minutes."""
    seeds.tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"mat": 10', f'"mat": {2**31}'))
    assert str(2**31) in path.read_text()
    config = from_dict({"engine": "NULL", "model_dir": str(tmp_path)})
    with pytest.raises(UserError, match="has the token ID 2147483648"):
        PromptEncoder(config)


@pytest.mark.parametrize("held", [b"\xff\xfe\x00", b"process 1\x1b[2J\nmore", b"", b"x" * 10_000])
def test_a_lock_is_told_whatever_it_holds(held: bytes, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_bytes(held)
    with lock.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match="is being written by") as refused,
            store.locked(tmp_path),
        ):
            pass
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None]
)
def test_an_index_names_no_file_elsewhere(file: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    seeds.drafter(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"d2t": file}}))
    with pytest.raises(UserError, match="expected a file beside it"):
        draft_vocabulary.read(folder)


def test_a_vocabulary_of_a_run_that_nothing_holds_is_refused(tmp_path: Path) -> None:
    store.write_draft_vocabulary(tmp_path, np.array([1, 2**31 - 1]), {"n_tokens": None})
    with pytest.raises(UserError, match="expected at most"):
        draft_vocabulary.load(tmp_path)


def test_a_template_that_only_its_compiler_refuses_is_refused() -> None:
    with pytest.raises(UserError, match="not valid"):
        template_variables("{% for m in messages %}{% extends 'x' %}{% endfor %}", "here")


def test_every_field_of_a_configuration_is_looked_at() -> None:
    """One that is not named in `manifest` would reach a report in whatever form it was stored."""
    named = {*manifest.REQUIRED, *manifest.OPTIONAL}
    assert {f"config.{name}" for name in RunConfig.model_fields} <= named


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """Every default, and every field's other forms, pass."""
    path = tmp_path / "manifest.json"
    for values in ({}, {"max_duration": "90s", "warmup": 0, "shard": "0/2", "category": ["math"]}):
        whole = builders.manifest(config=values)
        manifest.refuse_damaged(json.loads(json.dumps(whole)), str(path))
