"""Buckets: every written row has exactly its length, keeps its question and repeats no padding.

Lengths are counted by the `tokenizers` library itself on text that is rendered here.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import speedbench.datasets
from speedbench.cli_build import bucket_command
from speedbench.config import RunConfig
from speedbench.datasets.bucket import Ruler, bucket_name, read_lengths, terciles
from speedbench.datasets.embed import mean_entropies
from speedbench.datasets.fit import Fitted, Inexact, character_places, fit, word_places
from speedbench.datasets.padding import WORDS, Padding, plain_sentences, repeated_ngram
from speedbench.types import UserError
from tests.bucket_tokenizers import BUILDERS, CHAT, save

NAMES = sorted(BUILDERS)
TIERS = ("low_entropy", "mixed", "high_entropy")
RENDERED = jinja2.Environment().from_string(CHAT)

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
ALPHABET = [
    "a",
    "e",
    "Z",
    " ",
    "\n",
    ".",
    "?",
    "é",
    "e\u0301",
    "ß",
    "中",
    "文",
    "。",
    "한",
    "한",
    "ไ",
]
ALPHABET += [
    "\U0001f600",
    FAMILY,
    "\U0001f1e9\U0001f1ea",
    "👍\U0001f3fd",
    "❤\ufe0f",
    "\u202e",
    "\0",
]
ALPHABET += ["<|end|>", "<s>", "\r\n", "\t", "\u00a0", "ﬁ", "½", "  the ", " of "]

Row = dict[str, Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tokenizers")
    return {name: save(base / name, name) for name in NAMES}


@pytest.fixture(scope="module")
def rulers(folders: dict[str, Path]) -> dict[tuple[str, str], Ruler]:
    kinds: tuple[Any, ...] = ("template", "completions", "bare")
    return {
        (name, counted): Ruler(str(folders[name]), counted, {})
        for name in NAMES
        for counted in kinds
    }


@pytest.fixture(scope="module")
def libraries(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_file(str(folders[name] / "tokenizer.json")) for name in NAMES}


def tokens(library: Tokenizer, name: str, counted: str, text: str) -> int:
    """What the engine gets: the rendered prompt, and BOS once where the tokenizer puts one."""
    if counted == "template":
        text = RENDERED.render(
            messages=[{"role": "user", "content": text}], add_generation_prompt=True
        )
    ids = library.encode(text, add_special_tokens=False).ids
    if counted == "bare":
        return len(ids)
    bos = library.token_to_id("<s>")
    given = next((i for i, token in enumerate(ids) if token != bos), len(ids))
    return len(ids) - given + (name == "unigram" or given > 0)


def words(seed: int = 0) -> Iterator[str]:
    return Padding("words", (), seed).sentences(0, "row", "")


# The fit


PROSE = "Read this first. " + " ".join(
    f"Item {i} costs {i * 37 % 101} crowns, said the {WORDS[i * 13 % 600]}." for i in range(120)
)
QUESTION = "\n\nWhich of the items above costs the most, and who said so?"

MULTI_BYTE = (
    "重要なお知らせ。"
    + "混ぜた文字 🙂👨\u200d👩\u200d👧 e\u0301a\u0308o\u0302 " * 60
    + "\n最後の質問です?"
)


@pytest.mark.parametrize("counted", ["template", "completions", "bare"])
@pytest.mark.parametrize("name", NAMES)
def test_every_length_is_met_exactly_and_the_question_stays(
    name: str, counted: str, rulers: Any, libraries: Any
) -> None:
    ruler, library = rulers[name, counted], libraries[name]
    for text, question in ((PROSE + QUESTION, QUESTION.strip()), (MULTI_BYTE, "最後の質問です?")):
        natural = tokens(library, name, counted, text)
        targets = [natural + n for n in (0, 1, 2, 3, 7, 40, 333)]
        targets += [natural - n for n in (1, 2, 3, 11, natural // 3, natural // 2)]
        for target in targets:
            found = fit(text, target, ruler.length, words(), "Some notes first.")
            assert isinstance(found, Fitted), (target - natural, found)
            assert tokens(library, name, counted, found.text) == target
            assert found.text.endswith(question)
            expected = {0: "kept", -1: "cut"}.get((target > natural) - (target < natural))
            assert found.how == expected or (expected is None and found.how in ("padded", "cut"))
            if found.how == "padded":
                assert found.text.endswith(text)


def test_a_cut_text_keeps_its_beginning_and_loses_one_piece(rulers: Any) -> None:
    text = PROSE + QUESTION
    found = fit(text, 300, rulers["byte-level", "template"].length, words())
    assert isinstance(found, Fitted)
    head, _, tail = found.text.partition("\n\n")
    assert text.startswith(head)
    assert head.startswith("Read this first.")
    kept = tail.rpartition("\n\n")[0] or tail
    assert QUESTION.strip() in found.text
    assert len(kept) > 0
    assert len(found.text) < len(text)


def test_a_question_of_few_tokens_stays_whole_behind_many_tokens(
    rulers: Any, libraries: Any
) -> None:
    """Half of the kept characters would be less than the question."""
    question = "Which of these would the baker choose, and why not one of the others? " * 4
    text = "\U0001f600" * 400 + "\n" + question
    assert tokens(libraries["byte-level"], "byte-level", "bare", question) < 400
    found = fit(text, 800, rulers["byte-level", "bare"].length, words())
    assert isinstance(found, Fitted)
    assert found.text.endswith(question)
    assert found.text.startswith("\U0001f600")
    assert len(found.text) - len(question) < len(question)


def test_only_the_marked_context_changes(rulers: Any, libraries: Any) -> None:
    before, after = "Answer from the notes.\n<notes>", "</notes>\nShort.\nWho was it?"
    for name in NAMES:
        for target in (250, 1500):
            text = before + PROSE + after
            length = rulers[name, "template"].length
            found = fit(text, target, length, words(), "Unused.", ("<notes>", "</notes>"))
            assert isinstance(found, Fitted)
            assert tokens(libraries[name], name, "template", found.text) == target
            assert found.text.startswith(before)
            assert found.text.endswith(after)
            assert "Unused." not in found.text


def test_a_text_that_cannot_be_made_exact_is_given_up_with_the_reason() -> None:
    def refused(text: str, target: int, **options: Any) -> str:
        found = fit(
            text, target, options.pop("count", len), options.pop("more", words()), **options
        )
        assert isinstance(found, Inexact)
        return found.reason

    assert "no context between '<a>'" in refused("x" * 50, 9, mark=("<a>", "</a>"))
    marked = "q" * 40 + "<a>" + "x" * 50 + "</a>"
    assert "42 tokens" not in refused(marked, 9, mark=("<a>", "</a>"))
    assert "outside its context" in refused(marked, 9, mark=("<a>", "</a>"))
    assert "with no text at all" in refused("word " * 9, 4, count=lambda text: 5 + len(text))
    assert "too little prose" in refused("word", 400, more=iter(["One short sentence."]))
    assert "exactly 501 tokens" in refused("one two", 501, count=lambda text: 2 * len(text.split()))


def test_padding_that_the_tokenizer_drops_ends(rulers: Any) -> None:
    found = fit("a", 50, lambda text: text.count("a") and 1, words())
    assert isinstance(found, Inexact)


TEXTS = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=60).map("".join)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(NAMES),
    counted=st.sampled_from(["template", "completions", "bare"]),
    text=TEXTS,
    target=st.integers(1, 160),
)
@example(name="byte-level", counted="template", text=FAMILY * 30, target=100)
@example(name="unigram", counted="completions", text="<s>" * 9, target=7)
@example(name="word-level", counted="bare", text="a" * 60, target=30)
def test_no_text_is_inexact_or_raises(
    name: str, counted: str, text: str, target: int, rulers: Any, libraries: Any
) -> None:
    found = fit(text, target, rulers[name, counted].length, words(), "Some notes first.")
    if isinstance(found, Inexact):
        assert found.reason
        return
    assert tokens(libraries[name], name, counted, found.text) == target
    assert found.text.encode("utf-8").decode("utf-8") == found.text
    assert not repeated_ngram(found.padding)
    if found.how == "padded":
        assert found.text.endswith(text)


@given(TEXTS)
@settings(deadline=None)
def test_no_character_is_cut_in_two(text: str) -> None:
    for places in (word_places(text), character_places(text)):
        assert places[0] == 0
        assert places[-1] == len(text)
        assert places == sorted(set(places))
        for place in places[1:-1]:
            assert not unicodedata.combining(text[place])
            assert text[place] not in "\u200d\ufe0f\U0001f3fd"
            assert text[place - 1] != "\u200d"
            assert text[place - 1 : place + 1] not in ("\r\n", "\U0001f1e9\U0001f1ea")


# The padding


def grams(text: str, n: int = 4) -> Counter[tuple[str, ...]]:
    """By another rule than the code's: words at blanks, punctuation off."""
    found = [word.strip(".,!?;:").lower() for word in text.split()]
    return Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))


