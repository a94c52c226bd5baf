"""The drafters with a known answer, against twins written from the papers, in torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from speedbench.calibration import weights
from speedbench.calibration.closed_form import (
    Case,
    ExpectedStep,
    KnownAnswer,
    parallel_draft_steps,
    read_known_answer,
)
from speedbench.calibration.verdict import ObservedRequest, judge_consistent, wrong_experts
from speedbench.types import RoutedExperts

Tensors = dict[str, Any]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


@pytest.fixture(scope="module")
def word(models: Path) -> Path:
    return models / "word"


def load(folder: Path, dtype: torch.dtype) -> Tensors:
    tensors = load_file(folder / "model.safetensors")
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def norm(x: Any, weight: Any) -> Any:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return scaled.to(x.dtype) * weight


def chain(function: Sequence[int], token: int, k: int) -> list[int]:
    """g(x), g(g(x)), ..."""
    said = []
    for _ in range(k):
        token = function[token]
        said.append(token)
    return said


PROMPT = [1, 700, 17, 17, 900, 5, 300, 1000, 44, 45]


def prompts(known: KnownAnswer) -> list[list[int]]:
    """Prompts whose next tokens are drafted rightly and wrongly."""
    rng = np.random.default_rng(0)
    found = [[*PROMPT, int(x)] for x in rng.integers(4, len(known.target_next), 24)]
    agreed = {known.target_next[p[-1]] == known.draft_next[p[-1]] for p in found}
    assert agreed == {True, False}
    return found


# ---------------------------------------------------------------- EAGLE3


def rotated(x: Any, positions: Any) -> Any:
    """Rotary embedding in the (i, i + d/2) layout: (T, heads, d) at `positions` (T)."""
    d = x.shape[-1]
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)[None, :]
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Eagle3:
    """One EAGLE3 layer with its KV cache (https://arxiv.org/abs/2503.01840, Figure 5)."""

    def __init__(self, target: Tensors, own: Tensors) -> None:
        self.target, self.own = target, own
        self.keys: list[Any] = []
        self.values: list[Any] = []

    def __call__(self, tokens: Any, positions: Any, hidden: Any) -> tuple[Any, Any]:
        """(logits over the draft vocabulary, output before the last norm) of each position."""
        w = {name.removeprefix("midlayer."): t for name, t in self.own.items()}
        embedded = norm(
            self.target["model.embed_tokens.weight"][tokens], w["input_layernorm.weight"]
        )
        both = torch.cat([embedded, norm(hidden, w["hidden_norm.weight"])], -1)
        q, k, v = (
            (both @ w[f"self_attn.{n}_proj.weight"].T).view(len(tokens), -1, weights.HEAD_DIM)
            for n in "qkv"
        )
        q, k = rotated(q, positions), rotated(k, positions)
        self.keys.append(k)
        self.values.append(v)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys.float()) / weights.HEAD_DIM**0.5
        seen = torch.arange(len(keys))[None, :] <= positions[:, None]
        mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(values.dtype)
        attended = torch.einsum("hqk,khd->qhd", mixed, values).flatten(1)
        out = attended @ w["self_attn.o_proj.weight"].T + hidden
        return norm(out, w["norm.weight"]) @ w["lm_head.weight"].T, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["eagle3", "eagle3-pruned"])
def test_eagle3_proposes_the_known_chain(word: Path, name: str, dtype: torch.dtype) -> None:
    known = read_known_answer(word / "target", word / name)
    target, own = load(word / "target", dtype), load(word / name, dtype)
    ids = torch.arange(len(known.target_next))
    if "d2t" in own:
        ids = torch.arange(len(own["d2t"])) + own["d2t"]
        assert own["t2d"].nonzero().flatten().tolist() == ids.tolist()
        assert 0.7 < len(ids) / len(known.target_next) < 0.8
    n_wrong = 0
    for prompt in prompts(read_known_answer(word / "target")):
        head = Eagle3(target, own)
        # The drafter's inputs are shifted by one: token x[i + 1] beside the target's state at i.
        tokens = torch.tensor([*prompt[1:], known.target_next[prompt[-1]]])
        aux = torch.cat([target["model.embed_tokens.weight"][torch.tensor(prompt)]] * 2, -1)
        logits, out = head(tokens, torch.arange(len(tokens)), aux @ own["fc.weight"].T)
        said = [int(ids[logits[-1].float().argmax()])]
        for i in range(4):
            logits, out = head(torch.tensor(said[-1:]), torch.tensor([len(tokens) + i]), out[-1:])
            said.append(int(ids[logits[-1].float().argmax()]))
        expected = chain(known.draft_next, int(tokens[-1]), 5)
        # Where a pruned vocabulary lacks the right word, near-ties decide which wrong one it says.
        right = next(
            (i for i, x in enumerate(expected) if not _is_right(known, tokens, expected, i)), 5
        )
        assert said[:right] == expected[:right]
        assert right == 5 or not _is_right(known, tokens, said, right)
        n_wrong += right < 5
    assert 0 < n_wrong < 24


