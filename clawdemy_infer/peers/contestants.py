"""Who takes part: each engine, the formats it has for a number of bits, and the Python that can import it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from clawdemy_infer.model.converted import converted
from clawdemy_infer.model.load import PACKAGED, packaged_file

ENVIRONMENTS = Path(__file__).parents[2] / ".peers"
"""Where `make peers` puts a virtual environment for each engine that needs its own."""

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
"""Our formats by the bits of a weight, which say what they are compared with."""

FORMATS = {
    "transformers": {32: ["fp32"], 16: ["bf16"]},
    "llama.cpp": {32: ["F32"], 16: ["F16"], 8: ["Q8_0"], 4: ["Q4_1"]},
    "vllm": {32: ["fp32"], 16: ["bf16"]},
}
"""The formats of each peer by bits. Q4_1, 4 bits with a scale and a minimum for 32 weights, is how the packaged model is stored."""

TARGETS = {"llama.cpp": "peer-llama", "vllm": "peer-vllm"}
"""The make target that sets a peer up. `transformers` is there already: the project depends on it."""


@dataclass(frozen=True)
class Contestant:
    """One engine in one format."""

    engine: str
    weights: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.engine} {self.weights}"

    @property
    def command(self) -> list[str]:
        """What starts its worker, without the settings."""
        return [str(python(self.engine)), str(Path(__file__).with_name(f"serve_{self.engine.replace('.', '_')}.py"))]


def python(engine: str) -> Path:
    """The interpreter of the environment that an engine lives in."""
    return ENVIRONMENTS / engine / "bin" / "python" if engine in TARGETS else Path(sys.executable)


def weights_of(model: str) -> tuple[Path, Path | None]:
    """The same weights twice: a Hugging Face directory, and the GGUF file that it was made from, if it was."""
    path = Path(model).expanduser()
    if model in PACKAGED:
        package, file, digest = PACKAGED[model]
        path = packaged_file(package, file)
        return converted(path, digest), path
    if path.suffix == ".gguf" and path.is_file():
        return converted(path), path
    if path.is_dir():
        return path, None
    raise ValueError(f"model={model!r}: beside peers, accepted are {', '.join(PACKAGED)}, and the path of a GGUF file or of a "
                     "Hugging Face directory")


def contestants(weights: list[str], peers: list[str], gguf: Path | None) -> tuple[list[Contestant], list[str]]:
    """Ours in each of `weights`, then the peers in their formats of as many bits; and a sentence for each peer that takes no part."""
    bits = dict.fromkeys(BITS[name] for name in weights)
    found, missing = [Contestant("ours", name, BITS[name]) for name in weights], []
    for peer in peers:
        if peer == "llama.cpp" and gguf is None:
            missing.append("llama.cpp reads GGUF files only, and this model is not one, so it takes no part.")
        elif python(peer).exists():
            found += [Contestant(peer, name, width) for width in bits for name in FORMATS[peer].get(width, [])]
        else:
            missing.append(f"{peer} is not set up, so it takes no part: `make {TARGETS[peer]}` in the checkout does that.")
    return found, missing
