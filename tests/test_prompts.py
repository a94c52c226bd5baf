"""Prompts: the same text gives the same token IDs, BOS once; the fingerprint sees any change.

Expected token IDs come from the `tokenizers` library itself, never from the code under test.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import speedbench.prompts as prompts
from speedbench.config import RunConfig
from speedbench.prompts import (
    PromptEncoder,
    final_message,
    fingerprint,
    read_history,
    template_variables,
    turn_sha256,
)
from speedbench.types import Conversation, UserError

CORPUS = ["the quick brown fox jumps over the lazy dog", "what is 2 + 2 ? it is 4 .", "def f(x):"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>", "<|start|>"]
SPECIAL += ["<|end|>", "<|return|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_BOS = "{{ bos_token }}" + CHATML
REASONING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content is defined and keep_reasoning %}({{ m.reasoning_content }})"
    "{% endif %}"
    "{{ m.content }}{% endfor %}[assistant]"
)
SPLITS_ITSELF = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% endfor %}[assistant]"
)


def byte_level(specials: Sequence[str] = SPECIAL) -> Tokenizer:
    """Byte-level BPE: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level(unknown: bool = True) -> Tokenizer:
    words = ["<s>", "</s>", "<unk>", "red", "green", "blue", "."]
    vocabulary = {word: i for i, word in enumerate(words) if unknown or word != "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if unknown else None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def adds(tokenizer: Tokenizer, template: str, *specials: str) -> Tokenizer:
    """The tokenizer with a post-processor that adds special tokens around any text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in specials]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


def save(
    folder: Path,
    tokenizer: Tokenizer,
    template: str | None = None,
    bos: str | None = "<s>",
    **files: Mapping[str, object],
) -> Path:
    """A checkpoint folder with a tokenizer, and further JSON files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def config(folder: Path | str | None, **fields: Any) -> RunConfig:
    model_dir = None if folder is None else str(folder)
    return RunConfig(engine="NULL", model_dir=model_dir, **fields)


def encoder(folder: Path | str | None, **fields: Any) -> PromptEncoder:
    return PromptEncoder(config(folder, **fields))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def token(text: str) -> int:
    """The ID of one special token."""
    return SPECIAL.index(text)


def raw(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def row(*turns: str, id: str = "q") -> Conversation:
    return Conversation(id, "c", turns)


BPE = byte_level()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that differ in who adds BOS: nobody, template, tokenizer, both."""
    root = tmp_path_factory.mktemp("tokenizers")
    adding = adds(byte_level(), "<s> $A </s>", "<s>", "</s>")
    return {
        "nobody": save(root / "nobody", BPE, CHATML),
        "template": save(root / "template", BPE, CHATML_BOS),
        "tokenizer": save(root / "tokenizer", adding, CHATML),
        "both": save(root / "both", adding, CHATML_BOS),
    }


# Rendering and encoding


def test_first_turns_are_rendered_with_the_template(folders: dict[str, Path]) -> None:
    rows = [row("what is 2 + 2 ?", "and 3 ?"), row("def f(x):\n\treturn é\U0001f600", id="r")]
    expected = [
        raw(BPE, f"<|im_start|>user\n{r.turns[0]}<|im_end|>\n<|im_start|>assistant\n") for r in rows
    ]
    assert expected[0][0] == token("<|im_start|>")
    assert encoder(folders["nobody"]).encode_first_turns(rows) == expected


def test_more_rows_than_one_batch_stay_in_order(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "BATCH_ROWS", 3)
    rows = [row(f"question {n}", id=str(n)) for n in range(8)]
    rows.insert(4, Conversation("t", "random", token_turns=((7, 0, 0, 9),)))
    found = encoder(folders["nobody"], completions=True).encode_first_turns(rows)
    assert found == [
        list(r.token_turns[0]) if r.token_turns else raw(BPE, r.turns[0]) for r in rows
    ]
    assert encoder(folders["nobody"]).encode_first_turns([]) == []


def test_later_turn_holds_the_conversation_so_far(folders: dict[str, Path]) -> None:
    reply = [*raw(BPE, " it is 4 ."), token("</s>")]
    text = (
        "<|im_start|>user\n2 + 2 ?<|im_end|>\n<|im_start|>assistant\n it is 4 .<|im_end|>\n"
        "<|im_start|>user\n3 ?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = encoder(folders["nobody"])
    conversation = row("2 + 2 ?", "3 ?", "4 ?")
    assert prompt.encode_turn(conversation, 1, [reply]) == raw(BPE, text)
    third = text + " six<|im_end|>\n<|im_start|>user\n4 ?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.encode_turn_from_text(conversation, 2, [" it is 4 .", " six"]) == raw(BPE, third)
    with pytest.raises(ValueError, match="follows 2 replies, not 1"):
        prompt.encode_turn(conversation, 2, [reply])


def test_completions_join_turns_and_replies_by_newlines(folders: dict[str, Path]) -> None:
    prompt = encoder(folders["tokenizer"], completions=True)
    conversation = row("one", "two", "three")
    bos = token("<s>")
    assert prompt.encode_first_turns([conversation]) == [[bos, *raw(BPE, "one")]]
    replies = [raw(BPE, "uno"), raw(BPE, "dos")]
    expected = [bos, *raw(BPE, "one\nuno\ntwo\ndos\nthree")]
    assert prompt.encode_turn(conversation, 2, replies) == expected


def test_tokens_pass_untouched(folders: dict[str, Path]) -> None:
    tokens = Conversation("t", "random", token_turns=((5, 0, 0, 1), (9,)))
    prompt = encoder(folders["both"])
    assert prompt.encode_first_turns([tokens]) == [[5, 0, 0, 1]]
    assert prompt.encode_turn(tokens, 1, [[3]]) == [9]
    assert prompt.encode_all_turns_frozen([tokens], {}) == [[[5, 0, 0, 1], [9]]]


def test_truncation_and_padding_stored_in_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    rows = [row("the quick brown fox jumps over the lazy dog"), row("a", id="r")]
    found = encoder(save(tmp_path, tokenizer), completions=True).encode_first_turns(rows)
    assert found == [raw(BPE, r.turns[0]) for r in rows]
    assert len(found[0]) > 4


def test_slow_tokenizer(tmp_path: Path) -> None:
    # ByT5's is pure Python: token ID = byte + 3, and it ends every text with </s>, ID 1.
    settings = {"tokenizer_class": "ByT5Tokenizer", "chat_template": "{{ messages[0].content }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    prompt = encoder(tmp_path)
    rows = [row("né"), row("b", id="r")]
    assert prompt.encode_first_turns(rows) == [[b + 3 for b in "né!".encode()], [101, 36]]
    assert prompt.reply_text([101, 102, 1]) == "bc"
    assert prompt.eos_token_ids == (1,)
    assert {0, 1, 2} & set(prompt.ordinary_token_ids) == set()
    assert {3, 258} <= set(prompt.ordinary_token_ids)


def test_date_in_a_template_is_the_same_every_day(tmp_path: Path) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}:"
    prompt = encoder(save(tmp_path, BPE, template))
    assert prompt.encode_first_turns([row("a")]) == [raw(BPE, "26 Jul 2024:")]


# BOS


@pytest.mark.parametrize(
    ("who", "n_bos"), [("nobody", 0), ("template", 1), ("tokenizer", 1), ("both", 1)]
)
@pytest.mark.parametrize("completions", [False, True])
def test_bos_is_added_once(
    folders: dict[str, Path], who: str, n_bos: int, completions: bool
) -> None:
    n_bos = int(who in ("tokenizer", "both")) if completions else n_bos
    text = "what is" if completions else None
    body = text or "<|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\n"
    expected = [0] * n_bos + raw(BPE, body)
    assert BPE.token_to_id("<s>") == 0
    prompt = encoder(folders[who], completions=completions)
    assert prompt.encode_first_turns([row("what is")]) == [expected]
    later = prompt.encode_turn(row("what is", "it"), 1, [raw(BPE, "x")])
    assert later.count(0) == n_bos
    assert later[: n_bos + 2] == expected[: n_bos + 2]


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, PromptEncoder]:
    made = {who: encoder(folder) for who, folder in folders.items()}
    return {**made, "completions": encoder(folders["tokenizer"], completions=True)}


@given(text=st.text().filter(lambda text: "<s>" not in text and text.strip()))
@example(text=" <s")
def test_bos_once_for_any_text(encoders: dict[str, PromptEncoder], text: str) -> None:
    for who in ("template", "tokenizer", "both"):
        (ids,) = encoders[who].encode_first_turns([row(text)])
        body = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert ids == [0, *raw(BPE, body)]
        assert ids.count(0) == 1
    (ids,) = encoders["completions"].encode_first_turns([row(text)])
    assert ids == [0, *raw(BPE, text)]


def test_bos_written_twice_by_the_template_is_folded(tmp_path: Path) -> None:
    prompt = encoder(save(tmp_path, BPE, "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"))
    assert prompt.encode_first_turns([row("a<s>b")]) == [[0, *raw(BPE, "a"), 0, *raw(BPE, "b")]]


def test_bos_that_is_also_eos_is_known_by_its_place(tmp_path: Path) -> None:
    ends = adds(byte_level(), "$A <s>", "<s>")
    begins = adds(byte_level(), "<s> $A", "<s>")
    plain = raw(BPE, "what is")
    for tokenizer, expected in ((ends, plain), (begins, [0, *plain])):
        prompt = encoder(save(tmp_path, tokenizer), completions=True)
        assert prompt.encode_first_turns([row("what is")]) == [expected]


def test_all_that_a_tokenizer_puts_in_front_is_kept(tmp_path: Path) -> None:
    # As GLM's: two tokens, written by the template too, and no token called BOS.
    tokenizer = adds(byte_level(), "<|start|> <|im_start|> $A", "<|start|>", "<|im_start|>")
    front = [token("<|start|>"), token("<|im_start|>")]
    template = "<|start|><|im_start|>{{ messages[0].content }}"
    for completions in (False, True):
        folder = save(tmp_path / str(completions), tokenizer, template, bos=None)
        prompt = encoder(folder, completions=completions)
        assert prompt.encode_first_turns([row("fox")]) == [[*front, *raw(BPE, "fox")]]


def test_word_level_tokenizers(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for unknown in (True, False):  # without one, a text with any other word is an error
        tokenizer = adds(word_level(unknown), "<s> $A", "<s>")
        prompt = encoder(save(tmp_path / str(unknown), tokenizer, template))
        assert prompt.encode_first_turns([row("red blue blue")]) == [[0, 3, 5, 5]]
        assert prompt.reply_text([4, 6, 3, 1]) == "green . red"
    message = refused(lambda: prompt.encode_first_turns([row("purple")]))
    assert "cannot encode a prompt (" in message
    assert "use a tokenizer that knows every character" in message


def test_a_tokenizer_that_drops_the_text_is_noticed(tmp_path: Path) -> None:
    """transformers puts Qwen2's own tokenizer in place of any that a model_type qwen2 brings; it
    knows none of these words, and every prompt became one token."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = save(tmp_path / "model", adds(word_level(), "<s> $A", "<s>"), template)
    rows = [row("red blue", id="a"), row("blue", id="b"), row("green", id="c")]
    assert len(encoder(folder).encode_first_turns(rows)) == 3
    unknown = [row(f"purple{i}", id=str(i)) for i in range(3)]  # each one <unk>
    message = refused(lambda: encoder(folder).encode_first_turns(unknown))
    assert "3 different prompts into 1 token sequence(s)" in message
    same = [row("red", id=str(i)) for i in range(3)]
    assert len(encoder(folder).encode_first_turns(same)) == 3


# Replies


def test_reply_text_is_what_the_model_wrote_without_special_tokens(
    folders: dict[str, Path],
) -> None:
    prompt = encoder(folders["nobody"])
    text = "it is 4 .\n don't, é\U0001f600"
    ids = [*raw(BPE, text), token("<|im_end|>"), token("</s>")]
    assert prompt.reply_text(ids) == text
    assert prompt.reply_text([]) == ""
    assert prompt.reply_text([token("</s>")]) == ""


def test_stop_token_that_is_not_special_is_no_part_of_the_reply(tmp_path: Path) -> None:
    stop = raw(BPE, "!")
    folder = save(tmp_path, BPE, CHATML, generation_config={"eos_token_id": stop})
    assert encoder(folder).reply_text([*raw(BPE, "a!b"), *stop]) == "a!b"


@pytest.mark.parametrize(
    ("reply", "kept"),
    [
        ("<|channel|>final<|message|>4<|return|>", "4"),
        (
            "<|channel|>analysis<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>"
            "It is\n4<|return|>",
            "It is\n4",
        ),
        (
            "<|channel|>commentary to=f<|message|>{}<|end|><|start|>assistant<|channel|>final"
            "<|message|>cut of",
            "cut of",
        ),
        ("<|channel|>analysis<|message|>the final answer is 4", ""),
        ("<|channel|>finality<|message|>no", ""),
        ("<|channel|>final", ""),
        ("4", ""),
        ("", ""),
    ],
)
def test_gptoss_keeps_the_final_channel_only(
    folders: dict[str, Path], reply: str, kept: str
) -> None:
    prompt = encoder(folders["nobody"], postprocess="gptoss")
    assert prompt.reply_text(raw(BPE, reply)) == kept
    assert final_message(reply) == kept


def test_gptoss_history_has_no_analysis(folders: dict[str, Path]) -> None:
    prompt = encoder(folders["nobody"], postprocess="gptoss")
    reply = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>4"
    ids = prompt.encode_turn(row("2 + 2 ?", "3 ?"), 1, [raw(BPE, reply)])
    text = BPE.decode(ids, skip_special_tokens=False)
    assert "<|im_start|>assistant\n4<|im_end|>" in text
    assert "hm" not in text


def later_prompt(folder: Path, reply: str, **fields: Any) -> str:
    """The second turn's prompt as text, after the given reply to the first."""
    ids = encoder(folder, **fields).encode_turn(row("a", "b"), 1, [raw(BPE, reply)])
    text: str = BPE.decode(ids, skip_special_tokens=False)
    return text


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("<think>\nwell\n</think>\n\n4", "(well)", "4"),
        ("well</think>4", "(well)", "4"),
        ("<think>\n\n</think>\n\n4", "()", "4"),
        ("<think>\ncut of", "(cut of)", ""),
        ("4", "", "4"),
        ("", "", ""),
    ],
)
def test_reasoning_goes_into_its_own_field(
    tmp_path: Path, reply: str, reasoning: str, answer: str
) -> None:
    folder = save(tmp_path, BPE, REASONING)
    assert later_prompt(folder, reply) == f"[user]a[assistant]{answer}[user]b[assistant]"
    kept = later_prompt(folder, reply, chat_template_args={"keep_reasoning": True})
    assert kept == f"[user]a[assistant]{reasoning}{answer}[user]b[assistant]"


