"""Batching: one scheduler, two clocks. The order of reading is in `clawdemy_infer/README.md`."""

from clawdemy_infer.batching.engine import Engine
from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.policy import Policy
from clawdemy_infer.batching.request import Request, Sequence, State
from clawdemy_infer.batching.simulator import simulate, simulator
from clawdemy_infer.batching.step_cost import Operations, StepCost

__all__ = ["SLO", "Engine", "Operations", "Policy", "Report", "Request", "Sequence", "State",
           "StepCost", "simulate", "simulator"]
