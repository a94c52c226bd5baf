"""Hub: files of a dataset repository at one commit, downloaded and held against their hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from speedbench.datasets.landing import disk_full
from speedbench.types import UserError

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at a commit. `files` maps a path to its size and its digest, both as the hub
    lists them (sha256 of a large file, git's object id of a small one); empty offline."""

    repository: str
    commit: str
    files: Mapping[str, tuple[int, str]]


def resolve(repository: str, revision: str) -> Snapshot:
    """The commit that a revision names now (offline: that the cache knows), and its files."""
    import huggingface_hub
    from huggingface_hub import constants

    with _sentences(repository, revision):
        if constants.HF_HUB_OFFLINE:
            folder = _cached(repository, revision)
            return Snapshot(repository, folder.name, {})
        info = huggingface_hub.HfApi().dataset_info(
            repository, revision=revision, files_metadata=True
        )
    if not info.sha:
        raise UserError(f"the hub names no commit for {repository} at {revision}: try again later")
    if is_commit(revision) and info.sha != revision:
        raise UserError(
            f"the hub answers with {repository} at {info.sha} and not at {revision}, which was "
            "asked for: check HF_ENDPOINT"
        )
    files = {s.rfilename: (s.size or 0, _listed_digest(s)) for s in info.siblings or ()}
    return Snapshot(repository, info.sha, files)


def is_commit(revision: str) -> bool:
    return len(revision) == 40 and _SHA.fullmatch(revision) is not None


def check_access(repositories: Iterable[str]) -> None:
    """Raise UserError for the first dataset whose terms this user has yet to accept."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    api = huggingface_hub.HfApi()
    for repository in repositories:
        with _sentences(repository, "main"):
            api.auth_check(repository, repo_type="dataset")


def download(
    snapshot: Snapshot, names: Iterable[str], advance: Callable[[str, float | None], None]
) -> dict[str, Path]:
    """Those files in the hub's own cache, each held against its digest."""
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours is shown
    wanted = list(names)
    sizes = {name: snapshot.files.get(name, (0, ""))[0] for name in wanted}
    total, done, found = sum(sizes.values()), 0, {}
    for name in wanted:
        advance(f"{name} ({sizes[name] / 1e6:.1f} MB)", done / total if total else None)
        with _sentences(snapshot.repository, snapshot.commit):
            path = huggingface_hub.hf_hub_download(
                snapshot.repository, name, repo_type="dataset", revision=snapshot.commit
            )
        found[name] = Path(path)
        _verify(snapshot, name, found[name])
        done += sizes[name]
    return found


def names_of(snapshot: Snapshot, config: str) -> list[str]:
    """The parquet files of a configuration, in the order of their names."""
    known: Iterable[str] = snapshot.files
    if not snapshot.files:
        folder = _cached(snapshot.repository, snapshot.commit)
        known = (path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet"))
    paths = [PurePosixPath(name) for name in known]
    found = [p for p in paths if p.suffix == ".parquet" and config in p.parts[:-1]]
    if not found:
        raise UserError(
            f"{snapshot.repository} at revision {snapshot.commit[:12]} holds no parquet file of "
            f"the configuration {config}: name another --revision, or --config"
        )
    return sorted(map(str, found))


def page(repository: str) -> str:
    return f"https://huggingface.co/datasets/{repository}"


def _cached(repository: str, revision: str) -> Path:
    """The cache's folder of that revision; its name is the commit."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            local_files_only=True,
            allow_patterns="no file, the folder only",
        )
    )


def _listed_digest(sibling: Any) -> str:
    lfs = sibling.lfs
    return str(lfs["sha256"] if lfs is not None else sibling.blob_id or "")


def _verify(snapshot: Snapshot, name: str, path: Path) -> None:
    """Hold a file against what the hub lists; offline, against its name in the cache."""
    digest = snapshot.files.get(name, (0, ""))[1] or path.resolve().name
    if not _SHA.fullmatch(digest):
        return  # a cache without links, offline: there is nothing to hold it against
    content = path.read_bytes()
    if len(digest) == 64:
        found = hashlib.sha256(content).hexdigest()
    else:
        found = hashlib.sha1(
            b"blob %d\0" % len(content) + content, usedforsecurity=False
        ).hexdigest()
    if found != digest:
        raise UserError(
            f"{name} of {snapshot.repository} hashes to {found[:12]} and not to {digest[:12]}, as "
            f"the hub lists it: remove {path.resolve()} and repeat the command"
        )


@contextmanager
def _sentences(repository: str, revision: str) -> Iterator[None]:
    """Everything that can go wrong with the hub, in one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        raise UserError(
            f"{repository} is gated: open {page(repository)} while signed in, accept its terms, "
            "set HF_TOKEN to a token of that account, and repeat the command"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"the hub shows no dataset {repository} to this user: check {page(repository)}, and "
            "HF_TOKEN if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{repository} has no revision {revision} (any more): name another --revision, such "
            f"as main, or see {page(repository)}/commits/main"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if disk_full(error.__cause__ or error, "HF_HOME"):
            raise
        raise UserError(
            f"{repository} at {revision} is not in the hub's cache and cannot be fetched "
            f"({_reason(error)}): connect, unset HF_HUB_OFFLINE, or set HF_HOME to a cache that "
            "holds it"
        ) from None
    except Exception as error:  # noqa: BLE001 - requests', httpx' or httpx2's own, by the library's version
        if full := disk_full(error, "HF_HOME"):
            raise full from None
        raise UserError(
            f"the hub did not deliver {repository} at {revision} ({_reason(error)}): check the "
            "network, HF_ENDPOINT and any proxy, and repeat the command; what was downloaded is "
            "kept"
        ) from None


def _reason(error: BaseException) -> str:
    lines = str(error).split("\n")
    text = next((line.strip() for line in lines if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:197]}..."
