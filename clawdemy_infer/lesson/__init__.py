"""What a lesson is made of: the ledger, tables, plots, diagrams and widgets; steps and their parts;
workloads; quality, judged on texts."""

from clawdemy_infer.lesson.lesson import Lesson, NotRight

__all__ = ["Lesson", "NotRight"]
