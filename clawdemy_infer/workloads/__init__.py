"""Who arrives when, and with how much to do."""

from clawdemy_infer.workloads.trace import load_trace, save_trace
from clawdemy_infer.workloads.workload import lognormal, uniform, workload, workload_names

__all__ = ["load_trace", "lognormal", "save_trace", "uniform", "workload", "workload_names"]
