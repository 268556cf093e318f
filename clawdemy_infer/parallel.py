"""Several devices: what each of them holds and does in a step, and what they must tell one another. Arithmetic, no network.

    tensor parallel (tp)     every matrix is cut; each device has N/tp query heads and F/tp of the width: 1/tp of the weights and of
                             the cache, at the price of two all-reduces a layer (Shoeybi et al. 2019, Megatron-LM, section 3)
    pipeline parallel (pp)   each device has L/pp layers: 1/pp of the weights, but a token passes all the stages in sequence, so that
                             one sequence gets no faster (Huang et al. 2019, GPipe)
    expert parallel (ep)     each device has 1/ep of the experts and of the sequences; tokens travel to their experts and back
                             (Lepikhin et al. 2020, GShard; Rajbhandari et al. 2022, DeepSpeed-MoE)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from clawdemy_infer.arithmetic import Capacity, Experts, Format, Layer, ModelShape, Work, at_least_1, element_bytes, total
from clawdemy_infer.roofline import Link

# ---- what a transfer costs ----


def all_reduce_s(bytes: float, devices: int, link: Link) -> float:
    """Seconds until each of `devices` has the sum of all their arrays of `bytes`, by a ring.

    A ring passes p-th parts around twice, once to sum and once to share: 2(p-1) steps of bytes/p, 2(p-1)/p · bytes from every
    device in all (Thakur, Rabenseifner and Gropp 2005, section 4; Patarasuk and Yuan 2009 prove that fewer bytes cannot do it).
    Nothing for one device. Raises ValueError for devices < 1.
    """
    at_least_1(devices=devices)
    steps = 2 * (devices - 1)
    return link.latency_s + steps * (link.hop_s + bytes / devices / link.bytes_per_s) if steps else 0.0


def all_to_all_s(bytes: float, devices: int, link: Link) -> float:
    """Seconds until each of `devices` has sent its `bytes` to where they belong, in equal shares: (p-1)/p of them leave the device.

    By p-1 pairwise exchanges (Thakur et al. 2005, section 4). Nothing for one device. Raises ValueError for devices < 1.
    """
    at_least_1(devices=devices)
    steps = devices - 1
    return link.latency_s + steps * (link.hop_s + bytes / devices / link.bytes_per_s) if steps else 0.0


def send_s(bytes: float, link: Link) -> float:
    """Seconds to hand `bytes` to one other device."""
    return link.latency_s + link.hop_s + bytes / link.bytes_per_s


# ---- who holds what ----


@dataclass(frozen=True)
class Layout:
    """How a model lies on tp · pp · ep devices.

    The batch is cut twice. Each of the ep groups has its own sequences, and attends to them with its own copy of all that is not an
    expert. In a group they pass the pp stages in up to pp microbatches, so that every stage has one to work on.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.ep

    def check(self, shape: ModelShape) -> None:
        """ValueError naming the argument by which `shape` cannot be cut."""
        tp, pp, ep = self.tp, self.pp, self.ep
        at_least_1(tp=tp, pp=pp, ep=ep)
        if shape.N % tp or (shape.K % tp and tp % shape.K):
            raise ValueError(f"tp={tp}: it must divide the N={shape.N} query heads, and divide the K={shape.K} KV heads "
                             "or be a multiple of them")
        if shape.ssm and (shape.ssm.inner % tp or shape.ssm.heads % tp):
            raise ValueError(f"tp={tp}: it must divide the {shape.ssm.inner} channels and the {shape.ssm.heads} heads of the state space")
        if pp > shape.L:
            raise ValueError(f"pp={pp}: at most a stage for each of the L={shape.L} layers")
        if ep > 1 and not shape.moe:
            raise ValueError(f"ep={ep}: {shape.name} has no experts, so only 1 is accepted")
        if shape.moe and shape.moe.experts % ep:
            raise ValueError(f"ep={ep}: it must divide the {shape.moe.experts} experts")

    def sequences(self, batch: int) -> int:
        """Sequences in the cache of one device: those of its group, in the largest group."""
        return ceil(batch / self.ep)

    def microbatch(self, batch: int) -> int:
        """Sequences that pass a stage together."""
        return ceil(self.sequences(batch) / self.pp)

    def filling(self, batch: int) -> float:
        """How much longer a prefill takes because the pipeline starts empty: m microbatches need pp + m - 1 turns, the first alone pp."""
        microbatches = ceil(self.sequences(batch) / self.microbatch(batch))
        return 1 + (microbatches - 1) / self.pp


ONE_DEVICE = Layout()


