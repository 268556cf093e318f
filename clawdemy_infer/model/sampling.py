"""From logits to a token: which distribution we draw from, and the draw."""

from dataclasses import dataclass

import torch

NOTHING = -1
"""The token of a row of logits that leaves none to choose: NaN or +inf among them, or all -inf."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature=0`, the default, is greedy and ignores the rest.

    top_k keeps the k likeliest tokens; top_p the fewest likeliest that hold at least p of the
    probability (Holtzman et al. 2020, nucleus sampling); min_p those at least min_p times as likely
    as the likeliest (Nguyen et al. 2024). Without a `seed` every run draws afresh. Raises
    ValueError for a value that makes no sense."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or above is accepted")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k}: a whole number, 1 or more, is accepted")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: above 0 and at most 1 is accepted")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p}: 0 to 1 is accepted")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise ValueError(f"seed={self.seed}: a whole number from 0 to 2^63 - 1 is accepted")

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A source of randomness that starts from `seed`. Make one per generation: reseeding at
        each token would bias it."""
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return generator


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that `sample` draws from: [..., V] logits to [..., V] probabilities in fp32,
    or in fp64 if they come so.

    Filters act in the order temperature, top-k, top-p, min-p, each on what the one before left:
    transformers' order, and other orders give other distributions. Greedy is the distribution that
    is certain of the likeliest token. NaN where there is none, as in `NOTHING`."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if sampling.temperature == 0:
        largest, token = logits.max(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, token, 1 + 0 * largest)
    # Shifted so that the largest is 0: a tiny temperature then cannot overflow, unless to 0 / 0.
    temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        # A token stays if those likelier than it do not reach top_p already; the likeliest stays.
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        beyond[..., 0] = False
        beyond = torch.zeros_like(beyond).scatter_(-1, order, beyond)
        logits = logits.masked_fill(beyond, -torch.inf)
    if sampling.min_p is not None:
        # p / p_max >= min_p, and p / p_max = exp(logit - largest), whose largest is 0 by now.
        logits = logits.masked_fill(logits.exp() < sampling.min_p, -torch.inf)
    return logits.softmax(-1)


def sample(logits: torch.Tensor, sampling: Sampling,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw one token for each row: logits [B, V] -> ids [B], or `NOTHING`."""
    if sampling.temperature == 0:
        return likeliest(logits)
    return draw(probabilities(logits, sampling), generator)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token of each row: logits [..., V] -> ids [...], or `NOTHING`. One walk over
    the V logits, as of argmax, and some bytes a row: the largest is NaN where there is one."""
    largest, token = logits.max(-1)
    return token.masked_fill(largest - largest != 0, NOTHING)   # x - x is 0 for finite x alone


def draw(weights: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token for each row of `weights` [B, V], which need not sum to 1: ids [B], and `NOTHING`
    for a row that sums to nothing, to NaN or to infinity.

    The first at which the running sum exceeds a random share of the whole. `torch.multinomial`
    draws a random number for each token of the vocabulary, and takes twenty times as long."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64, device=sums.device)
    found = torch.searchsorted(sums, u * sums[:, -1:], right=True).squeeze(-1)
    return found.where(found < sums.shape[-1], NOTHING)
