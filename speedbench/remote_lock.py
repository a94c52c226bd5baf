"""The right to write behind a URL: an object there with its owner's name, renewed for as long."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from speedbench.remote import MismatchError, Store, patiently, unusable
from speedbench.types import UserError

LOCK = ".lock"

BEAT_S = 20.0
STALE_S = 300.0
"""A lock that was not renewed for so long is of a process that ended without removing it."""

SETTLE_S = 1.0
"""Of two that took the lock at one time, the one that wrote last has it: seen after this."""


class TakenOverError(UserError):
    """Another process writes behind the URL now."""


@contextmanager
def held(store: Store) -> Iterator[Lock]:
    """A lock that is renewed in a thread. Raises UserError if another process has it."""
    lock = Lock(store)
    try:
        patiently(lock.take)
    except Exception as error:  # noqa: BLE001 - each package has its own
        raise unusable(store.url, "locked", error) from None
    done = threading.Event()
    thread = threading.Thread(target=_keep, args=(lock, done), name="speedbench-beat", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        done.set()
        thread.join()
        with suppress(Exception):
            patiently(lock.release)


def _keep(lock: Lock, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with suppress(Exception):  # the next beat may reach it
            lock.beat()


class Lock:
    """The right to write to a URL: an object with its owner's name, renewed every BEAT_S.

    An owner that stood still for long enough loses it, and sees that at its next beat: it uploads
    nothing from then on.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._id = uuid.uuid4().hex
        self.lost_to = ""
        self.taken_from = ""

    def take(self) -> None:
        """Raises UserError if another process has it."""
        found = self._read()
        if found is not None and found.get("id") != self._id and not _has_ended(found):
            if time.time() - _beat_at(found) < STALE_S:
                raise self._refusal(found)
            time.sleep(2 * BEAT_S)  # its clock may only differ from ours: a beat tells
            again = self._read()
            if again is not None and again != found:
                raise self._refusal(again)
        if found is not None and found.get("id") != self._id:
            self.taken_from = str(found.get("owner", "a process without a name"))
        self._write()
        time.sleep(SETTLE_S)
        now = self._read()
        if now is None or now.get("id") != self._id:
            raise self._refusal(now or {})

    def _refusal(self, found: Mapping[str, Any]) -> UserError:
        age_s = max(0.0, time.time() - _beat_at(found))
        return UserError(
            f"{self._store.url} is being written by {found.get('owner', 'another process')} (last "
            f"sign of life {age_s:.0f} s ago): wait for it or choose another --save_dir; if it is "
            f"gone for sure, remove {self._store.url}/{LOCK}, or try again {STALE_S / 60:.0f} "
            "minutes after its last sign"
        )

    def beat(self) -> None:
        """Renew it, or find that it is lost. Raises what the store raises."""
        found = self._read()
        if found is not None and found.get("id") != self._id:
            self.lost_to = str(found.get("owner", "another process"))
        elif not self.lost_to:
            self._write()

    def check(self) -> None:
        if self.lost_to:
            raise TakenOverError(f"{self._store.url} was taken over by {self.lost_to}")

    def release(self) -> None:
        found = self._read()
        if found is not None and found.get("id") == self._id:
            self._store.remove(LOCK)

    def _read(self) -> dict[str, Any] | None:
        data = self._store.read(LOCK)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        content = {
            "id": self._id,
            "owner": f"process {os.getpid()} on {os.uname().nodename}",
            "pid": os.getpid(),
            "place": _place(),
            "beat_at": time.time(),
        }
        # Whoever writes at the same time makes it another than was sent: `take` and `beat` look.
        with suppress(MismatchError):
            self._store.put(json.dumps(content).encode(), LOCK)


def _beat_at(found: Mapping[str, Any]) -> float:
    value = found.get("beat_at")
    return float(value) if isinstance(value, (int, float)) else 0.0


def _place() -> str:
    """Where a process number means one process: host, its start, and namespace of processes."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _has_ended(found: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine and is gone."""
    pid = found.get("pid")
    if not isinstance(pid, int) or found.get("place") != _place():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
