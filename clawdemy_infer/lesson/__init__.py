"""What a lesson is made of: the ledger, tables, plots, widgets, and the course that runs them
all."""

from clawdemy_infer.lesson.lesson import Lesson, NotRight

__all__ = ["Lesson", "NotRight"]
