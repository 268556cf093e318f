"""Lesson 02's build task: the KV cache of one sequence. And what a cache that grows by `torch.cat`
looks like, whose price the lesson measures."""

import torch
from hypothesis import strategies as st

from clawdemy_course.properties import for_all
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.kv_cache.contiguous import RectangularCache
from clawdemy_infer.lesson.build import Task, Wrong

K, H = 2, 3                                             # two KV heads of three numbers


# ---- a learner's cache beside plain lists ----


class Beside:
    """A learner's cache beside a list of token numbers for each layer, the oracle.

    Token t is appended to layer l with keys that begin with 100 l + t, and with values that are the
    keys' negatives unless `alike`. `done` tells in words what was done.
    """

    def __init__(self, answer: type, layers: int = 1, capacity: int = 16,
                 alike: bool = False) -> None:
        self.cache, self.alike = answer(layers, K, H, capacity), alike
        self.kept: list[list[int]] = [[] for _ in range(layers)]
        self.met = set()                                # layers that were ever appended to
        self.new, self.done = 1, []

    def pair(self, layer: int, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [K, T, H] of these tokens in this layer."""
        first = 100.0 * layer + torch.tensor(tokens, dtype=torch.float32)
        k = first[:, None] + torch.arange(K)[:, None, None] / 4 + torch.arange(H) / 64
        return k, k.clone() if self.alike else -k

    def append(self, T: int, layers: tuple[int, ...] = ()) -> None:
        """Append T new tokens to each of `layers`, by default to all."""
        tokens = list(range(self.new, self.new + T))
        self.new += T
        for layer in layers or range(len(self.kept)):
            self.cache.append(layer, *self.pair(layer, tokens))
            self.kept[layer] += tokens
            self.met.add(layer)
        where = f" to layer {layers[0]}" if layers else ""
        self.done.append(f"appending {of(T, 'token')}{where}")

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)
        self.kept = [tokens[:length] for tokens in self.kept]
        self.done.append(f"truncate({length})")

    def check(self) -> None:
        """`Wrong` unless each layer that was ever appended to reads as the lists say."""
        for layer in sorted(self.met):
            tokens = self.kept[layer]
            got = self.cache.read(layer)
            if not (isinstance(got, tuple | list) and len(got) == 2
                    and all(isinstance(each, torch.Tensor) for each in got)):
                raise Wrong(f"read({layer}) gave {got!r:.40}; expected two tensors, keys and "
                            "values.")
            for name, ours, theirs in zip(("keys", "values"), got, self.pair(layer, tokens),
                                          strict=True):
                self.compare(f"After {', then '.join(self.done)}", f"read({layer})", name, ours,
                             theirs)

    def compare(self, after: str, read: str, name: str, ours: torch.Tensor,
                theirs: torch.Tensor) -> None:
        if ours.shape != theirs.shape:
            alike = ours.ndim == 3 and (ours.shape[0], ours.shape[2]) == (K, H)
            got, asked = ((of(ours.shape[1], "token"), f"{theirs.shape[1]}") if alike else
                          (f"the shape {list(ours.shape)}", f"[K, S, H] = {list(theirs.shape)}"))
            raise Wrong(f"{after}, {read} gave {name} of {got}; expected {asked}.")
        if ours.dtype != theirs.dtype:
            raise Wrong(f"{after}, {read} gave {name} of dtype {ours.dtype}; expected "
                        f"{theirs.dtype}, as appended.")
        wrong = (ours != theirs).transpose(0, 1).nonzero()      # token, head, number
        if len(wrong):
            at, head, number = wrong[0].tolist()
            found, appended = float(ours[head, at, number]), float(theirs[head, at, number])
            place = "begin with" if head == number == 0 else f"at [{head}, {at}, {number}] are"
            near = abs(found - appended) < 0.02 * abs(appended)
            raise Wrong(f"{after}, the {name} of token {at + 1} in {read} {place} {found:.7g}; "
                        f"{appended:.7g} was appended."
                        + " Is a dtype with fewer bits in between?" * near)


def of(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


# ---- what a cache must do ----


def append_then_read_returns_what_was_appended(answer: type) -> None:
    for chunks in ((1,), (2,), (1, 1), (3, 1, 2)):
        both = Beside(answer, alike=True)
        for T in chunks:
            both.append(T)
        both.check()


def keys_are_read_as_keys_and_values_as_values(answer: type) -> None:
    both = Beside(answer)
    both.append(1)
    both.check()


def each_layer_keeps_its_own(answer: type) -> None:
    both = Beside(answer, layers=2)
    both.append(1, (0,))
    both.check()
    both.append(2, (1,))
    both.check()
    both.append(1)
    both.check()


@for_all(T=st.integers(1, 5))
def a_chunk_is_the_same_as_one_token_after_another(answer: type, T: int) -> None:
    chunk, single = Beside(answer), Beside(answer)
    chunk.append(T)
    for _ in range(T):
        single.append(1)
    for name, ours, theirs in zip(("keys", "values"), chunk.cache.read(0), single.cache.read(0),
                                  strict=True):
        chunk.compare(f"After a chunk of {of(T, 'token')}", "read(0)", name, ours, theirs)


def truncate_forgets_in_every_layer_and_the_next_append_follows_on(answer: type) -> None:
    _cut(answer, 1, more=2)


def truncate_beyond_the_length_changes_nothing(answer: type) -> None:
    _cut(answer, 5, more=1)


def _cut(answer: type, length: int, more: int) -> None:
    """Keep 3 tokens, truncate to `length`, append `more`."""
    both = Beside(answer, layers=2)
    both.append(3)
    both.truncate(length)
    both.check()
    both.append(more)
    both.check()


def a_full_cache_refuses_with_ValueError_and_stays_as_it_was(answer: type) -> None:
    for kept, more in ((3, 1), (2, 2)):
        both = Beside(answer, layers=2, capacity=3)
        _fits(both, kept)
        for layer in range(2):
            try:
                both.cache.append(layer, *both.pair(layer, list(range(more))))
            except ValueError:
                continue
            raise Wrong(f"Of capacity 3, with {of(kept, 'token')} kept, append took {more} more.")
        both.done.append(f"a refused append of {of(more, 'token')}")
        both.check()
        if kept < 3:
            _fits(both, 3 - kept)                       # the last that fits
            both.check()


def _fits(both: Beside, T: int) -> None:
    """Append T tokens that fill a cache of capacity 3 exactly, or in part."""
    kept = len(both.kept[0])
    try:
        both.append(T)
    except ValueError as error:
        raise Wrong(f"Of capacity 3, with {of(kept, 'token')} kept, append refused {T} more, which "
                    "fits.") from error


def tensors_of_the_caller_may_be_written_over(answer: type) -> None:
    both = Beside(answer)
    for tokens in ([1, 2], [3]):                        # from the first append on
        k, v = both.pair(0, tokens)
        both.cache.append(0, k, v)
        both.kept[0] += tokens
        both.met.add(0)
        k.zero_(), v.zero_()
        both.done.append(f"appending {of(len(tokens), 'token')} and setting k and v to 0")
        both.check()


def two_caches_know_nothing_of_each_other(answer: type) -> None:
    one, other = Beside(answer), Beside(answer)
    one.append(2)
    other.done.append("appending 2 tokens to another cache")
    other.append(1)
    other.check()
    one.done.append("appending 1 token to another cache")
    one.check()


@for_all(steps=st.lists(st.integers(-3, 3).filter(bool), max_size=8))
def any_order_of_appends_and_truncates_reads_like_a_list(answer: type, steps: list[int]) -> None:
    both = Beside(answer, layers=2, capacity=24)
    for step in steps:                                  # 2: append two; -2: forget the last two
        if step > 0:
            both.append(step)
        elif both.met:
            both.truncate(max(0, len(both.kept[0]) + step))
        both.check()


def _smoke(answer: type) -> list:
    cache, one = answer(1, 1, 1, 2), torch.ones(1, 1, 1)
    return [cache.append(0, one, one.clone()), cache.read(0), cache.truncate(0)]


# ---- what a decoder asks of it ----


class OneSequence(RectangularCache):
    """What a decoder asks of a cache, made of a learner's `append`, `read` and `truncate`: a cache
    of the one sequence 0, in fp32. ValueError for another batch or dtype."""

    kind: type                                          # the learner's

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int,
                 device: torch.device | str = "cpu") -> None:
        super().__init__(1, capacity, torch.float32, device)
        self.sizes = layers, kv_heads, head_dim, capacity
        self.empty()

    def empty(self) -> None:
        """A new cache of the learner's, where its `torch.zeros` belong."""
        with torch.device(self.device):
            self.kept = self.kind(*self.sizes)

    @classmethod
    def for_model(cls, model, batch: int, capacity: int) -> "OneSequence":
        """An empty cache in the shape and place of `model`, a `Decoder` that computes in fp32."""
        if batch != 1 or model.dtype != torch.float32:
            raise ValueError(f"batch={batch}, {model.dtype}: one sequence in fp32 is accepted")
        shape = model.config.shape
        return cls(shape.L, shape.K, shape.H, capacity, model.device)

    def begin(self, new, window=None):
        step = super().begin(new, window)               # refuses what does not fit
        if self.length:
            self.kept.truncate(self.length)             # what was cut off, or an interrupted step's
        else:
            self.empty()                                # what was never appended to need not cut
        return step

    def write(self, layer: int, part, k: torch.Tensor, v: torch.Tensor) -> None:
        self.kept.append(layer, k.transpose(0, 1), v.transpose(0, 1))   # [T, K, H] -> [K, T, H]

    def read(self, layer: int, part) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.kept.read(layer)                    # [K, S, H] each
        return k[None, :, part.begin:], v[None, :, part.begin:]


def adapt(answer: type) -> type:
    """A cache that a decoder runs with, whose keys and values an `answer` keeps."""
    return type(answer.__name__, (OneSequence,), {"kind": answer})


class CatCache:
    """The cache that grows: `torch.cat` makes a new tensor for each append, and copies all that was
    kept before into it. Keys and values [K, S, H] of each layer."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int) -> None:
        self.capacity = capacity
        self.kept = [torch.zeros(2, kv_heads, 0, head_dim) for _ in range(layers)]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        grown = torch.cat([self.kept[layer], torch.stack((k, v))], dim=2)
        if grown.shape[2] > self.capacity:
            raise ValueError(f"capacity={self.capacity}: {grown.shape[2]} tokens do not fit")
        self.kept[layer] = grown

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.kept[layer]
        return k, v

    def truncate(self, length: int) -> None:
        self.kept = [each[:, :, :length] for each in self.kept]


TASK = Task(
    name="KVCache", student="MyCache",
    properties=(
        append_then_read_returns_what_was_appended,
        keys_are_read_as_keys_and_values_as_values,
        each_layer_keeps_its_own,
        a_chunk_is_the_same_as_one_token_after_another,
        truncate_forgets_in_every_layer_and_the_next_append_follows_on,
        truncate_beyond_the_length_changes_nothing,
        a_full_cache_refuses_with_ValueError_and_stays_as_it_was,
        tensors_of_the_caller_may_be_written_over,
        two_caches_know_nothing_of_each_other,
        any_order_of_appends_and_truncates_reads_like_a_list,
    ),
    smoke=_smoke, library=ContiguousCache, where="clawdemy_infer/kv_cache/contiguous.py",
    adapt=adapt, same_interface=False, shown=(ContiguousCache,))
