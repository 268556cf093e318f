"""The one table of tolerances: how far logits may lie from the reference, by dtype.

For logits with a standard deviation near 1; divide others by theirs first. The order of additions
and of roundings is free, and so two correct computations in bf16 (8 bits) differ by a hundredth in
the mean, and by ten times that in the worst of a million logits. Such a bound lets mistakes pass: a
test in bf16 also asks who is nearer to fp32.
"""

import torch

from clawdemy_kernels.tolerance import KERNEL  # noqa: F401

LOGITS = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 2e-1},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
