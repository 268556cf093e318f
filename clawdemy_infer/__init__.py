"""clawdemy-infer: predict the cost of LLM inference, measure it, explain the difference."""

import os

__version__ = "0.1.0"

# Memory comes in pages of 4 KiB: each is a fault when first touched, and an entry to look up when
# read. Linux has pages of 2 MiB for who asks, and PyTorch asks if told to before its first array: a
# decode step streams its weights some 5 % faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Threads that share a product wait for one another awake, by default some milliseconds. Where other
# processes hold the cores, the thread that is waited for cannot run meanwhile: a decode step takes
# 2 to 30 times as long. So they fall asleep after some 30 µs: at half of that, waking them costs a
# quiet machine up to a third of a step. This counts if PyTorch is not yet imported: lessons import
# this package before it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