def test_padding_repeats_no_ngram_and_nothing_of_its_row() -> None:
    boilerplate = "Please answer the question below with care."
    rows = [
        f"{boilerplate} "
        + " ".join(
            f"The {WORDS[k]} sees a {WORDS[-k - 1]} now." for k in range(30 * i, 30 * (i + 1))
        )
        for i in range(20)
    ]
    padding = Padding("rows", rows, 0)
    for row in (0, 7):
        sentences = list(padding.sentences(row, f"key {row}", rows[row]))
        text = " ".join(sentences)
        assert len(sentences) > 100
        assert max(grams(text).values()) == 1
        assert not grams(text).keys() & grams(rows[row]).keys()
        assert boilerplate not in sentences
    made_up = " ".join(islice(words(), 2000))
    assert max(grams(made_up).values()) == 1


def test_padding_follows_from_the_seed_and_the_row() -> None:
    def first(seed: int, key: str) -> list[str]:
        return list(islice(Padding("words", (), seed).sentences(0, key, ""), 5))

    assert first(1, "a") == first(1, "a")
    assert len({tuple(first(*given)) for given in ((1, "a"), (1, "b"), (2, "a"))}) == 3


def test_code_and_markup_are_no_padding() -> None:
    text = "A plain sentence here. Call f(x) { return; } now. <|end|> is special. "
    text += "這是一個完整的中文句子在此。"
    assert list(plain_sentences(text)) == ["A plain sentence here.", "這是一個完整的中文句子在此。"]


