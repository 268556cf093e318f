"""The trained draft: one layer that goes on from the target's own last vectors (Li et al. 2024, EAGLE).

What the target's head reads at a token, the token's *feature*, holds what the whole model made of the text so far. Features
change more smoothly from token to token than tokens do, so one layer can guess the next of them:

    feature of token t-1, embedding of token t  ->  fc [2D -> D]  ->  one decoder layer  ->  the target's norm  ->  feature of t
    feature of token t  ->  the target's head  ->  what may follow t

Where the target has been, its own features go in; behind that, those that the layer made itself. Embedding, norm and head are
the target's. What the layer keeps of its own features is forgotten after each round: the target's are better.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.arithmetic.work import Work, matmul, total
from clawdemy_infer.kv_cache import KVCache, Step
from clawdemy_infer.linear import Linear, PackedLinear
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.model.compiled import example_past, filled_up, keep, past_of, translated
from clawdemy_infer.model.decoder import Layer
from clawdemy_infer.model.loops import after_attention, before_attention, parts_of, product, stored
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.speculative.drafts import DTYPES, ModelDraft, Proposal, Texts

SHIPPED = Path(str(files("clawdemy_data"))) / "smollm2-135m.draft.safetensors"
"""The draft for the packaged model, made by `train_draft`."""


class FeatureLayer(nn.Module):
    """All that is trained: fc and one decoder layer of the target's shape. A cache is made for it as for a `Decoder`."""

    def __init__(self, target: Decoder) -> None:
        super().__init__()
        D = target.config.shape.D
        self.config = replace(target.config, shape=replace(target.config.shape, L=1))
        self.tokenizer, self.backend, self.frequencies = target.tokenizer, target.backend, target.frequencies
        self.fc = Linear(2 * D, D)
        self.layer = Layer(self.config.shape, target.config.norm_eps)
        self.compiled: CompiledLayer | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.attention_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.attention_norm.weight.device

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Features of the tokens before, and embeddings of these, each [M, D] -> what the target's norm makes features of, [M, D]."""
        if self.compiled and self.compiled.takes(step):
            return self.compiled(features, embeddings, step)
        D = features.shape[-1]
        # Each to its own scale: they are of different ones.
        pair = torch.cat((F.rms_norm(features, (D,)), F.rms_norm(embeddings, (D,))), -1).to(self.dtype)
        return self.layer(self.fc(pair), rope_tables(self.frequencies.to(self.device), step.positions, self.dtype), step, 0)


