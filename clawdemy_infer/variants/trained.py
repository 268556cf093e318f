"""The trained draft: one layer that goes on from the target's own last vectors.

What the target's head reads at a token, the token's *feature*, changes more smoothly than tokens
do, so one layer can predict the next (Li et al. 2024, EAGLE):

    feature of token t-1, embedding of token t  ->  fc [2D -> D]  ->  one decoder layer
                                                ->  the target's norm  ->  feature of t
    feature of token t  ->  the target's head  ->  what may follow t

Where the target has been, its own features go in; behind that, those that the layer made itself,
which are forgotten after each round. Embedding, norm and head are the target's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F

from clawdemy_infer.arithmetic.work import Work, matmul, total
from clawdemy_infer.fast import PackedLinear
from clawdemy_infer.fast.cpp_step import CppLayers, CppStep
from clawdemy_infer.kv_cache import KVCache, Step
from clawdemy_infer.model import Decoder, Sampling
from clawdemy_infer.model.decoder import FORMATS, Layer
from clawdemy_infer.model.rope import rope_tables
from clawdemy_infer.paths import write_atomically
from clawdemy_infer.speculative.drafts import ModelDraft, Proposal, Texts

SHIPPED = Path(str(files("clawdemy_data"))) / "smollm2-135m.draft.safetensors"
"""The draft for the packaged model, made by `training.train_draft`."""


class FeatureLayer(nn.Module):
    """All that is trained: fc and one layer of the target's shape. Caches take it for a model."""

    def __init__(self, target: Decoder) -> None:
        super().__init__()
        shape = replace(target.config.shape, L=1)
        self.config, self.tokenizer = replace(target.config, shape=shape), target.tokenizer
        self.frequencies = target.frequencies
        self.fc = nn.Linear(2 * shape.D, shape.D, bias=False)
        self.layer = Layer(shape, target.config.norm_eps)
        self.in_cpp: tuple[PackedLinear, CppLayers] | None = None       # both of them

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Features of the tokens before, and embeddings of these, each [M, D] and scaled to 1 ->
        what the target's norm makes features of, [M, D]."""
        pair = torch.cat([F.rms_norm(each, each.shape[-1:]) for each in (features, embeddings)], -1)
        if self.in_cpp and self.in_cpp[1].takes(step):
            fc, layer = self.in_cpp
            return layer.run(fc(pair.float()), step)[0]
        rope = rope_tables(self.frequencies.to(self.device), step.positions, self.dtype,
                           self.config.rope_gain)
        return self.layer(self.fc(pair.to(self.dtype)), rope, step, 0)


