"""Preparer: the publisher's own program, at one commit of its repository, in its own environment.

What it does is never done here: a turn whose text may not be shipped is rebuilt by the program that
the publisher wrote for it. One argument is set from outside: the revision of the data set that it
reads, which it would otherwise take from the branch as it stands on the day.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from speedbench.datasets.landing import locked
from speedbench.types import UserError

URL = "https://github.com/NVIDIA/Model-Optimizer"
COMMIT = "a2fbac7bad8ab446d3f8783dadb0c3366eb0ad73"
FOLDER = "examples/specdec_bench"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRET = re.compile(r"(?<=://)[^/@]+@")

_RUNNER = """\
import os, runpy, sys
import datasets
repository, revision = sys.argv[1:3]
load = datasets.load_dataset
def load_at_revision(path, *args, **kwargs):
    if path == repository:
        kwargs.setdefault("revision", revision)
    return load(path, *args, **kwargs)
datasets.load_dataset = load_at_revision
sys.argv[:3] = ["prepare_data.py"]
try:
    runpy.run_path("prepare_data.py", run_name="__main__")
except SystemExit as ended:
    if ended.code not in (None, 0):
        raise
# Done, and every file closed. Libraries' threads now and then abort an interpreter that shuts down.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""

Detail = Callable[[str, float | None], None]


