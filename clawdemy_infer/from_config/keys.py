"""Foreign JSON, read with limits, and the keys of a config, each to be asked for once. What nobody
asked for may change what the model is, so it is not passed over."""

import json
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from math import inf, isfinite
from pathlib import Path
from typing import Any, NoReturn

from clawdemy_infer.refused import Refused, name, short

MAX_JSON_BYTES = 64 * 2**20         # of a file; an index of 100,000 tensors has 10 MB
MAX_VALUES = 1_000_000              # in one file, however small each is
MAX_DEPTH = 32                      # of objects and lists in one another
MAX_WHOLE = 2**63                   # above any size, id or count that a file may mean
_MAY_BE_INFINITE = ("time_step_limit",)         # Mamba-2's range, open above, in published files
_MAY_BE_VAST = ("model_max_length",)            # of a tokenizer: 10^30 is how files say "no limit"
TEXT = ("text_config", "llm_config", "language_config")
"""Where a file that describes more than a language model has the language model."""

_REQUIRED = object()
_KINDS = {"positive": ((int, float), "a number above 0"), "number": ((int, float), "a number"),
          "flag": ((bool,), "true, false"), "text": ((str,), "a text"),
          "object": ((dict,), "an object"), "any": ((object, bool), "")}
"""How the page of families groups the keys that cost nothing."""


@cache
def tables() -> dict[str, dict]:
    """The page of families, data/families.toml."""
    return tomllib.loads(files("clawdemy_data").joinpath("families.toml").read_text("utf-8"))


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in the regular file `path` of at most `limit` bytes. A key may stand twice if
    both say the same. ValueError in one line naming the path, for anything else; FileNotFoundError
    where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: {path.name} is missing")
    if not path.is_file():
        raise ValueError(f"{path}: a regular file is accepted, no folder, pipe or device")
    if path.stat().st_size > limit:
        raise ValueError(f"{path}: more than {limit:,} bytes, the limit for JSON")
    data = path.read_bytes()
    if sum(data.count(mark) for mark in b",[{") > MAX_VALUES:
        raise ValueError(f"{path}: more than {MAX_VALUES:,} values, the limit for JSON")
    try:
        found = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_agreeing)
    except RecursionError:
        raise ValueError(f"{path}: more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {short(found)}; accepted: a JSON object")
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
    """ValueError naming source and key for numbers that are not finite or beyond `MAX_WHOLE`, and
    for more than `MAX_DEPTH` levels."""
    if isinstance(value, dict | list | tuple):
        if depth >= MAX_DEPTH:
            raise ValueError(f"{source}: {name(key)} is more than {MAX_DEPTH} levels deep")
        for inner in value.items() if isinstance(value, dict) else ((key, one) for one in value):
            check_values(inner[1], source, inner[0], depth + 1)
    elif isinstance(value, float):
        if not isfinite(value) and not (value == inf and key in _MAY_BE_INFINITE):
            raise ValueError(f"{source}: {name(key)}={value}; accepted: a finite number")
    elif isinstance(value, int) and abs(value) >= MAX_WHOLE and key not in _MAY_BE_VAST:
        raise ValueError(f"{source}: {name(key)} is beyond 2^63, more than any size")


class Keys:
    """The keys of a config that nobody has asked for yet. A null counts as absent, as Hugging Face
    means it. Everything raises ValueError naming `source`, the key, its value and what is accepted.

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
        return name(self.said.get(key, key))

    def rename(self, key: str, usual: str) -> None:
        """Another name for a usual key; if both are there, they agree."""
        value = self.take(key, None)
        if value is not None:
            if self.left.get(usual, value) != value:
                self.refuse(key, value, f"what {self.name(usual)} says: {short(self.left[usual])}")
            self.left[usual], self.said[usual] = value, key

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.left.pop(key, None)
        if value is None and default is _REQUIRED:
            raise Refused(self.source, self.said.get(key, key))
        return default if value is None else value

    def whole(self, key: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**24) -> int:
        """A whole number of that range; absent is an error where `default` is None or not given."""
        value = self.take(key, _REQUIRED if default is None else default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, value, f"a whole number, {least} to {most:,}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < inf:
            self.refuse(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, in JSON's own words: "false" is neither."""
        if type(value := self.take(key, default)) is not bool:
            self.refuse(key, value, "true, false")
        return value

    def only(self, **accepted: Any) -> None:
        """Keys that have one accepted value, which is also what their absence means."""
        for key, value in accepted.items():
            if (found := self.take(key, value)) != value:
                self.refuse(key, found, repr(value))

    def one_each(self, key: str, L: int, words: tuple[str, ...]) -> list[str]:
        """A list of one of `words` for each layer, or none."""
        found = self.take(key, [])
        if not isinstance(found, list | tuple) or len(found) not in (0, L):
            self.refuse(key, found, f"one for each of the {L} layers")
        for word in found:
            if word not in words:
                self.refuse(key, word, ", ".join(words))
        return list(found)

    def indices(self, key: str, L: int) -> set[int]:
        """Which of L layers a list names."""
        found = self.take(key, [])
        if not isinstance(found, list | tuple) or not all(
                type(one) is int and 0 <= one < L for one in found):
            self.refuse(key, found, f"a list of whole numbers, 0 to {L - 1}")
        return set(found)

    def words(self, key: str) -> list[str]:
        found = self.take(key, [])
        if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
            self.refuse(key, found, "a list of names")
        return list(found)

    def settle(self, own: Iterable[str], why: str) -> None:
        """Take what changes no cost, here or in any family, if it is of the kind that it should be.
        What nobody asked for is refused, unless it says "none"."""
        for key in own:
            self.drop(*tables()["_groups"].get(key, key).split())
        for kind, (types, accepted) in _KINDS.items():
            for key in tables()["_harmless"][kind].split():
                value = self.take(key, None)
                if value is not None and (not isinstance(value, types) or (
                        bool not in types and isinstance(value, bool))
                        or kind == "positive" and value <= 0):
                    self.refuse(key, value, accepted)
        for key, value in self.left.items():
            if value not in (None, False, 0, "", [], {}, ()):
                self.refuse(key, value, why)

    def inner(self, key: str) -> "Keys":
        found = self.take(key, {})
        if not isinstance(found, dict):
            self.refuse(key, found, "an object")
        return Keys(found, f"{self.source}: {key}")

    def drop(self, *keys: str) -> None:
        """Keys that change nothing here, whatever they say."""
        for key in keys:
            self.left.pop(key, None)
