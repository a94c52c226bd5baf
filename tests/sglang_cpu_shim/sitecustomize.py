"""Test only. Lets SGLang start in every process of a machine that has no GPU and no triton."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType


class _BeforeTorchvision(MetaPathFinder):
    """torchvision's wheel on PyPI is a CUDA build: its C library does not load beside a CPU build
    of torch, and its import then ends at the missing schemas of two operators."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        keep = ModuleType("_torchvision_operators")  # they end with their library
        keep.__dict__["library"] = library
        sys.modules[keep.__name__] = keep


class _BeforeSglang(MetaPathFinder):
    """SGLang imports triton everywhere and never launches it on a CPU. It carries a stand-in for
    macOS, which is installed here, before SGLang's first line."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "sglang":
            return
        sys.meta_path.remove(self)
        import torch

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


if importlib.util.find_spec("torchvision") is not None:
    sys.meta_path.insert(0, _BeforeTorchvision())
if os.environ.get("SHIM_TRITON") and importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, _BeforeSglang())
