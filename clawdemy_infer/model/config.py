"""What a decoder is made of: the shape that sets its cost, and what only its values depend on."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.from_config.decoder import decoder_from_config
from clawdemy_infer.from_config.rope import RopeScaling

RUNS = frozenset({"name", "source", "L", "D", "N", "K", "H", "F", "V", "tied", "window", "qk_norm",
                  "max_context"})
"""Fields of a ModelShape that the decoder runs with any value; others only with their default, and
`biases` with none or those of Q, K and V."""


@dataclass(frozen=True)
class ModelConfig:
    """A shape that the decoder runs, the epsilon of its norms, the base and the scaling of its
    rotary positions, and the ids that begin and end a text.

    Raises ValueError naming a field that the arithmetic can count and the decoder cannot run."""

    shape: ModelShape
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
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

    @property
    def same_angles_until(self) -> int | None:
        """Beyond how many tokens the angles depend on the length of the text; None: never."""
        return self.rope_scaling and self.rope_scaling.same_until

    @property
    def rope_gain(self) -> float:
        """What yarn and longrope multiply cos and sin by."""
        return self.rope_scaling.attention_factor if self.rope_scaling else 1.0

    @classmethod
    def from_hf(cls, config: dict[str, Any], name: str = "",
                source: str = "config.json") -> "ModelConfig":
        """What the keys of a Hugging Face config.json say: see `decoder_from_config`, which raises
        ValueError for any key that is neither used nor known to change nothing."""
        return cls(**decoder_from_config(config, name, source))
