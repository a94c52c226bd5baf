"""Sweeps as plans: which cells a grid has, what they are called, and which share an engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines
import engines.null
from speedbench import inputs, series, sweep
from speedbench.cli import main
from speedbench.config import RunConfig, from_dict
from speedbench.configure import cell_configuration, most_requests
from speedbench.series import Plan
from speedbench.sweep import Cell, Spec, expanded, spec_of
from speedbench.types import UserError

NULL = {"engine": "NULL", "random_isl": 4}
DRAFTS = {**NULL, "speculative_algorithm": "DRAFT_TARGET", "draft_model_dir": "none"}
VLLM = {"engine": "VLLM", "model_dir": "/models/t", "dataset": "mini"}


def cells(base: Mapping[str, Any], kept: Sequence[Cell] = (), **more: Any) -> tuple[Cell, ...]:
    spec = spec_of({"base": base, **more}, "the sweep")
    return expanded(spec, cell_configuration, most_requests, kept)


def plan(found: Sequence[Cell], repeat: int = 1, kind: series.Kind = "sweep") -> Plan:
    return Plan(kind, Path("d"), Spec(repeat=repeat), tuple(found))


def told(found: Sequence[Cell]) -> set[tuple[str, str]]:
    return {(cell.name, sweep.identity(cell.config)) for cell in found}


def starts(found: Sequence[Cell], repeat: int = 1) -> list[list[str]]:
    return [[run.name for run in start.runs] for start in plan(found, repeat).starts()]


# --- cells ----------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_a_baseline_per_load() -> None:
    found = cells(
        DRAFTS,
        grid={"draft_length": [1, 3, 5], "concurrency": [1, 8], "temperature": [0, 0.7]},
        baseline=True,
    )
    speculative = [cell for cell in found if not cell.is_baseline]
    asked = {
        (cell.config.draft_length, cell.config.concurrency, cell.config.temperature)
        for cell in speculative
    }
    assert asked == set(itertools.product((1, 3, 5), (1, 8), (0, 0.7)))
    assert len(speculative) == 12
    baselines = [cell for cell in found if cell.is_baseline]
    assert {(c.config.concurrency, c.config.temperature) for c in baselines} == set(
        itertools.product((1, 8), (0, 0.7))
    )
    assert len(baselines) == 4  # not one for each K
    assert {c.config.draft_model_dir for c in baselines} == {None}


def test_the_baseline_differs_in_speculation_and_in_nothing_else() -> None:
    spec = from_dict(
        {
            **VLLM,
            "speculative_algorithm": "EAGLE3",
            "draft_model_dir": "/models/d",
            "draft_length": 5,
            "draft_sample_method": "greedy",
            "concurrency": 8,
            "max_num_seqs": 32,
            "max_seq_len": 512,
            "prefix_cache": True,
            "seed": 7,
            "temperature": 0.5,
            "engine_args": {"enforce_eager": True, "speculative_config": {"a": 1}},
        }
    )
    base = spec.baseline()
    assert set(spec.differences(base)) == {
        "speculative_algorithm", "draft_model_dir", "draft_length", "draft_sample_method",
        "engine_args",
    }  # fmt: skip
    assert base.engine_args == {"enforce_eager": True}
    assert base.engine_settings().concurrency == spec.engine_settings().concurrency == 32
    assert from_dict(base.model_dump(mode="json")) == base  # valid by itself
    assert base.baseline() == base


def test_names_tell_the_cells_apart_and_never_collide() -> None:
    found = cells(
        {**VLLM, "speculative_algorithm": "EAGLE3"},
        grid={
            "draft_model_dir": ["/a/head", "/b/head"],
            "draft_length": [1, 3],
            "concurrency": [1, 8],
        },
        baseline=True,
    )
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names) == 2 * 2 * 2 + 2
    assert {"baseline-c1", "baseline-c8", "eagle3-head-k3-c8", "eagle3-head-k3-c8-2"} <= set(names)
    first = next(cell for cell in found if cell.name == "eagle3-head-k3-c8")
    assert first.config.draft_model_dir == "/a/head"
    assert all(sweep.NAME.fullmatch(name) for name in names)


def test_a_cell_is_named_by_what_it_varies() -> None:
    """Of `cells` as of a grid: the value, not a number that says nothing."""
    found = cells(DRAFTS, cells=[{"temperature": t} for t in (0, 0.7, 1)])
    assert [cell.name for cell in found] == [f"draft_target-k3-c1-t{t}" for t in ("0", "0.7", "1")]
    found = cells(DRAFTS, grid={"concurrency": [1]}, cells=[{"temperature": 0.7, "seed": 3}])
    assert {cell.name for cell in found} == {
        "draft_target-k3-c1", "draft_target-k3-c1-t0.7-seed-3",
    }  # fmt: skip
    found = cells(DRAFTS, cells=[{"engine_args": {"step_ms": ms}} for ms in (1, 2)])
    assert [cell.name for cell in found] == ["draft_target-k3-c1", "draft_target-k3-c1-2"]


def test_algorithms_in_small_letters_are_the_same_cells() -> None:
    small = cells(DRAFTS, grid={"speculative_algorithm": ["none", "draft_target"]})
    assert told(small) == told(
        cells(DRAFTS, grid={"speculative_algorithm": ["NONE", "DRAFT_TARGET"]})
    )


def test_what_a_sweep_stored_is_its_configuration(tmp_path: Path) -> None:
    """The folder, or the sweep.json in it, asks for the same cells again."""
    asked = spec_of(
        {"base": DRAFTS, "grid": {"draft_length": [1, 3]}, "baseline": True, "repeat": 2}, "here"
    )
    found = expanded(asked, cell_configuration, most_requests)
    series.write(Plan("sweep", tmp_path, asked, found), {})
    for path in (tmp_path, tmp_path / "sweep.json"):
        again = sweep.read_spec(path)
        assert (again.baseline, again.repeat) == (True, 2)
        assert told(expanded(again, cell_configuration, most_requests)) == told(found)


def test_one_value_is_no_list() -> None:
    with pytest.raises(UserError, match=r"grid\.concurrency is 4, expected a list: \[4\]$"):
        cells(NULL, grid={"concurrency": 4})


VALUES = {
    "draft_length": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    "concurrency": st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
    "temperature": st.lists(st.sampled_from([0, 0.5, 1]), min_size=1, max_size=2, unique=True),
    "random_isl": st.lists(st.integers(1, 999), min_size=1, max_size=2, unique=True),
}


@settings(max_examples=40, deadline=None)
@given(grid=st.fixed_dictionaries({}, optional=VALUES), baseline=st.booleans(),
       repeat=st.integers(1, 3))  # fmt: skip
def test_any_grid_keeps_the_rules(grid: dict[str, list[Any]], baseline: bool, repeat: int) -> None:
    found = cells(DRAFTS, grid=grid, baseline=baseline)
    sizes = {name: len(values) for name, values in grid.items()}
    n_spec = sizes.get("draft_length", 1)
    n_load = 1
    for name in ("concurrency", "temperature", "random_isl"):
        n_load *= sizes.get(name, 1)
    assert len(found) == n_load * (n_spec + baseline)
    runs = plan(found, repeat).runs()
    assert len({run.name for run in runs}) == len(runs) == len(found) * repeat
    # Each round measures every cell once, on one start per engine, of the size of the largest load.
    assert len(plan(found, repeat).starts()) == (n_spec + baseline) * repeat
    largest = max(grid.get("concurrency", [1]))
    assert {cell.config.engine_settings().concurrency for cell in found} == {largest}


def test_an_algorithm_without_a_drafter_leaves_it_out_and_k_means_nothing_to_a_baseline() -> None:
    found = cells(
        {**VLLM, "draft_model_dir": "/models/d"},
        grid={"speculative_algorithm": ["EAGLE3", "NGRAM", "NONE"], "draft_length": [1, 3]},
    )
    told = [(c.config.speculative_algorithm, c.config.draft_length, c.config.draft_model_dir)
            for c in found]  # fmt: skip
    assert told == [
        ("NONE", 3, None),  # once, the field's default
        ("EAGLE3", 1, "/models/d"),
        ("EAGLE3", 3, "/models/d"),
        ("NGRAM", 1, None),
        ("NGRAM", 3, None),
    ]


def test_explicit_cells_stand_beside_the_grid() -> None:
    found = cells(
        {**VLLM, "speculative_algorithm": "EAGLE3", "draft_model_dir": "/models/d"},
        grid={"concurrency": [1, 8]},
        cells=[
            {"name": "lookup", "speculative_algorithm": "NGRAM", "draft_length": 5,
             "engine_args": {"speculative_config": {"prompt_lookup_max": 4}}},
            {"concurrency": 64},
        ],
        baseline=True,
    )  # fmt: skip
    by_name = {cell.name: cell.config for cell in found}
    assert set(by_name) == {
        "baseline-c1", "baseline-c8", "baseline-c64", "eagle3-k3-c1", "eagle3-k3-c8",
        "eagle3-k3-c64", "lookup",
    }  # fmt: skip
    assert by_name["lookup"].engine_args == {"speculative_config": {"prompt_lookup_max": 4}}
    assert by_name["lookup"].draft_model_dir is None
    assert by_name["baseline-c1"].engine_args == {}


# --- engines --------------------------------------------------------------------------------------


def test_one_engine_start_per_engine_configuration() -> None:
    found = cells(
        {**VLLM, "speculative_algorithm": "EAGLE3", "draft_model_dir": "/models/d"},
        grid={"draft_length": [1, 3], "concurrency": [1, 8], "temperature": [0, 1]},
        baseline=True,
    )
    assert starts(found) == [
        [f"baseline-c{c}-t{t}" for c in (1, 8) for t in (0, 1)],
        *([f"eagle3-k{k}-c{c}-t{t}" for c in (1, 8) for t in (0, 1)] for k in (1, 3)),
    ]


def test_tensorrt_llm_is_started_for_greedy_decoding_and_again_for_sampling() -> None:
    found = cells(
        {**VLLM, "engine": "TRTLLM", "speculative_algorithm": "EAGLE3", "draft_model_dir": "/d"},
        grid={"temperature": [0, 0.5, 1]},
        baseline=True,
    )
    assert starts(found) == [
        ["baseline-c1-t0"], ["baseline-c1-t0.5", "baseline-c1-t1"],
        ["eagle3-k3-c1-t0"], ["eagle3-k3-c1-t0.5", "eagle3-k3-c1-t1"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "alone"),
    [
        ({"speculative_algorithm": "SUFFIX"}, True),
        ({"speculative_algorithm": "NGRAM"}, False),
        ({"prefix_cache": True}, False),  # vLLM can be told to forget it
        ({"engine": "TRTLLM", "prefix_cache": True}, True),
        ({"engine": "TRTLLM", "speculative_algorithm": "NGRAM"}, True),
        ({"engine": "TRTLLM"}, False),
    ],
)
def test_an_engine_that_cannot_forget_is_started_anew(more: dict[str, Any], alone: bool) -> None:
    found = cells({**VLLM, **more}, grid={"concurrency": [1, 8]})
    assert len(starts(found)) == (2 if alone else 1)


def test_what_an_engine_keeps_is_asked_of_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy_and_not = cells(NULL, grid={"temperature": [0, 1]})
    cached = cells({**NULL, "prefix_cache": True}, grid={"concurrency": [1, 8]})
    drafted = cells(DRAFTS, grid={"concurrency": [1, 8]})
    for name, value, found in (
        ("samples_as_started", True, greedy_and_not),
        ("forgets_prompts", False, cached),
        ("remembers", ("DRAFT_TARGET",), drafted),
    ):
        assert len(starts(found)) == 1
        monkeypatch.setattr(engines.null.NullEngine, name, value)
        assert len(starts(found)) == 2, name
        monkeypatch.undo()


def test_every_adapter_says_what_it_keeps() -> None:
    for name in engines.ADAPTERS:
        adapter = engines.adapter(name)
        assert set(adapter.remembers) <= set(adapter.algorithms)
        assert {type(adapter.forgets_prompts), type(adapter.samples_as_started)} == {bool}


def test_what_is_set_at_the_start_is_a_start_of_its_own() -> None:
    for name, values in (
        ("max_seq_len", [128, 256]),
        ("prefix_cache", ["true", "false"]),
        ("tp_size", [1, 2]),
        ("seed", [0, 1]),
        ("draft_model_dir", ["/a", "/b"]),
        ("max_num_seqs", [8, 16]),
    ):
        found = cells(
            {**VLLM, "speculative_algorithm": "EAGLE3", "draft_model_dir": "/d"},
            grid={name: values, "concurrency": [1, 8]},
        )
        assert [len(runs) for runs in starts(found)] == [2, 2], name


def test_a_load_that_the_engine_refuses_does_not_size_the_others_engine() -> None:
    """transformers decodes one request at a time: its cell at 1 must be started for 1."""
    found = cells({**VLLM, "engine": "HF"}, grid={"concurrency": [1, 8]})
    assert [(c.config.concurrency, c.config.max_num_seqs) for c in found] == [(1, 1), (8, 8)]


def test_one_server_is_not_swept_over_what_it_was_started_with() -> None:
    served = {
        "engine": "OPENAI", "url": "http://h:1", "model": "m", "dataset": "random",
        "random_isl": 8, "speculative_algorithm": "EAGLE3",
    }  # fmt: skip
    assert len(cells(served, grid={"concurrency": [1, 8]})) == 2
    with pytest.raises(UserError, match="with --draft_length 1 and 5, but it drafts as it was"):
        cells(served, grid={"draft_length": [1, 5]})
    with pytest.raises(UserError, match="with --speculative_algorithm NONE and EAGLE3"):
        cells(served, grid={"speculative_algorithm": ["NONE", "EAGLE3"]})
    others = [
        {"url": "http://h:1", "draft_length": 1}, {"url": "http://h:2", "draft_length": 5},
    ]  # fmt: skip
    assert len(cells(served, cells=others)) == 2


def test_two_servers_are_two_cells() -> None:
    """Such as one behind another router, of which nothing else is known."""
    served: dict[str, Any] = {
        "engine": "OPENAI", "model": "m", "dataset": "random", "random_isl": 8,
    }  # fmt: skip
    urls = ["http://h:1", "http://h:2"]
    found = cells(served, cells=[{"url": url} for url in urls])
    assert [cell.config.url for cell in found] == urls
    assert len({cell.name for cell in found}) == 2
    assert [c.config.url for c in cells(served, grid={"url": urls})] == urls
    assert len(starts(found)) == 2
    # Measured again at where a server has moved to, a cell is the one that it was.
    served["url"] = urls[0]
    before = cells(served, grid={"concurrency": [1, 8]})
    after = cells({**served, "url": urls[1]}, before, grid={"concurrency": [1, 4, 8]})
    assert [cell.name for cell in before] == ["baseline-c1", "baseline-c8"]
    assert [cell.name for cell in after] == ["baseline-c1", "baseline-c4", "baseline-c8"]


# --- the order ------------------------------------------------------------------------------------


def test_repeats_go_to_and_fro() -> None:
    config = cell_configuration(DRAFTS)
    arms = series.arms(config, baseline=True)
    expected = {1: "bs", 2: "bssb", 3: "bssbbs", 4: "bssbbssb"}
    for repeat, order in expected.items():
        names = [run.name for run in plan(arms, repeat, "series").runs()]
        assert "".join(name[0] for name in names) == order
        assert sorted(names) == sorted(
            f"{arm}-{i}" for arm in ("baseline", "speculative") for i in range(1, repeat + 1)
        )
    assert [cell.name for cell in series.arms(config, baseline=False)] == ["speculative"]
    assert [cell.name for cell in series.arms(config.baseline(), False)] == ["baseline"]
    alone = plan(series.arms(config, baseline=False), 3, "series")
    assert [len(start.runs) for start in alone.starts()] == [1, 1, 1]  # engines between them


@settings(max_examples=30, deadline=None)
@given(repeat=st.integers(1, 6), n=st.integers(1, 4))
def test_rounds_cancel_a_steady_drift(repeat: int, n: int) -> None:
    """With an even number of rounds, every cell has the same mean place in the order."""
    found = cells(DRAFTS, grid={"draft_length": list(range(1, n + 1))})
    runs = plan(found, 2 * repeat).runs()
    places: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        places.setdefault(run.cell.name, []).append(place)
    assert len({sum(mine) for mine in places.values()}) == 1


# --- growth ---------------------------------------------------------------------------------------


def test_a_grown_grid_keeps_names_and_engines_of_what_was_there() -> None:
    before = cells(DRAFTS, grid={"concurrency": [1, 8]}, baseline=True)
    after = cells(
        DRAFTS, before, grid={"concurrency": [1, 4, 8, 32], "draft_length": [3, 5]}, baseline=True
    )
    assert told(before) <= told(after)
    slots = {(c.config.concurrency, c.config.max_num_seqs) for c in after}
    assert slots == {(1, 8), (4, 8), (8, 8), (32, 32)}  # alike for the arms at each load
    again = cells(
        DRAFTS, after, grid={"concurrency": [1, 4, 8, 16, 32], "draft_length": [3, 5]},
        baseline=True,
    )  # fmt: skip
    assert told(after) <= told(again)
    assert {c.config.max_num_seqs for c in again if c.config.concurrency == 16} == {32}


def test_another_base_under_the_same_names_is_refused() -> None:
    before = cells({**DRAFTS, "output_length": 40}, grid={"concurrency": [1, 8]})
    with pytest.raises(UserError, match=r"draft_target-k3-c1 .*--output_length 40.*50"):
        cells({**DRAFTS, "output_length": 50}, before, grid={"concurrency": [1, 8]})


def test_a_second_drafter_of_the_same_name_is_no_change() -> None:
    base = {**VLLM, "speculative_algorithm": "EAGLE3"}
    before = cells(base, grid={"draft_model_dir": ["/a/head"]})
    after = cells(base, before, grid={"draft_model_dir": ["/a/head", "/b/head"]})
    assert [(c.name, c.config.draft_model_dir) for c in after] == [
        ("eagle3-head-k3-c1", "/a/head"), ("eagle3-head-k3-c1-2", "/b/head"),
    ]  # fmt: skip


def test_a_value_that_ends_like_a_repeat_is_no_other_cells_repeat() -> None:
    """Such as a run of another sweep, whose replies are the history."""
    base = {**NULL, "dataset": "jsonl"}
    del base["random_isl"]
    found = cells(
        base, grid={"dataset_path": ["/a/base", "/a/base-run2", "/a/base_run2", "x.json"]}
    )
    runs = plan(found, 3).runs()
    assert len({run.name for run in runs}) == len(runs) == 12
    assert not any(cell.name.endswith((".json", "-run2")) for cell in found)


def test_long_values_make_no_long_names() -> None:
    found = cells(NULL, grid={"category": ["a" * 300, "a" * 299 + "b"]})
    first, second = (cell.name for cell in found)
    assert first != second
    assert len(first) == 150


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    found = cells(DRAFTS, grid={"concurrency": [1, 8], "draft_length": [1, 3]}, baseline=True)
    spec = spec_of({"base": DRAFTS, "grid": {"concurrency": [1, 8]}, "repeat": 2}, "x")
    made = Plan("sweep", tmp_path, spec, found)
    series.write(made, {"draft_target-k1-c1": "no GPU"})
    kept = series.read(tmp_path)
    assert kept is not None
    assert (kept.kind, kept.spec, kept.not_measured) == (
        "sweep", spec, {"draft_target-k1-c1": "no GPU"},
    )  # fmt: skip
    assert [(c.name, c.config) for c in kept.cells] == [(c.name, c.config) for c in found]
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored["format"] == 1
    assert stored["cells"][0]["runs"] == ["baseline-c1", "baseline-c1-run2"]
    # A smaller grid forgets nothing.
    series.write(Plan("sweep", tmp_path, spec, found[:2]), {}, kept)
    again = series.read(tmp_path)
    assert again is not None
    assert {c.name for c in again.cells} == {c.name for c in found}
    assert again.not_measured == {"draft_target-k1-c1": "no GPU"}
    for text, word in (
        ("{", "sweep.json"),
        ('{"format": 9}', "format 9"),
        ('{"format": 1}', "cells"),
        ('{"format": null}', "lacks a format"),
        ("[" * 100_000, "restore"),
        (json.dumps({**stored, "not_measured": ["a"]}), "restore"),
        (json.dumps({**stored, "spec": "abc"}), "restore"),
        (json.dumps({**stored, "cells": [{**stored["cells"][0], "values": ["x"]}]}), "restore"),
        (json.dumps({**stored, "cells": [{**stored["cells"][0], "name": "../x"}]}), "../x"),
        (json.dumps({**stored, "cells": [{**stored["cells"][0], "name": 5}]}), "restore"),
        (json.dumps(stored).replace('"NULL"', '"NIL"'), "NIL"),
    ):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match=word):
            series.read(tmp_path)


# --- inputs ---------------------------------------------------------------------------------------

CHANGED: Mapping[str, Any] = {
    "engine_args": {"acceptance": 0.1}, "speculative_algorithm": "DRAFT_TARGET",
    "draft_model_dir": "none", "draft_length": 7, "draft_sample_method": "greedy",
    "output_length": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 5, "ignore_eos": True,
    "sampling_kwargs": {"x": 1}, "concurrency": 3, "max_num_seqs": 9, "warmup": 1,
    "max_duration": 5.0, "save_dir": "elsewhere", "show_progress": True, "tp_size": 2, "pp_size": 2,
    "dp_size": 2, "ep_size": 2, "max_seq_len": 99, "prefix_cache": True, "capture_experts": True,
    "block_size": 4, "goodput": "ttft=1s", "stall_timeout": 5.0,
}  # fmt: skip
"""A change of every field that is said to change no input."""


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_what_changes_no_prompt_shares_them_and_everything_else_does_not() -> None:
    base = from_dict({**NULL, "dataset": "random", "dataset_kwargs": {"n_rows": 5}})
    made = inputs.prepare(base)
    assert set(CHANGED) == inputs.NOT_INPUT
    for name, value in CHANGED.items():
        other = base.model_copy(update={name: value})
        assert inputs.input_identity(other) == inputs.input_identity(base), name
        again = inputs.prepare(other)
        assert (again.fingerprint, again.rows, again.stop_token_ids) == (
            made.fingerprint, made.rows, made.stop_token_ids,
        ), name  # fmt: skip
    for name in set(RunConfig.model_fields) - inputs.NOT_INPUT:
        other = base.model_copy(update={name: "another"})
        assert inputs.input_identity(other) != inputs.input_identity(base), name


# --- mistakes -------------------------------------------------------------------------------------

YAML_MISTAKES: dict[str, tuple[str, list[str]]] = {
    "a key twice": ("base: {engine: 'NULL'}\nbase: {seed: 1}", ["'base' stands twice"]),
    "a flag twice": ("base: {seed: 1, seed: 2}", ["'seed' stands twice"]),
    "a value twice": ("grid: {concurrency: [1, 8, 1]}", ["concurrency", "1 twice"]),
    "no mapping": ("[1, 2]", ["list", "grid"]),
    "unknown section": ("gird: {}", ["'gird'", "grid"]),
    "unknown flag in base": ("base: {concurency: 1}", ["'concurency'", "concurrency"]),
    "unknown flag in grid": ("grid: {concurency: [1]}", ["'concurency'", "concurrency"]),
    "unknown flag in a cell": ("cells: [{K: 3}]", ["'K'"]),
    "several engines": ("grid: {engine: [VLLM, SGLANG]}", ["engine", "a sweep for each"]),
    "save_dir": ("base: {save_dir: x}", ["save_dir"]),
    "an empty grid": ("grid: {concurrency: []}", ["concurrency is empty"]),
    "engine arguments in the grid": ("grid: {engine_args: [1]}", ["engine_args", "cells"]),
    "no list": ("grid: {concurrency: 8}", ["grid.concurrency", "8"]),
    "repeat": ("repeat: 0", ["repeat", "0"]),
    "a name that is a path": ("cells: [{name: ../x}]", ["../x"]),
    "a name of ours": ("cells: [{name: a-run2}]", ["a-run2"]),
    "a name of a file": ("cells: [{name: sweep.json}]", ["sweep.json"]),
    "a name of a run's parts": ("cells: [{name: turns}]", ["turns"]),
    "a name that no disk takes": (f"cells: [{{name: {'a' * 151}}}]", ["at most 150"]),
    "no finite number": ("base: {engine_args: {acceptance: .nan}}", ["no JSON", "finite"]),
    "no finite number in a cell": ("cells: [{engine_args: {step_ms: .inf}}]", ["finite"]),
    "a date": ("base: {engine_args: {revision: 2020-01-01}}", ["date", "quotes"]),
    "bytes": ("base: {engine_args: {a: !!binary /9j/}}", ["bytes"]),
    "a loop": ("base: {engine_args: &a {b: *a}}", ["contain itself"]),
    "a huge grid": (
        "grid: {seed: [%s], top_k: [%s]}" % ((",".join(map(str, range(101))),) * 2),
        ["10201 combinations", "10000"],
    ),
    "python": ("base: !!python/object/apply:os.system ['true']", ["python/object"]),
    "no YAML": ("grid: [", ["YAML"]),
    "two cells of a name": (
        "base: {engine: 'NULL', random_isl: 4}\n"
        "cells: [{name: a, seed: 1}, {name: a, seed: 2}]",
        ["two cells are named 'a'"],
    ),
    "a value out of range": (
        "base: {engine: 'NULL', random_isl: 4}\ngrid: {concurrency: [0]}", ["--concurrency", "0"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", YAML_MISTAKES)
def test_a_mistake_in_the_file_is_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = YAML_MISTAKES[name]
    (tmp_path / "s.yaml").write_text(text)
    save_dir = tmp_path / "d"
    assert main(["sweep", "--config", str(tmp_path / "s.yaml"), "--save_dir", str(save_dir)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line
    assert not save_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "concurrency"], ["concurrency=1,8,32"]),
        (["--grid", "concurrency=1,,8"], ["concurrency=1,,8"]),
        (["--grid", "concurrency=1", "--grid", "concurrency=2"], ["given twice"]),
        (["--grid", "colour=1"], ["colour"]),
        (["--grid", "concurrency=1,8", "--concurrency", "4"], ["--concurrency 4", "grid"]),
        (["--grid", "shard=0/2,1/2"], ["shard", "whole sweep"]),
        (["--resume"], ["--save_dir"]),
        (["--resume", "--save_dir", "nowhere"], ["sweep.json"]),
        (["--repeat", "many"], ["repeat", "many"]),
        (["--config", "none.yaml"], ["none.yaml"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--engine", "NULL", "--random_isl", "4", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []
