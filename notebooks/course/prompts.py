"""Texts to try drafts on, of four kinds that they find easy or hard."""

import re
import statistics
from inspect import getsource

from clawdemy_infer.model import Decoder
from clawdemy_infer.rigs.text import prose

PROMPTS = {
    "copying": "Repeat word for word: The quick brown fox jumps over the lazy dog while seven "
               "wizards quietly mix a strong potion of herbs.",
    "code": "class Vector:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"
            "\n    def add(self, other):\n        return",
    "prose": "The history of the steam engine begins with",
    "chat": "Tell me about rivers.",
}
IN_A_CHAT = ("copying", "chat")
"""Prompts that a chat template is put around; the others are continued as they are."""
SUBJECTS = ("bread", "the moon", "glass", "old maps", "bees", "bridges", "tea", "volcanoes",
            "chess", "wool", "the sea", "clocks", "salt", "owls", "paper")


def texts_of(model: Decoder, count: int) -> dict[str, list[list[int]]]:
    """`count` prompts of every kind as token ids, the one of `PROMPTS` first: more are cut from
    Python's own help and library. At most 16."""
    words = [sentence.split() for sentence in re.findall(
        r"(?<=\. )[A-Z][\w ,]{70,110}\.", re.sub(r"\s+", " ", prose("evaluation")))]
    functions = re.findall(r"^def [a-z].*\n(?:(?: .*)?\n){9}", getsource(statistics), re.MULTILINE)
    more = {"copying": [f"Repeat word for word: {' '.join([*first, *second])}"
                        for first, second in zip(words[::2], words[1::2], strict=False)],
            "code": [function.rstrip() for function in functions],
            "prose": [" ".join(each[:8]) for each in words],
            "chat": [f"Tell me about {subject}." for subject in SUBJECTS]}

    def encoded(kind: str, text: str) -> list[int]:
        if kind in IN_A_CHAT:
            return model.tokenizer.chat([{"role": "user", "content": text}])
        return model.tokenizer.encode(text)
    return {kind: [encoded(kind, each) for each in [text, *more[kind]][:count]]
            for kind, text in PROMPTS.items()}