def test_reasoning_opened_by_the_template_and_cut_is_no_answer(tmp_path: Path) -> None:
    folder = save(tmp_path, BPE, REASONING + "{{ '<think>\n' }}")
    assert later_prompt(folder, "cut of") == "[user]a[assistant][user]b[assistant]<think>\n"


def test_template_that_splits_reasoning_itself_gets_the_whole(tmp_path: Path) -> None:
    folder = save(tmp_path / "splits", BPE, SPLITS_ITSELF)
    expected = "[user]a[assistant]4[user]b[assistant]"
    assert later_prompt(folder, "<think>\nwell\n</think>\n\n4") == expected
    plain = save(tmp_path / "plain", BPE, SPLITS_ITSELF.replace(".split('</think>')[-1]", ""))
    expected = "[user]a[assistant]<think>well</think>4[user]b[assistant]"
    assert later_prompt(plain, "<think>well</think>4") == expected


@pytest.mark.parametrize(
    ("template", "opening"), [(SPLITS_ITSELF, ""), (REASONING, "<think>"), (CHATML, None)]
)
def test_special_tokens_at_which_the_template_splits_survive(
    tmp_path: Path, template: str, opening: str | None
) -> None:
    tokenizer = byte_level([*SPECIAL, "<think>", "</think>"])
    prompt = encoder(save(tmp_path, tokenizer, template))
    reply = raw(tokenizer, "<think>\nwell</think>\n\n it is 4<|im_end|></s>")
    if opening is None:  # the template knows of no reasoning
        assert prompt.reply_text(reply) == "\nwell\n\n it is 4"
        return
    assert prompt.reply_text(reply) == opening + "\nwell</think>\n\n it is 4"
    ids = prompt.encode_turn(row("a", "b"), 1, [reply])
    assert tokenizer.decode(ids) == "[user]a[assistant] it is 4[user]b[assistant]"


