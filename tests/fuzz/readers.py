"""Readers: every place where bytes that others wrote come in; one entry of the table for each.

A reader takes the folder of one input. It returns, or raises UserError; anything else is a fault.
It may look at what it got, and raise AssertionError for what damage must not turn into.
"""

from __future__ import annotations

import fcntl
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from speedbench.columns import Columns
from speedbench.types import PromptRefusedError, UserError
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_stream
from tests.fuzz.seeds import Files, files_of


@dataclass(frozen=True, slots=True)
class Reader:
    """One place where foreign bytes are read.

    seeds    whole inputs, made once; inputs of a campaign are damaged forms of them
    weight   share of a campaign's inputs: by how much there is to go wrong, and by its cost
    names    what a refusal names: the folder of the input, unless other things may be wrong with it
    targets  patterns of the files that are damaged
    mutate   (generator, file name, bytes) -> bytes, where not every damage is wanted
    """

    name: str
    seeds: Callable[[], Sequence[Files]]
    read: Callable[[Path], object]
    weight: float = 10
    targets: tuple[str, ...] = ("*",)
    mutate: Callable[[Random, str, bytes], bytes] | None = None
    names: tuple[str, ...] = ()


# ---------------------------------------------------------------- runs


@cache
def _run_seeds() -> Sequence[Files]:
    return (files_of(seeds.run), files_of(lambda folder: seeds.run(folder, 0)))


@cache
def _served_seeds() -> Sequence[Files]:
    return (files_of(seeds.served),)


def _load(folder: Path) -> None:
    from speedbench import draft_vocabulary, store
    from speedbench.checks import all_checks

    run = store.load(folder)
    assert_sound(run.columns)
    list(all_checks(run))
    store.committed(folder)
    store.expected_conversations(run)
    store.n_replicas_of(run.manifest)
    for part in (store.load_experts, draft_vocabulary.load):
        part(folder)
    store.load_energy(run)
    store.load_served(run)
    store.load_server_metrics(folder)


def assert_sound(columns: Columns) -> None:
    """No number that no writer can have written."""
    least = {"n_tokens": 0, "accepted": -1, "drafted": -1, "engine_steps": 0, "step": 0, "turn": 0,
             "session": 0, "replica": 0, "n_prompt_tokens": 0, "submitted_ns": -1}  # fmt: skip
    for name, low in least.items():
        assert np.min(getattr(columns, name), initial=low) >= low, name


def _flip(random: Random, _name: str, data: bytes) -> bytes:
    """What a disk does: bits that turn, blocks that are zero, an end that is missing."""
    changed = bytearray(data)
    at = random.randrange(len(data))
    kind = random.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        changed[at : at + random.randrange(1, 64)] = bytes(min(8, len(data) - at))
    else:
        changed[at] ^= 1 << random.randrange(8)
    return bytes(changed)