def share(shape: ModelShape, tp: int) -> ModelShape:
    """What one of `tp` devices computes: a model with fewer heads, a narrower feed-forward part, fewer channels, less vocabulary.

    With more devices than KV heads, each device holds one, so they are held more than once. Never cut: the residual stream of
    width D, and the latent of latent attention, which every head reads.
    """
    moe, ssm = shape.moe, shape.ssm
    return replace(
        shape, N=shape.N // tp, K=ceil(shape.K / tp), F=ceil(shape.F / tp), V=ceil(shape.V / tp),
        moe=moe and replace(moe, F=moe.F and ceil(moe.F / tp), shared=ceil(moe.shared / tp)),
        ssm=ssm and replace(ssm, inner=ssm.inner // tp, heads=ssm.heads // tp, groups=ceil(ssm.groups / tp)),
    )


def step(shape: ModelShape, layout: Layout, batch: int, new: int, context: int, **formats) -> Work:
    """What stands between a token and the next: the stages one after the other, and in each of them the work of one device.

    A step of the whole batch in a pipeline that is kept full. At batch 1 that is once all the layers: pp devices have pp times the
    bandwidth, but only one of them is ever busy. `formats` as in `ModelShape.step`.
    """
    layout.check(shape)
    own, group = share(shape, layout.tp), layout.microbatch(batch)
    work = own.step(group, new, context, **formats)
    if layout.ep == 1:
        return work
    # The experts of one device serve the tokens of all ep groups: 1/ep of what one device with all experts would do for them.
    everyone = own.step(group * layout.ep, new, context, **formats)
    return total("step", [theirs * (1 / layout.ep) if op.name.startswith("expert ") else op
                          for op, theirs in zip(work.operations(), everyone.operations(), strict=True)])


def fits(shape: ModelShape, layout: Layout, memory: float, batch: int, context: int, weights: Format = "bf16",
         kv: Format = "bf16") -> Capacity:
    """Does the fullest stage fit into the `memory` bytes of each of its devices? `batch` of the result is what those devices cache."""
    layout.check(shape)
    at_least_1(batch=batch, context=context)
    own, sequences, table = share(shape, layout.tp), layout.sequences(batch), ceil(shape.V / layout.tp) * shape.D
    stages = [own.layers[stage * shape.L // layout.pp:(stage + 1) * shape.L // layout.pp] for stage in range(layout.pp)]
    parameters = [sum(_held(layer, layout.ep) for layer in stage) for stage in stages]
    # The first stage has the embedding. The last has what follows the layers, and where head and embedding are one, a copy of it.
    before = table + shape.positions * shape.D
    after = own.parameters() - sum(layer.parameters() for layer in own.layers) - before
    parameters[0] += before
    parameters[-1] += after + table * (shape.tied and len(stages) > 1)
    cached = [sequences * sum(layer.mixer.kept(context) for layer in stage) for stage in stages]
    return max((Capacity(memory, p * element_bytes("weights", weights), c * element_bytes("kv", kv), sequences)
                for p, c in zip(parameters, cached, strict=True)), key=lambda stage: stage.weight_bytes + stage.kv_bytes)


def _held(layer: Layer, ep: int) -> int:
    """Parameters of a layer on one device: all of it but the experts that live elsewhere."""
    if not isinstance(layer.feed_forward, Experts):
        return layer.parameters()
    experts = layer.feed_forward.moe.experts
    return layer.parameters() - (experts - experts // ep) * layer.feed_forward.expert.parameters()


# ---- what they tell one another ----


@dataclass(frozen=True)
class Transfer:
    """So many `calls` of one kind in a step, each of `bytes` (the array that a device holds), and the seconds of all of them."""

    name: str
    calls: int
    bytes: float
    seconds: float


def transfers(shape: ModelShape, layout: Layout, batch: int, new: int, link: Link, activations: str = "bf16") -> list[Transfer]:
    """What devices tell one another in a step, with B the microbatch. A step waits for all of it; nothing is assumed to overlap.

        tp   an all-reduce of [B·T, D] after each mixer and each feed-forward part; one for both where they are parallel
        ep   an all-to-all of [B·T·k, D] to the experts and one back, in every layer that has them; the load is taken as even
        pp   a send of [B·T, D] between stages

    Left out: gathering logits or the parts of a vocabulary, a call or two in a step. Raises ValueError as `Layout.check`.
    """
    layout.check(shape)
    stream = layout.microbatch(batch) * new * shape.D * element_bytes("activations", activations)
    found = []
    if layout.tp > 1:
        calls = sum(count * (2 if layer.feed_forward and not layer.parallel else 1) for layer, count in shape.groups)
        found.append(("all-reduce", calls, stream, all_reduce_s(stream, layout.tp, link)))
    if layout.ep > 1:
        calls = 2 * sum(count for layer, count in shape.groups if isinstance(layer.feed_forward, Experts))
        sent = shape.moe.active * stream
        found.append(("all-to-all", calls, sent, all_to_all_s(sent, layout.ep, link)))
    if layout.pp > 1:
        found.append(("send", layout.pp - 1, stream, send_s(stream, link)))
    return [Transfer(name, calls, bytes, calls * seconds) for name, calls, bytes, seconds in found]
