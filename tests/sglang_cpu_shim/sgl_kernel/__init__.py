"""Test only. SGLang's compiled CPU kernels, as far as small models and drafts need them, in torch.

The real ones are in a package that is not on PyPI (sglang-kernel-cpu). Scheduler, workers, cache
accounting, drafting and verification stay SGLang's own; any kernel that is missing here raises.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor


def _ints(*tensors: Tensor) -> Iterator[tuple[int, ...]]:
    return zip(*(t.flatten().tolist() for t in tensors), strict=False)


# --- book-keeping of cache slots ------------------------------------------------
def assign_req_to_token_pool_cpu(req_pool, table, start, end, slots, pool_len):
    at = 0
    for r, s, e in _ints(req_pool, start, end):
        table[r, s:e] = slots[at : at + e - s].to(table.dtype)
        at += e - s


def assign_extend_cache_locs_cpu(req_pool, table, start, end, out, pool_len):
    at = 0
    for r, s, e in _ints(req_pool, start, end):
        out[at : at + e - s] = table[r, s:e].to(out.dtype)
        at += e - s


def assign_draft_cache_locs_contiguous_cpu(req_pool, table, seq_lens, out, pool_len, topk, steps):
    n = topk * steps
    for i, (r, s) in enumerate(_ints(req_pool, seq_lens)):
        out[i * n : (i + 1) * n] = table[r, s : s + n].to(out.dtype)


def build_draft_decode_metadata_cpu(table, req_pool, seq_lens, topk, steps, pool_len):
    out = table.new_zeros(len(req_pool) * topk, pool_len)
    for b, (r, s) in enumerate(_ints(req_pool, seq_lens)):
        for k in range(topk):
            out[b * topk + k, :s] = table[r, :s]
            out[b * topk + k, s : s + steps] = table[r, s + k * steps : s + (k + 1) * steps]
    return out


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt, src):
    for ptr, stride in _ints(data_ptrs, strides):
        rows = [ctypes.string_at(ptr + s * stride, stride) for s in src.tolist()]
        for t, row in zip(tgt.tolist(), rows, strict=True):
            ctypes.memmove(ptr + t * stride, row, stride)


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus, stride):
    last = torch.arange(len(accept_lens)) * stride + accept_lens - 1
    bonus.copy_(accept_tokens.flatten()[last])


def fill_accept_out_cache_loc_cpu(accept_index, slots, out):
    kept = accept_index[accept_index > -1].long()
    out[: len(kept)] = slots[kept]


# --- the draft tree -------------------------------------------------------------
def _links(parents, first, sibling):
    """First child and next sibling of every node, children in ascending order."""
    first.fill_(-1)
    sibling.fill_(-1)
    for i in range(len(parents) - 1, 0, -1):
        p = parents[i]
        sibling[i] = first[p]
        first[p] = i


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected,
    seq_lens,
    tree_mask,
    positions,
    index,
    first,
    sibling,
    topk,
    depth,
    n,
    mode,
):
    if mode != 1:
        raise NotImplementedError("only the draft-by-draft mask is used on a CPU")
    mask = tree_mask.view(-1, n, n)[: len(seq_lens)]
    mask.zero_()
    for b, (length,) in enumerate(_ints(seq_lens)):
        chosen, parent_of = selected[b].tolist(), parent_list[b].tolist()
        parents = [0]
        for c in chosen:  # the node's parent, as a position among the chosen
            up = c // topk
            parents.append(0 if up == 0 else chosen.index(parent_of[up]) + 1)
        _links(parents, first[b], sibling[b])
        index[b] = torch.arange(b * n, (b + 1) * n)
        for i in range(n):
            at, hops = i, 0
            mask[b, i, i] = True
            while at:
                at, hops = parents[at], hops + 1
                mask[b, i, at] = True
            positions[b * n + i] = length + hops


def reconstruct_indices_from_tree_mask(
    tree_mask, seq_lens, positions, index, first, sibling, bs, n
):
    mask = tree_mask.view(-1, n, n)
    for b, (length,) in enumerate(_ints(seq_lens)):
        parents = [0]
        for i in range(n):
            above = [j for j in range(i) if mask[b, i, j]]
            positions[b * n + i] = length + len(above)
            if i:
                parents.append(max(above, default=0))
        _links(parents, first[b], sibling[b])
        index[b] = torch.arange(b * n, (b + 1) * n)


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    target = target_predict.flatten().tolist()
    for b in range(len(candidates)):
        tokens, flat = candidates[b].tolist(), retrive_index[b].tolist()
        first, sibling = retrive_next_token[b].tolist(), retrive_next_sibling[b].tolist()
        node, taken = 0, 0
        accept_index[b, 0] = flat[0]
        predicts[flat[0]] = target[flat[0]]
        while taken + 1 < accept_index.shape[1]:
            child = first[node]
            while child != -1 and tokens[child] != target[flat[node]]:
                child = sibling[child]
            if child == -1:
                break
            node, taken = child, taken + 1
            accept_index[b, taken] = flat[node]
            predicts[flat[node]] = target[flat[node]]
        accept_token_num[b] = taken


# --- attention ------------------------------------------------------------------
def _attend(q, k, v, allowed, scale, cap):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", scores, v.float()).to(q.dtype)


def _extend(
    q,
    k,
    v,
    out,
    k_pool,
    v_pool,
    k_scale,
    v_scale,
    table,
    req_pool,
    seq_lens,
    ext_lens,
    ext_start,
    max_ext,
    scale,
    cap,
    cross,
    window,
    enc_lens,
    sinks,
    tree_mask,
    causal,
):
    at = 0
    for r, length, n, start in _ints(req_pool, seq_lens, ext_lens, ext_start):
        slots = table[r, :length].long()
        key = torch.arange(length)
        allowed = key <= (length - n + torch.arange(n))[:, None]
        if not causal:
            allowed = torch.ones_like(allowed)
        if tree_mask is not None:
            allowed[:, length - n :] = tree_mask.flatten()[at : at + n * n].view(n, n)
            at += n * n
        out[start : start + n] = _attend(
            q[start : start + n], k_pool[slots], v_pool[slots], allowed, scale, cap
        )


def _decode(
    q,
    k_pool,
    v_pool,
    k_scale,
    v_scale,
    out,
    k,
    v,
    loc,
    logits,
    table,
    req_pool,
    seq_lens,
    scale,
    cap,
    cross,
    window,
    enc_lens,
    sinks,
):
    if k is not None:
        k_pool[loc], v_pool[loc] = k.view(-1, *k_pool.shape[1:]), v.view(-1, *v_pool.shape[1:])
    for b, (r, length) in enumerate(_ints(req_pool, seq_lens)):
        slots = table[r, :length].long()
        out[b] = _attend(
            q[b : b + 1],
            k_pool[slots],
            v_pool[slots],
            torch.ones(1, length, dtype=torch.bool),
            scale,
            cap,
        )[0]


torch.ops.sgl_kernel.extend_attention_cpu = _extend
torch.ops.sgl_kernel.decode_attention_cpu = _decode


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*a, **k):
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in")

    return missing
