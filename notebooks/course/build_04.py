"""Lesson 04's build task: selective batching (Yu et al. 2022, Orca, section 3.2). Sequences that
bring different numbers of tokens go through one forward pass: all rows together through the
products, each sequence's rows alone to its own cache."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from hypothesis import strategies as st

from clawdemy_course.properties import for_all
from clawdemy_infer.fast.faster import shallow_copy
from clawdemy_infer.from_config import catalog
from clawdemy_infer.kv_cache import ContiguousCache, Step
from clawdemy_infer.kv_cache.paged import PagedStep
from clawdemy_infer.lesson.build import Task, Wrong
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.model.decoder import Layer, LogitsToKeep, wanted_rows
from clawdemy_infer.model.rope import rope_tables, rotate

# ---- what a learner's step is made of ----


class Parts:
    """The parts of a decoder that work on rows, whosever they are."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.L = decoder, decoder.config.shape.L
        self.places = self.turn = None      # RoPE's tables are the same for all layers of a step

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """The rows [M, D] of M tokens."""
        return self.decoder.embed(torch.as_tensor(tokens, device=self.decoder.device))

    def qkv(self, layer: int, x: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, ...]:
        """Norm, QKV product and RoPE of rows x [M, D]: q [M, N, H], k and v [M, K, H]."""
        decoder, part, shape = self.decoder, self.decoder.layers[layer], self.decoder.config.shape
        places = torch.as_tensor(positions, dtype=torch.float32, device=x.device)
        if places.shape != x.shape[:1]:
            raise ValueError(f"positions: {list(places.shape)}, and x has {len(x)} rows; one "
                             "position for each row is accepted")
        if self.places is None or not torch.equal(places, self.places):
            decoder.frequencies = decoder.frequencies.to(x.device)
            self.places, self.turn = places.clone(), rope_tables(
                decoder.frequencies, places, decoder.dtype, decoder.config.rope_gain)
        heads = part.qkv(part.attention_norm(x)).view(len(x), -1, shape.H)
        q, k, v = heads.split((shape.N, shape.K, shape.K), dim=1)
        if part.q_norm is not None:
            q, k = part.q_norm(q), part.k_norm(k)
        return rotate(q, *self.turn), rotate(k, *self.turn), v

    def mlp(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Output matrix and MLP, each added to x [M, D]; attended [M, N*H]."""
        part = self.decoder.layers[layer]
        x = x + part.out(attended)
        return x + part.mlp(part.mlp_norm(x))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Norm and LM head: logits [rows, V] of x [rows, D]."""
        return self.decoder.logits(self.decoder.norm(x))


class OneCache:
    """The cache of one sequence in mid-step; it had `length` tokens before. A step of that sequence
    alone does its work."""

    def __init__(self, step: Step) -> None:
        [self.length], self.step = step.past, step

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Keep k, v [T, K, H]; q [T, N, H] sees all that is kept, up to itself: [T, N*H]."""
        return self.step.attend(layer, q, k, v)


def caches_of(cache: object, new: dict[int, list[int]], window: int | None) -> list[OneCache]:
    return [OneCache(cache.begin({sequence: ids}, window)) for sequence, ids in new.items()]


class ByHand(Parts):
    """A decoder's `runner` that runs a learner's step. A step of which other rows' logits are
    wanted than each sequence's last goes the decoder's own way."""

    def __init__(self, decoder: Decoder, answer: Callable) -> None:
        super().__init__(decoder)
        self.answer, self.rows = answer, None

    def takes(self, step: Step) -> bool:
        return True

    def mlp(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        self.rows = super().mlp(layer, x, attended)     # an observer reads the last layer's
        return self.rows

    def __call__(self, tokens: torch.Tensor, step: Step,
                 logits_to_keep: LogitsToKeep) -> tuple[torch.Tensor, torch.Tensor]:
        if logits_to_keep != 1:
            return self.decoder.layer_by_layer(tokens, step, logits_to_keep)
        caches = caches_of(step.cache, step.ids, step.window)
        logits = self.answer(self, [list(ids) for ids in step.ids.values()], caches)
        return self.rows, logits


def with_step(answer: Callable) -> Callable[[Decoder], Decoder]:
    """A function that gives a copy of a decoder whose steps are a learner's `answer`. ValueError
    for layers with experts, latents or others."""
    def of(decoder: Decoder) -> Decoder:
        if any(type(layer) is not Layer for layer in decoder.layers):
            raise ValueError(f"decoder: {decoder.config.shape.name} has layers other than a "
                             "`Layer`; plain layers are accepted")
        made = shallow_copy(decoder)
        made.runner = ByHand(made, answer)
        return made
    return of


def as_it_is(decoder: Decoder) -> Decoder:
    """The library's: the decoder packs the rows, and its cache knows whose they are."""
    return decoder


# ---- a learner's step beside each sequence alone ----

V = 17


@functools.cache
def small() -> Decoder:
    """Two layers of random weights, in which each row and position is told from all others."""
    shape = replace(catalog.model("smollm2-135m"), name="small", L=2, D=16, N=4, K=2, H=4, F=24,
                    V=V, max_context=64)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        decoder = Decoder(ModelConfig(shape)).requires_grad_(False)
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5)
    return decoder


