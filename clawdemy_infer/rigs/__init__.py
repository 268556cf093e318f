"""Benchmarks: the real model on the clock, beside what was predicted;
workloads to serve; quality, judged on texts; quantized checkpoints."""
