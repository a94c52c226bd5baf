"""The process in which a mirror works while a command measures.

Neither its imports nor its Python code nor a stuck network are in the process that measures; and
where that is killed, what it had committed is still uploaded.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from speedbench.mirror import Mirror, Uploaded, mend, opened, verdict
from speedbench.processes import give_way
from speedbench.remote import canonical, is_url, local_path, told
from speedbench.types import UserError

POLL_S = 1.0
LONGEST_WAIT_S = 60.0
"""Between rounds that fail, once many have."""


@dataclass(slots=True)  # mutable: known at the end
class Mirroring:
    """Whether everything is where it was to go."""

    is_whole: bool = True


@contextmanager
def mirrored(
    save_dir: str | None, *, resume: bool, tell: Callable[[str], None]
) -> Iterator[Mirroring]:
    """While a command writes into `remote.local_path(save_dir)`: put that behind the URL, too.

    Does nothing for a path. Raises UserError at once if the URL cannot be written, or holds what it
    must not; what happens afterwards is told, and never raised: what was measured is staged.
    """
    if save_dir is None or not is_url(save_dir):
        yield Mirroring()
        return
    url, directory = canonical(save_dir), local_path(save_dir)
    if url.startswith("memory://"):
        raise UserError(f"{url} ends with its process: give --save_dir a URL that lasts, or a path")
    process = _start(directory, url, resume)
    try:
        news = _ready(process, url, directory)
    except BaseException:
        _release(process)
        raise
    state = Mirroring()
    try:
        if news:
            tell(news)
        yield state
    except SystemExit:  # ended at once, by the user
        _release(process)
        tell(f"process {process.pid} goes on uploading what is stored in {directory} to {url}")
        raise
    except BaseException:
        _end(process, url, directory, tell)
        raise
    state.is_whole = _end(process, url, directory, tell)


def _start(directory: Path, url: str, resume: bool) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    words = [str(directory), url, "resume" if resume else "new", str(os.getpid())]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        log = _log_of(directory).open("wb")
    except OSError as error:
        raise UserError(
            f"{directory.parent}, where {url} is staged, cannot be written ({error.strerror}): set "
            "XDG_CACHE_HOME to a folder with room for the run"
        ) from None
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "speedbench.mirror_process", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a terminal's Ctrl-C is for the run alone
        )


def _log_of(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.log")


def _ready(process: subprocess.Popen[bytes], url: str, directory: Path) -> str:
    """Wait until the mirror can upload. Raises UserError if it cannot."""
    answer = _answer(process)
    if answer is None:
        raise UserError(
            f"the process that is to upload to {url} ended at once: see {_log_of(directory)}"
        )
    if "error" in answer:
        raise UserError(str(answer["error"]))
    return str(answer["news"])


def _release(process: subprocess.Popen[bytes]) -> None:
    """Tell the mirror that nothing more comes."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.write(b"end\n")
        process.stdin.close()


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def _end(
    process: subprocess.Popen[bytes], url: str, directory: Path, tell: Callable[[str], None]
) -> bool:
    """Let the mirror upload what is left; whether all is there. Tells what is not."""
    assert process.stdout is not None
    _release(process)
    try:
        if not select.select([process.stdout], [], [], 3.0)[0]:
            tell(f"uploading what is left to {url}")
        answer = _answer(process)
    except SystemExit:
        tell(f"process {process.pid} goes on uploading what is stored in {directory} to {url}")
        raise
    process.wait()
    if answer is None:
        log = _log_of(directory)
        tell(f"the process that uploaded to {url} ended too early ({log}): {mend(url, directory)}")
        return False
    uploaded = Uploaded(**answer)
    if uploaded.n_files:
        tell(verdict(uploaded, url, directory))
    return not uploaded.missing


def serve(directory: Path, url: str, resume: bool, parent: int) -> None:
    """Mirror until the process that asked for it says so on stdin, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it ends when the run ends, which they are for
    give_way()
    try:
        with opened(directory, url, "resume" if resume else "new") as (mirror, news):
            _say({"news": news})
            _follow(mirror, parent)
            uploaded = mirror.finish()
    except UserError as error:
        _say({"error": str(error)})
        return
    _say(asdict(uploaded))


def _follow(mirror: Mirror, parent: int) -> None:
    wait_s, n_faults = POLL_S, 0
    while not _is_over(wait_s, parent):
        started_s = time.monotonic()
        try:
            n_uploaded = mirror.round()
        except Exception as error:  # noqa: BLE001 - tried again; told at the end
            n_faults += 1
            wait_s = min(LONGEST_WAIT_S, POLL_S * 2 ** min(n_faults, 10))
            sys.stderr.write(f"{time.strftime('%F %T')} {told(error)}\n")
            sys.stderr.flush()
            continue
        n_faults = 0
        if not n_uploaded:  # looking must stay a small part of a core
            wait_s = max(POLL_S, 50 * (time.monotonic() - started_s))


def _is_over(wait_s: float, parent: int) -> bool:
    """Wait; whether the run has ended. The pipe alone does not tell: forks keep it open."""
    end_s = time.monotonic() + wait_s
    while True:
        left_s = end_s - time.monotonic()
        if os.getppid() != parent:
            return True
        if select.select([sys.stdin], [], [], max(0.0, min(POLL_S, left_s)))[0]:
            return True
        if left_s <= POLL_S:
            return False


def _say(message: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the run was killed
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume", int(sys.argv[4]))
