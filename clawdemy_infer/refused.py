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
    A value of `...` means that the key is missing.

    >>> str(Refused("config.json", "num_hidden_layers", -3, "a whole number, 1 to 10,000"))
    'config.json: num_hidden_layers=-3 is not supported; accepted: a whole number, 1 to 10,000'
    >>> str(Refused("config.json", "vocab_size"))
    'config.json: vocab_size is missing'
    """

    def __init__(self, source: object, key: object, value: object = ...,
                 accepted: str = "") -> None:
        super().__init__(source, key, value, accepted)
        self.source, self.key, self.value, self.accepted = source, key, value, accepted

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        what = " is missing" if self.value is ... else f"={short(self.value)} is not supported"
        return where + name(self.key) + what + (f"; accepted: {self.accepted}"
                                                if self.accepted else "")