def _is_right(known: KnownAnswer, tokens: Any, said: Sequence[int], i: int) -> bool:
    before = said[i - 1] if i else int(tokens[-1])
    return said[i] == known.target_next[before]


# ---------------------------------------------------------------- EAGLE, MTP, Medusa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["eagle", "eagle-sglang"])
def test_eagle_proposes_the_known_chain(word: Path, form: str, dtype: torch.dtype) -> None:
    known = read_known_answer(word / "target", word / form)
    target, own = load(word / "target", dtype), load(word / form, dtype)
    assert not any(own[n].any() for n in own if n.endswith(("o_proj.weight", "down_proj.weight")))
    assert ("fc.bias" in own) == (form == "eagle-sglang")
    table, rows = target["model.embed_tokens.weight"], target["lm_head.weight"]
    hidden = torch.randn_like(table)  # it must not matter
    out = torch.cat([table, hidden], -1) @ own["fc.weight"].T
    assert (out @ rows.T).float().argmax(-1).tolist() == list(known.draft_next)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mtp_predicts_the_known_next_but_one(word: Path, dtype: torch.dtype) -> None:
    known = read_known_answer(word / "mtp")
    w = load(word / "mtp", dtype)
    layer = "model.mtp_layers.0."
    table = norm(w["model.embed_tokens.weight"], w[f"{layer}token_layernorm.weight"])
    hidden = norm(torch.randn_like(table), w[f"{layer}hidden_layernorm.weight"])
    out = torch.cat([hidden, table], -1) @ w[f"{layer}input_proj.weight"].T
    logits = norm(out, w[f"{layer}final_layernorm.weight"]) @ w["lm_head.weight"].T
    assert logits.float().argmax(-1).tolist() == list(known.draft_next)


@pytest.mark.parametrize("dtype", DTYPES)
def test_medusa_heads_say_the_chain_of_the_next_token(word: Path, dtype: torch.dtype) -> None:
    known = read_known_answer(word / "target")
    target, w = load(word / "target", dtype), load(word / "medusa", dtype)
    hidden = norm(target["model.embed_tokens.weight"], target["model.norm.weight"])
    for k in range(5):
        h = hidden + torch.nn.functional.silu(hidden @ w[f"blocks.{k}.layers.0.weight"].T)
        said = (h @ w[f"lm_heads.{k}.weight"].T).float().argmax(-1).tolist()
        assert said == [chain(known.draft_next, f, k + 1)[-1] for f in known.target_next]


# ---------------------------------------------------------------- PARD, DFlash, routed experts


@pytest.mark.parametrize("dtype", DTYPES)
def test_dflash_fills_a_block_as_known(word: Path, dtype: torch.dtype) -> None:
    """One Qwen3 layer over the last token and K masks, every place seeing the whole block."""
    known = read_known_answer(word / "target", word / "dflash")
    mask = json.loads((word / "dflash/config.json").read_text())["dflash_config"]["mask_token_id"]
    assert known.after_mask == known.draft_next[mask]
    w = {name.removeprefix("layers.0."): t for name, t in load(word / "dflash", dtype).items()}
    assert not w["fc.weight"].any()  # so the context's keys and values are zero
    for position, token in ((4, 700), (900, 17), (4000, 1100)):
        block = torch.tensor([token, mask, mask, mask])
        positions = position + torch.arange(len(block))
        hidden = w["embed_tokens.weight"][block]
        normed = norm(hidden, w["input_layernorm.weight"])
        q, k, v = (
            (normed @ w[f"self_attn.{n}_proj.weight"].T).view(len(block), -1, weights.HEAD_DIM)
            for n in "qkv"
        )
        q = rotated(norm(q, w["self_attn.q_norm.weight"]), positions)
        k = rotated(norm(k, w["self_attn.k_norm.weight"]), positions)
        keys, values = torch.cat([torch.zeros_like(k), k]), torch.cat([torch.zeros_like(v), v])
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys.float()) / weights.HEAD_DIM**0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(dtype), values).flatten(1)
        out = hidden + mixed @ w["self_attn.o_proj.weight"].T
        said = (norm(out, w["norm.weight"]) @ w["lm_head.weight"].T).float().argmax(-1)
        assert said[1:].tolist() == [known.draft_next[token], known.after_mask, known.after_mask]


