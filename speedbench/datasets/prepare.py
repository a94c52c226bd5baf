"""Prepare: a benchmark from its publisher to a folder here: whole, checked, with its identity."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from speedbench.config import SPEED_CATEGORIES, SPEED_CONFIGS, SPEED_TIERS
from speedbench.datasets import DATA, MTBENCH, SENTINEL, SPEED, hub, identity, preparer
from speedbench.datasets.files import Record, jsonl_records, parquet_records
from speedbench.datasets.landing import disk_full, landing
from speedbench.datasets.rows import Schema, to_conversations
from speedbench.types import Conversation, UserError

REPOSITORY = "nvidia/SPEED-Bench"
REVISION = "fd51e1f5c17d9071cc2aaa1f21df2ef79641e588"
"""What is prepared unless another revision is named."""

GATED = ("cais/hle",)
"""Sources whose terms an account must accept. Each occurs in every configuration."""

COLUMNS: Mapping[str, str] = {
    "question_id": "string",
    "category": "string",
    "sub_category": "string",
    "turns": "list of strings",
    "source": "string",
    "src_id": "string",
    "difficulty": "string",
    "multiturn": "bool",
}

_SPEED_LICENCES: tuple[Mapping[str, str], ...] = (
    {"of": REPOSITORY, "name": "nvidia-evaluation-dataset-license", "page": hub.page(REPOSITORY)},
    *(
        {"of": source, "name": "its own: see its page", "page": hub.page(source)}
        for source in (
            "RUCAIBox/BAMBOO", "abisee/cnn_dailymail", "cais/hle",
            "livecodebench/code_generation_lite", "deepmind/code_contests",
            "mtbench101/mt-bench-101", "Helsinki-NLP/opus-100", "nvidia/ChatRAG-Bench",
            "TIGER-Lab/MMLU-Pro", "AdaLEval/stackselect", "AdaLEval/textsort",
            "ZenMoore/RoleBench", "Neph0s/CoSER",
        )
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GitFile:
    """A benchmark that is one file of a git repository; `sha256` is of that file at `commit`."""

    url: str
    commit: str
    path: str
    sha256: str
    n_rows: int
    schema: Schema
    licence: str


GIT_FILES: Mapping[str, GitFile] = {
    "specbench": GitFile(
        "https://github.com/hemingkx/Spec-Bench",
        "fd2c1cd7d2201ef71db4c5f4e455008f017967bf",
        "data/spec_bench/question.jsonl",
        "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
        480,
        SPEED,
        "Apache-2.0",
    ),
    "mtbench": GitFile(
        "https://github.com/lm-sys/FastChat",
        "0e6d3e4beaab66f4d3f93db72541a4abab8af28d",
        "fastchat/llm_judge/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
        80,
        MTBENCH,
        "Apache-2.0",
    ),
}


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be prepared. None: the pinned revision, the usual folder, the publisher's own."""

    dataset: str
    config: str = "all"
    revision: str | None = None
    out: Path | None = None
    git_url: str | None = None
    preparer_commit: str = preparer.COMMIT
    sha256: str | None = None

    @property
    def folder(self) -> Path:
        return self.out if self.out is not None else DATA / self.dataset


@dataclass(frozen=True, slots=True)
class Done:
    """A prepared folder. `was_there`: it was already what the order asks for, and is unchanged."""

    folder: Path
    identity: Mapping[str, Any]
    was_there: bool


class Watcher(Protocol):
    """Whoever shows what goes on. A detail comes with the share that is done, where it is known."""

    def stage(self, text: str) -> None: ...
    def detail(self, text: str, share: float | None) -> None: ...


Accept = Callable[[Sequence[Mapping[str, str]], bool], None]
"""Shows licences; the flag says whether they must be accepted. Raises UserError if they are not."""


def prepare(order: Order, watcher: Watcher, accept: Accept) -> list[Done]:
    """Carry out an order. Raises UserError, and then every folder is what it was before."""
    try:
        if order.dataset in GIT_FILES:
            return [_prepare_git_file(order, GIT_FILES[order.dataset], watcher, accept)]
        return _prepare_speed(order, watcher, accept)
    except OSError as error:
        raise (disk_full(error, str(order.folder)) or error) from None


def _prepare_speed(order: Order, watcher: Watcher, accept: Accept) -> list[Done]:
    configs = SPEED_CONFIGS if order.config == "all" else (order.config,)
    if order.sha256 is not None and len(configs) > 1:
        raise UserError("--sha256 is the hash of one configuration: name it with --config")
    _show_licences(order.folder, accept)
    asked = order.revision or REVISION
    commit = asked  # a commit needs no network where all is there already
    if not hub.is_commit(asked):
        watcher.stage(f"asking the hub what {asked} of {REPOSITORY} is")
        commit = hub.resolve(REPOSITORY, asked).commit
    done = {
        config: Done(order.folder / config, found, was_there=True)
        for config in configs
        if (found := _current(order.folder / config, order, commit)) is not None
    }
    if len(done) < len(configs):
        watcher.stage(f"asking the hub for {REPOSITORY} at {commit[:12]}")
        snapshot = hub.resolve(REPOSITORY, commit)
        watcher.stage(f"checking access to {', '.join(GATED)}")
        hub.check_access(GATED)
        tool = preparer.ready(order.git_url, order.preparer_commit, watcher.stage, watcher.detail)
        for config in configs:
            if config not in done:
                done[config] = _prepare_config(config, order, snapshot, tool, asked, watcher)
    return [done[config] for config in configs]


