"""Several devices: what each holds and does in a step, and what they must tell one another.

    tp   tensor parallel: a device has N/tp query heads, F/tp of the width, 1/tp of weights and
         cache, at two all-reduces a layer (Shoeybi et al. 2019, Megatron-LM, section 3)
    pp   pipeline parallel: a device has L/pp layers, but a token passes all the stages in
         sequence: one sequence gets no faster (Huang et al. 2019, GPipe)
    ep   expert parallel: a device has 1/ep of the experts and of the sequences; tokens travel to
         their experts and back (Lepikhin et al. 2020; Rajbhandari et al. 2022, DeepSpeed-MoE)
"""

from dataclasses import dataclass, replace
from math import ceil

from clawdemy_infer.arithmetic import Capacity, Experts, Format, Layer, ModelShape, Work
from clawdemy_infer.arithmetic.feed_forward import weigh
from clawdemy_infer.arithmetic.work import at_least_1, element_bytes, total
from clawdemy_infer.envelope.roofline import Link


@dataclass(frozen=True)
class Layout:
    """How a model lies on tp · pp · ep devices. The batch is cut twice: each of the ep groups has
    its own sequences, and its own copy of all that is not an expert. In a group they pass the pp
    stages in up to pp microbatches, so that every stage has one to work on."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.ep

    def check(self, shape: ModelShape) -> None:
        """ValueError naming the argument by which `shape` cannot be cut."""
        tp, pp, ep, ssm = self.tp, self.pp, self.ep, shape.ssm
        at_least_1(tp=tp, pp=pp, ep=ep)
        if shape.N % tp or (shape.K % tp and tp % shape.K):
            raise ValueError(f"tp={tp}: it must divide the N={shape.N} query heads, and divide the "
                             f"K={shape.K} KV heads or be a multiple of them")
        if ssm and (ssm.inner % tp or ssm.heads % tp):
            raise ValueError(f"tp={tp}: it must divide the {ssm.inner} channels and the "
                             f"{ssm.heads} heads of the state space")
        if pp > shape.L:
            raise ValueError(f"pp={pp}: at most a stage for each of the L={shape.L} layers")
        if ep > 1 and not shape.moe:
            raise ValueError(f"ep={ep}: {shape.name} has no experts, so only 1 is accepted")
        if shape.moe and shape.moe.experts % ep:
            raise ValueError(f"ep={ep}: it must divide the {shape.moe.experts} experts")

    def microbatch(self, batch: int) -> int:
        """Sequences that pass a stage together."""
        return ceil(batch / (self.ep * self.pp))

    def filling(self, batch: int) -> float:
        """How much longer a prefill takes because the pipeline starts empty: m microbatches need
        pp + m - 1 turns, the first alone pp."""
        return 1 + (ceil(batch / (self.ep * self.microbatch(batch))) - 1) / self.pp


ONE_DEVICE = Layout()


def share(shape: ModelShape, tp: int) -> ModelShape:
    """What one of `tp` devices computes: a model with fewer heads (but at least one KV head), a
    narrower feed-forward part, fewer channels, less vocabulary. Never cut: the residual stream of
    width D, and the latent of latent attention, which every head reads."""
    moe, ssm = shape.moe, shape.ssm
    if moe:
        moe = replace(moe, F=moe.F and ceil(moe.F / tp), shared=ceil(moe.shared / tp))
    if ssm:
        ssm = replace(ssm, inner=ssm.inner // tp, heads=ssm.heads // tp,
                      groups=ceil(ssm.groups / tp))
    full = (ceil(shape.full[0] / tp), shape.full[1]) if shape.full else ()
    return replace(shape, N=shape.N // tp, K=ceil(shape.K / tp), F=ceil(shape.F / tp),
                   V=ceil(shape.V / tp), moe=moe, ssm=ssm, full=full)


def step(shape: ModelShape, layout: Layout, batch: int, new: int, context: int, **formats) -> Work:
    """What a token waits for: the stages one after the other, in each the work of one device, in a
    pipeline that is kept full. At batch 1 that is once all the layers: of pp devices only one is
    ever busy. `formats` as in `ModelShape.step`."""
    layout.check(shape)
    own, group = share(shape, layout.tp), layout.microbatch(batch)
    work = own.step(group, new, context, **formats)
    if layout.ep == 1:
        return work
    # The experts of a device serve all ep groups: 1/ep of what one device with all would do.
    everyone = own.step(group * layout.ep, new, context, **formats)
    return total("step", [theirs * (1 / layout.ep) if op.name.startswith("expert ") else op
                          for op, theirs in zip(work.operations(), everyone.operations(),
                                                strict=True)])


def fits(shape: ModelShape, layout: Layout, memory: float, batch: int, context: int,
         weights: Format = "bf16", kv: Format = "bf16") -> Capacity:
    """Does the fullest stage of the largest group fit into `memory` bytes a device? It caches its
    part of `batch`."""
    layout.check(shape)
    at_least_1(batch=batch, context=context)
    own, sequences, pp = share(shape, layout.tp), ceil(batch / layout.ep), layout.pp
    stages = [own.layers[i * shape.L // pp:(i + 1) * shape.L // pp] for i in range(pp)]
    held = [sum(weigh(_held(layer, layout.ep), weights) for layer in stage) for stage in stages]
    # The first stage has the tables, the last what follows the layers, with a copy if tied.
    held[0] += weigh({"embedding": own.gathered}, weights)
    held[-1] += weigh(own.ends, weights)
    held[0] += weigh({"head": own.V * own.D}, weights) if shape.tied and pp > 1 else 0
    cached = [sequences * sum(layer.held(context, kv) for layer in stage) for stage in stages]
    return max((Capacity(memory, *stage, sequences) for stage in zip(held, cached, strict=True)),
               key=lambda stage: stage.weight_bytes + stage.kv_bytes)


def _held(layer: Layer, ep: int) -> dict[str, float]:
    """Numbers of a layer on one device: all of it but the experts that live elsewhere."""
    return {name: count // ep if "expert" in name.split() else count
            for name, count in layer.numbers().items()}


def all_reduce_s(bytes: float, devices: int, link: Link) -> float:
    """Seconds until each of `devices` has the sum of all their arrays of `bytes`, by a ring that
    passes p-th parts around twice, to sum and to share: 2(p-1) steps of bytes/p (Thakur et al.
    2005, section 4; no fewer bytes do: Patarasuk and Yuan 2009). ValueError for devices < 1."""
    at_least_1(devices=devices)
    return _steps_s(2 * (devices - 1), bytes / devices, link)


def _steps_s(steps: int, bytes: float, link: Link) -> float:
    return link.latency_s + steps * (link.hop_s + bytes / link.bytes_per_s) if steps else 0.0


@dataclass(frozen=True)
class Transfer:
    """`calls` transfers in a step, each of an array of `bytes`, and the seconds of all of them."""

    name: str
    calls: int
    bytes: float
    seconds: float


def transfers(shape: ModelShape, layout: Layout, batch: int, new: int, link: Link,
              activations: str = "bf16") -> list[Transfer]:
    """What devices tell one another in a step, with B the microbatch. A step waits for all of it.

        tp   an all-reduce of [B·T, D] after each mixer and feed-forward part; parallel: one
        ep   an all-to-all of [B·T·k, D] to each token's k experts and one back, of even load, by
             p-1 pairwise exchanges (Thakur et al. 2005, section 4)
        pp   a send of [B·T, D] between stages

    Left out: gathering logits, a call or two in a step. Raises ValueError as `Layout.check`."""
    layout.check(shape)
    stream = layout.microbatch(batch) * new * shape.D * element_bytes("activations", activations)
    found = []
    if layout.tp > 1:
        calls = sum(count * (1 if layer.parallel else layer.parts)
                    for layer, count in shape.groups)
        found.append(("all-reduce", calls, stream, all_reduce_s(stream, layout.tp, link)))
    if layout.ep > 1:
        calls = 2 * sum(count for layer, count in shape.groups
                        if isinstance(layer.feed_forward, Experts))
        sent = shape.moe.active * stream
        found.append(("all-to-all", calls, sent, _steps_s(layout.ep - 1, sent / layout.ep, link)))
    if layout.pp > 1:
        found.append(("send", layout.pp - 1, stream, _steps_s(1, stream, link)))
    return [Transfer(name, calls, bytes, calls * seconds) for name, calls, bytes, seconds in found]
