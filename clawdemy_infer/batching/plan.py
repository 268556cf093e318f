"""A step before it is run and after: the plan that a scheduler makes, and what each sequence gets of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from clawdemy_infer.batching.request import Sequence


class Rectangle(NamedTuple):
    """A padded step: all of `rows` are computed, `T` tokens each over a context of `S`, whoever of them is still alive."""

    rows: list[Sequence]
    T: int
    S: int


class Plan(NamedTuple):
    """One step: how many tokens each sequence brings, those that decode first. `rectangle` where it is padded.

    `steady`: nobody has come or gone, and all bring one token and get one. The next step will then be decided in the same way.
    `guesses`: for how many drafted tokens beyond its own a decoding sequence has room.
    """

    new: dict[Sequence, int]
    rectangle: Rectangle | None = None
    steady: bool = False
    guesses: Mapping[Sequence, int] = {}


class Emission(NamedTuple):
    """What a sequence got: token ids (None where nobody needs them), why it ends with the last of them, or "", and their text.

    Of a step with `drafted` tokens it may get a `run` of several: those that stood, and one of the model's own.
    """

    ids: list[int] | None = None
    reason: str = ""
    text: str = ""
    run: int = 1
    drafted: int = 0
