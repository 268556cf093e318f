"""Texts to try drafts on, of four kinds that they find easy or hard."""

from clawdemy_infer.model import Decoder

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


def prompts_of(model: Decoder) -> dict[str, list[int]]:
    """`PROMPTS` as token ids."""
    tokenizer = model.tokenizer
    return {kind: tokenizer.chat([{"role": "user", "content": text}]) if kind in IN_A_CHAT
            else tokenizer.encode(text) for kind, text in PROMPTS.items()}
