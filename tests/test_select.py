"""Selection: the least alike rows are found, whatever the blocks; the report's figures are true."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import speedbench.datasets
from speedbench import cli, cli_base
from speedbench.cli_build import select_command
from speedbench.config import RunConfig
from speedbench.datasets import embed as embedding
from speedbench.datasets import selection
from speedbench.datasets.embed import embed, open_array
from speedbench.datasets.selection import mean_similarity, pairwise_sum, random_means, search
from speedbench.datasets.selection import select as choose
from speedbench.types import UserError

SCHEMA = ["question_id", "category", "sub_category", "turns", "source", "src_id", "difficulty"]
SCHEMA += ["multiturn"]


def vectors(n: int, dimensions: int, seed: int, offset: float = 0.0) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal((n, dimensions)) + offset
    return drawn.astype(np.float32)


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """In plain Python."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [sum(float(x) ** 2 for x in v) ** 0.5 for v in (a, b)]
    return dot / (lengths[0] * lengths[1])


def brute_sum(rows: np.ndarray, chosen: Sequence[int]) -> float:
    return sum(cosine(rows[a], rows[b]) for a, b in combinations(chosen, 2))


def table(rows: np.ndarray) -> np.ndarray:
    n = len(rows)
    return np.array([[cosine(rows[i], rows[j]) for j in range(n)] for i in range(n)])


def optimum(similar: np.ndarray, n: int) -> float:
    subsets = combinations(range(len(similar)), n)
    return min(sum(similar[a, b] for a, b in combinations(subset, 2)) for subset in subsets)


def greedy(similar: np.ndarray, n: int, first: int) -> float:
    """Additions only, from a first row."""
    chosen = [first]
    while len(chosen) < n:
        free = [i for i in range(len(similar)) if i not in chosen]
        chosen.append(min(free, key=lambda i: sum(similar[i, j] for j in chosen)))
    return sum(similar[a, b] for a, b in combinations(chosen, 2))


# The search


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(8))
def test_within_one_percent_of_the_optimum_and_never_worse_than_greedy(
    seed: int, offset: float
) -> None:
    n_rows, n = 7 + seed % 5, 2 + seed % 4
    rows = vectors(n_rows, 2 + seed, seed, offset)
    similar = table(rows)
    found = brute_sum(rows, choose(rows, n, seed).tolist())
    best = optimum(similar, n)
    assert found <= best + 0.01 * abs(best)
    assert found <= min(greedy(similar, n, first) for first in range(n_rows)) + 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_one_start_is_never_worse_than_greedy_from_there_and_no_swap_improves_it(seed: int) -> None:
    rows = vectors(60, 12, seed, 0.5)
    similar = table(rows)
    found = search(rows, 9, seed, n_starts=1)
    chosen = found.indices.tolist()
    first = int(np.random.default_rng(seed).permutation(60)[0])
    assert brute_sum(rows, chosen) <= greedy(similar, 9, first) + 1e-5
    for member in chosen:
        for other in set(range(60)) - set(chosen):
            swapped = [*(i for i in chosen if i != member), other]
            assert brute_sum(rows, swapped) > brute_sum(rows, chosen) - 1e-4


def test_swaps_happen_and_pay() -> None:
    rows = np.abs(vectors(300, 16, 3))  # in one quadrant, as embeddings are
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    similar = unit @ unit.T
    found = search(rows, 20, 5, n_starts=1)
    first = int(np.random.default_rng(5).permutation(300)[0])
    assert found.n_swaps > 0
    assert pairwise_sum(rows, found.indices) < greedy(similar, 20, first) - 0.1


