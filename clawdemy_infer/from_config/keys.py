"""The keys of a config.json, each to be asked for once. What nobody asked for may change what the
model is, so it is not passed over."""

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
