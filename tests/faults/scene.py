"""A scene: one run, to which one thing happens, and what must hold afterwards whatever it was."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from speedbench import store
from speedbench.cli import main

ROOT = Path(__file__).parent.parent.parent
MARK = "SPEEDBENCH_FAULT_SCENE"
N_ROWS, LENGTH, K = 60, 20, 3

Answers = Mapping[str, tuple[int, ...]]
"""Conversation -> the tokens of its stored answer."""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(slots=True)  # mutable: what has been seen so far
class Scene:
    """`folder` is new and empty; `random` decides moments and places."""

    folder: Path
    random: Random
    n_rows: int = N_ROWS
    length: int = LENGTH
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    def arguments(self, *more: str) -> list[str]:
        return [
            "--engine", "NULL", "--dataset", "random", "--random_isl", "4", "--num_requests",
            str(self.n_rows), "--output_length", str(self.length), "--concurrency", "4", "--warmup",
            "0", "--speculative_algorithm", "DRAFT_TARGET", "--draft_model_dir", "none",
            "--draft_length", str(K), "--save_dir", str(self.directory), *more,
        ]  # fmt: skip

    # ------------------------------------------------------------ the run

    def start(
        self,
        *more: str,
        fault: str = "",
        slow_ms: float = 0,
        before: Callable[[], None] | None = None,
        **environ: str,
    ) -> subprocess.Popen[str]:
        """Start the run in a process of its own; `slow_ms` is added to every step."""
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.run", *self.arguments(*more)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ, **environ, "FAULT": fault, "SLOW_MS": str(slow_ms), MARK: self.name,
            },
            preexec_fn=before,
        )  # fmt: skip

    def ended(self, process: subprocess.Popen[str], timeout_s: float = 60) -> Ended:
        """How a process ends; nothing that it started may outlive it."""
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"it did not end within {timeout_s:g} s") from None
        self.nobody_is_left()
        return Ended(process.returncode, out, err)

    def run(
        self,
        *more: str,
        fault: str = "",
        slow_ms: float = 0,
        before: Callable[[], None] | None = None,
    ) -> Ended:
        return self.ended(self.start(*more, fault=fault, slow_ms=slow_ms, before=before))

    def wait_for_part(self, process: subprocess.Popen[str], beyond: int = 0) -> None:
        """Until something is stored, in more parts than there were."""
        turns = self.directory / "turns"
        self.wait(process, lambda: len(list(turns.glob("[0-9]*.parquet"))) > beyond)

    def wait(self, process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + 30
        while not until():
            assert process.poll() is None, f"it ended too early: {process.communicate()[1]}"
            assert time.monotonic() < limit_s, "what was waited for did not come in 30 s"
            time.sleep(0.02)

    def nobody_is_left(self) -> None:
        """Nothing of the run may run on; processes are given a moment to see that it ended."""
        limit_s = time.monotonic() + 10
        while left := self.processes():
            if time.monotonic() > limit_s:
                for process in left:
                    os.kill(process, signal.SIGKILL)
                raise AssertionError(f"process(es) {left} were left behind")
            time.sleep(0.05)

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                alive = (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and self.name.encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    # ------------------------------------------------------------ what is stored

    def command(self, *words: str) -> Ended:
        """A command in this process: nothing goes wrong in it."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        return Ended(code, " ".join(out.getvalue().split()), " ".join(err.getvalue().split()))

    def report(self) -> str:
        ended = self.command("report", str(self.directory))
        assert ended.code == 0, ended.err
        return ended.out

    def status(self) -> str:
        return str(store.read_manifest(self.directory)["status"])

    def answers(self) -> Answers:
        """What is stored and did not fail; nothing may be there twice."""
        run = store.load(self.directory)
        rows = [row for row in run.turns.to_pylist() if row["finish_reason"] not in store.FAILED]
        counts = Counter(row["conversation_id"] for row in rows)
        twice = [name for name, n in counts.items() if n > 1]
        assert not twice, f"{twice} are stored twice"
        return {row["conversation_id"]: tuple(row["output_token_ids"]) for row in rows}

    def resumed(self, kept: Answers, *more: str) -> str:
        """Go on, without a fault: all is there in the end, once, and what was kept is as it was."""
        ended = self.command("run", "--save_dir", str(self.directory), "--resume", *more)
        assert ended.code == 0, ended.err
        now = self.answers()
        assert {name: now.get(name) for name in kept} == dict(kept), "a stored answer was lost"
        assert len(now) == self.n_rows
        assert all(len(tokens) == self.length for tokens in now.values())
        run = store.load(self.directory)
        assert run.manifest["status"] == "complete"
        assert int(run.columns.n_tokens.sum()) >= self.length * self.n_rows
        return f"{len(kept)} of {self.n_rows} stored, all {self.n_rows} once after --resume"


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> object:  # type: ignore[misc]
    """A file system of that size; raises CannotError where this user may not mount one."""
    folder.mkdir()
    done = subprocess.run(
        ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CannotError("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=False)


class CannotError(Exception):
    """The fault cannot be made on this machine."""
