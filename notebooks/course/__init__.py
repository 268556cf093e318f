"""The content of the lessons that needs Python: their build tasks, exercises and diagrams.

`build_NN.py` has `TASK`, the build task of lesson NN; `exercises_NN.py` has `EXERCISES`, by name;
`diagrams_NN.py` draws with what `drawing` has.
"""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from clawdemy_course.checks import Exercise
from clawdemy_infer.lesson.build import Task


def task(name: str) -> Task:
    """The build task of this name. ValueError where there is none."""
    return _one("build task", name, tasks())


def exercise(name: str) -> Exercise:
    """The exercise of this name. ValueError where there is none."""
    return _one("exercise", name, exercises())


def tasks() -> dict[str, Task]:
    """The build tasks of all lessons, by name."""
    return {module.TASK.name: module.TASK for module in _modules("build_")}


def exercises() -> dict[str, Exercise]:
    """The exercises of all lessons, by name."""
    return {name: each for module in _modules("exercises_")
            for name, each in module.EXERCISES.items()}


def _modules(prefix: str) -> Iterator[ModuleType]:
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        if name.startswith(prefix):
            yield import_module(f"{__name__}.{name}")


def _one(kind: str, name: str, known: dict) -> object:
    if name not in known:
        raise ValueError(f"{kind} {name!r} does not exist; there are "
                         f"{', '.join(map(repr, known)) or 'none'}")
    return known[name]
