"""Engine name -> where its adapter lives; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import cast

from speedbench.types import EngineAdapter

ADAPTERS = {
    "VLLM": "engines.vllm:VllmEngine",
    "SGLANG": "engines.sglang:SglangEngine",
    "TRTLLM": "engines.trtllm:TrtllmEngine",
    "AUTO_DEPLOY": "engines.trtllm:AutoDeployEngine",
    "HF": "engines.hf:HfEngine",
    "OPENAI": "engines.openai:OpenaiEngine",
    "NULL": "engines.null:NullEngine",
}


def adapter(name: str) -> EngineAdapter:
    """The adapter class of an engine in ADAPTERS. Imports the adapter, not yet the engine."""
    module, _, attribute = ADAPTERS[name].partition(":")
    return cast(EngineAdapter, getattr(importlib.import_module(module), attribute))
