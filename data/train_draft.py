"""Train a draft like the shipped one: the target writes, and a layer learns to guess its vectors.

    python -m clawdemy_data.train_draft --tokens 150000 --out draft.safetensors
"""

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from clawdemy_data.draft_samples import Sample, write_samples
from clawdemy_infer.attention import attend
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.files.load import DEFAULT_MODEL, PACKAGED
from clawdemy_infer.model import Decoder
from clawdemy_infer.variants.trained import FeatureLayer, save_draft

VOCABULARY, BATCH_TOKENS = 8192, 1024
"""Tokens that the draft can say, the most frequent of the samples; tokens learnt from at once."""
SAMPLED_SOFTMAX_TOKENS = 1024
"""Tokens under the cross-entropy: as many of the most frequent, those of the batch, and as many
others at random, which stand for all that were not drawn (Jean et al. 2015)."""
SELF_FEATURE_SHARE = 0.3
"""Share of features that are the layer's own, as after a first guess (HASS, Zhang et al. 2024)."""


class WholeTexts:
    """In the place of a `Step`: B whole texts of T tokens, uncached, so that gradients flow."""

    def __init__(self, B: int, T: int) -> None:
        self.B, self.positions = B, torch.arange(T, dtype=torch.float32).repeat(B)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.unflatten(0, (self.B, -1)).transpose(1, 2) for x in (k, v))
        return attend(q, k, v)


def batches(samples: Sequence[Sample], chance: random.Random) -> list[list[Sample]]:
    """All samples, in batches of like lengths, in a random order."""
    made: list[list[Sample]] = [[]]
    for sample in sorted(samples, key=lambda sample: (len(sample.tokens), chance.random())):
        if made[-1] and (len(made[-1]) + 1) * len(sample.tokens) > BATCH_TOKENS:
            made.append([])
        made[-1].append(sample)
    chance.shuffle(made)
    return made


def linear_guess(layer: FeatureLayer, target: Decoder, samples: Sequence[Sample]) -> None:
    """Begin with the best linear guess by least squares, to which the layer adds nothing yet."""
    D = target.config.shape.D
    gram, right = torch.zeros(2 * D, 2 * D), torch.zeros(2 * D, D)
    for sample in samples:
        features, embeddings = sample.features.float(), target.embed(sample.tokens[1:])
        pair = torch.cat([F.rms_norm(x, (D,)) for x in (features[:-1], embeddings)], -1)
        gram += pair.T @ pair
        right += pair.T @ (features[1:] / target.norm.weight)   # a vector of length √D
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(2 * D)
    layer.fc.weight.copy_(torch.linalg.solve(gram + ridge, right).T)
    layer.layer.out.weight.zero_()
    layer.layer.down.weight.zero_()


def loss_of(layer: FeatureLayer, target: Decoder, head: torch.Tensor, batch: Sequence[Sample],
            own: float, weight: torch.Tensor | float = 0.0) -> tuple[torch.Tensor, float]:
    """Cross-entropy against the target's distribution and distance of features; and the α of
    sampling, Σ min(p, q), over the vocabulary of `head` [v, D]. `own` is the share of the layer's
    own features, `weight` [v] the logarithm of how many tokens each stands for."""
    lengths = torch.tensor([len(sample.tokens) for sample in batch])
    tokens, features = (pad_sequence(list(each), batch_first=True) for each in zip(
        *((sample.tokens, sample.features.float()) for sample in batch), strict=True))
    (B, T), embeddings = tokens.shape, target.embed(tokens).flatten(0, 1)
    there = torch.arange(T) < lengths[:, None]                                          # [B, T]

    def forward(theirs: torch.Tensor) -> torch.Tensor:                                  # [B, T, D]
        before = torch.cat((torch.zeros_like(theirs[:, :1]), theirs[:, :-1]), 1).flatten(0, 1)
        return target.norm(layer(before, embeddings, WholeTexts(B, T))).view(B, T, -1)

    mixed = features
    if own:
        with torch.no_grad():
            mixed = torch.where(torch.rand(B, T, 1) < own, forward(features), features)
    guessed, features = forward(mixed)[there], features[there]                          # [M, D]
    p = ((features @ head.T).float() + weight).softmax(-1)                              # [M, v]
    q = (guessed @ head.T).float() + weight
    loss = F.cross_entropy(q, p) + F.smooth_l1_loss(guessed, features)
    with torch.no_grad():
        return loss, float(torch.minimum(p, q.softmax(-1)).sum(-1).mean())


