"""Who may import whom: core decides without I/O, and a service pays at its start for nothing that it doesn't use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "handoff"
MODULES = sorted(path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
# What a layer may import of ours, itself included.
LAYERS = {
    "core": {"core"},
    "linux": {"core", "linux"},
    "runtime": {"core", "linux", "runtime"},
    "aio": {"core", "linux", "runtime"},
    "integrations": {"core", "linux", "runtime", "aio", "integrations"},
    "cli": {"core", "linux", "runtime", "aio", "integrations", "cli"},
    "__init__": {"core", "runtime"},  # the public names
    "__main__": {"cli"},
}
# core gets time as an argument and touches no descriptor.
OUT_OF_CORE = {"os", "socket", "time", "threading", "asyncio", "logging", "select", "signal", "subprocess", "fcntl"}


def layer_of(module: str) -> str:
    """The layer of a module, given as a path such as handoff/core/old."""
    return module.split("/")[1]


def imports(module: str) -> Iterator[str]:
    """Everything that a module imports anywhere, also within functions and for types, by dotted name.

    `from a import b` counts as a.b: it may be a module.
    """
    tree = ast.parse((PACKAGE.parent / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(module: str) -> set[str]:
    """The top-level packages that a module imports."""
    return {name.partition(".")[0] for name in imports(module)}


def test_modules_are_found() -> None:
    """The files are where this test looks for them, and each belongs to a layer."""
    assert "handoff/core/old" in MODULES
    assert {layer_of(module) for module in MODULES} <= set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_ours(module: str) -> None:
    """A module imports nothing of ours above its own layer."""
    ours = {name.split(".")[1] for name in imports(module) if name.startswith("handoff.")}

    assert ours <= LAYERS[layer_of(module)]


@pytest.mark.parametrize("module", [module for module in MODULES if layer_of(module) == "core"])
def test_core_does_no_io(module: str) -> None:
    """Core imports nothing by which it could look at the world."""
    assert not tops(module) & OUT_OF_CORE


@pytest.mark.parametrize("module", MODULES)
def test_netlink_is_in_one_place(module: str) -> None:
    """Only sock_diag imports pyroute2."""
    assert "pyroute2" not in tops(module) or module == "handoff/linux/sock_diag"


@pytest.mark.parametrize("module", MODULES)
def test_click_is_in_the_command(module: str) -> None:
    """Only the command line imports click."""
    assert "click" not in tops(module) or layer_of(module) == "cli"


def imported_by(statement: str) -> set[str]:
    """The top-level packages that are loaded in a new interpreter after `statement`."""
    script = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=15
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import handoff", "from handoff import Service", "import handoff.runtime.service"]
)
def test_service_pays_for_nothing_else(statement: str) -> None:
    """A service that imports handoff loads neither the command line, netlink, asyncio nor subprocess."""
    loaded = imported_by(statement)

    assert "handoff" in loaded
    assert not loaded & {"click", "pyroute2", "asyncio", "subprocess"}
