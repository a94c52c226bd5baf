"""The known answers themselves: closed forms, checkpoints, and verdicts on injected faults."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from speedbench.calibration.checkpoints import PROMPTS_FILE, VERSION, build
from speedbench.calibration.closed_form import (
    Case,
    ExpectedStep,
    KnownAnswer,
    acceptance_probabilities,
    draft_target_steps,
    expected_al,
    hf_draft_target_steps,
    hf_ngram_steps,
    next_token_logits,
    ngram_steps,
    overlap_probabilities,
    plain_steps,
    read_known_answer,
)
from speedbench.calibration.verdict import (
    N_EXACT_TRIALS,
    Fault,
    ObservedRequest,
    Verdict,
    _check_position,
    judge_greedy,
    judge_sampled,
    wrong_end,
)
from speedbench.calibration.words import DENSITIES, N_CYCLE, N_TAIL
from speedbench.types import UserError
from tests import hf_twin

EOS = 9
RING = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]  # 0 -> 1 -> ... -> 9 -> 0


def _lengths(steps: Sequence[ExpectedStep]) -> list[int]:
    return [len(step.token_ids) for step in steps]


# --- closed forms, by hand ------------------------------------------------------------------------


def test_perfect_drafter_is_cut_at_the_length_limit() -> None:
    """The numbers vLLM 0.32 gave for K=3: [1, 1] with 3 accepted, [1, 4, 2] with 6."""
    assert draft_target_steps([0], RING, RING, 3, 2, ()) == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((2,), 3, 3),
    ]
    assert draft_target_steps([0], RING, RING, 3, 7, ()) == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((2, 3, 4, 5), 3, 3),
        ExpectedStep((6, 7), 3, 3),
    ]


def test_perfect_drafter_counters_match_vllm() -> None:
    """2 requests, 48 tokens, K=3: 24 drafts, 72 accepted."""
    requests = [draft_target_steps([start], RING, RING, 3, 48, ()) for start in (0, 5)]
    decode = [step for steps in requests for step in steps[1:]]
    assert len(decode) == 24
    assert sum(step.accepted for step in decode) == 72
    assert expected_al(requests) == 4.0


def test_wrong_drafts_end_a_block() -> None:
    """The drafter is wrong after 2, 5 and 6."""
    draft = [1, 2, 7, 4, 5, 0, 0, 8, 9, 0]
    assert draft_target_steps([0], RING, draft, 3, 9, (EOS,)) == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((2, 3), 1, 3),  # drafts 2 7 8: the target says 3 after 2
        ExpectedStep((4, 5, 6), 2, 3),  # drafts 4 5 0
        ExpectedStep((7,), 0, 3),  # drafts 0 1 2
        ExpectedStep((8, 9), 3, 3),  # drafts 8 9 0 accepted beyond the stop token, then cut
    ]


def test_stop_token_as_the_prefill_token_and_as_the_last_of_a_block() -> None:
    assert draft_target_steps([8], RING, RING, 3, 5, (EOS,)) == [ExpectedStep((9,), 0, 0)]
    assert draft_target_steps([4], RING, RING, 3, 9, (EOS,)) == [
        ExpectedStep((5,), 0, 0),
        ExpectedStep((6, 7, 8, 9), 3, 3),
    ]


def test_plain_steps() -> None:
    assert plain_steps([6], RING, 4, (EOS,)) == [
        ExpectedStep((7,), 0, 0),
        ExpectedStep((8,), 0, 0),
        ExpectedStep((9,), 0, 0),
    ]
    assert _lengths(plain_steps([6], RING, 2, (EOS,))) == [1, 1]


def test_ngram_hits_partial_hits_and_misses() -> None:
    """Prompt 1 2 3 4 7 | 4 5 | 0: the answer runs 1 2 3 4 5 6 7 8 ..."""
    prompt = [1, 2, 3, 4, 7, 4, 5, 0]
    assert ngram_steps(prompt, RING, 3, 2, 3, 9, ()) == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((2,), 0, 0),  # no earlier "0 1": plain
        ExpectedStep((3, 4, 5), 2, 3),  # "1 2" was followed by 3 4 7: two right
        ExpectedStep((6,), 0, 3),  # "4 5" was followed by 0 1 2
        ExpectedStep((7,), 0, 0),
        ExpectedStep((8,), 0, 0),
        ExpectedStep((9,), 0, 0),
    ]


def test_ngram_prefers_the_longest_then_the_earliest_and_drafts_what_exists() -> None:
    # After the prefill the context ends in 5 6. "4 5 6" (3 tokens) beats the earlier "5 6".
    longest = ngram_steps([5, 6, 0, 4, 5, 6, 7, 8, 4, 5], RING, 2, 1, 3, 2, ())
    assert longest[1] == ExpectedStep((7,), 2, 2)
    # Twice "5 6": the earliest counts, and it was followed by 0.
    earliest = ngram_steps([5, 6, 0, 5, 6, 7, 1, 5], RING, 2, 2, 2, 2, ())
    assert earliest[1] == ExpectedStep((7,), 0, 2)
    # One token repeated: only one token follows the overlapping occurrence.
    overlap = ngram_steps([1], [0, 1], 3, 1, 2, 3, ())
    assert overlap == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((1, 1), 1, 1),
    ]


def test_expected_al_counts_uncut_decode_steps_only() -> None:
    assert expected_al([[ExpectedStep((1,), 0, 0)]]) is None
    assert expected_al([draft_target_steps([0], RING, RING, 3, 2, ())]) == 4.0


# --- closed forms, against a second formulation ---------------------------------------------------

ids = st.integers(0, 9)
functions = st.lists(ids, min_size=10, max_size=10)


@given(functions, functions, ids, st.integers(1, 6), st.integers(1, 40), st.sets(ids, max_size=2))
def test_draft_target_against_runs_of_agreement(
    target: list[int], draft: list[int], start: int, k: int, max_tokens: int, stop: set[int]
) -> None:
    """The answer is fixed beforehand; a step accepts the run of agreements that begins with it."""
    steps = draft_target_steps([start], target, draft, k, max_tokens, stop)
    chain = [start]
    for _ in range(max_tokens + k + 1):
        chain.append(target[chain[-1]])
    agrees = [draft[x] == target[x] for x in chain]
    answer = chain[1 : max_tokens + 1]
    ends = [i + 1 for i, token in enumerate(answer) if token in stop]
    answer = answer[: ends[0]] if ends else answer

    emitted = [token for step in steps for token in step.token_ids]
    assert emitted == answer
    assert steps[0] == ExpectedStep(tuple(answer[:1]), 0, 0)
    at = 1
    for step in steps[1:]:
        run = agrees[at : at + k]
        assert step.accepted == (run.index(False) if False in run else k)
        assert step.drafted == k
        at += step.accepted + 1
        assert len(step.token_ids) == min(step.accepted + 1, len(answer) - (at - step.accepted - 1))


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=25),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 25),
    st.sets(st.integers(0, 3), max_size=1),
)
def test_ngram_against_common_suffixes(
    prompt: list[int],
    target: list[int],
    k: int,
    low: int,
    more: int,
    max_tokens: int,
    stop: set[int],
) -> None:
    steps = ngram_steps(prompt, target, k, low, low + more, max_tokens, stop)
    context = list(prompt)
    for i, step in enumerate(steps):
        draft = _lookup(context, k, low, low + more) if i else []
        assert step.drafted == len(draft)
        accepted, last = 0, context[-1]
        while accepted < len(draft) and draft[accepted] == target[last]:
            last = draft[accepted]
            accepted += 1
        assert step.accepted == accepted
        whole = [*draft[:accepted], target[last]]
        assert list(step.token_ids) == whole[: len(step.token_ids)]
        if i < len(steps) - 1:
            assert len(step.token_ids) == len(whole)
        context += step.token_ids
    n_output = len(context) - len(prompt)
    assert n_output == max_tokens or context[-1] in stop
    assert not stop & set(context[len(prompt) : -1])


def _lookup(context: list[int], k: int, low: int, high: int) -> list[int]:
    """For every place, how far the text before it agrees with the end of the context."""
    best, at = 0, -1
    for end in range(1, len(context)):
        same = 0
        while same < min(high, end) and context[end - 1 - same] == context[-1 - same]:
            same += 1
        if same > best:
            best, at = same, end
    return context[at : at + k] if best >= low else []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 25),
    st.sets(st.integers(0, 3), max_size=1),
)
def test_transformers_rules_against_their_twin(
    prompt: list[int],
    target: list[int],
    draft: list[int],
    k: int,
    ngram_max: int,
    max_tokens: int,
    stop: set[int],
) -> None:
    for found, propose in (
        (
            hf_draft_target_steps(prompt, target, draft, k, max_tokens, stop),
            hf_twin.draft_model(hf_twin.bigram(draft), k, stop),
        ),
        (
            hf_ngram_steps(prompt, target, k, 1, ngram_max, max_tokens, stop),
            hf_twin.prompt_lookup(k, ngram_max, stop),
        ),
    ):
        twin = hf_twin.steps(prompt, hf_twin.bigram(target), propose, max_tokens, stop)
        assert [(s.token_ids, s.accepted, s.drafted) for s in found] == list(map(tuple, twin))


@given(functions, functions, st.integers(1, 6), st.integers(1, 40))
def test_steps_hold_at_most_k_plus_one_tokens_and_sum_to_the_limit(
    target: list[int], draft: list[int], k: int, max_tokens: int
) -> None:
    for steps in (
        draft_target_steps([0], target, draft, k, max_tokens, ()),
        ngram_steps([0, 1, 0], target, k, 1, 2, max_tokens, ()),
    ):
        assert sum(_lengths(steps)) == max_tokens
        assert max(_lengths(steps)) <= k + 1
        assert all(step.accepted <= step.drafted <= k for step in steps)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration")
    build(out)
    return out


@pytest.fixture(scope="session")
def word(pairs: Path) -> KnownAnswer:
    return read_known_answer(pairs / "word" / "target")


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_build_is_deterministic_and_idempotent(pairs: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pairs.rglob("*")}
    build(pairs)
    assert {path: path.stat().st_mtime_ns for path in pairs.rglob("*")} == before
    build(tmp_path / "again")
    assert _tree(tmp_path / "again") == _tree(pairs)
    shutil.rmtree(tmp_path / "again" / "bpe")
    build(tmp_path / "again")
    assert _tree(tmp_path / "again") == _tree(pairs)
    (tmp_path / "again" / "build.json").write_text('{"version": 0}')
    (tmp_path / "again" / "word" / "target" / "model.safetensors").write_bytes(b"half")
    build(tmp_path / "again")
    assert _tree(tmp_path / "again") == _tree(pairs)


def test_version_is_raised_when_the_word_pair_changes(pairs: Path) -> None:
    digest = hashlib.sha256()
    for path in sorted((pairs / "word").rglob("*")):
        if path.name in ("model.safetensors", "config.json", PROMPTS_FILE, "known_answer.json"):
            digest.update(path.read_bytes())
    assert (VERSION, digest.hexdigest()[:16]) == (3, "d2e16511b68918ed")


def test_build_without_its_corpus_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run from a checkout"):
        build(tmp_path / "out", tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="build the checkpoints again"):
        read_known_answer(tmp_path)


@pytest.mark.parametrize("pair", ["word", "bpe"])
def test_folders_are_complete_checkpoints(pairs: Path, pair: str) -> None:
    for role in ("target", "draft"):
        folder = pairs / pair / role
        generation = json.loads((folder / "generation_config.json").read_text())
        known = read_known_answer(pairs / pair / "target")
        assert tuple(generation["eos_token_id"]) == known.eos_token_ids
        config = json.loads((folder / "config.json").read_text())
        assert config["vocab_size"] == len(known.target_next) == len(known.draft_next)
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (folder / "tokenizer.json").is_file()
        assert "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())


def test_every_category_has_exactly_its_density(pairs: Path, word: KnownAnswer) -> None:
    vocabulary = json.loads((pairs / "word/target/tokenizer.json").read_text())["model"]["vocab"]
    assert word.densities == DENSITIES
    assert len(DENSITIES) == 11
    for category, density in DENSITIES.items():
        cycle = [vocabulary[f"{category}_{i:03d}"] for i in range(N_CYCLE)]
        assert [word.target_next[x] for x in cycle] == [*cycle[1:], cycle[0]]
        agreed = sum(word.target_next[x] == word.draft_next[x] for x in cycle)
        assert agreed == round(density * N_CYCLE)
        x = vocabulary[f"{category}_end_{N_TAIL:02d}"]
        for _ in range(N_TAIL):
            x = word.target_next[x]
        assert (x,) == word.eos_token_ids


def test_bpe_functions(pairs: Path) -> None:
    known = read_known_answer(pairs / "bpe" / "target")
    n_tokens = len(known.target_next)
    assert 1500 <= n_tokens <= 2000
    assert len(known.eos_token_ids) == 2
    ends = sum(x in known.eos_token_ids for x in known.target_next)
    assert n_tokens / 160 < ends < n_tokens / 140
    agreed = sum(f == g for f, g in zip(known.target_next, known.draft_next, strict=True))
    assert abs(agreed / n_tokens - 0.7) < 0.01


def _prompts(pairs: Path) -> list[dict[str, object]]:
    lines = (pairs / "word" / "target" / PROMPTS_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_calibration_prompts(pairs: Path, word: KnownAnswer) -> None:
    rows = _prompts(pairs)
    vocabulary = json.loads((pairs / "word/target/tokenizer.json").read_text())["model"]["vocab"]
    assert len(rows) == 242
    assert len({row["question_id"] for row in rows}) == 242
    columns = "question_id category sub_category turns source src_id difficulty multiturn"
    assert all(" ".join(row) == columns for row in rows)
    tail_distances = set()
    for category in DENSITIES:
        mine = [row for row in rows if row["category"] == category]
        single = [row["turns"][0] for row in mine if not row["multiturn"]]  # type: ignore[index]
        assert (len(single), len(mine)) == (20, 22)
        n_words = [len(turn.split()) for turn in single]
        assert (min(n_words), max(n_words)) == (3, 60)
        assert all(word in vocabulary for turn in single for word in turn.split())
        tails = [turn.rsplit("_", 1)[1] for turn in single if "_end_" in turn.split()[-1]]
        assert len(tails) >= 4
        tail_distances |= set(map(int, tails))
    assert tail_distances == set(range(1, N_TAIL + 1))


def test_prompts_end_answers_and_match_ngrams_in_every_way(pairs: Path, word: KnownAnswer) -> None:
    """All offsets of the stop token in a block; n-gram hits, partial hits and misses."""
    for k in (1, 3, 5):
        ends, counts = set(), set()
        for request in _prompt_ids(pairs).values():
            drafted = draft_target_steps(
                request, word.target_next, word.draft_next, k, 128, word.eos_token_ids
            )
            if drafted[-1].token_ids[-1] in word.eos_token_ids and len(drafted) > 1:
                ends.add((len(drafted[-1].token_ids), drafted[-1].accepted))
            looked_up = ngram_steps(request, word.target_next, k, 2, 4, 20, word.eos_token_ids)
            counts |= {(step.accepted, step.drafted) for step in looked_up[1:]}
        assert {n for n, _ in ends} == set(range(1, k + 2))
        assert {n for n, accepted in ends if accepted >= n} == set(range(1, k + 1))
        assert {(0, 0), *((accepted, k) for accepted in range(k + 1))} <= counts


def _prompt_ids(pairs: Path) -> dict[tuple[str, str], list[int]]:
    """(question id, category) -> token ids of every single-turn prompt, as the template makes."""
    vocabulary = json.loads((pairs / "word/target/tokenizer.json").read_text())["model"]["vocab"]
    found = {}
    for row in _prompts(pairs):
        if not row["multiturn"]:
            text = str(row["turns"][0])  # type: ignore[index]
            key = (str(row["question_id"]), str(row["category"]))
            found[key] = [vocabulary["<s>"], *(vocabulary[word] for word in text.split())]
    return found


def test_import_needs_no_framework() -> None:
    modules = "checkpoints closed_form suffix tokenizers verdict weights words"
    imports = "\n".join(f"import speedbench.calibration.{name}" for name in modules.split())
    heavy = "{'torch', 'transformers', 'tokenizers', 'safetensors'}"
    script = f"import sys\n{imports}\nassert not {heavy} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", ["word", "bpe"])
def test_transformers_decodes_the_known_answer(pairs: Path, pair: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    known = read_known_answer(pairs / pair / "target")
    for role, function in (("draft", known.draft_next), ("target", known.target_next)):
        folder = pairs / pair / role
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        with torch.inference_mode():
            logits = model(torch.arange(len(function))[:, None]).logits[:, -1].float()
        assert not logits.isnan().any()
        assert logits.argmax(-1).tolist() == list(function)
        error = np.abs(logits.numpy() - next_token_logits(folder)).max()
        assert error < (2e-3 if dtype == "float32" else 0.1)
    for prompt in ([5, 300, 17, 900], [7, 8] * 20):
        tokens = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        steps = plain_steps(prompt, known.target_next, 16, known.eos_token_ids)
        answer = [token for step in steps for token in step.token_ids]
        assert tokens[0, len(prompt) :].tolist() == answer


def test_tokenizers_and_templates(pairs: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def encode(pair: str, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(pairs / pair / "target")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = _prompt_ids(pairs)
    row = _prompts(pairs)[4]
    text, tokens = encode("word", [{"role": "user", "content": str(row["turns"][0])}])  # type: ignore[index]
    assert tokens == prompts[str(row["question_id"]), str(row["category"])]
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": " Elbe"},
        {"role": "user", "content": "Another,\n  in a far country, please"},
    ]
    text, tokens = encode("bpe", chat)
    assert text == (
        "<|bos|><|start|>system\nBe kind.<|end|>\n<|start|>user\nName a river.<|end|>\n"
        "<|start|>assistant\nRe: Name a river. Elbe<|end|>\n"
        "<|start|>user\nAnother,\n  in a far country, please<|end|>\n"
        "<|start|>assistant\nRe: Another, in a far co"
    )
    assert tokens.count(0) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(pairs / "bpe" / "target")
    assert tokenizer("a")["input_ids"][0] == 0  # like Llama 3: tokenizer and template both add BOS
    assert tokenizer.decode(tokens) == text
    word = transformers.AutoTokenizer.from_pretrained(pairs / "word" / "target")
    reply = word.decode([word.vocab["qa_001"], word.vocab["qa_002"], 2], skip_special_tokens=True)
    assert reply == "qa_001 qa_002"


# --- verdicts: greedy -----------------------------------------------------------------------------

Records = list[ObservedRequest]


def _observe(
    prompts: dict[tuple[str, str], list[int]], known: KnownAnswer, case: Case, told: bool = True
) -> Records:
    """What a correct engine and adapter would record."""
    records = []
    for (name, category), prompt in prompts.items():
        steps = case.steps(known, prompt)
        records.append(
            ObservedRequest(
                conversation_id=name,
                turn=0,
                category=category,
                prompt_ids=prompt,
                output_ids=[token for step in steps for token in step.token_ids],
                n_tokens=_lengths(steps),
                accepted=[step.accepted if told else -1 for step in steps],
                drafted=[step.drafted if told else -1 for step in steps],
                engine_steps=[1] * len(steps),
            )
        )
    return records


def _case(known: KnownAnswer, algorithm: str, k: int = 3, max_tokens: int = 20) -> Case:
    return Case(algorithm, k, max_tokens, known.eos_token_ids, 2, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 2, 5, 20, 128])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("algorithm", ["NONE", "DRAFT_TARGET", "NGRAM"])
def test_no_false_alarm(
    pairs: Path, word: KnownAnswer, algorithm: str, k: int, max_tokens: int, told: bool
) -> None:
    case = _case(word, algorithm, k, max_tokens)
    records = _observe(_prompt_ids(pairs), word, case, told)
    asked = [(record.conversation_id, record.turn) for record in records]
    verdict = judge_greedy(records, word, case, asked)
    assert (verdict.ok, verdict.fault, verdict.n_requests) == (True, None, 220), verdict.sentence
    assert verdict.n_steps == sum(len(record.n_tokens) for record in records)
    assert verdict.measured_al == verdict.expected_al
    if algorithm == "NONE" and max_tokens > 1:
        assert set(verdict.expected_al.values()) == {1.0}


def test_an_exact_verdict_says_what_was_not_told(pairs: Path, word: KnownAnswer) -> None:
    case = _case(word, "DRAFT_TARGET")
    told, untold = (_observe(_prompt_ids(pairs), word, case, it) for it in (True, False))
    assert "does not tell" not in judge_greedy(told, word, case).sentence
    n_decode = sum(len(record.n_tokens) - 1 for record in untold)
    sentence = judge_greedy(untold, word, case).sentence
    assert f"Of {n_decode} of them the engine does not tell" in sentence


@pytest.mark.parametrize(
    ("output", "reason", "is_right"),
    [
        ([5, 6, 9], "stop", True),
        ([5, 6, 9], "length", False),
        ([5, 6, 7, 8], "length", True),
        ([5, 6, 7, 8], "stop", False),
        ([5, 6, 7, 9], "stop", True),  # both at once: engines name either
        ([5, 6, 7, 9], "length", True),
        ([5, 6, 7], "length", False),  # steps are missing
        ([5, 6, 7], "stop", False),
        ([], "error", False),
    ],
)
def test_a_request_ends_at_a_stop_id_or_at_its_limit(
    output: list[int], reason: str, is_right: bool
) -> None:
    one = [1] * len(output)
    record = ObservedRequest("r", 0, "c", [1], output, one, one, one, one, reason)
    case = Case("NONE", 0, 4, (9,))
    assert (wrong_end(record, case) is None) is is_right


def test_expected_al_orders_the_categories(pairs: Path, word: KnownAnswer) -> None:
    case = _case(word, "DRAFT_TARGET", max_tokens=128)
    expected = judge_greedy(_observe(_prompt_ids(pairs), word, case), word, case).expected_al
    by_density = sorted(DENSITIES, key=lambda name: DENSITIES[name])
    assert expected[by_density[-1]] > 3.5
    assert expected[by_density[0]] < 1.7
    ranks = [sorted(expected, key=lambda name: expected[name]).index(name) for name in by_density]
    assert np.corrcoef(ranks, range(11))[0, 1] > 0.95


def _merge(record: ObservedRequest, at: int) -> ObservedRequest:
    """Steps `at` and `at` + 1 arrive as one event."""
    n = list(record.n_tokens)
    if len(n) < at + 2:
        return record
    merged: dict[str, Any] = {
        name: [*getattr(record, name)[:at], -1, *getattr(record, name)[at + 2 :]]
        for name in ("accepted", "drafted")
    }
    return replace(
        record,
        n_tokens=[*n[:at], n[at] + n[at + 1], *n[at + 2 :]],
        engine_steps=[1] * (len(n) - 1),
        **merged,
    )


def _some_merged(records: Records) -> Records:
    return [_merge(r, 2) if i % 7 == 0 else r for i, r in enumerate(records)]


def _honestly_merged(records: Records) -> Records:
    merged = _some_merged(records)
    return [
        replace(new, engine_steps=[*new.engine_steps[:2], 2, *new.engine_steps[3:]])
        if new != old
        else old
        for new, old in zip(merged, records, strict=True)
    ]


def _prefill_as_verify(records: Records) -> Records:
    return [replace(r, accepted=[0, *r.accepted[1:]], drafted=[3, *r.drafted[1:]]) for r in records]


def _counts_shifted(records: Records) -> Records:
    """The engine lists verify steps only; they were laid from the prefill on."""
    return [
        replace(r, accepted=[*r.accepted[1:], -1], drafted=[*r.drafted[1:], -1]) for r in records
    ]


def _prefill_merged(records: Records) -> Records:
    return [_merge(record, 0) for record in records]


def _final_as_seen(records: Records) -> Records:
    return [
        replace(r, accepted=[*r.accepted[:-1], r.n_tokens[-1] - 1]) if len(r.n_tokens) > 1 else r
        for r in records
    ]


def _other_tokens(records: Records) -> Records:
    output = [0, *records[7].output_ids[1:]]
    return [*records[:7], replace(records[7], output_ids=output), *records[8:]]


def _one_short(records: Records) -> Records:
    """A stop token that is dropped instead of counted."""
    first = next(i for i, r in enumerate(records) if r.n_tokens[-1] > 1)
    r = records[first]
    cut = replace(r, output_ids=r.output_ids[:-1], n_tokens=[*r.n_tokens[:-1], r.n_tokens[-1] - 1])
    return [*records[:first], cut, *records[first + 1 :]]


def _rejecting(records: Records) -> Records:
    return [
        replace(
            r,
            n_tokens=[1] * len(r.output_ids),
            accepted=[0] * len(r.output_ids),
            drafted=[0, *[3] * (len(r.output_ids) - 1)],
            engine_steps=[1] * len(r.output_ids),
        )
        for r in records
    ]


def _counts_garbled(records: Records) -> Records:
    at = next(i for i, r in enumerate(records) if len(r.accepted) > 3)
    r = records[at]
    garbled = replace(r, accepted=[0, 0, (r.accepted[2] + 1) % 3, *r.accepted[3:]])
    return [*records[:at], garbled, *records[at + 1 :]]


FAULTS: list[tuple[Callable[[Records], Records], Fault]] = [
    (_some_merged, "merged events"),
    (_honestly_merged, "merged events"),
    (_prefill_as_verify, "prefill counted"),
    (_counts_shifted, "prefill counted"),
    (_prefill_merged, "prefill counted"),
    (_final_as_seen, "final step counted"),
    (_other_tokens, "wrong tokens"),
    (_one_short, "wrong tokens"),
    (_rejecting, "nothing accepted"),
    (_counts_garbled, "steps differ"),
    (lambda records: records[:-3], "missing requests"),
    (lambda records: [*records, records[0]], "missing requests"),
    (lambda records: [], "missing requests"),
    (lambda records: [replace(records[0], accepted=[]), *records[1:]], "steps differ"),
]


@pytest.mark.parametrize("max_tokens", [5, 20, 128])
@pytest.mark.parametrize(("inject", "fault"), FAULTS)
def test_injected_fault_is_named(
    pairs: Path,
    word: KnownAnswer,
    inject: Callable[[Records], Records],
    fault: Fault,
    max_tokens: int,
) -> None:
    case = _case(word, "DRAFT_TARGET", max_tokens=max_tokens)
    records = _observe(_prompt_ids(pairs), word, case)
    asked = [(record.conversation_id, record.turn) for record in records]
    verdict = judge_greedy(inject(records), word, case, asked)
    assert (verdict.ok, verdict.fault) == (False, fault), verdict.sentence
    assert verdict.sentence.endswith(".")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("algorithm", ["DRAFT_TARGET", "NGRAM"])
@pytest.mark.parametrize("wrong_k", [2, 4])
def test_another_k_is_named(
    pairs: Path, word: KnownAnswer, algorithm: str, wrong_k: int, told: bool
) -> None:
    records = _observe(_prompt_ids(pairs), word, _case(word, algorithm, wrong_k), told)
    verdict = judge_greedy(records, word, _case(word, algorithm, 3))
    assert verdict.fault == "off-by-one K", verdict.sentence
    assert f"K={wrong_k}, asked was K=3" in verdict.sentence


def test_another_k_shows_in_the_counts_where_no_length_can(pairs: Path, word: KnownAnswer) -> None:
    """Answers of 5 tokens are too short for K=4 and K=5 to differ in length."""
    records = _observe(_prompt_ids(pairs), word, _case(word, "DRAFT_TARGET", 5, 5))
    assert judge_greedy(records, word, _case(word, "DRAFT_TARGET", 4, 5)).fault == "off-by-one K"


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("pair", ["word", "bpe"])
def test_swapped_drafter_is_named(pairs: Path, word: KnownAnswer, pair: str, told: bool) -> None:
    known = read_known_answer(pairs / pair / "target")
    case = _case(known, "DRAFT_TARGET")
    prompts = _prompt_ids(pairs)
    itself = replace(known, draft_next=known.target_next)
    verdict = judge_greedy(_observe(prompts, itself, case, told), known, case)
    assert verdict.fault == "swapped drafter"
    assert "drafting for itself" in verdict.sentence
    exchanged = replace(known, draft_next=known.target_next, target_next=known.draft_next)
    verdict = judge_greedy(_observe(prompts, exchanged, case, told), known, case)
    assert verdict.fault == "swapped drafter"
    assert "exchanged" in verdict.sentence


def test_faults_without_told_counts_and_in_other_algorithms(pairs: Path, word: KnownAnswer) -> None:
    prompts = _prompt_ids(pairs)
    for algorithm in ("NONE", "DRAFT_TARGET", "NGRAM"):
        case = _case(word, algorithm)
        records = _observe(prompts, word, case, told=False)
        assert judge_greedy(_some_merged(records), word, case).fault == "merged events"
        assert judge_greedy(_prefill_merged(records), word, case).fault == "prefill counted"
        assert judge_greedy(_other_tokens(records), word, case).fault == "wrong tokens"
    silent = [replace(r, engine_steps=[0] * len(r.n_tokens)) for r in records]
    verdict = judge_greedy(silent, word, case)
    assert verdict.ok
    assert "cannot say" in verdict.sentence


def test_which_of_two_one_token_steps_was_drafted_need_not_be_told() -> None:
    """An n-gram drafter that finds 3 and 7 in the prompt, in vain; which steps is open."""
    known = KnownAnswer("ring", 1, tuple(RING), tuple(RING), (EOS,))
    case = Case("NGRAM", 2, 7, (), ngram_min=1, ngram_max=1)
    prompt = [3, 7, 2, 0, 1, 9, 2]  # -> 3 4 5 6 7 8 9; 3 7 is drafted after 3, 2 0 after 7
    steps = case.steps(known, prompt)
    told = [(len(s.token_ids), s.accepted, s.drafted) for s in steps]
    assert told == [(1, 0, 0), (1, 0, 2), (1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 0, 2), (1, 0, 0)]

    def record(drafted: Sequence[int]) -> ObservedRequest:
        return ObservedRequest(
            "r", 0, "c", prompt, [3, 4, 5, 6, 7, 8, 9], [1] * 7, [0] * 7, drafted, [1] * 7
        )

    assert judge_greedy([record([0, 2, 0, 0, 0, 2, 0])], known, case).ok
    other_order = judge_greedy([record([0, 0, 2, 0, 0, 0, 2])], known, case)
    assert other_order.ok
    assert "In 1 of them the engine tells how many" in other_order.sentence
    one_more = judge_greedy([record([0, 2, 2, 0, 0, 2, 0])], known, case)
    assert not one_more.ok
    prefill = judge_greedy([record([2, 0, 0, 0, 0, 2, 0])], known, case)
    assert (prefill.ok, prefill.fault) == (False, "prefill counted")


def test_the_first_mismatch_is_told_in_a_sentence() -> None:
    known = KnownAnswer("toy", 1, tuple(RING), tuple(RING), (EOS,))
    case = Case("DRAFT_TARGET", 3, 6, (EOS,))
    record = ObservedRequest(
        "c1", 2, "", [0], [1, 2, 3, 4, 5, 6], [1, 4, 1], [0, 3, 0], [0, 3, 3], [1] * 3
    )
    verdict = judge_greedy([record], known, case)
    assert verdict.fault == "final step counted"
    assert verdict.sentence == (
        "1 of 1 requests differ; first: request c1 turn 2, step 2: found 1 tokens [6] "
        "(accepted 0, drafted 3), expected 1 tokens [6] (accepted 3, drafted 3). "
        "Where a request ends inside a block, the cut length is reported as accepted."
    )
    with pytest.raises(UserError, match="no known answer"):
        judge_greedy([record], known, replace(case, algorithm="NGRAM", engine="SGLANG"))


@settings(max_examples=60)
@given(st.data())
def test_any_change_of_a_record_is_noticed(data: st.DataObject) -> None:
    known = KnownAnswer("toy", 1, tuple(RING), (1, 2, 7, 4, 5, 0, 0, 8, 9, 0), (EOS,))
    case = Case("DRAFT_TARGET", data.draw(st.integers(1, 4)), data.draw(st.integers(2, 12)), ())
    record = _observe({("a", ""): [data.draw(ids)]}, known, case)[0]
    column = data.draw(st.sampled_from(["output_ids", "n_tokens", "accepted", "drafted"]))
    values = list(getattr(record, column))
    at = data.draw(st.integers(0, len(values) - 1))
    values[at] += data.draw(st.sampled_from([1, 2, 5]))
    change: dict[str, Any] = {column: values}
    verdict = judge_greedy([replace(record, **change)], known, case)
    assert not verdict.ok
    assert verdict.fault is not None


# --- verdicts: sampled ----------------------------------------------------------------------------


def _probabilities(folder: Path, temperature: float) -> NDArray[np.float64]:
    """(V, V) target distribution after every token."""
    weights = np.exp(next_token_logits(folder) / temperature)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _sample(
    prompts: dict[tuple[str, str], list[int]],
    known: KnownAnswer,
    cumulative: NDArray[np.float64],
    k: int,
    max_tokens: int,
    rng: np.random.Generator,
    told: bool = True,
) -> Records:
    """A correct engine at temperature > 0: target samples, drafts are kept while they agree."""

    def draw(context: int) -> int:
        return int(np.searchsorted(cumulative[context], rng.random()))

    records = []
    for (name, category), prompt in prompts.items():
        output, n_tokens, accepted, drafted = [draw(prompt[-1])], [1], [0], [0]
        while len(output) < max_tokens and output[-1] not in known.eos_token_ids:
            block: list[int] = []
            context = output[-1]
            for _ in range(k):
                draft = known.draft_next[context]
                block.append(draw(context))
                context = block[-1]
                if context != draft:
                    break
            else:
                block.append(draw(context))
            hits = len(block) - 1
            block = block[: max_tokens - len(output)]
            end = next((i for i, x in enumerate(block) if x in known.eos_token_ids), len(block))
            block = block[: end + 1]
            output += block
            n_tokens.append(len(block))
            accepted.append(hits if told else -1)
            drafted.append(k if told else -1)
        steps = [1] * len(n_tokens)
        records.append(
            ObservedRequest(name, 0, category, prompt, output, n_tokens, accepted, drafted, steps)
        )
    return records


@pytest.fixture(scope="session")
def cumulative(pairs: Path) -> NDArray[np.float64]:
    return np.asarray(_probabilities(pairs / "word" / "target", 1.0).cumsum(axis=1))


def _acceptance(pairs: Path, temperature: float) -> NDArray[np.float64]:
    folder = pairs / "word"
    return acceptance_probabilities(folder / "target", folder / "draft", temperature)


def test_acceptance_probabilities(pairs: Path, word: KnownAnswer) -> None:
    agrees = np.asarray(word.target_next) == np.asarray(word.draft_next)
    assert np.array_equal(_acceptance(pairs, 0.0), agrees.astype(float))
    at_one = _acceptance(pairs, 1.0)
    assert 0.6 < np.median(at_one[agrees]) < 0.95
    assert at_one[~agrees].max() < 0.01
    rows = np.arange(len(agrees))
    exact = _probabilities(pairs / "word" / "target", 1.0)[rows, np.asarray(word.draft_next)]
    assert np.allclose(at_one, exact, rtol=1e-12)
    assert np.all(_acceptance(pairs, 0.5)[agrees] >= at_one[agrees])


@pytest.mark.parametrize("told", [True, False])
def test_sampled_run_passes(
    pairs: Path, word: KnownAnswer, cumulative: NDArray[np.float64], told: bool
) -> None:
    rng = np.random.default_rng(5)
    records = _sample(_prompt_ids(pairs), word, cumulative, 3, 40, rng, told)
    verdict = judge_sampled(records, word, _acceptance(pairs, 1.0), 3)
    assert verdict.ok, verdict.sentence
    assert [check.position for check in verdict.positions] == [1, 2, 3]
    assert "level 0.999" in verdict.sentence
    assert all(c.low < c.expected < c.high for c in verdict.positions)


def test_sampled_false_alarms_are_as_rare_as_stated(
    pairs: Path, word: KnownAnswer, cumulative: NDArray[np.float64]
) -> None:
    rng = np.random.default_rng(11)
    chances = _acceptance(pairs, 1.0)
    prompts = dict(list(_prompt_ids(pairs).items())[::20])
    n_alarms = 0
    for _ in range(200):
        records = _sample(prompts, word, cumulative, 3, 20, rng)
        n_alarms += not judge_sampled(records, word, chances, 3, level=0.9).ok
    assert n_alarms <= 33  # 20 expected at most; exceeded by chance once in 1,000


def _rejected_draft_emitted(records: Records, known: KnownAnswer) -> Records:
    """What vLLM 0.32 does on the CPU above temperature 0: it divides by uninitialised memory."""
    at = next(i for i, r in enumerate(records) if r.accepted[1:2] == [0] and len(r.accepted) > 2)
    output = list(records[at].output_ids)
    output[1] = known.draft_next[output[0]]
    return [*records[:at], replace(records[at], output_ids=output), *records[at + 1 :]]


def test_sampled_faults_are_named(
    pairs: Path, word: KnownAnswer, cumulative: NDArray[np.float64]
) -> None:
    prompts, chances = _prompt_ids(pairs), _acceptance(pairs, 1.0)
    rng = np.random.default_rng(3)
    good = _sample(prompts, word, cumulative, 3, 40, rng)
    untold = _sample(prompts, word, cumulative, 3, 40, rng, told=False)

    def fault(records: Records, k: int = 3) -> str | None:
        return judge_sampled(records, word, chances, k).fault

    assert fault(_sample(prompts, word, cumulative, 4, 40, rng)) == "off-by-one K"
    for wrong_k in (2, 4):
        other = _sample(prompts, word, cumulative, wrong_k, 40, rng, told=False)
        assert fault(other) == "off-by-one K"
    assert fault(_some_merged(untold)) == "merged events"
    assert fault(_honestly_merged(good)) == "merged events"
    assert fault(_prefill_as_verify(good)) == "prefill counted"
    assert fault(_final_as_seen(good)) == "final step counted"
    assert fault(_rejected_draft_emitted(good, word)) == "wrong tokens"
    itself = replace(word, draft_next=word.target_next)
    assert fault(_sample(prompts, itself, cumulative, 3, 40, rng)) == "swapped drafter"
    assert fault([good[0], *good]) == "missing requests"
    assert fault([replace(good[0], output_ids=[1]), *good]) == "missing requests"
    assert fault([replace(good[0], output_ids=[]), *good[1:]]) == "steps differ"
    assert fault(_observe(prompts, word, _case(word, "DRAFT_TARGET", max_tokens=1))) == (
        "too few steps"
    )
    warm = np.asarray(_probabilities(pairs / "word" / "target", 1.1).cumsum(axis=1))
    assert fault(_sample(prompts, word, warm, 3, 40, rng)) == "acceptance rate"


def _sample_both(
    prompts: dict[tuple[str, str], list[int]],
    known: KnownAnswer,
    p: NDArray[np.float64],
    q: NDArray[np.float64],
    k: int,
    max_tokens: int,
    rng: np.random.Generator,
) -> Records:
    """Speculative sampling as Leviathan et al. (2023) define it: drafts from q, target p."""
    records = []
    for (name, category), prompt in prompts.items():
        output = [int(rng.choice(len(p), p=p[prompt[-1]]))]
        n_tokens, accepted, drafted = [1], [0], [0]
        while len(output) < max_tokens and output[-1] not in known.eos_token_ids:
            block: list[int] = []
            context = output[-1]
            for _ in range(k):
                draft = int(rng.choice(len(q), p=q[context]))
                if rng.random() < p[context, draft] / q[context, draft]:
                    block.append(draft)
                    context = draft
                    continue
                rest = np.maximum(p[context] - q[context], 0)
                block.append(int(rng.choice(len(p), p=rest / rest.sum())))
                break
            else:
                block.append(int(rng.choice(len(p), p=p[context])))
            accepted.append(len(block) - 1)
            block = block[: max_tokens - len(output)]
            end = next((i for i, x in enumerate(block) if x in known.eos_token_ids), len(block))
            block = block[: end + 1]
            output += block
            n_tokens.append(len(block))
            drafted.append(k)
        records.append(
            ObservedRequest(
                name, 0, category, prompt, output, n_tokens, accepted, drafted, [1] * len(n_tokens)
            )
        )
    return records


def test_sampled_drafts_are_judged_by_the_overlap(pairs: Path, word: KnownAnswer) -> None:
    folder = pairs / "word"
    prompts = dict(list(_prompt_ids(pairs).items())[::4])
    p = _probabilities(folder / "target", 1.0)
    rng = np.random.default_rng(17)
    for draft_temperature in (1.0, 1.5):
        q = _probabilities(folder / "draft", draft_temperature)
        records = _sample_both(prompts, word, p, q, 3, 20, rng)

        def judge(law: float, found: Records = records) -> Verdict:
            chances = overlap_probabilities(folder / "target", folder / "draft", 1.0, law)
            return judge_sampled(found, word, chances, 3, drafts_are_sampled=True)

        assert judge(draft_temperature).ok, judge(draft_temperature).sentence
        assert judge(2.5 - draft_temperature).fault == "acceptance rate"
    untold = [replace(records[0], accepted=[-1] * len(records[0].accepted)), *records[1:]]
    assert judge(1.5, untold).fault == "steps differ"
    assert judge(1.5, _some_merged(records)).fault in ("steps differ", "merged events")


def test_greedy_run_is_judged_exactly_at_temperature_0(pairs: Path, word: KnownAnswer) -> None:
    chances = _acceptance(pairs, 0.0)
    records = _observe(_prompt_ids(pairs), word, _case(word, "DRAFT_TARGET"))
    verdict = judge_sampled(records, word, chances, 3)
    assert verdict.ok
    assert all(c.low == c.n_accepted == c.high for c in verdict.positions)
    chances[records[0].output_ids[0]] = 1 - chances[records[0].output_ids[0]]
    assert judge_sampled(records, word, chances, 3).fault == "acceptance rate"


def test_interval_of_a_sum_of_draws() -> None:
    fair = _check_position(1, np.full(4, 0.5), 0, 0.2)  # P(0) = P(4) = 1/16 < 0.1
    assert (fair.low, fair.high, fair.ok) == (1, 3, False)
    many = np.full(N_EXACT_TRIALS, 0.3)
    exact = _check_position(1, many, 600, 0.001)
    normal = _check_position(1, np.append(many, 0.0), 600, 0.001)
    assert abs(exact.low - normal.low) < 1.5
    assert abs(exact.high - normal.high) < 1.5
