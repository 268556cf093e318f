"""What a ragged step costs: some sequences decode, others bring a chunk of a prompt, and all share one read of the weights.

Everything but attention sees M rows and not whose they are; it costs what `ModelShape.step` says of one sequence with M new
tokens. Attention is one operation for all that decode, and one for each chunk. For a decoding sequence its FLOPs and bytes are a
straight line in the keys that it sees, so the line is worked out once and a step needs only the sum of what is seen. For
sequences that are all alike the result is `Machine.time(shape.step(...))`, operation by operation, which the tests hold it to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2

from clawdemy_infer.arithmetic import Attention, LatentAttention, ModelShape, Pass, Work
from clawdemy_infer.arithmetic.layer import Layer
from clawdemy_infer.parallel import ONE_DEVICE, Layout, share, transfers
from clawdemy_infer.roofline import PAGED_ATTENTION, Machine

OF_SEQUENCES = ("attention", "kv_b", "absorb_k", "absorb_v", "scan")
"""Operations that depend on more than the number of rows."""

Term = tuple[float, float, float]
"""Of one operation: seconds to compute, bytes to move, and the most bytes/s that it can handle."""


@dataclass(frozen=True)
class Operations:
    """How many operations a step dispatches, each at the machine's fixed cost. Counted from the model that runs; 0 for a machine of
    which only the data sheet is known.

    step in any case, decode if somebody decodes, chunk for each chunk of a prompt, mixed where there are both, resumed for each
    chunk before which others came. Resumed chunks of up to `few` tokens, as of drafts, are computed like tokens that are decoded:
    all that bring as many together.
    """

    step: int = 0
    decode: int = 0
    chunk: int = 0
    mixed: int = 0
    resumed: int = 0
    few: int = 0

    def of(self, decodes: int, chunks: list[tuple[int, int]]) -> int:
        """Operations of one step; arguments as of `StepCost.seconds`."""
        few = {T for T, S in chunks if T <= self.few and S > T}
        many = [(T, S) for T, S in chunks if T not in few or S == T]
        together = len(few) + bool(decodes)
        mixed = self.mixed if together + bool(many) > 1 else 0
        return self.step + self.decode * together + self.chunk * len(many) + mixed + self.resumed * sum([S > T for T, S in many])


class StepCost:
    """Seconds of a step of `shape` on `machine`, in these formats.

    With `layout`, on several devices that share every matrix (tensor parallel; Shoeybi et al. 2019): the work of one of them, and
    the time that they spend on talking. Raises ValueError for a layout of another kind, or a machine without a link.
    """

    def __init__(self, shape: ModelShape, machine: Machine, weights="bf16", kv="bf16", activations="bf16",
                 operations: Operations | None = None, layout: Layout = ONE_DEVICE) -> None:
        layout.check(shape)
        if layout.pp > 1 or layout.ep > 1:
            raise ValueError(f"layout={layout}: only tensor parallel (tp) is simulated")
        if layout.tp > 1 and machine.link is None:
            raise ValueError(f"tp={layout.tp}: {machine.name} has no link to another of its kind")
        self.whole, self.shape, self.machine, self.layout = shape, share(shape, layout.tp), machine, layout
        self.formats = {"weights": weights, "kv": kv, "activations": activations}
        self.operations = operations or Operations()
        self.windows = tuple(dict.fromkeys(_window(layer) for layer, _ in self.shape.groups))
        """Distinct windows of the layers; None for those that see everything."""
        # A simulation asks for the same few hundred sizes millions of times.
        self._rows, self._decode, self._chunk = cache(self._rows), cache(self._decode), cache(self._chunk)
        self._rows_seconds = lru_cache(4096)(self._rows_seconds)

    def visible(self, contexts: Iterable[int]) -> list[int]:
        """For each of `windows`, the sum of the keys that sequences of these contexts see."""
        contexts = list(contexts)
        return [sum(contexts) if window is None else sum(min(S, window) for S in contexts) for window in self.windows]

    def seconds(self, decodes: int, visible: list[int], chunks: Iterable[tuple[int, int]] = (), drafted: int = 0) -> float:
        """One step in which `decodes` sequences bring a token each and see `visible` keys, their own included, and for each of
        `chunks` a sequence brings T tokens and then has S. Of a chunk the last token alone needs logits; with drafted tokens in
        chunks of their own, `drafted` more."""
        chunks, terms = list(chunks), []
        rows = decodes + sum([T for T, _ in chunks]), decodes + len(chunks) + drafted
        for chunk in chunks:
            terms += self._chunk(*chunk)
        if decodes:
            seen = dict(zip(self.windows, visible, strict=True))
            near = tuple([_near(keys / decodes) for keys in visible])
            for window, (compute, bytes, handles), (more_compute, more_bytes, _) in self._decode(decodes, near):
                keys = seen[window] - decodes
                terms.append((compute + keys * more_compute, bytes + keys * more_bytes, handles))
        return self._bound(rows, terms) + self.operations.of(decodes, chunks) * self.machine.fixed_s_per_op

    def rectangle(self, B: int, T: int, S: int) -> float:
        """A padded step: B sequences, T new tokens each, over a context of S."""
        run = Pass(B, T, S, **self.formats)
        terms = [self._term(op, count) for layer, count in self.shape.groups for op in _of_sequences(layer, run)]
        ops = self.operations.step + (self.operations.decode if T == 1 else self.operations.chunk)
        return self._bound((B * T, B), terms) + ops * self.machine.fixed_s_per_op

    def _bound(self, rows: tuple[int, int], terms: list[Term]) -> float:
        """As `Machine.time`: each operation by compute or by memory, the working set being the whole. `rows` are the arguments of
        `_rows`, `terms` the operations that are not in it."""
        _, bytes, talk = self._rows(*rows)
        bandwidth = self.machine.bandwidth_at(bytes + sum([bytes for _, bytes, _ in terms]))
        return self._rows_seconds(*rows, bandwidth) + self._sum(terms, bandwidth) + talk

    def _sum(self, terms: list[Term], bandwidth: float) -> float:
        return sum([max(compute, bytes / min(bandwidth, handles)) for compute, bytes, handles in terms])

    def _rows_seconds(self, M: int, heads: int, bandwidth: float) -> float:
        return self._sum(self._rows(M, heads)[0], bandwidth)

    def _term(self, op: Work, times: float = 1) -> Term:
        return times * op.flops / self.machine.flops_at(op) if op.flops else 0.0, times * op.bytes, self.machine.handles_at(op)

    def _rows(self, M: int, heads: int) -> tuple[list[Term], float, float]:
        """All that does not ask whose row is whose, the head on `heads` of them; its bytes; and the seconds spent on talking."""
        run = Pass(1, M, M, **self.formats)
        terms = [self._term(op, count) for layer, count in self.shape.groups for op in layer.work(run).operations()
                 if op.name not in OF_SEQUENCES]
        talk = transfers(self.whole, self.layout, 1, M, self.machine.link, self.formats["activations"]) if self.layout.tp > 1 else []
        formats = {name: self.formats[name] for name in ("weights", "activations")}
        terms.append(self._term(self.shape.head(heads, **formats)))
        return terms, sum(bytes for _, bytes, _ in terms), sum(transfer.seconds for transfer in talk)

    def _decode(self, B: int, near: tuple[float, ...]) -> list[tuple[int | None, Term, Term]]:
        """For each kind of layer: its window, what its operations cost when each of B sequences sees one key, and for one key more; at
        the rate that attention has when it sees `near` keys, of each window, or that of pages where it was measured."""
        found, near, paged = [], dict(zip(self.windows, near, strict=True)), PAGED_ATTENTION in self.machine.rates
        for layer, count in self.shape.groups:
            # Latent attention decodes in its absorbed form, which is the cheaper one beyond the first few tokens.
            one, two = (_of_sequences(layer, Pass(B, 1, S, absorbed=True, **self.formats)) for S in (1, 2))
            for first, second in zip(one, two, strict=True):
                how = {"kernel": PAGED_ATTENTION, "keys": 0} if paged and first.keys else {"keys": first.keys and near[_window(layer)]}
                base, more = (self._term(op._replace(**how), count) for op in (first, second))
                slope = (more[0] - base[0]) / B, (more[1] - base[1]) / B, base[2]
                found.append((_window(layer), base, slope))
        return found

    def _chunk(self, T: int, S: int) -> list[Term]:
        run = Pass(1, T, S, **self.formats)
        return [self._term(op, count) for layer, count in self.shape.groups for op in _of_sequences(layer, run)]


def _of_sequences(layer: Layer, run: Pass) -> list[Work]:
    """The operations of one layer that depend on whose row is whose."""
    mixer = layer.mixer
    if isinstance(mixer, Attention):
        return [mixer.attend(run)]
    return mixer.attend(run) if isinstance(mixer, LatentAttention) else [mixer.scan(run)]


def _near(keys: float) -> float:
    """Within a tenth of `keys`, and one of a few: rates change little with it."""
    return 2 ** (round(4 * log2(keys)) / 4)


def _window(layer: Layer) -> int | None:
    return getattr(layer.mixer, "window", None)
