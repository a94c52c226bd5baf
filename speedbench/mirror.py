"""A mirror: what a run writes into a directory is also put behind a URL, while it is written.

Behind the URL is at every moment a state that the directory could have had: what lies beside the
runs of a folder comes before them, a manifest that begins a session before its parts, experts
before steps before turns, and a manifest that tells how a session ended after all parts.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from speedbench import remote, remote_lock
from speedbench.remote import Store, canonical, patiently, told, unusable
from speedbench.remote_lock import TakenOverError
from speedbench.types import UserError

ORDER = ("experts", "steps", "turns")
"""Folders of a run's parts, in the order in which the parts are written."""

MANIFEST = "manifest.json"

Signature = tuple[int, int, int]


# ---------------------------------------------------------------- what is in the directory


@dataclass(frozen=True, slots=True)
class _Found:
    """A file with its final name. `text` is what a .json file held when it was met."""

    name: str
    path: Path
    signature: Signature
    text: bytes | None = None

    @property
    def source(self) -> Path | bytes:
        return self.path if self.text is None else self.text


def _files(
    directory: Path, known: Mapping[str, Signature] | None = None, prefix: str = ""
) -> Iterator[_Found]:
    """All files, met against the order in which they are written: what a file speaks of is there
    when it is met, and so is found later. Names that begin with a dot are not final. The text of
    one that is `known` is not read."""
    try:
        entries = sorted(
            os.scandir(directory), key=lambda e: (e.is_dir(), e.name != "turns", e.name)
        )
    except FileNotFoundError:
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), known, f"{name}/")
            continue
        with suppress(FileNotFoundError):
            status = entry.stat()
            signature = (status.st_size, status.st_mtime_ns, status.st_ino)
            is_read = name.endswith(".json") and (known or {}).get(name) != signature
            text = Path(entry.path).read_bytes() if is_read else None
            yield _Found(name, Path(entry.path), signature, text)


def _runs(names: Sequence[str]) -> list[str]:
    """The folders that hold a run, the deepest first."""
    found = {_parent(name) for name in names if name.rpartition("/")[2] == MANIFEST}
    return sorted(found, key=lambda run: (-run.count("/") - bool(run), run))


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _in_run(name: str, runs: Sequence[str]) -> str | None:
    """The run that a file is of; None if it lies beside the runs."""
    return next((run for run in runs if not run or name.startswith(f"{run}/")), None)


def _folder(name: str) -> str:
    """'turns' of a/turns/00000.parquet."""
    return _parent(name).rpartition("/")[2]


def _rank(name: str) -> int:
    if name.rpartition("/")[2] == MANIFEST:
        return len(ORDER)
    return ORDER.index(_folder(name)) if _folder(name) in ORDER else 0


def _session_keys(text: bytes | None) -> list[tuple[str, ...]]:
    """What tells one session of a manifest from every other session of any run."""
    try:
        sessions = json.loads(text or b"{}").get("sessions", [])
        # Not its started_ns, which is another one once the session has ended.
        names = ("session", "replica", "started_at", "hostname", "clock")
        return [tuple(str(session.get(name)) for name in names) for session in sessions]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []


# ---------------------------------------------------------------- before a run


@dataclass(slots=True)  # mutable: filled run by run
class _Common:
    """What is the same in the directory and behind the URL, once they were brought together."""

    known: dict[str, Signature]
    ours: set[str]
    fetches: bool = True
    n_fetched: int = 0
    n_fetched_bytes: int = 0


def probe(store: Store) -> None:
    """Write, replace, read back and remove a small object. Raises UserError if one cannot."""
    name = f".probe-{uuid.uuid4().hex[:8]}"
    try:
        patiently(store.listing)
        for data in (b"1", b"2"):
            patiently(lambda data=data: store.put(data, name))  # type: ignore[misc]
        if patiently(lambda: store.read(name)) != b"2":
            raise remote.MismatchError("what was written is not what is read")
        store.remove(name)
    except Exception as error:  # noqa: BLE001 - each package has its own
        raise unusable(store.url, "written", error) from None


Intent = Literal["new", "resume", "upload"]
"""What a mirror is for: a run that must meet nothing, one to be continued (what only the URL has is
fetched), or a directory as it is."""


def reconcile(store: Store, directory: Path, intent: Intent) -> _Common:
    """Bring the directory to where the URL is, if that was continued elsewhere. Raises UserError if
    a new run would meet something, or if both hold what the other does not."""
    there = patiently(store.listing)
    here = {found.name: found for found in _files(directory)}
    if intent == "new":
        _refuse_existing(store, directory, there, here)
        return _Common({}, set())
    common = _Common({}, set(), fetches=intent == "resume")
    runs = _runs([*there, *here] if common.fetches else list(here))
    ahead = [run for run in runs if _settle(store, directory, run, runs, there, here, common)]
    for name in there:
        if _in_run(name, runs) is None and (name not in here or ahead):
            _fetch(store, directory, name, there, common)
    for found in _files(directory):
        info = there.get(found.name)
        if info is not None and (
            found.name in common.known or store.holds(found.name, found.path, info)
        ):
            common.known[found.name] = found.signature
    common.ours.update(name for name in there if _folder(name) == "turns")
    return common


