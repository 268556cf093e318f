"""Other people's runs, predicted by one small model of time and compared with what was published.

In reading order: `rows` (what a source states), `setting` (what ran, and where), `demand` (seconds
at data-sheet speed, operation by operation), `fitting` (the nine figures that no data sheet tells),
`judging` (a verdict on a row, without its own source), `summary` (many verdicts in a few lines).
"""

from clawdemy_infer.published.demand import Demand, demand
from clawdemy_infer.published.fitting import FIGURES, Figures, Stack, fit
from clawdemy_infer.published.judging import Evidence, Verdict, judge
from clawdemy_infer.published.rows import PublishedRun, read, source_group
from clawdemy_infer.published.summary import AIMS, by, contradictions, errors, simpler, verdicts

__all__ = [
    "AIMS", "FIGURES", "Demand", "Evidence", "Figures", "PublishedRun", "Stack", "Verdict", "by",
    "contradictions", "demand", "errors", "fit", "judge", "read", "simpler", "source_group",
    "verdicts",
]