class Watched(Parts):
    """The same parts; they keep how many rows each part got, and the queries of each layer."""

    def __init__(self) -> None:
        super().__init__(small())
        self.got: list[tuple[str, int, int]] = []       # part, layer, rows
        self.queries: dict[int, torch.Tensor] = {}
        self.positions: list[int] = []
        self.problems: list[str] = []                   # of what went to the caches and came back

    def qkv(self, layer, x, positions):
        q, k, v = super().qkv(layer, x, positions)
        self.got.append(("qkv", layer, len(x)))
        self.queries[layer], self.positions = q, [int(each) for each in positions]
        return q, k, v

    def mlp(self, layer, x, attended):
        self.got.append(("mlp", layer, len(x)))
        if attended.shape != (len(x), 16):
            self.problems.append(f"mlp got {list(attended.shape)} from attention; expected [M, N·H]"
                                 f" = [{len(x)}, 16]")
            attended = x.new_zeros(len(x), 16)
        return super().mlp(layer, x, attended)

    def head(self, x):
        self.got.append(("head", 0, len(x)))
        return super().head(x)


class WatchedCache(OneCache):
    """It keeps which rows of the step came in layer 0, and goes on where their number is wrong."""

    def __init__(self, step: Step, model: Watched) -> None:
        super().__init__(step)
        self.model, self.rows, self.new = model, [], len(step.positions)

    def attend(self, layer, q, k, v):
        every = self.model.queries.get(layer, q[:0])
        if layer == 0:
            self.rows += [row for mine in q for row, each in enumerate(every)
                          if torch.equal(mine, each)]
        if len(q) == len(k) == len(v) == self.new:
            return super().attend(layer, q, k, v)
        self.model.problems.append(
            f"the cache of a sequence that brings {rows(self.new)} got {rows(len(q))} of q, "
            f"{len(k)} of k and {len(v)} of v")
        return q.new_zeros(len(q), 16)


class Trial:
    """One step of a learner over sequences with `past` tokens each, which bring `new` ones."""

    def __init__(self, answer: Callable, past: list[int], new: list[int]) -> None:
        chosen = torch.Generator().manual_seed(1)
        self.texts = [torch.randint(V, (P + T,), generator=chosen).tolist()
                      for P, T in zip(past, new, strict=True)]
        self.new = [text[P:] for text, P in zip(self.texts, past, strict=True)]
        cache = ContiguousCache.for_model(small(), len(new), 32)
        for sequence, P in enumerate(past):
            if P:
                small().step({sequence: self.texts[sequence][:P]}, cache)
        self.model = Watched()
        steps = [cache.begin({i: ids}) for i, ids in enumerate(self.new)]
        self.caches = [WatchedCache(step, self.model) for step in steps]
        self.said = f"Of sequences with {past} tokens that bring {new}"
        with torch.inference_mode():
            self.logits = answer(self.model, [list(ids) for ids in self.new], self.caches)

    @property
    def ends(self) -> list[int]:
        return list(accumulate(map(len, self.new)))

    def alone(self, length: int = 0) -> torch.Tensor:
        """Logits [B, V] of each sequence by itself, computed whole, without a cache; `length` cuts
        its new tokens."""
        return torch.stack([small()(torch.tensor([text[:len(text) - len(new) + length]
                                                  if length else text]), last_only=True)[0, 0]
                            for text, new in zip(self.texts, self.new, strict=True)])

    def check(self) -> None:
        """`Wrong` unless each sequence's logits are those that it has alone."""
        got, B = self.logits, len(self.new)
        if not isinstance(got, torch.Tensor) or got.shape != (B, V):
            shape = list(got.shape) if isinstance(got, torch.Tensor) else repr(got)[:40]
            raise Wrong(f"{self.said}, it gave {shape}; expected logits [B, V] = [{B}, {V}].")
        off = (got - self.alone()).abs().amax(1)
        if off.max() > 1e-3:
            which = int(off.argmax())
            found = torch.cdist(got[which:which + 1], self.alone())[0]
            other = int(found.argmin())
            why = f" They are those of sequence {other}." if found[other] < 1e-3 else (
                " They are those behind its first new token."
                if torch.allclose(got[which], self.alone(1)[which], atol=1e-3) else "")
            raise Wrong(f"{self.said}, the logits of sequence {which} differ by {off[which]:.2g} "
                        f"from those that it has alone.{why}")


def rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


# ---- what a step must do ----


def all_rows_pass_a_product_together(answer: Callable) -> None:
    for past, new in (([3, 5], [1, 1]), ([0, 4], [3, 1])):
        trial, M = Trial(answer, past, new), sum(new)
        for part in ("qkv", "mlp"):
            counts = [count for name, layer, count in trial.model.got if (name, layer) == (part, 1)]
            if len(counts) != 1:
                raise Wrong(f"{trial.said}, {part} of layer 1 ran {len(counts)} times. Each run "
                            "reads its weights; once for all rows is enough.")
            if counts != [M]:
                raise Wrong(f"{trial.said}, {part} got {rows(counts[0])}; the new tokens are "
                            f"{' + '.join(map(str, new))} = {M}.")


def each_row_counts_positions_in_its_own_sequence(answer: Callable) -> None:
    for past, new in (([0], [3]), ([2], [1]), ([0, 0], [2, 2]), ([4, 2], [2, 1])):
        trial = Trial(answer, past, new)
        right = [P + t for P, T in zip(past, new, strict=True) for t in range(T)]
        if trial.model.positions != right:
            raise Wrong(f"{trial.said}, the positions were {trial.model.positions}; expected "
                        f"{right}.")


def each_cache_gets_the_rows_of_its_sequence(answer: Callable) -> None:
    for past, new in (([3, 5], [1, 1]), ([0, 4], [3, 1]), ([2, 0, 6], [1, 4, 2])):
        trial = Trial(answer, past, new)
        if trial.model.problems:
            raise Wrong(f"{trial.said}, {trial.model.problems[0]}.")
        for i, (cache, end) in enumerate(zip(trial.caches, trial.ends, strict=True)):
            right = list(range(end - new[i], end))
            if cache.rows != right:
                raise Wrong(f"{trial.said}, cache {i} got the rows {cache.rows} of the step; "
                            f"expected {right}.")


def logits_come_from_the_last_row_of_each_sequence(answer: Callable) -> None:
    for past, new in (([0], [3]), ([0, 4], [3, 1]), ([5, 0], [1, 2])):
        Trial(answer, past, new).check()


def the_LM_head_gets_one_row_of_each_sequence(answer: Callable) -> None:
    trial = Trial(answer, [0, 4], [3, 1])
    got = [count for part, _, count in trial.model.got if part == "head"]
    if got != [2]:
        raise Wrong(f"{trial.said}, the LM head got {' + '.join(map(str, got))} rows; the last of "
                    "each sequence, 2 in all, is enough.")


def neighbours_do_not_matter(answer: Callable) -> None:
    """The same sequence beside another neighbour, and in another place."""
    Trial(answer, [3, 7, 1], [1, 1, 1]).check()
    Trial(answer, [7, 1], [1, 1]).check()


@for_all(examples=20, sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1,
                                     max_size=4))
def any_batch_goes_on_as_each_sequence_alone(answer: Callable, sizes: list) -> None:
    Trial(answer, [P for P, _ in sizes], [T for _, T in sizes]).check()


def smoke(answer: Callable) -> object:
    return Trial(answer, [0, 4], [3, 1]).logits


TASK = Task(
    name="selective_batching", student="my_step",
    properties=(
        all_rows_pass_a_product_together,
        each_row_counts_positions_in_its_own_sequence,
        each_cache_gets_the_rows_of_its_sequence,
        logits_come_from_the_last_row_of_each_sequence,
        the_LM_head_gets_one_row_of_each_sequence,
        neighbours_do_not_matter,
        any_batch_goes_on_as_each_sequence_alone,
    ),
    smoke=smoke, library=as_it_is, where="clawdemy_infer/model/decoder.py", adapt=with_step,
    same_interface=False,
    shown=("class Layer:", Layer.forward, Layer.attention, "class PagedStep:", PagedStep.attend,
           wanted_rows))
