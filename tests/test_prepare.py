"""`speedbench prepare` against a hub and a publisher's repository on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from speedbench import datasets
from speedbench.cli_data import prepare_command
from speedbench.config import RunConfig
from speedbench.datasets import hub as our_hub
from speedbench.datasets import identity, landing, prepare, preparer
from speedbench.datasets.prepare import Done, Order
from speedbench.types import UserError
from tests.hub import (
    CATEGORIES,
    EARLY,
    LATER,
    SENTINEL,
    Hub,
    commit_all,
    parquet,
    publisher,
    qualitative_rows,
    serving,
    speed_hub,
)

ROOT = Path(__file__).parent.parent
FILE = "qualitative/test-00000-of-00001.parquet"


@dataclass(frozen=True)
class Place:
    """A hub, a publisher's repository, and an empty folder to prepare in."""

    hub: Hub
    url: str
    commit: str
    out: Path

    def order(self, **fields: Any) -> Order:
        usual = {"config": "qualitative", "out": self.out, "git_url": self.url}
        return Order("speed", **{**usual, "preparer_commit": self.commit, **fields})

    def prepare(self, **fields: Any) -> list[Done]:
        return prepare.prepare(self.order(**fields), Watched(), lambda licences, must: None)

    def refused(self, **fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            self.prepare(**fields)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def left(self) -> list[str]:
        """Everything in the folder but locks and the record of the licences."""
        names = {path.relative_to(self.out).as_posix() for path in self.out.rglob("*")}
        return sorted(n for n in names if not n.endswith(".lock") and n != "licences.json")


class Watched:
    """Keeps the stages; `at` is called when one begins."""

    def __init__(self, at: Callable[[str], None] = lambda text: None) -> None:
        self.stages: list[str] = []
        self._at = at

    def stage(self, text: str) -> None:
        self.stages.append(text)
        self._at(text)

    def detail(self, text: str, share: float | None) -> None:
        pass


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The publisher's repository and a cache with its environment, which takes seconds to build."""
    folder = tmp_path_factory.mktemp("publisher")
    url, commit = publisher(folder)
    return {"url": url, "commit": commit, "cache": tmp_path_factory.mktemp("cache")}


@pytest.fixture
def place(
    shared: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    with serving(speed_hub()) as hub:
        monkeypatch.setenv("XDG_CACHE_HOME", str(shared["cache"]))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        # Read when the library is imported, which happened long ago.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield Place(hub, shared["url"], shared["commit"], tmp_path / "speed")


# What is prepared


def test_qualitative_whole_and_with_its_identity(place: Place) -> None:
    (done,) = place.prepare()
    assert done.folder == place.out / "qualitative"
    assert not done.was_there
    rows = pq.read_table(done.folder / "test.parquet").to_pylist()
    expected = qualitative_rows()
    for number, row in enumerate(expected):
        if row["turns"][0].startswith(SENTINEL):
            row["turns"] = [f"rebuilt text {number}"]
    assert rows == expected

    found = json.loads((done.folder / "identity.json").read_text())
    assert found["rows_per_category"] == dict.fromkeys(CATEGORIES, 80)
    assert (found["rows"], found["requests"]) == (880, 880 + 11 * 16)
    assert found["source"]["revision"] == EARLY
    content = place.hub.repositories["nvidia/SPEED-Bench"][EARLY][FILE]
    assert found["source"]["files"] == {FILE: hashlib.sha256(content).hexdigest()}
    assert found["preparer"]["commit"] == place.commit
    assert any("datasets" in package for package in found["preparer"]["packages"])
    file = (done.folder / "test.parquet").read_bytes()
    assert found["file_sha256"] == hashlib.sha256(file).hexdigest()
    line = (
        '{"category":"coding","id":"coding-1","sub_category":"easy","turns":["question coding-1 '
        '\\u00e9","and again, coding-1?"]}\n'
    )
    assert found["row_sha256"]["coding-1"] == hashlib.sha256(line.encode()).hexdigest()
    assert list(found["row_sha256"]) == [row["question_id"] for row in expected]
    assert found["licences"][0]["name"] == "nvidia-evaluation-dataset-license"
    assert place.left() == [
        "qualitative", "qualitative/identity.json", "qualitative/test.parquet"
    ]  # fmt: skip


def test_a_run_names_what_was_prepared(place: Place) -> None:
    (done,) = place.prepare()
    config = RunConfig(engine="NULL", dataset="speed", dataset_path=str(done.folder))
    dataset = datasets.load(config)
    assert dataset.sha256 == done.identity["sha256"]
    assert dataset.origin == {
        "dataset": "speed",
        "config": "qualitative",
        "repository": "nvidia/SPEED-Bench",
        "revision": EARLY,
        "preparer": place.commit,
    }
    path = done.folder / "test.parquet"
    assert datasets.load(config.model_copy(update={"dataset_path": str(path)})).origin is not None
    by_name = RunConfig(engine="NULL", dataset="speed_bench_rag", dataset_path=str(place.out))
    assert {row.category for row in datasets.select(datasets.load(by_name), by_name)} == {"rag"}

    rows = qualitative_rows()
    rows[5]["turns"] = ["another question"]
    path.write_bytes(parquet([row for row in rows if SENTINEL not in row["turns"][0]]))
    with pytest.raises(UserError, match="was changed since it was prepared"):
        datasets.load(config)


def test_throughput_and_all_that_is_asked_together(place: Place) -> None:
    (done,) = place.prepare(config="throughput_1k")
    tiers = dict.fromkeys(("low_entropy", "mixed", "high_entropy"), 512)
    assert done.identity["rows_per_category"] == tiers
    # The later buckets are not on this hub: what came before them stays, whole.
    message = place.refused(config="all")
    assert "holds no parquet file of the configuration throughput_2k" in message
    assert place.left() == [
        "qualitative", "qualitative/identity.json", "qualitative/test.parquet",
        "throughput_1k", "throughput_1k/identity.json", "throughput_1k/test.parquet",
    ]  # fmt: skip


def test_a_branch_becomes_the_commit_it_names(place: Place) -> None:
    (done,) = place.prepare(revision="main")
    assert done.identity["source"]["revision"] == LATER
    assert done.identity["source"]["asked"] == "main"
    rows = pq.read_table(done.folder / "test.parquet").to_pylist()
    assert rows[3]["src_id"] == "v1.1-3"
    (early,) = place.prepare()  # the pinned one takes its place
    assert early.identity["source"]["revision"] == EARLY
    assert early.identity["sha256"] == done.identity["sha256"]  # src_id is no part of a prompt


def test_repeating_changes_nothing_and_downloads_nothing(place: Place) -> None:
    (first,) = place.prepare()
    before = stat(first.folder)
    place.hub.requests.clear()
    (again,) = place.prepare()
    assert again.was_there
    assert again.identity == first.identity
    assert stat(first.folder) == before
    assert place.hub.requests == []
    (first.folder / "test.parquet").write_bytes(b"damaged")
    (mended,) = place.prepare()
    assert not mended.was_there
    assert mended.identity["file_sha256"] == first.identity["file_sha256"]


def stat(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_a_download_that_breaks_off_is_taken_up(place: Place) -> None:
    content = place.hub.repositories["nvidia/SPEED-Bench"][EARLY][FILE]
    digest = hashlib.sha256(content).hexdigest()
    place.hub.cut_once.add(digest)
    (done,) = place.prepare()
    assert done.identity["source"]["files"] == {FILE: digest}
    assert place.hub.cut_once == set()


def test_licences_are_shown_once(place: Place) -> None:
    shown: list[Sequence[Mapping[str, str]]] = []
    for _ in range(2):
        prepare.prepare(place.order(), Watched(), lambda licences, must: shown.append(licences))
    assert len(shown) == 1
    assert shown[0][0]["name"] == "nvidia-evaluation-dataset-license"
    assert "cais/hle" in {licence["of"] for licence in shown[0]}
    stored = json.loads((place.out / "licences.json").read_text())
    assert stored["accepted"] == shown[0]


# Faults: one sentence, and nothing changed


def put_other_revision(place: Place, shared: Mapping[str, Any]) -> Path:
    """What `main` names, prepared once and copied for every test."""
    kept = shared["cache"] / "other_revision"
    if not kept.exists():
        place.prepare(revision="main")
        shutil.copytree(place.out, kept)
    else:
        shutil.copytree(kept, place.out)
    return place.out / "qualitative"


@pytest.fixture
def prepared(place: Place, shared: Mapping[str, Any]) -> Iterator[Place]:
    """With another revision in place, which every failure must leave as it is."""
    folder = put_other_revision(place, shared)
    before = stat(folder)
    yield place
    assert stat(folder) == before
    assert [n for n in place.left() if n.startswith((".", "throughput"))] == []


def test_gated_source_before_any_download(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    prepared.hub.requests.clear()
    message = prepared.refused()
    assert "cais/hle is gated: open https://huggingface.co/datasets/cais/hle" in message
    assert "HF_TOKEN" in message
    assert prepared.hub.paths("/resolve/") == prepared.hub.paths("/cdn/") == []


def test_wrong_hash(prepared: Place) -> None:
    content = prepared.hub.repositories["nvidia/SPEED-Bench"][EARLY][FILE]
    digest = hashlib.sha256(content).hexdigest()
    prepared.hub.wrong[digest] = content[:-1] + b"?"
    message = prepared.refused()
    wrong = hashlib.sha256(prepared.hub.wrong[digest]).hexdigest()
    assert (
        f"{FILE} of nvidia/SPEED-Bench hashes to {wrong[:12]} and not to {digest[:12]}" in message
    )
    assert "remove " in message


def test_a_missing_row_on_the_hub(prepared: Place) -> None:
    files = prepared.hub.repositories["nvidia/SPEED-Bench"][EARLY]
    files[FILE] = parquet(qualitative_rows()[:-1])
    message = prepared.refused()
    assert (
        "the hub's file of qualitative has 79 rows of the category 'writing', expected 80"
        in message
    )


def test_an_id_that_the_hub_has_twice(prepared: Place) -> None:
    rows = qualitative_rows()
    rows[7]["question_id"] = "coding-6"
    prepared.hub.repositories["nvidia/SPEED-Bench"][EARLY][FILE] = parquet(rows)
    assert "not fit to be measured with: row 8 repeats the id 'coding-6'" in prepared.refused()


def test_a_revision_that_is_gone(prepared: Place) -> None:
    del prepared.hub.repositories["nvidia/SPEED-Bench"][EARLY]
    message = prepared.refused()
    assert f"nvidia/SPEED-Bench has no revision {EARLY} (any more)" in message
    assert "--revision" in message


def test_no_such_dataset(prepared: Place) -> None:
    prepared.hub.repositories.pop("nvidia/SPEED-Bench")
    assert "shows no dataset nvidia/SPEED-Bench" in prepared.refused()


def test_no_network(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    message = prepared.refused()
    assert f"the hub did not deliver nvidia/SPEED-Bench at {EARLY}" in message
    assert "check the network" in message


def test_offline_uses_the_cache_or_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = place.refused()
    assert f"nvidia/SPEED-Bench at {EARLY} is not in the hub's cache" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (online,) = place.prepare()
    shutil.rmtree(place.out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place.hub.requests.clear()
    (offline,) = place.prepare()
    assert offline.identity["sha256"] == online.identity["sha256"]
    assert offline.identity["source"] == online.identity["source"]
    # The stand-in preparer knows no cache and asks once more; nothing else does.
    assert len(place.hub.paths("/resolve/")) == 1
    assert place.hub.paths("/api/") == []


def test_a_preparer_that_aborts_after_its_work_did_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "import atexit; atexit.register(os.abort)")
    (done,) = place.prepare()
    assert done.identity["rows"] == 880


FAULTS: dict[str, tuple[str, Sequence[str]]] = {
    "fails": (
        # Not SystemExit: pyarrow's threads may abort an interpreter that ends this early.
        "print('ValueError: the source has moved', flush=True); os._exit(1)",
        ["failed with exit code 1", "ValueError: the source has moved", "qualitative.log"],
    ),
    "leaves a placeholder": (
        "rows[10]['turns'] = [f'x FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING "
        "SPECDEC_BENCH']",
        ["row 11 of qualitative (coding-10, from https://huggingface.co/datasets/cais/hle)",
         "placeholder"],
    ),
    "loses a row": ("del rows[7]", ["has 879 rows and the hub's 880 (coding-7 is missing)"]),
    "another order": ("rows.reverse()", ["their ids or their order differ"]),
    "repeats an id": (
        "rows[7]['question_id'] = 'coding-6'",
        ["has 880 rows and the hub's 880 (coding-7 is missing)"],
    ),
    "an empty turn": ("rows[10]['turns'] = ['']", ["row 11, turn 1 is blank"]),
    "no turns": ("rows[10]['turns'] = []", ["row 11 has no turns"]),
    "a changed text": (
        "rows[3]['turns'] = ['other']", ["row 4", "differs from the hub's in 'turns'"]
    ),
    "another revision": (
        "rows[3]['src_id'] = 'v1.1-3'", ["differs from the hub's in 'src_id'", "another revision"]
    ),
    "another column": (
        "rows = [{**r, 'difficulty': 1} for r in rows]; table = pa.Table.from_pylist(rows)",
        ["'difficulty' as int64, expected string"],
    ),
    "writes nothing": ("os._exit(0)", ["ended well but wrote 0 parquet files"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_preparer_that(fault: str, prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    code, words = FAULTS[fault]
    monkeypatch.setenv("STAND_IN_FAULT", code)
    message = prepared.refused()
    for word in words:
        assert word in message


def test_the_preparer_reads_the_revision_that_was_asked_for(place: Place) -> None:
    """It names none itself, and the branch has moved."""
    (done,) = place.prepare()
    assert place.hub.branches["nvidia/SPEED-Bench"] == LATER
    assert done.identity["source"]["revision"] == EARLY
    assert not [r for r in place.hub.paths("/resolve/") if EARLY not in r]


def test_the_python_is_the_one_that_ran(place: Place, shared: Mapping[str, Any]) -> None:
    place.prepare()
    (settings,) = shared["cache"].rglob("pyvenv.cfg")
    text = settings.read_text()
    settings.write_text(
        "".join(
            "version = 3.9.99\n"
            if line.startswith("version") and "info" not in line
            else line + "\n"
            for line in text.splitlines()
        )
    )
    try:
        (done,) = place.prepare(out=place.out / "again")
    finally:
        settings.write_text(text)
    assert done.identity["preparer"]["python"] == "3.9.99"


def test_another_hash_than_the_named_one(prepared: Place) -> None:
    sha256 = json.loads((prepared.out / "qualitative/identity.json").read_text())["sha256"]
    message = prepared.refused(sha256="0" * 64)
    assert f"have sha256 {sha256[:12]}, --sha256 asks for 000000000000" in message
    assert "--config" in prepared.refused(sha256=sha256, config="all")


def test_a_repository_without_a_preparer(prepared: Place, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README").write_text("nothing here\n")
    url, commit = commit_all(tmp_path / "other")
    message = prepared.refused(git_url=url, preparer_commit=commit)
    assert "holds no examples/specdec_bench/prepare_data.py" in message
    gone = prepared.refused(git_url=url, preparer_commit="3" * 40)
    assert f"git could not fetch {'3' * 12} from {url}" in gone
    away = prepared.refused(git_url="file:///no/such", preparer_commit="4" * 40)
    assert "git could not fetch" in away
    assert "40 hex digits" in prepared.refused(preparer_commit="main")


def test_an_environment_that_cannot_be_built(
    prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tmp_path / "other" / "examples" / "specdec_bench"
    part.mkdir(parents=True)
    (part / "prepare_data.py").write_text("")
    (part / "requirements.txt").write_text("")
    url, commit = commit_all(tmp_path / "other")
    (tmp_path / "python").write_text("#!/bin/sh\necho no ensurepip here >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    message = prepared.refused(git_url=url, preparer_commit=commit)
    assert "the preparer's environment could not be built (no ensurepip here)" in message
    assert f"{commit}-venv.log" in message


def test_a_folder_that_was_not_prepared_is_not_touched(place: Place) -> None:
    own = place.out / "qualitative"
    own.mkdir(parents=True)
    (own / "test.parquet").write_bytes(b"my own")
    assert f"{own} exists and was not prepared here: move it away" in place.refused()
    assert (own / "test.parquet").read_bytes() == b"my own"
    shutil.rmtree(own)
    place.prepare()
    (own / "notes.txt").write_text("mine")
    assert "also holds notes.txt" in place.refused(revision="main")
    assert (own / "notes.txt").read_text() == "mine"


def test_two_at_once(prepared: Place) -> None:
    with landing.locked(prepared.out / ".qualitative.lock", "held"):
        message = prepared.refused()
    assert "is being prepared by another process: wait for it to end" in message


STEPS: dict[str, tuple[Any, str]] = {
    "resolve": (our_hub, "resolve"),
    "access": (our_hub, "check_access"),
    "environment": (preparer, "ready"),
    "download": (our_hub, "download"),
    "preparer": (preparer.Preparer, "run"),
    "check": (prepare, "_checked_rows"),
    "identity": (prepare, "_sealed"),
    "sync": (landing, "_sync"),
    "swap": (landing, "_exchange"),
}
BREAKS: dict[str, BaseException] = {
    "full disk": OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded", "/somewhere/file"),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize(
    ("kind", "step", "after"),
    [
        *(("full disk", step, False) for step in STEPS),
        *(("Ctrl-C", step, True) for step in STEPS if step != "swap"),  # then it is in place
        ("quota", "identity", False),
        ("Ctrl-C", "swap", False),
    ],
)
def test_broken_off_at(
    kind: str, step: str, after: bool, prepared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step fails, before it does anything or when it is done: the old data stay."""
    module, name = STEPS[step]
    original = getattr(module, name)

    def broken(*arguments: Any) -> Any:
        if after:
            original(*arguments)
        raise BREAKS[kind]

    monkeypatch.setattr(module, name, broken)
    if kind == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            prepared.prepare()
    else:
        message = prepared.refused()
        assert "the disk is full (/somewhere/file): free some space" in message
        assert "nothing was changed" in message


def test_a_disk_that_is_full_for_the_hub(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **fields: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/hf/blob")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert "the disk is full (/hf/blob)" in prepared.refused()


def test_a_file_system_that_cannot_exchange_folders(
    place: Place, shared: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_other_revision(place, shared)
    before = stat(folder)
    monkeypatch.setattr(landing, "_exchange", lambda one, other: False)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and target.name == "qualitative":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", broken)
        with pytest.raises(OSError, match="Input/output"):
            place.prepare()
    assert stat(folder) == before
    (done,) = place.prepare()
    assert identity.read(folder) == done.identity
    assert done.identity["source"]["revision"] == EARLY
    assert [n for n in place.left() if n.startswith(".")] == []


def test_a_link_to_another_disk_stays(tmp_path: Path) -> None:
    there, link = tmp_path / "disk" / "q", tmp_path / "q"
    link.symlink_to(there)
    for text in ("old", "new"):
        with landing.landing(link) as folder:
            (folder / "rows").write_text(text)
        assert (there / "rows").read_text() == text
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".q.lock", "disk", "q", "q", "rows"]


def test_killed_between_the_two_renames(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (done,) = place.prepare(revision="main")
    done.folder.rename(place.out / ".qualitative.previous")  # what a kill would leave
    (place.out / ".qualitative.partial-x").mkdir()
    monkeypatch.setenv("STAND_IN_FAULT", "raise SystemExit(1)")
    place.refused()
    assert identity.read(done.folder) == done.identity
    assert [n for n in place.left() if n.startswith(".")] == []


def test_a_failed_first_time_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "raise SystemExit(1)")
    place.refused()
    assert place.left() == []


# The command, in a process of its own


def command(place: Place, *more: str) -> list[str]:
    code = "import sys; from speedbench.cli_data import prepare_command as p; "
    code += "sys.exit(p(sys.argv[1:], 'speedbench prepare'))"
    return [
        sys.executable, "-c", code, "--dataset", "speed", "--config", "qualitative",
        "--out", str(place.out), "--git_url", place.url, "--preparer_commit", place.commit, *more,
    ]  # fmt: skip


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT)}  # fmt: skip


def test_the_command_honours_endpoint_home_and_token(place: Place, tmp_path: Path) -> None:
    run = subprocess.run(
        command(place, "--accept-license"),
        env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    sha256 = json.loads((place.out / "qualitative" / "identity.json").read_text())["sha256"]
    assert run.stdout.startswith(f"{place.out}/qualitative: prepared; 880 rows, 1056 requests")
    assert sha256 in run.stdout
    assert "nvidia-evaluation-dataset-license" in run.stderr
    assert list((tmp_path / "home" / "hub").glob("datasets--nvidia--SPEED-Bench/snapshots/*"))
    assert run.stderr.count("speedbench: ") >= 6  # a line per stage, no bar
    assert "\r" not in run.stderr


SIGNALS = [
    ("downloading", signal.SIGKILL),
    ("rebuilding", signal.SIGKILL),
    ("rebuilding", signal.SIGTERM),
    ("rebuilding", signal.SIGINT),
    ("checking every row", signal.SIGKILL),
]


@pytest.mark.parametrize(("stage", "number"), SIGNALS)
def test_a_signal_at(
    stage: str, number: signal.Signals, place: Place, shared: Mapping[str, Any], tmp_path: Path
) -> None:
    """A process that is ended leaves the old data, whole; the next one cleans up behind it.

    Where it came to its end before the signal did, it leaves the new data, whole.
    """
    folder = put_other_revision(place, shared)
    before = stat(folder)
    process = subprocess.Popen(
        command(place, "--accept_license"),
        env={**environment(tmp_path), "STAND_IN_FAULT": "import time; time.sleep(0.3)"},
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if stage in line:
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    if stage == "checking every row" and stat(folder) != before:
        found = json.loads((folder / "identity.json").read_text())
        assert found["source"]["revision"] == EARLY
        content = (folder / "test.parquet").read_bytes()
        assert found["file_sha256"] == hashlib.sha256(content).hexdigest()
    else:
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert stat(folder) == before
    (new,) = place.prepare()
    assert new.identity["source"]["revision"] == EARLY
    assert [n for n in place.left() if n.startswith(".")] == []


def test_refusals_of_the_command(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "--config is missing: name one of qualitative"),
        (["--dataset", "mtbench", "--config", "all"], "mtbench has no configurations"),
        (["--config", "agentic"], "agentic"),
        (["--config", "qualitative", "--sha256", "ABC"], "--sha256 is 'ABC': expected 64 hex"),
        (["--dataset", "mtbench", "--preparer_commit", "e" * 40], "mtbench has no preparer"),
        (["--config", "all", "--out", str(place.out)], "add --accept_license"),
    ):
        with pytest.raises(UserError, match=words):
            prepare_command(arguments, "speedbench prepare")
    assert "nvidia-evaluation-dataset-license" in capsys.readouterr().err
    assert not place.out.exists()
    assert place.hub.requests == []


# Benchmarks of one file


@pytest.fixture
def mtbench(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in FastChat's layout, pinned at its only commit."""
    folder = tmp_path / "fastchat"
    file = folder / prepare.GIT_FILES["mtbench"].path
    file.parent.mkdir(parents=True)
    rows = [{"question_id": n, "category": f"c{n % 8}", "turns": ["a", "b"]} for n in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    url, commit = commit_all(folder)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    pinned = replace(prepare.GIT_FILES["mtbench"], url=url, commit=commit, sha256=sha256)
    monkeypatch.setattr(prepare, "GIT_FILES", {"mtbench": pinned})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own_cache"))
    return folder


def fetch(out: Path, **fields: Any) -> Done:
    order = Order("mtbench", out=out, **fields)
    (done,) = prepare.prepare(order, Watched(), lambda licences, must: None)
    return done


def test_a_benchmark_of_one_file(
    mtbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = fetch(tmp_path / "data" / "mtbench")
    assert done.identity["rows_per_category"] == {f"c{n}": 10 for n in range(8)}
    assert done.identity["requests"] == 160
    assert done.identity["preparer"] is None
    monkeypatch.setattr(datasets, "DATA", tmp_path / "data")
    dataset = datasets.load(RunConfig(engine="NULL", dataset="mtbench"))
    assert Counter(row.category for row in dataset.rows) == done.identity["rows_per_category"]
    assert dataset.origin is not None
    assert dataset.origin["revision"] == done.identity["source"]["revision"]
    assert fetch(tmp_path / "data" / "mtbench").was_there


def test_a_moved_file_of_one_benchmark(
    mtbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = prepare.GIT_FILES["mtbench"]
    wrong = {"mtbench": replace(pinned, sha256="0" * 64)}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "GIT_FILES", wrong)
        with pytest.raises(UserError, match=r"hashes to .* expected 000000000000"):
            fetch(tmp_path / "out")
    file = mtbench / pinned.path
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    commit_all(mtbench)
    with pytest.raises(UserError, match="holds 79 rows, expected 80"):
        fetch(tmp_path / "out", revision="main")
    with pytest.raises(UserError, match="has no revision v9"):
        fetch(tmp_path / "out", revision="v9")
    assert not (tmp_path / "out").exists()


def test_a_revision_is_a_whole_name_and_a_tag_is_the_commit_it_is_of(mtbench: Path) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        run = ["git", "-C", str(mtbench), *who, *arguments]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    first = git("rev-parse", "HEAD")
    git("branch", "early/main")  # listed before main
    git("tag", "-a", "-m", "signed off", "v1")
    git("commit", "-q", "--allow-empty", "-m", "y")
    url = mtbench.as_uri()
    assert preparer.commit_of(url, "main") == git("rev-parse", "HEAD") != first
    assert preparer.commit_of(url, "v1") == first


def test_what_git_says_is_told_and_not_its_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not appear to be a git repository"):
        preparer.commit_of(str(tmp_path / "none"), "main")


# AIPerf's names


@pytest.mark.parametrize(
    ("name", "config", "category"),
    [
        ("speed_bench_coding", "qualitative", ("coding",)),
        ("speed_bench_qualitative", "qualitative", ()),
        ("speed_bench_throughput_32k", "throughput_32k", ()),
        ("speed_bench_throughput_1k_low_entropy", "throughput_1k", ("low_entropy",)),
        ("speed_bench_throughput_16k_mixed", "throughput_16k", ("mixed",)),
    ],
)
def test_names_that_aiperf_users_know(name: str, config: str, category: tuple[str, ...]) -> None:
    found = RunConfig(engine="NULL", dataset=name)
    assert (found.dataset, found.speed_config, found.category) == ("speed", config, category)
    assert RunConfig.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(UserError, match=f"data/speed/{config} does not exist: run `speedbench"):
        datasets.load(found)
