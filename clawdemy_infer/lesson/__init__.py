"""What a lesson is made of: guesses, tasks and exercises; the ledger; tables, plots and widgets;
steps and their parts."""

from clawdemy_infer.lesson.lesson import Lesson, NotRight

__all__ = ["Lesson", "NotRight"]