# Frozen history


def test_frozen_turns_equal_live_ones(folders: dict[str, Path]) -> None:
    rows = [row("a", "b", "c", id="x"), row("d", id="y"), row("e", "f", id="z")]
    history = {"x": ("one", "two", "ignored"), "z": ("three",), "other": ()}
    for fields in ({}, {"completions": True}):
        prompt = encoder(folders["both"], **fields)
        frozen = prompt.encode_all_turns_frozen(rows, history)
        assert [len(turns) for turns in frozen] == [3, 1, 2]
        assert [turns[0] for turns in frozen] == prompt.encode_first_turns(rows)
        replies = [raw(BPE, "one"), raw(BPE, "two")]
        assert frozen[0][1] == prompt.encode_turn(rows[0], 1, replies[:1])
        assert frozen[0][2] == prompt.encode_turn(rows[0], 2, replies)
        assert frozen[2][1] == prompt.encode_turn_from_text(rows[2], 1, ["three"])


def test_frozen_history_that_lacks_a_reply(folders: dict[str, Path]) -> None:
    prompt = encoder(folders["nobody"])
    message = refused(
        lambda: prompt.encode_all_turns_frozen([row("a", "b", "c", id="x")], {"x": ("one",)})
    )
    assert "holds 1 replies for conversation 'x', expected 2" in message
    assert "--history_from" in message


