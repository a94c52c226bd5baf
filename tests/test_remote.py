"""Places behind a URL: their names, what is written and read there, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from speedbench import remote, store
from speedbench.remote import MismatchError, Store, canonical, local_path, localized, write_bytes
from speedbench.types import UserError
from tests.builders import conversation, manifest, stored, write_part
from tests.faulty_store import FaultyStore

ROOT = Path(__file__).parent.parent
STORES = ("faulty://bucket/run", "oss://bucket/run")
"""One where a file is moved to its place, and one that is taken for an object store."""


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0, 0.0))
    FaultyStore.reset()
    yield
    FaultyStore.reset()
    memory = fsspec.filesystem("memory")
    memory.store.clear()


def put_tree(directory: Path, url: str) -> None:
    """Copy a directory behind a URL without the code under test."""
    fs, root = fsspec.url_to_fs(url)
    for path in directory.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            fs.pipe_file(f"{root}/{path.relative_to(directory).as_posix()}", path.read_bytes())


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("place", "is_url"),
    [
        ("s3://bucket/run", True),
        ("file:///tmp/x", True),
        ("runs/x", False),
        ("/tmp/s3:/x", False),
        ("C:/x", False),
    ],
)
def test_what_is_a_url(place: str, is_url: bool) -> None:
    assert remote.is_url(place) is is_url
    assert not remote.is_url(Path(place))


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("https://host/run", "neither listed nor written"),
        ("http://host/run", "neither listed nor written"),
        ("s3://", "names no place"),
        ("s3:///", "names no place"),
        ("file://runs/x", "no absolute path"),
        ("simplecache::s3://bucket/x", "no URL of one place"),
        ("s3://key:secret@bucket/x", "credentials"),
        ("abfs://c@account.net/x?sig=abc", "credentials"),
    ],
)
def test_urls_at_which_nothing_can_be_kept_are_refused(url: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        canonical(url)
    assert "secret" not in str(refused.value)
    assert "sig=" not in str(refused.value)


def test_a_container_of_an_account_is_no_credential() -> None:
    url = "abfs://container@account.dfs.core.windows.net/run"
    assert canonical(url + "/") == url


def test_a_missing_package_is_named_with_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"  # as if it were not installed
        "from speedbench.remote import Store\n"
        "from speedbench.types import UserError\n"
        "try:\n    Store('s3://bucket/run')\n"
        "except UserError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "pip install s3fs" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UserError, match="'s4', which fsspec does not know"):
        Store("s4://bucket/run")


def test_the_module_does_not_import_fsspec() -> None:
    code = "import sys, speedbench.mirror_process; print('fsspec' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_a_path_is_where_it_is_and_a_url_has_one_staged_copy(tmp_path: Path) -> None:
    assert local_path("runs/x") == Path("runs/x")
    assert localized("runs/x") == Path("runs/x")
    staged = local_path("s3://bucket/run")
    assert staged == local_path("s3://bucket/run/")
    assert staged.is_relative_to(tmp_path / "cache")
    assert staged != local_path("gs://bucket/run")
    assert staged != local_path("s3://bucket-run")


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("url", STORES)
def test_a_file_that_did_not_arrive_whole_does_not_count(url: str, tmp_path: Path) -> None:
    FaultyStore.spoil = staticmethod(lambda _path, data: data[:-1])
    source = tmp_path / "x"
    source.write_bytes(b"12345")
    with pytest.raises(MismatchError):
        Store(url).put(source, "turns/00000.parquet")
    if url.startswith("faulty"):  # it never had its final name
        assert FaultyStore.files() == {}
    # Of the same length, so that only reading it tells.
    FaultyStore.spoil = staticmethod(lambda _path, data: data[:-1] + b"x")
    with pytest.raises(MismatchError):
        Store(url).put(source, "turns/00000.parquet")
    FaultyStore.spoil = staticmethod(lambda _path, data: data)
    Store(url).put(source, "turns/00000.parquet")
    assert FaultyStore.files() == {"turns/00000.parquet": b"12345"}


def test_where_a_put_is_not_all_or_nothing_a_file_is_moved_to_its_place() -> None:
    Store("faulty://bucket/run").put(b"1", "manifest.json")
    written = [path for what, path in FaultyStore.calls if what == "put"]
    assert written
    assert all(path.rpartition("/")[2].startswith(".") for path in written)
    assert FaultyStore.files() == {"manifest.json": b"1"}


def test_a_checksum_of_the_store_saves_reading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "5d41402abc4b2a76b9719d911017c592"  # md5 of "hello"
    monkeypatch.setattr(
        FaultyStore,
        "info",
        lambda _self, _path, **_: {"type": "file", "size": 5, "ETag": f'"{told}"'},
    )
    monkeypatch.setattr(FaultyStore, "_open", lambda *_args, **_kwargs: pytest.fail("was read"))
    assert Store("oss://bucket/run").holds("x", b"hello")


def test_an_etag_that_is_no_md5_is_not_taken_for_a_difference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With encryption by a key of the user's, S3's ETag looks like an md5 and is none."""
    there = Store("oss://bucket/run")
    there.put(b"hello", "x")
    monkeypatch.setattr(
        FaultyStore, "info", lambda _self, _path, **_: {"type": "file", "size": 5, "ETag": "0" * 32}
    )
    assert there.holds("x", b"hello")
    assert not there.holds("x", b"jello")