@cache
def _whole(k: int) -> Mapping[str, Mapping[str, Any]]:
    """Conversation id -> its numbers, of the undamaged run."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        seeds.run(Path(name), k)
        return _numbers(Path(name))


def _numbers(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    from speedbench import store

    columns = store.load(folder).columns
    found = {}
    for row in range(columns.n_requests):
        mine = columns.request == row
        name = columns.conversation_ids[columns.conversation[row]]
        found[name] = {
            "category": columns.categories[columns.category[columns.conversation[row]]],
            "submitted_ns": int(columns.submitted_ns[row]),
            **{c: getattr(columns, c)[mine].tolist()
               for c in ("time_ns", "n_tokens", "accepted", "drafted", "engine_steps")},
        }  # fmt: skip
    return found


def _unharmed(folder: Path) -> None:
    """Whatever is left of a run after its parts were damaged: its numbers are those of before."""
    from speedbench import store
    from speedbench.checks import all_checks

    run = store.load(folder)
    if run.damage or any(check.level == "error" for check in all_checks(run)):
        return
    before, after = _whole(int(run.manifest["engine"]["draft_length"])), _numbers(folder)
    for name, numbers in after.items():
        assert before.get(name) == numbers, f"{name} changed, and nothing says so"


FORMS = ("markdown", "console", "json", "csv", "html")


def _report(folder: Path) -> None:
    out = folder.parent / f"{folder.name}.out"
    # One after the other by what the input holds, so that an input always takes the same way.
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    form = FORMS[size % len(FORMS)]
    _cli("report", str(folder), "--format", form, "--out", str(out))
    if form == "html" and out.exists():
        assert "<script" not in out.read_text(encoding="utf-8")


@cache
def _arms_seeds() -> Sequence[Files]:
    return (files_of(seeds.arms),)


def _compare(folder: Path) -> None:
    _cli("compare", str(folder / "runs"), "--gate", "al=-5%", ok=(0, 3, 4))


def _report_of_arms(folder: Path) -> None:
    _cli("report", str(folder / "runs"), "--format", "markdown")


@cache
def _pinned_seeds() -> Sequence[Files]:
    pinned = files_of(seeds.pinned)
    run = {
        f"run/{name}": data
        for name, data in files_of(lambda folder: seeds.run(folder, experts=False)).items()
    }
    return ({**pinned, **run},)


def _baseline(folder: Path) -> None:
    _cli("compare", "--baseline_file", str(folder / "base.json"), str(folder / "run"),
         "--gate", "al=-5%", ok=(0, 3, 4))  # fmt: skip


def _resumed(folder: Path) -> None:
    """A stored configuration, as --config and --resume take it."""
    from speedbench import store
    from speedbench.config import from_dict
    from speedbench.configure import configuration

    from_dict(store.read_manifest(folder)["config"], str(folder))
    try:
        configuration({"config": str(folder)})
        configuration({"resume": True, "save_dir": str(folder)})
    except UserError as error:  # a name that is no engine's, say: flags are told of like that, too
        raise UserError(f"{folder}: {error}") from None


def _series(folder: Path) -> None:
    from speedbench import series

    runs = folder / "runs"
    kept = series.read(runs)
    if kept is None:
        return
    series.measured(kept, runs)
    plan = series.Plan(kept.kind, runs, kept.spec, kept.cells)
    for run in plan.runs():
        assert (runs / run.name).resolve().is_relative_to(runs.resolve()), run.name
    series.left(plan)
    series.refuse_other_runs(plan)


def _lock(folder: Path) -> None:
    """The owner's name, read by whoever finds the directory locked."""
    from speedbench import store

    name = folder / ".lock"
    if not name.is_file():
        with store.locked(folder):
            return
    with name.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with store.locked(folder):
            raise AssertionError("two have the lock")


def _remote_lock(folder: Path) -> None:
    from speedbench import remote_lock
    from speedbench.remote import Store

    lock = remote_lock.Lock(Store(str(folder)))
    found = lock._read()
    if found is not None:
        remote_lock._beat_at(found)
        remote_lock._has_ended(found)
        raise lock._refusal(found)


# ---------------------------------------------------------------- datasets, prompts