def test_read_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text(
        '{"question_id": 81, "replies": ["a\u2028b", ""]}\n\n{"question_id": "x", "replies": []}\n',
        encoding="utf-8",
    )
    assert read_history(path) == {"81": ("a\u2028b", ""), "x": ()}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"question_id": 1, "replies": ["a"]', "line 1 is not JSON ("),
        (b'\n["a"]', "line 2 has no question_id that is a string or a whole number"),
        (b'{"replies": ["a"]}', "line 1 has no question_id"),
        (b'{"question_id": true, "replies": ["a"]}', "line 1 has no question_id"),
        (b'{"question_id": 1, "replies": "a"}', "line 1 has no list of strings as 'replies'"),
        (b'{"question_id": 1, "replies": [1]}', "line 1 has no list of strings as 'replies'"),
        (
            b'{"question_id": 1, "replies": []}\n{"question_id": "1", "replies": []}',
            "line 2 repeats the question_id '1': keep one line",
        ),
        (b'{"question_id": "\xff"}', "cannot be read ('utf-8' codec"),
    ],
)
def test_bad_history(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    message = refused(lambda: read_history(path))
    assert message.startswith(f"--history_from {path}")
    assert sentence in message


def test_missing_history(tmp_path: Path) -> None:
    message = refused(lambda: read_history(tmp_path / "none.jsonl"))
    assert "cannot be read (" in message
    assert "give a run directory or a JSONL file" in message


# What a tokenizer and a model say of themselves


def test_eos_ids_of_model_and_tokenizer(tmp_path: Path) -> None:
    assert encoder(save(tmp_path / "a", BPE, CHATML)).eos_token_ids == (1,)
    files: Any = {
        "generation_config": {"eos_token_id": [9, 3, 1]},
        "config": {"eos_token_id": 7, "text_config": {"eos_token_id": [8]}},
    }
    assert encoder(save(tmp_path / "b", BPE, CHATML, **files)).eos_token_ids == (1, 3, 7, 8, 9)
    none: Any = {"generation_config": {}, "config": {"eos_token_id": None}}
    folder = save(tmp_path / "c", BPE, CHATML, **none)
    assert encoder(folder).eos_token_ids == (1,)
    # The model's ids hold, whatever tokenizer is named; without a model there are the tokenizer's.
    other = {"tokenizer": str(folder)}
    assert encoder(tmp_path / "b", **other).eos_token_ids == (1, 3, 7, 8, 9)
    assert encoder(None, **other).eos_token_ids == (1,)


def test_eos_ids_of_a_model_on_the_hub(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def download(repository: str, name: str) -> str:
        assert repository == "some-org/some-model"
        if name == "config.json":
            raise FileNotFoundError("not there")
        (tmp_path / name).write_text('{"eos_token_id": [5, 6]}')
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    prompt = encoder("some-org/some-model", tokenizer=str(folders["nobody"]))
    assert prompt.eos_token_ids == (1, 5, 6)


def test_bad_eos_id_and_damaged_config(tmp_path: Path) -> None:
    folder = save(tmp_path, BPE, CHATML, generation_config={"eos_token_id": "</s>"})
    message = refused(lambda: encoder(folder))
    assert "eos_token_id in generation_config.json" in message
    assert "is '</s>', expected a token ID or a list of them" in message
    (folder / "generation_config.json").write_text("{")
    message = refused(lambda: encoder(folder))
    assert "generation_config.json cannot be read as JSON (" in message
    assert "fetch the checkpoint again" in message


def test_ordinary_tokens_leave_out_special_and_added_ones(tmp_path: Path) -> None:
    tokenizer = byte_level()
    n_trained = tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken("plain_addition", special=False)])
    ordinary = encoder(save(tmp_path, tokenizer, CHATML)).ordinary_token_ids
    assert list(ordinary) == list(range(len(SPECIAL), n_trained))


