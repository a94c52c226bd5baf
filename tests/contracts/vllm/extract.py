"""Writes VERSION.json beside this file: what a vLLM release takes, read from its source.

    python tests/contracts/vllm/extract.py VERSION FOLDER_THAT_HOLDS_vllm

Nothing is imported, so a wheel unpacked anywhere will do. A class is a set of fields with the text
of type and default; `Class.method` holds the method's parameters. Aliases of Literal types are
written out, so that the values a field takes can be read from its type.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

CLASSES = {
    "AsyncEngineArgs": "vllm/engine/arg_utils.py",
    "SpeculativeConfig": "vllm/config/speculative.py",
    "SamplingParams": "vllm/sampling_params.py",
    "EngineCoreOutput": "vllm/v1/engine/__init__.py",
    "EngineCoreOutputs": "vllm/v1/engine/__init__.py",
    "SpecDecodingStats": "vllm/v1/spec_decode/metrics.py",
    "AsyncLLM.from_vllm_config": "vllm/v1/engine/async_llm.py",
    "AsyncLLM.add_request": "vllm/v1/engine/async_llm.py",
    "AsyncLLM.reset_prefix_cache": "vllm/v1/engine/async_llm.py",
}
"""Everything the adapter relies on, and where it is."""

Fields = dict[str, dict[str, str | None]]


def contract(version: str, root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, path in CLASSES.items():
        module = ast.parse((root / path).read_text(encoding="utf-8"))
        owner, _, method = name.partition(".")
        fields = parameters(module, owner, method) if method else fields_of(module, owner)
        found[name] = {"fields": fields}
    return {"engine": "VLLM", "version": version, "classes": found}


def fields_of(module: ast.Module, name: str) -> Fields:
    """Annotated fields of a class and of its bases in the same file."""
    owner = class_of(module, name)
    found: Fields = {}
    for base in owner.bases:
        if isinstance(base, ast.Name) and has_class(module, base.id):
            found |= fields_of(module, base.id)
    literals = literals_of(module)
    for line in owner.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            found[line.target.id] = {
                "type": written_out(line.annotation, literals),
                "default": None if line.value is None else ast.unparse(line.value),
            }
    return dict(sorted(found.items()))


def parameters(module: ast.Module, owner: str, method: str) -> Fields:
    """Parameters of a method, in order, without self or cls."""
    function = next(
        line
        for line in class_of(module, owner).body
        if isinstance(line, (ast.FunctionDef, ast.AsyncFunctionDef)) and line.name == method
    )
    arguments = function.args.args[1:]
    defaults: list[ast.expr | None] = [None] * (len(arguments) - len(function.args.defaults))
    return {
        argument.arg: {
            "type": None if argument.annotation is None else ast.unparse(argument.annotation),
            "default": None if default is None else ast.unparse(default),
        }
        for argument, default in zip(arguments, [*defaults, *function.args.defaults], strict=True)
    }


def literals_of(module: ast.Module) -> dict[str, list[ast.expr]]:
    """Alias -> values, for every `Name = Literal[...]`; aliases inside are resolved."""
    found: dict[str, list[ast.expr]] = {}
    for line in module.body:
        if (
            isinstance(line, ast.Assign)
            and isinstance(line.targets[0], ast.Name)
            and isinstance(line.value, ast.Subscript)
            and ast.unparse(line.value.value) == "Literal"
        ):
            inner = line.value.slice
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            found[line.targets[0].id] = [
                value
                for entry in values
                for value in (found[entry.id] if isinstance(entry, ast.Name) else [entry])
            ]
    return found


def written_out(annotation: ast.expr, literals: dict[str, list[ast.expr]]) -> str:
    class Write(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            if node.id not in literals:
                return node
            return ast.parse(
                f"Literal[{', '.join(map(ast.unparse, literals[node.id]))}]", mode="eval"
            ).body

    return ast.unparse(Write().visit(annotation))


def class_of(module: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)


def has_class(module: ast.Module, name: str) -> bool:
    return any(isinstance(n, ast.ClassDef) and n.name == name for n in module.body)


if __name__ == "__main__":
    target = Path(__file__).parent / f"{sys.argv[1]}.json"
    text = json.dumps(contract(sys.argv[1], Path(sys.argv[2])), indent=1)
    target.write_text(text + "\n", encoding="utf-8")