@dataclass(frozen=True, slots=True)
class Preparer:
    """A preparer that can run: where it lies, with which Python, and what is known of it."""

    folder: Path
    python: Path
    log_dir: Path
    identity: Mapping[str, Any]

    def run(
        self, config: str, repository: str, revision: str, output_dir: Path, detail: Detail
    ) -> Path:
        """Prepare a configuration of that revision. Returns the parquet file it wrote."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        log = self.log_dir / f"{config}.log"
        command = [self.python, "-c", _RUNNER, repository, revision]
        command += ["--dataset", "speed", "--config", config, "--output_dir", output_dir]
        code, last = _follow(list(map(str, command)), self.folder, log, detail)
        if code != 0:
            raise UserError(
                f"the publisher's preparer failed with exit code {code} on {config} ({last}): see "
                f"{log}; what it downloaded is kept, so repeat the command when that is mended"
            )
        found = sorted(output_dir.rglob("*.parquet"))
        if len(found) != 1:
            raise UserError(
                f"the publisher's preparer ended well but wrote {len(found)} parquet files for "
                f"{config}, expected one: see {log}"
            )
        return found[0]


def ready(url: str | None, commit: str, stage: Callable[[str], None], detail: Detail) -> Preparer:
    """The preparer at that commit, with its environment; both are kept in the cache."""
    if not _COMMIT.fullmatch(commit):
        raise UserError(f"--preparer_commit is '{commit}': expected the 40 hex digits of a commit")
    stage("fetching the publisher's preparer")
    source = checkout(url or URL, commit, FOLDER)
    folder = source / FOLDER
    for name in ("prepare_data.py", "requirements.txt"):
        if not (folder / name).is_file():
            raise UserError(
                f"{_shown(url or URL)} at commit {commit[:12]} holds no {FOLDER}/{name}: name the "
                "preparer's repository and a commit that holds it"
            )
    stage("installing the preparer's requirements in an environment of its own")
    home = cache_dir() / "preparer"
    python, packages = _environment(home / f"{commit}-venv", folder, detail)
    identity = {
        "repository": _shown(url or URL),
        "commit": commit,
        "python": _version(python.parent.parent),
        "packages": packages,
    }
    return Preparer(folder, python, home / "logs", identity)


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "speedbench"


def commit_of(url: str, revision: str) -> str:
    """The commit that a branch or a tag of a git repository names now."""
    if _COMMIT.fullmatch(revision):
        return revision
    # Whole names: "main" alone would find a branch x/main, too. A signed tag is peeled (^{}).
    names = [f"refs/heads/{revision}", f"refs/tags/{revision}^{{}}", f"refs/tags/{revision}"]
    lines = _git(["ls-remote", "--", url, *names], url, revision).splitlines()
    listed = {name: commit for commit, name in (line.split("\t", 1) for line in lines)}
    found = next((listed[name] for name in names if name in listed), None)
    if found is None:
        raise UserError(f"{_shown(url)} has no revision {revision}: name a branch, tag or commit")
    return found


def checkout(url: str, commit: str, part: str) -> Path:
    """A folder or file of a git repository at a commit, which git itself holds against its hash."""
    home = cache_dir() / "git"
    home.mkdir(parents=True, exist_ok=True)
    target = home / commit
    with locked(home / f"{commit}.lock", f"{target} is being fetched", wait=True):
        if not target.is_dir():
            with _staging(home) as folder:
                _fetch(url, commit, part, folder)
                folder.rename(target)
    return target


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=home, prefix=".partial-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch(url: str, commit: str, part: str, folder: Path) -> None:
    """That commit alone, without its history, and of its files only those of `part`."""
    within = ["-C", str(folder)]
    _git(["init", "-q", str(folder)], url, commit)
    _git([*within, "remote", "add", "origin", "--", url], url, commit)
    _git([*within, "sparse-checkout", "set", "--no-cone", f"/{part}"], url, commit)
    _git(
        [*within, "fetch", "-q", "--depth", "1", "--filter=blob:none", "origin", commit],
        url,
        commit,
    )
    _git([*within, "checkout", "-q", "--detach", commit], url, commit)


def _git(arguments: Sequence[str], url: str, commit: str) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except FileNotFoundError:
        raise UserError("git is not installed, which fetches the sources: install git") from None
    if done.returncode != 0:
        reason = _shown(_fatal_line(done.stderr) or f"exit code {done.returncode}")
        raise UserError(
            f"git could not fetch {commit[:12]} from {_shown(url)} ({reason}): check the network, "
            "or name a mirror with --git_url"
        )
    return done.stdout


def _environment(venv: Path, folder: Path, detail: Detail) -> tuple[Path, list[str]]:
    """A virtual environment with the preparer's requirements, and the packages in it."""
    python, marker = venv / "bin" / "python", venv / "speedbench.json"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with locked(venv.with_suffix(".lock"), f"{venv} is being built", wait=True):
        if not marker.is_file() or not python.exists():
            shutil.rmtree(venv, ignore_errors=True)
            log = venv.with_suffix(".log")
            for command in (
                [sys.executable, "-m", "venv", str(venv)],
                [str(python), "-m", "pip", "install", "-r", "requirements.txt"],
            ):
                code, last = _follow(command, folder, log, detail)
                if code != 0:
                    raise UserError(
                        f"the preparer's environment could not be built ({last}): see {log}; it "
                        "needs Python's venv module (Debian: python3-venv) and a package index"
                    )
            frozen = subprocess.run(
                [python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True,
                env=_own_environment(),
            )  # fmt: skip
            marker.write_text(json.dumps(frozen.stdout.split("\n")[:-1]), encoding="utf-8")
    packages: list[str] = json.loads(marker.read_text(encoding="utf-8"))
    return python, packages


def _version(venv: Path) -> str:
    """The Python that an environment was built with; ours may be another by now."""
    text = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    found = re.search(r"^version\s*=\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else "unknown"


def _own_environment() -> dict[str, str]:
    """The user's environment, without what would lead Python to packages of another place."""
    away = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in away}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}


def _follow(command: list[str], folder: Path, log: Path, detail: Detail) -> tuple[int, str]:
    """Run a program, its output to a log; returns its exit code and its last line.

    However this process leaves, short of being killed, the program does not outlive it.
    """
    last = ""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_own_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in _lines(process.stdout, file):
                last = line
                detail(line, None)
            return process.wait(), last
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()


def _lines(stream: IO[bytes], log: IO[bytes]) -> Iterator[str]:
    """The lines of a program's output that are not blank; a bar ends its own by a return."""
    rest = b""
    while block := os.read(stream.fileno(), 1 << 16):
        log.write(block)
        log.flush()
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        yield from (text for line in whole if (text := line.decode("utf-8", "replace").strip()))
    if text := rest.decode("utf-8", "replace").strip():
        yield text


def _fatal_line(text: str) -> str:
    """The line in which git says what is wrong; advice follows it."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return next((line for line in lines if line.startswith("fatal:")), lines[-1] if lines else "")


def _shown(text: str) -> str:
    """Without the user name and password that a URL may hold."""
    return _SECRET.sub("", text)
