"""Where the package keeps what it would be slow to make again: converted models, this machine's calibration."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache directory for this package. The caller creates it when there is something to keep.

    `CLAWDEMY_CACHE` names it outright; else it is `clawdemy-infer` under `XDG_CACHE_HOME`, or under `~/.cache`
    (XDG Base Directory Specification 0.8). An empty variable counts as unset.
    """
    if own := os.environ.get("CLAWDEMY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clawdemy-infer"