@given(
    n_rows=st.integers(2, 30),
    dimensions=st.integers(1, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_blocks_change_nothing(n_rows: int, dimensions: int, seed: int, data: Any) -> None:
    rows = vectors(n_rows, dimensions, seed)
    n = data.draw(st.integers(1, n_rows))
    whole = choose(rows, n, seed, block_rows=n_rows)
    assert sorted(set(whole.tolist())) == whole.tolist()
    assert len(whole) == n
    for block_rows in (1, 2, 7):
        assert choose(rows, n, seed, block_rows=block_rows).tolist() == whole.tolist()


def test_one_seed_one_selection_also_from_a_memory_map_or_other_number_types(
    tmp_path: Path,
) -> None:
    rows = vectors(200, 24, 1).astype(np.float16)
    np.save(tmp_path / "a.npy", rows.astype(np.float32))
    np.save(tmp_path / "f.npy", np.asfortranarray(rows.astype(np.float64)))
    expected = choose(rows.astype(np.float32), 15, 7).tolist()
    assert choose(rows, 15, 7).tolist() == expected
    for name in ("a.npy", "f.npy"):
        mapped = open_array(tmp_path / name)
        assert isinstance(mapped, np.memmap)
        assert choose(mapped, 15, 7).tolist() == expected


def test_another_seed_starts_elsewhere() -> None:
    rows = vectors(400, 30, 1)
    assert len({tuple(search(rows, 12, seed, n_starts=1).indices) for seed in range(6)}) > 1


def test_equal_rows_are_taken_by_their_order() -> None:
    rows = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)  # rows 0-2 alike, 3-5 alike, ...
    for seed in range(5):
        chosen = search(rows, 4, seed, n_starts=1).indices.tolist()
        first = int(np.random.default_rng(seed).permutation(12)[0])
        assert chosen == sorted({0, 3, 6, 9} - {first // 3 * 3} | {first})


def test_the_length_of_a_vector_does_not_matter() -> None:
    rows = vectors(50, 8, 2)
    scaled = rows * np.random.default_rng(3).uniform(1e-6, 1e6, (50, 1)).astype(np.float32)
    assert choose(scaled, 6, 0).tolist() == choose(rows, 6, 0).tolist()


@given(seed=st.integers(0, 999), n=st.integers(2, 12), dimensions=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_the_objective_is_the_sum_over_pairs(seed: int, n: int, dimensions: int) -> None:
    rows = vectors(15, dimensions, seed, 0.2)
    chosen = np.random.default_rng(seed).choice(15, n, replace=False)
    expected = brute_sum(rows, chosen.tolist())
    assert pairwise_sum(rows, chosen) == pytest.approx(expected, abs=1e-9)
    assert mean_similarity(rows, chosen) == pytest.approx(expected / (n * (n - 1) / 2), abs=1e-9)
    pool = brute_sum(rows, range(15)) / 105
    assert mean_similarity(rows) == pytest.approx(pool, abs=1e-9)


def test_random_picks_scatter_around_the_pool() -> None:
    rows = vectors(300, 10, 4, 0.4)
    means = random_means(rows, 40, 0, 200)
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - mean_similarity(rows)) < 4 * error
    assert len(set(means.tolist())) == 200


def test_the_selection_is_less_alike_than_any_random_pick() -> None:
    rows = vectors(500, 32, 4, 0.5)
    chosen = choose(rows, 20, 0)
    assert mean_similarity(rows, chosen) < random_means(rows, 20, 0, 50).min()


@pytest.mark.parametrize("n", [0, 6])
def test_more_rows_than_there_are_is_refused(n: int) -> None:
    with pytest.raises(UserError, match=f"^{n} rows were asked of 5 candidates"):
        choose(vectors(5, 3, 0), n, 0)


def test_a_table_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_TABLE_BYTES", 4 * 5 * 100 - 1)
    with pytest.raises(UserError, match="5 of 100 candidates need a table"):
        choose(vectors(100, 3, 0), 5, 0)


def test_the_functions_of_the_package_are_not_hidden_by_its_modules() -> None:
    assert callable(speedbench.datasets.select)


# The command


Row = dict[str, Any]


def pool_rows(per_category: Mapping[str, int]) -> list[Row]:
    rows: list[Row] = []
    for category, n in per_category.items():
        for i in range(n):
            turns = [f"question {i} about {category}", "and then?"][: 1 + i % 2]
            rows.append(
                {
                    "question_id": f"{category}-{i}",
                    "category": category,
                    "sub_category": "sub",
                    "turns": turns,
                    "source": "own",
                    "src_id": i,
                    "difficulty": "easy",
                    "multiturn": len(turns) > 1,
                }
            )
    return rows


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, rows: Sequence[Row], array: np.ndarray | str, *flags: str) -> Path:
    """The command over these rows and vectors; the folder it wrote."""
    source = write(tmp_path / "pool.jsonl", rows)
    embeddings = array if isinstance(array, str) else str(tmp_path / "vectors.npy")
    if not isinstance(array, str):
        np.save(tmp_path / "vectors.npy", array)
    out = tmp_path / "out"
    argv = ["--from", str(source), "--embeddings", embeddings, "--out", str(out)]
    if "--per_category" not in flags:
        argv += ["--per_category", "3"]
    assert select_command([*argv, *flags], "speedbench data select") == 0
    return out


def refused(tmp_path: Path, rows: Sequence[Row], array: np.ndarray | str, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        run(tmp_path, rows, array, *flags)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_split_is_in_the_benchmarks_schema_and_can_be_run(tmp_path: Path) -> None:
    rows = pool_rows({"math": 9, "coding": 7})
    rows = rows[::2] + rows[1::2]  # a category is not one block of the pool
    array = vectors(16, 6, 0)
    out = run(tmp_path, rows, array)
    found = pq.read_table(out / "test.parquet")
    assert found.column_names == SCHEMA
    written = found.to_pylist()
    by_id = {row["question_id"]: {**row, "src_id": str(row["src_id"])} for row in rows}
    assert written == [by_id[row["question_id"]] for row in written]
    assert [row["category"] for row in written] == ["math"] * 3 + ["coding"] * 3
    for category in ("math", "coding"):
        places = [i for i, row in enumerate(rows) if row["category"] == category]
        chosen = [
            i for i in places if rows[i]["question_id"] in {r["question_id"] for r in written}
        ]
        best = optimum(table(array[places]), 3)
        assert brute_sum(array, chosen) == pytest.approx(best, abs=1e-5)
    config = RunConfig(engine="NULL", dataset="speed", dataset_path=str(out))
    dataset = speedbench.datasets.load(config)
    assert len(dataset.rows) == 6
    assert json.loads((out / "report.json").read_text())["sha256"] == dataset.sha256


def test_the_report_tells_the_similarities(tmp_path: Path) -> None:
    rows, array = pool_rows({"math": 12}), vectors(12, 5, 3, 0.5)
    out = run(tmp_path, rows, array, "--seed", "4", "--random-picks", "7")
    report = json.loads((out / "report.json").read_text())
    (category,) = report["categories"]
    ids = pq.read_table(out / "test.parquet")["question_id"].to_pylist()
    chosen = [int(name.rpartition("-")[2]) for name in ids]
    assert category["selected"] == pytest.approx(brute_sum(array, chosen) / 3, abs=1e-6)
    assert category["pool"] == pytest.approx(brute_sum(array, range(12)) / 66, abs=1e-6)
    assert len(category["random"]) == 7
    assert category["random_mean"] == pytest.approx(sum(category["random"]) / 7)
    assert category["below_random"] == pytest.approx(
        1 - category["selected"] / category["random_mean"]
    )
    assert (report["seed"], report["per_category"], report["pool"]["rows"]) == (4, 3, 12)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{category['selected']:.4f}" in page
    assert "<svg" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_data_says_how_a_split_was_built_while_its_rows_are_those(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pool_rows({"a": 6})
    out = run(tmp_path, rows, vectors(6, 4, 1), "--per_category", "2")
    assert cli.main(["data", str(out)]) == cli_base.OK
    assert "built as" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**report, "sha256": "0" * 64}))
    assert cli.main(["data", str(out)]) == cli_base.OK
    assert "not from `speedbench prepare`" in capsys.readouterr().out


def test_one_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    outs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outs.append(run(tmp_path / name, pool_rows({"math": 20}), vectors(20, 4, 0)))
    for file in ("test.parquet", "report.json", "report.html"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()


def test_one_row_per_category_has_no_pair(tmp_path: Path) -> None:
    out = run(tmp_path, pool_rows({"a": 4}), vectors(4, 3, 0), "--per_category", "1")
    (category,) = json.loads((out / "report.json").read_text())["categories"]
    assert category["selected"] is None
    assert category["below_random"] is None


def test_faults_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    rows, array = pool_rows({"math": 6}), vectors(6, 3, 0)
    spoiled = array.copy()
    for value, words in ((np.nan, "NaN"), (np.inf, "infinity")):
        spoiled[4, 1] = value
        message = refused(tmp_path, rows, spoiled)
        assert f"the vector of row 'math-4' has {words}" in message
    spoiled[4] = 0
    assert "the vector of row 'math-4' has only zeros" in refused(tmp_path, rows, spoiled)
    assert "holds 5 vectors, but the pool has 6 rows" in refused(tmp_path, rows, array[:5])
    assert "shape (6,)" in refused(tmp_path, rows, array[:, 0])
    assert "holds int64" in refused(tmp_path, rows, np.ones((6, 3), dtype=np.int64))
    assert "has 6 candidate(s)" in refused(tmp_path, rows, array, "--per_category", "7")
    twice = [*rows[:5], {**rows[5], "question_id": "math-0"}]
    assert "line 6 repeats the id 'math-0'" in refused(tmp_path, twice, array)
    unknown = [*rows[:5], {**rows[5], "colour": "red"}]
    assert "line 6 has the unknown column 'colour'" in refused(tmp_path, unknown, array)
    wrong = [*rows[:5], {**rows[5], "multiturn": False}]
    assert "says multiturn False, but has 2 turn(s)" in refused(tmp_path, wrong, array)
    assert "does not exist" in refused(tmp_path, rows, str(tmp_path / "none.npy"))
    (tmp_path / "text.npy").write_text("no array")
    assert "cannot be read as a .npy array" in refused(tmp_path, rows, str(tmp_path / "text.npy"))
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_dir()) == []


def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("texts were embedded")

    monkeypatch.setattr("speedbench.datasets.embed.embed", worked)
    (tmp_path / "file").write_text("")
    rows, inside = pool_rows({"math": 4}), str(tmp_path / "file" / "x.npy")
    said = refused(tmp_path, rows, "tfidf", "--save_embeddings", inside)
    assert said.startswith(f"--save_embeddings {inside} cannot be written (Not a directory")
    said = refused(tmp_path, rows, "tfidf", "--save_embeddings", str(tmp_path / "vectors"))
    assert "expected a file that ends in .npy" in said
    assert "--out" in refused(tmp_path, rows, "tfidf", "--out", inside)


def test_a_column_that_is_read_cannot_be_left_out(tmp_path: Path) -> None:
    rows = pool_rows({"math": 4})
    said = refused(tmp_path, rows, vectors(4, 3, 0), "--ignore_columns", "category")
    assert said.startswith("--ignore_columns names 'category', which is read")


def test_unknown_columns_can_be_left_out(tmp_path: Path) -> None:
    rows = [{**row, "colour": "red"} for row in pool_rows({"a": 4})]
    out = run(tmp_path, rows, vectors(4, 3, 0), "--ignore_columns", "colour")
    assert pq.read_table(out / "test.parquet").column_names == SCHEMA


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.parquet").write_text("precious")
    with pytest.raises(UserError, match="exists and is not empty"):
        run(tmp_path, pool_rows({"a": 4}), vectors(4, 3, 0))
    assert (tmp_path / "out" / "test.parquet").read_text() == "precious"


@pytest.mark.parametrize("victim", ["write_rows", "write_json", "write_text"])
def test_an_interruption_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"speedbench.datasets.split.{victim}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, pool_rows({"a": 4}), vectors(4, 3, 0))
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert (run(tmp_path, pool_rows({"a": 4}), vectors(4, 3, 0)) / "test.parquet").is_file()


def test_wrong_flags_are_one_sentence(tmp_path: Path) -> None:
    rows, array = pool_rows({"a": 4}), vectors(4, 3, 0)
    assert "no whole number of at least 0" in refused(tmp_path, rows, array, "--seed", "-1")
    message = refused(tmp_path, rows, array, "--embedding_model", "m")
    assert "--embedding_model m is only asked of an endpoint" in message
    message = refused(tmp_path, rows, array, "--save_embeddings", str(tmp_path / "v.npy"))
    assert "is a file already" in message


# Embeddings


def test_tfidf_tells_texts_apart_in_any_script() -> None:
    pytest.importorskip("sklearn")
    texts = ["the red fox runs", "the red fox ran", "机器学习很有趣", "机器学习很难", "2 + 2"]
    found = embed("tfidf", texts).vectors
    similar = table(found)
    assert similar[0, 1] > similar[0, 2] + 0.3
    assert similar[2, 3] > similar[2, 0] + 0.3
    assert (np.linalg.norm(found, axis=1) > 0.9).all()


def test_tfidf_beyond_its_dimensions_keeps_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in generator.integers(3000, size=400)) for _ in range(12)]
    exact = embed("tfidf", texts).vectors
    monkeypatch.setattr(embedding, "MAX_TFIDF_BYTES", 4 * 12 * 1024)
    shared = embed("tfidf", texts).vectors
    assert shared.shape == (12, 1024)
    assert exact.shape[1] > 2000
    shared, exact = table(shared), table(exact)
    assert abs(shared - exact).max() < 0.12
    assert abs((shared - exact).mean()) < 0.02


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pool_rows({"a": 4})
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    assert "pip install scikit-learn" in refused(tmp_path, rows, "tfidf")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert "pip install sentence-transformers" in refused(tmp_path, rows, "some/model")


