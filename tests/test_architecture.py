"""The dependency direction of DESIGN section 3, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = sys.stdlib_module_names

ALLOWED = {
    "speedbench.types": set(),
    "speedbench.words": set(),
    "speedbench.processes": set(),
    "speedbench.guardian": {"speedbench.processes"},
    "speedbench.watchdog": {"speedbench.guardian", "speedbench.processes"},
    "speedbench.launch": {"speedbench.processes", "speedbench.types"},
    "speedbench.replicas": {"mpi4py", "speedbench.launch", "speedbench.types"},
    "speedbench.columns": {"numpy"},
    "speedbench.metrics": {"numpy", "speedbench.columns"},
    "speedbench.stats": {"numpy", "scipy", "speedbench.columns"},
    "speedbench.steps": {"numpy", "speedbench.columns", "speedbench.types"},
    "speedbench.manifest": {"speedbench.limits", "speedbench.types"},
    "speedbench.part": {"pyarrow"},
    "speedbench.collector": set(),
    "speedbench.loop": {"speedbench.collector", "speedbench.steps", "speedbench.types"},
    "speedbench.limits": set(),
    "speedbench.arrivals": {"numpy", "speedbench.columns"},
    "speedbench.goodput": {"numpy", "speedbench.columns", "speedbench.limits"},
    "speedbench.spans": {
        "numpy",
        "speedbench.columns",
        "speedbench.metrics",
        "speedbench.store",
    },
    "speedbench.open_loop": {"numpy", "speedbench.columns"},
    "speedbench.config": {"pydantic", "yaml", "speedbench.limits", "speedbench.types"},
    "speedbench.environment": set(),
    "speedbench.prompts": {
        "numpy",
        "transformers",
        "jinja2",
        "speedbench.types",
        "speedbench.config",
        "speedbench.words",
    },
    "speedbench.store": {
        "numpy",
        "pyarrow",
        "speedbench.columns",
        "speedbench.steps",
        "speedbench.types",
        "speedbench.environment",
        "speedbench.manifest",
        "speedbench.part",
        "speedbench.processes",
    },
    "speedbench.beside": {"pyarrow"},
    "speedbench.prometheus": set(),
    "speedbench.server_counters": {
        "pyarrow",
        "speedbench.prometheus",
        "speedbench.store",
        "speedbench.types",
    },
    "speedbench.server_metrics": {
        "pyarrow",
        "speedbench.beside",
        "speedbench.processes",
        "speedbench.prometheus",
        "speedbench.server_counters",
        "speedbench.store",
    },
    "speedbench.aiperf": {"speedbench.server_counters", "speedbench.types"},
    "speedbench.permutation": {"numpy", "scipy", "speedbench.columns"},
    "speedbench.remote": {"fsspec", "speedbench.types"},
    "speedbench.remote_lock": {"speedbench.remote", "speedbench.types"},
    "speedbench.mirror": {"speedbench.remote", "speedbench.remote_lock", "speedbench.types"},
    "speedbench.mirror_process": {
        "speedbench.mirror",
        "speedbench.processes",
        "speedbench.remote",
        "speedbench.types",
    },
    "speedbench.checks": {
        "numpy",
        "speedbench.columns",
        "speedbench.metrics",
        "speedbench.open_loop",
        "speedbench.spans",
        "speedbench.store",
        "speedbench.types",
    },
}
"""What each module may import at most, beside the standard library."""

FORBIDDEN = {
    "speedbench.datasets": ("engines", "speedbench.loop", "speedbench.store", "speedbench.metrics"),
    "speedbench.report": ("engines", "speedbench.loop", "speedbench.session", "speedbench.cli"),
    "speedbench.calibration": ("engines", "speedbench.loop", "speedbench.store", "speedbench.cli"),
    "speedbench.insights": ("engines", "speedbench.loop", "speedbench.session", "speedbench.cli"),
    "speedbench.energy": ("engines", "speedbench.loop", "speedbench.session", "speedbench.cli"),
    "speedbench.inputs": ("engines", "speedbench.metrics", "speedbench.session"),
    "speedbench.target": ("engines", "speedbench.metrics", "speedbench.session"),
    "speedbench.share": ("engines", "speedbench.metrics", "speedbench.session"),
    "speedbench.session": ("engines", "speedbench.metrics", "speedbench.report", "speedbench.cli"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("speedbench", "engines"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Full names of everything a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = whole & set(MODULES)
            names.update(submodules or {node.module})
    return {name for name in names if name.partition(".")[0] not in STDLIB}


def is_within(name: str, package: str) -> bool:
    """Whether a module is of a package; speedbench.cli_report is of speedbench.cli."""
    return name == package or name.startswith((f"{package}.", f"{package}_"))


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_nothing_but_what_it_may(module: str) -> None:
    extra = {
        name
        for name in imports(MODULES[module])
        if not any(is_within(name, allowed) for allowed in ALLOWED[module])
    }
    assert not extra


@pytest.mark.parametrize("module", sorted(MODULES))
def test_dependencies_point_one_way(module: str) -> None:
    names = imports(MODULES[module])
    if is_within(module, "engines"):
        ours = {n for n in names if is_within(n, "speedbench")}
        assert ours <= {"speedbench.types", "speedbench.steps", "speedbench.words"}
    for package, forbidden in FORBIDDEN.items():
        if is_within(module, package):
            bad = {n for n in names if any(is_within(n, f) for f in forbidden)}
            assert not bad


def test_only_cli_prints() -> None:
    for module, path in MODULES.items():
        if module.startswith("speedbench.cli"):
            continue
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
        ]
        assert not calls, f"{module} prints in lines {calls}"


def heavy_imports_after(code: str) -> set[str]:
    heavy = ("torch", "transformers", "vllm", "scipy", "pandas", "matplotlib", "pydantic", "rich")
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    return {name for name in heavy if name in loaded}


def test_import_speedbench_is_light() -> None:
    assert heavy_imports_after("import speedbench, speedbench.store, speedbench.metrics") == set()


def test_help_imports_no_engine() -> None:
    loaded = heavy_imports_after(
        "from contextlib import suppress\nfrom speedbench.cli import main\n"
        "with suppress(SystemExit):\n    main(['run', '--help'])"
    )
    assert loaded <= {"pydantic"}
