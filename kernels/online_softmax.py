"""The one step that all attention kernels share: take in a block of keys and values, and forget it
(Milakov and Gimelshein 2018).

softmax needs the largest score and the sum over all keys, which are only known at the end. But a
running pair is enough: when a larger score turns up, all that was summed so far shrinks by the same
factor.

    largest' = max(largest, max(scores))        shrink = 2^(largest - largest')
    weights  = 2^(scores - largest')            total' = total * shrink + sum(weights)
                                                acc'   = acc * shrink + weights @ values

At the end acc / total is the output. Scores come multiplied by log2(e), so that 2^x stands for e^x.
"""

from clawdemy_kernels.launch import tl, triton


@triton.jit
def rescale(scores, largest, total):
    """scores [Q, S] (-inf where hidden), largest and total [Q] -> weights [Q, S], shrink [Q], and
    the new largest and total."""
    new = tl.maximum(largest, tl.max(scores, 1))
    # A row that has seen no key yet has -inf on both sides, and -inf - -inf is no number.
    known = tl.where(new == -float("inf"), 0.0, new)
    shrink = tl.exp2(largest - known)
    weights = tl.exp2(scores - known[:, None])
    return weights, shrink, new, total * shrink + tl.sum(weights, 1)
