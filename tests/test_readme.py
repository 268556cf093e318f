"""The pages for readers keep to what there is: their Python runs, their paths exist, their minutes
follow from the files."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "clawdemy_infer"
README = (REPOSITORY / "README.md").read_text("utf-8")
LIFE = (PACKAGE / "README.md").read_text("utf-8")
RESULTS = (REPOSITORY / "notebooks" / "RESULTS.md").read_text("utf-8")
CORE = ["arithmetic", "envelope", "attention.py", "kv_cache", "model", "batching", "quantization",
        "speculative"]
LINES_A_MINUTE = 25


def lines_of(room: str) -> int:
    path = PACKAGE / room
    files = [path] if path.is_file() else sorted(path.glob("*.py"))
    return sum(len(file.read_text("utf-8").splitlines()) for file in files)


def test_the_readme_is_short():
    assert len(README) <= 10_000


def test_the_python_of_the_readme_runs_as_shown(capsys):
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    cost, *text, rate = capsys.readouterr().out.splitlines()
    assert [float(number) > 0 for number in [*cost.split(), rate]] == [True] * 4
    assert "Paris" in "".join(text)


@pytest.mark.parametrize("page, folder", [(README, REPOSITORY), (LIFE, PACKAGE),
                                          (RESULTS, REPOSITORY / "notebooks")],
                         ids=["README", "clawdemy_infer/README", "notebooks/RESULTS"])
def test_every_link_leads_somewhere(page, folder):
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (folder / target).exists(), target


def test_every_file_that_the_life_of_a_request_names_exists():
    named = re.findall(r"`([\w/]+(?:\.py|/))`", LIFE)
    lost = [name for name in named
            if not (PACKAGE / name).exists() and not (REPOSITORY / name).exists()]
    assert len(named) > 60 and lost == []


def test_every_name_in_the_life_of_a_request_is_in_the_file_that_is_named_with_it():
    """`Class.method` (`file.py`)."""
    named = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", LIFE)
    assert len(named) >= 15
    for name, file in named:
        defined = {node.name for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8")))
                   if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert set(name.split(".")) <= defined, f"{name} in {file}"


def test_every_room_of_the_library_is_on_the_readme():
    rooms = [path.name + "/" * path.is_dir() for path in PACKAGE.iterdir()
             if not path.name.startswith("__") and path.suffix != ".md"]
    assert [room for room in rooms if f"`{room}`" not in README] == []


def test_the_reading_list_has_every_file_of_the_core():
    files = [path for room in CORE for path in ([PACKAGE / room] if room.endswith(".py") else
                                                sorted((PACKAGE / room).glob("*.py")))]
    names = [str(path.relative_to(PACKAGE)) for path in files if path.name != "__init__.py"]
    assert [name for name in names if f"| `{name}` |" not in LIFE] == []


def test_a_file_of_the_reading_list_imports_none_below_it():
    files = re.findall(r"^\| `([\w/]+)\.py` \|", LIFE, re.MULTILINE)
    modules = [f"from clawdemy_infer.{name.replace('/', '.')} import" for name in files]
    for place, name in enumerate(files, 1):
        text = (PACKAGE / f"{name}.py").read_text("utf-8")
        assert [module for module in modules[place:] if module in text] == [], name


def test_the_minutes_are_those_of_the_lines():
    rooms = re.findall(r"^\| `([\w.]+?)/?` \|.*\| (\d+) \|$", README, re.MULTILINE)
    assert [room for room, _ in rooms] == CORE
    files = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", LIFE, re.MULTILINE)
    for name, minutes in rooms + files:
        expected = lines_of(name) / LINES_A_MINUTE
        assert abs(int(minutes) - expected) <= max(3, 0.25 * expected), (name, minutes, expected)
