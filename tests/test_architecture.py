"""The structure that DESIGN promises: imports point down only, and what decides is pure."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AGENT = ROOT / "agent"

LAYERS = [
    {"__init__"},
    {"errors", "messages", "topics", "clock", "histogram", "usage", "memory", "streams"},
    {"boot"},
    {"pictures"},
    {"payloads"},
    {"settings"},
    {"places"},
    {"wire"},
    {"policy"},
    {"redaction"},
    {"pipeline"},
    {"alarm"},
    {"board", "mqtt", "store"},
    {"intake", "uplink"},
    {"trust"},
    {"systemd", "journal", "status", "metrics", "assembly"},
    {"beacon"},
    {"wiring", "vitals", "accepted"},
    {"reload"},
    {"commands", "daemon", "doctor", "first_day"},
    {"explain"},
    {"__main__"},
]
"""From the lowest to the highest: a package or module imports only from below, or from its own package."""

PURE = {
    "errors",
    "messages",
    "topics",
    "clock",
    "histogram",
    "usage",
    "pictures",
    "payloads",
    "settings",
    "places",
    "wire",
    "policy",
    "pipeline",
}
READS_FILES = {"agent.settings.config"}  # by its contract: the one module that reads the configuration files
IMPURE = {
    "asyncio",
    "logging",
    "onnxruntime",
    "os",
    "paho",
    "random",
    "secrets",
    "select",
    "signal",
    "socket",
    "sqlite3",
    "subprocess",
    "threading",
    "time",
    "uuid",
}


def modules():
    for path in sorted(AGENT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)
        yield name, ast.parse(path.read_text())


MODULES = dict(modules())


def imports(tree):
    """Every module that is imported, also inside functions; `from agent import x` counts as agent.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def place(name):
    """The part of agent/ that a module belongs to: its package, or itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer(name):
    found = [number for number, members in enumerate(LAYERS) if place(name) in members]
    assert len(found) == 1, f"{name} belongs to no layer; say in LAYERS where it stands"
    return found[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down_only(name):
    for other in imports(MODULES[name]):
        if other.split(".")[0] != "agent" or other == "agent":
            continue
        assert place(other) == place(name) or layer(other) < layer(name), f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {other for other in imports(tree) if other in MODULES} - {name} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"circle: {exc.args[1]}")


@pytest.mark.parametrize("name", sorted(name for name in MODULES if place(name) in PURE and name not in READS_FILES))
def test_what_decides_reads_no_clock_no_disk_no_socket_and_no_logger(name):
    used = {other.split(".")[0] for other in imports(MODULES[name])}
    assert not used & IMPURE, f"{name} imports {sorted(used & IMPURE)}"


def test_the_agent_does_not_import_its_tools():
    for name, tree in MODULES.items():
        assert not any(other.split(".")[0] in {"tools", "tests"} for other in imports(tree)), name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_keep_to_their_room(name):
    lines = MODULES[name].body[-1].end_lineno if MODULES[name].body else 0
    assert lines <= 350, f"{name} has {lines} lines: redesign it rather than squeeze"


def test_top_level_is_the_promised_one():
    promised = {"agent", "models", "tests", "systemd", "tools", "pyproject.toml", "README.md", "LICENSE"}
    promised |= {"CHANGELOG.md", "NOTICE"}
    made_by_running = {"build", "dist", "out", "runs", "PKG-INFO"}  # the last one by unpacking an sdist
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - made_by_running == promised