def test_a_model_embeds_all_turns_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sentence-transformers: a vector holds the text's length."""

    class SentenceTransformer:
        max_seq_length = 256

        def __init__(self, name: str) -> None:
            if name != "some/model":
                raise OSError(f"{name} is not a model")

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            return np.array([[len(text), 1.0] for text in texts])

    module = types.ModuleType("sentence_transformers")
    monkeypatch.setattr(module, "SentenceTransformer", SentenceTransformer, raising=False)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    rows, saved = pool_rows({"a": 4}), tmp_path / "kept.npy"
    out = run(tmp_path, rows, "some/model", "--save_embeddings", str(saved))
    assert np.load(saved)[:, 0].tolist() == [len("\n".join(row["turns"])) for row in rows]
    report = json.loads((out / "report.json").read_text())
    assert report["embeddings"] == {
        "kind": "model",
        "model": "some/model",
        "max_seq_length": 256,
        "dimensions": 2,
    }
    with pytest.raises(UserError, match="other/model gives no sentence-transformers model"):
        embed("other/model", ["a"])


Answer = Callable[[dict[str, Any]], tuple[int, object]]


@pytest.fixture
def endpoint() -> Iterator[Callable[[Answer], tuple[str, list[Any]]]]:
    """Serves an answer at a URL, and keeps what it was asked."""
    servers: list[HTTPServer] = []

    def serve(answer: Answer) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers.get("Authorization"), body))
                status, values = answer(body)
                content = json.dumps(values).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def by_length(body: dict[str, Any]) -> tuple[int, object]:
    """A vector that holds the text's length; the answer's order is not the question's."""
    data = [{"index": i, "embedding": [len(t), 1.0]} for i, t in enumerate(body["input"])]
    return 200, {"data": data[::-1]}