def test_repetition_is_had_where_it_is_asked_for(rulers: Any) -> None:
    sentences = Padding("repeat", (), 0, "Please answer now.").sentences(0, "k", "")
    length = rulers["byte-level", "template"].length
    found = fit("Why?", 400, length, sentences, may_repeat=True)
    assert isinstance(found, Fitted)
    assert found.text.count("Please answer now.") > 10


# Tiers


def test_terciles_are_thirds_and_equal_values_share_a_tier() -> None:
    found = terciles([5.0, 1.0, 3.0, 2.0, 6.0, 4.0], "column")
    assert found.of_rows == (TIERS[2], TIERS[0], TIERS[1], TIERS[0], TIERS[2], TIERS[1])
    assert found.thresholds == (2.0, 4.0)
    found = terciles([1.0, 2.0, 1.0, 3.0, 1.0, 2.0], "column")
    assert Counter(found.of_rows) == {TIERS[0]: 3, TIERS[1]: 2, TIERS[2]: 1}
    with pytest.raises(UserError, match="makes no tier"):
        terciles([1.0, 1.0, 1.0], "column")


def test_a_models_entropy_is_that_of_its_next_tokens(tmp_path: Path, folders: Any) -> None:
    """Bias on the output makes every next-token distribution the same and known."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=512,
        n_positions=64,
        n_embd=8,
        n_layer=1,
        n_head=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1.0
        model.transformer.wte.weight.zero_()  # tied: the logit of token t is wte[t, 0]
        model.transformer.wte.weight[5, 0] = math.log(512.0)
    model.save_pretrained(tmp_path / "model")
    save(tmp_path / "model", "word-level")
    share = 512 / (512 + 511)  # of token 5; 511 others at weight 1
    rest = (1 - share) / 511
    expected = -share * math.log(share) - 511 * rest * math.log(rest)
    found = mean_entropies(str(tmp_path / "model"), ["the of is a and", "the", "a b " * 99], 20)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert math.isnan(found[1])
    assert found[2] == pytest.approx(expected, rel=1e-5)


# The command


def pool(n: int = 9) -> list[Row]:
    """Three tiers; short and long rows; other rows' prose is what pads."""
    return [
        {
            "question_id": f"r{i}",
            "category": ("coding", "needle", "writing")[i % 3],
            "turns": [
                f"Note {i}. "
                + " ".join(
                    f"The {WORDS[(i * 97 + j * 7) % 600]} met {WORDS[(i + j * 11) % 600]} in {j}."
                    for j in range(20 + 60 * (i % 2))
                )
                + f"\n\nWhat did row {i} say, in one line?"
            ],
            "tier": TIERS[i % 3],
            "entropy": float(i % 3) + i / 100,
        }
        for i in range(n)
    ]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, rows: Sequence[Row], tokenizer: Path, *flags: str) -> Path:
    source, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    argv = ["--from", str(source), "--tokenizer", str(tokenizer), "--out", str(out), *flags]
    if "--entropy" not in flags:
        argv += ["--entropy", "tier"]
    if "--isl" not in flags:
        argv += ["--isl", "300"]
    unused = {"tier", "entropy"} - {argv[argv.index("--entropy") + 1]}
    argv += ["--ignore_columns", ",".join(unused)]
    assert bucket_command(argv, "speedbench data bucket") == 0
    return out


