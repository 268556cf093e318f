"""Where the package keeps what it would be slow to make again, and how a file is written whole."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory for this package. The caller creates it when there is something
    to keep.

    `CLAWDEMY_CACHE` names it outright; else it is `clawdemy-infer` under `XDG_CACHE_HOME`, or under
    `~/.cache` (XDG Base Directory Specification 0.8). An empty variable counts as unset.
    """
    if own := os.environ.get("CLAWDEMY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clawdemy-infer"


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all; its folder is made if need be.

    Who reads `path` never meets half a file, and a failure leaves the old file and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
