"""The Dockerfile: linted, and its steps replayed in a fresh virtual environment.

No container is built. What is proven: the files it copies are there, its pip line installs
speedbench without moving a package beside it, and its entry point starts. The packages of this
environment stand in for those of the engine's image, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers import ROOT

HADOLINT = Path(sys.executable).parent / "hadolint"


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in whole if line)]


def of(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


@pytest.mark.skipif(not HADOLINT.exists(), reason="no hadolint beside this Python")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_image_is_a_build_argument_and_the_user_is_not_root() -> None:
    assert of("ARG") == ["ENGINE_IMAGE"]
    assert of("FROM") == ["${ENGINE_IMAGE}"]
    (user,) = of("USER")
    assert int(user) > 0
    assert any(f"--uid {user}" in run for run in of("RUN"))
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert [json.loads(rest) for rest in of("ENTRYPOINT")] == [["speedbench"]]


def ignored() -> tuple[set[str], set[str]]:
    """(names let through, names kept out again) of .dockerignore, which begins with all out."""
    lines = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    assert lines[0] == "*"
    let = {line[1:] for line in lines if line.startswith("!")}
    return let, set(lines[1:]) - {f"!{name}" for name in let}


def test_what_is_copied_is_what_the_context_holds() -> None:
    copied = {source for rest in of("COPY") for source in rest.split()[:-1]}
    let, out = ignored()
    assert copied == let
    assert not copied & out
    assert all((ROOT / name).exists() for name in copied)


def test_its_steps_install_an_entry_point_that_works(tmp_path: Path) -> None:
    image = tmp_path / "image"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(image)], check=True)
    (packages,) = image.glob("lib/python*/site-packages")
    # The engine's packages, behind the environment's own; without this repository's installation.
    engine = tmp_path / "engine"
    engine.mkdir()
    for path in Path(site.getsitepackages()[0]).iterdir():
        if "speedbench" not in path.name.lower() and path.suffix != ".pth":
            (engine / path.name).symlink_to(path)
    (packages / "engine.pth").write_text(str(engine))
    workdir = tmp_path / "speedbench"
    workdir.mkdir()
    for rest in of("COPY"):
        *sources, target = rest.split()
        for source in sources:
            path = workdir / (source if target == "./" else target)
            if (ROOT / source).is_dir():
                skip = shutil.ignore_patterns("__pycache__", "speed")
                shutil.copytree(ROOT / source, path, ignore=skip)
            else:
                shutil.copy(ROOT / source, path)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))
    } | {"PATH": f"{image / 'bin'}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    (installation,) = [run for run in of("RUN") if "pip install" in run]
    done = subprocess.run(
        installation, shell=True, cwd=workdir, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    installed = re.findall(r"^Successfully installed (.+)$", done.stdout, re.MULTILINE)
    assert [re.sub(r"-[\d.]+$", "", name) for name in installed] == ["speedbench"]  # no other moved
    (entry,) = [json.loads(rest) for rest in of("ENTRYPOINT")]
    (words,) = [json.loads(rest) for rest in of("CMD")]
    found = subprocess.run(
        [str(image / "bin" / entry[0]), *words], cwd=tmp_path, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "speedbench run --engine VLLM" in found.stdout
    run = shlex.split("run --engine NULL --random_isl 4 --num_requests 2 --output_length 3")
    subprocess.run(
        [str(image / "bin" / entry[0]), *run, "--save_dir", str(tmp_path / "run")],
        cwd=workdir, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "run" / "manifest.json").is_file()
