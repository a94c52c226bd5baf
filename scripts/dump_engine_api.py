#!/usr/bin/env python3
"""Write down the installed engine's arguments, and compare them with the recorded contract.

    python scripts/dump_engine_api.py --engine TRTLLM|VLLM|SGLANG [--out FILE] [--diff FILE]

Run it inside the engine's container: for every class that the adapters use it takes the names,
types, defaults and aliases of all fields. It compares them with FILE, or with the nearest version
under tests/contracts/, and writes them as JSON where --out says so.
Exit code 0: the same; 1: different, with a list; 2: the engine cannot be imported.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import importlib
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTRACTS = Path(__file__).resolve().parent.parent / "tests" / "contracts"

_LLMAPI = "tensorrt_llm.llmapi"
PACKAGES = {"TRTLLM": "tensorrt_llm", "VLLM": "vllm", "SGLANG": "sglang"}
CLASSES: dict[str, dict[str, str]] = {
    "TRTLLM": {
        "TorchLlmArgs": _LLMAPI,
        "KvCacheConfig": _LLMAPI,
        "CudaGraphConfig": _LLMAPI,
        "MoeConfig": _LLMAPI,
        "EagleDecodingConfig": _LLMAPI,
        "Eagle3DecodingConfig": _LLMAPI,
        "MTPDecodingConfig": _LLMAPI,
        "NGramDecodingConfig": _LLMAPI,
        "DraftTargetDecodingConfig": _LLMAPI,
        "PARDDecodingConfig": _LLMAPI,
        "DFlashDecodingConfig": _LLMAPI,
        "SamplingParams": "tensorrt_llm",
        "AutoDeployLlmArgs": "tensorrt_llm._torch.auto_deploy.llm_args:LlmArgs",
    },
    "VLLM": {
        "AsyncEngineArgs": "vllm.engine.arg_utils",
        "SpeculativeConfig": "vllm.config",
        "SamplingParams": "vllm.sampling_params",
    },
    "SGLANG": {
        "ServerArgs": "sglang.srt.server_args",
        "SamplingParams": "sglang.srt.sampling.sampling_params",
    },
}
"""Engine -> class -> its module, or module:name where it has another name there."""

REQUIRED = "<required>"
UNKNOWN = "<unknown>"  # in a contract that was written by hand

Field = dict[str, Any]


# ---------------------------------------------------------------- looking at classes


def dump(engine: str) -> dict[str, Any]:
    """The installed engine's classes. Raises what importing the engine raises."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    package = importlib.import_module(PACKAGES[engine])
    classes = {}
    for name, where in CLASSES[engine].items():
        module, _, other_name = where.partition(":")
        try:
            found = getattr(importlib.import_module(module), other_name or name)
        except (ImportError, AttributeError):
            continue  # this version has no such class
        classes[name] = {"fields": dict(fields_of(found))}
    return {"engine": engine, "version": str(package.__version__), "classes": classes}


def fields_of(found: Any) -> Iterator[tuple[str, Field]]:
    """Name and description of every field: pydantic, dataclass, msgspec or __init__."""
    if hasattr(found, "model_fields"):
        for name, field in found.model_fields.items():
            default = REQUIRED if field.is_required() else _made(field)
            about = _field(field.annotation, default)
            alias = field.validation_alias or field.alias
            names = [a for a in getattr(alias, "choices", [alias]) if isinstance(a, str)]
            if others := [a for a in names if a != name]:
                about["aliases"] = others
            yield name, about
    elif dataclasses.is_dataclass(found):
        for data_field in dataclasses.fields(found):
            if not data_field.name.startswith("_") and data_field.init:
                yield data_field.name, _field(data_field.type, _made(data_field))
    elif hasattr(found, "__struct_fields__"):
        import msgspec

        for item in msgspec.structs.fields(found):
            if not item.name.startswith("_"):
                yield item.name, _field(item.type, _made(item))
    else:
        for parameter in list(inspect.signature(found.__init__).parameters.values())[1:]:
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            yield parameter.name, _field(parameter.annotation, default)


