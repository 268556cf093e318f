"""What a lesson is made of: the ledger, tables, plots and widgets; workloads and traces; quality,
judged on texts; and the course that runs all lessons."""

from clawdemy_infer.lesson.lesson import Lesson, NotRight

__all__ = ["Lesson", "NotRight"]
