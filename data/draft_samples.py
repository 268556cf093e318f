"""What a draft is trained on: texts that the target writes itself, and the vectors behind each of
its tokens. Prompts are made of the documentation and the code of Python, which any machine has, and
of questions that the model asks itself."""

import random
import sysconfig
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import Decoder
from clawdemy_infer.rigs.text import prose

PROMPT_KINDS = "ask chat prose chat code copy chat document ask chat listing chat".split()
"""Prompts, in turn. Documents and listings are read whole, and nothing is written."""
MAX_TEXT_TOKENS, TEXTS_AT_ONCE, SHARD_TOKENS = 512, 48, 3000
"""Tokens of a text, texts at once, and tokens after which it is asked whether there are enough."""


class Sample(NamedTuple):
    """`tokens` [T] of a text, and `features` [T, D] bf16, what the target's head reads there."""

    tokens: torch.Tensor
    features: torch.Tensor


class Prompts:
    """Prompts as token ids. Files of the standard library that begin with an "a", and the part of
    the documentation for evaluation, are left for measuring the draft."""

    def __init__(self, model: Decoder, seed: int) -> None:
        self.tokenizer, self.random = model.tokenizer, random.Random(seed)
        self.words = self.tokenizer.encode(prose("calibration"))
        self.lines = self.tokenizer.encode("\n\n".join(
            path.read_text("utf-8", "ignore")[:20_000]
            for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[!a_]*.py"))))
        template = self.tokenizer.chat_text([{"role": "user", "content": "QUESTION"}])
        self.opening = self.tokenizer.backend.encode(template.split("QUESTION")[0],
                                                     add_special_tokens=False).ids
        self.questions = ["What is the capital of France?"]

    def make(self, kind: str) -> tuple[list[int], int]:
        """A prompt of a kind, and how many tokens are to be written at most."""
        choice, length = self.random.choice, self.random.randint
        if kind == "ask":       # it goes on where a user would speak (Xu et al. 2024, "Magpie")
            return self.opening, 48
        if kind == "chat":
            return self._chat(choice(self.questions)), 192
        if kind == "copy":
            passage = self.tokenizer.decode(self._piece(choice((self.words, self.lines)), 64))
            return self._chat(f"Repeat this text word for word:\n\n{passage}"), 96
        if kind == "prose":
            return self._piece(self.words, length(16, 64)), 160
        if kind == "code":
            return self._piece(self.lines, length(24, 96)), 160
        ids = self.words if kind == "document" else self.lines
        return self._piece(ids, choice((256, MAX_TEXT_TOKENS))), 0

    def asked(self, ids: list[int]) -> None:
        if text := self.tokenizer.decode(ids[len(self.opening):]).strip():
            self.questions = [*self.questions, text][-256:]

    def _chat(self, text: str) -> list[int]:
        return self.tokenizer.chat([{"role": "user", "content": text}])[:MAX_TEXT_TOKENS - 192]

    def _piece(self, ids: list[int], length: int) -> list[int]:
        start = self.random.randrange(len(ids) - length)
        return ids[start:start + length]


def write_samples(model: Decoder, tokens: int, seed: int) -> list[Sample]:
    """At least `tokens` tokens of texts of `model`: many at once, every other one greedily and the
    rest at temperature 1. A row that has ended takes the next prompt in the same step."""
    prompts, kinds, generator = Prompts(model, seed), cycle(PROMPT_KINDS), torch.Generator()
    generator.manual_seed(seed)
    cache = ContiguousCache.for_model(model, TEXTS_AT_ONCE, MAX_TEXT_TOKENS + 1)
    kind, texts, left, features = {}, {}, {}, {}
    samples, shard, greedy = [], 0, torch.arange(TEXTS_AT_ONCE) % 2 == 0

    def observe(step, x: torch.Tensor) -> None:
        parts = model.norm(x).bfloat16().split(step.num_new_tokens)
        for row, part in zip(step.sequences, parts, strict=True):
            features[row].append(part)

    def begin(row: int) -> list[int]:
        cache.truncate(0, row)
        kind[row], features[row] = next(kinds), []
        prompt, left[row] = prompts.make(kind[row])
        texts[row] = list(prompt)
        return prompt

    new, model.observer = {row: begin(row) for row in range(TEXTS_AT_ONCE)}, observe
    bar = tqdm(total=tokens, desc="samples", unit="token")
    while bar.n < tokens:
        logits = model.step(new, cache).float()                         # [TEXTS_AT_ONCE, V]
        # Not by `draw`: the shipped draft's command shall give its samples again.
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        asking = torch.tensor([kind[row] == "ask" for row in range(TEXTS_AT_ONCE)])
        chosen = torch.where(greedy & ~asking, logits.argmax(-1), drawn)
        for row, token in enumerate(chosen.tolist()):
            if left[row] > 0 and token not in model.config.eos_ids:
                new[row], left[row] = [token], left[row] - 1
                texts[row].append(token)
                continue
            if kind[row] == "ask":
                prompts.asked(texts[row])
            if len(texts[row]) > 8 and bar.n < tokens:
                samples.append(Sample(torch.tensor(texts[row]), torch.cat(features[row])))
                shard += len(texts[row])
                if shard >= SHARD_TOKENS:
                    bar.update(shard)
                    shard = 0
            new[row] = begin(row)
    model.observer = None
    return samples
