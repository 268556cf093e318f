"""Foreign JSON, read with limits, and the keys of a config, each to be asked for once. What nobody
asked for may change what the model is, so it is not passed over."""

import json
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path
from typing import Any, NoReturn

from clawdemy_infer.paths import Refused, key_name, short

MAX_JSON_BYTES = 64 * 2**20         # of a file; an index of 100,000 tensors has 10 MB
MAX_VALUES = 1_000_000              # in one file, however small each is
MAX_DEPTH = 32                      # of objects and lists in one another
MAX_WHOLE = 2**63                   # above any size, id or count that a file may mean
_MAY_BE_INFINITE = ("time_step_limit",)         # Mamba-2's range, open above, in published files
_MAY_BE_VAST = ("model_max_length",)            # of a tokenizer: 10^30 is how files say "no limit"
TEXT = ("text_config", "llm_config", "language_config")
"""Where a file that describes more than a language model has the language model."""

_REQUIRED = object()


@cache
def tables() -> dict[str, dict]:
    """The page of families, data/families.toml."""
    return tomllib.loads(files("clawdemy_data").joinpath("families.toml").read_text("utf-8"))


def read_bytes(path: Path, limit: int) -> bytes:
    """What the regular file `path` of at most `limit` bytes holds, else Refused; FileNotFoundError
    where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: {path.name} is missing")
    if not path.is_file():
        raise Refused(path, None, why="a regular file is accepted, no folder, pipe or device")
    if path.stat().st_size > limit:
        raise Refused(path, None, why=f"more than {limit:,} bytes")
    return path.read_bytes()


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, as `read_bytes` takes it. A key may stand twice if both say the
    same."""
    data = read_bytes(path, limit)
    if sum(data.count(mark) for mark in b",[{") > MAX_VALUES:
        raise Refused(path, None, why=f"more than {MAX_VALUES:,} values")
    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_agreeing)
    except RecursionError:
        raise Refused(path, None, why=f"more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise Refused(path, None, why=f"not valid JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise Refused(path, None, accepted="a JSON object", why=short(found))
    check_values(found, str(path))
    return found


def _agreeing(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{short(key)} stands twice, with values that differ")
        found[key] = value
    return found


def check_values(value: Any, source: str, key: str = "", depth: int = 0) -> None:
    """Refuses numbers that are not finite or beyond `MAX_WHOLE`, and more than `MAX_DEPTH` levels.
    """
    if isinstance(value, dict | list | tuple):
        if depth >= MAX_DEPTH:
            raise Refused(source, key, why=f"is more than {MAX_DEPTH} levels deep")
        for inner in value.items() if isinstance(value, dict) else ((key, one) for one in value):
            check_values(inner[1], source, inner[0] or "''", depth + 1)
    elif isinstance(value, float):
        if not isfinite(value) and not (value == inf and key in _MAY_BE_INFINITE):
            raise Refused(source, key, value, "a finite number")
    elif isinstance(value, int) and abs(value) >= MAX_WHOLE and key not in _MAY_BE_VAST:
        raise Refused(source, key, why="is beyond 2^63, more than any size")


def above_0(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < inf


def is_text(value: object) -> bool:
    return isinstance(value, str)


_KINDS = {"positive": (above_0, "a number above 0"), "text": (is_text, "a text"),
          "number": (lambda value: type(value) in (int, float), "a number"),
          "flag": (lambda value: type(value) is bool, "true, false"),
          "object": (lambda value: isinstance(value, dict), "an object"),
          "any": (lambda value: True, "")}
"""How the page of families groups the keys that cost nothing."""


class Keys:
    """The keys of a config that nobody has asked for yet. A null counts as absent, as Hugging Face
    means it. Everything raises Refused.

    >>> keys = Keys({"n_head": 12, "bias": None}, "config.json")
    >>> keys.whole("n_head"), keys.take("bias", False), keys.left
    (12, False, {})
    """

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.left, self.source, self.said = dict(config), source, {}

    def refuse(self, key: str, value: object, accepted: str) -> NoReturn:
        raise Refused(self.source, self.said.get(key, key), value, accepted)

    def name(self, key: str) -> str:
        """What the file calls it."""
        return key_name(self.said.get(key, key))

    def rename(self, key: str, usual: str) -> None:
        """Another name for a usual key; if both are there, they agree."""
        value = self.take(key, None)
        if value is not None:
            if (other := self.left.get(usual)) not in (None, value):
                self.refuse(key, value, f"what {self.name(usual)} says: {short(other)}")
            self.left[usual], self.said[usual] = value, key

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.left.pop(key, None)
        if value is None and default is _REQUIRED:
            raise Refused(self.source, self.said.get(key, key))
        return default if value is None else value

    def such(self, key: str, fits: Callable[[Any], bool], accepted: str,
             default: Any = _REQUIRED) -> Any:
        """A value that `fits`, which `accepted` says in words."""
        value = self.take(key, default)
        if not fits(value):
            self.refuse(key, value, accepted)
        return value

    def whole(self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**24) -> int:
        """A whole number of that range; absent is an error where `default` is None or not given."""
        return self.such(key, lambda value: type(value) is int and least <= value <= most,
                         f"a whole number, {least} to {most:,}",
                         _REQUIRED if default is None else default)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return float(self.such(key, *_KINDS["positive"], default))

    def flag(self, key: str, default: bool) -> bool:
        """True or false, in JSON's own words: "false" is neither."""
        return self.such(key, *_KINDS["flag"], default)

    def text(self, key: str) -> str | None:
        return self.such(key, lambda value: isinstance(value, str | None), "a text", None)

    def one_of(self, key: str, known: Iterable[str], default: Any = None, instead: str = "") -> str:
        return str(self.such(key, lambda value: str(value) in known, ", ".join(known) + instead,
                             default))

    def only(self, **accepted: Any) -> None:
        """Keys that have one accepted value, which is also what their absence means."""
        for key, value in accepted.items():
            if (found := self.take(key, value)) != value:
                self.refuse(key, found, repr(value))

    def listed(self, key: str, fits: Callable[[Any], bool], accepted: str,
               default: Any = _REQUIRED, least: int = 0, most: int = MAX_VALUES) -> list:
        """A list of `least` to `most` values that all `fits`."""
        found = self.such(key, lambda value: isinstance(value, list | tuple)
                          and least <= len(value) <= most, accepted, default)
        for one in found:
            if not fits(one):
                self.refuse(key, one, accepted)
        return list(found)

    def one_each(self, key: str, L: int, words: tuple[str, ...]) -> list[str]:
        """A list of one of `words` for each layer, or none."""
        accepted = f"one for each of the {L} layers, of {', '.join(map(str, words))}"
        found = self.listed(key, words.__contains__, accepted, [])
        if len(found) not in (0, L):
            self.refuse(key, found, accepted)
        return found

    def indices(self, key: str, L: int) -> set[int]:
        """Which of L layers a list names."""
        return set(self.listed(key, lambda one: type(one) is int and 0 <= one < L,
                               f"a list of whole numbers, 0 to {L - 1}", []))

    def words(self, key: str) -> list[str]:
        return self.listed(key, is_text, "a list of names", [])

    def settle(self, own: Iterable[str], why: str) -> None:
        """Take what changes no cost, here or in any family, if it is of the kind that it should be.
        What nobody asked for is refused, unless it says "none"."""
        for key in own:
            self.drop(*tables()["_groups"].get(key, key).split())
        for kind, (fits, accepted) in _KINDS.items():
            for key in tables()["_harmless"][kind].split():
                value = self.take(key, None)
                if value is not None and not fits(value):
                    self.refuse(key, value, accepted)
        self.end(why, none=(None, False, 0, "", [], {}, ()))

    def end(self, why: str, none: tuple = (None,)) -> None:
        """Refuse what is left, but for values that say `none`."""
        for key, value in self.left.items():
            if value not in none:
                self.refuse(key, value, why)

    def inner(self, key: str) -> "Keys":
        return Keys(self.such(key, *_KINDS["object"], {}), f"{self.source}: {key}")

    def drop(self, *keys: str) -> None:
        """Keys that change nothing here, whatever they say."""
        for key in keys:
            self.left.pop(key, None)