def test_a_report_is_written_whole_at_a_path_or_a_url(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.html", b"old")
    write_bytes(str(tmp_path / "a.html"), b"report")
    assert (tmp_path / "a.html").read_bytes() == b"report"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "none" / "a.html", b"report")
    write_bytes("memory://bucket/a.html", b"report")
    assert fsspec.filesystem("memory").cat_file("/bucket/a.html") == b"report"
    write_bytes(f"file://{tmp_path}/deep/er/a.html", b"report")
    assert (tmp_path / "deep/er/a.html").read_bytes() == b"report"


def test_a_fault_that_passes_is_survived_and_one_that_stays_is_a_sentence() -> None:
    n_faults = iter(range(3))

    def now_and_then(what: str, _path: str) -> None:
        if what == "put" and next(n_faults, None) is not None:
            raise ConnectionResetError("by peer")

    FaultyStore.fault = staticmethod(now_and_then)
    write_bytes("faulty://bucket/run/a.html", b"report")
    assert FaultyStore.files() == {"a.html": b"report"}

    def never(what: str, _path: str) -> None:
        if what == "put":
            raise PermissionError("Access Denied\nRequestId: 1")

    FaultyStore.fault = staticmethod(never)
    FaultyStore.calls.clear()
    with pytest.raises(UserError, match="PermissionError: Access Denied") as refused:
        write_bytes("faulty://bucket/run/b.html", b"report")
    assert "\n" not in str(refused.value)
    assert len([what for what, _ in FaultyStore.calls if what == "put"]) == 1  # not tried again


# ---------------------------------------------------------------- reading


def some_run(directory: Path, n_parts: int = 3) -> None:
    run = [conversation(f"a{i}", "code", [1, 2, 2]) for i in range(n_parts)]
    stored(directory, run[:1], expected={"code": n_parts})
    for number, record in enumerate(run[1:], 1):
        write_part(directory, [record], number=0)
        assert (directory / f"turns/{number:05d}.parquet").is_file()


@pytest.mark.parametrize("url", ["memory://bucket/run", *STORES])
def test_a_run_behind_a_url_reads_as_the_same_run(url: str, tmp_path: Path) -> None:
    some_run(tmp_path / "run")
    put_tree(tmp_path / "run", url)
    path = localized(url)
    assert tree(path) == tree(tmp_path / "run")
    assert store.load(path).columns.conversation_ids == ("a0", "a1", "a2")
    assert localized(f"{url}/manifest.json") == path / "manifest.json"


def test_a_file_url_is_read_where_it_is(tmp_path: Path) -> None:
    some_run(tmp_path / "run")
    assert localized(f"file://{tmp_path}/run") == tmp_path / "run"