def _dataset(name: str, file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from speedbench import datasets
        from speedbench.config import from_dict

        path = str(folder / file) if file else str(folder)
        config = from_dict({"engine": "NULL", "dataset": name, "dataset_path": path})
        rows = datasets.select(datasets.load(config), config)
        assert rows
        assert all(row.id is not None and row.n_turns for row in rows)

    return read


def _overview(folder: Path) -> None:
    _cli("data", str(folder), "--format", "html", "--out", f"{folder}.out", ok=(0, 1))


def _split(folder: Path) -> None:
    from speedbench.datasets.split import read_rows

    read_rows(folder / "test.parquet")


@cache
def _speed_seeds() -> Sequence[Files]:
    return (files_of(seeds.speed),)


@cache
def _tokens_seeds() -> Sequence[Files]:
    return (files_of(seeds.tokens),)


def _tokens(folder: Path) -> None:
    from speedbench import inputs
    from speedbench.config import from_dict

    prepared = inputs.prepare(
        from_dict({"engine": "NULL", "prompts": str(folder / "tokens.parquet")})
    )
    for prompt in prepared.prompts.values():
        assert all(type(token) is int and token >= 0 for token in prompt.token_ids)
    assert all(type(token) is int and token >= 0 for token in prepared.stop_token_ids)


def _history(folder: Path) -> None:
    from speedbench.prompts import read_history

    read_history(folder / "history.jsonl")


@cache
def _tokenizer_seeds() -> Sequence[Files]:
    return (files_of(seeds.tokenizer),)


def _tokenizer(folder: Path) -> None:
    from speedbench.config import from_dict
    from speedbench.prompts import PromptEncoder
    from speedbench.types import Conversation

    config = from_dict({"engine": "NULL", "model_dir": str(folder), "dataset": "jsonl",
                        "dataset_path": "rows.jsonl"})  # fmt: skip
    rows = [Conversation("a", "math", ("the cat sat", "a dog")), Conversation("b", "qa", ("mat",))]
    try:
        encoder = PromptEncoder(config)
        encoder.encode_first_turns(rows)
        encoder.encode_turn(rows[0], 1, [[4, 5, 2]])
        len(encoder.ordinary_token_ids)
    except PromptRefusedError:
        pass


def _template(folder: Path) -> None:
    from speedbench.prompts import template_variables

    path = folder / "chat_template.jinja"
    if path.is_file():
        template_variables(path.read_bytes().decode("utf-8", "replace"), str(folder))


# ---------------------------------------------------------------- servers


def _prometheus(folder: Path) -> None:
    from speedbench.prometheus import FormatError, parse

    path = folder / "metrics.txt"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    try:
        for sample in parse(text):
            assert isinstance(sample.value, float)
    except FormatError as error:
        raise UserError(f"{folder}: {error}") from None


def _stream(folder: Path) -> None:
    """A response as it comes from the network: in reads that end anywhere."""
    from engines import told
    from engines.http_client import BadStreamError, Stream, message_of

    path = folder / "response.txt"
    data = path.read_bytes() if path.is_file() else b""
    message_of(data)
    for counts_usage in (False, True):
        stream = Stream(0, b"[1,2,3]", 3, counts_usage=counts_usage)
        stream.status, stream.is_events = 200, True
        try:
            n_tokens = []
            for start in range(0, len(data), 97):
                token_ids, n = stream.take(data[start : start + 97])
                assert all(type(token) is int and 0 <= token < 2**31 for token in token_ids)
                assert type(n) is int
                assert n >= 0
                n_tokens.append(n)
            if fault := stream.fault():
                raise BadStreamError(fault)
        except BadStreamError as error:
            raise UserError(f"{folder}: {error}") from None
        try:
            found = told.acceptance(stream.about)
            told.draft_length(stream.about)
        except (ValueError, TypeError, KeyError):  # as the adapter takes them
            return
        if found is not None:
            told.steps_in([n for n in n_tokens if n], found, 3)


@cache
def _aiperf_seeds() -> Sequence[Files]:
    folder = Path(__file__).parents[1] / "aiperf" / "vllm"
    return ({path.name: path.read_bytes() for path in sorted(folder.iterdir())},)


def _aiperf(folder: Path) -> None:
    _cli("report", str(folder), "--format", "markdown")


# ---------------------------------------------------------------- checkpoints


@cache
def _checkpoint_seeds() -> Sequence[Files]:
    return (files_of(seeds.drafter), files_of(seeds.drafter_of_one_file))


def _checkpoint(folder: Path) -> None:
    from engines.checkpoint import refuse_other_vocabulary
    from engines.trtllm_arguments import model_config
    from speedbench import draft_vocabulary, environment
    from speedbench.prompts import _eos_token_ids
    from speedbench.types import EngineSettings

    model_config(str(folder))
    environment.capture([], [str(folder)])
    refuse_other_vocabulary(EngineSettings(str(folder), str(folder)))
    _eos_token_ids(str(folder), 2)
    found = draft_vocabulary.read(folder)
    if found is not None:
        assert found.token_ids.min(initial=0) >= 0
        assert len(np.unique(found.token_ids)) == len(found.token_ids)
        assert found.n_tokens is None or found.token_ids.max(initial=-1) < found.n_tokens


@cache
def _known_seeds() -> Sequence[Files]:
    return (files_of(seeds.known_answer),)


def _known(folder: Path) -> None:
    from speedbench.calibration.closed_form import read_known_answer

    read_known_answer(folder, folder)


# ---------------------------------------------------------------- YAML


def _runtime(folder: Path) -> None:
    from speedbench.config import read_runtime_params

    read_runtime_params(str(folder / "params.yaml"))


def _sweep(folder: Path) -> None:
    from speedbench.configure import cell_configuration
    from speedbench.sweep import expanded, read_spec

    spec = read_spec(folder / "sweep.yaml")
    try:
        cells = expanded(spec, cell_configuration, lambda _config: None)
    except UserError as error:  # of a combination: it names the field, not the file
        raise UserError(f"{folder}: {error}") from None
    for cell in cells:
        assert (folder / cell.name).resolve().parent == folder.resolve(), cell.name


# ---------------------------------------------------------------- the command line


def _cli(*argv: str, ok: Sequence[int] = (0,)) -> None:
    """A command as a user calls it. Its refusal is raised, as the sentence that it printed."""
    from speedbench import cli

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(list(argv))
    if code == 2:
        raise UserError(err.getvalue().removesuffix("\n"))
    assert code in ok, (code, err.getvalue()[-2000:])
    out.getvalue().encode("utf-8")


def _one(name: str, data: bytes) -> Callable[[], Sequence[Files]]:
    return lambda: ({name: data},)


PARTS = ("turns/*.parquet", "steps/*.parquet")

READERS: Mapping[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("run", _run_seeds, _load, 15),
        Reader("run-bits", _run_seeds, _unharmed, 15, PARTS, _flip),
        Reader("run-manifest", _run_seeds, _load, 20, ("manifest.json",)),
        Reader("report", _run_seeds, _report, 1.5),
        Reader("report-manifest", _run_seeds, _report, 2, ("manifest.json",)),
        Reader("report-arms", _arms_seeds, _report_of_arms, 0.5),
        Reader("compare", _arms_seeds, _compare, 0.5, names=("cannot be compared",)),
        Reader("baseline-file", _pinned_seeds, _baseline, 6, ("base.json",),
               names=("cannot be compared",)),
        Reader("stored-config", _run_seeds, _resumed, 30, ("manifest.json",)),
        Reader("series", _arms_seeds, _series, 15, ("runs/sweep.json", "*/manifest.json")),
        Reader("lock", _one(".lock", seeds.LOCK), _lock, 10),
        Reader("remote-lock", _one("lock.json", seeds.REMOTE_LOCK), _remote_lock, 10),
        Reader("jsonl", _one("rows.jsonl", seeds.OWN_ROWS), _dataset("jsonl", "rows.jsonl"), 80),
        Reader("mini", _one("prompts.jsonl", seeds.ROWS), _dataset("mini", ""), 60),
        Reader("mtbench", _one("question.jsonl", seeds.ROWS), _dataset("mtbench", ""), 40),
        Reader("specbench", _one("question.jsonl", seeds.ROWS), _dataset("specbench", ""), 40),
        Reader("calibration", _one("calibration_prompts.jsonl", seeds.ROWS),
               _dataset("calibration", ""), 40),
        Reader("speed", _speed_seeds, _dataset("speed", ""), 40),
        Reader("split", _speed_seeds, _split, 20, ("*.parquet",)),
        Reader("data", _speed_seeds, _overview, 4),
        Reader("tokens", _tokens_seeds, _tokens, 40),
        Reader("history", _one("history.jsonl", seeds.HISTORY), _history, 60),
        Reader("tokenizer", _tokenizer_seeds, _tokenizer, 6),
        Reader("template", _one("chat_template.jinja", seeds.TEMPLATE.encode()), _template, 60),
        Reader("checkpoint", _checkpoint_seeds, _checkpoint, 8),
        Reader("known-answer", _known_seeds, _known, 40),
        Reader("runtime-params", _one("params.yaml", seeds.RUNTIME), _runtime, 60),
        Reader("sweep", _one("sweep.yaml", seeds.SWEEP), _sweep, 20),
        Reader("run-served", _served_seeds, _load, 15),
        Reader("report-served", _served_seeds, _report, 1.5),
        Reader("prometheus", _one("metrics.txt", seeds.METRICS), _prometheus, 60),
        Reader("stream", _one("response.txt", seeds.STREAM), _stream, 60, mutate=mutate_stream),
        Reader("aiperf", _aiperf_seeds, _aiperf, 2, ("*.json", "*.jsonl")),
    )
}  # fmt: skip
