"""The transformers adapter: what it refuses, and its steps on tiny models with real attention."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.hf import (
    HfEngine,
    _NotAsExpectedError,
    _Recorder,
    check_options,
    check_sampling,
    refuse_flags,
)
from speedbench.types import (
    EngineDiedError,
    EngineSettings,
    Request,
    Sampling,
    Step,
    UserError,
)
from tests import hf_twin

VOCABULARY = 23
STOPS = (5, 11)
TINY = {"dtype": "float64"}  # so that no two logits are nearly equal


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concurrency": 2}, ["--concurrency", "2", "use --concurrency 1"]),
        ({"tp_size": 2}, ["--tp_size", "device_map"]),
        ({"pp_size": 2}, ["--pp_size"]),
        ({"dp_size": 2}, ["--dp_size"]),
        ({"ep_size": 2}, ["--ep_size"]),
        ({"prefix_cache": True}, ["--prefix_cache"]),
        ({"capture_experts": True}, ["--capture_experts"]),
        ({"block_size": 8}, ["--block_size"]),
        ({"draft_sample_method": "greedy"}, ["--draft_sample_method", "NONE"]),
        ({"algorithm": "DRAFT_TARGET"}, ["--draft_model_dir"]),
        ({"algorithm": "NGRAM", "draft_model_dir": "d"}, ["NGRAM", "--draft_model_dir"]),
        ({"algorithm": "EAGLE3"}, ["EAGLE3", "DRAFT_TARGET, NGRAM, NONE"]),
        ({"algorithm": "MTP"}, ["MTP", "not driven here"]),
        (
            {"algorithm": "DRAFT_TARGET", "draft_model_dir": "d", "draft_sample_method": "best"},
            ["best", "greedy or probabilistic"],
        ),
    ],
)
def test_a_flag_that_cannot_be_followed_is_refused(
    changes: dict[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        refuse_flags(EngineSettings("target", **changes))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("algorithm", "engine_args", "words"),
    [
        ("NONE", {"dtpye": "float32"}, ["dtpye", "did you mean dtype"]),
        ("NONE", {"num_assistant_tokens": 9}, ["--draft_length"]),
        ("NGRAM", {"prompt_lookup_num_tokens": 9}, ["--draft_length"]),
        ("NONE", {"max_matching_ngram_size": 3}, ["only NGRAM"]),
        ("NGRAM", {"max_matching_ngram_size": 0}, ["0", "from 1"]),
        ("NGRAM", {"max_matching_ngram_size": "3"}, ["'3'", "from 1"]),
        ("NONE", {"dtype": "float32", "torch_dtype": "float32"}, ["both"]),
        ("NONE", {"device": "cpu", "device_map": "auto"}, ["both"]),
    ],
)
def test_an_engine_argument_that_is_not_the_users_is_refused(
    algorithm: Any, engine_args: dict[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        check_options(EngineSettings("target", algorithm=algorithm, engine_args=engine_args))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"min_q": 0.1}, ["min_q", "did you mean min_p"]),
        ({"num_beams": 4}, ["num_beams", "speedbench sets"]),
        ({"eos_token_id": 3}, ["eos_token_id"]),
        ({"max_time": 3}, ["max_time"]),  # transformers would take it, and end answers by it
        ({"top_h": 0.5}, ["top_h"]),  # not known to the version below
    ],
)
def test_a_sampling_parameter_that_would_not_be_followed_is_refused(
    extra: dict[str, Any], words: Sequence[str]
) -> None:
    fields = {"min_p", "repetition_penalty", "max_time", "num_beams"}
    with pytest.raises(UserError) as refusal:
        check_sampling(Sampling(extra=extra), fields, "4.51.0")
    assert all(word in str(refusal.value) for word in words)
    check_sampling(Sampling(extra={"min_p": 0.1}), fields, "4.51.0")


def test_without_transformers_the_user_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install"):
        HfEngine(EngineSettings("target"))


def test_a_checkpoint_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as refusal:
        HfEngine(EngineSettings(str(tmp_path)))
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- the recorder


class Tokens(list[int]):
    """What a streamer is handed, as far as the recorder looks at it."""

    def reshape(self, _shape: int) -> Tokens:
        return self

    def tolist(self) -> list[int]:
        return list(self)


def recorded(
    blocks: Sequence[tuple[list[int], list[int], int | None]], max_tokens: int
) -> list[Step]:
    """Steps of (streamed tokens, draft, accepted as far as the logits tell)."""
    request = Request("r", [1, 2], max_tokens, Sampling(stop_token_ids=STOPS))
    recorder = _Recorder(request, assisted=True)
    recorder.put(Tokens([1, 2]))
    output: list[int] = []
    for tokens, draft, uncut in blocks:
        recorder.put(Tokens(tokens))
        recorder.take(draft, lambda uncut=uncut: uncut)
        output += tokens
    return recorder.finished(output)


def counts(steps: Sequence[Step]) -> list[tuple[tuple[int, ...], int | None, int | None]]:
    return [(tuple(step.token_ids), step.accepted, step.drafted) for step in steps]


@pytest.mark.parametrize(
    ("tokens", "draft", "uncut", "max_tokens", "step"),
    [
        ([7, 8, 9], [7, 8], 99, 4, ((7, 8, 9), 2, 2)),  # all accepted
        ([7, 1, 9][:2], [7, 8], 99, 3, ((7, 1), 1, 2)),  # the second refused
        ([7, 8], [7, 8, 9, 6], 4, 3, ((7, 8), 4, 4)),  # cut by the library at the limit
        ([7, 8], [7, 8, 9, 6], None, 3, ((7, 8), None, 4)),  # the same, sampled: not known
        ([7, 8, 9, 6], [7, 8, 9, 4], 99, 3, ((7, 8), 3, 4)),  # overrun by the library
        ([7, 5], [7, 5], 99, 9, ((7, 5), 2, 2)),  # the draft ends in a stop token
        ([5], [], 99, 9, ((5,), 0, 0)),  # nothing drafted
    ],
)
def test_a_last_step_tells_what_was_accepted_before_the_cut(
    tokens: list[int], draft: list[int], uncut: int | None, max_tokens: int, step: Any
) -> None:
    steps = recorded([([3], [], 99), (tokens, draft, uncut)], max_tokens)
    assert counts(steps) == [((3,), 0, 0), step]
    assert [s.finish_reason for s in steps] == [None, "stop" if 5 in tokens else "length"]


@pytest.mark.parametrize(
    "blocks",
    [
        [([3], [], 0), ([7, 8], [], 0), ([1], [], 0)],  # two tokens, nothing drafted
        [([3], [], 0), ([7, 8, 9], [7, 1], 0)],  # a token behind the one that was refused
        [([3], [], 0), ([], [7], 0)],
        [([5], [], 0), ([7], [7], 0)],  # goes on after a stop token
        [([3], [], 0)],  # ends too early
    ],
)
def test_blocks_that_no_verification_can_show_are_an_error(blocks: Any) -> None:
    with pytest.raises(_NotAsExpectedError):
        recorded(blocks, 4)


def test_tokens_that_differ_from_what_is_returned_are_an_error() -> None:
    recorder = _Recorder(Request("r", [1], 1, Sampling()), assisted=False)
    recorder.put(Tokens([1]))
    recorder.put(Tokens([3]))
    with pytest.raises(_NotAsExpectedError):
        recorder.finished([4])


# ---------------------------------------------------------------- tiny models


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target, draft (the target with noise) and wide (another vocabulary), whose every token
    depends on all before it. Their generation_config.json says what must not act."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 96, "initializer_range": 0.35,
    }  # fmt: skip
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    for name in ("target", "draft"):
        if name == "draft":
            for weight in model.parameters():
                weight.data += 0.04 * torch.randn_like(weight)
        model.save_pretrained(folder / name)
    LlamaForCausalLM(LlamaConfig(vocab_size=29, **sizes)).save_pretrained(folder / "wide")
    acts = GenerationConfig(eos_token_id=[1, 2, 3], pad_token_id=4, repetition_penalty=5.0)
    for name in ("target", "draft"):
        acts.save_pretrained(folder / name)
    return folder


@contextmanager
def started(tiny: Path, algorithm: Any, k: int, **changes: Any) -> Iterator[HfEngine]:
    arguments: dict[str, Any] = {"engine_args": TINY, **changes}
    if algorithm == "DRAFT_TARGET":
        arguments.setdefault("draft_model_dir", str(tiny / "draft"))
    engine = HfEngine(
        EngineSettings(str(tiny / "target"), algorithm=algorithm, draft_length=k, **arguments)
    )
    try:
        yield engine
    finally:
        engine.close()
        engine.close()


def answer(engine: HfEngine, request: Request) -> list[Step]:
    engine.submit(request)
    return list(engine.poll())


def greedy(folder: Path) -> hf_twin.Next:
    """The next token by one forward pass over everything, no cache, no generate."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder).to(torch.float64).eval()

    def next_token(context: Sequence[int]) -> int:
        with torch.no_grad():
            return int(model(torch.tensor([list(context)]), use_cache=False).logits[0, -1].argmax())

    return next_token


