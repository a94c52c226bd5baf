"""Places behind a URL (s3://, gs://, abfs://, sftp://, ...): runs are read from there and reports
written to there. What keeps a run's copy there while it is measured is in `mirror`.

fsspec does the talking and is imported when a URL is met; credentials come from the environment, as
the protocol's own package reads them. A plain path never gets here further than `is_url`.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import time
import uuid
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from speedbench.types import UserError

T = TypeVar("T")

OBJECT_STORES = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "tos", "memory"}
)
"""Protocols where a file is there whole or not at all. Elsewhere it is written beside its place
first, and moved there."""

LISTED_FLAT = frozenset({"s3", "s3a", "gs", "gcs"})
"""Protocols whose `find` lists all that lies below a name at once, and fails loudly. The generic
one leaves out what it cannot list."""

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Between tries at something that may work the next time."""

PERMANENT = (UserError, PermissionError, FileNotFoundError)
"""Faults that another try does not mend."""

MAX_DEPTH = 2
"""Folders between a URL and the runs below it, at most."""


class MismatchError(OSError):
    """A file behind a URL is not what was sent, or what came is not what is there."""


# ---------------------------------------------------------------- names


def is_url(place: str | Path) -> bool:
    """Whether a place is behind a URL. No path is: a Path would have folded its two slashes."""
    return "://" in str(place)


def canonical(url: str) -> str:
    """A URL as it names its place everywhere. Raises UserError if nothing can be kept there."""
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", url, re.DOTALL)
    if match is None:
        raise UserError(f"{url} is no URL of one place: give protocol://place, as s3://bucket/run")
    protocol, rest = match[1].lower(), match[2].rstrip("/")
    if re.match(r"[^/@]*:[^/@]*@", rest) or "?" in rest:
        raise UserError(
            f"a URL of {protocol}:// holds credentials or options, which would be stored with the "
            "run: leave them out, they are read from the environment"
        )
    if protocol in ("http", "https"):
        raise UserError(
            f"{url} can be neither listed nor written: give a store's own URL, such as s3://, "
            "gs:// or abfs://"
        )
    if protocol in ("file", "local") and not rest.startswith("/"):
        raise UserError(f"{url} has no absolute path: give file:///folder, or a plain path")
    if not rest.strip("/"):
        raise UserError(f"{url} names no place: give a bucket or folder after {protocol}://")
    return f"{protocol}://{rest}"


def local_path(place: str) -> Path:
    """Where a command writes what is to end up in a place: there, or in the staged copy of a URL,
    which is always the same one."""
    return _cached("staged", canonical(place)) if is_url(place) else Path(place)


