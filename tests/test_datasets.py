"""Datasets: every format read, every fault named, and the rows of a run chosen evenly."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import speedbench.datasets as datasets
from speedbench.config import RunConfig
from speedbench.datasets import Dataset, load, select
from speedbench.types import Conversation, UserError

Row = Mapping[str, object]


def config(dataset: Any, path: Path | str | None = None, **fields: Any) -> RunConfig:
    given_path = None if path is None else str(path)
    return RunConfig(engine="NULL", dataset=dataset, dataset_path=given_path, **fields)


def row(number: int, **fields: object) -> dict[str, object]:
    turns = [f"question {number}", f"follow-up {number}"][: 1 + number % 2]
    return {
        "question_id": f"q{number}",
        "category": "coding",
        "sub_category": "python",
        "turns": turns,
        "multiturn": len(turns) > 1,
        **fields,
    }


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows]), path)
    return path


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def refused(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The formats


def test_speed_parquet_keeps_order_turns_and_sub_categories(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet", [row(2), row(1, category="math"), row(0)])
    dataset = load(config("speed", path))
    assert dataset.name == "speed"
    assert dataset.path == str(path)
    assert dataset.rows == (
        Conversation("q2", "coding", ("question 2",), sub_category="python"),
        Conversation("q1", "math", ("question 1", "follow-up 1"), sub_category="python"),
        Conversation("q0", "coding", ("question 0",), sub_category="python"),
    )


def test_speed_folder_prefers_test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "other.parquet", [row(5)])
    write_parquet(tmp_path / "test.parquet", [row(1)])
    assert [r.id for r in load(config("speed", tmp_path)).rows] == ["q1"]


def test_speed_folder_of_parts_is_read_in_name_order(tmp_path: Path) -> None:
    for part in (4, 1, 5, 0, 3, 2):
        write_parquet(
            tmp_path / f"test-0000{part}-of-00006.parquet", [row(9 - part), row(20 + part)]
        )
    expected = ["q9", "q20", "q8", "q21", "q7", "q22", "q6", "q23", "q5", "q24", "q4", "q25"]
    assert [r.id for r in load(config("speed", tmp_path)).rows] == expected


def test_speed_default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "DEFAULT_SPEED", tmp_path / "qualitative")
    message = refused(config("speed"))
    assert "qualitative does not exist" in message
    assert "`speedbench prepare --dataset speed --config qualitative`" in message
    assert "--dataset_path" in message
    write_parquet(tmp_path / "qualitative" / "test.parquet", [row(4)])
    assert [r.id for r in load(config("speed")).rows] == ["q4"]


def test_specbench_ids_may_be_numbers(tmp_path: Path) -> None:
    rows = [{"question_id": 81, "category": "writing", "turns": ["a", "b"]}]
    path = write_jsonl(tmp_path / "question.jsonl", rows)
    expected = (Conversation("81", "writing", ("a", "b")),)
    assert load(config("specbench", path)).rows == expected
    assert load(config("specbench", tmp_path)).rows == expected


def test_mtbench_in_both_spellings(tmp_path: Path) -> None:
    original = {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": []}
    hub = {"prompt_id": 82, "category": "math", "prompt": ["c", "d"], "reference": ["x"]}
    path = write_jsonl(tmp_path / "mt.jsonl", [original, hub])
    assert load(config("mtbench", path)).rows == (
        Conversation("81", "writing", ("a", "b")),
        Conversation("82", "math", ("c", "d")),
    )


def test_own_jsonl_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        '{"turns": ["a", "b"]}',
        "",
        '{"prompt": "c", "category": "x", "question_id": 7}',
        '{"messages": [{"role": "user", "content": "d"}, {"role": "user", "content": "e"}]}',
        '{"turns": null, "prompt": "f", "category": null}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load(config("jsonl", path)).rows == (
        Conversation("1", "default", ("a", "b")),
        Conversation("7", "x", ("c",)),
        Conversation("4", "default", ("d", "e")),
        Conversation("5", "default", ("f",)),
    )


def test_own_jsonl_with_renamed_fields(tmp_path: Path) -> None:
    rows = [
        {"uid": "a", "domain": "x", "text": "one", "turns": ["not this"]},
        {"uid": "b", "domain": "y", "text": ["one", "two"]},
    ]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    names = {"id_field": "uid", "category_field": "domain", "turns_field": "text"}
    assert load(config("jsonl", path, dataset_kwargs=names)).rows == (
        Conversation("a", "x", ("one",)),
        Conversation("b", "y", ("one", "two")),
    )
    for missing in ("id_field", "category_field", "turns_field"):  # who names a field has it
        message = refused(config("jsonl", path, dataset_kwargs={**names, missing: "topic"}))
        assert "line 1 has no topic (found: uid, domain, text, turns)" in message


def test_jsonl_text_may_hold_any_character(tmp_path: Path) -> None:
    odd = 'a\u2028b\x85c\u00e9\U0001f600 / "quoted" \\ \n\r\t\x00'
    line = json.dumps({"question_id": odd, "category": odd, "turns": [odd]}, ensure_ascii=False)
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line.encode("utf-8") + b"\r\n")  # as Windows saves it
    assert load(config("jsonl", path)).rows == (Conversation(odd, odd, (odd,)),)


def test_mini_and_calibration_are_speed_rows_in_jsonl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = (Conversation("q1", "coding", ("question 1", "follow-up 1"), sub_category="python"),)
    write_jsonl(tmp_path / "prompts.jsonl", [row(1)])
    write_jsonl(tmp_path / "calibration_prompts.jsonl", [row(1)])
    monkeypatch.setattr(datasets, "DEFAULT_MINI", tmp_path)
    assert load(config("mini")).rows == expected
    assert load(config("mini", tmp_path / "prompts.jsonl")).rows == expected
    assert load(config("calibration", tmp_path)).rows == expected
    assert load(config("calibration", tmp_path / "calibration_prompts.jsonl")).rows == expected
    assert load(config("calibration", model_dir=str(tmp_path))).rows == expected
    (tmp_path / "empty").mkdir()
    assert load(config("calibration", tmp_path, model_dir=str(tmp_path / "empty"))).rows == expected


def test_shipped_mini_has_eleven_categories() -> None:
    categories = Counter(r.category for r in load(config("mini")).rows)
    assert len(categories) == 11
    assert min(categories.values()) >= 8


# Random tokens


def random_config(n: int | None = None, isl: int = 50, seed: int = 0, **kwargs: Any) -> RunConfig:
    return config("random", random_isl=isl, num_requests=n, seed=seed, dataset_kwargs=kwargs)


def test_random_rows_have_the_length_and_count_asked_for() -> None:
    dataset = load(random_config(5, isl=17), range(1000, 1010))
    assert dataset.path == ""
    assert [r.id for r in dataset.rows] == ["0", "1", "2", "3", "4"]
    assert {r.category for r in dataset.rows} == {"random"}
    assert [len(turn) for r in dataset.rows for turn in r.token_turns] == [17] * 5
    assert len(load(random_config(), [1]).rows) == 64
    assert len(load(random_config(n_rows=9), [1]).rows) == 9


def test_random_tokens_are_uniform_over_the_vocabulary() -> None:
    vocabulary = [3, 5, 7, 11, 13, 17, 19, 23]
    dataset = load(random_config(20, isl=1000), vocabulary)
    counts = Counter(token for r in dataset.rows for token in r.token_turns[0])
    assert set(counts) == set(vocabulary)
    # 20,000 draws over 8 tokens: 2,500 each, standard deviation 46.8; five of them.
    assert all(abs(n - 2500) < 234 for n in counts.values())
    assert all(type(token) is int for token in dataset.rows[0].token_turns[0])


def test_random_rows_depend_on_the_seed_and_not_on_their_number() -> None:
    vocabulary = range(500)
    few, many = load(random_config(3), vocabulary), load(random_config(8), vocabulary)
    assert many.rows[:3] == few.rows
    assert load(random_config(3, seed=1), vocabulary).rows != few.rows
    assert len({r.token_turns for r in many.rows}) == 8


def test_random_needs_a_vocabulary_and_reads_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        load(random_config())
    path = config("random", tmp_path, random_isl=4)
    assert "reads no file" in refused(path)


# The identity of a dataset


def test_sha256_is_over_canonical_json() -> None:
    rows = (
        Conversation("1", "c", ("a", "é"), sub_category="s"),
        Conversation("2", "d", token_turns=((5, 6),)),
    )
    text = (
        '{"category":"c","id":"1","sub_category":"s","turns":["a","\\u00e9"]}\n'
        '{"category":"d","id":"2","sub_category":"","token_turns":[[5,6]]}\n'
    )
    assert datasets.identity.rows_sha256(rows) == hashlib.sha256(text.encode()).hexdigest()


def test_sha256_is_of_the_content_and_not_of_the_file(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", [row(1), row(2)])
    jsonl = write_jsonl(tmp_path / "b.jsonl", [row(1, source="elsewhere"), row(2)])
    same = load(config("speed", parquet)).sha256
    assert load(config("jsonl", jsonl)).sha256 == same
    for change in ({"question_id": "x"}, {"category": "x"}, {"turns": ["x"]}, {"sub_category": ""}):
        write_jsonl(jsonl, [row(1), row(2, **change)])
        assert load(config("jsonl", jsonl)).sha256 != same
    write_jsonl(jsonl, [row(2), row(1)])
    assert load(config("jsonl", jsonl)).sha256 != same


# Faults: the same sentences for both file formats

WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "speed": lambda folder, rows: write_parquet(folder / "test.parquet", rows),
    "mini": lambda folder, rows: write_jsonl(folder / "prompts.jsonl", rows),
}


@pytest.fixture(params=WRITERS)
def refuse_rows(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Sequence[Row]], str]:
    """Writes rows as parquet or JSONL and returns the sentence they are refused with."""
    name = request.param

    def refuse(rows: Sequence[Row]) -> str:
        path = WRITERS[name](tmp_path, rows)
        message = refused(config(name, path))
        assert str(path) in message
        return message.replace("line", "row")

    return refuse


RefuseRows = Callable[[Sequence[Row]], str]


def test_empty_list_of_turns(refuse_rows: RefuseRows) -> None:
    message = refuse_rows([row(1), row(2, turns=[])])
    assert "row 2 has no turns ('turns' is empty), expected at least one" in message
    assert "remove it" in message


@pytest.mark.parametrize("value", [None, "a text", 5])
def test_turns_that_are_no_list(tmp_path: Path, value: object) -> None:
    path = write_parquet(tmp_path / "test.parquet", [row(1, turns=value)])
    message = refused(config("speed", path))
    write_jsonl(tmp_path / "prompts.jsonl", [row(1, turns=value)])
    assert refused(config("mini", tmp_path)).partition(", line")[2] == message.partition(", row")[2]
    if value is None:
        assert "row 1 has no turns (found: question_id, category, sub_category" in message
    else:
        assert f"row 1 has {value!r} as 'turns', expected a list of strings" in message
        assert "mend the row" in message


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_blank_turn(refuse_rows: RefuseRows, blank: str) -> None:
    message = refuse_rows([row(2), row(1, turns=["fine", blank])])
    assert f"row 2, turn 2 is blank ({blank!r}), expected text: fill it in" in message


def test_turn_of_another_type(refuse_rows: RefuseRows) -> None:
    message = refuse_rows([row(1, turns=[["nested"]])])
    assert "row 1 has ['nested'] as 'turn 1', expected a string: mend the row" in message


def test_duplicate_id(refuse_rows: RefuseRows) -> None:
    message = refuse_rows([row(1), row(2), row(3, question_id="q1")])
    assert "row 3 repeats the id 'q1' of " in message
    assert "row 1: give every row an id of its own" in message


def test_ids_that_differ_in_type_only_are_duplicates(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [row(1, question_id=7), row(2, question_id="7")])
    assert "line 2 repeats the id '7'" in refused(config("mini", tmp_path))


@pytest.mark.parametrize("column", ["category", "question_id", "turns"])
def test_missing_column(refuse_rows: RefuseRows, column: str) -> None:
    rows = [{k: v for k, v in row(1).items() if k != column}]
    message = refuse_rows(rows)
    assert f"row 1 has no {column} (found: " in message
    assert "sub_category" in message
    assert ": give " in message


@pytest.mark.parametrize("column", ["category", "question_id"])
@pytest.mark.parametrize("value", [1.5, True, ["x"]])
def test_wrong_type(refuse_rows: RefuseRows, column: str, value: object) -> None:
    message = refuse_rows([row(1, **{column: value})])
    assert f"row 1 has {value!r} as '{column}', expected a string" in message
    assert "mend the row" in message


def test_long_values_are_shown_in_part(refuse_rows: RefuseRows) -> None:
    assert len(refuse_rows([row(1, category=["x" * 10_000])])) < 400


def test_lone_surrogate(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [row(1, turns=["bad \ud83d end"])])
    message = refused(config("mini", tmp_path))
    assert "the lone surrogate '\\ud83d' in 'turn 1'" in message
    assert message.encode("utf-8")


@pytest.mark.parametrize(
    ("folder", "named"),
    [("throughput_8k", "throughput_8k"), ("qualitative", "qualitative"), ("mine", "qualitative")],
)
def test_unresolved_source_names_its_command(tmp_path: Path, folder: str, named: str) -> None:
    sentinel = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
    rows = [row(0), row(1, turns=["fine", f"{sentinel}: src_7"])]
    write_parquet(tmp_path / folder / "test.parquet", rows)
    message = refused(config("speed", tmp_path / folder))
    assert "row 2, turn 2 is still a placeholder" in message
    assert message.endswith(f"run `speedbench prepare --dataset speed --config {named}`")


def test_own_jsonl_refuses_other_roles_and_strings_as_turns(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_jsonl(path, [{"messages": [{"role": "system", "content": "a"}]}])
    message = refused(config("jsonl", path))
    assert "line 1, message 1 has the role 'system', expected 'user' only" in message
    assert "remove" in message
    write_jsonl(path, [{"turns": "a text"}])
    assert "line 1 has 'a text' as 'turns', expected a list" in refused(config("jsonl", path))
    write_jsonl(path, [{"text": "a"}])
    message = refused(config("jsonl", path))
    assert "line 1 has no turns or prompt or messages (found: text)" in message


# Faults of files


@pytest.mark.parametrize("name", ["speed", "specbench", "mtbench", "jsonl", "mini"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    message = refused(config(name, tmp_path / "none.data"))
    assert f"{tmp_path / 'none.data'} does not exist" in message
    assert "--dataset_path" in message


@pytest.mark.parametrize("name", ["specbench", "mtbench", "jsonl"])
def test_missing_path(name: str) -> None:
    assert f"--dataset {name} needs its JSONL file" in refused(config(name))
    assert "add --dataset_path FILE" in refused(config(name))


def test_folder_for_own_jsonl(tmp_path: Path) -> None:
    message = refused(config("jsonl", tmp_path))
    assert f"{tmp_path} is a folder, expected a JSONL file: name the file" in message


def test_folder_without_parquet(tmp_path: Path) -> None:
    message = refused(config("speed", tmp_path))
    assert f"{tmp_path} holds no parquet file, expected test.parquet: give another" in message
    for name in ("throughput_1k", "qualitative"):
        write_parquet(tmp_path / name / "test.parquet", [row(1)])
    message = refused(config("speed", tmp_path))
    assert "give one of the folders in it (qualitative, throughput_1k)" in message


def test_empty_parquet(tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    pq.write_table(pa.Table.from_pylist([row(1)]).slice(0, 0), path)
    assert f"{path} holds 0 rows: fetch or prepare" in refused(config("speed", tmp_path))


def test_empty_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n \n", encoding="utf-8")
    assert f"{path} holds 0 rows: write one JSON object" in refused(config("jsonl", path))


def test_corrupt_or_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "test.parquet", [row(n) for n in range(200)])
    whole = path.read_bytes()
    damaged = [b"", b"PAR1", b'{"turns": ["a"]}\n', whole[:-1], whole[: len(whole) // 2]]
    damaged.append(whole[:4] + b"\xff" * 400 + whole[404:])
    for content in damaged:
        path.write_bytes(content)
        message = refused(config("speed", path))
        assert f"{path} cannot be read as parquet (" in message
        assert "fetch or prepare the file again; for JSON lines use --dataset jsonl" in message


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    message = refused(config("jsonl", path))
    assert f"{path}, line 2 is not UTF-8 (byte 0xe9): save the file as UTF-8" in message


@pytest.mark.parametrize("line", ['{"prompt": "a"', "[" * 100_000, "{'prompt': 'a'}"])
def test_invalid_json_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + "\n", encoding="utf-8")
    message = refused(config("jsonl", path))
    assert f"{path}, line 3 is not JSON (" in message
    assert "mend or remove the line" in message


def test_json_line_that_is_no_object(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [["a"]])
    message = refused(config("jsonl", path))
    assert f"{path}, line 1 holds a list, expected an object" in message


def test_calibration_without_prompts(tmp_path: Path) -> None:
    assert "add --model_dir or --dataset_path" in refused(config("calibration"))
    message = refused(config("calibration", model_dir=str(tmp_path)))
    assert f"{tmp_path} holds no calibration_prompts.jsonl" in message
    assert "`speedbench calibrate`" in message


# Options of the reader


def test_unknown_option_lists_the_known_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "a"}])
    message = refused(config("jsonl", path, dataset_kwargs={"id_feild": "x"}))
    assert "--dataset jsonl has no option 'id_feild'" in message
    assert "id_field, category_field, turns_field" in message
    assert "dataset_kwargs are n_rows" in refused(random_config(rows=3))
    assert "dataset_kwargs are none" in refused(config("speed", path, dataset_kwargs={"a": 1}))


def test_option_of_the_wrong_type(tmp_path: Path) -> None:
    message = refused(config("jsonl", tmp_path, dataset_kwargs={"id_field": 3}))
    assert "id_field is 3, expected the name of a field" in message
    for bad in (0, "9", True, 2.0):
        assert f"n_rows is {bad!r}, expected a number of at least 1" in refused(
            random_config(n_rows=bad)
        )


# Selection


def dataset_of(sizes: Mapping[str, int]) -> Dataset:
    """Sorted by category, as the benchmark's file is."""
    rows = tuple(Conversation(f"{c}{i}", c, ("?",)) for c, n in sizes.items() for i in range(n))
    return Dataset("speed", "", rows, "")