def prompts() -> list[list[int]]:
    rng = random.Random(2)
    found = [[rng.randrange(VOCABULARY) for _ in range(n)] for n in (1, 2, 5, 9, 14, 30)]
    return [*found, [4, 4, 4, 4, 7], [8, 9, 8, 9, 8]]  # 4 is the padding id of the checkpoint


def test_steps_are_those_of_decoding_without_a_cache(tiny: Path) -> None:
    """The draft model sees what was kept, all of it and nothing else: so do both caches."""
    target, draft = greedy(tiny / "target"), greedy(tiny / "draft")
    arms: Mapping[tuple[str, int], Any] = {
        ("NONE", 0): lambda _: hf_twin.nothing,
        ("DRAFT_TARGET", 1): lambda stops: hf_twin.draft_model(draft, 1, stops),
        ("DRAFT_TARGET", 4): lambda stops: hf_twin.draft_model(draft, 4, stops),
        ("NGRAM", 3): lambda stops: hf_twin.prompt_lookup(3, 2, stops),
    }
    kinds: dict[str, set[tuple[int, int, int]]] = {"DRAFT_TARGET": set(), "NGRAM": set()}
    for (algorithm, k), propose in arms.items():
        with started(tiny, algorithm, max(k, 1)) as engine:
            n_drafts = n_drafted = n_accepted = 0
            per_position = [0] * k
            for number, prompt in enumerate(prompts()):
                for stops, max_tokens in (((), 17), (STOPS, 17), ((), 1), ((), 2), (STOPS, 6)):
                    wanted = hf_twin.steps(prompt, target, propose(stops), max_tokens, stops)
                    sampling = Sampling(stop_token_ids=stops)
                    name = f"{number}-{max_tokens}"
                    found = answer(engine, Request(name, prompt, max_tokens, sampling))
                    assert counts(found) == [tuple(step) for step in wanted]
                    assert [s.finish_reason for s in found[:-1]] == [None] * (len(found) - 1)
                    last = found[-1].token_ids[-1]
                    assert found[-1].finish_reason == ("stop" if last in stops else "length")
                    times = [s.time_ns for s in found]
                    assert times == sorted(times)
                    for step in wanted:
                        n_drafts += step.drafted > 0
                        n_drafted += step.drafted
                        n_accepted += step.accepted
                        for position in range(step.accepted):
                            per_position[position] += 1
                        if algorithm in kinds:
                            kinds[algorithm].add((step.drafted, step.accepted, len(step.token_ids)))
            told = engine.counters()
            if k == 0:
                assert told is None
            else:
                assert told is not None
                assert (told.drafts, told.draft_tokens, told.accepted) == (
                    n_drafts,
                    n_drafted,
                    n_accepted,
                )
                assert told.accepted_per_position == tuple(per_position)
    # The prompts reach what they are for: every length of draft, full, partial and no acceptance,
    # and for n-grams a miss, and a block that the length limit cut.
    assert {d for d, _, _ in kinds["DRAFT_TARGET"]} == {0, 1, 2, 3, 4}
    assert {a for d, a, _ in kinds["DRAFT_TARGET"] if d == 4} >= {0, 1, 4}
    assert {d for d, _, _ in kinds["NGRAM"]} == {0, 1, 2, 3}
    assert any(n < a + 1 for _, a, n in kinds["NGRAM"])