def _field(annotation: Any, default: Any) -> Field:
    return {"type": type_text(annotation), "default": plain(default)}


def _made(field: Any) -> Any:
    """A field's default, from its factory if it has one."""
    factory = field.default_factory
    if callable(factory) and type(factory).__name__ != "NODEFAULT":
        try:
            return factory()
        except Exception:  # noqa: BLE001 - a factory may need what this machine lacks
            return UNKNOWN
    default = field.default
    nothing = default is dataclasses.MISSING or type(default).__name__ in (
        "_NoDefault", "NoDefaultType", "NODEFAULT",
    )  # fmt: skip
    if nothing or repr(default) == "NODEFAULT":
        return REQUIRED
    # A pydantic field standing in for a dataclass's default.
    if type(default).__name__ == "FieldInfo":
        return REQUIRED if default.is_required() else _made(default)
    return default


def type_text(annotation: Any) -> str:
    """A type as short text: int|None, Literal['a','b'], list[int]."""
    if isinstance(annotation, str):
        return re.sub(r"\btyping\.|\s", "", annotation).replace('"', "'")
    if annotation is type(None):
        return "None"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is typing.Literal:
        return f"Literal[{','.join(repr(a) for a in arguments)}]"
    if origin is typing.Union or isinstance(annotation, types.UnionType):
        return "|".join(type_text(a) for a in arguments)
    name = str(getattr(origin or annotation, "__name__", annotation)).removeprefix("typing.")
    if arguments and origin is not None:
        inner = ",".join("..." if a is ... else type_text(a) for a in arguments)
        return f"{name}[{inner}]"
    return name


def plain(value: Any) -> Any:
    """A default as JSON: values as they are, objects as Class(), anything odd as <type>."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(type(value), "model_fields") or dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return f"<{type(value).__name__}>"


# ---------------------------------------------------------------- comparing


def differences(engine: str, found: dict[str, Any], contract: dict[str, Any]) -> Iterator[str]:
    """A line for everything in which the installed engine is not the contract."""
    have, known = found["classes"], _readable(contract["classes"])
    for name in CLASSES[engine]:
        if name not in have and name not in known:
            continue
        if name not in known:
            yield f"{name}: new class"
        elif name not in have:
            yield f"{name}: gone"
        else:
            yield from _field_differences(name, have[name]["fields"], known[name])


def _readable(classes: dict[str, Any]) -> dict[str, dict[str, Field]]:
    """Class -> fields of a contract, in the form that `dump` gives.

    Three kinds of contracts are committed: with values (as `dump` writes them), read from source
    (where types and defaults are text), and lists of names.
    """
    described: dict[str, dict[str, Field]] = {}
    for name, about in classes.items():
        fields = about if isinstance(about, list) else about["fields"]
        described[name] = {
            field: {} if isinstance(about, list) else dict(fields[field])
            for field in fields
            if not field.startswith("_")
        }
    defaults = [f["default"] for fields in described.values() for f in fields.values() if f]
    if all(default is None or isinstance(default, str) for default in defaults):
        for fields in described.values():
            for field in fields.values():
                if field:
                    field["default"] = _from_source(field["default"])
    return described


def _from_source(text: str | None) -> Any:
    """A default from its source text, where that is a literal; None stands for no default."""
    if text is None:
        return REQUIRED
    inside = re.match(r"[Ff]ield\(default=([^,)]+)", text)
    try:
        return plain(ast.literal_eval(inside[1] if inside else text))
    except (ValueError, SyntaxError):
        return UNKNOWN


def _field_differences(
    class_name: str, have: dict[str, Field], known: dict[str, Field]
) -> Iterator[str]:
    for name in sorted(have.keys() | known.keys()):
        where = f"{class_name}.{name}"
        old, new = known.get(name), have.get(name)
        if old is None:
            yield f"{where}: new"
        elif new is None:
            if not old.get("unverified"):
                yield f"{where}: gone"
        else:
            was, now = old.get("default", UNKNOWN), new["default"]
            if UNKNOWN not in (was, now) and was != now:
                yield f"{where}: default was {was!r}, is {now!r}"
            if _differ(type_text(old.get("type", "?")), new["type"]):
                yield f"{where}: type was {old['type']}, is {new['type']}"
            if old.get("aliases", []) != new.get("aliases", []):
                yield f"{where}: aliases were {old.get('aliases')}, are {new.get('aliases')}"


_BUILT_IN = {"int", "str", "bool", "float", "None", "list", "dict", "set", "tuple", "Path"}


def _differ(old: str, new: str) -> bool:
    """Whether two types differ; types of the engine's own are compared by its fields instead."""
    words = set(re.findall(r"\w+|\?", f"{old} {new}"))
    return words <= _BUILT_IN and set(old.split("|")) != set(new.split("|"))