def chosen(sizes: Mapping[str, int], **fields: Any) -> list[str]:
    return [r.id for r in select(dataset_of(sizes), config("speed", **fields))]


def test_dataset_order_takes_the_first_rows_of_each_category() -> None:
    ids = chosen({"a": 5, "b": 1, "c": 4}, num_requests=6, order="dataset")
    assert ids == ["a0", "a1", "a2", "b0", "c0", "c1"]


def test_everything_in_dataset_order() -> None:
    assert chosen({"a": 2, "b": 1}, order="dataset") == ["a0", "a1", "b0"]


def test_shuffle_is_a_permutation_fixed_by_the_seed() -> None:
    sizes = {"a": 40, "b": 40}
    ids = chosen(sizes, seed=3)
    assert sorted(ids) == sorted(chosen(sizes, order="dataset"))
    assert ids != chosen(sizes, order="dataset")
    assert ids == chosen(sizes, seed=3)
    assert ids != chosen(sizes, seed=4)
    # Mixed: with 40 + 40 rows, all of the first 20 in one category has a chance below 1e-6.
    assert {i[0] for i in ids[:20]} == {"a", "b"}


def test_category_filter_keeps_the_order_of_the_whole() -> None:
    sizes = {"a": 9, "b": 9, "c": 9}
    everything = chosen(sizes, seed=1)
    assert chosen(sizes, seed=1, category=("c", "a", "c")) == [i for i in everything if i[0] != "b"]


