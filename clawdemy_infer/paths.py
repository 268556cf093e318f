"""Where the package keeps what it would be slow to make again, how a file is written whole, how one
is read that may be damaged, and the error of an input that is not accepted."""

import glob
import json
import os
import shutil
import threading
import warnings
from pathlib import Path
from textwrap import shorten

KEPT_BYTES = 2**28
"""The largest file of our own that is read."""


def cache_dir() -> Path:
    """The user's cache directory for this package. The caller creates it when there is something
    to keep.

    `CLAWDEMY_CACHE` names it outright; else it is `clawdemy-infer` under `XDG_CACHE_HOME`, or under
    `~/.cache` (XDG Base Directory Specification 0.8). An empty variable counts as unset. Raises
    OSError where there is no home."""
    own, caches = os.environ.get("CLAWDEMY_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own or f"{caches}/clawdemy-infer").expanduser()
    except RuntimeError as error:
        raise OSError(f"there is no home directory to keep files in ({error}); CLAWDEMY_CACHE "
                      "names a folder") from error


def unfinished(path: Path) -> Path:
    """Where to write what one rename makes `path`; its folder is made if need be. What a process
    that was killed has left behind is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        try:
            os.getpgid(int(left.suffixes[-2][1:]))                  # does it run?
        except (ValueError, OverflowError, ProcessLookupError):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(True)
    return path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.partial")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all; its folder is made if need be.

    Who reads `path` never meets half a file, and a failure leaves the old file and nothing else."""
    partial = unfinished(path)
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_kept(path: Path, shape: object) -> object:
    """The JSON that an earlier run left in `path`; None where there is none. A file that is torn,
    no JSON, or not `alike` to `shape` counts as absent, and a warning names it."""
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_file() or path.stat().st_size > KEPT_BYTES:
            raise ValueError(f"a file of up to {KEPT_BYTES:,} bytes is accepted")
        found = json.loads(path.read_bytes())
        json.dumps(found, allow_nan=False)                          # or its ValueError
        if alike(found, shape):
            return found
        why = "it has another shape"
    except (OSError, ValueError, RecursionError) as error:
        why = shorten(str(error), 200)
    warnings.warn(f"{path} is damaged and counts as absent until it is written again: {why}",
                  stacklevel=2)
    return None


def alike(value: object, shape: object) -> bool:
    """Has JSON's `value` that `shape`? A type is that of a value, a text itself, a number the lower
    bound of one, a tuple has alternatives. `[x]` is a list of `x`, and `[x, ...]` is not empty; a
    dict has at least these keys, `?` at the end says that one may be absent, `""` is any other."""
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, tuple):
        return any(alike(value, each) for each in shape)
    if isinstance(shape, list):
        return (isinstance(value, list | tuple) and len(value) >= len(shape) - 1
                and all(alike(each, shape[0]) for each in value))
    if isinstance(shape, dict):
        known = {name.removesuffix("?"): each for name, each in shape.items()}
        return (isinstance(value, dict) and all(name in value or name[-1:] in "?" for name in shape)
                and all(alike(each, known.get(name or None, known.get("", object)))
                        for name, each in value.items()))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value == shape if isinstance(shape, str) else number and shape <= value < 1e30


SHOWN_CHARACTERS = 200
"""The longest value that an error shows whole."""


def short(value: object) -> str:
    """`repr(value)`, cut where it is longer than an error shows."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def key_name(key: object) -> str:
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
        key = "" if self.key is None else f"{key_name(self.key)} "
        shown = key if self.value is ... else f"{key[:-1]}={short(self.value)} "
        return where + shown + self.why + (f"; accepted: {self.accepted}" if self.accepted else "")
