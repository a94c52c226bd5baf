"""Test-only vLLM plugin: gives the CPU build the one function that its rejection sampler lacks,
and starts its processes faster.

On a CPU, `expand_batch_to_tokens` returns uninitialised memory (vllm-project/vllm issue 55005), so
sampled drafts are verified at random temperatures. vLLM loads this in each of its processes when
this folder is on PYTHONPATH.

vLLM forks its processes unless told otherwise; its CPU build spawns them, and each imports torch
and vLLM anew: a start takes 3 s instead of 10. Forking is safe where the parent computes nothing
with torch, as `python -m speedbench` does not.
"""

from typing import Any


def register() -> None:
    import torch
    import vllm.v1.sample.rejection_sampler as sampler

    def expand(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        filled = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
        return torch.repeat_interleave(filled, counts)

    sampler.expand_batch_to_tokens = expand
    _fork()


def _fork() -> None:
    import multiprocessing

    import vllm.v1.engine.utils as engine

    engine.get_mp_context = lambda: multiprocessing.get_context("fork")
