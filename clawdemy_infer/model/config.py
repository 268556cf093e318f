"""What a decoder is made of: the shape that sets its cost, and what only its values depend on."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config.decoder import decoder_from_config

RUNS = frozenset({"name", "source", "L", "D", "N", "K", "H", "F", "V", "tied", "window", "qk_norm",
                  "max_context"})
"""Fields of a ModelShape that the decoder runs with any value; others only with their default, and
`biases` with none or those of Q, K and V."""


@dataclass(frozen=True)
class Llama3Scaling:
    """How Llama 3.1 stretches RoPE to a longer context, in the words of config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A shape that the decoder runs, the epsilon of its norms, the base and the scaling of its
    rotary positions, and the ids that begin and end a text.

    Raises ValueError naming a field that the arithmetic can count and the decoder cannot run.
    """

    shape: ModelShape
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    runs: ClassVar[frozenset[str]] = RUNS       # a decoder that runs more has a config that says so

    def __post_init__(self) -> None:
        runs = self.runs | {"biases"} if self.shape.biases == ("qkv",) else self.runs
        for field in fields(ModelShape):
            value = getattr(self.shape, field.name)
            if field.name not in runs and value != field.default:
                raise ValueError(
                    f"shape {self.shape.name!r}: {field.name}={value}: the decoder runs dense "
                    f"Llama-family models, which have {field.name}={field.default}")

    @classmethod
    def from_hf(cls, config: dict[str, Any], name: str = "",
                source: str = "config.json") -> "ModelConfig":
        """What the keys of a Hugging Face config.json say: see `decoder_from_config`, which raises
        ValueError for any key that is neither used nor known to change nothing."""
        said = decoder_from_config(config, name, source)
        if said["rope_scaling"]:
            said["rope_scaling"] = Llama3Scaling(**said["rope_scaling"])
        return cls(**said)
