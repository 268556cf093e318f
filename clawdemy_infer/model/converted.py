"""A cache of converted models: whole and checked, or made anew.

    <cache_dir>/models/<sha256 of the source>-<format>/    the four files of a Hugging Face directory, and manifest.json

A conversion is written beside its place and moved there in one rename, so a reader sees all of it or nothing. manifest.json
holds the sha256 of each file, and every load compares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from pathlib import Path

from clawdemy_infer.model.gguf import convert_gguf
from clawdemy_infer.paths import cache_dir

FORMAT = 1
"""Raise it when `convert_gguf` writes something else than before: older conversions are then no longer found."""


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def converted(source: Path, expected_sha256: str | None = None) -> Path:
    """The Hugging Face directory of the GGUF file `source`: found in the cache, or converted now.

    A damaged cache entry is made anew, with a warning. Raises ValueError naming the file where `source` is not the file
    of `expected_sha256`, or is not a GGUF that `convert_gguf` takes.
    """
    digest = sha256(source)
    if expected_sha256 not in (None, digest):
        raise ValueError(f"{source}: damaged, or another file than expected (its sha256 is {digest}, not {expected_sha256}); "
                         "install it again")
    place = cache_dir() / "models" / f"{digest[:32]}-{FORMAT}"
    if place.exists():
        if is_whole(place):
            return place
        warnings.warn(f"the converted model in {place} was damaged and is being made anew", stacklevel=2)
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".unfinished-") as scratch:
        fresh = Path(scratch) / place.name
        fresh.mkdir()
        convert_gguf(source, fresh)
        manifest = {file.name: sha256(file) for file in sorted(fresh.iterdir())}
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2), "utf-8")
        try:
            fresh.rename(place)
        except OSError:
            if not is_whole(place):     # unless another process was faster
                raise
    return place


def is_whole(directory: Path) -> bool:
    """Does every file that the manifest names have the content it had when it was written?"""
    try:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        return bool(manifest) and all(sha256(directory / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False
