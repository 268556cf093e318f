"""What a draft is trained on: texts that the target writes itself, and the vectors behind each of its tokens.

A draft shall guess what the target will say, so the target is its teacher. It writes many texts at once, every other one greedily
and the rest at temperature 1; a row that has ended takes the next prompt in the same step. What prompts are made of is on any
machine that has the model and Python: the documentation and the code of Python, and questions that the model asks itself.
"""

from __future__ import annotations

import random
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder
from clawdemy_infer.quantization.text import prose

KINDS = ("ask", "chat", "prose", "chat", "code", "copy", "chat", "document", "ask", "chat", "listing", "chat")
"""Prompts, in turn. Documents and listings are read whole, and nothing is written."""
LONGEST = 512
ROWS = 48
"""Texts that are written at once."""
SHARD = 3000
"""Tokens in a file of samples."""


class Sample(NamedTuple):
    """`tokens` [T] of a text, and `features` [T, D], for each what the target's head reads there, in bf16."""

    tokens: torch.Tensor
    features: torch.Tensor


class Prompts:
    """An endless, repeatable row of prompts as token ids, if the model's answers are repeatable.

    Of the standard library, files that begin with an "a" are left for those who measure the draft; of the documentation, the
    evaluation part.
    """

    def __init__(self, model: Decoder, seed: int) -> None:
        self.tokenizer, self.random = model.tokenizer, random.Random(seed)
        self.words = self.tokenizer.encode(prose("calibration"))
        files = sorted(path for path in Path(sysconfig.get_path("stdlib")).glob("*.py") if path.name[0] not in "a_")
        self.lines = self.tokenizer.encode("\n\n".join(path.read_text("utf-8", "ignore")[:20_000] for path in files))
        before, _ = self.tokenizer.chat_text([{"role": "user", "content": "QUESTION"}]).split("QUESTION")
        self.opening = self.tokenizer.backend.encode(before, add_special_tokens=False).ids
        self.questions: deque[str] = deque(["What is the capital of France?"], maxlen=256)

    def __iter__(self) -> Iterator[tuple[str, list[int], int]]:
        """(kind, prompt, most new tokens)."""
        while True:
            for kind in KINDS:
                yield kind, *getattr(self, kind)()

    def ask(self) -> tuple[list[int], int]:
        """The model goes on where a user would speak (Xu et al. 2024, "Magpie"). What it asks becomes a chat prompt."""
        return self.opening, 48

    def asked(self, ids: list[int]) -> None:
        text = self.tokenizer.decode(ids[len(self.opening):]).strip()
        if text:
            self.questions.append(text)

    def chat(self) -> tuple[list[int], int]:
        return self._chat(self.random.choice(self.questions)), 192

    def copy(self) -> tuple[list[int], int]:
        passage = self.tokenizer.decode(self._piece(self.random.choice((self.words, self.lines)), 64))
        return self._chat(f"Repeat this text word for word:\n\n{passage}"), 96

    def prose(self) -> tuple[list[int], int]:
        return self._piece(self.words, self.random.randint(16, 64)), 160

    def code(self) -> tuple[list[int], int]:
        return self._piece(self.lines, self.random.randint(24, 96)), 160

    def document(self) -> tuple[list[int], int]:
        return self._piece(self.words, self.random.choice((256, LONGEST))), 0

    def listing(self) -> tuple[list[int], int]:
        return self._piece(self.lines, self.random.choice((256, LONGEST))), 0

    def _chat(self, text: str) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": text}])[:LONGEST - 192]

    def _piece(self, ids: list[int], length: int) -> list[int]:
        start = self.random.randrange(len(ids) - length)
        return ids[start:start + length]


def write(model: Decoder, seed: int) -> Iterator[Sample]:
    """Texts of `model`, without end, in the order in which they end. Their features are caught where the last layer leaves them."""
    prompts, rows = Prompts(model, seed), ROWS
    source, generator = iter(prompts), torch.Generator().manual_seed(seed)
    cache = ContiguousCache.for_model(model, rows, LONGEST + 1)
    kinds, texts, left, features = {}, {}, {}, {}
    greedy = torch.arange(rows) % 2 == 0

    def observe(step, x: torch.Tensor) -> None:
        for row, part in zip(step.sequences, model.norm(x).bfloat16().split(step.new), strict=True):
            features[row].append(part)

    def begin(row: int) -> list[int]:
        cache.truncate(0, row)
        kinds[row], prompt, left[row] = next(source)
        texts[row], features[row] = list(prompt), []
        return prompt

    new = {row: begin(row) for row in range(rows)}
    model.observer = observe
    try:
        while True:
            logits = model.step(new, cache).float()                                         # [rows, V]
            # Not by `draw`, which is faster: the shipped draft's command shall give its samples again.
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
            asking = torch.tensor([kinds[row] == "ask" for row in range(rows)])
            tokens = torch.where(greedy & ~asking, logits.argmax(-1), drawn).tolist()
            for row, token in enumerate(tokens):
                new[row] = [token]
                if left[row] == 0 or token in model.config.eos_ids:
                    if kinds[row] == "ask":
                        prompts.asked(texts[row])
                    if len(texts[row]) > 8:
                        yield Sample(torch.tensor(texts[row]), torch.cat(features[row]))
                    new[row] = begin(row)
                else:
                    texts[row].append(token)
                    left[row] -= 1
    finally:
        model.observer = None


def write_samples(model: Decoder, folder: Path, tokens: int, seed: int) -> None:
    """Let `model` write until the folder holds so many tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    have, pending, count = len(files) * SHARD, [], 0
    with tqdm(total=tokens, initial=min(have, tokens), desc="samples", unit="token") as bar:
        if have >= tokens:
            return
        for sample in write(model, seed + len(files)):
            pending.append(sample)
            count += len(sample.tokens)
            if count >= SHARD:
                lengths = torch.tensor([len(sample.tokens) for sample in pending])
                part = folder / f"{seed}-{len(files):05d}.part"
                save_file({"tokens": torch.cat([sample.tokens for sample in pending]).int(), "lengths": lengths,
                           "features": torch.cat([sample.features for sample in pending])}, part)
                files.append(part.rename(part.with_suffix(".safetensors")))
                bar.update(count)
                have, pending, count = have + count, [], 0
                if have >= tokens:
                    return


def read_samples(folder: Path) -> tuple[list[Sample], list[Sample]]:
    """Those to learn from, and every twenty-fifth, to be judged by."""
    samples = []
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        lengths = held["lengths"].tolist()
        samples += [Sample(*pair) for pair in zip(held["tokens"].split(lengths), held["features"].split(lengths), strict=True)]
    return [sample for i, sample in enumerate(samples) if i % 25], samples[::25]