def _prepare_config(
    config: str,
    order: Order,
    snapshot: hub.Snapshot,
    tool: preparer.Preparer,
    asked: str,
    watcher: Watcher,
) -> Done:
    target = order.folder / config
    _refuse_foreign(target, "test.parquet")
    with landing(target) as folder:
        watcher.stage(f"{config}: downloading from the hub")
        names = hub.names_of(snapshot, config)
        files = hub.download(snapshot, names, watcher.detail)
        source = list(parquet_records(files.values()))
        _check_counts(config, [str(r.values.get("category")) for r in source], "the hub's file")
        watcher.stage(f"{config}: rebuilding texts from their sources (publisher's preparer)")
        work = folder / "work"
        written = tool.run(config, REPOSITORY, snapshot.commit, work, watcher.detail)
        watcher.stage(f"{config}: checking every row")
        file = folder / "test.parquet"
        written.rename(file)
        shutil.rmtree(work)
        rows = _checked_rows(config, file, source)
        found = {
            "source": {
                "repository": REPOSITORY,
                "revision": snapshot.commit,
                "asked": asked,
                "files": {name: identity.file_sha256(path) for name, path in files.items()},
            },
            "preparer": dict(tool.identity),
        }
        result = _sealed(order, config, rows, file, found, _SPEED_LICENCES)
    return Done(target, result, was_there=False)


def _prepare_git_file(order: Order, wanted: GitFile, watcher: Watcher, accept: Accept) -> Done:
    target, url = order.folder, order.git_url or wanted.url
    licences = ({"of": order.dataset, "name": wanted.licence, "page": wanted.url},)
    if not (target / identity.NAME).exists():
        accept(licences, False)
    asked = order.revision or wanted.commit
    watcher.stage(f"fetching {wanted.path} from {url.rpartition('@')[2]}")
    commit = preparer.commit_of(url, asked)
    if (found := _current(target, order, commit)) is not None:
        return Done(target, found, was_there=True)
    _refuse_foreign(target, "question.jsonl")
    fetched = preparer.checkout(url, commit, wanted.path) / wanted.path
    with landing(target) as folder:
        if not fetched.is_file():
            raise UserError(
                f"{wanted.url} at {commit[:12]} holds no {wanted.path}: name another --revision"
            )
        file = folder / "question.jsonl"
        shutil.copyfile(fetched, file)
        sha256 = identity.file_sha256(file)
        if commit == wanted.commit and sha256 != wanted.sha256:
            raise UserError(
                f"{wanted.path} at {commit[:12]} hashes to {sha256[:12]}, expected "
                f"{wanted.sha256[:12]}: remove {preparer.cache_dir()} and repeat the command"
            )
        watcher.stage("checking every row")
        rows = to_conversations(jsonl_records(file), wanted.schema)
        if len(rows) != wanted.n_rows:
            raise UserError(
                f"{wanted.path} at {commit[:12]} holds {len(rows)} rows, expected "
                f"{wanted.n_rows}: name another --revision"
            )
        source = {
            "repository": wanted.url,
            "revision": commit,
            "asked": asked,
            "files": {wanted.path: sha256},
        }
        result = _sealed(order, "", rows, file, {"source": source, "preparer": None}, licences)
    return Done(target, result, was_there=False)


