"""The error of an input that is not accepted. One line says where it stands, what it is and what
would be accepted; the same four are fields."""

SHOWN_CHARACTERS = 200
"""The longest value that an error shows whole."""


def short(value: object) -> str:
    """`repr(value)`, cut where it is longer than an error shows."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def name(key: object) -> str:
    """A key as an error shows it: bare where it is a plain word."""
    plain = isinstance(key, str) and key.isprintable() and 0 < len(key) < 100
    return key if plain else short(key)


class Refused(ValueError):
    """`source` (a file, an address, an option) says `value` for `key`, which is not `accepted`.
    A value of `...` means that there is none to show: `why` says what is the matter instead. A key
    of None means the whole file.

    >>> str(Refused("config.json", "num_hidden_layers", -3, "a whole number, 1 to 10,000"))
    'config.json: num_hidden_layers=-3 is not supported; accepted: a whole number, 1 to 10,000'
    >>> str(Refused("config.json", "vocab_size"))
    'config.json: vocab_size is missing'
    >>> str(Refused("m.gguf", None, why="ends too early"))
    'm.gguf: ends too early'
    """

    def __init__(self, source: object, key: object, value: object = ..., accepted: str = "",
                 why: str = "is missing") -> None:
        super().__init__(source, key, value, accepted, why)
        self.source, self.key, self.value, self.accepted = source, key, value, accepted
        self.why = why if value is ... else "is not supported"

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        key = "" if self.key is None else f"{name(self.key)} "
        shown = key if self.value is ... else f"{key[:-1]}={short(self.value)} "
        return where + shown + self.why + (f"; accepted: {self.accepted}" if self.accepted else "")
