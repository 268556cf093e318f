"""Batching: one scheduler, two clocks.

In reading order: `request` (what is asked for, and how far it has come), `policy`, `plan` (a step), `scheduler` (who runs, who waits,
who gives way), `static` (the baseline), `metrics`, `engine` (the loop), `counted_blocks`, `step_cost` and `simulator` (time by the
roofline), `workload`, `trace`, `timeline`. None of these needs torch. `torch_executor` runs the model, `endpoint` asks somebody else's
server, and `compare` sets servers side by side; import them by their names.
"""

from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request, Sequence, State
from clawdemy_infer.batching.simulator import simulate, simulator
from clawdemy_infer.batching.step_cost import Operations, StepCost
from clawdemy_infer.batching.trace import load_trace, save_trace
from clawdemy_infer.batching.workload import lognormal, uniform, with_tokens, workload, workload_names

__all__ = [
    "SLO", "Engine", "Operations", "Policy", "Report", "Request", "Sequence", "State", "StepCost", "load_trace", "lognormal", "save_trace",
    "simulate", "simulator", "uniform", "with_tokens", "workload", "workload_names",
]