def test_what_it_is_is_read_back(tiny: Path) -> None:
    with started(tiny, "DRAFT_TARGET", 4) as engine:
        info = engine.describe()
    assert (info.name, info.draft_length, info.max_num_seqs) == ("HF", 4, 1)
    assert (info.max_seq_len, info.vocab_size, info.prefix_cache) == (96, VOCABULARY, False)
    assert info.tells_drafted
    expected = {
        "dtype": "float64",
        "draft_dtype": "float64",
        "attn_implementation": "eager",
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
        "draft_sample_method": "probabilistic",
    }
    with started(
        tiny,
        "DRAFT_TARGET",
        4,
        max_seq_len=80,
        engine_args={**TINY, "attn_implementation": "eager"},
    ) as engine:
        info = engine.describe()
    assert info.max_seq_len == 80
    assert {name: info.settings[name] for name in expected} == expected
    args = {**TINY, "max_matching_ngram_size": 5}
    with started(tiny, "NGRAM", 2, engine_args=args) as engine:
        info = engine.describe()
    assert (info.draft_length, info.settings["ngram_min"], info.settings["ngram_max"]) == (2, 1, 5)


def test_models_that_do_not_fit_are_refused_at_the_start(tiny: Path) -> None:
    wide = started(tiny, "DRAFT_TARGET", 2, draft_model_dir=str(tiny / "wide"))
    with pytest.raises(UserError, match="29 tokens"), wide:
        pass
    with pytest.raises(UserError, match="96 positions"), started(tiny, "NONE", 1, max_seq_len=97):
        pass


