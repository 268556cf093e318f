"""Who takes part, each engine with its formats by bits and the Python that can import it; and what
all of them are asked to do: decode at a batch and a context, or prefill the same tokens."""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from clawdemy_infer.arithmetic import BYTES
from clawdemy_infer.fast.cpp import isa
from clawdemy_infer.files.load import PACKAGED, weights_on_disk
from clawdemy_infer.rigs.text import prose

ENVIRONMENTS = Path(__file__).parents[2] / ".peers"
"""Where `make peers` puts a virtual environment for each engine that needs its own."""
PEER_FORMATS = {"transformers": {32: ["fp32"], 16: ["bf16"]}, "vllm": {32: ["fp32"], 16: ["bf16"]},
                "llama.cpp": {32: ["F32"], 16: ["F16"], 8: ["Q8_0"], 4: ["Q4_1"]}}
"""The formats of each peer by bits. The packaged model is stored as Q4_1: 4 bits, with a scale and
a minimum for 32 weights."""
TARGETS = {"llama.cpp": "peer-llama", "vllm": "peer-vllm"}
"""Make targets that set peers up; the project depends on `transformers` anyway."""
DEFAULT_WORKLOADS = "decode-1 decode-8 decode-16 decode-32 decode-1@2000 prefill-512".split()
"""Workloads that take a minute each for a few engines."""


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
        script, engine = Path(__file__).with_name("serve.py"), self.engine.replace(".", "_")
        return [str(python(self.engine)), str(script), f"serve_{engine}"]


def python(engine: str) -> Path:
    """The interpreter of the environment that an engine lives in. With CLAWDEMY_ISA, llama.cpp's is
    that of a build for the same instructions."""
    place = ENVIRONMENTS / f"{engine}{narrower(engine)}"
    return place / "bin" / "python" if engine in TARGETS else Path(sys.executable)


def narrower(engine: str) -> str:
    return f"-{isa()}" if engine == "llama.cpp" and isa() else ""


def weights_of(model: str) -> tuple[Path, Path | None]:
    """As `weights_on_disk`, but ValueError for what is neither a packaged model nor a path."""
    directory, gguf = weights_on_disk(model)
    if directory is None:
        raise ValueError(f"model={model!r}: beside peers, accepted are {', '.join(PACKAGED)}, and "
                         "the path of a GGUF file or of a Hugging Face directory")
    return directory, gguf


def contestants(weights: list[str], peers: list[str],
                gguf: Path | None) -> tuple[list[Contestant], list[str]]:
    """Ours in each of `weights`, then the peers in as many bits; and why others take no part."""
    found, missing = [Contestant("ours", name, round(8 * BYTES[name])) for name in weights], []
    wanted = dict.fromkeys(one.bits for one in found)
    for peer in peers:
        if peer == "llama.cpp" and gguf is None:
            missing.append("llama.cpp reads GGUF files only, and this model is not one, so it "
                           "takes no part.")
        elif not python(peer).exists():
            missing.append(f"{peer} is not set up, so it takes no part: `make "
                           f"{TARGETS[peer]}{narrower(peer)}` in the checkout does that.")
        else:
            found += [Contestant(peer, name, bits) for bits in wanted
                      for name in PEER_FORMATS[peer].get(bits, [])]
    return found, missing


@dataclass(frozen=True)
class PeerWorkload:
    """Decode or prefill (`phase`) `batch` prompts of `context` tokens, and generate `new` each."""

    name: str
    phase: str
    batch: int = 1
    context: int = 128
    new: int = 32


def parse(name: str) -> PeerWorkload:
    """`decode-8` (B = 8 at context 128), `decode-1@2000` or `prefill-512`; else ValueError."""
    if found := re.fullmatch(r"decode-([1-9]\d*)(?:@([1-9]\d*))?", name):
        return PeerWorkload(name, "decode", int(found[1]), int(found[2] or 128))
    if found := re.fullmatch(r"prefill-([1-9]\d*)", name):
        return PeerWorkload(name, "prefill", 1, int(found[1]), 1)
    raise ValueError(f"workloads={name!r}: accepted are decode-B, decode-B@S and prefill-S")


def asked(work: PeerWorkload, directory: Path) -> dict:
    """The command for a worker (see `serve`), with consecutive pieces of a text as prompts."""
    ids, S = text(directory), work.context
    starts = [i % max(1, len(ids) // S) * S for i in range(work.batch)]
    return {"prompts": [ids[start:start + S] for start in starts], "new": work.new}


@cache
def text(directory: Path) -> list[int]:
    """Token ids of Python's own help: plain English, so greedy choices are seldom close calls."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return tokenizer.encode(prose("evaluation")[:200_000], add_special_tokens=False).ids
