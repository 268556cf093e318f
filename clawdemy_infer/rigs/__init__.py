"""Benchmarks: the real model on the clock, beside what was predicted; and allocators compared."""