def refused(tmp_path: Path, rows: Sequence[Row], tokenizer: Path, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        run(tmp_path, rows, tokenizer, *flags)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "flag", "counted"),
    [
        ("byte-level", "", "template"),
        ("unigram", "--completions", "completions"),
        ("word-level", "--bare", "bare"),
    ],
)
def test_the_files_hold_exact_rows_of_three_tiers(
    tmp_path: Path, folders: Any, libraries: Any, name: str, flag: str, counted: str
) -> None:
    flags = ["--isl", "300,1k", *([flag] if flag else [])]
    out = run(tmp_path, pool(), folders[name], *flags)
    report = json.loads((out / "report.json").read_text())
    assert report["counted"] == counted
    assert report["tokens_per_k"] == 1000
    assert [bucket["tokens"] for bucket in report["buckets"]] == [300, 1000]
    for bucket in report["buckets"]:
        rows = pq.read_table(out / bucket["name"] / "test.parquet").to_pylist()
        assert len(rows) == 9
        for row in rows:
            assert tokens(libraries[name], name, counted, row["turns"][0]) == bucket["tokens"]
            number = int(row["question_id"][1:])
            assert row["turns"][0].endswith(f"What did row {number} say, in one line?")
            assert row["category"] == TIERS[number % 3]
            assert row["sub_category"] == ("coding", "needle", "writing")[number % 3]
        config = RunConfig(engine="NULL", dataset="speed", dataset_path=str(out / bucket["name"]))
        assert speedbench.datasets.load(config).sha256 == bucket["sha256"]
        for change, row in zip(bucket["changes"], rows, strict=True):
            assert change["question_id"] == row["question_id"]
            text = pool()[int(row["question_id"][1:])]["turns"][0]
            before = tokens(libraries[name], name, counted, text)
            assert change["n_tokens_before"] == before
            assert change["n_tokens"] == bucket["tokens"]
            expected = {1: "cut", -1: "padded", 0: "kept"}
            sign = (before > bucket["tokens"]) - (before < bucket["tokens"])
            assert change["how"] == expected[sign] or abs(before - bucket["tokens"]) < 20
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "://" not in page


def test_rows_that_need_the_least_change_come_first(tmp_path: Path, folders: Any) -> None:
    out = run(tmp_path, pool(18), folders["word-level"], "--per_tier", "2", "--isl", "700")
    report = json.loads((out / "report.json").read_text())
    (bucket,) = report["buckets"]
    assert {tier: counts["rows"] for tier, counts in bucket["tiers"].items()} == dict.fromkeys(
        TIERS, 2
    )
    # Rows of odd number hold four times the text of the others.
    assert all(int(change["question_id"][1:]) % 2 for change in bucket["changes"])


def test_tiers_from_numbers(tmp_path: Path, folders: Any) -> None:
    out = run(tmp_path, pool(), folders["word-level"], "--entropy", "entropy")
    rows = pq.read_table(out / "throughput_300" / "test.parquet").to_pylist()
    assert {row["question_id"]: row["category"] for row in rows} == {
        f"r{i}": TIERS[i % 3] for i in range(9)
    }
    report = json.loads((out / "report.json").read_text())
    assert report["tiers"]["thresholds"] == [0.06, 1.07]


def test_one_seed_writes_the_same_bytes(tmp_path: Path, folders: Any) -> None:
    outs = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        out = run(tmp_path / name, pool(), folders["word-level"], "--isl", "600", "--seed", seed)
        outs.append((out / "throughput_600" / "test.parquet").read_bytes())
    assert outs[0] == outs[1] != outs[2]


