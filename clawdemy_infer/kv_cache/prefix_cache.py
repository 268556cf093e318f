"""Which full block holds which tokens: what a prompt shares with an earlier one is computed once.

The keys and values of a block depend on its tokens and on all before them. So a block is known by a
chain of digests, each over the digest before it and the block's own tokens. SHA-256: two prompts
must never meet by chance, for the second would then be answered from the first one's memory.
Standard library only."""

from array import array
from collections.abc import Sequence
from hashlib import sha256


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

    def digest(self, i: int, tokens: Sequence[int], digests: list[bytes]) -> bytes:
        """The name of block i of `tokens`: digests[i], which is appended where it is the next."""
        if i == len(digests):
            own = array("q", tokens[i * self.block_size:(i + 1) * self.block_size])
            digests.append(sha256((digests[-1] if digests else b"") + own.tobytes()).digest())
        return digests[i]

    def find(self, tokens: Sequence[int], digests: list[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of `tokens`. The last token is left out:
        a prompt that is known whole still has to bring one token, from whose logits generation goes
        on. Digests of `tokens` that are not yet among `digests` are added to them."""
        blocks = []
        for i in range((len(tokens) - 1) // self.block_size):
            block = self._block_of.get(self.digest(i, tokens, digests))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def learn(self, digest: bytes, block: int) -> None:
        """`block` is full, and this is what it holds. Of two that hold the same the first stays."""
        if digest not in self._block_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def forget(self, block: int) -> None:
        """What `block` holds is about to be overwritten, or its room is needed."""
        if block in self._digest_of:
            del self._block_of[self._digest_of.pop(block)]
