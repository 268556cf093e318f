"""Texts to try drafts on: of four kinds that they find easy or hard, and twenty more to see that greedy tokens never change."""

from __future__ import annotations

from clawdemy_infer.model import Decoder

KINDS = {
    "copying": "Repeat word for word: The quick brown fox jumps over the lazy dog while seven wizards quietly mix a strong potion of "
               "herbs.",
    "code": "class Vector:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
            "    def add(self, other):\n        return",
    "prose": "The history of the steam engine begins with",
    "chat": "Tell me about rivers.",
}
"""The first and the last are asked as in a chat, the others are continued."""

VARIED = (
    "The capital of France is", "def area(r):\n    return 3.14 * r * r\n\ndef area(", "red, green, blue, red, green, blue, red,",
    "Once upon a time, in a village by the sea,", "1, 2, 3, 4, 5, 6,", "Q: What is photosynthesis?\nA:", "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to", "The three laws of motion are", "To make bread you need flour, water,",
    "<html>\n<head>\n<title>", "SELECT name, age FROM", "In 1969, the first", "Roses are red,\nviolets are", "Two plus two is",
    "The opposite of hot is", "for i in range(10):\n    print(", "Monday, Tuesday, Wednesday,", "La capitale de la France est", "A",
)


def prompts_of(model: Decoder) -> dict[str, list[int]]:
    """`KINDS` as token ids."""
    tokenizer = model.tokenizer
    return {kind: tokenizer.chat([{"role": "user", "content": text}]) if kind in ("copying", "chat") else tokenizer.encode(text)
            for kind, text in KINDS.items()}
