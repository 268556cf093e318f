"""Other people's runs: predicted by one small model of time, and compared with what their sources published.

In reading order: `rows` (what a source states), `setting` (the chip, and what is known of the software), `shapes` (the model), `plans`
(seconds at data-sheet speed, operation by operation), `fitting` (the nine figures that no data sheet tells), `judging` (a verdict on a row,
without its own source), `summary` (many verdicts in a few lines), `on_paper` (the same for a person).
"""

from clawdemy_infer.published.fitting import FIGURES, IDEAL, Figures, Stack, fit
from clawdemy_infer.published.judging import Evidence, Judged, judge
from clawdemy_infer.published.plans import Plan, plan
from clawdemy_infer.published.rows import Run, read, source_group
from clawdemy_infer.published.summary import AIMS, by, contradictions, errors, simpler, verdicts

__all__ = [
    "AIMS", "FIGURES", "IDEAL", "Evidence", "Figures", "Judged", "Plan", "Run", "Stack", "by", "contradictions", "errors", "fit", "judge",
    "plan", "read", "simpler", "source_group", "verdicts",
]