def test_an_endpoint_is_asked_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: Any
) -> None:
    monkeypatch.setattr(embedding, "BATCH_TEXTS", 3)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    url, asked = endpoint(by_length)
    rows, saved = pool_rows({"a": 8}), tmp_path / "kept.npy"
    flags = ("--embedding_model", "small", "--save_embeddings", str(saved))
    out = run(tmp_path, rows, url, *flags)
    lengths = [len("\n".join(row["turns"])) for row in rows]
    assert np.load(saved).tolist() == [[length, 1.0] for length in lengths]
    assert [len(body["input"]) for _, _, body in asked] == [3, 3, 2]
    assert {(path, key, body["model"]) for path, key, body in asked} == {
        ("/v1/embeddings", "Bearer secret-key", "small")
    }
    assert "secret-key" not in (out / "report.json").read_text()


def test_an_endpoint_is_asked_again_after_a_passing_fault(
    monkeypatch: pytest.MonkeyPatch, endpoint: Any
) -> None:
    monkeypatch.setattr(embedding, "FIRST_WAIT_S", 0.0)
    url, asked = endpoint(lambda body: (503, {}) if len(asked) < 3 else by_length(body))
    assert embed(url, ["ab", "abcd"], "m").vectors[:, 0].tolist() == [2, 4]
    assert len(asked) == 3
    url, asked = endpoint(lambda body: (401, {}))
    with pytest.raises(UserError, match="HTTP 401"):
        embed(url, ["ab"], "m")
    assert len(asked) == 1


def test_an_answer_that_is_none_is_refused(endpoint: Any) -> None:
    for answer in ({"data": []}, {"error": "no"}, {"data": [{"index": 0, "embedding": "x"}]}, []):
        url, _ = endpoint(lambda body, answer=answer: (200, answer))
        with pytest.raises(UserError, match="one embedding for each of 1 texts"):
            embed(url, ["ab"], "m")
    with pytest.raises(UserError, match="add --embedding_model"):
        embed(url, ["ab"])
    with pytest.raises(UserError, match="a user or a query") as caught:
        embed("http://me:hidden@host/v1", ["ab"], "m")
    assert "hidden" not in str(caught.value)