# Faults of tokenizers and templates


def test_no_tokenizer_named() -> None:
    message = refused(lambda: encoder(None))
    assert message == "prompts need a tokenizer: add --model_dir or --tokenizer"


@pytest.mark.parametrize("name", ["none", "sub/none"])
def test_no_such_folder(tmp_path: Path, folders: dict[str, Path], name: str) -> None:
    path = tmp_path / name
    message = refused(lambda: encoder(path))
    assert message == f"--model_dir {path} is not a folder: give a checkpoint's folder or a hub id"
    message = refused(lambda: encoder(folders["both"], tokenizer=str(path)))
    assert message.startswith(f"--tokenizer {path} is not a folder")
    message = refused(lambda: encoder(path, tokenizer=str(folders["both"])))
    assert message.startswith(f"--model_dir {path} is not a folder")


def test_relative_paths_are_not_taken_for_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").touch()
    for name in ("./none", "../none", "models/none", "a/b/c", "file"):
        assert "is not a folder" in refused(partial(encoder, name))


def test_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    message = refused(lambda: encoder("some-org/some-model"))
    assert "--model_dir some-org/some-model gives no tokenizer (We couldn't connect" in message
    assert "a hub id that can be reached" in message

    def needs_trust(*args: object, **kwargs: object) -> None:
        raise ValueError("set the option `trust_remote_code=True` to remove this error.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs_trust)
    message = refused(lambda: encoder("some-org/some-model"))
    assert "add --trust_remote_code if you trust it" in message


@pytest.mark.parametrize("content", [None, "{bad", "{}"])
def test_folder_without_a_good_tokenizer(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        settings = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        (tmp_path / "tokenizer_config.json").write_text(settings)
    message = refused(lambda: encoder(tmp_path))
    assert message.startswith(f"--model_dir {tmp_path} gives no tokenizer (")
    assert "give a folder that holds a tokenizer" in message


def test_tokenizer_without_a_template(tmp_path: Path) -> None:
    folder = save(tmp_path, BPE)
    message = refused(lambda: encoder(folder))
    assert f"the tokenizer of {folder} has no chat template: add --completions" in message
    assert encoder(folder, completions=True).encode_first_turns([row("a")]) == [raw(BPE, "a")]
    tokens = Conversation("t", "random", token_turns=((5, 6),))
    prompt = encoder(folder, dataset="random", random_isl=2)
    assert prompt.encode_first_turns([tokens]) == [[5, 6]]


def test_several_templates(tmp_path: Path) -> None:
    save(tmp_path, BPE)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())

    def with_templates(**named: str) -> Path:
        templates = [{"name": name, "template": text} for name, text in named.items()]
        text = json.dumps({**settings, "chat_template": templates})
        (tmp_path / "tokenizer_config.json").write_text(text)
        return tmp_path

    prompt = encoder(with_templates(default="D{{ messages[0].content }}", tool_use="T"))
    assert prompt.encode_first_turns([row("a")]) == [raw(BPE, "Da")]
    message = refused(lambda: encoder(with_templates(rag="R", tool_use="T")))
    assert "has several chat templates and none is the default (" in message
    assert "--tokenizer" in message


def test_template_arguments(tmp_path: Path, folders: dict[str, Path]) -> None:
    template = "{{ 'yes' if enable_thinking else 'no' }}{{ effort | default('') }}" + CHATML_BOS
    folder = save(tmp_path, BPE, template)
    arguments = {"enable_thinking": True, "effort": "low"}
    prompt = encoder(folder, chat_template_args=arguments)
    (ids,) = prompt.encode_first_turns([row("a")])
    assert BPE.decode(ids, skip_special_tokens=False).startswith("yeslow<s>")
    message = refused(lambda: encoder(folder, chat_template_args={"enable_thinkng": True}))
    assert "has no variable 'enable_thinkng' (chat_template_args)" in message
    assert message.endswith("it has effort, enable_thinking")
    for reserved in ("messages", "bos_token", "add_generation_prompt"):
        call = partial(encoder, folder, chat_template_args={reserved: 1})
        assert "has no variable" in refused(call)
    nothing = refused(lambda: encoder(folders["both"], chat_template_args={"x": 1}))
    assert nothing.endswith("it has none")
    message = refused(lambda: encoder(folder, chat_template_args=arguments, completions=True))
    assert "--completions" in message
    assert "remove them" in message


def test_variables_of_a_template_are_those_of_its_caller() -> None:
    template = """{{- bos_token }}
    {%- macro call(x) %}{{ later(x) }}{% endmacro %}{%- macro later(x) %}{{ x }}{% endmacro %}
    {%- if not date_string is defined %}{%- set date_string = strftime_now('%Y') %}{%- endif %}
    {%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
    {%- if not tools is defined %}{%- set tools = none %}{%- endif %}
    {%- set ns = namespace(n=0) %}{{ range(3) | length }}{{ date_string }}
    {%- for message in messages %}{%- set text = message.content %}
    {%- if loop.first %}{% continue %}{% endif %}
    {%- generation -%}{{ call(text) }}{%- endgeneration -%}
    {%- if unknown_role %}{{ raise_exception('no') }}{% endif %}{%- endfor %}
    {%- if add_generation_prompt %}{{ eos_token }}{% endif %}"""
    expected = ["custom_tools", "date_string", "tools", "unknown_role"]
    assert template_variables(template, "x") == expected


def test_broken_template(tmp_path: Path) -> None:
    message = refused(lambda: encoder(save(tmp_path, BPE, "{% if %}")))
    assert f"the chat template of {tmp_path} is not valid (" in message
    assert "--completions" in message


def test_row_that_the_template_refuses(tmp_path: Path) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x"
    prompt = encoder(save(tmp_path, BPE, template))
    assert prompt.encode_first_turns([row("a", "b")]) == [raw(BPE, "x")]
    message = refused(lambda: prompt.encode_turn(row("a", "b", id="q7"), 1, [[]]))
    assert "conversation 'q7', turn 2 does not fit the chat template of" in message
    assert "(one turn only)" in message
    assert "remove the row, or add --completions" in message


# Fingerprints


def test_turn_hash_is_over_these_bytes() -> None:
    content = b"\x04\x00\x00\x00" + "qé1".encode() + b"\x02\x00\x00\x00"
    content += b"\x05\x00\x00\x00" + b"\x00\x01\x00\x00" + b"\x40\x0d\x03\x00"
    assert turn_sha256("qé1", 2, [5, 256, 200_000]) == hashlib.sha256(content).hexdigest()
    empty = b"\x00\x00\x00\x00\x00\x00\x00\x00"
    assert turn_sha256("", 0, []) == hashlib.sha256(empty).hexdigest()


def test_fingerprint_is_over_these_bytes() -> None:
    hashes = {("b", 0): "00" * 32, ("a", 1): "ff" * 32}
    content = b"\x01\x00\x00\x00a\x01\x00\x00\x00" + b"\xff" * 32
    content += b"\x01\x00\x00\x00b\x00\x00\x00\x00" + b"\x00" * 32
    assert fingerprint(hashes) == hashlib.sha256(content).hexdigest()


TURNS = st.dictionaries(
    st.tuples(st.text(max_size=4), st.integers(0, 5)),
    st.lists(st.integers(0, 2**31 - 1), max_size=6),
    max_size=6,
)


def hashed(turns: Mapping[tuple[str, int], Sequence[int]]) -> dict[tuple[str, int], str]:
    return {key: turn_sha256(*key, ids) for key, ids in turns.items()}


@given(turns=TURNS, shuffle=st.randoms(use_true_random=False))
def test_fingerprint_does_not_depend_on_order(
    turns: dict[tuple[str, int], list[int]], shuffle: Any
) -> None:
    items = list(hashed(turns).items())
    shuffle.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(hashed(turns))


@given(turns=TURNS, others=TURNS)
def test_fingerprint_sees_every_difference(
    turns: dict[tuple[str, int], list[int]], others: dict[tuple[str, int], list[int]]
) -> None:
    assert (fingerprint(hashed(turns)) == fingerprint(hashed(others))) == (turns == others)


@given(turns=TURNS.filter(bool), data=st.data())
def test_fingerprint_sees_the_smallest_change(
    turns: dict[tuple[str, int], list[int]], data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(turns)))
    ids = turns[key]
    changed = [dict(turns), {**turns, key: [*ids, 0]}]
    del changed[0][key]
    if ids:
        changed += [{**turns, key: [ids[0] ^ 1, *ids[1:]]}, {**turns, key: ids[1:]}]
    moved = dict(turns)
    moved[(key[0], 6)] = moved.pop(key)
    renamed = dict(turns)
    renamed[(key[0] + "longer", key[1])] = renamed.pop(key)
    for other in [*changed, moved, renamed]:
        assert fingerprint(hashed(other)) != fingerprint(hashed(turns))
