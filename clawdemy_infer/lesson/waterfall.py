"""From napkin to measured, step by step: what was measured of each part, and what no part accounts
for. Nobody types a cause; the largest step is one."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from clawdemy_infer.envelope.roofline import Prediction
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.tables import percent, si

BETWEEN_PRODUCTS = {"attention", "scan", "element-wise", "launches", "communication"}
"""Parts of a step besides its products, which are told together: "products"."""
REST = "not explained"
MOST_PARTS = 4      # that a waterfall shows; the small ones stand together
COUNTED = {"memory": ("bytes", "bandwidth"), "compute": ("FLOPs", "peak")}


class Moment(NamedTuple):
    """The machine around a run: `kind` is what the napkin waits for, memory or compute; its `speed`
    (the mean of before and after) and the `fastest` are fractions of what predicted."""

    kind: str = "memory"
    speed: float = 1.0
    fastest: float = 1.0


AS_CALIBRATED = Moment()


def moment(said: object, machine: object, around: Sequence = ()) -> Moment:
    """Of a run that `said` predicted at `machine.now`, with the `Speeds` right `around` it."""
    parts = said.parts.values() if isinstance(said, Prediction) else ()     # their own bounds:
    # `compute_s` has the rates of products with few rows too, which memory limits.
    kind = max(COUNTED, key=lambda kind: sum(part.seconds for part in parts if part.bound == kind))
    now = getattr(getattr(machine, "now", None), kind, 1.0)             # a data sheet has no now
    speeds = [getattr(one, kind) / now for one in around] or [1.0]
    return Moment(kind, sum(speeds) / len(speeds), max(speeds))


def shares(parts: Iterable[dict], whole_s: float) -> tuple[dict, ...]:
    """The parts of a step that was watched, as shares of another run of it, of `whole_s`."""
    scale = whole_s / getattr(parts, "whole_s", whole_s)
    return tuple(part | {"measured_s": part["measured_s"] * scale,
                         "reached": part.get("reached") and part["reached"] / scale}
                 for part in parts)


def choices(parts: Iterable[str]) -> list[str]:
    """What may be named as a cause, where these are the parts."""
    parts, changes = list(parts), [f"{kind} was {way} than calibrated" for kind in COUNTED
                                   for way in ("slower", "faster")]
    return [*["products"] * bool(BETWEEN_PRODUCTS & set(parts)), *parts, *changes, REST]


class Account(NamedTuple):
    """`steps` lead from napkin to measured, in the row's unit, `REST` the last. `causes`: the words
    that rightly name the largest; none, if there is nothing to explain."""

    steps: dict[str, float]
    causes: tuple[str, ...]
    explained: float | None
    sentence: str


def account(row: LedgerRow, at: Moment = AS_CALIBRATED) -> Account:
    """Each part's step is what it took beyond its share of the napkin, at the speed around the run.
    What the speed and the parts leave of measured - napkin is not explained."""
    counted, limit = COUNTED[at.kind]
    if at.speed != 1:
        limit += " at that moment"
    parts = _together(row.parts, at)
    steps = {limit: row.napkin * (1 / at.speed - 1)} if at.speed != 1 else {}
    steps |= {name: _step(some, at) for name, some in parts.items()}
    difference = row.measured - row.napkin
    rest = difference - sum(steps.values())
    steps[REST] = rest if abs(rest) > 1e-9 * row.measured else 0.0      # nor what rounding leaves

    def change(value: float) -> str:
        return f"{'+' * (value > 0)}{si(value, row.unit)}"

    largest = max(steps, key=lambda name: abs(steps[name]))
    if largest in parts:
        causes = largest, *(part["name"] for part in parts[largest])
    else:
        way = "slower" if steps[largest] > 0 else "faster"
        causes = (REST if largest == REST else f"{at.kind} was {way} than calibrated",)
    differs = abs(difference) > (row.spread or 0) * row.measured
    explained = 1 - abs(steps[REST] / difference) if differs else None

    # 1. What is faster than its own bound did not happen as it was counted.
    bound = row.napkin / at.fastest
    if row.unit == "s" and row.spread is not None and row.measured * (1 + row.spread) < bound:
        return Account(steps, causes, explained, (
            f"Impossible as stated: the napkin's {counted} take {si(bound, 's')} at the {limit}, "
            f"and it took {si(row.measured, 's')}. Not counted: what spared it "
            f"{percent(1 - row.measured / bound)} of those {counted}. The largest step: {largest}, "
            f"{change(steps[largest])}."))

    # 2. Within what the clock can tell there is no difference.
    if not differs:
        within = f", within the clock's own spread of ± {percent(row.spread)}" if row.spread else ""
        return Account(steps, (), None, f"Nothing to explain: {change(difference)} from napkin to "
                       f"measured{within}.")

    # 3. Else the largest step, and what was measured of it.
    share = steps[largest] / difference
    beside = (f", {percent(share)} of the {change(difference)} from napkin to measured"
              if 0 < share < 2 else f", and {change(difference)} from napkin to measured in all")
    sentence = f"{causes[0]}: {change(steps[largest])}{beside}"
    if largest in parts:
        sentence += _reached(parts[largest], at, limit)
    elif largest != REST:
        sentence += f"; {at.kind} ran at {percent(at.speed)} of the speed the prediction used"
    if largest != REST:
        sentence += f". Not explained: {change(steps[REST])}"
    return Account(steps, causes, explained, f"{sentence[0].upper()}{sentence[1:]}.")


def _together(parts: Sequence[dict], at: Moment) -> dict[str, list[dict]]:
    """Parts by the name of their step: the products of a step are one, and so are small parts."""
    found: dict[str, list[dict]] = {}
    is_step = any(part["name"] in BETWEEN_PRODUCTS for part in parts)
    for part in parts:
        product = is_step and part["name"] not in BETWEEN_PRODUCTS
        found.setdefault("products" if product else part["name"], []).append(part)
    for name in sorted(found, key=lambda name: abs(_step(found[name], at)))[:-MOST_PARTS]:
        found["other parts"] = found.get("other parts", []) + found.pop(name)
    return found


def _step(parts: list[dict], at: Moment) -> float:
    return sum(part["measured_s"] - part["napkin_s"] / at.speed for part in parts)


def _reached(parts: list[dict], at: Moment, limit: str) -> str:
    """What was measured of a step: launches and their price, or the rate against the bound."""
    def rate(parts: list[dict]) -> str:
        spent = sum(part["measured_s"] for part in parts)
        return percent(sum(part["napkin_s"] for part in parts) / at.speed / spent)

    worst = max(parts, key=lambda part: abs(_step([part], at)))
    if worst.get("unit") == "launches/s":
        return (f"; {worst['reached'] * worst['measured_s']:,.0f} launches at "
                f"{si(1 / worst['reached'], 's')}")
    if not worst["napkin_s"] or not worst["measured_s"]:
        return ""
    most = f", {worst['name']} at {rate([worst])}" if len(parts) > 1 else ""
    return f"; at {rate(parts)} of the {limit}{most}"