class CompiledLayer:
    """A `FeatureLayer` for a few tokens of one sequence as compiled code, behind a past in one piece: see `model.compiled`."""

    @torch.inference_mode()
    def __init__(self, layer: FeatureLayer, rows: Sequence[int]) -> None:
        shape, eps, dtype = layer.config.shape, layer.config.norm_eps, layer.dtype
        self.window, self.frequencies, self.rows, format = shape.window, layer.frequencies, rows, DTYPES[dtype]
        self.weights = stored(format, layer.fc.weight), *parts_of(layer.layer, format)

        def run(features, embeddings, rope, fc, into, out_of, past):
            x = product(fc, torch.cat([F.rms_norm(each, (shape.D,)) for each in (features, embeddings)], -1))
            q, k, v = before_attention(x, into, rope, shape.N, shape.K, eps, dtype)
            return after_attention(x, (q, k, v, *past), out_of, eps), k, v

        def code_for(M: int):
            features, embeddings = torch.zeros(M, shape.D), torch.zeros(M, shape.D)      # one tensor twice would be compiled as one
            rope = rope_tables(self.frequencies, torch.zeros(M), torch.float32)
            return translated(run, features, embeddings, rope, *self.weights, example_past(shape, dtype))
        self.code = {M: code_for(M) for M in rows}

    def takes(self, step: Step) -> bool:
        return len(step.new) == 1 and step.new[0] <= self.rows[-1] and bool(past_of(step, self.window))

    def __call__(self, features: torch.Tensor, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        M, (past,) = len(features), past_of(step, self.window)
        filled = filled_up(M, self.rows)
        rope = rope_tables(self.frequencies, step.positions[filled], torch.float32)
        x, k, v = self.code[len(filled)](features[filled].float(), embeddings[filled].float(), rope, *self.weights, past)
        keep(step, [(k, v)])
        return x[:M]


class TrainedDraft(ModelDraft):
    """Guesses with a `FeatureLayer` that was trained for `target`, and with a head over the `vocabulary` that it was trained on.

    A token outside has q = 0: it is never guessed, and comes from the residual. On a CPU the head is packed in int8: a guess may
    be rough, as long as q is what it was drawn from. A target that is compiled gets a draft that is. Raises ValueError, at `begin`,
    for any other target.
    """

    def __init__(self, target: Decoder, layer: FeatureLayer, vocabulary: torch.Tensor) -> None:
        super().__init__(layer)
        self.target, self.vocabulary = target, vocabulary
        if target.compiled_step:
            layer.compiled = CompiledLayer(layer, target.compiled_step.rows)
        weight = (target.embed if target.config.shape.tied else target.head).weight[vocabulary].detach().float()
        self.head = PackedLinear("int8", weight) if weight.device.type == "cpu" else lambda x: F.linear(x, weight)
        self.observed: KVCache | None = None

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        """Nothing is read yet: where the target has not been, there are no features."""
        if target is not self.target:
            raise ValueError("draft: it goes on from the vectors of the model that it was made for, and this is another one")
        nothing = torch.zeros(0, target.config.shape.D, dtype=target.dtype, device=target.device)
        # The features of the last tokens, in a row, with the position of the first of them.
        self.features: dict[Hashable, tuple[int, torch.Tensor]] = dict.fromkeys(prompts, (0, nothing))
        self.nothing, self.observed, target.observer = nothing, cache, self.observe
        super().begin(target, cache, dict.fromkeys(prompts, ()))

    def join(self, sequence: Hashable) -> None:
        super().join(sequence)
        self.features[sequence] = 0, self.nothing

    def leave(self, sequence: Hashable) -> None:
        super().leave(sequence)
        del self.features[sequence]

    def observe(self, step: Step, x: torch.Tensor) -> None:
        """The target takes a step: keep the features of the tokens that it reads."""
        if step.cache is self.observed:
            for sequence, past, features in zip(step.sequences, step.past, self.target.norm(x).split(step.new), strict=True):
                if sequence in self.features:
                    first, known = self.features[sequence]
                    if first < past <= first + len(known):              # it goes on from what is known
                        self.features[sequence] = first, torch.cat((known[:past - first], features))
                    else:
                        self.features[sequence] = past, features

    def _before(self, sequence: Hashable, past: int, count: int) -> torch.Tensor:
        """The feature before each of `count` tokens behind `past`: [count, D], zeros where there is none."""
        first, known = self.features[sequence]
        begin, end = past - 1 - first, past - 1 - first + count
        if 0 <= begin and end <= len(known):
            return known[begin:end]
        rows = known.new_zeros(count, known.shape[1])
        rows[max(0, -begin):max(0, len(known) - begin)] = known[max(0, begin):max(0, end)]
        return rows

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling, generator: torch.Generator) -> Proposal:
        proposal = super().propose(texts, counts, sampling, generator)
        for sequence, text in texts.items():            # what lies behind was made of the draft's own features
            place = self.places[sequence]
            self.cache.truncate(min(len(text), self.cache.lengths[place]), place)
        return proposal

    def step_work(self, batch: int, context: int) -> Work:
        """What a guess costs for each of `batch` sequences: layer and fc in bf16, and a head over the vocabulary in int8."""
        shape = self.model.config.shape
        fc = matmul(batch, 2 * shape.D, shape.D, "fc", "bf16", "bf16")
        return total("draft", [*shape.decode(batch, context).parts[:-1], fc, matmul(batch, shape.D, len(self.vocabulary), "head", "int8")])

    @torch.inference_mode()
    def _step(self, new: Texts) -> torch.Tensor | None:
        """Logits [B, V] of what may follow these tokens."""
        if not new:
            return None
        step = self.cache.begin({self.places[sequence]: ids for sequence, ids in new.items()})
        parts = list(zip(new, step.past, step.new, strict=True))
        before = torch.cat([self._before(sequence, past, count) for sequence, past, count in parts])                # [M, D]
        tokens = torch.tensor([token for ids in new.values() for token in ids], device=before.device)
        x = self.model(before, self.target.embed(tokens), step)
        features = self.target.norm(x[torch.tensor(step.new, device=x.device).cumsum(0) - 1].to(before.dtype))      # [B, D]
        step.commit()
        for (sequence, past, count), feature in zip(parts, features.split(1), strict=True):
            self.features[sequence] = past + count - 1, feature         # until the target has been there; all before has been read
        logits = self.head(features.float())                                                                        # [B, v]
        return logits.new_full((len(new), self.model.config.shape.V), -torch.inf).index_copy_(1, self.vocabulary, logits)


def save_draft(file: Path, layer: FeatureLayer, vocabulary: torch.Tensor, about: Mapping[str, str]) -> None:
    """The layer in bf16 and the ids of its tokens; `about` says how it was made. Written beside and then renamed: never half a file."""
    part = file.with_suffix(".part")
    tensors = {name: weight.detach().bfloat16().contiguous() for name, weight in layer.state_dict().items()}
    save_file(tensors | {"vocabulary": vocabulary.int()}, part, dict(about))
    part.rename(file)


def load_draft(target: Decoder, file: Path = SHIPPED) -> TrainedDraft:
    """The draft in `file`, on the target's device. Raises ValueError where it was made for a target of other sizes."""
    held = load_file(file, device=str(target.device))
    vocabulary, layer = held.pop("vocabulary").long(), FeatureLayer(target)
    mine, theirs = ({name: weight.shape for name, weight in each.items()} for each in (layer.state_dict(), held))
    if mine != theirs or int(vocabulary.max()) >= target.config.shape.V:
        raise ValueError(f"draft: {file.name} was trained for a target of another shape than {target.config.shape.name}")
    layer.load_state_dict(held)
    return TrainedDraft(target, layer.to(target.device, torch.bfloat16), vocabulary)
