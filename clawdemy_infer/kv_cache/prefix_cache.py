"""Which full block holds which tokens, so that a prompt that begins like an earlier one need not be
computed again.

The keys and values of a block depend on its tokens and on all before them. So a block is known by a
chain of digests, each over the digest before it and the block's own tokens. SHA-256: two prompts
must never meet by chance, for the second would then be answered from the first one's memory.
Standard library only.
"""

from array import array
from collections.abc import Sequence
from hashlib import sha256

ROOT = b""
"""The digest before the first block."""


class PrefixCache:
    """The known blocks. Who holds them is the pool's business: a block is found whether it is used
    or idle. Counts the tokens that sequences `asked` for and `found` when they were added."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.asked = self.found = 0
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    @property
    def hit_rate(self) -> float:
        """Tokens found over tokens asked for; 0 before anybody has asked."""
        return self.found / self.asked if self.asked else 0.0

    def digest(self, before: bytes, tokens: Sequence[int]) -> bytes:
        """The name of the block that holds `tokens`, behind the block named `before`."""
        return sha256(before + array("q", tokens).tobytes()).digest()

    def find(self, tokens: Sequence[int], digests: list[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens`. The last token is left out:
        a prompt that is known whole still has to bring one token, from whose logits generation goes
        on. Digests of `tokens` that are not yet among `digests` are added to them."""
        blocks, size = [], self.block_size
        for i in range((len(tokens) - 1) // size):
            if i == len(digests):
                before = digests[-1] if digests else ROOT
                digests.append(self.digest(before, tokens[i * size:(i + 1) * size]))
            if digests[i] not in self._block_of:
                break
            blocks.append(self._block_of[digests[i]])
        return blocks

    def learn(self, digest: bytes, block: int) -> None:
        """`block` is full, and this is what it holds. Where another block is known for the same
        tokens, that one stays."""
        if digest not in self._block_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def forget(self, block: int) -> None:
        """What `block` holds is about to be overwritten, or its room is needed."""
        if block in self._digest_of:
            del self._block_of[self._digest_of.pop(block)]