def _refuse_existing(
    store: Store, directory: Path, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    if there:
        what = "a run" if any(name.endswith(MANIFEST) for name in there) else "something"
        raise UserError(
            f"{store.url} already holds {what}: choose another --save_dir, or continue that run "
            "with --resume"
        )
    if here:
        raise UserError(
            f"{directory} still holds the staged copy of an earlier run to {store.url}: continue "
            "that with --resume, or move it away"
        )


def _settle(
    store: Store,
    directory: Path,
    run: str,
    runs: Sequence[str],
    there: Mapping[str, Any],
    here: Mapping[str, _Found],
    common: _Common,
) -> bool:
    """Fetch what the directory lacks of a run; whether the URL was ahead."""
    manifest = f"{run}/{MANIFEST}".lstrip("/")
    theirs_text = patiently(lambda: store.read(manifest)) if manifest in there else None
    theirs = _session_keys(theirs_text)
    mine = _session_keys(here[manifest].text) if manifest in here else []
    of_run = [name for name in there if _in_run(name, runs) == run]
    only_here = [
        name
        for name in here
        if _in_run(name, runs) == run
        and _folder(name) == "turns"
        and not (name in there and store.holds(name, here[name].path, there[name]))
    ]
    is_ahead = theirs[: len(mine)] == mine and (len(theirs) > len(mine) or manifest not in here)
    if is_ahead and not only_here and not common.fetches:
        raise UserError(
            f"{store.url} was continued elsewhere and holds more of this run than {directory}: "
            "there is nothing to upload"
        )
    if is_ahead and not only_here:
        for name in sorted(of_run, key=lambda name: (_rank(name), name)):
            if name not in here or not store.holds(name, here[name].path, there[name]):
                _fetch(store, directory, name, there, common)
        return True
    if is_ahead or mine[: len(theirs)] != theirs:
        session = json.loads(theirs_text or b"{}").get("sessions", [{}])[-1]
        raise UserError(
            f"{store.url} and its staged copy {directory} went different ways: {len(only_here)} "
            f"part(s) are only in the copy, and another run on {session.get('hostname')} began at "
            f"the URL at {session.get('started_at')}; move {directory} away to go on from the URL "
            "(what is only in the copy is then measured again)"
        )
    for name in sorted(of_run, key=lambda name: (_rank(name), name)):
        if name not in here:
            _fetch(store, directory, name, there, common)
    return False


def _fetch(
    store: Store, directory: Path, name: str, there: Mapping[str, Any], common: _Common
) -> None:
    if not common.fetches:
        return
    patiently(lambda: store.fetch(name, directory / name))
    common.known[name] = (0, 0, 0)  # it was held against the URL's: `reconcile` puts its signature
    common.n_fetched += 1
    common.n_fetched_bytes += int(there[name]["size"])


# ---------------------------------------------------------------- while a run is written


@dataclass(frozen=True, slots=True)
class Uploaded:
    """How a mirror ended. `missing`: what the URL lacks, because of `why`; of `n_files` in all."""

    missing: tuple[str, ...]
    why: str
    n_files: int
    n_bytes: int


class Mirror:
    """Uploads what is new in a directory, round by round."""

    def __init__(
        self,
        directory: Path,
        store: Store,
        common: _Common | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises once nothing may be uploaded any more."""
        self._directory = directory
        self._store = store
        self._known: dict[str, Signature] = dict(common.known) if common else {}
        self._ours: set[str] = set(common.ours) if common else set()
        self._announced: set[tuple[str, ...]] = set()
        self._check = check

    def round(self) -> int:
        """Upload what is new; how many files that were. Raises the first fault, after everything
        that can go without what failed was uploaded."""
        files = list(_files(self._directory, self._known))
        runs = _runs([found.name for found in files])
        groups: dict[str | None, list[_Found]] = {}
        for found in files:
            if self._known.get(found.name) != found.signature:
                groups.setdefault(_in_run(found.name, runs), []).append(found)
        faults: list[Exception] = []
        for run in sorted(groups, key=lambda run: (run is not None, run)):
            try:
                self._upload_group(run, groups[run])
            except TakenOverError:
                raise
            except Exception as error:  # noqa: BLE001 - raised below
                faults.append(error)
        if faults:
            raise faults[0]
        return sum(map(len, groups.values()))

    def _upload_group(self, run: str | None, group: Sequence[_Found]) -> None:
        """The files of a run, or (None) those beside the runs."""
        manifest = None if run is None else f"{run}/{MANIFEST}".lstrip("/")
        # Read after all parts were met: it knows the sessions that they are of.
        now = None if manifest is None else (self._directory / manifest).read_bytes()
        if manifest is not None and now is not None:
            self._announce(manifest, now)
        for found in sorted(group, key=lambda found: (_rank(found.name), found.name)):
            if found.name == manifest and found.text != now:
                continue  # the run went on meanwhile: the next round has all that this one promises
            if _folder(found.name) in ORDER:
                self._refuse_foreign(found)
            self._upload(found)

    def _announce(self, manifest: str, text: bytes) -> None:
        """A session that the URL does not know yet goes there before its parts, as running."""
        keys = set(_session_keys(text))
        if keys <= self._announced:
            return
        content = {**json.loads(text), "status": "running"}
        self._check()
        self._store.put(json.dumps(content, indent=1, ensure_ascii=False).encode(), manifest)
        self._announced |= keys

    def _refuse_foreign(self, found: _Found) -> None:
        """A part of another run under the same name is never replaced."""
        run, part = _parent(_parent(found.name)), found.name.rpartition("/")[2]
        turns = f"{run}/turns/{part}".lstrip("/")
        if turns in self._ours:
            return
        local = self._directory / turns
        if self._store.has(turns) and not (local.is_file() and self._store.holds(turns, local)):
            raise TakenOverError(
                f"{self._store.url} holds another {turns} than was measured here, from a process "
                "that wrote there meanwhile"
            )
        self._ours.add(turns)

    def _upload(self, found: _Found) -> None:
        self._check()
        self._store.put(found.source, found.name)
        self._known[found.name] = found.signature

    def finish(self) -> Uploaded:
        """Upload all that is left, and hold the whole URL against the directory once more."""
        why = ""
        for pause_s in (*remote.PAUSES_S, None):
            try:
                self.round()
                missing = self._missing(self._store.listing())
                if not missing:
                    return self._ended((), "")
                why = "they vanished, or were changed, after they had been uploaded"
                for name in missing:
                    self._known.pop(name, None)
            except TakenOverError as error:
                why = str(error)
                break
            except Exception as error:  # noqa: BLE001 - told
                why = told(error)
            if pause_s is not None:
                time.sleep(pause_s)
        return self._ended(self._missing(None), why)

    def _missing(self, listing: Mapping[str, Any] | None) -> tuple[str, ...]:
        """Files that the URL lacks; without a listing, those that were not uploaded."""
        return tuple(
            found.name
            for found in _files(self._directory, self._known)
            if self._known.get(found.name) != found.signature
            or (
                listing is not None
                and (found.name not in listing or listing[found.name]["size"] != found.signature[0])
            )
        )

    def _ended(self, missing: tuple[str, ...], why: str) -> Uploaded:
        files = list(_files(self._directory, self._known))
        return Uploaded(missing, why, len(files), sum(found.signature[0] for found in files))


@contextmanager
def opened(directory: Path, url: str, intent: Intent) -> Iterator[tuple[Mirror, str]]:
    """A mirror that may write to its URL, brought together with what is there, and a sentence on
    what was fetched. Raises UserError before anything of a run is touched."""
    store = Store(url)
    probe(store)
    with remote_lock.held(store) as lock:
        try:
            common = reconcile(store, directory, intent)
        except Exception as error:  # noqa: BLE001 - each package has its own
            raise unusable(store.url, "read", error) from None
        news = []
        if lock.taken_from:
            news.append(f"{lock.taken_from} ended without leaving {store.url}: its lock was taken")
        if common.n_fetched:
            news.append(
                f"{common.n_fetched} file(s), {common.n_fetched_bytes / 1e6:.1f} MB, were fetched "
                f"from {store.url} into {directory}"
            )
        yield Mirror(directory, store, common, lock.check), "; ".join(news)


def upload(directory: Path, url: str) -> Uploaded:
    """Put a run directory, or a folder of such, behind a URL, or complete what is there. Raises
    UserError."""
    if next(_files(directory), None) is None:
        raise UserError(f"{directory} holds nothing to upload: name the --save_dir of a run")
    if not any(MANIFEST in files for _, _, files in os.walk(directory)):
        raise UserError(
            f"{directory} is no run directory (it has no {MANIFEST}) and holds none: name the "
            "--save_dir of a run, or a folder of runs"
        )
    with opened(directory, canonical(url), "upload") as (mirror, _news):
        return mirror.finish()


def mend(url: str, directory: Path) -> str:
    return f"it is all in {directory}, and `speedbench upload {directory} {url}` completes it"


def verdict(uploaded: Uploaded, url: str, directory: Path) -> str:
    """How a mirror ended, in a sentence."""
    missing = uploaded.missing
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return (
            f"{len(missing)} of {uploaded.n_files} files are not at {url} "
            f"({', '.join(missing[:3])}{more}: {uploaded.why}); {mend(url, directory)}"
        )
    return (
        f"{url} holds all {uploaded.n_files} files ({uploaded.n_bytes / 1e6:.1f} MB), each "
        f"verified; the copy here stays in {directory}"
    )
