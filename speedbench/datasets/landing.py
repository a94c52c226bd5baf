"""Landing: a prepared folder takes the place of the old one whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speedbench.types import UserError

_EXCHANGE, _AT_FDCWD = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of renameat2(2)."""


@contextmanager
def landing(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same disk; what is in it at the end becomes `target`.

    If the block does not end well, the folder is removed and `target` is what it was. Nobody else
    can be preparing the same target meanwhile. A folder that a killed process left is removed.
    """
    if target.is_symlink():  # to another disk, where the data is to stay
        target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be created ({error.strerror}): give another --out"
        ) from None
    previous = target.with_name(f".{target.name}.previous")
    with locked(target.with_name(f".{target.name}.lock"), f"{target} is being prepared"):
        if previous.exists() and not target.exists():
            previous.rename(target)  # killed between the two renames of `_swap`
        for old in (previous, *target.parent.glob(f".{target.name}.partial-*")):
            shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp's is for its owner alone
            _sync(folder)
            _swap(folder, target, previous)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def locked(path: Path, taken: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{taken} by another process: wait for it to end, then repeat the command"
            ) from None
        yield


def disk_full(error: BaseException, place: str) -> UserError | None:
    """The sentence for a full disk or an exceeded quota; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename2 or error.filename or place  # of a copy, where it goes
        return UserError(
            f"the disk is full ({where}): free some space, or move --out, HF_HOME or "
            "XDG_CACHE_HOME to another disk, and repeat the command; nothing was changed"
        )
    return None


def _sync(folder: Path) -> None:
    """To the disk, the files first: a power cut after the rename must find them whole."""
    for path in (*sorted(folder.iterdir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(folder: Path, target: Path, previous: Path) -> None:
    """Put `folder` where `target` is; the old one lands at `folder` or `previous`."""
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):
        # A file system that cannot exchange two folders: the old one steps aside for an instant.
        target.rename(previous)
        try:
            folder.rename(target)
        except BaseException:
            previous.rename(target)
            raise
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system has no such step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))
