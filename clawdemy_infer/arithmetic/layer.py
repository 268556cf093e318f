"""A layer: a mixer, a feed-forward part, and the norms and sums around them."""

from __future__ import annotations

from dataclasses import dataclass

from clawdemy_infer.arithmetic.attention import Attention
from clawdemy_infer.arithmetic.feed_forward import MLP, Experts
from clawdemy_infer.arithmetic.latent import LatentAttention
from clawdemy_infer.arithmetic.state_space import StateSpace
from clawdemy_infer.arithmetic.work import Pass, Work, total


@dataclass(frozen=True)
class Layer:
    """`norms` of width D, with a bias where `norm_bias`. In a `parallel` layer both parts read the same input, and one sum
    adds both to it (Wang and Komatsuzaki 2021, GPT-J)."""

    D: int
    mixer: Attention | LatentAttention | StateSpace
    feed_forward: MLP | Experts | None
    norms: int
    norm_bias: bool
    parallel: bool

    def matrices(self) -> dict[str, tuple[int, int]]:
        return self.mixer.matrices() | (self.feed_forward.matrices() if self.feed_forward else {})

    def parameters(self, tokens: int | None = None) -> float:
        """The numbers that `tokens` tokens touch, or all of them."""
        norms = self.norms * self.D * (2 if self.norm_bias else 1)
        return self.mixer.parameters() + (self.feed_forward.parameters(tokens) if self.feed_forward else 0) + norms

    def work(self, run: Pass) -> Work:
        """Element-wise work is counted as if each line were one fused kernel: what has to be read and written at least."""
        feed_forward = self.feed_forward.work(run) if self.feed_forward else []
        # A norm reads and writes the residual stream. A sum reads it and what is added, and writes it: 3, or 4 with two at once.
        sums = 4 if self.parallel else 3 * (2 if self.feed_forward else 1)
        glue = [run.elementwise("norms", 2 * self.norms * run.tokens * self.D), run.elementwise("residual", sums * run.tokens * self.D)]
        return total("layer", [*self.mixer.work(run), *feed_forward, *glue])