def make(target: Decoder, out: Path, tokens: int = 150_000, steps: int = 3000, seed: int = 0,
         rate: float = 5e-4) -> None:
    """Have `target` write, train a draft for it by `steps` batches of AdamW (Loshchilov and Hutter
    2019) at a rate that falls to 0, and save it as `out`. ValueError for too few `tokens`."""
    # 1. Texts, every twenty-fifth of them to judge by, and the tokens that come most often.
    texts = write_samples(faster(target, "bf16"), tokens, seed)
    samples, judges = [text for i, text in enumerate(texts) if i % 25], texts[::25][:20]
    if not samples:
        raise ValueError(f"tokens={tokens}: they make one text, by which the draft is judged; more "
                         "are needed to learn from")
    counts = torch.bincount(torch.cat([sample.tokens for sample in samples]),
                            minlength=target.config.shape.V)
    # stable: of equals the lower, the older merge
    vocabulary = counts.argsort(descending=True, stable=True)[:VOCABULARY].sort().values
    frequent = counts.argsort(descending=True)[:SAMPLED_SOFTMAX_TOKENS]
    # 2. The layer as it begins. fc begins near where it will end.
    target.requires_grad_(False)
    layer = FeatureLayer(target).requires_grad_(False)
    linear_guess(layer, target, samples)
    optimizer = torch.optim.AdamW(
        [{"params": [weight.requires_grad_()], "pace": 0.2 if name == "fc.weight" else 1.0}
         for name, weight in layer.named_parameters() if weight.dim() == 2],
        betas=(0.9, 0.95), weight_decay=0.01)
    # 3. Steps.
    head = (target.embed if target.config.shape.tied else target.head).weight
    chance, queue = random.Random(seed), []
    torch.manual_seed(seed)
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for at in bar:
            queue = queue or batches(samples, chance)
            batch = queue.pop()
            present = torch.cat([frequent, *(sample.tokens for sample in batch)]).unique()
            present = present[torch.isin(present, vocabulary)]
            others = vocabulary[~torch.isin(vocabulary, present)]
            drawn = others[torch.randperm(len(others))[:SAMPLED_SOFTMAX_TOKENS]]
            weight = torch.zeros(len(present) + len(drawn))
            weight[len(present):] = math.log(len(others) / max(1, len(drawn)))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["pace"] * min(1, (at + 1) / 20) * (1 - at / steps)
            with torch.autocast(target.device.type, torch.bfloat16):
                loss, alpha = loss_of(layer, target, head[torch.cat((present, drawn))], batch,
                                      SELF_FEATURE_SHARE, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", alpha=f"{alpha:.3f}")
    # 4. α at the first drafted token, over texts that were not learnt from; and the file.
    with torch.no_grad():
        alphas = [loss_of(layer, target, head[vocabulary], [text], 0.0)[1] * len(text.tokens)
                  for text in judges]
    alpha = sum(alphas) / sum(len(text.tokens) for text in judges)
    name = target.config.shape.name
    options = f"--tokens {tokens} --steps {steps} --rate {rate} --seed {seed} --out {out.name}"
    save_draft(out, layer, vocabulary, {
        "command": f"python -m clawdemy_data.train_draft {options}", "target": name,
        "target_sha256": PACKAGED[name][2] if name in PACKAGED else "", "batch": str(BATCH_TOKENS),
        "tokens": str(int(counts.sum())), "steps": str(steps), "rate": str(rate),
        "seed": str(seed), "alpha": f"{alpha:.3f}"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a draft for a model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="as for `generate`")
    parser.add_argument("--out", type=Path, required=True, help="the draft's .safetensors")
    for name, default in (("tokens", 150_000), ("steps", 3000), ("seed", 0), ("rate", 5e-4)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    settings = vars(parser.parse_args(arguments))
    make(load_model(settings.pop("model")), **settings)


if __name__ == "__main__":
    main()
