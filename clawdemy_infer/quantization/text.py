"""Text to calibrate on and text to judge by, with no download: they never overlap.

`pydoc_data.topics`, in every Python, is some 100,000 tokens of English prose about the language. Every other topic is for
evaluation, the rest for calibration. Some topics quote others whole; what the evaluation holds is taken out of the calibration,
paragraph by paragraph. The words differ a little between Python versions, and so do the perplexities.
"""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import torch

from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder, Sampling, Tokenizer, sample


def prose(part: str) -> str:
    """The "evaluation" or the "calibration" part of Python's documentation."""
    names = sorted(topics)
    evaluation = "\n\n".join(topics[name] for name in names[0::2])
    if part == "evaluation":
        return evaluation
    seen = set(_paragraphs(evaluation))
    others = (paragraph for name in names[1::2] for paragraph in _paragraphs(topics[name]))
    return "\n\n".join(paragraph for paragraph in dict.fromkeys(others) if paragraph not in seen)


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]


def evaluation_tokens(tokenizer: Tokenizer, sequences: int = 8, length: int = 512, text: str | Path | None = None) -> torch.Tensor:
    """[B, T] token ids from the beginning of the evaluation prose, or of `text`: a text, or the path of a text file.

    Raises ValueError where there is too little of it.
    """
    ids = _ids(tokenizer, "evaluation", text, sequences * length, sequences, length)
    return torch.tensor(ids[:sequences * length]).view(sequences, length)


def calibration_tokens(tokenizer: Tokenizer, sequences: int = 16, length: int = 512, seed: int = 0,
                       text: str | Path | None = None) -> torch.Tensor:
    """[B, T] token ids from random places in the calibration prose, or in `text`: a text, or the path of a text file.

    Raises ValueError where there is too little of it.
    """
    ids = torch.tensor(_ids(tokenizer, "calibration", text, length, sequences, length))
    starts = torch.randint(len(ids) - length + 1, (sequences,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start:start + length] for start in starts])


def _ids(tokenizer: Tokenizer, part: str, text: str | Path | None, needed: int, sequences: int, length: int) -> list[int]:
    if sequences < 1 or length < 2:
        raise ValueError(f"sequences={sequences}, length={length}: at least 1 sequence of 2 tokens is accepted")
    if isinstance(text, Path):
        text = text.read_text("utf-8")
    ids = tokenizer.encode(prose(part) if text is None else text)
    if len(ids) < needed:
        raise ValueError(f"{part} text: it has {len(ids):,} tokens, and {sequences} sequences of {length} ask for {needed:,}")
    return ids


def own_samples(model: Decoder, sequences: int = 8, length: int = 128, seed: int = 0) -> torch.Tensor:
    """[B, T] token ids that the model writes itself, at temperature 1 from its beginning-of-sequence token: calibration text for
    a model whose training data nobody has (Liu et al. 2023, "LLM-QAT", section 2.1).

    A decode step for each token, so some 10 s. Raises ValueError for a model without such a token.
    """
    if model.config.bos_id is None:
        raise ValueError("own_samples: this model has no beginning-of-sequence token to start from")
    sampling, cache = Sampling(temperature=1.0, seed=seed), ContiguousCache.for_model(model, sequences, length)
    generator = sampling.generator(model.device)
    tokens = [torch.full((sequences,), model.config.bos_id, device=model.device)]
    while len(tokens) < length:
        tokens.append(sample(model(tokens[-1][:, None], cache, last_only=True)[:, -1], sampling, generator))
    return torch.stack(tokens, 1)
