"""scripts/setup.sh: an environment is called installed only while it holds what is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.launchers import ROOT


def test_what_was_installed_last_counts(tmp_path: Path) -> None:
    """The stand-in for pip notes what it is given: an older lock file is installed anew, and two
    sets of lock files may share an environment."""
    (tmp_path / "setup.cfg").write_text("one")
    python = tmp_path / "v" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/log\n')
    python.chmod(0o755)
    log = tmp_path / "log"

    def installs(*locks: str) -> list[str]:
        log.write_text("")
        command = f"set -euo pipefail; . {ROOT}/scripts/setup.sh; setup v {' '.join(locks)}"
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
        return [line.rpartition("-r ")[2] for line in log.read_text().splitlines() if "-r " in line]

    lock, more = tmp_path / "a.txt", tmp_path / "b.txt"
    lock.write_text("numpy==1")
    more.write_text("scipy==1")
    assert installs("a.txt") == ["a.txt"]
    assert installs("a.txt") == []
    assert installs("a.txt", "b.txt") == ["a.txt", "b.txt"]
    assert installs("a.txt") == []
    assert installs("b.txt", "a.txt") == []
    lock.write_text("numpy==2")
    assert installs("a.txt") == ["a.txt"]
    lock.write_text("numpy==1")  # an earlier commit was checked out again
    assert installs("a.txt") == ["a.txt"]