def _sealed(
    order: Order,
    config: str,
    rows: Sequence[Conversation],
    file: Path,
    found: Mapping[str, Any],
    licences: Sequence[Mapping[str, str]],
) -> Mapping[str, Any]:
    """Write the identity file beside the data; refuse rows that are not those the user named."""
    result = {
        "format": identity.FORMAT,
        "dataset": order.dataset,
        "config": config,
        **found,
        **identity.of_rows(rows, file),
        "licences": [dict(licence) for licence in licences],
        "prepared_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if order.sha256 not in (None, result["sha256"]):
        raise UserError(
            f"the rows of {config or order.dataset} have sha256 {result['sha256'][:12]}, --sha256 "
            f"asks for {str(order.sha256)[:12]}: a source, the preparer or the revision differs "
            "from that of whoever gave you the hash"
        )
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (file.parent / identity.NAME).write_text(text, encoding="utf-8")
    return result


def _refuse_foreign(target: Path, file: str) -> None:
    """What is put in a folder's place must replace nothing but what was prepared."""
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if (target.exists() and not target.is_dir()) or (names and identity.NAME not in names):
        raise UserError(
            f"{target} exists and was not prepared here: move it away, or name another --out"
        )
    if extra := sorted(names - {file, identity.NAME}):
        raise UserError(
            f"{target} also holds {extra[0]}, which preparing it again would remove: move that "
            "away, or name another --out"
        )


def _current(target: Path, order: Order, commit: str) -> Mapping[str, Any] | None:
    """The identity of a folder that is what the order asks for already, down to its bytes."""
    try:
        found = identity.read(target)
    except UserError:
        return None  # damaged: prepared anew
    if found is None or found["source"]["revision"] != commit:
        return None
    tool = found["preparer"]
    if tool is not None and tool["commit"] != order.preparer_commit:
        return None
    if order.sha256 not in (None, found["sha256"]):
        return None
    file = target / found["file"]
    same = file.is_file() and identity.file_sha256(file) == found["file_sha256"]
    return found if same else None


def _show_licences(out: Path, accept: Accept) -> None:
    """Once per folder: what was accepted is stored in it."""
    path = out / "licences.json"
    licences = [dict(licence) for licence in _SPEED_LICENCES]
    if path.is_file():
        try:
            if json.loads(path.read_text(encoding="utf-8"))["accepted"] == licences:
                return
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # damaged: shown again
    accept(licences, True)
    out.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"accepted": licences, "utc": stamp}, indent=1), encoding="utf-8")
    partial.replace(path)


def _checked_rows(config: str, file: Path, source: Sequence[Record]) -> tuple[Conversation, ...]:
    """The prepared rows, if they are the hub's rows with every text in its place."""
    _check_columns(config, file)
    records = list(parquet_records([file]))
    _check_same(config, records, source)
    for record in records:
        turns = record.values["turns"]
        if isinstance(turns, list) and any(isinstance(t, str) and SENTINEL in t for t in turns):
            raise UserError(
                f"{record.place} of {config} ({record.values['question_id']}, from "
                f"{record.values['source']}) still holds a placeholder after the publisher's "
                "preparer ran: name a --revision and --preparer_commit that belong together"
            )
    try:
        rows = to_conversations(records, SPEED)
    except UserError as error:
        text = str(error).replace(f"{file}, ", "")
        raise UserError(f"the prepared {config} is not fit to be measured with: {text}") from None
    _check_counts(config, [row.category for row in rows], "the preparer's result")
    return rows


def _check_columns(config: str, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"the preparer's {config} cannot be read as parquet ({str(error).splitlines()[0]}): "
            "repeat the command"
        ) from None
    found = {name: _kind(schema.field(name).type) for name in schema.names}
    if found != COLUMNS:
        odd = sorted(n for n in {*found, *COLUMNS} if found.get(n) != COLUMNS.get(n))
        raise UserError(
            f"the preparer's {config} has '{odd[0]}' as {found.get(odd[0], 'no column')}, expected "
            f"{COLUMNS.get(odd[0], 'no such column')}: name another --revision"
        )


def _kind(kind: Any) -> str:
    import pyarrow.types as is_a

    if is_a.is_string(kind) or is_a.is_large_string(kind):
        return "string"
    if is_a.is_list(kind) or is_a.is_large_list(kind):
        return f"list of {_kind(kind.value_type)}s"
    return str(kind)


def _check_same(config: str, records: Sequence[Record], source: Sequence[Record]) -> None:
    """Row by row what the hub has: the same ids in the same order, and all that is not a text
    to be rebuilt. A preparer that read another revision is found out here."""
    ids = [[str(r.values.get("question_id")) for r in rows] for rows in (records, source)]
    if ids[0] != ids[1]:
        missing = [name for name in ids[1] if name not in set(ids[0])]
        detail = f"{missing[0]} is missing" if missing else "their ids or their order differ"
        raise UserError(
            f"the preparer's {config} has {len(ids[0])} rows and the hub's {len(ids[1])} "
            f"({detail}): nothing was kept, name a --revision and --preparer_commit that belong "
            "together"
        )
    for record, original in zip(records, source, strict=True):
        turns = original.values.get("turns")
        rebuilt = isinstance(turns, list) and SENTINEL in str(turns[:1])
        for name in COLUMNS:
            if name == "turns" and rebuilt:
                continue
            if record.values.get(name) != original.values.get(name):
                raise UserError(
                    f"{record.place} of the preparer's {config} differs from the hub's in "
                    f"'{name}': it read another revision of the data set; name a "
                    "--preparer_commit that reads this one"
                )


def _check_counts(config: str, categories: Iterable[str], what: str) -> None:
    expected = SPEED_CATEGORIES if config == "qualitative" else SPEED_TIERS
    found = Counter(categories)
    if found != expected:
        odd = next(n for n in (*expected, *found) if found.get(n, 0) != expected.get(n, 0))
        raise UserError(
            f"{what} of {config} has {found.get(odd, 0)} rows of the category '{odd}', expected "
            f"{expected.get(odd, 0)}: name another --revision"
        )
