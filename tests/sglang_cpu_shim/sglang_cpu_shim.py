"""Test only. A plugin of SGLang: host memory for the table of routed experts on a CPU."""

from __future__ import annotations

from typing import Any


def load() -> None:
    import torch
    from sglang.srt.mem_cache.pool_host import common

    def allocate(dims: Any, dtype: Any, *_: object, **__: object) -> Any:
        return torch.empty(dims, dtype=dtype)

    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
