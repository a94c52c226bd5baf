"""The weights of calibration checkpoints, as plain arrays: what each kind of model does with x.

A token's embedding has three blocks of unit length: NOW names the token itself, BEFORE names the
token whose successor the drafter proposes, and ROUTE holds a constant and the experts it goes to.
Attention and MLP of the target add nothing, and its head reads NOW only, so it says f(x). A
drafter that shares the target's head moves BEFORE to where NOW was: it says f(before(x)) = g(x).
Entries are small multiples of powers of two, so float32, bfloat16 and float16 agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]

BLOCK = 256  # a power of four: signs / sqrt(BLOCK) are exact
HIDDEN = 3 * BLOCK
NOW, BEFORE, ROUTE = slice(0, BLOCK), slice(BLOCK, 2 * BLOCK), slice(2 * BLOCK, HIDDEN)
NORM_FACTOR = 16.0
"""What RMSNorm multiplies an embedding by: sqrt(HIDDEN / 3)."""
HEAD_DIM = 64  # GPU kernels take 64
INTERMEDIATE = 128
HEAD_SCALE = 9 / 16
"""Puts the logit of f(x) at 9: at temperature 1 its probability is about 0.8."""

N_CONSTANT = 96  # entries of 1/16: squares sum to 3/8
N_EXPERTS, TOP_K, N_ROUTED_LAYERS = 8, 2, 2
EXPERT_WIDTH = 4  # entries per layer and expert: 1/4 for the first choice, 1/8 for the second

EAGLE3_HEADS = 8
"""Half of them carry BEFORE, the others what the residual stream must lose."""
SHARP = 32.0
"""Size of the constant queries and keys: attention sees the current position only."""
N_ROTATIONS = 8  # of the fastest rotary pairs: enough to tell any two positions apart


def embedding(before: Sequence[int]) -> NDArray[np.float32]:
    """(V, HIDDEN); `before[x]` is a token whose successor is what the drafter says after x."""
    signs = _signs(len(before))
    table = np.zeros((len(before), HIDDEN), np.float32)
    table[:, NOW] = signs
    table[:, BEFORE] = signs[np.asarray(before)]
    route = table[:, ROUTE]
    route[:, :N_CONSTANT] = 1 / 16
    for token in range(len(before)):
        for layer, experts in enumerate(experts_of(token)):
            for rank, expert in enumerate(experts):
                route[token, _expert_slots(layer, expert)] = 1 / 4 if rank == 0 else 1 / 8
    return table


def experts_of(token: int) -> tuple[tuple[int, ...], ...]:
    """Per layer of the Mixture-of-Experts target, the experts of a token, the first choice first.

    All ordered pairs of different experts occur.
    """
    routes = []
    for layer in range(N_ROUTED_LAYERS):
        first = (token + 3 * layer) % N_EXPERTS
        routes.append((first, (first + 1 + (token // N_EXPERTS + layer) % 7) % N_EXPERTS))
    return tuple(routes)


def _expert_slots(layer: int, expert: int) -> slice:
    start = N_CONSTANT + (layer * N_EXPERTS + expert) * EXPERT_WIDTH
    return slice(start, start + EXPERT_WIDTH)


def _signs(n_tokens: int) -> NDArray[np.float32]:
    """(V, BLOCK) unit rows of random signs: nearly orthogonal, and exact in any float format.

    Raw generator output, because numpy keeps that the same in all its versions.
    """
    raw = np.random.PCG64(7).random_raw(n_tokens * BLOCK // 64)
    bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8)).reshape(n_tokens, BLOCK)
    return np.asarray((bits.astype(np.float32) * 2 - 1) / np.sqrt(BLOCK), dtype=np.float32)


def head(table: NDArray[np.float32], function: Sequence[int]) -> NDArray[np.float32]:
    """(V, HIDDEN): row j is the sum of NOW of all x with function(x) = j."""
    rows = np.zeros_like(table)
    np.add.at(rows[:, NOW], np.asarray(function), table[:, NOW] * np.float32(HEAD_SCALE))
    return rows


def bigram(
    table: NDArray[np.float32], function: Sequence[int], n_layers: int, n_heads: int
) -> Weights:
    """A Llama that says function(x) after x."""
    weights = _ends(table, function)
    for layer in range(n_layers):
        weights |= _layer(f"model.layers.{layer}.", n_heads)
    return weights


def _ends(table: NDArray[np.float32], function: Sequence[int]) -> Weights:
    return {
        "model.embed_tokens.weight": table,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": head(table, function),
    }


def _zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def _attention(prefix: str, n_heads: int, n_inputs: int = HIDDEN) -> Weights:
    inner = n_heads * HEAD_DIM
    weights = {f"{prefix}self_attn.{name}_proj.weight": _zeros(inner, n_inputs) for name in "qkv"}
    return weights | {f"{prefix}self_attn.o_proj.weight": _zeros(HIDDEN, inner)}


def _mlp(prefix: str, intermediate: int = INTERMEDIATE) -> Weights:
    return {
        f"{prefix}gate_proj.weight": _zeros(intermediate, HIDDEN),
        f"{prefix}up_proj.weight": _zeros(intermediate, HIDDEN),
        f"{prefix}down_proj.weight": _zeros(HIDDEN, intermediate),
    }


def _norms(prefix: str, *names: str) -> Weights:
    return {f"{prefix}{name}.weight": np.ones(HIDDEN, np.float32) for name in names}


def _layer(prefix: str, n_heads: int, *, biased: bool = False) -> Weights:
    """A decoder layer that adds nothing to the residual stream."""
    weights = _attention(prefix, n_heads) | _mlp(f"{prefix}mlp.")
    weights |= _norms(prefix, "input_layernorm", "post_attention_layernorm")
    if biased:
        names = (f"{prefix}self_attn.{name}_proj.bias" for name in "qkv")
        weights |= {name: _zeros(n_heads * HEAD_DIM) for name in names}
    return weights


def _before_to_now() -> NDArray[np.float32]:
    """(HIDDEN, HIDDEN) matrix that puts BEFORE where the head reads, and drops the rest."""
    matrix = _zeros(HIDDEN, HIDDEN)
    matrix[NOW, BEFORE] = np.eye(BLOCK, dtype=np.float32)
    return matrix


# ---------------------------------------------------------------- drafters


def eagle(n_heads: int, *, biased: bool) -> Weights:
    """EAGLE: `fc` takes BEFORE of the new token's embedding; embedding and head are the target's.

    biased: `fc` has a bias (SGLang reads one, vLLM refuses it).
    """
    weights = _layer("layers.0.", n_heads)
    del weights["layers.0.input_layernorm.weight"]  # the first layer has none
    weights["fc.weight"] = np.concatenate([_before_to_now(), _zeros(HIDDEN, HIDDEN)], axis=1)
    return weights | ({"fc.bias": _zeros(HIDDEN)} if biased else {})


def eagle3(
    table: NDArray[np.float32], function: Sequence[int], kept: Sequence[int] | None
) -> Weights:
    """EAGLE3: attention that sees the current position only copies BEFORE; `fc` gives nothing.

    function  the target's f: the head is its own, but says the same
    kept      the draft vocabulary, ascending; None: all tokens

    From its second pass on, the residual stream begins with the first pass's output. Attention
    sees that too, normed to a known length, and takes it away again.
    """
    prefix = "midlayer."
    attention = _attention(prefix, EAGLE3_HEADS, 2 * HIDDEN)
    queries = attention[f"{prefix}self_attn.q_proj.weight"]
    for n in range(EAGLE3_HEADS):
        # One constant entry of the normed embedding is 1; pair i of a head is (i, i + 32).
        queries[n * HEAD_DIM : n * HEAD_DIM + N_ROTATIONS, ROUTE.start] = SHARP
    attention[f"{prefix}self_attn.k_proj.weight"] = queries.copy()
    values = attention[f"{prefix}self_attn.v_proj.weight"]
    values[:BLOCK, BEFORE] = np.eye(BLOCK)
    values[BLOCK:, HIDDEN : HIDDEN + BLOCK] = np.eye(BLOCK)
    out = attention[f"{prefix}self_attn.o_proj.weight"]
    out[NOW, :BLOCK] = np.eye(BLOCK)
    out[NOW, BLOCK:] = -np.eye(BLOCK)
    rows = head(table, function)
    weights = attention | _mlp(f"{prefix}mlp.")
    weights |= _norms(prefix, "input_layernorm", "post_attention_layernorm") | _norms("", "norm")
    # The first pass's output has length NORM_FACTOR, which RMSNorm makes sqrt(HIDDEN).
    undo = bfloat16(np.full(HIDDEN, NORM_FACTOR / np.sqrt(HIDDEN), np.float32))
    weights |= {f"{prefix}hidden_norm.weight": undo, "fc.weight": _zeros(HIDDEN, 2 * HIDDEN)}
    if kept is None:
        return weights | {"lm_head.weight": rows}
    return weights | {"lm_head.weight": rows[np.asarray(kept)]}


def draft_vocabulary(kept: Sequence[int], n_tokens: int) -> dict[str, NDArray[np.generic]]:
    """EAGLE3's maps: draft id -> offset of the token id, and token id -> whether it is kept."""
    ids = np.asarray(kept, np.int64)
    return {"d2t": ids - np.arange(len(ids)), "t2d": np.isin(np.arange(n_tokens), ids)}


