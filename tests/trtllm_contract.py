"""Puts the stand-in for TensorRT-LLM (`tests/contracts/tensorrt_llm`) in place, by version."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CONTRACTS = Path(__file__).parent / "contracts"
VARIABLE = "SPEEDBENCH_CONTRACT_TRTLLM"
VERSIONS = ("1.0.0", "1.1.0", "1.2.0", "main")

_LOADED: dict[str, dict[str, ModuleType]] = {}
"""Version -> its modules: building the classes of a version costs more than most tests."""


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def contract(version: str) -> Iterator[Any]:
    """`import tensorrt_llm` finds the stand-in of this version; yields its scripted engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, version)
        patch.setattr(sys, "path", [str(CONTRACTS), *sys.path])
        _take_out()
        sys.modules.update(_LOADED.get(version, {}))
        try:
            engine: Any = importlib.import_module("tensorrt_llm._engine")
            engine.SCRIPT = engine.FAULT = engine.START_ERROR = None
            engine.STARTED.clear()
            importlib.import_module("tensorrt_llm._models").UNVERIFIED_USED.clear()
            yield engine
        finally:
            _LOADED[version] = _take_out()
            importlib.invalidate_caches()
