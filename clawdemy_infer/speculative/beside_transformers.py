"""The same prompts through `transformers`: plain, with its prompt lookup, and with an assistant model, its name for a draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from clawdemy_infer.model import Sampling
from clawdemy_infer.timing import now


@dataclass(frozen=True)
class Theirs:
    """One way of decoding one prompt. `speedup` is over its own plain decoding, `tpot_s` seconds per token after the first that came."""

    draft: str
    prompt: str
    tpot_s: float
    speedup: float
    tokens: list[int]


class _Clock:
    """A streamer, to which `generate` puts the prompt and then what each round brought."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(now())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def tpot_s(self) -> float:
        """Of what came after the first round, which has the prefill in it; of a text of one round, all."""
        first = 1 if len(self.times) > 2 else 0
        return (self.times[-1] - self.times[first]) / sum(self.counts[first + 1:])


def transformers_rows(directory: Path, prompts: Mapping[str, Sequence[int]], eos: Sequence[int], gamma: int = 4, max_tokens: int = 64,
                      sampling: Sampling | None = None, repeats: int = 1) -> list[Theirs]:
    """The weights in `directory` in fp32, without a draft, with prompt lookup, and with themselves in bf16 as the assistant, in turn."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model, assistant = (AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16))
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = gamma, "constant", 0.0
    ways = {"": {}, "lookup": {"prompt_lookup_num_tokens": gamma, "max_matching_ngram_size": 3}, "bf16": {"assistant_model": assistant}}
    how = {"do_sample": False}
    if sampling and sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    rows = []
    for kind, ids in prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        tokens = {}
        for _ in range(repeats):
            for name, options in ways.items():
                clock, text = _Clock(), torch.tensor([list(ids)])
                torch.manual_seed(0)
                out = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=max_tokens, eos_token_id=list(eos),
                                     pad_token_id=0, streamer=clock, **how, **options)
                seconds[name].append(clock.tpot_s)
                tokens[name] = out[0, len(ids):].tolist()
        for name in ways:
            speedup = median(plain / fast for plain, fast in zip(seconds[""], seconds[name], strict=True))
            rows.append(Theirs(name, kind, median(seconds[name]), speedup, tokens[name]))
    return rows