def _cached(purpose: str, url: str) -> Path:
    """A folder of this user's cache for a URL."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", url.partition("://")[2]).strip("-.")[-60:]
    return (
        Path(base)
        / "speedbench"
        / purpose
        / f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:10]}"
    )


# ---------------------------------------------------------------- one place


class Store:
    """The files below a URL, by their names relative to it.

    What is written is held against its source before it counts, and what is read against what is
    there: by the size and the checksum that the store tells, or by reading it (again) where it
    tells none. Names with a part that begins with a dot are not listed. Raises UserError if the URL
    cannot be opened; the methods raise what the protocol's package raises.
    """

    def __init__(self, url: str) -> None:
        self.url = canonical(url)
        self._protocol = self.url.partition("://")[0]
        self._fs, self._root = _opened(self.url)

    def listing(self) -> dict[str, Mapping[str, Any]]:
        """Name -> what the store tells of the file; nothing where there is no such place."""
        self._fs.invalidate_cache()
        found: dict[str, Mapping[str, Any]] = {}
        if self._protocol in LISTED_FLAT:
            with suppress(FileNotFoundError):
                found = self._fs.find(self._root, detail=True)
        else:
            self._walk(self._root, found)
        names = {path[len(self._root) :].removeprefix("/"): info for path, info in found.items()}
        return {name: info for name, info in sorted(names.items()) if _is_plain(name)}

    def _walk(self, folder: str, found: dict[str, Mapping[str, Any]]) -> None:
        try:
            entries = self._fs.ls(folder, detail=True)
        except FileNotFoundError:
            return
        for info in entries:
            path = info["name"].rstrip("/")
            if info["type"] != "directory":
                found[path] = info
            elif len(path) > len(folder) and not path.rpartition("/")[2].startswith("."):
                self._walk(path, found)

    def put(self, source: Path | bytes, name: str) -> None:
        """Write a file, replacing what has its name. Raises MismatchError if it is not there then
        as it was sent."""
        key = self._key(name)
        if self._protocol in OBJECT_STORES:
            self._send(source, key)
            self._refuse_other(name, key, source)
            return
        folder, _, last = key.rpartition("/")
        beside = f"{folder}/.{last}.{uuid.uuid4().hex[:8]}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._send(source, beside)
            self._refuse_other(name, beside, source)
            self._fs.mv(beside, key)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(beside)
            raise
        if not self.has(name):
            raise MismatchError(f"{name} is not there after it was moved to its place")

    def _send(self, source: Path | bytes, key: str) -> None:
        if isinstance(source, bytes):
            self._fs.pipe_file(key, source)
        else:
            self._fs.put_file(str(source), key)

    def _refuse_other(self, name: str, key: str, source: Path | bytes) -> None:
        if not self._is_same(key, source):
            raise MismatchError(f"{name} is not there as it was sent")

    def holds(self, name: str, source: Path | bytes, info: Mapping[str, Any] | None = None) -> bool:
        """Whether a file is there, and the same as a local one. `info`: as it was listed."""
        return self._is_same(self._key(name), source, info)

    def _is_same(
        self, key: str, source: Path | bytes, info: Mapping[str, Any] | None = None
    ) -> bool:
        try:
            info = info or self._info(key)
        except FileNotFoundError:
            return False
        n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        if info["type"] == "directory" or info["size"] != n_bytes:
            return False
        own = _Digest.of(source)
        # What looks like an md5 is none where the store encrypts: only equality proves anything.
        return own.md5 in _md5s(info) or self._sha256(key) == own.sha256

    def has(self, name: str) -> bool:
        try:
            return bool(self._info(self._key(name))["type"] != "directory")
        except FileNotFoundError:
            return False

    def _info(self, key: str) -> Mapping[str, Any]:
        self._fs.invalidate_cache()
        found: Mapping[str, Any] = self._fs.info(key)
        return found

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None if there is none."""
        self._fs.invalidate_cache()
        try:
            return bytes(self._fs.cat_file(self._key(name)))
        except FileNotFoundError:
            return None

    def fetch(self, name: str, target: Path) -> None:
        """Bring a file here, under its final name once it was held against the one there."""
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.tmp")
        self._fs.get_file(self._key(name), str(beside))
        if not self.holds(name, beside):
            raise MismatchError(f"{name} did not come as it is at {self.url}")
        beside.replace(target)

    def remove(self, name: str) -> None:
        self._fs.rm_file(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        with self._fs.open(key, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's path in it."""
    protocol = url.partition("://")[0]
    try:
        import fsspec
        from fsspec.core import url_to_fs
        from fsspec.registry import known_implementations
    except ImportError:
        raise UserError(f"{url} needs fsspec: pip install fsspec") from None
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(
            f"{url} has the protocol '{protocol}', which fsspec does not know: use s3://, gs://, "
            "abfs://, sftp:// or another that it knows"
        ) from None
    except ImportError as error:
        implementation = known_implementations[protocol]["class"]
        package = str(implementation).partition(".")[0]
        what = (
            f"{error}: install that"
            if package == "fsspec"
            else f"{package} is needed for {protocol}:// and cannot be imported "
            f"({error.__cause__ or error}): pip install {package}"
        )
        raise UserError(f"{url} cannot be opened: {what}") from None
    try:
        fs, root = url_to_fs(url)
    except Exception as error:  # noqa: BLE001 - each package has its own ways to refuse
        raise unusable(url, "opened", error) from None
    return fs, str(root).rstrip("/")


def unusable(url: str, what: str, error: Exception) -> UserError:
    """One sentence for whatever a store says; `what` could not be done with the URL."""
    if isinstance(error, UserError):
        return error
    advice = "check the URL, the network and the credentials in the environment"
    if isinstance(error, PermissionError):
        advice = "give the credentials in the environment the right to list, read, write and delete"
    elif isinstance(error, FileNotFoundError):
        advice = "create its bucket or container first, or mend the URL"
    return UserError(f"{url} cannot be {what} ({told(error)}): {advice}")


def told(error: BaseException) -> str:
    """An error of someone else's in one line."""
    lines = str(error).split("\n")
    name = type(error).__name__
    return f"{name}: {lines[0][:300]}" if lines[0].strip() else name


def patiently(do: Callable[[], T]) -> T:
    """Do something that talks to a store; faults that may pass get more tries."""
    for pause_s in PAUSES_S:
        try:
            return do()
        except PERMANENT:
            raise
        except Exception as error:
            if "Credential" in type(error).__name__:  # there are none: each package has its own
                raise
            time.sleep(pause_s)
    return do()


def _is_plain(name: str) -> bool:
    """Whether a listed name is a file to read: no folder's marker, no way out of the folder."""
    return all(part and not part.startswith(".") for part in name.split("/"))


@dataclass(frozen=True, slots=True)
class _Digest:
    md5: str
    sha256: str

    @classmethod
    def of(cls, source: Path | bytes) -> _Digest:
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            while block := file.read(1 << 22):
                md5.update(block)
                sha256.update(block)
        return cls(md5.hexdigest(), sha256.hexdigest())


def _md5s(info: Mapping[str, Any]) -> set[str]:
    """What a store tells that may be the md5 of a file: S3's ETag, Google's and Azure's own."""
    found = {str(info.get("ETag", "")).strip('"').lower()}
    with suppress(NotBase64, ValueError, TypeError):
        found.add(b64decode(info.get("md5Hash", "")).hex())
    settings = info.get("content_settings")
    content_md5 = settings.get("content_md5") if isinstance(settings, Mapping) else None
    if isinstance(content_md5, (bytes, bytearray)):
        found.add(content_md5.hex())
    return found


# ---------------------------------------------------------------- reading and writing


def localized(place: str | Path) -> Path:
    """A path from which a stored run, a folder of runs, or a manifest can be read: the path itself,
    or a copy of what is behind a URL, of which only what changed is fetched. Raises UserError."""
    if not is_url(place):
        return Path(place)
    url = canonical(str(place))
    if url.endswith("/manifest.json"):
        return localized(url.rpartition("/")[0]) / "manifest.json"
    if url.startswith(("file://", "local://")):
        return Path(url.partition("://")[2])
    target = _cached("read", url)
    try:
        with _alone(target):
            names = fetch_changed(Store(url), target)
    except Exception as error:  # noqa: BLE001 - each package has its own
        raise unusable(url, "read", error) from None
    if not names:
        raise UserError(
            f"{url} holds no run (no manifest.json at most {MAX_DEPTH} folders down): name the "
            "--save_dir of a run, or a folder of runs"
        )
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this process changes a folder of the cache; another that wants to waits."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch_changed(store: Store, target: Path) -> set[str]:
    """Make a folder hold the runs that a store holds, and return the names of their files.

    The store may be written to meanwhile, and what is fetched must be a state that it had: it is
    listed and read against the order of writing, the manifests first, whose status tells that all
    parts are there, then the turns, then what they refer to.
    """
    known_path = target / ".fetched.json"
    known = _read_json(known_path)
    names: set[str] = set()
    for stage in (0, 1, 2):
        listing = patiently(store.listing)
        wanted = [name for name in _of_runs(listing) if _stage(name) == stage]
        for name in wanted:
            signature = _signature(listing[name])
            if known.get(name) != signature or not (target / name).is_file():
                patiently(lambda name=name: store.fetch(name, target / name))  # type: ignore[misc]
                known[name] = signature
                _write_json(known_path, known)
        names.update(wanted)
    for path in [path for path in target.rglob("*") if path.is_file()]:
        name = path.relative_to(target).as_posix()
        if _is_plain(name) and name not in names:
            path.unlink()
    return names


def _of_runs(names: Mapping[str, Any]) -> list[str]:
    """The files of the runs among those listed, and those that lie beside the runs of a folder: no
    more than that is fetched where a whole bucket was named."""
    runs = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == "manifest.json"}
    runs = {run for run in runs if (run.count("/") + 1 if run else 0) <= MAX_DEPTH}
    if "" in runs:
        return list(names)
    beside = {run.rpartition("/")[0] for run in runs} | ({""} if runs else set())
    return [
        name
        for name in names
        if (name.rpartition("/")[0] in beside and name.endswith(".json"))
        or any(name.startswith(f"{run}/") for run in runs)
    ]


def _stage(name: str) -> int:
    """When a file is fetched: 0 what describes, 1 turns, 2 what turns refer to."""
    parts = name.split("/")
    if len(parts) > 1 and parts[-2] == "turns":
        return 1
    return 0 if name.endswith(".json") else 2


def _signature(info: Mapping[str, Any]) -> str:
    """What differs once a file behind a URL was written again."""
    names = ("size", "ETag", "etag", "md5Hash", "generation", "mtime", "LastModified",
             "last_modified", "updated", "modified", "created")  # fmt: skip
    return " ".join(f"{name}={info[name]}" for name in names if info.get(name) is not None)


def _read_json(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, value: Mapping[str, str]) -> None:
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=0), encoding="utf-8")
    beside.replace(path)


def write_bytes(place: str | Path, data: bytes) -> None:
    """Write a file whole, at a path or behind a URL. Raises UserError."""
    if is_url(place):
        url = canonical(str(place))
        folder, _, name = url.rpartition("/")
        try:
            store = Store(folder)
            patiently(lambda: store.put(data, name))
        except Exception as error:  # noqa: BLE001 - each package has its own
            raise unusable(url, "written", error) from None
        return
    path = Path(place)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give a path in a folder that exists "
            "and can be written to"
        ) from None
