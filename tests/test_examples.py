"""The worked examples in docstrings run as they stand."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = {"clawdemy_infer": "clawdemy_infer", "clawdemy_course": "notebooks/course"}
WITH_EXAMPLES = [".".join([package, *path.relative_to(REPOSITORY / folder).with_suffix("").parts])
                 for package, folder in FOLDERS.items()
                 for path in sorted((REPOSITORY / folder).rglob("*.py"))
                 if ">>> " in path.read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_give_what_they_say(name):
    failed, tried = doctest.testmod(import_module(name))
    assert tried and not failed