def mtp(
    table: NDArray[np.float32], function: Sequence[int], n_layers: int, n_heads: int
) -> Weights:
    """MiMo: a target with Qwen2's biases, and one layer that predicts one token further."""
    weights = _ends(table, function)
    for layer in range(n_layers):
        weights |= _layer(f"model.layers.{layer}.", n_heads, biased=True)
    prefix = "model.mtp_layers.0."
    weights |= _layer(prefix, n_heads, biased=True)
    weights |= _norms(prefix, "token_layernorm", "hidden_layernorm", "final_layernorm")
    joined = np.concatenate([_zeros(HIDDEN, HIDDEN), _before_to_now()], axis=1)
    return weights | {f"{prefix}input_proj.weight": joined}


def dflash(table: NDArray[np.float32], function: Sequence[int], mask: int, n_heads: int) -> Weights:
    """DFlash: all drafts of a block at once, each place seeing the one before it.

    The block is the last token and K masks. Attention copies NOW of the place before, which is
    the last token for the first mask and a mask for the others; a mask's own embedding is too
    small to matter beside it. `fc` gives nothing, so the target's states are not looked at.
    """
    weights = _layer("layers.0.", n_heads)
    prefix = "layers.0.self_attn."
    turn = 10000.0 ** (-2 * np.arange(N_ROTATIONS) / HEAD_DIM)  # radians per position
    queries, keys = weights[f"{prefix}q_proj.weight"], weights[f"{prefix}k_proj.weight"]
    for n in range(n_heads):
        first = n * HEAD_DIM + np.arange(N_ROTATIONS)
        keys[first, ROUTE.start] = 1
        queries[first, ROUTE.start] = np.cos(turn)  # turned back by one position
        queries[first + HEAD_DIM // 2, ROUTE.start] = -np.sin(turn)
    weights[f"{prefix}q_proj.weight"] = bfloat16(queries)
    for name in ("q_norm", "k_norm"):  # to SHARP per entry: the norm makes it sqrt(8)
        weights[f"{prefix}{name}.weight"] = np.full(HEAD_DIM, 12, np.float32)
    weights[f"{prefix}v_proj.weight"][:, NOW] = np.eye(n_heads * HEAD_DIM, BLOCK)
    weights[f"{prefix}o_proj.weight"][NOW, :] = np.eye(BLOCK, n_heads * HEAD_DIM)
    own = table.copy()
    own[mask] /= 16
    weights |= _norms("", "hidden_norm", "norm")
    return weights | {
        "fc.weight": _zeros(HIDDEN, HIDDEN),
        "embed_tokens.weight": own,
        "lm_head.weight": head(table, function),
    }


def medusa(
    table: NDArray[np.float32], target: Sequence[int], draft: Sequence[int], n_heads: int
) -> Weights:
    """Medusa: head k reads x and says g applied k + 1 times to f(x)."""
    weights: Weights = {}
    said = list(target)
    for k in range(n_heads):
        said = [draft[token] for token in said]
        weights[f"blocks.{k}.layers.0.weight"] = _zeros(HIDDEN, HIDDEN)
        weights[f"lm_heads.{k}.weight"] = head(table, said)
    return weights


def mixture(
    table: NDArray[np.float32], function: Sequence[int], n_heads: int, expert_size: int
) -> Weights:
    """Qwen3-MoE: experts that add nothing behind a router that reads ROUTE."""
    weights = _ends(table, function)
    for layer in range(N_ROUTED_LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= _attention(prefix, n_heads)
        weights |= _norms(prefix, "input_layernorm", "post_attention_layernorm")
        for name in ("q_norm", "k_norm"):
            weights[f"{prefix}self_attn.{name}.weight"] = np.ones(HEAD_DIM, np.float32)
        gate = _zeros(N_EXPERTS, HIDDEN)
        for expert in range(N_EXPERTS):
            gate[expert, ROUTE][_expert_slots(layer, expert)] = 1 / 4
            weights |= _mlp(f"{prefix}mlp.experts.{expert}.", expert_size)
        weights[f"{prefix}mlp.gate.weight"] = gate
    return weights


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.asarray(rounded & np.uint32(0xFFFF0000)).view(np.float32)