def test_inexact_rows_are_listed_and_not_written(
    tmp_path: Path, folders: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pool()
    rows[3]["turns"] = ["First?", "Second?"]
    out = run(tmp_path, rows, folders["word-level"], "--per_tier", "3")
    report = json.loads((out / "report.json").read_text())
    (bucket,) = report["buckets"]
    assert bucket["inexact"] == [
        {
            "question_id": "r3",
            "tier": "low_entropy",
            "reason": "it has 2 turns, and a throughput row has one",
        }
    ]
    ids = pq.read_table(out / "throughput_300" / "test.parquet")["question_id"].to_pylist()
    assert sorted(ids) == [f"r{i}" for i in range(9) if i != 3]
    warning = "throughput_300 has 2 row(s) of low_entropy, 3 were asked for"
    assert warning in capsys.readouterr().err
    assert warning in bucket["warnings"][0]
    assert warning in (out / "report.html").read_text()


def test_a_row_that_the_template_refuses_is_listed(tmp_path: Path, folders: Any) -> None:
    folder = save(tmp_path / "strict", "word-level")
    path = folder / "tokenizer_config.json"
    settings_ = json.loads(path.read_text())
    strict = "{% if 'Note 4' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    path.write_text(json.dumps({**settings_, "chat_template": strict + CHAT}))
    out = run(tmp_path, pool(), folder)
    (bucket,) = json.loads((out / "report.json").read_text())["buckets"]
    assert [row["question_id"] for row in bucket["inexact"]] == ["r4"]
    assert "does not fit the chat template" in bucket["inexact"][0]["reason"]
    assert bucket["rows"] == 8


def test_an_unsteady_file_is_not_landed(
    tmp_path: Path, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ruler, "lengths", lambda self, texts: [300] * (len(texts) - 1) + [301])
    message = refused(tmp_path, pool(), folders["word-level"])
    assert "has 301 tokens once it is written, expected 300" in message
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_faults_are_one_sentence(tmp_path: Path, folders: Any) -> None:
    def fault(*flags: str, rows: Sequence[Row] | None = None) -> str:
        return refused(tmp_path, pool() if rows is None else rows, folders["word-level"], *flags)

    assert "--isl has '1m'" in fault("--isl", "1m")
    assert "names a length twice" in fault("--isl", "1k,1000")
    assert "3 row(s) are of the tier low_entropy, but 4" in fault("--per_tier", "4")
    assert "expected a JSON object" in fault("--chat_template_args", "[1]")
    assert "has no variable 'tone'" in fault("--chat_template_args", '{"tone": 1}')
    assert "belong together" in fault("--padding", "repeat")
    assert "not allowed with" in fault("--bare", "--completions")
    assert "no row can be made exactly 3 tokens" in fault("--isl", "3")
    mixed = [*pool()[:8], {**pool()[8], "tier": 3}]
    assert "row r0 has 'low_entropy' as its column 'tier'" in fault(rows=mixed)
    (tmp_path / "empty").mkdir()
    message = fault("--entropy", str(tmp_path / "empty"))
    assert "neither a column of the rows nor a language model" in message
    unknown = [{**row, "colour": 1} for row in pool()]
    assert "unknown column 'colour'" in fault(rows=unknown)


def test_without_entropy_the_category_is_the_tier(tmp_path: Path, folders: Any) -> None:
    rows = [{**row, "category": row["tier"], "sub_category": "code"} for row in pool()]
    for row in rows:
        del row["tier"], row["entropy"]
    source = write(tmp_path / "rows.jsonl", rows)
    argv = ["--from", str(source), "--tokenizer", str(folders["word-level"]), "--isl", "300"]
    out = tmp_path / "out"
    assert bucket_command([*argv, "--out", str(out)], "p") == 0
    found = pq.read_table(out / "throughput_300" / "test.parquet").to_pylist()
    assert {row["sub_category"] for row in found} == {"code"}
    rows[2]["category"] = "poems"
    write(source, rows)
    with pytest.raises(UserError, match="row r2 has the category 'poems', which is no tier"):
        bucket_command([*argv, "--out", str(tmp_path / "other")], "p")


def test_lengths_and_names() -> None:
    assert read_lengths("1k, 2k,32k,500") == (1000, 2000, 32000, 500)
    assert [bucket_name(n) for n in (1000, 32000, 1500)] == [
        "throughput_1k",
        "throughput_32k",
        "throughput_1500",
    ]
