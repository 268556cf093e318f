"""How far a kernel may lie from fp64, by dtype, on numbers near 1: two units in the last place, and
its sums in any order."""

import torch

KERNEL = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}
