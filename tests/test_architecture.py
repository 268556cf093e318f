"""The house rules that a reader relies on: who may import whom, how long a file may be, what is never written."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "clawdemy_infer"
EVERYTHING = None

# In reading order: a room may import itself and the rooms named beside it, all of them above it.
MAY_IMPORT = {
    "paths": [],
    "arithmetic": [],
    "roofline": ["arithmetic"],
    "from_config": ["arithmetic"],
    "catalog": ["arithmetic", "roofline"],
    "parallel": ["arithmetic", "roofline"],
    "napkin": ["arithmetic", "roofline", "parallel"],
    "timing": [],
    "backends": [],
    "attention": ["roofline"],
    "cpp": ["paths"],
    "linear": ["paths", "timing", "backends", "cpp"],
    "kv_cache": ["backends", "attention", "cpp"],
    "probes": ["roofline", "timing", "backends", "linear"],
    "probes_attention": ["roofline", "timing", "attention", "kv_cache", "linear"],
    "calibrate": ["paths", "arithmetic", "roofline", "catalog", "timing", "cpp", "linear", "probes", "probes_attention"],
    "ledger": ["paths"],
    "tables": ["ledger"],
    "published": ["arithmetic", "roofline", "catalog", "parallel", "tables"],
    "paper": ["arithmetic", "roofline", "tables"],
    "model": ["paths", "arithmetic", "from_config", "timing", "attention", "backends", "cpp", "kv_cache", "linear"],
    "batching": ["arithmetic", "roofline", "parallel", "timing", "calibrate", "kv_cache", "model"],
    "bench": ["arithmetic", "roofline", "catalog", "timing", "probes", "calibrate", "linear", "kv_cache", "model"],
    "bench_kernels": ["arithmetic", "roofline", "tables"],
    "breakdown": ["arithmetic", "roofline", "timing", "linear", "kv_cache", "model", "bench"],
    "quantization": ["arithmetic", "roofline", "timing", "calibrate", "tables", "kv_cache", "linear", "model", "bench"],
    "speculative": ["arithmetic", "roofline", "timing", "backends", "linear", "probes", "kv_cache", "model", "batching", "quantization"],
    "peers": ["arithmetic", "roofline", "tables", "timing", "kv_cache", "model", "batching"],
    "lesson": EVERYTHING,
    "plots": EVERYTHING,
    "widgets": EVERYTHING,
    "course": EVERYTHING,
    "doctor": EVERYTHING,
    "commands": EVERYTHING,
    "commands_bench": EVERYTHING,
    "commands_kernels": EVERYTHING,
    "commands_published": EVERYTHING,
    "commands_quantize": EVERYTHING,
    "commands_replay": EVERYTHING,
    "commands_drafts": EVERYTHING,
    "commands_peers": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
}

MODULES = sorted(PACKAGE.rglob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path):
    """All modules that a file imports, anywhere in it: `clawdemy_infer.ledger`, also when it says `from clawdemy_infer import ledger`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: imports are written in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "clawdemy_infer" else [node.module]


def test_the_table_points_upwards():
    rooms = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        assert all(rooms.index(other) < rooms.index(room) for other in allowed or [])


@each_module
def test_a_room_imports_only_the_rooms_above_it(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"put {room} into MAY_IMPORT, in reading order"
    used = {name.split(".")[1] for name in imports(path) if name.startswith("clawdemy_infer.")} - {room, "__version__"}
    allowed = set(MAY_IMPORT) if MAY_IMPORT[room] is EVERYTHING else set(MAY_IMPORT[room])
    assert used <= allowed, f"{path.name} may not import {sorted(used - allowed)}"


@pytest.mark.parametrize("room", ["paths", "arithmetic", "roofline"])
def test_the_envelope_needs_nothing_but_the_standard_library(room):
    paths = [path for path in MODULES if room_of(path) == room]
    others = {name.split(".")[0] for path in paths for name in imports(path)} - {"clawdemy_infer"}
    assert others <= sys.stdlib_module_names


@each_module
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 250


@pytest.mark.parametrize("path", [*MODULES, *sorted((REPOSITORY / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_no_failure_is_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"{path.name}, line {node.lineno}: says what it catches"


# What would tie the text to the machine that it was written on, or to how it came about.
FORBIDDEN = re.compile(
    r"/work/|/root/|/tmp/exp|\.pyenv|/opt/|pypi\.org|pythonhosted|artifactory|ANCHORS|FINDINGS|DESIGN\.md"
    r"|\bissue #?\d|\bchatgpt\b|\bclaude\b|\banthropic\b|\bcopilot\b|\bAI[- ](generated|assist|written)|language model wrote",
    re.IGNORECASE,
)
TEXTS = [
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/run", "clawdemy_infer/**/*.py", "data/*.*", "notebooks/**/*.py")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.suffix != ".safetensors"
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_text_speaks_of_the_project_alone(path):
    found = [(number, hit[0]) for number, line in enumerate(path.read_text().splitlines(), 1) if (hit := FORBIDDEN.search(line))]
    assert not found


# -- packaging --------------------------------------------------------------------------------------------------------------------

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_folder_of_the_library_is_packaged():
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders | {"clawdemy_data", "clawdemy_kernels"}


def test_every_data_file_is_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["clawdemy_data"]
    left_out = [path.name for path in (REPOSITORY / "data").glob("*.*") if not any(path.match(one) for one in ["*.py", *patterns])]
    assert left_out == []


@pytest.mark.parametrize("folder", [REPOSITORY, REPOSITORY / "notebooks", Path("/")], ids=["root", "notebooks", "elsewhere"])
def test_the_data_is_found_from_any_working_directory(folder):
    script = "from importlib.resources import files; print(len((files('clawdemy_data') / 'machines.toml').read_text()))"
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len((files("clawdemy_data") / "machines.toml").read_text())


def test_every_dependency_of_the_project_is_pinned():
    wanted = PYPROJECT["project"]["dependencies"] + PYPROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in wanted}
    pinned = {line.split("==")[0].lower() for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pinned