def test_only_what_changed_is_fetched_and_what_is_gone_goes(tmp_path: Path) -> None:
    url = STORES[0]
    some_run(tmp_path / "run")
    put_tree(tmp_path / "run", url)
    localized(url)
    FaultyStore.calls.clear()
    localized(url)
    assert [path for what, path in FaultyStore.calls if what == "get"] == []
    write_part(tmp_path / "run", [conversation("b", "code", [1, 1])])
    store.write_manifest(tmp_path / "run", manifest(expected={"code": 4}))
    (tmp_path / "run/turns/00001.parquet").unlink()
    (tmp_path / "run/steps/00001.parquet").unlink()
    for name in list(FaultyStore.store):
        if "00001" in name:
            del FaultyStore.store[name]
    for name in ("manifest.json", "turns/00003.parquet", "steps/00003.parquet"):
        fs = fsspec.filesystem("faulty")
        fs.pipe_file(f"/bucket/run/{name}", (tmp_path / "run" / name).read_bytes())
    FaultyStore.calls.clear()
    assert tree(localized(url)) == tree(tmp_path / "run")
    assert {path.rpartition("run/")[2] for what, path in FaultyStore.calls if what == "get"} == {
        "manifest.json",
        "turns/00003.parquet",
        "steps/00003.parquet",
    }


def test_what_is_read_while_a_run_goes_on_is_a_state_that_it_had(tmp_path: Path) -> None:
    """Before every listing and every read, one more part and a new manifest arrive: whatever is
    seen, no turns lack their steps, and no part lacks that a manifest promised."""
    url = STORES[1]
    source = tmp_path / "run"
    stored(source, [conversation("a0", "code", [1, 2])], expected={"code": 1})
    put_tree(source, url)
    fs = fsspec.filesystem("oss")
    n_parts = [1]
    is_busy = [False]

    def goes_on(what: str, _path: str) -> None:
        if is_busy[0] or what not in ("list", "get") or n_parts[0] >= 12:
            return
        is_busy[0] = True
        number = n_parts[0]
        write_part(source, [conversation(f"a{number}", "code", [1, 2])])
        store.write_manifest(source, manifest(expected={"code": number + 1}))
        for folder in ("steps", "turns"):
            name = f"{folder}/{number:05d}.parquet"
            fs.pipe_file(f"/bucket/run/{name}", (source / name).read_bytes())
        fs.pipe_file("/bucket/run/manifest.json", (source / "manifest.json").read_bytes())
        n_parts[0] += 1
        is_busy[0] = False

    FaultyStore.fault = staticmethod(goes_on)
    for _ in range(4):
        run = store.load(localized(url))
        assert run.damage == ()
        assert len(run.columns.conversation_ids) >= run.manifest["dataset"]["expected"]["code"]
        assert run.columns.n_tokens.sum() == 3 * len(run.columns.conversation_ids)
    assert n_parts[0] > 4  # it did go on


def test_a_folder_of_runs_is_read_and_nothing_else_of_its_bucket(tmp_path: Path) -> None:
    some_run(tmp_path / "all/cell-1")
    some_run(tmp_path / "all/cell-2", 1)
    (tmp_path / "all/sweep.json").write_text("{}")
    put_tree(tmp_path / "all", "faulty://bucket/all")
    (tmp_path / "all/weights").mkdir()
    (tmp_path / "all/weights/model.safetensors").write_bytes(b"huge")
    (tmp_path / "all/dataset.tar").write_bytes(b"huge")
    put_tree(tmp_path / "all", "faulty://bucket/all")
    read = tree(localized("faulty://bucket/all"))
    wanted = tree(tmp_path / "all")
    del wanted["weights/model.safetensors"], wanted["dataset.tar"]
    assert read == wanted


def test_a_url_without_a_run_is_refused() -> None:
    with pytest.raises(UserError, match="holds no run"):
        localized("memory://bucket/none")


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a//evil.json", ".hidden"])
def test_names_that_lead_out_of_the_folder_are_not_read(name: str, tmp_path: Path) -> None:
    some_run(tmp_path / "run", 1)
    put_tree(tmp_path / "run", "faulty://bucket/run")
    fs = fsspec.filesystem("faulty")
    fs.pipe_file(f"/bucket/run/{name}", b"x")
    assert set(tree(localized("faulty://bucket/run"))) == set(tree(tmp_path / "run"))
    assert not list(tmp_path.rglob("evil.json"))


def test_a_listing_that_fails_in_a_folder_is_no_empty_folder(tmp_path: Path) -> None:
    some_run(tmp_path / "run")
    put_tree(tmp_path / "run", "faulty://bucket/run")

    def no_turns(what: str, path: str) -> None:
        if what == "list" and path.endswith("/turns"):
            raise TimeoutError("no answer")

    FaultyStore.fault = staticmethod(no_turns)
    with pytest.raises(UserError, match="TimeoutError: no answer"):
        localized("faulty://bucket/run")
