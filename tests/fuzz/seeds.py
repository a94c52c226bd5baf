"""Seeds: small, whole inputs of every reader, made by the code that writes such files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from speedbench import store
from speedbench.config import from_dict
from speedbench.types import (
    ConversationRecord,
    RoutedExperts,
    Served,
    Step,
    ToldAcceptance,
    TurnRecord,
)
from tests.builders import MS, conversation, counters, manifest, session, told, turn, write_part

Files = Mapping[str, bytes]
"""Path within the input's folder -> content."""


def files_of(make: Callable[[Path], object]) -> Files:
    """What `make` writes into an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


# ---------------------------------------------------------------- runs


def _records(draft_length: int) -> list[ConversationRecord]:
    shapes = ((1, 4, 2, 1, 3), (1, 1, 4, 4), (1, 2, 2, 2, 2, 1))
    found = []
    for i in range(6):
        lengths = shapes[i % 3] if draft_length else (1,) * 9
        one = turn(f"c{i}.0", lengths, submitted_ns=i * 60 * MS, told=told(lengths, draft_length))
        found.append(conversation(f"c{i}", "math" if i % 2 else "coding", one))
    return found


def _experts() -> ConversationRecord:
    ids = np.arange(5 * 2 * 2, dtype="<i2").tobytes()
    last = Step("e.0", 70 * MS, [7], 1, finish_reason="stop",
                routed_experts=RoutedExperts(5, 2, 2, ids))  # fmt: skip
    return conversation("e", "math", TurnRecord("e.0", 0, 5, "00", 0, "stop", None, [last]))


def _energy() -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "time_ns": i * 100 * MS, "session": 0, "replica": 0, "gpu": 0, "uuid": "GPU-1",
            "whole_gpu": True, "energy_mj": i * 50_000, "power_mw": 500_000,
            "utilization_percent": 99, "sm_clock_mhz": 1900, "temperature_c": 60,
            "throttle_reasons": 0, "n_processes": 1, "n_others": 0,
        }
        for i in range(12)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=store.ENERGY)


def run(folder: Path, draft_length: int = 3, experts: bool = True) -> None:
    """A run with everything that a run directory may hold."""
    store.create(folder)
    records = _records(draft_length)
    drafts = sum(len(r.turns[0].steps) - 1 for r in records)
    accepted = sum(len(s.token_ids) - 1 for r in records for s in r.turns[0].steps[1:])
    one = session(
        ended_ns=1_200 * MS, counters=counters(drafts, accepted), replica=0, hostname="node1",
        n_cpus=2, devices=None, clock="boot 1", met_ns=None, argv=["run.py"], energy="",
    )  # fmt: skip
    about = manifest(
        draft_length=draft_length,
        expected={"coding": 3, "math": 3 + experts},
        sessions=[one],
        config={"capture_experts": experts},
        engine={"fits_drafts": False, "sampling_fault": ""},
    )
    store.write_manifest(folder, {**about, "format": store.FORMAT})
    write_part(folder, records[:4])
    write_part(folder, [*records[4:], *([_experts()] if experts else [])])
    store.write_energy_part(folder, 0, 0, _energy())
    if draft_length:
        ids = np.arange(0, 64, 2, dtype=np.int64)
        store.write_draft_vocabulary(folder, ids, {"n_tokens": 64, "source": "d2t"})


def served(folder: Path) -> None:
    """A run against a server: what it told of each request, and its metrics."""
    store.create(folder)
    records = []
    for i in range(4):
        one = turn(f"c{i}.0", [1, 3, 2, 1], submitted_ns=i * 60 * MS, engine_steps=[0] * 4)
        told_by = ToldAcceptance("vLLM's per-request metrics, totals", (1, 1, 1, 0), 9)
        last = one.steps[-1]._replace(
            served=Served(i * 60 * MS, i == 0, "echoed", 5, 0, told_by), merged=[1] * 4
        )
        records.append(conversation(f"c{i}", "math", replace(one, steps=[*one.steps[:-1], last])))
    entry = session(
        ended_ns=1_200 * MS, counters=counters(12, 12), replica=0, clock="boot 1", met_ns=None,
        server_metrics={"sources": ["http://h:1/metrics"], "why_not": ""}, client_busy=0.1,
        served_others=False, why_no_counters=None,
    )  # fmt: skip
    config = {"engine": "OPENAI", "url": "http://h:1", "model": "m", "draft_model_dir": None}
    about = manifest(draft_length=3, expected={"math": 4}, sessions=[entry], config=config)
    store.write_manifest(folder, {**about, "format": store.FORMAT})
    write_part(folder, records)
    names = ("vllm:spec_decode_num_drafts_total", "vllm:generation_tokens_total",
             "vllm:request_success_total", "vllm:prompt_tokens_total")  # fmt: skip
    rows = [
        {"time_ns": at, "took_ns": MS, "session": 0, "source": 0, "name": name,
         "labels": '{"model_name": "m"}', "kind": "counter", "value": float(at // MS)}
        for at in (0, 600 * MS, 1_200 * MS)
        for name in names
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=store.SERVER_METRICS)
    store.write_server_metrics_part(folder, 0, table)


def arms(folder: Path) -> None:
    """A folder of two runs, with its sweep.json."""
    (folder / "runs").mkdir()
    run(folder / "runs" / "baseline-1", 0, experts=False)
    run(folder / "runs" / "speculative-1", 3, experts=False)
    sweep(folder / "runs")


def sweep(folder: Path) -> None:
    from speedbench import series
    from speedbench.sweep import Cell, Spec

    names = ("baseline", "speculative")
    configs = [store.read_manifest(folder / f"{name}-1")["config"] for name in names]
    cells = tuple(
        Cell(name, from_dict(config), {}) for name, config in zip(names, configs, strict=True)
    )
    spec = Spec(base={"engine": "VLLM", "speculative_algorithm": "EAGLE3"}, baseline=True)
    series.write(series.Plan("series", folder, spec, cells), {"speculative-2": "why not"})


def pinned(folder: Path) -> None:
    from speedbench.report import baseline_file
    from speedbench.report.arms import load_arms
    from speedbench.report.sample import of_arm

    with tempfile.TemporaryDirectory() as name:
        run(Path(name), 0, experts=False)
        text = baseline_file.dumps(of_arm(load_arms([Path(name)])[0]))
    (folder / "base.json").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- prompts


def _lines(*rows: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


ROWS = _lines(
    {"question_id": "a", "category": "math", "turns": ["the cat", "sat on"], "sub_category": "x"},
    {"question_id": 7, "category": "coding", "turns": ["a dog \u2028 ran"]},
    {"question_id": "c", "category": "qa\u00e9", "turns": ["on the mat"], "sub_category": None},
)
OWN_ROWS = _lines(
    {"prompt": "the cat", "category": "math"},
    {"messages": [{"role": "user", "content": "sat on"}], "question_id": "m"},
    {"turns": ["a dog", "ran"]},
)
HISTORY = _lines({"question_id": "a", "replies": ["sat", "mat"]}, {"question_id": 7, "replies": []})


def _speed_table() -> pa.Table:
    return pa.table(
        {
            "question_id": ["a", "b", "c"],
            "category": ["math", "coding", "math"],
            "sub_category": ["x", None, ""],
            "turns": [["the cat", "sat"], ["a dog"], ["on the mat"]],
            "source": ["s", "s", "s"],
            "src_id": ["1", "2", "3"],
            "difficulty": ["", "hard", ""],
            "multiturn": [True, False, False],
        }
    )


def speed(folder: Path) -> None:
    """A prepared folder: rows, and the identity beside them."""
    from speedbench.datasets import identity
    from speedbench.datasets.files import parquet_records
    from speedbench.datasets.rows import Schema, to_conversations

    file = folder / "test.parquet"
    pq.write_table(_speed_table(), file)
    rows = to_conversations(parquet_records([file]), Schema())
    about = {
        "format": identity.FORMAT, "dataset": "speed", "config": "qualitative",
        "source": {"repository": "r", "revision": "0" * 40, "asked": "main", "files": {}},
        "preparer": {"repository": "p", "commit": "1" * 40},
        "licences": [{"name": "n", "of": "o", "url": "u"}],
        "prepared_utc": "2026-01-02T03:04:05+00:00", **identity.of_rows(rows, file),
    }  # fmt: skip
    (folder / identity.NAME).write_text(json.dumps(about), encoding="utf-8")


def tokens(folder: Path) -> None:
    from speedbench.datasets import tokens as token_file
    from speedbench.prompts import turn_sha256
    from speedbench.types import Conversation, Prompt

    rows = [Conversation("a", "math", ("x", "y")), Conversation("b", "coding", ("z",))]
    keys = [("a", 0), ("a", 1), ("b", 0)]
    prompts = {key: Prompt([1, 2, 3 + i], turn_sha256(*key, [1, 2, 3 + i]))
               for i, key in enumerate(keys)}  # fmt: skip
    about = {
        "dataset": {"name": "jsonl", "path": "rows.jsonl", "sha256": "d" * 64, "origin": None},
        "tokenizer": "t", "tokenizer_files": {"t": {"files": {"tokenizer.json": "a" * 64}}},
        "completions": False, "chat_template_args": {}, "history": "frozen", "eos_token_ids": [2],
        "fingerprint": "f" * 64,
    }  # fmt: skip
    token_file.write(folder / "tokens.parquet", rows, prompts, about)


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% if thinking %}think{% endif %}{% endif %}"
)
WORDS = ("[UNK]", "<s>", "</s>", "the", "cat", "sat", "on", "a", "dog", "ran", "mat", "user",
         "assistant", "think", "x")  # fmt: skip


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    _json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "[UNK]", "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    _json(folder / "generation_config.json", {"eos_token_id": [2, 1]})
    _json(folder / "config.json", CONFIG)


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64,
    "draft_vocab_size": 32, "max_position_embeddings": 512, "eos_token_id": 2,
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "text_config": {"vocab_size": 64, "eos_token_id": 2},
    "transformer_layer_config": {"vocab_size": 64},
}  # fmt: skip


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


# ---------------------------------------------------------------- checkpoints


def drafter(folder: Path) -> None:
    from safetensors.numpy import save_file

    _json(folder / "config.json", CONFIG)
    d2t = np.arange(32, dtype=np.int64)
    t2d = np.tile(np.array([True, False]), 32)
    file = folder / "model-00001.safetensors"
    save_file({"d2t": d2t, "t2d": t2d, "fc.weight": np.zeros((2, 2), np.float32)}, file)
    _json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(("d2t", "t2d", "fc.weight"), file.name),
    })  # fmt: skip


def drafter_of_one_file(folder: Path) -> None:
    from safetensors.numpy import save_file

    _json(folder / "config.json", CONFIG)
    save_file({"t2d": np.tile(np.array([True, False]), 32)}, folder / "model.safetensors")


def known_answer(folder: Path) -> None:
    from speedbench.calibration.closed_form import KNOWN_ANSWER_FILE, KNOWN_DRAFT_FILE

    found = {"name": "word", "version": 3, "next": [1, 2, 0], "draft_next": [1, 0, 2],
             "densities": {"math": 0.5}, "vocab_size": 3, "eos_token_ids": [2]}  # fmt: skip
    _json(folder / KNOWN_ANSWER_FILE, found)
    _json(folder / KNOWN_DRAFT_FILE, {"draft_next": [2, 1, 0], "after_mask": 1})


# ---------------------------------------------------------------- YAML, locks


RUNTIME = yaml.safe_dump(
    {
        "engine_args": {"enforce_eager": True, "compilation_config": {"level": 0, "sizes": [1, 2]}},
        "sampling_kwargs": {"presence_penalty": 0.5},
        "chat_template_args": {"thinking": True},
        "dataset_kwargs": {"n_rows": 4},
    }
).encode()
SWEEP = yaml.safe_dump(
    {
        "base": {"engine": "NULL", "dataset": "mini", "output_length": 64},
        "grid": {"concurrency": [1, 8], "draft_length": [1, 3], "temperature": [0, 0.7],
                 "speculative_algorithm": ["NGRAM", "NONE"]},
        "cells": [{"name": "wide", "concurrency": 64, "engine_args": {"seed": 1}}],
        "baseline": True,
        "repeat": 2,
    }
).encode()  # fmt: skip
LOCK = b"process 123 on node1"
REMOTE_LOCK = json.dumps(
    {"id": "ab", "owner": "process 1 on n", "pid": 1, "place": "n", "beat_at": 1.5}
).encode()

# ---------------------------------------------------------------- servers

METRICS = b"""# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a\\"b\\\\c"} 1.5e3
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{le="0.1"} 1
vllm:time_to_first_token_seconds_bucket{le="+Inf"} 3 1700000000000
vllm:time_to_first_token_seconds_sum 0.5
vllm:time_to_first_token_seconds_count 3
up 1
nan_gauge NaN
"""


def _events(*events: Mapping[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


STREAM = (
    _events(
        {"id": "x", "choices": [{"index": 0, "text": "a", "token_ids": [5],
                                 "prompt_token_ids": [1, 2, 3], "finish_reason": None}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        {"id": "x", "choices": [{"index": 0, "text": "bc", "token_ids": [6, 7],
                                 "finish_reason": None}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
        {"id": "x", "choices": [{"index": 0, "text": "d", "token_ids": [8],
                                 "finish_reason": "stop"}],
         "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
        {"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4,
                                             "prompt_tokens_details": {"cached_tokens": 0}},
         "metrics": {"speculative_decoding": {
             "num_spec_steps": 2, "num_spec_tokens": 3, "num_draft_tokens": 6,
             "acceptance_histogram": [1, 1, 0, 0], "per_step_accepted": [1, 0],
             "per_step_drafted": [3, 3]}},
         "sglext": {"spec_tokens_details": {"spec_correct_drafts_histogram": [1, 1],
                                            "spec_verify_ct": 2, "spec_num_proposed_drafts": 6}}},
    )
    + b"data: [DONE]\n\n"
)  # fmt: skip
