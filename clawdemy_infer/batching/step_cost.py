"""What a ragged step costs: some sequences decode, others bring chunks, and all share the weights.

Everything but attention sees M rows and not whose they are: what `ModelShape.step` says of one
sequence with M new tokens. Attention is one operation for each chunk, and one for all that decode:
linear in the keys that a sequence sees, so B sequences ask for what they would if each saw the
mean. For sequences that are all alike the result is `Machine.time(shape.step(...))`."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from clawdemy_infer.arithmetic import ModelShape, Pass, Work
from clawdemy_infer.envelope.parallel import ONE_DEVICE, Layout, share, transfers
from clawdemy_infer.envelope.roofline import PAGED_ATTENTION, Machine

Term = tuple[float, float, float]
"""An operation: seconds to compute, bytes to move, and the most bytes/s that it can handle."""


class Operations(NamedTuple):
    """Operations that a step dispatches, each at the machine's fixed cost: `step` in any case, and
    `group` for each group of sequences that bring equally many tokens, or `split` where there are
    several. Counted from the model that runs; 0 where only a data sheet is known."""

    step: int = 0
    group: int = 0
    split: int = 0

    def of(self, groups: int) -> int:
        return self.step + (self.split if groups > 1 else self.group) * groups


class StepCost:
    """Seconds of a step of `shape` on `machine`, in these formats.

    With a tensor-parallel `layout` (Shoeybi et al. 2019): the work of one device, and the time that
    they talk. Raises ValueError for a layout of another kind, or a machine without a link."""

    def __init__(self, shape: ModelShape, machine: Machine, weights="bf16", kv="bf16",
                 activations="bf16", operations: Operations | None = None,
                 layout: Layout = ONE_DEVICE) -> None:
        layout.check(shape)
        if layout.pp > 1 or layout.ep > 1:
            raise ValueError(f"layout={layout}: only tensor parallel (tp) is simulated")
        if layout.tp > 1 and machine.link is None:
            raise ValueError(f"tp={layout.tp}: {machine.name} has no link to another of its kind")
        self.whole, self.shape, self.layout = shape, share(shape, layout.tp), layout
        self.machine, self.operations = machine, operations or Operations()
        self.formats = {"weights": weights, "kv": kv, "activations": activations}
        self.fixed_s = machine.fixed_s(shape.head(1, weights, activations))
        # A simulation asks for the same few hundred sizes millions of times.
        self._rows, self._attention = cache(self._rows), cache(self._attention)
        self._talk = cache(self._talk)

    def seconds(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]] = (),
                extra_logits: int = 0) -> float:
        """One step. For each of `contexts` a sequence brings a token and then has that many; for
        each of `chunks` = (T, S) it brings T and then has S. Of a chunk the last token alone needs
        logits; where drafted tokens are verified, `extra_logits` more."""
        rows = len(contexts) + sum([T for T, _ in chunks])
        terms = list(self._rows(rows, len(contexts) + len(chunks) + extra_logits))
        if contexts:
            terms += self._decode(contexts)
        for T, S in chunks:
            terms += self._attention(1, T, S)
        groups = {T for T, _ in chunks} | ({1} if contexts else set())
        return self._seconds(terms, rows, len(groups))

    def padded(self, B: int, T: int, S: int) -> float:
        """A padded step: B sequences, T new tokens each, over a context of S."""
        return self._seconds([*self._rows(B * T, B), *self._attention(B, T, S)], B * T, groups=1)

    def _seconds(self, terms: list[Term], rows: int, groups: int) -> float:
        """As `Machine.time`: each operation by compute or by memory, the working set the whole."""
        bandwidth = self.machine.bandwidth_at(sum([moved for _, moved, _ in terms]))
        return (sum([max(compute, bytes / min(bandwidth, most)) for compute, bytes, most in terms])
                + self._talk(rows) + self.operations.of(groups) * self.fixed_s)

    def _rows(self, M: int, logits: int) -> list[Term]:
        """All that does not ask whose row is whose, and the head on `logits` of the M rows."""
        run = Pass(1, M, M, **self.formats)
        layers = [self._term(op, count) for layer, count in self.shape.groups
                  for op in layer.of_rows(run)]
        return [*layers, self._term(self.shape.head(logits, run.weights, run.activations))]

    def _talk(self, M: int) -> float:
        return sum(transfer.seconds for transfer in transfers(
            self.whole, self.layout, 1, M, self.machine.link, self.formats["activations"]))

    def _decode(self, contexts: Sequence[int]) -> list[Term]:
        """All that decode, over pages."""
        terms = []
        for layer, count in self.shape.groups:
            window = layer.mixer.window
            keys = sum([min(S, window) for S in contexts] if window else contexts)
            run = Pass(len(contexts), 1, keys / len(contexts), **self.formats)
            terms += [self._term(op._replace(kernel=PAGED_ATTENTION) if op.keys else op, count)
                      for op in layer.mixer.of_sequences(run)]
        return terms

    def _attention(self, B: int, T: int, S: int) -> list[Term]:
        run = Pass(B, T, S, **self.formats)
        return [self._term(op, count) for layer, count in self.shape.groups
                for op in layer.mixer.of_sequences(run)]

    def _term(self, op: Work, count: int = 1) -> Term:
        compute_s = count * op.flops / self.machine.flops_at(op) if op.flops else 0.0
        return compute_s, count * op.bytes, self.machine.handles_at(op)
