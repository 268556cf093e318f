"""What a waterfall leaves to ask: the price of a launch, a bar below zero, and two bandwidths."""

from clawdemy_infer.lesson import Lesson
from clawdemy_infer.lesson.tables import si
from clawdemy_infer.lesson.waterfall import REST, account


def how_to_read(lesson: Lesson, quantity: str) -> str:
    """Lines to print under the waterfall of `quantity`, a time; none before it is measured."""
    row = lesson.rows[quantity]
    if row.measured is None:
        return ""
    at = lesson.moments[quantity]
    steps, *_, sentence = account(row, at)
    noise_s = row.measured * (row.spread or 0)
    below = [name for name, seconds in steps.items()
             if seconds < -noise_s and name != REST and "at that moment" not in name]
    lines = [f"A launch: {si(1 / part['reached'], 's')} in this step's turns, "
             f"{si(1 / part['bound'], 's')} in the prediction."
             for part in row.parts if part.get("unit") == "launches/s" and part["reached"]]
    if below:
        lines.append(f"Below 0 ({', '.join(below)}): faster than the napkin's share. Its peak and "
                     "bandwidth\nwere measured on other work; they are no hard limits.")
    if row.parts and steps[REST] < -noise_s:
        lines.append(f"The parts, timed by themselves, add up to {si(-steps[REST], 's')} more than "
                     "the whole.\nThat surplus is not explained.")
    if sentence.startswith("Impossible") and at.fastest != at.speed:
        lines.append(f"The {at.kind} was timed before and after. The bar has the mean, "
                     f"{si(row.napkin / at.speed, 's')} in all;\nwhat is impossible is judged by "
                     f"the faster, {si(row.napkin / at.fastest, 's')}.")
    return "\n".join(lines)
