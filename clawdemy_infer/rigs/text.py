"""Text to calibrate on and text to judge by, with no download: they never overlap.

`pydoc_data.topics`, in every Python, is some 100,000 tokens of English prose about the language.
Every other topic is for evaluation, the rest for calibration. Some topics quote others whole; what
the evaluation holds is taken out of the calibration, paragraph by paragraph. The words differ a
little between Python versions, and so do the perplexities.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

import torch

from clawdemy_infer.files.tokenizer import Tokenizer
from clawdemy_infer.paths import Refused


def prose(part: str) -> str:
    """The "evaluation" or the "calibration" part of Python's documentation."""
    def paragraphs(text: str) -> list[str]:
        return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text)]

    names = sorted(topics)
    evaluation = "\n\n".join(topics[name] for name in names[0::2])
    if part == "evaluation":
        return evaluation
    seen = set(paragraphs(evaluation))
    others = (paragraph for name in names[1::2] for paragraph in paragraphs(topics[name]))
    return "\n\n".join(paragraph for paragraph in dict.fromkeys(others) if paragraph not in seen)


def evaluation_tokens(tokenizer: Tokenizer, sequences: int = 8, length: int = 512,
                      text: str | Path | None = None) -> torch.Tensor:
    """[B, T] token ids from the beginning of the evaluation prose, or of `text`: a text, or the
    path of a text file. Raises ValueError where there is too little of it."""
    ids = _ids(tokenizer, "evaluation", text, sequences * length, sequences, length)
    return ids[:sequences * length].view(sequences, length)


def calibration_tokens(tokenizer: Tokenizer, sequences: int = 16, length: int = 512, seed: int = 0,
                       text: str | Path | None = None) -> torch.Tensor:
    """[B, T] token ids from random places in the calibration prose, or in `text`, as above."""
    ids = _ids(tokenizer, "calibration", text, length, sequences, length)
    starts = torch.randint(len(ids) - length + 1, (sequences,),
                           generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start:start + length] for start in starts])


def _ids(tokenizer: Tokenizer, part: str, text: str | Path | None, needed: int, sequences: int,
         length: int) -> torch.Tensor:
    if sequences < 1 or length < 2:
        raise Refused("", "sequences and length", (sequences, length), "at least (1, 2)")
    if isinstance(text, Path):
        text = text.read_text("utf-8")
    ids = tokenizer.encode(prose(part) if text is None else text)
    if len(ids) < needed:
        raise ValueError(f"{part} text: it has {len(ids):,} tokens, and {sequences} sequences of "
                         f"{length} ask for {needed:,}")
    return torch.tensor(ids)