def test_drafts_after_masks_are_all_the_same(word: Path) -> None:
    known = read_known_answer(word / "target", word / "pard")
    mask = json.loads((word / "pard" / "config.json").read_text())["pard_token"]
    assert known.after_mask == known.draft_next[mask]
    ring = [1, 2, 3, 4, 5, 0]
    # After 1 the drafter says 2 and then, after every mask, 3: the third 3 is wrong.
    assert parallel_draft_steps([0], ring, ring, 3, 3, 6, ()) == [
        ExpectedStep((1,), 0, 0),
        ExpectedStep((2, 3, 4), 2, 3),
        ExpectedStep((5, 0), 1, 3),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_routes_as_known(word: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    known = read_known_answer(word / "moe")
    model = AutoModelForCausalLM.from_pretrained(word / "moe", dtype=dtype)
    with torch.inference_mode():
        tokens = torch.arange(len(known.target_next))[:, None]
        out = model(tokens, output_router_logits=True)
    assert out.logits[:, -1].float().argmax(-1).tolist() == list(known.target_next)
    chosen = torch.stack([layer.topk(2).indices for layer in out.router_logits], 1)
    assert chosen.tolist() == [[list(e) for e in routes] for routes in known.experts]
    pairs = {tuple(routes[0]) for routes in known.experts}
    assert len(pairs) == 8 * 7  # every ordered pair occurs


def request(
    output: Sequence[int], n_tokens: Sequence[int], **told: Sequence[int]
) -> ObservedRequest:
    n = len(n_tokens)
    columns = {"accepted": [-1] * n, "drafted": [-1] * n, "engine_steps": [1] * n, **told}
    return ObservedRequest("r", 0, "c", [5, 0], output, n_tokens, **columns)


RING = KnownAnswer(
    "ring", 1, (1, 2, 3, 4, 5, 0), (1, 2, 3, 4, 5, 0), (), experts=[[[t, 7]] for t in range(6)]
)


def experts(ids: Sequence[Sequence[int]], n_layers: int = 1) -> RoutedExperts:
    return RoutedExperts(len(ids), n_layers, 2, np.asarray(ids, "<i2").tobytes())


def test_wrong_experts_are_told() -> None:
    record = request([1, 2, 3], [1, 2])
    right = [[5, 7], [0, 7], [7, 1], [2, 7]]  # of prompt 5 0 and output 1 2; any order
    assert wrong_experts(record, experts(right), RING) is None
    assert "no experts" in str(wrong_experts(record, None, RING))
    assert "(3, 1, 2)" in str(wrong_experts(record, experts(right[:3]), RING))
    one_off = [*right[:3], [3, 7]]
    assert "1 of 4 choices differ; first: token 3, layer 0: [3, 7]" in str(
        wrong_experts(record, experts(one_off), RING)
    )


# ---------------------------------------------------------------- consistent, not known


CASE = Case("NGRAM", 3, 6, (), engine="SGLANG")
OUTPUT = [1, 2, 3, 4, 5, 0]
GOOD = request(OUTPUT, [1, 3, 1, 1], accepted=[0, 2, 0, 2], drafted=[0, 3, 0, 2])


def test_a_consistent_record_passes_and_says_what_is_not_known() -> None:
    verdict = judge_consistent([GOOD], RING, CASE, [("r", 0)])
    assert (verdict.ok, verdict.kind) == (True, "consistent")
    assert "acceptance is not known" in verdict.sentence
    untold = replace(GOOD, accepted=[-1] * 4, drafted=[-1] * 4)
    assert judge_consistent([untold], RING, CASE, [("r", 0)]).ok


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"output_ids": [1, 2, 3, 4, 5, 5]}, "wrong tokens"),
        ({"n_tokens": [2, 2, 1, 1]}, "prefill counted"),
        ({"accepted": [0, 2, 0, 3], "drafted": [3, 3, 0, 3]}, "prefill counted"),
        ({"engine_steps": [1, 2, 1, 1]}, "merged events"),
        ({"n_tokens": [1, 5], "accepted": [0, 4], "drafted": [0, 4], "engine_steps": [1, 1]},
         "merged events"),
        ({"drafted": [0, 4, 0, 2]}, "off-by-one K"),
        ({"accepted": [0, 1, 0, 2]}, "steps differ"),  # fewer than the tokens show
        ({"accepted": [0, 3, 0, 2]}, "steps differ"),  # more, and not the last step
        ({"drafted": [0, 1, 0, 2]}, "steps differ"),  # more accepted than drafted
        ({"n_tokens": [1, 3, 1]}, "steps differ"),
    ],
)  # fmt: skip
def test_an_inconsistent_record_is_named(change: dict[str, Any], fault: str) -> None:
    verdict = judge_consistent([replace(GOOD, **change)], RING, CASE, [("r", 0)])
    assert (verdict.ok, verdict.fault) == (False, fault), verdict.sentence


def test_a_missing_request_is_noticed() -> None:
    assert judge_consistent([GOOD], RING, CASE, [("r", 0), ("r", 1)]).fault == "missing requests"
    assert judge_consistent([], RING, CASE).fault == "missing requests"