def test_unknown_category_lists_those_there_are() -> None:
    with pytest.raises(UserError) as caught:
        chosen({"coding": 2, "math": 1}, category=("math", "maths"))
    assert str(caught.value) == "--category maths is not in the dataset: choose from coding, math"


def test_more_requests_than_rows() -> None:
    with pytest.raises(UserError) as caught:
        chosen({"a": 3, "b": 2, "c": 4}, category=("a", "b"), num_requests=6)
    assert "--num_requests is 6, but there are 5 rows" in str(caught.value)
    assert "ask for at most 5" in str(caught.value)
    assert len(chosen({"a": 3, "b": 2}, num_requests=5)) == 5


def test_random_rows_can_be_selected() -> None:
    setting = random_config(4)
    assert len(select(load(setting, [1, 2]), setting)) == 4


CATEGORY_SIZES = st.dictionaries(st.text(max_size=3), st.integers(1, 12), min_size=1, max_size=6)


@given(sizes=CATEGORY_SIZES, seed=st.integers(0, 5), data=st.data())
def test_selection_is_as_even_as_the_sizes_let_it(
    sizes: dict[str, int], seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, sum(sizes.values())))
    order = data.draw(st.sampled_from(["shuffle", "dataset"]))
    dataset = dataset_of(sizes)
    rows = select(dataset, config("speed", num_requests=n, seed=seed, order=order))
    counts = Counter(r.category for r in rows)
    assert len({id(r) for r in rows}) == len(rows) == n
    for category, size in sizes.items():
        assert counts[category] == size or counts[category] >= max(counts.values()) - 1
    everything = select(dataset, config("speed", seed=seed, order=order))
    assert list(rows) == [r for r in everything if any(r is chosen for chosen in rows)]
    if n < len(dataset.rows):
        more = select(dataset, config("speed", num_requests=n + 1, seed=seed, order=order))
        assert all(any(r is other for other in more) for r in rows)


# What importing costs


def test_import_brings_no_heavy_package() -> None:
    code = (
        "import sys, speedbench.datasets, speedbench.prompts;"
        "heavy = {'transformers', 'tokenizers', 'torch', 'pandas', 'pyarrow', 'jinja2'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
