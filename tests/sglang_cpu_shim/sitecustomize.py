"""Test only. Lets SGLang start in every process of a machine that has no GPU and no triton."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
import sys
from enum import Enum
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType


class _Interpolation(Enum):
    """What `torchvision.transforms.InterpolationMode` is asked for at import."""

    NEAREST, NEAREST_EXACT, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(7)


def _stand_in_for_torchvision() -> None:
    """torchvision's wheel on PyPI is a CUDA build and is not installed. SGLang imports it with its
    image processors and decodes no image here; transformers must not count on it."""
    from transformers.utils import import_utils

    if import_utils.is_torchvision_available():  # remembered by transformers
        return
    names = ("", ".transforms", ".transforms.functional", ".transforms.v2")
    for name in (*names, ".transforms.v2.functional"):
        module = ModuleType(f"torchvision{name}")
        module.__path__ = []
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name].__dict__["InterpolationMode"] = _Interpolation


class _BeforeSglang(MetaPathFinder):
    """SGLang imports triton everywhere and never launches it on a CPU. It carries a stand-in for
    macOS, which is installed here, before SGLang's first line."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "sglang":
            return
        sys.meta_path.remove(self)
        import torch

        _stand_in_for_torchvision()
        found = importlib.util.find_spec("sglang")
        folder = Path(found.submodule_search_locations[0])
        spec = importlib.util.spec_from_file_location("_stubs", folder / "_platform_stubs.py")
        stubs = sys.modules["_stubs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(stubs)
        mps, tensor = torch.backends.mps, torch.Tensor
        before = sys.platform, platform.machine, mps.is_available, tensor.to, tensor.copy_
        names = set(vars(torch.mps))
        sys.platform, platform.machine = "darwin", lambda: "arm64"
        mps.is_available = lambda: True
        try:
            stubs.install_platform_stubs()
        finally:
            sys.platform, platform.machine, mps.is_available, tensor.to, tensor.copy_ = before
            for name in set(vars(torch.mps)) - names:
                delattr(torch.mps, name)


if os.environ.get("SHIM_TRITON") and importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, _BeforeSglang())
if os.environ.get("SHIM_FORK"):
    # SGLang asks for spawned processes, each of which imports everything anew: a start takes 25 s
    # instead of 5. Forking is safe where the parent has computed nothing with torch.
    multiprocessing.set_start_method = lambda *_arguments, **_names: None