def nearest(engine: str, version: str) -> Path | None:
    """The recorded contract to compare with: this version, else the newest before it, else the
    oldest; 'main' for a release newer than any recorded one."""
    folder = CONTRACTS / engine.lower()
    files = {path.stem: path for path in folder.glob("*.json") if re.match(r"\d|main$", path.stem)}
    if version in files:
        return files[version]
    numbered = sorted((_numbers(stem), path) for stem, path in files.items() if stem != "main")
    mine = _numbers(version)
    if "main" in files and (not numbered or mine[:2] > numbered[-1][0][:2]):
        return files["main"]
    earlier = [path for numbers, path in numbered if numbers <= mine]
    return earlier[-1] if earlier else numbered[0][1] if numbered else None


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", required=True, type=str.upper, choices=list(CLASSES))
    parser.add_argument("--out", type=Path, help="write what was found, as JSON")
    parser.add_argument("--diff", type=Path, help="contract to compare with")
    given = parser.parse_args(arguments)
    try:
        found = dump(given.engine)
    except Exception as error:  # noqa: BLE001 - a missing driver raises anything
        why = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{given.engine} cannot be imported ({why[0]}): run this inside its container")
        return 2
    if given.out is not None:
        given.out.write_text(as_json(found), encoding="utf-8")
        print(f"{given.engine} {found['version']} is written to {given.out}")
    path = given.diff or nearest(given.engine, found["version"])
    if path is None:
        print(f"no contract of {given.engine} is under {CONTRACTS}: nothing to compare with")
        return 0 if given.out is not None else 1
    try:
        contract = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--diff {path} cannot be read ({error}): give a file written by --out")
    lines = list(differences(given.engine, found, contract))
    for line in lines:
        print(line)
    n_fields = sum(len(about["fields"]) for about in found["classes"].values())
    print(
        f"{given.engine} {found['version']}, {n_fields} fields of {len(found['classes'])} classes: "
        f"{len(lines) or 'no'} difference(s) from {contract['version']} ({path.name})"
    )
    return 1 if lines else 0


def as_json(found: dict[str, Any]) -> str:
    """JSON with a line for each field, so that two versions can be compared by eye."""
    lines = ["{", f' "engine": {json.dumps(found["engine"])},']
    lines += [f' "version": {json.dumps(found["version"])},', ' "classes": {']
    classes = []
    for name, about in found["classes"].items():
        fields = ",\n".join(
            f"    {json.dumps(field)}: {json.dumps(text)}"
            for field, text in about["fields"].items()
        )
        classes.append(f'  {json.dumps(name)}: {{\n   "fields": {{\n{fields}\n   }}\n  }}')
    return "\n".join([*lines, ",\n".join(classes), " }", "}", ""])


if __name__ == "__main__":
    sys.exit(main())
