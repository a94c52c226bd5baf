"""Writes VERSION.json beside this file: what an SGLang release takes, read from its source.

    python tests/contracts/sglang/extract.py VERSION FOLDER_THAT_HOLDS_sglang

Nothing is imported, so a wheel unpacked anywhere will do. `classes` hold the names of fields,
`methods` those of parameters, with "async" in front of a coroutine.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

SRT = "sglang/srt"
CLASSES = {
    "ServerArgs": f"{SRT}/server_args.py",
    "SamplingParams": f"{SRT}/sampling/sampling_params.py",
    "BatchTokenIDOutput": f"{SRT}/managers/io_struct.py",
    "FlushCacheReqOutput": f"{SRT}/managers/io_struct.py",
}
METHODS = {
    "Engine.async_generate": f"{SRT}/entrypoints/engine.py",
    "Engine.shutdown": f"{SRT}/entrypoints/engine.py",
    "TokenizerManager._handle_batch_output": f"{SRT}/managers/tokenizer_manager.py",
    "TokenizerManager.handle_loop": f"{SRT}/managers/tokenizer_manager.py",
    "TokenizerManager.flush_cache": f"{SRT}/managers/*mixin*.py",
    "TokenizerManager.get_internal_state": f"{SRT}/managers/*mixin*.py",
}
"""Everything the adapter relies on, and where it is; a mixin has the method under its own name."""
FIELDS = f"{SRT}/arg_groups/fields"
"""Where the fields of ServerArgs are since they are put together from several classes."""


def contract(version: str, root: Path) -> dict[str, object]:
    found = {name: sorted(_fields(root / path, name)) for name, path in CLASSES.items()}
    for path in sorted((root / FIELDS).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found["ServerArgs"] += _annotated(node)
    found["ServerArgs"] = sorted({name for name in found["ServerArgs"] if name[0] not in "_A"})
    return {
        "engine": "SGLANG",
        "version": version,
        "classes": found,
        "methods": {name: _signature(root, path, name) for name, path in METHODS.items()},
        "override_points": [
            name
            for name in _fields(root / f"{SRT}/entrypoints/engine.py", "Engine")
            if name.endswith(("_func", "_class"))
        ],
        "histograms": [name for name in found["BatchTokenIDOutput"] if "histogram" in name],
    }


def _fields(path: Path, name: str) -> list[str]:
    """Annotated fields of a class and of its bases in the same file, or its __init__'s."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    owners = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    owner = owners[name]
    bases = [b.id for b in owner.bases if isinstance(b, ast.Name) and b.id in owners]
    found = [field for base in bases for field in _fields(path, base)] + _annotated(owner)
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__" and not found:
            found = [argument.arg for argument in _arguments(node)]
    return found


def _annotated(owner: ast.ClassDef) -> list[str]:
    return [
        node.target.id
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def _signature(root: Path, pattern: str, name: str) -> list[str] | None:
    method = name.partition(".")[2]
    for function in _functions(root, pattern):
        if function.name == method:
            kind = ["async"] if isinstance(function, ast.AsyncFunctionDef) else []
            return kind + [argument.arg for argument in _arguments(function)]
    return None


def _functions(root: Path, pattern: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for path in sorted(root.glob(pattern)):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef)):
                        yield line


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*function.args.args[1:], *function.args.kwonlyargs]


if __name__ == "__main__":
    target = Path(__file__).parent / f"{sys.argv[1]}.json"
    text = json.dumps(contract(sys.argv[1], Path(sys.argv[2])), indent=1, sort_keys=True)
    target.write_text(text + "\n", encoding="utf-8")