def test_a_request_that_cannot_be_answered_fails_alone(tiny: Path) -> None:
    with started(tiny, "DRAFT_TARGET", 2) as engine:
        for prompt, words in (([], "empty"), ([3] * 90, "limit of 96"), ([VOCABULARY], "failed")):
            (step,) = answer(engine, Request("bad", prompt, 7, Sampling()))
            assert step.finish_reason == "error"
            assert words in (step.error or "")
        assert answer(engine, Request("good", [3], 7, Sampling()))[-1].finish_reason == "length"


def test_a_full_gpu_is_said_with_what_to_do_and_keeps_the_steps(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    with started(tiny, "NGRAM", 2) as engine:
        forward = engine._model.forward
        n_calls = 0

        def full(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            if n_calls == 4:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(*args, **kwargs)

        monkeypatch.setattr(engine._model, "forward", full)
        steps = answer(engine, Request("r", [3, 9, 4], 17, Sampling()))
        assert len(steps) == 4
        assert "lower --output_length" in (steps[-1].error or "")
        assert answer(engine, Request("s", [3], 3, Sampling()))[-1].finish_reason == "length"


def test_an_engine_that_cannot_go_on_says_so(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with started(tiny, "NONE", 1) as engine:
        with pytest.raises(EngineDiedError):
            engine.poll()
        monkeypatch.setattr(engine._model, "forward", broken)
        with pytest.raises(EngineDiedError, match="device-side"):
            answer(engine, Request("r", [3], 3, Sampling()))
    with pytest.raises(EngineDiedError):
        answer(engine, Request("r", [3], 3, Sampling()))


def test_a_version_that_drafts_elsewhere_is_refused(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.utils import GenerationMixin

    monkeypatch.delattr(GenerationMixin, "_get_candidate_generator")
    with pytest.raises(UserError, match="candidate generators"), started(tiny, "NGRAM", 2):
        pass


def test_a_version_that_streams_another_number_of_tokens_is_noticed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = _Recorder.put
    with started(tiny, "DRAFT_TARGET", 2) as engine:
        monkeypatch.setattr(_Recorder, "put", lambda self, value: put(self, value[..., :1]))
        with pytest.raises(EngineDiedError, match="does not decode as this adapter expects"):
            [answer(engine, Request(f"{i}", [i], 30, Sampling())) for i in range(20)]


def test_sampling_is_the_seeds(tiny: Path) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=7, extra={"min_p": 0.01})
    found = []
    for seed in (1, 1, 2):
        with started(tiny, "DRAFT_TARGET", 3, seed=seed) as engine:
            found.append(counts(answer(engine, Request("r", [3], 60, sampling))))
    assert found[0] == found[1] != found[2]


def test_a_checkpoint_that_lacks_weights_is_refused(models: Path) -> None:
    """transformers would fill them in at random and go on: an EAGLE3 head as a draft model."""
    with pytest.raises(UserError, match=r"lacks \d+ weight\(s\) of its architecture"):
        HfEngine(
            EngineSettings(
                str(models / "word/target"), str(models / "word/eagle3"), "DRAFT_TARGET", 3
            )
        )