class TrainedDraft(ModelDraft):
    """Drafts with a `FeatureLayer` trained for `target`, in C++ if that is, and with a head over
    the `vocabulary` that it was trained on: a token outside has q = 0, and comes from the residual.
    On a CPU the head is in int8: a draft may be rough, as long as q is what it was drawn from.
    Raises ValueError, at `begin`, for any other target."""

    def __init__(self, target: Decoder, layer: FeatureLayer, vocabulary: torch.Tensor) -> None:
        super().__init__(layer)
        self.target, self.vocabulary = target, vocabulary
        if isinstance(target.runner, CppStep):
            format = FORMATS[layer.dtype]
            layer.in_cpp = PackedLinear(format, layer.fc.weight), CppLayers(
                [layer.layer], target.norm, layer.config, format, layer.dtype, layer.frequencies)
        table = target.embed if target.config.shape.tied else target.head
        weight = table.weight[vocabulary].detach().float()
        on_cpu = weight.device.type == "cpu"
        self.head = PackedLinear("int8", weight) if on_cpu else lambda x: F.linear(x, weight)
        self.observed: KVCache | None = None

    def begin(self, target: Decoder, cache: KVCache, prompts: Texts) -> None:
        """Nothing is read yet: where the target has not been, there are no features."""
        if target is not self.target:
            raise ValueError("draft: it goes on from the vectors of the model that it was made "
                             "for, and this is another one")
        self.none = torch.zeros(0, target.config.shape.D, dtype=target.dtype, device=target.device)
        # The features of the last tokens, in a row, with the position of the first of them.
        self.features: dict[Hashable, tuple[int, torch.Tensor]] = dict.fromkeys(prompts,
                                                                                (0, self.none))
        self.observed, target.observer = cache, self.observe
        super().begin(target, cache, dict.fromkeys(prompts, ()))

    def join(self, sequence: Hashable) -> None:
        super().join(sequence)
        self.features[sequence] = 0, self.none

    def leave(self, sequence: Hashable) -> None:
        super().leave(sequence)
        del self.features[sequence]

    def observe(self, step: Step, x: torch.Tensor) -> None:
        """The target takes a step: keep the features of the tokens that it reads."""
        if step.cache is not self.observed:
            return
        new = self.target.norm(x).split(step.num_new_tokens)
        for sequence, past, features in zip(step.sequences, step.past, new, strict=True):
            if sequence in self.features:
                first, known = self.features[sequence]
                if first < past <= first + len(known):          # it goes on from what is known
                    past, features = first, torch.cat((known[:past - first], features))
                self.features[sequence] = past, features

    def _before(self, sequence: Hashable, past: int, count: int) -> torch.Tensor:
        """The feature before each of `count` tokens behind `past`, [count, D]; zeros for none."""
        first, known = self.features[sequence]
        start = past - 1 - first                                # of `known`
        inside = known[max(0, start):max(0, start + count)]
        before = min(count, max(0, -start))
        return F.pad(inside, (0, 0, before, count - before - len(inside)))

    def propose(self, texts: Texts, counts: Mapping[Hashable, int], sampling: Sampling,
                generator: torch.Generator) -> Proposal:
        proposal = super().propose(texts, counts, sampling, generator)
        for sequence, text in texts.items():        # what lies behind was made of our own features
            name = self.names[sequence]
            self.cache.truncate(min(len(text), self.cache.lengths[name]), name)
        return proposal

    def step_work(self, batch: int, context: int) -> Work:
        """Of a draft step of `batch` sequences: layer and fc in bf16, and the head in int8."""
        shape = self.model.config.shape
        return total("draft", [*shape.decode(batch, context).parts[:-1],
                               matmul(batch, 2 * shape.D, shape.D, "fc", "bf16", "bf16"),
                               matmul(batch, shape.D, len(self.vocabulary), "head", "int8")])

    @torch.inference_mode()
    def _step(self, new: Texts) -> torch.Tensor | None:
        """Logits [B, V] of what may follow these tokens."""
        if not new:
            return None
        step = self.cache.begin({self.names[sequence]: ids for sequence, ids in new.items()})
        parts = list(zip(new, step.past, step.num_new_tokens, strict=True))
        before = torch.cat([self._before(*part) for part in parts])                     # [M, D]
        tokens = torch.tensor([token for ids in new.values() for token in ids],
                              device=before.device)
        x = self.model(before, self.target.embed(tokens), step)
        step.commit()
        last = torch.tensor(step.num_new_tokens, device=x.device).cumsum(0) - 1
        features = self.target.norm(x[last].to(before.dtype))                           # [B, D]
        for (sequence, past, count), feature in zip(parts, features.split(1), strict=True):
            # Until the target has been there; all before has been read.
            self.features[sequence] = past + count - 1, feature
        logits = self.head(features.float())                    # [B, v], of the vocabulary
        return logits.new_full((len(new), self.model.config.shape.V), -torch.inf).index_copy_(
            1, self.vocabulary, logits)


def save_draft(file: Path, layer: FeatureLayer, vocabulary: torch.Tensor,
               about: Mapping[str, str]) -> None:
    """The layer in bf16 and the ids of its tokens; `about` says how it was made."""
    tensors = {name: weight.detach().bfloat16().contiguous()
               for name, weight in layer.state_dict().items()}
    write_atomically(file, save(tensors | {"vocabulary": vocabulary.int()}, dict(about)))


def load_draft(target: Decoder, file: Path = SHIPPED) -> TrainedDraft:
    """The draft in `file`, on the target's device. ValueError for a target of other sizes."""
    held = load_file(file, device=str(target.device))
    vocabulary, layer = held.pop("vocabulary").long(), FeatureLayer(target)
    mine, theirs = ({name: weight.shape for name, weight in tensors.items()}
                    for tensors in (layer.state_dict(), held))
    if mine != theirs or int(vocabulary.max()) >= target.config.shape.V:
        raise ValueError(f"draft: {file.name} was trained for a target of another shape than "
                         f"{target.config.shape.name}")
    layer.load_state_dict(held)
    return TrainedDraft(target, layer.to(target.device, torch.bfloat16), vocabulary)
