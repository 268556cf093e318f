"""What a lesson is made of, from the guess to the ledger, and how it is shown."""

from clawdemy_infer.lesson.lesson import Lesson, NotRight

__all__ = ["Lesson", "NotRight"]
