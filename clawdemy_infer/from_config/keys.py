"""The keys of a config.json, each to be asked for once. What nobody asked for may change what the
model is, so it is not passed over."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

_REQUIRED = object()


class Keys:
    """The keys of a config that nobody has asked for yet. A null counts as absent, as Hugging Face
    means it. Everything raises ValueError naming `source`, the key, its value and what is accepted.

    >>> keys = Keys({"n_head": 12, "bias": None}, "config.json")
    >>> keys.whole("n_head"), keys.take("bias", False), keys.left
    (12, False, {})
    """

    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.left, self.source = dict(config), source

    def refuse(self, key: str, value: object, accepted: str) -> NoReturn:
        raise ValueError(
            f"{self.source}: {key}={repr(value)[:200]} is not supported; accepted: {accepted}")

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.left.pop(key, None)
        if value is None and default is _REQUIRED:
            raise ValueError(f"{self.source}: {key} is missing")
        return default if value is None else value

    def whole(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number, 1 or more; absent is an error where `default` is None or not given."""
        value = self.take(key, _REQUIRED if default is None else default)
        if type(value) is not int or value < 1:
            self.refuse(key, value, "a whole number, 1 or more")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or value <= 0:
            self.refuse(key, value, "a number above 0")
        return float(value)

    def only(self, **accepted: Any) -> None:
        """Keys that have one accepted value, which is also what their absence means."""
        for key, value in accepted.items():
            if (found := self.take(key, value)) != value:
                self.refuse(key, found, repr(value))

    def drop(self, *keys: str) -> None:
        """Keys that change nothing here, whatever they say."""
        for key in keys:
            self.left.pop(key, None)


MAX_JSON_BYTES = 64 * 2**20     # of a file; the longest published ones, indices of weights, have 10


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file that others wrote. Raises ValueError naming the file: no regular
    one, longer than MAX_JSON_BYTES, no JSON, a number that is not finite, or no object on top."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
        found = json.loads(path.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError:
        raise ValueError(f"{path}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {type(found).__name__} on top; a JSON object is accepted")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text} is not finite")
    return number
